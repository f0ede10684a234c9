# SPDX-License-Identifier: LGPL-2.1-or-later
"""What became of the guest's packets under ``remus --colo``, and what the checkpoints were made for: ``python3 -m
remus_colo.testbed.verdicts``.

The load is that of the failovers (redis, HTTP, echo streams, short connections), UDP, and downloads of 10 MB beside it.
Prints a table, and as the last line one JSON object; exit status 1 if a client had something to complain of.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections import Counter
from typing import Any

from remus_colo.testbed import scenario_figures
from remus_colo.testbed.arguments import count, not_negative, positive, some
from remus_colo.testbed.bed import Bed
from remus_colo.testbed.ending import exit_on_signals, exit_status
from remus_colo.testbed.own_bed import own_bed
from remus_colo.testbed.scenario import Protection
from remus_colo.testbed.scenario_trial import LOAD, client_faults

# By counter of the comparator, in the order of the table.
_FATES = {
    "released_equal": "left at once: both VMs said the same",
    "released_passed": "left at once: not compared (ARP, neighbour discovery, ...)",
    "released_commit": "left with a checkpoint",
    "held": "held when the load had ended",
}
_NOT_A_DOWNLOAD = {"redis": 0, "echo": 0, "udp": 0, "rate": 0.0, "churn": 0.0}
# An emulated guest gives 10 MB in about a minute.
_DOWNLOAD_TIMEOUT_S = 600.0


def measure(
    bed: Bed, seconds: float, downloads: int, load: dict[str, Any], remus: dict[str, Any]
) -> dict[str, Any]:
    """Protect the guest, load it for so long, end protection.

    :param downloads: connections that fetch 10 MB again and again.
    :param load, remus: further options of either.
    """
    with Protection(bed) as protection:
        protection.ensure_guest()
        protection.start_daemon()
        run = protection.protect(**remus)
        big = protection.start_load(
            seconds,
            **_NOT_A_DOWNLOAD,
            http=downloads,
            sizes="10m",
            timeout=_DOWNLOAD_TIMEOUT_S,
            drain=_DOWNLOAD_TIMEOUT_S,
        )
        small = protection.load(seconds, **(LOAD | {"udp": 2} | load))
        large = big.result()
        protection.stop()
    counters = next(event for event in reversed(run.events) if event["event"] == "counters")
    asked = Counter(event["reason"] for event in run.events if event["event"] == "checkpoint-asked")
    return {
        "seconds": seconds,
        "mode": next(event["mode"] for event in run.events if event["event"] == "protected"),
        "requests": small["requests"],
        "downloads": large["requests"],
        "packets": {fate: counters[fate] for fate in _FATES},
        "released_without_checkpoint": scenario_figures.released_share(run.events),
        "checkpoints": scenario_figures.checkpoints(run.events),
        "asked_by_comparator": dict(asked.most_common()),
        "details": [event["detail"] for event in run.events if event["event"] == "checkpoint-asked"],
        "faults": client_faults(small) + client_faults(large),
    }


def report(found: dict[str, Any]) -> str:
    """The result for people."""
    all_packets = sum(found["packets"].values())
    all_checkpoints = sum(found["checkpoints"].values())
    packets = [
        (count, f"{count / all_packets:.2%}", _FATES[fate]) for fate, count in found["packets"].items()
    ]
    checkpoints = [
        (count, f"{count / all_checkpoints:.0%}", reason) for reason, count in found["checkpoints"].items()
    ]
    lines = [
        scenario_figures.table([("packets", "share", "fate"), *packets]),
        scenario_figures.table([("checkpoints", "share", "reason"), *checkpoints]),
        f"requests {found['requests']}, downloads of 10 MB {found['downloads']}, mode {found['mode']}",
        f"of what was compared, left without waiting for a checkpoint: {found['released_without_checkpoint']}",
    ]
    lines += [f"asked for: {detail}" for detail in found["details"][:20]]
    lines += [f"the client complains: {fault}" for fault in found["faults"]]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python3 -m remus_colo.testbed.verdicts", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add(
        "--seconds",
        type=positive,
        default=120.0,
        metavar="S",
        help="length of the load (default: %(default)s)",
    )
    add("--downloads", type=some, default=2, metavar="N",
        help="connections that fetch 10 MB files (default: %(default)s)")  # fmt: skip
    add("--rate", type=not_negative, default=LOAD["rate"], metavar="R",
        help="requests per second and connection of the others (default: %(default)s)")  # fmt: skip
    add("--random-every", type=not_negative, metavar="S",
        help="GET /random, which the VMs answer differently, each S seconds (never)")  # fmt: skip
    add("--checkpoint", choices=("transparent", "cooperative", "auto"), default="auto", help="as for remus")
    add("--period", type=count, metavar="MS", help="as for remus")
    add("--bed", default=f"verdicts-{os.getpid()}", metavar="NAME", help="name of the bed (verdicts-PID)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="    %(message)s", stream=sys.stdout)
    exit_on_signals()

    def body() -> int:
        load = {"rate": options.rate, "random_every": options.random_every}
        remus = {"checkpoint": options.checkpoint, "period": options.period}
        with own_bed(options.bed) as bed:
            found = measure(bed, options.seconds, options.downloads, load, remus)
        print(report(found))
        print(json.dumps(found), flush=True)
        return 1 if found["faults"] else 0

    return exit_status("verdicts", body)


if __name__ == "__main__":
    sys.exit(main())
