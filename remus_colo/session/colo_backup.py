# SPDX-License-Identifier: LGPL-2.1-or-later
"""COLO on the backup host: the SVM, which runs beside the PVM, takes its checkpoints, and is the guest when
that dies.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable

from remus_colo.adapters import toolstack, userdata
from remus_colo.adapters.backend import Vif
from remus_colo.adapters.xenctrl import Clock, Guest, ShutdownReason
from remus_colo.adapters.xenstore import domain_named
from remus_colo.checkpoint import birth
from remus_colo.checkpoint.guestinfo import GuestLayout, Mode
from remus_colo.checkpoint.mode import MAX_BEHIND_NS
from remus_colo.checkpoint.svm import Received, SvmEngine
from remus_colo.checkpoint.transfer import Assembler
from remus_colo.errors import DomainError, MessageError, RemusError, XenError
from remus_colo.failover.arbiter import Verdict
from remus_colo.failover.backup import BackupEvent as E
from remus_colo.failover.backup import BackupState
from remus_colo.proxy.backup_path import BackupPath
from remus_colo.relocation.clock import secondary_offset
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.wire import Message
from remus_colo.session import inherited, leftovers
from remus_colo.session.backup import BackupConfig, BackupSession
from remus_colo.session.creation import Creation
from remus_colo.session.parts import EventSink
from remus_colo.session.peer import Peer
from remus_colo.session.steps import each
from remus_colo.session.svm_lan import SvmLan

log = logging.getLogger(__name__)

STREAM_PIECES = 64  # of the save stream, that wait for xl


class ColoBackupSession(BackupSession):
    """One SVM."""

    creation: Creation

    def __init__(
        self,
        config: BackupConfig,
        creation: Creation,
        make_peer: Callable[..., Peer],
        clock: Clock,
        event: EventSink,
    ) -> None:
        super().__init__(config, creation, make_peer, clock, event)
        self._claim = contextlib.ExitStack()  # to the names of its links
        self.path: BackupPath | None = None
        self.lan: SvmLan | None = None
        self.engine: SvmEngine | None = None
        self._restored = threading.Event()
        self._chunks: queue.Queue[bytes | None] = queue.Queue(maxsize=STREAM_PIECES)
        self._stream_over = threading.Event()  # what has come of it is of no use any more
        self._assembler: Assembler | None = None
        self._received: Received | None = None
        self._dirty = b""
        self._applied_s = 0.0

    # -- the SVM's birth -------------------------------------------------------------------------------------

    def _create_svm(self) -> None:
        creation = self.creation
        try:
            self._refuse_remains(birth.secondary_name(creation.config["c_info"]["name"]))
            self._claim.enter_context(leftovers.claim(creation.tag))
            self.path = BackupPath(self.loop, creation.tag, list(creation.tunnels))
            self.lan = SvmLan(creation, self.path, self.store, self.config.lan_bridge)
            self.lan.check()  # now, not when the primary is dead
            self.path.start(creation.tunnels, creation.mtus)
            for handle, connections in creation.connections.items():
                if handle in self.path.vifs:
                    self.path.vifs[handle].rewriter.inherit(time.monotonic(), connections)
        except RemusError as error:
            self.loop.call(functools.partial(self._svm_failed, error))  # not from within the transition
            return
        self._svm_thread("restore", self._restore, self._on_restored)

    def _on_stream(self, chunk: bytes) -> None:
        """In the reader's thread: hand a piece of the save stream to the restoring one; an empty piece ends it."""
        while not self._restored.is_set():
            try:
                self._chunks.put(chunk or None, timeout=0.5)
                return
            except queue.Full:
                continue  # xl is slower than the network: the primary waits

    def _end_stream(self) -> None:
        self._stream_over.set()
        with contextlib.suppress(queue.Full):  # then there is something to wake up by
            self._chunks.put_nowait(None)

    def _restore(self) -> None:
        """In a thread: have xl make the domain from the stream, and take hold of it."""
        name = birth.secondary_name(self.creation.config["c_info"]["name"])
        restorer = birth.Restorer(name)
        try:
            while (chunk := self._chunks.get()) is not None and not self._stream_over.is_set():
                restorer.feed(chunk)
            if self._stream_over.is_set():
                raise DomainError(
                    f"{'the primary was lost' if self._peer_lost else 'protection ended'} before the guest had arrived"
                )
            domid = restorer.finish(self.store)
        except BaseException:
            restorer.abort()
            if restorer.made:
                self.domid = domain_named(self.store, name)  # to be destroyed
            raise
        finally:
            self._restored.set()
        self.domid = domid
        assert self.path is not None
        guest = Guest(domid, writable=True)
        try:
            layout = GuestLayout.read(guest, self.store)
            self.engine = engine = SvmEngine(guest, self.store, layout, self.path.attach)
        except BaseException:
            guest.close()
            raise
        engine.mode = self.creation.mode
        if self.creation.clock_offset_ns is not None:
            engine.set_clock(self.creation.clock_offset_ns)
        engine.start()

    def _on_restored(self, _: None, error: BaseException | None) -> None:
        if error is not None:
            if isinstance(error, RemusError) and self.machine.state is not BackupState.CREATING:
                log.info("%s: %s", self.creation.name, error)  # it was given up
                return
            self._svm_failed(error)
            return
        if self.machine.state is not BackupState.CREATING:
            return  # it is being destroyed
        engine, path, lan = self.engine, self.path, self.lan
        assert engine is not None and path is not None and lan is not None
        vifs = engine.layout.vifs
        try:
            path.open_queues(vifs, {vif.handle: lan.mac_of(vif) for vif in vifs})
            for vif in vifs:
                path.attach(vif)
        except RemusError as failure:
            self._svm_failed(failure)
            return
        lan.vifs_are(vifs)
        self.handle(E.SVM_CREATED)

    def _send_created(self) -> None:
        self.peer.send(MessageType.CREATED, domid=self.domid or 0, ports={}, addresses={})

    # -- checkpoints -----------------------------------------------------------------------------------------

    def _on_checkpoint(self, message: Message) -> None:
        kind = message.type
        if kind is MessageType.CHECKPOINT_BEGIN:
            self._assembler = Assembler(message, self.creation.limit_pages)
            self.handle(E.CHECKPOINT_BEGIN)
        elif kind is MessageType.CHECKPOINT_STREAM:
            raise MessageError(f"the primary sent {kind.name}, which is Remus's")
        elif self._assembler is None:
            return  # of a checkpoint that was given up
        elif kind is MessageType.CHECKPOINT_END:
            self._received, self._assembler = self._assembler.finish(message), None
            self.handle(E.CHECKPOINT_COMPLETE)
        else:
            self._assembler.add(message)

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

    def _send_ack(self) -> None:
        assert self.path is not None
        self.path.each(lambda vif: vif.mute())
        super()._send_ack()

    def _apply_checkpoint(self) -> None:
        received, self._received = self._received, None
        engine = self.engine
        path = self.path
        assert received is not None and engine is not None and path is not None
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

        self._apply_thread(apply, self._on_applied)

    def _align_clock(self, engine: SvmEngine, stopped_ns: int) -> None:
        """In a thread, the SVM stopped: have its clock go on from the PVM's.

        :param stopped_ns: the guest's clock when the PVM was stopped.
        :raise DomainError: the SVM's clock would go back, and nothing can be done about it.
        """
        if self.creation.clock_offset_ns is not None:
            clocks = self.peer.clocks
            estimate = None if clocks is None else clocks.estimate()
            measured_ns = self.creation.clock_offset_ns if estimate is None else estimate.offset_ns
            now_ns = self.clock.now_ns()
            offset_ns = secondary_offset(measured_ns, stopped_ns, now_ns)
            engine.set_clock(offset_ns)
            self.event(
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
        if error is not None:
            self._svm_failed(error)
            return
        assert apply_s is not None
        self._applied_s = apply_s
        if self.creation.mode is Mode.TRANSPARENT:
            self._reset_rewriters()
        self.handle(E.APPLIED)

    def _reset_rewriters(self) -> None:
        """The SVM has the PVM's sequence numbers now."""
        assert self.path is not None
        self.path.each(lambda vif: vif.reset())

    def _send_resumed(self) -> None:
        assert self.engine is not None
        apply_ms = round(self._applied_s * 1000, 1)
        verified_pages, self.engine.verified_pages = self.engine.verified_pages, 0
        self.event("applied", epoch=self._epoch, apply_ms=apply_ms)
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

    # -- failover --------------------------------------------------------------------------------------------

    def _on_heartbeats(self, *, missing: bool) -> None:
        if self.lan is None:
            return
        if not missing:
            self.lan.no_outage()
        elif self.machine.replica:
            self.lan.expect_outage()

    def _look_at_lan(self, window_s: float) -> Verdict:
        assert self.lan is not None
        return self.lan.look(window_s)

    def _open_lan(self) -> None:
        assert self.engine is not None
        opened = [functools.partial(self._open_vif, vif) for vif in self.engine.layout.vifs]
        each([*opened, self._publish_connections])
        self.event("active", domid=self.domid)
        log.warning("%s: the primary is gone, domain %s is the guest now", self.creation.name, self.domid)
        self._svm_thread("become-guest", self._become_guest, self._on_became_guest)

    def _publish_connections(self) -> None:
        """Who protects the guest from here has to tell the next backup of them."""
        assert self.domid is not None and self.path is not None
        inherited.publish(
            self.domid, {handle: vif.rewriter.connections() for handle, vif in self.path.vifs.items()}
        )
        self.loop.call_later(inherited.PUBLISH_S, self._publish_connections)

    def _open_vif(self, vif: Vif) -> None:
        assert self.lan is not None
        self.event("made-good", vif=vif.handle, **self.lan.open(vif))

    def _become_guest(self) -> None:
        assert self.engine is not None and self.domid is not None and self.lan is not None
        self.engine.stop_logging()
        steps: list[Callable[[], object]] = [functools.partial(userdata.change, self.domid, self.lan.settle)]
        if not self.creation.same_host:
            steps.append(
                functools.partial(toolstack.rename, self.domid, self.creation.config["c_info"]["name"])
            )
        steps.append(self.lan.close_isolated)
        try:
            each(steps)
        except RemusError as error:
            log.warning("domain %s serves, but is not quite what it was: %s", self.domid, error)

    def _on_became_guest(self, _: object, error: BaseException | None) -> None:
        if error is not None:
            raise error

    def _announce_once(self) -> None:
        assert self.lan is not None
        self.lan.announce()

    # -- the end ---------------------------------------------------------------------------------------------

    def _svm_failure(self) -> RemusError | None:
        if self.engine is None:
            return None
        try:
            info = self.engine.guest.info()
            gone = info.dying or (info.shutdown and info.shutdown_reason != ShutdownReason.SUSPEND)
        except XenError:
            gone = True
        return DomainError("the SVM has ended by itself") if gone else None

    def _destroy(self) -> None:
        # A restore or a load ends by itself; then the domain can be destroyed.
        self._svm_at_rest.wait(birth.RESTORE_TIMEOUT_S)
        self._close_engine()
        if self.domid is not None:
            toolstack.destroy(self.domid)

    def _end_steps(self) -> list[Callable[[], object]]:
        # What is being done to the domain is done to the end, above all its becoming the guest.
        at_rest = functools.partial(self._svm_at_rest.wait, toolstack.XL_TIMEOUT_S)
        steps: list[Callable[[], object]] = [at_rest, self.peer.close]
        if self.domid is not None:
            steps.append(functools.partial(inherited.remove, self.domid))
        if self.path is not None:
            steps.append(self.path.close)
        return [*steps, self._claim.close, self._close_engine]

    def _close_engine(self) -> None:
        """Not under the hands of a thread that is stuck in it: it would write to memory that is not mapped any more."""
        if self.engine is not None and self._svm_at_rest.is_set():
            self.engine.close()
