# SPDX-License-Identifier: LGPL-2.1-or-later
"""Packets as the comparator sees them: which flow, and which part of them a client can tell apart.

Input is what NFQUEUE hands over: a packet from its network header on.  Formats: RFC 791 (IPv4), RFC 9293 (TCP),
RFC 768 (UDP), RFC 792 (ICMP), RFC 8200 (IPv6), RFC 4443, 4861 and 3810 (ICMPv6).

Not read, because two healthy replicas may differ in it: IPv4 identification, TTL, DSCP and ECN, options, all checksums
(a vif leaves them to offloading, too), TCP window and options.

A flow's key is one ``bytes`` object, which hashes faster than a tuple; its first byte is the IPv4 protocol, or
``IPV6_MARK``; the length tells the shapes apart.  :func:`describe` turns it into words.
"""

from __future__ import annotations

import enum
import ipaddress
import struct
from typing import Any

ETHERTYPE_IPV4 = 0x0800
ETHERTYPE_IPV6 = 0x86DD
# IEEE 802.1Q and 802.1ad: there is IP inside, so these must not pass unseen.
ETHERTYPES_VLAN = frozenset((0x8100, 0x88A8, 0x9100))

ICMP, IGMP, TCP, UDP, ICMPV6, HOP_BY_HOP = 1, 2, 6, 17, 58, 0

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10

IPV6_MARK = 0x06  # with 34 bytes of key; a TCP key has 13
MALFORMED_KEY = b""

# ICMPv6 that configures the link rather than serves a client: multicast listener discovery (RFC 3810, RFC 2710) and
# neighbour discovery (RFC 4861).
ICMPV6_PASSED = frozenset((130, 131, 132, 143, 133, 134, 135, 136, 137))
ICMP_ERRORS = frozenset((3, 4, 5, 11, 12))
# Queries whose second word begins with an identifier: echo, timestamp, information, address mask.
ICMP_QUERIES = frozenset((0, 8, 13, 14, 15, 16, 17, 18))

_IPV4 = struct.Struct(">BxHxxHxB")  # version+IHL, total length, flags+fragment offset, protocol
_TCP = struct.Struct(">IIBB")  # from byte 4: sequence, acknowledgement, data offset, flags
_U16 = struct.Struct(">H")


class Kind(enum.IntEnum):
    """What decides how a packet is compared, and what its time-out is called."""

    TCP = 0
    UDP = 1
    ICMP = 2
    OTHER = 3


# Module constants: an enum attribute look-up per packet costs more than the comparison.
_TCP_KIND, _UDP_KIND, _ICMP_KIND, _OTHER_KIND = Kind.TCP, Kind.UDP, Kind.ICMP, Kind.OTHER


class Packet:
    """One parsed packet.

    :ivar payload: what is compared; for TCP the segment's data.
    :ivar seq: TCP sequence number of the segment (of its SYN if it has one), 32 bits.
    :ivar ack: TCP acknowledgement number, 32 bits; meaningless without ACK in ``flags``.
    """

    __slots__ = ("ack", "flags", "key", "kind", "malformed", "payload", "seq")

    def __init__(self, kind: Kind, key: bytes, payload: bytes, seq: int = 0, ack: int = 0, flags: int = 0,
                 malformed: bool = False) -> None:
        self.kind = kind
        self.key = key
        self.payload = payload
        self.seq = seq
        self.ack = ack
        self.flags = flags
        self.malformed = malformed


class Fragment:
    """One fragment of an IPv4 datagram.

    :ivar key: source, destination, protocol and identification: what RFC 791 reassembles by.
    :ivar offset: of ``data`` within the datagram's payload, in bytes.
    :ivar more: there are fragments behind this one.
    :ivar header: the IP header with its options.
    """

    __slots__ = ("data", "header", "key", "kind", "more", "offset")

    def __init__(self, kind: Kind, key: bytes, offset: int, more: bool, header: bytes, data: bytes) -> None:
        self.kind = kind
        self.key = key
        self.offset = offset
        self.more = more
        self.header = header
        self.data = data


class Held:
    """A PVM packet, or the fragments of one datagram, waiting for leave.

    :ivar ids: packet ids in arrival order; more than one for fragments.
    :ivar orders: arrival numbers of the ids.
    :ivar flow: its flow; None while fragments are missing.
    :ivar arrived_s: when the first of it came.
    :ivar conn: (TCP) its connection.
    :ivar end: (TCP) sequence position behind its last unit; None if it takes up no sequence space.
    :ivar ack: (TCP) position that it acknowledges; None without ACK.
    :ivar matched: (others) the SVM has sent an equal datagram.
    """

    __slots__ = ("ack", "arrived_s", "conn", "end", "flow", "ids", "kind", "matched", "orders", "packet", "size")

    def __init__(self, packet_id: int, order: int, size: int, arrived_s: float, kind: Kind,
                 packet: Packet | None) -> None:
        self.ids = (packet_id,)
        self.orders = (order,)
        self.size = size
        self.arrived_s = arrived_s
        self.kind = kind
        self.packet = packet
        self.flow: Any = None
        self.conn: Any = None
        self.end: int | None = None
        self.ack: int | None = None
        self.matched = False


def parse(packet: bytes, ethertype: int = ETHERTYPE_IPV4) -> Packet | Fragment | None:
    """Sort one packet.

    :param packet: from the network header on; bytes beyond the IP length are Ethernet's padding.
    :return: None if it is nothing that a client compares (ARP, IGMP, neighbour discovery, non-IP); a
        :class:`Fragment`; or a :class:`Packet`, which for anything that cannot be parsed has ``malformed`` set and the
        whole packet as payload.  Never raises on any content.
    """
    if ethertype == ETHERTYPE_IPV4:
        return _parse_ipv4(packet)
    if ethertype == ETHERTYPE_IPV6:
        return _parse_ipv6(packet)
    if ethertype in ETHERTYPES_VLAN:
        return malformed(packet)
    return None


def malformed(packet: bytes) -> Packet:
    """The packet as one to be compared whole."""
    return Packet(_OTHER_KIND, MALFORMED_KEY, packet, malformed=True)


def _parse_ipv4(packet: bytes) -> Packet | Fragment | None:
    size = len(packet)
    if size < 20:
        return malformed(packet)
    version_ihl, total, fragment, protocol = _IPV4.unpack_from(packet)
    body = (version_ihl & 0x0F) * 4
    if not total and size > 0xFFFF:
        total = size  # a superpacket beyond 64 KiB ("BIG TCP") carries no length
    if version_ihl >> 4 != 4 or body < 20 or total < body or total > size:
        return malformed(packet)
    if protocol == IGMP:
        return None
    if total != size:
        packet = packet[:total]
    if fragment & 0x3FFF:
        return _fragment(packet, body, fragment, protocol)

    if protocol == TCP:
        if total < body + 20:
            return malformed(packet)
        seq, ack, offset, flags = _TCP.unpack_from(packet, body + 4)
        start = body + (offset >> 4) * 4
        if start < body + 20 or start > total:
            return malformed(packet)
        return Packet(_TCP_KIND, packet[9:10] + packet[12:20] + packet[body:body + 4], packet[start:], seq, ack, flags)
    if protocol == UDP:
        if total < body + 8:
            return malformed(packet)
        (length,) = _U16.unpack_from(packet, body + 4)
        if length < 8 or length > total - body:
            return malformed(packet)
        return Packet(_UDP_KIND, packet[9:10] + packet[12:20] + packet[body:body + 4], packet[body + 8:body + length])
    if protocol == ICMP:
        return _icmp(packet, body)
    return Packet(_OTHER_KIND, packet[9:10] + packet[12:20], packet[body:])


def _fragment(packet: bytes, body: int, fragment: int, protocol: int) -> Packet | Fragment:
    data = packet[body:]
    more = bool(fragment & 0x2000)
    offset = (fragment & 0x1FFF) * 8
    if not data or (more and len(data) % 8) or offset + len(data) > 0xFFFF - 20:
        return malformed(packet)
    key = packet[12:20] + packet[9:10] + packet[4:6]
    return Fragment(kind_of_protocol(protocol), key, offset, more, packet[:body], data)


def _icmp(packet: bytes, body: int) -> Packet:
    if len(packet) < body + 8:
        return malformed(packet)
    kind = packet[body]
    key = packet[9:10] + packet[12:20]
    if kind in ICMP_QUERIES:
        return Packet(_ICMP_KIND, key + packet[body + 4:body + 6], packet[body:body + 2] + packet[body + 6:])
    content = packet[body:body + 2] + packet[body + 4:]
    if kind in ICMP_ERRORS:
        content = _mask_quoted(content)
    return Packet(_ICMP_KIND, key, content)


def _mask_quoted(content: bytes) -> bytes:
    """Blank what may differ in the header that an ICMP error quotes.

    The quoted packet is the client's, as each VM got it: DSCP/ECN, identification, TTL and checksum belong to its way
    here; in TCP the acknowledgement (and so the checksum) lies in the sequence space of the VM that it was sent to.
    """
    quoted = 6  # type, code, the error's own second word
    if len(content) < quoted + 20:
        return content
    masked = bytearray(content)
    masked[quoted + 1] = 0
    masked[quoted + 4:quoted + 6] = b"\0\0"
    masked[quoted + 8] = 0
    masked[quoted + 10:quoted + 12] = b"\0\0"
    inner = quoted + (content[quoted] & 0x0F) * 4
    if content[quoted + 9] == TCP:
        for low, high in ((inner + 8, inner + 12), (inner + 16, inner + 18)):
            if high <= len(masked):
                masked[low:high] = bytes(high - low)
    return bytes(masked)


def _parse_ipv6(packet: bytes) -> Packet | None:
    size = len(packet)
    if size < 40 or packet[0] >> 4 != 6:
        return malformed(packet)
    (length,) = _U16.unpack_from(packet, 4)
    header = packet[6]
    end = 40 + length
    if not length and header == HOP_BY_HOP:
        end = size  # RFC 2675: a jumbogram's length is in its hop-by-hop option
    if end > size:
        return malformed(packet)
    body, upper = 40, header
    if upper == HOP_BY_HOP and end >= 48:  # RFC 3810: reports carry a router alert in a hop-by-hop header
        upper = packet[40]
        body += (packet[41] + 1) * 8
    if upper == ICMPV6 and body < end and packet[body] in ICMPV6_PASSED:
        return None
    kind = _OTHER_KIND if header == TCP else kind_of_protocol(header)
    return Packet(kind, b"\x06" + packet[6:7] + packet[8:40], packet[40:end])


def kind_of_protocol(protocol: int) -> Kind:
    if protocol == TCP:
        return _TCP_KIND
    if protocol == UDP:
        return _UDP_KIND
    if protocol in (ICMP, ICMPV6):
        return _ICMP_KIND
    return _OTHER_KIND


def describe(key: bytes) -> str:
    """A flow's key in words for people."""
    if key == MALFORMED_KEY:
        return "malformed packets"
    if len(key) == 34:
        source, destination = ipaddress.IPv6Address(key[2:18]), ipaddress.IPv6Address(key[18:34])
        return f"IPv6 next header {key[1]} {source} > {destination}"
    source4, destination4 = ipaddress.IPv4Address(key[1:5]), ipaddress.IPv4Address(key[5:9])
    protocol = key[0]
    if len(key) == 13:
        name = "TCP" if protocol == TCP else "UDP"
        sport, dport = struct.unpack(">HH", key[9:13])
        return f"{name} {source4}:{sport} > {destination4}:{dport}"
    if len(key) == 11:
        return f"ICMP {source4} > {destination4} id {int.from_bytes(key[9:11], 'big')}"
    name = "ICMP" if protocol == ICMP else f"IP protocol {protocol}"
    return f"{name} {source4} > {destination4}"
