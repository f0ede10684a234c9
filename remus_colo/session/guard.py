# SPDX-License-Identifier: LGPL-2.1-or-later
"""A process that outlives a ``remus`` that is killed, and puts right what that cannot (``recovery.py``).

It does nothing until then: it waits for the other end of a socket to close.  It has copies of the connections
to the backup, so that there the end looks like silence, and not before the guest runs again.  Then they are
closed: the backup looks for the guest on the LAN, finds it, and stands down.

It resumes no guest that the backup may have taken over.  That it has not is sure for as long as the backup
has had a heartbeat of late (see SelfMonitor): :meth:`Guard.sure` puts the moment into memory that both
processes share.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from remus_colo.errors import HostError, RemusError

log = logging.getLogger(__name__)

END = b"end"
TAG = b"tag "
MESSAGE_BYTES = 256
CHANNELS = 2
COMM_BYTES = 15  # of a process's name (proc(5))
# When we last knew that the backup had not taken over (time.monotonic(), s; 0: there is none yet), and
# whether the guest is being resumed as if in a new domain.
_SHARED = struct.Struct("=d?")


@dataclass(frozen=True, slots=True)
class Remains:
    """What is known of a ``remus`` that has gone without a word.

    :ivar tags: of its links.
    :ivar reborn: see ``recovery.let_run``.
    :ivar silence_s: since it was last sure that the backup had not taken over; 0 if there was no backup yet.
    """

    pid: int
    tags: tuple[str, ...]
    reborn: bool
    silence_s: float


class Guard:
    """The guarded process's end.

    :param recover: called in the guard if the guarded process has gone without :meth:`end`.
    """

    def __init__(self, name: str, recover: Callable[[Remains], None]) -> None:
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)
        # Messages keep their bounds, and the end of the last holder of the other end is seen as such.
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        self._pid = os.fork()
        if not self._pid:
            self._sock.close()
            self._guard(theirs, parent, name, recover)
        theirs.close()

    def note_tag(self, tag: str) -> None:
        """Links with this tag are about to be made.

        :raise HostError: the guard is gone.
        """
        with self._telling():
            self._sock.send(TAG + tag.encode("ascii"))

    def hold(self, *fds: int) -> None:
        """Keep these connections open for as long as the guest is not put right.

        :raise HostError: the guard is gone.
        """
        with self._telling():
            socket.send_fds(self._sock, [b"hold"], fds)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise HostError(
                f"the process {self._pid} that was to guard this one is gone: it was killed, maybe for want of memory (see `dmesg`); "
                "start remus again"
            ) from error

    def sure(self) -> None:
        """The backup has heard us. From any thread."""
        struct.pack_into("=d", self._shared, 0, time.monotonic())

    @contextlib.contextmanager
    def rebirth(self) -> Iterator[None]:
        """While the guest is being resumed as if in a new domain."""
        self._shared[8] = 1
        yield
        self._shared[8] = 0  # not after an error: then the guest may be half-way

    def end(self) -> None:
        """All is in order: the guard is not needed any more, but for a rebirth that broke off."""
        self._close(b"" if self._shared[8] else END)

    def give_up(self) -> None:
        """It is not: have the guard do its work now."""
        self._close(b"")

    def _close(self, word: bytes) -> None:
        if word:
            with contextlib.suppress(OSError):
                self._sock.send(word)
        self._sock.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)

    # -- the guard's end -------------------------------------------------------------------------------------

    def _guard(
        self, sock: socket.socket, parent: int, name: str, recover: Callable[[Remains], None]
    ) -> NoReturn:
        status = 1
        try:
            # It is to live on: also if its terminal, or its service, goes.
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            with contextlib.suppress(OSError), open("/proc/self/comm", "wb") as comm:
                # Not to be killed by the name of what it guards.
                comm.write(f"guard-{name}".encode("utf-8", "replace")[:COMM_BYTES])
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(null, 1)  # who waits for its output's end does not wait for us
            tags = self._await_end(sock)
            if tags is not None:
                sure_s, reborn = _SHARED.unpack_from(self._shared)
                recover(Remains(parent, tags, reborn, time.monotonic() - sure_s if sure_s else 0.0))
            status = 0
        except RemusError as error:
            log.error("%s", error)
        except BaseException:
            log.exception("while cleaning up after process %d", parent)
        finally:
            sys.stderr.flush()
            os._exit(status)

    @staticmethod
    def _await_end(sock: socket.socket) -> tuple[str, ...] | None:
        """The tags, once the other end has closed; None if all is in order."""
        tags: list[str] = []
        held: list[int] = []  # open until this process ends
        while True:
            message, fds, _, _ = socket.recv_fds(sock, MESSAGE_BYTES, CHANNELS)
            held += fds
            if not message:
                return tuple(tags)
            if message == END:
                return None
            if message.startswith(TAG):
                tags.append(message.removeprefix(TAG).decode("ascii"))
