# SPDX-License-Identifier: LGPL-2.1-or-later
"""Map the SVM's TCP sequence space onto the PVM's, which is the one that the client knows.

Runs on the backup host, between the SVM and everything else.  For a connection made since the last checkpoint the
two VMs chose different initial sequence numbers; ``offset = PVM's ISN - SVM's ISN`` (mod 2**32) is added to the sequence
numbers that the SVM sends, and taken from acknowledgements and SACK blocks that the client sends.

* The SVM's ISN comes from its SYN-ACK, or its SYN if the guest opens the connection.  The SVM is trusted: only
  what *it* sends starts, restarts or (with a reset) ends a mapping.
* The PVM's ISN comes from what the client acknowledges.  A client's packet is trusted with that only if its sequence
  number is exactly the one that the SVM's SYN-ACK acknowledges (client's ISN + 1): older duplicates on a reused
  4-tuple have another one.  Output commit makes that acknowledgement the PVM's ISN + 1: nothing after the
  PVM's SYN-ACK leaves before the SVM sent the same, which it cannot before it saw that packet.

Why each decision is as it is: ``docs/rewriter.rst``.

Packets start at the IP header and must have finished checksums.  IPv4 only; fragments, and whatever is no
TCP (nor an ICMP error about TCP), are left as they are.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from remus_colo.proxy import headers
from remus_colo.proxy.headers import ACK, FIN, MASK32, RST, SYN

# A closed connection's last acknowledgements and FIN retransmissions still need the mapping.
LINGER_S = 60.0
# Linux gives up a SYN after 127 s and a SYN-ACK after 63 s (tcp_syn_retries 6, tcp_synack_retries 5).
HANDSHAKE_S = 180.0
# How long a client's packet waits for an SVM that lags with its SYN-ACK.
SYN_ANSWER_S = 3.0
HELD_PER_FLOW = 8
HELD_LIMIT = 4096
# A client's RST this far above the SVM's last acknowledgement may be one that the SVM accepts.
_RST_WINDOW_BYTES = 65535

_PLAIN_TIMESTAMPS = b"\x01\x01\x08\x0a"  # NOP, NOP, timestamps: the only options of most segments


@dataclass(slots=True)
class Counters:
    """What happened since the rewriter was made; packets unless said otherwise."""

    from_guest_rewritten: int = 0
    to_guest_rewritten: int = 0
    held: int = 0
    dropped: int = 0
    learned_flows: int = 0
    restarted_flows: int = 0
    evicted_flows: int = 0
    resets: int = 0  # checkpoints


class _Flow:
    """One 4-tuple.  Sequence numbers of the guest are in the SVM's space."""

    __slots__ = (
        "client_fin",
        "client_key",
        "deadline_s",
        "fast_open",
        "finished",
        "guest_ack",
        "guest_fin",
        "guest_key",
        "guest_opened",
        "held",
        "offset",
        "peer_next",
        "reset",
        "svm_isn",
        "svm_tsval",
        "syn_next",
        "syn_until_s",
    )

    def __init__(self, client_key: bytes, guest_key: bytes) -> None:
        self.client_key = client_key
        self.guest_key = guest_key
        self.held: list[bytes] = []
        self.syn_next: int | None = None  # ISN + 1 of a client's SYN that the SVM has not answered
        self.syn_until_s = 0.0
        self.deadline_s = 0.0
        self.offset: int | None = None
        self.start(None, None, None, guest_opened=False)

    def start(self, isn: int | None, peer_next: int | None, tsval: int | None, *, guest_opened: bool) -> None:
        self.svm_isn = isn
        self.peer_next = peer_next  # what the SVM's SYN-ACK acknowledged
        self.svm_tsval = tsval  # of the SVM's latest SYN or SYN-ACK
        self.guest_opened = guest_opened
        self.fast_open = False
        self.guest_ack: int | None = None
        self.guest_fin: int | None = None  # sequence number after the FIN
        self.client_fin: int | None = None
        self.finished = 0  # 1: the guest's FIN was acknowledged, 2: the client's
        self.reset = False


class Rewriter:
    """All flows of one SVM.  Not thread-safe.

    ``idle_s``: a mapped connection without a packet for so long is forgotten.  ``limit_flows``: at the limit, flows
    without a mapping go first.
    """

    def __init__(self, idle_s: float = 7200.0, limit_flows: int = 65536) -> None:
        self.counters = Counters()
        self._idle_s = idle_s
        self._limit_flows = max(1, limit_flows)
        # The same flows under the first 12 bytes of addresses and ports as each side's packets have them.
        self._by_client: dict[bytes, _Flow] = {}
        self._by_guest: dict[bytes, _Flow] = {}
        self._rewritten_flows = 0
        self._held_packets = 0
        self._ready: list[bytes] = []
        self._learning = True

    @property
    def flows(self) -> int:
        """Flows known, those in a handshake and those with offset zero included."""
        return len(self._by_guest)

    @property
    def rewritten_flows(self) -> int:
        """Flows with an offset that is not zero."""
        return self._rewritten_flows

    # -- the packet path

    def from_guest(self, now_s: float, packet: bytes) -> bytes | None:
        """A packet that the SVM sent: what to send in its place; None: as it is."""
        if len(packet) < 40 or packet[9] != 6:
            return None
        start = headers.tcp_start(packet)
        if not start:
            return None
        key = packet[12:24] if start == 20 else packet[12:20] + packet[start : start + 4]
        flow = self._by_guest.get(key)
        flags = packet[start + headers.FLAGS]
        if flags & SYN:
            if flags & (RST | FIN):
                return None
            flow = self._guest_syn(now_s, packet, start, key, flow, flags)
            return None if flow is None or not flow.offset else self._shift_guest(packet, start, flow)
        if flow is None or (flow.offset == 0 and flow.syn_next is None):
            return None
        return self._guest_segment(now_s, packet, start, flow, flags)

    def to_guest(self, now_s: float, packet: bytes) -> bytes | None:
        """A packet of the client for the SVM: what to send in its place; None: as it is; ``b""``: drop it."""
        if len(packet) < 40:
            return None
        if packet[9] != 6:
            return self._shift_quoted(packet) if packet[9] == 1 and self._rewritten_flows else None
        start = headers.tcp_start(packet)
        if not start:
            return None
        key = packet[12:24] if start == 20 else packet[12:20] + packet[start : start + 4]
        flow = self._by_client.get(key)
        flags = packet[start + headers.FLAGS]
        if flags & (SYN | ACK | RST | FIN) == SYN:
            self._client_syn(now_s, packet, start, key, flow)
            return None
        if flow is None:
            return None
        if flow.syn_next is not None:
            verdict = self._await_answer(now_s, packet, start, flow, flags)
            if verdict is not None:
                return verdict
        if flow.offset == 0:
            return None
        if flow.offset is None:
            return self._learn(now_s, packet, start, flow, flags)
        self._client_segment(now_s, packet, start, flow, flags)
        return self._shift_client(packet, start, flow) if flags & ACK else None

    def take_held(self) -> list[bytes]:
        """Client's packets that waited for the SVM's SYN-ACK and may go to the SVM now, in order.

        To be called after :meth:`from_guest`.  A caller that never does loses what TCP sends again.
        """
        if not self._ready:
            return []
        ready, self._ready = self._ready, []
        return ready

    # -- events

    def reset(self) -> None:
        """A checkpoint was applied: the SVM is a copy of the PVM, and every offset is zero.

        What the SVM sent before must not come to :meth:`from_guest` any more.
        """
        self._by_client.clear()
        self._by_guest.clear()
        self._ready.clear()
        self._rewritten_flows = 0
        self._held_packets = 0
        self.counters.resets += 1

    def stop_learning(self) -> None:
        """Failover: there is no PVM any more, connections from now on have the SVM's own numbers.

        Flows that are known, also those in a handshake, stay.  Final.  Without this call, a sender with a forged source
        address could finish a handshake with the SVM without having seen its SYN-ACK.
        """
        self._learning = False

    def expire(self, now_s: float) -> None:
        """Forget flows whose time is over.  To be called every few seconds."""
        for flow in [flow for flow in self._by_guest.values() if flow.deadline_s <= now_s]:
            self._forget(flow)

    # -- SYN and SYN-ACK

    def _guest_syn(
        self, now_s: float, packet: bytes, start: int, key: bytes, flow: _Flow | None, flags: int
    ) -> _Flow | None:
        isn, ack = headers.SEQ_ACK.unpack_from(packet, start + headers.SEQ)
        opens = not flags & ACK
        if flow is not None and flow.svm_isn == isn and (
            flow.guest_opened if opens or flow.peer_next is None else flow.peer_next == ack
        ):
            # Sent again, or the SYN-ACK of a simultaneous open, which has the SYN's number.
            flow.svm_tsval = headers.timestamp_value(packet, start)
            flow.syn_next = None
            self._discard_held(flow)
            if not opens:
                flow.peer_next = ack
            if flow.offset is None:
                flow.deadline_s = now_s + HANDSHAKE_S
            return flow
        if not self._learning:
            # A SYN from before the failover: its sender may have the PVM's answer.
            awaited = flow is not None and not opens and flow.syn_next == ack and now_s < flow.syn_until_s
            if not awaited:
                if flow is not None:
                    self._forget(flow)
                return None
        pvm_isn = None
        if flow is None:
            flow = self._add(now_s, key[4:8] + key[:4] + key[10:12] + key[8:10], key)
        elif flow.svm_isn is not None:
            self.counters.restarted_flows += 1
            if not opens and flow.peer_next == ack and flow.offset is not None:
                # The same handshake with another number (SYN cookies): the client's view of it stands.
                pvm_isn = (flow.svm_isn + flow.offset) & MASK32
        self._set_offset(flow, None)
        tsval = headers.timestamp_value(packet, start)
        flow.start(isn, None if opens else ack, tsval, guest_opened=opens)
        flow.deadline_s = now_s + HANDSHAKE_S
        if opens:
            flow.syn_next = None
            self._discard_held(flow)
            return flow
        # More than the SYN acknowledged: TCP fast open, the SVM may send data before the handshake's end.
        flow.fast_open = flow.syn_next is not None and flow.syn_next != ack
        held = flow.held if flow.syn_next == ack else []
        flow.syn_next = None
        if held:
            first = headers.tcp_start(held[0])
            pvm_isn = (headers.U32.unpack_from(held[0], first + headers.ACK_SEQ)[0] - 1) & MASK32
        if pvm_isn is not None:
            self._settle(now_s, flow, pvm_isn)
            for waiting in held:
                at = headers.tcp_start(waiting)
                self._client_segment(now_s, waiting, at, flow, waiting[at + headers.FLAGS])
                self._ready.append(self._shift_client(waiting, at, flow))
        self._discard_held(flow)
        return flow

    def _client_syn(self, now_s: float, packet: bytes, start: int, key: bytes, flow: _Flow | None) -> None:
        """A SYN alone changes no mapping: it may be old or forged.  The SVM's answer tells."""
        if not self._learning:
            return
        syn_next = (headers.U32.unpack_from(packet, start + headers.SEQ)[0] + 1) & MASK32
        if flow is None:
            flow = self._add(now_s, key, key[4:8] + key[:4] + key[10:12] + key[8:10])
            flow.deadline_s = now_s + SYN_ANSWER_S
        elif flow.svm_isn is not None and flow.peer_next == syn_next:
            return  # sent again
        if flow.syn_next != syn_next:
            self._discard_held(flow)
            flow.syn_next = syn_next
        flow.syn_until_s = now_s + SYN_ANSWER_S
        flow.deadline_s = max(flow.deadline_s, flow.syn_until_s)

    def _await_answer(
        self, now_s: float, packet: bytes, start: int, flow: _Flow, flags: int
    ) -> bytes | None:
        """Hold what belongs to a handshake that the SVM has not answered; None: not such a packet."""
        if now_s >= flow.syn_until_s:
            flow.syn_next = None
            self._discard_held(flow)
            return None
        seq = headers.U32.unpack_from(packet, start + headers.SEQ)[0]
        if flags & RST:
            if seq == flow.syn_next:
                flow.syn_next = None
                self._discard_held(flow)
            return None
        # The first one must be the one that may teach; segments of the same flight follow it.
        if not flags & ACK or flags & SYN or not (
            seq == flow.syn_next or (flow.held and (seq - flow.syn_next) & MASK32 <= _RST_WINDOW_BYTES)
        ):
            return None
        if len(flow.held) < HELD_PER_FLOW and self._held_packets < HELD_LIMIT:
            flow.held.append(bytes(packet))
            self._held_packets += 1
            self.counters.held += 1
        else:
            self.counters.dropped += 1
        return b""

    # -- learning

    def _learn(self, now_s: float, packet: bytes, start: int, flow: _Flow, flags: int) -> bytes | None:
        """A client's packet of a flow whose offset is unknown."""
        if flow.svm_isn is None or not flags & ACK:
            return None
        seq, ack = headers.SEQ_ACK.unpack_from(packet, start + headers.SEQ)
        if flow.peer_next is None:
            # SYN-SENT: only a SYN-ACK, or the RST of a closed port, answers the SYN.  Anything else the SVM
            # answers with a reset, and so does the PVM.
            teaches = bool(flags & (SYN | RST))
        elif flags & RST:
            return None  # judged by its sequence number alone
        elif flags & SYN:
            if not flow.guest_opened:
                return None
            teaches = (seq + 1) & MASK32 == flow.peer_next
        else:
            teaches = seq == flow.peer_next
            if not teaches:
                # As it is, it would make the SVM reset the connection.
                self.counters.dropped += 1
                return b""
        if not teaches:
            return None
        self._settle(now_s, flow, (ack - 1) & MASK32)
        if flags & SYN:
            flow.peer_next = (seq + 1) & MASK32
        self._client_segment(now_s, packet, start, flow, flags)
        return self._shift_client(packet, start, flow)

    def _settle(self, now_s: float, flow: _Flow, pvm_isn: int) -> None:
        assert flow.svm_isn is not None
        self._set_offset(flow, (pvm_isn - flow.svm_isn) & MASK32)
        # Without a mapping, the entry only keeps a late SYN-ACK from being taken for a new connection's.
        flow.deadline_s = now_s + (self._idle_s if flow.offset else LINGER_S)
        self.counters.learned_flows += 1

    # -- segments of flows with a mapping

    def _guest_segment(self, now_s: float, packet: bytes, start: int, flow: _Flow, flags: int) -> bytes | None:
        seq, ack = headers.SEQ_ACK.unpack_from(packet, start + headers.SEQ)
        if flow.syn_next is not None:
            # The SVM's answer to the client's SYN was no SYN-ACK.
            flow.syn_next = None
            self._discard_held(flow)
            if flow.svm_isn is None:
                self._forget(flow)
                return None
        if flow.offset is None:
            # The SVM's handshake ended without a packet that we saw: it passed before the SYN-ACK (sent again after
            # a checkpoint) did.  So the SVM is a copy of the PVM in this connection.
            if flow.peer_next is not None and not flow.fast_open and not flags & RST and flow.svm_isn is not None:
                progressed = flags & FIN or headers.payload_bytes(packet, start)
                if progressed or (flags & ACK and ack != flow.peer_next):
                    self._settle(now_s, flow, flow.svm_isn)
            return None
        if flow.offset == 0:
            return None
        if flags & RST:
            flow.reset = True
            flow.deadline_s = min(flow.deadline_s, now_s + LINGER_S)
            # The answer of a closed port to a segment without ACK: its 0 is no sequence number (RFC 9293, 3.5.2).
            return None if flags & ACK and seq == 0 else self._shift_guest(packet, start, flow)
        flow.reset = False  # the SVM goes on: that reset did not end the connection
        if flags & ACK:
            flow.guest_ack = ack
            if flow.client_fin is not None and headers.at_or_after(ack, flow.client_fin):
                self._finish(now_s, flow, 2)
        if flags & FIN:
            flow.guest_fin = (seq + headers.payload_bytes(packet, start) + 1) & MASK32
        if flow.finished != 3:
            flow.deadline_s = now_s + self._idle_s
        return self._shift_guest(packet, start, flow)

    def _client_segment(self, now_s: float, packet: bytes, start: int, flow: _Flow, flags: int) -> None:
        """Follow the client's side of the connection's end."""
        if not flow.offset:
            return
        seq, ack = headers.SEQ_ACK.unpack_from(packet, start + headers.SEQ)
        known = flow.peer_next if flow.guest_ack is None else flow.guest_ack
        if flags & RST:
            if known is None or (seq - known) & MASK32 <= _RST_WINDOW_BYTES:
                flow.reset = True
                flow.deadline_s = min(flow.deadline_s, now_s + LINGER_S)
            return
        if flags & FIN and known is not None and headers.at_or_after(seq, known):
            flow.client_fin = (seq + headers.payload_bytes(packet, start) + 1) & MASK32
        fin = flow.guest_fin
        if flags & ACK and fin is not None and headers.at_or_after((ack - flow.offset) & MASK32, fin):
            self._finish(now_s, flow, 1)
        if flow.finished != 3 and not flow.reset:
            flow.deadline_s = now_s + self._idle_s

    def _finish(self, now_s: float, flow: _Flow, side: int) -> None:
        if flow.finished != 3:
            flow.finished |= side
            if flow.finished == 3:
                flow.deadline_s = now_s + LINGER_S

    def _shift_guest(self, packet: bytes, start: int, flow: _Flow) -> bytes:
        assert flow.offset is not None
        buffer = bytearray(packet)
        seq = headers.U32.unpack_from(buffer, start + headers.SEQ)[0]
        difference = headers.put32(buffer, start, start + headers.SEQ, (seq + flow.offset) & MASK32)
        headers.update_checksum(buffer, start + headers.CHECKSUM, difference)
        self.counters.from_guest_rewritten += 1
        return bytes(buffer)

    def _shift_client(self, packet: bytes, start: int, flow: _Flow) -> bytes:
        assert flow.offset is not None and flow.svm_isn is not None
        buffer = bytearray(packet)
        seq, ack = headers.SEQ_ACK.unpack_from(buffer, start + headers.SEQ)
        ack = (ack - flow.offset) & MASK32
        difference = headers.put32(buffer, start, start + headers.ACK_SEQ, ack)
        # Linux checks that what ends a handshake echoes a timestamp that it sent itself (tcp_input.c,
        # tcp_rcv_synsent_state_process; tcp_minisocks.c, tcp_check_req); this one echoes the PVM's.
        flags = buffer[start + headers.FLAGS]
        ends_handshake = ack == (flow.svm_isn + 1) & MASK32 and (flags & SYN or seq == flow.peer_next)
        echo = flow.svm_tsval if ends_handshake else None
        words = buffer[start + headers.DATA_OFFSET] >> 4
        plain = words == 5 or (words == 8 and buffer[start + 20 : start + 24] == _PLAIN_TIMESTAMPS)
        if not plain or echo is not None:
            difference += _shift_options(buffer, start, flow.offset, echo)
        headers.update_checksum(buffer, start + headers.CHECKSUM, difference)
        self.counters.to_guest_rewritten += 1
        return bytes(buffer)

    def _shift_quoted(self, packet: bytes) -> bytes | None:
        """An ICMP error about a segment of the guest: Linux ignores it if the quoted number is none of its own."""
        quoted, at = headers.quoted_tcp(packet)
        if not at:
            return None
        flow = self._by_guest.get(packet[quoted + 12 : quoted + 20] + packet[at : at + 4])
        if flow is None or not flow.offset:
            return None
        buffer = bytearray(packet)
        seq = headers.U32.unpack_from(buffer, at + headers.SEQ)[0]
        difference = headers.put32(buffer, at, at + headers.SEQ, (seq - flow.offset) & MASK32)
        headers.update_checksum(buffer, (packet[0] & 0x0F) * 4 + 2, difference)
        self.counters.to_guest_rewritten += 1
        return bytes(buffer)

    # -- the table

    def _add(self, now_s: float, client_key: bytes, guest_key: bytes) -> _Flow:
        if len(self._by_guest) >= self._limit_flows:
            self._make_room(now_s)
        flow = _Flow(client_key, guest_key)
        self._by_client[client_key] = self._by_guest[guest_key] = flow
        return flow

    def _make_room(self, now_s: float) -> None:
        self.expire(now_s)
        if len(self._by_guest) < self._limit_flows:
            return
        # Several at once, so that a flood of SYNs does not search the table for each.
        victims = heapq.nsmallest(
            max(1, self._limit_flows // 16),
            self._by_guest.values(),
            key=lambda flow: (bool(flow.offset), flow.deadline_s),
        )
        mapped = sum(1 for flow in victims if flow.offset)
        for flow in victims[: max(1, len(victims) - mapped)]:
            self._forget(flow)
            self.counters.evicted_flows += 1

    def _forget(self, flow: _Flow) -> None:
        self._set_offset(flow, None)
        self._discard_held(flow)
        del self._by_client[flow.client_key], self._by_guest[flow.guest_key]

    def _set_offset(self, flow: _Flow, offset: int | None) -> None:
        self._rewritten_flows += bool(offset) - bool(flow.offset)
        flow.offset = offset

    def _discard_held(self, flow: _Flow) -> None:
        if flow.held:
            self._held_packets -= len(flow.held)
            flow.held = []


def _shift_options(buffer: bytearray, start: int, offset: int, echo: int | None) -> int:
    """Take ``offset`` from SACK blocks and, if given, set TSecr to ``echo``; return the checksum's difference."""
    difference = 0
    for kind, at, length in headers.options(buffer, start):
        if kind == headers.OPTION_SACK and length % 8 == 2:
            for edge in range(at + 2, at + length, 4):
                value = (headers.U32.unpack_from(buffer, edge)[0] - offset) & MASK32
                difference += headers.put32(buffer, start, edge, value)
        elif kind == headers.OPTION_TIMESTAMPS and length == headers.TIMESTAMPS_BYTES and echo is not None:
            difference += headers.put32(buffer, start, at + 6, echo)
    return difference
