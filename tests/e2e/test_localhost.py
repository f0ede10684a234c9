# SPDX-License-Identifier: LGPL-2.1-or-later
"""The classic default destination: both VMs on one Xen host."""

from __future__ import annotations

import pytest

from remus_colo.errors import ExitStatus
from remus_colo.testbed.scenario import GUEST, Protection
from remus_colo.testbed.scenario_trial import client_faults

# Three VMs and the protection share one emulated CPU; what the SVM is too late with waits for the time-out and a checkpoint.
PATIENCE = {"heartbeat_timeout": 20_000, "compare_timeout": 10_000}
DRAIN_S = 60


@pytest.mark.long
def test_both_vms_on_one_host(protection: Protection) -> None:
    protection.ensure_guest()
    before = protection.state("primary")
    daemon = protection.start_daemon("primary")
    protection.protect(destination="localhost", **PATIENCE)
    assert protection.domains("primary").keys() == {GUEST, f"{GUEST}--secondary"}
    assert client_faults(protection.load(10, redis=2, http=2, echo=1, rate=1, drain=DRAIN_S)) == []
    assert protection.stop() == ExitStatus.OK
    assert daemon.stop() == ExitStatus.OK
    assert protection.state("primary") == before
