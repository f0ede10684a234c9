# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is kept of an outage: each segment once, whole, and no more than there is room for."""

from __future__ import annotations

import socket
import struct

import pytest

from remus_colo.adapters.rawlink import Frame
from remus_colo.proxy.outage import Segment, Tail

MAC = bytes(6)
SYN, RST, ACK = 0x02, 0x04, 0x10


def tcp(seq: int, flags: int, data: bytes) -> bytes:
    return struct.pack("!HHIIBBHHH", 1234, 80, seq, 0, 5 << 4, flags, 1000, 0, 0) + data


def ipv4(
    payload: bytes, *, options: bytes = b"", protocol: int = socket.IPPROTO_TCP, fragment: int = 0
) -> bytes:
    header = 20 + len(options)
    first = struct.pack(
        "!BBHHHBBH", 0x40 | header // 4, 0, header + len(payload), 7, fragment, 64, protocol, 0
    )
    return first + bytes((10, 0, 0, 1, 10, 0, 0, 2)) + options + payload


def ipv6(payload: bytes, *, next_header: int = socket.IPPROTO_TCP) -> bytes:
    return struct.pack("!IHBB", 6 << 28, len(payload), next_header, 64) + bytes(range(32)) + payload


@pytest.mark.parametrize(
    "packet", [ipv4(tcp(1, ACK, b"x")), ipv4(tcp(1, ACK, b"x"), options=bytes(8)), ipv6(tcp(1, ACK, b"x"))]
)
def test_a_segment_without_its_padding(packet: bytes) -> None:
    segment = Segment.parse(packet + bytes(6))
    assert segment is not None
    assert segment.packet == packet
    assert not segment.opens_or_resets


@pytest.mark.parametrize(("flags", "so"), [(SYN, True), (SYN | ACK, True), (RST, True), (ACK, False)])
def test_segments_that_open_or_reset(flags: int, so: bool) -> None:
    segment = Segment.parse(ipv4(tcp(1, flags, b"")))
    assert segment is not None
    assert segment.opens_or_resets == so


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        bytes(60),
        ipv4(tcp(1, ACK, b"")[:19]),
        ipv4(tcp(1, ACK, b"data"))[:-1],
        ipv4(tcp(1, ACK, b""), protocol=socket.IPPROTO_UDP),
        ipv4(tcp(1, ACK, b""), fragment=0x2000),
        ipv4(tcp(1, ACK, b""), fragment=1),
        ipv6(tcp(1, ACK, b""), next_header=0),
        ipv6(tcp(1, ACK, b"data"))[:-1],
        b"\x41" + ipv4(tcp(1, ACK, b""))[1:],
    ],
)
def test_what_is_no_whole_segment(payload: bytes) -> None:
    assert Segment.parse(payload) is None


def kept(tail: Tail) -> list[bytes]:
    return [segment.packet for _, segment in tail.take()]


def add(tail: Tail, packet: bytes) -> None:
    segment = Segment.parse(packet)
    assert segment is not None
    tail.add(Frame(0x0800, packet, MAC, MAC, True), segment)


def test_of_repetitions_the_last_in_the_place_of_the_first() -> None:
    tail = Tail()
    add(tail, ipv4(tcp(1, ACK, b"a")))
    add(tail, ipv4(tcp(2, ACK, b"b")))
    add(tail, ipv4(tcp(1, ACK, b"ab")))
    assert kept(tail) == [ipv4(tcp(1, ACK, b"ab")), ipv4(tcp(2, ACK, b"b"))]
    assert kept(tail) == []


def test_an_acknowledgement_does_not_take_the_place_of_data() -> None:
    tail = Tail()
    add(tail, ipv4(tcp(1, ACK, b"a")))
    add(tail, ipv4(tcp(1, ACK, b"")))
    assert len(tail) == 2


def test_room() -> None:
    packets = [ipv4(tcp(number, ACK, b"data")) for number in range(4)]
    few, small = Tail(segments=2), Tail(size=2 * len(packets[0]))
    for packet in packets:
        add(few, packet)
        add(small, packet)
    add(few, packets[0])  # one that has its place already
    assert kept(few) == kept(small) == packets[:2]
    add(small, packets[3])
    assert kept(small) == packets[3:]
