# SPDX-License-Identifier: LGPL-2.1-or-later
"""The comparator beside QEMU's colo-compare: packets per second of CPU time, in one run, fed with the same frames.

Both are processes of their own that read the PVM's and the SVM's frames from two stream sockets and write to
a third what may leave, each frame behind its length; QEMU's is the object of Debian's package, on
``-machine none``.  A feeder here sends batches small enough for QEMU's queues, which drop what is beyond 1024
packets of one connection, and waits for each batch to come out, so neither loses a packet.  Measured is the
CPU time of the process (all its threads, user and system), which depends little on what else the machine
does.  All take turns; figures and ratios are medians over the turns.
"""

from __future__ import annotations

import logging
import shutil
import socket
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from remus_colo.errors import HostError

log = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parent / "_native"
QEMU = "qemu-system-x86_64"

SIZES = (64, 512, 1400)  # bytes of a frame, from the Ethernet header on
FLOWS = (1, 100, 10000)
BATCH_PACKETS = 256
# Less than a socket's buffer: what is sent must not wait for what is not read yet.
BATCH_BYTES = 128 << 10
TURNS = 9
START_TIMEOUT_S = 20.0
ROLES = ("pri", "sec", "out")
NAMES = ("remus_colo", "QEMU")
BATCH_TIMEOUT_S = 30.0
_HEADERS = 54  # Ethernet, IPv4, TCP


def frames(flows: int, size: int, batch: int, start: int) -> bytes:
    """The ``batch`` next frames from number ``start`` on: TCP data, each flow in its turn, as they go over
    the socket.
    """
    out = bytearray()
    data = size - _HEADERS
    for number in range(start, start + batch):
        flow, position = number % flows, number // flows
        payload = (b"%016x" % number * (data // 16 + 1))[:data]
        out += struct.pack(">I", size) + b"\x02\0\0\0\0\1\x02\0\0\0\0\2\x08\0"
        out += struct.pack(">BBHHHBBH", 0x45, 0, size - 14, number & 0xFFFF, 0x4000, 64, 6, 0)
        out += b"\x0a\0\0\1" + struct.pack(">I", 0x0A010000 + flow // 50000)
        out += struct.pack(">HHIIBBHHH", 80, 10000 + flow % 50000, (1000 + position * data) & 0xFFFFFFFF, 77, 0x50, 0x18,
                           1000, 0, 0) + payload  # fmt: skip
    return bytes(out)


class Subject:
    """A process under test and the sockets to it, which it connects to: then none of them loses what is sent early.

    :raise HostError: it does not start.
    """

    def __init__(self, name: str, command: list[str], directory: Path) -> None:
        self.name = name
        self.sockets: list[socket.socket] = []
        with ExitStack() as listening:
            listeners = []
            for role in ROLES:
                listener = listening.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                listener.bind(str(directory / role))
                listener.listen(1)
                listener.settimeout(START_TIMEOUT_S)
                listeners.append(listener)
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            try:
                for listener in listeners:
                    sock, _ = listener.accept()
                    sock.settimeout(BATCH_TIMEOUT_S)
                    self.sockets.append(sock)
            except OSError as error:
                self.process.kill()
                said = self._said()
                self.close()
                raise HostError(f"{name} did not start: {said}") from error

    def _said(self) -> str:
        assert self.process.stderr is not None
        said = self.process.stderr.read().decode(errors="replace").strip()
        return said or f"it said nothing and ended with status {self.process.wait()}"

    def cpu_s(self) -> float:
        """CPU time of all its threads so far: the process's CPU clock, as clock_getcpuclockid(3) computes its
        number.
        """
        return time.clock_gettime((~self.process.pid << 3) | 2)

    def pump(self, batches: list[bytes]) -> None:
        """Have every frame of ``batches`` compared.

        :raise HostError: frames do not come out.
        """
        primary, secondary, out = self.sockets
        for number, batch in enumerate(batches):
            first, second = (primary, secondary) if number % 2 else (secondary, primary)
            first.sendall(batch)
            second.sendall(batch)
            left = len(batch)
            while left:
                try:
                    got = len(out.recv(left))
                except TimeoutError as error:
                    raise HostError(f"{self.name} kept {left} of {len(batch)} bytes") from error
                if not got:
                    raise HostError(f"{self.name} has ended: {self._said()}")
                left -= got

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        self.process.kill()
        self.process.wait()
        if self.process.stderr is not None:
            self.process.stderr.close()


def build_bridge(directory: Path) -> Path:
    """:raise HostError: there is no compiler, or it fails."""
    path = directory / "bridge"
    sources = [HERE / "bridge.c", *sorted((NATIVE / "compare").glob("*.c"))]
    command = ["cc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-o", str(path), *map(str, sources)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except OSError as error:
        raise HostError(f"no C compiler: {error} (Debian: apt install gcc libc6-dev)") from error
    if done.returncode:
        raise HostError(f"the benchmark's bridge does not compile: {done.stderr.strip()[-500:]}")
    return path


def qemu_command(directory: Path) -> list[str]:
    command = [QEMU, "-machine", "none", "-nodefaults", "-display", "none", "-object", "iothread,id=io"]
    for role in ROLES:
        command += ["-chardev", f"socket,id={role},path={directory / role}"]
    return [
        *command,
        "-object",
        "colo-compare,id=compare,primary_in=pri,secondary_in=sec,outdev=out,iothread=io",
    ]


def qemu_version() -> str:
    shown = subprocess.run([QEMU, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    return shown.splitlines()[0].removeprefix("QEMU emulator version ")


@contextmanager
def subjects(directory: Path, bridge: Path) -> Iterator[tuple[Subject, Subject]]:
    with ExitStack() as stack:
        both = []
        for name in NAMES:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=directory)))
            command = (
                qemu_command(home) if name == "QEMU" else [str(bridge), *(str(home / role) for role in ROLES)]
            )
            subject = Subject(name, command, home)
            stack.callback(subject.close)
            both.append(subject)
        yield both[0], both[1]


def measure(bridge: Path, directory: Path, size: int, packets: int) -> tuple[list[dict[str, float]], float]:
    """Packets per CPU second of both, for each number of flows, and what a packet of the most flows costs us, in
    packets of one.  A packet is what the PVM sends; each comes from both sides.

    All take turns, so that what disturbs this machine disturbs all alike; ratios are of one turn, and their
    median counts.
    """
    batch = min(BATCH_PACKETS, BATCH_BYTES // size)
    per_turn = max(1, packets // batch)
    rates: dict[tuple[int, str], list[float]] = {(flows, name): [] for flows in FLOWS for name in NAMES}
    with ExitStack() as stack:
        under_test = {flows: stack.enter_context(subjects(directory, bridge)) for flows in FLOWS}
        for turn in range(TURNS + 1):
            for flows, both in under_test.items():
                warm_up = max(4, -(-flows // batch))
                count, number = (
                    (per_turn, (warm_up + (turn - 1) * per_turn) * batch) if turn else (warm_up, 0)
                )
                batches = [frames(flows, size, batch, number + index * batch) for index in range(count)]
                for subject in both if turn % 2 else both[::-1]:
                    before_s = subject.cpu_s()
                    subject.pump(batches)
                    if turn:
                        rates[flows, subject.name].append(count * batch / (subject.cpu_s() - before_s))
    found = []
    for flows in FLOWS:
        ours, theirs = (rates[flows, name] for name in NAMES)
        found.append({"bytes": size, "flows": flows, "packets_per_cpu_s": round(statistics.median(ours)),
                      "qemu_packets_per_cpu_s": round(statistics.median(theirs)),
                      "ratio": round(_median_ratio(ours, theirs), 2)})  # fmt: skip
    few, many = (rates[flows, NAMES[0]] for flows in (FLOWS[0], FLOWS[-1]))
    return found, round(_median_ratio(few, many), 2)


def _median_ratio(one: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def run(quick: bool = False) -> dict[str, object]:
    """All sizes and flow counts.

    :raise HostError: QEMU or a compiler is missing, or a packet did not come out.
    """
    if shutil.which(QEMU) is None:
        raise HostError(f"{QEMU} is not installed (Debian: apt install qemu-system-x86)")
    version = qemu_version()
    log.info("comparator: packets per CPU second, beside colo-compare of QEMU %s", version)
    log.info("%6s %6s %12s %12s %6s", "bytes", "flows", *NAMES, "ratio")
    cells: list[dict[str, float]] = []
    costs: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="remus-bench-") as scratch:
        bridge = build_bridge(Path(scratch))
        for size in SIZES:
            measured, costs[str(size)] = measure(bridge, Path(scratch), size, 10_000 if quick else 50_000)
            for cell in measured:
                cells.append(cell)
                log.info("%6d %6d %12d %12d %6.2f", *cell.values())
    return {"qemu": version, "cells": cells, "least_ratio": min(cell["ratio"] for cell in cells),
            "cost_10000_flows_to_1": costs}  # fmt: skip
