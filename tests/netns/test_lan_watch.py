# SPDX-License-Identifier: LGPL-2.1-or-later
"""A primary in doubt asks the LAN whether the guest is there, too.  What the guest says here is no answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address
from unittest import mock

import pytest
from conftest import CLIENT_IP, DEADLINE_S, GUEST_IP, VIF, Network, pending, run, wait_until

from remus_colo.adapters.backend import Vif
from remus_colo.adapters.netlink import Links
from remus_colo.adapters.rawlink import RawLink
from remus_colo.proxy import announce
from remus_colo.session.addresses import AddressWatch, Known
from remus_colo.session.lan import mac_bytes
from remus_colo.session.lan_watch import LanWatch
from remus_colo.session.loop import Loop

GUEST_MAC = "02:00:00:00:00:02"
CLIENT_MAC = bytes.fromhex("020000000001")
OTHER_IP, THIRD_IP = GUEST_IP.rpartition(".")[0] + ".77", GUEST_IP.rpartition(".")[0] + ".78"
WINDOW_S = 0.4
KNOWN = {0: Known((GUEST_IP,), (CLIENT_IP,))}


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def watch(net: Network, links: Links, loop: Loop) -> Iterator[LanWatch]:
    made = LanWatch(loop, links, [Vif(7, 0)], mock.Mock(read=lambda path: GUEST_MAC))
    with mock.patch(
        "remus_colo.session.lan_watch.uplinks", lambda bridge: ["lan0"]
    ):  # sysfs shows the machine's links
        made.start()
    yield made
    made.close()


def appear(net: Network, *, arp: bool = True) -> None:
    """The guest's copy, on another host of the LAN: it announces nothing."""
    with net.inside("client"):
        run(
            "ip",
            "link",
            "add",
            "copy0",
            "link",
            "c0",
            "address",
            GUEST_MAC,
            "type",
            "macvlan",
            "mode",
            "bridge",
        )
        run("ip", "addr", "add", f"{GUEST_IP}/32", "dev", "copy0")
        for ifname, wanted in (("copy0", "1" if arp else "8"), ("c0", "1")):
            with open(f"/proc/sys/net/ipv4/conf/{ifname}/arp_ignore", "w") as file:
                file.write(wanted)
        run("ip", "link", "set", "copy0", "up")


def test_the_guest_is_nowhere_else(watch: LanWatch) -> None:
    assert watch.secondary_active(WINDOW_S, KNOWN) is False


def test_the_guest_is_elsewhere_and_was_not_heard_to_say_so(net: Network, watch: LanWatch) -> None:
    appear(net)
    assert watch.secondary_active(WINDOW_S, KNOWN) is True


def test_an_announcement_is_enough(net: Network, watch: LanWatch) -> None:
    appear(net, arp=False)
    with net.inside("client"), RawLink("copy0") as raw:
        for frame in announce.announcements(mac_bytes(GUEST_MAC), [IPv4Address(GUEST_IP)]):
            raw.send(frame)
    wait_until(watch.conflict, "the announcement")
    assert watch.secondary_active(WINDOW_S, {}) is True


def test_frames_that_were_found_to_come_round_tell_nothing(net: Network, watch: LanWatch) -> None:
    """Nor do more of them, for a while: to look for the guest there would find those, too."""
    sender = net.sniffer("client", "c0")

    def comes_round() -> None:
        sender.send(announce.gratuitous_arp(mac_bytes(GUEST_MAC), IPv4Address(GUEST_IP)))

    comes_round()
    wait_until(watch.conflict, "the frame")
    watch.no_conflict()
    assert watch.secondary_active(WINDOW_S, KNOWN) is None
    deaf_until_s = watch._deaf_until_s
    comes_round()
    wait_until(lambda: not watch.conflict() and watch._deaf_until_s > deaf_until_s, "the next frame")
    watch._deaf_until_s = 0.0  # that was long ago
    assert watch.secondary_active(WINDOW_S, KNOWN) is False
    comes_round()
    wait_until(watch.conflict, "another host's")


def test_a_lan_that_does_not_work_says_nothing(net: Network, watch: LanWatch) -> None:
    with net.inside("client"):
        run("ip", "link", "set", "c0", "down")
    assert watch.secondary_active(WINDOW_S, KNOWN) is None


def test_addresses_are_learnt_from_what_is_said(net: Network, watch: LanWatch, loop: Loop) -> None:
    guest, client = net.socket("guest"), net.socket("client")
    guest.bind((GUEST_IP, 7013))
    client.bind((CLIENT_IP, 7013))
    guest.sendto(b"here I am", (CLIENT_IP, 7013))
    wait_until(lambda: pending(client), "the datagram")
    loop.call_later(0.2, loop.stop)
    loop.run()
    assert watch.known()[0].addresses == (GUEST_IP,)


def test_neighbours_are_those_that_ask_for_others(net: Network, watch: LanWatch, loop: Loop) -> None:
    """Newest first; the guest's own questions do not come from there."""
    frames = [
        announce.arp_request(CLIENT_MAC, IPv4Address(address), IPv4Address(GUEST_IP))
        for address in (OTHER_IP, CLIENT_IP)
    ]
    frames.append(announce.neighbour_advertisement(CLIENT_MAC, IPv6Address("fe80::1")))
    frames.append(announce.arp_probe(CLIENT_MAC, IPv4Address(THIRD_IP)))
    frames.append(announce.gratuitous_arp(mac_bytes(GUEST_MAC), IPv4Address(GUEST_IP)))
    sender = net.sniffer("client", "c0")
    for frame in frames:
        sender.send(frame)
    run_until(loop, lambda: len(watch.known()[0].neighbours) == 3)
    assert watch.known()[0].neighbours == ("fe80::1", CLIENT_IP, OTHER_IP)


def run_until(loop: Loop, done: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S

    def look() -> None:
        if done() or time.monotonic() > deadline_s:
            loop.stop()
        else:
            loop.call_later(0.01, look)

    look()
    loop.run()
    assert done()


def test_addresses_are_learnt_anew_look_by_look(net: Network, links: Links, loop: Loop) -> None:
    """From few packets a look, and from a link that was made anew, too."""
    with mock.patch.multiple("remus_colo.session.addresses", LOOK_INTERVAL_S=0.05, LOOK_FRAMES=1):
        watch = AddressWatch(loop, Vif(7, 0), mac_bytes(GUEST_MAC), [])
        guest = net.socket("guest")

        def knows(address: str) -> bool:
            guest.sendto(b"here I am", (CLIENT_IP, 7013))
            return address in watch.known().addresses

        run_until(loop, lambda: knows(GUEST_IP))
        with net.inside("guest"):
            run("ip", "addr", "flush", "dev", "eth0")
            run("ip", "addr", "add", f"{OTHER_IP}/24", "dev", "eth0")
        net.neighbour("guest", "eth0", CLIENT_IP, "02:00:00:00:00:01")
        run_until(loop, lambda: knows(OTHER_IP))
        links.delete_link(VIF)
        net.add_port(VIF, "guest", "eth0", THIRD_IP, GUEST_MAC)
        net.neighbour("guest", "eth0", CLIENT_IP, "02:00:00:00:00:01")
        run_until(loop, lambda: knows(THIRD_IP))
        watch.close()
