# SPDX-License-Identifier: LGPL-2.1-or-later
"""Flows whose packets are compared whole (UDP, ICMP, other protocols), and the reassembly of IPv4 fragments.

A datagram has no position in its flow, so it is matched by content, wherever in the flow the other side sent it.  Equal
datagrams count: two equal ones of the PVM need two of the SVM.
"""

from __future__ import annotations

from collections import deque

from .packets import Fragment, Held, Packet

DATAGRAM_OVERHEAD_BYTES = 200  # what keeping one costs beside its payload; bounds empty datagrams, too


class SecondaryDatagram:
    """A datagram of the SVM that the PVM has not sent yet.

    :ivar live: False once it is matched or thrown away.
    """

    __slots__ = ("live", "payload", "queue", "seen_s", "size")

    def __init__(self, queue: DatagramQueue, payload: bytes, seen_s: float) -> None:
        self.queue = queue
        self.payload = payload
        self.seen_s = seen_s
        self.size = len(payload) + DATAGRAM_OVERHEAD_BYTES
        self.live = True


class DatagramQueue:
    """The state of one such flow within one epoch."""

    __slots__ = ("early", "secondary_bytes", "waiting")

    diverged = None  # content never differs here: a datagram has its equal or has none

    def __init__(self) -> None:
        self.early: dict[bytes, deque[SecondaryDatagram]] = {}
        self.waiting: dict[bytes, deque[Held]] = {}
        self.secondary_bytes = 0

    def primary(self, held: Held) -> None:
        """Take a PVM datagram; sets its ``matched``."""
        packet = held.packet
        assert packet is not None
        payload = packet.payload
        early = self.early.get(payload)
        if early is not None:
            self.discard(early[0])
            held.matched = True
            return
        held.matched = False
        waiting = self.waiting.get(payload)
        if waiting is None:
            self.waiting[payload] = deque((held,))
        else:
            waiting.append(held)

    def secondary(self, packet: Packet, now_s: float) -> SecondaryDatagram | None:
        """Take an SVM datagram.

        :return: None if a PVM datagram waited for it, else the entry that is kept.
        """
        payload = packet.payload
        waiting = self.waiting.get(payload)
        if waiting is not None:
            waiting.popleft().matched = True
            if not waiting:
                del self.waiting[payload]
            return None
        entry = SecondaryDatagram(self, payload, now_s)
        self.early.setdefault(payload, deque()).append(entry)
        self.secondary_bytes += entry.size
        return entry

    def discard(self, entry: SecondaryDatagram) -> None:
        """Take out ``entry``, which is the oldest of its equals."""
        early = self.early[entry.payload]
        early.popleft()
        if not early:
            del self.early[entry.payload]
        entry.live = False
        self.secondary_bytes -= entry.size

    def ready(self, held: Held) -> bool:
        return held.matched

    def rebased(self) -> DatagramQueue:
        return DatagramQueue()

    def waits_for(self, held: Held) -> str:
        return "packets before it wait" if held.matched else "the SVM has sent no equal datagram"

    def check_invariants(self) -> None:
        """:raise AssertionError: a state that must not be."""
        assert not self.early.keys() & self.waiting.keys()
        assert all(self.early.values()) and all(self.waiting.values())
        assert self.secondary_bytes == sum(entry.size for early in self.early.values() for entry in early)
        assert all(entry.live for early in self.early.values() for entry in early)
        assert not any(held.matched for waiting in self.waiting.values() for held in waiting)


class FragmentSet:
    """The fragments of one IPv4 datagram.

    Fragments that overlap and are not plain repeats have no one meaning (RFC 5722 discards them for IPv6): such a set
    is never complete.
    """

    __slots__ = ("_broken", "_total", "fragments", "seen_s", "size")

    def __init__(self, seen_s: float) -> None:
        self.seen_s = seen_s
        self.fragments: dict[int, Fragment] = {}
        self.size = 0
        self._total: int | None = None
        self._broken = False

    def add(self, fragment: Fragment) -> bytes | None:
        """Take a fragment.

        :return: the whole datagram with an unfragmented header, once nothing is missing.
        """
        old = self.fragments.get(fragment.offset)
        if old is not None:
            self._broken |= old.data != fragment.data or old.more != fragment.more
            return None
        self.fragments[fragment.offset] = fragment
        self.size += len(fragment.data)
        if not fragment.more:
            self._broken |= self._total is not None
            self._total = fragment.offset + len(fragment.data)
        # The sizes add up to the total only where nothing is missing, or where something overlaps: checked below.
        if self._broken or self._total is None or self.size < self._total:
            return None
        return self._join()

    def _join(self) -> bytes | None:
        parts: list[bytes] = []
        position = 0
        for offset in sorted(self.fragments):
            if offset != position:
                self._broken = True
                return None
            data = self.fragments[offset].data
            parts.append(data)
            position += len(data)
        header = bytearray(self.fragments[0].header)
        total = len(header) + position
        if position != self._total or total > 0xFFFF:
            self._broken = True
            return None
        header[2:4] = total.to_bytes(2, "big")
        header[6:8] = b"\0\0"
        return bytes(header) + b"".join(parts)
