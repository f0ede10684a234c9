# SPDX-License-Identifier: LGPL-2.1-or-later
"""The output of the PVM at one vif: held by the kernel, compared with the SVM's, let go.

What is done per packet is in :mod:`remus_colo.proxy.pump`; here is what happens now and then: checkpoints, time-outs,
losses.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from remus_colo.adapters.nft import QueueRules
from remus_colo.adapters.packetqueue import QueueCounters
from remus_colo.adapters.rawlink import LinkGone, RawLink
from remus_colo.errors import RemusError
from remus_colo.proxy.comparator import CheckpointRequest, Comparator, CompareConfig, Decision, Reason
from remus_colo.proxy.pump import Pump, QueueSize, open_pump
from remus_colo.session.loop import Loop, Timer

log = logging.getLogger(__name__)

DEFAULT_SIZE = QueueSize()

COUNTERS = (
    "released_equal",
    "released_commit",
    "released_passed",
    "diverged",
    "held",
    "held_bytes",
    "secondary_seen",
    "secondary_dropped",
    "malformed",
    "truncated",
)


class Output:
    """Nothing is protected at first, and everything leaves; the first :meth:`cut` starts protection.

    :param vif: its name, for messages.
    :param link: the name of the link over which the SVM's output comes; it exists by the time of :meth:`start`.
    :param on_request: called when a checkpoint is needed.
    """

    def __init__(
        self,
        loop: Loop,
        vif: str,
        link: str,
        config: CompareConfig,
        on_request: Callable[[CheckpointRequest], None],
    ) -> None:
        self.vif = vif
        self._ifname = link
        self._config = config
        self._loop = loop
        self._on_request = on_request
        self._comparator = Comparator(config, time.monotonic())
        self._comparator.release_all(time.monotonic())
        self._pump: Pump | None = None
        self._link: RawLink | None = None
        self._timer: Timer | None = None
        self._protecting = False
        self._uncommitted = False  # a cut that is neither committed nor taken back
        self._listening = True  # to the SVM
        self._lost = 0  # packets, as far as a checkpoint was asked for
        self._missing = 0

    def start(self, queue_number: int, rules: QueueRules, size: QueueSize = DEFAULT_SIZE) -> None:
        """Open the queue, have the vif's packets held, and read from now on.

        :raise NetworkError, HostError, ConfigError: queue, link or rules cannot be had; :meth:`close` nevertheless.
        """
        self._link = RawLink(self._ifname)
        self._pump = open_pump(queue_number, size, self._link, self._comparator, self._apply)
        # One call for both: where one VM's packet is, the other's is, too, or comes soon.
        read = self.read
        self._loop.add_reader(self._link, read)
        self._loop.add_reader(self._pump.queue, read)
        rules.hold_from_guest(self.vif, queue_number)
        if rules.backend != "nft":
            self._pump.ignore_tags()

    def counters(self) -> dict[str, int]:
        """The comparator's; and what never came to be compared because the kernel dropped or cut it, of the
        PVM's packets (``queue_lost``) and of the SVM's (``secondary_lost``).
        """
        counters = self._comparator.counters
        found = {name: int(getattr(counters, name)) for name in COUNTERS}
        found["queue_lost"] = 0 if self._pump is None else _lost(self._pump.queue.counters())
        found["secondary_lost"] = 0 if self._link is None else self._link.dropped()
        return found

    @property
    def waiting_since_s(self) -> float | None:
        """Since when the oldest packet that is held waits, by ``time.monotonic()``; None if none is held."""
        return self._comparator.oldest_s

    # -- packets ---------------------------------------------------------------------------------------

    def read(self) -> None:
        """Have the waiting output of both VMs compared."""
        pump = self._pump
        if pump is None:
            return
        try:
            if not self._listening:
                pump.drain_primary()
            elif not pump.turn():
                return
        except LinkGone as error:
            self._link_gone(error)
        if pump.missing > self._missing:
            self._missing = pump.missing
            self.check_losses()
        self._arm(pump.deadline_s)

    def _link_gone(self, error: LinkGone) -> None:
        log.info("the tunnel of %s is gone: %s", self.vif, error)
        self._close_link()

    def _apply(self, decision: Decision) -> None:
        if self._pump is not None and decision.release:
            self._pump.queue.accept_each(decision.release)
        if decision.checkpoint is not None:
            self._on_request(decision.checkpoint)

    def _decided(self, decision: Decision) -> None:
        self._apply(decision)
        self._arm(self._comparator.next_deadline_s)

    def _arm(self, deadline_s: float | None) -> None:
        """Have :meth:`_tick` called at the comparator's deadline, or earlier.

        A timer that turns out to be early is left alone: it costs less than making a new one for each packet.
        """
        if deadline_s is None or (self._timer is not None and self._timer.due_s <= deadline_s):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(max(0.0, deadline_s - time.monotonic()), self._tick)
        if self._pump is not None:
            self._pump.arm(self._timer.due_s)

    def _tick(self) -> None:
        self._timer = None
        if self._pump is not None:
            self._pump.arm(None)
        self._decided(self._comparator.tick(time.monotonic()))

    def check_losses(self) -> None:
        """Packets that the kernel dropped were never compared: they call for a checkpoint.

        To be called now and then: that our socket was full shows when the next packet is read, but that the queue
        was full only in the kernel's counters.
        """
        if self._pump is None or not self._protecting:
            return
        lost = _lost(self._pump.queue.counters())
        if lost > self._lost:
            detail = f"{lost - self._lost} packets of {self.vif} were dropped or cut by the kernel"
            self._on_request(CheckpointRequest(Reason.QUEUE_DROPPED, detail))
        self._lost = lost

    # -- a checkpoint ----------------------------------------------------------------------------------

    def cut(self) -> int:
        """The PVM is stopped: what it sent is all in the queue, and belongs to the closing epoch.

        :return: packets held for it.
        """
        if self._pump is not None:
            self._pump.drain_primary()
        now_s = time.monotonic()
        if not self._protecting:
            self._protecting = True
            self._comparator = Comparator(self._config, now_s)
            if self._pump is not None:
                self._pump.compare_with(self._comparator)
        self._uncommitted = True
        return self._comparator.cut(now_s)

    def commit(self) -> None:
        """The backup has the checkpoint: the closing epoch's packets leave.

        What the SVM said is of another history.  What it says from now on it says as the copy, and may do so before
        :meth:`secondary_resumed` is called, since packets are faster than messages: it waits in the socket.
        """
        self._uncommitted = False
        self._drain_secondary()
        if self._link is not None and self._listening:
            self._loop.remove_reader(self._link)
        self._listening = False
        self._decided(self._comparator.commit(time.monotonic()))

    def secondary_resumed(self) -> None:
        """The SVM, a copy of the PVM as of the cut, runs."""
        if self._listening:  # resumed before the commit
            self._drain_secondary()
        self._decided(self._comparator.secondary_resumed(time.monotonic()))
        if self._link is not None and not self._listening:
            self._loop.add_reader(self._link, self.read)
        self._listening = True

    def _drain_secondary(self) -> None:
        if self._pump is not None:
            try:
                self._pump.drain_secondary()
            except LinkGone as error:
                self._link_gone(error)

    def abort(self) -> None:
        """The checkpoint did not take place, whether it came to a cut or not."""
        if self._uncommitted:
            self._uncommitted = False
            self._decided(self._comparator.abort_cut(time.monotonic()))

    # -- the end ---------------------------------------------------------------------------------------

    def release_all(self) -> None:
        """Protection has ended and the PVM goes on: everything leaves, and is held no more.  May be called again."""
        self._protecting = False
        self._apply(self._comparator.release_all(time.monotonic()))
        if self._pump is not None:
            self._pump.drain_primary()

    def stop_reading(self) -> None:
        if self._pump is not None:
            self._loop.remove_reader(self._pump.queue)
        if self._link is not None:
            self._loop.remove_reader(self._link)
        if self._timer is not None:
            self._timer.cancel()

    def close(self, *, drop_held: bool) -> None:
        """Idempotent.  What is held leaves first, unless the guest went on elsewhere."""
        self.stop_reading()
        if self._pump is not None:
            try:
                if not drop_held:
                    self._pump.drain_primary()
                    self._pump.queue.accept_all()
            except RemusError as error:
                log.warning("while letting the packets of %s go: %s", self.vif, error)
            self._pump.close()
            self._pump = None
        self._close_link()

    def _close_link(self) -> None:
        if self._link is not None:
            self._loop.remove_reader(self._link)
            self._link.close()
            self._link = None


def _lost(counters: QueueCounters) -> int:
    return counters.dropped_queue_full + counters.dropped_buffer_full + counters.truncated
