# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pure parts of scenarios: figures out of events, a host's state out of what its tools print, the demo's
verdict.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from remus_colo.testbed import (
    bench,
    demo,
    scenario_endurance,
    scenario_figures,
    scenario_host,
    scenario_run,
    verdicts,
)
from remus_colo.testbed.scenario_trial import Outcome, client_faults


def checkpoint(reason: str, pause_ms: float) -> dict[str, Any]:
    return {"event": "checkpoint", "reason": reason, "pause_ms": pause_ms}


EVENTS = [
    {"event": "mode", "mode": "transparent"},
    checkpoint("start", 900.0),
    {"event": "counters", "released_equal": 10, "released_commit": 5},
    checkpoint("period", 3.0),
    checkpoint("tcp-payload", 1.0),
    checkpoint("period", 2.0),
    {"event": "counters", "released_equal": 90, "released_commit": 10},
    {"event": "ended"},
]


def test_figures_of_events() -> None:
    assert scenario_figures.checkpoints(EVENTS) == {"period": 2, "start": 1, "tcp-payload": 1}
    assert scenario_figures.pauses_ms(EVENTS) == [3.0, 1.0, 2.0]
    assert scenario_figures.released_share(EVENTS) == 0.9


def test_the_longest_round() -> None:
    made = [{"event": "checkpoint", "t": t * 10**6} for t in (100, 350, 400)]
    assert scenario_figures.longest_round_ms([*made, {"event": "ended", "t": 10**12}]) == 250.0
    assert scenario_figures.longest_round_ms(made[:1]) == 0.0


def test_figures_of_no_events() -> None:
    assert scenario_figures.checkpoints([]) == {}
    assert scenario_figures.released_share([]) is None
    assert (
        scenario_figures.released_share([{"event": "counters", "released_equal": 0, "released_commit": 0}])
        is None
    )


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.5, 2), (0.51, 3), (0.99, 4), (1.0, 4)])
def test_quantile(share: float, value: int) -> None:
    assert scenario_figures.quantile([3, 1, 4, 2], share) == value


def test_quantile_of_nothing() -> None:
    assert scenario_figures.quantile([], 0.5) is None


def test_failover_ends_with_the_first_long_gap_after_the_death() -> None:
    gaps = [
        (10.0, 14.0),  # before
        (19.9, 20.2),  # a reply that was on its way when the host died
        (20.2, 24.5),  # the failover
        (30.0, 33.0),
    ]
    assert scenario_figures.failover_s(gaps, 20.0, at_least_s=1.5) == 4.5


def test_no_failover() -> None:
    assert scenario_figures.failover_s([(10.0, 14.0), (20.0, 20.5)], 20.0, at_least_s=1.5) is None


def test_a_table_is_aligned() -> None:
    assert (
        scenario_figures.table([("", "ms"), ("redis", 1.5), ("all", None)])
        == "        ms\nredis  1.5\n  all    -"
    )


REPORT = """\
== link
1: lo: <LOOPBACK,UP,LOWER_UP> mtu 65536 qdisc noqueue state UNKNOWN mode DEFAULT group default qlen 1000\\    link/loopback
2: eth-lan: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500 qdisc fq_codel master xenbr0 state UP mode DEFAULT\\    link/ether
5: vif1.0: <BROADCAST,MULTICAST,NOARP,UP> mtu 1500 qdisc plug master xenbr0 state UP mode DEFAULT\\    link/ether
6: rcpdc7d2d.0: <BROADCAST,NOARP,UP,LOWER_UP> mtu 1500 qdisc plug state UNKNOWN mode DEFAULT\\    link/ether
7: veth0@if3: <BROADCAST,UP> mtu 1500 qdisc noqueue state UP mode DEFAULT\\    link/ether
== qdisc
qdisc noqueue 0: dev lo root refcnt 2
qdisc fq_codel 0: dev eth-lan root refcnt 2 limit 10240p
qdisc clsact ffff: dev vif1.0 parent ffff:fff1
qdisc plug 8001: dev rcpdc7d2d.0 root refcnt 2
== table
table bridge remus_colo_pvm_1
table inet mine
== process
COMMAND
/usr/bin/python3 /usr/local/bin/remus --colo web backup
/usr/bin/python3 /usr/local/bin/remusd --foreground
xl restore -p /proc/self/fd/19
tail -n +1 -f /var/log/remus-1.json
xl create -q /domu/web.cfg
== domain
Name                                        ID   Mem VCPUs      State   Time(s)
Domain-0                                     0  1500     1     r-----      50.1
web                                          1   256     1     -b----      10.1
web--secondary                               2   256     1     --p---       0.0
"""


def test_a_host_is_parsed() -> None:
    state = scenario_host.parse(REPORT)
    assert state.links == {"lo", "eth-lan in xenbr0", "vif1.0 in xenbr0", "rcpdc7d2d.0", "veth0"}
    assert dict(state.domains) == {"web": 1, "web--secondary": 2}
    assert state.leftovers() == sorted([
        "link rcpdc7d2d.0",
        "qdisc clsact ffff: dev vif1.0 parent ffff:fff1",
        "qdisc plug 8001: dev rcpdc7d2d.0 root refcnt 2",
        "table bridge remus_colo_pvm_1",
        "process /usr/bin/python3 /usr/local/bin/remus --colo web backup",
        "process /usr/bin/python3 /usr/local/bin/remusd --foreground",
        "process xl restore -p /proc/self/fd/19",
        "domain web--secondary",
    ])  # fmt: skip


def test_options_become_words() -> None:
    options = {"random_every": 5, "no_compression": True, "verbose": False, "fence": None, "rate": 0.0}
    assert scenario_run.words(options) == ["--random-every", "5", "--no-compression", "--rate", "0.0"]


def load_result(**changes: Any) -> dict[str, Any]:
    figures = {
        "requests": 100, "errors": 0, "wrong_bytes": 0, "resets": 0, "lost_writes": 0, "repeated_writes": 0,
        "longest_gap_ms": 4000.0, "redis_verified": True, "rate": 10.0, "p50_ms": 1.0, "p99_ms": 2.0, "max_ms": 3.0,
        "connections": 20,
    }  # fmt: skip
    figures |= changes
    kinds = {"reset": figures["resets"]} if figures["resets"] else {}
    return figures | {"services": {"redis": figures | {"error_kinds": kinds}}}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"resets": 2, "errors": 2}, "2 connections broken"),
        ({"wrong_bytes": 1, "errors": 1}, "1 wrong bytes"),
        ({"lost_writes": 1}, "1 acknowledged writes lost"),
        ({"repeated_writes": 3}, "3 writes repeated"),
        ({"redis_verified": False}, "the load could not be verified"),
        ({"requests": 0}, "the load could not be verified"),
    ],
)
def test_what_a_client_complains_of(changes: dict[str, Any], fault: str) -> None:
    assert client_faults(load_result(**changes)) == [fault]
    assert client_faults(load_result()) == []


def outcome(faults: list[str]) -> Outcome:
    return Outcome("primary", "transparent", load_result(), {"start": 1, "period": 2}, 0.97, 3500.0, faults)


def test_the_demos_summary_has_the_documented_keys() -> None:
    summary = demo.summary(outcome([]))
    assert list(summary) == [
        "requests", "errors", "wrong_bytes", "resets", "lost_writes", "longest_gap_ms", "checkpoints",
        "released_without_checkpoint", "failover_ms",
    ]  # fmt: skip
    json.dumps(summary)


def test_the_demos_story_ends_with_the_verdict() -> None:
    assert demo.story(outcome([])).endswith("The service survived the death of its host.")
    assert "did NOT survive: 1 wrong bytes." in demo.story(outcome(["1 wrong bytes"]))


def test_growth_is_told_from_noise() -> None:
    first = dict.fromkeys(scenario_endurance.ALLOWED, 1000)
    noise = {name: 1000 + allowed for name, allowed in scenario_endurance.ALLOWED.items()}
    assert scenario_endurance.growths([first, first, noise]) == []
    more = noise | {"fds": 1300}
    assert scenario_endurance.growths([first, more, more]) == ["fds grew from 1000 to 1300"]
    assert scenario_endurance.growths([first, first, more, first, more, first]) == [], "it comes and goes"
    assert scenario_endurance.growths([first, more]) == []


def test_the_benchs_report() -> None:
    figures = bench.figures([load_result(rate=10.0), load_result(rate=20.0)])
    assert figures["all"]["rate"] == 15.0
    slow, nothing = bench.figures([load_result(rate=7.5)]), {"count": 0, "p50": None, "p99": None}
    found = {
        "rounds": 1,
        "errors": {"remus 200 ms": 3},
        "unprotected": figures,
        "colo": slow,
        "remus 200 ms": bench.figures([load_result(rate=3.0)]),
        "checkpoints": {"start": 1},
        "pause_ms": nothing,
        "remus_pause_ms": {"remus 200 ms": nothing},
        "standstill_ms": {
            "200": {
                "xl remus": {
                    "count": 3,
                    "p50": 80.0,
                    "p99": 90.0,
                    "share": 0.08,
                    "stopped": {"count": 4, "p50": 60.0, "p99": 70.0, "resolution_ms": 1.5},
                }
            }
        },
        "released_without_checkpoint": 0.99,
    }
    shown = bench.report(found)
    assert "the load on the remus 200 ms guest saw 3 errors: its figures are not to be compared" in shown
    assert "rate, of the unprotected guest's: colo 0.50, remus 200 ms 0.20" in shown
    assert (
        "standstill that a client sees, xl remus -i 200: p50 80.0 ms, p99 90.0 ms (3 of them, 8% of the time)"
        in shown
    )
    assert (
        "as Xen has it, xl remus -i 200: p50 60.0 ms, p99 70.0 ms (4 of them; looked at every 1.5 ms)"
        in shown
    )


def test_verdicts_are_shares_of_all_packets() -> None:
    found = {
        "mode": "transparent",
        "requests": 100,
        "downloads": 2,
        "packets": {"released_equal": 97, "released_passed": 1, "released_commit": 2, "held": 0},
        "released_without_checkpoint": 0.9798,
        "checkpoints": {"period": 3, "tcp-payload": 1},
        "details": ["192.0.2.1:80 > 192.0.2.2:5000: byte 7"],
        "faults": ["2 wrong bytes"],
    }
    told = " ".join(verdicts.report(found).split())
    for words in ("97 97.00%", "3 75% period", "1 25% tcp-payload", "byte 7", "complains: 2 wrong bytes"):
        assert words in told
