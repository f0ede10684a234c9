# SPDX-License-Identifier: LGPL-2.1-or-later
"""Latency histogram, gap meter, and the result that is made of them."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remus_colo.testbed import load_report
from remus_colo.testbed.load_check import Verdict
from remus_colo.testbed.load_report import Recorder
from remus_colo.testbed.load_stats import Gap, GapMeter, Histogram

# A busy machine is no counter-example.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

durations = st.lists(st.floats(min_value=1e-6, max_value=1000), min_size=1, max_size=200)


@given(durations, st.floats(min_value=0.01, max_value=1))
def test_a_quantile_is_at_most_two_percent_off(values: list[float], share: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    ordered = sorted(values)
    exact = next(value for i, value in enumerate(ordered, start=1) if i >= share * len(ordered))
    assert exact * 0.999 <= histogram.quantile_s(share) <= exact * 1.0201
    assert histogram.longest_s == max(values)


@given(durations, durations)
def test_merged_histograms_are_that_of_all_values(one: list[float], other: list[float]) -> None:
    both, first, second = Histogram(), Histogram(), Histogram()
    for value in one:
        first.add(value)
        both.add(value)
    for value in other:
        second.add(value)
        both.add(value)
    first.merge(second)
    assert [first.quantile_s(q) for q in (0.1, 0.5, 0.99)] == [both.quantile_s(q) for q in (0.1, 0.5, 0.99)]
    assert (first.count, first.longest_s) == (both.count, both.longest_s)


def test_an_empty_histogram_has_no_duration() -> None:
    assert Histogram().quantile_s(0.5) == 0.0


def test_idle_time_is_no_gap() -> None:
    meter = GapMeter()
    meter.begin(1.0)
    meter.reply(1.25)
    meter.end(1.25)
    meter.begin(100.0)
    meter.reply(100.125)
    meter.end(100.125)
    assert meter.longest() == [Gap(0.25, 1.0), Gap(0.125, 100.0)]
    assert meter.open_s(200.0) == 0.0
    assert meter.close(200.0) is None


def test_replies_to_others_end_a_gap() -> None:
    meter = GapMeter()
    meter.begin(0.0)  # this one is never answered
    for now_s in (1.0, 2.0, 3.5):
        meter.begin(now_s - 0.5)
        meter.reply(now_s)
        meter.end(now_s)
    assert meter.longest()[0] == Gap(1.5, 2.0)
    assert meter.close(10.0) == Gap(6.5, 3.5)


def test_a_gap_counts_even_if_everybody_gives_up() -> None:
    meter = GapMeter()
    meter.begin(0.0)
    meter.end(5.0)
    assert meter.longest() == [Gap(5.0, 0.0)]


def test_the_open_gap_runs_from_the_last_reply() -> None:
    meter = GapMeter()
    meter.begin(0.0)
    meter.begin(1.0)
    assert meter.reply(2.0) == Gap(2.0, 0.0)
    meter.end(2.0)
    assert meter.open_s(6.0) == 4.0


@given(st.lists(st.floats(min_value=0.001, max_value=10), min_size=1, max_size=50))
def test_the_longest_gap_is_kept_whatever_follows(steps: list[float]) -> None:
    meter = GapMeter()
    now_s = 0.0
    meter.begin(now_s)
    seen = []
    for step in steps:
        seen.append(meter.reply(now_s + step))
        now_s += step
    assert meter.longest()[0].duration_s == max(gap.duration_s for gap in seen)
    assert len(meter.longest()) == min(len(steps), 10)


# -- the result


def recorded(log: io.StringIO | None = None) -> Recorder:
    """A recorder that has seen one reply of each of two services."""
    recorder = Recorder(["redis", "http"], gap_limit_s=0.2, log=log)
    recorder.start(0.0, "run")
    recorder.begin("redis", 1.0)
    recorder.begin("http", 1.0)
    recorder.reply("redis", 1.1, 0.1)
    recorder.end("redis", 1.1)
    recorder.reply("http", 1.5, 0.5)
    recorder.end("http", 1.5)
    return recorder


def finished(recorder: Recorder) -> dict[str, object]:
    recorder.close(10.0)
    recorder.redis_verified = True
    return recorder.result()


def test_the_result_adds_the_services_up() -> None:
    result = finished(recorded())
    assert result["requests"] == 2
    assert result["rate"] == 0.2
    assert result["longest_gap_ms"] == 400.0
    assert result["longest_gap_start_s"] == 1.1
    assert result["services"]["http"]["longest_gap_ms"] == 500.0  # type: ignore[index]
    assert result["max_ms"] == 500.0
    assert load_report.clean(result)
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize(
    "verdict",
    [
        Verdict(wrong_bytes=1, fault="wrong"),
        Verdict(lost_writes=1, fault="lost"),
        Verdict(repeated_writes=1, fault="repeated"),
        Verdict(fault="any"),
    ],
)
def test_a_fault_makes_the_result_unclean(verdict: Verdict) -> None:
    recorder = recorded()
    recorder.verdict("redis", "redis-0", verdict, 2.0)
    result = finished(recorder)
    assert not load_report.clean(result)
    assert result["errors"] == 1
    assert result["wrong_bytes"] == verdict.wrong_bytes
    assert result["lost_writes"] == verdict.lost_writes
    assert result["repeated_writes"] == verdict.repeated_writes


@pytest.mark.parametrize(("kind", "resets"), [("reset", 1), ("eof", 1), ("timeout", 0), ("connect", 0)])
def test_an_error_makes_the_result_unclean(kind: str, resets: int) -> None:
    recorder = recorded()
    recorder.error("http", "http-0", kind, "detail", 2.0)
    result = finished(recorder)
    assert not load_report.clean(result)
    assert (result["errors"], result["resets"]) == (1, resets)


def test_keys_that_cannot_be_read_back_make_the_result_unclean() -> None:
    recorder = recorded()
    recorder.close(10.0)
    recorder.redis_verified = False
    assert not load_report.clean(recorder.result())


def test_a_load_without_a_reply_is_not_clean() -> None:
    recorder = Recorder(["http"], gap_limit_s=0.2, log=None)
    recorder.start(0.0, "run")
    assert not load_report.clean(finished(recorder))


def test_the_log_has_long_gaps_and_errors_with_their_times() -> None:
    log = io.StringIO()
    recorder = recorded(log)
    recorder.error("http", "http-3", "reset", "detail", 2.0)
    recorder.begin("http", 2.0)
    finished(recorder)
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [(line["event"], line.get("service"), line.get("ms")) for line in lines] == [
        ("start", None, None),
        ("gap", "http", 500.0),
        ("gap", "all", 400.0),
        ("error", "http", None),
        ("end", None, None),
        ("gap", "http", 8000.0),
        ("gap", "all", 8000.0),
    ]
    assert lines[3] == {
        "t": 2.0, "event": "error", "service": "http", "connection": "http-3", "kind": "reset", "detail": "detail",
    }  # fmt: skip
    assert (lines[2]["t"], lines[2]["start_s"]) == (1.5, 1.1)


def test_progress_tells_an_outage_while_it_lasts() -> None:
    recorder = recorded()
    recorder.begin("redis", 3.0)
    assert recorder.progress(4.0)["open_gap_ms"] == 1000.0
    assert recorder.progress(4.0)["requests"] == 2


def test_the_guests_clock_is_judged_against_the_clients() -> None:
    recorder = recorded()
    # A reply that is late says little: the guest may have read its clock at any moment meanwhile.
    for guest_ns, sent_s, arrived_s in (
        (1_000, 5.0, 5.1),
        (2_500, 6.0, 6.1),
        (2_500, 5.0, 9.0),
        (2_900, 7.1, 7.2),
    ):
        recorder.clock.read(guest_ns * 1_000_000, sent_s, arrived_s)
    assert finished(recorder)["guest_clock"] == {"readings": 4, "behind_ms": 100.0, "ahead_ms": 400.0}


def test_the_table_has_a_line_per_service_and_one_for_all() -> None:
    lines = load_report.table(finished(recorded())).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["redis", "http", "all"]
