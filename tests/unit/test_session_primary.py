# SPDX-License-Identifier: LGPL-2.1-or-later
"""A protection on the primary host, from its beginning to whatever ends it: the guest must go on, as it was."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pytest
from primary_world import DOMID, World

from remus_colo.adapters import backend
from remus_colo.checkpoint.guestinfo import Mode
from remus_colo.errors import ExitStatus, NetworkError, PeerLost, RemusError, XenError
from remus_colo.failover.primary import PrimaryEvent
from remus_colo.proxy.comparator import CheckpointRequest, Reason
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.wire import Message
from remus_colo.session import colo_checkpoints, inherited, peer, primary

MODES = (Mode.TRANSPARENT, Mode.COOPERATIVE)


def stop_when_protected(world: World) -> None:
    world.on_event["protected"] = world.session.request_stop


def stop_after_checkpoint(world: World, number: int) -> None:
    def answer_and_stop(message: Message) -> None:
        world.backup.answer(message)
        world.session.request_stop()

    world.backup.at[MessageType.CHECKPOINT_END, number] = answer_and_stop


@pytest.mark.parametrize("mode", MODES)
def test_from_the_beginning_to_the_end(mode: Mode) -> None:
    world = World(mode)
    stop_when_protected(world)
    assert world.run() is ExitStatus.OK
    world.assert_clean()
    assert world.states() == ["creating", "syncing", "committed", "protected", "stopping", "stopped"]
    assert world.backup.received.count(MessageType.STOP) == 1
    assert world.session.stats.reasons == {"start": 1}


def test_connections_that_have_lived_through_a_failover_are_told_to_the_backup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = {"0": [["10.77.0.5", 80, "10.77.0.9", 40000, 7]]}
    monkeypatch.setattr(inherited, "read", lambda domid: told)
    world = World(Mode.TRANSPARENT)
    stop_when_protected(world)
    heard: list[object] = []

    def create(message: Message) -> None:
        heard.append(message.fields["connections"])
        world.backup.answer(message)

    world.backup.at[MessageType.CREATE, 1] = create
    assert world.run() is ExitStatus.OK
    assert heard == [told]


AT_START = ("suspend", "start_logging", "await_connected", "path.start")
AT_CHECKPOINT = (
    "prepare",
    "hold_input",
    "drain_input",
    "collect",
    "cut",
    "release_input",
    "commit",
    "secondary_resumed",
)
ERRORS = (XenError("Xen refused"), NetworkError("a link is gone"), RuntimeError("a bug"))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("step", (*AT_START, *AT_CHECKPOINT))
@pytest.mark.parametrize("mode", MODES)
def test_whatever_fails_the_guest_goes_on(mode: Mode, step: str, error: Exception) -> None:
    """At the beginning: one step fails, and nothing is left of the attempt on either host."""
    world = World(mode)
    world.faults.planned[step] = error
    ended = world.run()
    world.assert_clean()
    if isinstance(error, RemusError):
        assert ended is error.exit_status
        assert world.session.failure is error
    else:
        assert ended is error
    assert world.backup.received.count(MessageType.STOP) == 1
    assert world.path.dropped is False
    assert "error" in world.names()


def test_a_guest_that_loses_an_interface() -> None:
    """What was about to be done with it fails, which says little."""
    world = World()
    world.faults.planned["hold_input"] = NetworkError("cannot change the plug of vif7.0: No such device")
    world.path.links.exists.return_value = False
    assert world.run() is ExitStatus.DOMAIN
    assert str(world.session.failure).startswith(f"vif{DOMID}.0 is gone: if the guest was not destroyed")
    world.assert_clean()


@pytest.mark.parametrize("more", [{f"vif{DOMID}.0", f"vif{DOMID}.0-emu"}, {f"vif{DOMID}.1"}], ids=str)
def test_a_guest_that_gets_an_interface(monkeypatch: pytest.MonkeyPatch, more: set[str]) -> None:
    """Nobody would hold what it says there, and nobody would say it after a failover."""
    world = World()
    monkeypatch.setattr(backend, "interfaces", lambda domid: {f"vif{domid}.0"})

    def protected() -> None:
        monkeypatch.setattr(backend, "interfaces", lambda domid: more)
        world.loop.call_later(0.01, world.session._check_guest)
        world.loop.call_later(0.1, world.session.request_stop)

    world.on_event["protected"] = protected
    new = f"vif{DOMID}.1" in more
    assert world.run() is (ExitStatus.DOMAIN if new else ExitStatus.OK)
    assert (f"the guest has got vif{DOMID}.1" in str(world.session.failure)) is new
    world.assert_clean()


def test_a_guest_that_has_suspended_when_its_stop_fails_runs_before_the_end() -> None:
    """How long that takes is up to the backup."""
    world = World(Mode.COOPERATIVE)
    stop = world.engine.stop

    def stop_and_fail() -> None:
        stop()
        raise XenError("a ring cannot be read")

    world.engine.stop = stop_and_fail  # type: ignore[method-assign]
    ran: list[bool] = []

    def on_stop(message: Message) -> None:
        ran.append(world.engine.guest.running)
        world.backup.answer(message)

    world.backup.at[MessageType.STOP, 1] = on_stop
    assert world.run() is ExitStatus.HOST
    assert ran == [True]
    world.assert_clean()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("step", AT_CHECKPOINT)
@pytest.mark.parametrize("mode", MODES)
def test_whatever_fails_in_a_later_checkpoint(mode: Mode, step: str, error: Exception) -> None:
    world = World(mode)

    def protected() -> None:
        world.faults.planned[step] = error
        world.session.request_checkpoint(CheckpointRequest(Reason.USER, ""))

    world.on_event["protected"] = protected
    ended = world.run()
    world.assert_clean()
    assert ended is (error.exit_status if isinstance(error, RemusError) else error)
    assert world.backup.received.count(MessageType.STOP) == 1


@pytest.mark.parametrize("first", [XenError("Xen refused"), RuntimeError("a bug")], ids=["error", "bug"])
def test_a_second_error_ends_it_at_once_and_the_backup_is_told(first: Exception) -> None:
    world = World()
    world.faults.planned = {"secondary_resumed": first}
    world.backup.at[MessageType.STOP, 1] = lambda message: world.session.loop.call(lambda: 1 // 0)
    ended = world.run()
    world.assert_clean()
    assert ended is first if isinstance(first, RuntimeError) else ended is ExitStatus.HOST
    assert world.backup.received.count(MessageType.BYE) == 1


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(3)], ids=["ctrl-c", "exit"])
def test_an_interrupt_in_a_scripts_thread_ends_it_in_concert_with_the_backup(
    interrupt: BaseException, times: int
) -> None:
    """Which would otherwise see the connection break, and a primary host that may be dead."""
    world = World()

    def raise_it() -> None:
        raise interrupt

    world.on_event["protected"] = lambda: world.loop.call(raise_it)
    if times > 1:
        world.backup.at[MessageType.STOP, 1] = lambda message: world.loop.call(raise_it)
    with pytest.raises(type(interrupt)):
        world.run()
    world.assert_clean()
    assert world.backup.received.count(MessageType.STOP) == 1
    assert world.backup.received.count(MessageType.BYE) == 1
    assert world.path.dropped is False
    assert "error" not in world.names()


def test_a_part_of_the_end_that_fails_does_not_keep_the_others() -> None:
    world = World()
    stop_when_protected(world)
    bug = RuntimeError("a bug")
    world.faults.planned["path.close"] = bug
    assert world.run() is bug
    assert world.engine.closed
    assert world.engine.guest.running


def test_a_bug_while_nobody_knows_who_is_active_releases_nothing() -> None:
    """It waits for the verdict, as for any other reason to end."""
    world = World(fence=("/bin/sh", "-c", "exit 7"))  # no verdict

    def protected() -> None:
        world.backup.leave()

    world.on_event["protected"] = protected

    def arbitrating() -> None:
        world.loop.call(lambda: 1 // 0)
        world.loop.call_later(0.1, lambda: world.loop.call(lambda: 1 // 0))

    world.on_event["arbitrating"] = arbitrating
    ended = world.run()
    assert isinstance(ended, ZeroDivisionError)
    assert world.path.dropped is True
    assert "release_all" not in world.steps
    world.assert_clean()


def test_a_doubt_that_lasts_is_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(fence=("/bin/sh", "-c", "exit 7"))  # no verdict
    handle, unknown = world.session.handle, itertools.count(1)

    def count(event: PrimaryEvent, reason: str = "") -> None:
        if event is PrimaryEvent.BACKUP_UNKNOWN and next(unknown) == 3:
            world.engine.guest.gone = True  # which ends it
            world.loop.call(world.session.guest_alive)
        handle(event, reason)

    monkeypatch.setattr(world.session._doubt, "_decided", count)
    monkeypatch.setattr("remus_colo.session.doubt.INTERVAL_S", 0.01)
    world.on_event["protected"] = world.backup.leave
    world.run()
    assert ["nobody can tell" in record.message for record in caplog.records].count(True) == 1


def test_a_host_that_is_cut_off_from_backup_and_lan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backup finds nobody there and takes over: what the guest says is held until the LAN tells."""
    world = World()
    answers: Iterator[bool | None] = iter([None, True])
    monkeypatch.setattr(world.session._lan, "unplugged", lambda: True)
    monkeypatch.setattr(world.session._lan, "secondary_active", lambda *_: next(answers))
    monkeypatch.setattr("remus_colo.session.doubt.INTERVAL_S", 0.01)
    world.on_event["protected"] = world.backup.leave
    assert world.run() is ExitStatus.FENCED
    assert "release_all" not in world.steps
    assert world.engine.guest.gone


def test_an_arbiter_that_fails_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(fence=("unused",))
    answers: Iterator[Exception | bool] = iter([RuntimeError("a mistake"), False])

    def judge(_known: object) -> bool:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(world.session._doubt, "_judge", judge)
    monkeypatch.setattr("remus_colo.session.doubt.INTERVAL_S", 0.01)
    world.on_event["protected"] = world.backup.leave
    assert world.run() is ExitStatus.UNPROTECTED
    world.assert_clean()


@pytest.mark.parametrize("mode", MODES)
def test_a_guest_that_is_destroyed_in_a_checkpoint(mode: Mode) -> None:
    world = World(mode)

    def gone() -> None:
        world.engine.guest.gone = True
        raise XenError("there is no such domain", domid=7, errno=3)

    world.at["collect"] = gone
    assert world.run() is ExitStatus.OK
    assert "guest-gone" in world.names()
    assert "error" not in world.names()
    assert world.path.closed
    assert world.engine.closed


def test_a_takeover_stops_the_guest_and_nothing_is_released() -> None:
    world = World()
    world.on_event["protected"] = lambda: world.backup.say(MessageType.TAKEOVER)
    assert world.run() is ExitStatus.FENCED
    assert world.engine.guest.gone
    assert world.path.dropped is True
    assert "release_all" not in world.steps
    assert world.path.links.set_down.called


def test_a_takeover_stops_the_guest_whatever_fails() -> None:
    world = World()
    world.path.links.set_down.side_effect = RuntimeError("a bug")
    world.on_event["protected"] = lambda: world.backup.say(MessageType.TAKEOVER)
    assert isinstance(world.run(), RuntimeError)
    assert world.engine.guest.gone
    assert world.path.dropped is True


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_while_the_guest_is_copied_is_an_end_as_asked(mode: Mode) -> None:
    """The backup has no more use for the copy, and closes its end of it; its BYE may be read only after that."""
    world = World(mode)
    goodbye: list[bool] = []

    def stop_and_break() -> None:
        world.session.request_stop()
        while "stopping" not in world.states():
            pass
        world.loop.call_later(0.1, lambda: world.backup.say(MessageType.BYE))
        raise PeerLost("the backup closed the connection")

    world.at["suspend"] = stop_and_break
    world.backup.at[MessageType.STOP, 1] = lambda _: goodbye.append(True)
    assert world.run() is ExitStatus.OK
    assert goodbye == [True]
    assert world.session.failure is None
    assert "error" not in world.names()
    world.assert_clean()


# -- the backup is lost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("message", "count", "status"),
    [
        (MessageType.CREATE, 1, ExitStatus.PEER_UNREACHABLE),
        (MessageType.CREATE_STREAM, 1, ExitStatus.PEER_UNREACHABLE),
        (MessageType.PREPARE, 1, ExitStatus.PEER_UNREACHABLE),
        (MessageType.CHECKPOINT_BEGIN, 1, ExitStatus.PEER_UNREACHABLE),
        (MessageType.CHECKPOINT_END, 1, ExitStatus.PEER_UNREACHABLE),
        (MessageType.PREPARE, 2, ExitStatus.UNPROTECTED),
        (MessageType.CHECKPOINT_BEGIN, 2, ExitStatus.UNPROTECTED),
        (MessageType.CHECKPOINT_END, 2, ExitStatus.UNPROTECTED),
        (MessageType.STOP, 1, ExitStatus.OK),
    ],
)
def test_a_backup_that_is_lost_at_any_moment(
    mode: Mode, message: MessageType, count: int, status: ExitStatus
) -> None:
    world = World(mode)
    world.backup.at[message, count] = lambda _: world.backup.leave()

    def protected() -> None:
        if message is MessageType.STOP:
            world.session.request_stop()
        else:
            world.session.request_checkpoint(CheckpointRequest(Reason.USER, ""))

    world.on_event["protected"] = protected
    assert world.run() is status
    world.assert_clean()
    assert world.path.dropped is False
    assert ("unprotected" in world.names()) is (status is ExitStatus.UNPROTECTED)


def test_a_backup_that_leaves_before_the_svm_has_stopped_costs_no_packet() -> None:
    """There was no cut: what the comparator holds is let go by the end, and input comes in again at once."""
    world = World(Mode.COOPERATIVE)
    world.backup.at[MessageType.PREPARE, 2] = lambda _: world.backup.leave()
    world.on_event["protected"] = lambda: world.session.request_checkpoint(CheckpointRequest(Reason.USER, ""))
    assert world.run() is ExitStatus.UNPROTECTED
    assert world.steps.count("cut") == 1  # the first checkpoint's
    assert "release_all" in world.steps
    world.assert_clean()


def test_a_guest_is_not_kept_from_its_input_by_a_backup_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The link may be gone, and then the backup looks for the guest on the LAN; when it does answer, the checkpoint goes on."""
    monkeypatch.setattr(colo_checkpoints, "HOLD_LIMIT", 0.0001)
    world = World(Mode.COOPERATIVE)
    silent: list[bool] = []

    def slow(message: Message) -> None:
        while "give_input" not in world.steps[first:]:
            time.sleep(0.001)
        silent.append(world.path.vifs[0].input_held or world.path.vifs[0].mirror_held)
        world.backup.answer(message)

    first = 0

    def protected() -> None:
        nonlocal first
        first = len(world.steps)
        world.backup.at[MessageType.PREPARE, 2] = slow
        world.session.request_checkpoint(CheckpointRequest(Reason.USER, ""))

    world.on_event["protected"] = protected
    stop_after_checkpoint(world, 2)
    assert world.run() is ExitStatus.OK
    assert silent == [False]
    assert world.steps[first:].count("hold_input") == 2
    assert world.steps.count("collect") == 2
    world.assert_clean()


@pytest.mark.parametrize("limit_s", [0.0, 30.0])
def test_a_backup_that_is_lost_while_the_guest_answers_nobody(
    limit_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For so long that the backup may have looked for it in vain, and be active: nobody knows before the LAN is asked."""
    world = World(Mode.COOPERATIVE)
    world.session.peer.self_monitor.guest_limit_s = limit_s
    monkeypatch.setattr(world.session._lan, "secondary_active", lambda *_: True)
    world.backup.at[MessageType.PREPARE, 2] = lambda _: world.backup.leave()
    world.on_event["protected"] = lambda: world.session.request_checkpoint(CheckpointRequest(Reason.USER, ""))
    status = world.run()
    if limit_s:
        assert status is ExitStatus.UNPROTECTED
        world.assert_clean()
    else:
        assert status is ExitStatus.FENCED
        assert "release_all" not in world.steps


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("standby", ExitStatus.OK),
        ("syncing", ExitStatus.OK),
        ("arbitrating", ExitStatus.FENCED),
        ("", ExitStatus.FENCED),
    ],
)
def test_the_guests_own_mac_in_the_lan(
    state: str, status: ExitStatus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is the backup's, or nobody knows; but not if that says that it waits: the only guest is not destroyed for a loop."""
    monkeypatch.setattr(primary, "GUEST_CHECK_S", 0.05)
    world = World()
    lan = world.session._lan
    monkeypatch.setattr(lan, "conflict", lambda: lan._conflict)
    no_conflict = lan.no_conflict

    def settled() -> None:
        no_conflict()
        world.session.request_stop()

    monkeypatch.setattr(lan, "no_conflict", settled)

    def protected() -> None:
        if state:
            world.backup.say(MessageType.HEARTBEAT, sequence=1, sent_ns=1, state=state, seen=0)
            while world.session.peer.peer_state != state:
                time.sleep(0.001)
        lan._conflict = True

    world.on_event["protected"] = protected
    assert world.run() is status
    assert ("there is a loop" in caplog.text) is (status is ExitStatus.OK)
    if status is ExitStatus.OK:
        world.assert_clean()


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_that_is_given_up_while_the_guest_suspends(mode: Mode) -> None:
    """The copy does not come about, and the guest goes on."""
    world = World(mode)

    def protected() -> None:
        def lost() -> None:
            world.backup.leave()
            if mode is Mode.COOPERATIVE:  # in a thread: the loop learns of it meanwhile
                while "unprotected" not in world.names():
                    pass

        world.at["suspend" if mode is Mode.COOPERATIVE else "pause"] = lost
        world.session.request_checkpoint(CheckpointRequest(Reason.USER, ""))

    world.on_event["protected"] = protected
    assert world.run() is ExitStatus.UNPROTECTED
    world.assert_clean()


def test_a_backup_that_refuses_says_why() -> None:
    world = World()
    world.backup.at[MessageType.CREATE, 1] = lambda _: world.backup.say(
        MessageType.REFUSE, reason="there is no bridge 'xenbr7'", exit_status=5
    )
    assert world.run() is ExitStatus.PEER_REFUSED
    assert "no bridge 'xenbr7'" in str(world.session.failure)
    world.assert_clean()


@pytest.mark.parametrize(
    ("silent_from", "status"),
    [
        (MessageType.CREATE, ExitStatus.PEER_UNREACHABLE),
        (MessageType.CHECKPOINT_END, ExitStatus.PEER_UNREACHABLE),
    ],
)
def test_a_backup_that_falls_silent(
    silent_from: MessageType, status: ExitStatus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer, "PATIENCE_AT_START_S", 1.5)
    world = World(timeout_s=1.0)  # by which this machine runs now and then, else it is ours that was silent
    world.backup.at[silent_from, 1] = lambda _: None
    assert world.run() is status
    assert isinstance(world.session.failure, PeerLost)
    world.assert_clean()


def test_since_when_clients_wait_for_the_backup() -> None:
    """For the first of what is held and what the guest is not given; not before there is a copy that could be lost."""
    world = World(Mode.COOPERATIVE)
    since_s: list[float | None] = []

    def note(held_s: float | None) -> None:
        world.path.vifs[0].waiting_since_s = held_s
        since_s.append(world.session._waiting_since_s())

    def protected() -> None:
        note(5.0)
        note(None)
        world.session.peer.guest_silent(7.0)
        note(None)
        note(9.0)
        note(5.0)
        world.session.request_stop()

    world.at["commit"] = lambda: note(5.0)
    world.on_event["protected"] = protected
    assert world.run() is ExitStatus.OK
    assert since_s == [None, 5.0, None, 7.0, 7.0, 5.0]
    world.assert_clean()


# -- requests --------------------------------------------------------------------------------------------------


def test_a_request_during_a_checkpoint_is_kept_if_it_came_after_the_cut() -> None:
    """What is asked for before the guest is copied is settled by that copy; what is asked for after it is not."""
    world = World()

    def protected() -> None:
        world.at["collect"] = lambda: world.session._checkpoints.request(
            CheckpointRequest(Reason.USER, "before")
        )
        world.at["release_input"] = lambda: world.session._checkpoints.request(
            CheckpointRequest(Reason.USER, "after")
        )
        world.at["commit"] = lambda: world.session._checkpoints.request(
            CheckpointRequest(Reason.USER, "also after")
        )
        world.session.request_checkpoint(CheckpointRequest(Reason.USER, "first"))

    world.on_event["protected"] = protected
    stop_after_checkpoint(world, 3)
    assert world.run() is ExitStatus.OK
    asked = [fields["detail"] for name, fields in world.events if name == "checkpoint-asked"]
    assert asked == ["first", "after"]
    world.assert_clean()


def test_a_stop_while_a_request_waits() -> None:
    world = World()

    def protected() -> None:
        world.session._checkpoints.request(CheckpointRequest(Reason.USER, ""))
        world.session.handle(PrimaryEvent.STOP_REQUESTED, reason="the user's")

    world.on_event["protected"] = lambda: world.loop.call(protected)
    assert world.run() is ExitStatus.OK
    assert world.session.stats.epoch == 1
    world.assert_clean()
