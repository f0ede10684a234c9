# SPDX-License-Identifier: LGPL-2.1-or-later
"""Setting the distance of two clocks, against hosts that are only numbers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remus_colo.testbed import skew

seconds = st.floats(-1000, 1000, allow_nan=False)


@settings(deadline=None)
@given(measured=seconds, wanted=seconds)
def test_holding_for_the_correction_gives_the_wanted_distance(measured, wanted):
    step = skew.correction(measured, wanted)
    assert step.for_s >= 0
    moved = -step.for_s if step.host == "backup" else step.for_s
    assert measured + moved == pytest.approx(wanted, abs=1e-6)


def test_the_fastest_exchange_is_believed():
    slow, fast = (0, 5_000_000_000, 800_000_000), (1_000_000_000, 6_001_000_000, 1_002_000_000)
    assert skew.best([slow, fast]) == skew.Reading(offset_s=5.0, error_s=0.001)


class Clocks:
    """A meter over two clocks that ``hold`` really moves, with an error in each hold."""

    def __init__(self, apart_s, hold_error_s):
        self.apart_s = apart_s
        self.hold_error_s = hold_error_s
        self.holds = []

    def measure(self):
        return skew.Reading(self.apart_s, 0.0005)

    def hold(self, step):
        self.holds.append(step)
        held_s = step.for_s + self.hold_error_s / len(self.holds) ** 2
        self.apart_s += -held_s if step.host == "backup" else held_s


@settings(deadline=None)
@given(apart=seconds, wanted=seconds)
def test_corrections_converge(apart, wanted):
    clocks = Clocks(apart, hold_error_s=0.004)
    reached = skew.set_skew(clocks, wanted, clocks.hold)
    assert abs(reached.offset_s - wanted) <= skew.GOOD_ENOUGH_S + 1e-6
    assert len(clocks.holds) <= skew.MAX_CORRECTIONS


def test_clocks_that_are_right_are_left_alone():
    clocks = Clocks(0.0004, hold_error_s=0.0)
    skew.set_skew(clocks, 0.0, clocks.hold)
    assert clocks.holds == []


def test_a_host_goes_on_even_if_the_hold_is_interrupted():
    done = []
    with pytest.raises(KeyboardInterrupt), skew.stopped(done.append):
        raise KeyboardInterrupt
    assert done == ["stop", "cont"]
