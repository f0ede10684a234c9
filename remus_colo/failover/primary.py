# SPDX-License-Identifier: LGPL-2.1-or-later
"""The primary host's state machine: what protects the PVM, and who may speak for the guest when that ends."""

from __future__ import annotations

import enum
from typing import ClassVar

from remus_colo.failover.machine import Machine, Row, Step, Table, expand, require


class PrimaryState(enum.Enum):
    CONNECTING = "connecting"
    CREATING = "creating"  # the SVM is being made from a save stream
    SYNCING = "syncing"  # the first checkpoint: not protected yet
    PROTECTED = "protected"  # both VMs run, their output is compared
    CHECKPOINTING = "checkpointing"  # captured or on its way, not yet acknowledged
    COMMITTED = "committed"  # acknowledged: the backup loads it into the SVM
    ARBITRATING = "arbitrating"  # backup silent, and it may be active: nothing is released
    UNPROTECTED = "unprotected"  # the PVM goes on alone
    STOPPING = "stopping"  # STOP is sent, the SVM may still exist
    STOPPED = "stopped"
    FENCED = "fenced"  # the backup is active: the PVM must not run
    FAILED = "failed"  # protection never began


class PrimaryEvent(enum.Enum):
    # from the backup
    BACKUP_READY = "backup ready"  # both HELLOs of both channels are exchanged
    SVM_CREATED = "SVM created"
    CHECKPOINT_ACKED = "checkpoint acknowledged"
    SVM_RESUMED = "SVM resumed"
    BACKUP_REFUSED = "backup refused"
    BACKUP_ABORTED = "backup aborted"  # ABORT: it cannot protect any more
    BACKUP_LEFT = "backup left"  # BYE: the SVM is destroyed
    TAKEOVER = "takeover"
    # found out here
    CHECKPOINT_DUE = "checkpoint due"  # a level, not an edge: repeat it for as long as it holds
    CHECKPOINT_FAILED = "checkpoint failed"  # while capturing, before CHECKPOINT_END; the PVM is sound
    BACKUP_LOST = "backup lost"  # silent, and nobody can have decided against us
    BACKUP_LOST_IN_DOUBT = "backup lost, in doubt"  # silent, and it may be active: see SelfMonitor
    BACKUP_INACTIVE = "backup inactive"  # arbiter: the SVM is not active, and will not be
    BACKUP_ACTIVE = "backup active"  # arbiter: the SVM is active
    BACKUP_UNKNOWN = "backup unknown"  # arbiter: cannot tell
    LAN_CONFLICT = "LAN conflict"  # another host answers with the guest's MAC
    STOP_REQUESTED = "stop requested"  # Ctrl-C, SIGTERM
    PVM_GONE = "PVM gone"  # the guest ended by itself, or the user ended it
    LOCAL_FAILURE = "local failure"  # a Xen, network or host error that ends protection


class PrimaryAction(enum.Enum):
    CREATE_SVM = "create SVM"  # suspend, CREATE and save stream, resume in place
    START_CHECKPOINT = "start checkpoint"  # hold output from here on; PREPARE and what follows
    ABANDON_CAPTURE = "abandon capture"  # of save stream or checkpoint: the PVM runs, its dirty bits are kept
    RELEASE_COMMITTED = "release committed"  # what was held from before the acknowledged checkpoint
    RESUME_COMPARING = "resume comparing"
    RELEASE_ALL = "release all"  # what is held, and from now on everything
    WARN_UNPROTECTED = "warn unprotected"
    ASK_ARBITER = "ask arbiter"  # hook or LAN probe: is the SVM active?
    SEND_ABORT = "send ABORT"
    SEND_STOP = "send STOP"
    SEND_BYE = "send BYE"  # "I go on alone, the SVM is no replica any more"; must not wait for a silent peer
    CUT_LAN = "cut LAN"  # at once, and cheaper than stopping the PVM: take its vif off the bridge
    DROP_HELD = "drop held"
    STOP_PVM = "stop PVM"  # destroy it; if that fails, pause it
    CLEAN_UP = "clean up"  # rules, qdiscs, tunnels, dirty log, channels; a running PVM is left running


_S, _E, _A = PrimaryState, PrimaryEvent, PrimaryAction

# The backup is gone in a way that leaves no SVM, or none that a truthful arbiter lets take over.
_GONE = (_E.BACKUP_LOST, _E.BACKUP_LEFT, _E.BACKUP_ABORTED, _E.BACKUP_REFUSED)
_ENDING = (_E.STOP_REQUESTED, _E.LOCAL_FAILURE)
# What may still come of a checkpoint, or of the SVM's creation, that no longer matters.
_LATE = (_E.SVM_CREATED, _E.CHECKPOINT_DUE, _E.CHECKPOINT_FAILED, _E.CHECKPOINT_ACKED, _E.SVM_RESUMED)
# No checkpoint is being captured or sent; in the other states something has to be put back first.
_CALM = (_S.PROTECTED, _S.COMMITTED)
# A backup that was only frozen must not go on holding an SVM that what we release makes stale.
_ALONE = (_A.SEND_BYE, _A.RELEASE_ALL)
_FENCE = (_A.CUT_LAN, _A.DROP_HELD, _A.STOP_PVM, _A.CLEAN_UP)

_ROWS: tuple[Row[PrimaryState, PrimaryEvent, PrimaryAction], ...] = (
    # -- towards protection
    ((_S.CONNECTING,), (_E.BACKUP_READY,), _S.CREATING, (_A.CREATE_SVM,)),
    ((_S.CREATING,), (_E.SVM_CREATED,), _S.SYNCING, (_A.START_CHECKPOINT,)),
    ((_S.SYNCING, _S.CHECKPOINTING), (_E.CHECKPOINT_ACKED,), _S.COMMITTED, (_A.RELEASE_COMMITTED,)),
    ((_S.COMMITTED,), (_E.SVM_RESUMED,), _S.PROTECTED, (_A.RESUME_COMPARING,)),
    # -- checkpoints
    ((_S.PROTECTED,), (_E.CHECKPOINT_DUE,), _S.CHECKPOINTING, (_A.START_CHECKPOINT,)),
    ((_S.CHECKPOINTING,), (_E.CHECKPOINT_FAILED,), _S.PROTECTED, (_A.ABANDON_CAPTURE, _A.SEND_ABORT)),
    ((_S.SYNCING, _S.CHECKPOINTING, _S.COMMITTED), (_E.CHECKPOINT_DUE,), None, ()),
    # -- the backup goes before protection began: without a complete checkpoint it never takes over
    ((_S.CONNECTING,), (*_GONE, _E.BACKUP_LOST_IN_DOUBT), _S.FAILED, (_A.CLEAN_UP,)),
    ((_S.CREATING,), (*_GONE, _E.BACKUP_LOST_IN_DOUBT), _S.FAILED, (_A.ABANDON_CAPTURE, _A.CLEAN_UP)),
    ((_S.SYNCING,), _GONE, _S.FAILED, (_A.ABANDON_CAPTURE, *_ALONE, _A.CLEAN_UP)),
    # the first checkpoint may be complete over there, and its ACK lost
    ((_S.SYNCING,), (_E.BACKUP_LOST_IN_DOUBT,), _S.ARBITRATING, (_A.ABANDON_CAPTURE, _A.ASK_ARBITER)),
    # -- the backup goes while it protects
    (_CALM, _GONE, _S.UNPROTECTED, (*_ALONE, _A.WARN_UNPROTECTED)),
    ((_S.CHECKPOINTING,), _GONE, _S.UNPROTECTED, (_A.ABANDON_CAPTURE, *_ALONE, _A.WARN_UNPROTECTED)),
    (_CALM, (_E.BACKUP_LOST_IN_DOUBT,), _S.ARBITRATING, (_A.ASK_ARBITER,)),
    ((_S.CHECKPOINTING,), (_E.BACKUP_LOST_IN_DOUBT,), _S.ARBITRATING, (_A.ABANDON_CAPTURE, _A.ASK_ARBITER)),
    # -- arbitrating: BYE and ABORT mean that the SVM is destroyed, a REFUSE or more silence says nothing
    # about it; not even the user's stop releases output before the verdict
    (
        (_S.ARBITRATING,),
        (_E.BACKUP_INACTIVE, _E.BACKUP_LEFT, _E.BACKUP_ABORTED),
        _S.UNPROTECTED,
        (*_ALONE, _A.WARN_UNPROTECTED),
    ),
    ((_S.ARBITRATING,), (_E.BACKUP_UNKNOWN,), None, (_A.ASK_ARBITER,)),
    ((_S.ARBITRATING,), (_E.PVM_GONE,), _S.STOPPED, (_A.SEND_BYE, _A.DROP_HELD, _A.CLEAN_UP)),
    ((_S.ARBITRATING,), (_E.BACKUP_LOST, _E.BACKUP_LOST_IN_DOUBT, _E.BACKUP_REFUSED, *_ENDING), None, ()),
    ((_S.ARBITRATING,), _LATE, None, ()),
    # -- the backup is active
    (
        (*_CALM, _S.SYNCING, _S.CHECKPOINTING, _S.STOPPING, _S.ARBITRATING, _S.UNPROTECTED),
        (_E.TAKEOVER, _E.LAN_CONFLICT),
        _S.FENCED,
        _FENCE,
    ),
    ((_S.ARBITRATING, _S.UNPROTECTED), (_E.BACKUP_ACTIVE,), _S.FENCED, _FENCE),
    # -- alone
    ((_S.UNPROTECTED,), (*_ENDING, _E.PVM_GONE), _S.STOPPED, (_A.CLEAN_UP,)),
    ((_S.UNPROTECTED,), (*_GONE, _E.BACKUP_LOST_IN_DOUBT, _E.BACKUP_INACTIVE, _E.BACKUP_UNKNOWN), None, ()),
    ((_S.UNPROTECTED,), _LATE, None, ()),
    # -- the end of protection
    ((_S.CONNECTING,), (_E.STOP_REQUESTED,), _S.STOPPED, (_A.CLEAN_UP,)),
    ((_S.CONNECTING,), (_E.PVM_GONE, _E.LOCAL_FAILURE), _S.FAILED, (_A.CLEAN_UP,)),
    ((_S.CREATING, _S.SYNCING, _S.CHECKPOINTING), _ENDING, _S.STOPPING, (_A.ABANDON_CAPTURE, _A.SEND_STOP)),
    ((_S.SYNCING,), (_E.CHECKPOINT_FAILED,), _S.STOPPING, (_A.ABANDON_CAPTURE, _A.SEND_STOP)),
    (_CALM, _ENDING, _S.STOPPING, (_A.SEND_STOP,)),
    ((_S.CREATING, _S.SYNCING, _S.CHECKPOINTING, *_CALM), (_E.PVM_GONE,), _S.STOPPING, (_A.SEND_STOP,)),
    ((_S.STOPPING,), _GONE, _S.STOPPED, (*_ALONE, _A.CLEAN_UP)),
    ((_S.STOPPING,), (_E.BACKUP_LOST_IN_DOUBT,), _S.ARBITRATING, (_A.ASK_ARBITER,)),
    ((_S.STOPPING,), (*_ENDING, _E.PVM_GONE, *_LATE), None, ()),
    # -- ended: whatever still comes is late
    ((_S.STOPPED, _S.FENCED, _S.FAILED), tuple(_E), None, ()),
)


class PrimaryMachine(Machine[PrimaryState, PrimaryEvent, PrimaryAction]):
    """The primary host's side of one protection.

    Invariants:

    * Before a checkpoint is acknowledged, nothing that it covers is released on its account.
    * Everything is released at once only when the backup cannot be active: not while arbitrating, and never
      after a takeover is known.
    * Whoever goes on alone says so: the backup may only have been frozen.
    * Once fenced, always fenced.
    """

    TABLE: ClassVar[Table[PrimaryState, PrimaryEvent, PrimaryAction]] = expand(_ROWS)
    PEER_EVENTS: ClassVar[frozenset[PrimaryEvent]] = frozenset(
        {
            *(_E.BACKUP_READY, _E.SVM_CREATED, _E.CHECKPOINT_ACKED, _E.SVM_RESUMED),
            *(_E.BACKUP_REFUSED, _E.BACKUP_ABORTED, _E.BACKUP_LEFT, _E.TAKEOVER),
        }
    )
    FINAL: ClassVar[frozenset[PrimaryState]] = frozenset({_S.STOPPED, _S.FENCED, _S.FAILED})
    CYCLE: ClassVar[frozenset[PrimaryState]] = frozenset({_S.PROTECTED, _S.CHECKPOINTING, _S.COMMITTED})

    def __init__(self) -> None:
        super().__init__(PrimaryState.CONNECTING, "primary")

    @property
    def protected(self) -> bool:
        """Whether the guest survives the loss of this host now."""
        return self.state in (_S.PROTECTED, _S.CHECKPOINTING, _S.COMMITTED)

    @property
    def beats(self) -> bool:
        """Whether heartbeats are to be sent.

        Not once the session is lost to us: they would keep a backup that was only frozen waiting, with an SVM
        that protects nothing, while we wait for it to decide.
        """
        return not self.final and self.state not in (_S.ARBITRATING, _S.UNPROTECTED)

    def check_invariants(self, step: Step[PrimaryState, PrimaryEvent, PrimaryAction]) -> None:
        if _A.RELEASE_COMMITTED in step.actions:
            require(step.event is _E.CHECKPOINT_ACKED, "only an acknowledged checkpoint commits output")
        if _A.RELEASE_ALL in step.actions:
            require(step.new is not _S.ARBITRATING, "nothing is released while arbitrating")
            require(step.event is not _E.BACKUP_LOST_IN_DOUBT, "nothing is released in doubt")
            require(_A.SEND_BYE in step.actions, "whoever goes on alone says so")
        if _S.FENCED in self.visited:
            require(step.new is _S.FENCED, "once fenced, always fenced")
            require(_A.RELEASE_ALL not in step.actions, "a fenced primary releases nothing")
            require(_A.STOP_PVM in self.ordered, "a fenced primary's PVM is stopped")
