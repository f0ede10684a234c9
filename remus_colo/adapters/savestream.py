# SPDX-License-Identifier: LGPL-2.1-or-later
"""libxenguest's save (``xc_domain_save`` of xenguest.h), once or checkpointed, its callbacks as methods of an object."""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import IntEnum
from typing import Any, Protocol

from remus_colo.adapters.xenctrl import _native
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
    lib, ffi = _native()
    _register(lib, ffi)
    calls = _Calls(hooks)
    handle = ffi.new_handle(calls)
    table = ffi.new("struct rc_save_hooks *")
    table.round = lib.rc_save_round
    table.suspend = lib.rc_save_suspend
    table.resume = lib.rc_save_resume
    table.checkpoint = lib.rc_save_checkpoint
    table.log_dirty = lib.rc_save_log_dirty
    message = ffi.new("char[]", MESSAGE_BYTES)
    rc = lib.rc_save_stream(domid, fd, int(mode), table, handle, message, MESSAGE_BYTES)
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


class _Calls:
    """The hooks, and what the first of them to fail raised: an exception cannot cross C."""

    def __init__(self, hooks: SaveHooks) -> None:
        self.hooks = hooks
        self.error: BaseException | None = None

    def run(self, call: Callable[[SaveHooks], int | None], failed: int) -> int:
        try:
            answer = call(self.hooks)
        except BaseException as error:  # raised again by save_checkpoints
            if self.error is None:
                self.error = error
            return failed
        return 1 if answer is None else int(answer)


def _register(lib: Any, ffi: Any) -> None:
    global _registered
    if _registered:
        return
    _registered = True

    def calls(data: Any) -> _Calls:
        found: _Calls = ffi.from_handle(data)
        return found

    @ffi.def_extern(name="rc_save_round")
    def on_round(data: Any, number: int, dirty: int) -> int:
        return calls(data).run(lambda hooks: hooks.round(number, dirty), -1)

    @ffi.def_extern(name="rc_save_suspend")
    def on_suspend(data: Any) -> int:
        return calls(data).run(lambda hooks: hooks.suspend(), 0)

    @ffi.def_extern(name="rc_save_resume")
    def on_resume(data: Any) -> int:
        return calls(data).run(lambda hooks: hooks.resume(), 0)

    @ffi.def_extern(name="rc_save_checkpoint")
    def on_checkpoint(data: Any) -> int:
        return calls(data).run(lambda hooks: hooks.checkpoint(), 0)

    @ffi.def_extern(name="rc_save_log_dirty")
    def on_log_dirty(data: Any, enable: int) -> int:
        def switch(hooks: SaveHooks) -> int:
            hooks.log_dirty(bool(enable))
            return 0

        return calls(data).run(switch, -1)
