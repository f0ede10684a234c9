# SPDX-License-Identifier: LGPL-2.1-or-later
"""Remus's loop: suspend the guest, copy what it changed, resume it, send the copy, and again.

One round, in libxenguest's order:

==  ==================================================================================================
1   The guest suspends itself; ``suspended`` of the caller's: cut output and disks.
2   libxenguest writes the pages that changed, and the CPU state, into memory (``staging.py``); without a
    dirty log all pages (``fullcopy.py``).
3   ``resuming`` of the caller's; the guest is resumed.  It was stopped from 1 to here.
4   ``deliver``: the copy goes where it is to go, while the guest runs.
5   ``committed`` of the caller's: release output; wait for the interval to pass; say whether to go on.
==  ==================================================================================================

The first round has live rounds before it, in which the whole guest is copied while it runs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from remus_colo.adapters import savestream
from remus_colo.adapters.devicemodel import DeviceState
from remus_colo.checkpoint import fullcopy
from remus_colo.checkpoint.staging import Staging
from remus_colo.checkpoint.suspend import Suspender
from remus_colo.errors import XenError

log = logging.getLogger(__name__)


class Destination(Protocol):
    """Where the copies go."""

    def live(self, chunk: bytes) -> None:
        """A piece of the whole guest, in a thread of its own; it may block."""

    def deliver(self, number: int, staged: memoryview) -> None:
        """The first checkpoint is complete with what ``live`` has had, and ``staged`` is empty; each later one is
        ``staged``, which is the caller's again afterwards."""


class Callbacks(Protocol):
    """What happens around each checkpoint; an exception ends the loop, and is raised from it."""

    def suspended(self) -> None: ...

    def resuming(self) -> None: ...

    def committed(self) -> bool:
        """Whether to go on."""

    def going_on(self) -> bool:
        """Asked between the live rounds, of which each may take long; False gives the whole copy up."""


class DeviceModel(Protocol):
    """An HVM guest's device model, which stops and is saved with the guest."""

    def log_dirty(self, enable: bool) -> None: ...

    def prepare(self) -> None:
        """The guest is about to be suspended."""

    def stop(self) -> DeviceState:
        """The guest has suspended."""

    def go_on(self) -> None:
        """It is about to be resumed."""

    def close(self) -> None: ...


@dataclass(slots=True)
class RoundTimes:
    """One checkpoint in figures.

    :ivar suspend_s: from the request to the guest's standstill, in which it still ran for the most part.
    :ivar pause_s: from its standstill to its resume.
    :ivar deliver_s: from its resume until the copy was delivered.
    """

    number: int = 0
    suspend_s: float = 0.0
    pause_s: float = 0.0
    deliver_s: float = 0.0
    staged_bytes: int = 0


class PeriodicCheckpoints:
    """Checkpoints of one domain until it is told to end, or something fails; the guest runs afterwards.

    :param dirty_log: whether Xen tells what this guest has written; see ``fullcopy.py``.
    :param timer_s: suspend the guest at this interval by a clock, whatever the copy before has come to
        (``remus --timer``); 0: when ``committed`` returns.
    :param on_standstill: called, in any thread, before the guest is stopped and when it has been, with the time since when it
        may stand still, in seconds of CLOCK_MONOTONIC; and with None when it runs.
    """

    def __init__(
        self,
        suspender: Suspender,
        destination: Destination,
        callbacks: Callbacks,
        *,
        timer_s: float = 0.0,
        device_model: DeviceModel | None = None,
        dirty_log: bool = True,
        on_round: Callable[[RoundTimes], None] | None = None,
        on_standstill: Callable[[float | None], None] = lambda since_s: None,
    ) -> None:
        self._suspender = suspender
        self._destination = destination
        self._callbacks = callbacks
        self._device_model = device_model
        self._dirty_log = dirty_log
        self._on_round = on_round
        self._on_standstill = on_standstill
        self._alarm = Alarm(timer_s, self._stop_guest) if timer_s else None
        self._staging: Staging | None = None
        self._times = RoundTimes()
        self._stopped_s = 0.0
        self._resumed_s = 0.0
        self._stopped_state = (
            DeviceState()
        )  # with a timer, of a checkpoint later than the one that is being delivered
        self._device_state = DeviceState()

    def run(self) -> None:
        """:raise XenError, DomainError: the domain cannot be copied or suspended; what a callback raised."""
        domid = self._suspender.guest.domid
        staging = self._staging = Staging(self._destination.live)
        try:
            save = savestream.save_checkpoints if self._dirty_log else fullcopy.save_checkpoints
            save(domid, staging.fd, self)
        except (XenError, OSError) as error:
            if staging.failure is not None:
                raise staging.failure from error
            raise
        finally:
            if self._alarm is not None:
                self._alarm.cancel()
            try:
                # It may have ended while the guest was about to suspend, or between suspend and resume.
                self._suspender.call_off()
                if self._suspender.suspended:
                    self._resume_guest()
                else:
                    self._on_standstill(None)  # it may have been asked to suspend, in vain
            except XenError as error:
                log.info("after the last checkpoint: %s", error)
            if self._device_model is not None:
                self._device_model.close()
            staging.close()

    # -- the hooks, in libxenguest's order -----------------------------------------------------------------

    def log_dirty(self, enable: bool) -> None:
        if self._device_model is not None:
            self._device_model.log_dirty(enable)

    def round(self, number: int, dirty_pages: int) -> bool:
        log.debug("live round %d: %d pages", number, dirty_pages)
        if not self._callbacks.going_on():
            raise Ended
        return True

    def suspend(self) -> None:
        self._times = RoundTimes(number=self._times.number + 1)
        asked_s = time.monotonic()
        if self._alarm is None or not self._alarm.taken():
            self._stop_guest()
        self._times.suspend_s = max(0.0, self._stopped_s - asked_s)
        self._callbacks.suspended()

    def resume(self) -> None:
        self._device_state = self._stopped_state
        self._callbacks.resuming()
        self._resume_guest()
        self._resumed_s = time.monotonic()
        self._times.pause_s = self._resumed_s - self._stopped_s
        if self._alarm is not None:
            self._alarm.set()

    def checkpoint(self) -> bool:
        assert self._staging is not None
        staged = self._staging.take()
        self._times.staged_bytes = len(staged)
        self._destination.deliver(self._times.number, staged)
        self._times.deliver_s = time.monotonic() - self._resumed_s
        if self._on_round is not None:
            self._on_round(self._times)
        return self._callbacks.committed()

    # -- the guest -----------------------------------------------------------------------------------------

    @property
    def device_state(self) -> DeviceState:
        """The device model's, of the checkpoint that is being delivered."""
        return self._device_state

    def _stop_guest(self) -> None:
        self._on_standstill(time.monotonic())
        if self._device_model is not None:
            self._device_model.prepare()
        self._stopped_s = self._suspender.suspend()
        self._on_standstill(self._stopped_s)
        if self._device_model is not None:
            # At once, as what it does to the guest's memory in saving is to be copied, too.
            self._stopped_state = self._device_model.stop()

    def _resume_guest(self) -> None:
        try:
            if self._device_model is not None:
                self._device_model.go_on()
        finally:
            self._suspender.resume()  # much of a guest works without its device model
            self._on_standstill(None)


class Ended(Exception):
    """Not an error: the copy was given up as asked, before its first checkpoint."""


class Alarm:
    """Stops the guest at fixed intervals, each time that :meth:`set` was called before."""

    def __init__(self, interval_s: float, stop: Callable[[], None]) -> None:
        self._interval_s = interval_s
        self._stop = stop
        self._next_s = 0.0
        self._thread: threading.Thread | None = None
        self._cancelled = threading.Event()
        self._error: BaseException | None = None

    def set(self) -> None:
        now_s = time.monotonic()
        if not self._next_s:
            self._next_s = now_s
        while self._next_s <= now_s:
            self._next_s += self._interval_s
        self._thread = threading.Thread(target=self._run, name="suspend-timer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        if self._cancelled.wait(max(0.0, self._next_s - time.monotonic())):
            return
        try:
            self._stop()
        except BaseException as error:  # raised by taken()
            self._error = error

    def taken(self) -> bool:
        """Wait for the guest to have been stopped; False if nothing was set.

        :raise BaseException: what stopping it raised.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return False
        thread.join()
        if self._error is not None:
            raise self._error
        return True

    def cancel(self) -> None:
        """No more; one that has begun is waited for."""
        self._cancelled.set()
        if self._thread is not None:
            self._thread.join()
