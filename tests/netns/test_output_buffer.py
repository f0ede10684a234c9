# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's output behind a plug on an ifb device, with real frames: what Remus holds, and lets go."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import CLIENT_IP, GUEST_IP, VIF, Network, pending, receive, snapshot

import remus_colo.classic.finder
from remus_colo.adapters import ifb
from remus_colo.adapters.netlink import Links
from remus_colo.devices.device import CheckpointedDevice
from remus_colo.devices.netbuffer import BufferedVif
from remus_colo.errors import HostError

assert remus_colo.classic.finder.XenFinder

pytest.importorskip("pyxs", reason="pyxs is not installed (Debian: python3-pyxs)")

from xen.remus import device  # noqa: E402
from xen.remus.vif import VIF as ClassicVif  # noqa: E402

PORT = 7009
IFB = "rci123456.0"


@pytest.fixture(autouse=True)
def ifb_support(links: Links, plug_support: None) -> None:
    try:
        ifb.create(links, "probe0")
    except HostError as error:
        pytest.skip(str(error))
    links.delete_link("probe0")


@pytest.fixture
def client(net: Network) -> socket.socket:
    sock = net.socket("client")
    sock.bind((CLIENT_IP, PORT))
    return sock


@pytest.fixture
def say(net: Network) -> Callable[[int], list[bytes]]:
    """The guest sends numbered datagrams."""
    sock = net.socket("guest")
    sock.bind((GUEST_IP, PORT))
    number = 0

    def send(count: int) -> list[bytes]:
        nonlocal number
        sent = [b"%08d" % n for n in range(number, number + count)]
        number += count
        for datagram in sent:
            sock.sendto(datagram, (CLIENT_IP, PORT))
        return sent

    return send


@pytest.fixture(params=["ours", "classic"])
def nic(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[CheckpointedDevice]:
    """The device that ``remus`` uses, and the one for scripts."""
    if request.param == "ours":
        made: CheckpointedDevice = BufferedVif(VIF, IFB)
        made.setup()
    else:
        monkeypatch.setattr(device, "POOL_DIR", str(tmp_path))
        monkeypatch.setattr(device, "selectnetbuf", lambda: device.IFBBuffer)
        vif = ClassicVif(mac="00:16:3e:00:00:01")
        vif.dev = VIF
        made = device.BufferedNIC(vif)
    yield made
    made.teardown()


Say = Callable[[int], list[bytes]]


def test_passes_before_the_first_checkpoint(nic: CheckpointedDevice, client: socket.socket, say: Say) -> None:
    sent = say(10)
    assert receive(client, 10) == sent


def test_what_a_checkpoint_covers_leaves_when_it_is_committed(
    nic: CheckpointedDevice, client: socket.socket, say: Say
) -> None:
    nic.postsuspend()
    first = say(5)
    nic.postsuspend()  # ends the first epoch
    second = say(5)
    assert pending(client) == []
    nic.commit()
    assert receive(client, 5) == first
    assert pending(client) == []
    nic.postsuspend()
    third = say(3)
    nic.commit()
    assert receive(client, 5) == second
    assert pending(client) == []
    nic.teardown()
    assert receive(client, 3) == third  # protection ends, the guest goes on
    sent = say(2)
    assert receive(client, 2) == sent


def test_nothing_is_left_behind(net: Network, client: socket.socket, say: Say) -> None:
    before = snapshot()
    nic = BufferedVif(VIF, IFB)
    nic.setup()
    nic.postsuspend()
    say(3)
    nic.teardown()
    nic.teardown()
    assert len(receive(client, 3)) == 3
    assert snapshot() == before


def test_what_was_held_is_dropped_if_the_guest_goes_on_elsewhere(
    net: Network, links: Links, client: socket.socket, say: Say
) -> None:
    nic = BufferedVif(VIF, IFB)
    nic.setup()
    nic.postsuspend()
    say(3)
    nic.teardown(drop_held=True)
    assert not links.exists(IFB)
    assert pending(client) == []


def test_a_vif_that_is_gone(net: Network, links: Links) -> None:
    nic = BufferedVif(VIF, IFB)
    nic.setup()
    nic.postsuspend()
    links.delete_link(VIF)
    nic.teardown()
    assert not links.exists(IFB)


def test_a_setup_that_fails_leaves_nothing(links: Links) -> None:
    before = snapshot()
    nic = BufferedVif("nosuch0", IFB)
    with pytest.raises(Exception, match="nosuch0"):
        nic.setup()
    assert snapshot() == before
