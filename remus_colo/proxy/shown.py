# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the packets of a capture carry, for explanations: shown to people, never judged by.

A packet is what lies behind the Ethernet addresses and type, with that type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

_TYPE_IPV4, _TYPE_IPV6, _VLAN_TYPES = 0x0800, 0x86DD, (0x8100, 0x88A8, 0x9100)
_SNAP = b"\xaa\xaa\x03\0\0\0"
_EXTENSIONS, _FRAGMENT = (0, 43, 60, 135, 139, 140), 44
_CHECKSUMS = {1: 2, 58: 2, 17: 6}  # where: of ICMP, ICMPv6, UDP
_NEAR = 100  # packets of a capture, in which the fragments of one datagram are looked for

Packet = tuple[bytes, int]


class _Ip(NamedTuple):
    """:ivar before: tags and the like.
    :ivar at: bytes of the IP headers.
    :ivar datagram: of a fragment, what it has in common with its others; and where in it it lies.
    """

    before: bytes
    packet: bytes
    at: int
    protocol: int
    datagram: bytes = b""
    offset: int = 0


def _ip(packet: bytes, ethertype: int) -> _Ip | None:
    """Without what follows the IP length; None for what is no IP packet."""
    inner = packet
    while ethertype in _VLAN_TYPES and len(inner) >= 4:
        inner, ethertype = inner[4:], int.from_bytes(inner[2:4], "big")
    if ethertype < 0x600 and inner.startswith(_SNAP) and len(inner) >= 8:
        inner, ethertype = inner[8:], int.from_bytes(inner[6:8], "big")
    before = packet[: len(packet) - len(inner)]
    if ethertype == _TYPE_IPV4 and len(inner) >= 20:
        inner = inner[: max(20, int.from_bytes(inner[2:4], "big"))]
        fragment = int.from_bytes(inner[6:8], "big")
        datagram = inner[4:6] + inner[9:10] + inner[12:20] if fragment & 0x3FFF else b""
        return _Ip(before, inner, (inner[0] & 15) * 4, inner[9], datagram, (fragment & 0x1FFF) * 8)
    if ethertype != _TYPE_IPV6 or len(inner) < 40:
        return None
    inner = inner[: 40 + int.from_bytes(inner[4:6], "big")]
    protocol, at = inner[6], 40
    while protocol in _EXTENSIONS and len(inner) >= at + 8:
        protocol, at = inner[at], at + (inner[at + 1] + 1) * 8
    if protocol == _FRAGMENT and len(inner) >= at + 8:
        datagram = inner[at + 4 : at + 8] + inner[8:40]
        offset = int.from_bytes(inner[at + 2 : at + 4], "big") & 0xFFF8
        return _Ip(before, inner, at + 8, inner[at], datagram, offset)
    return _Ip(before, inner, at, protocol)


def whole(packet_at: Callable[[int], Packet], count: int, index: int) -> Packet:
    """A packet of a capture; if it is a fragment, the datagram that it was cut from, as far as it is there.

    :param count: packets of the capture.
    """
    packet, ethertype = packet_at(index)
    ip = _ip(packet, ethertype)
    if ip is None or not ip.datagram:
        return packet, ethertype
    pieces: dict[int, bytes] = {}
    for near in range(max(0, index - _NEAR), min(count, index + _NEAR)):
        other = _ip(*packet_at(near))
        if other is not None and (other.before, other.datagram) == (ip.before, ip.datagram):
            pieces.setdefault(other.offset, other.packet[other.at :])
    content = b"".join(pieces[offset] for offset in sorted(pieces))
    header = ip.packet
    if header[0] >> 4 == 4:
        size = (ip.at + len(content)).to_bytes(4, "big")[2:]
        header = header[:2] + size + header[4:6] + bytes(2) + header[8 : ip.at]
    else:
        size = len(content).to_bytes(4, "big")[2:]
        header = header[:4] + size + bytes([ip.protocol]) + header[7:40]
    return ip.before + header + content, ethertype


def carried(packet: bytes, ethertype: int) -> bytes:
    """What lies behind the IP headers, checksums blanked; all of what is no IP packet."""
    ip = _ip(packet, ethertype)
    if ip is None:
        return packet
    body = bytearray(ip.packet[ip.at :])
    checksum = _CHECKSUMS.get(ip.protocol)
    if checksum is not None and len(body) >= checksum + 2:
        body[checksum : checksum + 2] = b"\0\0"
    return bytes(body)


def first_difference(one: bytes, other: bytes) -> int | None:
    """Index of the first byte that is not the same in both, the end of the shorter one included; None if equal."""
    if one == other:
        return None
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)
