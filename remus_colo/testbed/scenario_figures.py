# SPDX-License-Identifier: LGPL-2.1-or-later
"""Figures out of what a scenario left: the events of ``remus``, the gaps of the load.  Pure."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Event = Mapping[str, Any]


def checkpoints(events: Iterable[Event]) -> dict[str, int]:
    """Checkpoints by reason, most frequent first."""
    reasons = Counter(str(event["reason"]) for event in events if event["event"] == "checkpoint")
    return dict(reasons.most_common())


def pauses_ms(events: Iterable[Event]) -> list[float]:
    """How long the guest stood still at each checkpoint, but for the first, which copies all of it."""
    return [
        float(event["pause_ms"])
        for event in events
        if event["event"] == "checkpoint" and event["reason"] != "start"
    ]


def longest_round_ms(events: Iterable[Event]) -> float:
    """The longest time from one checkpoint to the next, 0 if there are not two.

    ``t`` is nanoseconds of one monotonic clock.
    """
    times = [int(event["t"]) for event in events if event["event"] == "checkpoint"]
    return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0) / 1e6


def released_share(events: Iterable[Event]) -> float | None:
    """Share of the compared packets that left without waiting for a checkpoint, 0 to 1; None if there were none.

    The counters are totals since the start of protection, so the last event has all that is known.
    """
    last: Event | None = None
    for event in events:
        if event["event"] == "counters":
            last = event
    if last is None:
        return None
    equal, commit = int(last["released_equal"]), int(last["released_commit"])
    return round(equal / (equal + commit), 4) if equal + commit else None


def quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that ``share`` (0 to 1) of all do not exceed; None if there are none."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def failover_s(gaps: Iterable[tuple[float, float]], killed_s: float, at_least_s: float) -> float | None:
    """From a host's death to the first reply of the guest's other copy; None if none came.

    A reply that was on its way when the host died still arrives, so the copy's first reply is the one that
    ends the gap: the first that is as long as any failover.

    :param gaps: of the whole load, as begin and end; CLOCK_MONOTONIC in seconds, as ``killed_s``.
    :param at_least_s: no failover is quicker.
    """
    ends = [end_s for start_s, end_s in gaps if end_s > killed_s and end_s - start_s >= at_least_s]
    return min(ends) - killed_s if ends else None


def table(rows: Sequence[Sequence[object]]) -> str:
    """Columns, aligned right; the first row is the heading.  None shows as a dash."""
    cells = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells
    )
