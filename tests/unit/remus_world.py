# SPDX-License-Identifier: LGPL-2.1-or-later
"""As ``primary_world``, for Remus: checkpoints come from a thread of their own, as libxenguest's do, and
output is a device's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

from primary_world import VIF, Backup, Faults, World

from remus_colo.adapters.devicemodel import DeviceState
from remus_colo.checkpoint.guestinfo import Mode
from remus_colo.checkpoint.periodic import Ended, RoundTimes
from remus_colo.devices.device import CheckpointedDevice, DeviceSet
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.wire import Message
from remus_colo.session import remus_primary, remus_worker
from remus_colo.session.peer import HeartbeatConfig, Peer
from remus_colo.session.remus_primary import RemusConfig, RemusSession


class Output(CheckpointedDevice):
    """What the guest sends: held from each suspend on, until that checkpoint is committed."""

    def __init__(self, faults: Faults) -> None:
        self._step = faults.step
        self.held = False
        self.torn_down = False
        self.dropped = False

    def postsuspend(self) -> None:
        self._step("postsuspend")
        self.held = True

    def preresume(self) -> None:
        self._step("preresume")

    def commit(self) -> None:
        self._step("commit")

    def release_all(self) -> None:
        self._step("release_all")
        self.held = False

    def teardown(self, *, drop_held: bool = False) -> None:
        self.torn_down, self.dropped, self.held = True, drop_held, False


class Rounds:
    """As :class:`remus_colo.checkpoint.periodic.PeriodicCheckpoints`."""

    device_state = DeviceState()

    def __init__(
        self,
        world: RemusWorld,
        destination: Any,
        callbacks: Any,
        on_round: Callable[[RoundTimes], None],
        on_standstill: Callable[[float | None], None],
    ) -> None:
        self._world = world
        self._destination = destination
        self._callbacks = callbacks
        self._on_round = on_round
        self._on_standstill = on_standstill

    def run(self) -> None:
        guest = self._world.engine.guest
        self._destination.live(b"guest")
        number = 0
        while True:
            if not self._callbacks.going_on():
                raise Ended
            number += 1
            self._on_standstill(time.monotonic())
            self._world.faults.step("suspend")
            guest.suspended = True
            try:
                self._callbacks.suspended()
                self._callbacks.resuming()
            finally:
                guest.suspended = False
            self._on_standstill(None)
            self._destination.deliver(number, memoryview(b"" if number == 1 else b"changes"))
            self._on_round(RoundTimes(number=number, pause_s=0.001))
            if not self._callbacks.committed():
                return


class RemusBackup(Backup):
    def answer(self, message: Message) -> None:
        if message.type is not MessageType.PREPARE:
            super().answer(message)


class Session(RemusSession):
    def __init__(self, path: Any, *args: Any) -> None:
        self._fake_path = path
        super().__init__(*args)

    def _make_path(self) -> Any:
        return self._fake_path


class RemusWorld(World):
    """:ivar output: the one device."""

    def __init__(self, **options: Any) -> None:
        self._patches = [
            mock.patch.object(
                remus_primary.toolstack, "domain_config", lambda domid: {"c_info": {"name": "web"}}
            ),
            mock.patch.object(
                remus_worker,
                "PeriodicCheckpoints",
                lambda suspender, destination, calls, *, on_round, on_standstill, **_: Rounds(
                    self, destination, calls, on_round, on_standstill
                ),
            ),
        ]
        for patch in self._patches:
            patch.start()
        super().__init__(Mode.COOPERATIVE, **options)
        self.backup.__class__ = RemusBackup

    def _make_session(
        self, make_peer: Callable[..., Peer], mode: Mode, heartbeat: HeartbeatConfig, fence: tuple[str, ...]
    ) -> Any:
        self.output = Output(self.faults)
        config = RemusConfig(
            name="web", heartbeat=heartbeat, interval_s=0.001, timer=False, compression=False, same_host=False,
            destination="backup", fence=fence,
        )  # fmt: skip
        self.engine.suspender = mock.Mock()  # type: ignore[attr-defined]
        self.engine.dirty_log = True  # type: ignore[attr-defined]
        self.engine.device_model = None  # type: ignore[attr-defined]
        self.watched = mock.Mock(vifs=[mock.Mock(vif=VIF)])
        self.watched.links.master_of.return_value = None
        return Session(
            self.watched,
            self.loop,
            config,
            self.engine,
            mock.Mock(),
            make_peer,
            self._event,
            DeviceSet([self.output]),
        )

    def run(self) -> Any:
        try:
            return super().run()
        finally:
            for patch in self._patches:
                patch.stop()

    def after(self, checkpoints: int, call: Callable[[], object]) -> None:
        """Called in the loop once so many are done."""

        def look() -> None:
            if self.session.stats.epoch >= checkpoints:
                call()
            else:
                self.loop.call_later(0.002, look)

        self.loop.call_later(0.0, look)

    def assert_clean(self) -> None:
        assert self.engine.guest.running
        assert self.engine.closed
        assert self.output.torn_down
        assert not self.output.held
        self.watched.close.assert_called_once_with()
        deadline_s = time.monotonic() + 60
        while not self.session._guest_at_rest.is_set():
            assert time.monotonic() < deadline_s
