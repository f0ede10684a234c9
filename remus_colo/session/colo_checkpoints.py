# SPDX-License-Identifier: LGPL-2.1-or-later
"""COLO's checkpoints on the primary host, one after the other: from the request to the SVM's resume.

==  ==========================================================================================================
1   Co-operative mode: input is held, and the guest finishes what it is at.
2   PREPARE; the backup stops the SVM, and tells by DIRTY what it has changed.
3   Input is held, the backends hand over what they have; the guest is stopped, copied, and resumed.
4   The copy goes to the backup, while the guest runs on; its output from before is held.
5   ACK: the output is released.  RESUMED: outputs are compared again.
==  ==========================================================================================================
"""

from __future__ import annotations

import functools
import itertools
import logging
import time

from remus_colo.checkpoint import transfer
from remus_colo.checkpoint.guestinfo import Mode
from remus_colo.checkpoint.pvm import PvmEngine, Snapshot
from remus_colo.errors import RemusError, XenError
from remus_colo.failover.primary import PrimaryEvent as E
from remus_colo.failover.primary import PrimaryState
from remus_colo.proxy.comparator import CheckpointRequest, Reason
from remus_colo.proxy.primary_path import PrimaryPath
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.wire import Message
from remus_colo.session.loop import Timer
from remus_colo.session.primary import PrimarySession

log = logging.getLogger(__name__)

# Before a guest suspends itself it is given a while without input to finish what it is at: what its twin, whose network
# comes back late, sends before that is lost until TCP repeats it. It has finished when its vCPUs are blocked each
# time that it is looked at, so often in a row.
SETTLE_LOOK_S = 0.005
SETTLE_LOOKS = 5
SETTLE_TIMEOUT_S = 1.0  # work without end: suspend it as it is
# Of the heartbeat time-out: so long the guest may be kept from its input while the backup is waited for, which may have
# gone.  Less than SELF_LIMIT: a guest that answers nobody for longer may be held for dead there.
HOLD_LIMIT = 0.3


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


class Checkpoints:
    """Those of one session, in the loop's thread.

    :param period_s: one at least that often, 0 for never.
    :param verify_every: after each so many both VMs' memory is compared, 0 for never.
    """

    def __init__(
        self,
        session: PrimarySession,
        engine: PvmEngine,
        path: PrimaryPath,
        *,
        period_s: float,
        verify_every: int,
    ) -> None:
        self._session = session
        self._engine = engine
        self._path = path
        self._period_s = period_s
        self._verify_every = verify_every
        self._pending: CheckpointRequest | None = None  # asked for while another was under way
        self._reason = Reason.START
        self._capturing = False
        self._held = False  # input
        self._hold_limit: Timer | None = None
        self._suspending = False  # in a thread
        self._phases = Phases()
        self._period: Timer | None = None

    def request(self, request: CheckpointRequest) -> None:
        """The comparator, the period or the user asks for a checkpoint."""
        if self._session.machine.state is PrimaryState.PROTECTED and not self._capturing:
            self._pending = None
            self._reason = request.reason
            self._session.event("checkpoint-asked", reason=request.reason.value, detail=request.detail)
            # Not at once: the comparator may be in the midst of a packet.
            self._capturing = True
            self._session.loop.call(
                lambda: self._session.handle(E.CHECKPOINT_DUE, reason=request.reason.value)
            )
        elif self._pending is None:
            self._pending = request

    def start(self) -> None:
        """The state machine's order."""
        self._capturing = True
        self._phases = Phases()
        self._session.stats.epoch += 1
        if self._period is not None:
            self._period.cancel()
        if self._engine.mode is Mode.COOPERATIVE:
            self._hold_input()
            hold_s = self._session.config.heartbeat.timeout_s * HOLD_LIMIT
            self._hold_limit = self._session.loop.call_later(hold_s, self._hold_no_longer)
            settle_s = min(SETTLE_TIMEOUT_S, hold_s / 2)
            self._settle(self._session.stats.epoch, time.monotonic() + settle_s, SETTLE_LOOKS)
        else:
            self._prepare()

    def _hold_input(self) -> None:
        if not self._held:
            self._held = True
            # Before there is a replica nothing could be taken for the guest.
            if self._session.stats.epoch > 1:
                self._session.peer.guest_silent()
            self._path.each(lambda vif: vif.hold_input())

    def _hold_no_longer(self) -> None:
        """The backup has not answered yet, and may be gone: the guest is served meanwhile."""
        if self._held and self._capture_wanted():
            self._held = False
            self._path.each(lambda vif: vif.give_input())
            self._session.peer.guest_answers()

    def _no_hold_limit(self) -> None:
        if self._hold_limit is not None:
            self._hold_limit.cancel()
            self._hold_limit = None

    def _settle(self, epoch: int, deadline_s: float, looks: int) -> None:
        """Wait until the guest, without input, has nothing more to do.

        :param looks: how often it must still be seen idle.
        """
        if epoch != self._session.stats.epoch or not self._capture_wanted():
            return
        try:
            looks = looks - 1 if self._engine.guest.info().blocked else SETTLE_LOOKS
        except XenError:
            return  # it is gone, which the next look at the guest notices
        if looks and time.monotonic() < deadline_s:
            self._session.loop.call_later(SETTLE_LOOK_S, lambda: self._settle(epoch, deadline_s, looks))
        else:
            self._prepare()

    def _capture_wanted(self) -> bool:
        return self._session.machine.state in (PrimaryState.SYNCING, PrimaryState.CHECKPOINTING)

    def _prepare(self) -> None:
        """Have the backup stop the SVM, and tell what it has changed."""
        self._phases.end("settle")
        self._session.peer.send(MessageType.PREPARE, self._session.stats.epoch)
        try:
            self._engine.prepare()
        except RemusError as error:
            self._capture_failed(error)

    def on_dirty(self, message: Message) -> None:
        """The SVM has stopped; the message tells what it has changed."""
        if message.epoch != self._session.stats.epoch or not self._capture_wanted():
            return
        self._phases.end("dirty")
        self._no_hold_limit()
        dirty = bytes(message.data)
        self._hold_input()
        self._engine.drain_input()
        self._phases.end("drain")
        if self._engine.mode is Mode.TRANSPARENT:
            self._stop_and_capture(dirty)
            return
        # The guest's own suspend takes its time, in which its output must not wait for us.
        epoch = self._session.stats.epoch
        started_s = time.monotonic()
        self._suspending = True
        self._session.guest_thread(
            "suspend",
            self._engine.stop,
            lambda _, error: self._on_stopped(epoch, dirty, started_s, error),
        )

    def _on_stopped(self, epoch: int, dirty: bytes, started_s: float, error: BaseException | None) -> None:
        self._suspending = False
        if error is not None:
            self._let_run()  # it may have suspended all the same
            self._capture_failed(error)
        elif epoch == self._session.stats.epoch and self._capture_wanted():
            self._capture(dirty, started_s)
        else:
            self._let_run()  # the checkpoint was given up meanwhile

    def _stop_and_capture(self, dirty: bytes) -> None:
        started_s = time.monotonic()
        try:
            self._engine.stop()
        except RemusError as error:
            self._capture_failed(error)
            return
        self._capture(dirty, started_s)

    def _capture(self, dirty: bytes, started_s: float) -> None:
        """The PVM is stopped: copy it, cut its output, let it run on, and send the copy."""
        self._phases.end("stop")
        try:
            self._session.devices.postsuspend()
            every = self._verify_every
            epoch = self._session.stats.epoch
            snapshot = self._engine.collect(epoch, dirty, verify=every > 0 and epoch % every == 0)
            self._path.each(lambda vif: vif.cut())
            self._pending = (
                None  # this checkpoint settles it; what is asked for from now on is about the next epoch
            )
            self._session.devices.preresume()
            self._engine.go()
        except Exception as error:
            self._let_run()
            self._capture_failed(error)
            return
        pause_s = time.monotonic() - started_s
        self._phases.end("copy")
        self._path.each(lambda vif: vif.release_input())
        self._session.peer.guest_answers()
        self._session.stats.reasons[self._reason.value] += 1
        self._session.stats.pause_s = pause_s
        self._session.stats.pages = snapshot.count
        self._session.loop.thread(
            "send",
            lambda: transfer.send(self._session.peer.data, snapshot),
            functools.partial(self._on_sent, snapshot, pause_s),
        )

    def _on_sent(
        self, snapshot: Snapshot, pause_s: float, sent: int | None, error: BaseException | None
    ) -> None:
        if error is not None:
            if not isinstance(error, RemusError):
                raise error
            log.warning("checkpoint %d was not sent: %s", snapshot.epoch, error)
            return  # the peer's loss is reported by its readers
        self._phases.end("send")
        self._session.stats.bytes_sent += sent or 0
        self._session.event(
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
        if not self._session.guest_alive():
            return
        log.error("checkpoint %d failed: %s", self._session.stats.epoch, error)
        self._session.event("checkpoint-failed", epoch=self._session.stats.epoch, text=str(error))
        # What the dirty log told is gone with the failed collection: without it the next checkpoint would
        # leave stale pages.
        self._session.fail(error)

    def abandon(self) -> None:
        """There is no checkpoint: the guest and its network go on as they were."""
        self._capturing = False
        self._no_hold_limit()
        if self._engine.mode is Mode.TRANSPARENT:
            self._let_run()
        if self._held:
            self._held = False
            for vif in self._path.vifs:
                try:
                    vif.abort()
                except RemusError as error:
                    log.warning("while giving up a checkpoint: %s", error)
        if not self._suspending:
            self._session.peer.guest_answers()

    def _let_run(self) -> None:
        try:
            self._engine.go()
            if not self._held:
                self._session.peer.guest_answers()
        except XenError as error:
            log.error("%s", error)  # it has ended, which the next look at the guest notices

    def acknowledged(self) -> None:
        """The backup has the checkpoint: what the guest sent before it leaves."""
        self._session.devices.commit()
        self._path.each(lambda vif: vif.commit())

    def resumed(self) -> None:
        """The SVM runs from the checkpoint on."""
        self._held = False
        self._capturing = False
        self._path.each(lambda vif: vif.secondary_resumed())
        if self._session.stats.epoch == 1:
            self._session.event("protected", mode=self._engine.mode.value)
        if self._period_s > 0:
            self._period = self._session.loop.call_later(
                self._period_s, lambda: self.request(CheckpointRequest(Reason.PERIOD, ""))
            )
        if self._pending is not None:
            request, self._pending = self._pending, None
            self.request(request)
