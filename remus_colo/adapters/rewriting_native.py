# SPDX-License-Identifier: LGPL-2.1-or-later
"""One packet queue of the SVM through the rewriter and back, compiled (``_native/path/rewriting.c``)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from remus_colo.adapters.native import compiled
from remus_colo.adapters.packetqueue_native import NativeQueue
from remus_colo.errors import NetworkError

PACKETS_PER_TURN = 1024  # then the loop's other events have theirs


class RewritingTurns:
    """Rewrites what a queue holds and lets it go.

    :param rewriter: its ``struct rewriter *``, which must live as long as this is used.
    :param from_guest: the queue holds what the guest sends; otherwise what goes to it.
    :param look: called with payload (its first 128 bytes) and ethertype of packets to learn addresses from:
        ARP, ICMPv6, and the first packet of each source in a second.
    :param held: called when the rewriter has packets to be taken that it had held.
    """

    def __init__(
        self,
        queue: NativeQueue,
        rewriter: Any,
        look: Callable[[bytes, int], None],
        held: Callable[[], None],
        *,
        from_guest: bool,
    ) -> None:
        lib, ffi = compiled()
        self._lib, self._buffer = lib, ffi.buffer
        self._queue, self._rewriter = queue, rewriter
        self._look, self._held = look, held
        self._turns = ffi.new("struct rw_turns *")
        self._turns.queue = queue.handle
        self._turns.rewriter = rewriter
        self._turns.from_guest = from_guest

    def mute(self, muted: bool) -> None:
        """Drop what comes, until further notice."""
        self._turns.muted = muted

    def turn(self) -> None:
        """Deal with what waits, without blocking; a thousand packets or so at most.

        :raise NetworkError: the queue cannot be read, or verdicts not sent.
        """
        lib, turns = self._lib, self._turns
        what = lib.rw_turn(turns, PACKETS_PER_TURN)
        if not what:
            return
        if what & lib.RW_FAILED:
            raise NetworkError(f"cannot deal with the SVM's packets: {os.strerror(-turns.error)}")
        for look in turns.looks[0 : turns.nr_looks]:
            self._look(self._buffer(look.data, look.size)[:], look.ethertype)
        if what & lib.RW_HELD:
            self._held()
