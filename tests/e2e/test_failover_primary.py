# SPDX-License-Identifier: LGPL-2.1-or-later
"""The primary host loses its power under load, comes back, and is the backup then."""

from __future__ import annotations

import random
import time

from remus_colo.testbed import load_report, scenario_trial
from remus_colo.testbed.errors import BedError
from remus_colo.testbed.scenario import GUEST, Protection
from remus_colo.testbed.scenario_trial import Plan

REBOOT_TIMEOUT_S = 180.0
# Until xl has made the guest anew.
REBOOT = f"""
old=$(xl domid {GUEST}) && xl reboot {GUEST} &&
timeout 120 sh -c 'until new=$(xl domid {GUEST}) && [ "$new" != "$0" ]; do sleep 0.2; done 2> /dev/null' "$old"
"""


def reboot(protection: Protection, host: str) -> None:
    """The guest, until it serves again."""
    deadline_s = time.monotonic() + REBOOT_TIMEOUT_S
    protection.bed.exec(host, REBOOT, REBOOT_TIMEOUT_S)
    while True:
        try:
            protection.http_get("/1k")
            return
        except BedError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.5)


def test_the_guest_survives_its_host(protection: Protection, chance: random.Random) -> None:
    after_s = chance.uniform(4, 14)
    plan = Plan("primary", after_s, after_s + 25, load={"random_every": 4, "udp": 2}, remus={})
    outcome = scenario_trial.run(protection, plan)
    assert outcome.faults == []
    assert outcome.mode == "transparent"
    assert outcome.failover_ms is not None

    # The guest is one of the backup's now, under its own name.
    assert protection.daemon is not None
    protection.daemon.wait_event("active", 1)
    assert protection.domains("backup").keys() == {GUEST}
    assert len(protection.http_get("/10k")) == 10_000
    # remusd may end; the guest, and connections made since, live on.
    assert protection.daemon.stop() == 0
    assert len(protection.http_get("/1k")) == 1_000
    # What is left is the guest's own xl, which waits for its end as it does for any guest.
    assert [
        item for item in protection.leftovers("backup") if not item.startswith("process xl restore")
    ] == []

    # It can be protected from there by the host that was dead, and rebooted: it is a guest as any other.
    protection.bed.boot("primary")
    protection.start_daemon("primary")
    protection.protect(GUEST, "primary", host="backup")
    assert load_report.clean(protection.load(8, **scenario_trial.LOAD))
    assert protection.stop() == 0
    reboot(protection, "backup")
