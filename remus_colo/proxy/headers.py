# SPDX-License-Identifier: LGPL-2.1-or-later
"""Access to the headers of one IPv4 TCP packet in place, and its checksum.

A packet is a buffer that starts at the IP header.  Offsets and flags are those of RFC 791 (IPv4) and RFC 9293
(TCP); options those of RFC 2018 (SACK) and RFC 7323 (timestamps).

Checksums are one's complement sums, that is, sums modulo 0xffff.  RFC 1624's equation 3,
``HC' = ~(~HC + ~m + m')``, is then ``~HC' = ~HC + (m' - m)  (mod 0xffff)``, and as 0x10000 is 1 modulo 0xffff, the
difference of two 32-bit fields may be added as it is.  A field at an odd offset counts 256 times (its
bytes lie in the other halves of the words).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

IPPROTO_TCP = 6
ICMP_ERRORS = frozenset({3, 4, 5, 11, 12})  # unreachable, source quench, redirect, time exceeded, parameter problem
IPV4_MIN_BYTES = 20
TCP_MIN_BYTES = 20

FIN = 0x01
SYN = 0x02
RST = 0x04
PSH = 0x08
ACK = 0x10

# Within the TCP header.
SEQ = 4
ACK_SEQ = 8
DATA_OFFSET = 12
FLAGS = 13
CHECKSUM = 16

OPTION_END = 0
OPTION_NOP = 1
OPTION_SACK = 5
OPTION_TIMESTAMPS = 8
TIMESTAMPS_BYTES = 10

MASK32 = 0xFFFFFFFF
_HALF32 = 1 << 31

U16 = struct.Struct("!H")
U32 = struct.Struct("!I")
SEQ_ACK = struct.Struct("!II")


def tcp_start(packet: bytes | bytearray) -> int:
    """Where the TCP header starts; 0 if this is no IPv4 packet with a whole fixed TCP header, or a fragment."""
    length = len(packet)
    if length < IPV4_MIN_BYTES + TCP_MIN_BYTES or packet[9] != IPPROTO_TCP or packet[0] >> 4 != 4:
        return 0
    if packet[6] & 0x3F or packet[7]:  # more fragments, or a fragment offset
        return 0
    start = (packet[0] & 0x0F) * 4
    if start < IPV4_MIN_BYTES or start + TCP_MIN_BYTES > length:
        return 0
    return start


def quoted_tcp(packet: bytes | bytearray) -> tuple[int, int]:
    """Where an ICMP error (RFC 792) quotes the IP header, and the TCP header of a segment; (0, 0) if it does not.

    At least 8 bytes of the TCP header are there: ports and sequence number.
    """
    length = len(packet)
    start = (packet[0] & 0x0F) * 4
    if packet[0] >> 4 != 4 or start < IPV4_MIN_BYTES or packet[6] & 0x3F or packet[7]:
        return 0, 0
    quoted = start + 8
    if quoted + IPV4_MIN_BYTES + 8 > length or packet[start] not in ICMP_ERRORS:
        return 0, 0
    if packet[quoted] >> 4 != 4 or packet[quoted + 9] != IPPROTO_TCP:
        return 0, 0
    if packet[quoted + 6] & 0x1F or packet[quoted + 7]:
        return 0, 0
    tcp = quoted + (packet[quoted] & 0x0F) * 4
    if tcp < quoted + IPV4_MIN_BYTES or tcp + 8 > length:
        return 0, 0
    return quoted, tcp


def packet_end(packet: bytes | bytearray) -> int:
    """Where the IP packet ends.  A frame's padding may follow it; packets of segmentation offload may claim 0."""
    total = U16.unpack_from(packet, 2)[0]
    return total if IPV4_MIN_BYTES <= total <= len(packet) else len(packet)


def payload_bytes(packet: bytes | bytearray, start: int) -> int:
    """Bytes of TCP payload; 0 if the header claims more than there is."""
    header = (packet[start + DATA_OFFSET] >> 4) * 4
    return max(0, packet_end(packet) - start - max(header, TCP_MIN_BYTES))


def options(packet: bytes | bytearray, start: int) -> Iterator[tuple[int, int, int]]:
    """Each option as (kind, offset in the packet, bytes with kind and length), up to the first malformed one."""
    at = start + TCP_MIN_BYTES
    end = min(start + (packet[start + DATA_OFFSET] >> 4) * 4, packet_end(packet))
    while at < end:
        kind = packet[at]
        if kind == OPTION_END:
            return
        if kind == OPTION_NOP:
            at += 1
            continue
        if at + 2 > end:
            return
        length = packet[at + 1]
        if length < 2 or at + length > end:
            return
        yield kind, at, length
        at += length


def timestamp_value(packet: bytes | bytearray, start: int) -> int | None:
    """TSval of the timestamps option; None without one."""
    for kind, at, length in options(packet, start):
        if kind == OPTION_TIMESTAMPS and length == TIMESTAMPS_BYTES:
            return U32.unpack_from(packet, at + 2)[0]
    return None


def put32(buffer: bytearray, start: int, at: int, value: int) -> int:
    """Store a 32-bit field; return what that adds to the TCP checksum's sum (``start``: the TCP header)."""
    difference = value - U32.unpack_from(buffer, at)[0]
    U32.pack_into(buffer, at, value)
    return difference << 8 if (at - start) & 1 else difference


def update_checksum(buffer: bytearray, at: int, difference: int) -> None:
    """Add ``difference``, a sum of what :func:`put32` returned, to the checksum at ``at`` (RFC 1624).

    A right checksum stays right, a wrong one stays wrong.  The sum of a real packet is never 0 (TCP's pseudo-header has
    the protocol number, an ICMP error its type), so 0 stands for its other spelling, 0xffff.
    """
    total = (0xFFFF - U16.unpack_from(buffer, at)[0] + difference) % 0xFFFF or 0xFFFF
    U16.pack_into(buffer, at, 0xFFFF - total)


def tcp_checksum(packet: bytes | bytearray, start: int) -> int:
    """The checksum as it should be, computed from the whole segment and the pseudo-header (RFC 9293, 3.1)."""
    end = packet_end(packet)
    segment = bytearray(packet[start:end])
    U16.pack_into(segment, CHECKSUM, 0)
    if len(segment) & 1:
        segment.append(0)
    pseudo = bytes(packet[12:20]) + struct.pack("!HH", IPPROTO_TCP, (end - start) & 0xFFFF)
    # A big-endian number is the sum of its 16-bit words modulo 0xffff.
    total = int.from_bytes(pseudo + segment, "big") % 0xFFFF or 0xFFFF
    return 0xFFFF - total


def fill_tcp_checksum(buffer: bytearray, start: int) -> None:
    """Finish the checksum of a packet that a guest left to its device (checksum offload)."""
    U16.pack_into(buffer, start + CHECKSUM, tcp_checksum(buffer, start))


def at_or_after(a: int, b: int) -> bool:
    """Whether sequence number ``a`` is ``b`` or follows it (RFC 9293, 3.4: modulo 2**32)."""
    return (a - b) & MASK32 < _HALF32
