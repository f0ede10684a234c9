# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a fuzzer's bytes make the comparator do: packets of every kind, whole, cut and broken, and checkpoints
at any point. The rewriter gets its share of them, too.

Raises AssertionError if one breaks a promise; memory errors are the sanitizers' to find.
"""

from __future__ import annotations

import struct

from remus_colo.proxy.comparator import Comparator, CompareConfig, Decision
from remus_colo.proxy.rewriter import Rewriter

ETHERTYPES = (0x0800, 0x0800, 0x0800, 0x86DD, 0x86DD, 0x8100, 0x88A8, 0x0806)
SMALL = CompareConfig(held_bytes=2000, held_packets=12, flows=4, secondary_bytes=3000, idle_flow_s=2.0)
LARGE = CompareConfig(own_sequence=True)
STEPS_MAX = 400


class Bytes:
    """Reads values off the input; zeros behind its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        self._at += count
        return part + bytes(count - len(part))

    def byte(self) -> int:
        return self.take(1)[0]

    def short(self) -> int:
        return int.from_bytes(self.take(2), "big")


def ipv4(source: Bytes, protocol: int, body: bytes) -> bytes:
    flags = source.byte()
    fragment = (0, 0x2000, 1, 0x2001, 0x4000, source.short())[flags % 6]
    options = bytes(4 * (flags >> 6))
    head = struct.pack(
        ">BBHHHBBH",
        0x45 + (flags >> 6),
        0,
        20 + len(options) + len(body),
        flags >> 4 & 3,
        fragment,
        64,
        protocol,
        0,
    )
    return head + b"\x0a\0\0\1" + ((b"\xe0\0\0\1") if flags == 255 else b"\x0a\0\0\2") + options + body


def ipv6(source: Bytes, protocol: int, body: bytes) -> bytes:
    extensions, first = b"", protocol
    for _ in range(source.byte() % 4):
        kind = (0, 60, 43, 44)[source.byte() % 4]
        fill = source.take(7) if kind == 44 else bytes([0]) + source.take(6)
        extensions, first = bytes([first]) + fill + extensions, kind
    head = struct.pack(">IHBB", 0x60000000, len(extensions) + len(body), first, 64)
    return head + bytes(15) + b"\1" + bytes(15) + b"\2" + extensions + body


def transport(source: Bytes) -> tuple[int, bytes]:
    kind = source.byte()
    data = (b"abcdefgh" * 8)[source.byte() % 8 :][: source.byte() % 48]
    if kind & 1:
        data = source.take(len(data))
    if kind < 150:
        seq, ack = 0xFFFFFFF0 + source.byte() & 0xFFFFFFFF, 1000 + source.byte() % 8
        if kind > 140:
            seq, ack = int.from_bytes(source.take(4), "big"), int.from_bytes(source.take(4), "big")
        flags = source.byte() & 0x3F
        return 6, struct.pack(">HHIIBBHHH", 80, 4000 + (kind & 2), seq, ack, 0x50 + (source.byte() >> 6 << 4), flags, 9, 0,
                              source.byte() if flags & 32 else 0) + data  # fmt: skip
    if kind < 200:
        return 17, struct.pack(">HHHH", 5000, 53 + (kind & 2), 8 + len(data), 0) + data
    if kind < 240:
        return (1, 58)[kind & 1], bytes([source.byte(), 0, 0, 0, 0, kind & 3, 0, source.byte() & 3]) + data
    return source.byte(), data


def packet(source: Bytes, last: bytes) -> tuple[bytes, int]:
    how = source.byte()
    if how < 16:
        return source.take(source.byte()), ETHERTYPES[how % len(ETHERTYPES)]
    if how < 48 and last:  # the last one again, changed
        at, changed = source.short() % len(last), bytearray(last)
        changed[at] ^= source.byte()
        return bytes(changed), (0x86DD if changed[0] >> 4 == 6 else 0x0800)
    protocol, body = transport(source)
    if how & 1:
        made, ethertype = ipv6(source, protocol, body), 0x86DD
    else:
        made, ethertype = ipv4(source, protocol, body), 0x0800
    if how > 240:
        made, ethertype = bytes([0, how & 3]) + ethertype.to_bytes(2, "big") + made, 0x8100
    if 224 < how <= 240:
        made = made[: source.byte()]
    return made, ethertype


class Run:
    def __init__(self, config: CompareConfig) -> None:
        self.comparator = Comparator(config, 0.0)
        self.held: set[int] = set()
        self.given = 0
        self.cut = self.resumed = False

    def take(self, decision: Decision) -> None:
        for packet_id in decision.release:
            assert packet_id in self.held, "left twice, or was never given"
            self.held.remove(packet_id)
        self.comparator.check_invariants()
        assert self.comparator.counters.held == len(self.held)

    def step(self, source: Bytes, now_s: float, last: bytes) -> bytes:
        comparator, action = self.comparator, source.byte()
        if action < 200:
            made, ethertype = packet(source, last)
            wire_size = len(made) + action if action % 23 == 0 else 0
            if action % 3 != 1:
                self.held.add(self.given)
                self.given += 1
                self.take(comparator.primary(now_s, self.given - 1, made, ethertype, wire_size=wire_size))
            if action % 3 != 0:
                self.take(comparator.secondary(now_s, made, ethertype, wire_size=wire_size))
            return made
        if action < 212:
            self.take(comparator.tick(now_s))
        elif action < 224 and not self.cut:
            self.cut, self.resumed = True, False
            comparator.cut(now_s)
        elif action < 236 and self.cut:
            self.cut = False
            self.take(comparator.commit(now_s))
        elif action < 248:
            self.resumed = True
            self.take(comparator.secondary_resumed(now_s))
        elif action < 255 and self.cut and not self.resumed:
            self.cut = False
            self.take(comparator.abort_cut(now_s))
        elif action == 255 and not source:
            self.take(comparator.release_all(now_s))
            assert not self.held
        comparator.check_invariants()
        return last


def turned(packet: bytes) -> bytes:
    """The packet as if the client had sent it: addresses and ports change places."""
    if len(packet) >= 40 and packet[0] == 0x45:
        return packet[:12] + packet[16:20] + packet[12:16] + packet[22:24] + packet[20:22] + packet[24:]
    if len(packet) >= 60 and packet[0] >> 4 == 6:
        return packet[:8] + packet[24:40] + packet[8:24] + packet[42:44] + packet[40:42] + packet[44:]
    return packet


def run_rewriter(source: Bytes) -> None:
    rewriter = Rewriter(limit_flows=1 + source.byte() % 8)
    now_s, last = 0.0, b""
    for _ in range(STEPS_MAX):
        if not source:
            break
        action = source.byte()
        now_s += (0.0, 0.5, 4.0, 100.0)[action & 3]
        last, _ = packet(source, last)
        result = rewriter.from_guest(now_s, last) if action < 120 else rewriter.to_guest(now_s, turned(last))
        assert result is None or len(result) in (0, len(last))
        for held in rewriter.take_held():
            assert len(held) >= 40
        if action >= 250:
            rewriter.reset()
        elif action >= 240:
            rewriter.expire(now_s)
        elif action == 239:
            rewriter.stop_learning()
        assert rewriter.rewritten_flows <= rewriter.flows <= 8


def run(data: bytes) -> None:
    source = Bytes(data)
    kind = source.byte()
    if kind % 4 == 3:
        run_rewriter(source)
        return
    steps = Run(SMALL if kind & 1 else LARGE)
    now_s, last = 0.0, b""
    for _ in range(STEPS_MAX):
        if not source:
            break
        now_s += (0.0, 0.01, 0.2)[source.byte() % 3]
        last = steps.step(source, now_s, last)
    if steps.cut:
        steps.take(steps.comparator.commit(now_s))
    for packet_id in steps.held:
        assert steps.comparator.waits_for(packet_id)
    steps.comparator.cut(now_s)
    steps.take(steps.comparator.commit(now_s))
    assert not steps.held, "a checkpoint lets everything leave"
