# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every event in every state, from every way of getting there; and two machines with faults between them."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from failover_model import SELF_LIMIT_S, TICK_S, TIMEOUT_S, Arbiter, World
from hypothesis import example, given, settings
from hypothesis import strategies as st

from remus_colo.errors import MessageError, StateError
from remus_colo.failover.arbiter import LanProbe, Verdict
from remus_colo.failover.backup import BackupAction, BackupEvent, BackupMachine, BackupState, UnknownPolicy
from remus_colo.failover.heartbeat import Pacer, PeerMonitor, SelfMonitor
from remus_colo.failover.machine import Machine
from remus_colo.failover.primary import PrimaryAction, PrimaryEvent, PrimaryMachine, PrimaryState

AnyMachine = Machine[Any, Any, Any]
Make = Callable[[], AnyMachine]

MACHINES: list[tuple[Make, Any]] = [
    (PrimaryMachine, PrimaryEvent),
    (BackupMachine, BackupEvent),
    (lambda: BackupMachine(UnknownPolicy.TAKE_OVER), BackupEvent),
]
machines = pytest.mark.parametrize(
    ("make", "events"), MACHINES, ids=["primary", "backup", "backup-take-over"]
)


def replay(make: Make, path: Iterable[Any]) -> AnyMachine:
    machine = make()
    for event in path:
        machine.handle(event)
    return machine


def shortest_paths(make: Make, events: Iterable[Any]) -> dict[Any, tuple[Any, ...]]:
    """A way to every state that can be reached."""
    paths: dict[Any, tuple[Any, ...]] = {make().state: ()}
    todo = deque(paths.values())
    while todo:
        path = todo.popleft()
        for event in events:
            machine = replay(make, path)
            try:
                machine.handle(event)
            except (MessageError, StateError):
                continue
            if machine.state not in paths:
                paths[machine.state] = (*path, event)
                todo.append(paths[machine.state])
    return paths


@machines
def test_every_state_can_be_reached(make: Make, events: Any) -> None:
    states: Any = type(make().state)
    assert set(shortest_paths(make, events)) == set(states)


@machines
def test_every_event_in_every_state_moves_or_is_refused(make: Make, events: Any) -> None:
    for state, path in shortest_paths(make, events).items():
        for event in events:
            machine = replay(make, path)
            try:
                step = machine.handle(event)
            except MessageError as error:
                assert event in machine.PEER_EVENTS, error
                assert machine.state is state
            except StateError as error:
                assert "invariant" not in str(error)
                assert event not in machine.PEER_EVENTS
                assert machine.state is state
            else:
                assert (step.old, step.new) == (state, machine.state)


@machines
def test_invariants_hold_from_the_middle_of_everything(make: Make, events: Any) -> None:
    """All pairs of events on top of the way to each state: a second fault while the first is dealt with."""
    for path in shortest_paths(make, events).values():
        for first in events:
            for second in events:
                machine = replay(make, path)
                for event in (first, second):
                    try:
                        machine.handle(event)
                    except (MessageError, StateError) as error:
                        assert "invariant" not in str(error)


@machines
@given(st.data())
def test_invariants_hold_on_any_walk(make: Make, events: Any, data: st.DataObject) -> None:
    machine = make()
    for _ in range(data.draw(st.integers(0, 40))):
        allowed = [event for event in events if (machine.state, event) in machine.TABLE]
        machine.handle(data.draw(st.sampled_from(allowed)))


@machines
def test_the_end_can_be_reached_without_the_peer(make: Make, events: Any) -> None:
    own = [event for event in events if event not in make().PEER_EVENTS]
    for state, path in shortest_paths(make, events).items():
        seen, todo = {state}, deque([path])
        ends = False
        while todo and not ends:
            here = todo.popleft()
            ends = replay(make, here).final
            for event in own:
                machine = replay(make, here)
                if (machine.state, event) in machine.TABLE and machine.handle(event).new not in seen:
                    seen.add(machine.state)
                    todo.append((*here, event))
        assert ends, f"{state} has no way out once the peer is gone"


@machines
def test_final_states_take_everything_and_do_nothing(make: Make, events: Any) -> None:
    for state, path in shortest_paths(make, events).items():
        if state in make().FINAL:
            for event in events:
                step = replay(make, path).handle(event)
                assert (step.new, step.actions) == (state, ())


def test_nothing_is_released_between_a_takeover_and_the_end() -> None:
    release = {PrimaryAction.RELEASE_ALL, PrimaryAction.RELEASE_COMMITTED}
    for (state, event), (new, actions) in PrimaryMachine.TABLE.items():
        if new is PrimaryState.FENCED or event is PrimaryEvent.BACKUP_LOST_IN_DOUBT:
            assert not release.intersection(actions), (state, event)


def test_only_a_verdict_opens_the_lan() -> None:
    cases = [case for case, (_, actions) in BackupMachine.TABLE.items() if BackupAction.OPEN_LAN in actions]
    assert cases == [(BackupState.ARBITRATING, BackupEvent.PRIMARY_DEAD)]


def test_a_paused_vm_is_never_left_behind() -> None:
    """From a state in which the SVM is paused, every way out resumes or destroys it."""
    paused = {BackupState.PREPARING, BackupState.RECEIVING, BackupState.FINISHING, BackupState.APPLYING}
    for (state, event), (new, actions) in BackupMachine.TABLE.items():
        if state in paused and new not in paused:
            assert {BackupAction.RESUME_SVM, BackupAction.DESTROY_SVM}.intersection(actions), (state, event)


# -- two machines ---------------------------------------------------------------------------------

times = st.floats(0, 12).map(lambda value: round(value, 2))
spells = st.floats(0.1, 6).map(lambda value: round(value, 2))
hosts = st.sampled_from(["primary", "backup"])
kills = st.tuples(st.just("kill"), hosts, times, st.just(0.0))
freezes = st.tuples(st.just("freeze"), hosts, times, spells)
cuts = st.tuples(st.just("cut"), st.just("link"), times, spells)
stops = st.tuples(st.just("stop"), st.just("primary"), times, st.just(0.0))
faults = kills | freezes | cuts | stops
Fault = tuple[str, str, float, float]
many = settings(max_examples=120)


def run(seed: int, arbiter: Arbiter, script: list[Fault]) -> World:
    """The world some time after the last fault is over."""
    world = World(seed, arbiter)
    happenings: list[tuple[float, str, str, bool]] = []
    for kind, where, at_s, spell_s in script:
        happenings.append((at_s, kind, where, True))
        if spell_s:
            happenings.append((at_s + spell_s, kind, where, False))
    for at_s, kind, where, begins in sorted(happenings):
        world.run(at_s)
        host: Any = getattr(world, where, None)
        if kind == "kill":
            host.dead = True
        elif kind == "freeze":
            host.frozen = begins
        elif kind == "cut":
            world.link_up = not begins
        elif world.primary.runs:
            world.primary.on(PrimaryEvent.STOP_REQUESTED)
    world.run(world.now_s + 6 * TIMEOUT_S)
    return world


def check_the_end(world: World) -> None:
    """Whatever happened is over: the guest has one home if any host is left, and both sides agree."""
    primary, backup = world.primary, world.backup
    assert world.both_active_at_s is None
    assert primary.machine.state is not PrimaryState.ARBITRATING or primary.dead
    if not primary.dead and not backup.dead:
        assert primary.serves != backup.serves
        assert primary.machine.protected == backup.machine.replica
    if primary.machine.state is PrimaryState.FENCED and not primary.dead:
        assert backup.on_lan
    if not primary.dead and not backup.on_lan:
        assert primary.serves
        assert primary.machine.protected or primary.machine.final or primary.alone


@many
@example(58, Arbiter.ORACLE, [("freeze", "primary", 5.91, 1.24), ("freeze", "backup", 6.44, 4.84)])
@given(st.integers(0, 2**32), st.sampled_from([Arbiter.ORACLE, Arbiter.SWITCH]), st.lists(faults, max_size=4))
def test_never_both_active_given_a_truthful_arbiter(seed: int, arbiter: Arbiter, script: list[Fault]) -> None:
    check_the_end(run(seed, arbiter, script))


@many
@example(0, Arbiter.ORACLE, [("freeze", "backup", 2.0, 2.0)])
@given(st.integers(0, 2**32), st.sampled_from(Arbiter), st.lists(faults, min_size=1, max_size=1))
def test_one_fault_never_makes_two_histories(seed: int, arbiter: Arbiter, script: list[Fault]) -> None:
    """Even an arbiter that takes a frozen host for a dead one does no harm."""
    world = run(seed, arbiter, script)
    check_the_end(world)
    assert not world.released_then_taken_over
    assert (
        world.primary.serves
        or world.backup.serves
        or not world.backup.machine.visited & {BackupState.APPLYING}
    )


@many
@given(st.integers(0, 2**32), times, spells, st.floats(0, 1), spells)
def test_a_primary_that_was_frozen_asks_before_it_goes_on_alone(
    seed: int, at_s: float, frozen_s: float, share: float, cut_s: float
) -> None:
    """The backup sees a silent LAN and takes over, and its TAKEOVER cannot reach the primary."""
    script = [("freeze", "primary", at_s, frozen_s), ("cut", "link", at_s + share * frozen_s, cut_s)]
    world = run(seed, Arbiter.LAN, script)
    check_the_end(world)
    assert not world.released_then_taken_over


@many
@given(st.integers(0, 2**32), times, spells, st.floats(0, 3), st.floats(0.1, SELF_LIMIT_S - TICK_S))
def test_a_lan_probe_outlasts_what_the_primary_does_not_notice(
    seed: int, at_s: float, cut_s: float, after_s: float, frozen_s: float
) -> None:
    """The link is cut, and the primary hangs for a moment while the backup probes."""
    script = [("cut", "link", at_s, cut_s), ("freeze", "primary", at_s + after_s, frozen_s)]
    world = run(seed, Arbiter.LAN, script)
    check_the_end(world)
    assert not world.released_then_taken_over


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.sampled_from(Arbiter), times)
def test_the_guest_survives_the_loss_of_either_host(seed: int, arbiter: Arbiter, at_s: float) -> None:
    for victim in ("primary", "backup"):
        world = run(seed, arbiter, [("kill", victim, 3 + at_s, 0.0)])
        if victim == "primary":
            assert world.backup.machine.state is BackupState.ACTIVE
        else:
            assert world.primary.machine.state is PrimaryState.UNPROTECTED
            assert world.primary.alone


@given(st.integers(0, 2**32), times)
def test_a_clean_stop_leaves_the_guest_at_home(seed: int, at_s: float) -> None:
    world = run(seed, Arbiter.LAN, [("stop", "primary", at_s, 0.0)])
    assert world.primary.machine.state is PrimaryState.STOPPED
    assert world.primary.serves
    assert world.backup.machine.state in (BackupState.STOPPED, BackupState.IDLE)


@given(st.integers(0, 2**32))
def test_without_faults_protection_lasts(seed: int) -> None:
    world = run(seed, Arbiter.LAN, [])
    assert world.primary.machine.protected
    assert world.backup.machine.replica
    assert PrimaryState.COMMITTED in world.primary.machine.visited


# -- monitors -------------------------------------------------------------------------------------

moments = st.lists(st.floats(0, 1000), max_size=20)


@given(moments, st.floats(0.01, 10), st.floats(0, 1000))
def test_a_peer_is_lost_exactly_when_silent_for_longer_than_the_timeout(
    beats: list[float], timeout_s: float, now_s: float
) -> None:
    monitor = PeerMonitor(timeout_s)
    for beat_s in beats:
        monitor.beat(beat_s)
    assert monitor.expired(now_s) == (bool(beats) and now_s > max(beats) + timeout_s)


@given(st.floats(0, 1000), st.floats(0.01, 10), st.floats(0.1, 1), st.floats(0, 1000), st.floats(0, 20))
def test_nobody_waits_for_a_lost_peer_for_longer_than_the_timeout_and_what_a_silence_needs(
    beat_s: float, timeout_s: float, least: float, waiting_since_s: float, later_s: float
) -> None:
    monitor = PeerMonitor(timeout_s, timeout_s * least)
    monitor.beat(beat_s)
    now_s = beat_s + later_s
    if now_s > beat_s + timeout_s * least and now_s > waiting_since_s + timeout_s:
        assert monitor.expired(now_s, waiting_since_s)
    if monitor.expired(now_s):
        assert monitor.expired(now_s, waiting_since_s), "a wait makes it no longer"
    if monitor.expired(now_s, waiting_since_s):
        assert monitor.silence_s(now_s) > timeout_s * least * 0.999


@given(moments, st.floats(0.01, 10))
def test_heartbeats_are_neither_more_frequent_than_asked_nor_forgotten(
    polls: list[float], interval_s: float
) -> None:
    pacer, sent = Pacer(interval_s), []
    for now_s in sorted(polls):
        if pacer.due(now_s):
            sent.append(now_s)
        assert sent, "the first is due at once"
        assert now_s < sent[-1] + interval_s
    assert all(late >= early + interval_s for early, late in itertools.pairwise(sent))


@given(st.lists(st.floats(0, 3), min_size=1, max_size=20), st.integers(0, 25))
def test_doubt_lasts_until_a_heartbeat_after_the_gap_was_seen(gaps: list[float], seen: int) -> None:
    monitor, now_s, limit_s = SelfMonitor(1.0), 0.0, 1.0
    after_gap = None
    for sequence, gap_s in enumerate([0.0, *gaps]):
        if now_s + gap_s - now_s > limit_s and after_gap is None:
            after_gap = sequence
        now_s += gap_s
        monitor.sent(sequence, now_s)
    assert monitor.in_doubt(now_s) == (after_gap is not None)
    assert monitor.in_doubt(now_s + 1.5)
    monitor.seen(seen)
    assert monitor.in_doubt(now_s) == (after_gap is not None and seen < after_gap)


@given(st.lists(st.tuples(st.floats(0.01, 0.6), st.booleans(), st.booleans()), max_size=30))
def test_silence_proves_death_only_over_an_unbroken_window(
    observations: list[tuple[float, bool, bool]],
) -> None:
    probe, now_s, history = LanProbe(window_s=1.0, gap_s=0.5), 0.0, []
    for step_s, answers, works in observations:
        now_s += step_s
        history.append((now_s, step_s, works))
        verdict = probe.observe(now_s, peer_answers=answers, lan_works=works)
        assert (verdict is Verdict.ALIVE) == answers
        if verdict is not None:
            if not answers:
                window = [entry for entry in history if entry[0] > now_s - 1.0]
                assert all(entry[1] <= 0.5 for entry in window[1:])
                assert verdict is Verdict.DEAD or not any(entry[2] for entry in window)
            break
