# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long a guest stands still for a checkpoint: our ``remus`` beside Xen's own ``xl remus``, on the same
guest at the same interval.

Both replicate to nowhere and hold no output, so that all a client notices of a checkpoint is that the guest
does not answer while it is stopped.  Each is measured twice, by the same means for both:

* as a client sees it: a stream of datagrams, each sent when the answer to the one before is there, has one
  answer for each checkpoint that is late by just that.  It has what the guest itself does to suspend and
  resume; but what is shorter than the longest delay without checkpoints does not show.
* as Xen has it: how long the domain is suspended or paused (:mod:`remus_colo.testbed.standstill_watch`).  It
  has every checkpoint, from the guest's suspend call on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from remus_colo.testbed import scenario_figures
from remus_colo.testbed.guest_image import NAME as GUEST
from remus_colo.testbed.scenario import Protection
from remus_colo.testbed.standstill_watch import Seen

log = logging.getLogger(__name__)

# One stream, as fast as answers come, and nothing else.
LOAD = {"redis": 0, "http": 0, "echo": 0, "udp": 1, "rate": 0, "gap_ms": 1}
OURS, XL = "remus --blackhole --no-net", "xl remus -F -b -n"
BEGIN_TIMEOUT_S = 120.0
END_TIMEOUT_S = 60.0


def compare(
    protection: Protection, intervals_ms: tuple[int, ...], seconds: float
) -> dict[str, dict[str, Any]]:
    """Figures by interval and tool. Ends with a guest made anew: ``xl remus`` may leave it suspended.

    :raise BedError: one of them did not run.
    """
    found: dict[str, dict[str, Any]] = {}
    for interval_ms in intervals_ms:
        quiet_ms, gaps_ms, stops = 0.0, {}, {}
        for tool, checkpoints in ((OURS, _ours), (XL, _xl)):
            log.info("standstill: %s -i %d", tool, interval_ms)
            quiet_ms = max(quiet_ms, _longest_ms(protection, seconds / 3))
            with checkpoints(protection, interval_ms):
                gaps_ms[tool] = _gaps_ms(protection, seconds)
                stops[tool] = _watch(protection, seconds)
        found[str(interval_ms)] = {
            tool: _figures(gaps, quiet_ms, seconds) | {"stopped": _stopped(stops[tool])}
            for tool, gaps in gaps_ms.items()
        }
    return found


def _figures(gaps_ms: list[float], quiet_ms: float, seconds: float) -> dict[str, Any]:
    """Of one kind of protection.

    :param quiet_ms: what takes longer is a checkpoint: nothing did without them. The same for all that are compared.
    """
    seen = [gap_ms for gap_ms in gaps_ms if gap_ms > quiet_ms]
    return {
        "count": len(seen),
        "p50": scenario_figures.quantile(seen, 0.5),
        "p99": scenario_figures.quantile(seen, 0.99),
        "share": round(sum(seen) / 1000 / seconds, 3),
        "longest_without_ms": quiet_ms,
    }


def _stopped(seen: Seen) -> dict[str, Any]:
    return {
        "count": len(seen.stops_ms),
        "p50": scenario_figures.quantile(seen.stops_ms, 0.5),
        "p99": scenario_figures.quantile(seen.stops_ms, 0.99),
        "resolution_ms": seen.resolution_ms,
    }


def _watch(protection: Protection, seconds: float) -> Seen:
    """How long the domain is stopped each time, with the same load on it."""
    domid = protection.domains("primary")[GUEST]
    command = f"python3 -m remus_colo.testbed.standstill_watch {domid} {seconds:g}"
    load = protection.start_load(seconds, **LOAD)
    done = protection.bed.exec("primary", command, seconds + BEGIN_TIMEOUT_S)
    load.result()
    return Seen(**json.loads(done.stdout))


def _gaps_ms(protection: Protection, seconds: float) -> list[float]:
    load = protection.start_load(seconds, **LOAD)
    load.result()
    return [round((end_s - start_s) * 1000, 1) for start_s, end_s in load.gaps()]


def _longest_ms(protection: Protection, seconds: float) -> float:
    return max(_gaps_ms(protection, seconds), default=0.0)


@contextlib.contextmanager
def _ours(protection: Protection, interval_ms: int) -> Iterator[None]:
    run = protection.start_remus(colo=False, blackhole=True, no_net=True, interval=interval_ms)
    run.wait_event("blackhole", BEGIN_TIMEOUT_S)
    try:
        yield
    finally:
        run.stop()


@contextlib.contextmanager
def _xl(protection: Protection, interval_ms: int) -> Iterator[None]:
    bed = protection.bed
    # A destination is wanted, and not used.
    command = f"xl remus -F -b -n -i {interval_ms} {GUEST} nowhere"
    with bed.popen("primary", command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline_s = time.monotonic() + BEGIN_TIMEOUT_S
        # It prints nothing when it has begun: the guest is then seen suspended now and then.
        look = "for i in $(seq 600); do xl list web | grep -q -- '---s' && exit 0; sleep 0.05; done; exit 1"
        bed.exec("primary", look, max(1.0, deadline_s - time.monotonic()))
        try:
            yield
        finally:
            process.kill()
            process.wait(END_TIMEOUT_S)
            bed.exec("primary", f"xl destroy {GUEST}", check=False)
            protection.start_guest()
            protection.http_get("/1k")
