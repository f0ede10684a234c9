# SPDX-License-Identifier: LGPL-2.1-or-later
"""COLO on the primary host: the SVM is born there from this host's guest, and outputs are compared here."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from remus_colo.adapters import toolstack, xenctrl
from remus_colo.adapters.xenstore import Store
from remus_colo.checkpoint import birth
from remus_colo.checkpoint.guestinfo import Mode
from remus_colo.checkpoint.pvm import PvmEngine
from remus_colo.devices.device import DeviceSet
from remus_colo.errors import RemusError
from remus_colo.failover.primary import PrimaryEvent as E
from remus_colo.failover.primary import PrimaryState
from remus_colo.proxy.comparator import CheckpointRequest, CompareConfig
from remus_colo.proxy.primary_path import PrimaryPath, Tunnel
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.wire import Message
from remus_colo.session import inherited
from remus_colo.session.colo_checkpoints import Checkpoints
from remus_colo.session.loop import Loop
from remus_colo.session.parts import EventSink
from remus_colo.session.peer import STREAM_TIMEOUT_S, HeartbeatConfig, Peer
from remus_colo.session.primary import PrimarySession

log = logging.getLogger(__name__)

STREAM_FRAME_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ColoConfig:
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


class ColoSession(PrimarySession):
    """One protection by COLO.

    :param rebirth: entered around the guest's resume as if in a new domain.
    """

    config: ColoConfig
    engine: PvmEngine
    path: PrimaryPath

    def __init__(
        self,
        loop: Loop,
        config: ColoConfig,
        engine: PvmEngine,
        store: Store,
        make_peer: Callable[..., Peer],
        event: EventSink,
        devices: DeviceSet | None = None,
        rebirth: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        super().__init__(loop, config, engine, store, make_peer, event, devices)
        self._rebirth = rebirth
        self._checkpoints = Checkpoints(
            self, engine, self.path, period_s=config.period_s, verify_every=config.verify_every
        )
        self._born = False

    def _make_path(self) -> PrimaryPath:
        return PrimaryPath(
            self.loop,
            self.engine.layout.vifs,
            self.config.tag,
            self.config.compare,
            lambda request: self._checkpoints.request(request),
        )

    def _on_message(self, message: Message) -> None:
        if message.type is MessageType.DIRTY:
            self._checkpoints.on_dirty(message)
        else:
            super()._on_message(message)

    # -- the SVM's birth -------------------------------------------------------------------------------------

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
            "heartbeat": {
                "interval_s": self.config.heartbeat.interval_s,
                "timeout_s": self.config.heartbeat.timeout_s,
            },
            "host_addresses": sorted(map(str, self.path.links.addresses())),
        }
        if self.config.clock_offset_ns is not None:
            fields["clock_offset_ns"] = self.config.clock_offset_ns
        if connections := inherited.read(self.engine.guest.domid):
            fields["connections"] = connections
        self.peer.send(MessageType.CREATE, 0, **fields)
        self.event("creating", mode=self.config.mode.value)
        secondary = birth.secondary_config(
            config,
            lambda index: f"rcb{self.config.tag}.{self.engine.layout.vifs[index].handle}",
            same_host=self.config.same_host,
        )
        self.guest_thread("birth", functools.partial(self._give_birth, secondary), self._on_born)

    def _give_birth(self, secondary: dict[str, Any]) -> float:
        """In a thread: send the guest, start the dirty log, resume it. Returns how long it was stopped."""
        engine, stopped_s = self.engine, 0.0

        def write(chunk: bytes) -> None:
            deadline_s = time.monotonic() + STREAM_TIMEOUT_S
            for start in range(0, len(chunk), STREAM_FRAME_BYTES):
                piece = memoryview(chunk)[start : start + STREAM_FRAME_BYTES]
                self.peer.data.send_bulk(MessageType.CREATE_STREAM, 0, [piece], deadline_s=deadline_s)

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
            with self._rebirth():
                engine.resume_as_new()
        else:
            engine.resume_cancelled()
        pause_s = time.monotonic() - stopped_s
        self.peer.data.send_bulk(MessageType.CREATE_STREAM, 0, [])
        engine.await_connected()
        engine.rings_changed()
        # Mapping a large guest takes seconds, which its packets would have to wait for in the loop's thread.
        engine.prepare()
        return pause_s

    def _on_born(self, pause_s: float | None, error: BaseException | None) -> None:
        if error is not None:
            if self.machine.final:
                return
            if self.machine.state is PrimaryState.STOPPING and isinstance(error, RemusError):
                log.info("the copy broke off as protection ended: %s", error)
                return
            self.fail(error)
            return
        assert pause_s is not None
        self.event("resumed-in-place", pause_ms=round(pause_s * 1000, 1))
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
            self.fail(error)
            return
        self.handle(E.SVM_CREATED)

    # -- checkpoints -----------------------------------------------------------------------------------------

    def request_checkpoint(self, request: CheckpointRequest) -> None:
        """As the comparator does; from any thread."""
        self.loop.call(lambda: self._checkpoints.request(request))

    def _start_checkpoint(self) -> None:
        self._checkpoints.start()

    def _abandon_capture(self) -> None:
        self._checkpoints.abandon()

    def _release_committed(self) -> None:
        self._checkpoints.acknowledged()

    def _resume_comparing(self) -> None:
        self._checkpoints.resumed()

    # -- packets, and the end --------------------------------------------------------------------------------

    def packet_counters(self) -> dict[str, int]:
        """The comparators' counters, all vifs together."""
        total: Counter[str] = Counter()
        for vif in self.path.vifs:
            total.update(vif.counters())
        return dict(total)

    def _waiting_since_s(self) -> float | None:
        """The guest's oldest packet that waits for its equal or for a commit, or the first that it is kept from hearing."""
        if PrimaryState.PROTECTED not in self.machine.visited:
            return None  # nothing is lost yet but the copy, and both hosts are at their hardest work
        since_s = [self.peer.guest_silent_since_s(), *(vif.waiting_since_s for vif in self.path.vifs)]
        return min((known_s for known_s in since_s if known_s is not None), default=None)

    def _look_at_packets(self) -> None:
        self.path.each(lambda vif: vif.check_losses())

    def _release_all(self) -> None:
        self.path.release_all()

    def _end_steps(self) -> list[Callable[[], object]]:
        return [
            self._lan.close,
            self.peer.close,
            lambda: self.path.close(drop_held=self._drops_held),
            self._await_rest,
            self.engine.close,
        ]
