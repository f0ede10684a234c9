# SPDX-License-Identifier: LGPL-2.1-or-later
"""Helpers of scripts: a lock, a MAC address's usual form, a command's output."""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import subprocess
from collections.abc import Sequence
from typing import TextIO

from remus_colo.adapters import kmod
from remus_colo.errors import HostError

__all__ = ["Lock", "PipeException", "canonifymac", "checkpid", "modprobe", "runcmd"]

RUN_TIMEOUT_S = 120.0


class PipeException(Exception):
    """A command could not be run, or failed. ``errno``: the system's, or its exit status."""

    def __init__(self, message: str, errno: int) -> None:
        super().__init__(f"{message}: {errno}, {os.strerror(errno)}")
        self.errno = errno


class Lock:
    """Holds ``filename + '.lock'`` from its making until :meth:`unlock`.

    The file stays: unlinked, it could be locked by one process under its name and by another as the file
    that has lost it.
    """

    def __init__(self, filename: str) -> None:
        self.filename = filename + ".lock"
        self.fd: TextIO | None = None
        self.lock()

    def lock(self) -> None:
        if self.fd is None:
            self.fd = open(self.filename, "a", encoding="ascii")  # noqa: SIM115 (held)
            fcntl.lockf(self.fd, fcntl.LOCK_EX)

    def unlock(self) -> None:
        if self.fd is not None:
            self.fd.close()
            self.fd = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.unlock()


def canonifymac(mac: str) -> str:
    """Two digits for each byte: ``0:16:3E:1:2:3`` is ``00:16:3e:01:02:03``."""
    return ":".join(f"{int(field, 16):02x}" for field in mac.split(":"))


def checkpid(pid: int) -> bool:
    """Whether a process of this number is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def runcmd(args: str | Sequence[str], cwd: str | None = None) -> str:
    """What a command prints.

    :param args: its words, or one line that is split as a shell would.
    :raise PipeException: it could not be run, or did not end with 0.
    """
    try:
        words = shlex.split(args) if isinstance(args, str) else [str(word) for word in args]
    except ValueError as error:
        raise PipeException(f"could not run {args!r}: {error}", errno.EINVAL) from error
    if not words:
        raise PipeException("could not run an empty command", errno.ENOENT)
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            cwd=cwd,
            timeout=RUN_TIMEOUT_S,
            check=False,
        )
    except OSError as error:
        raise PipeException(f"could not run {words[0]}", error.errno or 0) from error
    except subprocess.TimeoutExpired as error:
        raise PipeException(f"{words[0]} did not end within {RUN_TIMEOUT_S:g} s", errno.ETIMEDOUT) from error
    if done.returncode:
        raise PipeException(f"{words[0]} failed (errmsg: {done.stderr.strip()})", done.returncode)
    return done.stdout


def modprobe(modname: str) -> bool:
    """Whether the kernel module is there now."""
    try:
        kmod.load(modname, "Remus")
    except (HostError, ValueError):  # ValueError: no module can have such a name
        return False
    return True
