# SPDX-License-Identifier: LGPL-2.1-or-later
"""``remus`` itself is killed, by SIGKILL, at any moment: the guest goes on alone, and nothing is left on either host.

``REMUS_COLO_TEST_ROUNDS`` says how many moments each test tries (1).
"""

from __future__ import annotations

import os
import random
import time

import pytest

from remus_colo.testbed.network import HOSTS
from remus_colo.testbed.scenario import GUEST, Protection
from remus_colo.testbed.scenario_trial import LOAD, client_faults

PATIENCE_S = 120.0
ROUNDS = int(os.environ.get("REMUS_COLO_TEST_ROUNDS", "1"))
MODES: dict[str, dict[str, object]] = {
    "transparent": {"checkpoint": "transparent"},
    "cooperative": {"checkpoint": "cooperative"},
    "remus": {"colo": False, "interval": 200},
}


def await_clean(protection: Protection) -> None:
    """The guard on one host, and remusd on the other, take their time."""
    deadline_s = time.monotonic() + PATIENCE_S
    while any(left := [protection.leftovers(host) for host in HOSTS]):
        # remusd itself goes on
        if all(line.startswith("process") and "remusd" in line for lines in left for line in lines):
            return
        assert time.monotonic() < deadline_s, left
        time.sleep(0.5)


@pytest.mark.parametrize(
    "mode", [mode if mode == "transparent" else pytest.param(mode, marks=pytest.mark.long) for mode in MODES]
)
def test_the_guest_goes_on(protection: Protection, chance: random.Random, mode: str) -> None:
    protection.ensure_guest()
    before = protection.state("primary")
    daemon = protection.start_daemon()
    for _ in range(ROUNDS):
        run = protection.protect(**MODES[mode])  # type: ignore[arg-type]
        load = protection.start_load(20, **LOAD, random_every=2)
        load.let_run(chance.uniform(1, 8))
        protection.bed.exec("primary", f"kill -KILL {run.pid}")
        assert client_faults(load.result()) == []
        await_clean(protection)
        assert set(protection.domains("primary")) == {GUEST}
        assert protection.domains("backup") == {}
        assert protection.state("primary") == before
    daemon.stop()


@pytest.mark.long
def test_the_guest_goes_on_if_remus_is_killed_while_its_copy_is_born(
    protection: Protection, chance: random.Random
) -> None:
    protection.ensure_guest()
    before = protection.state("primary")
    daemon = protection.start_daemon()
    for _ in range(ROUNDS):
        run = protection.start_remus()
        run.wait_event("creating", PATIENCE_S)
        time.sleep(chance.uniform(0.5, 15))  # the suspend comes at its end; a moment of its own each time
        protection.bed.exec("primary", f"kill -KILL {run.pid}")
        await_clean(protection)
        assert protection.http_get("/1k")
        assert protection.state("primary") == before
    daemon.stop()
