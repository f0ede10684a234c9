# SPDX-License-Identifier: LGPL-2.1-or-later
"""Held packets: rules and queue together, between a client and a "guest"."""

from __future__ import annotations

import contextlib
import select
import socket
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
    snapshot,
    transport_sum,
    wait_until,
    with_checksums,
)  # fmt: skip

from remus_colo.adapters.netlink import Links
from remus_colo.adapters.nft import QueueRules, owners
from remus_colo.adapters.packetqueue import ETHERTYPE_IPV4, ETHERTYPE_IPV6, PacketQueue, open_queue
from remus_colo.errors import NetworkError, StateError

pytestmark = pytest.mark.usefixtures("queue_form")

PORT = 7007
FROM, TO = 11, 12


class Held:
    """A queue that keeps what it is given: ``packets`` maps id to payload."""

    def __init__(self, number: int, max_packets: int = 1000) -> None:
        self.packets: dict[int, bytes] = {}
        self.ethertypes: set[int] = set()
        self.queue = open_queue(number, self._keep, max_packets)

    def _keep(self, packet_id: int, payload: bytes, ethertype: int) -> None:
        self.packets[packet_id] = payload
        self.ethertypes.add(ethertype)

    def wait_for(self, number: int) -> list[int]:
        def arrived() -> bool:
            self.queue.process()
            return len(self.packets) >= number

        wait_until(arrived, f"{number} held packets")
        assert len(self.packets) == number
        return list(self.packets)


@pytest.fixture
def held(rules: QueueRules) -> Iterator[Held]:
    """What the guest sends, held."""
    rules.hold_from_guest(VIF, FROM)
    made = Held(FROM)
    yield made
    made.queue.close()


@pytest.fixture
def client(net: Network) -> socket.socket:
    sock = net.socket("client")
    sock.bind((CLIENT_IP, PORT))
    return sock


@pytest.fixture
def guest(net: Network) -> socket.socket:
    sock = net.socket("guest")
    sock.bind((GUEST_IP, PORT))
    return sock


def send(sock: socket.socket, address: str, *payloads: bytes) -> None:
    for payload in payloads:
        sock.sendto(payload, (address, PORT))


def test_path_works_without_a_queue(client: socket.socket, guest: socket.socket) -> None:
    send(guest, CLIENT_IP, b"out")
    assert receive(client, 1) == [b"out"]
    send(client, GUEST_IP, b"in")
    assert receive(guest, 1) == [b"in"]


def test_what_a_guest_says_is_compared_before_it_is_rewritten(
    rules: QueueRules, client: socket.socket, guest: socket.socket
) -> None:
    """One that lives by the rewriter since a failover, and is protected anew: its next SVM speaks as it does itself."""
    rules.rewriter(VIF, FROM, TO)
    anew = QueueRules("pvm_anew")
    with contextlib.ExitStack() as stack:
        rewritten, compared = Held(FROM), Held(TO + 1)
        for held in (rewritten, compared):
            stack.callback(held.queue.close)
        anew.hold_from_guest(VIF, TO + 1)
        stack.callback(anew.remove)
        send(guest, CLIENT_IP, b"1")
        (first,) = compared.wait_for(1)
        rewritten.queue.process()
        assert rewritten.packets == {}
        compared.queue.accept(first)
        rewritten.queue.accept(rewritten.wait_for(1)[0])
        assert receive(client, 1) == [b"1"]


def test_held_until_accepted_in_the_order_of_verdicts(
    held: Held, client: socket.socket, guest: socket.socket
) -> None:
    send(guest, CLIENT_IP, b"1", b"2", b"3")
    first, second, third = held.wait_for(3)
    assert pending(client) == []
    assert held.ethertypes == {ETHERTYPE_IPV4}
    assert [packet[28:29] for packet in held.packets.values()] == [b"1", b"2", b"3"]
    held.queue.accept(third)
    assert receive(client, 1) == [b"3"]
    held.queue.accept(first)
    held.queue.accept(second)
    assert receive(client, 2) == [b"1", b"2"]
    assert held.queue.counters().held == 0


def test_input_of_the_guest_is_not_held(held: Held, client: socket.socket, guest: socket.socket) -> None:
    send(client, GUEST_IP, b"in")
    assert receive(guest, 1) == [b"in"]
    assert held.queue.process() == 0


def test_packets_to_the_host_itself_are_held(
    held: Held, net: Network, links: Links, guest: socket.socket
) -> None:
    run("ip", "addr", "add", "10.77.0.9/24", "dev", "br0")
    host = net.socket("host")
    host.bind(("10.77.0.9", PORT))
    net.neighbour("guest", "eth0", "10.77.0.9", links.mac("br0"))
    send(guest, "10.77.0.9", b"to dom0")
    (packet,) = held.wait_for(1)
    assert pending(host) == []
    held.queue.accept(packet)
    assert receive(host, 1) == [b"to dom0"]


def test_ipv6(held: Held, net: Network) -> None:
    sockets = {}
    for name, ifname, address in (("client", "c0", "fd77::1"), ("guest", "eth0", "fd77::2")):
        with net.inside(name):
            with open(f"/proc/sys/net/ipv6/conf/{ifname}/disable_ipv6", "w") as setting:
                setting.write("0")
            run("ip", "addr", "add", f"{address}/64", "dev", ifname, "nodad")
        sockets[name] = net.socket(name, family=socket.AF_INET6)
        sockets[name].bind((address, PORT))
    net.neighbour("guest", "eth0", "fd77::1", "02:00:00:00:00:01")
    sockets["guest"].sendto(b"six", ("fd77::1", PORT))
    wait_until(lambda: held.queue.process() + len(held.packets) and ours(held), "the datagram")
    assert pending(sockets["client"]) == []
    assert ETHERTYPE_IPV6 in held.ethertypes
    held.queue.accept(ours(held)[0])
    assert receive(sockets["client"], 1) == [b"six"]
    assert held.queue.counters().truncated == 0


def ours(held: Held) -> list[int]:
    """Ids of UDP over IPv6, leaving aside what the guest's IPv6 says by itself."""
    return [
        i for i, packet in held.packets.items() if packet[0] >> 4 == 6 and packet[6] == socket.IPPROTO_UDP
    ]


def test_accept_all_keeps_the_order(held: Held, client: socket.socket, guest: socket.socket) -> None:
    sent = [b"%d" % i for i in range(50)]
    send(guest, CLIENT_IP, *sent)
    held.wait_for(50)
    assert held.queue.accept_all() == 50
    assert receive(client, 50) == sent


def test_drop(held: Held, client: socket.socket, guest: socket.socket) -> None:
    send(guest, CLIENT_IP, b"gone", b"kept")
    gone, kept = held.wait_for(2)
    held.queue.drop(gone)
    held.queue.accept(kept)
    assert receive(client, 1) == [b"kept"]


@pytest.mark.parametrize("text", [b"short", b"same..size", b"quite a lot longer than it was before" * 20])
def test_modified_payload(held: Held, client: socket.socket, guest: socket.socket, text: bytes) -> None:
    send(guest, CLIENT_IP, b"0123456789")
    (packet,) = held.wait_for(1)
    old = held.packets[packet]
    length = 28 + len(text)
    new = (
        old[:2] + length.to_bytes(2, "big") + old[4:24] + (8 + len(text)).to_bytes(2, "big") + b"\0\0" + text
    )
    held.queue.accept_modified(packet, with_checksums(new))
    assert receive(client, 1) == [text]


def test_a_wrong_checksum_is_not_repaired(held: Held, client: socket.socket, guest: socket.socket) -> None:
    """The contract of accept_modified: what it is given is what is sent."""
    send(guest, CLIENT_IP, b"bad", b"good")
    bad, good = held.wait_for(2)
    payload = bytearray(with_checksums(held.packets[bad]))
    payload[-1] ^= 1
    held.queue.accept_modified(bad, bytes(payload))
    held.queue.accept(good)
    assert receive(client, 1) == [b"good"]


def test_one_verdict_only(held: Held, guest: socket.socket) -> None:
    send(guest, CLIENT_IP, b"x")
    (packet,) = held.wait_for(1)
    held.queue.accept(packet)
    for verdict in (held.queue.accept, held.queue.drop, lambda i: held.queue.accept_modified(i, b"y")):
        with pytest.raises(StateError, match="not held"):
            verdict(packet)
    with pytest.raises(StateError):
        held.queue.accept(4711)


def test_passes_when_nobody_listens(rules: QueueRules, client: socket.socket, guest: socket.socket) -> None:
    rules.hold_from_guest(VIF, FROM)
    send(guest, CLIENT_IP, b"before")
    assert receive(client, 1) == [b"before"]
    held = Held(FROM)
    send(guest, CLIENT_IP, b"held")
    held.wait_for(1)
    held.queue.close()
    send(guest, CLIENT_IP, b"after")
    assert receive(client, 1) == [b"after"]


def test_polling_shows_all_that_waits(held: Held, guest: socket.socket) -> None:
    """A queue is readable while there is anything to process, and no longer."""
    held.queue.close()
    small = Held(FROM, max_packets=3)
    small.queue.process()
    assert not readable(small.queue)
    send(guest, CLIENT_IP, b"1", b"2", b"3")
    wait_until(lambda: readable(small.queue), "a readable queue")
    small.wait_for(3)
    assert not readable(small.queue)
    small.queue.close()


def readable(queue: PacketQueue) -> bool:
    return bool(select.select([queue], [], [], 0)[0])


def test_close_is_idempotent_and_frees_the_number(rules: QueueRules) -> None:
    queue = open_queue(FROM, lambda *_: None, 10)
    fd = queue.fileno()
    assert fd >= 0
    queue.close()
    queue.close()
    with pytest.raises(StateError, match="closed"):
        queue.process()
    with pytest.raises(StateError, match="closed"):
        queue.fileno()
    open_queue(FROM, lambda *_: None, 10).close()


def test_queue_number_taken(rules: QueueRules) -> None:
    queue = open_queue(FROM, lambda *_: None, 10)
    try:
        with pytest.raises(NetworkError, match=f"queue {FROM} is taken"):
            open_queue(FROM, lambda *_: None, 10)
    finally:
        queue.close()


def test_counts_what_exceeds_max_packets(
    rules: QueueRules, client: socket.socket, guest: socket.socket
) -> None:
    rules.hold_from_guest(VIF, FROM)
    held = Held(FROM, max_packets=5)
    send(guest, CLIENT_IP, *[b"%d" % i for i in range(8)])
    wait_until(lambda: held.queue.counters().dropped_queue_full == 3, "three dropped")
    held.wait_for(5)
    counters = held.queue.counters()
    assert (counters.received, counters.held, counters.truncated) == (5, 5, 0)
    held.queue.accept_all()
    assert receive(client, 5) == [b"0", b"1", b"2", b"3", b"4"]
    held.queue.close()
    assert held.queue.counters().dropped_queue_full == 3


def test_counts_what_exceeds_the_receive_buffer(
    rules: QueueRules, client: socket.socket, guest: socket.socket
) -> None:
    rules.hold_from_guest(VIF, FROM)
    seen: list[int] = []
    queue = open_queue(FROM, lambda i, _p, _e: seen.append(i), 1000, receive_buffer_bytes=8192)
    send(guest, CLIENT_IP, *[bytes(1000)] * 100)
    wait_until(lambda: queue.counters().dropped_buffer_full > 0, "drops")
    queue.process()
    assert len(seen) + queue.counters().dropped_buffer_full == 100
    assert queue.accept_all() == len(seen)
    assert len(receive(client, len(seen))) == len(seen)
    queue.close()


def test_large_datagrams_are_whole(
    held: Held, client: socket.socket, guest: socket.socket, net: Network
) -> None:
    """A jumbo MTU: more than NetfilterQueue's own buffer holds."""
    for name, ifname in (("client", "c0"), ("guest", "eth0")):
        with net.inside(name):
            run("ip", "link", "set", ifname, "mtu", "9000")
    for ifname in ("lan0", VIF, "br0"):
        run("ip", "link", "set", ifname, "mtu", "9000")
    text = bytes(range(256)) * 34
    send(guest, CLIENT_IP, text)
    (packet,) = held.wait_for(1)
    assert held.packets[packet][28:] == text
    assert held.queue.counters().truncated == 0
    held.queue.accept(packet)
    assert receive(client, 1) == [text]


def test_arp_is_held_or_passes(held: Held, rules: QueueRules, net: Network, guest: socket.socket) -> None:
    """With nftables ARP is held, as ethertype 0x0806; by way of iptables it passes."""
    arrivals = net.sniffer("client", "c0")
    with net.inside("guest"):
        run("ip", "neigh", "del", CLIENT_IP, "dev", "eth0")
    send(guest, CLIENT_IP, b"x")
    if rules.backend == "nft":
        (request,) = held.wait_for(1)
        assert held.ethertypes == {0x0806}
        assert pending(arrivals) == []
        held.queue.accept(request)
    (frame,) = receive(arrivals, 1)
    assert frame[12:14] == b"\x08\x06"


def test_rules_by_name_outlive_the_vif(held: Held, client: socket.socket, net: Network, links: Links) -> None:
    """As at each checkpoint: the vif goes, and a new one of its name comes, here into another bridge."""
    links.delete_link(VIF)
    wait_until(lambda: not links.exists(VIF), "the vif is gone")
    links.create_isolated_bridge("iso0")
    links.set_up("iso0")
    net.add_port(VIF, "guest", "eth0", GUEST_IP, "02:00:00:00:00:02", bridge="iso0")
    net.neighbour("guest", "eth0", CLIENT_IP, "02:00:00:00:00:01")
    fresh = net.socket("guest")
    send(fresh, CLIENT_IP, b"isolated")
    (packet,) = held.wait_for(1)
    held.queue.accept(packet)
    links.set_master(VIF, "br0")
    send(fresh, CLIENT_IP, b"on the LAN")
    held.packets.clear()
    (packet,) = held.wait_for(1)
    held.queue.accept(packet)
    assert receive(client, 1) == [b"on the LAN"]


def test_verdict_for_a_packet_of_a_deleted_vif(held: Held, guest: socket.socket, links: Links) -> None:
    send(guest, CLIENT_IP, b"x")
    (packet,) = held.wait_for(1)
    links.delete_link(VIF)
    held.queue.accept(packet)
    held.queue.process()
    assert held.queue.counters().flushed == 1


def test_rewriter_tells_the_directions(
    rules: QueueRules, client: socket.socket, guest: socket.socket
) -> None:
    rules.rewriter(VIF, FROM, TO)
    out, into = Held(FROM), Held(TO)
    send(guest, CLIENT_IP, b"out")
    send(client, GUEST_IP, b"in")
    (o,) = out.wait_for(1)
    (i,) = into.wait_for(1)
    assert (out.packets[o][28:], into.packets[i][28:]) == (b"out", b"in")
    assert pending(client) == pending(guest) == []
    out.queue.accept_modified(o, with_checksums(out.packets[o][:28] + b"OUT"))
    into.queue.accept_modified(i, with_checksums(into.packets[i][:28] + b"IN"))
    assert receive(client, 1) == [b"OUT"]
    assert receive(guest, 1) == [b"IN"]
    out.queue.close()
    into.queue.close()


def test_two_owners_side_by_side(
    net: Network, rules: QueueRules, client: socket.socket, guest: socket.socket
) -> None:
    """Ending one leaves the other's rules."""
    rules.hold_from_guest(VIF, FROM)
    other = QueueRules("test_other")
    other.hold_from_guest("vif8.0", TO)
    held = Held(FROM)
    other.remove()
    send(guest, CLIENT_IP, b"x")
    (packet,) = held.wait_for(1)
    held.queue.accept(packet)
    assert receive(client, 1) == [b"x"]
    held.queue.close()


def test_the_first_owner_leaves_first(
    net: Network, rules: QueueRules, client: socket.socket, guest: socket.socket
) -> None:
    """What it switched on in the kernel stays on while others need it."""
    first = QueueRules("test_first")
    first.hold_from_guest("vif8.0", TO)
    rules.hold_from_guest(VIF, FROM)
    held = Held(FROM)
    first.remove()
    send(guest, CLIENT_IP, b"x")
    (packet,) = held.wait_for(1)
    assert pending(client) == []
    held.queue.accept(packet)
    assert receive(client, 1) == [b"x"]
    held.queue.close()


def test_removing_rules_flushes_every_queue(
    net: Network, rules: QueueRules, client: socket.socket, guest: socket.socket
) -> None:
    """Not what one would wish, but what the kernel does and callers must reckon with."""
    rules.hold_from_guest(VIF, FROM)
    held = Held(FROM)
    send(guest, CLIENT_IP, b"lost")
    (packet,) = held.wait_for(1)
    run(
        "nft",
        "add table bridge elsewhere; add chain bridge elsewhere c { type filter hook prerouting priority 5; }",
    )
    run("nft", "delete table bridge elsewhere")
    held.queue.accept(packet)
    held.queue.process()
    assert held.queue.counters().flushed == 1
    held.packets.clear()
    send(guest, CLIENT_IP, b"next")
    (packet,) = held.wait_for(1)
    held.queue.accept(packet)
    assert receive(client, 1) == [b"next"]
    held.queue.close()


def test_adding_rules_flushes_nothing(
    rules: QueueRules, held: Held, client: socket.socket, guest: socket.socket
) -> None:
    send(guest, CLIENT_IP, b"kept")
    (packet,) = held.wait_for(1)
    rules.hold_from_guest("vif9.0", TO)
    held.queue.accept(packet)
    assert receive(client, 1) == [b"kept"]


def test_leftovers_of_a_crashed_run(net: Network, rules: QueueRules) -> None:
    before = snapshot()
    owner = rules._owner
    rules.rewriter(VIF, FROM, TO)
    if rules.backend == "nft":
        assert owners() == [owner]
    again = QueueRules(owner)
    assert again.remove_stale()
    assert not again.remove_stale()
    assert owners() == []
    rules.remove()
    assert snapshot() == before


def test_starting_anew_replaces_leftovers(rules: QueueRules, guest: socket.socket) -> None:
    rules.hold_from_guest(VIF, FROM)
    again = QueueRules(rules._owner)
    again.hold_from_guest(VIF, TO)
    old, new = Held(FROM), Held(TO)
    send(guest, CLIENT_IP, b"x")
    new.wait_for(1)
    assert old.queue.process() == 0
    old.queue.close()
    new.queue.close()
    again.remove()


def test_teardown_leaves_nothing(net: Network, rules: QueueRules, guest: socket.socket) -> None:
    before = snapshot()
    rules.hold_from_guest(VIF, FROM)
    rules.rewriter("vif8.0", 20, 21)
    assert snapshot() != before
    rules.remove()
    rules.remove()
    assert snapshot() == before


@pytest.mark.parametrize("modify", [False, True], ids=["as-is", "modified"])
def test_bulk_tcp(net: Network, rules: QueueRules, modify: bool) -> None:
    """Packets come unsplit, as offload makes them, and reach the client split, whole and with right checksums."""
    no_offload("lan0")
    rules.hold_from_guest(VIF, FROM)
    sizes: list[int] = []

    def on_packet(packet_id: int, payload: bytes, _ethertype: int) -> None:
        sizes.append(len(payload))
        header = 20 + (payload[32] >> 4) * 4
        if modify and len(payload) > header:
            queue.accept_modified(packet_id, with_checksums(payload[:header] + payload[header:].swapcase()))
        else:
            queue.accept(packet_id)

    queue = open_queue(FROM, on_packet, 4096)
    wire = net.sniffer("client", "c0")
    text = b"".join(b"Line %06d of what the guest has to say\n" % i for i in range(20000))
    got = transfer(net, text, queue.process)
    assert got == (text.swapcase() if modify else text)
    assert max(sizes) > 1500
    assert queue.counters().truncated == 0
    frames = pending(wire)
    segments = [frame[14:] for frame in frames if frame[12:14] == b"\x08\x00"]
    assert len(segments) > len(text) / 1500
    assert max(len(segment) for segment in segments) <= 1500
    assert {frame[:6] for frame in frames} == {bytes.fromhex("020000000001")}
    assert [s for s in segments if internet_sum(s[:20]) or transport_sum(s)] == []
    queue.close()


def transfer(net: Network, text: bytes, pump: Callable[[], object], *, sender: str = "guest") -> bytes:
    """Send ``text`` over TCP, on a connection that the client opens to the guest; what came."""
    server, client = net.socket("guest", socket.SOCK_STREAM), net.socket("client", socket.SOCK_STREAM)
    server.bind((GUEST_IP, 80))
    server.listen()
    client.connect_ex((GUEST_IP, 80))
    got, sent, peer = bytearray(), 0, None

    def step() -> bool:
        nonlocal sent, peer
        pump()
        with contextlib.suppress(BlockingIOError):
            if peer is None:
                peer = net.adopt(server.accept()[0])
            if sent < len(text):
                sent += (peer if sender == "guest" else client).send(text[sent : sent + 200000])
        if peer is not None:
            with contextlib.suppress(BlockingIOError):
                got.extend((client if sender == "guest" else peer).recv(1 << 20))
        return len(got) >= len(text)

    wait_until(step, "the transfer's end")
    return bytes(got)
