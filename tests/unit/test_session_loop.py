# SPDX-License-Identifier: LGPL-2.1-or-later
"""The event loop: files, timers, calls from other threads, and what a callback raises."""

from __future__ import annotations

import socket
import threading

import pytest

from remus_colo.adapters.xentime import XenClock
from remus_colo.session.loop import Loop


def test_timers_run_in_order_and_can_be_cancelled() -> None:
    loop, seen = Loop(), []
    loop.call_later(0.02, lambda: seen.append("later"))
    loop.call_later(0.0, lambda: seen.append("first"))
    loop.call_later(0.01, lambda: seen.append("never")).cancel()
    loop.call_later(0.03, loop.stop)
    loop.run()
    loop.close()
    assert seen == ["first", "later"]


def test_calls_of_another_thread_run_here_in_their_order() -> None:
    loop, seen = Loop(), []

    def other() -> None:
        for number in range(100):
            loop.call(lambda number=number: seen.append((number, threading.current_thread() is main)))
        loop.call(loop.stop)

    main = threading.current_thread()
    loop.call(lambda: threading.Thread(target=other).start())
    loop.run()
    loop.close()
    assert seen == [(number, True) for number in range(100)]


def test_readers_are_called_while_there_is_something() -> None:
    loop, seen = Loop(), []
    left, right = socket.socketpair()

    def read() -> None:
        seen.append(right.recv(1))
        if len(seen) == 3:
            loop.remove_reader(right)
            loop.stop()

    loop.add_reader(right, read)
    left.send(b"abc")
    loop.run()
    loop.close()
    left.close()
    right.close()
    assert b"".join(seen) == b"abc"


def test_a_reader_may_be_a_descriptor() -> None:
    loop = Loop()
    left, right = socket.socketpair()

    def read() -> None:
        right.recv(1)
        loop.remove_reader(right.fileno())
        left.send(b"b")  # nobody reads it
        loop.call_later(0.0, loop.stop)

    loop.add_reader(right.fileno(), read)
    left.send(b"a")
    loop.run()
    loop.close()
    assert right.recv(1) == b"b"
    left.close()
    right.close()


def test_work_beside_the_loop_hands_over_result_or_error() -> None:
    loop, seen = Loop(), []

    def done(result: object, error: BaseException | None) -> None:
        seen.append((result, type(error)))
        if len(seen) == 2:
            loop.stop()

    loop.thread("good", lambda: 42, done)
    loop.thread("bad", lambda: 1 // 0, done)
    loop.run()
    loop.close()
    assert sorted(seen, key=str) == sorted([(42, type(None)), (None, ZeroDivisionError)], key=str)


def test_what_a_callback_raises_ends_the_loop() -> None:
    loop = Loop()
    loop.call(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        loop.run()
    loop.close()


def test_xen_clock_finds_the_creation_time_from_below() -> None:
    created_ns, now = 5_000, iter(range(1_000_000, 9_000_000, 10_000))
    lateness = iter([700, 3, 900] * 100)

    def runstate() -> tuple[int, int]:
        now_ns = next(now)
        return now_ns - next(lateness), now_ns - created_ns

    clock = XenClock(runstate, samples=6)
    first = clock.now_ns()
    assert abs(first - (1_000_000 + 6 * 10_000)) <= 3
    assert clock.now_ns() > first


def test_threads_that_never_stop_calling_do_not_keep_timers_waiting() -> None:
    """Each call makes the next one, as a reader of a fast peer does that is let go on by each."""
    loop = Loop()
    counted = 0

    def again() -> None:
        nonlocal counted
        counted += 1
        if counted < 1_000_000:
            loop.call(again)

    loop.call(again)
    loop.call_later(0.0, loop.stop)
    loop.run()
    loop.close()
    assert counted < 1_000_000
