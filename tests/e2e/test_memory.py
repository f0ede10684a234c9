# SPDX-License-Identifier: LGPL-2.1-or-later
"""After a checkpoint the copy's memory is the guest's, to the last page."""

from __future__ import annotations

from pathlib import Path

import pytest

from remus_colo.errors import ExitStatus
from remus_colo.testbed.guest_image import MAC
from remus_colo.testbed.scenario import Protection

LATE_PACKETS = Path(__file__).parent / "late_packets.py"
CHECKPOINTS = 3
TIMEOUT_S = 120


@pytest.mark.long
@pytest.mark.parametrize("mode", ["transparent", "cooperative"])
def test_packets_that_come_while_the_copy_is_stopped(protection: Protection, mode: str) -> None:
    """A backend goes on writing to a stopped VM, to pages that its original has no reason to touch."""
    protection.ensure_guest()
    protection.start_daemon()
    run = protection.protect(checkpoint=mode, period=1000, verify=1)
    (domid,) = protection.domains("backup").values()
    protection.bed.push("backup", LATE_PACKETS, "/root/late_packets.py")
    with protection.bed.popen("backup", f"python3 /root/late_packets.py vif{domid}.0 {MAC}") as late:
        for _ in range(CHECKPOINTS):
            run.wait_event("memory-equal", TIMEOUT_S, after=len(run.events))
        assert late.poll() is None
    assert protection.stop() == ExitStatus.OK
