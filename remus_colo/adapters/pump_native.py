# SPDX-License-Identifier: LGPL-2.1-or-later
"""What one vif does per packet, compiled from socket to verdict (``_native/path/pump.c``)."""

from __future__ import annotations

import errno
import os
from typing import Any

from remus_colo.adapters.native import compiled
from remus_colo.adapters.packetqueue_native import NativeQueue
from remus_colo.adapters.rawlink import RawLink
from remus_colo.errors import NetworkError, StateError

SPIN_NS = 20_000  # of the order of what it costs to sleep and be woken
_ALL = 0xFFFFFFFF


class NativeTurns:
    """Reads a packet queue and a link into a comparator, and lets go what that releases.

    :ivar requested: the comparator asks for a checkpoint; its ``take()`` tells, and whoever calls that sets this back.
    :ivar missing: packets that the kernel could not put on the queue's socket, as far as the ids of others tell.
    """

    def __init__(self, queue: NativeQueue, link: RawLink | None, comparator: Any) -> None:
        """:param comparator: see :meth:`compare_with`.
        :raise NetworkError: the link cannot be read.
        """
        lib, ffi = compiled()
        self._lib, self._ffi = lib, ffi
        self._queue, self._link = queue, link
        self._turn = lib.rp_turn
        self._both = lib.RP_PRIMARY | lib.RP_SECONDARY
        self._pump = ffi.new("struct rp_pump *")
        self._pump.armed_ns = self._pump.deadline_ns = lib.COLO_NEVER
        self._pump.queue = queue.handle
        self._pump.spin_ns = SPIN_NS if (os.cpu_count() or 1) > 1 else 0
        self._frames: Any = None
        self.requested = False
        self.missing = 0
        if link is not None:
            reader = lib.rf_open(link.fileno())
            if reader == ffi.NULL:
                raise NetworkError(f"cannot read frames of {link.ifname}: {os.strerror(ffi.errno)}")
            self._frames = ffi.gc(reader, lib.rf_close)
            self._pump.frames = reader
        self.compare_with(comparator)

    def compare_with(self, comparator: Any) -> None:
        """Use another comparator from now on.

        :param comparator: its ``struct colo *``, which must live as long as it is used.
        """
        self._pump.comparator = comparator

    def ignore_tags(self) -> None:
        """The queue does not tell VLAN ids, so they must not be compared."""
        self._pump.ignore_tags = 1

    def both(self, most: int) -> bool:
        """Deal with what both VMs have sent, until nothing is left or about ``most`` packets.

        :return: something calls for attention: a request, packets missing, or a deadline before the one that
            :meth:`arm` was told.
        :raise NetworkError: the queue cannot be read, or verdicts not sent.
        :raise LinkGone: the link was deleted; it is read no more.
        """
        what = self._turn(self._pump, self._both, most)
        return bool(what) and self._attend(what)

    def primary(self) -> bool:
        """The same for the PVM alone, and all of it."""
        return self._attend(self._turn(self._pump, self._lib.RP_PRIMARY, _ALL))

    def secondary(self) -> bool:
        return self._attend(self._turn(self._pump, self._lib.RP_SECONDARY, _ALL))

    @property
    def deadline_s(self) -> float | None:
        """The comparator's, as of the last call of those."""
        deadline_ns = self._pump.deadline_ns
        return None if deadline_ns == self._lib.COLO_NEVER else deadline_ns / 1e9

    def arm(self, due_s: float | None) -> None:
        """The caller will come by at that time in any case, so only deadlines before it are news."""
        self._pump.armed_ns = self._lib.COLO_NEVER if due_s is None else round(due_s * 1e9)

    def close(self) -> None:
        """Idempotent; queue and link stay their owners'."""
        self._pump.frames = self._ffi.NULL
        self._frames = None

    def _attend(self, what: int) -> bool:
        lib, pump = self._lib, self._pump
        if what & lib.RP_RELEASE_FAILED:
            if pump.release_error == -errno.ENOENT:
                raise StateError("the comparator released a packet that is not held")
            raise NetworkError(f"cannot let packets go: {os.strerror(-pump.release_error)}")
        if what & lib.RP_PRIMARY_FAILED:
            raise NetworkError(f"cannot read the packet queue: {os.strerror(-pump.primary_error)}")
        self.requested = bool(what & lib.RP_REQUEST)
        self.missing = pump.missing
        if what & lib.RP_SECONDARY_FAILED:
            self._link_failed(-pump.secondary_error)
        return bool(what & (lib.RP_REQUEST | lib.RP_DEADLINE | lib.RP_MISSING))

    def _link_failed(self, error: int) -> None:
        assert self._link is not None
        try:
            self._link.failed(error)
        except NetworkError:
            self.close()
            raise
