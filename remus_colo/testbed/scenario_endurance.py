# SPDX-License-Identifier: LGPL-2.1-or-later
"""Protection over many checkpoints under a mixed load: does the guest get stuck, is a page stale, does anything grow?

Stale pages are looked for by ``remus --verify``, which compares all memory of both VMs before the SVM is let run.

What is counted on both hosts, after each piece of the load: memory that dom0 can still use, memory and open files of
``remus`` and ``remusd``, event channels of dom0, and grants in use.  A leak of one per checkpoint shows as a
difference of a hundred between the first third of the readings and the last.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from remus_colo.testbed import scenario_figures
from remus_colo.testbed.bed import Bed
from remus_colo.testbed.errors import BedError
from remus_colo.testbed.network import HOSTS
from remus_colo.testbed.scenario import Protection
from remus_colo.testbed.scenario_run import Run
from remus_colo.testbed.scenario_trial import LOAD, client_faults

log = logging.getLogger(__name__)

# A checkpoint each second besides those that the load's divergences ask for.
PERIOD_MS = 1000
PIECE_S = 60.0
# All memory of both VMs is compared after each so many checkpoints.
VERIFY_EVERY = 3
# What may change without being a leak: a page cache, a log's buffers, connections that come and go.
ALLOWED = {"mem_used_kb": 40_000, "rss_kb": 30_000, "fds": 8, "event_channels": 4, "grants": 16}

# Xen prints all grants in use, one a line, on the debug key g.
_COUNT = """
awk '/^MemTotal/ {{t = $2}} /^MemAvailable/ {{a = $2}} END {{print "mem_used_kb", t - a}}' /proc/meminfo
awk '/^VmRSS/ {{print "rss_kb", $2}}' /proc/{pid}/status
echo fds $(ls /proc/{pid}/fd | wc -l)
echo event_channels $(lsevtchn 0 | wc -l)
xl dmesg -c > /dev/null; xl debug-keys g
echo grants $(xl dmesg | grep -c '^(XEN) \\[0x')
"""


def reading(bed: Bed, run: Run) -> dict[str, int]:
    """Counts on the host of ``run``, whose process is looked at too."""
    shown = bed.exec(run.host, _COUNT.format(pid=run.pid)).stdout
    return {name: int(value) for name, value in (line.split() for line in shown.splitlines())}


def run(bed: Bed, checkpoints: int, remus: dict[str, Any], directory: Path) -> tuple[dict[str, Any], bool]:
    """Protect until so many checkpoints are made; the summary, and whether all went well."""
    with Protection(bed) as protection:
        faults: list[str] = []
        requests = 0
        readings: dict[str, list[dict[str, int]]] = {host: [] for host in HOSTS}
        protection.ensure_guest()
        before = {host: protection.state(host) for host in HOSTS}
        daemon = protection.start_daemon()
        primary = protection.protect(period=PERIOD_MS, verify=VERIFY_EVERY, **remus)
        try:
            while not faults:
                result = protection.load(PIECE_S, **LOAD, random_every=5, time_every=5, udp=2)
                requests += result["requests"]
                faults += client_faults(result)
                ended = [run for run in (primary, daemon) if not run.running()]
                faults += [f"{run.command.split()[0]} has ended: {run.events[-1:]}" for run in ended]
                if ended:
                    break
                for run in (primary, daemon):
                    readings[run.host].append(reading(bed, run))
                made = sum(scenario_figures.checkpoints(primary.events).values())
                log.info(
                    "%d checkpoints, %d requests; %s", made, requests, {h: r[-1] for h, r in readings.items()}
                )
                if made >= checkpoints:
                    break
            faults += [f"{host}: {growth}" for host in HOSTS for growth in growths(readings[host])]
            status = protection.stop()
            if status != 0:
                faults.append(f"remus ended with status {status}")
            daemon.stop()
            for host in HOSTS:
                after = protection.state(host)
                if after != before[host]:
                    faults.append(f"{host} is not as it was: {after.leftovers() or after}")
        except BedError as error:
            faults.append(str(error))
        if faults:
            protection.save_logs(directory)
        pauses = scenario_figures.pauses_ms(primary.events)
        compared = [event["pages"] for event in primary.events if event["event"] == "memory-equal"]
        if not compared and not faults:
            faults.append("memory was never compared")
        found = {
            "kind": "memory",
            "requests": requests,
            "memory_compared": len(compared),
            "pages": max(compared, default=0),
            "checkpoints": scenario_figures.checkpoints(primary.events),
            "pause_ms": {
                "p50": scenario_figures.quantile(pauses, 0.5),
                "p99": scenario_figures.quantile(pauses, 0.99),
            },
            "readings": readings,
            "faults": faults,
        }
        for fault in faults:
            print(f"    {fault}", flush=True)
        return found, not faults


def growths(readings: list[dict[str, int]]) -> list[str]:
    """What is greater all through the last third than it was at all in the first, by more than it may be.

    One reading says little: while a checkpoint is under way, memory is up by what it takes.
    """
    third = len(readings) // 3
    if not third:
        return []
    found = []
    for name, allowed in ALLOWED.items():
        before = max(reading[name] for reading in readings[:third])
        after = min(reading[name] for reading in readings[-third:])
        if after - before > allowed:
            found.append(f"{name} grew from {before} to {after}")
    return found
