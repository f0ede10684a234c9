# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ethernet frames that tell a LAN where the guest is now, and the guest's addresses as learnt from what it sends.

ARP: RFC 826; announcement and probe: RFC 5227.  Neighbour advertisement: RFC 4861, 4.4 and 7.2.6; its probe,
a solicitation without a sender: RFC 4862, 5.4.2.
RARP: RFC 903, sent as virtual machine monitors do after migration: switches learn the port, hosts ignore it.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

Address = IPv4Address | IPv6Address

ETHERTYPE_IPV4 = 0x0800
ETHERTYPE_ARP = 0x0806
ETHERTYPE_RARP = 0x8035
ETHERTYPE_IPV6 = 0x86DD

ARP_REQUEST = 1
ARP_REPLY = 2
RARP_REQUEST = 3

BROADCAST_MAC = b"\xff" * 6
ANY_MAC = bytes(6)
ALL_NODES_MAC = bytes.fromhex("333300000001")
ALL_NODES = IPv6Address("ff02::1")
ANY_IPV4 = IPv4Address(0)
ANY_IPV6 = IPv6Address(0)
# RFC 4291, 2.7.1; the last three bytes are the address's.
_SOLICITED_NODE = bytes.fromhex("ff0200000000000000000001ff")
_LINK_LOCAL = bytes.fromhex("fe80000000000000")

# Without the frame check sequence (IEEE 802.3).
MIN_FRAME_BYTES = 60

IPPROTO_ICMPV6 = 58
_ROUTER_ADVERTISEMENT = 134
_NEIGHBOUR_SOLICITATION = 135
_NEIGHBOUR_ADVERTISEMENT = 136
_OPTION_TARGET_LINK_ADDRESS = 2
_FLAG_ROUTER = 0x80000000
_FLAG_OVERRIDE = 0x20000000

_ARP = struct.Struct("!HHBBH6s4s6s4s")
assert _ARP.size == 28

# What hosts start with.  Another value was counted down by a router: by the guest itself, if it forwards.
_INITIAL_TTLS = frozenset({32, 64, 128, 255})


@dataclass(frozen=True, slots=True)
class Arp:
    """An ARP (or RARP) packet for Ethernet and IPv4; MAC addresses as 6 bytes."""

    operation: int
    sender_mac: bytes
    sender_ip: IPv4Address
    target_mac: bytes
    target_ip: IPv4Address

    def pack(self) -> bytes:
        """28 bytes, from the hardware type on."""
        return _ARP.pack(
            1,
            ETHERTYPE_IPV4,
            6,
            4,
            self.operation,
            self.sender_mac,
            self.sender_ip.packed,
            self.target_mac,
            self.target_ip.packed,
        )


def parse_arp(frame_payload: bytes) -> Arp | None:
    """What follows the Ethernet header, padding allowed; None if it is no ARP for Ethernet and IPv4."""
    if len(frame_payload) < _ARP.size:
        return None
    hardware, protocol, hardware_bytes, protocol_bytes, operation, *rest = _ARP.unpack_from(frame_payload)
    if (hardware, protocol, hardware_bytes, protocol_bytes) != (1, ETHERTYPE_IPV4, 6, 4):
        return None
    sender_mac, sender_ip, target_mac, target_ip = rest
    return Arp(operation, sender_mac, IPv4Address(sender_ip), target_mac, IPv4Address(target_ip))


def ethernet(destination: bytes, source: bytes, ethertype: int, payload: bytes) -> bytes:
    """A frame without its check sequence, padded to the minimum.

    Raises ValueError if a MAC address is not 6 bytes.
    """
    if len(destination) != 6 or len(source) != 6:
        raise ValueError("A MAC address has 6 bytes.")
    return (destination + source + struct.pack("!H", ethertype) + payload).ljust(MIN_FRAME_BYTES, b"\0")


def gratuitous_arp(mac: bytes, address: IPv4Address, *, reply: bool = False) -> bytes:
    """An announcement of the guest's address.

    The request form is RFC 5227's (2.3), which every host understands (section 3).  The reply form is for those that
    are configured to update an entry by replies only; its target is the sender, too.
    """
    operation, target_mac = (ARP_REPLY, mac) if reply else (ARP_REQUEST, ANY_MAC)
    arp = Arp(operation, mac, address, target_mac, address)
    return ethernet(BROADCAST_MAC, mac, ETHERTYPE_ARP, arp.pack())


def arp_request(mac: bytes, sender: IPv4Address, target: IPv4Address) -> bytes:
    """Ask who has ``target``, as ``sender`` with ``mac``."""
    return ethernet(BROADCAST_MAC, mac, ETHERTYPE_ARP, Arp(ARP_REQUEST, mac, sender, ANY_MAC, target).pack())


def arp_probe(mac: bytes, target: IPv4Address) -> bytes:
    """Ask whether anyone has ``target`` without touching anyone's ARP cache (RFC 5227, 2.1.1: sender 0.0.0.0)."""
    return arp_request(mac, ANY_IPV4, target)


def neighbour_probe(mac: bytes, target: IPv6Address) -> bytes:
    """Ask whether anyone has ``target`` without touching anyone's neighbour cache; the answer goes to all nodes."""
    group = IPv6Address(_SOLICITED_NODE + target.packed[13:])
    body = struct.pack("!BBHI", _NEIGHBOUR_SOLICITATION, 0, 0, 0) + target.packed
    return _neighbour_discovery(b"\x33\x33" + group.packed[12:], mac, ANY_IPV6, group, body)


def probe(mac: bytes, target: Address) -> bytes:
    """:func:`arp_probe` or :func:`neighbour_probe`."""
    return arp_probe(mac, target) if isinstance(target, IPv4Address) else neighbour_probe(mac, target)


def link_local(mac: bytes) -> IPv6Address:
    """What a host with this MAC address may call itself without being told (RFC 4291, appendix A; not if RFC
    7217 is in use).
    """
    return IPv6Address(_LINK_LOCAL + bytes((mac[0] ^ 2,)) + mac[1:3] + b"\xff\xfe" + mac[3:])


def neighbour(frame_payload: bytes, ethertype: int) -> Address | None:
    """Who says by ARP or neighbour discovery that it is on this LAN, by what follows the Ethernet header;
    None if nobody does.
    """
    if ethertype == ETHERTYPE_ARP:
        arp = parse_arp(frame_payload)
        return None if arp is None or arp.sender_ip == ANY_IPV4 else arp.sender_ip
    if ethertype != ETHERTYPE_IPV6 or len(frame_payload) < 48 or frame_payload[6] != IPPROTO_ICMPV6:
        return None
    if frame_payload[7] != 255 or frame_payload[40] not in (
        _NEIGHBOUR_SOLICITATION,
        _NEIGHBOUR_ADVERTISEMENT,
    ):
        return None  # a hop limit of 255: no router has forwarded it
    source = IPv6Address(frame_payload[8:24])
    return None if source == ANY_IPV6 else source


def is_to_many(packet: bytes) -> bool:
    """Whether an IPv4 or IPv6 packet, from the IP header on, is a multicast, or goes to 255.255.255.255."""
    if packet[:1] and packet[0] >> 4 == 4:
        return packet[16:17] >= b"\xe0"
    return packet[24:25] == b"\xff"


def answers_probe(arp: Arp, mac: bytes, target: IPv4Address) -> bool:
    """Whether ``arp`` shows that someone other than ``mac`` has or wants ``target`` (RFC 5227, 2.1.1)."""
    if arp.sender_mac == mac or arp.operation not in (ARP_REQUEST, ARP_REPLY):
        return False
    wants = arp.operation == ARP_REQUEST and arp.sender_ip == ANY_IPV4 and arp.target_ip == target
    return arp.sender_ip == target or wants


def neighbour_advertisement(mac: bytes, address: IPv6Address, *, router: bool = False) -> bytes:
    """Unsolicited, to all nodes, with the override flag.

    ``router``: whether the guest is one.  Hosts take an advertisement without the flag as "no router any
    more" (RFC 4861, 7.2.5).
    """
    flags = _FLAG_OVERRIDE | (_FLAG_ROUTER if router else 0)
    body = struct.pack("!BBHI", _NEIGHBOUR_ADVERTISEMENT, 0, 0, flags) + address.packed
    body += bytes((_OPTION_TARGET_LINK_ADDRESS, 1)) + mac
    return _neighbour_discovery(ALL_NODES_MAC, mac, address, ALL_NODES, body)


def _neighbour_discovery(
    destination_mac: bytes, mac: bytes, source: IPv6Address, destination: IPv6Address, body: bytes
) -> bytes:
    checksum = _icmpv6_checksum(source, destination, body)
    body = body[:2] + struct.pack("!H", checksum) + body[4:]
    header = (
        struct.pack("!IHBB", 6 << 28, len(body), IPPROTO_ICMPV6, 255) + source.packed + destination.packed
    )
    return ethernet(destination_mac, mac, ETHERTYPE_IPV6, header + body)


def rarp_announcement(mac: bytes) -> bytes:
    """A broadcast from ``mac`` that means nothing to hosts: switches learn where it is."""
    arp = Arp(RARP_REQUEST, mac, ANY_IPV4, mac, ANY_IPV4)
    return ethernet(BROADCAST_MAC, mac, ETHERTYPE_RARP, arp.pack())


def announcements(mac: bytes, addresses: Iterable[Address], *, router: bool = False) -> list[bytes]:
    """What to send at failover: both ARP forms for each IPv4 address, an advertisement for each IPv6 one.

    A RARP announcement if there is no address.  A frame may be lost: send the list more than once.
    """
    frames: list[bytes] = []
    for address in addresses:
        if isinstance(address, IPv4Address):
            frames += [gratuitous_arp(mac, address), gratuitous_arp(mac, address, reply=True)]
        else:
            frames.append(neighbour_advertisement(mac, address, router=router))
    return frames or [rarp_announcement(mac)]


class AddressBook:
    """The guest's own addresses, by what it sends.

    An address counts if the guest claims it by ARP or neighbour discovery, or sends from it with a TTL that
    hosts start with: what it merely forwards was counted down.  Link-local addresses count (neighbours have
    entries for them).
    Holds ``limit`` addresses, those most recently seen.  ``mac``: ARP claims of others, bridged by the guest,
    are not its own.
    """

    def __init__(self, mac: bytes, limit: int = 64) -> None:
        self._mac = mac
        self._limit = max(1, limit)
        self._seen: dict[bytes, Address] = {}  # packed; oldest first
        self.router = False  # whether the guest advertises itself as one

    @property
    def addresses(self) -> list[Address]:
        """Newest first."""
        return list(reversed(self._seen.values()))

    def learn_frame(self, frame: bytes) -> None:
        """A whole Ethernet frame that the guest sent (no VLAN tags)."""
        if len(frame) < 14 or frame[6:12] != self._mac:
            return
        ethertype = int.from_bytes(frame[12:14], "big")
        if ethertype == ETHERTYPE_ARP:
            self.learn_arp(frame[14:])
        elif ethertype in (ETHERTYPE_IPV4, ETHERTYPE_IPV6):
            self.learn_packet(frame[14:])

    def learn_arp(self, payload: bytes) -> None:
        """An ARP packet that the guest sent."""
        arp = parse_arp(payload)
        if arp is not None and arp.sender_mac == self._mac:
            self._note(arp.sender_ip.packed)

    def learn_packet(self, packet: bytes) -> None:
        """An IPv4 or IPv6 packet that the guest sent, from the IP header on."""
        version = packet[0] >> 4 if packet else 0
        if version == 4 and len(packet) >= 20:
            if packet[8] in _INITIAL_TTLS:
                self._note(packet[12:16])
        elif version == 6 and len(packet) >= 40:
            if packet[6] == IPPROTO_ICMPV6 and packet[7] == 255 and len(packet) >= 48:
                self._learn_router(packet)
            if packet[7] in _INITIAL_TTLS:
                self._note(packet[8:24])

    def _learn_router(self, packet: bytes) -> None:
        if packet[40] == _ROUTER_ADVERTISEMENT:
            self.router = True
        elif packet[40] == _NEIGHBOUR_ADVERTISEMENT:
            self.router = bool(packet[44] & 0x80)

    def _note(self, packed: bytes) -> None:
        known = self._seen.pop(packed, None)
        if known is None:
            known = ipaddress.ip_address(packed)
            if not _is_host(known):
                return
            if len(self._seen) >= self._limit:
                del self._seen[next(iter(self._seen))]
        self._seen[packed] = known


def _is_host(address: Address) -> bool:
    if address.is_unspecified or address.is_multicast or address.is_loopback:
        return False
    # 0.0.0.0/8 and 240.0.0.0/4 (RFC 1122, 3.2.1.3), the broadcast address among them.
    return not (isinstance(address, IPv4Address) and (address.packed[0] == 0 or address.is_reserved))


def _icmpv6_checksum(source: IPv6Address, destination: IPv6Address, body: bytes) -> int:
    """RFC 8200, 8.1.  ``body``: an even number of bytes, its checksum zero."""
    pseudo = source.packed + destination.packed + struct.pack("!II", len(body), IPPROTO_ICMPV6)
    return 0xFFFF - (int.from_bytes(pseudo + body, "big") % 0xFFFF or 0xFFFF)
