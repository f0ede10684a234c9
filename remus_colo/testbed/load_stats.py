# SPDX-License-Identifier: LGPL-2.1-or-later
"""The load's figures: latencies, gaps, counts.  Pure; times are arguments, in seconds of one monotonic clock."""

from __future__ import annotations

import collections
import dataclasses
import math


class Histogram:
    """Durations in buckets 2 % wide, so that hours of load take no more memory than seconds."""

    _GROWTH = math.log(1.02)
    _SMALLEST_S = 1e-6

    def __init__(self) -> None:
        self._counts: collections.Counter[int] = collections.Counter()
        self.count = 0
        self.longest_s = 0.0

    def add(self, duration_s: float) -> None:
        self._counts[int(math.log(max(duration_s / self._SMALLEST_S, 1.0)) / self._GROWTH)] += 1
        self.count += 1
        self.longest_s = max(self.longest_s, duration_s)

    def merge(self, other: Histogram) -> None:
        self._counts.update(other._counts)
        self.count += other.count
        self.longest_s = max(self.longest_s, other.longest_s)

    def quantile_s(self, share: float) -> float:
        """The duration that ``share`` (0 to 1) of all do not exceed, at most 2 % too high; 0 if there are none."""
        rank = share * self.count
        passed = 0
        for bucket in sorted(self._counts):
            passed += self._counts[bucket]
            if passed >= rank:
                return min(self._SMALLEST_S * math.exp((bucket + 1) * self._GROWTH), self.longest_s)
        return 0.0


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Gap:
    """A time without a reply although at least one was waited for."""

    duration_s: float
    start_s: float


class GapMeter:
    """Finds the gaps between replies, as seen by all who wait.

    Whoever begins to wait goes on waiting until a reply of its own ends that: a broken connection ends nothing, so
    an outage counts in full even if every connection dies in it.
    """

    _KEPT = 10

    def __init__(self) -> None:
        self._waiting = 0
        self._since_s = 0.0
        self._longest: list[Gap] = []

    def begin(self, now_s: float) -> None:
        """One more waits for a reply."""
        if self._waiting == 0:
            self._since_s = now_s
        self._waiting += 1

    def reply(self, now_s: float) -> Gap:
        """A reply came; returns the gap that it ended."""
        gap = self._keep(now_s)
        self._since_s = now_s
        return gap

    def end(self, now_s: float) -> None:
        """One who waited waits no longer, with or without a reply of its own."""
        self._waiting -= 1
        if self._waiting == 0 and now_s > self._since_s:
            self._keep(now_s)

    def open_s(self, now_s: float) -> float:
        """How long there has been no reply, 0 if none is waited for."""
        return now_s - self._since_s if self._waiting else 0.0

    def close(self, now_s: float) -> Gap | None:
        """The load ends; returns the gap that no reply has ended."""
        return self._keep(now_s) if self._waiting else None

    def longest(self) -> list[Gap]:
        """The longest gaps, longest first."""
        return list(self._longest)

    def _keep(self, now_s: float) -> Gap:
        gap = Gap(now_s - self._since_s, self._since_s)
        if len(self._longest) < self._KEPT or gap > self._longest[-1]:
            self._longest = sorted([*self._longest, gap], reverse=True)[: self._KEPT]
        return gap


@dataclasses.dataclass(slots=True)
class ServiceStats:
    """What one service's connections saw.

    :ivar requests: requests that were answered, right or wrong.
    :ivar errors: everything that a client would call a failure, by kind; resets are among them.
    """

    requests: int = 0
    wrong_bytes: int = 0
    lost_writes: int = 0
    repeated_writes: int = 0
    unknown_writes: int = 0
    lost_datagrams: int = 0
    connections: int = 0
    errors: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    latency: Histogram = dataclasses.field(default_factory=Histogram)
    gaps: GapMeter = dataclasses.field(default_factory=GapMeter)

    #: Kinds of error that mean: the peer ended an established connection.
    RESETS = ("reset", "eof")

    def figures(self, seconds: float) -> dict[str, object]:
        """The figures as the result names them."""
        longest = self.gaps.longest()
        return {
            "requests": self.requests,
            "errors": self.errors.total(),
            "wrong_bytes": self.wrong_bytes,
            "resets": sum(self.errors[kind] for kind in self.RESETS),
            "lost_writes": self.lost_writes,
            "repeated_writes": self.repeated_writes,
            "unknown_writes": self.unknown_writes,
            "lost_datagrams": self.lost_datagrams,
            "connections": self.connections,
            "longest_gap_ms": milliseconds(longest[0].duration_s if longest else 0.0),
            "longest_gap_start_s": round(longest[0].start_s, 6) if longest else None,
            "rate": round(self.requests / seconds, 2) if seconds > 0 else 0.0,
            "p50_ms": milliseconds(self.latency.quantile_s(0.50)),
            "p99_ms": milliseconds(self.latency.quantile_s(0.99)),
            "max_ms": milliseconds(self.latency.longest_s),
            "error_kinds": dict(self.errors),
        }


def milliseconds(duration_s: float) -> float:
    return round(duration_s * 1e3, 3)
