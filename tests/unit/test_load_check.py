# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each kind of corruption is caught by the check that is there for it, however the bytes are split."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remus_colo.testbed import load_content
from remus_colo.testbed.load_check import (
    Check,
    DatagramCheck,
    EchoCheck,
    HttpCheck,
    Verdict,
    VolatileCheck,
)
from remus_colo.testbed.load_counter import Counter, IncrementCheck

# A busy machine is no counter-example.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

RANDOM_HEADER = load_content.volatile_header(load_content.RANDOM_BODY_BYTES)
TIME_HEADER = load_content.volatile_header(load_content.TIME_BODY_BYTES)


def feed_split(check: Check, data: bytes, cuts: list[int]) -> Verdict:
    """Feeds ``data`` cut at ``cuts`` (any integers), and adds the verdicts up, as far as the check can go on."""
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    total = Verdict()
    for begin, end in itertools.pairwise(edges):
        verdict = check.feed(data[begin:end])
        total.completed += verdict.completed
        total.wrong_bytes += verdict.wrong_bytes
        total.lost_writes += verdict.lost_writes
        total.repeated_writes += verdict.repeated_writes
        total.fault = total.fault or verdict.fault
        if verdict.out_of_step:
            total.out_of_step = True
            break
    return total


cuts = st.lists(st.integers(min_value=0, max_value=1 << 20), max_size=8)


def static_reply(name: str) -> bytes:
    size = load_content.SIZES[name]
    return load_content.static_header(size) + load_content.content(name, size)


# -- echo


@given(count=st.integers(1, 8), cuts=cuts)
def test_an_echo_that_comes_back_as_it_was_is_right(count: int, cuts: list[int]) -> None:
    check = EchoCheck("seed")
    sent = b"".join(check.request() for _ in range(count))
    assert check.outstanding == count
    assert feed_split(check, sent, cuts) == Verdict(completed=count)
    assert check.outstanding == 0


@given(count=st.integers(1, 4), cuts=cuts, where=st.integers(0, 1 << 20), change=st.integers(1, 255))
def test_one_changed_byte_of_an_echo_is_found(count: int, cuts: list[int], where: int, change: int) -> None:
    check = EchoCheck("seed")
    wrong = bytearray(b"".join(check.request() for _ in range(count)))
    wrong[where % len(wrong)] ^= change
    verdict = feed_split(check, bytes(wrong), cuts)
    assert verdict.wrong_bytes == 1
    assert verdict.out_of_step
    assert "wrong bytes" in verdict.fault


@given(cuts=cuts, where=st.integers(0, 1 << 20))
def test_a_byte_lost_out_of_an_echo_is_found(cuts: list[int], where: int) -> None:
    check = EchoCheck("seed")
    sent = b"".join(check.request() for _ in range(4))
    where %= len(sent)
    verdict = feed_split(check, sent[:where] + sent[where + 1 :], cuts)
    # Where only equal bytes follow, the loss shows as a chunk that never ends.
    assert verdict.out_of_step or check.outstanding


def test_a_chunk_echoed_twice_is_found() -> None:
    check = EchoCheck("seed")
    sent = check.request()
    verdict = check.feed(sent + sent)
    assert verdict.completed == 1
    assert verdict.wrong_bytes == len(sent)
    assert verdict.out_of_step


def test_chunks_in_another_order_are_found() -> None:
    check = EchoCheck("seed")
    first, second = check.request(), check.request()
    assert check.feed(second + first).out_of_step


def test_two_connections_streams_cannot_be_mistaken_for_each_other() -> None:
    one, other = EchoCheck("run:echo-0:0"), EchoCheck("run:echo-0:1")
    sent = one.request()
    other.request()
    assert other.feed(sent).out_of_step


def test_bytes_that_nothing_asked_for_are_found() -> None:
    verdict = EchoCheck("seed").feed(b"hello")
    assert verdict.wrong_bytes == 5
    assert verdict.out_of_step


# -- HTTP


@given(cuts=cuts)
def test_the_right_files_are_right(cuts: list[int]) -> None:
    check = HttpCheck(["1k", "10k"])
    assert check.request().startswith(b"GET /1k HTTP/1.1\r\n")
    assert check.request().startswith(b"GET /10k HTTP/1.1\r\n")
    assert feed_split(check, static_reply("1k") + static_reply("10k"), cuts) == Verdict(completed=2)


def test_files_come_in_turn_from_the_given_one_on() -> None:
    check = HttpCheck(["1k", "10k"], start=1)
    assert [check.request().split()[1] for _ in range(3)] == [b"/10k", b"/1k", b"/10k"]


@given(cuts=cuts, where=st.integers(0, 1 << 20), change=st.integers(1, 255))
def test_one_changed_byte_of_header_or_body_is_found(cuts: list[int], where: int, change: int) -> None:
    check = HttpCheck(["1k"])
    check.request()
    wrong = bytearray(static_reply("1k"))
    wrong[where % len(wrong)] ^= change
    verdict = feed_split(check, bytes(wrong), cuts)
    assert verdict.wrong_bytes == 1
    assert verdict.out_of_step


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"Server: nginx\r\n", b"Server: nginx\r\nDate: Mon, 01 Jan 2024 00:00:00 GMT\r\n"),
        (b"200 OK", b"500 Internal Server Error"),
        (b'-3e8"', b'-3e9"'),
        (b"keep-alive", b"close"),
    ],
)
def test_another_header_is_found(old: bytes, new: bytes) -> None:
    check = HttpCheck(["1k"])
    check.request()
    assert check.feed(static_reply("1k").replace(old, new, 1)).out_of_step


def test_another_files_content_is_found() -> None:
    check = HttpCheck(["1k"])
    check.request()
    size = load_content.SIZES["1k"]
    verdict = check.feed(load_content.static_header(size) + load_content.content("other", size))
    assert verdict.wrong_bytes > 900


def test_a_truncated_file_is_never_complete() -> None:
    check = HttpCheck(["1k"])
    check.request()
    assert check.feed(static_reply("1k")[:-1]) == Verdict()
    assert check.outstanding == 1


def test_a_byte_after_the_file_is_found() -> None:
    check = HttpCheck(["1k"])
    check.request()
    verdict = check.feed(static_reply("1k") + b"x")
    assert (verdict.completed, verdict.wrong_bytes, verdict.out_of_step) == (1, 1, True)


def test_what_a_broken_connection_owed_is_not_expected_of_the_next() -> None:
    check = HttpCheck(["1k"])
    check.request()
    check.feed(static_reply("1k")[:100])
    check.broken()
    assert check.outstanding == 0
    check.request()
    assert check.feed(static_reply("1k")) == Verdict(completed=1)


# -- redis


@given(count=st.integers(1, 5), cuts=cuts)
def test_increments_by_one_are_right(count: int, cuts: list[int]) -> None:
    check = IncrementCheck(Counter("k"))
    for _ in range(count):
        assert check.request() == b"*2\r\n$4\r\nINCR\r\n$1\r\nk\r\n"
    replies = b"".join(b":%d\r\n" % value for value in range(1, count + 1))
    assert feed_split(check, replies, cuts) == Verdict(completed=count)


@pytest.mark.parametrize(
    ("value", "lost", "repeated"), [(7, 4, 0), (10, 1, 0), (11, 0, 0), (12, 0, 1), (15, 0, 4)]
)
def test_a_value_that_is_not_the_next_is_lost_or_repeated_writes(
    value: int, lost: int, repeated: int
) -> None:
    counter = Counter("k")
    counter.acknowledged = 10
    check = IncrementCheck(counter)
    check.request()
    verdict = check.feed(b":%d\r\n" % value)
    assert (verdict.lost_writes, verdict.repeated_writes) == (lost, repeated)
    assert bool(verdict.fault) == bool(lost or repeated)
    assert verdict.completed == 1


def test_one_loss_is_reported_once() -> None:
    counter = Counter("k")
    counter.acknowledged = 10
    check = IncrementCheck(counter)
    check.request()
    assert check.feed(b":5\r\n").lost_writes == 6
    check.request()
    assert check.feed(b":6\r\n") == Verdict(completed=1)


@pytest.mark.parametrize(
    "reply",
    [
        b"-ERR value is not an integer\r\n", b":01\r\n", b":1\n", b"+OK\r\n", b":-1\r\n", b":\r\n", b"\r\n", b"x" * 40,
    ],
)  # fmt: skip
def test_what_is_no_integer_reply_is_wrong(reply: bytes) -> None:
    check = IncrementCheck(Counter("k"))
    check.request()
    verdict = check.feed(reply)
    assert verdict.out_of_step
    assert verdict.wrong_bytes == len(reply)


def test_a_reply_that_nothing_asked_for_is_wrong() -> None:
    check = IncrementCheck(Counter("k"))
    check.request()
    verdict = check.feed(b":1\r\n:2\r\n")
    assert (verdict.completed, verdict.out_of_step) == (1, True)


@pytest.mark.parametrize(("value", "lost", "repeated"), [(2, 1, 0), (3, 0, 0), (4, 0, 0), (5, 0, 1)])
def test_an_unanswered_increment_may_have_been_made_or_not(value: int, lost: int, repeated: int) -> None:
    counter = Counter("k")
    check = IncrementCheck(counter)
    for reply in (b":1\r\n", b":2\r\n"):
        check.request()
        check.feed(reply)
    check.request()
    check.feed(b":3")  # cut off: not acknowledged
    check.broken()
    assert (counter.acknowledged, counter.unknown) == (2, 1)
    again = IncrementCheck(counter)
    again.request()
    verdict = again.feed(b":%d\r\n" % value)
    assert (verdict.lost_writes, verdict.repeated_writes) == (lost, repeated)
    assert counter.unknown == 0


@pytest.mark.parametrize(
    ("value", "lost", "repeated"), [(0, 10, 0), (9, 1, 0), (10, 0, 0), (12, 0, 0), (13, 0, 1)]
)
def test_the_last_read_allows_only_what_is_unknown(value: int, lost: int, repeated: int) -> None:
    counter = Counter("k")
    counter.acknowledged, counter.unknown = 10, 2
    verdict = counter.finally_is(value)
    assert (verdict.lost_writes, verdict.repeated_writes) == (lost, repeated)
    assert bool(verdict.fault) == bool(lost or repeated)


# -- what two VMs can never answer alike


@given(cuts=cuts)
def test_random_numbers_that_differ_are_right(cuts: list[int]) -> None:
    check = VolatileCheck("random")
    check.request()
    check.request()
    replies = RANDOM_HEADER + b"0123456789abcdef" * 4 + b"\n" + RANDOM_HEADER + b"a" * 64 + b"\n"
    assert feed_split(check, replies, cuts) == Verdict(completed=2)


def test_the_same_random_number_again_is_wrong() -> None:
    check = VolatileCheck("random")
    for fault in (False, True):
        check.request()
        assert bool(check.feed(RANDOM_HEADER + b"a" * 64 + b"\n").fault) == fault


@pytest.mark.parametrize("body", [b"A" * 64 + b"\n", b"a" * 65, b"g" * 64 + b"\n"])
def test_a_body_that_is_no_random_number_is_wrong(body: bytes) -> None:
    check = VolatileCheck("random")
    check.request()
    assert check.feed(RANDOM_HEADER + body).fault


@pytest.mark.parametrize("data", [b"HTTP/1.1 502 Bad Gateway\r\n", RANDOM_HEADER[:-2] + b"X", b"\0"])
def test_another_header_of_a_random_number_is_wrong(data: bytes) -> None:
    check = VolatileCheck("random")
    check.request()
    assert check.feed(data).out_of_step


def test_a_random_number_that_nothing_asked_for_is_wrong() -> None:
    assert VolatileCheck("random").feed(RANDOM_HEADER).out_of_step


def test_two_halves_of_different_answers_are_never_taken_for_one_after_a_break() -> None:
    check = VolatileCheck("random")
    check.request()
    check.feed(RANDOM_HEADER + b"a" * 30)
    check.broken()
    check.request()
    assert check.feed(b"a" * 34 + b"\n").out_of_step


@pytest.mark.parametrize(
    ("second", "right"),
    [(b"1700000000.000000002", True), (b"1700000000.000000001", False), (b"1699999999.999999999", False)],
)
def test_guest_time_must_go_on(second: bytes, right: bool) -> None:
    check = VolatileCheck("time")
    for body in (b"1700000000.000000001", second):
        check.request()
        verdict = check.feed(TIME_HEADER + body + b"\n")
    assert bool(verdict.fault) is not right
    assert check.guest_time_ns == int(second.replace(b".", b""))


# -- datagrams


def test_a_datagram_that_comes_back_is_right_and_so_are_late_and_second_copies() -> None:
    check = DatagramCheck("seed")
    first = check.request()
    check.broken()  # taken for lost
    second = check.request()
    assert check.feed(second) == Verdict(completed=1)
    assert check.feed(second) == Verdict()
    assert check.feed(first) == Verdict()


@given(where=st.integers(0, 199), change=st.integers(1, 255))
def test_one_changed_byte_of_a_datagram_is_found(where: int, change: int) -> None:
    check = DatagramCheck("seed")
    wrong = bytearray(check.request())
    wrong[where] ^= change
    verdict = check.feed(bytes(wrong))
    assert verdict.fault
    assert verdict.wrong_bytes == 200
    assert check.outstanding == 1


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d + b"x", lambda d: b""])
def test_a_datagram_of_another_length_is_found(change) -> None:  # type: ignore[no-untyped-def]
    check = DatagramCheck("seed")
    assert check.feed(change(check.request())).fault
