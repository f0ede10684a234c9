# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the clocks of a guest that failed over are judged."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from remus_colo.testbed import scenario_clock, soak
from remus_colo.testbed.scenario_clock import Leg, Reading, faults, limit_ms

MS = 1_000_000
GOOD = Leg(
    host="primary", mode="transparent", why="because", checkpoints=3, birth_ms=700.0, pauses_ms=[90.0, 30.0, 40.0],
    stopped_ms=[1500.0, 900.0, 1000.0], takeover_ms=3200.0, error_ms=4.0, shift_ms=(-1.0, 3.0),
)  # fmt: skip


def told(**changes: Any) -> dict[str, Any]:
    """What a guest says that has seen nothing odd."""
    return {
        "backward": {"monotonic": 0, "realtime": 0, "boottime": 0},
        "skew": {"realtime": [5, 4, 300], "boottime": [50, 40, 90]},
        "gaps": [[10, 1500 * MS, 1490 * MS], [20, 12 * MS, 2 * MS]],
        "miscounted": 0,
        "together": 1000,
    } | changes


def test_what_a_stop_explains_is_no_fault() -> None:
    assert limit_ms([GOOD]) == 1500.0 + 3200.0
    assert faults(told(), [GOOD]) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"backward": {"monotonic": 1, "realtime": 0, "boottime": 0}}, "CLOCK_MONOTONIC went back 1 times"),
        ({"backward": {"monotonic": 0, "realtime": 2, "boottime": 0}}, "CLOCK_REALTIME went back 2 times"),
        (
            {"skew": {"realtime": [0, 0, 1], "boottime": [0, 0, 1002 * MS]}},
            "CLOCK_BOOTTIME moved by 1002.000 ms",
        ),
        ({"gaps": [[10, 600_000 * MS, 0]]}, "CLOCK_MONOTONIC jumped by 600000.0 ms, more than 4700.0 ms"),
        ({"gaps": [[10, 12 * MS, 5000 * MS]]}, "a timer was 5000.0 ms late"),
        ({"miscounted": 3}, "3 expirations"),
        ({"together": 0}, "never read its clocks close enough together"),
    ],
)
def test_each_fault_is_named(changes: dict[str, Any], says: str) -> None:
    found = faults(told(**changes), [GOOD])
    assert len(found) == 1 and says in found[0]


def test_a_guests_clock_that_gained_or_lost_time_is_a_fault() -> None:
    for shift in ((4.5, 8.0), (-1100.0, -1004.5)):
        assert "clock was off by" in faults(told(), [dataclasses.replace(GOOD, shift_ms=shift)])[0]
    # Each takeover may add the error of its own measurement.
    assert faults(told(), [GOOD, dataclasses.replace(GOOD, shift_ms=(7.5, 12.0))]) == []
    # A guest that suspends itself stops its clock meanwhile, and the others go on: once if its checkpoints
    # are transparent.
    once = told(skew={"realtime": [0, 0, 900 * MS], "boottime": [0, 0, 900 * MS]})
    assert faults(once, [dataclasses.replace(GOOD, shift_ms=(-900.0, -800.0))]) == []
    slept = told(skew={"realtime": [0, 0, 5000 * MS], "boottime": [0, 0, 5000 * MS]})
    assert len(faults(slept, [GOOD])) == 2
    assert (
        faults(slept, [dataclasses.replace(GOOD, mode="cooperative", stopped_ms=[], shift_ms=(-900, -800))])
        == []
    )


@pytest.mark.parametrize(
    ("xen", "checkpoint", "wanted"),
    [
        ("patched", None, "transparent"),
        ("patched", "auto", "transparent"),
        ("patched", "cooperative", "cooperative"),
        ("debian", None, None),
        ("debian", "transparent", "transparent"),
        ("/boot/xen", "auto", None),
    ],
)
def test_a_patched_xen_has_to_be_made_use_of(xen: str, checkpoint: str | None, wanted: str | None) -> None:
    assert soak.wanted_mode(xen, checkpoint) == wanted
    fallen_back = dataclasses.replace(
        GOOD, host="backup", mode="cooperative", why="which would jump", stopped_ms=[], shift_ms=(0.0, 0.0)
    )
    found = faults(told(), [GOOD, fallen_back], wanted)
    if wanted == "transparent":
        assert found == ["the checkpoints on backup were cooperative, not transparent: which would jump"]
    else:
        assert len(found) == (wanted is not None)


def test_a_reading_bounds_how_far_the_guest_is_ahead() -> None:
    reading = Reading(asked_ns=100, answered_ns=130, told={"now": {"monotonic": 1120}})
    assert reading.ahead_ns == (990, 1020)


def test_the_report_names_every_leg_and_the_longest_steps() -> None:
    shown = scenario_clock.report([GOOD, GOOD], told(period_ns=10 * MS, samples=9, expirations=7, expected=7))
    assert shown.count("transparent") == 2
    assert "1500, 12 ms" in shown and "allowed: 4700 ms" in shown
    table = scenario_clock.pauses_table({"transparent": [1.0, 2.0, 3.0], "co-operative": []}).splitlines()
    assert table[1].split() == ["transparent", "3", "2.0", "3.0", "3.0"]
    assert table[2].split() == ["co-operative", "0", "-", "-", "-"]
