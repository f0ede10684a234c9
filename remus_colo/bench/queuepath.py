# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's output through NFQUEUE, end to end: our path against a bare NetfilterQueue callback that accepts
everything.

Datagrams go from a guest's namespace through bridge and queue to a client's.  What holds them is in turn
nothing, the bare callback, and ours, which lets a packet go when the SVM's copy of it has come over another
link, too.  All take turns in one run, some rounds; figures are medians of the rounds, ratios are those of
each round.

* Rate: as fast as they come through, with a few hundred on their way.
* Latency: one at a time, at half the rate that the bare callback reached.  Only what holding adds is compared: the
  latency minus that without a queue.

Sender and holder each have a processor.  Both run in the real-time class if that is allowed, so that what else the
machine does counts less.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from remus_colo.bench.queuepath_network import COPY, VIF, Network
from remus_colo.errors import HostError, RemusError
from remus_colo.testbed import netns

log = logging.getLogger(__name__)

FORMS = ("none", "bare", "colo")
SIZES = (64, 512, 1400)  # bytes of payload
FLOWS = 64
WINDOW = 256  # datagrams on their way, in measuring the rate
QUEUE = 1
REALTIME_PRIORITY = 10
TIMEOUT_S = 60.0


class QueueBench:
    """:param rounds: of each measurement.
    :param seconds: of each round.
    """

    def __init__(self, network: Network, traffic: Path, rounds: int, seconds: float) -> None:
        self._rounds, self._seconds = rounds, seconds
        self._traffic_program = traffic
        self._host = network.name("host")
        self._sockets = [network.receiver(), *(network.sender(number) for number in range(FLOWS))]
        cpus = sorted(os.sched_getaffinity(0))
        self._cpus = (cpus[0], cpus[-1])
        self.realtime = _may_be_realtime()

    def measure(self, size: int) -> dict[str, Any]:
        """All forms with datagrams of ``size`` bytes."""
        rates = self._rounds_of("rate", size, {form: float(WINDOW) for form in FORMS})
        half = statistics.median(found["per_second"] for found in rates["bare"]) / 2
        times = self._rounds_of("latency", size, {form: half for form in FORMS})
        figures: dict[str, Any] = {"bytes": size, "latency_at_per_second": round(half)}
        for form in FORMS:
            figures[form] = {
                "per_second": _median(rates[form], "per_second"),
                "cpu_us_per_packet": _median(rates[form], "cpu_us"),
                **{f"{name}_us": _median(times[form], name) for name in ("p50", "p99")},
                "cpu_us_per_packet_at_half": _median(times[form], "cpu_us"),
                "lost": sum(found["lost"] for found in rates[form] + times[form]),
            }
        for name in ("p50", "p99"):
            for form in ("bare", "colo"):
                added = [
                    found[name] - none[name] for found, none in zip(times[form], times["none"], strict=True)
                ]
                figures[form][f"added_{name}_us"] = round(statistics.median(added), 2)
            figures[f"added_{name}_ratio"] = _ratio(times["colo"], times["bare"], name, times["none"])
        figures["rate_ratio"] = _ratio(rates["colo"], rates["bare"], "per_second")
        return figures

    def _rounds_of(
        self, mode: str, size: int, arguments: dict[str, float]
    ) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {form: [] for form in arguments}
        for _ in range(self._rounds):
            for form, argument in arguments.items():
                with self._holding(form) as holder:
                    before_s = _cpu_s(holder)
                    result = self._traffic(mode, size, argument)
                    result["cpu_us"] = (_cpu_s(holder) - before_s) / result["received"] * 1e6
                found[form].append(result)
        return found

    def _traffic(self, mode: str, size: int, argument: float) -> dict[str, Any]:
        with contextlib.suppress(BlockingIOError):
            while True:  # what was late for the round before
                self._sockets[0].recv(1, socket.MSG_DONTWAIT)
        descriptors = [sock.fileno() for sock in self._sockets]
        done = subprocess.run(
            [
                self._traffic_program,
                mode,
                str(size),
                str(self._seconds),
                str(round(argument)),
                *map(str, descriptors),
            ],
            pass_fds=descriptors,
            preexec_fn=self._on(self._cpus[0]),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            raise HostError(done.stderr.strip() or "the traffic's program ended without a word")
        found: dict[str, Any] = json.loads(done.stdout)
        if mode == "rate":
            found["per_second"] = found["received"] / found["ns"] * 1e9
        else:
            found["lost"] = found["sent"] - found["received"]
            found |= {name: found[name] / 1000 for name in ("p50", "p99")}
        return found

    @contextlib.contextmanager
    def _holding(self, form: str) -> Iterator[int | None]:
        """The process that holds what the guest sends: its pid."""
        if form == "none":
            yield None
            return
        with netns.entered(self._host):
            holder = subprocess.Popen(
                [sys.executable, "-m", "remus_colo.bench.queuepath_worker", form, str(QUEUE), VIF, COPY],
                stdout=subprocess.PIPE,
                text=True,
                preexec_fn=self._on(self._cpus[1]),
            )
        assert holder.stdout is not None
        try:
            if holder.stdout.readline() != "ready\n":
                raise HostError(f"what holds the packets ({form}) did not start: see above")
            yield holder.pid
        finally:
            holder.send_signal(signal.SIGTERM)
            text, _ = holder.communicate(timeout=TIMEOUT_S)
        _check(form, json.loads(text))

    def _on(self, cpu: int) -> Callable[[], None]:
        """To be called in the new process."""

        def prepare() -> None:
            os.sched_setaffinity(0, {cpu})
            if self.realtime:
                os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(REALTIME_PRIORITY))

        return prepare


def run(*, quick: bool = False, sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    """Measure, with a line of the log for each size.

    :raise RemusError: this machine lacks something.
    """
    rounds, seconds = (3, 0.2) if quick else (9, 0.3)
    found = []
    with tempfile.TemporaryDirectory(prefix="remus-bench-") as scratch:
        program = _compile(Path(scratch))
        network = Network()
        try:
            bench = QueueBench(network, program, rounds, seconds)
            for size in sizes:
                found.append(figures := bench.measure(size))
                log.info("nfqueue: %s", _line(figures))
        finally:
            network.close()
    return {
        "rounds": rounds,
        "seconds": seconds,
        "flows": FLOWS,
        "window": WINDOW,
        "realtime": bench.realtime,
        "sizes": found,
    }


def _line(figures: dict[str, Any]) -> str:
    bare, colo = figures["bare"], figures["colo"]
    return (
        f"{figures['bytes']} bytes: {colo['per_second']:.0f} packets/s against {bare['per_second']:.0f}"
        f" (ratio {figures['rate_ratio']:.2f}), CPU {colo['cpu_us_per_packet']:.2f} against"
        f" {bare['cpu_us_per_packet']:.2f} us; at {figures['latency_at_per_second']} packets/s adds p50"
        f" {colo['added_p50_us']:.1f} against {bare['added_p50_us']:.1f} us (ratio {figures['added_p50_ratio']:.2f}), p99"
        f" {colo['added_p99_us']:.1f} against {bare['added_p99_us']:.1f} us (ratio {figures['added_p99_ratio']:.2f})"
    )


def _check(form: str, told: dict[str, Any]) -> None:
    """What diverged or was lost would make the figures worthless.

    :raise RemusError: that happened.
    """
    if form == "colo" and (
        told["requests"] or told["counters"]["queue_lost"] or told["counters"]["secondary_lost"]
    ):
        raise RemusError(f"the bench's own traffic asked for a checkpoint: {told}")


def _median(found: list[dict[str, Any]], name: str) -> float:
    return round(float(statistics.median(one[name] for one in found)), 2)


def _ratio(
    ours: list[dict[str, Any]],
    theirs: list[dict[str, Any]],
    name: str,
    base: list[dict[str, Any]] | None = None,
) -> float:
    """Median of the rounds' ratios."""
    ratios = [
        (our[name] - (base[number][name] if base else 0))
        / (their[name] - (base[number][name] if base else 0))
        for number, (our, their) in enumerate(zip(ours, theirs, strict=True))
    ]
    return round(float(statistics.median(ratios)), 3)


def _cpu_s(pid: int | None) -> float:
    """CPU time of a process so far, the kernel's work for it included."""
    # Its clock by number: CPUCLOCK_SCHED of the whole process (include/linux/posix-timers.h).
    return 0.0 if pid is None else time.clock_gettime(~pid << 3 | 2)


def _may_be_realtime() -> bool:
    try:
        policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(REALTIME_PRIORITY))
        os.sched_setscheduler(0, policy, priority)
    except PermissionError:
        return False
    return True


def _compile(directory: Path) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise HostError("there is no C compiler for the traffic's program: install gcc")
    program = directory / "traffic"
    source = Path(__file__).with_name("traffic.c")
    done = subprocess.run(
        [compiler, "-O2", "-Wall", "-o", program, source],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise HostError(f"the traffic's program cannot be compiled: {done.stderr.strip().splitlines()[0]}")
    return program
