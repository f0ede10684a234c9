# SPDX-License-Identifier: LGPL-2.1-or-later
"""The primary host loses its power under load, comes back, and is the backup then."""

from __future__ import annotations

import random

from remus_colo.testbed import load_report, scenario_trial
from remus_colo.testbed.scenario import GUEST, Protection
from remus_colo.testbed.scenario_trial import Plan

SAVE_TIMEOUT_S = 300.0
SAVE_AND_RESTORE = f"xl save {GUEST} /run/{GUEST}.save && xl restore /run/{GUEST}.save; rm /run/{GUEST}.save"


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

    # It can be protected from there by the host that was dead, and be saved: it is a guest as any other.
    protection.bed.boot("primary")
    protection.start_daemon("primary")
    protection.protect(GUEST, "primary", host="backup")
    assert load_report.clean(protection.load(8, **scenario_trial.LOAD))
    assert protection.stop() == 0
    protection.bed.exec("backup", SAVE_AND_RESTORE, SAVE_TIMEOUT_S)
    assert len(protection.http_get("/1k")) == 1_000
