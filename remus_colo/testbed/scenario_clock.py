# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest's clocks over many checkpoints and failovers, from host to host and back: do they go on as if nothing were?

A program in the guest (``services/guest_clock.c``) reads its clocks 100 times a second from the beginning to the
end.  The guest is protected, its host loses its power, the other host's copy goes on, the dead host is booted (its
Xen clock begins anew) and becomes the backup, and so forth.  What the guest saw is then judged by what was measured
from outside: how long it was stopped, how long a takeover took, and how long the whole lasted.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remus_colo.testbed import scenario_figures
from remus_colo.testbed.bed import Bed
from remus_colo.testbed.errors import BedError
from remus_colo.testbed.guest_image import NAME as GUEST
from remus_colo.testbed.scenario import Protection, destroy_guests
from remus_colo.testbed.scenario_run import Run

log = logging.getLogger(__name__)

OTHER = {"primary": "backup", "backup": "primary"}
CHECKPOINT_TIMEOUT_S = 120.0
ACTIVE_TIMEOUT_S = 120.0
PERIOD_MS = 1000
COOPERATIVE_CHECKPOINTS = 20
# A guest that wakes up two hundred times a second takes half of an emulated host's one processor.
HEARTBEAT_TIMEOUT_MS = 8000
CLOCKS = ("monotonic", "realtime", "boottime")
# realtime and boottime are monotonic plus a constant to the kernel; they are read at most 1 ms apart, in this order.
SKEW_LIMIT_NS = 1_000_000
# Of a suspend, before its beginning is seen from outside, and after its end.
SUSPEND_SLACK_MS = 300.0
LARGEST_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Reading:
    """What the guest's program told, between two moments of this machine's CLOCK_MONOTONIC (ns)."""

    asked_ns: int
    answered_ns: int
    told: dict[str, Any]

    @property
    def ahead_ns(self) -> tuple[int, int]:
        """The guest's monotonic clock less this machine's: at least, at most."""
        now_ns = int(self.told["now"]["monotonic"])
        return now_ns - self.answered_ns, now_ns - self.asked_ns


@dataclass(frozen=True, slots=True)
class Leg:
    """The guest's life on one host under protection, and the end of that host.

    :ivar birth_ms: how long the guest was stopped when its twin was made.
    :ivar pauses_ms: how long at each checkpoint.
    :ivar stopped_ms: from the PVM's stop to its twin's start, by the guest's clock, at each checkpoint; empty if the
        twin did not get the guest's clock.
    :ivar takeover_ms: from the host's death until the other's copy was the guest.
    :ivar error_ms: how well the hosts had measured their clocks against each other, at the last checkpoint.
    :ivar shift_ms: how much further the guest's clock went than this machine's since the first reading: least, most.
    """

    host: str
    mode: str
    why: str
    checkpoints: int
    birth_ms: float
    pauses_ms: list[float]
    stopped_ms: list[float]
    takeover_ms: float
    error_ms: float
    shift_ms: tuple[float, float]


def read(protection: Protection, timer_ms: int) -> Reading:
    """Ask the guest what it saw; the first time, have it begin to look, every so many milliseconds."""
    asked_ns = time.monotonic_ns()
    body = protection.http_get(f"/clock?period_ms={timer_ms}")
    return Reading(asked_ns, time.monotonic_ns(), json.loads(body))


def leg(
    protection: Protection, host: str, checkpoints: int, first: Reading, timer_ms: int, remus: dict[str, Any]
) -> Leg:
    """Protect the guest that runs on ``host``, wait for so many checkpoints, kill the host, see the other take over."""
    other = OTHER[host]
    daemon = protection.start_daemon(other)
    run = protection.protect(GUEST, other, host=host, **remus)
    wait_checkpoints(run, checkpoints)
    killed_s = protection.kill(host)
    daemon.wait_event("active", ACTIVE_TIMEOUT_S)
    takeover_ms = (time.monotonic() - killed_s) * 1000
    after = read(protection, timer_ms)
    shift = tuple(
        round((a - b) / 1e6, 1) for a, b in zip(after.ahead_ns, reversed(first.ahead_ns), strict=True)
    )
    mode = next(event for event in run.events if event["event"] == "mode")
    clocks = [event for event in daemon.events if event["event"] == "clock"]
    return Leg(
        host=host,
        mode=str(mode["mode"]),
        why=str(mode["why"]),
        checkpoints=sum(scenario_figures.checkpoints(run.events).values()),
        birth_ms=next(
            float(event["pause_ms"]) for event in run.events if event["event"] == "resumed-in-place"
        ),
        pauses_ms=[float(event["pause_ms"]) for event in run.events if event["event"] == "checkpoint"],
        stopped_ms=[float(event["stopped_ms"]) for event in clocks],
        takeover_ms=round(takeover_ms, 1),
        error_ms=float(clocks[-1]["error_ms"] or 0.0) if clocks else 0.0,
        shift_ms=(shift[0], shift[1]),
    )


def wait_checkpoints(run: Run, count: int) -> None:
    """Wait until that many checkpoints were made.

    :raise BedTimeout: too long passed between one and the next.
    """
    place = 0
    for _ in range(count):
        event = run.wait_event("checkpoint", CHECKPOINT_TIMEOUT_S, after=place)
        place = run.events.index(event, place) + 1


def limit_ms(legs: Sequence[Leg]) -> float:
    """The longest time for which the guest may rightly have seen nothing: a pause, and a takeover besides."""
    pauses = [ms for one in legs for ms in (one.birth_ms, *one.pauses_ms, *one.stopped_ms)]
    return max(pauses, default=0.0) + max((one.takeover_ms for one in legs), default=0.0)


def slept_ms(leg: Leg) -> float:
    """How long, at most, the guest's monotonic clock stood still when its twin was made."""
    return leg.birth_ms + SUSPEND_SLACK_MS


def faults(told: dict[str, Any], legs: Sequence[Leg], wanted: str | None = None) -> list[str]:
    """What is wrong with the clocks that the guest saw.

    :param wanted: the mode that checkpoints had to be of; None if ``auto`` was free to take what works.
    """
    limit = limit_ms(legs)
    found = [
        f"the checkpoints on {one.host} were {one.mode}, not {wanted}: {one.why}"
        for one in legs
        if wanted is not None and one.mode != wanted
    ]
    found += [
        f"CLOCK_{name.upper()} went back {told['backward'][name]} times"
        for name in CLOCKS
        if told["backward"][name]
    ]
    # A guest that suspends itself counts that as sleep: its monotonic clock stands still, the others do not.
    # So does every guest once when its twin is made.
    if all(one.mode == "transparent" for one in legs):
        skew_limit_ns = SKEW_LIMIT_NS + sum(slept_ms(one) for one in legs) * 1e6
        found += [
            f"CLOCK_{name.upper()} moved by {(most - least) / 1e6:.3f} ms against CLOCK_MONOTONIC"
            for name, (_, least, most) in told["skew"].items()
            if most - least > skew_limit_ns
        ]
    if not told["together"]:
        found.append("the guest never read its clocks close enough together to compare them")
    for _, length_ns, late_ns in sorted(told["gaps"], key=lambda gap: -gap[1]):
        if length_ns / 1e6 > limit:
            found.append(f"CLOCK_MONOTONIC jumped by {length_ns / 1e6:.1f} ms, more than {limit:.1f} ms")
        elif late_ns / 1e6 > limit:
            found.append(f"a timer was {late_ns / 1e6:.1f} ms late, more than {limit:.1f} ms")
    if told["miscounted"] > 0:
        found.append(f"{told['miscounted']} expirations of the timer were lost or made up")
    allowed_ms = asleep_ms = 0.0
    for one in legs:
        if one.mode != "transparent" or not one.stopped_ms:
            break
        allowed_ms += one.error_ms
        asleep_ms += slept_ms(one)
        if one.shift_ms[0] > allowed_ms or one.shift_ms[1] < -allowed_ms - asleep_ms:
            found.append(
                f"after {one.host} died the guest's clock was off by {one.shift_ms} ms, not {allowed_ms:.1f} at most"
            )
    return found


def journey(
    protection: Protection,
    failovers: int,
    checkpoints: int,
    timer_ms: int,
    remus: dict[str, Any],
    note: Callable[[str], None],
) -> tuple[list[Leg], dict[str, Any]]:
    """The guest's whole way; the legs of it, and what its program told at the end."""
    protection.ensure_guest()
    first = read(protection, timer_ms)
    legs: list[Leg] = []
    host = "primary"
    for number in range(1, failovers + 1):
        made = leg(protection, host, math.ceil(checkpoints / failovers), first, timer_ms, remus)
        legs.append(made)
        note(
            f"{number}: {made.checkpoints} {made.mode} checkpoints on {host} ({made.why}), takeover after "
            f"{made.takeover_ms:.0f} ms, the guest's clock is {made.shift_ms} ms off"
        )
        if number < failovers:
            protection.bed.boot(host)
        host = OTHER[host]
    return legs, read(protection, timer_ms).told


def cooperative_pauses_ms(protection: Protection, checkpoints: int, remus: dict[str, Any]) -> list[float]:
    """Of a guest on the same hosts that suspends itself for each checkpoint, to lay beside the others."""
    protection.ensure_guest()
    daemon = protection.start_daemon()
    run = protection.protect(**(remus | {"checkpoint": "cooperative"}))
    wait_checkpoints(run, checkpoints)
    protection.stop()
    daemon.stop()
    destroy_guests(protection.bed)
    return scenario_figures.pauses_ms(run.events)


def run(
    bed: Bed, failovers: int, checkpoints: int, timer_ms: int, remus: dict[str, Any], directory: Path,
    wanted: str | None = None,
) -> tuple[dict[str, Any], bool]:  # fmt: skip
    """The whole of it in a bed that is up; the summary, and whether all went well.

    :param wanted: as for :func:`faults`.
    """
    with Protection(bed) as protection:
        remus = {"period": PERIOD_MS, "heartbeat_timeout": HEARTBEAT_TIMEOUT_MS} | remus
        wrong: list[str] = []
        legs: list[Leg] = []
        told: dict[str, Any] = {}
        try:
            cooperative = cooperative_pauses_ms(protection, COOPERATIVE_CHECKPOINTS, remus)
            legs, told = journey(protection, failovers, checkpoints, timer_ms, remus, log.info)
            wrong = faults(told, legs, wanted)
            print(report(legs, told))
            transparent = [ms for one in legs if one.mode == "transparent" for ms in one.pauses_ms[1:]]
            print("\n" + pauses_table({"co-operative": cooperative, "transparent": transparent}))
        except BedError as error:
            wrong.append(str(error))
        if wrong:
            protection.save_logs(directory)
        for fault in wrong:
            print(f"    {fault}", flush=True)
        found = {
            "kind": "clock",
            "legs": [dataclasses.asdict(one) for one in legs],
            "guest": told,
            "faults": wrong,
        }
        return found, not wrong


def pauses_table(pauses_ms: dict[str, list[float]]) -> str:
    """How long the guest stood still per checkpoint, by the kind of checkpoint."""
    rows: list[tuple[object, ...]] = [("pause per checkpoint", "of", "p50 ms", "p90 ms", "p99 ms")]
    for name, values in pauses_ms.items():
        rows.append(
            (name, len(values), *(scenario_figures.quantile(values, share) for share in (0.5, 0.9, 0.99)))
        )
    return scenario_figures.table(rows)


def report(legs: Sequence[Leg], told: dict[str, Any]) -> str:
    """For people."""

    def quantiles(values: list[float]) -> tuple[object, ...]:
        return tuple(scenario_figures.quantile(values, share) for share in (0.5, 0.99, 1.0))

    rows: list[tuple[object, ...]] = [("", "died", "mode", "checkpoints", "pause p50 ms", "p99", "max", "to twin p50 ms",
                                       "p99", "max", "takeover ms", "clock off ms")]  # fmt: skip
    for number, one in enumerate(legs, 1):
        rows.append((number, one.host, one.mode, one.checkpoints, *quantiles(one.pauses_ms), *quantiles(one.stopped_ms),
                     one.takeover_ms, f"{one.shift_ms[0]:g}..{one.shift_ms[1]:g}"))  # fmt: skip
    longest = sorted((gap[1] / 1e6 for gap in told["gaps"]), reverse=True)[:LARGEST_SHOWN]
    return "\n".join([
        scenario_figures.table(rows),
        f"readings by the guest: {told['samples']}; clocks went back: {told['backward']}",
        "its clocks moved against CLOCK_MONOTONIC: "
        + ", ".join(f"{name} {(most - least) / 1e6:.3f} ms" for name, (_, least, most) in told["skew"].items()),
        f"the longest steps of its clock: {', '.join(f'{ms:.0f}' for ms in longest)} ms; allowed: {limit_ms(legs):.0f} ms",
        f"its timer of {told['period_ns'] / 1e6:g} ms: {told['expirations']} expirations, {told['expected']} expected, "
        f"never more than {told['miscounted']} apart",
    ])  # fmt: skip
