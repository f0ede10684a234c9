# SPDX-License-Identifier: LGPL-2.1-or-later
"""Both channels to the other host: what is read ahead of the loop, and what counts as silence.  Over real sockets."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from primary_world import join_all

from remus_colo.errors import PeerLost
from remus_colo.failover.heartbeat import PeerMonitor
from remus_colo.relocation.channel import Channel
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.wire import Message
from remus_colo.session import backup, colo_checkpoints, inbox, peer, primary
from remus_colo.session.inbox import Inbox
from remus_colo.session.loop import Loop
from remus_colo.session.peer import HeartbeatConfig, Peer

PATIENCE_S = 30.0
FRAME = bytes(1 << 20)
LOTS = 4 * inbox.LIMIT_BYTES // len(FRAME)


class Ends:
    """A peer, and the other host's ends of its channels."""

    def __init__(self, timeout_s: float, **calls: Any) -> None:
        self.loop = Loop()
        self.starting = False
        self.received: list[Message] = []
        self.lost: list[Exception] = []
        pairs = [socket.socketpair() for _ in range(2)]
        self.control, self.data = (Channel(theirs, generation=1) for _, theirs in pairs)
        self.peer = Peer(
            self.loop,
            *(Channel(ours, generation=1) for ours, _ in pairs),
            HeartbeatConfig(0.01, timeout_s),
            on_message=self.received.append,
            on_lost=self.lost.append,
            state=lambda: "protected",
            starting=lambda: self.starting,
            **calls,
        )

    def close(self) -> None:
        self.peer.close()
        self.control.close()
        self.data.close()
        join_all()
        self.loop.close()


@contextlib.contextmanager
def ends(timeout_s: float = 30.0, **calls: Any) -> Iterator[Ends]:
    both = Ends(timeout_s, **calls)
    try:
        yield both
    finally:
        both.close()


def await_true(condition: object, what: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline_s, what
        time.sleep(0.005)


def test_a_loop_that_does_not_come_round_makes_the_sender_wait() -> None:
    with ends() as both:
        both.peer.start()
        sent = 0

        def send() -> None:
            nonlocal sent
            for _ in range(LOTS):
                both.data.send_bulk(MessageType.PAGES, 1, [FRAME], deadline_s=time.monotonic() + PATIENCE_S)
                sent += 1

        sender = threading.Thread(target=send)
        sender.start()
        data = both.peer._inboxes[1]
        await_true(lambda: data.full, "the reader never waited")
        # The kernel's buffers have a part of one more frame, and the reader has another.
        assert sent * len(FRAME) <= inbox.LIMIT_BYTES + 2 * len(FRAME)
        # Once the loop comes round, all of it arrives, in order.
        done = lambda: len(both.received) == LOTS or time.monotonic() > deadline_s  # noqa: E731
        deadline_s = time.monotonic() + PATIENCE_S

        def look() -> None:
            if done():
                both.loop.stop()
            else:
                both.loop.call_later(0.005, look)

        look()
        both.loop.run()
        sender.join(PATIENCE_S)
        assert (sent, len(both.received), both.lost) == (LOTS, LOTS, [])


def test_a_host_is_not_silent_while_it_is_not_listened_to() -> None:
    with ends(timeout_s=0.02) as both:
        both.peer.start()
        for _ in range(inbox.LIMIT_BYTES // inbox.OVERHEAD_BYTES + 1):
            both.control.send_control(MessageType.ACK, 1)
        await_true(lambda: both.peer._inboxes[0].full, "the reader never waited")
        await_true(lambda: both.peer.silence_s() > 0.02, "no silence")
        assert not both.peer.expired()
        both.loop.call(both.loop.stop)  # after what lies there
        both.loop.run()
        await_true(lambda: both.peer.expired(), "a host that has said all, and then is silent, is not lost")


def test_a_silent_host_is_given_longer_while_there_is_no_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    with ends(timeout_s=0.02) as both:
        both.starting = True
        both.peer.monitor.beat(time.monotonic())
        await_true(lambda: both.peer.silence_s() > 0.02, "no silence")
        assert not both.peer.expired()
        both.starting = False
        assert both.peer.expired()
        both.starting = True
        monkeypatch.setattr(peer, "PATIENCE_AT_START_S", 0.03)
        await_true(lambda: both.peer.expired(), "a host that never says anything is waited for for ever")


def test_a_reader_that_waits_ends_with_its_peer() -> None:
    with ends() as both:
        both.peer.start()
        for _ in range(inbox.LIMIT_BYTES // inbox.OVERHEAD_BYTES + 1):
            both.control.send_control(MessageType.ACK, 1)
        await_true(lambda: both.peer._inboxes[0].full, "the reader never waited")
        readers = [thread for thread in threading.enumerate() if thread.name in ("peer-control", "peer-data")]
        both.peer.close()
        for thread in readers:
            thread.join(PATIENCE_S)
        assert not any(thread.is_alive() for thread in readers)


def test_a_message_larger_than_the_room_goes_through_alone() -> None:
    loop, seen = Loop(), []
    small = Inbox(
        loop, lambda message: (seen.append(len(message.data)), loop.stop() if len(seen) == 2 else None), 100
    )

    def put() -> None:
        for _ in range(2):
            assert small.put(Message(MessageType.PAGES, 1, 1, data=bytes(1000)))

    threading.Thread(target=put).start()
    loop.run()
    loop.close()
    assert seen == [1000, 1000]


def test_a_channel_that_breaks_is_told_once() -> None:
    with ends() as both:
        both.peer.start()
        both.control.close()
        both.data.close()
        await_true(lambda: len(both.loop._calls) == 2, "both readers notice")
        both.loop.call(both.loop.stop)
        both.loop.run()
        assert [type(error) for error in both.lost] == [PeerLost]


@pytest.mark.parametrize("lost", [False, True])
def test_what_is_sent_to_a_host_that_is_gone_is_told_to_the_loop_and_not_raised(lost: bool) -> None:
    with ends() as both:
        if lost:
            both.control.close()
        both.peer.send(MessageType.STOP, reason="the end")
        both.loop.call(both.loop.stop)
        both.loop.run()
        assert len(both.lost) == lost


def test_a_silent_host_is_looked_at_when_it_may_be_lost() -> None:
    with ends() as both:
        interval_s, timeout_s = both.peer.config.interval_s, both.peer.config.timeout_s
        assert both.peer.next_look_s() == interval_s  # it was not heard yet
        now_s = time.monotonic()
        both.peer.monitor.beat(now_s)
        assert both.peer.next_look_s() == interval_s
        both.peer.monitor = PeerMonitor(timeout_s)
        both.peer.monitor.beat(now_s - timeout_s + interval_s / 2)
        assert 0 < both.peer.next_look_s() <= interval_s / 2 + peer.LOOK_SLACK_S
        both.peer.monitor = PeerMonitor(timeout_s)
        both.peer.monitor.beat(now_s - timeout_s / 2 + interval_s / 2)
        assert 0 < both.peer.next_look_s(timeout_s / 2) <= interval_s / 2 + peer.LOOK_SLACK_S
        both.peer.monitor = PeerMonitor(timeout_s)
        both.peer.monitor.beat(now_s - 2 * timeout_s)
        assert both.peer.next_look_s() == interval_s  # it is lost: nothing to wait for


def test_clients_that_wait_make_a_silent_host_be_lost_earlier() -> None:
    since_s: list[float | None] = [None]
    with ends(timeout_s=8.0, waiting_since_s=lambda: since_s[0]) as both:
        now_s = time.monotonic()
        both.peer.monitor.beat(now_s - 5.0)
        assert not both.peer.expired()
        since_s[0] = now_s - 6.0
        assert not both.peer.expired()
        since_s[0] = now_s - 8.5
        assert both.peer.expired()
        both.peer.monitor.beat(now_s - 1.0)
        assert not both.peer.expired(), "it lives"


def test_a_look_at_the_lan_is_long_enough_and_done_in_time() -> None:
    """Longer than a primary that is alive may be frozen without knowing it, and over when that one counts as lost."""
    assert peer.SELF_LIMIT < peer.PROBE_WINDOW < 1 - backup.SUSPECT_AFTER


def test_a_guest_that_is_silent_for_as_long_as_is_borne_is_no_doubt() -> None:
    """What is borne is less than what is looked for, and grows with the pauses that the backup was told of."""
    for pause_s in (0.0, 0.5, 7.0):
        assert peer.bearable_s(2.0, pause_s) < peer.look_s(2.0, pause_s)
        assert peer.bearable_s(2.0, pause_s) > pause_s
    assert peer.bearable_s(2.0) == 2.0 * peer.SELF_LIMIT
    assert (peer.look_s(2.0, 0.4), peer.look_s(2.0, 7.0)) == (1.0, 10.5)
    with ends(timeout_s=2.0) as both:
        monitor = both.peer.self_monitor
        assert monitor.guest_limit_s == 0.8
        both.peer.pause_told(7.0, certain=False)
        assert monitor.guest_limit_s == 0.8  # it may not have heard yet
        both.peer.pause_told(7.0, certain=True)
        assert monitor.guest_limit_s == pytest.approx(8.4)
        both.peer.pause_told(1.0, certain=False)
        assert monitor.guest_limit_s == pytest.approx(1.2)  # or it may have


def test_the_input_is_not_held_for_so_long_that_the_guest_seems_dead() -> None:
    assert colo_checkpoints.HOLD_LIMIT < peer.SELF_LIMIT


def test_the_primary_gives_its_backup_less_than_the_time_out() -> None:
    assert primary.patience_s(HeartbeatConfig(0.25, 2.0)) == 1.6
    assert primary.patience_s(HeartbeatConfig(0.5, 2.0)) == 1.5
    assert primary.patience_s(HeartbeatConfig(0.7, 1.0)) == 0.5
