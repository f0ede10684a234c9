# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whatever the order of packets, losses, checkpoints and resets: the SVM speaks in the client's sequence numbers.

Two guests get a client's packets, each at its own pace; what the PVM sends reaches the client only as output
commit allows (but SYN-ACKs once the SYN came to the backup, which is harder on the rewriter).
"""

from __future__ import annotations

import copy
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from rewriter_model import ACK, RST, SYN, WINDOW, Client, Family, Guest, M, Sent, build, read, stream

from remus_colo.proxy.rewriter import Rewriter, finish_checksum

numbers = st.one_of(st.integers(0, M - 1), st.integers(M - 3000, M - 1), st.integers(0, 5))
counts = st.integers(1, 3000)


class Protected(RuleBasedStateMachine):
    """One client port, one guest twice."""

    v6 = False

    @initialize(
        pvm=st.lists(numbers, min_size=8, max_size=8),
        svm=st.lists(numbers, min_size=8, max_size=8),
        first=numbers,
    )
    def start(self, pvm: list[int], svm: list[int], first: int) -> None:
        Family.v6 = self.v6
        self.rewriter = Rewriter()
        self.client = Client()
        self.pvm: Guest | None = Guest(pvm)
        self.svm = Guest(svm, strict=True)
        self.svm_isns = svm
        self.next_isn = first
        self.now_s = 0.0
        self.pvm_in: list[bytes] = []
        self.svm_in: list[bytes] = []
        self.pvm_out: list[Sent] = []
        self.svm_out: list[Sent] = []  # not yet at the rewriter
        self.agreed: dict[
            int, tuple[int, int]
        ] = {}  # client's ISN: what the SVM's output covers, data and ACK
        self.old: list[bytes] = []
        self.lost_sync = False
        self.mirrored: set[int] = set()  # client's ISNs whose SYN came to the rewriter

    # -- the client

    def _submit(self, packet: bytes) -> None:
        if self.pvm is not None:
            self.pvm_in.append(packet)
        self.svm_in.append(packet)

    @precondition(lambda self: self.client.state == "closed")
    @rule()
    def connect(self) -> None:
        self._submit(self.client.connect(self.next_isn))
        self.next_isn = (self.next_isn + 100 * WINDOW) % M

    @precondition(lambda self: self.client.state == "established")
    @rule(count=counts)
    def client_sends(self, count: int) -> None:
        packet = self.client.send(count)
        self.old.append(packet)
        self._submit(packet)

    @precondition(lambda self: self.client.state != "closed")
    @rule(count=counts)
    def client_sends_again(self, count: int) -> None:
        self._submit(self.client.again(count))

    @precondition(lambda self: self.client.state == "established")
    @rule()
    def client_aborts(self) -> None:
        self._submit(self.client.abort())

    @precondition(lambda self: self.old)
    @rule(data=st.data())
    def old_duplicate(self, data: st.DataObject) -> None:
        self._submit(data.draw(st.sampled_from(self.old)))

    def _to_client(self, packet: bytes) -> None:
        for answer in self.client.receive(packet):
            self.old.append(answer)
            self._submit(answer)

    # -- the PVM, and what is released of its output

    @precondition(lambda self: self.pvm_in)
    @rule(count=st.integers(1, 5))
    def pvm_receives(self, count: int) -> None:
        for _ in range(min(count, len(self.pvm_in))):
            self.pvm_out += self.pvm.receive(self.pvm_in.pop(0))

    @precondition(lambda self: self.pvm is not None)
    @rule(count=counts, again=st.booleans())
    def pvm_sends(self, count: int, again: bool) -> None:
        self.pvm_out += self.pvm.again(count) if again else self.pvm.send(count)

    @rule()
    def compare(self) -> None:
        held = []
        for sent in self.pvm_out:
            got = read(sent.packet)
            if sent.pos is None:
                if got.flags & SYN and sent.client_isn not in self.mirrored:
                    held.append(sent)
                elif got.flags & SYN:
                    self._to_client(sent.packet)
                continue
            data, acked = self.agreed.get(sent.client_isn, (0, 0))
            if sent.pos + len(got.payload) <= data and (got.ack - sent.client_isn - 1) % M <= acked:
                self._to_client(sent.packet)
            else:
                held.append(sent)
        self.pvm_out = held

    # -- the SVM behind the rewriter

    def _to_svm(self, packet: bytes, lost: bool = False) -> None:
        self.now_s += 0.001
        if read(packet).flags & SYN:
            self.mirrored.add(read(packet).seq)
        rewritten = self.rewriter.to_guest(self.now_s, packet)
        if rewritten != b"" and not lost:
            self.svm_out += self.svm.receive(packet if rewritten is None else rewritten)

    @precondition(lambda self: self.svm_in)
    @rule(count=st.integers(1, 5))
    def svm_receives(self, count: int) -> None:
        for _ in range(min(count, len(self.svm_in))):
            self._to_svm(self.svm_in.pop(0))

    @precondition(lambda self: self.svm_in)
    @rule(seen=st.booleans())
    def svm_loses(self, seen: bool) -> None:
        packet = self.svm_in.pop(0)
        self.lost_sync |= bool(read(packet).flags & (SYN | RST))
        if seen:
            self._to_svm(packet, lost=True)

    @rule(count=counts, again=st.booleans())
    def svm_sends(self, count: int, again: bool) -> None:
        self.svm_out += self.svm.again(count) if again else self.svm.send(count)

    @precondition(lambda self: self.svm_out)
    @rule(count=st.integers(1, 5))
    def svms_output_arrives(self, count: int) -> None:
        for _ in range(min(count, len(self.svm_out))):
            self._from_svm(self.svm_out.pop(0))

    def _from_svm(self, sent: Sent) -> None:
        self.now_s += 0.001
        packet = self.rewriter.from_guest(self.now_s, sent.packet) or sent.packet
        for held in self.rewriter.take_held():
            self.svm_out += self.svm.receive(held)
        got = read(packet)
        if sent.pos is not None and (sent.pos or got.payload):
            # A guest that sent data has finished the handshake: the client has a number for it.
            assert got.seq == (self.client.peers[sent.client_isn] + 1 + sent.pos) % M
        if sent.pos is not None:
            data, acked = self.agreed.get(sent.client_isn, (0, 0))
            received = (got.ack - sent.client_isn - 1) % M
            self.agreed[sent.client_isn] = max(data, sent.pos + len(got.payload)), max(acked, received)
        if self.pvm is None:
            self._to_client(packet)

    # -- checkpoint and failover

    @precondition(lambda self: self.pvm is not None)
    @rule()
    def checkpoint(self) -> None:
        self.svm = copy.deepcopy(self.pvm)
        self.svm.strict, self.svm.isns = True, self.svm_isns
        self.svm_in, self.svm_out = list(self.pvm_in), []
        self.rewriter.reset()
        self.lost_sync = False
        released, self.pvm_out = self.pvm_out, []
        for sent in released:
            if not read(sent.packet).flags & RST:
                self._to_client(sent.packet)

    @precondition(lambda self: self.pvm is not None)
    @rule()
    def failover(self) -> None:
        self.pvm = None
        self.pvm_in, self.pvm_out = [], []
        self.rewriter.stop_learning()

    @precondition(lambda self: self.pvm is None and self.client.state == "established")
    @rule()
    def the_connection_lives_on(self) -> None:
        if self.lost_sync:
            return  # the SVM never heard of the connection: only a checkpoint would have told it
        self.old.clear()
        for _ in range(20):
            self._submit(self.client.again(WINDOW))
            self.svm_out += self.svm.again(WINDOW)
            for _ in range(100):
                if not (self.svm_in or self.svm_out):
                    break
                if self.svm_in:
                    self._to_svm(self.svm_in.pop(0))
                if self.svm_out:
                    self._from_svm(self.svm_out.pop(0))
        assert (self.svm.state, self.svm.client_isn) == ("established", self.client.isn)
        assert (self.client.received, self.svm.received) == (self.svm.sent, self.client.sent)

    @invariant()
    def one_flow_at_most(self) -> None:
        if hasattr(self, "rewriter"):
            assert self.rewriter.flows <= 1
            assert self.rewriter.rewritten_flows <= self.rewriter.flows


class ProtectedOverIPv6(Protected):
    v6 = True


TestProtected = Protected.TestCase
TestProtected.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)
TestProtectedOverIPv6 = ProtectedOverIPv6.TestCase
TestProtectedOverIPv6.settings = settings(max_examples=40, stateful_step_count=60, deadline=None)


@pytest.fixture(params=["IPv4", "IPv6"])
def family(request: pytest.FixtureRequest) -> None:
    """Which IP the packets of the test have."""
    Family.v6 = request.param == "IPv6"


SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def mapped(pvm_isn: int, svm_isn: int, client_isn: int) -> Rewriter:
    rewriter = Rewriter()
    rewriter.to_guest(0, build(True, SYN, client_isn, 0))
    rewriter.from_guest(0, build(False, SYN | ACK, svm_isn, client_isn + 1))
    rewriter.to_guest(0, build(True, ACK, client_isn + 1, pvm_isn + 1))
    return rewriter


@pytest.mark.usefixtures("family")
@SHARED
@given(
    numbers, numbers, numbers, st.binary(max_size=99), st.binary(max_size=30), st.integers(0, 3), st.data()
)
def test_checksums_and_sack_blocks(
    pvm_isn: int, svm_isn: int, client_isn: int, payload: bytes, other: bytes, lead: int, data: st.DataObject
) -> None:
    rewriter = mapped(pvm_isn, svm_isn, client_isn)
    edges = data.draw(st.lists(numbers, max_size=3).map(lambda some: some * 2))

    def packet(isn: int) -> bytes:
        blocks = b"".join(struct.pack("!I", (isn + edge) % M) for edge in edges)
        options = b"\x01" * lead + bytes((5, 2 + len(blocks))) + blocks
        if len(options) + len(other) + 2 <= 40:
            options += bytes((253, 2 + len(other))) + other
        return build(True, ACK, client_isn + 9, isn + 9, payload, options)

    want = packet(svm_isn)
    assert (rewriter.to_guest(0, packet(pvm_isn)) or packet(pvm_isn)) == want
    assert finish_checksum(want) == want
    sent = build(False, ACK, svm_isn + 9, client_isn + 9, payload)
    assert (rewriter.from_guest(0, sent) or sent) == build(False, ACK, pvm_isn + 9, client_isn + 9, payload)


@pytest.mark.usefixtures("family")
@SHARED
@given(numbers, numbers, numbers, st.lists(st.tuples(st.booleans(), counts), max_size=10))
def test_connections_that_the_guest_opens(
    pvm_isn: int, svm_isn: int, peer_isn: int, steps: list[tuple[bool, int]]
) -> None:
    rewriter = Rewriter()
    assert rewriter.from_guest(0, build(False, SYN, svm_isn, 0)) is None
    answer = build(True, SYN | ACK, peer_isn, pvm_isn + 1)
    assert rewriter.to_guest(0, answer) == build(True, SYN | ACK, peer_isn, svm_isn + 1)
    guest = peer = 0
    for from_guest, count in steps:
        if from_guest:
            payload = stream(guest, count, 2)
            packet = build(False, ACK, svm_isn + 1 + guest, peer_isn + 1 + peer, payload)
            want = build(False, ACK, pvm_isn + 1 + guest, peer_isn + 1 + peer, payload)
            assert (rewriter.from_guest(0, packet) or packet) == want
            guest += count
        else:
            payload = stream(peer, count, 1)
            packet = build(True, ACK, peer_isn + 1 + peer, pvm_isn + 1 + guest, payload)
            want = build(True, ACK, peer_isn + 1 + peer, svm_isn + 1 + guest, payload)
            assert (rewriter.to_guest(0, packet) or packet) == want
            peer += count


@pytest.mark.usefixtures("family")
@SHARED
@given(st.lists(st.tuples(st.integers(0, 4), st.binary(max_size=100), st.integers(0, 255)), max_size=20))
def test_random_bytes_never_raise(steps: list[tuple[int, bytes, int]]) -> None:
    rewriter = mapped(1, 2, 3)
    template = {1: build(True, ACK, 4, 2), 2: build(False, ACK, 3, 4)}
    start, protocol = (40, 6) if Family.v6 else (20, 9)
    for now_s, (kind, data, flags) in enumerate(steps):
        packet = data
        if kind in template:  # the known flow, with a random TCP header behind the ports
            packet = template[kind][: start + 4] + data
        elif kind == 3:  # an ICMP error
            icmp, error = (58, 1) if Family.v6 else (1, 3)
            packet = (
                template[1][:protocol]
                + bytes((icmp,))
                + template[1][protocol + 1 : start]
                + bytes((error, 4))
                + data
            )
        elif kind == 4:
            at = start + 12
            packet = template[2][:at] + bytes((data[0] if data else 0, flags)) + template[2][at + 2 :] + data
        for result in (rewriter.to_guest(now_s, packet), rewriter.from_guest(now_s, packet)):
            assert result is None or len(result) in (0, len(packet))
        rewriter.take_held()
