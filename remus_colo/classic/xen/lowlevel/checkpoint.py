# SPDX-License-Identifier: LGPL-2.1-or-later
"""``xen.lowlevel.checkpoint``: a domain's checkpoints into a file descriptor, with a call around each phase."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from remus_colo.classic import protection
from remus_colo.errors import RemusError

__all__ = ["checkpointer", "error"]

Callback = Callable[[], Any] | None


class error(Exception):  # the name is the old module's
    """A domain could not be opened, or its checkpoints failed."""


class checkpointer:
    """``open`` it for a domain, ``start`` checkpoints, ``close`` it; that is done at the latest when the
    object goes.
    """

    _domain: protection.Domain | None = None

    def open(self, domid: int) -> None:
        """:raise error: there is no such domain, or Xen refuses."""
        self.close()
        try:
            self._domain = protection.Domain(domid)
        except RemusError as failure:
            raise error(str(failure)) from failure

    def start(
        self,
        iofile: Any,
        suspend_cb: Callback = None,
        postcopy_cb: Callback = None,
        checkpoint_cb: Callback = None,
        interval: int = 0,
        flags: int = 0,
    ) -> None:
        """Take checkpoints until ``checkpoint_cb`` returns something false, other than None; one if there is
        no such callback.

        :param iofile: an object with a ``fileno``, written to by checkpoint; a ``MigrationSocket`` sends them
            to ``remusd``.
        :param suspend_cb: called when the guest has suspended; something false, other than None, ends it all.
        :param postcopy_cb: called before the guest is resumed, whatever it returns.
        :param checkpoint_cb: called when a checkpoint is written, or, by a ``MigrationSocket``, acknowledged.
        :param interval: ms; suspend the guest at this interval by a clock. 0: when ``checkpoint_cb`` returns.
        :param flags: 1: compress, where the receiver understands it.
        :raise error: it failed; the guest runs, unless the backup has taken over.  What a callback raised is
            raised as it is.
        :raise TypeError: no descriptor, or something that cannot be called.
        """
        if self._domain is None:
            raise error("checkpoint state not opened")
        for name, callback in (
            ("suspend", suspend_cb),
            ("postcopy", postcopy_cb),
            ("checkpoint", checkpoint_cb),
        ):
            if callback is not None and not callable(callback):
                raise TypeError(f"{name} callback not callable")
        heard = protection.Heard()
        calls = protection.Calls(heard.of(suspend_cb), heard.of(postcopy_cb), heard.of(checkpoint_cb))
        try:
            protection.run(self._domain, iofile, calls, interval_s=interval / 1000, compress=bool(flags & 1))
        except RemusError as failure:
            if heard.error is not None:
                raise heard.error  # noqa: B904 (it has its own cause)
            raise error(str(failure)) from failure

    def close(self) -> None:
        domain, self._domain = self._domain, None
        if domain is not None:
            domain.close()

    def __del__(self) -> None:
        # or the domain would count as protected by a process that was killed
        self.close()
