# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bed's networks, with this test in QEMU's place at the taps' other end."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections.abc import Iterator

import pytest

from remus_colo.testbed import netns
from remus_colo.testbed.commands import run
from remus_colo.testbed.errors import BedError
from remus_colo.testbed.network import CLIENT_ADDRESS, HOSTS, NIC_ROLES, BedNetwork

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/net/tun"), reason="needs root and /dev/net/tun"
)

DEADLINE_S = 20.0
ETHERTYPE = 0x88B5  # IEEE 802: for local experiments
VNET_HEADER = bytes(10)  # struct virtio_net_hdr: no offload
MAC_A, MAC_B = bytes.fromhex("525400aaaa01"), bytes.fromhex("525400bbbb01")
BROADCAST = b"\xff" * 6


@pytest.fixture
def network() -> Iterator[BedNetwork]:
    made = BedNetwork(f"test-{os.getpid()}")
    made.create()
    yield made
    made.remove()
    assert not any((netns.NETNS_DIR / name).exists() for name in made.namespaces)


@pytest.fixture
def taps(network: BedNetwork) -> Iterator[dict[str, dict[str, int]]]:
    with contextlib.ExitStack() as stack:
        found = {}
        for host in ("primary", "backup"):
            found[host] = network.open_taps(host)
            for fd in found[host].values():
                stack.callback(os.close, fd)
        yield found


def frame(target: bytes, source: bytes, body: bytes, ethertype: int = ETHERTYPE) -> bytes:
    return target + source + struct.pack(">H", ethertype) + body.ljust(46, b"\0")


def send(tap: int, data: bytes) -> None:
    with contextlib.suppress(OSError):  # EIO: the port is down, as the test may want it
        os.write(tap, VNET_HEADER + data)


def receive(tap: int, marker: bytes, timeout_s: float = DEADLINE_S) -> bool:
    """Whether a frame with ``marker`` arrives."""
    while select.select([tap], [], [], timeout_s)[0]:
        if marker in os.read(tap, 65536):
            return True
    return False


@pytest.mark.parametrize("role", NIC_ROLES)
def test_each_net_joins_the_hosts_and_no_other_net_hears_it(taps, role):
    send(taps["primary"][role], frame(BROADCAST, MAC_A, b"hello"))
    assert receive(taps["backup"][role], b"hello")
    # A frame that follows on every other net shows that nothing came before it.
    for other in NIC_ROLES:
        if other != role:
            assert not receive(taps["backup"][other], b"hello", 0)


def test_each_host_is_woken_again_and_again(taps):
    question = bytes.fromhex("01005e000001")  # to all hosts that listen to a group (RFC 3376, 4.1.12)
    for host in HOSTS:
        for _ in range(3):
            assert receive(taps[host]["mgmt"], question)
        assert not receive(taps[host]["lan"], question, 0)


def test_the_client_is_on_the_lan(network, taps):
    with netns.entered(network.namespace("client")):
        listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        listener.bind((CLIENT_ADDRESS, 9))
    with contextlib.closing(listener):
        # Who has 10.77.0.100?  Tell 10.77.0.2.  (RFC 826)
        sender, client = socket.inet_aton("10.77.0.2"), socket.inet_aton(CLIENT_ADDRESS)
        question = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + MAC_A + sender + bytes(6) + client
        send(taps["primary"]["lan"], frame(BROADCAST, MAC_A, question, 0x0806))
        assert receive(taps["primary"]["lan"], client + MAC_A + sender)


def test_a_cut_link_loses_packets_until_it_is_restored(network, taps):
    assert network.link_is_up()
    network.set_link(up=False)
    assert not network.link_is_up()
    send(taps["primary"]["repl"], frame(MAC_B, MAC_A, b"lost"))
    network.set_link(up=True)
    assert network.link_is_up()
    send(taps["primary"]["repl"], frame(MAC_B, MAC_A, b"through"))
    assert select.select([taps["backup"]["repl"]], [], [], DEADLINE_S)[0]
    assert b"through" in os.read(taps["backup"]["repl"], 65536)


def test_large_frames_cross_the_replication_link(taps):
    body = bytes(range(256)) * 35
    send(taps["primary"]["repl"], frame(MAC_B, MAC_A, body))
    assert receive(taps["backup"]["repl"], body)


def test_taps_vanish_with_their_owner_and_can_be_made_again(network):
    for _ in range(2):
        for fd in network.open_taps("primary").values():
            os.close(fd)


def test_a_second_host_of_the_same_name_is_refused(network, taps):
    with pytest.raises(BedError, match="cannot make the tap"):
        network.open_taps("primary")


def test_a_host_that_does_not_answer_yet_is_no_unknown_one(network):
    """Or a login while it boots would end at once: no route to host."""
    for host in HOSTS.values():  # as it is after a boot, and after another one
        for fd in network.open_taps(host.host).values():
            os.close(fd)
    with contextlib.ExitStack() as stack:
        for fd in network.open_taps("primary").values():
            stack.callback(os.close, fd)
        with netns.entered(network.namespace("mgmt")):
            shown = run(["ip", "neigh", "show", "dev", "mgmt"], timeout_s=DEADLINE_S).stdout
    assert {line.split()[0] for line in shown.splitlines() if "PERMANENT" in line} == {
        host.mgmt for host in HOSTS.values()
    }


def test_what_exists_is_not_made_again_and_removing_can_be_repeated(network):
    with pytest.raises(BedError, match="exists: run 'clean'"):
        network.create()
    assert network.remove()
    assert network.remove() == []


def test_entering_a_namespace_that_is_gone_is_an_error_and_changes_nothing():
    before = os.readlink("/proc/thread-self/ns/net")
    with pytest.raises(BedError, match="is gone"), netns.entered("no-such-namespace"):
        pass
    assert os.readlink("/proc/thread-self/ns/net") == before


def test_an_exception_inside_leaves_the_namespace(network):
    before = os.readlink("/proc/thread-self/ns/net")
    with pytest.raises(ValueError), netns.entered(network.namespace("lan")):
        assert os.readlink("/proc/thread-self/ns/net") != before
        raise ValueError
    assert os.readlink("/proc/thread-self/ns/net") == before
