# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a backend really delivers, through a queue and out again unharmed: offload, jumbo frames, tags, multicast."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable, Iterator

import pytest
from conftest import (
    CLIENT_IP,
    GUEST_IP,
    VIF,
    Network,
    internet_sum,
    no_offload,
    pending,
    receive,
    run,
    transport_sum,
    wait_until,
    with_checksums,
)  # fmt: skip

from remus_colo.adapters.nft import QueueRules
from remus_colo.adapters.packetqueue import PacketQueue, open_queue

pytestmark = pytest.mark.usefixtures("queue_form")

PORT = 7013
FROM, OTHER = 31, 32
CLIENT_MAC, GUEST_MAC = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
CLIENT_IP6, GUEST_IP6 = "fd77::1", "fd77::2"
GROUP, GROUP6 = "239.1.2.3", "ff05::1:3"
SOL_PACKET, PACKET_AUXDATA, TP_STATUS_VLAN_VALID = 263, 8, 1 << 4


class Passing:
    """A queue that notes what it is given, and lets it go at once, changed by ``change`` if that is given."""

    def __init__(self, number: int, change: Callable[[bytes], bytes] | None = None) -> None:
        self.packets: list[bytes] = []
        self._change = change
        self.queue: PacketQueue = open_queue(number, self._packet, 4096)

    def _packet(self, packet_id: int, payload: bytes, _ethertype: int) -> None:
        self.packets.append(payload)
        changed = payload if self._change is None else self._change(payload)
        if changed == payload:
            self.queue.accept(packet_id)
        else:
            self.queue.accept_modified(packet_id, changed)

    def pump(self) -> int:
        return self.queue.process()


@pytest.fixture
def passing(rules: QueueRules) -> Iterator[Passing]:
    rules.hold_from_guest(VIF, FROM)
    made = Passing(FROM)
    yield made
    counters = made.queue.counters()
    made.queue.close()
    assert (counters.held, counters.flushed, counters.truncated) == (0, 0, 0)
    assert (counters.dropped_queue_full, counters.dropped_buffer_full) == (0, 0)


def set_mtu(net: Network, mtu: int) -> None:
    for name, ifname in (("client", "c0"), ("guest", "eth0")):
        with net.inside(name):
            run("ip", "link", "set", ifname, "mtu", str(mtu))
    for ifname in ("lan0", VIF, "br0"):
        run("ip", "link", "set", ifname, "mtu", str(mtu))


def add_ipv6(net: Network) -> None:
    for name, ifname, address in (("client", "c0", CLIENT_IP6), ("guest", "eth0", GUEST_IP6)):
        with net.inside(name):
            with open(f"/proc/sys/net/ipv6/conf/{ifname}/disable_ipv6", "w") as setting:
                setting.write("0")
            run("ip", "addr", "add", f"{address}/64", "dev", ifname, "nodad")
    net.neighbour("guest", "eth0", CLIENT_IP6, "02:00:00:00:00:01")
    net.neighbour("client", "c0", GUEST_IP6, "02:00:00:00:00:02")


def tcp_sum(packet: bytes) -> int:
    """0 if the checksum of a TCP packet over IPv4 or IPv6 (without extension headers) is right."""
    if packet[0] >> 4 == 4:
        return transport_sum(packet)
    body = packet[40 : 40 + int.from_bytes(packet[4:6], "big")]
    return internet_sum(packet[8:40] + struct.pack("!IxxxB", len(body), packet[6]) + body)


def tcp_transfer(net: Network, family: int, text: bytes, pump: Callable[[], object]) -> bytes:
    """The guest sends ``text`` on a connection that the client opens; what the client got."""
    address = GUEST_IP if family == socket.AF_INET else GUEST_IP6
    server = net.socket("guest", socket.SOCK_STREAM, family)
    server.bind((address, 80))
    server.listen()
    client = net.socket("client", socket.SOCK_STREAM, family)
    client.connect_ex((address, 80))
    got, sent, peer = bytearray(), 0, None

    def step() -> bool:
        nonlocal sent, peer
        pump()
        with contextlib.suppress(BlockingIOError):
            if peer is None:
                peer = net.adopt(server.accept()[0])
            if sent < len(text):
                sent += peer.send(text[sent : sent + 1000000])
        with contextlib.suppress(BlockingIOError):
            got.extend(client.recv(1 << 20))
        return len(got) >= len(text)

    wait_until(step, "the transfer's end")
    return bytes(got)


@pytest.mark.parametrize("mtu", [1500, 9000])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def test_superpackets_are_whole_and_leave_split(
    passing: Passing, net: Network, family: int, mtu: int
) -> None:
    """With offload, the guest's stack hands down up to 64 kB without checksum; the client's link has no offload."""
    set_mtu(net, mtu)
    if family == socket.AF_INET6:
        add_ipv6(net)
    no_offload("lan0")
    wire = net.sniffer("client", "c0")
    text = b"".join(b"Line %06d of what the guest has to say\n" % i for i in range(20000))
    assert tcp_transfer(net, family, text, passing.pump) == text
    # How long they grow is up to TCP's pacing; longer than any frame is what counts.
    assert max(len(packet) for packet in passing.packets) > 2 * 1500
    version = 4 if family == socket.AF_INET else 6
    segments = [
        f[14:] for f in pending(wire) if f[12:14] in (b"\x08\x00", b"\x86\xdd") and f[14] >> 4 == version
    ]
    protocol = 9 if version == 4 else 6
    segments = [segment for segment in segments if segment[protocol] == socket.IPPROTO_TCP]
    assert mtu - 100 < max(len(segment) for segment in segments) <= mtu
    assert [segment for segment in segments if tcp_sum(segment)] == []


def test_a_changed_superpacket(rules: QueueRules, net: Network) -> None:
    """As the rewriter would: 64 kB go back to the kernel and leave as segments with right checksums."""
    no_offload("lan0")
    rules.hold_from_guest(VIF, FROM)

    def change(packet: bytes) -> bytes:
        header = 20 + (packet[32] >> 4) * 4
        return (
            with_checksums(packet[:header] + packet[header:].swapcase()) if len(packet) > header else packet
        )

    passing = Passing(FROM, change)
    wire = net.sniffer("client", "c0")
    text = b"".join(b"Line %06d of what the guest has to say\n" % i for i in range(20000))
    assert tcp_transfer(net, socket.AF_INET, text, passing.pump) == text.swapcase()
    # How long they grow is up to TCP's pacing; longer than any frame is what counts.
    assert max(len(packet) for packet in passing.packets) > 2 * 1500
    segments = [f[14:] for f in pending(wire) if f[12:14] == b"\x08\x00"]
    assert max(len(segment) for segment in segments) <= 1500
    assert [segment for segment in segments if tcp_sum(segment)] == []
    passing.queue.close()


def test_checksums_that_are_not_filled_in_yet(passing: Passing, net: Network) -> None:
    """A datagram leaves the guest with its checksum left to the card, and reaches the wire with it."""
    no_offload("lan0")
    wire = net.sniffer("client", "c0")
    guest, client = net.socket("guest"), net.socket("client")
    guest.bind((GUEST_IP, PORT))
    client.bind((CLIENT_IP, PORT))
    guest.sendto(b"unsummed", (CLIENT_IP, PORT))
    assert receive(client, 1, passing.pump) == [b"unsummed"]
    assert transport_sum(passing.packets[0]) != 0
    (frame,) = pending(wire)
    assert transport_sum(frame[14:]) == 0


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def test_large_datagrams_in_fragments(passing: Passing, net: Network, family: int) -> None:
    if family == socket.AF_INET6:
        add_ipv6(net)
    guest, client = net.socket("guest", family=family), net.socket("client", family=family)
    there = CLIENT_IP if family == socket.AF_INET else CLIENT_IP6
    guest.bind((GUEST_IP if family == socket.AF_INET else GUEST_IP6, PORT))
    client.bind((there, PORT))
    text = bytes(range(256)) * 200
    guest.sendto(text, (there, PORT))
    assert receive(client, 1, passing.pump) == [text]


@pytest.mark.parametrize("group", [GROUP, GROUP6])
def test_multicast(passing: Passing, net: Network, group: str) -> None:
    """One packet is held, and when it may go all ports of the bridge get it."""
    family = socket.AF_INET6 if ":" in group else socket.AF_INET
    if family == socket.AF_INET6:
        add_ipv6(net)
    guest, client = net.socket("guest", family=family), net.socket("client", family=family)
    client.bind(("", PORT))
    if family == socket.AF_INET:
        guest.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(GUEST_IP))
        membership = socket.inet_aton(group) + socket.inet_aton(CLIENT_IP)
        client.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
    else:
        for sock, name, ifname in ((guest, "guest", "eth0"), (client, "client", "c0")):
            with net.inside(name):
                index = socket.if_nametoindex(ifname)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
            membership = socket.inet_pton(family, group) + struct.pack("@I", index)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, membership)
    guest.sendto(b"to all", (group, PORT))
    assert receive(client, 1, passing.pump) == [b"to all"]
    assert [packet[-6:] for packet in passing.packets].count(b"to all") == 1


def tagged(sock: socket.socket) -> list[tuple[int | None, bytes]]:
    """Frames, each with the tag that the kernel took out of it."""
    got = []
    with contextlib.suppress(BlockingIOError):
        while True:
            frame, control, _, _ = sock.recvmsg(70000, 100)
            status, _, _, _, _, tci, _ = struct.unpack("=IIIHHHH", control[0][2])
            got.append((tci & 0xFFF if status & TP_STATUS_VLAN_VALID else None, frame))
    return got


@pytest.mark.parametrize(
    "tags", [b"\x81\x00\x60\x05", b"\x88\xa8\x00\x07\x81\x00\x00\x05"], ids=["802.1Q", "802.1ad"]
)
def test_tagged_frames_are_held_and_keep_their_tags(
    passing: Passing, rules: QueueRules, net: Network, tags: bytes
) -> None:
    wire = net.sniffer("client", "c0")
    wire.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
    guest = net.socket("guest", socket.SOCK_RAW, socket.AF_PACKET)
    with net.inside("guest"):
        guest.bind(("eth0", 0))
    udp = struct.pack("!HHHH", PORT, PORT, 12, 0) + b"tags"
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 7, 0, 64, socket.IPPROTO_UDP, 0)
    packet = with_checksums(ip + socket.inet_aton(GUEST_IP) + socket.inet_aton(CLIENT_IP) + udp)
    guest.send(CLIENT_MAC + GUEST_MAC + tags + b"\x08\x00" + packet)
    arrived: list[tuple[int | None, bytes]] = []

    def look() -> bool:
        passing.pump()
        arrived.extend(tagged(wire))
        return bool(arrived)

    wait_until(look, "the frame")
    inside = tags[4:] + b"\x08\x00" + packet
    assert arrived == [(int.from_bytes(tags[2:4], "big") & 0xFFF, CLIENT_MAC + GUEST_MAC + inside)]
    if rules.backend == "nft" or len(tags) == 4:  # by way of iptables a second tag hides what is inside
        (held,) = passing.packets
        assert held == tags[6:] + b"\x08\x00" * bool(tags[6:]) + packet


def test_two_vifs_of_one_guest(passing: Passing, rules: QueueRules, net: Network) -> None:
    """Each has its queue, in its bridge; what is held in one does not hold up the other."""
    run("ip", "link", "add", "br1", "type", "bridge", "forward_delay", "0", "mcast_snooping", "0")
    run("ip", "link", "set", "br1", "up")
    net.add_port("lan1", "client", "c1", "10.79.0.1", "02:00:00:00:01:01", bridge="br1")
    net.add_port("vif7.1", "guest", "eth1", "10.79.0.2", "02:00:00:00:01:02", bridge="br1")
    net.neighbour("guest", "eth1", "10.79.0.1", "02:00:00:00:01:01")
    rules.hold_from_guest("vif7.1", OTHER)
    other = Passing(OTHER)
    sockets = {}
    for guest_ip, client_ip in ((GUEST_IP, CLIENT_IP), ("10.79.0.2", "10.79.0.1")):
        sockets[client_ip] = net.socket("guest"), net.socket("client")
        sockets[client_ip][0].bind((guest_ip, PORT))
        sockets[client_ip][1].bind((client_ip, PORT))
        sockets[client_ip][0].sendto(client_ip.encode(), (client_ip, PORT))
    assert receive(sockets["10.79.0.1"][1], 1, other.pump) == [b"10.79.0.1"]
    assert pending(sockets[CLIENT_IP][1]) == []
    assert receive(sockets[CLIENT_IP][1], 1, passing.pump) == [CLIENT_IP.encode()]
    assert [packet[28:] for packet in passing.packets] == [CLIENT_IP.encode()]
    assert [packet[28:] for packet in other.packets] == [b"10.79.0.1"]
    other.queue.close()
