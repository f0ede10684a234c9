# SPDX-License-Identifier: LGPL-2.1-or-later
"""Collects what the connections saw, writes the log, and makes the result.

Times are seconds of CLOCK_MONOTONIC, which all processes of the machine share, so that a log can be laid beside
the moment at which somebody cut a host's power.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TextIO

from remus_colo.testbed.load_check import Verdict
from remus_colo.testbed.load_stats import Gap, GapMeter, Histogram, ServiceStats, milliseconds

_COUNTS = (
    "requests", "errors", "wrong_bytes", "resets", "lost_writes", "repeated_writes", "unknown_writes",
    "lost_datagrams", "connections",
)  # fmt: skip
_COLUMNS = (
    "requests",
    "rate",
    "p50_ms",
    "p99_ms",
    "max_ms",
    "longest_gap_ms",
    "errors",
    "resets",
    "wrong_bytes",
)


@dataclasses.dataclass(slots=True)
class GuestClock:
    """How far the guest's clock strays from the client's at least, over all readings of ``/time``.

    The guest reads its clock at some moment between a request's departure and the reply's arrival, which may be far
    apart; the first reading is the zero.
    """

    readings: int = 0
    behind_s: float = 0.0
    ahead_s: float = 0.0
    _zero_ns: tuple[int, int] = (0, 0)

    def read(self, guest_ns: int, sent_s: float, arrived_s: float) -> None:
        lowest_ns, highest_ns = guest_ns - round(arrived_s * 1e9), guest_ns - round(sent_s * 1e9)
        if not self.readings:
            self._zero_ns = lowest_ns, highest_ns
        self.readings += 1
        self.behind_s = max(self.behind_s, (self._zero_ns[0] - highest_ns) / 1e9)
        self.ahead_s = max(self.ahead_s, (lowest_ns - self._zero_ns[1]) / 1e9)


class Recorder:
    """Everything that happened, per service and over all services.

    :param gap_limit_s: longer gaps go to the log.
    :param log: gets one JSON object per line, or None.
    """

    def __init__(self, services: list[str], gap_limit_s: float, log: TextIO | None) -> None:
        self.services = {name: ServiceStats() for name in services}
        self.clock = GuestClock()
        self.redis_verified: bool | None = None
        self._overall = GapMeter()
        self._gap_limit_s = gap_limit_s
        self._log = log
        self._run = ""
        self._begun_s = 0.0
        self._ended_s = 0.0

    def start(self, now_s: float, run: str) -> None:
        """The load begins: rates are over the time from here on.

        :param run: names the run in the log and in the result.
        """
        self._run = run
        self._begun_s = now_s
        self.event("start", now_s, run=run, services=list(self.services))

    def event(self, event: str, now_s: float, **details: object) -> None:
        """Writes a line to the log."""
        if self._log:
            self._log.write(json.dumps({"t": round(now_s, 6), "event": event, **details}) + "\n")
            self._log.flush()

    def begin(self, service: str, now_s: float) -> None:
        """A connection of ``service`` begins to wait for a reply."""
        self.services[service].gaps.begin(now_s)
        self._overall.begin(now_s)

    def end(self, service: str, now_s: float) -> None:
        """A connection of ``service`` waits no longer."""
        self.services[service].gaps.end(now_s)
        self._overall.end(now_s)

    def reply(self, service: str, now_s: float, latency_s: float) -> None:
        """A reply of ``service`` is complete."""
        stats = self.services[service]
        stats.requests += 1
        stats.latency.add(latency_s)
        self._gap(service, stats.gaps.reply(now_s))
        self._gap("all", self._overall.reply(now_s))

    def verdict(self, service: str, connection: str, verdict: Verdict, now_s: float) -> None:
        """Takes a check's findings; one that found a fault is an error."""
        stats = self.services[service]
        stats.wrong_bytes += verdict.wrong_bytes
        stats.lost_writes += verdict.lost_writes
        stats.repeated_writes += verdict.repeated_writes
        if verdict.fault:
            self.error(service, connection, "wrong", verdict.fault, now_s)

    def error(self, service: str, connection: str, kind: str, detail: str, now_s: float) -> None:
        self.services[service].errors[kind] += 1
        self.event("error", now_s, service=service, connection=connection, kind=kind, detail=detail)

    def close(self, now_s: float) -> None:
        """The load has ended: gaps still open end here, and so does the time that rates are over."""
        self._ended_s = now_s
        self.event("end", now_s, run=self._run)
        for service, stats in self.services.items():
            if gap := stats.gaps.close(now_s):
                self._gap(service, gap)
        if gap := self._overall.close(now_s):
            self._gap("all", gap)

    def progress(self, now_s: float) -> dict[str, object]:
        """The counts so far, small enough for a line each second."""
        totals = self._totals(now_s)
        return {
            "progress": True,
            "t": round(now_s, 6),
            "requests": totals["requests"],
            "errors": totals["errors"],
            "wrong_bytes": totals["wrong_bytes"],
            "open_gap_ms": milliseconds(self._overall.open_s(now_s)),
            "by_service": {name: stats.requests for name, stats in self.services.items()},
        }

    def result(self) -> dict[str, object]:
        """The result of the whole load, after :meth:`close`."""
        seconds = self._ended_s - self._begun_s
        latency = Histogram()
        for stats in self.services.values():
            latency.merge(stats.latency)
        gaps = self._overall.longest()
        result = self._totals(self._ended_s) | {
            "longest_gap_ms": milliseconds(gaps[0].duration_s if gaps else 0.0),
            "longest_gap_start_s": round(gaps[0].start_s, 6) if gaps else None,
            "p50_ms": milliseconds(latency.quantile_s(0.50)),
            "p99_ms": milliseconds(latency.quantile_s(0.99)),
            "max_ms": milliseconds(latency.longest_s),
            "redis_verified": self.redis_verified,
            "run": self._run,
            "seconds": round(seconds, 3),
            "begun_s": round(self._begun_s, 6),
            "ended_s": round(self._ended_s, 6),
            "gaps": [{"start_s": round(gap.start_s, 6), "ms": milliseconds(gap.duration_s)} for gap in gaps],
            "services": {name: stats.figures(seconds) for name, stats in self.services.items()},
        }
        if self.clock.readings:
            result["guest_clock"] = {
                "readings": self.clock.readings,
                "behind_ms": milliseconds(self.clock.behind_s),
                "ahead_ms": milliseconds(self.clock.ahead_s),
            }
        return result

    def _totals(self, now_s: float) -> dict[str, object]:
        seconds = now_s - self._begun_s
        each = [stats.figures(seconds) for stats in self.services.values()]
        totals: dict[str, object] = {name: sum(int(str(one[name])) for one in each) for name in _COUNTS}
        totals["rate"] = round(
            sum(stats.requests for stats in self.services.values()) / max(seconds, 1e-9), 2
        )
        return totals

    def _gap(self, service: str, gap: Gap) -> None:
        if gap.duration_s > self._gap_limit_s:
            end_s = gap.start_s + gap.duration_s
            start_s, ms = round(gap.start_s, 6), milliseconds(gap.duration_s)
            self.event("gap", end_s, service=service, start_s=start_s, ms=ms)


def clean(result: dict[str, object]) -> bool:
    """Whether a client had nothing to complain of: no error, no wrong byte, nothing lost or done twice.

    A load that completed no request is not clean: it has checked nothing.
    """
    faults = ("errors", "wrong_bytes", "resets", "lost_writes", "repeated_writes")
    return (
        result["redis_verified"] is not False
        and bool(result["requests"])
        and not any(result[f] for f in faults)
    )


def table(result: dict[str, object]) -> str:
    """The result for people."""
    services = result["services"]
    assert isinstance(services, dict)
    rows = [("", *(name.removesuffix("_ms") for name in _COLUMNS))]
    for name, figures in (*services.items(), ("all", result)):
        rows.append((name, *(str(figures[column]) for column in _COLUMNS)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.append("(times in milliseconds, rate in requests per second)")
    return "\n".join(lines)
