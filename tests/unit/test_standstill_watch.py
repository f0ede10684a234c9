# SPDX-License-Identifier: LGPL-2.1-or-later
"""How often and how long a domain was stopped, from looks at it."""

from __future__ import annotations

import pytest

from remus_colo.testbed.standstill_watch import Seen, evaluate


@pytest.mark.parametrize(
    ("states", "stops_ms"),
    [
        ("", []),
        (".", []),
        ("....", []),
        (".##.", [20]),
        (".#.##..###.", [10, 20, 30]),
        ("##..#.", [10]),  # when the first one began nobody saw
        (".#.##", [10]),  # nor when the last one ended
        ("####", []),
    ],
)
def test_stops(states: str, stops_ms: list[float]) -> None:
    looks = [(100 + number / 100, state == "#") for number, state in enumerate(states)]
    assert evaluate(looks) == Seen(stops_ms, 10 if len(states) > 1 else 0)


def test_the_resolution_is_the_mean_of_what_was_between_looks() -> None:
    assert evaluate([(1.0, False), (1.001, True), (1.004, False)]) == Seen([3.0], 2.0)
