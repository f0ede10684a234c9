# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each mode of checkpoints on demand, under a load that asks for some."""

from __future__ import annotations

import pytest

from remus_colo.errors import ExitStatus
from remus_colo.testbed import scenario_figures
from remus_colo.testbed.network import HOSTS
from remus_colo.testbed.scenario import Protection
from remus_colo.testbed.scenario_trial import LOAD, client_faults


@pytest.mark.long
@pytest.mark.parametrize("mode", ["transparent", "cooperative"])
def test_checkpoints_under_load(protection: Protection, mode: str) -> None:
    protection.ensure_guest()
    before = {host: protection.state(host) for host in HOSTS}
    daemon = protection.start_daemon()
    run = protection.protect(checkpoint=mode)
    assert run.wait_event("mode", 1)["mode"] == mode
    result = protection.load(20, **LOAD, random_every=3, time_every=3, udp=2)
    assert client_faults(result) == []
    assert protection.stop() == ExitStatus.OK
    assert scenario_figures.checkpoints(run.events).get("tcp-payload", 0) >= 1
    assert daemon.stop() == ExitStatus.OK
    for host in HOSTS:
        assert protection.state(host) == before[host]
