# SPDX-License-Identifier: LGPL-2.1-or-later
"""The little of QEMU's QMP (docs/interop/qmp-spec of QEMU) that the bed needs: one command, one answer."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any, Self

from remus_colo.testbed.errors import BedError, BedTimeout


class Qmp:
    """A connection to one QEMU.  QEMU serves one at a time, so keep it short: a context manager.

    :raise BedTimeout: QEMU does not answer within ``timeout_s`` (it is stopped, or busy).
    :raise BedError: QEMU is gone, or refuses the command.
    """

    def __init__(self, path: Path, timeout_s: float = 30.0) -> None:
        self._path = path
        self._deadline_s = time.monotonic() + timeout_s
        self._buffer = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect()
            if "QMP" not in self._read():
                raise BedError(f"{path} is not a QMP socket")
            self.execute("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run one command; its ``return`` value.  Events that arrive meanwhile are dropped."""
        request = {"execute": command, "arguments": arguments}
        self._arm()
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except TimeoutError as cause:
            raise BedTimeout(f"QEMU does not answer at {self._path}") from cause
        except OSError as cause:
            raise BedError(f"QEMU closed {self._path}") from cause
        while True:
            answer = self._read()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise BedError(f"QEMU refuses {command}: {answer['error'].get('desc', answer['error'])}")

    def _connect(self) -> None:
        while True:
            self._arm()
            try:
                self._socket.connect(str(self._path))
                return
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError) as cause:
                # QEMU makes the socket a moment after it starts.
                if time.monotonic() + 0.05 > self._deadline_s:
                    raise BedTimeout(f"QEMU does not listen at {self._path}") from cause
                time.sleep(0.02)
            except TimeoutError as cause:
                raise BedTimeout(f"QEMU does not answer at {self._path}") from cause

    def _arm(self) -> None:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise BedTimeout(f"QEMU does not answer at {self._path}")
        self._socket.settimeout(left_s)

    def _read(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._arm()
            try:
                data = self._socket.recv(65536)
            except TimeoutError as cause:
                raise BedTimeout(f"QEMU does not answer at {self._path}") from cause
            except OSError:
                data = b""  # reset: it ended
            if not data:
                raise BedError(f"QEMU closed {self._path}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer
