# SPDX-License-Identifier: LGPL-2.1-or-later
"""A backup asks the LANs of a guest with two vifs whether it still answers there."""

from __future__ import annotations

import threading
from ipaddress import IPv4Address, IPv6Address
from typing import Any
from unittest import mock

import pytest
from conftest import CLIENT_IP, DEADLINE_S, GUEST_IP, VIF, Network, run

from remus_colo.adapters.netlink import Links
from remus_colo.errors import NetworkError
from remus_colo.failover.arbiter import Verdict
from remus_colo.session import lan
from remus_colo.session.lan import LanSide, mac_bytes, probe_guest

WINDOW_S = 0.4
NEVER_S = 3600.0
OTHER_GUEST_IP, OTHER_CLIENT_IP = "198.51.100.2", "198.51.100.1"


@pytest.fixture
def sides(net: Network, links: Links) -> list[LanSide]:
    """Of the second LAN, where nobody has the guest's address, and of the first, where the guest is."""
    net.add_namespace("other")
    run("ip", "link", "add", "br1", "type", "bridge", "forward_delay", "0", "mcast_snooping", "0")
    run("ip", "link", "set", "br1", "up")
    net.add_port("lan1", "other", "o0", OTHER_CLIENT_IP, "02:00:00:00:01:01", bridge="br1")
    return [
        LanSide(
            [bridge],
            mac_bytes(links.mac(bridge)),
            mac_bytes(mac),
            [IPv4Address(guest)],
            [IPv4Address(client)],
        )
        for bridge, mac, guest, client in (
            ("br1", "02:00:00:00:01:02", OTHER_GUEST_IP, OTHER_CLIENT_IP),
            ("br0", "02:00:00:00:00:02", GUEST_IP, CLIENT_IP),
        )
    ]


def test_an_answer_on_one_lan_does_not_wait_for_the_others(sides: list[LanSide]) -> None:
    verdicts: list[Verdict] = []
    asking = threading.Thread(target=lambda: verdicts.append(probe_guest(sides, NEVER_S)), daemon=True)
    asking.start()
    asking.join(DEADLINE_S)
    assert verdicts == [Verdict.ALIVE]


def test_silence_everywhere(sides: list[LanSide], links: Links) -> None:
    links.delete_link(VIF)
    assert probe_guest(sides, WINDOW_S) is Verdict.DEAD


def test_one_lan_that_does_not_work_leaves_it_open(net: Network, sides: list[LanSide], links: Links) -> None:
    links.delete_link(VIF)
    with net.inside("other"):
        run("ip", "link", "set", "o0", "down")
    assert probe_guest(sides, WINDOW_S) is Verdict.UNKNOWN


def speak_ipv6(net: Network, name: str, ifname: str, *addresses: str) -> None:
    with net.inside(name):
        for setting in ("accept_dad", "disable_ipv6"):
            run("sh", "-c", f"echo 0 > /proc/sys/net/ipv6/conf/{ifname}/{setting}")
        for address in addresses:
            run("ip", "addr", "add", f"{address}/64", "dev", ifname, "nodad")


def side(links: Links, guest: list[str], clients: list[str]) -> LanSide:
    return LanSide(
        ["br0"],
        mac_bytes(links.mac("br0")),
        mac_bytes("02:00:00:00:00:02"),
        [IPv6Address(address) for address in guest],
        [IPv6Address(address) for address in clients],
    )


def test_a_guest_without_ipv4(net: Network, links: Links) -> None:
    speak_ipv6(net, "guest", "eth0", "2001:db8::2")
    speak_ipv6(net, "client", "c0", "2001:db8::1")
    asked = [side(links, ["2001:db8::2"], ["2001:db8::1"])]
    assert probe_guest(asked, NEVER_S) is Verdict.ALIVE
    links.delete_link(VIF)
    assert probe_guest(asked, WINDOW_S) is Verdict.DEAD
    with net.inside("client"):
        run("ip", "link", "set", "c0", "down")
    assert probe_guest(asked, WINDOW_S) is Verdict.UNKNOWN


def test_a_guest_that_has_not_been_heard_yet(net: Network, links: Links) -> None:
    """Most have an address that their MAC tells."""
    speak_ipv6(net, "guest", "eth0")
    assert probe_guest([side(links, [], [])], NEVER_S) is Verdict.ALIVE
    links.delete_link(VIF)
    assert probe_guest([side(links, [], [])], WINDOW_S) is Verdict.DEAD


def test_nowhere_to_ask() -> None:
    assert probe_guest([], WINDOW_S) is Verdict.UNKNOWN


@pytest.mark.parametrize(("ways", "verdict"), [(["lan0"], Verdict.UNKNOWN), (["br0"], Verdict.DEAD)])
def test_a_guest_of_this_host_proves_nothing_of_the_lan(
    net: Network, links: Links, ways: list[str], verdict: Verdict
) -> None:
    """It hears, and answers, however cut off this host is: only what comes in by an uplink tells of others."""
    links.delete_link(VIF)
    net.add_namespace("local")
    net.add_port("vif9.0", "local", "l0", "10.77.0.9", "02:00:00:00:00:09")
    with net.inside("client"):
        run("ip", "link", "set", "c0", "down")
    own_mac, guest_mac = mac_bytes(links.mac("br0")), mac_bytes("02:00:00:00:00:02")
    clients = [IPv4Address(CLIENT_IP), IPv4Address("10.77.0.9")]
    side = LanSide(ways, own_mac, guest_mac, [IPv4Address(GUEST_IP)], clients)
    assert probe_guest([side], WINDOW_S) is verdict


def test_clients_beyond_a_router(links: Links) -> None:
    """They answer no one who asks the LAN for them; the router, a neighbour of this host, does."""
    links.delete_link(VIF)
    beyond = [IPv4Address("192.0.2.1")]
    own_mac, guest_mac = mac_bytes(links.mac("br0")), mac_bytes("02:00:00:00:00:02")
    asked = [["lan0"], own_mac, guest_mac, [IPv4Address(GUEST_IP)], beyond]
    assert probe_guest([LanSide(*asked)], WINDOW_S) is Verdict.UNKNOWN
    assert probe_guest([LanSide(*asked, [IPv4Address(CLIENT_IP)])], WINDOW_S) is Verdict.DEAD


def test_a_way_that_goes_while_it_is_looked_at(
    net: Network, links: Links, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other tells; without another nobody does."""
    net.add_namespace("local")
    net.add_port("veth9", "local", "l0", "10.77.0.9", "02:00:00:00:00:09")
    select = lan.select.select

    def goes(*args: Any) -> Any:
        if links.exists("veth9"):
            links.delete_link("veth9")
        return select(*args)

    monkeypatch.setattr(lan, "select", mock.Mock(select=goes))
    own_mac, guest_mac = mac_bytes(links.mac("br0")), mac_bytes("02:00:00:00:00:02")
    about = (own_mac, guest_mac, [IPv4Address(OTHER_GUEST_IP)], [IPv4Address(CLIENT_IP)])
    assert probe_guest([LanSide(["veth9", "lan0"], *about)], WINDOW_S) is Verdict.DEAD
    net.add_port("veth9", "local", "l0", "10.77.0.9", "02:00:00:00:00:09")
    with pytest.raises(NetworkError, match="veth9"):
        probe_guest([LanSide(["veth9"], *about)], WINDOW_S)
