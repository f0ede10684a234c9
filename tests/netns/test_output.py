# SPDX-License-Identifier: LGPL-2.1-or-later
"""The PVM's output, held and compared, with real frames and both forms of the path; no plugs, so any kernel does.

The SVM's output is what the test puts into the far end of the tunnel's stand-in, or a copy, made by the
guest's kernel, of all that the guest sends.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest
from conftest import (
    CLIENT_IP,
    DEADLINE_S,
    GUEST_IP,
    VIF,
    Network,
    no_offload,
    pending,
    receive,
    run,
    wait_until,
    with_checksums,
)  # fmt: skip
from test_queue_traffic import add_ipv6, set_mtu, tcp_transfer

from remus_colo.adapters.netlink import Links
from remus_colo.adapters.nft import QueueRules
from remus_colo.adapters.packetqueue import Form
from remus_colo.adapters.rawlink import RawLink
from remus_colo.errors import HostError
from remus_colo.proxy.comparator import CheckpointRequest, CompareConfig, Reason
from remus_colo.proxy.output import DEFAULT_SIZE, Output
from remus_colo.proxy.pump import QueueSize
from remus_colo.session.loop import Loop

pytestmark = pytest.mark.usefixtures("queue_form")

PORT = 7014
QUEUE = 41
TUNNEL, FAR_END = "rcp0", "far0"
CLIENT_MAC, GUEST_MAC = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
LATE_S = 60.0  # later than any test ends


class Bench:
    def __init__(
        self, net: Network, rules: QueueRules, size: QueueSize = DEFAULT_SIZE, timeout_s: float = LATE_S
    ) -> None:
        self.requests: list[CheckpointRequest] = []
        self.loop = Loop()
        self.client, self.guest = net.socket("client"), net.socket("guest")
        self.client.bind((CLIENT_IP, PORT))
        self.guest.bind((GUEST_IP, PORT))
        config = CompareConfig(compare_timeout_s=timeout_s, held_packets=100000, held_bytes=1 << 30)
        self.output = Output(self.loop, VIF, TUNNEL, config, self.requests.append)
        self.output.start(QUEUE, rules, size)

    def checkpoint(self) -> None:
        self.output.cut()
        self.output.commit()
        self.output.secondary_resumed()

    def run_until(self, condition: Callable[[], object], what: str) -> None:
        """Let the loop run: its readers and timers."""

        def look() -> None:
            if condition():
                self.loop.stop()
            else:
                self.loop.call_later(0.002, look)

        def give_up() -> None:
            raise AssertionError(f"in vain: {what}")

        guard = self.loop.call_later(DEADLINE_S, give_up)
        self.loop.call_later(0.0, look)
        self.loop.run()
        guard.cancel()

    def arrive(self, number: int) -> list[bytes]:
        got: list[bytes] = []

        def enough() -> bool:
            got.extend(pending(self.client))
            return len(got) >= number

        self.run_until(enough, f"{number} datagrams, now {got}")
        return got

    def held(self, number: int) -> None:
        self.run_until(lambda: self.output.counters()["held"] == number, f"{number} held")

    def say(self, *texts: bytes) -> None:
        for text in texts:
            self.guest.sendto(text, (CLIENT_IP, PORT))

    def close(self) -> None:
        self.output.close(drop_held=True)
        self.loop.close()


def frame(text: bytes, source_port: int = PORT, tag: bytes = b"") -> bytes:
    """A datagram of the guest, as the SVM sends it."""
    udp = struct.pack("!HHHH", source_port, PORT, 8 + len(text), 0) + text
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 77, 0, 64, socket.IPPROTO_UDP, 0)
    packet = with_checksums(ip + socket.inet_aton(GUEST_IP) + socket.inet_aton(CLIENT_IP) + udp)
    return CLIENT_MAC + GUEST_MAC + tag + b"\x08\x00" + packet


@pytest.fixture
def svm(net: Network) -> Iterator[RawLink]:
    """The far end of the tunnel."""
    run("ip", "link", "add", TUNNEL, "type", "veth", "peer", "name", FAR_END)
    for ifname in (TUNNEL, FAR_END):
        run("ip", "link", "set", ifname, "up")
    with RawLink(FAR_END) as made:
        yield made


@pytest.fixture
def bench(net: Network, rules: QueueRules, svm: RawLink) -> Iterator[Bench]:
    made = Bench(net, rules)
    made.checkpoint()
    yield made
    made.close()


def test_unprotected_all_leaves_at_once(net: Network, rules: QueueRules, svm: RawLink) -> None:
    bench = Bench(net, rules)
    bench.say(b"1", b"2")
    assert bench.arrive(2) == [b"1", b"2"]
    bench.close()


def test_what_both_say_leaves(bench: Bench, svm: RawLink) -> None:
    bench.say(b"PVM first")
    bench.held(1)
    assert pending(bench.client) == []
    svm.send(frame(b"PVM first"))
    assert bench.arrive(1) == [b"PVM first"]
    svm.send(frame(b"SVM first"))
    bench.run_until(lambda: bench.output.counters()["secondary_seen"] == 2, "the SVM's packet")
    bench.say(b"SVM first")
    assert bench.arrive(1) == [b"SVM first"]
    counters = bench.output.counters()
    assert (counters["released_equal"], counters["held"], counters["queue_lost"]) == (2, 0, 0)
    assert bench.requests == []


def test_flows_leave_independently(bench: Bench, net: Network, svm: RawLink) -> None:
    """Verdicts in another order than that of arrival, in one lot and in several."""
    guests = [net.socket("guest") for _ in range(8)]
    for number, guest in enumerate(guests):
        guest.bind((GUEST_IP, 9000 + number))
        guest.sendto(b"%d" % number, (CLIENT_IP, PORT))
    bench.held(8)
    order = [5, 0, 7, 1, 6, 2, 4, 3]
    for number in order:
        svm.send(frame(b"%d" % number, 9000 + number))
    assert bench.arrive(8) == [b"%d" % number for number in order]


def test_since_when_the_oldest_packet_waits(bench: Bench, svm: RawLink) -> None:
    """By the clock that heartbeats go by."""
    assert bench.output.waiting_since_s is None
    before_s = time.monotonic()
    bench.say(b"first")
    bench.held(1)
    first_s = bench.output.waiting_since_s
    assert first_s is not None
    assert before_s < first_s < time.monotonic()
    bench.say(b"second")
    bench.held(2)
    assert bench.output.waiting_since_s == first_s
    svm.send(frame(b"first"))
    bench.held(1)
    second_s = bench.output.waiting_since_s
    assert second_s is not None
    assert first_s < second_s < time.monotonic()
    svm.send(frame(b"second"))
    bench.held(0)
    assert bench.output.waiting_since_s is None


def test_a_timer_asks_for_what_the_svm_never_says(net: Network, rules: QueueRules, svm: RawLink) -> None:
    bench = Bench(net, rules, timeout_s=0.05)
    bench.checkpoint()
    bench.say(b"alone")
    bench.run_until(lambda: bench.requests, "a request")
    assert [request.reason for request in bench.requests] == [Reason.UDP_TIMEOUT]
    assert pending(bench.client) == []
    bench.output.cut()
    bench.output.commit()
    assert bench.arrive(1) == [b"alone"]
    bench.close()


def test_an_epoch_leaves_when_it_is_committed(bench: Bench, svm: RawLink) -> None:
    sent = [b"%d" % number for number in range(200)]
    bench.say(*sent)  # not read yet: the cut sees to that
    assert bench.output.cut() == 200
    bench.say(b"of the next epoch")
    bench.held(201)
    svm.send(frame(b"of the next epoch"))  # from before the SVM is a copy again: does not count
    bench.output.commit()
    assert bench.arrive(200) == sent
    bench.output.secondary_resumed()
    bench.held(1)
    assert pending(bench.client) == []
    svm.send(frame(b"of the next epoch"))
    assert bench.arrive(1) == [b"of the next epoch"]


def test_an_svm_that_speaks_before_the_message_comes_that_it_runs(bench: Bench, svm: RawLink) -> None:
    bench.output.cut()
    bench.say(b"of the next epoch")
    bench.held(1)
    bench.output.commit()
    svm.send(frame(b"of the next epoch"))
    bench.say(b"and another")
    bench.held(2)
    bench.output.secondary_resumed()
    assert bench.arrive(1) == [b"of the next epoch"]
    svm.send(frame(b"and another"))
    assert bench.arrive(1) == [b"and another"]


def test_a_checkpoint_that_is_given_up(bench: Bench, svm: RawLink) -> None:
    bench.output.abort()  # without a cut, too
    bench.say(b"held")
    bench.held(1)
    bench.output.cut()
    bench.output.abort()
    svm.send(frame(b"held"))
    assert bench.arrive(1) == [b"held"]


def test_protection_ends(bench: Bench) -> None:
    bench.say(b"1", b"2")
    bench.held(2)
    bench.say(b"3")  # not read yet
    bench.output.release_all()
    assert bench.arrive(3) == [b"1", b"2", b"3"]
    bench.say(b"4")
    assert bench.arrive(1) == [b"4"]


def test_closing_lets_go(bench: Bench) -> None:
    bench.say(b"held")
    bench.held(1)
    bench.output.close(drop_held=False)
    assert receive(bench.client, 1) == [b"held"]
    bench.output.close(drop_held=False)


def test_nothing_is_lost_between_the_last_look_and_the_end(bench: Bench, rules: QueueRules) -> None:
    bench.say(b"held")
    bench.held(1)
    bench.say(b"not read yet")
    rules.let_pass()
    bench.say(b"passes")
    assert receive(bench.client, 1) == [b"passes"]
    bench.output.close(drop_held=False)
    rules.remove()
    assert receive(bench.client, 2) == [b"held", b"not read yet"]


def test_the_tunnel_goes(bench: Bench, links: Links, svm: RawLink) -> None:
    bench.say(b"before")
    bench.held(1)
    links.delete_link(TUNNEL)
    bench.say(b"after")
    bench.held(2)
    bench.output.cut()
    bench.output.commit()
    assert bench.arrive(2) == [b"before", b"after"]
    bench.output.secondary_resumed()


def test_a_full_queue_is_counted_and_asks_for_a_checkpoint(
    net: Network, rules: QueueRules, svm: RawLink
) -> None:
    bench = Bench(net, rules, QueueSize(packets=5))
    bench.checkpoint()
    bench.say(*[b"%d" % number for number in range(8)])
    bench.held(5)
    bench.output.check_losses()
    (request,) = bench.requests
    assert request.reason is Reason.QUEUE_DROPPED
    assert request.detail.startswith(f"3 packets of {VIF}")
    assert bench.output.counters()["queue_lost"] == 3
    bench.output.check_losses()
    assert len(bench.requests) == 1
    bench.close()


def test_a_full_socket_is_counted_and_asks_for_a_checkpoint(
    net: Network, rules: QueueRules, svm: RawLink, queue_form: Form
) -> None:
    bench = Bench(net, rules, QueueSize(packets=1000, socket_bytes=8192))
    bench.checkpoint()
    bench.say(*[bytes(1000)] * 100)
    bench.run_until(lambda: bench.output.counters()["held"], "held packets")
    if queue_form is Form.NATIVE:  # it shows in the ids, with the next packet that comes through
        bench.say(b"next")
        bench.run_until(lambda: bench.requests, "a request")
    bench.output.check_losses()
    counters = bench.output.counters()
    assert [request.reason for request in bench.requests] == [Reason.QUEUE_DROPPED]
    assert counters["queue_lost"] > 0
    assert counters["held"] + counters["queue_lost"] == 100 + (queue_form is Form.NATIVE)
    bench.close()


def test_what_is_lost_of_the_svm_is_counted(bench: Bench, svm: RawLink) -> None:
    for _ in range(20000):
        svm.send(frame(bytes(1000)))
    counters = bench.output.counters()
    assert counters["secondary_lost"] > 0
    bench.run_until(
        lambda: sum(bench.output.counters()[name] for name in ("secondary_seen", "secondary_lost")) == 20000,
        "the rest",
    )


def test_the_same_on_another_vlan(
    bench: Bench, rules: QueueRules, net: Network, svm: RawLink, queue_form: Form
) -> None:
    """It is not the same, where the kernel tells a packet's VLAN; elsewhere that must not keep packets from leaving."""
    guest = net.socket("guest", socket.SOCK_RAW, socket.AF_PACKET)
    with net.inside("guest"):
        guest.bind(("eth0", 0))
    guest.send(frame(b"on 5", tag=b"\x81\x00\x00\x05"))
    bench.held(1)
    if rules.backend == "nft" and queue_form is Form.NATIVE:
        svm.send(frame(b"on 5"))
        svm.send(frame(b"on 5", tag=b"\x81\x00\x00\x06"))
        bench.run_until(lambda: bench.output.counters()["secondary_seen"] == 2, "the SVM's packets")
        assert bench.output.counters()["held"] == 1
    svm.send(frame(b"on 5", tag=b"\x81\x00\x60\x05"))
    bench.held(0)
    assert bench.output.counters()["released_equal"] == 1


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("mtu", [1500, 9000])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def test_bulk_leaves_as_the_copy_comes(
    net: Network, rules: QueueRules, family: int, mtu: int, split: bool
) -> None:
    """Superpackets of 64 kB, their copies as such or as segments with checksums: no checkpoint is needed."""
    set_mtu(net, mtu)
    with net.inside("guest"):
        far_end = ["peer", "name", TUNNEL, "mtu", str(mtu), "netns", net.names["host"]]
        run("ip", "link", "add", "copy", "mtu", str(mtu), "type", "veth", *far_end)
        run("ip", "link", "set", "copy", "up")
        if split:
            no_offload("copy")
        with Links() as links:
            links.silence("copy")
            try:
                links.mirror_egress("eth0", "copy")
            except HostError as exc:
                pytest.skip(str(exc))
    run("ip", "link", "set", TUNNEL, "up")
    if family == socket.AF_INET6:
        add_ipv6(net)
    bench = Bench(net, rules)
    bench.checkpoint()
    text = b"".join(b"Line %06d of what the guest has to say\n" % number for number in range(20000))
    assert tcp_transfer(net, family, text, bench.output.read) == text
    wait_until(lambda: bench.output.read() or bench.output.counters()["held"] == 0, "the rest")
    counters = bench.output.counters()
    assert bench.requests == []
    assert counters["released_equal"] > len(text) / 65536
    assert (counters["released_commit"], counters["diverged"], counters["malformed"]) == (0, 0, 0)
    assert (counters["queue_lost"], counters["secondary_lost"], counters["truncated"]) == (0, 0, 0)
    bench.close()
