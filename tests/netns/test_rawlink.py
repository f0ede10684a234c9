# SPDX-License-Identifier: LGPL-2.1-or-later
"""Frames of one link, in and out."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from conftest import CLIENT_IP, GUEST_IP, VIF, Network, receive, run, wait_until

from remus_colo.adapters import bpf
from remus_colo.adapters.netlink import Links
from remus_colo.adapters.rawlink import Frame, RawLink, RawSender
from remus_colo.errors import NetworkError, StateError

GUEST_MAC = bytes.fromhex("020000000002")
PORT = 7010
ETHERTYPE_ARP, ETHERTYPE_IPV6 = 0x0806, 0x86DD


@pytest.fixture
def raw(net: Network) -> Iterator[RawLink]:
    with RawLink(VIF) as made:
        yield made


def next_frame(raw: RawLink) -> Frame:
    return wait_until(raw.recv, "a frame")


def test_reads_what_comes_in_and_not_what_goes_out(net: Network, raw: RawLink) -> None:
    guest, client = net.socket("guest"), net.socket("client")
    guest.bind((GUEST_IP, PORT))
    client.bind((CLIENT_IP, PORT))
    assert raw.recv() is None
    client.sendto(b"to the guest", (GUEST_IP, PORT))
    assert receive(guest, 1) == [b"to the guest"]
    raw.send(GUEST_MAC + GUEST_MAC + b"\x88\xb5" + bytes(46))
    guest.sendto(b"from the guest", (CLIENT_IP, PORT))
    frame = next_frame(raw)
    assert (frame.ethertype, frame.source_mac) == (0x0800, GUEST_MAC)
    assert frame.payload[28:] == b"from the guest"
    assert raw.recv() is None
    assert raw.dropped() == 0


def test_sends_whole_frames(net: Network, raw: RawLink) -> None:
    arrivals = net.sniffer("guest", "eth0")
    frame = GUEST_MAC + bytes.fromhex("02000000000a") + b"\x88\xb5" + bytes(range(100))
    raw.send(frame)
    assert receive(arrivals, 1) == [frame]


def test_who_asks_for_another(net: Network) -> None:
    """By ARP or, without an address of its own, by neighbour discovery; nothing else is seen."""
    guest = net.socket("guest")
    with RawLink(VIF, bpf.discovery) as raw:
        guest.sendto(b"not this", (CLIENT_IP, PORT))
        with net.inside("guest"):
            run("ip", "neigh", "del", CLIENT_IP, "dev", "eth0")
        guest.sendto(b"nor this, but who-has", (CLIENT_IP, PORT))
        frame = next_frame(raw)
        assert frame.ethertype == ETHERTYPE_ARP
        assert frame.payload[24:28] == socket.inet_aton(CLIENT_IP)
        sender = net.sniffer("guest", "eth0")
        for asked in (b"\x60" + bytes(5) + b"\x11", b"\x60" + bytes(5) + b"\x3a"):  # UDP, ICMPv6
            sender.send(bytes(6) + GUEST_MAC + ETHERTYPE_IPV6.to_bytes(2, "big") + asked.ljust(48, b"\0"))
        frame = next_frame(raw)
        assert (frame.ethertype, frame.payload[6]) == (ETHERTYPE_IPV6, 58)


def test_link_down_and_up_again(net: Network, raw: RawLink, links: Links) -> None:
    links.set_down(VIF)
    assert raw.recv() is None
    with pytest.raises(NetworkError, match=f"cannot send 60 bytes on {VIF}"):
        raw.send(bytes(60))
    links.set_up(VIF)
    wait_until(lambda: "LOWER_UP" in run("ip", "link", "show", VIF), "carrier")
    net.socket("guest").sendto(b"x", (CLIENT_IP, PORT))
    assert next_frame(raw).payload[28:29] == b"x"


@pytest.mark.parametrize("down_first", [False, True])
def test_link_deleted(net: Network, raw: RawLink, links: Links, down_first: bool) -> None:
    if down_first:
        links.set_down(VIF)
        assert raw.recv() is None
    links.delete_link(VIF)
    for _ in range(2):
        with pytest.raises(NetworkError, match=f"{VIF} was deleted"):
            raw.recv()
    with pytest.raises(NetworkError):
        raw.send(bytes(60))
    raw.close()


def test_missing_link(net: Network) -> None:
    with pytest.raises(NetworkError, match=r"vif9\.9: No such device"):
        RawLink("vif9.9")


def test_too_long_a_frame(net: Network, raw: RawLink) -> None:
    with pytest.raises(NetworkError, match="cannot send 3000 bytes"):
        raw.send(bytes(3000))


def test_closed(net: Network) -> None:
    raw = RawLink(VIF)
    raw.close()
    raw.close()
    with pytest.raises(StateError):
        raw.recv()
    with pytest.raises(StateError):
        raw.send(bytes(60))
    assert raw.dropped() == 0


def test_counts_what_is_not_read_in_time(net: Network) -> None:
    with RawLink(VIF, receive_buffer_bytes=4096) as raw:
        guest = net.socket("guest")
        for _ in range(100):
            guest.sendto(bytes(1000), (CLIENT_IP, PORT))
        got = 0
        while raw.recv() is not None:
            got += 1
        assert got + raw.dropped() == 100
        assert raw.dropped() > 0


@pytest.fixture
def sender(net: Network) -> Iterator[RawSender]:
    made = RawSender()
    yield made
    made.close()


def test_a_sender_goes_by_name_also_to_a_link_made_anew(
    net: Network, links: Links, sender: RawSender
) -> None:
    frame = GUEST_MAC + bytes.fromhex("02000000000a") + b"\x88\xb5" + bytes(range(100))
    arrivals = net.sniffer("guest", "eth0")
    sender.send(VIF, frame)
    assert receive(arrivals, 1) == [frame]
    links.delete_link(VIF)
    with pytest.raises(NetworkError, match=f"on {VIF}: No such device"):
        sender.send(VIF, frame)
    net.add_port(VIF, "guest", "eth0", GUEST_IP, "02:00:00:00:00:02")
    arrivals = net.sniffer("guest", "eth0")
    sender.send(VIF, frame)
    assert receive(arrivals, 1) == [frame]


def test_a_sender_refuses_what_the_link_does(net: Network, links: Links, sender: RawSender) -> None:
    with pytest.raises(NetworkError, match="cannot send 3000 bytes"):
        sender.send(VIF, bytes(3000))
    run("ip", "link", "set", VIF, "down")
    with pytest.raises(NetworkError, match="Network is down"):
        sender.send(VIF, bytes(60))
