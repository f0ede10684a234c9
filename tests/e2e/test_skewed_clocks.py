# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hosts that booted at different times: ``auto`` picks what works, and the guest's time goes on."""

from __future__ import annotations

import random

import pytest

from remus_colo.testbed import scenario_trial
from remus_colo.testbed.scenario import Protection
from remus_colo.testbed.scenario_trial import Plan

# Far more than either mode of checkpoints could hide.
SKEW_S = 20.0


@pytest.mark.skew(-SKEW_S)
def test_the_primary_booted_first(protection: Protection, chance: random.Random) -> None:
    """The backup's Xen clock is behind: under transparent checkpoints the guest's time would stand still."""
    after_s = chance.uniform(4, 14)
    plan = Plan("primary", after_s, after_s + 25, load={"random_every": 4, "time_every": 2}, remus={})
    outcome = scenario_trial.run(protection, plan)
    assert outcome.faults == []  # that time never went back is among what the load checks
    assert outcome.mode == "cooperative"
    clock = outcome.load["guest_clock"]
    assert clock["readings"] >= 3
    assert max(clock["behind_ms"], clock["ahead_ms"]) < SKEW_S * 1000 / 2
