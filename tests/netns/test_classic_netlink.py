# SPDX-License-Identifier: LGPL-2.1-or-later
"""xen.remus.netlink, .qdisc and .device against the kernel, as scripts of Xen 4.4's time used them."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CLIENT_IP, VIF, Network, receive, run, snapshot

import remus_colo.classic.finder
from remus_colo.adapters import ifb
from remus_colo.adapters.netlink import Links
from remus_colo.errors import HostError

assert remus_colo.classic.finder.XenFinder

pytest.importorskip("pyxs", reason="pyxs is not installed (Debian: python3-pyxs)")

from xen.remus import device, netlink, qdisc, util  # noqa: E402
from xen.remus.vif import VIF as ClassicVif  # noqa: E402

REPOSITORY = Path(__file__).parents[2]
OWN = "own0"


@pytest.fixture
def rth(net: Network) -> netlink.rtnl:
    run("ip", "link", "add", OWN, "type", "veth", "peer", "name", "own1")
    run("ip", "link", "set", OWN, "up")
    return netlink.rtnl()


def test_links_are_those_that_ip_shows(rth: netlink.rtnl) -> None:
    shown = {link["ifindex"]: link for link in json.loads(run("ip", "-j", "link"))}
    found = rth.getlinks()
    assert {index: link["name"] for index, link in found.items()} == {
        index: link["ifname"] for index, link in shown.items()
    }
    for index, link in found.items():
        assert link["index"] == index
        assert link["address"].hex(":") == shown[index]["address"]
    index = socket.if_nametoindex(OWN)
    assert rth.getlink(OWN) == rth.getlink(index) == found[index]
    assert rth.getlink("nosuch0") is None
    run("ip", "link", "del", OWN)
    assert rth.getlink(OWN, cached=True) is not None
    assert rth.getlink(OWN) is None


def test_qdiscs_come_with_what_the_kernel_says_of_them(rth: netlink.rtnl) -> None:
    run("tc", "qdisc", "add", "dev", OWN, "root", "handle", "5:", "pfifo_fast")
    run("tc", "qdisc", "add", "dev", "own1", "root", "handle", "6:", "pfifo", "limit", "7")
    found, other = rth.getqdisc(OWN), rth.getqdisc(socket.if_nametoindex("own1"))
    assert found is not None and other is not None
    assert (found["kind"], found["handle"], found["index"]) == (
        "pfifo_fast",
        0x50000,
        socket.if_nametoindex(OWN),
    )
    prio = qdisc.Qdisc(found)
    assert isinstance(prio, qdisc.PrioQdisc)
    assert (prio.handle, prio.bands, len(prio.priomap)) == (5, 3, 16)
    assert prio.optstr().startswith("bands 3 priomap  1 2 2 2")
    plain = qdisc.Qdisc(other)
    assert (type(plain), plain.kind, plain.handle) == (qdisc.Qdisc, "pfifo", 6)
    assert struct.unpack("=I", other["options"]) == (7,)
    assert rth.getqdiscs()[found["index"]] == found
    with pytest.raises(netlink.RTNLException, match="nosuch0"):
        rth.getqdisc("nosuch0")


def test_a_plug_comes_and_goes_by_messages(rth: netlink.rtnl, plug_support: None) -> None:
    index, before = socket.if_nametoindex(OWN), snapshot()
    plug = qdisc.PlugQdisc()
    rth.talk(qdisc.addrequest(index, qdisc.TC_H_ROOT, plug).pack())
    found = rth.getqdisc(OWN)
    assert found is not None and found["kind"] == "plug"
    for action in (qdisc.TC_PLUG_BUFFER, qdisc.TC_PLUG_RELEASE_ONE):
        plug.action = action
        rth.talk(qdisc.changerequest(index, qdisc.TC_H_ROOT, plug).pack())
    rth.talk(qdisc.delrequest(index, qdisc.TC_H_ROOT).pack())
    with pytest.raises(OSError, match="No such"):
        rth.talk(qdisc.delrequest(index, qdisc.TC_H_ROOT).pack())
    assert snapshot() == before


# -- a vif's buffer --------------------------------------------------------------------------------


@pytest.fixture
def vif(plain_vif: ClassicVif, plug_support: None) -> ClassicVif:
    return plain_vif


@pytest.fixture
def plain_vif(links: Links, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClassicVif:
    try:
        ifb.create(links, "probe0")
    except HostError as error:
        pytest.skip(str(error))
    links.delete_link("probe0")
    monkeypatch.setattr(device, "POOL_DIR", str(tmp_path / "pool"))
    monkeypatch.setattr(device, "_rth", None)
    made = ClassicVif(mac="00:16:3e:00:00:01")
    made.dev = VIF
    return made


@pytest.mark.parametrize("there", [False, True])
def test_output_goes_through_an_ifb(plain_vif: ClassicVif, net: Network, links: Links, there: bool) -> None:
    if there:
        run("ip", "link", "add", "ifb0", "type", "ifb")
        for state in ("up", "down"):  # the kernel gives it its first qdisc now
            run("ip", "link", "set", "ifb0", state)
        assert device.IFBBuffer.available()
        assert device.Netbufpool(device.IFBBuffer).getdevs() == ["ifb0"]
    before = snapshot()
    buffer = device.Netbufpool(device.IFBBuffer).get()
    assert buffer.devname == "ifb0"
    client, guest = net.socket("client"), net.socket("guest")
    client.bind((CLIENT_IP, 7010))

    def passes(datagram: bytes) -> None:
        guest.sendto(datagram, (CLIENT_IP, 7010))
        assert receive(client, 1) == [datagram]

    buffer.install(plain_vif)
    passes(b"through")
    assert links.stats("ifb0").rx_packets == 1
    buffer.uninstall()
    passes(b"past")
    assert links.exists("ifb0") is there
    assert not there or links.stats("ifb0").rx_packets == 1
    assert snapshot() == before


def test_what_a_script_finds_in_a_buffered_nic(vif: ClassicVif) -> None:
    said: list[int] = []

    class Telling(device.BufferedNIC):
        def _sendqmsg(self, action: int) -> bool:
            said.append(action)
            return super()._sendqmsg(action)

    nic = Telling(vif)
    assert (nic.vif, nic.installed, nic.handle) == (vif, False, qdisc.TC_H_ROOT)
    assert nic.rth.getlink(nic.bufdevno)["name"] == nic.bufdev.devname
    nic.postsuspend()
    assert nic.installed
    assert nic.rth.getqdisc(nic.bufdevno)["kind"] == "plug"
    nic.preresume()
    nic.commit()
    assert said == [qdisc.TC_PLUG_BUFFER, qdisc.TC_PLUG_RELEASE_ONE]
    assert nic.q.action == qdisc.TC_PLUG_RELEASE_ONE
    nic.uninstall()
    assert not nic.installed


def test_taking_it_down_twice_takes_nothing_from_the_next(vif: ClassicVif, net: Network) -> None:
    first = device.BufferedNIC(vif)
    first.postsuspend()
    first.uninstall()
    second = device.BufferedNIC(vif)
    assert second.bufdev.devname == first.bufdev.devname
    first.uninstall()
    assert list(second.pool.load()) == [second.bufdev.devname]
    second.uninstall()
    assert second.pool.load() == {}


@pytest.mark.parametrize("end", ["pass", "raise SystemError", "del nic"])
def test_a_script_that_forgets_it_does_not_cut_the_guest_off(vif: ClassicVif, end: str) -> None:
    before = snapshot()
    script = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
import remus_colo.classic.finder
from xen.remus import device, vif
device.POOL_DIR = {device.POOL_DIR!r}
nic = device.BufferedNIC(vif.parse({{"mac": "00:16:3e:00:00:01"}}, 7, 0))
nic.postsuspend()
{end}
"""
    subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, timeout=60)
    assert snapshot() == before
    assert device.Netbufpool(device.IFBBuffer).load() == {}


def test_a_module_that_is_not_there() -> None:
    assert not util.modprobe("no_module_of_that_name")
