# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hosts' Xen clocks: how far apart they are, and setting that.

Xen system time runs since a host's boot.  While QEMU holds a host stopped its virtual clock and TSC
stand still, and Xen's time with them; so holding the host that is ahead moves the clocks to any distance wanted.
"""

from __future__ import annotations

import logging
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from remus_colo.testbed.errors import BedError
from remus_colo.testbed.remote_process import RemoteProcess
from remus_colo.testbed.ssh import Remote

log = logging.getLogger(__name__)

SAMPLES = 80
# What one correction leaves is scheduling noise; below this it is not worth another.
GOOD_ENOUGH_S = 0.001
MAX_CORRECTIONS = 4

# Answers each line on stdin with Xen's time in nanoseconds.
READER = """
import sys
from remus_colo.adapters import xentime
clock = xentime.host_clock()
for _ in sys.stdin:
    print(clock.now_ns(), flush=True)
"""


class NoXenClock(BedError):
    """The work tree's code in a host does not tell Xen's time."""


@dataclass(frozen=True, slots=True)
class Reading:
    """``offset_s``: a host's Xen time minus this machine's monotonic time; right to within ``error_s``."""

    offset_s: float
    error_s: float


@dataclass(frozen=True, slots=True)
class Hold:
    """Stop ``host`` for ``for_s`` seconds."""

    host: str
    for_s: float


def best(samples: list[tuple[int, int, int]]) -> Reading:
    """The reading of the fastest of some exchanges.

    :param samples: (sent, Xen's time in the answer, answer arrived), all in nanoseconds.
    """
    sent_ns, xen_ns, arrived_ns = min(samples, key=lambda sample: sample[2] - sample[0])
    return Reading((xen_ns - (sent_ns + arrived_ns) / 2) / 1e9, (arrived_ns - sent_ns) / 2e9)


def correction(measured_s: float, wanted_s: float) -> Hold:
    """Which host to hold, and for how long, to turn a measured distance into the wanted one.

    Both are backup's Xen time minus primary's.
    """
    excess_s = measured_s - wanted_s
    return Hold("backup", excess_s) if excess_s > 0 else Hold("primary", -excess_s)


class SkewMeter:
    """Reads both hosts' clocks; a context manager that leaves nothing running in them."""

    def __init__(self, primary: Remote, backup: Remote) -> None:
        self._readers: list[RemoteProcess] = []
        try:
            for remote in (primary, backup):
                command = f"python3 -c {shlex.quote(READER)}"
                self._readers.append(
                    RemoteProcess(remote, command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
                )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for reader in self._readers:
            reader.kill()
        self._readers.clear()

    def measure(self) -> Reading:
        """Backup's Xen time minus primary's.

        :raise NoXenClock: a host has no Xen clock to read (the work tree's code is not in it, or does not run).
        """
        primary, backup = (_read(reader) for reader in self._readers)
        return Reading(backup.offset_s - primary.offset_s, primary.error_s + backup.error_s)


def _read(reader: RemoteProcess) -> Reading:
    samples = []
    for _ in range(SAMPLES):
        sent_ns = time.monotonic_ns()
        try:
            reader.stdin.write(b"\n")
            reader.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the empty line below says so
        line = reader.stdout.readline()
        arrived_ns = time.monotonic_ns()
        if not line:
            said = reader.stderr.read().decode(errors="replace").strip().splitlines()
            raise NoXenClock(
                f"cannot read the Xen clock of a host: {said[-1] if said else 'the reader ended'}"
            )
        samples.append((sent_ns, int(line), arrived_ns))
    return best(samples)


def set_skew(meter: SkewMeter, wanted_s: float, hold: Callable[[Hold], None]) -> Reading:
    """Bring the clocks to the wanted distance as nearly as they can be measured; returns what was reached.

    :param hold: stops a host for a time.
    """
    reading = meter.measure()
    for _ in range(MAX_CORRECTIONS):
        if abs(reading.offset_s - wanted_s) <= max(GOOD_ENOUGH_S, reading.error_s / 2):
            break
        step = correction(reading.offset_s, wanted_s)
        log.debug(
            "Xen clocks are %.6f s apart: holding %s for %.6f s", reading.offset_s, step.host, step.for_s
        )
        hold(step)
        reading = meter.measure()
    return reading


@contextmanager
def stopped(qmp: Callable[[str], object]) -> Iterator[None]:
    """QEMU stands still inside; whatever happens it goes on after."""
    qmp("stop")
    try:
        yield
    finally:
        qmp("cont")
