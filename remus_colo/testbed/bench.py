# SPDX-License-Identifier: LGPL-2.1-or-later
"""What protection costs: the same load on the unprotected guest and under ``remus --colo``, in one run.

``python3 -m remus_colo.testbed.bench``.  Emulated hosts are slow and noisy: the ratios say something, the times do
not.  Prints a table, and as the last line one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from typing import Any, NoReturn

from remus_colo.errors import RemusError
from remus_colo.testbed import machine, scenario_figures
from remus_colo.testbed.bed import Bed
from remus_colo.testbed.errors import BedError
from remus_colo.testbed.scenario import Protection
from remus_colo.testbed.scenario_load import Result

log = logging.getLogger(__name__)

_FIGURES = ("rate", "p50_ms", "p99_ms")


def measure(bed: Bed, rounds: int, seconds: float, load: dict[str, Any], remus: dict[str, Any]) -> dict[str, Any]:
    """Both kinds in turn, ``rounds`` times.

    :raise BedError: a load had something to complain of.
    """
    results: dict[str, list[Result]] = {"unprotected": [], "colo": []}
    events: list[dict[str, Any]] = []
    shares = []
    with Protection(bed) as protection:
        protection.ensure_guest()
        protection.start_daemon()
        for number in range(1, rounds + 1):
            log.info("round %d: unprotected", number)
            results["unprotected"].append(protection.load(seconds, **load))
            log.info("round %d: remus --colo", number)
            run = protection.protect(**remus)
            results["colo"].append(protection.load(seconds, **load))
            protection.stop()
            events += run.events
            shares.append(scenario_figures.released_share(run.events))
    for kind, found in results.items():
        for result in found:
            if result["errors"]:
                raise BedError(f"the load on the {kind} guest saw {result['errors']} errors: nothing to be compared")
    pauses = scenario_figures.pauses_ms(events)
    known = [share for share in shares if share is not None]
    return {
        "rounds": rounds,
        "seconds": seconds,
        **{kind: figures(found) for kind, found in results.items()},
        "checkpoints": scenario_figures.checkpoints(events),
        "pause_ms": {
            "count": len(pauses),
            "p50": scenario_figures.quantile(pauses, 0.5),
            "p99": scenario_figures.quantile(pauses, 0.99),
        },
        "released_without_checkpoint": round(sum(known) / len(known), 4) if known else None,
    }


def figures(results: list[Result]) -> dict[str, dict[str, float]]:
    """Rate and latencies by service, ``all`` for all of them: the mean of the rounds."""
    services = {"all": results, **{name: [r["services"][name] for r in results] for name in results[0]["services"]}}
    return {
        name: {key: round(sum(one[key] for one in found) / len(found), 3) for key in _FIGURES}
        for name, found in services.items()
    }


def report(found: dict[str, Any]) -> str:
    """The result for people."""
    rows: list[tuple[object, ...]] = [
        ("", "unprotected/s", "colo/s", "ratio", "p50 ms", "colo p50", "p99 ms", "colo p99")
    ]
    for name, plain in found["unprotected"].items():
        colo = found["colo"][name]
        ratio = round(colo["rate"] / plain["rate"], 2) if plain["rate"] else None
        rows.append((name, plain["rate"], colo["rate"], ratio, plain["p50_ms"], colo["p50_ms"], plain["p99_ms"],
                     colo["p99_ms"]))  # fmt: skip
    pause = found["pause_ms"]
    counts = ", ".join(f"{reason} {count}" for reason, count in found["checkpoints"].items())
    return "\n".join([
        scenario_figures.table(rows),
        f"checkpoints: {counts}",
        f"pause per checkpoint: p50 {pause['p50']} ms, p99 {pause['p99']} ms ({pause['count']} of them)",
        f"left without waiting for a checkpoint: {found['released_without_checkpoint']}",
    ])  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m remus_colo.testbed.bench", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, default=2, metavar="N", help="how often both are measured (default: %(default)s)")
    add("--seconds", type=float, default=30.0, metavar="S", help="length of each load (default: %(default)s)")
    add("--rate", type=float, default=0.0, metavar="R",
        help="requests per second and connection, 0 for as fast as replies come (default: %(default)s)")  # fmt: skip
    add("--checkpoint", choices=("transparent", "cooperative", "auto"), default="auto", help="as for remus")
    add("--period", type=int, metavar="MS", help="as for remus")
    add("--bed", default=f"bench-{os.getpid()}", metavar="NAME", help="name of the bed (bench-PID)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="    %(message)s", stream=sys.stdout)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit_on_signal)
    try:
        machine.setup()
        bed = Bed(options.bed)
        if bed.directory.exists():
            raise BedError(f"the bed '{bed.name}' exists: take another name, or take it down first")
        try:
            bed.up()
            remus = {"checkpoint": options.checkpoint, "period": options.period}
            found = measure(bed, options.rounds, options.seconds, {"rate": options.rate}, remus)
        finally:
            bed.down()
    except RemusError as error:
        print(f"bench: {error}", file=sys.stderr)
        return int(error.exit_status)
    except KeyboardInterrupt:
        return 130
    print(report(found))
    print(json.dumps(found), flush=True)
    return 0


def _exit_on_signal(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
