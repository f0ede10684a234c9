# SPDX-License-Identifier: LGPL-2.1-or-later
"""A protection on the backup host: whatever happens the SVM is taken down with all that belongs to it, or serves."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from backup_world import DOMID, NOW_NS, PATIENCE_S, Primary, World

from remus_colo.errors import DomainError, HostError, NetworkError, PeerLost, RemusError, XenError
from remus_colo.failover.arbiter import Verdict
from remus_colo.failover.backup import UnknownPolicy
from remus_colo.proxy.rewriter import Connection
from remus_colo.relocation.schema import MessageType
from remus_colo.session import backup, inherited
from remus_colo.session.colo_backup import STREAM_PIECES

ERRORS = (XenError("Xen refused"), NetworkError("a link is gone"), RuntimeError("a mistake"))
error_of_each_kind = pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)


def bug() -> None:
    raise RuntimeError("a mistake")


def test_from_the_beginning_to_the_end() -> None:
    world = World()
    with world.running() as primary:
        primary.begin()
        primary.checkpoint()
        primary.checkpoint()
        primary.stop()
    world.assert_gone()
    assert world.destroyed == 1
    assert world.ended is None
    assert world.texts() == []


@error_of_each_kind
@pytest.mark.parametrize("step", ["path.start", "feed", "finish", "start", "open_queues", "attach"])
def test_whatever_fails_at_the_start(step: str, error: Exception) -> None:
    """The primary is refused, with the reason."""
    world = World()
    world.faults.planned[step] = error
    with world.running() as primary:
        with contextlib.suppress(PeerLost):  # it may be over before all is sent
            primary.send_guest()
        assert str(error) in primary.expect(MessageType.REFUSE).fields["reason"]
        assert MessageType.BYE in primary.rest()
    world.assert_gone()
    assert len(world.texts()) == 1
    assert world.ended is None


def test_a_host_without_the_guests_bridge_refuses_at_once_and_not_when_it_is_needed() -> None:
    world = World(bridges=())
    with world.running() as primary:
        assert (
            "there is no bridge 'xenbr0' on this host" in primary.expect(MessageType.REFUSE).fields["reason"]
        )
    world.assert_gone()
    assert "feed" not in world.faults.steps


def test_what_a_killed_remusd_has_left_is_named_and_left_alone() -> None:
    """It may be another's: whoever knows that it is not destroys it."""
    world = World(names={"3": "other", "4": "web--secondary"})
    with world.running() as primary:
        reason = primary.expect(MessageType.REFUSE).fields["reason"]
    assert "there is a domain web--secondary on this host already" in reason
    assert "xl destroy web--secondary" in reason
    assert world.destroyed == 0
    assert world.path.closed is False


def test_a_domain_that_has_the_guests_own_name_is_in_the_way() -> None:
    """The guest as it was before an earlier failover, say, that was started again with its host: with the
    same addresses.
    """
    world = World(names={"3": "other", "4": "web"})
    with world.running() as primary:
        reason = primary.expect(MessageType.REFUSE).fields["reason"]
    assert "there is a domain web on this host already" in reason
    assert world.destroyed == 0


@error_of_each_kind
@pytest.mark.parametrize("step", ["prepare", "apply", "await_forwarding", "reset", "resume"])
def test_whatever_fails_at_a_checkpoint(step: str, error: Exception) -> None:
    """The primary is told that protection is over."""
    world = World()
    with world.running() as primary:
        primary.begin()
        primary.checkpoint()
        world.faults.planned[step] = error
        with contextlib.suppress(PeerLost):  # it may be over before all is sent
            primary.prepare()
            primary.send_checkpoint()
        assert {MessageType.ABORT, MessageType.BYE} <= set(primary.rest())
    world.assert_gone()
    assert world.ended is None


TEN_MINUTES_NS = 600 * 10**9


@pytest.mark.parametrize("offset_ns", [TEN_MINUTES_NS, -TEN_MINUTES_NS])
def test_the_svm_never_runs_with_another_clock_than_the_guests(offset_ns: int) -> None:
    """It is set before the SVM first runs, and at each checkpoint when all of it is loaded."""
    world = World(clock_offset_ns=offset_ns)
    with world.running() as primary:
        primary.begin()
        primary.stopped_ns = NOW_NS + offset_ns - 5_000_000
        primary.checkpoint()
        primary.checkpoint()
        primary.stop()
    assert world.engine.clock_offsets_ns == [offset_ns] * 3
    told = [step for step in world.faults.steps if step in ("set_clock", "start", "apply", "resume")]
    assert told == ["set_clock", "start"] + ["apply", "set_clock", "resume"] * 2
    stopped_ms = [fields["stopped_ms"] for event, fields in world.events if event == "clock"]
    assert stopped_ms == [5.0, 5.0]


def test_the_guests_clock_does_not_go_back_however_badly_it_was_measured() -> None:
    world = World(clock_offset_ns=-TEN_MINUTES_NS)
    with world.running() as primary:
        primary.begin()
        primary.stopped_ns = NOW_NS - TEN_MINUTES_NS + 30_000_000
        primary.checkpoint()
        primary.stop()
    assert world.engine.clock_offsets_ns == [-TEN_MINUTES_NS, -TEN_MINUTES_NS + 30_000_000]


def test_a_clock_that_drifts_is_followed() -> None:
    world = World(clock_offset_ns=TEN_MINUTES_NS)
    with world.running() as primary:
        primary.begin()
        primary.checkpoint()
        probe = primary.expect(MessageType.CLOCK_PROBE)
        now_ns = NOW_NS + TEN_MINUTES_NS + 1_000_000
        primary.control.send_control(
            MessageType.CLOCK_REPLY, 0, dict(probe.fields) | {"received_ns": now_ns, "replied_ns": now_ns}
        )
        primary.checkpoint()
        primary.stop()
    assert world.engine.clock_offsets_ns == [TEN_MINUTES_NS, TEN_MINUTES_NS, TEN_MINUTES_NS + 1_000_000]


def test_a_xen_that_refuses_the_clock_refuses_the_guest() -> None:
    world = World(clock_offset_ns=TEN_MINUTES_NS)
    world.faults.planned["set_clock"] = XenError("could not set the system time offset")
    with world.running() as primary:
        with contextlib.suppress(PeerLost):  # it may be over before all is sent
            primary.send_guest()
        assert "could not set the system time offset" in primary.expect(MessageType.REFUSE).fields["reason"]
    assert "start" not in world.faults.steps
    world.assert_gone()


def test_a_xen_that_refuses_the_clock_of_a_checkpoint_ends_the_protection() -> None:
    world = World(clock_offset_ns=TEN_MINUTES_NS)
    with world.running() as primary:
        primary.begin()
        primary.checkpoint()
        world.faults.planned["set_clock"] = XenError("could not set the system time offset")
        with contextlib.suppress(PeerLost):
            primary.prepare()
            primary.send_checkpoint()
        assert {MessageType.ABORT, MessageType.BYE} <= set(primary.rest())
    world.assert_gone()


def test_without_the_patch_a_host_that_is_behind_cannot_take_the_checkpoint() -> None:
    """Its clock fell behind since the mode was chosen, by more than can be waited for."""
    world = World()
    with world.running() as primary:
        primary.begin()
        primary.stopped_ns = NOW_NS + 10_000_000
        primary.checkpoint()
        primary.stopped_ns = NOW_NS + 21_000_000
        with contextlib.suppress(PeerLost):
            primary.prepare()
            primary.send_checkpoint()
        assert {MessageType.ABORT, MessageType.BYE} <= set(primary.rest())
    assert world.engine.clock_offsets_ns == []
    assert world.faults.steps.count("resume") == 1
    world.assert_gone()


@pytest.mark.parametrize("moment", ["creating", "syncing", "preparing", "receiving", "standby"])
def test_a_bug_at_any_moment_leaves_nothing(moment: str) -> None:
    world = World()
    with world.running() as primary:
        if moment != "creating":
            primary.begin()
        if moment in ("preparing", "receiving", "standby"):
            primary.checkpoint()
        if moment in ("preparing", "receiving"):
            primary.prepare()
        if moment == "receiving":
            primary.send_checkpoint(whole=False)
        world.session.loop.call(bug)
        primary.rest()
        assert MessageType.BYE in primary.received
        assert {MessageType.ABORT, MessageType.REFUSE} & set(primary.received)
    world.assert_gone()
    assert world.texts() == ["a bug: RuntimeError('a mistake')"]


@pytest.mark.parametrize("again", ["destroy", "second"])
def test_a_bug_while_it_is_taken_down_does_not_keep_it_from_that(again: str) -> None:
    world = World()
    with world.running() as primary:
        primary.begin()
        bugs = 2
        if again == "destroy":
            world.faults.planned["event:state"] = RuntimeError("another mistake")  # as standing down begins
            bugs = 1

        def at_once() -> None:
            for _ in range(bugs):
                world.session.loop.call(bug)

        world.session.loop.call(at_once)
    world.assert_gone()
    assert isinstance(world.ended, RuntimeError)


def test_a_part_of_the_end_that_fails_does_not_keep_the_others() -> None:
    world = World()
    world.faults.planned["path.close"] = RuntimeError("a mistake")
    with world.running() as primary:
        primary.begin()
        primary.stop()
    world.assert_gone()
    assert isinstance(world.ended, RuntimeError)


# -- failover --------------------------------------------------------------------------------------------------


def test_a_takeover() -> None:
    world = World()
    world.take_over()
    world.assert_serving()
    assert world.states()[-3:] == ["arbitrating", "active", "stopped"]
    assert world.faults.steps.count("rename") == 1
    # What xl would reboot it with, or remus would protect it with from here.
    assert world.xl_config["nics"] == [{"bridge": "xenbr0", "mac": "02:00:00:00:00:02", "ifname": "web0"}]


def test_connections_that_are_mapped_are_told_to_who_protects_the_guest_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inherited, "RUN_DIR", tmp_path)
    listed = ["10.77.0.5", 80, "10.77.0.9", 40000, 7]
    world = World(connections={0: (Connection.parse(listed),), 5: ()})
    rewriter = world.path.vifs[0].rewriter
    rewriter.connections.return_value = [Connection.parse(listed)]
    with world.running() as primary:
        primary.begin()
        primary.checkpoint()
        assert rewriter.inherit.call_args.args[1] == (Connection.parse(listed),), (
            "of a failover before this one"
        )
        assert inherited.read(DOMID) == {}
        primary.leave()
        world.await_event("active")
        assert inherited.read(DOMID) == {"0": [listed]}
        world.session.shut_down()
    assert list(tmp_path.iterdir()) == [], "the rewriter has gone"


@pytest.mark.parametrize("step", ["rename", "change_config", "delete_isolated"])
def test_a_takeover_whose_finish_fails(step: str, caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.faults.planned[step] = HostError("no space left")
    world.take_over()
    world.assert_serving()
    assert {"rename", "change_config", "delete_isolated"} <= set(world.faults.steps)
    assert "not quite what it was: no space left" in caplog.text


@pytest.mark.parametrize("verdict", [Verdict.DEAD, Verdict.ALIVE])
def test_an_end_of_remusd_in_the_midst_of_arbitration_waits_for_the_verdict_and_no_longer(
    verdict: Verdict,
) -> None:
    world = World(verdict=verdict)

    def arbitrate() -> None:
        world.session.shut_down()
        world.call(lambda: None)  # it has been told by the time of the verdict

    with world.running() as primary:
        primary.begin()
        primary.checkpoint()
        world.faults.at["probe"] = arbitrate
        primary.leave()
    if verdict is Verdict.DEAD:
        world.assert_serving()
        assert world.states()[-3:] == ["arbitrating", "active", "stopped"]
        assert world.faults.steps.count("rename") == 1
    else:
        world.assert_gone()


@pytest.mark.parametrize("count", [1, 20])
def test_a_bug_does_not_end_a_guest_that_is_served_here(count: int) -> None:
    world = World()
    with world.running() as primary:
        primary.begin()
        primary.checkpoint()
        primary.leave()
        world.await_event("active")
        for _ in range(count):
            world.call(bug)
        assert not world.path.closed  # the rewriter is the guest's connections' life
        world.session.shut_down()
    world.assert_serving()
    assert len(world.texts()) == count
    assert world.ended is None


def test_a_flood_of_bugs_leaves_the_guest_alone() -> None:
    world = World()
    with world.running() as primary:
        primary.begin()
        primary.checkpoint()
        primary.leave()
        world.await_event("active")

        def flood() -> None:
            world.session.loop.call(flood)
            bug()

        world.session.loop.call(flood)
    world.assert_serving()
    assert isinstance(world.ended, RuntimeError)


@error_of_each_kind
@pytest.mark.parametrize("step", ["open_lan", "make_good"])
def test_a_takeover_that_fails_half_way_does_not_destroy_the_only_copy(step: str, error: Exception) -> None:
    world = World()
    world.faults.planned[step] = error
    with world.running() as primary:
        primary.begin()
        primary.checkpoint()
        primary.leave()
        world.await_event("error")
        world.session.shut_down()
    assert world.svm_exists
    assert world.destroyed == 0
    assert world.engine.running
    assert any(str(error) in text for text in world.texts())


@pytest.mark.parametrize(
    "verdict", [Verdict.ALIVE, Verdict.UNKNOWN, DomainError("no bridge"), RuntimeError("a mistake")], ids=str
)
def test_a_primary_that_is_not_known_to_be_dead(verdict: Verdict | Exception) -> None:
    world = World(verdict=verdict)
    with world.running() as primary:
        primary.begin()
        primary.checkpoint()
        primary.leave()
    world.assert_gone()
    assert "open_lan" not in world.faults.steps


def test_a_primary_that_goes_on_alone_is_heard_to_the_last() -> None:
    """This host was frozen, say, and its connection is found silent before it is read: what the SVM knows is old by now."""
    world = World()
    with world.running() as primary:
        primary.begin()
        primary.checkpoint()

        def said_before_the_verdict() -> None:
            primary.control.send_control(MessageType.BYE, 0, {})
            world.await_state_after("arbitrating")

        world.faults.at["probe"] = said_before_the_verdict
        world.call(lambda: world.session._lost("no sign of life"))
    world.assert_gone()
    assert "active" not in world.states()


def test_a_look_that_found_the_guest_is_repeated_when_its_host_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The link went first, then the host: that the guest was seen is no longer true."""
    world = World(verdict=Verdict.ALIVE)
    arbitration = world.session._arbitration
    monkeypatch.setattr(arbitration, "forget", lambda: None)  # it is late all the time
    with world.running() as primary:
        primary.begin()
        primary.checkpoint()
        world.call(arbitration.look_early)
        while arbitration._early.verdict is None:
            time.sleep(0.001)
        world.verdict = Verdict.DEAD
        primary.leave()
        world.await_event("active")
        world.session.shut_down()
    world.assert_serving()
    assert world.faults.steps.count("probe") == 2


def test_neither_host_is_asked_whether_the_lan_works() -> None:
    """The one cannot answer itself, the other may be dead: a guest that they alone talked to would have no heir."""
    world = World(verdict=Verdict.DEAD)
    client, primary_host, this_host = (ip_address(f"10.77.0.{number}") for number in (10, 11, 12))
    world.path.vifs[0].client_addresses.addresses = [client, primary_host, this_host]
    world.take_over()
    assert [side.client_addresses for side in world.asked] == [[client]]


def test_an_arbiter_that_fails_cannot_tell_and_the_policy_decides() -> None:
    world = World(verdict=RuntimeError("a mistake"), unknown=UnknownPolicy.TAKE_OVER)
    world.take_over()
    world.assert_serving()


@pytest.mark.parametrize(
    ("unknown", "serves"), [(UnknownPolicy.STAND_DOWN, False), (UnknownPolicy.TAKE_OVER, True)]
)
def test_a_bug_in_the_midst_of_arbitration_is_no_verdict(unknown: UnknownPolicy, serves: bool) -> None:
    world = World(unknown=unknown)

    def arbitrate() -> None:
        world.call(bug)
        # What becomes of the bug comes before the verdict.  The loop may have ended with it, and take no more calls.
        world.await_state_after("arbitrating")

    with world.running() as primary:
        primary.begin()
        primary.checkpoint()
        world.faults.at["probe"] = arbitrate
        primary.leave()
        if serves:
            world.await_event("active")
            world.session.shut_down()
    if serves:
        world.assert_serving()
    else:
        world.assert_gone()


@pytest.mark.parametrize("moment", ["creating", "syncing", "first preparing", "first receiving"])
def test_a_primary_that_is_lost_before_the_first_checkpoint_is_whole(moment: str) -> None:
    """The copy is no replica yet: it never serves, whatever the LAN looks like."""
    world = World(verdict=Verdict.DEAD)
    with world.running() as primary:
        if moment != "creating":
            primary.begin()
        if moment.startswith("first"):
            primary.prepare()
        if moment == "first receiving":
            primary.send_checkpoint(whole=False)
        primary.leave()
    world.assert_gone()
    assert "probe" not in world.faults.steps


@pytest.mark.parametrize(("moment", "loaded"), [("preparing", 1), ("receiving", 1), ("applying", 2)])
def test_a_primary_that_is_lost_in_a_later_checkpoint(moment: str, loaded: int) -> None:
    """The SVM goes on as it was, or from the checkpoint if that is whole."""
    world = World()
    with world.running() as primary:
        primary.begin()
        primary.checkpoint()
        if moment == "applying":
            world.faults.at["apply"] = primary.leave
        primary.prepare()
        if moment != "preparing":
            primary.send_checkpoint(whole=moment == "applying")
        if moment != "applying":
            primary.leave()
        world.await_event("active")
        world.session.shut_down()
    world.assert_serving()
    assert world.faults.steps.count("apply") == loaded
    assert ("go_on" in world.faults.steps) is (moment != "applying")


def test_an_abort_lets_the_svm_go_on_as_it_was() -> None:
    world = World()
    with world.running() as primary:
        primary.begin()
        primary.checkpoint()
        primary.prepare()
        primary.control.send_control(MessageType.ABORT, 2, {"reason": "the capture failed"})
        primary.checkpoint()
        primary.stop()
    world.assert_gone()
    assert world.faults.steps.count("go_on") == 1
    assert world.texts() == []


def test_what_is_no_checkpoint_counts_as_a_lost_primary() -> None:
    world = World(verdict=Verdict.ALIVE)
    with world.running() as primary:
        primary.begin()
        primary.checkpoint()
        primary.data.send_bulk(MessageType.CHECKPOINT_STREAM, 2, [b"x"])
        assert MessageType.TAKEOVER not in primary.rest()
    world.assert_gone()
    assert any(name == "primary-lost" and "Remus" in fields["reason"] for name, fields in world.events)
    assert not isinstance(world.ended, RemusError)


def test_protection_that_ends_while_xl_is_slower_than_the_network() -> None:
    """What has come and waits for xl is not fed to it any more, and nothing more is waited for."""
    world = World()
    go_on = threading.Event()
    world.faults.at["feed"] = lambda: go_on.wait(PATIENCE_S)
    with world.running() as primary:
        for _ in range(STREAM_PIECES + 2):
            primary.data.send_bulk(MessageType.CREATE_STREAM, 0, [b"guest"])
        wait_until(world.session._chunks.full)
        primary.control.send_control(MessageType.STOP, 0, {"reason": "done"})
        world.await_state_after("creating")
        go_on.set()
        primary.expect(MessageType.BYE)
    world.assert_gone()
    assert world.faults.steps.count("feed") == 1
    assert "finish" not in world.faults.steps
    assert "restore.abort" in world.faults.steps


@pytest.mark.parametrize("end", ["lost", "stopped"])
def test_a_restore_that_is_given_up_and_leaves_a_domain(end: str) -> None:
    """xl was killed as it took its time, or had the whole guest already."""
    world = World()
    world.xl_leaves_it = True
    with world.running() as primary:
        primary.data.send_bulk(MessageType.CREATE_STREAM, 0, [b"guest"])
        wait_until(lambda: "feed" in world.faults.steps)
        if end == "lost":
            primary.leave()
        else:
            primary.stop()
    world.assert_gone()
    assert world.destroyed == 1


@contextlib.contextmanager
def stuck_in_a_load(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Primary, threading.Event]]:
    """The first checkpoint is acknowledged, and is not loaded before the event is set: the time-out is shorter."""
    monkeypatch.setattr(backup, "APPLY_TIMEOUT_S", 0.2)
    go_on = threading.Event()
    with world.running() as primary:
        primary.begin()
        world.faults.at["apply"] = lambda: go_on.wait(PATIENCE_S)
        primary.prepare()
        primary.send_checkpoint()
        primary.expect(MessageType.ACK)
        yield primary, go_on


def test_a_checkpoint_that_is_never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The primary's clients wait for it: it is told that protection is over."""
    world = World()
    with stuck_in_a_load(world, monkeypatch) as (primary, go_on):
        reason = primary.expect(MessageType.ABORT).fields["reason"]
        assert "checkpoint 1 was not loaded within 0.2 s" in reason
        wait_until(lambda: world.states()[-1] == "standing down")
        assert not world.engine.closed
        go_on.set()
    world.assert_gone()
    assert world.destroyed == 1


def test_a_checkpoint_that_is_loaded_late_is_the_guest_if_the_primary_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(verdict=Verdict.DEAD)
    with stuck_in_a_load(world, monkeypatch) as (primary, go_on):
        primary.leave()
        wait_until(lambda: world.states()[-1] == "finishing")
        late = threading.Event()
        world.session.loop.call_later(0.3, late.set)  # after the time-out
        assert late.wait(PATIENCE_S)
        go_on.set()
        world.await_event("active")
        world.session.shut_down()
    world.assert_serving()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
