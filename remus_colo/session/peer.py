# SPDX-License-Identifier: LGPL-2.1-or-later
"""The other host: its two channels, its messages as calls in the loop, heartbeats both ways."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from remus_colo.adapters.xenctrl import Clock
from remus_colo.errors import PeerLost, RemusError
from remus_colo.failover.heartbeat import PeerMonitor, SelfMonitor
from remus_colo.relocation.channel import Channel
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.wire import Message
from remus_colo.session.clocks import ClockWatch
from remus_colo.session.inbox import Inbox
from remus_colo.session.loop import Loop

log = logging.getLogger(__name__)

LOOK_SLACK_S = 0.001  # a timer may come early by what a clock rounds
POLL_S = 1.0  # how soon a reader notices that it is to end
# A loop that has not come round for so many time-outs is stuck: saying that we live would be a lie.
STUCK_TIMEOUTS = 4.0
# Of the time-out. A gap between our heartbeats shorter than the first cannot have made the other host think that
# we are dead; a LAN probe that is silent for the second, which must be longer, can.
SELF_LIMIT = 0.4
PROBE_WINDOW = 0.5
# Where a guest stands still for long at each checkpoint: silence for so many of its longest pauses is no pause.  If it is
# one after all, its primary does not go on without asking (SELF_LIMIT); and a takeover waits for as long.
PAUSES_PER_WINDOW = 1.5
BYE_TIMEOUT_S = 0.2
# A save stream goes to the backup's xl, which may be busy for a while with what it has: it makes a domain first, and takes
# memory for it.
STREAM_TIMEOUT_S = 120.0
# Of the time for which the other host may be silent, when clients have already waited for so long.
IMPATIENT = 0.6
# Until there is a replica nothing hangs on how soon a silent host is given up, and making one is the hardest
# that both hosts have to do: a whole guest is copied, suspended and resumed.
PATIENCE_AT_START_S = 20.0
# What a primary may ask for: options.py has no less than a millisecond.
MIN_INTERVAL_S = 0.001
MAX_TIMEOUT_S = 86_400.0


@dataclass(frozen=True, slots=True)
class HeartbeatConfig:
    interval_s: float
    timeout_s: float

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> HeartbeatConfig:
        """What a primary asks for in CREATE.

        :raise KeyError, TypeError, ValueError: it lacks a part, or asks for what would keep us busy, or blind.
        """
        interval_s, timeout_s = float(fields["interval_s"]), float(fields["timeout_s"])
        if not MIN_INTERVAL_S <= interval_s < timeout_s <= MAX_TIMEOUT_S:
            raise ValueError(f"heartbeats every {interval_s} s with a time-out of {timeout_s} s")
        return cls(interval_s, timeout_s)


def look_s(timeout_s: float, longest_pause_s: float = 0.0) -> float:
    """How long the backup looks for the guest of a primary that is late, before it takes it for dead.

    :param timeout_s: the heartbeats'.
    :param longest_pause_s: of the guest's, as the primary has told.
    """
    return max(timeout_s * PROBE_WINDOW, longest_pause_s * PAUSES_PER_WINDOW)


def bearable_s(timeout_s: float, longest_pause_s: float = 0.0) -> float:
    """A silence of the guest's for which no backup has looked in vain; see :func:`look_s`."""
    return look_s(timeout_s, longest_pause_s) * SELF_LIMIT / PROBE_WINDOW


class Peer:
    """Both channels to the other host.

    :param on_message: called in the loop's thread with each message, of either channel, but heartbeats.
    :param on_lost: called once in the loop's thread, when a channel breaks.
    :param state: what our heartbeats say of us.
    :param beats: whether heartbeats are to be sent: a host that protects no more must not keep the other waiting.
    :param on_stream: takes a save stream's chunks, in the reader's own thread: it may block, and so slow
        the sender down.
    :param clock: what this side says and measures clocks by: the primary's is the guest's, the backup's its host's;
        None where clocks are no concern.
    :param sure: called with each heartbeat for as long as the other host cannot hold us for dead.
    :param patience_s: how long it may be silent, if that is not the heartbeats' time-out.
    :param starting: whether no replica can be lost yet; the other host may be silent for
        :data:`PATIENCE_AT_START_S` then.
    :param waiting_since_s: called in the loop's thread: since when, by ``time.monotonic()``, clients wait for something that
        the other host has to send; None if none do.  Their wait counts as if that host had been silent, but for
        :data:`IMPATIENT`.
    :param ask_clock: send a probe with each heartbeat; see :attr:`clocks` for what they tell.
    """

    def __init__(
        self,
        loop: Loop,
        control: Channel,
        data: Channel,
        config: HeartbeatConfig,
        *,
        on_message: Callable[[Message], None],
        on_lost: Callable[[RemusError], None],
        state: Callable[[], str],
        beats: Callable[[], bool] = lambda: True,
        on_stream: Callable[[bytes], None] | None = None,
        clock: Clock | None = None,
        ask_clock: bool = False,
        sure: Callable[[], None] = lambda: None,
        patience_s: float | None = None,
        starting: Callable[[], bool] = lambda: False,
        waiting_since_s: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.loop = loop
        self.control = control
        self.data = data
        self.config = config
        patience_s = config.timeout_s if patience_s is None else patience_s
        self.monitor = PeerMonitor(patience_s, patience_s * IMPATIENT)
        self.self_monitor = SelfMonitor(config.timeout_s * SELF_LIMIT)
        self.peer_state = ""
        self._on_lost = on_lost
        self._inboxes = [Inbox(loop, on_message), Inbox(loop, on_message)]
        self._on_stream = on_stream
        self._state = state
        self._beats = beats
        self._closing = threading.Event()
        self._lost = False
        self._lock = threading.Lock()
        self._ask_clock = ask_clock
        self._sure = sure
        self._starting = starting
        self._waiting_since_s = waiting_since_s
        self.clocks = (
            None
            if clock is None
            else ClockWatch(clock, lambda kind, fields: control.send_control(kind, 0, fields))
        )
        self._seen = 0  # the last sequence number of the peer's heartbeats
        self.quiet_state: Callable[[str], bool] = lambda state: False

    def start(self) -> None:
        self.monitor.beat(time.monotonic())
        for channel, inbox, name in zip(
            (self.control, self.data), self._inboxes, ("control", "data"), strict=True
        ):
            threading.Thread(
                target=self._read, args=(channel, inbox), name=f"peer-{name}", daemon=True
            ).start()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def close(self) -> None:
        self._closing.set()
        for inbox in self._inboxes:
            inbox.close()
        self.control.close()
        self.data.close()

    def send(self, kind: MessageType, epoch: int = 0, **fields: object) -> None:
        """A control message; a broken channel is reported through ``on_lost``, not here."""
        deadline_s = time.monotonic() + BYE_TIMEOUT_S if kind is MessageType.BYE else None
        try:
            self.control.send_control(kind, epoch, fields, deadline_s=deadline_s)
        except PeerLost as error:
            self._report_lost(error)

    # -- reading ---------------------------------------------------------------------------------------

    def _read(self, channel: Channel, inbox: Inbox) -> None:
        try:
            self._read_all(channel, inbox)
        except RemusError as error:
            if not self._closing.is_set():
                self._report_lost(error)
        except Exception as error:
            # Without this reader the other host would be there, by its heartbeats, and never heard.
            log.exception("reading from %s", channel.peer)
            self._report_lost(PeerLost(f"what {channel.peer} sent could not be handled: {error!r}"))

    def _read_all(self, channel: Channel, inbox: Inbox) -> None:
        while not self._closing.is_set():
            message = channel.poll(time.monotonic() + POLL_S)
            if message is None:
                continue
            with self._lock:
                self.monitor.beat(time.monotonic())
            if self.clocks is not None and self.clocks.take(message):
                continue
            if message.type is MessageType.HEARTBEAT:
                self._heard(message)
            elif message.type is MessageType.CREATE_STREAM and self._on_stream is not None:
                self._on_stream(bytes(message.data))
            elif inbox.put(message):
                with self._lock:
                    self.monitor.beat(time.monotonic())  # it may have waited, and heard nothing meanwhile

    def _heard(self, message: Message) -> None:
        self._seen = int(message.fields["sequence"])
        self.peer_state = str(message.fields["state"])
        seen = message.fields.get("seen")
        if isinstance(seen, int) and not self.quiet_state(self.peer_state):
            with self._lock:
                self.self_monitor.seen(seen)

    def _report_lost(self, error: RemusError) -> None:
        def report() -> None:
            if not self._lost and not self._closing.is_set():
                self._lost = True
                self._on_lost(error)

        self.loop.call(report)

    # -- heartbeats ------------------------------------------------------------------------------------

    def _beat(self) -> None:
        sequence = 0
        try:
            while not self._closing.wait(self.config.interval_s):
                if (
                    self._beats()
                    and time.monotonic() - self.loop.turn_s <= STUCK_TIMEOUTS * self.config.timeout_s
                ):
                    sequence += 1
                    self._beat_once(sequence)
        except RemusError as error:
            if not self._closing.is_set():
                self._report_lost(error)
        except Exception as error:
            log.exception("sending heartbeats")
            self._report_lost(PeerLost(f"heartbeats can no longer be sent: {error!r}"))

    def _beat_once(self, sequence: int) -> None:
        fields = {
            "sequence": sequence,
            "sent_ns": time.monotonic_ns(),
            "state": self._state(),
            "seen": self._seen,
        }
        self.control.send_control(MessageType.HEARTBEAT, 0, fields)
        if self._ask_clock and self.clocks is not None:
            self.clocks.ask()
        with self._lock:
            now_s = time.monotonic()
            self.self_monitor.sent(sequence, now_s)
            doubt = self.self_monitor.in_doubt(now_s)
        if not doubt:
            self._sure()

    def silence_s(self) -> float:
        with self._lock:
            return self.monitor.silence_s(time.monotonic())

    def next_look_s(self, *noticed_s: float) -> float:
        """After what time to look again: as soon as it may have expired, and at each heartbeat's time in any case.

        :param noticed_s: shorter silences that are to be noticed as soon as they are reached.
        """
        with self._lock:
            silence_s = self.monitor.silence_s(time.monotonic())
        left_s = [limit_s - silence_s for limit_s in (self.monitor.timeout_s, *noticed_s)]
        return min([self.config.interval_s, *(left + LOOK_SLACK_S for left in left_s if left > 0)])

    def expired(self) -> bool:
        """Whether the other host has been silent for too long: not while it is we who do not listen."""
        if any(inbox.full for inbox in self._inboxes):
            return False
        waiting_since_s = self._waiting_since_s()
        with self._lock:
            now_s = time.monotonic()
            if self._starting() and self.monitor.silence_s(now_s) <= PATIENCE_AT_START_S:
                return False
            return self.monitor.expired(now_s, waiting_since_s)

    def pause_told(self, longest_pause_s: float, *, certain: bool) -> None:
        """The backup bears with the guest's pauses by this, the longest of late; from any thread.

        :param certain: it is known to have it; else it may yet go by what it was told before.
        """
        limit_s = bearable_s(self.config.timeout_s, longest_pause_s)
        with self._lock:
            before_s = self.self_monitor.guest_limit_s
            self.self_monitor.guest_limit_s = limit_s if certain else min(limit_s, before_s)

    def guest_silent(self, since_s: float | None = None) -> None:
        """Since then, or from now on, our guest answers nobody; from any thread, see :class:`SelfMonitor`."""
        with self._lock:
            self.self_monitor.guest_silent(time.monotonic() if since_s is None else since_s)

    def guest_answers(self) -> None:
        """It does again; from any thread."""
        with self._lock:
            self.self_monitor.guest_answers(time.monotonic())

    def guest_silent_since_s(self) -> float | None:
        """Since when it answers nobody; None if it does."""
        with self._lock:
            return self.self_monitor.guest_silent_since_s

    def in_doubt(self) -> bool:
        """Whether the backup may rightly hold this host for dead."""
        with self._lock:
            return self.self_monitor.in_doubt(time.monotonic())
