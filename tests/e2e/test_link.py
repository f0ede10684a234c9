# SPDX-License-Identifier: LGPL-2.1-or-later
"""Only the replication link is lost: both hosts live, and exactly one VM may go on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from remus_colo.errors import ExitStatus
from remus_colo.testbed.network import HOSTS
from remus_colo.testbed.scenario import GUEST, Protection
from remus_colo.testbed.scenario_trial import LOAD, client_faults


@pytest.fixture
def link(protection: Protection) -> Iterator[None]:
    yield
    protection.bed.link(up=True)


def test_exactly_one_goes_on(protection: Protection, link: None) -> None:
    protection.ensure_guest()
    daemon = protection.start_daemon()
    run = protection.protect()
    load = protection.start_load(35, **LOAD)
    load.let_run(3)
    protection.bed.link(up=False)

    status = run.wait(90)
    assert client_faults(load.result()) == []
    domains = {host: protection.domains(host).keys() for host in HOSTS}
    if status == ExitStatus.UNPROTECTED:
        daemon.wait_event("ended", 90)
        assert domains["primary"] == {GUEST}
        assert protection.domains("backup") == {}
    else:
        assert status == ExitStatus.FENCED
        assert domains == {"primary": set(), "backup": {GUEST}}
    # Whichever it was, it still is when the hosts can talk again.
    protection.bed.link(up=True)
    assert protection.http_get("/1k")
    assert protection.leftovers("primary") == []
    assert daemon.stop() == ExitStatus.OK
    assert protection.leftovers("backup") == []
