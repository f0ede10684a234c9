# SPDX-License-Identifier: LGPL-2.1-or-later
"""The comparator, rule by rule."""

from __future__ import annotations

import struct

import pytest
from packets import ACK, FIN, HOLD, MASK, RST, SYN, Bench, ipv4, ipv6, tcp, udp

from remus_colo.errors import StateError
from remus_colo.proxy.comparator import Reason, describe


def echo(ident: int, data: bytes, checksum: int = 0, sequence: int = 1) -> bytes:
    return ipv4(1, struct.pack(">BBHHH", 0, 0, checksum, ident, sequence) + data)


def test_syn_ack_waits_for_the_svms_own_and_numbers_do_not_matter():
    bench = Bench()
    assert bench.p(tcp(100, 50, SYN | ACK)) == HOLD
    assert bench.s(tcp(7777, 50, SYN | ACK)) == ((1,), None)
    assert bench.p(tcp(100, 50, SYN | ACK)) == ((2,), None), "repeated"
    assert bench.s(tcp(100, 50, SYN | ACK)) == HOLD, "repeated, through a rewriter that knows the offset now"
    assert bench.p(tcp(101, 50, ACK, b"a")) == HOLD
    assert bench.s(tcp(101, 50, ACK, b"a")) == ((3,), None)


def test_svm_first():
    bench = Bench()
    assert bench.s(tcp(7777, 50, SYN | ACK)) == HOLD
    assert bench.p(tcp(100, 50, SYN | ACK)) == ((1,), None)
    bench.s(tcp(101, 60, ACK, b"hello world"))
    assert bench.p(tcp(101, 60, ACK, b"hello")) == ((2,), None)
    assert bench.p(tcp(106, 60, ACK, b" world")) == ((3,), None)


def test_a_superpacket_of_the_svm_releases_what_it_covers():
    bench = Bench().connect()
    for start in range(0, 5000, 1000):
        assert bench.p(tcp(101 + start, 50, ACK, bytes(1000))) == HOLD
    assert bench.s(tcp(101, 50, ACK, bytes(4500))) == ((2, 3, 4, 5), None)
    assert bench.s(tcp(4601, 50, ACK, bytes(500))) == ((6,), None)


def test_headers_that_may_differ():
    bench = Bench().connect()
    bench.p(tcp(101, 50, ACK, b"data", window=1, ident=7, ttl=1, tos=3, options=b"\1\1\1\1"))
    assert bench.s(tcp(101, 50, ACK | 8, b"data", window=2, ident=9)) == ((2,), None)


def test_ethernet_padding_is_no_data():
    bench = Bench().connect()
    bench.p(tcp(101, 50, ACK, b"ab") + b"\0\0\0\0")
    assert bench.s(tcp(101, 50, ACK, b"ab") + b"xxxx") == ((2,), None)


def test_ack_beyond_the_svms_is_held_and_times_out():
    bench = Bench().connect()
    assert bench.p(tcp(101, 60)) == HOLD
    assert bench.s(tcp(101, 59)) == HOLD
    assert bench.s(tcp(101, 61)) == ((2,), None)
    assert bench.p(tcp(101, 70)) == HOLD
    assert bench.comparator.next_deadline_s == 1.0
    assert bench.tick(0.99) == HOLD
    assert bench.tick(1.0) == ((), Reason.TCP_TIMEOUT)
    assert bench.tick(9.0) == HOLD and bench.comparator.next_deadline_s is None, "asked once"
    assert bench.cut() == 1
    assert bench.commit() == ((3,), None)
    bench.resume()
    assert bench.p(tcp(101, 70)) == ((4,), None), "the SVM is a copy that has acknowledged it"
    assert bench.p(tcp(101, 71)) == HOLD


def test_the_oldest_packet_that_waits():
    bench = Bench().connect()
    assert bench.comparator.oldest_s is None
    bench.now_s = 1.0
    bench.p(tcp(101, 60))
    bench.now_s = 1.25
    bench.p(udp(b"datagram"))
    assert bench.comparator.oldest_s == 1.0
    assert bench.s(tcp(101, 60)) == ((2,), None)
    assert bench.comparator.oldest_s == 1.25
    bench.now_s = 2.0
    bench.cut()
    bench.p(udp(b"of the next epoch"))
    assert bench.comparator.oldest_s == 1.25
    bench.commit()
    assert bench.comparator.oldest_s == 2.0
    bench.now_s = 3.0
    bench.resume()
    assert bench.comparator.oldest_s == 2.0, "it waits for its equal as it did for the SVM"
    bench.cut()
    bench.p(udp(b"of an epoch that never was"))
    bench.now_s = 4.0
    bench.abort()
    assert bench.comparator.oldest_s == 2.0
    bench.comparator.release_all(5.0)
    assert bench.comparator.oldest_s is None


def test_ack_numbers_wrap():
    bench = Bench().connect(ack=MASK - 1)
    assert bench.p(tcp(101, 3)) == HOLD
    assert bench.s(tcp(101, 3)) == ((2,), None)
    assert bench.p(tcp(101, MASK)) == ((3,), None)


def test_packets_without_sequence_space_never_wait_for_payload():
    bench = Bench().connect()
    bench.p(tcp(101, 50, ACK, b"abc"))
    bench.s(tcp(101, 50, ACK, b"abc"))
    for probe in (tcp(104, 50), tcp(103, 50), tcp(103, 50, ACK, b"\0"), tcp(104, 50, window=0), tcp(104, 50)):
        assert bench.p(probe) == ((bench.count,), None)
    assert bench.comparator.next_deadline_s is None
    bench.p(tcp(104, 50, ACK, b"d"))
    assert bench.s(tcp(104, 50, ACK, b"d")) == ((bench.count,), None)


def test_a_keepalive_as_first_packet_of_an_open_connection():
    bench = Bench()
    assert bench.p(tcp(499, 50)) == HOLD
    assert bench.s(tcp(499, 50)) == ((1,), None)
    bench.p(tcp(500, 50, ACK, b"data"))
    assert bench.s(tcp(500, 50, ACK, b"data")) == ((2,), None)
    bench.checkpoint()
    assert bench.p(tcp(503, 50)) == ((3,), None)


def test_open_connection_starts_at_the_first_pvm_byte():
    bench = Bench()
    bench.s(tcp(990, 50, ACK, b"0123456789abcdef"))
    assert bench.p(tcp(1000, 50, ACK, b"abcd")) == ((1,), None)
    assert bench.p(tcp(1004, 50, ACK, b"eX")) == ((), Reason.TCP_PAYLOAD)


def test_sequence_numbers_wrap():
    bench = Bench().connect(isn=MASK - 2)
    bench.p(tcp(MASK - 1, 50, ACK, b"abcdef"))
    bench.s(tcp(3, 50, ACK, b"f"))
    assert bench.s(tcp(MASK - 1, 50, ACK, b"abcde")) == ((2,), None)


def test_a_difference_asks_at_once_names_its_place_and_holds_its_flow_alone():
    bench = Bench().connect().connect(port=5000)
    bench.p(tcp(101, 50, ACK, b"0123456789"))
    decision = bench.comparator.secondary(0.0, tcp(101, 50, ACK, b"0123X56789"))
    assert decision.checkpoint.reason is Reason.TCP_PAYLOAD
    assert "10.0.0.1:80 > 10.0.0.2:4000" in decision.checkpoint.detail
    assert "byte 4 (sequence 105): PVM 0x34, SVM 0x58" in decision.checkpoint.detail
    assert bench.p(tcp(101, 50)) == HOLD, "the flow holds pure ACKs, too"
    bench.p(tcp(101, 50, ACK, b"x", port=5000))
    assert bench.s(tcp(101, 50, ACK, b"x", port=5000)) == ((5,), None), "other flows go on"
    bench.p(tcp(102, 50, ACK, b"y", port=5000))
    assert bench.s(tcp(102, 50, ACK, b"z", port=5000)) == HOLD, "one request until the cut"
    assert bench.comparator.counters.diverged == 2
    assert bench.cut() == 3
    assert bench.commit() == ((3, 4, 6), None)
    bench.resume()
    bench.p(tcp(111, 50, ACK, b"on"))
    assert bench.s(tcp(111, 50, ACK, b"on")) == ((7,), None)


@pytest.mark.parametrize("svm_has_fin", [False, True])
def test_fin_against_data(svm_has_fin):
    bench = Bench().connect()
    one, other = tcp(101, 50, FIN | ACK, b"ab"), tcp(101, 50, ACK, b"abc")
    bench.p(other if svm_has_fin else one)
    assert bench.s(one if svm_has_fin else other) == ((), Reason.TCP_PAYLOAD)


def test_fin_on_both_sides():
    bench = Bench().connect()
    bench.p(tcp(101, 50, FIN | ACK, b"ab"))
    assert bench.s(tcp(101, 50, ACK, b"ab")) == HOLD
    assert bench.s(tcp(103, 50, FIN | ACK)) == ((2,), None)
    assert bench.p(tcp(103, 50, FIN | ACK)) == ((3,), None), "repeated"
    bench.s(tcp(104, 51))
    assert bench.p(tcp(104, 51)) == ((4,), None)


@pytest.mark.parametrize(
    "second", [tcp(101, 50, ACK, b"aX"), tcp(101, 50, FIN | ACK, b"a"), tcp(102, 50, FIN | ACK)]
)
def test_a_pvm_that_contradicts_itself_diverges(second):
    bench = Bench().connect()
    bench.p(tcp(101, 50, ACK, b"ab"))
    assert bench.p(second) == ((), Reason.TCP_PAYLOAD)
    assert bench.s(tcp(101, 50, ACK, b"ab")) == HOLD


def test_pvm_data_behind_its_fin_diverges():
    bench = Bench().connect()
    bench.p(tcp(101, 50, FIN | ACK))
    assert bench.p(tcp(101, 50, ACK, b"ab")) == ((), Reason.TCP_PAYLOAD)


def test_a_fin_sent_while_diverged_is_known_after_the_checkpoint():
    bench = Bench().connect()
    bench.p(tcp(101, 50, ACK, b"ab"))
    assert bench.s(tcp(101, 50, ACK, b"aX")) == ((), Reason.TCP_PAYLOAD)
    bench.p(tcp(103, 50, FIN | ACK))
    bench.checkpoint()
    assert bench.p(tcp(103, 50, FIN | ACK)) == ((4,), None)


def test_rst_on_both_and_on_one_side():
    bench = Bench().connect()
    assert bench.p(tcp(101, 0, RST)) == HOLD
    assert bench.s(tcp(101, 0, RST)) == ((2,), None)
    bench.connect(port=5000)
    bench.p(tcp(101, 0, RST, port=5000))
    assert bench.tick(1.0) == ((), Reason.TCP_TIMEOUT)
    assert bench.checkpoint() == (4,)
    bench.connect(port=6000)
    assert bench.s(tcp(101, 0, RST, port=6000)) == HOLD
    assert bench.comparator.next_deadline_s == 2.0
    assert bench.tick(2.0) == ((), Reason.TCP_TIMEOUT), "of the SVM alone: it is no replica any more"


def test_a_new_syn_starts_a_new_connection_at_each_sides_pace():
    bench = Bench().connect()
    bench.p(tcp(101, 50, ACK, b"old"))
    bench.s(tcp(101, 50, ACK, b"old"))
    bench.s(tcp(12, 900, SYN | ACK))
    bench.s(tcp(70001, 900, ACK, b"new"))
    assert bench.p(tcp(104, 50)) == ((3,), None), "still the old one on the PVM"
    assert bench.p(tcp(70000, 900, SYN | ACK)) == ((4,), None)
    assert bench.p(tcp(70001, 900, ACK, b"new")) == ((5,), None)
    assert bench.p(tcp(90000, 1000, SYN | ACK)) == HOLD
    assert bench.s(tcp(70004, 900, FIN | ACK)) == HOLD
    assert bench.s(tcp(13, 1000, SYN | ACK)) == ((6,), None)


def test_guest_as_client():
    bench = Bench()
    bench.p(tcp(100, 0, SYN))
    assert bench.s(tcp(900, 0, SYN)) == ((1,), None)
    bench.p(tcp(101, 71, ACK))
    assert bench.s(tcp(101, 71, ACK)) == ((2,), None)


def test_data_in_a_syn():
    bench = Bench()
    bench.s(tcp(900, 50, SYN | ACK, b"fast"))
    assert bench.p(tcp(100, 50, SYN | ACK, b"fast")) == ((1,), None)
    other = Bench()
    other.s(tcp(900, 50, SYN | ACK, b"fast"))
    assert other.p(tcp(100, 50, SYN | ACK, b"fart")) == ((), Reason.TCP_PAYLOAD)


def test_new_epoch_waits_for_the_commit_even_if_nothing_is_to_be_compared():
    bench = Bench().connect()
    bench.p(tcp(101, 50, ACK, b"abcd"))
    assert bench.cut() == 1
    assert bench.p(tcp(101, 50, ACK, b"abcd")) == HOLD, "a repeat of what the commit covers"
    assert bench.p(tcp(105, 50, ACK, b"e")) == HOLD
    assert bench.p(b"\0" * 28, 0x0806) == ((5,), None), "ARP passes at any time"
    assert bench.commit() == ((2, 3), None)
    assert bench.p(tcp(101, 50, ACK, b"abcd")) == HOLD, "behind a packet that waits"
    assert bench.s(tcp(105, 50, ACK, b"e")) == HOLD, "not from the new SVM"
    assert bench.tick(50.0) == HOLD and bench.comparator.next_deadline_s is None
    bench.resume()
    assert bench.comparator.next_deadline_s == 51.0
    assert bench.s(tcp(105, 50, ACK, b"e")) == ((4, 6), None)


def test_resumed_before_committed():
    bench = Bench().connect()
    bench.p(tcp(101, 50, ACK, b"a"))
    bench.cut()
    bench.p(tcp(102, 50, ACK, b"b"))
    bench.resume()
    assert bench.s(tcp(102, 50, ACK, b"b")) == HOLD
    assert bench.commit() == ((2, 3), None)


def test_nothing_leaves_before_the_commit_although_nothing_waits_before_it():
    bench = Bench().connect()
    bench.cut()
    assert bench.p(tcp(101, 50)) == HOLD, "agreed on before the cut"
    assert bench.p(udp(b"x")) == HOLD
    bench.resume()
    assert bench.s(udp(b"x")) == HOLD
    assert bench.p(tcp(101, 50)) == HOLD
    assert bench.commit() == ((2, 4, 3), None)


def test_a_syn_that_a_checkpoint_covers_may_be_repeated():
    bench = Bench()
    bench.p(tcp(100, 50, SYN | ACK))
    assert bench.checkpoint() == (1,)
    assert bench.p(tcp(100, 50, SYN | ACK)) == ((2,), None)
    assert bench.s(tcp(100, 50, SYN | ACK)) == HOLD
    bench.p(tcp(101, 50, ACK, b"a"))
    assert bench.s(tcp(101, 50, ACK, b"a")) == ((3,), None)


def test_svm_output_from_before_the_cut_is_dropped():
    bench = Bench().connect()
    bench.s(tcp(101, 99, ACK, b"from another history"))
    bench.s(udp(b"x"))
    bench.checkpoint()
    assert bench.p(udp(b"x")) == HOLD
    assert bench.p(tcp(101, 50, ACK, b"from")) == HOLD
    assert bench.s(tcp(101, 50, ACK, b"from")) == ((3,), None)


def test_abort_compares_both_epochs_with_the_old_svm():
    bench = Bench().connect()
    bench.s(tcp(101, 50, ACK, b"abcdef"))
    bench.s(udp(b"early"))
    bench.s(udp(b"early", port=55))
    bench.p(tcp(101, 50, ACK, b"abX"))
    bench.p(udp(b"one", port=54))
    bench.now_s = 0.9
    assert bench.cut() == 2
    bench.now_s = 2.0
    bench.p(udp(b"early"))
    bench.p(udp(b"two", port=54))
    assert bench.s(udp(b"one", port=54)) == HOLD
    assert bench.abort() == ((4, 3), None)
    assert bench.s(udp(b"two", port=54)) == ((5,), None)
    assert bench.comparator.next_deadline_s == 3.0
    bench.now_s = 2.5
    assert bench.p(udp(b"early", port=55)) == ((6,), None), "what the SVM said has not aged meanwhile"
    assert bench.tick(3.0) == ((), Reason.TCP_PAYLOAD), "the difference is still there"
    assert bench.checkpoint() == (2,)


def test_abort_joins_fragments_across_the_cut():
    bench = Bench()
    whole = udp(b"x" * 24)[20:]
    bench.p(ipv4(17, whole[:16], 1, 0x2000))
    bench.cut()
    assert bench.p(ipv4(17, whole[16:], 1, 2)) == HOLD
    assert bench.abort() == HOLD
    assert bench.s(udp(b"x" * 24)) == ((1, 2), None)


def test_remus_without_an_svm():
    bench = Bench()
    for epoch in range(3):
        bench.p(udp(b"x"))
        assert bench.cut() == 1
        assert bench.commit() == ((epoch + 1,), None)


def test_cut_and_commit_come_in_pairs():
    bench = Bench()
    for call in (bench.comparator.commit, bench.comparator.abort_cut):
        with pytest.raises(StateError):
            call(0.0)
    bench.cut()
    with pytest.raises(StateError):
        bench.cut()
    bench.resume()
    with pytest.raises(StateError):
        bench.comparator.abort_cut(0.0)


def test_release_all_in_order_of_arrival_and_from_then_on_at_once():
    bench = Bench().connect()
    bench.p(udp(b"x"))
    bench.cut()
    bench.p(tcp(101, 50, ACK, b"a"))
    assert bench._out(bench.comparator.release_all(0.0)) == ((2, 3), None)
    assert bench.p(udp(b"y")) == ((4,), None)
    assert bench.s(udp(b"z")) == HOLD
    assert bench.cut() == 0 and bench.tick(99.0) == HOLD


def test_udp_matches_anywhere_and_leaves_at_once():
    bench = Bench()
    bench.p(udp(b"a", ident=1))
    bench.p(udp(b"b"))
    bench.p(udp(b"b"))
    assert bench.s(udp(b"b", ident=2)) == ((2,), None), "not held up by what the SVM may have lost"
    assert bench.s(udp(b"a")) == ((1,), None)
    assert bench.s(udp(b"b", port=54)) == HOLD, "another flow"
    assert bench.tick(1.0) == ((), Reason.UDP_TIMEOUT)


def test_an_early_svm_datagram_ages():
    bench = Bench()
    bench.s(udp(b"a"))
    bench.now_s = 1.0
    assert bench.p(udp(b"a")) == HOLD
    assert bench.comparator.counters.secondary_dropped == 1


def test_icmp_echo_by_id_sequence_and_content():
    bench = Bench()
    bench.p(echo(1, b"data"))
    assert bench.s(echo(2, b"data")) == HOLD
    assert bench.s(echo(1, b"date", sequence=2)) == HOLD
    assert bench.s(echo(1, b"data", checksum=5)) == ((1,), None)
    bench.p(echo(1, b"data"))
    assert bench.tick(1.0) == ((), Reason.ICMP_TIMEOUT)


@pytest.mark.parametrize("pvm_first", [True, False])
def test_two_answers_to_one_echo_request_differ_at_once(pvm_first):
    bench = Bench()
    one, other = (bench.p, bench.s) if pvm_first else (bench.s, bench.p)
    assert one(echo(1, b"data")) == HOLD
    assert other(echo(1, b"date")) == ((), Reason.ICMP_PAYLOAD)


def test_icmp_error_may_quote_another_ip_header():
    bench = Bench()
    quoted = udp(b"12345678", ident=4)[:28], udp(b"12345678", ident=5, ttl=63, tos=1)[:28]
    bench.p(ipv4(1, b"\3\3\0\0\0\0\0\0" + quoted[0]))
    assert bench.s(ipv4(1, b"\3\3\1\1\0\0\0\0" + quoted[1])) == ((1,), None)
    bench.p(ipv4(1, b"\3\1\0\0\0\0\0\0" + tcp(1, 5)))
    assert bench.s(ipv4(1, b"\3\1\0\0\0\0\0\0" + tcp(1, 6))) == ((2,), None), "the ACK that the rewriter maps"
    bench.p(ipv4(1, b"\3\1\0\0\0\0\0\0" + tcp(1, 5)))
    assert bench.s(ipv4(1, b"\3\1\0\0\0\0\0\0" + tcp(2, 5))) == HOLD


@pytest.mark.parametrize(
    ("packet", "ethertype"),
    [
        (b"\0" * 28, 0x0806),
        (b"", 0x88CC),
        (ipv4(2, b"\x16\0\0\0"), 0x0800),
        *[
            (ipv6(58, bytes([kind]) + bytes(7)), 0x86DD)
            for kind in (130, 131, 132, 133, 134, 135, 136, 137, 143)
        ],
        (ipv6(0, b"\x3a\0\5\2\0\0\1\0" + b"\x8f" + bytes(7)), 0x86DD),
    ],
)
def test_passes_at_once_from_the_pvm_and_is_dropped_from_the_svm(packet, ethertype):
    bench = Bench()
    assert bench.p(packet, ethertype) == ((1,), None)
    assert bench.s(packet, ethertype) == HOLD
    assert bench.comparator.counters.released_passed == bench.comparator.counters.secondary_dropped == 1


@pytest.mark.parametrize(
    ("packet", "ethertype", "reason"),
    [
        (ipv6(17, b"\0\1\0\2\0\x0f\0\0payload"), 0x86DD, Reason.UDP_TIMEOUT),
        (ipv6(58, b"\x04\0\0\0whole payload"), 0x86DD, Reason.ICMP_TIMEOUT),
        (ipv6(47, b"gre"), 0x86DD, Reason.OTHER_TIMEOUT),
        (ipv4(47, b"gre"), 0x0800, Reason.OTHER_TIMEOUT),
        (b"\0\7\x08\0" + udp(b"x"), 0x8100, Reason.UDP_TIMEOUT),
        (b"\0\7\x81\0\0\x09\x08\0" + udp(b"x"), 0x88A8, Reason.UDP_TIMEOUT),
    ],
)
def test_others_by_flow_and_payload(packet, ethertype, reason):
    bench = Bench()
    assert bench.p(packet, ethertype) == HOLD
    assert bench.s(packet[:-1] + b"?", ethertype) == HOLD
    assert bench.s(packet, ethertype) == ((1,), None)
    bench.p(packet, ethertype)
    assert bench.tick(1.0) == ((), reason)


@pytest.mark.parametrize(
    ("packet", "ethertype"),
    [
        (b"", 0x0800),
        (b"\x45" * 19, 0x0800),
        (b"\x65" + bytes(40), 0x0800),
        (b"\x44" + udp(b"")[1:], 0x0800),
        (udp(b"abc")[:-1], 0x0800),
        (ipv4(17, b"1234567"), 0x0800),
        (ipv4(17, b"\0\1\0\2\0\7\0\0"), 0x0800),
        (ipv4(17, b"\0\1\0\2\0\x19\0\0"), 0x0800),
        (ipv4(6, bytes(19)), 0x0800),
        (ipv4(6, bytes(12) + b"\x40" + bytes(7)), 0x0800),
        (ipv4(6, bytes(12) + b"\x60" + bytes(7)), 0x0800),
        (ipv4(1, b"\0\0\0\0"), 0x0800),
        (ipv4(17, b"", fragment=0x2000), 0x0800),
        (ipv4(17, b"123", fragment=0x2000), 0x0800),
        (ipv4(17, b"123", fragment=0x1FFF), 0x0800),
        (ipv6(17, b"abc")[:-1], 0x86DD),
        (b"\x60" * 39, 0x86DD),
        (b"\x45" * 60, 0x86DD),
    ],
)
def test_malformed_is_held_counted_and_compared_whole(packet, ethertype):
    bench = Bench()
    assert bench.p(packet, ethertype) == HOLD
    assert bench.s(b"\xff" + packet, ethertype) == HOLD
    assert bench.s(packet, ethertype) == ((1,), None)
    assert bench.comparator.counters.malformed == 3
    bench.p(packet, ethertype)
    assert bench.tick(1.0) == ((), Reason.OTHER_TIMEOUT)


def test_fragments_repeat_overlap_and_lack():
    whole = udp(bytes(range(40)))[20:]
    first, second = ipv4(17, whole[:24], 1, 0x2000), ipv4(17, whole[24:], 1, 3)
    bench = Bench()
    assert bench.p(first) == bench.p(first) == bench.p(second) == HOLD
    assert bench.s(udp(bytes(range(40)))) == ((1, 2, 3), None)
    bench.p(first)
    assert bench.p(ipv4(17, whole[16:], 1, 2)) == HOLD, "overlaps: has no one meaning"
    assert bench.s(udp(bytes(range(40)))) == HOLD
    assert bench.tick(1.0) == ((), Reason.UDP_TIMEOUT)
    assert bench.checkpoint() == (4, 5)
    assert bench.s(first) == HOLD
    bench.tick(9.0)
    assert bench.s(second) == HOLD, "the first has aged"
    assert bench.comparator.counters.secondary_dropped == 2


def test_fragments_that_disagree_on_being_the_last_are_never_complete():
    whole = udp(bytes(40))[20:]
    bench = Bench()
    for packet in (
        ipv4(17, whole[:24], 1, 0x2000),
        ipv4(17, whole[24:40], 1, 0x2003),
        ipv4(17, whole[24:40], 1, 3),
        ipv4(17, whole[40:], 1, 5),
    ):
        bench.p(packet)
    assert bench.s(udp(bytes(40))) == HOLD
    assert bench.tick(1.0) == ((), Reason.UDP_TIMEOUT)


def test_interleaved_fragments_leave_in_order_of_arrival_at_a_commit():
    whole = udp(bytes(40))[20:]
    bench = Bench()
    bench.p(ipv4(17, whole[:24], 1, 0x2000))
    bench.p(udp(b"between", port=9))
    bench.p(ipv4(17, whole[24:], 1, 3))
    assert bench.checkpoint() == (1, 2, 3)


def test_limits_ask_and_drop_nothing_of_the_pvm():
    bench = Bench(held_packets=2)
    assert [bench.p(udp(b"x")) for _ in range(4)] == [HOLD, HOLD, ((), Reason.LIMIT_PACKETS), HOLD]
    assert bench.checkpoint() == (1, 2, 3, 4)
    bench = Bench(held_bytes=100)
    assert [bench.p(udp(bytes(40)))[1] for _ in range(2)] == [None, Reason.LIMIT_BYTES]
    bench = Bench(flows=2)
    assert [bench.p(udp(b"x", port=port))[1] for port in range(4)] == [None, None, Reason.LIMIT_FLOWS, None]
    assert bench.s(udp(b"x", port=77)) == HOLD and bench.comparator.counters.secondary_dropped == 1
    assert bench.checkpoint() == (1, 2, 3, 4)
    assert bench.p(udp(b"x", port=8))[1] is None, "the checkpoint has made room"


def test_svm_output_is_bounded():
    bench = Bench(secondary_bytes=1000).connect()
    for start in range(0, 4000, 400):
        bench.s(tcp(101 + start, 50, ACK, bytes(400)))
    assert bench.comparator.counters.secondary_dropped == 8
    assert bench.p(tcp(101, 50, ACK, bytes(800))) == ((2,), None)
    assert bench.p(tcp(901, 50, ACK, bytes(400))) == HOLD
    assert bench.s(tcp(901, 50, ACK, bytes(4000))) == ((3,), None), "used at once, the rest dropped"
    for number in range(9):
        bench.s(udp(bytes([number]) * 100))
    assert bench.p(udp(b"\0" * 100)) == HOLD
    assert bench.p(udp(b"\x08" * 100))[0] == (5,), "the latest were kept"


def test_idle_flows_are_forgotten_and_found_again():
    bench = Bench(idle_flow_s=300.0).connect()
    bench.p(udp(b"waits"))
    assert bench.tick(301.0) == ((), Reason.UDP_TIMEOUT)
    assert bench.comparator.counters.flows == 1, "one holds a packet"
    bench.p(tcp(500, 50, ACK, b"later"))
    assert bench.s(tcp(500, 50, ACK, b"later")) == ((3,), None)


def test_flows_in_words():
    assert describe(tcp(1, 1)) == (True, "TCP 10.0.0.1:80 > 10.0.0.2:4000")
    assert describe(udp(b"")) == (True, "UDP 10.0.0.1:5353 > 10.0.0.2:53")
    assert describe(echo(7, b"")) == (True, "ICMP 10.0.0.1 > 10.0.0.2 id 7")
    assert describe(ipv4(1, b"\3" + bytes(30))) == (True, "ICMP 10.0.0.1 > 10.0.0.2")
    assert describe(ipv4(47, b"")) == (True, "IP protocol 47 10.0.0.1 > 10.0.0.2")
    assert describe(ipv6(17, bytes(4) + b"\0\x08\0\0"), 0x86DD) == (True, "UDP [::1]:0 > [::2]:0")
    assert describe(b"") == (True, "malformed packets")
    assert describe(b"", 0x0806) == (False, "ARP")
