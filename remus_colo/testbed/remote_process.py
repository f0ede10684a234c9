# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program in a dom0 that the caller reads from, writes to and signals."""

from __future__ import annotations

import signal
import subprocess
from typing import Any, Self

from remus_colo.testbed.errors import BedError
from remus_colo.testbed.ssh import Remote


class RemoteProcess:
    """A shell command that runs in a dom0, with its pid *there*.

    ``stdin``, ``stdout`` and ``stderr`` are as :class:`subprocess.Popen` was asked for (stdout a pipe
    unless said otherwise; it must be one, the pid comes first in it).  Ending the local ssh does not end
    the program: :meth:`signal` it, or use this as a context manager, which kills it.
    """

    def __init__(self, remote: Remote, command: str, **popen: Any) -> None:
        self._remote = remote
        popen.setdefault("stdin", subprocess.DEVNULL)
        popen["stdout"] = subprocess.PIPE
        # The shell's own pid becomes the command's, since exec keeps it; a compound command stays its child.
        self._local = subprocess.Popen(remote.argv(f"echo $$; exec {command}"), **popen)
        assert self._local.stdout is not None
        first = self._local.stdout.readline()
        try:
            self.pid = int(first)
        except ValueError as cause:
            self._local.kill()
            self._local.wait()
            raise BedError(
                f"cannot start '{command[:200]}' on {remote.host}: the connection broke"
            ) from cause
        self.stdin: Any = self._local.stdin
        self.stdout: Any = self._local.stdout
        self.stderr: Any = self._local.stderr

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def returncode(self) -> int | None:
        return self._local.returncode

    def poll(self) -> int | None:
        return self._local.poll()

    def wait(self, timeout_s: float) -> int:
        """Its exit status.  :raise subprocess.TimeoutExpired: it is still running."""
        return self._local.wait(timeout_s)

    def communicate(self, input: Any = None, *, timeout_s: float) -> tuple[Any, Any]:
        return self._local.communicate(input, timeout=timeout_s)

    def signal(self, number: signal.Signals, *, timeout_s: float = 30.0) -> None:
        """Send a signal to the program there; does nothing once it has ended."""
        if self.poll() is None:
            self._remote.run(f"kill -{int(number)} {self.pid}", timeout_s=timeout_s, check=False)

    def kill(self, *, timeout_s: float = 30.0) -> None:
        """End it, if its host still answers, and end the local side in any case."""
        try:
            if self.poll() is None:
                self.signal(signal.SIGKILL, timeout_s=timeout_s)
                self.wait(timeout_s)
        except (BedError, subprocess.TimeoutExpired):
            self._local.kill()
            self._local.wait()
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
