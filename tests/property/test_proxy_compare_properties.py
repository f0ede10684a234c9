# SPDX-License-Identifier: LGPL-2.1-or-later
"""Properties of the comparator that must hold for every run of two VMs."""

from __future__ import annotations

import itertools
import struct
from collections import Counter
from dataclasses import dataclass

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from remus_colo.proxy.comparator import Comparator, CompareConfig, Decision, Reason

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
MASK = (1 << 32) - 1


def ipv4(protocol: int, body: bytes, ident: int = 0, fragment: int = 0, ttl: int = 64) -> bytes:
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), ident, fragment, ttl, protocol, 0)
    return head + b"\x0a\0\0\1\x0a\0\0\2" + body


def tcp(seq: int, ack: int, flags: int, data: bytes = b"", port: int = 4000) -> bytes:
    return ipv4(
        6, struct.pack(">HHIIBBHHH", 80, port, seq & MASK, ack & MASK, 0x50, flags, 1000, 0, 0) + data
    )


def udp(payload: bytes, port: int = 53, **header: int) -> bytes:
    return ipv4(17, struct.pack(">HHHH", 5353, port, 8 + len(payload), 0) + payload, **header)


def flow(packet: bytes) -> bytes:
    """What tells apart the flows that these tests use."""
    return packet[9:10] + packet[12:24]


def tcp_parts(packet: bytes) -> tuple[int, bytes]:
    """Sequence number and payload of what :func:`tcp` made."""
    return int.from_bytes(packet[24:28], "big"), packet[40:]


class Driver:
    """Feeds a comparator and checks what must hold after each step."""

    def __init__(self, config: CompareConfig | None = None) -> None:
        self.comparator = Comparator(config or CompareConfig(), 0.0)
        self.now_s = 0.0
        self.sent: list[bytes] = []
        self.released: list[int] = []
        self.requests: list[Reason] = []
        self.asked = False

    def take(self, decision: Decision) -> Decision:
        for packet_id in decision.release:
            assert 0 <= packet_id < len(self.sent)
            assert packet_id not in self.released
            self.released.append(packet_id)
        if decision.checkpoint is not None:
            assert not self.asked, "asked again before the cut"
            self.asked = True
            self.requests.append(decision.checkpoint.reason)
        self.comparator.check_invariants()
        assert self.comparator.counters.held == len(self.sent) - len(self.released)
        return decision

    def primary(self, packet: bytes, ethertype: int = 0x0800) -> Decision:
        self.sent.append(packet)
        return self.take(self.comparator.primary(self.now_s, len(self.sent) - 1, packet, ethertype))

    def secondary(self, packet: bytes, ethertype: int = 0x0800) -> Decision:
        return self.take(self.comparator.secondary(self.now_s, packet, ethertype))

    def cut(self) -> int:
        self.asked = False
        held = self.comparator.cut(self.now_s)
        self.comparator.check_invariants()
        return held

    def abort(self) -> Decision:
        self.asked = False
        return self.take(self.comparator.abort_cut(self.now_s))

    def streams_in_order(self) -> None:
        last: dict[bytes, int] = {}
        for packet_id in self.released:
            key = flow(self.sent[packet_id])
            if key[0] != 6:
                continue
            assert last.get(key, -1) < packet_id
            last[key] = packet_id

    def all_released(self) -> bool:
        return sorted(self.released) == list(range(len(self.sent)))


@st.composite
def segments(draw: st.DrawFn, length: int, fin: bool, lossy: bool = True) -> list[tuple[int, int, bool]]:
    """(start, end, FIN) in sending order: any cutting, repeats, swaps; in the end everything has been sent."""
    cuts = sorted(draw(st.sets(st.integers(1, max(length - 1, 1)), max_size=8)))
    edges = [0, *[cut for cut in cuts if cut < length], length]
    plain = [(low, high, False) for low, high in itertools.pairwise(edges) if low < high]
    if fin:
        low, high, _ = plain.pop() if draw(st.booleans()) else (length, length, False)
        plain.append((low, high, True))
    sent = list(plain)
    if lossy:
        keep = draw(st.lists(st.booleans(), min_size=len(sent), max_size=len(sent)))
        sent = [segment for segment, kept in zip(sent, keep, strict=True) if kept]
        for _ in range(draw(st.integers(0, 5))):  # repeats that are cut in another way
            low = draw(st.integers(0, length - 1))
            high = draw(st.integers(low + 1, length))
            sent.insert(
                draw(st.integers(0, len(sent))), (low, high, fin and high == length and draw(st.booleans()))
            )
        sent = draw(st.permutations(sent))
        sent = [*sent, *plain]
    return sent


def interleave(draw: st.DrawFn, one: list, other: list) -> list[tuple[bool, object]]:
    steps: list[tuple[bool, object]] = []
    one, other = list(one), list(other)
    while one or other:
        first = bool(one) and (not other or draw(st.booleans()))
        steps.append((first, (one if first else other).pop(0)))
    return steps


@st.composite
def two_cuttings(draw: st.DrawFn):
    data = draw(st.binary(min_size=1, max_size=200))
    fin = draw(st.booleans())
    steps = interleave(draw, draw(segments(len(data), fin)), draw(segments(len(data), fin)))
    return data, draw(st.integers(0, MASK)), steps


def tcp6(seq: int, ack: int, flags: int, data: bytes = b"", extension: bool = False) -> bytes:
    body = struct.pack(">HHIIBBHHH", 80, 4000, seq & MASK, ack & MASK, 0x50, flags, 1000, 0, 0) + data
    body = b"\x06\0\1\4\0\0\0\0" + body if extension else body  # destination options
    return (
        struct.pack(">IHBB", 6 << 28, len(body), 60 if extension else 6, 64)
        + bytes(15)
        + b"\1"
        + bytes(15)
        + b"\2"
        + body
    )


@dataclass(frozen=True)
class Connection:
    """How a stream is carried: over which IP, from its SYN on or found open, with what numbers."""

    isn: int
    secondary_isn: int
    v6: bool
    from_syn: bool

    def packet(self, seq: int, flags: int, data: bytes = b"") -> tuple[bytes, int]:
        if self.v6:
            return tcp6(seq, 77, flags, data, extension=bool(seq & 1)), 0x86DD
        return tcp(seq, 77, flags, data), 0x0800

    def segment(self, data: bytes, part: tuple[int, int, bool]) -> tuple[bytes, int]:
        low, high, fin = part
        return self.packet(self.isn + 1 + low, ACK | (FIN if fin else 0), data[low:high])

    def open(self, driver: Driver) -> None:
        """What both sides say before the first byte."""
        if self.from_syn:
            driver.primary(*self.packet(self.isn, SYN | ACK))
            driver.secondary(*self.packet(self.secondary_isn, SYN | ACK))


CONNECTIONS = st.builds(Connection, st.integers(0, MASK), st.integers(0, MASK), st.booleans(), st.booleans())
NEW_CONNECTIONS = st.builds(
    Connection, st.integers(0, MASK), st.integers(0, MASK), st.booleans(), st.just(True)
)


@settings(max_examples=200, deadline=None)
@given(two_cuttings(), CONNECTIONS)
def test_one_stream_cut_in_two_ways_never_diverges_and_leaves(case, connection: Connection) -> None:
    data, _, steps = case
    driver = Driver()
    connection.open(driver)
    for first, part in steps:
        (driver.primary if first else driver.secondary)(*connection.segment(data, part))
    assert not driver.requests
    assert driver.all_released()
    assert driver.comparator.next_deadline_s is None
    assert driver.released == sorted(driver.released)


@settings(max_examples=200, deadline=None)
@given(st.data(), two_cuttings(), NEW_CONNECTIONS, st.booleans())
def test_what_has_left_never_leaves_again_with_another_byte(
    data: st.DataObject, case, connection: Connection, checkpoint: bool
) -> None:
    content, _, steps = case
    assume(content)
    driver = Driver()
    connection.open(driver)
    for first, part in steps:
        (driver.primary if first else driver.secondary)(*connection.segment(content, part))
    if checkpoint:
        driver.cut()
        driver.take(driver.comparator.commit(driver.now_s))
        driver.take(driver.comparator.secondary_resumed(driver.now_s))
    low = data.draw(st.integers(0, len(content) - 1))
    high = data.draw(st.integers(low + 1, len(content)))
    assume(high > low + 1 or high < len(content))  # as a keepalive is
    driver.primary(*connection.segment(content, (low, high, False)))
    assert driver.all_released() and not driver.requests
    at = data.draw(st.integers(low, high - 1))
    other = content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :]
    driver.primary(*connection.segment(other, (low, high, False)))
    assert driver.requests == [Reason.TCP_PAYLOAD]
    assert not driver.all_released()


@settings(max_examples=200, deadline=None)
@given(st.data(), st.binary(min_size=1, max_size=200), CONNECTIONS, st.booleans())
def test_what_the_pvm_never_sends_again_holds_nothing_up(
    data: st.DataObject, content: bytes, connection: Connection, both: bool
) -> None:
    """Segments of the PVM, or the same ones of both, are lost for good before anybody sees them, but for the last."""
    ours = data.draw(segments(len(content), True, lossy=False))
    lost = data.draw(st.sets(st.sampled_from(ours[:-1]))) if len(ours) > 1 else set()
    theirs = [part for part in ours if part not in lost] if both else data.draw(segments(len(content), True))
    ours = data.draw(st.permutations([part for part in ours if part not in lost]))
    assume(connection.from_syn or not lost)  # otherwise the first byte seen is where the stream begins
    driver = Driver()
    connection.open(driver)
    for first, part in interleave(data.draw, ours, theirs):
        (driver.primary if first else driver.secondary)(*connection.segment(content, part))
    assert not driver.requests
    assert driver.all_released()
    assert driver.comparator.next_deadline_s is None


@settings(max_examples=300, deadline=None)
@given(st.data(), CONNECTIONS, st.sampled_from(["flip", "missing", "extra", "fin"]), st.booleans())
def test_what_differs_never_leaves_and_always_ends_in_a_checkpoint(
    data: st.DataObject, connection: Connection, how: str, swap: bool
) -> None:
    """What has left is what the SVM has said, too: after a failover at any moment a client sees one history."""
    content = data.draw(st.binary(min_size=2, max_size=200))
    at = data.draw(st.integers(0, len(content) - 1))
    if how == "flip":
        other = content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :]
    elif how == "missing":
        other = content[:at] + content[at + 1 :] or b"x"
    elif how == "extra":
        other = content[:at] + data.draw(st.binary(min_size=1, max_size=1)) + content[at:]
    else:
        other = content[: max(at, 1)]
    if swap:
        content, other = other, content
    fin = how == "fin"
    ours, theirs = data.draw(segments(len(content), fin)), data.draw(segments(len(other), fin))
    driver = Driver()
    connection.open(driver)
    parts: dict[int, tuple[int, int, bool]] = {}
    said: dict[int, int] = {}
    finished: set[int] = set()
    checked = 0
    for first, part in interleave(data.draw, ours, theirs):
        if first:
            parts[len(driver.sent)] = part
            driver.primary(*connection.segment(content, part))
        else:
            low, high, has_fin = part
            said.update({position: other[position] for position in range(low, high)})
            if has_fin:
                finished.add(high)
            driver.secondary(*connection.segment(other, part))
        for packet_id in driver.released[checked:]:
            low, high, has_fin = parts.get(packet_id, (0, 0, False))
            assert all(said.get(position) == content[position] for position in range(low, high))
            assert not has_fin or high in finished
        checked = len(driver.released)
    while not driver.requests and (deadline_s := driver.comparator.next_deadline_s) is not None:
        driver.now_s = deadline_s
        driver.take(driver.comparator.tick(deadline_s))
    assert len(driver.requests) == 1
    driver.cut()
    driver.take(driver.comparator.commit(driver.now_s))
    assert driver.all_released()
    assert driver.released == sorted(driver.released)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.binary(min_size=1, max_size=200), st.integers(0, MASK), st.integers(0, MASK))
def test_an_svm_in_its_own_sequence_space(data: st.DataObject, content: bytes, isn: int, own: int) -> None:
    """As in a capture from before the rewriter; random numbers lie far apart."""
    assume(10_000 < (isn - own) & MASK < MASK - 10_000)
    ours, theirs = data.draw(segments(len(content), True)), data.draw(segments(len(content), True))
    driver = Driver(CompareConfig(own_sequence=True))
    steps = interleave(
        data.draw,
        [(isn, None), *((isn, part) for part in ours)],
        [(own, None), *((own, part) for part in theirs)],
    )
    for first, (number, part) in steps:
        low, high, fin = part or (-1, -1, False)
        flags = SYN | ACK if part is None else ACK | (FIN if fin else 0)
        packet = tcp(number + 1 + low, 77, flags, content[low:high] if part else b"")
        (driver.primary if first else driver.secondary)(packet)
    assert not driver.requests
    assert driver.all_released()


@settings(max_examples=100, deadline=None)
@given(st.data(), st.lists(st.binary(max_size=20), min_size=1, max_size=10), st.booleans())
def test_a_datagram_that_differs_ends_in_a_checkpoint(
    data: st.DataObject, ours: list[bytes], v6: bool
) -> None:
    at = data.draw(st.integers(0, len(ours) - 1))
    how = data.draw(st.sampled_from(["other", "missing"]))
    theirs = list(ours)
    if how == "missing":
        del theirs[at]
    else:
        theirs[at] += b"!"
    theirs = data.draw(st.permutations(theirs))
    driver = Driver()
    for first, payload in interleave(data.draw, ours, theirs):
        packet = udp(payload)
        if v6:
            packet = struct.pack(">IHBB", 6 << 28, len(packet) - 20, 17, 64) + bytes(32) + packet[20:]
        (driver.primary if first else driver.secondary)(packet, 0x86DD if v6 else 0x0800)
    waiting = [payload for index, payload in enumerate(ours) if index not in driver.released]
    assert waiting and sum(ours.count(payload) > theirs.count(payload) for payload in set(waiting)) >= 1
    while not driver.requests:  # sooner than by the time-out if the SVM has one of the same length, too
        driver.now_s = driver.comparator.next_deadline_s
        driver.take(driver.comparator.tick(driver.now_s))
    assert driver.requests == [Reason.UDP_TIMEOUT] or (
        how == "other" and driver.requests == [Reason.UDP_PAYLOAD]
    )


class Guest:
    """A model guest: TCP output as a function of what it was asked to write, copied at checkpoints."""

    def __init__(self) -> None:
        self.written = {1000: b"", 2000: b""}
        self.sent = {1000: 0, 2000: 0}

    def copy(self) -> Guest:
        other = Guest()
        other.written, other.sent = dict(self.written), dict(self.sent)
        return other

    def send(self, port: int, count: int) -> bytes | None:
        low = self.sent[port]
        data = self.written[port][low : low + count]
        if not data:
            return None
        self.sent[port] = low + len(data)
        return tcp(port + low, 5, ACK, data, port)

    def repeat(self, port: int, back: int) -> bytes | None:
        low = max(0, self.sent[port] - back)
        data = self.written[port][low : self.sent[port]]
        return tcp(port + low, 5, ACK, data, port) if data else None


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "write",
                "write-differing",
                "primary",
                "primary",
                "secondary",
                "secondary",
                "repeat",
                "repeat-secondary",
                "cut",
                "commit",
                "resume",
                "abort",
                "tick",
                "udp",
                "udp-secondary",
                "arp",
            ]
        ),
        st.sampled_from([1000, 2000]),
        st.integers(1, 40),
    ),
    min_size=20,
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(STEPS, st.binary(min_size=64, max_size=64))
def test_cut_commit_resume_and_abort_at_any_point(steps, content: bytes) -> None:
    """The oracle is the model's SVM: bytes leave only if the SVM sent the same, or by a commit."""
    driver = Driver()
    comparator = driver.comparator
    pvm, svm = Guest(), Guest()
    image: Guest | None = None  # the cut's, while it is not committed or not resumed
    committed = ran = True
    covered: dict[int, int] = {
        1000: 0,
        2000: 0,
    }  # stream length that the last commit, or the SVM at its birth, covers
    said: dict[int, dict[int, int]] = {1000: {}, 2000: {}}  # position -> byte that the present SVM has sent
    meta: dict[int, tuple] = {}
    cut_at = 0
    datagrams: list[bytes] = []
    between: list[bytes] = []
    written = 0

    def check(decision: Decision, commit: bool = False) -> None:
        for packet_id in decision.release:
            kind = meta[packet_id][0]
            if kind == "arp" or (commit and packet_id < cut_at):
                continue
            assert committed, "left while an older epoch was not committed"
            if kind == "udp":
                datagrams.remove(meta[packet_id][1])
                continue
            _, port, low, data = meta[packet_id]
            for index, byte in enumerate(data):
                position = low + index
                assert position < covered[port] or said[port].get(position) == byte

    def from_primary(port: int, packet: bytes | None) -> None:
        if packet is None:
            return
        seq, payload = tcp_parts(packet)
        meta[len(driver.sent)] = ("tcp", port, seq - port, payload)
        check(driver.primary(packet))

    def from_secondary(port: int, packet: bytes | None) -> None:
        if packet is None:
            return
        seq, payload = tcp_parts(packet)
        if image is None:
            said[port].update({seq - port + i: byte for i, byte in enumerate(payload)})
            check(driver.secondary(packet))

    def adopt() -> None:
        """The SVM becomes a copy of the PVM at the cut: what the old one said no longer counts."""
        nonlocal covered, said, svm
        covered = dict(image.sent)
        said = {1000: {}, 2000: {}}
        svm = image.copy()
        svm.written = dict(pvm.written)
        datagrams.clear()

    for port in (1000, 2000):  # the ACK that both connections use
        meta[len(driver.sent)] = ("tcp", port, 0, b"")
        driver.primary(tcp(port, 5, ACK, b"", port))
        check(driver.secondary(tcp(port, 5, ACK, b"", port)))

    for action, port, count in steps:
        driver.now_s += 0.05
        if action == "write":
            for guest in (pvm, svm):
                guest.written[port] += content[:count]
        elif action == "write-differing":
            written += 1
            pvm.written[port] += content[:count] + bytes([written & 0xFF, 1])
            svm.written[port] += content[:count] + bytes([written & 0xFF, 2])
        elif action == "primary":
            from_primary(port, pvm.send(port, count))
        elif action == "repeat":
            from_primary(port, pvm.repeat(port, count))
        elif action == "secondary" and image is None:
            from_secondary(port, svm.send(port, count))
        elif action == "repeat-secondary" and image is None:
            from_secondary(port, svm.repeat(port, count))
        elif action == "udp":
            packet = udp(content[: count % 3], ident=count)
            meta[len(driver.sent)] = ("udp", content[: count % 3])
            check(driver.primary(packet))
        elif action == "udp-secondary":
            # What comes between cut and abort counts after the abort.
            (datagrams if image is None else between).append(content[: count % 3])
            check(driver.secondary(udp(content[: count % 3])))
        elif action == "arp":
            meta[len(driver.sent)] = ("arp",)
            assert driver.primary(b"\0" * 28, 0x0806).release == (len(driver.sent) - 1,)
        elif action == "tick":
            driver.now_s += count / 20
            check(driver.take(comparator.tick(driver.now_s)))
        elif action == "cut" and committed:
            cut_at = len(driver.sent)
            image, committed, ran = pvm.copy(), False, image is None
            between.clear()
            driver.cut()
        elif action == "commit" and not committed:
            committed = True
            if image is not None:
                adopt()
            check(driver.take(comparator.commit(driver.now_s)), commit=True)
        elif action == "resume" and image is not None:
            adopt()
            image = None
            driver.take(comparator.secondary_resumed(driver.now_s))
        elif action == "abort" and not committed and image is not None:
            before = driver.now_s
            committed, image = True, None
            if not ran:  # the SVM of the cut before never resumed
                image = svm
            else:
                datagrams += between
            check(driver.abort())
            assert before == driver.now_s
    if not committed:
        committed = True
        if image is not None:
            adopt()
        check(driver.take(comparator.commit(driver.now_s)), commit=True)
    cut_at = len(driver.sent)
    driver.cut()
    check(driver.take(comparator.commit(driver.now_s)), commit=True)
    assert driver.all_released()
    driver.streams_in_order()


PACKETS = st.one_of(
    st.binary(max_size=80),
    st.builds(
        lambda protocol, body, fragment, ident: ipv4(protocol, body, ident, fragment),
        st.sampled_from([1, 2, 6, 6, 17, 17, 47, 58]),
        st.binary(max_size=64),
        st.sampled_from([0, 0, 0x2000, 0x4000, 1, 0x2001, 2]),
        st.integers(0, 2),
    ),
    st.builds(
        lambda seq, ack, flags, data, port: tcp(seq, ack, flags, data, port),
        st.one_of(st.integers(0, 30), st.integers(0, MASK)),
        st.one_of(st.integers(0, 3), st.integers(0, MASK)),
        st.integers(0, 31),
        st.text("ab", max_size=20).map(str.encode),
        st.integers(1, 2),
    ),
    st.builds(
        lambda data: b"\x60\0\0\0" + struct.pack(">HBB", len(data), 17, 64) + bytes(32) + data,
        st.binary(max_size=9),
    ),
    st.builds(lambda packet, cut: packet[:cut], st.builds(udp, st.binary(max_size=3)), st.integers(0, 31)),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                [
                    "primary",
                    "secondary",
                    "primary",
                    "secondary",
                    "both",
                    "both",
                    "cut",
                    "commit",
                    "resume",
                    "abort",
                    "tick",
                ]
            ),
            PACKETS,
            st.sampled_from([0x0800, 0x0800, 0x0800, 0x86DD, 0x0806, 0x8100]),
        ),
        max_size=50,
    ),
    st.booleans(),
)
def test_no_input_breaks_it(steps, tight: bool) -> None:
    config = CompareConfig(held_bytes=200, held_packets=5, flows=3, secondary_bytes=300, idle_flow_s=2.0)
    driver = Driver(config if tight else None)
    comparator = driver.comparator
    cut = resumed = False
    for action, packet, ethertype in steps:
        driver.now_s += 0.1
        if action in ("primary", "both"):
            driver.primary(packet, ethertype)
        if action in ("secondary", "both"):
            driver.secondary(packet, ethertype)
        if action == "cut" and not cut:
            cut, resumed = True, False
            driver.cut()
        elif action == "commit" and cut:
            cut = False
            driver.take(comparator.commit(driver.now_s))
        elif action == "resume":
            resumed = True
            driver.take(comparator.secondary_resumed(driver.now_s))
        elif action == "abort" and cut and not resumed:
            cut = False
            driver.abort()
        elif action == "tick":
            driver.now_s += 1.0
            driver.take(comparator.tick(driver.now_s))
            deadline = comparator.next_deadline_s
            assert deadline is None or deadline > driver.now_s or comparator.counters.held > 0
    driver.take(comparator.release_all(driver.now_s))
    assert driver.all_released()
    driver.primary(b"anything")
    assert driver.all_released()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_datagrams_are_matched_as_a_multiset_and_leave_at_once(data: st.DataObject) -> None:
    ours = data.draw(
        st.lists(st.tuples(st.sampled_from([b"", b"a", b"b", b"cc"]), st.integers(1, 2)), max_size=15)
    )
    theirs = [
        each for each in data.draw(st.permutations(ours)) if data.draw(st.integers(0, 3))
    ]  # some are lost
    driver = Driver()
    said: Counter[tuple[bytes, int]] = Counter()
    sent: Counter[tuple[bytes, int]] = Counter()
    for first, datagram in interleave(data.draw, ours, theirs):
        (sent if first else said)[datagram] += 1
        (driver.primary if first else driver.secondary)(udp(*datagram, ident=first))
        assert len(driver.released) == (sent & said).total(), "whichever both have said has left"
    assert not driver.requests


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_fragments_are_compared_after_reassembly(data: st.DataObject) -> None:
    whole = udp(data.draw(st.binary(min_size=20, max_size=90)))[20:]

    def fragments(ident: int) -> list[bytes]:
        edges = [
            0,
            *sorted(data.draw(st.sets(st.sampled_from(range(8, len(whole), 8)), max_size=3))),
            len(whole),
        ]
        parts = [
            ipv4(17, whole[low:high], ident, low // 8 | (0x2000 if high < len(whole) else 0))
            for low, high in itertools.pairwise(edges)
        ]
        return data.draw(st.permutations(parts))

    driver = Driver()
    ours = fragments(1)
    for first, packet in interleave(data.draw, ours, fragments(2)):
        decision = (driver.primary if first else driver.secondary)(packet)
        assert decision.release in ((), tuple(range(len(ours))))
    assert driver.all_released() and not driver.requests
