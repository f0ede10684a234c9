# SPDX-License-Identifier: LGPL-2.1-or-later
"""The plug, with real frames: a client's packets to the "guest", kept at the vif."""

from __future__ import annotations

import socket
import time

import pytest
from conftest import GUEST_IP, VIF, Network, pending, receive, run, snapshot, wait_until

from remus_colo.adapters.netlink import Links, Plug
from remus_colo.errors import HostError, NetworkError

PORT = 7008
LIMIT_BYTES = 4 << 20


@pytest.fixture
def guest(net: Network) -> socket.socket:
    sock = net.socket("guest")
    sock.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE
    sock.bind((GUEST_IP, PORT))
    return sock


@pytest.fixture
def plug(links: Links, plug_support: None) -> Plug:
    made = Plug(links, VIF, LIMIT_BYTES)
    made.install()
    return made


def send(net: Network, first: int, number: int, size: int = 100) -> list[bytes]:
    """Numbered datagrams from the client; what was sent."""
    sent = [b"%08d" % i + bytes(size - 8) for i in range(first, first + number)]
    sock = net.socket("client")
    sock.setsockopt(
        socket.SOL_SOCKET, 32, 8 << 20
    )  # SO_SNDBUFFORCE: what the plug keeps is still the sender's
    for datagram in sent:
        sock.sendto(datagram, (GUEST_IP, PORT))
    return sent


def test_without_sch_plug_the_error_names_it(net: Network, links: Links) -> None:
    try:
        Plug(links, VIF, LIMIT_BYTES).install()
    except HostError as exc:
        assert "sch_plug" in str(exc)
        assert "modprobe" in str(exc)
    else:
        pytest.skip("this kernel has sch_plug")


def test_passes_once_installed(net: Network, plug: Plug, guest: socket.socket) -> None:
    sent = send(net, 0, 20)
    assert receive(guest, 20) == sent


def test_keeps_and_releases_all_in_order(net: Network, plug: Plug, guest: socket.socket) -> None:
    """Far more frames than a vif's default queue of 32."""
    plug.buffer()
    sent = send(net, 0, 500)
    wait_until(lambda: plug.stats().backlog_packets == 500, "500 frames in the plug")
    assert pending(guest) == []
    assert plug.stats().backlog_bytes == 500 * (100 + 28 + 14)
    plug.release()
    sent += send(net, 500, 50)
    assert receive(guest, 550) == sent
    assert plug.stats().dropped_packets == 0
    assert plug.stats().sent_packets == 550


def test_many_checkpoints(net: Network, plug: Plug, guest: socket.socket) -> None:
    sent = []
    for i in range(20):
        plug.buffer()
        plug.buffer()  # as if a checkpoint had been tried twice
        sent += send(net, i * 10, 5)
        wait_until(lambda: plug.stats().backlog_packets == 5, "5 frames in the plug")
        plug.release()
        sent += send(net, i * 10 + 5, 5)
        assert receive(guest, 10) == sent[-10:]
    plug.release()
    assert plug.stats().dropped_packets == 0


def test_limit_is_in_bytes_and_overflow_is_counted(
    net: Network, links: Links, plug_support: None, guest: socket.socket
) -> None:
    plug = Plug(links, VIF, 10 * (1000 + 28 + 14))
    plug.install()
    plug.buffer()
    sent = send(net, 0, 15, size=1000)
    wait_until(lambda: plug.stats().dropped_packets == 5, "5 drops")
    plug.release()
    assert receive(guest, 10) == sent[:10]


def test_install_takes_over_what_a_crashed_run_left(
    net: Network, links: Links, plug: Plug, guest: socket.socket
) -> None:
    plug.buffer()
    sent = send(net, 0, 3)
    wait_until(lambda: plug.stats().backlog_packets == 3, "3 frames in the plug")
    fresh = Plug(links, VIF, LIMIT_BYTES)
    fresh.install()
    assert receive(guest, 3) == sent


def test_remove_loses_nothing(net: Network, plug: Plug, guest: socket.socket) -> None:
    plug.buffer()
    sent = send(net, 0, 300)
    wait_until(lambda: plug.stats().backlog_packets == 300, "300 frames in the plug")
    plug.remove(time.monotonic() + 10)
    plug.remove()
    assert receive(guest, 300) == sent


def test_drop_loses_all(net: Network, plug: Plug, guest: socket.socket) -> None:
    plug.buffer()
    send(net, 0, 3)
    wait_until(lambda: plug.stats().backlog_packets == 3, "3 frames in the plug")
    plug.drop()
    plug.drop()
    sent = send(net, 3, 1)
    assert receive(guest, 1) == sent


def test_teardown_leaves_nothing(net: Network, links: Links, plug_support: None) -> None:
    before = snapshot()
    plug = Plug(links, VIF, LIMIT_BYTES)
    plug.install()
    assert snapshot() != before
    plug.buffer()
    plug.remove()
    assert snapshot() == before
    links.delete_link(VIF)
    plug.remove()


def test_refuses_to_replace_a_queueing_discipline_that_someone_chose(net: Network, links: Links) -> None:
    run("tc", "qdisc", "add", "dev", VIF, "root", "pfifo", "limit", "7")
    with pytest.raises(NetworkError, match="pfifo, which would be lost"):
        Plug(links, VIF, LIMIT_BYTES).install()
    assert "limit 7p" in run("tc", "qdisc", "show", "dev", VIF)


def test_missing_link(net: Network, links: Links) -> None:
    plug = Plug(links, "vif9.9", LIMIT_BYTES)
    for operation in (plug.install, plug.buffer, plug.release, plug.stats):
        with pytest.raises(NetworkError, match=r"vif9\.9"):
            operation()
    plug.remove()


def test_link_deleted_under_the_plug(net: Network, links: Links, plug: Plug) -> None:
    links.delete_link(VIF)
    with pytest.raises(NetworkError):
        plug.buffer()
    with pytest.raises(NetworkError):
        plug.stats()
    plug.remove()


def test_not_installed(net: Network, links: Links) -> None:
    plug = Plug(links, VIF, LIMIT_BYTES)
    with pytest.raises(NetworkError):
        plug.stats()
    with pytest.raises((NetworkError, HostError)):
        plug.buffer()
    plug.remove()


@pytest.mark.parametrize("limit_bytes", [0, -1, 1 << 32])
def test_impossible_limit(net: Network, links: Links, limit_bytes: int) -> None:
    with pytest.raises(ValueError, match="limit_bytes"):
        Plug(links, VIF, limit_bytes)
