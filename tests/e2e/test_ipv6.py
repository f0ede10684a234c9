# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest that speaks IPv6, with what hosts then say by themselves; its clients use nothing else."""

from __future__ import annotations

import random
import subprocess

import pytest

from remus_colo.testbed import scenario_trial
from remus_colo.testbed.scenario import Protection, destroy_guests
from remus_colo.testbed.scenario_trial import Plan

GUEST_ADDRESS, CLIENT_ADDRESS = "fd77::10", "fd77::100"
AFTERWARDS_S = 25


@pytest.fixture
def guest6(protection: Protection) -> None:
    """The bed's guest in this form, and a client that can reach it; every test that kills a host gets a new
    bed after it.
    """
    destroy_guests(protection.bed)
    protection.start_guest(address6=GUEST_ADDRESS)
    commands = (
        f"sysctl -q net.ipv6.conf.eth0.disable_ipv6=0; ip addr replace {CLIENT_ADDRESS}/64 dev eth0 nodad"
    )
    subprocess.run(protection.bed.client_argv(["sh", "-ec", commands]), check=True)


@pytest.mark.long
@pytest.mark.parametrize("colo", [True, False])
def test_failover(protection: Protection, guest6: None, chance: random.Random, colo: bool) -> None:
    after_s = chance.uniform(6, 10)
    load = {"target": GUEST_ADDRESS, "random_every": 4, "udp": 2}
    outcome = scenario_trial.run(
        protection, Plan("primary", after_s, after_s + AFTERWARDS_S, load, remus={}, colo=colo)
    )
    assert outcome.faults == []
    if colo:
        assert outcome.released_without_checkpoint is not None and outcome.released_without_checkpoint >= 0.9
