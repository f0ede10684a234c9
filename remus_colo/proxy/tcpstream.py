# SPDX-License-Identifier: LGPL-2.1-or-later
"""One TCP flow, guest to client, as two byte streams that must be one: the PVM's and the SVM's.

Sequence positions are unwrapped: plain integers congruent to the 32-bit number on the wire, within 2**31 of the
watermark.  ``watermark`` is the position below which the PVM's stream is known to be good: every unit below it was
equal on both sides, or was sent by the PVM before the cut that this epoch began with.  Bytes at or above it are kept for
whichever side is ahead, and compared as soon as both sides have them; how they were cut into segments plays no part.

A flow is a series of connections, because a 4-tuple is used again.  Both sides go through the same series, each at its own
pace: each connection starts with a SYN that has a new initial sequence number *of that side*.

RFC 9293 is the source for what takes up sequence space: each byte of data, SYN, and FIN.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from .packets import ACK, FIN, RST, SYN, Held, Packet

_HALF = 1 << 31
_MASK = (1 << 32) - 1


class Divergence(NamedTuple):
    """Where and how the two streams differ.

    :ivar offset: bytes from the start of the connection, or from where it was first seen.
    :ivar sequence: the PVM's sequence number there.
    """

    offset: int
    sequence: int
    what: str

    def __str__(self) -> str:
        return f"byte {self.offset} (sequence {self.sequence}): {self.what}"


class Runs:
    """Bytes of one side above the watermark: disjoint runs in ascending order.

    Only the first run may begin below the watermark (its used-up part is not cut off: that would copy).
    """

    __slots__ = ("runs", "size")

    def __init__(self) -> None:
        self.runs: deque[tuple[int, bytes]] = deque()
        self.size = 0  # bytes kept, used-up part of the first run included

    def insert(self, start: int, data: bytes) -> int | None:
        """Keep what is new of ``data``.

        :return: None, or the first position where ``data`` contradicts the bytes that are here already.
        """
        runs = self.runs
        if not runs or start >= runs[-1][0] + len(runs[-1][1]):
            runs.append((start, data))
            self.size += len(data)
            return None
        end = start + len(data)
        merged: deque[tuple[int, bytes]] = deque()
        position = start
        for low, old in runs:
            high = low + len(old)
            both_low, both_high = max(low, start), min(high, end)
            if both_low < both_high:
                mine, theirs = data[both_low - start:both_high - start], old[both_low - low:both_high - low]
                if mine != theirs:
                    return both_low + first_difference(mine, theirs)
            stop = min(low, end)
            if position < stop:
                merged.append((position, data[position - start:stop - start]))
                self.size += stop - position
            position = max(position, high)
            merged.append((low, old))
        if position < end:
            merged.append((position, data[position - start:]))
            self.size += end - position
        self.runs = merged
        return None

    def forget_below(self, position: int) -> None:
        runs = self.runs
        while runs and runs[0][0] + len(runs[0][1]) <= position:
            self.size -= len(runs.popleft()[1])

    def drop_last(self) -> None:
        self.size -= len(self.runs.pop()[1])

    def has(self, position: int) -> bool:
        """There is a byte at ``position``, which is the watermark."""
        return bool(self.runs) and self.runs[0][0] <= position


def first_difference(one: bytes, other: bytes) -> int:
    """Index of the first differing byte of two unequal strings of one length (by halving: no loop over bytes)."""
    low, high = 0, len(one)
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] != other[low:middle]:
            high = middle
        else:
            low = middle
    return low


class Connection:
    """One connection of a flow."""

    __slots__ = ("index", "isn", "next", "origin", "primary", "primary_ack", "primary_fin", "primary_high",
                 "primary_rst", "primary_seen", "reference", "secondary", "secondary_ack", "secondary_fin",
                 "secondary_isn", "secondary_rst", "secondary_seen", "syn_payload", "watermark")

    def __init__(self, index: int) -> None:
        self.index = index
        self.next: Connection | None = None
        self.primary_seen = False
        self.secondary_seen = False
        self.isn: int | None = None  # 32 bits, as on the wire
        self.secondary_isn: int | None = None
        self.syn_payload = b""  # of an SVM's SYN that came before the PVM's (TCP fast open, RFC 7413)
        self.reference: int | None = None  # what to unwrap sequence numbers by while there is no watermark
        self.origin: int | None = None
        self.watermark: int | None = None
        self.primary = Runs()
        self.secondary = Runs()
        self.primary_high: int | None = None  # behind the highest unit that the PVM has sent
        self.primary_fin: int | None = None  # position of the FIN itself
        self.secondary_fin: int | None = None
        self.primary_ack: int | None = None  # highest
        self.secondary_ack: int | None = None
        self.primary_rst = False
        self.secondary_rst: bytes | None = None  # its payload

    def unwrap(self, seq: int) -> int:
        reference = self.watermark
        if reference is None:
            reference = self.reference
            if reference is None:
                self.reference = reference = seq + (1 << 32)
        return reference + ((seq - reference + _HALF) & _MASK) - _HALF

    def unwrap_ack(self, ack: int) -> int:
        reference = self.secondary_ack
        if reference is None:
            reference = self.primary_ack
            if reference is None:
                return ack + (1 << 32)
        return reference + ((ack - reference + _HALF) & _MASK) - _HALF

    def start(self, position: int) -> None:
        """The PVM's stream begins at ``position`` for us."""
        self.watermark = position
        if self.origin is None:
            self.origin = position
        self.secondary.forget_below(position)
        if self.syn_payload:
            self.secondary.insert(position, self.syn_payload)
            self.syn_payload = b""


class TcpStream:
    """The state of one TCP flow within one epoch."""

    __slots__ = ("connection", "diverged", "secondary_connection")

    def __init__(self) -> None:
        self.connection = self.secondary_connection = Connection(0)
        self.diverged: Divergence | None = None

    @property
    def secondary_bytes(self) -> int:
        """SVM bytes kept."""
        connection: Connection | None = self.connection
        if connection is self.secondary_connection and connection.next is None:
            return connection.secondary.size + len(connection.syn_payload)
        if self.secondary_connection.index < self.connection.index:
            connection = self.secondary_connection
        size = 0
        while connection is not None:
            size += connection.secondary.size + len(connection.syn_payload)
            connection = connection.next
        return size

    def shrink(self, excess: int) -> int:
        """Throw away the latest SVM bytes of the SVM's connection until ``excess`` bytes are gone; return how many are."""
        connection = self.secondary_connection
        runs = connection.secondary
        before = runs.size + len(connection.syn_payload)
        connection.syn_payload = b""
        while runs.runs and before - runs.size < excess:
            runs.drop_last()
        return before - runs.size

    def primary(self, held: Held) -> None:
        """Take a PVM segment: set its ``conn``, ``end`` and ``ack``, and compare what can be compared."""
        packet = held.packet
        assert packet is not None
        flags = packet.flags
        connection = self._primary_syn(packet.seq) if flags & (SYN | RST) == SYN else self.connection
        connection.primary_seen = True
        held.conn = connection
        held.end = held.ack = None
        if flags & ACK:
            held.ack = ack = connection.unwrap_ack(packet.ack)
            if connection.primary_ack is None or ack > connection.primary_ack:
                connection.primary_ack = ack
        if flags & RST:
            connection.primary_rst = True
            return
        data = packet.payload
        if not data and not flags & (SYN | FIN):
            return  # takes up no sequence space: pure ACK, window update, keepalive, probe

        start = connection.unwrap(packet.seq)
        if flags & SYN:
            start += 1
        if connection.watermark is None:
            connection.start(start)
        watermark = connection.watermark
        assert watermark is not None
        fin = data_end = start + len(data)
        held.end = end = data_end + 1 if flags & FIN else data_end
        high = connection.primary_high
        if high is None or end > high:
            connection.primary_high = end
        if flags & FIN and connection.primary_fin != fin:
            if connection.primary_fin is None and (high is None or fin >= high):
                connection.primary_fin = fin
            elif self.diverged is None:
                self._differ(connection, fin, "the PVM's FIN contradicts what it sent before")
        if self.diverged is not None:
            return
        if end > watermark:
            if data and connection.primary_fin is not None and data_end > connection.primary_fin:
                self._differ(connection, connection.primary_fin, "the PVM sent data behind its own FIN")
                return
            if data and data_end > watermark:
                if start < watermark:
                    data = data[watermark - start:]
                    start = watermark
                conflict = connection.primary.insert(start, data)
                if conflict is not None:
                    self._differ(connection, conflict, "the PVM repeated it with another value")
                    return
        # Without anything new, too: with a SYN, SVM bytes may have waited for this start.
        self._advance(connection)

    def secondary(self, packet: Packet) -> None:
        """Take an SVM segment, in the PVM's sequence space except for a SYN, and compare what can be compared."""
        flags = packet.flags
        seq = packet.seq
        connection = self._secondary_syn(seq) if flags & (SYN | RST) == SYN else self.secondary_connection
        connection.secondary_seen = True
        if flags & ACK:
            ack = connection.unwrap_ack(packet.ack)
            if connection.secondary_ack is None or ack > connection.secondary_ack:
                connection.secondary_ack = ack
        data = packet.payload
        if flags & RST:
            connection.secondary_rst = data
            return
        if self.diverged is not None:
            return
        if flags & SYN:
            if not data:
                return
            if connection.isn is None:
                connection.syn_payload = data
                return
            seq = connection.isn + 1 & _MASK
        elif not data and not flags & FIN:
            return

        start = connection.unwrap(seq)
        end = start + len(data)
        watermark = connection.watermark
        if flags & FIN and (watermark is None or end >= watermark):
            if connection.secondary_fin is not None and connection.secondary_fin != end:
                self._differ(connection, end, "the SVM's FIN contradicts what it sent before")
                return
            connection.secondary_fin = end
        if watermark is None or end > watermark:
            if watermark is not None and start < watermark:
                data = data[watermark - start:]
                start = watermark
            if data:
                conflict = connection.secondary.insert(start, data)
                if conflict is not None:
                    self._differ(connection, conflict, "the SVM repeated it with another value")
                    return
        if watermark is not None:
            self._advance(connection)

    def ready(self, held: Held) -> bool:
        """This packet may leave, as far as the packet itself is concerned (those before it come first)."""
        if self.diverged is not None:
            return False
        connection: Connection = held.conn
        if held.ack is not None and (connection.secondary_ack is None or held.ack > connection.secondary_ack):
            return False
        end = held.end
        if end is not None and end > connection.watermark:  # type: ignore[operator]
            return False
        packet = held.packet
        assert packet is not None
        flags = packet.flags
        if flags & (SYN | RST):
            if flags & RST:
                return connection.secondary_rst == packet.payload
            return connection.secondary_isn is not None
        return True

    def rebased(self) -> TcpStream:
        """The state of this flow in the next epoch, whose SVM begins as a copy of the PVM as it is now."""
        stream = TcpStream()
        old = self.connection
        if not old.primary_seen:
            return stream
        new = stream.connection
        new.primary_seen = new.secondary_seen = True
        new.isn = new.secondary_isn = old.isn
        new.reference = old.reference
        new.origin = old.origin
        new.watermark = new.primary_high = old.primary_high
        new.primary_fin = old.primary_fin
        new.primary_ack = new.secondary_ack = old.primary_ack
        new.primary_rst = old.primary_rst
        return stream

    def waits_for(self, held: Held) -> str:
        """What ``held`` waits for, in words for people."""
        if self.diverged is not None:
            return str(self.diverged)
        connection: Connection = held.conn
        packet = held.packet
        assert packet is not None
        if packet.flags & RST and connection.secondary_rst is None:
            return "the SVM has not reset the connection"
        if packet.flags & SYN and connection.secondary_isn is None:
            return "the SVM has not sent its SYN"
        if held.end is not None and held.end > connection.watermark:  # type: ignore[operator]
            offset = connection.watermark - connection.origin  # type: ignore[operator]
            return f"byte {offset} (sequence {connection.watermark & _MASK}): one side has not sent it"  # type: ignore[operator]
        if held.ack is not None and (connection.secondary_ack is None or held.ack > connection.secondary_ack):
            has = "nothing" if connection.secondary_ack is None else str(connection.secondary_ack & _MASK)
            return f"the PVM acknowledged {held.ack & _MASK}, the SVM {has}"
        return "packets before it wait"

    def check_invariants(self) -> None:
        """:raise AssertionError: a state that must not be."""
        connection: Connection | None = self.connection
        assert self.secondary_connection.index <= self.connection.index + 1
        while connection is not None:
            watermark = connection.watermark
            for runs in (connection.primary, connection.secondary):
                assert runs.size == sum(len(data) for _, data in runs.runs)
                previous = None
                for start, data in runs.runs:
                    assert data
                    assert previous is None or start >= previous
                    assert previous is None or watermark is None or start >= watermark
                    previous = start + len(data)
                    assert watermark is None or previous > watermark
            if watermark is not None and self.diverged is None:
                assert connection.primary_high is not None and watermark <= connection.primary_high
                assert not (connection.primary.has(watermark) and connection.secondary.has(watermark))
            connection = connection.next

    def _primary_syn(self, seq: int) -> Connection:
        connection = self.connection
        if connection.isn == seq:
            return connection
        fresh = not connection.primary_seen and (not connection.secondary_seen or connection.secondary_isn is not None)
        if not fresh:
            connection = self.connection = self._following(connection)
        connection.isn = seq
        connection.start(connection.unwrap(seq) + 1)
        return connection

    def _secondary_syn(self, seq: int) -> Connection:
        connection = self.secondary_connection
        # A rewriter that has learned the offset in the meantime gives a repeated SYN the PVM's number.
        if seq in (connection.secondary_isn, connection.isn) and connection.secondary_isn is not None:
            return connection
        fresh = not connection.secondary_seen and (not connection.primary_seen or connection.isn is not None)
        if not fresh:
            if connection.index > self.connection.index:
                # The SVM is one connection ahead already and opens yet another: that one replaces it.
                connection.secondary_ack = connection.secondary_rst = connection.secondary_fin = None
                connection.secondary = Runs()
                connection.syn_payload = b""
                connection.reference = None
            else:
                connection = self.secondary_connection = self._following(connection)
        connection.secondary_isn = seq
        return connection

    @staticmethod
    def _following(connection: Connection) -> Connection:
        if connection.next is None:
            connection.next = Connection(connection.index + 1)
        return connection.next

    def _differ(self, connection: Connection, position: int, what: str) -> None:
        origin = connection.origin if connection.origin is not None else position
        self.diverged = Divergence(position - origin, position & _MASK, what)

    def _advance(self, connection: Connection) -> None:
        """Move the watermark over all that both sides have and that is equal."""
        primary, secondary = connection.primary.runs, connection.secondary.runs
        watermark = connection.watermark
        assert watermark is not None
        while primary and secondary:
            primary_start, mine = primary[0]
            secondary_start, theirs = secondary[0]
            if primary_start > watermark or secondary_start > watermark:
                break
            primary_at, secondary_at = watermark - primary_start, watermark - secondary_start
            primary_left, secondary_left = len(mine) - primary_at, len(theirs) - secondary_at
            count = min(primary_left, secondary_left)
            a, b = mine[primary_at:primary_at + count], theirs[secondary_at:secondary_at + count]
            if a != b:
                at = first_difference(a, b)
                connection.watermark = watermark
                self._differ(connection, watermark + at, f"PVM {a[at]:#04x}, SVM {b[at]:#04x}")
                return
            watermark += count
            if count == primary_left:
                primary.popleft()
                connection.primary.size -= len(mine)
            if count == secondary_left:
                secondary.popleft()
                connection.secondary.size -= len(theirs)
        connection.watermark = watermark
        if connection.primary_fin == watermark:
            if connection.secondary_fin == watermark:
                connection.watermark = watermark + 1
                connection.secondary.forget_below(watermark + 1)
            elif connection.secondary.has(watermark):
                self._differ(connection, watermark, "PVM FIN, SVM data")
        elif connection.secondary_fin == watermark and connection.primary.has(watermark):
            self._differ(connection, watermark, "PVM data, SVM FIN")
