# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two domains under protection at a time, one by COLO and one without, by one remusd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from remus_colo.errors import ExitStatus
from remus_colo.testbed.guest_image import SECOND_ADDRESS
from remus_colo.testbed.network import HOSTS
from remus_colo.testbed.scenario import GUEST, SECOND_GUEST, Protection
from remus_colo.testbed.scenario_trial import client_faults

pytestmark = pytest.mark.crowded

# Four VMs and two protections on two emulated processors.
LOAD = {"redis": 2, "http": 2, "echo": 1, "rate": 1}
# They keep the hosts so busy that a heartbeat may be seconds late.
COLO = {"heartbeat_timeout": 10_000}
REMUS = COLO | {"colo": False, "interval": 500}
TAKEOVER_TIMEOUT_S = 120.0


@pytest.fixture
def guests(protection: Protection) -> Iterator[Protection]:
    protection.ensure_guest()
    protection.start_guest(name=SECOND_GUEST)
    yield protection
    protection.close()
    for host in HOSTS:
        if protection.bed.hosts[host].state() == "ready" and SECOND_GUEST in protection.domains(host):
            protection.bed.exec(host, f"xl destroy {SECOND_GUEST}")


def test_one_ends_and_the_other_goes_on(guests: Protection) -> None:
    before = {host: guests.state(host) for host in HOSTS}
    daemon = guests.start_daemon()
    second = guests.protect(SECOND_GUEST, **REMUS)
    first = guests.protect(**COLO)
    loads = guests.start_load(15, **LOAD), guests.start_load(15, target=SECOND_ADDRESS, **LOAD)
    assert [client_faults(load.result()) for load in loads] == [[], []]
    assert first.running() and second.running()

    assert second.stop() == ExitStatus.OK
    assert client_faults(guests.load(5, **LOAD)) == []
    assert first.running()
    assert {name for name in guests.domains("backup") if name.startswith(SECOND_GUEST)} == set()
    assert len(guests.http_get("/1k", SECOND_ADDRESS)) == 1_000

    assert first.stop() == ExitStatus.OK
    assert daemon.stop() == ExitStatus.OK
    for host in HOSTS:
        assert guests.state(host) == before[host], host


def test_both_are_taken_over(guests: Protection) -> None:
    daemon = guests.start_daemon()
    guests.protect(SECOND_GUEST, **REMUS)
    guests.protect(**COLO)
    loads = guests.start_load(45, **LOAD), guests.start_load(45, target=SECOND_ADDRESS, **LOAD)
    loads[0].let_run(6)
    guests.kill("primary")
    assert [client_faults(load.result()) for load in loads] == [[], []]
    for name in (GUEST, SECOND_GUEST):
        daemon.wait_event("active", TAKEOVER_TIMEOUT_S, domain=name)
    assert guests.domains("backup").keys() == {GUEST, SECOND_GUEST}
    assert len(guests.http_get("/1k")) == len(guests.http_get("/1k", SECOND_ADDRESS)) == 1_000
