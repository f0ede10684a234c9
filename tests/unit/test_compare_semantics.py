# SPDX-License-Identifier: LGPL-2.1-or-later
"""The table of docs/comparison.rst, row by row, as far as test_proxy_compare.py does not have it."""

from __future__ import annotations

import struct

import pytest
from packets import (
    ACK,
    FIN,
    HOLD,
    IPV4,
    IPV6,
    RST,
    SYN,
    URG,
    VLAN,
    Bench,
    ipv4,
    ipv6,
    tcp,
    tcp6,
    tcp_body,
    udp,
    udp6,
    udp_body,
)

from remus_colo.options import parse_limits
from remus_colo.proxy.comparator import CompareConfig, How, Reason

# -- TCP: connections ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pvm_first", [True, False])
def test_one_accepts_what_the_other_refuses_is_noticed_at_once(pvm_first):
    bench = Bench()
    accept, refuse = tcp(100, 50, SYN | ACK), tcp(0, 50, RST | ACK)
    steps = [(bench.p, accept), (bench.s, refuse)]
    for call, packet in steps if pvm_first else reversed(steps):
        last = call(packet)
    assert (
        last == ((), Reason.TCP_RESET)
        and "the PVM accepted the connection, the SVM refused it" in bench.detail
    )
    bench = Bench()
    steps = [(bench.p, refuse), (bench.s, accept)]
    for call, packet in steps if pvm_first else reversed(steps):
        last = call(packet)
    assert (
        last == ((), Reason.TCP_RESET)
        and "the PVM refused the connection, the SVM accepted it" in bench.detail
    )


def test_both_refuse_and_later_only_one_does():
    bench = Bench()
    bench.p(tcp(0, 50, RST | ACK))
    assert bench.s(tcp(0, 50, RST | ACK)) == ((1,), None)
    assert bench.p(tcp(0, 40, RST | ACK)) == HOLD, "another attempt"
    assert bench.s(tcp(100, 40, SYN | ACK)) == HOLD
    assert bench.tick(1.0) == ((), Reason.TCP_TIMEOUT)


def test_the_pvm_goes_on_where_the_svm_has_reset():
    bench = Bench().connect()
    assert bench.s(tcp(101, 50, RST)) == HOLD
    assert bench.p(tcp(101, 50, ACK, b"data")) == ((), Reason.TCP_RESET)
    assert "byte 0 (sequence 101): the PVM goes on" in bench.detail
    bench = Bench().connect()
    bench.p(tcp(101, 50, ACK, b"data"))
    assert bench.s(tcp(101, 50, RST)) == ((), Reason.TCP_RESET)
    bench = Bench().connect()
    bench.p(tcp(101, 50, FIN | ACK))
    assert bench.s(tcp(101, 50, RST)) == ((), Reason.TCP_RESET)
    bench = Bench().connect()
    bench.p(tcp(101, 60))
    assert bench.s(tcp(101, 0, RST)) == ((), Reason.TCP_RESET), "it will never acknowledge that"


def test_a_reset_behind_data_that_was_lost_on_the_way_is_no_contradiction():
    bench = Bench().connect()
    bench.p(tcp(101, 50, ACK, b"data"))
    assert bench.s(tcp(105, 50, RST)) == HOLD, "it had sent them"
    assert bench.s(tcp(101, 50, ACK, b"data")) == ((2,), None)
    assert bench.p(tcp(105, 50, RST)) == ((3,), None)


def test_bytes_behind_a_gap_are_compared_at_once_and_leave():
    bench = Bench().connect()
    bench.p(tcp(201, 50, ACK, b"later"))
    assert bench.s(tcp(201, 50, ACK, b"later")) == ((2,), None), "neither has sent what lies before it"
    bench.p(tcp(301, 50, FIN | ACK, b"last"))
    assert bench.s(tcp(301, 50, ACK, b"last")) == HOLD
    assert bench.s(tcp(305, 50, FIN | ACK)) == ((3,), None)
    bench.p(tcp(101, 50, ACK, b"first"))
    assert bench.s(tcp(101, 50, ACK, b"first")) == ((4,), None)
    assert bench.p(tcp(250, 50, ACK, b"x")) == HOLD
    assert bench.s(tcp(250, 50, ACK, b"y")) == ((), Reason.TCP_PAYLOAD)
    assert "byte 149 (sequence 250): PVM 0x78, SVM 0x79" in bench.detail


@pytest.mark.parametrize("pvm_first", [True, False])
def test_a_fin_behind_a_gap_contradicts_at_once(pvm_first):
    bench = Bench().connect()
    one, other = (bench.p, bench.s) if pvm_first else (bench.s, bench.p)
    assert one(tcp(201, 50, FIN | ACK, b"end")) == HOLD
    assert other(tcp(201, 50, FIN | ACK, b"en")) == ((), Reason.TCP_PAYLOAD)


def test_half_close():
    bench = Bench().connect()
    bench.p(tcp(101, 50, FIN | ACK))
    assert bench.s(tcp(101, 50, FIN | ACK)) == ((2,), None)
    for ack in (60, 70):  # the client goes on sending
        bench.p(tcp(102, ack))
        assert bench.s(tcp(102, ack)) == ((bench.count,), None)


def test_the_guest_opens_a_connection_from_another_port():
    bench = Bench()
    bench.p(tcp(100, 0, SYN, port=4000))
    assert bench.s(ipv4(6, struct.pack(">HHIIBBHHH", 81, 4000, 900, 0, 0x50, SYN, 9, 0, 0))) == HOLD
    assert (
        bench.tick(0.1) == ((), Reason.TCP_PORTS) and "the SVM has sent its own from port 81" in bench.detail
    )
    assert bench.checkpoint() == (1,)
    assert bench.p(tcp(100, 0, SYN, port=4000)) == ((2,), None), "the SVM is a copy that has sent it"


def from_port(source: int, port: int = 4000, flags: int = SYN) -> bytes:
    return ipv4(6, struct.pack(">HHIIBBHHH", source, port, 900, 0, 0x50, flags, 9, 0, 0))


@pytest.mark.parametrize("pvm_first", [True, False])
def test_the_guest_opens_a_connection_from_another_port_and_need_not_wait_for_the_time_out(pvm_first):
    bench = Bench()
    steps = [(bench.p, from_port(40001)), (bench.s, from_port(40003))]
    for call, packet in steps if pvm_first else reversed(steps):
        assert call(packet) == HOLD
    assert bench.comparator.next_deadline_s == pytest.approx(0.1)
    assert bench.tick(0.09) == HOLD
    assert bench.tick(0.1) == ((), Reason.TCP_PORTS) and "from port 40003" in bench.detail
    assert bench.checkpoint() == (1,)
    assert bench.tick(0.3) == HOLD, "that is settled"


def test_connections_that_the_guest_opens_in_another_order_are_the_same():
    bench = Bench()
    bench.p(from_port(40001))
    bench.s(from_port(40003))
    assert bench.p(from_port(40003)) == ((2,), None)
    assert bench.s(from_port(40001)) == ((1,), None)
    assert bench.tick(0.5) == HOLD and bench.comparator.next_deadline_s is None


def test_connections_to_other_servers_have_nothing_to_do_with_each_other():
    bench = Bench()
    bench.p(from_port(40001, port=80))
    bench.s(from_port(40003, port=443))
    assert bench.tick(0.9) == HOLD
    assert bench.tick(1.0) == ((), Reason.TCP_TIMEOUT)


def test_a_doubt_waits_for_an_svm_that_is_copied_anew():
    bench = Bench()
    bench.p(from_port(40001))
    bench.s(from_port(40003))
    bench.cut()
    assert bench.tick(0.5) == HOLD
    bench.abort()
    assert bench.tick(0.59) == HOLD
    assert bench.tick(0.6) == ((), Reason.TCP_PORTS)


@pytest.mark.parametrize("late", ["pvm", "svm"])
def test_ports_used_again_and_again_while_one_side_is_late(late):
    bench = Bench()
    one, other = (bench.p, bench.s) if late == "svm" else (bench.s, bench.p)
    for side in (one, other):
        for number in range(10):
            isn, ack = 100_000 * number, 9000 * number
            packets = (
                tcp(isn if side == bench.p else isn + 7000, ack, SYN | ACK),
                tcp(isn + 1, ack + 5, ACK, b"answer %d" % number),  # behind the rewriter
                tcp(isn + 9, ack + 6, FIN | ACK),
            )
            assert [side(packet)[1] for packet in packets] == [None] * 3
    assert bench.comparator.counters.released_equal == 30


@pytest.mark.parametrize("late", ["pvm", "svm"])
def test_attempts_that_are_refused_one_after_another(late):
    bench = Bench()
    one, other = (bench.p, bench.s) if late == "svm" else (bench.s, bench.p)
    for side in (one, other):
        for ack in range(100, 600, 100):
            assert side(tcp(0, ack, RST | ACK))[1] is None
    assert bench.comparator.counters.released_equal == 5
    bench.p(tcp(0, 900, RST | ACK))
    assert bench.tick(1.0) == ((), Reason.TCP_TIMEOUT), "this one the SVM has not refused"


@pytest.mark.parametrize("again", ["pvm", "svm"])
def test_one_attempt_answered_twice_with_different_numbers(again):
    """As after SYN cookies, or where the first answer was forgotten."""
    bench = Bench()
    bench.p(tcp(100, 50, SYN | ACK))
    bench.s(tcp(900, 50, SYN | ACK))
    base = 100
    if again == "pvm":
        base = 5000
        assert bench.p(tcp(base, 50, SYN | ACK)) == ((2,), None)
    else:
        assert bench.s(tcp(7000, 50, SYN | ACK)) == HOLD
    bench.p(tcp(base + 1, 60, ACK, b"answer"))
    assert bench.s(tcp(base + 1, 60, ACK, b"answer")) == ((bench.count,), None)


def test_a_connection_that_only_the_svm_uses_asks_for_a_checkpoint():
    bench = Bench()
    assert bench.s(tcp(900, 50, SYN | ACK)) == HOLD and bench.tick(5.0) == HOLD, "nobody is told anything yet"
    assert bench.s(tcp(901, 60, ACK, b"said to nobody")) == HOLD
    assert bench.tick(6.0) == ((), Reason.TCP_TIMEOUT)
    assert "the SVM has sent data in a connection in which the PVM has sent none" in bench.detail


# -- TCP: the stream -------------------------------------------------------------------------------------


def test_a_stream_found_open_is_compared_below_its_first_byte_too():
    bench = Bench()
    bench.p(tcp(110, 50, ACK, b"later"))
    assert bench.s(tcp(110, 50, ACK, b"later")) == ((1,), None)
    assert bench.p(tcp(100, 50, ACK, b"earlier...")) == HOLD, "may be a repetition, or may have come late"
    assert bench.s(tcp(100, 50, ACK, b"earlier...")) == ((2,), None)
    assert bench.p(tcp(100, 50, ACK, b"eaRlier")) == ((), Reason.TCP_PAYLOAD)


def test_the_svm_was_first_below_the_pvms_first_byte():
    bench = Bench()
    bench.s(tcp(100, 50, ACK, b"earlier...later"))
    assert bench.p(tcp(110, 50, ACK, b"later")) == ((1,), None)
    assert bench.p(tcp(100, 50, ACK, b"earlier...l")) == ((2,), None)


def test_after_a_checkpoint_what_was_sent_before_may_be_repeated():
    bench = Bench()
    bench.p(tcp(110, 50, ACK, b"later"))
    bench.checkpoint()
    assert bench.p(tcp(110, 50, ACK, b"later")) == ((2,), None)


def test_what_has_left_may_be_repeated_but_not_with_another_byte():
    bench = Bench().connect()
    bench.s(tcp(101, 50, ACK, b"once said"))
    assert bench.p(tcp(101, 50, ACK, b"once ")) == ((2,), None)
    assert bench.p(tcp(106, 50, ACK, b"said")) == ((3,), None)
    assert bench.p(tcp(103, 50, ACK, b"ce sa")) == ((4,), None)
    assert bench.p(tcp(103, 50, ACK, b"ce Sa")) == ((), Reason.TCP_PAYLOAD)
    assert "the PVM repeated it with another value" in bench.detail


def test_a_repetition_with_another_byte_that_goes_on_with_new_ones():
    bench = Bench().connect()
    bench.s(tcp(101, 50, ACK, b"once said"))
    bench.p(tcp(101, 50, ACK, b"once"))
    assert bench.p(tcp(101, 50, ACK, b"onCe said")) == ((), Reason.TCP_PAYLOAD)


@pytest.mark.parametrize("differs", [False, True])
def test_what_left_by_a_checkpoint_is_known_afterwards(differs):
    bench = Bench().connect()
    bench.p(tcp(101, 50, ACK, b"only here"))
    if differs:
        assert bench.s(tcp(101, 50, ACK, b"only herE")) == ((), Reason.TCP_PAYLOAD)
    bench.p(tcp(110, 50, ACK, b", and more"))
    assert bench.checkpoint() == (2, 3)
    assert bench.p(tcp(106, 50, ACK, b"here, and")) == ((4,), None)
    assert bench.p(tcp(112, 50, ACK, b"or")) == ((), Reason.TCP_PAYLOAD)


def test_a_keepalive_may_have_a_byte_of_no_meaning():
    bench = Bench().connect()
    bench.s(tcp(101, 50, ACK, b"data"))
    bench.p(tcp(101, 50, ACK, b"data"))
    assert bench.p(tcp(104, 50, ACK, b"\0")) == ((3,), None), "RFC 1122, 4.2.3.6"


def test_a_connection_on_the_same_ports_has_said_nothing_yet():
    bench = Bench()
    for isn in (100, 104):
        bench.s(tcp(isn, 50, SYN | ACK))
        bench.p(tcp(isn, 50, SYN | ACK))
        bench.s(tcp(isn + 1, 50, ACK, b"%8d" % isn))
        assert bench.p(tcp(isn + 1, 50, ACK, b"%8d" % isn))[1] is None


def test_what_was_said_long_ago_is_not_known_any_more():
    bench = Bench().connect()
    piece = bytes(1000)
    for at in range(101, 400_101, 1000):
        bench.s(tcp(at, 50, ACK, piece))
        assert bench.p(tcp(at, 50, ACK, piece))[1] is None
    assert bench.p(tcp(101, 50, ACK, b"a repetition"))[1] is None
    assert bench.p(tcp(380_101, 50, ACK, b"a repetition")) == ((), Reason.TCP_PAYLOAD)


def test_an_svm_that_stays_ahead_asks_for_a_checkpoint_but_not_while_the_pvm_follows():
    bench = Bench().connect()
    bench.s(tcp(101, 50, ACK, b"0123456789"))
    assert bench.comparator.next_deadline_s == 1.0
    bench.now_s = 0.9
    assert bench.p(tcp(101, 50, ACK, b"01234")) == ((2,), None)
    assert bench.comparator.next_deadline_s == 1.9
    assert bench.tick(1.9) == ((), Reason.TCP_TIMEOUT)
    assert "byte 5 (sequence 106): the SVM has sent data, the PVM nothing" in bench.detail
    bench.checkpoint()
    assert bench.comparator.next_deadline_s is None


def test_a_fin_of_the_svm_alone():
    bench = Bench().connect()
    bench.s(tcp(101, 50, FIN | ACK))
    assert (
        bench.tick(1.0) == ((), Reason.TCP_TIMEOUT)
        and "the SVM has sent FIN, the PVM nothing" in bench.detail
    )


@pytest.mark.parametrize("late", [False, True])
def test_the_svm_contradicts_its_own_fin(late):
    bench = Bench().connect()
    bench.s(tcp(101, 50, FIN | ACK, b"ab") if late else tcp(101, 50, ACK, b"abc"))
    assert bench.s(tcp(101, 50, ACK, b"abc") if late else tcp(101, 50, FIN | ACK, b"ab")) == (
        (),
        Reason.TCP_PAYLOAD,
    )


def test_options_and_windows_may_differ_in_the_handshake_and_later():
    bench = Bench()
    bench.p(tcp(100, 50, SYN | ACK, options=b"\2\4\5\xb4\1\3\3\7\4\2\1\1", window=1))
    assert bench.s(tcp(900, 50, SYN | ACK, options=b"\2\4\5\xb4\1\3\3\x0e", window=2)) == ((1,), None)
    bench.p(tcp(101, 50, ACK, b"x", options=b"\1\1\x08\x0a\0\0\0\1\0\0\0\2"))
    assert bench.s(tcp(101, 50, ACK, b"x", options=b"\1\1\5\x0a\0\0\0\1\0\0\0\2")) == ((2,), None)


def test_urgent_data_is_marked_by_both_or_differs():
    bench = Bench().connect()
    bench.p(tcp(101, 50, ACK | URG, b"abc", urgent=3))
    assert bench.s(tcp(101, 50, ACK | URG, b"ab", urgent=3)) == HOLD
    assert bench.s(tcp(103, 50, ACK | URG, b"cd", urgent=1)) == ((2,), None), (
        "the same byte, cut in another way"
    )
    for ours, theirs in ((URG, 0), (0, URG)):
        bench = Bench().connect()
        bench.p(tcp(101, 50, ACK | ours, b"abc", urgent=3 if ours else 0))
        assert bench.s(tcp(101, 50, ACK | theirs, b"abc", urgent=3 if theirs else 0)) == (
            (),
            Reason.TCP_PAYLOAD,
        )
        assert "only one side marks it as urgent" in bench.detail


@pytest.mark.parametrize("pointer", [0, 1])
def test_an_urgent_pointer_of_0_marks_the_first_byte(pointer):
    for ours, theirs in ((URG, 0), (0, URG)):
        bench = Bench().connect()
        bench.p(tcp(101, 50, ACK | ours, b"abc", urgent=pointer if ours else 0))
        differs = bench.s(tcp(101, 50, ACK | theirs, b"abc", urgent=pointer if theirs else 0))
        assert differs == ((), Reason.TCP_PAYLOAD)
    bench = Bench().connect()
    bench.p(tcp(101, 50, ACK | URG, b"abc", urgent=pointer))
    assert bench.s(tcp(101, 50, ACK | URG, b"abc", urgent=1 - pointer)) == ((2,), None)


@pytest.mark.parametrize("late", ["pvm", "svm"])
def test_many_urgent_marks_before_the_other_side_has_any(late):
    bench = Bench().connect()
    one, other = (bench.p, bench.s) if late == "svm" else (bench.s, bench.p)
    for side in (one, other):
        for at in range(8):
            assert side(tcp(101 + at, 50, ACK | URG, b"!", urgent=1))[1] is None
    assert bench.comparator.counters.held == 0


@pytest.mark.parametrize(
    ("pvm_has_pieces", "reason"), [(True, Reason.LIMIT_PACKETS), (False, Reason.LIMIT_SECONDARY)]
)
def test_a_stream_in_too_many_pieces_is_a_limit_reached(pvm_has_pieces, reason):
    bench = Bench(held_packets=100_000).connect()
    for index in range(20_000):
        packet = tcp(200 + 2 * index, 50, ACK, b"x")
        if pvm_has_pieces:
            last = bench.comparator.primary(0.0, index + 10, packet)
        else:
            last = bench.comparator.secondary(0.0, packet)
        if last.checkpoint is not None:
            break
    assert last.checkpoint.reason is reason and "pieces" in last.checkpoint.detail
    bench.comparator.check_invariants()


@pytest.mark.parametrize("pvm_has_pieces", [True, False])
@pytest.mark.parametrize("order", [1, -1])
def test_a_stream_in_single_bytes_costs_no_checkpoint(pvm_has_pieces, order):
    bench = Bench().connect()
    content = bytes(range(256)) * 12
    whole = tcp(101, 50, ACK, content)
    pieces = [tcp(101 + at, 50, ACK, content[at : at + 1]) for at in range(len(content))][::order]
    one, other = (bench.p, bench.s) if pvm_has_pieces else (bench.s, bench.p)
    assert all(one(piece) == HOLD for piece in pieces)
    assert len(other(whole)[0]) == bench.count - 1 and bench.comparator.counters.held == 0


# -- IPv6, fragments, VLANs ------------------------------------------------------------------------------


def test_tcp_over_ipv6_is_a_stream_too():
    bench = Bench(IPV6)
    bench.p(tcp6(100, 50, SYN | ACK))
    assert bench.s(tcp6(900, 50, SYN | ACK)) == ((1,), None)
    bench.p(tcp6(101, 50, ACK, b"abcdef"))
    assert bench.s(tcp6(101, 50, ACK, b"abc")) == HOLD
    assert bench.s(tcp6(104, 50, ACK, b"def")) == ((2,), None)
    bench.p(tcp6(107, 50, ACK, b"x"))
    assert bench.s(tcp6(107, 50, ACK, b"y")) == ((), Reason.TCP_PAYLOAD)
    assert "TCP [::1]:80 > [::2]:4000, byte 6" in bench.detail


def test_ipv6_headers_that_may_differ():
    extensions = b"\x3c\0\1\4\0\0\0\0" + b"\x11\0\1\4\0\0\0\0"  # hop by hop, destination options
    bench = Bench(IPV6)
    bench.p(ipv6(0, extensions + udp_body(b"data"), hops=3, label=77))
    assert bench.s(udp6(b"data")) == ((1,), None)


def fragment6(data: bytes, offset: int, more: bool, ident: int, header: int = 17) -> bytes:
    return ipv6(44, struct.pack(">BBHI", header, 0, offset << 3 | more, ident) + data)


def test_ipv6_fragments_are_compared_after_reassembly():
    whole = udp_body(bytes(range(40)))
    bench = Bench(IPV6)
    assert bench.p(fragment6(whole[:16], 0, True, 1)) == HOLD
    assert bench.p(fragment6(whole[16:], 2, False, 1)) == HOLD
    assert bench.s(fragment6(whole[24:], 3, False, 0xFFFFFFFF)) == HOLD
    assert bench.s(fragment6(whole[:24], 0, True, 0xFFFFFFFF)) == ((1, 2), None)
    bench.p(fragment6(whole, 0, False, 5))
    assert bench.s(udp6(bytes(range(40)))) == ((3,), None), "an atomic fragment is whole (RFC 6946)"
    bench.p(fragment6(whole[:16], 0, True, 6))
    bench.p(fragment6(whole[8:], 1, False, 6))
    assert bench.s(udp6(bytes(range(40)))) == HOLD, "overlapping fragments have no meaning (RFC 5722)"
    assert bench.tick(1.0) == ((), Reason.UDP_TIMEOUT)


def test_a_tcp_segment_in_fragments_is_part_of_the_stream():
    segment = tcp_body(101, 50, ACK, b"0123456789abcdef")
    bench = Bench().connect()
    bench.p(ipv4(6, segment[:24], 1, 0x2000))
    bench.p(ipv4(6, segment[24:], 1, 3))
    assert bench.s(tcp(101, 50, ACK, b"01234567")) == HOLD
    assert bench.s(tcp(109, 50, ACK, b"89abcdef")) == ((2, 3), None)


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ((b"\0\7\x08\0", VLAN), (b"\xe0\7\x08\0", VLAN), True),  # another priority
        ((b"\0\7\x08\0", VLAN), (b"\0\x08\x08\0", VLAN), False),
        ((b"\0\7\x81\0\0\5\x08\0", 0x88A8), (b"\0\x09\x81\0\0\5\x08\0", 0x88A8), False),
        ((b"\0\7\x81\0\0\5\x08\0", 0x88A8), (b"\0\7\x81\0\0\5\x08\0", 0x88A8), True),
    ],
)
def test_vlans_are_worlds_of_their_own(ours, theirs, same):
    bench = Bench()
    assert bench.p(ours[0] + udp(b"x"), ours[1]) == HOLD
    assert bench.s(theirs[0] + udp(b"x"), theirs[1]) == (((1,), None) if same else HOLD)


def test_a_tag_that_the_kernel_took_out_is_the_same_tag():
    bench = Bench()
    bench.p(udp(b"x"), vlan=7)
    assert bench.s(udp(b"x")) == HOLD
    assert bench.s(b"\0\7\x08\0" + udp(b"x"), VLAN) == ((1,), None)


def test_three_tags_one_of_which_the_kernel_may_have_taken_out():
    bench = Bench()
    inner = b"\0\7\x81\0\0\5\x08\0"
    bench.p(inner + udp(b"x", ident=1), 0x88A8, vlan=0x101)
    assert bench.s(inner + udp(b"x", ident=2), 0x88A8, vlan=0x201) == HOLD
    assert bench.s(inner + udp(b"x", ident=2), 0x88A8) == HOLD
    assert bench.s(b"\1\1\x88\xa8" + inner + udp(b"x", ident=2), 0x88A8) == ((1,), None)


def test_more_tags_than_are_read_are_compared_whole_within_the_outermost():
    bench = Bench()
    inner = b"\0\7\x81\0\0\5\x81\0\0\6\x81\0\0\4\x08\0"
    bench.p(inner + udp(b"x"), 0x88A8, vlan=2)
    assert bench.s(inner + udp(b"x"), 0x88A8, vlan=3) == HOLD
    assert bench.s(inner + udp(b"x"), 0x88A8, vlan=2) == ((1,), None)
    assert bench.comparator.counters.malformed == 3


# -- datagrams -------------------------------------------------------------------------------------------


def test_what_only_the_svm_sends_in_a_datagram_ages_without_a_checkpoint():
    bench = Bench()
    bench.p(udp(b"1"))
    bench.s(udp(b"1"))
    bench.s(udp(b"2"))
    bench.s(udp(b"3"))
    assert bench.p(udp(b"3")) == ((2,), None), "the PVM's second was lost on the way"
    assert bench.tick(9.0) == HOLD
    assert bench.comparator.counters.secondary_dropped == 1


def test_a_datagram_that_is_lost_holds_up_no_other():
    bench = Bench()
    for payload in (b"1", b"lost", b"2"):
        bench.p(udp(payload))
    assert bench.s(udp(b"1")) == ((1,), None)
    assert bench.s(udp(b"2")) == ((3,), None)
    bench.cut()
    bench.p(udp(b"3"))
    bench.p(udp(b"4"))
    bench.resume()
    assert bench.s(udp(b"4")) == HOLD, "nothing of the new epoch before the commit"
    assert bench.commit() == ((2, 5), None)
    assert bench.s(udp(b"3")) == ((4,), None)


@pytest.mark.parametrize("source", [5353, 5354])
@pytest.mark.parametrize("pvm_first", [True, False])
def test_a_name_that_each_vm_asks_for_in_its_own_words(source, pvm_first):
    """With another identifier, and perhaps from another port."""
    bench = Bench()
    steps = [(bench.p, udp(b"\x01\x02 example.org")), (bench.s, udp(b"\x03\x04 example.org", source=source))]
    for call, packet in steps if pvm_first else reversed(steps):
        assert call(packet) == HOLD
    assert bench.tick(0.09) == HOLD
    assert bench.tick(0.1) == ((), Reason.UDP_PAYLOAD) and "UDP" in bench.detail
    assert bench.checkpoint() == (1,)


def test_datagrams_of_another_length_or_that_come_soon_are_no_contradiction():
    bench = Bench()
    bench.p(udp(b"a"))
    bench.s(udp(b"no answer to that"))
    assert bench.tick(0.1) == HOLD
    bench.s(udp(b"b"))
    assert bench.tick(0.19) == HOLD
    assert bench.s(udp(b"a")) == ((1,), None)
    assert bench.tick(0.5) == HOLD


def test_ip_behind_a_length_and_a_snap_header_is_ip():
    bench = Bench()
    snap = b"\xaa\xaa\3\0\0\0\x08\0"
    assert bench.p(snap + udp(b"a"), 4) == HOLD  # ETH_P_802_2, as the kernel says
    assert bench.s(snap + udp(b"a", ident=7), 4) == ((1,), None)
    assert bench.p(b"\xaa\xaa\3\0\0\x0c\x20\0" + bytes(40), 4) == ((2,), None), "CDP"
    assert bench.p(b"\xaa\xaa\3\0\0\0", 4) == ((3,), None)


def test_trailing_bytes_of_a_datagram_count():
    bench = Bench()
    body = udp_body(b"data")
    bench.p(ipv4(17, body + b"option"))
    assert bench.s(ipv4(17, body + b"optioN")) == HOLD
    assert bench.s(ipv4(17, body + b"option")) == ((1,), None)


def test_icmpv6_echo_and_errors():
    bench = Bench(IPV6)
    bench.p(ipv6(58, b"\x81\0\1\1\0\7\0\1data"))
    assert bench.s(ipv6(58, b"\x81\0\2\2\0\7\0\1data")) == ((1,), None)
    bench.p(ipv6(58, b"\x81\0\0\0\0\7\0\2data"))
    assert bench.s(ipv6(58, b"\x81\0\0\0\0\7\0\2dat")) == ((), Reason.ICMP_PAYLOAD)
    bench = Bench(IPV6)
    quoted = ipv6(6, tcp_body(1, 5), hops=64)
    other = ipv6(6, tcp_body(1, 6), hops=63, label=9)
    bench.p(ipv6(58, b"\1\4\0\0\0\0\0\0" + quoted))
    assert bench.s(ipv6(58, b"\1\4\1\1\0\0\0\0" + other)) == ((1,), None)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("left", [40, 28, 0])
def test_what_the_rewriter_maps_may_differ_in_a_quoted_segment(family, left):
    def error(acknowledged, code=4, data=b"data"):
        blocks = b"\1\1\5\x0a" + struct.pack(">II", acknowledged + 10, acknowledged + 20)
        segment = tcp_body(1, acknowledged, ACK, data, options=blocks)
        if family == 4:
            return ipv4(1, bytes([3, code]) + bytes(6) + ipv4(6, segment)[: left or None])
        quoted = ipv6(60, b"\6\0\1\4\0\0\0\0" + segment)
        return ipv6(58, bytes([1, code]) + bytes(6) + quoted[: left + 28 if left else None])

    ethertype = IPV4 if family == 4 else IPV6
    bench = Bench(ethertype)
    bench.p(error(5))
    assert bench.s(error(99_005)) == ((1,), None)
    bench.p(error(5))
    assert bench.s(error(5, code=3)) == HOLD
    if not left:
        assert bench.s(error(5, data=b"date")) == HOLD


@pytest.mark.parametrize(
    ("packet", "ethertype"),
    [
        (udp(b"discover", source=68, port=67), 0),
        (udp(b"mdns", to=b"\xe0\0\0\xfb"), 0),
        (ipv4(89, b"ospf", to=b"\xe0\0\0\5"), 0),
        (ipv4(17, bytes(16), 1, 0x2000, to=b"\xe0\0\0\xfb"), 0),
        (ipv4(1, b"\x0a\0\0\0\0\0\0\0"), 0),
        (udp6(b"solicit", to=b"\xff\2" + bytes(11) + b"\1\0\2"), IPV6),
        (ipv6(58, b"\x80\0\0\0\0\0\0\0", to=b"\xff\2" + bytes(13) + b"\1"), IPV6),
        (ipv6(17, udp_body(b"renew", 547, 546)), IPV6),
        (b"\0\7\x08\x06" + bytes(28), VLAN),
        (bytes(28), 0x8035),
        (bytes(50), 0x88CC),
        (bytes(50), 0x0026),
    ],
)
def test_link_chatter_passes_at_once(packet, ethertype):
    bench = Bench()
    assert bench.p(packet, ethertype) == ((1,), None)
    assert bench.s(packet, ethertype) == HOLD
    assert bench.comparator.counters.flows == 0


@pytest.mark.parametrize("ethertype", [0x8847, 0x8864, 0x88A2])
def test_frames_that_carry_something_beyond_the_link_are_compared_whole(ethertype):
    bench = Bench(ethertype)
    assert bench.p(b"content") == HOLD
    assert bench.s(b"conTent") == HOLD
    assert bench.s(b"content", ethertype ^ 0x0100) == HOLD, "another type"
    assert bench.s(b"content") == ((1,), None)
    bench.p(b"content")
    assert (
        bench.tick(1.0) == ((), Reason.OTHER_TIMEOUT) and f"frames of type 0x{ethertype:04x}" in bench.detail
    )
    assert bench.comparator.counters.malformed == 0


@pytest.mark.parametrize("to", [b"\xe0\0\1\1", b"\xef\xff\xff\xfa", b"\xff\xff\xff\xff"])
def test_multicast_and_broadcast_that_leave_the_link_are_compared(to):
    bench = Bench()
    assert bench.p(udp(b"x", to=to)) == HOLD
    assert bench.s(udp(b"x", to=to)) == ((1,), None)


# -- what cannot be compared -----------------------------------------------------------------------------


def test_a_packet_that_was_cut_off_waits_for_a_checkpoint_and_asks_at_once():
    bench = Bench().connect()
    packet = tcp(101, 50, ACK, b"0123456789")
    assert bench.p(packet[:-4], wire_size=len(packet)) == ((), Reason.TRUNCATED)
    assert bench.s(packet) == HOLD
    assert bench.comparator.counters.truncated == 1
    assert bench.checkpoint() == (2,)
    assert bench.p(packet) == ((3,), None), "the checkpoint covers its length on the wire"
    assert bench.p(udp(b"x")[:-1], wire_size=len(udp(b"x"))) == ((), Reason.TRUNCATED)


def test_of_an_svm_segment_that_was_cut_off_the_part_that_is_there_counts():
    bench = Bench().connect()
    packet = tcp(101, 50, ACK, b"0123456789")
    bench.s(packet[:-4], wire_size=len(packet))
    assert bench.p(tcp(101, 50, ACK, b"012345")) == ((2,), None)
    assert bench.p(tcp(107, 50, ACK, b"6789")) == HOLD
    assert bench.s(udp(b"x")[:-1], wire_size=len(udp(b"x"))) == HOLD
    assert bench.p(udp(b"x")) == HOLD


def test_a_cut_that_took_only_padding_is_none():
    bench = Bench()
    bench.p(udp(b"x"), wire_size=46)
    assert bench.s(udp(b"x") + bytes(17)) == ((1,), None)


# -- limits ----------------------------------------------------------------------------------------------


def test_svm_output_over_the_limit_asks_for_a_checkpoint():
    bench = Bench(secondary_bytes=1000)
    assert [bench.s(udp(bytes([number]) * 100))[1] for number in range(4)] == [
        None,
        None,
        None,
        Reason.LIMIT_SECONDARY,
    ]
    bench = Bench(secondary_bytes=1000).connect()
    assert bench.s(tcp(101, 50, ACK, bytes(2000))) == ((), Reason.LIMIT_SECONDARY)
    bench = Bench(secondary_bytes=1000)
    last = [bench.s(ipv4(17, bytes(80), ident, 0x2000))[1] for ident in range(4)]
    assert last[-1] is Reason.LIMIT_SECONDARY


def test_a_flood_of_connections_that_go_no_further_costs_no_checkpoint_and_no_memory():
    bench = Bench(flows=100)
    for port in range(5000):
        bench.comparator.primary(0.0, port, tcp(100, 50, SYN | ACK, port=port))
        decision = bench.comparator.secondary(0.0, tcp(900 + port, 50, SYN | ACK, port=port))
        assert (decision.release, decision.checkpoint) == ((port,), None)
    assert bench.comparator.counters.flows <= 100
    bench.comparator.check_invariants()


def test_a_port_scan_that_is_refused_costs_neither():
    bench = Bench(flows=100)
    for port in range(5000):
        bench.comparator.primary(0.0, port, tcp(0, 50, RST | ACK, port=port))
        assert bench.comparator.secondary(0.0, tcp(0, 50, RST | ACK, port=port)).release == (port,)
    assert bench.comparator.counters.flows <= 100


def test_ended_connections_and_answered_datagrams_make_room():
    bench = Bench(flows=10)
    for port in range(1000, 1200):
        for packet in (
            tcp(100, 50, SYN | ACK, port=port),
            tcp(101, 60, ACK, b"reply", port=port),
            tcp(106, 60, FIN | ACK, port=port),
        ):
            bench.s(packet)
            assert bench.p(packet) == ((bench.count,), None)
        bench.s(udp(b"answer", port=port))
        assert bench.p(udp(b"answer", port=port)) == ((bench.count,), None)
    assert bench.comparator.counters.flows <= 10


def test_connections_in_use_do_not_make_room():
    bench = Bench(flows=3)
    for port in range(3):
        bench.connect(port=port)
        bench.s(tcp(101, 50, ACK, b"a", port=port))
        assert bench.p(tcp(101, 50, ACK, b"a", port=port)) == ((bench.count,), None)
    assert bench.p(tcp(100, 50, SYN | ACK, port=9)) == ((), Reason.LIMIT_FLOWS)


def test_limits_as_a_user_gives_them():
    config = CompareConfig.from_limits(
        0.5, dict(parse_limits("flows=7, idle-flow-ms=900,held-bytes=5,held-packets=6,secondary-bytes=8"))
    )
    assert config == CompareConfig(
        0.5, held_bytes=5, held_packets=6, flows=7, secondary_bytes=8, idle_flow_s=0.9
    )
    assert CompareConfig.from_limits(1.0, {}) == CompareConfig()


def test_how_packets_leave():
    bench = Bench()
    assert bench.comparator.primary(0.0, 1, bytes(28), 0x0806).how == (How.PASSED,)
    bench.comparator.secondary(0.0, udp(b"x"))
    assert bench.comparator.primary(0.0, 2, udp(b"x")).how == (How.EQUAL,)
    bench.comparator.primary(0.0, 3, udp(b"y"))
    bench.comparator.cut(0.0)
    assert bench.comparator.waits_for(3) == "the checkpoint that it belongs to is not complete"
    assert bench.comparator.commit(0.0).how == (How.COMMITTED,)
    bench.comparator.primary(0.0, 4, udp(b"z"))
    assert (
        bench.comparator.waits_for(4) == "the SVM has sent no equal datagram"
        and bench.comparator.waits_for(9) is None
    )
    assert bench.comparator.release_all(0.0).how == (How.UNPROTECTED,)


def test_svm_output_stays_within_its_limit_when_it_is_cut_where_the_pvm_begins():
    bench = Bench(secondary_bytes=400)
    bench.s(tcp(100, 50, ACK, bytes(300)))
    assert bench.p(tcp(200, 50, ACK, b"x")) == ((), Reason.TCP_PAYLOAD), (
        "within a byte of the SVM's, and other"
    )
