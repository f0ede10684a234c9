# SPDX-License-Identifier: LGPL-2.1-or-later
"""Packets for the comparator's tests, from the IP header on, and a comparator that numbers and checks them."""

from __future__ import annotations

import struct

from remus_colo.proxy.comparator import Comparator, CompareConfig, Decision, Reason

FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32
MASK = (1 << 32) - 1
IPV4, IPV6, VLAN = 0x0800, 0x86DD, 0x8100
HOLD: tuple[tuple[int, ...], Reason | None] = ((), None)


def ipv4(
    protocol: int,
    body: bytes,
    ident: int = 0,
    fragment: int = 0,
    ttl: int = 64,
    tos: int = 0,
    options: bytes = b"",
    to: bytes = b"\x0a\0\0\2",
) -> bytes:
    head = struct.pack(">BBHHHBBH", 0x45 + len(options) // 4, tos, 20 + len(options) + len(body), ident, fragment, ttl,
                       protocol, ident)  # fmt: skip
    return head + b"\x0a\0\0\1" + to + options + body


def ipv6(header: int, body: bytes, hops: int = 64, label: int = 0, to: bytes = bytes(15) + b"\2") -> bytes:
    return struct.pack(">IHBB", 6 << 28 | label, len(body), header, hops) + bytes(15) + b"\1" + to + body


def tcp_body(
    seq: int,
    ack: int,
    flags: int = ACK,
    data: bytes = b"",
    port: int = 4000,
    window: int = 9,
    options: bytes = b"",
    urgent: int = 0,
) -> bytes:
    offset = (5 + len(options) // 4) << 4
    return (
        struct.pack(">HHIIBBHHH", 80, port, seq & MASK, ack & MASK, offset, flags, window, 0, urgent)
        + options
        + data
    )


def tcp(
    seq: int,
    ack: int,
    flags: int = ACK,
    data: bytes = b"",
    port: int = 4000,
    window: int = 9,
    options: bytes = b"",
    urgent: int = 0,
    **header: int,
) -> bytes:
    return ipv4(6, tcp_body(seq, ack, flags, data, port, window, options, urgent), **header)


def tcp6(seq: int, ack: int, flags: int = ACK, data: bytes = b"", port: int = 4000) -> bytes:
    return ipv6(6, tcp_body(seq, ack, flags, data, port))


def udp_body(payload: bytes, port: int = 53, source: int = 5353) -> bytes:
    return struct.pack(">HHHH", source, port, 8 + len(payload), 0) + payload


def udp(payload: bytes, port: int = 53, source: int = 5353, **header: int | bytes) -> bytes:
    return ipv4(17, udp_body(payload, port, source), **header)  # type: ignore[arg-type]


def udp6(payload: bytes, port: int = 53, to: bytes = bytes(15) + b"\2") -> bytes:
    return ipv6(17, udp_body(payload, port), to=to)


class Bench:
    """A comparator with numbered packets (from 1 on), checked after each call.  ``ethertype`` is that of
    ``p`` and ``s``.
    """

    def __init__(self, ethertype: int = IPV4, **config: float) -> None:
        self.comparator = Comparator(CompareConfig(**config), 0.0)  # type: ignore[arg-type]
        self.ethertype = ethertype
        self.now_s = 0.0
        self.count = 0
        self.detail = ""

    def _out(self, decision: Decision) -> tuple[tuple[int, ...], Reason | None]:
        self.comparator.check_invariants()
        if decision.checkpoint is not None:
            self.detail = decision.checkpoint.detail
        return decision.release, decision.checkpoint and decision.checkpoint.reason

    def p(self, packet: bytes, ethertype: int = 0, **more: int) -> tuple[tuple[int, ...], Reason | None]:
        self.count += 1
        return self._out(
            self.comparator.primary(self.now_s, self.count, packet, ethertype or self.ethertype, **more)
        )

    def s(self, packet: bytes, ethertype: int = 0, **more: int) -> tuple[tuple[int, ...], Reason | None]:
        return self._out(self.comparator.secondary(self.now_s, packet, ethertype or self.ethertype, **more))

    def tick(self, now_s: float) -> tuple[tuple[int, ...], Reason | None]:
        self.now_s = now_s
        return self._out(self.comparator.tick(now_s))

    def cut(self) -> int:
        held = self.comparator.cut(self.now_s)
        self.comparator.check_invariants()
        return held

    def commit(self) -> tuple[tuple[int, ...], Reason | None]:
        return self._out(self.comparator.commit(self.now_s))

    def resume(self) -> tuple[tuple[int, ...], Reason | None]:
        return self._out(self.comparator.secondary_resumed(self.now_s))

    def abort(self) -> tuple[tuple[int, ...], Reason | None]:
        return self._out(self.comparator.abort_cut(self.now_s))

    def checkpoint(self) -> tuple[int, ...]:
        self.cut()
        release, _ = self.commit()
        self.resume()
        return release

    def connect(self, port: int = 4000, isn: int = 100, ack: int = 50) -> Bench:
        """SYN-ACK on both sides: released as the next id."""
        self.p(tcp(isn, ack, SYN | ACK, port=port), IPV4)
        assert self.s(tcp(isn + 5000, ack, SYN | ACK, port=port), IPV4) == ((self.count,), None)
        return self
