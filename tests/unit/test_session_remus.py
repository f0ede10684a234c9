# SPDX-License-Identifier: LGPL-2.1-or-later
"""A protection by Remus on the primary host, from its beginning to whatever ends it: the guest must go on, as
it was.
"""

from __future__ import annotations

import time

import pytest
from remus_world import RemusWorld

from remus_colo.checkpoint.periodic import RoundTimes
from remus_colo.errors import ExitStatus, NetworkError, RemusError, XenError
from remus_colo.relocation.schema import MessageType
from remus_colo.session.remus_worker import LATELY, WorkerStats

ERRORS = (XenError("Xen refused"), NetworkError("a link is gone"), RuntimeError("a mistake"))


def test_from_the_beginning_to_the_end() -> None:
    world = RemusWorld()
    world.after(5, lambda: world.session.request_stop())
    assert world.run() is ExitStatus.OK
    world.assert_clean()
    assert world.output.dropped is False
    assert world.backup.received.count(MessageType.CHECKPOINT_END) >= 4
    # Output is let go once for each acknowledgement that came.
    assert 4 <= world.steps.count("commit") <= world.backup.received.count(MessageType.CHECKPOINT_END)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("step", ["suspend", "postsuspend", "preresume", "commit"])
@pytest.mark.parametrize("count", [1, 3])
def test_whatever_fails_the_guest_goes_on(step: str, count: int, error: Exception) -> None:
    world = RemusWorld()
    if count == 1:
        world.faults.planned[step] = error
    else:
        world.after(count, lambda: world.faults.planned.update({step: error}))
    ended = world.run()
    world.assert_clean()
    assert ended is (error.exit_status if isinstance(error, RemusError) else error)
    assert world.output.dropped is False
    assert world.backup.received.count(MessageType.STOP) == 1


@pytest.mark.parametrize(
    ("message", "count", "status"),
    [
        (MessageType.CREATE, 1, ExitStatus.PEER_UNREACHABLE),
        (MessageType.CREATE_STREAM, 1, ExitStatus.PEER_UNREACHABLE),
        (MessageType.CHECKPOINT_END, 1, ExitStatus.PEER_UNREACHABLE),
        (MessageType.CHECKPOINT_BEGIN, 3, ExitStatus.UNPROTECTED),
        (MessageType.CHECKPOINT_STREAM, 3, ExitStatus.UNPROTECTED),
        (MessageType.CHECKPOINT_END, 3, ExitStatus.UNPROTECTED),
    ],
)
def test_a_backup_that_is_lost_at_any_moment(message: MessageType, count: int, status: ExitStatus) -> None:
    world = RemusWorld()
    world.backup.at[message, count] = lambda _: world.backup.leave()
    assert world.run() is status
    world.assert_clean()
    assert world.output.dropped is False
    assert ("release_all" in world.steps) is (message is not MessageType.CREATE)


def test_what_a_checkpoint_holds_is_not_let_go_before_it_is_acknowledged() -> None:
    """The backup has it, as far as that knows, and says nothing: no commit, and the next checkpoint does not begin."""
    world = RemusWorld()

    def silent(_: object) -> None:
        world.loop.call_later(0.2, world.session.request_stop)

    world.backup.at[MessageType.CHECKPOINT_END, 3] = silent
    assert world.run() is ExitStatus.OK
    assert world.steps.count("commit") == 2
    assert world.steps.count("postsuspend") == 3
    world.assert_clean()


def test_a_takeover_stops_the_guest_and_nothing_is_released() -> None:
    world = RemusWorld()
    world.after(3, lambda: world.backup.say(MessageType.TAKEOVER))
    assert world.run() is ExitStatus.FENCED
    assert world.engine.guest.gone
    assert world.output.dropped is True
    assert "release_all" not in world.steps


def test_a_bug_while_nobody_knows_who_is_active_releases_nothing() -> None:
    world = RemusWorld(fence=("/bin/sh", "-c", "exit 7"))  # no verdict
    world.after(3, world.backup.leave)

    def arbitrating() -> None:
        world.loop.call(lambda: 1 // 0)
        world.loop.call_later(0.1, lambda: world.loop.call(lambda: 1 // 0))

    world.on_event["arbitrating"] = arbitrating
    assert isinstance(world.run(), ZeroDivisionError)
    assert world.output.dropped is True
    assert "release_all" not in world.steps
    world.assert_clean()


def test_a_pause_is_borne_by_what_was_told_of_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first, in which the whole guest may be copied, is soon forgotten; and so is a long one, some time after."""
    stats = WorkerStats()
    told = []
    for number, pause_s in enumerate([9.0, 0.1, 0.3, *[0.2] * LATELY], 1):
        stats.note(RoundTimes(number=number, pause_s=pause_s))
        told.append(stats.longest_pause_s)
    assert told[:4] == [9.0, 0.1, 0.3, 0.3]
    assert told[-2:] == [0.3, 0.2]
    assert WorkerStats().longest_pause_s == 0.0


@pytest.mark.parametrize(("number", "status"), [(1, ExitStatus.PEER_UNREACHABLE), (3, ExitStatus.FENCED)])
def test_a_backup_that_is_lost_in_a_long_pause(
    number: int, status: ExitStatus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have looked for the guest in vain; but not before there is a replica."""
    world = RemusWorld()
    monkeypatch.setattr(world.session._lan, "secondary_active", lambda *_: True)
    monkeypatch.setattr(world.session.peer, "pause_told", lambda *_, **__: None)
    world.session.peer.self_monitor.guest_limit_s = 0.0

    def lost() -> None:
        world.backup.leave()
        while not world.session._peer_lost:
            time.sleep(0.001)

    if number == 1:
        world.at["postsuspend"] = lost
    else:
        world.after(number, lambda: world.at.update(postsuspend=lost))
    assert world.run() is status
    if status is ExitStatus.FENCED:
        assert "release_all" not in world.steps
        assert world.engine.guest.gone
    else:
        world.assert_clean()


def test_a_backup_that_is_lost_in_a_pause_is_judged_after_it() -> None:
    """While the guest stands still nobody knows for how long it will, and whether the backup will have looked in vain."""
    world = RemusWorld()
    lost_while_it_stood: list[bool] = []

    def lost() -> None:
        world.backup.leave()
        while "peer-lost" not in world.names():
            time.sleep(0.001)
        time.sleep(0.1)  # the loop goes on meanwhile
        lost_while_it_stood.append(world.session._peer_lost)

    world.after(3, lambda: world.at.update(postsuspend=lost))
    assert world.run() is ExitStatus.UNPROTECTED
    assert lost_while_it_stood == [False]
    world.assert_clean()
