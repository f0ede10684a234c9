# SPDX-License-Identifier: LGPL-2.1-or-later
"""The measured difference of two clocks, and the clock that an SVM gets by it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from remus_colo.relocation.clock import DRIFT_PPM, ClockFilter, ClockSample, best_sample, secondary_offset

HOUR_NS = 3600 * 10**9
offsets = st.integers(-100 * HOUR_NS, 100 * HOUR_NS)
delays = st.integers(0, 2 * 10**9)


def exchange(offset_ns: int, begun_ns: int, there_ns: int, stay_ns: int, back_ns: int) -> ClockSample:
    """One exchange with a clock that is ``offset_ns`` ahead of ours."""
    received_ns = begun_ns + there_ns + offset_ns
    return ClockSample(begun_ns, received_ns, received_ns + stay_ns, begun_ns + there_ns + stay_ns + back_ns)


exchanges = st.lists(st.tuples(st.integers(0, HOUR_NS), delays, delays, delays), min_size=1, max_size=100)


@given(offsets, exchanges)
def test_the_estimate_is_right_to_within_its_error(
    offset_ns: int, made: list[tuple[int, int, int, int]]
) -> None:
    clock_filter = ClockFilter()
    samples = [exchange(offset_ns, *each) for each in sorted(made)]
    for sample in samples:
        clock_filter.add(sample)
    now_ns = max(sample.returned_ns for sample in samples)
    found = clock_filter.estimate(now_ns)
    assert found is not None
    assert abs(found.offset_ns - offset_ns) <= found.error_ns
    assert best_sample(samples).error_ns <= found.error_ns


@given(offsets, delays, delays, st.integers(0, 50 * HOUR_NS), st.integers(-DRIFT_PPM, DRIFT_PPM))
def test_it_stays_right_while_the_clocks_drift(
    offset_ns: int, there_ns: int, back_ns: int, later_ns: int, ppm: int
) -> None:
    clock_filter = ClockFilter()
    sample = exchange(offset_ns, 0, there_ns, 0, back_ns)
    clock_filter.add(sample)
    found = clock_filter.estimate(sample.returned_ns + later_ns)
    assert found is not None
    # what the clocks differ by at the later moment
    assert abs(found.offset_ns - (offset_ns + later_ns * ppm // 1_000_000)) <= found.error_ns + 1


@given(offsets)
def test_a_worse_exchange_is_worth_more_once_the_better_one_is_old(offset_ns: int) -> None:
    clock_filter = ClockFilter()
    assert clock_filter.estimate(0) is None
    clock_filter.add(exchange(offset_ns, 0, 1000, 0, 1000))
    slow_ns = 10**9
    clock_filter.add(exchange(offset_ns, 10**9, slow_ns, 0, 0))
    found = clock_filter.estimate(2 * 10**9)
    assert found is not None and found.offset_ns == offset_ns
    # In an hour the clocks may have drifted by more than the slow exchange can be wrong.
    assert slow_ns // 2 < HOUR_NS * DRIFT_PPM // 1_000_000
    clock_filter.add(exchange(offset_ns, HOUR_NS, slow_ns, 0, 0))
    found = clock_filter.estimate(HOUR_NS + slow_ns)
    assert found is not None and found.offset_ns == offset_ns + slow_ns // 2


@given(offsets, st.integers(0, HOUR_NS), delays, st.integers(-(10**9), 10**9))
def test_the_svms_clock_never_goes_back_and_else_is_what_was_measured(
    offset_ns: int, stopped_ns: int, transfer_ns: int, wrong_ns: int
) -> None:
    """``offset_ns``: truly the guest's clock less the backup's."""
    now_ns = stopped_ns - offset_ns + transfer_ns  # the backup's, when the SVM is about to run
    given_ns = secondary_offset(offset_ns + wrong_ns, stopped_ns, now_ns)
    assert now_ns + given_ns >= stopped_ns
    if wrong_ns >= -transfer_ns:
        assert given_ns == offset_ns + wrong_ns
    else:
        assert now_ns + given_ns == stopped_ns
