# SPDX-License-Identifier: LGPL-2.1-or-later
"""The thread that takes Remus's checkpoints, and what it has in common with and without a backup."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from remus_colo.checkpoint.periodic import DeviceModel, PeriodicCheckpoints, RoundTimes
from remus_colo.checkpoint.suspend import Suspender
from remus_colo.devices.device import DeviceSet

REASON = "interval"
RECENT = 4096  # pauses that are remembered
LATELY = 100  # by which it is judged how long the next may be


@dataclass(slots=True)
class WorkerStats:
    """:ivar pause_s: of the last checkpoints."""

    checkpoints: int = 0
    pause_s: list[float] = field(default_factory=list)
    _lately: deque[float] = field(default_factory=lambda: deque(maxlen=LATELY))
    staged_bytes: int = 0

    def note(self, times: RoundTimes) -> None:
        self.checkpoints = times.number
        self.staged_bytes = times.staged_bytes
        self.pause_s.append(times.pause_s)
        del self.pause_s[:-RECENT]
        if times.number == 2:
            self._lately.clear()  # in the first one's pause a whole guest may have been copied
        self._lately.append(times.pause_s)

    @property
    def longest_pause_s(self) -> float:
        """Of late; 0 before there was one."""
        return max(self._lately, default=0.0)


class CheckpointWorker:
    """Callbacks of :class:`PeriodicCheckpoints` with devices and an interval.

    :param interval_s: from the suspend of one checkpoint to that of the next, if there is time enough.
    :param probe: called with the name of each point at which a test may want the host to die.
    """

    def __init__(
        self,
        suspender: Suspender,
        devices: DeviceSet,
        *,
        interval_s: float,
        timer: bool,
        dirty_log: bool = True,
        device_model: DeviceModel | None = None,
        on_checkpoint: Callable[[RoundTimes], None],
        probe: Callable[[str], None] = lambda point: None,
    ) -> None:
        self.stats = WorkerStats()
        self.devices = devices
        self.ending = threading.Event()
        self._suspender = suspender
        self._interval_s = interval_s
        self._timer = timer
        self._dirty_log = dirty_log
        self._device_model = device_model
        self._on_checkpoint = on_checkpoint
        self.probe = probe
        self._begun_s = 0.0
        self.loop: PeriodicCheckpoints | None = None

    def run(self) -> None:
        """Until :attr:`ending` is set, or something fails; the guest runs afterwards.

        :raise RemusError: what failed.
        """
        self.loop = PeriodicCheckpoints(
            self._suspender,
            self,
            self,
            timer_s=self._interval_s if self._timer else 0.0,
            device_model=self._device_model,
            dirty_log=self._dirty_log,
            on_round=self._note,
            on_standstill=self.standstill,
        )
        self.loop.run()

    def _note(self, times: RoundTimes) -> None:
        self.stats.note(times)
        self._on_checkpoint(times)

    # -- where the copies go: nowhere, unless a subclass knows better ----------------------------------------

    def live(self, chunk: bytes) -> None:
        pass

    def deliver(self, number: int, staged: memoryview) -> None:
        pass

    def commit(self) -> None:
        """What was delivered is safe."""
        self.probe("c")
        self.devices.commit()
        self.probe("c2")

    # -- around each checkpoint ------------------------------------------------------------------------------

    def going_on(self) -> bool:
        return not self.ending.is_set()

    def standstill(self, since_s: float | None) -> None:
        """See ``on_standstill`` of :class:`PeriodicCheckpoints`."""

    def suspended(self) -> None:
        self._begun_s = time.monotonic()
        self.probe("s")
        self.devices.postsuspend()
        self.probe("s2")

    def resuming(self) -> None:
        self.probe("r")
        self.devices.preresume()
        self.probe("r2")

    def committed(self) -> bool:
        if self.ending.is_set():
            return False
        self.commit()
        if not self._timer:
            self.ending.wait(max(0.0, self._next_s() - time.monotonic()))
        return not self.ending.is_set()

    def _next_s(self) -> float:
        """When the next checkpoint is due."""
        due_s = self._begun_s + self._interval_s
        if self._dirty_log or not self.stats.pause_s:
            return due_s
        # A guest that is copied whole stands still for long: it is to run for as long, too.
        return max(due_s, self._begun_s + 2 * self.stats.pause_s[-1])

    def end(self) -> None:
        """From any thread: no more checkpoints."""
        self.ending.set()


def checkpoint_fields(times: RoundTimes) -> dict[str, Any]:
    """A checkpoint as the event log has it."""
    return {
        "epoch": times.number,
        "reason": REASON,
        "suspend_ms": round(times.suspend_s * 1000, 3),
        "pause_ms": round(times.pause_s * 1000, 3),
        "send_ms": round(times.deliver_s * 1000, 3),
        "bytes": times.staged_bytes,
    }
