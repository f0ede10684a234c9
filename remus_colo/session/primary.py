# SPDX-License-Identifier: LGPL-2.1-or-later
"""The primary's session: what the state machine orders, done to the PVM, its network and the peer.

The loop's thread owns packets, state and the guest's stops.  What takes long runs beside it: the guest's
birth on the backup, its own suspend in co-operative mode, and a checkpoint's way to the network.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from remus_colo.adapters import toolstack, xenctrl
from remus_colo.adapters.xenstore import Store
from remus_colo.checkpoint import birth, transfer
from remus_colo.checkpoint.guestinfo import Mode
from remus_colo.checkpoint.pvm import PvmEngine, Snapshot
from remus_colo.checkpoint.suspend import SUSPEND_TIMEOUT_S
from remus_colo.devices.device import DeviceSet
from remus_colo.errors import ExitStatus, MessageError, PeerError, PeerLost, RemusError, XenError
from remus_colo.failover.arbiter import Verdict
from remus_colo.failover.backup import DECIDING
from remus_colo.failover.primary import PrimaryAction as A
from remus_colo.failover.primary import PrimaryEvent as E
from remus_colo.failover.primary import PrimaryMachine, PrimaryState
from remus_colo.proxy.comparator import CheckpointRequest, CompareConfig, Reason
from remus_colo.proxy.primary_path import PrimaryPath, Tunnel
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.wire import Message
from remus_colo.session.fence import run_hook
from remus_colo.session.lan import LanWatch
from remus_colo.session.loop import Loop, Timer
from remus_colo.session.peer import HeartbeatConfig, Peer

log = logging.getLogger(__name__)

GUEST_CHECK_S = 0.5
STOP_TIMEOUT_S = 30.0
STREAM_FRAME_BYTES = 1 << 20
# Before a guest suspends itself it is given a while without input to finish what it is at: what its twin, whose network
# comes back late, sends before that is lost until TCP repeats it. It has finished when its vCPUs are blocked each
# time that it is looked at, so often in a row.
SETTLE_LOOK_S = 0.005
SETTLE_LOOKS = 5
SETTLE_TIMEOUT_S = 1.0  # work without end: suspend it as it is
DECIDING_STATES = frozenset(state.value for state in DECIDING)


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """What a protection runs with.

    :param period_s: a checkpoint at least that often, 0 for never.
    :param clock_offset_ns: what the backup's Xen shall add to its system time for the SVM, and keep right as
        clocks drift; None to leave the SVM its host's clock.
    :param verify_every: after each so many checkpoints both VMs' memory is compared, 0 for never.
    """

    name: str
    mode: Mode
    heartbeat: HeartbeatConfig
    compare: CompareConfig
    period_s: float
    verify_every: int
    tunnels: dict[int, Tunnel]
    backup_tunnels: dict[int, Tunnel]
    tag: str
    same_host: bool
    destination: str
    fence: tuple[str, ...] = ()
    clock_offset_ns: int | None = None


@dataclass(slots=True)
class SessionStats:
    """What the user sees."""

    epoch: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    pause_s: list[float] = field(default_factory=list)
    pages: int = 0
    bytes_sent: int = 0


class Phases:
    """How long each part of one checkpoint took; one after the other, from when it began."""

    def __init__(self) -> None:
        self._ended_s = [("", time.monotonic())]

    def end(self, name: str) -> None:
        self._ended_s.append((name, time.monotonic()))

    def ms(self) -> dict[str, float]:
        return {
            name: round((end_s - begin_s) * 1000, 1)
            for (_, begin_s), (name, end_s) in itertools.pairwise(self._ended_s)
        }


EventSink = Callable[..., None]


class PrimarySession:
    """One protection, from CREATE to its end.

    :param event: called with a name and fields at everything that a user may want to know.
    :param devices: what goes along with each checkpoint besides the vifs.
    """

    QUIET = False  # say nothing of the states that each checkpoint goes through

    def __init__(
        self,
        loop: Loop,
        config: SessionConfig,
        engine: PvmEngine,
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
        self.machine = PrimaryMachine()
        self.stats = SessionStats()
        self.failure: RemusError | None = None
        self._event = event
        self.peer = make_peer(
            loop, config.heartbeat, on_message=self._on_message, on_lost=self._on_lost, state=lambda: self.machine.state.value,
            beats=lambda: self.machine.beats, clock=engine.clock,
        )
        self.peer.quiet_state = lambda state: state in DECIDING_STATES
        self.path = self._make_path()
        self._lan = LanWatch(self.path.links, engine.layout.vifs, store)
        self._pending: CheckpointRequest | None = None  # asked for while another was under way
        self._reason = Reason.START
        self._capturing = False
        self._held = False
        self._phases = Phases()
        self._born = self._created = False
        self._period: Timer | None = None
        self._stop_deadline: Timer | None = None
        self._peer_lost = False
        self._peer_failure: RemusError | None = None  # why the backup is gone, in its words or ours
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
            A.SEND_ABORT: lambda: self.peer.send(MessageType.ABORT, self.stats.epoch, reason="the capture failed"),
            A.SEND_STOP: self._send_stop,
            A.SEND_BYE: lambda: self.peer.send(MessageType.BYE),
            A.CUT_LAN: self._cut_lan,
            A.DROP_HELD: self._drop_held,
            A.STOP_PVM: self._stop_pvm,
            A.CLEAN_UP: self.loop.stop,
        }

    def _make_path(self) -> PrimaryPath:
        return PrimaryPath(
            self.loop, self.engine.layout.vifs, self.config.tag, self.config.compare, self._on_request
        )

    # -- running -----------------------------------------------------------------------------------------

    def run(self) -> ExitStatus:
        """Protect until something ends it. Returns the exit status; always leaves the host clean."""
        self.loop.call(lambda: self._handle(E.BACKUP_READY))
        self.loop.call_later(self.config.heartbeat.interval_s, self._check_peer)
        self.loop.call_later(GUEST_CHECK_S, self._check_guest)
        self.peer.start()
        try:
            self.loop.run()
        finally:
            self._clean_up()
        state = self.machine.state
        if state is PrimaryState.FENCED:
            return ExitStatus.FENCED
        if state is PrimaryState.FAILED and self.failure is None:
            self.failure = self._peer_failure or PeerLost("the backup host left before protection began")
        if self.failure is not None:
            return self.failure.exit_status
        return ExitStatus.UNPROTECTED if PrimaryState.UNPROTECTED in self.machine.visited else ExitStatus.OK

    def request_stop(self) -> None:
        """Ctrl-C or SIGTERM; from any thread or a signal handler."""
        self.loop.call(lambda: self._handle(E.STOP_REQUESTED, reason="the user's"))

    def request_checkpoint(self, request: CheckpointRequest) -> None:
        """As the comparator does; from any thread."""
        self.loop.call(lambda: self._on_request(request))

    def _handle(self, event: E, reason: str = "") -> None:
        step = self.machine.handle(event, epoch=self.stats.epoch, reason=reason)
        if step.moved and not (self.QUIET and self.machine.routine(step)):
            self._event("state", old=step.old.value, new=step.new.value, cause=event.value, reason=reason)
        for action in step.actions:
            self._actions[action]()

    def _fail(self, error: BaseException) -> None:
        """An error of this host's that ends protection; a bug is raised on."""
        if not isinstance(error, RemusError):
            raise error
        log.error("%s", error)
        self._event("error", text=str(error))
        if self.failure is None:
            self.failure = error
        self._handle(E.LOCAL_FAILURE, reason=str(error))

    # -- the peer ------------------------------------------------------------------------------------------

    def _on_message(self, message: Message) -> None:
        kind = message.type
        if kind is MessageType.DIRTY:
            self._on_dirty(message)
        elif kind is MessageType.CREATED:
            self._created = True
            self._event("created", svm_domid=message.fields["domid"])
            self._maybe_begin()
        elif kind is MessageType.ACK:
            self._handle(E.CHECKPOINT_ACKED)
        elif kind is MessageType.RESUMED:
            self._event("svm-resumed", epoch=message.epoch, apply_ms=message.fields.get("apply_ms"))
            if pages := message.fields.get("verified_pages"):
                self._event("memory-equal", epoch=message.epoch, pages=pages)
            self._handle(E.SVM_RESUMED)
        elif kind is MessageType.ABORT:
            self._note_refusal(str(message.fields["reason"]))
            self._handle(E.BACKUP_ABORTED, reason=str(message.fields["reason"]))
        elif kind is MessageType.REFUSE:
            self._note_refusal(str(message.fields["reason"]))
            self._handle(E.BACKUP_REFUSED, reason=str(message.fields["reason"]))
        elif kind is MessageType.BYE:
            self._handle(E.BACKUP_LEFT)
        elif kind is MessageType.TAKEOVER:
            self._handle(E.TAKEOVER)
        else:
            self._fail(MessageError(f"the backup sent {kind.name}, which only a primary sends"))

    def _note_refusal(self, reason: str) -> None:
        self._peer_failure = PeerError(f"the backup host gave up: {reason}")
        self._event("backup-error", text=reason)

    def _on_lost(self, error: RemusError) -> None:
        log.warning("%s", error)
        self._event("peer-lost", text=str(error))
        self._lost(str(error))

    def _lost(self, reason: str) -> None:
        if self._peer_lost:
            return
        self._peer_lost = True
        self._peer_failure = self._peer_failure or PeerLost(reason)
        # A hook at the backup may be switching this host off, however well we feel.
        doubt = bool(self.config.fence) or self.peer.in_doubt() or self._lan.conflict()
        self._handle(E.BACKUP_LOST_IN_DOUBT if doubt else E.BACKUP_LOST, reason=reason)

    def _check_peer(self) -> None:
        self.loop.call_later(self.config.heartbeat.interval_s, self._check_peer)
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
        """Is the SVM active? It would answer for the guest's addresses from beyond this host."""
        self._event("arbitrating")

        def decided(active: bool | None, error: BaseException | None) -> None:
            if error is not None and not isinstance(error, RemusError):
                raise error
            if error is not None or active is None:
                self.loop.call_later(0.5, lambda: self._handle(E.BACKUP_UNKNOWN))
            else:
                self._handle(E.BACKUP_ACTIVE if active else E.BACKUP_INACTIVE)

        self.loop.thread("arbiter", self._judge, decided)

    def _judge(self) -> bool | None:
        """In a thread: is the SVM active? None if nobody can tell."""
        if self.config.fence:
            verdict = run_hook(self.config.fence, self.config.name, self.config.destination)
            return {Verdict.DEAD: False, Verdict.ALIVE: True}.get(verdict)
        return self._lan.secondary_active(self.config.heartbeat.timeout_s)

    # -- the SVM's birth -----------------------------------------------------------------------------------

    def _create_svm(self) -> None:
        config = toolstack.domain_config(self.engine.guest.domid)
        fields: dict[str, Any] = {
            "name": self.config.name,
            "mode": self.config.mode.value,
            "config": config,
            "tunnel": {
                "tag": self.config.tag,
                "same_host": self.config.same_host,
                "vifs": [
                    {
                        "handle": handle,
                        "vni": tunnel.vni,
                        "port": tunnel.port,
                        "local": tunnel.local,
                        "remote": tunnel.remote,
                        "mtu": self.path.links.mtu(f"vif{self.engine.guest.domid}.{handle}"),
                    }
                    for handle, tunnel in self.config.backup_tunnels.items()
                ],
            },
            "heartbeat": {"interval_s": self.config.heartbeat.interval_s, "timeout_s": self.config.heartbeat.timeout_s},
        }
        if self.config.clock_offset_ns is not None:
            fields["clock_offset_ns"] = self.config.clock_offset_ns
        self.peer.send(MessageType.CREATE, 0, **fields)
        self._event("creating", mode=self.config.mode.value)
        secondary = birth.secondary_config(
            config, lambda index: f"rcb{self.config.tag}.{self.engine.layout.vifs[index].handle}",
            same_host=self.config.same_host,
        )
        self._guest_thread("birth", functools.partial(self._give_birth, secondary), self._on_born)

    def _guest_thread(self, name: str, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        """As :meth:`Loop.thread`, for what suspends the guest: the session does not end before it has."""
        self._guest_at_rest.clear()

        def run() -> Any:
            try:
                return work()
            finally:
                self._guest_at_rest.set()

        self.loop.thread(name, run, done)

    def _give_birth(self, secondary: dict[str, Any]) -> float:
        """In a thread: send the guest, start the dirty log, resume it. Returns how long it was stopped."""
        engine, stopped_s = self.engine, 0.0

        def write(chunk: bytes) -> None:
            for start in range(0, len(chunk), STREAM_FRAME_BYTES):
                self.peer.data.send_bulk(
                    MessageType.CREATE_STREAM, 0, [memoryview(chunk)[start : start + STREAM_FRAME_BYTES]]
                )

        def suspend() -> None:
            nonlocal stopped_s
            engine.suspend()
            stopped_s = time.monotonic()

        suspended = False
        try:
            birth.send_guest(engine.guest.domid, secondary, suspend, write)
            suspended = True
            engine.start_logging()
        except BaseException:
            info = engine.guest.info()
            if info.shutdown and info.shutdown_reason == xenctrl.ShutdownReason.SUSPEND:
                engine.resume_cancelled()
            raise
        assert suspended
        if engine.mode is Mode.TRANSPARENT:
            engine.resume_as_new()
        else:
            engine.resume_cancelled()
        pause_s = time.monotonic() - stopped_s
        self.peer.data.send_bulk(MessageType.CREATE_STREAM, 0, [])
        engine.await_connected()
        engine.rings_changed()
        return pause_s

    def _on_born(self, pause_s: float | None, error: BaseException | None) -> None:
        if error is not None:
            if self.machine.final:
                return
            self._fail(error)
            return
        assert pause_s is not None
        self._event("resumed-in-place", pause_ms=round(pause_s * 1000, 1))
        self._born = True
        self._maybe_begin()

    def _maybe_begin(self) -> None:
        """Both halves of the birth are done: bring the network up and take the first checkpoint."""
        if not (self._born and self._created) or self.machine.state is not PrimaryState.CREATING:
            return
        try:
            self.path.start(self.config.tunnels)
            self._lan.start()
        except RemusError as error:
            self._fail(error)
            return
        self._handle(E.SVM_CREATED)

    # -- checkpoints ---------------------------------------------------------------------------------------

    def _on_request(self, request: CheckpointRequest) -> None:
        """The comparator, the period or the user asks for a checkpoint."""
        if self.machine.state is PrimaryState.PROTECTED and not self._capturing:
            self._pending = None
            self._reason = request.reason
            self._event("checkpoint-asked", reason=request.reason.value, detail=request.detail)
            # Not at once: the comparator may be in the midst of a packet.
            self._capturing = True
            self.loop.call(lambda: self._handle(E.CHECKPOINT_DUE, reason=request.reason.value))
        elif self._pending is None:
            self._pending = request

    def _start_checkpoint(self) -> None:
        self._capturing = True
        self._phases = Phases()
        self.stats.epoch += 1
        if self._period is not None:
            self._period.cancel()
        if self.engine.mode is Mode.COOPERATIVE:
            self._hold_input()
            self._settle(self.stats.epoch, time.monotonic() + SETTLE_TIMEOUT_S, SETTLE_LOOKS)
        else:
            self._prepare()

    def _hold_input(self) -> None:
        if not self._held:
            self._held = True
            self.path.each(lambda vif: vif.hold_input())

    def _settle(self, epoch: int, deadline_s: float, looks: int) -> None:
        """Wait until the guest, without input, has nothing more to do.

        :param looks: how often it must still be seen idle.
        """
        if epoch != self.stats.epoch or not self._capture_wanted():
            return
        try:
            looks = looks - 1 if self.engine.guest.info().blocked else SETTLE_LOOKS
        except XenError:
            return  # it is gone, which the next look at the guest notices
        if looks and time.monotonic() < deadline_s:
            self.loop.call_later(SETTLE_LOOK_S, lambda: self._settle(epoch, deadline_s, looks))
        else:
            self._prepare()

    def _capture_wanted(self) -> bool:
        return self.machine.state in (PrimaryState.SYNCING, PrimaryState.CHECKPOINTING)

    def _prepare(self) -> None:
        """Have the backup stop the SVM, and tell what it has changed."""
        self._phases.end("settle")
        self.peer.send(MessageType.PREPARE, self.stats.epoch)
        try:
            self.engine.prepare()
        except RemusError as error:
            self._capture_failed(error)

    def _on_dirty(self, message: Message) -> None:
        if message.epoch != self.stats.epoch or not self._capture_wanted():
            return
        self._phases.end("dirty")
        dirty = bytes(message.data)
        self._hold_input()
        self.engine.drain_input()
        self._phases.end("drain")
        if self.engine.mode is Mode.TRANSPARENT:
            self._stop_and_capture(dirty)
            return
        # The guest's own suspend takes its time, in which its output must not wait for us.
        epoch = self.stats.epoch
        started_s = time.monotonic()
        self._guest_thread(
            "suspend",
            self.engine.stop,
            lambda _, error: self._on_stopped(epoch, dirty, started_s, error),
        )

    def _on_stopped(self, epoch: int, dirty: bytes, started_s: float, error: BaseException | None) -> None:
        if error is not None:
            self._capture_failed(error)
        elif epoch == self.stats.epoch and self._capture_wanted():
            self._capture(dirty, started_s)
        else:
            self.engine.go()  # the checkpoint was given up meanwhile

    def _stop_and_capture(self, dirty: bytes) -> None:
        started_s = time.monotonic()
        try:
            self.engine.stop()
        except RemusError as error:
            self._capture_failed(error)
            return
        self._capture(dirty, started_s)

    def _capture(self, dirty: bytes, started_s: float) -> None:
        """The PVM is stopped: copy it, cut its output, let it run on, and send the copy."""
        self._phases.end("stop")
        try:
            self.devices.postsuspend()
            every = self.config.verify_every
            snapshot = self.engine.collect(self.stats.epoch, dirty, verify=every > 0 and self.stats.epoch % every == 0)
            self.path.each(lambda vif: vif.cut())
            self._pending = None  # this checkpoint settles it; what is asked for from now on is about the next epoch
            self.devices.preresume()
            self.engine.go()
        except RemusError as error:
            self.engine.go()
            self._capture_failed(error)
            return
        pause_s = time.monotonic() - started_s
        self._phases.end("copy")
        self.path.each(lambda vif: vif.release_input())
        self.stats.reasons[self._reason.value] += 1
        self.stats.pause_s.append(pause_s)
        self.stats.pages = snapshot.count
        self.loop.thread(
            "send",
            lambda: transfer.send(self.peer.data, snapshot),
            functools.partial(self._on_sent, snapshot, pause_s),
        )

    def _on_sent(self, snapshot: Snapshot, pause_s: float, sent: int | None, error: BaseException | None) -> None:
        if error is not None:
            if not isinstance(error, RemusError):
                raise error
            log.warning("checkpoint %d was not sent: %s", snapshot.epoch, error)
            return  # the peer's loss is reported by its readers
        self._phases.end("send")
        self.stats.bytes_sent += sent or 0
        self._event(
            "checkpoint",
            epoch=snapshot.epoch,
            reason=self._reason.value,
            pause_ms=round(pause_s * 1000, 3),
            collect_ms=round(snapshot.collect_s * 1000, 3),
            pages=snapshot.count,
            zero_pages=len(snapshot.zero_gfns) // 8,
            bytes=sent,
            phases_ms=self._phases.ms(),
        )

    def _capture_failed(self, error: BaseException) -> None:
        if not isinstance(error, RemusError):
            raise error
        if not self._guest_alive():
            return
        log.error("checkpoint %d failed: %s", self.stats.epoch, error)
        self._event("checkpoint-failed", epoch=self.stats.epoch, text=str(error))
        # What the dirty log told is gone with the failed collection: without it the next checkpoint would
        # leave stale pages.
        self._fail(error)

    def _abandon_capture(self) -> None:
        self._capturing = False
        if self.engine.mode is Mode.TRANSPARENT:
            self.engine.go()
        if self._held:
            self._held = False
            self.path.each(lambda vif: vif.abort())

    def _release_committed(self) -> None:
        self.devices.commit()
        self.path.each(lambda vif: vif.commit())

    def _resume_comparing(self) -> None:
        self._held = False
        self._capturing = False
        self.path.each(lambda vif: vif.secondary_resumed())
        if self.stats.epoch == 1:
            self._event("protected", mode=self.engine.mode.value)
        if self.config.period_s > 0:
            self._period = self.loop.call_later(
                self.config.period_s, lambda: self._on_request(CheckpointRequest(Reason.PERIOD, ""))
            )
        if self._pending is not None:
            request, self._pending = self._pending, None
            self._on_request(request)

    # -- the guest -----------------------------------------------------------------------------------------

    def _guest_alive(self) -> bool:
        try:
            info = self.engine.guest.info()
        except XenError:
            info = None
        suspended = xenctrl.ShutdownReason.SUSPEND
        if info is not None and not info.dying and (not info.shutdown or info.shutdown_reason == suspended):
            return True
        if not self.machine.final:
            self._event("guest-gone")
            self._handle(E.PVM_GONE, reason="the guest shut down or was destroyed")
        return False

    def _check_guest(self) -> None:
        self.loop.call_later(GUEST_CHECK_S, self._check_guest)
        if self._guest_alive():
            self.path.each(lambda vif: vif.check_losses())
            if self._lan.conflict() and not self.machine.final and self.machine.state is not PrimaryState.CONNECTING:
                self._event("lan-conflict")
                self._handle(E.LAN_CONFLICT)

    def packet_counters(self) -> dict[str, int]:
        """The comparators' counters, all vifs together."""
        total: Counter[str] = Counter()
        for vif in self.path.vifs:
            total.update(vif.counters())
        return dict(total)

    # -- the end -------------------------------------------------------------------------------------------

    def _release_all(self) -> None:
        self.path.each(lambda vif: vif.release_all())

    def _warn_unprotected(self) -> None:
        self._event("unprotected")
        log.warning("%s runs UNPROTECTED: the backup is gone", self.config.name)
        self.loop.call(lambda: self._handle(E.STOP_REQUESTED, reason="nothing is left to do"))

    def _send_stop(self) -> None:
        self.peer.send(MessageType.STOP, reason="protection ends")
        self._stop_deadline = self.loop.call_later(
            STOP_TIMEOUT_S, lambda: self._lost(f"the backup host did not confirm the end within {STOP_TIMEOUT_S:g} s")
        )

    def _cut_lan(self) -> None:
        for vif in self.path.vifs:
            try:
                self.path.links.set_down(vif.vif.ifname)
            except RemusError as error:
                log.error("could not take %s off the LAN: %s", vif.vif.ifname, error)

    def _drop_held(self) -> None:
        self._held = False

    def _stop_pvm(self) -> None:
        log.error("the backup host has taken over %s: it is stopped here", self.config.name)
        self._event("fenced")
        try:
            self.engine.guest.pause()
            toolstack.destroy(self.engine.guest.domid)
        except RemusError as error:
            log.error("%s", error)

    def _clean_up(self) -> None:
        fenced = self.machine.state is PrimaryState.FENCED
        self._lan.close()
        self.peer.close()
        self.path.close(drop_held=fenced)
        # Its channel is closed, or the guest's suspend has its own time-out: it ends, and then the guest is resumed.
        if not self._guest_at_rest.wait(SUSPEND_TIMEOUT_S + STOP_TIMEOUT_S):
            log.error("%s was asked to suspend, did not, and may yet: look after it with 'xl list'", self.config.name)
        self.engine.close()
