# SPDX-License-Identifier: LGPL-2.1-or-later
"""Remus without COLO: failovers, a clean end, and a script that knows only the modules of Xen 4.4."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from remus_colo.errors import ExitStatus
from remus_colo.testbed import scenario_trial
from remus_colo.testbed.network import HOSTS
from remus_colo.testbed.remote_process import RemoteProcess
from remus_colo.testbed.scenario import GUEST, Protection, fresh
from remus_colo.testbed.scenario_trial import Plan

SCRIPT = Path(__file__).parent / "classic_script.py"
CONTROL_SCRIPT = Path(__file__).parent / "classic_control.py"
SAVE_SCRIPT = Path(__file__).parent / "classic_save.py"
IMAGE_SCRIPT = Path(__file__).parent / "classic_image.py"
MOVE_SCRIPT = Path(__file__).parent / "classic_move.py"
AFTERWARDS_S = 15.0
# A PV guest is copied whole at each checkpoint, which takes emulated hosts seconds.
PV_AFTERWARDS_S = 40.0
# xl starts a QEMU before it lets an HVM guest run.
HVM_AFTERWARDS_S = 30.0
LOAD = scenario_trial.LOAD | {"redis": 4, "http": 4, "echo": 2}
SCRIPT_TIMEOUT_S = 300.0


def test_a_script_of_the_classic_interface(protection: Protection) -> None:
    """It protects to nowhere, with output held, and tells when each phase was."""
    protection.ensure_guest()
    before = protection.state("primary")
    protection.bed.push("primary", SCRIPT, "/root/classic_script.py")
    done = protection.bed.exec(
        "primary", f"python3 /root/classic_script.py {GUEST} 5", SCRIPT_TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["rounds"] == 5
    # What the interface promises: the hooks of a device, around each checkpoint, in this order.
    assert told["calls"] == ["postsuspend", "preresume", "commit"] * 5
    assert all(round["suspended_s"] <= round["resuming_s"] <= round["committed_s"] for round in told["times"])
    assert told["nics"] == 1
    assert told["domain"] == GUEST
    protection.http_get("/1k")
    assert protection.state("primary") == before


CONTROL = "/root/classic_control.py"
CONTROL_LOG = "/var/log/classic-control.log"
CONTROL_CONFIG = "/root/classic-control.sxp"
# The first checkpoint after the whole copy, of all that a loaded guest has written meanwhile, can keep an emulated host
# silent for longer than the bed's time-out, and its guest, too: the backup then takes over from a host that lives.
CONTROL_TIMEOUT_MS = 10_000


@contextlib.contextmanager
def control_script(protection: Protection, rounds: int) -> Iterator[RemoteProcess]:
    """The guest is protected by a script, which has had so many checkpoints committed."""
    bed = protection.bed
    bed.push("primary", CONTROL_SCRIPT, CONTROL)
    bed.exec(
        "primary",
        f"echo '(remus-colo (heartbeat-timeout {CONTROL_TIMEOUT_MS}))' > {CONTROL_CONFIG}; : > {CONTROL_LOG}",
    )
    command = f"env XEND_CONFIG={CONTROL_CONFIG} python3 {CONTROL} {GUEST} 10.78.0.2 200"
    with bed.popen("primary", f"{command} > {CONTROL_LOG} 2>&1") as script:
        wanted = f"until grep -qx 'committed {rounds}' {CONTROL_LOG}; do kill -0 {script.pid} && sleep 0.2 || exit 1; done"
        bed.exec("primary", f"timeout {SCRIPT_TIMEOUT_S:.0f} sh -c {shlex.quote(wanted)} || {{ cat {CONTROL_LOG}; false; }}",
                 SCRIPT_TIMEOUT_S + 30)  # fmt: skip
        yield script


@pytest.mark.long
def test_a_control_script_protects_to_a_backup(protection: Protection) -> None:
    protection.ensure_guest()
    before = {host: protection.state(host) for host in HOSTS}
    protection.start_daemon()
    with control_script(protection, 5) as script:
        assert scenario_trial.client_faults(protection.load(10, **LOAD)) == []
        script.signal(signal.SIGTERM)
        status = script.wait(SCRIPT_TIMEOUT_S)
        said = protection.bed.exec("primary", f"tail -n 5 {CONTROL_LOG}").stdout
    assert (status, said.splitlines()[-1:]) == (0, ["signalled"]), said
    protection.http_get("/1k")
    protection.close()
    for host, state in before.items():
        assert protection.state(host) == state, host


@pytest.mark.long
def test_saving_and_restoring_as_xend_did(protection: Protection) -> None:
    protection.ensure_guest()
    protection.bed.push("primary", SAVE_SCRIPT, "/root/classic_save.py")
    protection.bed.exec("primary", f"python3 /root/classic_save.py {GUEST} /root/web.save", SCRIPT_TIMEOUT_S)
    protection.http_get("/1k")


@pytest.mark.long
def test_an_image_of_checkpoints_becomes_the_guest(protection: Protection) -> None:
    protection.ensure_guest()
    protection.bed.push("primary", IMAGE_SCRIPT, "/root/classic_image.py")
    protection.bed.exec(
        "primary", f"python3 /root/classic_image.py {GUEST} /var/tmp/web.img", SCRIPT_TIMEOUT_S
    )
    protection.http_get("/1k")


@pytest.mark.long
def test_moving_as_xend_did(protection: Protection) -> None:
    protection.ensure_guest()
    daemon = protection.start_daemon()
    load = protection.start_load(30, **LOAD)
    protection.bed.push("primary", MOVE_SCRIPT, "/root/classic_move.py")
    protection.bed.exec("primary", f"python3 /root/classic_move.py {GUEST} backup", SCRIPT_TIMEOUT_S)
    daemon.wait_event("received", SCRIPT_TIMEOUT_S)
    assert scenario_trial.client_faults(load.result()) == []
    assert protection.domains("primary") == {}
    assert protection.domains("backup").keys() == {GUEST}
    assert daemon.stop() == ExitStatus.OK
    # xl stays with a domain that it has made, to make it anew when it reboots.
    assert all("xl restore" in line for line in protection.leftovers("backup"))
    assert protection.http_get("/1k")


@pytest.mark.long
def test_ending_it_leaves_the_guest_as_it_was(protection: Protection) -> None:
    protection.ensure_guest()
    before = {host: protection.state(host) for host in ("primary", "backup")}
    protection.start_daemon()
    remus = protection.protect(colo=False)
    result = protection.load(10, **LOAD)
    assert scenario_trial.client_faults(result) == []
    remus.wait_event("checkpoint", 60, epoch=5)
    assert remus.stop() == 0
    protection.http_get("/1k")
    protection.close()
    for host, state in before.items():
        assert protection.state(host) == state, host


@pytest.mark.long
def test_failover_of_a_guest_that_a_script_protects(protection: Protection) -> None:
    protection.ensure_guest()
    daemon = protection.start_daemon()
    with control_script(protection, 5):
        load = protection.start_load(20, **LOAD)
        load.let_run(5)
        protection.kill("primary")
        assert scenario_trial.client_faults(load.result()) == []
    daemon.wait_event("active", SCRIPT_TIMEOUT_S, domain=GUEST)
    protection.http_get("/1k")


@pytest.mark.parametrize("kind", ["primary", pytest.param("backup", marks=pytest.mark.long)])
def test_failover(protection: Protection, chance: random.Random, kind: str) -> None:
    after_s = chance.uniform(2, 6)
    outcome = scenario_trial.run(
        protection, Plan(kind, after_s, after_s + AFTERWARDS_S, LOAD, {"interval": 500}, colo=False)
    )
    assert outcome.faults == []
    assert outcome.checkpoints["interval"] > 1


@pytest.mark.long
def test_failover_of_a_pv_guest(protection: Protection, chance: random.Random) -> None:
    if GUEST in protection.domains("primary"):
        protection.bed.exec("primary", f"xl destroy {GUEST}")
    after_s = chance.uniform(8, 12)
    plan = Plan(
        "primary",
        after_s,
        after_s + PV_AFTERWARDS_S,
        LOAD | {"rate": 1, "churn": 0},
        {},
        colo=False,
        guest="pv",
    )
    outcome = scenario_trial.run(protection, plan)
    assert outcome.faults == []


@pytest.mark.long
def test_failover_of_an_hvm_guest(protection: Protection, chance: random.Random) -> None:
    """In a bed whose hosts have QEMU for Xen: its device model is saved with each checkpoint, and made anew
    from the last.
    """
    fresh(protection.bed, dataclasses.replace(protection.bed.options(), device_model=True))
    after_s = chance.uniform(6, 10)
    plan = Plan(
        "primary", after_s, after_s + HVM_AFTERWARDS_S, LOAD, {"interval": 200}, colo=False, guest="hvm"
    )
    outcome = scenario_trial.run(protection, plan)
    assert outcome.faults == []
    assert outcome.checkpoints["interval"] > 1
