# SPDX-License-Identifier: LGPL-2.1-or-later
"""Announcement frames byte by byte, and the book of the guest's addresses."""

from __future__ import annotations

import random
import struct
from ipaddress import IPv4Address, IPv6Address

import pytest

from remus_colo.proxy import announce
from remus_colo.proxy.announce import AddressBook, Arp, announcements, parse_arp

MAC = bytes.fromhex("00163e010203")
OTHER = bytes.fromhex("00163e0a0b0c")
V4 = IPv4Address("192.0.2.80")
V6 = IPv6Address("2001:db8::80")


def ipv4(source: str, ttl: int = 64) -> bytes:
    addresses = IPv4Address(source).packed + bytes((192, 0, 2, 9))
    return struct.pack("!BBHHHBBH", 0x45, 0, 20, 0, 0, ttl, 17, 0) + addresses


def ipv6(source: str, hop_limit: int = 64, icmp: bytes = b"") -> bytes:
    header = struct.pack("!IHBB", 6 << 28, len(icmp), 58 if icmp else 59, hop_limit)
    return header + IPv6Address(source).packed + IPv6Address("ff02::1").packed + icmp


def test_gratuitous_arp_request() -> None:
    assert announce.gratuitous_arp(MAC, V4).hex() == (
        "ffffffffffff00163e0102030806000108000604000100163e010203c0000250000000000000c0000250" + "00" * 18
    )


def test_gratuitous_arp_reply() -> None:
    assert announce.gratuitous_arp(MAC, V4, reply=True).hex() == (
        "ffffffffffff00163e0102030806000108000604000200163e010203c000025000163e010203c0000250" + "00" * 18
    )


def test_probe_has_no_sender_address() -> None:
    arp = parse_arp(announce.arp_probe(MAC, V4)[14:])
    assert arp == Arp(announce.ARP_REQUEST, MAC, announce.ANY_IPV4, announce.ANY_MAC, V4)


def test_who_answers_a_probe() -> None:
    def arp(operation: int, mac: bytes, sender: IPv4Address, target: IPv4Address = V4) -> Arp:
        return Arp(operation, mac, sender, announce.ANY_MAC, target)

    none = announce.ANY_IPV4
    assert announce.answers_probe(arp(announce.ARP_REPLY, OTHER, V4, none), MAC, V4)
    assert announce.answers_probe(arp(announce.ARP_REQUEST, OTHER, V4, none), MAC, V4)
    assert announce.answers_probe(arp(announce.ARP_REQUEST, OTHER, none), MAC, V4)  # probes for it, too
    assert not announce.answers_probe(arp(announce.ARP_REQUEST, OTHER, V4 + 1), MAC, V4)  # merely asks for it
    assert not announce.answers_probe(arp(announce.ARP_REPLY, MAC, V4), MAC, V4)
    assert not announce.answers_probe(arp(announce.RARP_REQUEST, OTHER, V4), MAC, V4)


def test_neighbour_probe() -> None:
    frame = announce.neighbour_probe(MAC, IPv6Address("2001:db8::12:3456:789a"))
    assert frame[:14].hex() == "3333ff56789a" + MAC.hex() + "86dd"
    assert frame[14:22].hex() == "6000000000183aff"
    assert frame[22:54] == bytes(16) + IPv6Address("ff02::1:ff56:789a").packed
    assert frame[54:56].hex() == "8700"
    assert frame[58:] == bytes(4) + IPv6Address("2001:db8::12:3456:789a").packed
    assert is_summed(frame)
    assert announce.probe(MAC, V6) == announce.neighbour_probe(MAC, V6)
    assert announce.probe(MAC, V4) == announce.arp_probe(MAC, V4)


def test_link_local() -> None:
    """The example of RFC 4291, appendix A, has the MAC address 34-56-78-9A-BC-DE of RFC 2464, 4."""
    assert announce.link_local(bytes.fromhex("3456789abcde")) == IPv6Address("fe80::3656:78ff:fe9a:bcde")


def test_who_is_there() -> None:
    def neighbour(frame: bytes) -> announce.Address | None:
        return announce.neighbour(frame[14:], int.from_bytes(frame[12:14], "big"))

    assert neighbour(announce.gratuitous_arp(MAC, V4)) == V4
    assert neighbour(announce.neighbour_advertisement(MAC, V6)) == V6
    assert neighbour(announce.arp_probe(MAC, V4)) is None
    assert neighbour(announce.neighbour_probe(MAC, V6)) is None
    echo = bytes((128,)) + bytes(7)
    for packet in (
        ipv6("fe80::1", 255, echo),
        ipv6("fe80::1", 254, b"\x88" + bytes(23)),
        ipv6("fe80::1"),
        b"",
    ):
        assert announce.neighbour(packet, announce.ETHERTYPE_IPV6) is None
    assert announce.neighbour(ipv4("192.0.2.1"), announce.ETHERTYPE_IPV4) is None


def test_neighbour_advertisement() -> None:
    frame = announce.neighbour_advertisement(MAC, V6)
    assert frame[:14].hex() == "33330000000100163e01020386dd"
    assert frame[14:22].hex() == "6000000000203aff"
    assert frame[22:54] == V6.packed + IPv6Address("ff02::1").packed
    assert frame[54:56].hex() == "8800"
    assert frame[58:62].hex() == "20000000"
    assert frame[62:] == V6.packed + bytes((2, 1)) + MAC
    assert is_summed(frame)


def is_summed(frame: bytes) -> bool:
    """RFC 1071: the sum over pseudo-header and message, checksum included, is all ones."""
    covered = frame[22:54] + struct.pack("!II", len(frame) - 54, 58) + frame[54:]
    total = sum(word for (word,) in struct.iter_unpack("!H", covered))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total == 0xFFFF


def test_a_routers_advertisement_says_so() -> None:
    assert announce.neighbour_advertisement(MAC, V6, router=True)[58:62].hex() == "a0000000"


def test_announcements() -> None:
    assert announcements(MAC, [V4, V6]) == [
        announce.gratuitous_arp(MAC, V4),
        announce.gratuitous_arp(MAC, V4, reply=True),
        announce.neighbour_advertisement(MAC, V6),
    ]
    assert all(len(frame) >= announce.MIN_FRAME_BYTES for frame in announcements(MAC, [V4, V6]))


def test_without_addresses_switches_are_told() -> None:
    (frame,) = announcements(MAC, [])
    assert frame[:14].hex() == "ffffffffffff00163e0102038035"
    assert parse_arp(frame[14:]) == Arp(3, MAC, announce.ANY_IPV4, MAC, announce.ANY_IPV4)


@pytest.mark.parametrize("mac", [b"", MAC[:5], MAC + b"\0"])
def test_a_mac_has_six_bytes(mac: bytes) -> None:
    with pytest.raises(ValueError, match="6 bytes"):
        announcements(mac, [])


def test_arp_of_other_networks_is_none() -> None:
    good = Arp(2, OTHER, V4, MAC, V4).pack()
    assert parse_arp(good + b"padding") is not None
    assert parse_arp(good[:27]) is None
    for at, value in ((1, 6), (2, 0x86), (4, 8), (5, 16)):
        assert parse_arp(good[:at] + bytes((value,)) + good[at + 1 :]) is None


# -- the book


@pytest.fixture
def book() -> AddressBook:
    return AddressBook(MAC, limit=3)


def test_it_learns_from_packets_newest_first(book: AddressBook) -> None:
    book.learn_packet(ipv4("192.0.2.80"))
    book.learn_packet(ipv6("2001:db8::80"))
    book.learn_packet(ipv6("fe80::1", 255))
    book.learn_packet(ipv4("192.0.2.80"))
    assert book.addresses == [V4, IPv6Address("fe80::1"), V6]


def test_what_goes_to_many() -> None:
    for destination, many in (("192.0.2.9", False), ("224.0.0.251", True), ("255.255.255.255", True)):
        assert announce.is_to_many(ipv4("192.0.2.1")[:16] + IPv4Address(destination).packed) is many
    assert announce.is_to_many(ipv6("fe80::1"))
    assert not announce.is_to_many(ipv6("fe80::1")[:24] + IPv6Address("fe80::2").packed)
    assert not announce.is_to_many(b"")


def test_it_is_bounded_and_keeps_the_newest(book: AddressBook) -> None:
    for number in range(1, 10):
        book.learn_packet(ipv4(f"192.0.2.{number}"))
        book.learn_packet(ipv4("192.0.2.80"))
    assert book.addresses == [V4, IPv4Address("192.0.2.9"), IPv4Address("192.0.2.8")]


@pytest.mark.parametrize(
    "packet",
    [
        ipv4("0.0.0.0"),
        ipv4("0.1.2.3"),
        ipv4("224.0.0.1"),
        ipv4("255.255.255.255"),
        ipv4("240.0.0.1"),
        ipv4("127.0.0.1"),
        ipv6("::"),
        ipv6("::1"),
        ipv6("ff02::1"),
        ipv4("198.51.100.1", ttl=63),  # forwarded
        ipv6("2001:db8:1::1", hop_limit=254),
        ipv4("192.0.2.80")[:19],
        ipv6("2001:db8::80")[:39],
        b"",
        b"\x50" * 60,
    ],
)
def test_what_is_no_address_of_the_guest(book: AddressBook, packet: bytes) -> None:
    book.learn_packet(packet)
    assert book.addresses == []


def test_ipv4_link_local_counts(book: AddressBook) -> None:
    book.learn_packet(ipv4("169.254.3.4"))
    assert book.addresses == [IPv4Address("169.254.3.4")]


def test_it_learns_from_arp_claims_of_the_guest_only(book: AddressBook) -> None:
    book.learn_frame(announce.arp_probe(MAC, V4))
    book.learn_frame(announce.arp_request(OTHER, V4 + 1, V4))
    book.learn_arp(Arp(2, OTHER, V4 + 2, MAC, V4).pack())
    assert book.addresses == []
    book.learn_frame(announce.arp_request(MAC, V4, V4 + 1))
    assert book.addresses == [V4]


def test_it_learns_from_frames(book: AddressBook) -> None:
    book.learn_frame(announce.ethernet(OTHER, MAC, announce.ETHERTYPE_IPV4, ipv4("192.0.2.80")))
    book.learn_frame(announce.ethernet(MAC, OTHER, announce.ETHERTYPE_IPV4, ipv4("192.0.2.9")))
    book.learn_frame(announce.ethernet(OTHER, MAC, 0x88CC, ipv4("192.0.2.7")))
    book.learn_frame(MAC)
    assert book.addresses == [V4]


def test_it_learns_whether_the_guest_is_a_router(book: AddressBook) -> None:
    assert not book.router
    book.learn_packet(ipv6("fe80::1", 255, bytes((134, 0, 0, 0, 64, 0, 0, 0))))
    assert book.router
    book.learn_frame(announce.neighbour_advertisement(MAC, V6))
    assert not book.router
    book.learn_frame(announce.neighbour_advertisement(MAC, V6, router=True))
    assert book.router


def test_random_bytes_never_raise(book: AddressBook) -> None:
    source = random.Random(1)
    for _ in range(2000):
        data = source.randbytes(source.randrange(90))
        parse_arp(data)
        book.learn_packet(data)
        book.learn_frame(data[:6] + MAC + source.choice((b"\x08\x00", b"\x08\x06", b"\x86\xdd")) + data)
    assert len(book.addresses) <= 3
