# SPDX-License-Identifier: LGPL-2.1-or-later
"""One protection a domain, and the record of what it has made, by which the next one cleans up after one that
was killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Collection, Iterator
from io import FileIO
from pathlib import Path

from remus_colo.adapters import backend
from remus_colo.adapters.netlink import Links
from remus_colo.adapters.xenstore import Store
from remus_colo.errors import DomainError, HostError, RemusError
from remus_colo.session import recovery

log = logging.getLogger(__name__)

RUN_DIR = Path("/run/remus_colo")


class Record:
    """The locked file: the process that protects, then the tags of its links, a line each; empty when all is
    in order.
    """

    def __init__(self, file: FileIO) -> None:
        """:param file: without a buffer: what could not be written is not tried again behind our back."""
        self._file = file
        file.seek(0)
        words = file.read().decode("ascii", "replace").split()
        self.pid = words[0] if words else ""
        self.tags = tuple(words[1:])

    def begin(self) -> None:
        self.clear()
        self._write(str(os.getpid()))

    def note_tag(self, tag: str) -> None:
        """Before the first link with it is made.

        :raise HostError: it could not be noted.
        """
        self._write(tag)

    def _write(self, word: str) -> None:
        line = f"{word}\n".encode("ascii")
        with _writing():
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def clear(self) -> None:
        self._file.seek(0)
        self._file.truncate(0)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """:raise HostError: the file system is full, say."""
    try:
        yield
    except OSError as error:
        raise HostError(
            f"cannot write to {RUN_DIR}, where it is noted what is protected: {error.strerror}; see `df {RUN_DIR.parent}` and "
            f"`df -i {RUN_DIR.parent}`"
        ) from error


@contextlib.contextmanager
def only_one(domid: int, name: str, *, diverted: Collection[str] = ()) -> Iterator[Record]:
    """Hold the lock that says this domain is being protected from this host.

    The file stays: unlinking it would let two processes lock two files of one name.

    :param diverted: vifs whose output the caller has diverted already; the cleaning up leaves that to them.
    :raise DomainError: it is being protected already.
    :raise HostError: that cannot be written down.
    """
    with _writing():
        RUN_DIR.mkdir(mode=0o755, exist_ok=True)
        file = open(RUN_DIR / f"protect-{domid}.lock", "a+b", buffering=0)  # noqa: SIM115
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DomainError(_why(name, Record(lock).pid)) from None
        record = Record(lock)
        if record.pid:
            log.warning(
                "%s was protected by process %s, which was killed: cleaning up after it", name, record.pid
            )
            with Store() as store, Links() as links:
                recovery.clean_network(
                    links, domid, backend.vifs(store, domid), record.tags, diverted=diverted
                )
        record.begin()
        try:
            yield record
        except (RemusError, KeyboardInterrupt):
            record.clear()
            raise
        else:
            record.clear()


def _why(name: str, pid: str) -> str:
    if pid and not os.path.exists(f"/proc/{pid}"):
        return f"{name} was protected by process {pid}, which was killed; it is being cleaned up after: try again in some seconds"
    return f"{name} is protected already, by process {pid or '?'}: end that one first"
