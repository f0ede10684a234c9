# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages of the kernel's packet queue: what is in them is found, and nothing makes the parser read beyond them."""

from __future__ import annotations

import socket
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from remus_colo.adapters.native import compiled
from remus_colo.errors import HostError

try:
    lib, ffi = compiled()
except HostError as error:
    pytest.skip(str(error), allow_module_level=True)

# <linux/netfilter/nfnetlink_queue.h>
PACKET = 3 << 8 | 0
PACKET_HDR, PAYLOAD, CAP_LEN, VLAN = 1, 10, 13, 19
VLAN_PROTO, VLAN_TCI = 1, 2
NLA_F_NESTED = 1 << 15


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def message(attributes: bytes, kind: int = PACKET) -> bytes:
    generic = struct.pack("=BBH", socket.AF_INET, 0, socket.htons(7))
    return struct.pack("=IHHII", 20 + len(attributes), kind, 0, 0, 0) + generic + attributes


def parse(data: bytes) -> tuple[int, object]:
    """Of a buffer that ends where the message does, so that a sanitizer sees what reads beyond it."""
    packet = ffi.new("struct rq_packet *")
    buffer = ffi.new("uint8_t[]", data or b"\0")
    return lib.rq_parse(buffer, len(data), packet), (packet, buffer)


@given(
    packet_id=st.integers(0, 2**32 - 1),
    ethertype=st.integers(0, 0xFFFF),
    payload=st.binary(max_size=200),
    tci=st.none() | st.integers(0, 0xFFFF),
    more=st.none() | st.integers(1, 70000),
    others=st.lists(
        st.tuples(st.sampled_from([3, 5, 6, 7, 8, 9, 14, 20, 21]), st.binary(max_size=40)), max_size=4
    ),
)
@example(1, 0x0800, b"\x45\0\xff\xff" + bytes(24), None, None, [])
@example(1, 0x86DD, b"\x60\0\0\0\xff\xff" + bytes(34), None, None, [])
def test_all_that_is_told_is_found(
    packet_id: int,
    ethertype: int,
    payload: bytes,
    tci: int | None,
    more: int | None,
    others: list[tuple[int, bytes]],
) -> None:
    parts = [attribute(kind, value) for kind, value in others]
    parts.append(attribute(PACKET_HDR, struct.pack("!IHB", packet_id, ethertype, 0)))
    if tci is not None:
        tag = attribute(VLAN_TCI, struct.pack("!H", tci)) + attribute(VLAN_PROTO, b"\x81\x00")
        parts.append(attribute(VLAN | NLA_F_NESTED, tag))
    if more is not None:
        parts.append(attribute(CAP_LEN, struct.pack("!I", len(payload) + more)))
    # As the kernel does: the payload comes last, unpadded.
    parts.append(struct.pack("=HH", 4 + len(payload), PAYLOAD) + payload)
    result, (packet, _) = parse(message(b"".join(parts)))
    assert result == 0
    frame = packet.frame
    assert (packet.id, frame.ethertype) == (packet_id, ethertype)
    assert ffi.buffer(frame.data, frame.size)[:] == payload
    assert frame.vlan == (tci or 0) & 0xFFF
    assert frame.wire_size == len(payload) + (more or 0), "whatever an IP header claims"


@given(data=st.binary(max_size=120), whole=st.booleans())
def test_anything_else_is_refused_or_within_bounds(data: bytes, whole: bool) -> None:
    held = message(data) if whole else data
    result, (packet, buffer) = parse(held)
    if result == 0:
        start = int(ffi.cast("uintptr_t", buffer))
        at = int(ffi.cast("uintptr_t", packet.frame.data))
        assert start <= at
        assert at + packet.frame.size <= start + len(held)


@given(cut=st.integers(0, 60))
def test_a_message_that_is_cut_off(cut: int) -> None:
    whole = message(attribute(PACKET_HDR, struct.pack("!IHB", 7, 0x0800, 0)) + attribute(PAYLOAD, bytes(24)))
    result, _ = parse(whole[: min(cut, len(whole) - 1)])
    assert result < 0
