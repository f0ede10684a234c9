# SPDX-License-Identifier: LGPL-2.1-or-later
"""Remus's test commands: lines on stdin that let this host's part of a protection die at a chosen moment."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from remus_colo.adapters import toolstack
from remus_colo.devices.device import DeviceSet
from remus_colo.errors import ExitStatus, RemusError
from remus_colo.session.loop import Loop

log = logging.getLogger(__name__)

LINE_BYTES = 4096
FILE_BYTES = 65536  # of a file on stdin; it may be /dev/zero
POINTS = {
    "s": "before the devices are told that the guest has suspended",
    "s2": "after it",
    "r": "before the devices are told that the guest is about to be resumed",
    "r2": "after it",
    "c": "before what the backup has acknowledged is released",
    "c2": "after it",
}
LAST = "c2"


class TestPoints:
    """Reads commands and dies at the next such point; what that means is a sudden end, of which the backup learns
    nothing but that the connection broke.

    Not before the first checkpoint is done: until then the backup has nothing, and drops that, and the guest that
    is destroyed here would be the only one.

    :param domid: the guest, which is destroyed: the host that it ran on counts as dead.
    """

    __test__ = False  # no test, for pytest

    def __init__(self, domid: int, devices: DeviceSet) -> None:
        self._domid = domid
        self._devices = devices
        self._command = ""
        self._replicated = False
        self._partial = b""

    def listen(self, loop: Loop, stream: TextIO | None = sys.stdin) -> None:
        """Read commands from now on; those of a file, for which nobody can wait, at once."""
        if stream is None:
            return
        try:
            fd = stream.fileno()
            try:
                loop.add_reader(fd, lambda: self._read(loop, fd))
            except PermissionError:  # of epoll: it is no terminal, pipe or socket, but a file
                for line in os.read(fd, FILE_BYTES).splitlines():
                    # The first command counts: it is reached before Xen's remus would have read another.
                    if not self._command:
                        self._take(line + b"\n")
        except (OSError, ValueError):
            return  # closed

    def _read(self, loop: Loop, fd: int) -> None:
        try:
            data = os.read(fd, LINE_BYTES)
        except OSError:
            data = b""  # of a terminal, in the background: see session/signals.py
        if not data:
            loop.remove_reader(fd)
            return
        self._take(data)

    def _take(self, data: bytes) -> None:
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._partial = self._partial[-LINE_BYTES:]  # no command is that long
        for line in lines:
            command = line.decode("utf-8", "replace").strip()
            if command in POINTS:
                self._command = command
            elif command:
                print(f"unknown command: {command} (known: {', '.join(POINTS)})", file=sys.stderr)

    def reached(self, point: str) -> None:
        """In any thread."""
        if self._replicated and self._command == point:
            self._die()
        if point == LAST:
            self._replicated = True

    def _die(self) -> None:
        print("dying...", file=sys.stderr, flush=True)
        self._devices.teardown(drop_held=True)
        try:
            toolstack.destroy(self._domid)
        except RemusError as error:
            log.error("%s", error)
        os._exit(int(ExitStatus.FAILURE))
