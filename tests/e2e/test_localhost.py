# SPDX-License-Identifier: LGPL-2.1-or-later
"""The classic default destination: both VMs on one Xen host."""

from __future__ import annotations

from remus_colo.errors import ExitStatus
from remus_colo.testbed.scenario import GUEST, Protection
from remus_colo.testbed.scenario_trial import client_faults


def test_both_vms_on_one_host(protection: Protection) -> None:
    protection.ensure_guest()
    before = protection.state("primary")
    daemon = protection.start_daemon("primary")
    protection.protect(destination="localhost")
    assert protection.domains("primary").keys() == {GUEST, f"{GUEST}--secondary"}
    # three VMs and the protection on one emulated CPU
    assert client_faults(protection.load(10, redis=2, http=2, echo=1, rate=1)) == []
    assert protection.stop() == ExitStatus.OK
    assert daemon.stop() == ExitStatus.OK
    assert protection.state("primary") == before
