# SPDX-License-Identifier: LGPL-2.1-or-later
"""Links, tunnels, the isolated bridge and the mirror."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from conftest import (
    CLIENT_IP,
    DEADLINE_S,
    GUEST_IP,
    VIF,
    Network,
    pending,
    receive,
    run,
    set_ipv6,
    setns,
    snapshot,
    with_checksums,
)  # fmt: skip

from remus_colo.adapters import ifb
from remus_colo.adapters.netlink import Links
from remus_colo.errors import HostError, NetworkError
from remus_colo.proxy import announce

PORT = 7009


@pytest.fixture
def mirror_support(links: Links) -> None:
    try:
        links.mirror_egress("lo", "lo")
    except HostError as exc:
        pytest.skip(str(exc))
    links.remove_mirror("lo")


def test_neighbours_are_those_that_were_found(links: Links) -> None:
    run("ip", "addr", "add", "10.77.0.3/24", "dev", "br0")
    for address, state in (("10.77.0.1", "reachable"), ("10.77.0.4", "stale"), ("10.77.0.7", "permanent")):
        run("ip", "neigh", "replace", address, "lladdr", "02:00:00:00:00:01", "dev", "br0", "nud", state)
    run("ip", "neigh", "replace", "10.77.0.5", "dev", "br0", "nud", "failed")
    run("ip", "neigh", "replace", "10.77.0.6", "lladdr", "02:00:00:00:00:01", "dev", VIF, "nud", "permanent")
    assert set(links.neighbours("br0")) == {ip_address(f"10.77.0.{number}") for number in (1, 4, 7)}
    with pytest.raises(NetworkError):
        links.neighbours("vif9.9")


def test_what_is_told_of_a_link(net: Network, links: Links) -> None:
    assert links.exists(VIF)
    assert not links.exists("vif9.9")
    assert links.ifindex(VIF) == socket.if_nametoindex(VIF)
    assert links.master_of(VIF) == "br0"
    assert links.master_of("br0") is None
    assert links.mtu(VIF) == 1500
    assert links.mac(VIF) in run("ip", "link", "show", VIF)
    assert links.is_up(VIF)
    links.set_down(VIF)
    assert not links.is_up(VIF)
    links.set_up(VIF)
    assert links.is_up(VIF)
    links.set_master(VIF, None)
    assert links.master_of(VIF) is None
    links.set_master(VIF, "br0")
    assert links.master_of(VIF) == "br0"


def test_stats_count_frames(net: Network, links: Links) -> None:
    guest = net.socket("guest")
    guest.bind((GUEST_IP, PORT))
    before = links.stats(VIF)
    sock = net.socket("client")
    for _ in range(7):
        sock.sendto(bytes(100), (GUEST_IP, PORT))
    receive(guest, 7)
    after = links.stats(VIF)
    assert after.tx_packets - before.tx_packets == 7
    assert after.tx_bytes - before.tx_bytes == 7 * 142
    assert after.rx_packets == before.rx_packets


@pytest.mark.parametrize(
    "operation",
    [
        lambda links: links.ifindex("vif9.9"),
        lambda links: links.mac("vif9.9"),
        lambda links: links.mtu("vif9.9"),
        lambda links: links.master_of("vif9.9"),
        lambda links: links.stats("vif9.9"),
        lambda links: links.set_up("vif9.9"),
        lambda links: links.set_down("vif9.9"),
        lambda links: links.silence("vif9.9"),
        lambda links: links.set_master("vif9.9", "br0"),
        lambda links: links.set_master(VIF, "vif9.9"),
        lambda links: links.mirror_egress("vif9.9", VIF),
        lambda links: links.mirror_egress(VIF, "vif9.9"),
    ],
)
def test_missing_link(net: Network, links: Links, operation: object) -> None:
    with pytest.raises(NetworkError, match=r"no link vif9\.9"):
        operation(links)


def test_no_error_for_what_is_gone_already(net: Network, links: Links) -> None:
    links.delete_link("vif9.9")
    links.remove_mirror("vif9.9")
    links.remove_mirror(VIF)


def test_names_that_cannot_be(net: Network, links: Links) -> None:
    for name in ("", "sixteen-letters-", "a/b", "a b"):
        with pytest.raises(NetworkError, match="cannot be the name"):
            links.create_isolated_bridge(name)


def test_taken_name(net: Network, links: Links) -> None:
    with pytest.raises(NetworkError, match="br0"):
        links.create_isolated_bridge("br0")
    assert links.master_of(VIF) == "br0"


def test_close_is_idempotent(net: Network) -> None:
    links = Links()
    links.close()
    links.close()


# --- waiting ---


def test_wait_for_a_link_that_is_there(net: Network, links: Links) -> None:
    assert links.wait_for_link(VIF, time.monotonic()) == links.ifindex(VIF)


def test_wait_for_a_link_that_comes(net: Network, links: Links) -> None:
    def make() -> None:
        setns(net.path("host"))
        with Links() as other:
            other.create_veth("late0", "late1", 1500)

    maker = threading.Thread(target=make)
    maker.start()
    assert links.wait_for_link("late0", time.monotonic() + DEADLINE_S) == links.ifindex("late0")
    maker.join()


def test_wait_in_vain(net: Network, links: Links) -> None:
    with pytest.raises(NetworkError, match=r"vif9\.9 did not appear in time"):
        links.wait_for_link("vif9.9", time.monotonic() + 0.05)


def test_the_deadline_is_by_the_given_clock(net: Network, links: Links) -> None:
    ticks: Iterator[float] = iter([0.0, 0.01, 5.0])
    with pytest.raises(NetworkError):
        links.wait_for_link("vif9.9", 0.02, clock=lambda: next(ticks))


def test_wait_for_a_port_that_forwards(net: Network, links: Links) -> None:
    links.create_veth("port0", "port1", 1500)
    with pytest.raises(NetworkError, match="port0 is no port of a bridge"):
        links.wait_forwarding("port0", time.monotonic())
    links.set_master("port0", "br0")
    links.set_up("port0")
    with pytest.raises(NetworkError, match="did not begin to forward"):
        links.wait_forwarding("port0", time.monotonic() + 0.05)

    def give_carrier() -> None:
        setns(net.path("host"))
        with Links() as other:
            other.set_up("port1")

    giver = threading.Thread(target=give_carrier)
    giver.start()
    links.wait_forwarding("port0", time.monotonic() + DEADLINE_S)
    giver.join()


def test_this_hosts_own_addresses(net: Network, links: Links) -> None:
    assert ip_address("10.77.0.9") not in links.addresses()
    run("ip", "addr", "add", "10.77.0.9/24", "dev", "br0")
    run("ip", "addr", "add", "10.77.1.1", "peer", "10.77.1.2", "dev", "br0")
    run("sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/br0/disable_ipv6")
    run("ip", "addr", "add", "2001:db8::9/64", "dev", "br0", "nodad")
    own = links.addresses()
    assert {ip_address(text) for text in ("10.77.0.9", "10.77.1.1", "2001:db8::9")} <= own
    assert ip_address("10.77.1.2") not in own


# --- isolated bridge ---


def test_isolated_bridge_forwards_at_once_and_keeps_to_itself(net: Network, links: Links) -> None:
    """The SVM's bridge: what is on it reaches neither the LAN bridge nor this host's own stack."""
    set_ipv6(enabled=True)
    run("ip", "addr", "add", "10.77.0.9/24", "dev", "br0")  # this host's address on the LAN
    links.create_isolated_bridge("iso0")
    links.create_veth("tun0", "tun1", 1500)
    links.set_up("iso0")
    for port in ("tun0", VIF):
        links.set_master(port, "iso0")
        links.set_up(port)
    links.set_up("tun1")
    assert run("ip", "-o", "addr", "show", "dev", "iso0") == ""
    with open("/proc/sys/net/ipv6/conf/iso0/disable_ipv6") as f:
        assert f.read().strip() == "1"
    tunnel, lan = net.sniffer("host", "tun1"), net.sniffer("client", "c0")
    to_guest = net.sniffer("guest", "eth0")
    sock = net.socket("guest")
    with net.inside("guest"):
        run("ip", "neigh", "del", CLIENT_IP, "dev", "eth0")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    for target in (CLIENT_IP, "10.77.0.9"):  # each asked for by ARP: a broadcast
        sock.sendto(b"x", (target, PORT))
    frames = receive(tunnel, 2)
    assert {frame[12:14] for frame in frames} == {b"\x08\x06"}
    # A frame the other way round, behind any answer that this host might have given.
    tunnel.send(bytes.fromhex("020000000002 020000000001 88b5") + bytes(46))
    assert [frame[12:14] for frame in receive(to_guest, 1)] == [b"\x88\xb5"]
    assert pending(lan) == []


def test_bridge_is_plain(net: Network, links: Links) -> None:
    links.create_isolated_bridge("iso0")
    shown = run("ip", "-d", "link", "show", "iso0")
    for setting in ("NOARP", "forward_delay 0 ", "stp_state 0 ", "mcast_snooping 0 "):
        assert setting in shown
    links.delete_link("iso0")
    assert not links.exists("iso0")


# --- mirror ---


def test_mirror_copies_each_frame_once(net: Network, links: Links, mirror_support: None) -> None:
    links.create_veth("tun0", "tun1", 1500)
    links.set_up("tun0")
    links.set_up("tun1")
    copies = net.sniffer("host", "tun1")
    guest = net.socket("guest")
    guest.bind((GUEST_IP, PORT))
    links.mirror_egress(VIF, "tun0")
    links.mirror_egress(VIF, "tun0")  # replaces, does not add
    client = net.socket("client")
    client.bind((CLIENT_IP, PORT))
    sent = [b"%04d" % i for i in range(100)]
    for datagram in sent:
        client.sendto(datagram, (GUEST_IP, PORT))
    assert receive(guest, 100) == sent
    assert [frame[42:46] for frame in receive(copies, 100)] == sent
    # The guest's own output is not copied.
    guest.sendto(b"out", (CLIENT_IP, PORT))
    client.sendto(b"last", (GUEST_IP, PORT))
    assert receive(guest, 1) == [b"last"]
    assert [frame[42:46] for frame in receive(copies, 1)] == [b"last"]
    links.remove_mirror(VIF)
    client.sendto(b"after", (GUEST_IP, PORT))
    assert receive(guest, 1) == [b"after"]
    assert pending(copies) == []


def test_mirror_does_no_harm_when_its_target_goes(net: Network, links: Links, mirror_support: None) -> None:
    links.create_veth("tun0", "tun1", 1500)
    links.mirror_egress(VIF, "tun0")  # which is down
    guest = net.socket("guest")
    guest.bind((GUEST_IP, PORT))
    client = net.socket("client")
    client.sendto(b"down", (GUEST_IP, PORT))
    links.delete_link("tun0")
    client.sendto(b"gone", (GUEST_IP, PORT))
    assert receive(guest, 2) == [b"down", b"gone"]
    links.remove_mirror(VIF)


def test_mirror_leaves_others_filters(net: Network, links: Links, mirror_support: None) -> None:
    run("tc", "qdisc", "add", "dev", VIF, "clsact")
    u32 = [
        "protocol",
        "ip",
        "prio",
        "5",
        "u32",
        "match",
        "u32",
        "0",
        "0",
        "action",
        "mirred",
        "egress",
        "mirror",
    ]
    run("tc", "filter", "add", "dev", VIF, "ingress", *u32, "dev", "lo")
    before = snapshot(), run("tc", "filter", "show", "dev", VIF, "ingress")
    links.mirror_egress(VIF, "lan0")
    links.remove_mirror(VIF)
    assert (snapshot(), run("tc", "filter", "show", "dev", VIF, "ingress")) == before
    assert run("tc", "filter", "show", "dev", VIF, "egress") == ""


def test_mirror_leaves_nothing(net: Network, links: Links, mirror_support: None) -> None:
    before = snapshot()
    links.mirror_egress(VIF, "lan0")
    assert snapshot() != before
    links.remove_mirror(VIF)
    links.remove_mirror(VIF)
    assert snapshot() == before


# --- what is redirected ---


def test_neighbours_are_answered_past_a_redirection(net: Network, links: Links, mirror_support: None) -> None:
    before = snapshot()
    links.create_veth("tun0", "tun1", 1500)
    links.set_up("tun0")
    links.set_up("tun1")
    held, lan, guest = net.sniffer("host", "tun1"), net.sniffer("client", "c0"), net.sniffer("guest", "eth0")
    mac, address = bytes.fromhex("020000000002"), IPv6Address("fd77::2")
    discovery = [
        announce.gratuitous_arp(mac, IPv4Address(GUEST_IP)),
        announce.neighbour_probe(mac, address),
        announce.neighbour_advertisement(mac, address),
    ]
    ipv6 = discovery[1]
    echo = ipv6[:54] + b"\x80" + ipv6[55:]
    other = bytes.fromhex("020000000001") + mac + b"\x88\xb5".ljust(60, b"\0")
    for wanted in (True, False):
        if wanted:
            ifb.redirect_input(links, VIF, "tun0")
            ifb.redirect_input(links, VIF, "tun0")  # replaces, does not add
        else:
            ifb.stop_redirecting(links, VIF)
        for frame in (*discovery, other, echo):
            guest.send(frame)
        if wanted:
            assert receive(lan, 3) == discovery
            assert receive(held, 2) == [other, echo]
        else:
            assert receive(lan, 5) == [*discovery, other, echo]
            assert pending(held) == []
    links.delete_link("tun0")
    assert snapshot() == before


# --- tunnel ---


@pytest.fixture(params=["plain", "bridge port"])
def tunnel(net: Network, links: Links, request: pytest.FixtureRequest) -> str:
    """Between ``host`` and ``client``, over a replication link with an MTU too small for what goes through.

    In ``client`` the tunnel ends in rt0; in ``host`` in rt0, as it is, or as a port of an isolated bridge with the vif.
    """
    as_port = request.param == "bridge port"
    run("ip", "link", "add", "rep0", "type", "veth", "peer", "name", "rep0", "netns", net.names["client"])
    addresses = {"host": "10.88.0.1", "client": "10.88.0.2"}
    made = {}
    for name, other in (("host", "client"), ("client", "host")):
        with net.inside(name):
            run("ip", "addr", "add", f"{addresses[name]}/24", "dev", "rep0")
            run("ip", "link", "set", "rep0", "mtu", "1500", "up")
            with Links() as there:
                try:
                    there.create_vxlan(
                        "rt0", vni=7, local=addresses[name], remote=addresses[other], port=4790, mtu=1500,
                        bridge_port=as_port and name == "host",
                    )  # fmt: skip
                except HostError as exc:
                    pytest.skip(str(exc))
                there.set_up("rt0")
                made[name] = there.ifindex("rt0")
    if as_port:
        links.create_isolated_bridge("iso0")
        links.set_up("iso0")
        links.set_master("rt0", "iso0")
        links.set_master(VIF, "iso0")
    return str(request.param)


def ethernet(target: str, source: str, size: int) -> bytes:
    """An IPv4 UDP packet that must not be fragmented, ``size`` bytes long."""
    ip = bytes.fromhex("4500") + size.to_bytes(2, "big") + bytes.fromhex("00014000401100000a4d00020a4d0001")
    udp = bytes.fromhex("00070007") + (size - 20).to_bytes(2, "big") + b"\0\0"
    return bytes.fromhex(target + source + "0800") + with_checksums(ip + udp + bytes(size - 28))


def test_tunnel_carries_full_frames_both_ways(net: Network, links: Links, tunnel: str) -> None:
    """1500 bytes with DF, through an outer link of 1500: fragmented outside, no ICMP made up, in order."""
    if tunnel == "plain":
        near, near_in = net.sniffer("host", "rt0"), "host"
    else:
        near, near_in = net.sniffer("guest", "eth0"), "guest"
    far = net.sniffer("client", "rt0")
    for sender, receiver in ((near, far), (far, near)):
        for size in (60, 1500, 576, 1500, 1451):
            sender.send(ethernet("02000000bbbb", "02000000aaaa", size))
        frames = receive(receiver, 5)
        assert [len(frame) - 14 for frame in frames] == [60, 1500, 576, 1500, 1451], near_in
        assert {frame[:12] for frame in frames} == {bytes.fromhex("02000000bbbb02000000aaaa")}
        assert pending(sender) == []


def test_tunnel_is_deleted_with_all_its_parts(net: Network, links: Links) -> None:
    before = snapshot()
    for as_port in (False, True):
        try:
            links.create_vxlan(
                "rt0", vni=7, local="127.0.0.1", remote="127.0.0.2", port=4790, mtu=1500, bridge_port=as_port
            )
        except HostError as exc:
            pytest.skip(str(exc))
        assert "ether" in run("ip", "link", "show", "rt0")
        assert links.mtu("rt0") == 1500
        links.delete_link("rt0")
        links.delete_link("rt0")
        assert snapshot() == before


def test_failed_tunnel_leaves_nothing(net: Network, links: Links) -> None:
    before = snapshot()
    with pytest.raises(NetworkError):
        links.create_vxlan(
            "rt0", vni=7, local="127.0.0.1", remote="127.0.0.2", port=4790, mtu=10, bridge_port=True
        )
    links.create_veth("rt1x", "rt1y", 1500)  # the name of what would carry it is taken by someone
    with pytest.raises(NetworkError):
        links.create_vxlan(
            "rt1", vni=7, local="127.0.0.1", remote="127.0.0.2", port=4790, mtu=1500, bridge_port=True
        )
    assert links.exists("rt1x")
    links.delete_link("rt1x")
    assert snapshot() == before


def test_pair_for_one_host(net: Network, links: Links) -> None:
    before = snapshot()
    links.create_veth("rt0", "rt1", 1600)
    assert (links.mtu("rt0"), links.mtu("rt1")) == (1600, 1600)
    links.delete_link("rt1")
    assert snapshot() == before


def test_without_permission(net: Network) -> None:
    """As an ordinary user: one sentence that says so."""
    program = (
        "import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "from remus_colo.adapters.netlink import Links\n"
        "try: Links().create_isolated_bridge('iso0')\n"
        "except Exception as exc: print(type(exc).__name__, exc)\n"
    )
    preload = "import remus_colo.adapters.netlink, pyroute2.netlink.rtnl.ifinfmsg.plugins\n"
    done = subprocess.run(
        [sys.executable, "-c", preload + program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "HostError cannot create the bridge iso0: no permission; run as root\n"
