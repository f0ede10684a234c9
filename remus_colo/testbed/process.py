# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processes known by pid *and* start time, so that a reused pid is never taken for ours."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from remus_colo.testbed.errors import BedError, BedTimeout


@dataclass(frozen=True, slots=True)
class ProcessId:
    """``start_ticks`` is field 22 of ``/proc/PID/stat`` (see proc(5)): clock ticks since boot."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """:raise BedError: there is no such process."""
        fields = _stat(pid)
        if fields is None:
            raise BedError(f"process {pid} ended right away")
        return cls(pid, int(fields[19]))

    def state(self) -> str | None:
        """The kernel's letter for its state, or None once it is gone (a zombie counts as gone)."""
        fields = _stat(self.pid)
        if fields is None or int(fields[19]) != self.start_ticks or fields[0] in "ZX":
            return None
        return fields[0]

    def alive(self) -> bool:
        return self.state() is not None

    def signal(self, number: signal.Signals) -> bool:
        """Send it, if it is still the same process; False if it is gone."""
        try:
            # A pidfd holds on to the process: between the check and the signal the pid cannot change hands.
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if not self.alive():
                return False
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, number)
                return True
            return False
        finally:
            os.close(fd)

    def kill(self, *, timeout_s: float = 20.0) -> bool:
        """SIGKILL, and wait until it is gone; False if it was gone already."""
        sent = self.signal(signal.SIGKILL)
        deadline_s = time.monotonic() + timeout_s
        while self.alive():
            self._reap()
            if time.monotonic() > deadline_s:
                raise BedTimeout(f"process {self.pid} did not end within {timeout_s:g} s of SIGKILL")
            time.sleep(0.01)
        self._reap()
        return sent

    def _reap(self) -> None:
        """If it is a child of ours, take its exit status."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)


def _stat(pid: int) -> list[str] | None:
    """Fields of ``/proc/PID/stat`` from the third (state) on, or None."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the name in parentheses, which may hold anything.
    return text.rpartition(")")[2].split()


def find_by_argument(argument: str) -> list[ProcessId]:
    """Processes that have exactly this argument in their command line."""
    found = []
    wanted = argument.encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if wanted in words[1:]:
                found.append(ProcessId.of(int(entry.name)))
        except (OSError, BedError):
            continue  # ended meanwhile
    return found
