# SPDX-License-Identifier: LGPL-2.1-or-later
"""Protection begins and ends; the guest and both hosts are as they were."""

from __future__ import annotations

import pytest

from remus_colo.errors import ExitStatus
from remus_colo.testbed.network import HOSTS
from remus_colo.testbed.scenario import GUEST, Protection
from remus_colo.testbed.scenario_trial import LOAD, client_faults


def test_protection_begins_and_ends_without_a_trace(protection: Protection) -> None:
    protection.ensure_guest()
    before = {host: protection.state(host) for host in HOSTS}
    # as the README advises: on the replication link only
    daemon = protection.start_daemon(address="10.78.0.2", hosts_allow="10[.]78[.]0[.]1$")
    run = protection.protect()

    assert protection.state("primary").domains == before["primary"].domains, "name or domid has changed"
    assert dict(protection.state("backup").domains).keys() == {f"{GUEST}--secondary"}
    result = protection.load(10, **LOAD)
    assert client_faults(result) == []

    assert protection.stop() == ExitStatus.OK
    assert run.events[-1]["event"] == "ended"
    assert protection.http_get("/1k")
    assert daemon.running()
    assert daemon.stop() == ExitStatus.OK
    for host in HOSTS:
        assert protection.state(host) == before[host]


@pytest.mark.long
def test_it_can_be_protected_again(protection: Protection) -> None:
    """By number this time, ended by Ctrl-C, with the same remusd serving both."""
    protection.ensure_guest()
    domid = protection.domains("primary")[GUEST]
    protection.start_daemon()
    for _ in range(2):
        run = protection.protect(str(domid))
        protection.bed.exec("primary", f"kill -INT {run.pid}")
        assert run.wait(120) == ExitStatus.OK
        assert protection.domains("primary") == {GUEST: domid}
        assert protection.leftovers("primary") == []
    assert client_faults(protection.load(5, **LOAD)) == []


@pytest.mark.long
def test_the_end_of_remusd_ends_protection_and_nothing_else(protection: Protection) -> None:
    protection.ensure_guest()
    daemon = protection.start_daemon()
    run = protection.protect()
    load = protection.start_load(15, **LOAD)
    assert daemon.stop() == ExitStatus.OK
    assert run.wait(120) == ExitStatus.UNPROTECTED
    assert client_faults(load.result()) == []
    assert [protection.leftovers(host) for host in HOSTS] == [[], []]
