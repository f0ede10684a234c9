# SPDX-License-Identifier: LGPL-2.1-or-later
"""The PVM's network through a checkpoint, with real frames: what is held, for how long, and what is left behind.

``svm`` stands for the whole backup: what it sends into the tunnel's other end is the SVM's output.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
from conftest import CLIENT_IP, GUEST_IP, Network, pending, receive, run, snapshot, wait_until

from remus_colo.adapters.backend import Vif
from remus_colo.adapters.netlink import Links
from remus_colo.adapters.nft import QueueRules
from remus_colo.adapters.rawlink import RawLink
from remus_colo.proxy.comparator import CheckpointRequest, CompareConfig
from remus_colo.proxy.primary_path import VifPath
from remus_colo.session.loop import Loop

PORT = 7012
TUNNEL, FAR_END = "rcp0", "far0"


class Bench:
    """A vif under protection, with its first checkpoint taken."""

    def __init__(self, net: Network, links: Links, rules: QueueRules) -> None:
        self.requests: list[CheckpointRequest] = []
        self.loop = Loop()
        run("ip", "link", "add", TUNNEL, "type", "veth", "peer", "name", FAR_END)
        run("ip", "link", "set", FAR_END, "up")
        self.client = net.socket("client")
        self.client.bind((CLIENT_IP, PORT))
        self.guest = net.socket("guest")
        self.guest.bind((GUEST_IP, PORT))
        self.svm = RawLink(FAR_END)
        self.path = VifPath(
            self.loop, links, Vif(7, 0), TUNNEL, CompareConfig(compare_timeout_s=60.0), self.requests.append
        )
        self.path.start(rules)
        self.checkpoint()

    def close(self) -> None:
        self.svm.close()
        self.loop.close()

    def checkpoint(self) -> None:
        self.path.hold_input()
        self.path.cut()
        self.path.release_input()
        self.path.commit()
        self.path.secondary_resumed()

    def pump(self) -> None:
        self.path.output.read()

    def wait_held(self, packets: int) -> None:
        def held() -> bool:
            self.pump()
            return self.path.counters()["held"] == packets

        wait_until(held, f"{packets} packets held")

    def answer(self, text: bytes) -> None:
        self.guest.sendto(text, (CLIENT_IP, PORT))

    def answer_of_svm(self, text: bytes) -> None:
        """The datagram that the guest would send, as a frame in the tunnel."""
        length = 8 + len(text)
        udp = PORT.to_bytes(2, "big") * 2 + length.to_bytes(2, "big") + b"\0\0" + text
        ip = bytes([0x45, 0, *(20 + length).to_bytes(2, "big"), 0, 0, 0, 0, 64, socket.IPPROTO_UDP, 0, 0])
        ip += socket.inet_aton(GUEST_IP) + socket.inet_aton(CLIENT_IP)
        self.svm.send(bytes.fromhex("0200000000010200000000020800") + ip + udp)


@pytest.fixture
def bench(net: Network, links: Links, rules: QueueRules, plug_support: None) -> Iterator[Bench]:
    made = Bench(net, links, rules)
    yield made
    with contextlib.suppress(Exception):
        made.path.close(drop_held=True)
    made.close()


def test_output_leaves_when_the_svm_says_the_same(bench: Bench) -> None:
    bench.answer(b"same")
    bench.wait_held(1)
    assert pending(bench.client) == []
    bench.answer_of_svm(b"same")
    assert receive(bench.client, 1, bench.pump) == [b"same"]
    assert bench.path.counters()["released_equal"] == 1


def test_a_difference_waits_for_its_checkpoint(bench: Bench) -> None:
    bench.answer(b"one")
    bench.answer_of_svm(b"two")
    bench.wait_held(1)
    bench.path.hold_input()
    assert bench.path.cut() == 1
    bench.path.release_input()
    bench.pump()
    assert pending(bench.client) == []
    bench.path.commit()
    assert receive(bench.client, 1, bench.pump) == [b"one"]
    bench.path.secondary_resumed()


def test_input_waits_while_the_guest_is_stopped(bench: Bench) -> None:
    bench.path.hold_input()
    bench.client.sendto(b"question", (GUEST_IP, PORT))
    bench.path.cut()
    assert pending(bench.guest) == []
    bench.path.release_input()
    assert receive(bench.guest, 1, bench.pump) == [b"question"]
    assert bench.svm.recv() is None  # the SVM is not there yet
    bench.path.commit()
    bench.path.secondary_resumed()
    frame = wait_until(bench.svm.recv, "the copy in the tunnel")
    assert frame.payload[28:] == b"question"


@pytest.mark.parametrize("after_cut", [False, True])
def test_a_checkpoint_given_up_leaves_both_as_they_were(bench: Bench, after_cut: bool) -> None:
    bench.answer(b"held")
    bench.wait_held(1)
    bench.path.hold_input()
    bench.client.sendto(b"question", (GUEST_IP, PORT))
    if after_cut:
        bench.path.cut()
    bench.path.abort()
    assert receive(bench.guest, 1, bench.pump) == [b"question"]
    assert wait_until(bench.svm.recv, "the copy in the tunnel").payload[28:] == b"question"
    assert pending(bench.client) == []
    bench.answer_of_svm(b"held")
    assert receive(bench.client, 1, bench.pump) == [b"held"]
    bench.checkpoint()  # the next one finds nothing in its way


def test_unprotected_everything_leaves(bench: Bench) -> None:
    for text in (b"1", b"2", b"3"):
        bench.answer(text)
    bench.wait_held(3)
    bench.path.hold_input()
    bench.path.release_all()
    assert receive(bench.client, 3, bench.pump) == [b"1", b"2", b"3"]
    bench.answer(b"4")
    assert receive(bench.client, 1, bench.pump) == [b"4"]


def test_nothing_is_left(net: Network, links: Links, rules: QueueRules, plug_support: None) -> None:
    before = snapshot()
    made = Bench(net, links, rules)
    made.answer(b"held")
    made.wait_held(1)
    made.path.close(drop_held=False)
    assert receive(made.client, 1) == [b"held"]
    rules.remove()
    made.close()
    assert snapshot() == before
