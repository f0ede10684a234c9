# SPDX-License-Identifier: LGPL-2.1-or-later
"""The little of QEMU's QMP (docs/interop/qmp-spec of QEMU) that is needed: one command, one answer."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any, ClassVar, Self

from remus_colo.errors import RemusError, XenError


class Qmp:
    """A connection to one QEMU.  QEMU serves one at a time, so keep it short: a context manager.

    :param timeout_s: for the connection, and for each command.
    :raise LATE: QEMU does not answer in time (it is stopped, or busy).
    :raise FAILED: QEMU is gone, or refuses the command.
    """

    LATE: ClassVar[type[RemusError]] = XenError
    FAILED: ClassVar[type[RemusError]] = XenError

    def __init__(self, path: Path, timeout_s: float = 30.0) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        self._buffer = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect()
            if "QMP" not in self._read():
                raise self.FAILED(f"{path} is not a QMP socket")
            self.execute("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run one command; its ``return`` value.  Events that arrive meanwhile are dropped."""
        return self.execute_with(command, arguments)

    def execute_with(self, command: str, arguments: dict[str, Any], fd: int | None = None) -> Any:
        """As :meth:`execute`, for arguments whose names are no words of Python's, and with a file descriptor
        to go along.
        """
        self._deadline_s = time.monotonic() + self._timeout_s
        request = json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"
        self._arm()
        try:
            if fd is not None:
                request = request[socket.send_fds(self._socket, [request], [fd]) :]
            self._socket.sendall(request)
        except TimeoutError as cause:
            raise self.LATE(f"QEMU does not answer at {self._path}") from cause
        except OSError as cause:
            raise self.FAILED(f"QEMU closed {self._path}") from cause
        while True:
            answer = self._read()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise self.FAILED(f"QEMU refuses {command}: {answer['error'].get('desc', answer['error'])}")

    def _connect(self) -> None:
        while True:
            self._arm()
            try:
                self._socket.connect(str(self._path))
                return
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError) as cause:
                # QEMU makes the socket a moment after it starts.
                if time.monotonic() + 0.05 > self._deadline_s:
                    raise self.LATE(f"QEMU does not listen at {self._path}") from cause
                time.sleep(0.02)
            except TimeoutError as cause:
                raise self.LATE(f"QEMU does not answer at {self._path}") from cause

    def _arm(self) -> None:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise self.LATE(f"QEMU does not answer at {self._path}")
        self._socket.settimeout(left_s)

    def _read(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._arm()
            try:
                data = self._socket.recv(65536)
            except TimeoutError as cause:
                raise self.LATE(f"QEMU does not answer at {self._path}") from cause
            except OSError:
                data = b""  # reset: it ended
            if not data:
                raise self.FAILED(f"QEMU closed {self._path}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            answer = json.loads(line)
        except ValueError as cause:
            raise self.FAILED(f"{self._path} is not a QMP socket") from cause
        if not isinstance(answer, dict):
            raise self.FAILED(f"{self._path} is not a QMP socket")
        return answer
