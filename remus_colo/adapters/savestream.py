# SPDX-License-Identifier: LGPL-2.1-or-later
"""libxenguest's save (``xc_domain_save`` of xenguest.h), once or checkpointed, its callbacks as methods of an
object.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Any, Protocol

from remus_colo.adapters.native import compiled_for_xen
from remus_colo.errors import XenError

MESSAGE_BYTES = 1024  # of struct xc_error


class SaveHooks(Protocol):
    """What libxenguest calls, in this order for each checkpoint, in the thread that saves.

    What a hook raises ends the save, and is raised by :func:`save_checkpoints`.
    """

    def round(self, number: int, dirty_pages: int) -> bool:
        """Before a round in which the running guest is copied; False: suspend it now.

        :param dirty_pages: how many this round has to copy, -1 if that is not known yet.
        """

    def suspend(self) -> None:
        """Suspend the guest; returns when it is (shutdown reason SUSPEND)."""

    def resume(self) -> None:
        """The guest's state is written: resume it."""

    def checkpoint(self) -> bool:
        """The guest runs again. Whether there is to be another checkpoint."""

    def log_dirty(self, enable: bool) -> None:
        """Have an HVM guest's device model report the pages that it writes, or stop."""


_registered = False


def save_checkpoints(domid: int, fd: int, hooks: SaveHooks) -> None:
    """Write a domain to ``fd``, again and again, until a hook ends it. The guest runs on at a regular end.

    :param fd: open for writing; its stream is libxenguest's alone, each checkpoint ending with a CHECKPOINT
        record (docs/specs/libxc-migration-stream.pandoc of Xen).
    :raise XenError: libxenguest failed. Whether the guest is suspended then is the caller's to find out.
    """
    _save(domid, fd, hooks, _Mode.CHECKPOINTS)


def save_once(domid: int, fd: int, suspend: Callable[[], None], *, live: bool) -> None:
    """Write a domain to ``fd``, as for ``xl save``; it stays suspended at the end.

    :param suspend: called once: returns when the guest has suspended itself.
    :param live: copy it while it runs first, so that it stands still for less.
    :raise XenError: libxenguest failed; what ``suspend`` raised is raised as it is.
    """
    _save(domid, fd, _Once(suspend), _Mode.LIVE if live else _Mode.ONCE)


class _Mode(IntEnum):
    """RC_SAVE_* of save.h"""

    ONCE = 0
    LIVE = 1
    CHECKPOINTS = 2


class _Once:
    """Nothing is asked but to suspend the guest."""

    def __init__(self, suspend: Callable[[], None]) -> None:
        self.suspend = suspend

    def round(self, number: int, dirty_pages: int) -> bool:
        return True

    def resume(self) -> None:
        pass

    def checkpoint(self) -> bool:
        return False

    def log_dirty(self, enable: bool) -> None:
        pass


def _save(domid: int, fd: int, hooks: SaveHooks, mode: _Mode) -> None:
    lib, ffi = compiled_for_xen()
    _register(lib, ffi)
    table = ffi.new("struct rc_save_hooks *")
    for name in _EXTERNS:
        setattr(table, name, getattr(lib, f"rc_save_{name}"))
    message = ffi.new("char[]", MESSAGE_BYTES)
    with _calling(hooks) as calls:
        rc = lib.rc_save_stream(domid, fd, int(mode), table, ffi.NULL, message, MESSAGE_BYTES)
    if calls.error is not None:
        raise calls.error
    if rc:
        errno = ffi.errno
        said = ffi.string(message).decode("utf-8", "replace").strip() or os.strerror(errno)
        raise XenError(
            f"could not copy domain {domid}: xc_domain_save failed: {said}",
            operation="xc_domain_save",
            domid=domid,
            errno=errno,
        )


# -- out of C --------------------------------------------------------------------------------------


class _Calls:
    """The hooks, and what the first of them to fail raised: an exception cannot cross C."""

    def __init__(self, hooks: SaveHooks) -> None:
        self.hooks = hooks
        self.error: BaseException | None = None

    def run(self, call: Callable[[SaveHooks], int | None], failed: int) -> int:
        try:
            answer = call(self.hooks)
        except BaseException as error:  # raised again by save_checkpoints
            self.fail(error)
            return failed
        return 1 if answer is None else int(answer)

    def fail(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error


class _Running(threading.local):
    """The save of each thread: libxenguest calls in the one that saves."""

    calls: _Calls


_running = _Running()


@contextlib.contextmanager
def _calling(hooks: SaveHooks) -> Iterator[_Calls]:
    _running.calls = _Calls(hooks)
    try:
        yield _running.calls
    finally:
        del _running.calls


def _on_round(_: Any, number: int, dirty: int) -> int:
    return _running.calls.run(lambda hooks: hooks.round(number, dirty), -1)


def _on_suspend(_: Any) -> int:
    return _running.calls.run(lambda hooks: hooks.suspend(), 0)


def _on_resume(_: Any) -> int:
    return _running.calls.run(lambda hooks: hooks.resume(), 0)


def _on_checkpoint(_: Any) -> int:
    return _running.calls.run(lambda hooks: hooks.checkpoint(), 0)


def _on_log_dirty(_: Any, enable: int) -> int:
    def switch(hooks: SaveHooks) -> int:
        hooks.log_dirty(bool(enable))
        return 0

    return _running.calls.run(switch, -1)


def _raised_outside(_kind: object, error: BaseException, _trace: object) -> None:
    """A signal's handler, for one, runs as soon as C has come back to Python, before any ``try``."""
    _running.calls.fail(error)


# What C calls, and what it is told where that failed.
_EXTERNS: dict[str, tuple[Callable[..., int], int]] = {
    "round": (_on_round, -1),
    "suspend": (_on_suspend, 0),
    "resume": (_on_resume, 0),
    "checkpoint": (_on_checkpoint, 0),
    "log_dirty": (_on_log_dirty, -1),
}


def _register(lib: Any, ffi: Any) -> None:
    global _registered
    if not _registered:
        for name, (function, failed) in _EXTERNS.items():
            ffi.def_extern(name=f"rc_save_{name}", error=failed, onerror=_raised_outside)(function)
        _registered = True
