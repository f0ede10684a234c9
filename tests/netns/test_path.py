# SPDX-License-Identifier: LGPL-2.1-or-later
"""The whole network path of two hosts, without Xen::

    client --- host [br0] --- guest (PVM)          backup [iso0] --- svm
                |  mirror, rt0  =====================  rt0 |
                |                replication link          |
                queue on the PVM's output                  queues on both directions of the SVM

``svm`` has the address and MAC of ``guest``, as the copy of it that it is.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
from conftest import CLIENT_IP, GUEST_IP, VIF, Network, pending, receive, run, wait_until
from test_queue import transfer

from remus_colo.adapters.netlink import Links
from remus_colo.adapters.nft import QueueRules
from remus_colo.adapters.packetqueue import PacketQueue, open_queue
from remus_colo.adapters.rawlink import Frame, RawLink
from remus_colo.errors import HostError

pytestmark = pytest.mark.usefixtures("queue_form")

PORT = 7011
GUEST_MAC = "02:00:00:00:00:02"


class Path:
    """Both hosts set up.  Packets pass the queues at once when pumped; what passed is noted."""

    def __init__(self, net: Network, stack: contextlib.ExitStack) -> None:
        self.net = net
        self.from_pvm: list[bytes] = []
        self.from_svm: list[bytes] = []
        self.to_svm: list[bytes] = []
        for name in ("backup", "svm"):
            net.add_namespace(name)
        addresses = {"host": "10.78.0.1", "backup": "10.78.0.2"}
        run("ip", "link", "add", "rep0", "type", "veth", "peer", "name", "rep0", "netns", net.names["backup"])
        for name, address in addresses.items():
            with net.inside(name):
                run("ip", "addr", "add", f"{address}/24", "dev", "rep0")
                run("ip", "link", "set", "rep0", "up")
        self._set_up_host(stack, addresses)
        with net.inside("backup"):
            self._set_up_backup(stack, addresses)
        self.svm_frames = RawLink("rt0")
        stack.callback(self.svm_frames.close)

    def _set_up_host(self, stack: contextlib.ExitStack, addresses: dict[str, str]) -> None:
        self.links = stack.enter_context(Links())
        self.links.create_vxlan(
            "rt0", vni=7, local=addresses["host"], remote=addresses["backup"], port=4790, mtu=1500
        )
        self.links.set_up("rt0")
        self.links.mirror_egress(VIF, "rt0")
        rules = QueueRules("primary")
        stack.callback(rules.remove)
        rules.hold_from_guest(VIF, 1)
        self.queues = [self._queue(stack, 1, self.from_pvm)]

    def _set_up_backup(self, stack: contextlib.ExitStack, addresses: dict[str, str]) -> None:
        links = stack.enter_context(Links())
        links.create_isolated_bridge("iso0")
        links.set_up("iso0")
        links.create_vxlan(
            "rt0", vni=7, local=addresses["backup"], remote=addresses["host"], port=4790, mtu=1500, bridge_port=True
        )  # fmt: skip
        links.set_master("rt0", "iso0")
        links.set_up("rt0")
        self.net.add_port("vif9.0", "svm", "eth0", GUEST_IP, GUEST_MAC, bridge="iso0")
        self.net.neighbour("svm", "eth0", CLIENT_IP, "02:00:00:00:00:01")
        rules = QueueRules("backup")
        stack.callback(self._in_backup, rules.remove)
        rules.rewriter("vif9.0", 2, 3)
        self.queues += [self._queue(stack, 2, self.from_svm), self._queue(stack, 3, self.to_svm)]

    def _in_backup(self, call: object) -> None:
        with self.net.inside("backup"):
            call()

    @staticmethod
    def _queue(stack: contextlib.ExitStack, number: int, noted: list[bytes]) -> PacketQueue:
        def on_packet(packet_id: int, payload: bytes, _ethertype: int) -> None:
            noted.append(payload)
            queue.accept(packet_id)

        queue = open_queue(number, on_packet, 4096)
        stack.callback(queue.close)
        return queue

    def pump(self) -> None:
        for queue in self.queues:
            queue.process()

    def next_svm_frame(self) -> Frame:
        def look() -> Frame | None:
            self.pump()
            return self.svm_frames.recv()

        return wait_until(look, "a frame of the SVM")


@pytest.fixture
def path(net: Network) -> Iterator[Path]:
    with contextlib.ExitStack() as stack:
        try:
            made = Path(net, stack)
        except HostError as exc:
            pytest.skip(str(exc))
        yield made


def test_input_reaches_both_and_output_only_the_comparator(path: Path) -> None:
    sockets = {}
    for name, address in (("client", CLIENT_IP), ("guest", GUEST_IP), ("svm", GUEST_IP)):
        sockets[name] = path.net.socket(name)
        sockets[name].bind((address, PORT))
    lan = path.net.sniffer("client", "c0")
    sockets["client"].sendto(b"question", (GUEST_IP, PORT))
    assert receive(sockets["guest"], 1, path.pump) == [b"question"]
    assert receive(sockets["svm"], 1, path.pump) == [b"question"]
    sockets["svm"].sendto(b"answer of the SVM", (CLIENT_IP, PORT))
    frame = path.next_svm_frame()
    assert frame.source_mac == bytes.fromhex(GUEST_MAC.replace(":", ""))
    assert frame.payload[28:] == b"answer of the SVM"
    sockets["guest"].sendto(b"answer of the PVM", (CLIENT_IP, PORT))
    assert receive(sockets["client"], 1, path.pump) == [b"answer of the PVM"]
    assert [f[42:] for f in pending(lan)] == [b"answer of the PVM"]
    assert path.svm_frames.recv() is None
    assert [p[28:] for p in path.from_pvm + path.from_svm] == [b"answer of the PVM", b"answer of the SVM"]


def test_broadcast_reaches_both(path: Path) -> None:
    """The client asks for the guest's MAC, which both answer, one of them to the comparator."""
    with path.net.inside("client"):
        run("ip", "neigh", "del", GUEST_IP, "dev", "c0")
    path.net.socket("client").sendto(b"x", (GUEST_IP, PORT))
    reply = path.next_svm_frame()
    assert reply.ethertype == 0x0806
    assert reply.payload[6:8] == b"\0\2"


def test_bulk_input_reaches_the_svm_whole(path: Path) -> None:
    """Upload over TCP, with offload, through an outer link that full frames do not fit."""
    seen = path.net.sniffer("svm", "eth0")
    frames: list[bytes] = []

    def pump() -> None:
        path.pump()
        frames.extend(pending(seen))

    text = b"".join(b"Line %06d of what the client has to say\n" % i for i in range(10000))
    assert transfer(path.net, text, pump, sender="client") == text

    def stream() -> bytes:
        pump()
        return reassemble([frame[14:] for frame in frames if frame[12:14] == b"\x08\x00"])

    wait_until(lambda: len(stream()) >= len(text), "all of it at the SVM")
    assert stream() == text


def reassemble(packets: list[bytes]) -> bytes:
    """The bytes of one TCP direction, from its SYN on, as far as they are there."""
    got: dict[int, bytes] = {}
    start = None
    for packet in packets:
        if packet[9] != socket.IPPROTO_TCP:
            continue
        tcp = packet[20 : int.from_bytes(packet[2:4], "big")]
        sequence = int.from_bytes(tcp[4:8], "big")
        if tcp[13] & 2:
            start = sequence + 1
        data = tcp[(tcp[12] >> 4) * 4 :]
        if data and len(data) > len(got.get(sequence, b"")):
            got[sequence] = data
    stream = b""
    while start is not None and (data := got.get((start + len(stream)) & 0xFFFFFFFF)):
        stream += data
    return stream
