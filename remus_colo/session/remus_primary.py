# SPDX-License-Identifier: LGPL-2.1-or-later
"""The primary's session in Remus mode: the same peer, state machine and end as COLO's, other checkpoints.

Two threads: the loop's, which has the state machine and the network, and the checkpoints', which is in
libxenguest for most of the time.  The latter asks the former before each checkpoint, and waits for its
acknowledgement there.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import functools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from remus_colo.adapters import backend, toolstack
from remus_colo.adapters.backend import Vif
from remus_colo.adapters.devicemodel import DeviceModel, DeviceState
from remus_colo.adapters.netlink import Links
from remus_colo.adapters.xenctrl import Guest
from remus_colo.adapters.xenstore import Store
from remus_colo.checkpoint.periodic import Ended, RoundTimes
from remus_colo.checkpoint.suspend import Suspender
from remus_colo.devices.device import DeviceSet
from remus_colo.devices.netbuffer import held_and_sent
from remus_colo.errors import PeerLost, RemusError, XenError
from remus_colo.failover.primary import PrimaryEvent as E
from remus_colo.failover.primary import PrimaryState
from remus_colo.relocation.schema import MessageType
from remus_colo.session.loop import Loop
from remus_colo.session.peer import HeartbeatConfig, Peer
from remus_colo.session.primary import PrimarySession
from remus_colo.session.remus_sender import MODE, CheckpointSender
from remus_colo.session.remus_worker import REASON, CheckpointWorker, checkpoint_fields

log = logging.getLogger(__name__)

# In CREATING and SYNCING nothing is asked of the loop that it would not grant soon; else it is the interval that waits.
GRANT_LOOK_S = 0.5
# In all others none is to be begun.
CHECKPOINTS_GO_ON = frozenset(
    {
        PrimaryState.CONNECTING,
        PrimaryState.CREATING,
        PrimaryState.SYNCING,
        PrimaryState.PROTECTED,
        PrimaryState.CHECKPOINTING,
        PrimaryState.COMMITTED,
    }
)


@dataclass(frozen=True, slots=True)
class RemusConfig:
    """What a protection runs with."""

    name: str
    heartbeat: HeartbeatConfig
    interval_s: float
    timer: bool
    compression: bool
    same_host: bool
    destination: str
    fence: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    vifs: tuple[Vif, ...]


class RemusMode(enum.StrEnum):
    """How the status calls it, where COLO has its checkpoint modes."""

    REMUS = MODE


class RemusEngine:
    """The guest as the session's common part sees it: alive or not, and with which vifs.

    It is opened twice, since a handle of libxenctrl's is for one thread.
    """

    mode = RemusMode.REMUS
    clock = None  # a guest that resumes itself takes its host's

    def __init__(self, domid: int, store: Store, *, device_model: bool = False) -> None:
        self._stack = contextlib.ExitStack()
        try:
            self.guest = self._stack.enter_context(Guest(domid, writable=False))
            stopped = self._stack.enter_context(Guest(domid, writable=False))
            self.suspender = self._stack.enter_context(Suspender(stopped, store, device_model=device_model))
            self.layout = Layout(tuple(backend.vifs(store, domid)))
            self.device_model = DeviceModel(domid, store) if device_model else None
            self.dirty_log = _has_dirty_log(self.guest)
        except BaseException:
            self._stack.close()
            raise

    def close(self) -> None:
        """The guest runs on."""
        self._stack.close()


def _has_dirty_log(guest: Guest) -> bool:
    """Whether Xen tells what the guest writes: not of a PV guest, if Xen was built without shadow page tables."""
    if guest.info().hvm:
        return True
    try:
        guest.enable_dirty_log()
    except XenError as error:
        if error.errno == errno.EOPNOTSUPP:
            return False
        raise
    guest.disable_dirty_log()
    return True


@dataclass(frozen=True, slots=True)
class VifEnd:
    vif: Vif


class DevicesPath:
    """The guest's vifs as the session's common part sees them; their output is the devices'."""

    def __init__(self, vifs: tuple[Vif, ...]) -> None:
        self.links = Links()
        self.vifs = [VifEnd(vif) for vif in vifs]

    def close(self) -> None:
        self.links.close()


class SendingWorker(CheckpointWorker):
    """Checkpoints that go to the backup, each when the session's loop grants it, committed when that says so."""

    def __init__(
        self, session: RemusSession, sender: CheckpointSender, suspender: Suspender, **options: Any
    ) -> None:
        super().__init__(suspender, session.devices, **options)
        self.sender = sender
        self._session = session
        self._begun_first = False
        self._progress = threading.Condition()
        self._acked_epoch = 0
        self._resumed_epoch = 0

    def standstill(self, since_s: float | None) -> None:
        if since_s is None:
            self._session.peer.guest_answers()
        elif self.stats.checkpoints:  # else there is no replica yet that could be taken for the guest
            self._session.peer.guest_silent(since_s)

    def live(self, chunk: bytes) -> None:
        if not self._begun_first:
            self._begun_first = True
            self.sender.begin_first()
        self.sender.live(chunk)

    def deliver(self, number: int, staged: memoryview) -> None:
        state = self.loop.device_state if self.loop is not None else DeviceState()
        if number == 1:
            self.sender.finish_first(state)
        else:
            self.sender.send(number, staged, state)

    def committed(self) -> bool:
        """Wait for the backup's acknowledgement, with which the loop releases output, and for the interval."""
        number = self.stats.checkpoints
        if not self._reached(lambda: self._acked_epoch, number) or not self.go_on():
            return False
        return self._reached(lambda: self._resumed_epoch, number) and self._session.grant_next(self.ending)

    def go_on(self) -> bool:
        """After each checkpoint: whether there is to be another, and not before its time."""
        return super().committed()

    def _reached(self, epoch: Callable[[], int], number: int) -> bool:
        """Wait until the backup has come so far; False if it will not."""
        with self._progress:
            while epoch() < number and not self.ending.is_set():
                self._progress.wait(GRANT_LOOK_S)
            return epoch() >= number

    def commit(self) -> None:
        pass

    def acknowledged(self, epoch: int) -> None:
        """In the loop's thread: the backup has the checkpoint."""
        with self._progress:
            self._acked_epoch = epoch
            self._progress.notify_all()

    def resumed(self, epoch: int) -> None:
        """In the loop's thread: the backup has taken the checkpoint, and the next may come."""
        with self._progress:
            self._resumed_epoch = epoch
            self._progress.notify_all()

    def end(self) -> None:
        """From any thread: no more checkpoints."""
        super().end()
        with self._progress:
            self._progress.notify_all()


class RemusSession(PrimarySession):
    """One protection by Remus, from CREATE to its end.

    :param devices: set up already; taken down by the session.
    :param probe: see :class:`CheckpointWorker`.
    """

    QUIET = True  # several a second
    config: RemusConfig
    engine: RemusEngine
    path: DevicesPath

    def __init__(
        self,
        loop: Loop,
        config: RemusConfig,
        engine: RemusEngine,
        store: Store,
        make_peer: Callable[..., Peer],
        event: Callable[..., None],
        devices: DeviceSet,
        probe: Callable[[str], None] = lambda point: None,
    ) -> None:
        self._granted = threading.Event()
        self._told_pause_s = 0.0
        self._domain_config = toolstack.domain_config(engine.guest.domid)
        super().__init__(loop, config, engine, store, make_peer, event, devices)
        sender = CheckpointSender(self.peer.data, compress=config.compression, describe=self._describe)
        self.worker = self._make_worker(
            self,
            sender,
            engine.suspender,
            interval_s=config.interval_s,
            timer=config.timer,
            dirty_log=engine.dirty_log,
            device_model=engine.device_model,
            on_checkpoint=self._on_checkpoint,
            probe=probe,
        )

    def _make_worker(self, *args: Any, **options: Any) -> SendingWorker:
        return SendingWorker(*args, **options)

    def _start_worker(self) -> None:
        self.guest_thread("checkpoints", self.worker.run, self._on_worker_ended)

    def _make_path(self) -> DevicesPath:
        return DevicesPath(self.engine.layout.vifs)

    def _describe(self) -> dict[str, Any]:
        """In the checkpoints' thread."""
        known = {str(handle): seen for handle, seen in self._lan.known().items()}
        self._told_pause_s = self.worker.stats.longest_pause_s
        self.peer.pause_told(self._told_pause_s, certain=False)
        return {
            "longest_pause_s": self._told_pause_s,
            "addresses": {handle: list(seen.addresses) for handle, seen in known.items()},
            "neighbours": {handle: list(seen.neighbours) for handle, seen in known.items()},
        }

    # -- checkpoints ---------------------------------------------------------------------------------------

    def _create_svm(self) -> None:
        self.peer.send(
            MessageType.CREATE,
            name=self.config.name,
            mode=MODE,
            config=self._domain_config,
            tunnel={"same_host": self.config.same_host, "vifs": [vif.vif.handle for vif in self.path.vifs]},
            heartbeat={
                "interval_s": self.config.heartbeat.interval_s,
                "timeout_s": self.config.heartbeat.timeout_s,
            },
        )
        self.event("creating", mode=MODE)

    def _maybe_begin(self) -> None:
        if self._created and self.machine.state is PrimaryState.CREATING:
            self._lan.start()
            self.handle(E.SVM_CREATED)

    def _start_checkpoint(self) -> None:
        self.stats.epoch += 1
        if self.stats.epoch == 1:
            self._start_worker()
        self._granted.set()

    def grant_next(self, ending: threading.Event) -> bool:
        """In the checkpoints' thread: ask for the next one; False if there is to be none."""
        self._granted.clear()
        self.loop.call(self._due)
        while not self._granted.wait(GRANT_LOOK_S):
            if ending.is_set():
                return False
        return not ending.is_set()

    def _due(self) -> None:
        if self.machine.state is PrimaryState.PROTECTED:
            self.handle(E.CHECKPOINT_DUE, reason=REASON)

    def _on_checkpoint(self, times: RoundTimes) -> None:
        """In the checkpoints' thread."""
        self.stats.reasons[REASON] += 1
        self.stats.pause_s = times.pause_s
        self.stats.bytes_sent = self.worker.sender.sent_bytes
        self.event("checkpoint", **checkpoint_fields(times), sent_bytes=self.worker.sender.sent_bytes)

    def _release_committed(self) -> None:
        self.peer.pause_told(self._told_pause_s, certain=True)
        self.worker.probe("c")
        try:
            self.devices.commit()
        except RemusError as error:
            self.loop.call(functools.partial(self.fail, error))  # not from within the transition
        self.worker.probe("c2")
        self.worker.acknowledged(self.stats.epoch)

    def _resume_comparing(self) -> None:
        if self.stats.epoch == 1:
            self.event("protected", mode=MODE)
        self.worker.resumed(self.stats.epoch)

    def _abandon_capture(self) -> None:
        self.worker.end()

    def _stands_still(self) -> bool:
        return self.peer.guest_silent_since_s() is not None

    def _on_worker_ended(self, _: object, error: BaseException | None) -> None:
        if error is None or self.machine.final or isinstance(error, Ended):
            return
        if isinstance(error, PeerLost):
            log.info("%s", error)  # its readers report the loss
            return
        if isinstance(error, RemusError) and not self.guest_alive():
            return
        self.fail(error)

    # -- the end -------------------------------------------------------------------------------------------

    def handle(self, event: E, reason: str = "") -> None:
        super().handle(event, reason)
        if self.machine.state not in CHECKPOINTS_GO_ON:
            self.worker.end()

    def _look_at_packets(self) -> None:
        pass  # a buffer that is full drops, as any queue does

    def packet_counters(self) -> dict[str, int]:
        held, sent = held_and_sent(self.devices)
        return {
            "released_equal": 0,
            "released_commit": sent,
            "held": held,
            "diverged": 0,
        }

    def _release_all(self) -> None:
        self.devices.release_all()

    def _end_steps(self) -> list[Callable[[], object]]:
        return [
            self.worker.end,
            self._lan.close,
            self.peer.close,
            self._await_rest,
            lambda: self.devices.teardown(drop_held=self._drops_held),
            self.path.close,
            self.engine.close,
        ]
