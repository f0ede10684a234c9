# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a ``remus`` that was killed leaves in the network, and what is left of that afterwards."""

from __future__ import annotations

import socket

import pytest
from conftest import CLIENT_IP, GUEST_IP, VIF, Network, pending, receive, snapshot

from remus_colo.adapters import ifb
from remus_colo.adapters.backend import Vif
from remus_colo.adapters.netlink import Links, Plug
from remus_colo.adapters.nft import QueueRules
from remus_colo.devices.netbuffer import buffer_ifname
from remus_colo.errors import HostError
from remus_colo.proxy.primary_path import primary_ifname, rules_owner
from remus_colo.session.recovery import clean_network

PORT = 7011
TAG = "abcdef"
OTHER = "abcde0"
GUEST = Vif(*(int(number) for number in VIF.removeprefix("vif").split(".")))
LIMIT_BYTES = 1 << 20
MARK = " 20000"  # of the queue, as iptables and nft both write it


def clean(links: Links) -> None:
    clean_network(links, GUEST.domid, [GUEST], [TAG])


def test_of_colo(links: Links, rules: QueueRules) -> None:
    """A tunnel, a mirror into it, rules that hold the guest's output; another protection's tunnel stays."""
    links.create_veth(primary_ifname(OTHER, 0), "far1", 1500)
    before = snapshot()
    tunnel = primary_ifname(TAG, 0)
    links.create_veth(tunnel, "far0", 1500)
    links.mirror_egress(VIF, tunnel)
    QueueRules(rules_owner(GUEST.domid)).hold_from_guest(VIF, 20000)
    assert MARK in snapshot()[0]
    for _ in range(2):
        clean(links)
        rules_left, *others = snapshot()
        assert MARK not in rules_left  # iptables leaves its tables, empty
        assert others == list(before[1:])
    links.delete_link(primary_ifname(OTHER, 0))


def test_input_that_was_held_goes_to_the_guest(net: Network, links: Links, plug_support: None) -> None:
    guest = net.socket("guest")
    guest.bind((GUEST_IP, PORT))
    before = snapshot()
    plug = Plug(links, VIF, LIMIT_BYTES)
    plug.install()
    plug.buffer()
    net.socket("client").sendto(b"held", (GUEST_IP, PORT))
    assert pending(guest) == []
    clean(links)
    assert snapshot() == before
    assert receive(guest, 1) == [b"held"]


def test_of_remus(net: Network, links: Links, plug_support: None) -> None:
    """Output that was held is dropped, and what the guest says then is heard."""
    try:
        ifb.create(links, buffer_ifname(TAG, 0))
    except HostError as error:
        pytest.skip(str(error))
    links.delete_link(buffer_ifname(TAG, 0))
    client = net.socket("client")
    client.bind(("", PORT))
    address = (CLIENT_IP, PORT)
    before = snapshot()
    ifb.create(links, buffer_ifname(TAG, 0))
    plug = Plug(links, buffer_ifname(TAG, 0), LIMIT_BYTES)
    plug.install()
    ifb.redirect_input(links, VIF, buffer_ifname(TAG, 0))
    plug.buffer()
    guest: socket.socket = net.socket("guest")
    guest.sendto(b"held", address)
    assert pending(client) == []
    clean(links)
    assert snapshot() == before
    guest.sendto(b"afterwards", address)
    assert receive(client, 1) == [b"afterwards"]
