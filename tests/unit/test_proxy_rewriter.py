# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rewriter, one decision of docs/rewriter.rst at a time."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from remus_colo.proxy import rewriter
from remus_colo.proxy.rewriter import Connection, Rewriter, finish_checksum

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16

CLIENT, GUEST = bytes((192, 0, 2, 9)), bytes((192, 0, 2, 80))
CLIENT6, GUEST6 = (bytes.fromhex("20010db8") + bytes(11) + bytes((last,)) for last in (9, 80))
CPORT, GPORT = 40000, 80
CLIENT_ISN, PVM_ISN, SVM_ISN = 0xFFFFFFF0, 5000, 0xFFFFFF00
OFFSET = (PVM_ISN - SVM_ISN) % 2**32
M = 2**32


class Family:
    """Which IP the packets of the running test have."""

    v6 = False


@pytest.fixture(autouse=True, params=["IPv4", "IPv6"])
def family(request: pytest.FixtureRequest) -> None:
    Family.v6 = request.param == "IPv6"


def words_sum(data: bytes) -> int:
    """RFC 1071, word by word: an oracle of its own."""
    total = 0
    for (word,) in struct.iter_unpack("!H", data + b"\0" * (len(data) % 2)):
        total += word
        total = (total & 0xFFFF) + (total >> 16)
    return total


def segment(
    to_guest: bool,
    flags: int,
    seq: int,
    ack: int = 0,
    payload: bytes = b"",
    options: bytes = b"",
    cport: int = CPORT,
    ip_options: bytes = b"",
    fragment: int = 0x4000,
) -> bytes:
    if Family.v6 and (ip_options or fragment != 0x4000):
        pytest.skip("about a field of IPv4")
    client, guest = (CLIENT6, GUEST6) if Family.v6 else (CLIENT, GUEST)
    source, target, sport, dport = (
        (client, guest, cport, GPORT) if to_guest else (guest, client, GPORT, cport)
    )
    options += b"\0" * (-len(options) % 4)
    tcp = struct.pack(
        "!HHIIBBHHH", sport, dport, seq % M, ack % M, (20 + len(options)) // 4 << 4, flags, 1000, 0, 0
    )
    tcp += options + payload
    checksum = 0xFFFF - words_sum(source + target + struct.pack("!II", len(tcp), 6) + tcp)
    tcp = tcp[:16] + struct.pack("!H", checksum) + tcp[18:]
    if Family.v6:
        return struct.pack("!IHBB", 6 << 28, len(tcp), 6, 64) + source + target + tcp
    first = 0x45 + len(ip_options) // 4
    ip = struct.pack("!BBHHHBBH", first, 0, 20 + len(ip_options) + len(tcp), 1, fragment, 64, 6, 0)
    return ip + source + target + ip_options + tcp


def to(flags: int, seq: int, ack: int = 0, payload: bytes = b"", **more) -> bytes:
    return segment(True, flags, seq, ack, payload, **more)


def out(flags: int, seq: int, ack: int = 0, payload: bytes = b"", **more) -> bytes:
    return segment(False, flags, seq, ack, payload, **more)


def timestamps(value: int, echo: int) -> bytes:
    return b"\x01\x01\x08\x0a" + struct.pack("!II", value, echo)


def handshake(
    rw: Rewriter, pvm_isn: int = PVM_ISN, svm_isn: int = SVM_ISN, now_s: float = 0.0, **more
) -> None:
    assert rw.to_guest(now_s, to(SYN, CLIENT_ISN, **more)) is None
    assert rw.from_guest(now_s, out(SYN | ACK, svm_isn, CLIENT_ISN + 1, **more)) is None
    rw.to_guest(now_s, to(ACK, CLIENT_ISN + 1, pvm_isn + 1, **more))


@pytest.fixture
def rw() -> Rewriter:
    return Rewriter()


@pytest.fixture
def established(rw: Rewriter) -> Rewriter:
    handshake(rw)
    return rw


def test_both_directions_are_mapped_across_the_wrap(rw: Rewriter) -> None:
    rw.to_guest(0, to(SYN, CLIENT_ISN))
    rw.from_guest(0, out(SYN | ACK, SVM_ISN, CLIENT_ISN + 1))
    assert rw.to_guest(0, to(ACK, CLIENT_ISN + 1, PVM_ISN + 1)) == to(ACK, CLIENT_ISN + 1, SVM_ISN + 1)
    assert rw.to_guest(0, to(ACK | PSH, CLIENT_ISN + 1, PVM_ISN + 1, b"GET")) == to(
        ACK | PSH, CLIENT_ISN + 1, SVM_ISN + 1, b"GET"
    )
    assert rw.from_guest(0, out(ACK, SVM_ISN + 1, CLIENT_ISN + 4, b"x" * 999)) == out(
        ACK, PVM_ISN + 1, CLIENT_ISN + 4, b"x" * 999
    )
    assert rw.to_guest(0, to(ACK, CLIENT_ISN + 4, PVM_ISN + 1000)) == to(ACK, CLIENT_ISN + 4, SVM_ISN + 1000)
    assert (rw.flows, rw.rewritten_flows, rw.counters.learned_flows) == (1, 1, 1)


def test_sack_blocks_are_mapped_at_odd_offsets_too(established: Rewriter) -> None:
    def sack(isn: int) -> bytes:
        edges = struct.pack("!IIII", (isn + 10) % M, (isn + 20) % M, (isn + 0x200) % M, (isn + 0x300) % M)
        return b"\x05\x12" + edges

    for lead in (b"", b"\x01", b"\x01\x01", b"\x01" * 3, timestamps(1, 2)):
        packet = to(ACK, CLIENT_ISN + 1, PVM_ISN + 1, options=lead + sack(PVM_ISN))
        want = to(ACK, CLIENT_ISN + 1, SVM_ISN + 1, options=lead + sack(SVM_ISN))
        assert established.to_guest(0, packet) == want


@pytest.mark.parametrize(
    "options", [b"\x05\x01", b"\x05\x00", b"\x05\xff\0\0", b"\x08", b"\x05\x03\0", b"\x22\x04ab"]
)
def test_malformed_options_are_left_and_the_ack_is_mapped(established: Rewriter, options: bytes) -> None:
    options = b"\x01" * (-len(options) % 4) + options
    packet = to(ACK, CLIENT_ISN + 1, PVM_ISN + 1, options=options)
    assert established.to_guest(0, packet) == to(ACK, CLIENT_ISN + 1, SVM_ISN + 1, options=options)


def test_the_guests_own_sack_blocks_are_the_clients_numbers(established: Rewriter) -> None:
    options = b"\x01\x01\x05\x0a" + struct.pack("!II", 7, 9)
    packet = out(ACK, SVM_ISN + 1, CLIENT_ISN + 1, options=options)
    assert established.from_guest(0, packet) == out(ACK, PVM_ISN + 1, CLIENT_ISN + 1, options=options)


def test_equal_numbers_need_nothing(rw: Rewriter) -> None:
    handshake(rw, pvm_isn=SVM_ISN)
    assert rw.to_guest(0, to(ACK, CLIENT_ISN + 1, SVM_ISN + 1, b"GET")) is None
    assert rw.from_guest(0, out(ACK, SVM_ISN + 1, CLIENT_ISN + 4, b"x")) is None
    assert (rw.flows, rw.rewritten_flows) == (1, 0)
    rw.expire(rewriter.LINGER_S)
    assert rw.flows == 0


def test_ip_options_move_the_ports(rw: Rewriter) -> None:
    handshake(rw, ip_options=b"\x01" * 4)
    assert rw.from_guest(0, out(ACK, SVM_ISN + 1, 0)) == out(ACK, PVM_ISN + 1, 0)


def ipaddress_packets() -> list[bytes]:
    """IPv6 packets that are no whole TCP segment: another protocol, a fragment, extension headers that do not end."""
    whole = out(ACK, SVM_ISN + 1, 0, b"x" * 40)
    fragment = whole[:6] + b"\x2c" + whole[7:40] + b"\6\0\0\1\0\0\0\7" + whole[40:]
    endless = whole[:6] + b"\0" + whole[7:40] + b"\0\0\0\0\0\0\0\0" * 40
    too_long = whole[:6] + b"\x3c" + whole[7:40] + b"\6\xff\0\0\0\0\0\0" + whole[40:]
    return [whole[:6] + b"\x11" + whole[7:], fragment, endless, too_long]


def test_extension_headers_of_ipv6_are_stepped_over(established: Rewriter) -> None:
    if not Family.v6:
        pytest.skip("IPv6 only")

    def extended(packet: bytes) -> bytes:
        return packet[:6] + b"\0" + packet[7:40] + b"\x3c\0\1\4\0\0\0\0" + b"\6\0\1\4\0\0\0\0" + packet[40:]

    assert established.from_guest(0, extended(out(ACK, SVM_ISN + 1, 5))) == extended(out(ACK, PVM_ISN + 1, 5))
    want = extended(to(ACK, 5, SVM_ISN + 1))
    assert established.to_guest(0, extended(to(ACK, 5, PVM_ISN + 1))) == want


def test_other_protocols_fragments_and_unknown_flows_are_left(established: Rewriter) -> None:
    whole = out(ACK, SVM_ISN + 1, 0, b"x" * 40)
    udp = whole[:9] + b"\x11" + whole[10:]
    ip = (
        ipaddress_packets()
        if Family.v6
        else [udp, out(ACK, SVM_ISN + 1, 0, fragment=0x2000), out(ACK, 1, fragment=5)]
    )
    for packet in (*ip, b"", *(whole[:size] for size in range(1, 40))):
        assert established.from_guest(0, packet) is None
        assert established.to_guest(0, packet) is None
    assert established.from_guest(0, out(ACK, SVM_ISN + 1, cport=1)) is None
    assert established.to_guest(0, to(ACK, CLIENT_ISN + 1, PVM_ISN + 1, cport=1)) is None
    assert established.from_guest(0, b"\x50" + whole[1:]) is None  # neither IPv4 nor IPv6


def test_padding_is_no_payload(established: Rewriter) -> None:
    packet = out(FIN | ACK, SVM_ISN + 1, CLIENT_ISN + 1)
    assert (
        established.from_guest(0, packet + b"\0" * 6)
        == out(FIN | ACK, PVM_ISN + 1, CLIENT_ISN + 1) + b"\0" * 6
    )
    established.to_guest(0, to(FIN | ACK, CLIENT_ISN + 1, PVM_ISN + 2))
    established.from_guest(0, out(ACK, SVM_ISN + 2, CLIENT_ISN + 2))
    established.expire(rewriter.LINGER_S)
    assert established.flows == 0


# -- the handshake


def test_an_ack_before_the_svms_syn_ack_waits_for_it(rw: Rewriter) -> None:
    rw.to_guest(0, to(SYN, CLIENT_ISN))
    assert rw.to_guest(0, to(ACK, CLIENT_ISN + 1, PVM_ISN + 1)) == b""
    assert rw.to_guest(0, to(ACK | PSH, CLIENT_ISN + 1, PVM_ISN + 1, b"GET")) == b""
    assert rw.to_guest(0, to(ACK | PSH, CLIENT_ISN + 4, PVM_ISN + 1, b" /")) == b""
    assert rw.take_held() == []
    # The offset is known at once, so the comparator already sees the PVM's number.
    assert rw.from_guest(0.1, out(SYN | ACK, SVM_ISN, CLIENT_ISN + 1)) == out(
        SYN | ACK, PVM_ISN, CLIENT_ISN + 1
    )
    assert rw.take_held() == [
        to(ACK, CLIENT_ISN + 1, SVM_ISN + 1),
        to(ACK | PSH, CLIENT_ISN + 1, SVM_ISN + 1, b"GET"),
        to(ACK | PSH, CLIENT_ISN + 4, SVM_ISN + 1, b" /"),
    ]
    assert rw.take_held() == []
    assert rw.counters.held == 3


def test_held_packets_are_bounded(rw: Rewriter) -> None:
    rw.to_guest(0, to(SYN, CLIENT_ISN))
    for _ in range(rewriter.HELD_PER_FLOW + 3):
        assert rw.to_guest(0, to(ACK, CLIENT_ISN + 1, PVM_ISN + 1)) == b""
    rw.from_guest(0, out(SYN | ACK, SVM_ISN, CLIENT_ISN + 1))
    assert len(rw.take_held()) == rewriter.HELD_PER_FLOW
    assert rw.counters.dropped == 3


def test_nothing_waits_for_an_svm_that_never_answers(rw: Rewriter) -> None:
    rw.to_guest(0, to(SYN, CLIENT_ISN))
    assert rw.to_guest(1, to(ACK, CLIENT_ISN + 1, PVM_ISN + 1)) == b""
    late_s = rewriter.SYN_ANSWER_S
    assert rw.to_guest(late_s, to(ACK, CLIENT_ISN + 1, PVM_ISN + 1)) is None
    rw.expire(late_s)
    assert rw.flows == 0


def test_an_old_syn_on_a_living_connection_does_not_stop_it(rw: Rewriter) -> None:
    # After a checkpoint the connection is unknown here; the SVM's challenge ACK shows that it lives.
    rw.to_guest(0, to(SYN, CLIENT_ISN))
    assert rw.from_guest(0, out(ACK, PVM_ISN + 100, CLIENT_ISN + 50)) is None
    assert rw.to_guest(0, to(ACK, CLIENT_ISN + 1, PVM_ISN + 100)) is None
    assert rw.flows == 0


def test_retransmitted_syn_and_syn_ack_change_nothing(rw: Rewriter) -> None:
    for _ in range(2):
        assert rw.to_guest(0, to(SYN, CLIENT_ISN)) is None
        assert rw.from_guest(0, out(SYN | ACK, SVM_ISN, CLIENT_ISN + 1)) is None
    ack = to(ACK, CLIENT_ISN + 1, PVM_ISN + 1)
    assert rw.to_guest(0, ack) == to(ACK, CLIENT_ISN + 1, SVM_ISN + 1)
    # The SVM lost that ACK: what it sends again has the client's numbers now.
    assert rw.from_guest(1, out(SYN | ACK, SVM_ISN, CLIENT_ISN + 1)) == out(
        SYN | ACK, PVM_ISN, CLIENT_ISN + 1
    )
    assert rw.to_guest(1, to(SYN, CLIENT_ISN)) is None
    assert rw.to_guest(1, ack) == to(ACK, CLIENT_ISN + 1, SVM_ISN + 1)
    assert rw.counters.restarted_flows == 0


def test_the_first_data_may_carry_the_handshakes_ack(rw: Rewriter) -> None:
    rw.to_guest(0, to(SYN, CLIENT_ISN))
    rw.from_guest(0, out(SYN | ACK, SVM_ISN, CLIENT_ISN + 1))
    packet = to(ACK | PSH | FIN, CLIENT_ISN + 1, PVM_ISN + 1, b"GET /")
    assert rw.to_guest(0, packet) == to(ACK | PSH | FIN, CLIENT_ISN + 1, SVM_ISN + 1, b"GET /")


@pytest.mark.parametrize("seq", [CLIENT_ISN, CLIENT_ISN + 2, CLIENT_ISN + 70000, CLIENT_ISN - 1000, 0])
def test_only_the_packet_after_the_syn_teaches(rw: Rewriter, seq: int) -> None:
    rw.to_guest(0, to(SYN, CLIENT_ISN))
    rw.from_guest(0, out(SYN | ACK, SVM_ISN, CLIENT_ISN + 1))
    assert rw.to_guest(0, to(ACK, seq, 123456)) == b""
    assert rw.counters.dropped == 1
    assert rw.to_guest(0, to(ACK, CLIENT_ISN + 1, PVM_ISN + 1)) == to(ACK, CLIENT_ISN + 1, SVM_ISN + 1)


@pytest.mark.parametrize("flags", [RST, RST | ACK])
def test_a_reset_in_the_handshake_passes_and_teaches_nothing(rw: Rewriter, flags: int) -> None:
    rw.to_guest(0, to(SYN, CLIENT_ISN))
    rw.from_guest(0, out(SYN | ACK, SVM_ISN, CLIENT_ISN + 1))
    assert rw.to_guest(0, to(flags, CLIENT_ISN + 1, 77)) is None
    assert rw.rewritten_flows == 0
    rw.expire(rewriter.HANDSHAKE_S)
    assert rw.flows == 0


def test_syn_cookies_the_last_number_of_the_svm_counts(established: Rewriter) -> None:
    other = SVM_ISN + 0x1234
    # The same SYN answered with another number; what the client acknowledged stands.
    assert established.from_guest(1, out(SYN | ACK, other, CLIENT_ISN + 1)) == out(
        SYN | ACK, PVM_ISN, CLIENT_ISN + 1
    )
    assert established.to_guest(1, to(ACK, CLIENT_ISN + 1, PVM_ISN + 1)) == to(ACK, CLIENT_ISN + 1, other + 1)


def test_a_handshake_without_the_clients_syn_is_learnt_from_the_syn_ack(rw: Rewriter) -> None:
    rw.from_guest(0, out(SYN | ACK, SVM_ISN, CLIENT_ISN + 1))
    assert rw.to_guest(0, to(ACK, CLIENT_ISN + 1, PVM_ISN + 1)) == to(ACK, CLIENT_ISN + 1, SVM_ISN + 1)


def test_the_end_of_the_handshake_echoes_a_timestamp_of_the_svm(rw: Rewriter) -> None:
    rw.to_guest(0, to(SYN, CLIENT_ISN, options=timestamps(10, 0)))
    rw.from_guest(0, out(SYN | ACK, SVM_ISN, CLIENT_ISN + 1, options=timestamps(700, 10)))
    packet = to(ACK, CLIENT_ISN + 1, PVM_ISN + 1, options=timestamps(11, 690))
    assert rw.to_guest(0, packet) == to(ACK, CLIENT_ISN + 1, SVM_ISN + 1, options=timestamps(11, 700))
    later = to(ACK, CLIENT_ISN + 1, PVM_ISN + 2, options=timestamps(11, 690))
    assert rw.to_guest(0, later) == to(ACK, CLIENT_ISN + 1, SVM_ISN + 2, options=timestamps(11, 690))


# -- connections that the guest opens


def test_a_connection_that_the_guest_opens(rw: Rewriter) -> None:
    for _ in range(2):
        assert rw.from_guest(0, out(SYN, SVM_ISN, options=timestamps(700, 0))) is None
    answer = to(SYN | ACK, 900, PVM_ISN + 1, options=timestamps(5, 690))
    want = to(SYN | ACK, 900, SVM_ISN + 1, options=timestamps(5, 700))
    assert rw.to_guest(0, answer) == want
    assert rw.to_guest(0, answer) == want
    assert rw.from_guest(0, out(ACK, SVM_ISN + 1, 901)) == out(ACK, PVM_ISN + 1, 901)
    # The SVM's SYN again (it lost the answer).
    assert rw.from_guest(0, out(SYN, SVM_ISN)) == out(SYN, PVM_ISN)
    assert rw.to_guest(0, to(ACK, 901, PVM_ISN + 1, b"220 ")) == to(ACK, 901, SVM_ISN + 1, b"220 ")


def test_a_refused_connection_is_refused_on_the_svm_too(rw: Rewriter) -> None:
    rw.from_guest(0, out(SYN, SVM_ISN))
    assert rw.to_guest(0, to(RST | ACK, 0, PVM_ISN + 1)) == to(RST | ACK, 0, SVM_ISN + 1)
    rw.expire(rewriter.LINGER_S)
    assert rw.flows == 0


def test_half_open_at_the_peer_the_svm_resets_as_the_pvm_does(rw: Rewriter) -> None:
    rw.from_guest(0, out(SYN, SVM_ISN))
    assert rw.to_guest(0, to(ACK, 1, 424242)) is None
    assert rw.from_guest(0, out(RST, 424242)) is None
    assert rw.to_guest(0, to(SYN | ACK, 900, PVM_ISN + 1)) == to(SYN | ACK, 900, SVM_ISN + 1)


def test_simultaneous_open(rw: Rewriter) -> None:
    rw.from_guest(0, out(SYN, SVM_ISN))
    assert rw.to_guest(0, to(SYN, CLIENT_ISN)) is None
    assert rw.from_guest(0, out(SYN | ACK, SVM_ISN, CLIENT_ISN + 1)) is None
    assert rw.to_guest(0, to(SYN | ACK, CLIENT_ISN, PVM_ISN + 1)) == to(SYN | ACK, CLIENT_ISN, SVM_ISN + 1)
    assert rw.from_guest(0, out(ACK, SVM_ISN + 1, CLIENT_ISN + 1)) == out(ACK, PVM_ISN + 1, CLIENT_ISN + 1)


def test_simultaneous_open_ended_by_a_plain_ack(rw: Rewriter) -> None:
    rw.from_guest(0, out(SYN, SVM_ISN))
    rw.to_guest(0, to(SYN, CLIENT_ISN))
    rw.from_guest(0, out(SYN | ACK, SVM_ISN, CLIENT_ISN + 1))
    assert rw.to_guest(0, to(ACK, CLIENT_ISN + 1, PVM_ISN + 1)) == to(ACK, CLIENT_ISN + 1, SVM_ISN + 1)


def test_a_failover_between_the_clients_syn_and_the_svms_answer(rw: Rewriter) -> None:
    rw.to_guest(0, to(SYN, CLIENT_ISN))
    assert rw.to_guest(0, to(ACK, CLIENT_ISN + 1, PVM_ISN + 1)) == b""
    rw.stop_learning()
    assert rw.from_guest(1, out(SYN | ACK, SVM_ISN, CLIENT_ISN + 1)) == out(
        SYN | ACK, PVM_ISN, CLIENT_ISN + 1
    )
    assert rw.take_held() == [to(ACK, CLIENT_ISN + 1, SVM_ISN + 1)]


def test_the_guest_opens_again_with_the_same_ports(rw: Rewriter) -> None:
    rw.from_guest(0, out(SYN, SVM_ISN))
    rw.to_guest(0, to(SYN | ACK, 900, PVM_ISN + 1))
    assert rw.from_guest(5, out(SYN, 111)) is None
    assert rw.rewritten_flows == 0
    assert rw.to_guest(5, to(SYN | ACK, 7, 222 + 1)) == to(SYN | ACK, 7, 111 + 1)


# -- reuse of a 4-tuple


def test_a_new_connection_on_the_same_ports(established: Rewriter) -> None:
    new_isn = CLIENT_ISN + 1_000_000
    assert established.to_guest(9, to(SYN, new_isn)) is None
    # Until the SVM agrees, the old connection stays mapped.
    old = to(ACK, CLIENT_ISN + 1, PVM_ISN + 1)
    assert established.to_guest(9, old) == to(ACK, CLIENT_ISN + 1, SVM_ISN + 1)
    assert established.from_guest(9, out(SYN | ACK, 42, new_isn + 1)) is None
    assert established.rewritten_flows == 0
    assert established.to_guest(9, old) == b""  # an old duplicate teaches nothing
    assert established.to_guest(9, to(ACK, new_isn + 1, 78)) == to(ACK, new_isn + 1, 43)
    assert established.from_guest(9, out(ACK, 43, new_isn + 1, b"x")) == out(ACK, 78, new_isn + 1, b"x")
    assert (established.flows, established.counters.restarted_flows) == (1, 1)


@pytest.mark.parametrize("pvm_isn", [PVM_ISN, SVM_ISN])
def test_on_a_reused_tuple_the_ack_may_come_first_too(rw: Rewriter, pvm_isn: int) -> None:
    handshake(rw, pvm_isn=pvm_isn)
    new_isn = CLIENT_ISN + 1_000_000
    rw.to_guest(9, to(SYN, new_isn))
    assert rw.to_guest(9, to(ACK, new_isn + 1, 78)) == b""
    assert rw.from_guest(9, out(SYN | ACK, 42, new_isn + 1)) == out(SYN | ACK, 77, new_isn + 1)
    assert rw.take_held() == [to(ACK, new_isn + 1, 43)]


def test_a_forged_syn_does_not_break_a_connection(established: Rewriter) -> None:
    established.to_guest(9, to(SYN, 4711))
    challenge = out(ACK, SVM_ISN + 1, CLIENT_ISN + 1)
    assert established.from_guest(9, challenge) == out(ACK, PVM_ISN + 1, CLIENT_ISN + 1)
    assert established.to_guest(9, to(ACK, 4712, PVM_ISN + 1)) == to(ACK, 4712, SVM_ISN + 1)
    assert established.rewritten_flows == 1


# -- the end of a connection


def close(rw: Rewriter, now_s: float) -> None:
    rw.from_guest(now_s, out(FIN | ACK, SVM_ISN + 1, CLIENT_ISN + 1, b"bye"))
    rw.to_guest(now_s, to(ACK, CLIENT_ISN + 1, PVM_ISN + 5))
    rw.to_guest(now_s, to(FIN | ACK, CLIENT_ISN + 1, PVM_ISN + 5))
    rw.from_guest(now_s, out(ACK, SVM_ISN + 5, CLIENT_ISN + 2))


def test_a_closed_connection_lingers(established: Rewriter) -> None:
    close(established, 100)
    established.expire(100 + rewriter.LINGER_S - 1)
    assert established.to_guest(150, to(FIN | ACK, CLIENT_ISN + 1, PVM_ISN + 5)) == to(
        FIN | ACK, CLIENT_ISN + 1, SVM_ISN + 5
    )
    established.expire(100 + rewriter.LINGER_S)
    assert (established.flows, established.rewritten_flows) == (0, 0)


def test_half_closed_connections_stay(established: Rewriter) -> None:
    established.from_guest(100, out(FIN | ACK, SVM_ISN + 1, CLIENT_ISN + 1, b"bye"))
    established.to_guest(100, to(ACK, CLIENT_ISN + 1, PVM_ISN + 5))
    established.expire(7000)
    assert established.rewritten_flows == 1


def test_the_svms_reset_ends_the_flow(established: Rewriter) -> None:
    assert established.from_guest(100, out(RST, SVM_ISN + 1)) == out(RST, PVM_ISN + 1)
    established.to_guest(150, to(ACK, CLIENT_ISN + 1, PVM_ISN + 1))
    established.expire(100 + rewriter.LINGER_S)
    assert established.flows == 0


def test_a_closed_ports_reset_has_no_sequence_number(established: Rewriter) -> None:
    assert established.from_guest(100, out(RST | ACK, 0, 4712)) is None


def test_the_clients_reset_ends_the_flow_unless_the_svm_goes_on(established: Rewriter) -> None:
    established.from_guest(90, out(ACK, SVM_ISN + 1, CLIENT_ISN + 1))
    packet = to(RST | ACK, CLIENT_ISN + 1, PVM_ISN + 1)
    assert established.to_guest(100, packet) == to(RST | ACK, CLIENT_ISN + 1, SVM_ISN + 1)
    established.from_guest(101, out(ACK, SVM_ISN + 1, CLIENT_ISN + 1))  # a challenge ACK (RFC 5961)
    established.expire(1000)
    assert established.rewritten_flows == 1
    established.to_guest(1000, packet)
    established.expire(1000 + rewriter.LINGER_S)
    assert established.flows == 0


def test_a_reset_out_of_the_window_ends_nothing(established: Rewriter) -> None:
    assert established.to_guest(100, to(RST, CLIENT_ISN + 0x40000000)) is None
    established.expire(1000)
    assert established.rewritten_flows == 1


def test_idle_flows_are_forgotten() -> None:
    rw = Rewriter(idle_s=100)
    handshake(rw)
    rw.from_guest(50, out(ACK, SVM_ISN + 1))
    rw.expire(149)
    assert rw.flows == 1
    rw.expire(150)
    assert rw.flows == 0


def test_a_connection_that_only_keeps_itself_alive_stays(established: Rewriter) -> None:
    established.stop_learning()
    for hours in (3, 5, 40):  # RFC 1122, 4.2.3.6: no more often than every two hours
        now_s = hours * 3600.0
        established.expire(now_s)
        assert established.from_guest(now_s, out(ACK, SVM_ISN)) == out(ACK, PVM_ISN)
        assert established.to_guest(now_s, to(ACK, CLIENT_ISN + 1, PVM_ISN + 1)) == to(
            ACK, CLIENT_ISN + 1, SVM_ISN + 1
        )


# -- checkpoint and failover


def test_a_checkpoint_forgets_all(established: Rewriter) -> None:
    established.to_guest(0, to(SYN, 1, cport=2))
    established.reset()
    assert (established.flows, established.rewritten_flows, established.counters.resets) == (0, 0, 1)
    assert established.from_guest(0, out(ACK, PVM_ISN + 1, CLIENT_ISN + 1)) is None
    assert established.to_guest(0, to(ACK, CLIENT_ISN + 1, PVM_ISN + 1)) is None


def test_a_checkpoint_within_the_handshake(rw: Rewriter) -> None:
    rw.to_guest(0, to(SYN, CLIENT_ISN))
    rw.from_guest(0, out(SYN | ACK, SVM_ISN, CLIENT_ISN + 1))
    rw.reset()
    # The client's ACK just after it: the SVM has the PVM's number.
    assert rw.to_guest(0, to(ACK, CLIENT_ISN + 1, PVM_ISN + 1)) is None


def test_a_checkpoint_within_the_handshake_then_the_syn_ack_again(rw: Rewriter) -> None:
    rw.to_guest(0, to(SYN, CLIENT_ISN))
    rw.reset()
    assert rw.from_guest(0, out(SYN | ACK, PVM_ISN, CLIENT_ISN + 1)) is None
    assert rw.to_guest(0, to(ACK, CLIENT_ISN + 1, PVM_ISN + 1, b"GET")) == to(
        ACK, CLIENT_ISN + 1, PVM_ISN + 1, b"GET"
    )
    assert rw.rewritten_flows == 0


@pytest.mark.parametrize(
    "sign",
    [
        (ACK | PSH, PVM_ISN + 1, CLIENT_ISN + 1, b"220 hello"),
        (ACK, PVM_ISN + 1, CLIENT_ISN + 10),
        (ACK | FIN, PVM_ISN + 1, CLIENT_ISN + 1),
    ],
)
def test_a_syn_ack_that_crossed_the_handshakes_ack(rw: Rewriter, sign: tuple[Any, ...]) -> None:
    # After a checkpoint: the client's ACK passed, and then came the SYN-ACK that the SVM had sent again before it.
    rw.reset()
    assert rw.to_guest(0, to(ACK, CLIENT_ISN + 1, PVM_ISN + 1)) is None
    rw.from_guest(0, out(SYN | ACK, PVM_ISN, CLIENT_ISN + 1))
    assert rw.from_guest(0, out(*sign)) is None
    # Acknowledges data, at the sequence number that teaches.
    assert rw.to_guest(0, to(ACK, CLIENT_ISN + 1, PVM_ISN + 10)) is None
    assert rw.rewritten_flows == 0


def test_a_challenge_ack_in_the_handshake_is_no_sign_that_it_ended(rw: Rewriter) -> None:
    rw.to_guest(0, to(SYN, CLIENT_ISN))
    rw.from_guest(0, out(SYN | ACK, SVM_ISN, CLIENT_ISN + 1))
    assert rw.from_guest(0, out(ACK, SVM_ISN + 1, CLIENT_ISN + 1)) is None
    assert rw.to_guest(0, to(ACK, CLIENT_ISN + 1, PVM_ISN + 1)) == to(ACK, CLIENT_ISN + 1, SVM_ISN + 1)


def test_fast_open_data_before_the_handshakes_end(rw: Rewriter) -> None:
    rw.to_guest(0, to(SYN, CLIENT_ISN, payload=b"GET"))
    rw.from_guest(0, out(SYN | ACK, SVM_ISN, CLIENT_ISN + 4))
    assert rw.from_guest(0, out(ACK, SVM_ISN + 1, CLIENT_ISN + 4, b"200")) is None
    assert rw.to_guest(0, to(ACK, CLIENT_ISN + 4, PVM_ISN + 1)) == to(ACK, CLIENT_ISN + 4, SVM_ISN + 1)


def test_after_failover_old_connections_stay_and_new_ones_are_the_svms_own(established: Rewriter) -> None:
    half = {"cport": 2}
    established.to_guest(0, to(SYN, CLIENT_ISN, **half))
    established.from_guest(0, out(SYN | ACK, SVM_ISN, CLIENT_ISN + 1, **half))
    established.stop_learning()
    packet = to(ACK, CLIENT_ISN + 1, PVM_ISN + 1)
    assert established.to_guest(1, packet) == to(ACK, CLIENT_ISN + 1, SVM_ISN + 1)
    # The client got the PVM's SYN-ACK before the failover.
    assert established.to_guest(1, to(ACK, CLIENT_ISN + 1, 78, **half)) == to(
        ACK, CLIENT_ISN + 1, SVM_ISN + 1, **half
    )
    # A forged handshake: its ACK must reach the SVM as it is.
    forged = {"cport": 3}
    established.to_guest(1, to(SYN, 1, **forged))
    assert established.from_guest(1, out(SYN | ACK, 999, 2, **forged)) is None
    assert established.to_guest(1, to(ACK, 2, 123, **forged)) is None
    # Ports used again.
    established.to_guest(1, to(SYN, 1))
    assert established.from_guest(1, out(SYN | ACK, 999, 2)) is None
    assert established.to_guest(1, to(ACK, 2, 1000)) is None
    assert established.flows == 1


# -- limits, checksums, ICMP


def test_mapped_flows_outlive_a_flood_of_syns() -> None:
    rw = Rewriter(limit_flows=64)
    handshake(rw)
    for number in range(1000):
        rw.to_guest(number / 1000, to(SYN, number, cport=1000 + number))
        rw.from_guest(number / 1000, out(SYN | ACK, number, number + 1, cport=1000 + number))
        assert rw.flows <= 64
    assert rw.rewritten_flows == 1
    assert rw.counters.evicted_flows > 900


def test_the_oldest_mapped_flow_goes_when_all_are_mapped() -> None:
    rw = Rewriter(limit_flows=8)
    for number in range(9):
        handshake(rw, now_s=number, cport=number + 1)
    assert rw.rewritten_flows == 8
    assert rw.from_guest(9, out(ACK, SVM_ISN + 1, cport=1)) is None
    assert rw.from_guest(9, out(ACK, SVM_ISN + 1, cport=2)) is not None


def test_wrong_checksums_stay_wrong(established: Rewriter) -> None:
    packet = bytearray(out(ACK, SVM_ISN + 1, 0, b"data"))
    packet[-1] ^= 0xFF
    rewritten = established.from_guest(0, bytes(packet))
    assert rewritten is not None
    assert finish_checksum(rewritten) != rewritten


def test_a_checksum_left_to_the_device_can_be_finished() -> None:
    whole = out(ACK, 1, 2, b"odd")
    start = 40 if Family.v6 else 20
    assert finish_checksum(whole[: start + 16] + b"\x12\x34" + whole[start + 18 :]) == whole


def icmp_error(quoted: bytes, kind: int = 3) -> bytes:
    if Family.v6:
        body = struct.pack("!BBHI", {3: 2, 8: 128}[kind], 0, 0, 1400) + quoted
        addresses = CLIENT6 + GUEST6
        checksum = 0xFFFF - words_sum(addresses + struct.pack("!II", len(body), 58) + body)
        body = body[:2] + struct.pack("!H", checksum) + body[4:]
        return struct.pack("!IHBB", 6 << 28, len(body), 58, 64) + addresses + body
    body = struct.pack("!BBHI", kind, 4, 0, 1400) + quoted
    body = body[:2] + struct.pack("!H", 0xFFFF - words_sum(body)) + body[4:]
    return struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, 1, 0) + CLIENT + GUEST + body


def test_icmp_errors_quote_the_svms_number(established: Rewriter) -> None:
    def error(isn: int) -> bytes:
        return icmp_error(out(ACK, isn + 1, CLIENT_ISN + 1, b"x" * 1460)[: 48 if Family.v6 else 28])

    assert established.to_guest(0, error(PVM_ISN)) == error(SVM_ISN)
    assert established.to_guest(0, error(PVM_ISN)[:-1]) is None  # quotes too little
    assert established.to_guest(0, icmp_error(b"ping" * 20, kind=8)) is None
    other = out(ACK, PVM_ISN, cport=7)[: 48 if Family.v6 else 28]
    assert established.to_guest(0, icmp_error(other)) is None


# -- the next failover


@pytest.fixture
def heir(established: Rewriter) -> Rewriter:
    """Of the next backup host, whose SVM is a copy of the one that has become the guest."""
    (connection,) = established.connections()
    assert (connection.guest_port, connection.client_port, connection.offset) == (GPORT, CPORT, OFFSET)
    made = Rewriter()
    made.inherit(0, [Connection.parse(connection.listed())])
    return made


def test_a_connection_lives_through_the_next_failover_too(heir: Rewriter) -> None:
    mirrored = to(ACK, CLIENT_ISN + 1, SVM_ISN + 1, b"GET")  # behind the rewriter of the PVM's host
    answer = out(ACK, SVM_ISN + 1, CLIENT_ISN + 4, b"200")  # before it
    assert heir.to_guest(1, mirrored) is None and heir.from_guest(1, answer) is None
    heir.reset()
    heir.stop_learning()
    assert heir.to_guest(2, to(ACK, CLIENT_ISN + 1, PVM_ISN + 1, b"GET")) == mirrored
    assert heir.from_guest(2, answer) == out(ACK, PVM_ISN + 1, CLIENT_ISN + 4, b"200")
    assert [connection.offset for connection in heir.connections()] == [OFFSET], (
        "and through the one after that"
    )


@pytest.mark.parametrize("flags", [SYN | ACK, SYN])
def test_another_connection_in_the_place_of_one_that_was_inherited(heir: Rewriter, flags: int) -> None:
    heir.to_guest(1, to(SYN, 7))
    heir.from_guest(1, out(flags, 900, 8 if flags & ACK else 0))
    heir.reset()
    heir.stop_learning()
    assert heir.from_guest(2, out(ACK, 901, 8, b"hello")) is None
    assert heir.rewritten_flows == 0


def test_a_syn_does_not_end_what_was_inherited(heir: Rewriter) -> None:
    """It may be old or forged."""
    heir.to_guest(1, to(SYN, 7))
    heir.stop_learning()
    challenge = out(ACK, SVM_ISN + 1, CLIENT_ISN + 1)
    assert heir.from_guest(2, challenge) == out(ACK, PVM_ISN + 1, CLIENT_ISN + 1)
    assert heir.from_guest(3, challenge) == out(ACK, PVM_ISN + 1, CLIENT_ISN + 1)


def test_what_has_ended_is_not_inherited(established: Rewriter) -> None:
    established.from_guest(1, out(RST, SVM_ISN + 1))
    assert established.connections() == []


@pytest.mark.parametrize(
    "listed",
    [
        None,
        [],
        ["10.0.0.1", 80, "10.0.0.2", 5000],
        ["10.0.0.1", 80, "10.0.0.2", 5000, 1 << 32],
        ["10.0.0.1", 80, "10.0.0.2", 65536, 1],
        ["10.0.0.1", True, "10.0.0.2", 5000, 1],
        ["10.0.0.1", 80, "fe80::1", 5000, 1],
        ["x", 80, "10.0.0.2", 5000, 1],
    ],
)
def test_what_is_no_connection(listed: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        Connection.parse(listed)
