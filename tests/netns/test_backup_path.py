# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rewriter between a client and an SVM, on real queues and with both forms of the path.

The namespace ``guest`` is the SVM.  The client is played by hand: it acknowledges another initial sequence number than
the SVM chose, namely the PVM's.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest
from conftest import (
    CLIENT_IP,
    GUEST_IP,
    VIF,
    Network,
    no_offload,
    pending,
    run,
    transport_sum,
    wait_until,
    with_checksums,
)
from test_queue_traffic import tcp_transfer

from remus_colo.adapters.backend import Vif
from remus_colo.adapters.netlink import Links
from remus_colo.adapters.nft import QueueRules
from remus_colo.adapters.packetqueue import Form
from remus_colo.adapters.rawlink import RawSender
from remus_colo.proxy.backup_path import SvmVifPath
from remus_colo.proxy.primary_path import Tunnel
from remus_colo.session.loop import Loop

pytestmark = pytest.mark.usefixtures("queue_form")

CLIENT_MAC, GUEST_MAC = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
SYN, ACK = 0x02, 0x10
HTTP, CLIENT_PORT = 80, 5555
TCP_REPAIR = 19  # <linux/tcp.h>
SOL_PACKET, PACKET_VNET_HDR = 263, 15  # <linux/socket.h>, <linux/if_packet.h>
APART = 123456  # the PVM's initial sequence number minus the SVM's


class Path:
    def __init__(self, links: Links, rules: QueueRules) -> None:
        self.loop = Loop()
        self._sender = RawSender()
        self.vif = SvmVifPath(self.loop, links, self._sender, "abcdef", 0)
        self.vif.open_queues(Vif(7, 0), GUEST_MAC, rules)

    def pump(self) -> None:
        """One round of the loop's readers."""
        self.loop.call(self.loop.stop)
        self.loop.run()

    def close(self) -> None:
        self.vif.close()
        self._sender.close()
        self.loop.close()


@pytest.fixture
def path(net: Network, links: Links, rules: QueueRules) -> Iterator[Path]:
    made = Path(links, rules)
    yield made
    made.close()


def pseudo_sum(packet: bytes) -> bytes:
    """What the kernel puts where the checksum will be: the sum of the pseudo-header, of an IPv4 packet with TCP."""
    words = struct.unpack("!4H", packet[12:20])
    total = sum(words) + socket.IPPROTO_TCP + len(packet) - 20
    return struct.pack("!H", total % 0xFFFF or 0xFFFF)


class Client:
    """A TCP client by hand: frames in and out at ``c0``, whose kernel is deaf to the connection."""

    def __init__(self, net: Network, path: Path) -> None:
        self._path = path
        self._out = net.socket("client", socket.SOCK_RAW, socket.AF_PACKET)
        with net.inside("client"):
            self._out.bind(("c0", 0))
            # The kernel knows of no connection, and would reset it.
            run("ip", "addr", "flush", "dev", "c0")
        no_offload("lan0")  # so that what arrives has its checksums
        self._in = net.sniffer("client", "c0")
        self._segments: list[bytes] = []

    def send(
        self,
        seq: int,
        ack: int,
        flags: int,
        data: bytes = b"",
        *,
        spoilt: bool = False,
        unsummed: bool = False,
    ) -> None:
        """:param spoilt: some bit has changed on its way.
        :param unsummed: the checksum is left to the device, as kernels do.
        """
        tcp = struct.pack("!HHIIBBHHH", CLIENT_PORT, HTTP, seq, ack, 5 << 4, flags, 60000, 0, 0) + data
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 1, 0, 64, socket.IPPROTO_TCP, 0)
        packet = with_checksums(ip + socket.inet_aton(CLIENT_IP) + socket.inet_aton(GUEST_IP) + tcp)
        if spoilt:
            packet = packet[:-1] + bytes([packet[-1] ^ 0x20])
        frame = GUEST_MAC + CLIENT_MAC + b"\x08\x00" + packet
        if unsummed:
            tcp_at = 14 + 20
            # struct virtio_net_hdr: flags (a checksum is wanted), GSO fields, from where to sum and where to put it
            header = struct.pack("=BBHHHH", 1, 0, 0, 0, tcp_at, 16)
            frame = header + frame[: tcp_at + 16] + pseudo_sum(packet) + frame[tcp_at + 18 :]
        self._out.setsockopt(SOL_PACKET, PACKET_VNET_HDR, unsummed)
        self._out.send(frame)

    def next(self) -> tuple[int, int, int, bytes]:
        """Sequence number, acknowledgement, flags and data of the SVM's next segment, whose checksum is right."""

        def look() -> list[bytes]:
            self._path.pump()
            frames = [frame for frame in pending(self._in) if frame[12:14] == b"\x08\x00"]
            self._segments += [frame[14:] for frame in frames if frame[23] == socket.IPPROTO_TCP]
            return self._segments

        packet = wait_until(look, "a segment of the SVM").pop(0)
        assert transport_sum(packet) == 0
        seq, ack, offset, flags = struct.unpack_from("!IIBB", packet, 24)
        return seq, ack, flags, packet[20 + (offset >> 4) * 4 : int.from_bytes(packet[2:4], "big")]


@pytest.fixture
def server(net: Network) -> socket.socket:
    made = net.socket("guest", socket.SOCK_STREAM)
    made.bind((GUEST_IP, HTTP))
    made.listen()
    return made


def accepted(net: Network, path: Path, server: socket.socket) -> socket.socket:
    connections: list[socket.socket] = []

    def accept() -> list[socket.socket]:
        path.pump()
        with contextlib.suppress(BlockingIOError):
            connections.append(net.adopt(server.accept()[0]))
        return connections

    return wait_until(accept, "the connection")[0]


def heard(path: Path, connection: socket.socket) -> bytes:
    def hear() -> bytes:
        path.pump()
        with contextlib.suppress(BlockingIOError):
            return connection.recv(100)
        return b""

    return wait_until(hear, "what the client says")


def connected(net: Network, path: Path, server: socket.socket) -> tuple[Client, socket.socket, int]:
    """A client, its connection at the SVM, and the sequence number that it expects from the PVM."""
    client = Client(net, path)
    client.send(1000, 0, SYN)
    svm_isn, _, _, _ = client.next()
    first = (svm_isn + APART + 1) & 0xFFFFFFFF
    client.send(1001, first, ACK, b"question")
    connection = accepted(net, path, server)
    assert heard(path, connection) == b"question"
    assert client.next()[:2] == (first, 1009)
    return client, connection, first


def test_a_spoilt_segment_stays_so(net: Network, path: Path, server: socket.socket, queue_form: Form) -> None:
    """To write its checksum anew would make it a good one."""
    if queue_form is Form.NETFILTERQUEUE:
        pytest.skip("it does not tell whose checksum is there already")
    client, connection, first = connected(net, path, server)
    client.send(1009, first, ACK, b" and another", spoilt=True)
    client.send(1021, first, ACK, b", and more")
    assert client.next()[:2] == (first, 1009), "the second one is missed"
    client.send(1009, first, ACK, b" and another")
    assert heard(path, connection) == b" and another, and more"


@pytest.fixture
def outage(
    net: Network, path: Path, server: socket.socket, links: Links
) -> tuple[Client, socket.socket, int]:
    """The primary has died: the SVM hears nobody, and nobody hears it."""
    client, connection, first = connected(net, path, server)
    path.vif.expect_outage(["lan0"])
    links.set_master(VIF, None)
    return client, connection, first


def take_over(path: Path, links: Links) -> dict[str, int]:
    links.set_master(VIF, "br0")
    path.vif.rewriter.stop_learning()
    return path.vif.make_good("br0")


def test_what_clients_said_in_an_outage_is_heard_at_the_takeover(
    outage: tuple[Client, socket.socket, int], path: Path, links: Links
) -> None:
    client, connection, first = outage
    for _ in range(3):  # it repeats itself
        client.send(1009, first, ACK, b" and another")
        path.pump()
    with pytest.raises(BlockingIOError):
        connection.recv(100)
    assert take_over(path, links)["to_guest"] == 1
    assert heard(path, connection) == b" and another"
    seq, ack, _, _ = client.next()
    assert (seq, ack) == (first, 1009 + len(b" and another"))


def test_what_the_svm_said_in_an_outage_is_said_at_the_takeover(
    outage: tuple[Client, socket.socket, int], path: Path, links: Links
) -> None:
    client, connection, first = outage
    connection.send(b"answer")
    path.pump()
    assert take_over(path, links)["to_lan"] == 1
    seq, _, _, data = client.next()
    assert (seq, data) == (first, b"answer")


def last_words(net: Network, connection: socket.socket, data: bytes) -> None:
    """The SVM says so, and is no more: left to itself it would repeat what nobody acknowledges."""
    vif = net.sniffer("host", VIF)
    connection.send(data)
    connection.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)  # such a socket is closed without a word
    connection.close()
    wait_until(lambda: any(frame.endswith(data) for frame in pending(vif)), "what the SVM said")


def test_what_an_svm_said_before_it_became_another_is_not_said(
    net: Network, outage: tuple[Client, socket.socket, int], path: Path, links: Links
) -> None:
    _, connection, _ = outage
    last_words(net, connection, b"answer")
    path.pump()
    path.vif.reset()
    assert take_over(path, links) == {"to_guest": 0, "to_lan": 0}


def test_what_an_svm_said_before_it_became_another_does_not_come_late(
    net: Network, path: Path, server: socket.socket
) -> None:
    _, connection, _ = connected(net, path, server)
    lan = net.sniffer("client", "c0")
    last_words(net, connection, b"before")
    path.vif.mute()
    path.vif.reset()
    path.pump()
    net.socket("guest").sendto(b"after", (CLIENT_IP, 1))
    heard: list[bytes] = []

    def hear() -> bool:
        path.pump()
        heard.extend(pending(lan))
        return any(frame.endswith(b"after") for frame in heard)

    wait_until(hear, "what the next one says")
    assert not any(frame.endswith(b"before") for frame in heard)


def test_a_primary_that_was_only_late(
    outage: tuple[Client, socket.socket, int], path: Path, links: Links
) -> None:
    client, _connection, first = outage
    client.send(1009, first, ACK, b" and another")
    path.pump()
    path.vif.no_outage()
    assert take_over(path, links) == {"to_guest": 0, "to_lan": 0}


def test_a_connection_with_the_pvms_numbers(net: Network, path: Path, server: socket.socket) -> None:
    client = Client(net, path)
    client.send(1000, 0, SYN)
    svm_isn, ack, flags, _ = client.next()
    assert (flags, ack) == (SYN | ACK, 1001)
    first = (svm_isn + APART + 1) & 0xFFFFFFFF
    client.send(1001, first, ACK, b"question")
    connection = accepted(net, path, server)
    assert heard(path, connection) == b"question"
    seq, ack, _, data = client.next()
    assert (seq, ack, data) == (first, 1009, b"")
    connection.send(b"answer")
    seq, ack, _, data = client.next()
    assert (seq, ack, data) == (first, 1009, b"answer")
    assert path.vif.rewriter.rewritten_flows == 1
    assert IPv4Address(GUEST_IP) in path.vif.guest_addresses.addresses
    assert IPv4Address(CLIENT_IP) in path.vif.client_addresses.addresses


@pytest.mark.parametrize("unsummed", [False, True])
def test_an_svm_that_lags_behind_the_handshake(
    net: Network, path: Path, server: socket.socket, unsummed: bool
) -> None:
    """The client has the PVM's SYN-ACK and goes on before the SVM has sent its own: that is kept, and given
    to it then.
    """
    client = Client(net, path)
    client.send(1000, 0, SYN)
    client.send(1001, 778, ACK, b"early", unsummed=unsummed)
    connection = accepted(net, path, server)
    assert heard(path, connection) == b"early"
    assert path.vif.rewriter.counters.held == 1
    connection.send(b"answer")
    data = b""
    while not data:
        seq, ack, _, data = client.next()
    assert (seq, ack, data) == (778, 1006, b"answer")


def test_bulk_of_a_connection_that_is_not_rewritten(net: Network, path: Path) -> None:
    text = b"".join(b"Line %06d of what the SVM has to say\n" % number for number in range(20000))
    assert tcp_transfer(net, socket.AF_INET, text, path.pump) == text
    assert path.vif.rewriter.counters.from_guest_rewritten == 0


def test_addresses_are_learnt_by_arp(net: Network, rules: QueueRules, path: Path) -> None:
    if rules.backend != "nft":
        pytest.skip("by way of iptables ARP passes unseen")
    net.socket("guest").sendto(b"x", ("10.77.0.99", 1))  # there is nobody: who-has
    wait_until(lambda: path.pump() or path.vif.guest_addresses.addresses, "an address")
    assert path.vif.guest_addresses.addresses == [IPv4Address(GUEST_IP)]


def test_the_vif_moves_to_the_lan_and_what_led_to_it_goes(path: Path, links: Links) -> None:
    vif = path.vif
    assert vif.vif is not None
    vif.start(Tunnel(0, 0, None, None), 1500)
    links.set_master(vif.vif.ifname, vif.bridge)
    vif.open_lan("br0")
    assert links.master_of(vif.vif.ifname) == "br0"
    for _ in range(2):
        vif.delete_isolated()
        assert not links.exists(vif.bridge)
        assert not links.exists(vif.tunnel_ifname)
    assert links.master_of(vif.vif.ifname) == "br0"
