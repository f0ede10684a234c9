# SPDX-License-Identifier: LGPL-2.1-or-later
"""A protection on the backup host, as far as COLO and Remus have it in common: peer, arbiter, failures, end.

What the state machine orders is done here, or in the subclasses: ``colo_backup.py`` and ``remus_backup.py``.
"""

from __future__ import annotations

import abc
import functools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from remus_colo.adapters.xenctrl import Clock
from remus_colo.adapters.xenstore import Store, domain_named
from remus_colo.errors import DomainError, ExitStatus, MessageError, RemusError
from remus_colo.failover.arbiter import Verdict
from remus_colo.failover.backup import BackupAction as A
from remus_colo.failover.backup import BackupEvent as E
from remus_colo.failover.backup import BackupMachine, BackupState, UnknownPolicy
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.wire import Message
from remus_colo.session.arbitration import Arbitration
from remus_colo.session.creation import AnyCreation
from remus_colo.session.fence import run_hook
from remus_colo.session.lan import ANNOUNCE_INTERVAL_S
from remus_colo.session.loop import Loop
from remus_colo.session.parts import EventSink
from remus_colo.session.peer import Peer, look_s
from remus_colo.session.steps import each

log = logging.getLogger(__name__)

GUEST_CHECK_S = 1.0
# The primary's clients wait for a checkpoint to be taken: what is part of it has shorter time-outs, but for
# the kernel's work and xl's.
APPLY_TIMEOUT_S = 120.0
# Of the heartbeat time-out. A look at the LAN (peer.PROBE_WINDOW) that begins then has ended when the primary
# counts as lost.
SUSPECT_AFTER = 0.45
LATE_AFTER = 2  # heartbeats: one may be held up
ANNOUNCE_REPEATS = 3  # a switch or a host may miss the first
# Errors that nobody expected, which a guest that is served here is to survive; more are a flood.
ERRORS_SURVIVED = 100

VERDICTS = {Verdict.DEAD: E.PRIMARY_DEAD, Verdict.ALIVE: E.PRIMARY_ALIVE, Verdict.UNKNOWN: E.PRIMARY_UNKNOWN}
_CONTENT = frozenset(
    {
        *(MessageType.CHECKPOINT_BEGIN, MessageType.PAGES, MessageType.STATE),
        *(MessageType.CHECKPOINT_STREAM, MessageType.CHECKPOINT_END),
    }
)


@dataclass(frozen=True, slots=True)
class BackupConfig:
    """What the daemon gives each session.

    :param lan_bridge: where the guest's vifs go at failover if the primary's configuration names a bridge
        that this host has not.
    :param fence: a command that is asked whether the primary is dead, or makes sure of it.
    """

    lan_bridge: str = ""
    fence: tuple[str, ...] = ()
    unknown: UnknownPolicy = UnknownPolicy.STAND_DOWN


class BackupSession(abc.ABC):
    """One SVM, from CREATE until it is destroyed or has become the guest.

    The loop's thread owns state and packets.  What takes long, with the SVM or the LAN, runs beside it.

    :param clock: this host's Xen system time.
    :param event: called with a name and fields at everything that a user may want to know.
    :ivar domid: the SVM's, as soon as there is one.
    """

    QUIET = False  # say nothing of the states that each checkpoint goes through

    def __init__(
        self,
        config: BackupConfig,
        creation: AnyCreation,
        make_peer: Callable[..., Peer],
        clock: Clock,
        event: EventSink,
    ) -> None:
        self.config = config
        self.creation = creation
        self.machine = BackupMachine(config.unknown)
        self.loop = Loop()
        self.store = Store()
        self.peer = make_peer(
            self.loop,
            creation.heartbeat,
            on_message=self._on_message,
            on_lost=self._on_lost,
            state=lambda: self.machine.state.value,
            on_stream=self._on_stream,
            clock=clock,
            ask_clock=creation.clock_offset_ns is not None,
            starting=lambda: BackupState.APPLYING not in self.machine.visited,
        )
        self.clock = clock
        self.event = event
        self.domid: int | None = None
        self._epoch = 0
        self._peer_lost = False
        self._shutting_down = False
        self._failure = ""
        self._arbitration = Arbitration(self.loop, self._judge, self._decided, event)
        self._svm_at_rest = threading.Event()  # no thread is at work on it
        self._svm_at_rest.set()
        self._actions: dict[A, Callable[[], None]] = {
            A.CREATE_SVM: self._create_svm,
            A.SEND_CREATED: self._send_created,
            A.SEND_REFUSE: self._send_refuse,
            A.PAUSE_SVM: self._pause_svm,
            A.SEND_DIRTY: self._send_dirty,
            A.START_BUFFER: lambda: None,
            A.DISCARD_BUFFER: self._discard_buffer,
            A.SEND_ACK: self._send_ack,
            A.APPLY_CHECKPOINT: self._apply_checkpoint,
            A.RESUME_SVM: self._resume_svm,
            A.SEND_RESUMED: self._send_resumed,
            A.SEND_ABORT: lambda: self.peer.send(
                MessageType.ABORT, self._epoch, reason=self._failure or "the SVM failed"
            ),
            A.ASK_ARBITER: self._arbitration.ask,
            A.SEND_TAKEOVER: lambda: self.peer.send(MessageType.TAKEOVER),
            A.OPEN_LAN: self._open_lan,
            A.ANNOUNCE: functools.partial(self._announce, ANNOUNCE_REPEATS),
            A.DESTROY_SVM: self._destroy_svm,
            A.SEND_BYE: lambda: self.peer.send(MessageType.BYE),
            A.LEAVE_SVM: self.loop.stop,
            A.CLEAN_UP: self.loop.stop,
        }

    # -- what differs ----------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _on_stream(self, chunk: bytes) -> None:
        """In the reader's thread: a piece of the save stream; an empty one ends it."""

    @abc.abstractmethod
    def _end_stream(self) -> None:
        """No more will come: whoever waits for it is to notice. From any thread, and more than once."""

    @abc.abstractmethod
    def _on_checkpoint(self, message: Message) -> None:
        """CHECKPOINT_BEGIN and all that follows, to CHECKPOINT_END.

        :raise MessageError: it is not what should come.
        """

    @abc.abstractmethod
    def _create_svm(self) -> None: ...

    @abc.abstractmethod
    def _send_created(self) -> None: ...

    @abc.abstractmethod
    def _pause_svm(self) -> None: ...

    @abc.abstractmethod
    def _send_dirty(self) -> None: ...

    @abc.abstractmethod
    def _discard_buffer(self) -> None: ...

    @abc.abstractmethod
    def _apply_checkpoint(self) -> None: ...

    @abc.abstractmethod
    def _resume_svm(self) -> None: ...

    @abc.abstractmethod
    def _send_resumed(self) -> None: ...

    @abc.abstractmethod
    def _look_at_lan(self, window_s: float) -> Verdict:
        """In a thread: does the guest still answer on the LAN?  Then its host is alive, and only the link is lost.

        :param window_s: so long a silence means that it does not.
        """

    def _longest_pause_s(self) -> float:
        """Of the guest at its checkpoints, by what the primary has told: it answers nobody then."""
        return 0.0

    @abc.abstractmethod
    def _open_lan(self) -> None: ...

    @abc.abstractmethod
    def _announce_once(self) -> None: ...

    @abc.abstractmethod
    def _svm_failure(self) -> RemusError | None:
        """What has become of the SVM, if it has ended by itself. Not called while a thread is at work on it."""

    @abc.abstractmethod
    def _destroy(self) -> None:
        """In a thread, once nothing more comes: end the SVM, and what makes it.

        :raise RemusError: it is still there.
        """

    @abc.abstractmethod
    def _end_steps(self) -> list[Callable[[], object]]:
        """What leaves the host as it was, but for an SVM that became the guest; each is taken."""

    # -- running ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the session ends; the host is clean then, but for an SVM that became the guest.

        :raise Exception: an error that nobody expected has ended it.
        """
        self.loop.call(lambda: self.handle(E.CREATE))
        self._look_again()
        self.loop.call_later(GUEST_CHECK_S, self._check_guest)
        self.peer.start()
        try:
            self._run_loop()
        finally:
            each([*self._end_steps(), self.store.close, self.loop.close, lambda: self.event("ended")])

    def _run_loop(self) -> None:
        """An error that nobody expected ends the SVM in concert with the primary; a second one, at once.

        Not the guest: if the SVM has become it, it is served on, and in the midst of arbitration the verdict
        is "unknown".
        """
        errors = 0
        while True:
            try:
                self.loop.run()
                return
            except Exception as error:
                failure = error
            errors += 1
            bug = not isinstance(failure, RemusError)
            log.error("%s: %s", self.creation.name, failure, exc_info=failure if bug else None)
            self.event("error", text=f"a bug: {failure!r}" if bug else str(failure))
            state = self.machine.state
            if state is BackupState.ACTIVE and errors <= ERRORS_SURVIVED:
                continue
            if state is BackupState.ACTIVE or self.machine.final:
                raise failure
            if errors > 1 or state is BackupState.STANDING_DOWN:
                self._destroy_now()
                raise failure
            self._failure = str(failure)
            unknown = state is BackupState.ARBITRATING
            self.loop.call(
                functools.partial(self.handle, E.PRIMARY_UNKNOWN if unknown else E.SVM_FAILED, repr(failure))
            )

    def shut_down(self) -> None:
        """remusd ends; from any thread.  The session does so, too, as soon as it is known what becomes of the guest."""

        def told() -> None:
            self._shutting_down = True
            self.handle(E.SHUTDOWN)

        self.loop.call(told)

    def handle(self, event: E, reason: str = "") -> None:
        """An event for the state machine, and what it orders then."""
        step = self.machine.handle(event, epoch=self._epoch, reason=reason)
        if step.moved and not (self.QUIET and self.machine.routine(step)):
            self.event("state", old=step.old.value, new=step.new.value, cause=event.value, reason=reason)
        if step.moved and step.new is BackupState.ACTIVE and self._shutting_down:
            # It had to wait for the verdict, and now until the LAN has heard of the guest.
            self.loop.call_later(ANNOUNCE_REPEATS * ANNOUNCE_INTERVAL_S, lambda: self.handle(E.SHUTDOWN))
        each([self._actions[action] for action in step.actions])

    def _send_ack(self) -> None:
        self.peer.send(MessageType.ACK, self._epoch)

    def _svm_failed(self, error: BaseException) -> None:
        if not isinstance(error, RemusError):
            raise error
        log.error("%s: %s", self.creation.name, error)
        self._failure = str(error)
        self.event("error", text=str(error))
        self.handle(E.SVM_FAILED, reason=str(error))

    def _refuse_remains(self, name: str) -> None:
        """:raise DomainError: a domain has the name that the SVM is to have, or the one that it takes as the guest."""
        if domain_named(self.store, name) is not None:
            raise DomainError(
                f"there is a domain {name} on this host already: if {self.creation.name} is protected here by nobody else, "
                f"it was left by a remusd that was killed: xl destroy {name}"
            )
        final = self.creation.config["c_info"]["name"]
        if not self.creation.same_host and domain_named(self.store, final) is not None:
            raise DomainError(
                f"there is a domain {final} on this host already, and two of that name would be one too many after a failover: "
                "end that one here, or rename it"
            )

    def _svm_thread(
        self, name: str, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]
    ) -> None:
        """As :meth:`Loop.thread`, for what changes the SVM: it is not destroyed meanwhile, nor looked at."""
        self._svm_at_rest.clear()

        def run() -> Any:
            try:
                return work()
            finally:
                self._svm_at_rest.set()

        self.loop.thread(name, run, done)

    def _apply_thread(
        self, work: Callable[[], float], done: Callable[[float | None, BaseException | None], None]
    ) -> None:
        """As :meth:`_svm_thread`, for the load of a checkpoint: one that takes too long has failed, whatever
        comes of it yet.

        Not once the primary is lost: nobody waits for it then, and what is being loaded is the guest.
        """
        epoch = self._epoch

        def late() -> None:
            if self.machine.state is BackupState.APPLYING:
                self._svm_failed(
                    DomainError(
                        f"checkpoint {epoch} was not loaded within {APPLY_TIMEOUT_S:g} s: see `xl list` and `dmesg` on the backup host"
                    )
                )

        timer = self.loop.call_later(APPLY_TIMEOUT_S, late)

        def ended(result: float | None, error: BaseException | None) -> None:
            timer.cancel()
            done(result, error)

        self._svm_thread("apply", work, ended)

    # -- the primary -----------------------------------------------------------------------------------------

    def _on_message(self, message: Message) -> None:
        kind = message.type
        if self._peer_lost:
            # Whatever else it says is late; but a primary that goes on alone has released what the SVM does not know.
            self.handle(E.PRIMARY_LEFT if kind is MessageType.BYE else E.PRIMARY_HEARD)
            return
        try:
            if kind is MessageType.PREPARE:
                self._epoch = message.epoch
                self.handle(E.PREPARE)
            elif kind in _CONTENT:
                self._on_checkpoint(message)
            elif kind is MessageType.ABORT:
                self.handle(E.ABORT, reason=str(message.fields["reason"]))
            elif kind in (MessageType.STOP, MessageType.REFUSE):
                self.handle(E.STOP, reason=str(message.fields["reason"]))
            elif kind is MessageType.BYE:
                self.handle(E.PRIMARY_LEFT)
            else:
                raise MessageError(f"the primary sent {kind.name}, which only a backup sends")
        except MessageError as error:
            log.error("%s: %s", self.creation.name, error)
            self._lost(str(error))

    def _send_refuse(self) -> None:
        self.peer.send(
            MessageType.REFUSE,
            reason=self._failure or "the SVM could not be made",
            exit_status=int(ExitStatus.PEER_REFUSED),
        )

    def _on_lost(self, error: RemusError) -> None:
        log.warning("%s: %s", self.creation.name, error)
        self._lost(str(error))

    def _lost(self, reason: str) -> None:
        if not self._peer_lost:
            self._peer_lost = True
            self.event("primary-lost", reason=reason, silence_ms=round(self.peer.silence_s() * 1000))
            self._end_stream()
            self.handle(E.PRIMARY_LOST, reason=reason)

    @property
    def _suspect_s(self) -> float:
        """The silence that makes the primary suspect."""
        return self.creation.heartbeat.timeout_s * SUSPECT_AFTER

    def _look_again(self) -> None:
        self.loop.call_later(self.peer.next_look_s(self._suspect_s), self._check_peer)

    def _check_peer(self) -> None:
        self._look_again()
        if self._peer_lost or self.machine.final:
            return
        silence_s = self.peer.silence_s()
        suspect_s = self._suspect_s
        self._on_heartbeats(
            missing=silence_s > min(self.creation.heartbeat.interval_s * LATE_AFTER, suspect_s)
        )
        if silence_s > suspect_s:
            self._suspect()
        else:
            self._arbitration.forget()
        if self.peer.expired():
            self.loop.call(self._check_expired)  # what lies unread comes first

    def _check_expired(self) -> None:
        if not self._peer_lost and self.peer.expired():
            self._lost(f"no sign of life from the primary for {self.peer.silence_s():.2f} s")

    # -- is it dead? -----------------------------------------------------------------------------------------

    def _on_heartbeats(self, *, missing: bool) -> None:
        """:param missing: some, as happens; when it is many, the primary is suspected."""
        return

    def _suspect(self) -> None:
        """The primary may be dead.

        Only a look: a fencing hook, which may switch a host off, is run when the primary counts as lost.
        """
        if self.machine.replica and not self.config.fence:
            self._arbitration.look_early()

    def _decided(self, verdict: Verdict) -> None:
        self.handle(VERDICTS[verdict])

    def _judge(self) -> Verdict:
        """In a thread: the fencing hook if there is one, else whether the guest still answers on the LAN."""
        if self.config.fence:
            return run_hook(self.config.fence, self.creation.name, self.peer.control.peer)
        return self._look_at_lan(look_s(self.creation.heartbeat.timeout_s, self._longest_pause_s()))

    def _announce(self, repeats: int) -> None:
        self._announce_once()
        if repeats > 1 and not self.machine.final:
            self.loop.call_later(ANNOUNCE_INTERVAL_S, lambda: self._announce(repeats - 1))

    # -- the end ---------------------------------------------------------------------------------------------

    def _check_guest(self) -> None:
        self.loop.call_later(GUEST_CHECK_S, self._check_guest)
        ending = self.machine.final or self.machine.state is BackupState.STANDING_DOWN
        if not ending and self._svm_at_rest.is_set() and (failure := self._svm_failure()) is not None:
            self._svm_failed(failure)

    def _destroy_svm(self) -> None:
        def done(_: object, error: BaseException | None) -> None:
            self._note_remains(error)
            self.handle(E.SVM_DESTROYED)

        self._end_stream()
        self.loop.thread("destroy", self._destroy, done)

    def _destroy_now(self) -> None:
        self._peer_lost = True
        self._end_stream()
        try:
            self._destroy()
        except Exception as error:
            self._note_remains(error)

    def _note_remains(self, error: BaseException | None) -> None:
        if error is not None:
            bug = not isinstance(error, RemusError)
            log.error(
                "%s: the SVM was not destroyed: %s",
                self.creation.name,
                error,
                exc_info=error if bug else None,
            )
