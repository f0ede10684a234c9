# SPDX-License-Identifier: LGPL-2.1-or-later
"""A protection on the primary host, as far as COLO and Remus have it in common: peer, failover, guest, end.

What the state machine orders is done here, or in the subclasses: ``colo_primary.py`` and ``remus_primary.py``.
"""

from __future__ import annotations

import abc
import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from remus_colo.adapters import backend, toolstack, xenctrl
from remus_colo.adapters.xenstore import Store
from remus_colo.checkpoint.suspend import SUSPEND_TIMEOUT_S
from remus_colo.devices.device import DeviceSet
from remus_colo.errors import DomainError, ExitStatus, MessageError, PeerError, PeerLost, RemusError, XenError
from remus_colo.failover.backup import DECIDING
from remus_colo.failover.primary import PrimaryAction as A
from remus_colo.failover.primary import PrimaryEvent as E
from remus_colo.failover.primary import PrimaryMachine, PrimaryState
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.wire import Message
from remus_colo.session.doubt import Doubt
from remus_colo.session.lan_watch import LanWatch
from remus_colo.session.loop import Loop, Timer
from remus_colo.session.parts import Engine, EventSink, Path, Terms
from remus_colo.session.peer import HeartbeatConfig, Peer
from remus_colo.session.steps import each

log = logging.getLogger(__name__)

# Of the heartbeat time-out: until a guest whose backup is lost is heard again.
REACTION = 0.2
GUEST_CHECK_S = 0.5
STOP_TIMEOUT_S = 30.0
STANDSTILL_LOOK_S = 0.02
FRESH = 2  # heartbeats: what the backup said of itself not longer ago is true yet
# In all others protection has ended, or is about to.
WITH_BACKUP = frozenset(
    {
        *(PrimaryState.CREATING, PrimaryState.SYNCING),
        *(PrimaryState.PROTECTED, PrimaryState.CHECKPOINTING, PrimaryState.COMMITTED),
    }
)
DECIDING_STATES = frozenset(state.value for state in DECIDING)


@dataclass(slots=True)
class SessionStats:
    """What the user sees.

    :ivar pause_s, pages: of the last checkpoint.
    """

    epoch: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    pause_s: float | None = None
    pages: int = 0
    bytes_sent: int = 0


def patience_s(heartbeat: HeartbeatConfig) -> float:
    """How long a silent backup is given: less than the time-out by :data:`REACTION`, or by one heartbeat if that is
    more, so that clients whose answers wait for it wait no longer than the time-out.  The backup need not agree: it
    looks for the guest on the LAN before it takes over.
    """
    least_s, most_s = heartbeat.timeout_s / 2, heartbeat.timeout_s * (1 - REACTION)
    return max(least_s, min(most_s, heartbeat.timeout_s - heartbeat.interval_s))


class PrimarySession(abc.ABC):
    """One protection, from CREATE to its end.

    The loop's thread owns packets, state and the guest's stops.  What takes long runs beside it.

    :param event: called with a name and fields at everything that a user may want to know.
    :param devices: what goes along with each checkpoint besides the vifs.
    :ivar failure: the error of this host's that has ended protection.
    """

    QUIET = False  # say nothing of the states that each checkpoint goes through

    def __init__(
        self,
        loop: Loop,
        config: Terms,
        engine: Engine,
        store: Store,
        make_peer: Callable[..., Peer],
        event: EventSink,
        devices: DeviceSet | None = None,
    ) -> None:
        self.devices = devices or DeviceSet([])
        self.loop = loop
        self.config = config
        self.engine = engine
        self.store = store
        self.event = event
        self.machine = PrimaryMachine()
        self.stats = SessionStats()
        self.failure: RemusError | None = None
        self.peer = make_peer(
            loop,
            config.heartbeat,
            on_message=self._on_message,
            on_lost=self._on_lost,
            state=lambda: self.machine.state.value,
            beats=lambda: self.machine.beats,
            clock=engine.clock,
            patience_s=patience_s(config.heartbeat),
            starting=lambda: self.machine.state is PrimaryState.CREATING,
            waiting_since_s=self._waiting_since_s,
        )
        self.peer.quiet_state = lambda state: state in DECIDING_STATES
        self.path: Path = self._make_path()
        self._lan = LanWatch(loop, self.path.links, engine.layout.vifs, store)
        self._doubt = Doubt(loop, config, self._lan, self.handle)
        self._odd_lan = False  # which was told
        self._created = False
        self._peer_lost = False
        self._peer_failure: RemusError | None = None  # why the backup is gone, in its words or ours
        self._stop_deadline: Timer | None = None
        self._guest_at_rest = threading.Event()  # no thread is about to suspend or resume the guest
        self._guest_at_rest.set()
        self._actions: dict[A, Callable[[], None]] = {
            A.CREATE_SVM: self._create_svm,
            A.START_CHECKPOINT: self._start_checkpoint,
            A.ABANDON_CAPTURE: self._abandon_capture,
            A.RELEASE_COMMITTED: self._release_committed,
            A.RESUME_COMPARING: self._resume_comparing,
            A.RELEASE_ALL: self._release_all,
            A.WARN_UNPROTECTED: self._warn_unprotected,
            A.ASK_ARBITER: self._ask_arbiter,
            A.SEND_ABORT: lambda: self.peer.send(
                MessageType.ABORT, self.stats.epoch, reason="the capture failed"
            ),
            A.SEND_STOP: self._send_stop,
            A.SEND_BYE: lambda: self.peer.send(MessageType.BYE),
            A.CUT_LAN: self._cut_lan,
            A.DROP_HELD: lambda: None,  # nothing but the end lets it go, and that looks at what was ordered
            A.STOP_PVM: self._stop_pvm,
            A.CLEAN_UP: self.loop.stop,
        }

    # -- what differs ----------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _make_path(self) -> Path:
        """Called while the session is being made, with :attr:`loop`, :attr:`config`, :attr:`engine` and
        :attr:`store` there.
        """

    @abc.abstractmethod
    def _create_svm(self) -> None:
        """Send CREATE, and what belongs to it."""

    @abc.abstractmethod
    def _maybe_begin(self) -> None:
        """The backup has said CREATED: the first checkpoint, if nothing else is missing."""

    @abc.abstractmethod
    def _start_checkpoint(self) -> None: ...

    @abc.abstractmethod
    def _abandon_capture(self) -> None: ...

    @abc.abstractmethod
    def _release_committed(self) -> None: ...

    @abc.abstractmethod
    def _resume_comparing(self) -> None: ...

    @abc.abstractmethod
    def _release_all(self) -> None: ...

    @abc.abstractmethod
    def _look_at_packets(self) -> None:
        """Called now and then while the guest lives."""

    @abc.abstractmethod
    def packet_counters(self) -> dict[str, int]:
        """The guest's output in figures, all vifs together."""

    def _waiting_since_s(self) -> float | None:
        """Since when clients wait because of the backup; None if none do, or if the mode has them wait anyway."""
        return None

    def _stands_still(self) -> bool:
        """Whether the guest is stopped, and may be for as long as the backup looks for it."""
        return False

    @abc.abstractmethod
    def _end_steps(self) -> list[Callable[[], object]]:
        """What leaves the host as it was, and the guest running; each is taken, whatever becomes of the others."""

    # -- running ---------------------------------------------------------------------------------------------

    def run(self) -> ExitStatus:
        """Protect until something ends it. Returns the exit status; always leaves the host clean.

        :raise Exception: a bug's, after all was cleaned up.
        """
        self.loop.call(lambda: self.handle(E.BACKUP_READY))
        self.loop.call_later(self.peer.next_look_s(), self._check_peer)
        self.loop.call_later(GUEST_CHECK_S, self._check_guest)
        self.peer.start()
        try:
            self._run_loop()
        finally:
            each(self._end_steps())
        state = self.machine.state
        if state is PrimaryState.FENCED:
            return ExitStatus.FENCED
        if state is PrimaryState.FAILED and self.failure is None:
            self.failure = self._peer_failure or PeerLost("the backup host left before protection began")
        if self.failure is not None:
            return self.failure.exit_status
        return ExitStatus.UNPROTECTED if PrimaryState.UNPROTECTED in self.machine.visited else ExitStatus.OK

    def _run_loop(self) -> None:
        """An error that nothing is waiting for ends protection as others do, in concert with the backup; a
        second one, at once.  So does Ctrl-C in the thread of a script that has no handler for it.

        :raise BaseException: the first one, if it was a bug's or no error.
        """
        try:
            self.loop.run()
            return
        except BaseException as error:
            first = error
        expected = isinstance(first, RemusError)
        if not expected and isinstance(first, Exception):
            log.error("%s: protection ends because of a bug", self.config.name, exc_info=first)
            self.event("error", text=f"a bug: {first!r}")
        if not self.machine.final:
            self.loop.call(lambda: self._end_after(first))
            try:
                self.loop.run()
            except BaseException as error:
                log.error(
                    "%s: and while it was ending: %s",
                    self.config.name,
                    error if isinstance(error, Exception) else repr(error),
                    exc_info=not isinstance(error, RemusError),
                )
                if not self._drops_held:
                    self.peer.send(MessageType.BYE)
        if not expected:
            raise first

    def _end_after(self, error: BaseException) -> None:
        if not self.guest_alive():
            return  # no wonder, then
        if isinstance(error, RemusError):
            self.fail(error)
        elif isinstance(error, Exception):
            self.handle(E.LOCAL_FAILURE, reason=repr(error))
        else:
            self.handle(E.STOP_REQUESTED, reason="the user's")

    def request_stop(self) -> None:
        """Ctrl-C or SIGTERM; from any thread or a signal handler."""
        self.loop.call(lambda: self.handle(E.STOP_REQUESTED, reason="the user's"))

    def handle(self, event: E, reason: str = "") -> None:
        """An event for the state machine, and what it orders then."""
        step = self.machine.handle(event, epoch=self.stats.epoch, reason=reason)
        if step.moved and not (self.QUIET and self.machine.routine(step)):
            self.event("state", old=step.old.value, new=step.new.value, cause=event.value, reason=reason)
        each([self._actions[action] for action in step.actions])

    def fail(self, error: BaseException) -> None:
        """An error of this host's that ends protection; a bug is raised on."""
        if not isinstance(error, RemusError):
            raise error
        error = self._explained(error)
        log.error("%s", error)
        self.event("error", text=str(error))
        if self.failure is None:
            self.failure = error
        self.handle(E.LOCAL_FAILURE, reason=str(error))

    def _explained(self, error: RemusError) -> RemusError:
        """What fails because the guest has lost an interface tells of a plug, or of a file of the backend's,
        that is not there.
        """
        with contextlib.suppress(RemusError):
            for end in self.path.vifs:
                if not self.path.links.exists(end.vif.ifname):
                    return DomainError(
                        f"{end.vif.ifname} is gone: if the guest was not destroyed, but lost an interface (xl network-detach), "
                        f"protect it anew ({error})"
                    )
        return error

    # -- the peer --------------------------------------------------------------------------------------------

    def _on_message(self, message: Message) -> None:
        kind = message.type
        if kind is MessageType.CREATED:
            self._created = True
            self.event("created", svm_domid=message.fields["domid"])
            self._maybe_begin()
        elif kind is MessageType.ACK:
            self.handle(E.CHECKPOINT_ACKED)
        elif kind is MessageType.RESUMED:
            self.event("svm-resumed", epoch=message.epoch, apply_ms=message.fields.get("apply_ms"))
            if pages := message.fields.get("verified_pages"):
                self.event("memory-equal", epoch=message.epoch, pages=pages)
            self.handle(E.SVM_RESUMED)
        elif kind is MessageType.ABORT:
            self._note_refusal(str(message.fields["reason"]))
            self.handle(E.BACKUP_ABORTED, reason=str(message.fields["reason"]))
        elif kind is MessageType.REFUSE:
            self._note_refusal(str(message.fields["reason"]))
            self.handle(E.BACKUP_REFUSED, reason=str(message.fields["reason"]))
        elif kind is MessageType.BYE:
            self.handle(E.BACKUP_LEFT)
        elif kind is MessageType.TAKEOVER:
            self.handle(E.TAKEOVER)
        else:
            self.fail(MessageError(f"the backup sent {kind.name}, which has no place here"))

    def _note_refusal(self, reason: str) -> None:
        self._peer_failure = PeerError(f"the backup host gave up: {reason}")
        self.event("backup-error", text=reason)

    def _on_lost(self, error: RemusError) -> None:
        log.warning("%s", error)
        self.event("peer-lost", text=str(error))
        self._lost(str(error))

    def _lost(self, reason: str) -> None:
        if self._peer_lost:
            return
        # A hook at the backup may be switching this host off, however well we feel.  And a look at the LAN
        # does not find a guest that is cut off from it.
        doubt = (
            bool(self.config.fence) or self.peer.in_doubt() or self._lan.conflict() or self._lan.unplugged()
        )
        if not doubt and self._stands_still():
            # For how long yet, nobody knows; and nobody is served meanwhile.
            self.loop.call_later(STANDSTILL_LOOK_S, lambda: self._lost(reason))
            return
        self._peer_lost = True
        self._peer_failure = self._peer_failure or PeerLost(reason)
        self.handle(E.BACKUP_LOST_IN_DOUBT if doubt else E.BACKUP_LOST, reason=reason)

    def _check_peer(self) -> None:
        self.loop.call_later(self.peer.next_look_s(), self._check_peer)
        if self._peer_lost or self.machine.final:
            return
        # What lies unread comes first: a takeover may be among it, if it was this host that was frozen.
        if self.peer.expired():
            self.loop.call(self._check_expired)

    def _check_expired(self) -> None:
        if not self._peer_lost and self.peer.expired():
            silence_s = self.peer.silence_s()
            self._lost(f"no sign of life from the backup host for {silence_s:.2f} s")

    def _ask_arbiter(self) -> None:
        self.event("arbitrating")
        self._doubt.ask()

    # -- the guest -------------------------------------------------------------------------------------------

    def guest_thread(
        self, name: str, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]
    ) -> None:
        """As :meth:`Loop.thread`, for what suspends the guest: the session does not end before it has."""
        self._guest_at_rest.clear()

        def run() -> Any:
            try:
                return work()
            finally:
                self._guest_at_rest.set()

        self.loop.thread(name, run, done)

    def guest_alive(self) -> bool:
        """Whether there is a guest to protect; if not, protection ends."""
        try:
            info = self.engine.guest.info()
        except XenError:
            info = None
        suspended = xenctrl.ShutdownReason.SUSPEND
        if info is not None and not info.dying and (not info.shutdown or info.shutdown_reason == suspended):
            return True
        if not self.machine.final:
            self.event("guest-gone")
            self.handle(E.PVM_GONE, reason="the guest shut down or was destroyed")
        return False

    def _check_guest(self) -> None:
        self.loop.call_later(GUEST_CHECK_S, self._check_guest)
        if not self.guest_alive():
            return
        self._check_interfaces()
        self._look_at_packets()
        if (
            self._lan.conflict()
            and not self.machine.final
            and self.machine.state is not PrimaryState.CONNECTING
        ):
            self._on_conflict()

    def _on_conflict(self) -> None:
        """Another host speaks as the guest; or its own frames come round, if the backup says that it only waits."""
        waits = self.peer.peer_state and self.peer.peer_state not in DECIDING_STATES
        if waits and not self._peer_lost and self.peer.silence_s() < self.config.heartbeat.interval_s * FRESH:
            self._lan.no_conflict()
            if not self._odd_lan:
                self._odd_lan = True
                log.warning(
                    "%s's own MAC address is seen in the LAN, and not from the backup host: there is a loop, or another machine has it",
                    self.config.name,
                )
            return
        self.event("lan-conflict")
        self.handle(E.LAN_CONFLICT)

    def _check_interfaces(self) -> None:
        """Through one that came later the guest speaks to everybody, unheard of here, and its copy has none."""
        known = {name for end in self.path.vifs for name in (end.vif.ifname, end.vif.emulated_ifname)}
        more = backend.interfaces(self.engine.guest.domid) - known
        if more and self.machine.state in WITH_BACKUP:
            self.fail(
                DomainError(
                    f"the guest has got {min(more)} while it is protected, which its copy has not: protect it anew, with that interface "
                    "or without"
                )
            )

    # -- the end ---------------------------------------------------------------------------------------------

    def _warn_unprotected(self) -> None:
        self.event("unprotected")
        log.warning("%s runs UNPROTECTED: the backup is gone", self.config.name)
        self.loop.call(lambda: self.handle(E.STOP_REQUESTED, reason="nothing is left to do"))

    def _send_stop(self) -> None:
        self.peer.send(MessageType.STOP, reason="protection ends")
        self._stop_deadline = self.loop.call_later(
            STOP_TIMEOUT_S,
            lambda: self._lost(f"the backup host did not confirm the end within {STOP_TIMEOUT_S:g} s"),
        )

    def _cut_lan(self) -> None:
        for end in self.path.vifs:
            for ifname in end.vif.ifnames or [end.vif.ifname]:
                try:
                    self.path.links.set_down(ifname)
                except RemusError as error:
                    log.error("could not take %s off the LAN: %s", ifname, error)

    def _stop_pvm(self) -> None:
        log.error("the backup host has taken over %s: it is stopped here", self.config.name)
        self.event("fenced")
        try:
            self.engine.guest.pause()
            toolstack.destroy(self.engine.guest.domid)
        except RemusError as error:
            log.error("%s", error)

    @property
    def _drops_held(self) -> bool:
        """Whether at the end what is held must not be seen: the guest goes on elsewhere, or nobody knows
        whether it does.
        """
        return A.DROP_HELD in self.machine.ordered or self.machine.state is PrimaryState.ARBITRATING

    def _await_rest(self) -> None:
        """With the peer closed, a copy that is under way breaks off; a guest's suspend has its own time-out:
        then it is resumed.
        """
        if not self._guest_at_rest.wait(SUSPEND_TIMEOUT_S + STOP_TIMEOUT_S):
            log.error(
                "%s was asked to suspend, did not, and may yet: look after it with 'xl list'",
                self.config.name,
            )
