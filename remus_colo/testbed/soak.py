# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many failovers in a row, or many checkpoints: ``python3 -m remus_colo.testbed.soak -n 10 --kind primary``.

``primary`` and ``backup`` kill that host at a random moment under load, ``mixed`` the two in turn, each time with
both hosts booted anew; ``memory`` kills nobody, but goes on until so many checkpoints are made, and looks for what
grows; ``clock`` lets a guest fail over from host to host and back, and looks at its clocks.  Prints a table, and as the
last line one JSON object.  Exit status 0 only if nothing went wrong; the logs of what did are kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from remus_colo.testbed import machine, scenario_clock, scenario_endurance, scenario_trial
from remus_colo.testbed.arguments import finite, some
from remus_colo.testbed.bed import DEFAULT_RELEASE, RELEASES, Bed, Options
from remus_colo.testbed.ending import exit_on_signals, exit_status
from remus_colo.testbed.errors import BedError
from remus_colo.testbed.host_config import HEARTBEAT_TIMEOUT_MS
from remus_colo.testbed.scenario import Protection, fresh
from remus_colo.testbed.scenario_figures import table
from remus_colo.testbed.scenario_trial import Outcome, Plan

KINDS = ("primary", "backup", "mixed", "memory", "clock")
DEFAULT_COUNT = {"memory": 300, "clock": 5}
KILL_EARLIEST_S, KILL_LATEST_S = 2.0, 25.0
AFTERWARDS_S = 20.0
_HEADING = ("", "killed", "at s", "mode", "requests", "errors", "resets", "wrong", "lost", "repeated", "gap ms",
            "failover ms", "checkpoints", "released", "verdict")  # fmt: skip

log = logging.getLogger(__name__)


def _row(number: int, plan: Plan, outcome: Outcome | None) -> tuple[object, ...]:
    if outcome is None:
        return (number, plan.kind, round(plan.kill_after_s, 1), *([None] * 11), "not tried")
    load = outcome.load
    return (
        number, plan.kind, round(plan.kill_after_s, 1), outcome.mode, load["requests"], load["errors"], load["resets"],
        load["wrong_bytes"], load["lost_writes"], load["repeated_writes"], round(load["longest_gap_ms"]),
        outcome.failover_ms, sum(outcome.checkpoints.values()), outcome.released_without_checkpoint,
        "FAILED" if outcome.faults else "ok",
    )  # fmt: skip


def failovers(bed: Bed, options: argparse.Namespace, directory: Path) -> tuple[dict[str, Any], bool]:
    """The series; its summary, and whether all went well."""
    chance = random.Random(options.seed)
    rows: list[tuple[object, ...]] = [_HEADING]
    runs = []
    for number in range(1, options.n + 1):
        kind = options.kind if options.kind != "mixed" else ("primary", "backup")[number % 2]
        after_s = chance.uniform(KILL_EARLIEST_S, KILL_LATEST_S)
        load = {"random_every": 5, "udp": 2}
        plan = Plan(
            kind,
            after_s,
            after_s + AFTERWARDS_S,
            load,
            _remus_options(options),
            options.mode == "colo",
            options.guest,
        )
        outcome, faults = _try(bed, options, plan, directory / f"{number}")
        rows.append(_row(number, plan, outcome))
        figures = {"number": number, "kind": kind, "kill_after_s": round(after_s, 2), "faults": faults}
        if outcome is not None:
            figures |= {
                "mode": outcome.mode,
                **{key: outcome.load[key] for key in ("requests", "errors", "resets", "wrong_bytes", "lost_writes",
                                                      "repeated_writes", "longest_gap_ms")},
                "failover_ms": outcome.failover_ms, "checkpoints": outcome.checkpoints,
                "released_without_checkpoint": outcome.released_without_checkpoint,
            }  # fmt: skip
        runs.append(figures)
        print(table([_HEADING, rows[-1]]), flush=True)
        for fault in faults:
            print(f"    {fault}", flush=True)
    print("\n" + table(rows))
    failed = [run["number"] for run in runs if run["faults"]]
    found = {
        "mode": options.mode,
        "guest": options.guest,
        "kind": options.kind,
        "seed": options.seed,
        "skew_s": options.skew,
        "failed": failed,
        "runs": runs,
        "heartbeat_timeout_ms": HEARTBEAT_TIMEOUT_MS,
    }
    return found, not failed


def _try(
    bed: Bed, options: argparse.Namespace, plan: Plan, directory: Path
) -> tuple[Outcome | None, list[str]]:
    """One failover with both hosts booted anew."""
    fresh(
        bed,
        Options(
            xen=options.xen, release=options.release, skew_s=options.skew, device_model=options.guest == "hvm"
        ),
    )
    with Protection(bed) as protection:
        outcome = None
        try:
            outcome = scenario_trial.run(protection, plan)
            faults = outcome.faults
        except BedError as error:
            faults = [str(error)]
        if faults:
            protection.save_logs(directory)
        return outcome, faults


def _remus_options(options: argparse.Namespace) -> dict[str, Any]:
    given = {"checkpoint": options.checkpoint, "interval": options.interval}
    return {name: value for name, value in given.items() if value}


def wanted_mode(xen: str, checkpoint: str | None) -> str | None:
    """The mode of all checkpoints of a bed with that Xen; None if it depends on how far apart the hosts' clocks are.

    A patched Xen that is not made use of would pass for one that works: co-operative checkpoints keep a guest's clocks
    right, too.
    """
    if checkpoint in ("transparent", "cooperative"):
        return checkpoint
    return "transparent" if xen == "patched" else None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, with the number of rounds and the seed filled in."""
    parser = argparse.ArgumentParser(
        prog="python3 -m remus_colo.testbed.soak", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add("-n", type=some, metavar="N", help="failovers (10, clock: 5), or checkpoints (300) for memory")
    add("--kind", choices=KINDS, default="primary", help="what happens (default: %(default)s)")
    add(
        "--bed",
        default=f"soak-{os.getpid()}",
        metavar="NAME",
        help="bed to use; made anew each time (soak-PID)",
    )
    add("--seed", type=int, default=None, help="of the random moments; printed, to repeat a run")
    add("--skew", type=finite, default=0.0, metavar="S", help="backup's Xen time minus primary's")
    add(
        "--checkpoints",
        type=some,
        default=100,
        metavar="N",
        help="all in all, for clock (default: %(default)s)",
    )
    add(
        "--timer",
        type=some,
        default=10,
        metavar="MS",
        help="of the guest's watch, for clock (default: %(default)s)",
    )
    add("--xen", default="debian", metavar="XEN", help="as for the bed's up: 'debian', 'patched' or a file")
    add("--release", choices=RELEASES, default=DEFAULT_RELEASE, help="as for the bed's up (%(default)s)")
    add("--checkpoint", choices=("transparent", "cooperative", "auto"), help="as for remus")
    add(
        "--mode",
        choices=("colo", "remus"),
        default="colo",
        help="how the guest is protected (default: %(default)s)",
    )
    add("--interval", type=some, metavar="MS", help="as for remus, without COLO")
    add(
        "--guest",
        choices=("pvh", "pv", "hvm"),
        default="pvh",
        help="its kind; pv and hvm only without COLO (default: %(default)s)",
    )
    add(
        "--logs",
        type=Path,
        metavar="DIR",
        help="where to keep the logs of what went wrong (a new directory in /tmp)",
    )
    options = parser.parse_args(arguments)
    if options.mode == "remus" and options.kind in ("memory", "clock"):
        parser.error(f"--kind {options.kind} is about COLO")
    if options.mode == "colo" and options.guest != "pvh":
        parser.error(f"COLO does not take {options.guest.upper()} guests: give --mode remus")
    options.n = options.n or DEFAULT_COUNT.get(options.kind, 10)
    options.seed = int(time.time()) if options.seed is None else options.seed
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status."""
    options = parse(arguments)
    directory = options.logs or Path(tempfile.mkdtemp(prefix="remus_colo-soak-"))
    logging.basicConfig(level=logging.INFO, format="    %(message)s", stream=sys.stdout)
    exit_on_signals()
    print(
        f"{options.n} of kind {options.kind}, seed {options.seed}; logs of what goes wrong: {directory}",
        flush=True,
    )

    def body() -> int:
        machine.setup()
        bed = Bed(options.bed)
        try:
            if options.kind == "memory":
                fresh(bed, Options(xen=options.xen, release=options.release, skew_s=options.skew))
                found, well = scenario_endurance.run(bed, options.n, _remus_options(options), directory)
            elif options.kind == "clock":
                fresh(bed, Options(xen=options.xen, release=options.release, skew_s=options.skew))
                found, well = scenario_clock.run(
                    bed, options.n, options.checkpoints, options.timer, _remus_options(options), directory,
                    wanted_mode(options.xen, options.checkpoint),
                )  # fmt: skip
            else:
                found, well = failovers(bed, options, directory)
        finally:
            bed.down()
        print(json.dumps(found), flush=True)
        return 0 if well else 1

    return exit_status("soak", body)


if __name__ == "__main__":
    sys.exit(main())
