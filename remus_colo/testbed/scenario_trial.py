# SPDX-License-Identifier: LGPL-2.1-or-later
"""One failover: a guest is protected, a client's load runs, a host loses its power, and what the client saw
is judged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from remus_colo.errors import ExitStatus
from remus_colo.testbed import load_report, scenario_figures
from remus_colo.testbed.guest_image import NAME as GUEST
from remus_colo.testbed.host_config import HEARTBEAT_TIMEOUT_MS
from remus_colo.testbed.scenario import Protection
from remus_colo.testbed.scenario_load import Result

# How much longer than the heartbeat's time-out a PVM may be silent when its backup dies: it is looked for
# once per heartbeat, by processes that share an emulated CPU.
BACKUP_LOSS_SLACK_MS = 1500
ACTIVE_TIMEOUT_S = 120.0

Step = Callable[[str, str], AbstractContextManager[None]]

# Connections that last for the whole load, and short ones besides, so that some are younger than the last
# checkpoint when the host dies. The rate leaves an emulated host time to breathe, also on a machine that is busy itself;
# an answer that is late on such a one is not lost.  Where answers are held, a round trip lasts as long, a PV guest's some
# seconds; TCP repeats a segment after three such times (RFC 6298: a first measurement R makes it R + 4 R/2), and then after
# twice as long, up to two minutes (TCP_RTO_MAX in Linux): for so long answers are waited for.
LOAD = {"redis": 8, "http": 8, "echo": 4, "rate": 2, "churn": 1, "timeout": 120, "drain": 120}


@dataclass(frozen=True, slots=True)
class Plan:
    """:ivar kind: the host that is killed.
    :ivar kill_after_s: when, counted from the load's first request.
    :ivar seconds: how long the load lasts.
    :ivar load: further options of the load.
    :ivar remus: options of ``remus``.
    :ivar colo: with ``--colo``.
    :ivar guest: its kind, see :meth:`Protection.start_guest`.
    """

    kind: str
    kill_after_s: float
    seconds: float
    load: dict[str, Any]
    remus: dict[str, Any]
    colo: bool = True
    guest: str = "pvh"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it.

    :ivar faults: what a client, or the user, has to complain of; empty if all is well.
    :ivar failover_ms: from the host's death to the first reply after it that had to wait for its detection;
        None if the client noticed nothing, or if nothing came.
    """

    kind: str
    mode: str
    load: Result
    checkpoints: dict[str, int]
    released_without_checkpoint: float | None
    failover_ms: float | None
    faults: list[str]


def quiet(what: str, how_long: str) -> AbstractContextManager[None]:
    """A :data:`Step` that says nothing."""
    return contextlib.nullcontext()


def run(protection: Protection, plan: Plan, step: Step = quiet) -> Outcome:
    """Carry out a plan in a bed that is up.

    :raise BedError: the guest could not be protected, or the load did not run.
    """
    with step(f"starting the guest '{GUEST}' on the primary", "10 to 40 s"):
        protection.ensure_guest(kind=plan.guest)
    with step("starting remusd on the backup", "some seconds"):
        daemon = protection.start_daemon()
    with step(f"protecting it: remus {'--colo ' if plan.colo else ''}{GUEST} backup", "20 to 60 s"):
        remus = protection.protect(colo=plan.colo, **plan.remus)
    with step(f"the client's load runs; after {plan.kill_after_s:.1f} s the {plan.kind} host loses its power",
              f"{plan.seconds:.0f} s"):  # fmt: skip
        load = protection.start_load(plan.seconds, **(LOAD | plan.load))
        load.let_run(plan.kill_after_s)
        killed_s = protection.kill(plan.kind)
        result = load.result()
    faults = client_faults(result)
    failover_ms = protection.failover_ms(load, killed_s)
    if plan.kind == "primary":
        if failover_ms is None:
            faults.append("no reply came after the primary's death")
        if not any(event["event"] == "active" for event in daemon.events):
            faults.append("the backup did not take over")
    else:
        status = remus.wait(ACTIVE_TIMEOUT_S)
        # Without COLO the guest is silent from one commit to the next in any case.
        held_ms = 0.0 if plan.colo else scenario_figures.longest_round_ms(remus.events)
        faults += _primary_faults(
            protection, result, status, HEARTBEAT_TIMEOUT_MS + BACKUP_LOSS_SLACK_MS + held_ms
        )
    mode = next((str(event["mode"]) for event in remus.events if event["event"] == "protected"), "?")
    return Outcome(
        kind=plan.kind,
        mode=mode,
        load=result,
        checkpoints=scenario_figures.checkpoints(remus.events),
        released_without_checkpoint=scenario_figures.released_share(remus.events) if plan.colo else None,
        failover_ms=failover_ms,
        faults=faults,
    )


def client_faults(result: Result) -> list[str]:
    """What a client has to complain of."""
    faults = [
        f"{result[count]} {what}"
        for count, what in (
            ("resets", "connections broken"),
            ("wrong_bytes", "wrong bytes"),
            ("lost_writes", "acknowledged writes lost"),
            ("repeated_writes", "writes repeated"),
        )
        if result[count]
    ]
    if result["errors"] and not faults:
        kinds: dict[str, int] = {}
        for figures in result["services"].values():
            for kind, count in figures["error_kinds"].items():
                kinds[kind] = kinds.get(kind, 0) + count
        faults.append("errors: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
    if not faults and not load_report.clean(result):
        faults.append("the load could not be verified")
    return faults


def _primary_faults(protection: Protection, result: Result, status: int, allowed_ms: float) -> list[str]:
    """The backup was killed: the PVM must have gone on as if nothing were, and ``remus`` have said so.

    :param allowed_ms: how long it may have been silent.
    """
    faults = []
    if status != ExitStatus.UNPROTECTED:
        faults.append(f"remus ended with status {status}, not {int(ExitStatus.UNPROTECTED)}")
    if result["longest_gap_ms"] > allowed_ms:
        faults.append(
            f"the guest was silent for {result['longest_gap_ms']:.0f} ms, longer than {allowed_ms:.0f} ms"
        )
    faults += [f"left over: {item}" for item in protection.leftovers("primary")]
    return faults
