# SPDX-License-Identifier: LGPL-2.1-or-later
"""The backup host's state machine: when the SVM is a replica, and when it may become the guest."""

from __future__ import annotations

import enum
from typing import ClassVar

from remus_colo.failover.machine import Machine, Row, Step, Table, expand, require


class BackupState(enum.Enum):
    IDLE = "idle"
    CREATING = "creating"
    # No complete checkpoint yet: with the primary lost the SVM is destroyed, never made the guest.
    SYNCING = "syncing"
    FIRST_PREPARING = "preparing the first checkpoint"
    FIRST_RECEIVING = "receiving the first checkpoint"
    # From here on the SVM, or the checkpoint in the buffer, is a valid replica.
    STANDBY = "standby"
    PREPARING = "preparing"  # SVM paused, its dirty bitmap sent
    RECEIVING = "receiving"  # into the buffer; the SVM is as it was
    APPLYING = "applying"  # complete and acknowledged: there is no way back
    FINISHING = "finishing"  # as APPLYING, and the primary is lost
    ARBITRATING = "arbitrating"  # is the primary really dead?
    ACTIVE = "active"  # the SVM is the guest
    STANDING_DOWN = "standing down"  # the SVM is being destroyed
    STOPPED = "stopped"


class BackupEvent(enum.Enum):
    # from the primary
    CREATE = "create"
    PREPARE = "prepare"
    CHECKPOINT_BEGIN = "checkpoint begins"
    CHECKPOINT_COMPLETE = "checkpoint complete"  # CHECKPOINT_END has come and its digest is right
    ABORT = "abort"
    STOP = "stop"  # STOP, or REFUSE: the primary ends protection, and waits for us to destroy the SVM
    PRIMARY_LEFT = "primary left"  # BYE: the PVM goes on alone, the SVM is stale
    PRIMARY_HEARD = "primary heard"  # a sign of life; needed only while arbitrating or active
    # found out here
    SVM_CREATED = "SVM created"
    SVM_FAILED = "SVM failed"  # not created, not paused, not applied, or it ended by itself
    SVM_DESTROYED = "SVM destroyed"
    APPLIED = "applied"
    PRIMARY_LOST = "primary lost"  # silent, connection gone, or it broke the protocol
    PRIMARY_DEAD = "primary dead"  # arbiter: it does not run, and will not
    PRIMARY_ALIVE = "primary alive"  # arbiter: only the link is lost
    PRIMARY_UNKNOWN = "primary unknown"  # arbiter: cannot tell, or did not answer in time
    LAN_CONFLICT = "LAN conflict"  # another host answers with the guest's MAC
    SHUTDOWN = "shutdown"  # remusd is told to end


class BackupAction(enum.Enum):
    CREATE_SVM = "create SVM"
    SEND_CREATED = "send CREATED"
    SEND_REFUSE = "send REFUSE"
    PAUSE_SVM = "pause SVM"
    SEND_DIRTY = "send DIRTY"
    START_BUFFER = "start buffer"
    DISCARD_BUFFER = "discard buffer"
    SEND_ACK = "send ACK"
    APPLY_CHECKPOINT = "apply checkpoint"
    RESUME_SVM = "resume SVM"
    SEND_RESUMED = "send RESUMED"
    SEND_ABORT = "send ABORT"
    ASK_ARBITER = "ask arbiter"  # fencing hook or LAN probe, with a deadline
    SEND_TAKEOVER = "send TAKEOVER"  # if the primary can be reached at all
    OPEN_LAN = "open LAN"  # the SVM's vif moves to the LAN bridge; the rewriter stays
    ANNOUNCE = "announce"  # gratuitous ARP, unsolicited NA
    DESTROY_SVM = "destroy SVM"
    SEND_BYE = "send BYE"
    LEAVE_SVM = "leave SVM"  # remusd ends, the guest goes on
    CLEAN_UP = "clean up"  # bridge, tunnel, rules, channels; what an active SVM needs is left


class UnknownPolicy(enum.Enum):
    """What the backup does if nobody can tell whether the primary is dead.

    STAND_DOWN risks that the guest stops; TAKE_OVER risks that it runs twice.
    """

    STAND_DOWN = "stand-down"
    TAKE_OVER = "take-over"


_S, _E, _A = BackupState, BackupEvent, BackupAction

# In these the backup no longer waits for the primary: a heartbeat does not call the decision off, because
# the fencing hook may be switching that host off at this moment.
DECIDING = frozenset({_S.FINISHING, _S.ARBITRATING, _S.ACTIVE})

_BUFFERING = (_S.FIRST_RECEIVING, _S.RECEIVING, _S.APPLYING)  # something is in the buffer, too
_CHECKPOINT = (_E.PREPARE, _E.CHECKPOINT_BEGIN, _E.CHECKPOINT_COMPLETE)
_VERDICTS = (_E.PRIMARY_DEAD, _E.PRIMARY_ALIVE, _E.PRIMARY_UNKNOWN)

_TAKE_OVER = (_A.SEND_TAKEOVER, _A.OPEN_LAN, _A.ANNOUNCE)
_UNDO = (_A.DISCARD_BUFFER, _A.RESUME_SVM)

_ROWS: tuple[Row[BackupState, BackupEvent, BackupAction], ...] = (
    # -- towards the first complete checkpoint
    ((_S.IDLE,), (_E.CREATE,), _S.CREATING, (_A.CREATE_SVM,)),
    ((_S.CREATING,), (_E.SVM_CREATED,), _S.SYNCING, (_A.SEND_CREATED,)),
    ((_S.SYNCING,), (_E.PREPARE,), _S.FIRST_PREPARING, (_A.PAUSE_SVM, _A.SEND_DIRTY)),
    ((_S.FIRST_PREPARING,), (_E.CHECKPOINT_BEGIN,), _S.FIRST_RECEIVING, (_A.START_BUFFER,)),
    # -- checkpoints
    ((_S.STANDBY,), (_E.PREPARE,), _S.PREPARING, (_A.PAUSE_SVM, _A.SEND_DIRTY)),
    ((_S.PREPARING,), (_E.CHECKPOINT_BEGIN,), _S.RECEIVING, (_A.START_BUFFER,)),
    (
        (_S.FIRST_RECEIVING, _S.RECEIVING),
        (_E.CHECKPOINT_COMPLETE,),
        _S.APPLYING,
        (_A.SEND_ACK, _A.APPLY_CHECKPOINT),
    ),
    ((_S.APPLYING,), (_E.APPLIED,), _S.STANDBY, (_A.SEND_RESUMED, _A.RESUME_SVM)),
    ((_S.PREPARING,), (_E.ABORT,), _S.STANDBY, (_A.RESUME_SVM,)),
    ((_S.RECEIVING,), (_E.ABORT,), _S.STANDBY, _UNDO),
    # -- the primary is lost
    ((_S.CREATING, _S.SYNCING, _S.FIRST_PREPARING), (_E.PRIMARY_LOST,), _S.STANDING_DOWN, (_A.DESTROY_SVM,)),
    ((_S.FIRST_RECEIVING,), (_E.PRIMARY_LOST,), _S.STANDING_DOWN, (_A.DISCARD_BUFFER, _A.DESTROY_SVM)),
    ((_S.STANDBY,), (_E.PRIMARY_LOST,), _S.ARBITRATING, (_A.ASK_ARBITER,)),
    ((_S.PREPARING,), (_E.PRIMARY_LOST,), _S.ARBITRATING, (_A.RESUME_SVM, _A.ASK_ARBITER)),
    ((_S.RECEIVING,), (_E.PRIMARY_LOST,), _S.ARBITRATING, (*_UNDO, _A.ASK_ARBITER)),
    # it has released output on our ACK: what is in the buffer is the guest now
    ((_S.APPLYING,), (_E.PRIMARY_LOST,), _S.FINISHING, ()),
    ((_S.FINISHING,), (_E.APPLIED,), _S.ARBITRATING, (_A.RESUME_SVM, _A.ASK_ARBITER)),
    # -- the verdict; PRIMARY_UNKNOWN follows the UnknownPolicy
    ((_S.ARBITRATING,), (_E.PRIMARY_DEAD,), _S.ACTIVE, _TAKE_OVER),
    ((_S.ARBITRATING,), (_E.PRIMARY_ALIVE, _E.PRIMARY_UNKNOWN), _S.STANDING_DOWN, (_A.DESTROY_SVM,)),
    # until then all that the primary says is late, even STOP (it has released nothing on the strength of it,
    # and the hook may be switching it off), and remusd's own end waits; BYE alone settles it, below
    ((_S.FINISHING, _S.ARBITRATING), (*_CHECKPOINT, _E.ABORT, _E.STOP), None, ()),
    ((_S.FINISHING, _S.ARBITRATING), (_E.PRIMARY_LOST, _E.SHUTDOWN), None, ()),
    # -- active; a primary that speaks again was frozen, and does not know yet
    (
        (_S.ACTIVE,),
        (*_CHECKPOINT, _E.CREATE, _E.ABORT, _E.STOP, _E.PRIMARY_LEFT, _E.PRIMARY_HEARD),
        None,
        (_A.SEND_TAKEOVER,),
    ),
    ((_S.ACTIVE,), (_E.LAN_CONFLICT,), None, (_A.SEND_TAKEOVER, _A.ANNOUNCE)),
    ((_S.ACTIVE,), (_E.SVM_FAILED,), _S.STOPPED, (_A.CLEAN_UP,)),
    ((_S.ACTIVE,), (_E.SHUTDOWN,), _S.STOPPED, (_A.LEAVE_SVM,)),
    ((_S.ACTIVE,), (_E.PRIMARY_LOST, *_VERDICTS), None, ()),
    # -- the end of protection
    (
        (_S.IDLE,),
        (_E.STOP, _E.ABORT, _E.PRIMARY_LEFT, _E.PRIMARY_LOST, _E.SHUTDOWN),
        _S.STOPPED,
        (_A.CLEAN_UP,),
    ),
    (
        (_S.CREATING, _S.SYNCING, _S.FIRST_PREPARING, _S.STANDBY, _S.PREPARING),
        (_E.STOP, _E.PRIMARY_LEFT, _E.SHUTDOWN),
        _S.STANDING_DOWN,
        (_A.DESTROY_SVM,),
    ),
    (
        _BUFFERING,
        (_E.STOP, _E.PRIMARY_LEFT, _E.SHUTDOWN),
        _S.STANDING_DOWN,
        (_A.DISCARD_BUFFER, _A.DESTROY_SVM),
    ),
    # a first checkpoint that fails ends the attempt
    ((_S.CREATING, _S.SYNCING, _S.FIRST_PREPARING), (_E.ABORT,), _S.STANDING_DOWN, (_A.DESTROY_SVM,)),
    ((_S.FIRST_RECEIVING,), (_E.ABORT,), _S.STANDING_DOWN, (_A.DISCARD_BUFFER, _A.DESTROY_SVM)),
    # -- the SVM cannot be the guest any more
    ((_S.CREATING,), (_E.SVM_FAILED,), _S.STANDING_DOWN, (_A.SEND_REFUSE, _A.DESTROY_SVM)),
    (
        (_S.SYNCING, _S.FIRST_PREPARING, _S.STANDBY, _S.PREPARING),
        (_E.SVM_FAILED,),
        _S.STANDING_DOWN,
        (_A.SEND_ABORT, _A.DESTROY_SVM),
    ),
    (_BUFFERING, (_E.SVM_FAILED,), _S.STANDING_DOWN, (_A.SEND_ABORT, _A.DISCARD_BUFFER, _A.DESTROY_SVM)),
    (
        (_S.FINISHING,),
        (_E.SVM_FAILED, _E.PRIMARY_LEFT),
        _S.STANDING_DOWN,
        (_A.DISCARD_BUFFER, _A.DESTROY_SVM),
    ),
    ((_S.ARBITRATING,), (_E.SVM_FAILED, _E.PRIMARY_LEFT), _S.STANDING_DOWN, (_A.DESTROY_SVM,)),
    ((_S.STANDING_DOWN,), (_E.SVM_DESTROYED,), _S.STOPPED, (_A.SEND_BYE, _A.CLEAN_UP)),
    # -- ended or ending: whatever still comes is late
    ((_S.STANDING_DOWN,), tuple(event for event in _E if event is not _E.SVM_DESTROYED), None, ()),
    ((_S.STOPPED,), tuple(_E), None, ()),
    # -- nobody waits for a sign of life
    (
        tuple(state for state in _S if state not in (_S.ACTIVE, _S.STANDING_DOWN, _S.STOPPED)),
        (_E.PRIMARY_HEARD,),
        None,
        (),
    ),
)


class BackupMachine(Machine[BackupState, BackupEvent, BackupAction]):
    """The backup host's side of one protection.

    Invariants:

    * The SVM reaches the LAN only after a complete checkpoint, an arbiter's verdict, and never once its
      destruction was ordered.
    * A checkpoint is acknowledged only when it is complete, and applied only when it is acknowledged.
    * An SVM on the LAN is not destroyed by us.

    :param unknown_policy: what an arbiter that cannot tell leads to.
    """

    TABLE: ClassVar[Table[BackupState, BackupEvent, BackupAction]] = expand(_ROWS)
    PEER_EVENTS: ClassVar[frozenset[BackupEvent]] = frozenset(
        {
            *(_E.CREATE, _E.PREPARE, _E.CHECKPOINT_BEGIN, _E.CHECKPOINT_COMPLETE),
            *(_E.ABORT, _E.STOP, _E.PRIMARY_LEFT, _E.PRIMARY_HEARD),
        }
    )
    FINAL: ClassVar[frozenset[BackupState]] = frozenset({_S.STOPPED})
    CYCLE: ClassVar[frozenset[BackupState]] = frozenset({_S.STANDBY, _S.PREPARING, _S.RECEIVING, _S.APPLYING})

    def __init__(self, unknown_policy: UnknownPolicy = UnknownPolicy.STAND_DOWN) -> None:
        super().__init__(BackupState.IDLE, "backup")
        self.unknown_policy = unknown_policy

    @property
    def replica(self) -> bool:
        """Whether the SVM could become the guest now."""
        return self.state in (
            _S.STANDBY,
            _S.PREPARING,
            _S.RECEIVING,
            _S.APPLYING,
            _S.FINISHING,
            _S.ARBITRATING,
        )

    def _look_up(self, event: BackupEvent) -> tuple[BackupState, tuple[BackupAction, ...]]:
        unknown = self.state is _S.ARBITRATING and event is _E.PRIMARY_UNKNOWN
        if unknown and self.unknown_policy is UnknownPolicy.TAKE_OVER:
            return self.TABLE[self.state, _E.PRIMARY_DEAD]
        return super()._look_up(event)

    def check_invariants(self, step: Step[BackupState, BackupEvent, BackupAction]) -> None:
        if _A.SEND_ACK in step.actions:
            require(step.event is _E.CHECKPOINT_COMPLETE, "only a complete checkpoint is acknowledged")
        if _A.APPLY_CHECKPOINT in step.actions:
            require(_A.SEND_ACK in step.actions, "what is applied is acknowledged")
        if _A.OPEN_LAN in self.ordered:
            require(_S.APPLYING in self.visited, "no takeover without a complete checkpoint")
            require(_S.ARBITRATING in self.visited, "no takeover without a verdict")
            require(_A.DESTROY_SVM not in self.ordered, "an SVM on the LAN is not one to be destroyed")
        if step.new is _S.ACTIVE:
            require(_A.OPEN_LAN in self.ordered, "an active SVM is on the LAN")
