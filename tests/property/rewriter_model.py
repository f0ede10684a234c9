# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client and a guest that speak enough TCP, in real packets, to test the rewriter between them."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

SYN, RST, ACK = 2, 4, 16

M = 1 << 32
WINDOW = 65535
CLIENT, GUEST = bytes((192, 0, 2, 9)), bytes((192, 0, 2, 80))


class Family:
    """Which IP :func:`build` makes packets of."""

    v6 = False


def stream(first: int, count: int, salt: int) -> bytes:
    """Bytes ``first`` to ``first + count`` of a stream that repeats only after long."""
    return bytes((pos * 31 + (pos >> 8) * 7 + salt) & 0xFF for pos in range(first, first + count))


def checksum(data: bytes) -> int:
    """RFC 1071, word by word."""
    total = sum(word for (word,) in struct.iter_unpack("!H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total


def build(
    to_guest: bool, flags: int, seq: int, ack: int, payload: bytes = b"", options: bytes = b""
) -> bytes:
    source, target, ports = (CLIENT, GUEST, (40000, 80)) if to_guest else (GUEST, CLIENT, (80, 40000))
    if Family.v6:
        source, target = source * 4, target * 4
    options += b"\0" * (-len(options) % 4)
    tcp = struct.pack("!HHIIBBHHH", *ports, seq % M, ack % M, (5 + len(options) // 4) << 4, flags, 500, 0, 0)
    tcp += options + payload
    total = checksum(source + target + struct.pack("!II", len(tcp), 6) + tcp)
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0x4000, 64, 6, 0)
    if Family.v6:
        ip = struct.pack("!IHBB", 6 << 28, len(tcp), 6, 64)
    return ip + source + target + tcp[:16] + struct.pack("!H", total) + tcp[18:]


@dataclass(frozen=True)
class Segment:
    flags: int
    seq: int
    ack: int
    payload: bytes


def read(packet: bytes) -> Segment:
    """Check the checksum in full, and take the packet apart."""
    start, addresses = (40, packet[8:40]) if packet[0] >> 4 == 6 else (20, packet[12:20])
    tcp = packet[start:]
    assert checksum(addresses + struct.pack("!II", len(tcp), 6) + tcp) == 0
    seq, ack, header, flags = struct.unpack_from("!IIBB", tcp, 4)
    return Segment(flags, seq, ack, tcp[(header >> 4) * 4 :])


@dataclass(frozen=True)
class Sent:
    """A guest's packet with what a test wants to know of it."""

    packet: bytes
    client_isn: int  # of the connection
    pos: int | None  # in the guest's stream; None for SYN-ACKs and resets


@dataclass
class Guest:
    """A server on one port.  ``isns`` are the numbers that it will choose."""

    isns: list[int]
    state: str = "listen"
    isn: int = 0
    client_isn: int = 0
    rcv_nxt: int = 0
    acked: int = 0  # of its stream
    sent: int = 0
    received: int = 0
    strict: bool = False  # fail on a client's packet that this TCP would refuse for its acknowledgement

    def _packet(self, flags: int, seq: int, payload: bytes = b"", pos: int | None = None) -> Sent:
        return Sent(build(False, flags, seq, self.rcv_nxt, payload), self.client_isn, pos)

    def _acknowledge(self) -> Sent:
        return self._packet(ACK, self.isn + 1 + self.sent, pos=self.sent)

    def receive(self, packet: bytes) -> list[Sent]:
        got = read(packet)
        if self.state == "listen":
            if got.flags & RST:
                return []
            if got.flags & ACK:
                return [Sent(build(False, RST, got.ack, 0), 0, None)]
            self.state, self.isn = "syn-received", self.isns.pop() if self.isns else (self.isn * 5 + 77) % M
            self.client_isn, self.rcv_nxt = got.seq, (got.seq + 1) % M
            self.acked = self.sent = self.received = 0
            return self.again(0)
        if got.flags & RST:
            if got.seq == self.rcv_nxt:
                self.state = "listen"
            return []
        if got.flags & SYN:
            return self.again(0) if self.state == "syn-received" else [self._acknowledge()]
        ahead = (got.seq - self.rcv_nxt) % M
        behind = (self.rcv_nxt - got.seq) % M
        if ahead > WINDOW and behind > self.received:
            if self.state == "syn-received":
                return [self._packet(ACK, self.isn + 1, pos=0)]
            return [self._acknowledge()]
        covered = (got.ack - self.isn - 1) % M
        if self.state == "syn-received":
            if covered:
                assert not self.strict, "the SVM would reset this handshake"
                return [Sent(build(False, RST, got.ack, 0), self.client_isn, None)]
            self.state = "established"
        if covered > self.sent:
            assert not self.strict or M - covered <= self.sent, "the SVM never sent what this acknowledges"
            return [self._acknowledge()]
        self.acked = max(self.acked, covered)
        if not got.payload:
            return []
        if behind < len(got.payload) and behind <= self.received:
            fresh = got.payload[behind:]
            assert fresh == stream(self.received, len(fresh), 1)
            self.received += len(fresh)
            self.rcv_nxt = (self.rcv_nxt + len(fresh)) % M
        return [self._acknowledge()]

    def send(self, count: int) -> list[Sent]:
        if self.state != "established":
            return []
        pos, self.sent = self.sent, self.sent + count
        return [self._packet(ACK, self.isn + 1 + pos, stream(pos, count, 2), pos)]

    def again(self, count: int) -> list[Sent]:
        """What a retransmission timer sends; ``count``: bytes at most."""
        if self.state == "syn-received":
            return [self._packet(SYN | ACK, self.isn)]
        count = min(count, self.sent - self.acked)
        if self.state == "listen" or not count:
            return []
        return [self._packet(ACK, self.isn + 1 + self.acked, stream(self.acked, count, 2), self.acked)]


@dataclass
class Client:
    """Opens one connection after the other from one port."""

    state: str = "closed"
    isn: int = 0
    peer_isn: int = 0
    sent: int = 0
    acked: int = 0
    received: int = 0
    peers: dict[int, int] = field(default_factory=dict)  # own ISN: the ISN that the guest has for the client

    def _packet(self, flags: int, pos: int, payload: bytes = b"", options: bytes = b"") -> bytes:
        ack = self.peer_isn + 1 + self.received if flags & ACK else 0
        return build(True, flags, self.isn + 1 + pos, ack, payload, options)

    def connect(self, isn: int) -> bytes:
        self.state, self.isn = "syn-sent", isn
        self.sent = self.acked = self.received = 0
        return self.syn()

    def syn(self) -> bytes:
        return self._packet(SYN, -1)

    def send(self, count: int) -> bytes:
        pos, self.sent = self.sent, self.sent + count
        return self._packet(ACK, pos, stream(pos, count, 1))

    def again(self, count: int) -> bytes:
        if self.state == "syn-sent":
            return self.syn()
        count = min(count, self.sent - self.acked)
        return self._packet(ACK, self.acked, stream(self.acked, count, 1))

    def abort(self) -> bytes:
        self.state = "closed"
        return self._packet(RST, self.sent)

    def receive(self, packet: bytes) -> list[bytes]:
        got = read(packet)
        if got.flags & RST or self.state == "closed":
            return []
        if self.state == "syn-sent":
            if got.flags & SYN and got.ack == (self.isn + 1) % M:
                self.state, self.peer_isn = "established", got.seq
                self.peers[self.isn] = got.seq
                return [self._packet(ACK, 0)]
            return []
        behind = (self.peer_isn + 1 + self.received - got.seq) % M
        if got.flags & SYN or behind > WINDOW:
            return [self._packet(ACK, self.sent)]  # a challenge
        covered = (got.ack - self.isn - 1) % M
        if covered <= self.sent:
            self.acked = max(self.acked, covered)
        if behind < len(got.payload):
            fresh = got.payload[behind:]
            assert fresh == stream(self.received, len(fresh), 2), "bytes of two histories"
            self.received += len(fresh)
        return [self._packet(ACK, self.sent)] if got.payload else []
