# SPDX-License-Identifier: LGPL-2.1-or-later
"""The backup host loses its power under load."""

from __future__ import annotations

import random

from remus_colo.errors import ExitStatus
from remus_colo.testbed.scenario import GUEST, Protection
from remus_colo.testbed.scenario_trial import LOAD, client_faults


def test_the_guest_goes_on_alone(protection: Protection, chance: random.Random) -> None:
    protection.ensure_guest()
    domains = protection.domains("primary")
    before = protection.state("primary")
    protection.start_daemon()
    run = protection.protect()
    load = protection.start_load(30, **LOAD, random_every=4, udp=2)
    load.let_run(chance.uniform(3, 12))
    protection.kill("backup")

    assert run.wait(60) == ExitStatus.UNPROTECTED
    assert any("UNPROTECTED" in line for line in run.output)
    assert client_faults(load.result()) == []
    assert protection.domains("primary") == domains == {GUEST: domains[GUEST]}
    assert protection.state("primary") == before
