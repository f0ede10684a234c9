# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest survives the death of its host: ``python3 -m remus_colo.testbed.demo``.

Builds two Xen hosts in QEMU, protects a guest on one of them with ``remus --colo``, puts a client's load on it,
cuts that host's power, and shows what the client saw.  Ends by itself, and leaves nothing behind but the cache.

Exit status 0 only if the service survived, 1 if it did not, 3 if it could not be tried.  The last line is the
summary as one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from remus_colo.errors import RemusError
from remus_colo.testbed import load_report, machine, scenario_trial
from remus_colo.testbed.bed import Bed
from remus_colo.testbed.ending import exit_on_signals
from remus_colo.testbed.own_bed import new_bed
from remus_colo.testbed.scenario import Protection
from remus_colo.testbed.scenario_trial import Outcome, Plan

# The host dies at a random moment between these.
KILL_EARLIEST_S, KILL_LATEST_S = 10.0, 20.0
# From its death to the end of the load: enough for the failover, and to see that all goes on.
AFTERWARDS_S = 30.0


class Steps:
    """Says what is being done, and how long it took."""

    def __init__(self) -> None:
        self._begun_s = time.monotonic()

    @contextlib.contextmanager
    def __call__(self, what: str, how_long: str) -> Iterator[None]:
        begun_s = time.monotonic()
        print(f"[{begun_s - self._begun_s:5.0f} s] {what} ({how_long})", flush=True)
        yield
        print(f"          done in {time.monotonic() - begun_s:.0f} s", flush=True)


def summary(outcome: Outcome) -> dict[str, object]:
    """The stable form of the result."""
    load = outcome.load
    return {
        **{
            key: load[key]
            for key in ("requests", "errors", "wrong_bytes", "resets", "lost_writes", "longest_gap_ms")
        },
        "checkpoints": outcome.checkpoints,
        "released_without_checkpoint": outcome.released_without_checkpoint,
        "failover_ms": outcome.failover_ms,
    }


def story(outcome: Outcome) -> str:
    """The result for people."""
    load, counts = outcome.load, outcome.checkpoints
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts.items())
    share = outcome.released_without_checkpoint
    lines = [
        "",
        load_report.table(load),
        "",
        f"connections broken        {load['resets']} of {load['connections']}",
        f"wrong bytes               {load['wrong_bytes']}",
        f"acknowledged writes lost  {load['lost_writes']}",
        f"longest silence           {load['longest_gap_ms']:.0f} ms without a reply to anyone",
        f"failover                  {'-' if outcome.failover_ms is None else f'{outcome.failover_ms:.0f} ms'}"
        " from the host's death to the first reply",
        f"checkpoints               {sum(counts.values())} ({reasons}), {outcome.mode}",
        f"left without waiting      {'-' if share is None else f'{share:.1%}'} of the guest's packets",
        "",
    ]
    if outcome.faults:
        lines.append("The service did NOT survive: " + "; ".join(outcome.faults) + ".")
    else:
        lines.append("The service survived the death of its host.")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python3 -m remus_colo.testbed.demo", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--bed", default=f"demo-{os.getpid()}", metavar="NAME", help="name of the bed (demo-PID)"
    )
    parser.add_argument("--seed", type=int, help="for the moment of the host's death")
    parser.add_argument("--keep", action="store_true", help="leave the bed up, to look around")
    parser.add_argument(
        "--logs", type=Path, metavar="DIR", help="keep all logs there, not only those of a failure"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="          %(message)s", stream=sys.stdout)
    exit_on_signals()
    steps = Steps()
    try:
        with steps("installing what this machine lacks", "nothing, or 1 to 5 minutes the first time"):
            machine.setup()
        bed = new_bed(options.bed)
        try:
            outcome = _show(bed, random.Random(options.seed), steps, options.logs)
        finally:
            if options.keep:
                print(f"the bed is still up: python3 -m remus_colo.testbed --bed {bed.name} status")
            else:
                bed.down()
    except RemusError as error:
        print(f"demo: {error}", file=sys.stderr)
        return int(error.exit_status)
    except KeyboardInterrupt:
        print("demo: interrupted; nothing is left behind but the cache", file=sys.stderr)
        return 130
    print(story(outcome))
    print(json.dumps(summary(outcome)), flush=True)
    return 1 if outcome.faults else 0


def _show(bed: Bed, chance: random.Random, steps: Steps, logs: Path | None) -> Outcome:
    with steps(
        "booting two Xen hosts in QEMU", "15 to 60 s; the first time 3 minutes more, to build their images"
    ):
        bed.up()
    kill_after_s = chance.uniform(KILL_EARLIEST_S, KILL_LATEST_S)
    plan = Plan("primary", kill_after_s, kill_after_s + AFTERWARDS_S, load={"random_every": 5}, remus={})
    with Protection(bed) as protection:
        well = False
        try:
            outcome = scenario_trial.run(protection, plan, steps)
            well = not outcome.faults
        finally:
            if logs is not None or not well:
                protection.save_logs(logs or Path(tempfile.mkdtemp(prefix="remus_colo-demo-")))
        return outcome


if __name__ == "__main__":
    sys.exit(main())
