# SPDX-License-Identifier: LGPL-2.1-or-later
"""The backup's session: one SVM, from CREATE until it is destroyed or has become the guest.

The loop's thread owns state and packets.  Beside it run: ``xl restore``, loading a checkpoint into the SVM,
and the arbiter.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import logging
import queue
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from remus_colo.adapters import toolstack, xenctrl
from remus_colo.adapters.backend import Vif
from remus_colo.adapters.rawlink import RawLink
from remus_colo.adapters.xenstore import Store
from remus_colo.checkpoint import birth
from remus_colo.checkpoint.guestinfo import GuestLayout, Mode
from remus_colo.checkpoint.mode import MAX_BEHIND_NS
from remus_colo.checkpoint.svm import Received, SvmEngine
from remus_colo.checkpoint.transfer import Assembler
from remus_colo.errors import ConfigError, DomainError, ExitStatus, MessageError, RemusError, XenError
from remus_colo.failover.arbiter import LanProbe, Verdict
from remus_colo.failover.backup import BackupAction as A
from remus_colo.failover.backup import BackupEvent as E
from remus_colo.failover.backup import BackupMachine, BackupState, UnknownPolicy
from remus_colo.options import check_word
from remus_colo.proxy import announce
from remus_colo.proxy.backup_path import BackupPath
from remus_colo.proxy.primary_path import Tunnel
from remus_colo.relocation.clock import secondary_offset
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.wire import Message
from remus_colo.session.fence import run_hook
from remus_colo.session.lan import ipv4_of, mac_bytes, probe_guest, uplinks
from remus_colo.session.loop import Loop
from remus_colo.session.peer import PROBE_WINDOW, HeartbeatConfig, Peer

log = logging.getLogger(__name__)

GUEST_CHECK_S = 1.0
SUSPECT_AFTER = 0.5  # of the heartbeat time-out
ANNOUNCE_REPEATS = 3
ANNOUNCE_INTERVAL_S = 0.5


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


# Six hexadecimal digits, which become part of links' names.
_TAG = re.compile(r"[0-9a-f]{6}")
SPECIAL_PAGES = 16384


def _address(text: str | None) -> str | None:
    """:raise ValueError: it is no address, or TypeError: it is nothing like one."""
    return None if text is None else str(ipaddress.ip_address(str(text)))


@dataclass(frozen=True, slots=True)
class Creation:
    """A CREATE message, checked."""

    name: str
    mode: Mode
    config: dict[str, Any]
    tag: str
    same_host: bool
    tunnels: dict[int, Tunnel]
    mtus: dict[int, int]
    heartbeat: HeartbeatConfig
    clock_offset_ns: int | None = None  # the SVM gets the PVM's clock, by this at first

    @classmethod
    def parse(cls, message: Message) -> Creation:
        """:raise MessageError: a part is missing or malformed."""
        fields = message.fields
        try:
            tunnel = fields["tunnel"]
            vifs = tunnel["vifs"]
            config = dict(fields["config"])
            name = config["c_info"]["name"]
            if not isinstance(name, str):
                raise TypeError(f"the domain's name is {name!r}")
            check_word("the domain", name)
            if not _TAG.fullmatch(tunnel["tag"]):
                raise ValueError(f"{tunnel['tag']!r} is no tag")
            return cls(
                name=str(fields["name"]),
                mode=Mode(fields["mode"]),
                config=config,
                tag=tunnel["tag"],
                same_host=bool(tunnel["same_host"]),
                tunnels={
                    int(vif["handle"]): Tunnel(
                        int(vif["vni"]), int(vif["port"]), _address(vif["local"]), _address(vif["remote"])
                    )
                    for vif in vifs
                },
                mtus={int(vif["handle"]): int(vif["mtu"]) for vif in vifs},
                heartbeat=HeartbeatConfig.parse(fields["heartbeat"]),
                clock_offset_ns=None if fields.get("clock_offset_ns") is None else int(fields["clock_offset_ns"]),
            )
        except (ConfigError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise MessageError(f"CREATE lacks a part or has a malformed one: {error!r}") from error

    @property
    def limit_pages(self) -> int | None:
        """More pages than these are no checkpoint of that guest: twice its memory, for what Xen adds to it."""
        try:
            return int(self.config["b_info"]["max_memkb"]) // 2 + SPECIAL_PAGES
        except (KeyError, OverflowError, TypeError, ValueError):
            return None


@dataclass(slots=True)
class EarlyVerdict:
    """A look at the LAN that began while the primary was only late."""

    verdict: Verdict | None = None
    waiting: Callable[[Verdict | None, BaseException | None], None] | None = None


EventSink = Callable[..., None]


class BackupSession:
    """One SVM.

    :param clock: this host's Xen system time.
    :param event: called with a name and fields at everything that a user may want to know.
    """

    QUIET = False  # say nothing of the states that each checkpoint goes through

    def __init__(
        self,
        config: BackupConfig,
        creation: Creation,
        make_peer: Callable[..., Peer],
        clock: xenctrl.Clock,
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
        )
        self.clock = clock
        self.path: BackupPath | None = None
        self.engine: SvmEngine | None = None
        self.domid: int | None = None
        self._event = event
        self._restored = threading.Event()
        self._chunks: queue.Queue[bytes | None] = queue.Queue(maxsize=64)
        self._assembler: Assembler | None = None
        self._received: Received | None = None
        self._epoch = 0
        self._applied_s = 0.0
        self._peer_lost = False
        self._busy = False  # a thread is at work on the SVM
        self._failure = ""
        self._early: EarlyVerdict | None = None
        self._actions: dict[A, Callable[[], None]] = {
            A.CREATE_SVM: self._create_svm,
            A.SEND_CREATED: self._send_created,
            A.SEND_REFUSE: self._send_refuse,
            A.PAUSE_SVM: self._pause_svm,
            A.SEND_DIRTY: self._send_dirty,
            A.START_BUFFER: lambda: None,
            A.DISCARD_BUFFER: self._discard_buffer,
            A.SEND_ACK: lambda: self.peer.send(MessageType.ACK, self._epoch),
            A.APPLY_CHECKPOINT: self._apply_checkpoint,
            A.RESUME_SVM: self._resume_svm,
            A.SEND_RESUMED: self._send_resumed,
            A.SEND_ABORT: lambda: self.peer.send(MessageType.ABORT, self._epoch, reason=self._failure or "the SVM failed"),
            A.ASK_ARBITER: self._ask_arbiter,
            A.SEND_TAKEOVER: lambda: self.peer.send(MessageType.TAKEOVER),
            A.OPEN_LAN: self._open_lan,
            A.ANNOUNCE: functools.partial(self._announce, ANNOUNCE_REPEATS),
            A.DESTROY_SVM: self._destroy_svm,
            A.SEND_BYE: lambda: self.peer.send(MessageType.BYE),
            A.LEAVE_SVM: self.loop.stop,
            A.CLEAN_UP: self.loop.stop,
        }

    # -- running -----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the session ends; the host is clean then, but for an SVM that became the guest."""
        self.loop.call(lambda: self._handle(E.CREATE))
        self.loop.call_later(self.creation.heartbeat.interval_s, self._check_peer)
        self.loop.call_later(GUEST_CHECK_S, self._check_guest)
        self.peer.start()
        try:
            self.loop.run()
        finally:
            self._clean_up()

    def shut_down(self) -> None:
        """remusd ends; from any thread."""
        self.loop.call(lambda: self._handle(E.SHUTDOWN))

    def _handle(self, event: E, reason: str = "") -> None:
        step = self.machine.handle(event, epoch=self._epoch, reason=reason)
        if step.moved and not (self.QUIET and self.machine.routine(step)):
            self._event("state", old=step.old.value, new=step.new.value, cause=event.value, reason=reason)
        for action in step.actions:
            self._actions[action]()

    def _svm_failed(self, error: BaseException) -> None:
        if not isinstance(error, RemusError):
            raise error
        log.error("%s: %s", self.creation.name, error)
        self._failure = str(error)
        self._event("error", text=str(error))
        self._handle(E.SVM_FAILED, reason=str(error))

    # -- the primary -----------------------------------------------------------------------------------------

    def _on_message(self, message: Message) -> None:
        kind = message.type
        if self._peer_lost:
            self._handle(E.PRIMARY_HEARD)
            return
        try:
            if kind is MessageType.PREPARE:
                self._epoch = message.epoch
                self._handle(E.PREPARE)
            elif kind is MessageType.CHECKPOINT_BEGIN:
                self._assembler = Assembler(message, self.creation.limit_pages)
                self._handle(E.CHECKPOINT_BEGIN)
            elif kind in (MessageType.PAGES, MessageType.STATE):
                if self._assembler is not None:  # else of a checkpoint that was given up
                    self._assembler.add(message)
            elif kind is MessageType.CHECKPOINT_END:
                if self._assembler is not None:
                    self._received, self._assembler = self._assembler.finish(message), None
                    self._handle(E.CHECKPOINT_COMPLETE)
            elif kind is MessageType.ABORT:
                self._handle(E.ABORT, reason=str(message.fields["reason"]))
            elif kind in (MessageType.STOP, MessageType.REFUSE):
                self._handle(E.STOP, reason=str(message.fields["reason"]))
            elif kind is MessageType.BYE:
                self._handle(E.PRIMARY_LEFT)
            else:
                raise MessageError(f"the primary sent {kind.name}, which only a backup sends")
        except MessageError as error:
            log.error("%s: %s", self.creation.name, error)
            self._lost(str(error))

    def _on_stream(self, chunk: bytes) -> None:
        """In the reader's thread: hand a piece of the save stream to the restoring one; an empty piece ends it."""
        while not self._restored.is_set():
            try:
                self._chunks.put(chunk or None, timeout=0.5)
                return
            except queue.Full:
                continue  # xl is slower than the network: the primary waits

    def _on_lost(self, error: RemusError) -> None:
        log.warning("%s: %s", self.creation.name, error)
        self._lost(str(error))

    def _lost(self, reason: str) -> None:
        if not self._peer_lost:
            self._peer_lost = True
            self._event("primary-lost", reason=reason, silence_ms=round(self.peer.silence_s() * 1000))
            self._end_stream()
            self._handle(E.PRIMARY_LOST, reason=reason)

    def _check_peer(self) -> None:
        self.loop.call_later(self.creation.heartbeat.interval_s, self._check_peer)
        if self._peer_lost or self.machine.final:
            return
        if self.peer.silence_s() > self.creation.heartbeat.timeout_s * SUSPECT_AFTER:
            self._suspect()
        else:
            if self._early is not None and self._early.verdict is not None:
                self._early = None  # it was late, not lost; the next silence is looked at anew
            if self.path is not None:
                self.path.each(lambda vif: vif.no_outage())
        if self.peer.expired():
            self.loop.call(self._check_expired)  # what lies unread comes first

    def _check_expired(self) -> None:
        if not self._peer_lost and self.peer.expired():
            self._lost(f"no sign of life from the primary for {self.peer.silence_s():.2f} s")

    # -- the SVM's birth -----------------------------------------------------------------------------------

    def _create_svm(self) -> None:
        creation = self.creation
        try:
            self.path = BackupPath(self.loop, creation.tag, list(creation.tunnels))
            self.path.start(creation.tunnels, creation.mtus)
        except RemusError as error:
            self._svm_failed(error)
            return
        self._busy = True
        self.loop.thread("restore", self._restore, self._on_restored)

    def _end_stream(self) -> None:
        """No more will come: whoever waits for it is to notice."""
        with contextlib.suppress(queue.Full):
            self._chunks.put_nowait(None)

    def _restore(self) -> SvmEngine:
        """In a thread: have xl make the domain from the stream, and take hold of it."""
        name = birth.secondary_name(self.creation.config["c_info"]["name"])
        restorer = birth.Restorer(name)
        try:
            while (chunk := self._chunks.get()) is not None and not self._peer_lost:
                restorer.feed(chunk)
            if self._peer_lost:
                raise DomainError("the primary was lost before the guest had arrived")
            domid = restorer.finish(self.store)
        except BaseException:
            restorer.abort()
            raise
        finally:
            self._restored.set()
        self.domid = domid
        guest = xenctrl.Guest(domid, writable=True)
        layout = GuestLayout.read(guest, self.store)
        assert self.path is not None
        engine = SvmEngine(guest, self.store, layout, self.path.attach)
        engine.mode = self.creation.mode
        if self.creation.clock_offset_ns is not None:
            engine.set_clock(self.creation.clock_offset_ns)
        engine.start()
        return engine

    def _on_restored(self, engine: SvmEngine | None, error: BaseException | None) -> None:
        self._busy = False
        if error is not None:
            self._svm_failed(error)
            return
        assert engine is not None and self.path is not None
        self.engine = engine
        try:
            self.path.open_queues(engine.layout.vifs, {vif.handle: self._mac(vif) for vif in engine.layout.vifs})
            if self.machine.state is BackupState.CREATING:
                for vif in engine.layout.vifs:
                    self.path.attach(vif)
        except RemusError as failure:
            self._svm_failed(failure)
            return
        self._handle(E.SVM_CREATED)

    def _send_created(self) -> None:
        self.peer.send(MessageType.CREATED, domid=self.domid or 0, ports={}, addresses={})

    def _send_refuse(self) -> None:
        self.peer.send(
            MessageType.REFUSE, reason=self._failure or "the SVM could not be made", exit_status=int(ExitStatus.PEER_REFUSED)
        )

    # -- checkpoints ---------------------------------------------------------------------------------------

    def _pause_svm(self) -> None:
        assert self.engine is not None
        try:
            self._dirty = self.engine.prepare()
        except RemusError as error:
            # Not from within the transition that ordered it.
            self.loop.call(functools.partial(self._svm_failed, error))
            self._dirty = b""

    def _send_dirty(self) -> None:
        try:
            self.peer.control.send_bulk(MessageType.DIRTY, self._epoch, [self._dirty])
        except RemusError as error:
            log.info("%s", error)  # its readers report the loss

    def _discard_buffer(self) -> None:
        self._assembler = None
        self._received = None

    def _apply_checkpoint(self) -> None:
        received, self._received = self._received, None
        engine = self.engine
        path = self.path
        assert received is not None and engine is not None and path is not None
        self._busy = True
        started_s = time.monotonic()

        def apply() -> float:
            engine.apply(received)
            if engine.mode is Mode.COOPERATIVE:
                # The guest connects its devices by itself, and only then can it take the input that the primary
                # holds back for it: the SVM counts as resumed when it has.
                self.loop.call(self._reset_rewriters)
                engine.resume()
                engine.await_devices()
            path.each(lambda vif: vif.await_forwarding())
            if engine.mode is Mode.TRANSPARENT:
                self._align_clock(engine, received.xen_time_ns)
            return time.monotonic() - started_s

        self.loop.thread("apply", apply, self._on_applied)

    def _align_clock(self, engine: SvmEngine, stopped_ns: int) -> None:
        """In a thread, the SVM stopped: have its clock go on from the PVM's.

        :param stopped_ns: the guest's clock when the PVM was stopped.
        :raise DomainError: the SVM's clock would go back, and nothing can be done about it.
        """
        if self.creation.clock_offset_ns is not None:
            estimate = self.peer.clocks and self.peer.clocks.estimate()
            measured_ns = self.creation.clock_offset_ns if estimate is None else estimate.offset_ns
            now_ns = self.clock.now_ns()
            offset_ns = secondary_offset(measured_ns, stopped_ns, now_ns)
            engine.set_clock(offset_ns)
            self._event(
                "clock",
                epoch=self._epoch,
                offset_ms=round(offset_ns / 1e6, 3),
                error_ms=None if estimate is None else round(estimate.error_ns / 1e6, 3),
                stopped_ms=round((now_ns + offset_ns - stopped_ns) / 1e6, 3),
            )
            return
        behind_ns = stopped_ns - self.clock.now_ns()
        if behind_ns > MAX_BEHIND_NS:
            raise DomainError(
                f"this host's Xen clock is {behind_ns / 1e9:.3f} s behind the guest's: "
                "protect the guest anew, with --checkpoint auto or cooperative"
            )
        if behind_ns > 0:
            time.sleep(behind_ns / 1e9)  # until the guest's clock does not go back

    def _on_applied(self, apply_s: float | None, error: BaseException | None) -> None:
        self._busy = False
        if error is not None:
            self._svm_failed(error)
            return
        assert apply_s is not None
        self._applied_s = apply_s
        if self.creation.mode is Mode.TRANSPARENT:
            self._reset_rewriters()
        self._handle(E.APPLIED)

    def _reset_rewriters(self) -> None:
        """The SVM has the PVM's sequence numbers now."""
        assert self.path is not None
        self.path.each(lambda vif: vif.reset())

    def _send_resumed(self) -> None:
        assert self.engine is not None
        apply_ms = round(self._applied_s * 1000, 1)
        verified_pages, self.engine.verified_pages = self.engine.verified_pages, 0
        self._event("applied", epoch=self._epoch, apply_ms=apply_ms)
        self.peer.send(MessageType.RESUMED, self._epoch, apply_ms=apply_ms, verified_pages=verified_pages)

    def _resume_svm(self) -> None:
        engine = self.engine
        assert engine is not None
        try:
            if engine.loaded:
                engine.resume()
            else:
                engine.go_on()
        except RemusError as error:
            self.loop.call(functools.partial(self._svm_failed, error))

    # -- failover ------------------------------------------------------------------------------------------

    def _suspect(self) -> None:
        """The primary is late: look at the LAN already, so that the answer is there when the time-out is.

        Only a look: a fencing hook, which may switch a host off, is run when the primary counts as lost.
        """
        if self.machine.replica:
            self._expect_outage()
        if self.config.fence or self._early is not None or not self.machine.replica:
            return
        self._early = early = EarlyVerdict()

        def looked(verdict: Verdict | None, error: BaseException | None) -> None:
            early.verdict = verdict if error is None else Verdict.UNKNOWN
            if early.waiting is not None:
                early.waiting(early.verdict, None)

        self.loop.thread("look", self._judge, looked)

    def _expect_outage(self) -> None:
        assert self.path is not None and self.engine is not None
        for vif in self.engine.layout.vifs:
            self.path.vifs[vif.handle].expect_outage(uplinks(self._lan_bridge(vif.handle)))

    def _ask_arbiter(self) -> None:
        started_s = time.monotonic()

        def decided(verdict: Verdict | None, error: BaseException | None) -> None:
            if error is not None:
                if not isinstance(error, RemusError):
                    raise error
                log.error("the arbiter failed: %s", error)
                verdict = Verdict.UNKNOWN
            assert verdict is not None
            self._event("verdict", verdict=verdict.value, took_ms=round((time.monotonic() - started_s) * 1000))
            events = {Verdict.DEAD: E.PRIMARY_DEAD, Verdict.ALIVE: E.PRIMARY_ALIVE, Verdict.UNKNOWN: E.PRIMARY_UNKNOWN}
            self._handle(events[verdict])

        early, self._early = self._early, None
        if early is None:
            self.loop.thread("arbiter", self._judge, decided)
        elif early.verdict is None:
            early.waiting = decided
        else:
            decided(early.verdict, None)

    def _judge(self) -> Verdict:
        """In a thread: the fencing hook if there is one, else whether the guest still answers on the LAN."""
        if self.config.fence:
            return run_hook(self.config.fence, self.creation.name, self.peer.control.peer)
        assert self.path is not None and self.engine is not None
        if not self.engine.layout.vifs:
            return Verdict.UNKNOWN
        verdicts = []
        window_s = self.creation.heartbeat.timeout_s * PROBE_WINDOW
        for vif in self.engine.layout.vifs:
            path = self.path.vifs[vif.handle]
            bridge = self._lan_bridge(vif.handle)
            guest_mac = self._mac(vif)
            own_mac = mac_bytes(self.path.links.mac(bridge))
            verdicts.append(
                probe_guest(
                    bridge,
                    own_mac,
                    guest_mac,
                    ipv4_of(path.guest_addresses),
                    ipv4_of(path.client_addresses),
                    LanProbe(window_s, window_s / 2),
                )
            )
        for verdict in (Verdict.ALIVE, Verdict.UNKNOWN):
            if verdict in verdicts:
                return verdict
        return Verdict.DEAD

    def _mac(self, vif: Vif) -> bytes:
        """:raise DomainError: the vif has none."""
        mac = self.store.read(f"{vif.backend}/mac")
        if mac is None:
            raise DomainError(f"{vif.ifname} has no MAC address in xenstore")
        return mac_bytes(mac)

    def _lan_bridge(self, handle: int) -> str:
        """Where a vif belongs once the SVM is the guest: the bridge of the primary's configuration."""
        assert self.path is not None
        handles = sorted(self.creation.tunnels)
        nics = self.creation.config.get("nics", [])
        index = handles.index(handle)
        named = nics[index].get("bridge") if index < len(nics) else None
        for bridge in (named, self.config.lan_bridge):
            if bridge and self.path.links.exists(bridge):
                return str(bridge)
        raise DomainError(f"there is no bridge {named or self.config.lan_bridge!r} on this host: name one by --bridge")

    def _open_lan(self) -> None:
        assert self.path is not None and self.engine is not None
        for vif in self.engine.layout.vifs:
            path = self.path.vifs[vif.handle]
            path.rewriter.stop_learning()
            lan_bridge = self._lan_bridge(vif.handle)
            path.open_lan(lan_bridge)
            self._event("made-good", vif=vif.handle, **path.make_good(lan_bridge))
            self.store.write(f"{vif.backend}/bridge", lan_bridge)
        self._event("active", domid=self.domid)
        log.warning("%s: the primary is gone, domain %s is the guest now", self.creation.name, self.domid)
        self.loop.thread("rename", self._become_guest, self._on_renamed)

    def _become_guest(self) -> None:
        assert self.engine is not None and self.domid is not None
        self.engine.stop_logging()
        name = self.creation.config["c_info"]["name"]
        if not self.creation.same_host:
            toolstack.rename(self.domid, name)

    def _on_renamed(self, _: object, error: BaseException | None) -> None:
        if error is not None:
            if not isinstance(error, RemusError):
                raise error
            log.warning("domain %s keeps its name: %s", self.domid, error)

    def _announce(self, repeats: int) -> None:
        assert self.path is not None and self.engine is not None
        for vif in self.engine.layout.vifs:
            path = self.path.vifs[vif.handle]
            try:
                with RawLink(self._lan_bridge(vif.handle)) as raw:
                    for frame in announce.announcements(self._mac(vif), path.guest_addresses.addresses):
                        raw.send(frame)
            except RemusError as error:
                log.error("could not announce the guest: %s", error)
        if repeats > 1 and not self.machine.final:
            # A switch or a host may have missed the first.
            self.loop.call_later(ANNOUNCE_INTERVAL_S, lambda: self._announce(repeats - 1))

    # -- the end -------------------------------------------------------------------------------------------

    def _check_guest(self) -> None:
        self.loop.call_later(GUEST_CHECK_S, self._check_guest)
        engine = self.engine
        if engine is None or self._busy or self.machine.final or self.machine.state is BackupState.STANDING_DOWN:
            return
        try:
            info = engine.guest.info()
            gone = info.dying or (info.shutdown and info.shutdown_reason != xenctrl.ShutdownReason.SUSPEND)
        except XenError:
            gone = True
        if gone:
            self._svm_failed(DomainError("the SVM has ended by itself"))

    def _destroy_svm(self) -> None:
        def destroy() -> None:
            deadline_s = time.monotonic() + birth.RESTORE_TIMEOUT_S
            while self._busy and time.monotonic() < deadline_s:
                time.sleep(0.05)  # a restore or a load ends by itself; then the domain can be destroyed
            if self.engine is not None:
                self.engine.close()
            if self.domid is not None:
                toolstack.destroy(self.domid)

        def done(_: object, error: BaseException | None) -> None:
            if error is not None:
                log.error("the SVM was not destroyed: %s", error)
            self._handle(E.SVM_DESTROYED)

        self._end_stream()
        self.loop.thread("destroy", destroy, done)

    def _clean_up(self) -> None:
        self.peer.close()
        if self.path is not None:
            self.path.close()
        if self.engine is not None:
            self.engine.close()
        self.store.close()
        self.loop.close()
        self._event("ended")
