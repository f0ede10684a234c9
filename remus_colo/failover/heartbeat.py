# SPDX-License-Identifier: LGPL-2.1-or-later
"""When to send a heartbeat, whether the peer is silent, and whether it may think that we are.

Pure: time is an argument, in seconds of a clock that never goes back (``time.monotonic()``).
"""

from __future__ import annotations

from remus_colo.errors import ConfigError


def _positive(name: str, value_s: float) -> float:
    if not value_s > 0:
        raise ConfigError(f"{name} must be more than 0 s, got {value_s}")
    return value_s


class PeerMonitor:
    """Whether the peer has been silent for too long.

    Anything that arrives is a beat, not only HEARTBEAT: a channel full of pages must not look dead.

    NB: after we were frozen ourselves, the peer's beats lie unread in the socket.  Read it empty, then ask
    :meth:`expired`; never the other way round.

    :param timeout_s: silence for longer than this means that the peer is lost.
    :param least_s: so does silence for longer than this, if somebody has waited for the peer for longer than `timeout_s`:
        they may have waited while it lived.
    """

    def __init__(self, timeout_s: float, least_s: float | None = None) -> None:
        self.timeout_s = _positive("the heartbeat time-out", timeout_s)
        self.least_s = (
            timeout_s if least_s is None else _positive("the shortest silence that counts", least_s)
        )
        self._last_s: float | None = None

    def beat(self, now_s: float) -> None:
        """The peer was heard. An earlier time than that of the last beat changes nothing."""
        if self._last_s is None or now_s > self._last_s:
            self._last_s = now_s

    def deadline_s(self, waiting_since_s: float | None = None) -> float | None:
        """When the peer will be lost unless it is heard; None before its first beat.

        :param waiting_since_s: since when somebody waits for it; None if nobody does.
        """
        if self._last_s is None:
            return None
        deadline_s = self._last_s + self.timeout_s
        if waiting_since_s is None:
            return deadline_s
        return min(deadline_s, max(self._last_s + self.least_s, waiting_since_s + self.timeout_s))

    def silence_s(self, now_s: float) -> float:
        """How long the peer has been silent; 0 before its first beat."""
        return 0.0 if self._last_s is None else max(0.0, now_s - self._last_s)

    def expired(self, now_s: float, waiting_since_s: float | None = None) -> bool:
        """:param waiting_since_s: see :meth:`deadline_s`."""
        deadline_s = self.deadline_s(waiting_since_s)
        return deadline_s is not None and now_s > deadline_s


class Pacer:
    """When the next heartbeat is due. Beats missed while we did not run are not made up for."""

    def __init__(self, interval_s: float) -> None:
        self.interval_s = _positive("the heartbeat interval", interval_s)
        self._next_s: float | None = None

    def due(self, now_s: float) -> bool:
        """True once per interval; at once when asked for the first time."""
        if self._next_s is not None and now_s < self._next_s:
            return False
        self._next_s = now_s + self.interval_s
        return True

    @property
    def next_s(self) -> float | None:
        return self._next_s


class SelfMonitor:
    """Whether the backup may rightly hold *us* for dead, because we did not run, or our guest answered nobody.

    The primary asks this when it has lost the backup: if its own heartbeats went out on time, and who asked its guest
    was answered, no truthful arbiter can have given the guest to the backup, and the PVM may go on alone.  If not (the
    host was frozen, the process starved, the guest stood still), the backup may be active by now, and releasing output
    would show clients a second history.

    A doubt ends when the backup says that it has seen a heartbeat sent after the gap, and that it has not
    begun to arbitrate.

    :param limit_s: the longest gap between two of our heartbeats that the backup surely bears with:
        its time-out less what a heartbeat can be late.
    :ivar guest_limit_s: the longest silence of the guest's that it surely bears with: less than it looks for the guest.
    :ivar guest_silent_since_s: since when the guest answers nobody; None if it does.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = _positive("the longest gap between heartbeats", limit_s)
        self.guest_limit_s = limit_s
        self._last_s: float | None = None
        self._last_sequence = 0
        self._unseen_from: int | None = None
        self.guest_silent_since_s: float | None = None

    def sent(self, sequence: int, now_s: float) -> None:
        """Heartbeat ``sequence`` has gone out."""
        if self._late(now_s) and self._unseen_from is None:
            self._unseen_from = sequence
        self._last_s = now_s
        self._last_sequence = sequence

    def guest_silent(self, since_s: float) -> None:
        """The guest stands still, or hears nobody: it answers no one who looks for it.

        :param since_s: since then; a later call knows better.
        """
        self.guest_silent_since_s = since_s

    def guest_answers(self, now_s: float) -> None:
        """It does again. Idempotent."""
        if self._guest_missed(now_s) and self._unseen_from is None:
            self._unseen_from = self._last_sequence + 1
        self.guest_silent_since_s = None

    def seen(self, sequence: int) -> None:
        """The backup has seen our heartbeat ``sequence``.

        To be called only for a HEARTBEAT of a backup that is in none of the states
        :data:`~remus_colo.failover.backup.DECIDING`: one that has begun to decide no longer listens.
        """
        if self._unseen_from is not None and sequence >= self._unseen_from:
            self._unseen_from = None

    def in_doubt(self, now_s: float) -> bool:
        return self._unseen_from is not None or self._late(now_s) or self._guest_missed(now_s)

    def _guest_missed(self, now_s: float) -> bool:
        return (
            self.guest_silent_since_s is not None and now_s - self.guest_silent_since_s > self.guest_limit_s
        )

    def _late(self, now_s: float) -> bool:
        return self._last_s is not None and now_s - self._last_s > self.limit_s
