# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host stands still, with its connections and its carrier, and goes on later as if nothing had been:
exactly one VM may.
"""

from __future__ import annotations

import pytest

from remus_colo.errors import ExitStatus
from remus_colo.testbed.scenario import GUEST, Protection
from remus_colo.testbed.scenario_trial import LOAD, client_faults

END_TIMEOUT_S = 120.0


@pytest.mark.long
@pytest.mark.parametrize("frozen_s", [6, 25])
def test_a_primary_that_comes_back_stands_down(protection: Protection, frozen_s: float) -> None:
    """After the longer time the backup's words to it come late, since TCP repeats them ever less often."""
    protection.ensure_guest()
    daemon = protection.start_daemon()
    run = protection.protect()
    load = protection.start_load(frozen_s + 25, **LOAD)
    load.let_run(5)
    protection.bed.pause("primary")
    try:
        load.let_run(frozen_s)
    finally:
        protection.bed.resume("primary")
    assert run.wait(END_TIMEOUT_S) == ExitStatus.FENCED
    assert client_faults(load.result()) == []
    assert any(event["event"] == "active" for event in daemon.events)
    assert protection.domains("primary") == {}
    assert protection.domains("backup").keys() == {GUEST}
    assert protection.leftovers("primary") == []


@pytest.mark.long
def test_a_backup_that_comes_back_gives_its_copy_up(protection: Protection) -> None:
    protection.ensure_guest()
    daemon = protection.start_daemon()
    run = protection.protect()
    load = protection.start_load(30, **LOAD)
    load.let_run(5)
    protection.bed.pause("backup")
    try:
        assert run.wait(END_TIMEOUT_S) == ExitStatus.UNPROTECTED
    finally:
        protection.bed.resume("backup")
    daemon.wait_event("ended", END_TIMEOUT_S)
    assert client_faults(load.result()) == []
    assert protection.domains("primary").keys() == {GUEST}
    assert protection.domains("backup") == {}
    assert daemon.stop() == ExitStatus.OK
    assert protection.leftovers("backup") == []
