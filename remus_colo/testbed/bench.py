# SPDX-License-Identifier: LGPL-2.1-or-later
"""What protection costs, beside the unprotected guest and beside Xen's own ``xl remus``.

In one run: the same load on the unprotected guest, under ``remus --colo`` and under ``remus`` without it; and how long
the guest stands still for a checkpoint, beside ``xl remus``.

``python3 -m remus_colo.testbed.bench``.  Emulated hosts are slow and noisy: the ratios say something, the times do
not.  Prints a table, and as the last line one JSON object.  Exit status 0 only if no load saw an error.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from typing import Any

from remus_colo.testbed import scenario_figures, scenario_standstill
from remus_colo.testbed.arguments import count, not_negative, positive, some
from remus_colo.testbed.bed import Bed
from remus_colo.testbed.ending import exit_on_signals, exit_status
from remus_colo.testbed.own_bed import own_bed
from remus_colo.testbed.scenario import Protection
from remus_colo.testbed.scenario_load import Result

log = logging.getLogger(__name__)

_FIGURES = ("rate", "p50_ms", "p99_ms")
INTERVALS_MS = (200, 25)
# The last answers wait for a checkpoint, and a segment that was lost before for TCP to repeat it.
DRAIN_S = 60.0
UNPROTECTED, COLO = "unprotected", "colo"


def remus_kind(interval_ms: int) -> str:
    return f"remus {interval_ms} ms"


def measure(
    bed: Bed, rounds: int, seconds: float, load: dict[str, Any], remus: dict[str, Any]
) -> dict[str, Any]:
    """All kinds in turn, ``rounds`` times."""
    kinds = (UNPROTECTED, COLO, *(remus_kind(interval_ms) for interval_ms in INTERVALS_MS))
    results: dict[str, list[Result]] = {kind: [] for kind in kinds}
    events: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    shares = []
    with Protection(bed) as protection:
        protection.ensure_guest()
        protection.start_daemon()
        for number in range(1, rounds + 1):
            log.info("round %d: unprotected", number)
            results[UNPROTECTED].append(protection.load(seconds, **load))
            log.info("round %d: remus --colo", number)
            run = protection.protect(**remus)
            results[COLO].append(protection.load(seconds, **load))
            protection.stop()
            events[COLO] += run.events
            shares.append(scenario_figures.released_share(run.events))
            for interval_ms in INTERVALS_MS:
                kind = remus_kind(interval_ms)
                log.info("round %d: %s", number, kind)
                run = protection.protect(colo=False, interval=interval_ms)
                results[kind].append(protection.load(seconds, **load))
                protection.stop()
                events[kind] += run.events
        standstill = scenario_standstill.compare(protection, INTERVALS_MS, seconds)
    known = [share for share in shares if share is not None]
    return {
        "rounds": rounds,
        "seconds": seconds,
        "errors": {
            kind: errors for kind, found in results.items() if (errors := sum(r["errors"] for r in found))
        },
        **{kind: figures(found) for kind, found in results.items()},
        "checkpoints": scenario_figures.checkpoints(events[COLO]),
        "pause_ms": pauses(events[COLO]),
        "remus_pause_ms": {kind: pauses(events[kind]) for kind in kinds if kind not in (UNPROTECTED, COLO)},
        "standstill_ms": standstill,
        "released_without_checkpoint": round(sum(known) / len(known), 4) if known else None,
    }


def pauses(events: list[dict[str, Any]]) -> dict[str, Any]:
    found = scenario_figures.pauses_ms(events)
    return {
        "count": len(found),
        "p50": scenario_figures.quantile(found, 0.5),
        "p99": scenario_figures.quantile(found, 0.99),
    }


def figures(results: list[Result]) -> dict[str, dict[str, float]]:
    """Rate and latencies by service, ``all`` for all of them: the mean of the rounds."""
    services = {
        "all": results,
        **{name: [r["services"][name] for r in results] for name in results[0]["services"]},
    }
    return {
        name: {key: round(sum(one[key] for one in found) / len(found), 3) for key in _FIGURES}
        for name, found in services.items()
    }


def report(found: dict[str, Any]) -> str:
    """The result for people."""
    kinds = [kind for kind in found if isinstance(found[kind], dict) and "all" in found[kind]]
    rows: list[tuple[object, ...]] = [
        ("", *(f"{kind}/s" for kind in kinds), *(f"{kind} p50 ms" for kind in kinds))
    ]
    for name in found[UNPROTECTED]:
        rows.append(
            (
                name,
                *(found[kind][name]["rate"] for kind in kinds),
                *(found[kind][name]["p50_ms"] for kind in kinds),
            )
        )
    plain = found[UNPROTECTED]["all"]["rate"]
    ratios = ", ".join(
        f"{kind} {found[kind]['all']['rate'] / plain:.2f}" for kind in kinds if plain and kind != UNPROTECTED
    )
    counts = ", ".join(f"{reason} {count}" for reason, count in found["checkpoints"].items())
    lines = [
        scenario_figures.table(rows),
        f"rate, of the unprotected guest's: {ratios}",
        f"checkpoints of COLO: {counts}",
    ]
    for kind, pause in ((COLO, found["pause_ms"]), *found["remus_pause_ms"].items()):
        lines.append(
            f"pause per checkpoint, {kind}: p50 {pause['p50']} ms, p99 {pause['p99']} ms ({pause['count']} of them)"
        )
    for interval_ms, by_tool in found["standstill_ms"].items():
        for tool, seen in by_tool.items():
            lines.append(
                f"standstill that a client sees, {tool} -i {interval_ms}: p50 {seen['p50']} ms, "
                f"p99 {seen['p99']} ms ({seen['count']} of them, {seen['share']:.0%} of the time)"
            )
            stopped = seen["stopped"]
            lines.append(
                f"domain stopped, as Xen has it, {tool} -i {interval_ms}: p50 {stopped['p50']} ms, "
                f"p99 {stopped['p99']} ms ({stopped['count']} of them; looked at every {stopped['resolution_ms']} ms)"
            )
    lines.append(f"left without waiting for a checkpoint, COLO: {found['released_without_checkpoint']}")
    for kind, errors in found["errors"].items():
        lines.append(f"the load on the {kind} guest saw {errors} errors: its figures are not to be compared")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python3 -m remus_colo.testbed.bench", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add(
        "--rounds",
        type=some,
        default=2,
        metavar="N",
        help="how often both are measured (default: %(default)s)",
    )
    add(
        "--seconds",
        type=positive,
        default=30.0,
        metavar="S",
        help="length of each load (default: %(default)s)",
    )
    add("--rate", type=not_negative, default=0.0, metavar="R",
        help="requests per second and connection, 0 for as fast as replies come (default: %(default)s)")  # fmt: skip
    add("--checkpoint", choices=("transparent", "cooperative", "auto"), default="auto", help="as for remus")
    add("--period", type=count, metavar="MS", help="as for remus")
    add("--bed", default=f"bench-{os.getpid()}", metavar="NAME", help="name of the bed (bench-PID)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="    %(message)s", stream=sys.stdout)
    exit_on_signals()

    def body() -> int:
        remus = {"checkpoint": options.checkpoint, "period": options.period}
        with own_bed(options.bed) as bed:
            load = {"rate": options.rate, "drain": DRAIN_S}
            found = measure(bed, options.rounds, options.seconds, load, remus)
        print(report(found))
        print(json.dumps(found), flush=True)
        return 1 if found["errors"] else 0

    return exit_status("bench", body)


if __name__ == "__main__":
    sys.exit(main())
