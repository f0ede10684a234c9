# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rules of failover, one by one, as runs of states and actions."""

from __future__ import annotations

import logging

import pytest

from remus_colo.errors import ConfigError, MessageError, StateError
from remus_colo.failover.arbiter import LanProbe, Verdict, hook_verdict
from remus_colo.failover.backup import BackupAction as BA
from remus_colo.failover.backup import BackupEvent as BE
from remus_colo.failover.backup import BackupMachine, UnknownPolicy
from remus_colo.failover.backup import BackupState as BS
from remus_colo.failover.heartbeat import Pacer, PeerMonitor, SelfMonitor
from remus_colo.failover.machine import expand
from remus_colo.failover.primary import PrimaryAction as PA
from remus_colo.failover.primary import PrimaryEvent as PE
from remus_colo.failover.primary import PrimaryMachine
from remus_colo.failover.primary import PrimaryState as PS

FIRST_CHECKPOINT = [BE.CREATE, BE.SVM_CREATED, BE.PREPARE, BE.CHECKPOINT_BEGIN, BE.CHECKPOINT_COMPLETE]
STANDBY = [*FIRST_CHECKPOINT, BE.APPLIED]
RECEIVING = [*STANDBY, BE.PREPARE, BE.CHECKPOINT_BEGIN]
APPLYING = [*RECEIVING, BE.CHECKPOINT_COMPLETE]
ARBITRATING = [*STANDBY, BE.PRIMARY_LOST]
ACTIVE = [*ARBITRATING, BE.PRIMARY_DEAD]

SYNCING = [PE.BACKUP_READY, PE.SVM_CREATED]
PROTECTED = [*SYNCING, PE.CHECKPOINT_ACKED, PE.SVM_RESUMED]
CHECKPOINTING = [*PROTECTED, PE.CHECKPOINT_DUE]
IN_DOUBT = [*PROTECTED, PE.BACKUP_LOST_IN_DOUBT]


def backup(*events: BE, policy: UnknownPolicy = UnknownPolicy.STAND_DOWN) -> BackupMachine:
    machine = BackupMachine(policy)
    for event in events:
        machine.handle(event)
    return machine


def primary(*events: PE) -> PrimaryMachine:
    machine = PrimaryMachine()
    for event in events:
        machine.handle(event)
    return machine


# -- primary --------------------------------------------------------------------------------------


def test_the_primarys_way_to_protection_and_through_a_checkpoint() -> None:
    machine = primary()
    run = [(step.new, step.actions) for step in map(machine.handle, [*CHECKPOINTING, PE.CHECKPOINT_ACKED])]
    assert run == [
        (PS.CREATING, (PA.CREATE_SVM,)),
        (PS.SYNCING, (PA.START_CHECKPOINT,)),
        (PS.COMMITTED, (PA.RELEASE_COMMITTED,)),
        (PS.PROTECTED, (PA.RESUME_COMPARING,)),
        (PS.CHECKPOINTING, (PA.START_CHECKPOINT,)),
        (PS.COMMITTED, (PA.RELEASE_COMMITTED,)),
    ]
    assert machine.protected


def test_a_checkpoint_asked_for_twice_is_made_once() -> None:
    step = primary(*CHECKPOINTING).handle(PE.CHECKPOINT_DUE)
    assert (step.moved, step.actions) == (False, ())


def test_backup_lost_frees_the_guest() -> None:
    step = primary(*PROTECTED).handle(PE.BACKUP_LOST)
    assert step.new is PS.UNPROTECTED
    assert step.actions == (PA.SEND_BYE, PA.RELEASE_ALL, PA.WARN_UNPROTECTED)


def test_backup_lost_within_a_checkpoint_resumes_the_guest_first() -> None:
    step = primary(*CHECKPOINTING).handle(PE.BACKUP_LOST)
    assert step.actions[0] is PA.ABANDON_CAPTURE
    assert step.new is PS.UNPROTECTED


def test_in_doubt_nothing_is_released_until_the_verdict() -> None:
    machine = primary(*IN_DOUBT)
    assert machine.state is PS.ARBITRATING
    assert not machine.beats
    for event in (PE.BACKUP_LOST, PE.STOP_REQUESTED, PE.CHECKPOINT_ACKED, PE.BACKUP_UNKNOWN):
        assert PA.RELEASE_ALL not in machine.handle(event).actions
    assert PA.RELEASE_ALL in machine.handle(PE.BACKUP_INACTIVE).actions


@pytest.mark.parametrize("event", [PE.TAKEOVER, PE.LAN_CONFLICT])
@pytest.mark.parametrize(
    "way",
    [
        SYNCING,
        PROTECTED,
        CHECKPOINTING,
        IN_DOUBT,
        [*PROTECTED, PE.BACKUP_LOST],
        [*PROTECTED, PE.STOP_REQUESTED],
    ],
)
def test_a_takeover_fences_at_once(way: list[PE], event: PE) -> None:
    step = primary(*way).handle(event)
    assert step.new is PS.FENCED
    assert step.actions == (PA.CUT_LAN, PA.DROP_HELD, PA.STOP_PVM, PA.CLEAN_UP)


def test_a_failed_start_is_not_a_lost_protection() -> None:
    for way in ([], [PE.BACKUP_READY], SYNCING):
        step = primary(*way).handle(PE.BACKUP_LOST)
        assert step.new is PS.FAILED
        assert PA.WARN_UNPROTECTED not in step.actions


def test_a_clean_stop_waits_for_the_svms_end() -> None:
    machine = primary(*CHECKPOINTING)
    assert machine.handle(PE.STOP_REQUESTED).actions == (PA.ABANDON_CAPTURE, PA.SEND_STOP)
    assert machine.handle(PE.CHECKPOINT_ACKED).actions == ()
    assert machine.handle(PE.BACKUP_LEFT).actions == (PA.SEND_BYE, PA.RELEASE_ALL, PA.CLEAN_UP)
    assert machine.state is PS.STOPPED
    assert machine.final


# -- backup ---------------------------------------------------------------------------------------


def test_the_backups_way_to_standby() -> None:
    machine = backup()
    assert [machine.handle(event).new for event in STANDBY] == [
        BS.CREATING,
        BS.SYNCING,
        BS.FIRST_PREPARING,
        BS.FIRST_RECEIVING,
        BS.APPLYING,
        BS.STANDBY,
    ]
    assert machine.replica


def test_acknowledge_first_then_apply() -> None:
    step = backup(*RECEIVING).handle(BE.CHECKPOINT_COMPLETE)
    assert step.actions == (BA.SEND_ACK, BA.APPLY_CHECKPOINT)


@pytest.mark.parametrize("length", range(1, len(FIRST_CHECKPOINT)))
def test_without_a_complete_checkpoint_the_svm_is_destroyed(length: int) -> None:
    step = backup(*FIRST_CHECKPOINT[:length]).handle(BE.PRIMARY_LOST)
    assert step.new is BS.STANDING_DOWN
    assert BA.DESTROY_SVM in step.actions


def test_a_checkpoint_that_breaks_off_is_discarded() -> None:
    step = backup(*RECEIVING).handle(BE.PRIMARY_LOST)
    assert step.new is BS.ARBITRATING
    assert step.actions == (BA.DISCARD_BUFFER, BA.RESUME_SVM, BA.ASK_ARBITER)


@pytest.mark.parametrize("way", [FIRST_CHECKPOINT, APPLYING])
def test_a_complete_checkpoint_is_applied_before_arbitrating(way: list[BE]) -> None:
    machine = backup(*way)
    assert machine.handle(BE.PRIMARY_LOST).actions == ()
    step = machine.handle(BE.APPLIED)
    assert step.new is BS.ARBITRATING
    assert step.actions == (BA.RESUME_SVM, BA.ASK_ARBITER)


def test_verdicts() -> None:
    dead = backup(*ARBITRATING).handle(BE.PRIMARY_DEAD)
    assert (dead.new, dead.actions) == (BS.ACTIVE, (BA.SEND_TAKEOVER, BA.OPEN_LAN, BA.ANNOUNCE))
    alive = backup(*ARBITRATING).handle(BE.PRIMARY_ALIVE)
    assert (alive.new, alive.actions) == (BS.STANDING_DOWN, (BA.DESTROY_SVM,))


def test_unknown_follows_the_policy() -> None:
    assert backup(*ARBITRATING).handle(BE.PRIMARY_UNKNOWN).new is BS.STANDING_DOWN
    machine = backup(*ARBITRATING, policy=UnknownPolicy.TAKE_OVER)
    assert machine.handle(BE.PRIMARY_UNKNOWN).new is BS.ACTIVE


def test_only_bye_calls_a_decision_off() -> None:
    machine = backup(*ARBITRATING)
    for late in (BE.PRIMARY_HEARD, BE.STOP, BE.PREPARE, BE.SHUTDOWN):
        assert machine.handle(late).new is BS.ARBITRATING
    assert machine.handle(BE.PRIMARY_LEFT).new is BS.STANDING_DOWN
    assert machine.handle(BE.PRIMARY_DEAD).actions == ()


def test_a_thawed_primary_is_told() -> None:
    machine = backup(*ACTIVE)
    for sign in (BE.PRIMARY_HEARD, BE.PREPARE, BE.STOP, BE.PRIMARY_LEFT):
        assert machine.handle(sign).actions == (BA.SEND_TAKEOVER,)
    assert machine.state is BS.ACTIVE


def test_the_guest_outlives_remusd() -> None:
    step = backup(*ACTIVE).handle(BE.SHUTDOWN)
    assert (step.new, step.actions) == (BS.STOPPED, (BA.LEAVE_SVM,))


@pytest.mark.parametrize("way", [STANDBY, RECEIVING, APPLYING, FIRST_CHECKPOINT])
def test_a_clean_stop_destroys_the_svm_then_says_bye(way: list[BE]) -> None:
    machine = backup(*way)
    assert machine.handle(BE.STOP).actions[-1] is BA.DESTROY_SVM
    assert machine.handle(BE.PRIMARY_LOST).actions == ()
    assert machine.handle(BE.SVM_DESTROYED).actions == (BA.SEND_BYE, BA.CLEAN_UP)


# -- what both share ------------------------------------------------------------------------------


def test_the_peers_fault_and_our_own_bug_are_told_apart() -> None:
    machine = backup(*STANDBY)
    with pytest.raises(MessageError, match="the peer sent 'checkpoint begins' while we are 'standby'"):
        machine.handle(BE.CHECKPOINT_BEGIN)
    with pytest.raises(StateError, match="event 'applied' is not allowed while 'standby'"):
        machine.handle(BE.APPLIED)
    assert machine.state is BS.STANDBY


def test_moves_are_logged_with_epoch_and_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "remus_colo.failover"):
        backup(*STANDBY).handle(BE.PRIMARY_LOST, epoch=41, reason="silent for 1.2 s")
    assert caplog.messages[-1] == "standby -> arbitrating on primary lost epoch=41 reason=silent for 1.2 s"
    assert caplog.records[-1].name.endswith(".backup")


def test_two_rows_for_one_case_are_a_bug() -> None:
    row = ((BS.IDLE,), (BE.CREATE,), BS.CREATING, (BA.CREATE_SVM,))
    with pytest.raises(StateError, match="two rows for 'create' while 'idle'"):
        expand([row, row])


# -- monitors and arbiters ------------------------------------------------------------------------


def test_peer_monitor() -> None:
    monitor = PeerMonitor(2.0)
    assert (monitor.deadline_s(), monitor.expired(99.0), monitor.silence_s(99.0)) == (None, False, 0.0)
    assert (monitor.deadline_s(1.0), monitor.expired(99.0, 1.0)) == (None, False)
    monitor.beat(10.0)
    monitor.beat(9.0)
    assert (monitor.deadline_s(), monitor.silence_s(11.5)) == (12.0, 1.5)
    assert not monitor.expired(12.0)
    assert monitor.expired(12.1)
    assert monitor.deadline_s(5.0) == 12.0, "no silence is too short"


def test_a_peer_that_others_wait_for_is_given_less() -> None:
    monitor = PeerMonitor(2.0, 1.0)
    monitor.beat(10.0)
    waiting_since_s = (None, 12.0, 10.0, 9.5, 9.0, 3.0)
    assert [monitor.deadline_s(since_s) for since_s in waiting_since_s] == [
        12.0,
        12.0,
        12.0,
        11.5,
        11.0,
        11.0,
    ]
    assert not monitor.expired(11.5, 9.5)
    assert monitor.expired(11.6, 9.5)
    assert not monitor.expired(11.6, 10.0)


def test_pacer() -> None:
    pacer = Pacer(1.0)
    assert [pacer.due(now_s) for now_s in (0.0, 0.5, 1.0, 5.0, 5.5, 6.0)] == [
        True,
        False,
        True,
        True,
        False,
        True,
    ]
    assert pacer.next_s == 7.0


def test_self_monitor() -> None:
    monitor = SelfMonitor(1.0)
    assert not monitor.in_doubt(5.0), "nothing was sent yet: there is no session to lose"
    monitor.sent(1, 5.0)
    monitor.sent(2, 5.9)
    assert not monitor.in_doubt(6.5)
    assert monitor.in_doubt(7.0)
    monitor.sent(3, 7.0)
    assert monitor.in_doubt(7.0), "heartbeat 3 may have come too late"
    monitor.seen(2)
    assert monitor.in_doubt(7.0)
    monitor.seen(3)
    assert not monitor.in_doubt(7.0)


def test_a_guest_that_answers_nobody_leaves_a_doubt() -> None:
    monitor = SelfMonitor(1.0)
    monitor.sent(1, 0.0)
    monitor.guest_silent(0.0)
    assert monitor.guest_silent_since_s == 0.0
    monitor.sent(2, 0.9)
    assert not monitor.in_doubt(1.0)
    assert monitor.in_doubt(1.1)
    monitor.sent(3, 1.1)
    monitor.guest_answers(1.2)
    assert monitor.in_doubt(1.2), "the backup may have looked for it"
    monitor.seen(3)
    assert monitor.in_doubt(1.2), "heartbeat 3 was sent before"
    monitor.sent(4, 1.3)
    monitor.seen(4)
    assert not monitor.in_doubt(1.3)
    monitor.guest_silent(0.4)  # it was asked to suspend
    monitor.guest_silent(1.4)  # and did
    monitor.guest_answers(1.5)
    assert monitor.guest_silent_since_s is None
    monitor.sent(5, 1.5)
    assert not monitor.in_doubt(1.6), "nobody takes that for dead"
    monitor.guest_limit_s = 5.0  # the backup knows that it pauses for long
    monitor.guest_silent(1.6)
    monitor.sent(6, 2.5)
    monitor.sent(7, 3.4)
    assert not monitor.in_doubt(4.0)


@pytest.mark.parametrize("make", [PeerMonitor, lambda least_s: PeerMonitor(1.0, least_s), Pacer, SelfMonitor])
@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_impossible_times(make: type, seconds: float) -> None:
    with pytest.raises(ConfigError, match="must be more than 0 s"):
        make(seconds)


@pytest.mark.parametrize(
    ("status", "verdict"),
    [(0, "DEAD"), (1, "ALIVE"), (2, "UNKNOWN"), (-9, "UNKNOWN"), (-1, "UNKNOWN"), (None, "UNKNOWN")],
)
def test_hook_statuses(status: int | None, verdict: str) -> None:
    assert hook_verdict(status) is Verdict[verdict]


def test_lan_probe() -> None:
    silent = LanProbe(window_s=1.0, gap_s=0.4)
    assert [silent.observe(t, peer_answers=False, lan_works=True) for t in (0.0, 0.4, 0.8)] == [None] * 3
    assert silent.observe(1.1, peer_answers=False, lan_works=False) is Verdict.DEAD

    frozen = LanProbe(window_s=1.0, gap_s=0.4)
    assert frozen.observe(0.0, peer_answers=False, lan_works=True) is None
    # we did not run from 0 to 5, and saw nothing
    assert frozen.observe(5.0, peer_answers=False, lan_works=True) is None

    cut_off_before = LanProbe(window_s=1.0, gap_s=0.4)
    assert [cut_off_before.observe(t, peer_answers=False, lan_works=t == 0.8) for t in (0.0, 0.4, 0.8)] == [
        None
    ] * 3
    assert cut_off_before.observe(1.1, peer_answers=False, lan_works=False) is None
    assert cut_off_before.observe(1.5, peer_answers=False, lan_works=False) is None
    assert cut_off_before.observe(1.9, peer_answers=False, lan_works=False) is Verdict.DEAD

    cut_off = LanProbe(window_s=0.5, gap_s=0.4)
    cut_off.observe(0.0, peer_answers=False, lan_works=False)
    cut_off.observe(0.3, peer_answers=False, lan_works=False)
    assert cut_off.observe(0.6, peer_answers=False, lan_works=False) is Verdict.UNKNOWN
    assert cut_off.observe(0.7, peer_answers=True, lan_works=False) is Verdict.ALIVE

    with pytest.raises(ConfigError, match="cannot bear gaps"):
        LanProbe(window_s=0.4, gap_s=0.4)
