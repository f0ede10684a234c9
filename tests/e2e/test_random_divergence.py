# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the VMs answer differently costs one checkpoint, what they answer alike none."""

from __future__ import annotations

import re

import pytest

from remus_colo.testbed import load_content, scenario_figures
from remus_colo.testbed.scenario import Protection
from remus_colo.testbed.scenario_run import Run
from remus_colo.testbed.scenario_trial import client_faults

# Only a real difference may ask for a checkpoint: no period, and time enough for an emulated SVM to answer.
ONLY_DIVERGENCE = {"period": 0, "compare_timeout": 30_000}


def checkpoints(run: Run) -> dict[str, int]:
    return scenario_figures.checkpoints(run.events)


def get_1k(protection: Protection) -> None:
    assert protection.http_get("/1k") == load_content.content("1k", 1_000)


def test_one_random_answer_is_one_checkpoint(protection: Protection) -> None:
    protection.ensure_guest()
    protection.start_daemon()
    run = protection.protect(**ONLY_DIVERGENCE)
    get_1k(protection)
    assert checkpoints(run) == {"start": 1}

    answers = set()
    for count in (1, 2):
        answer = protection.http_get("/random")
        assert re.fullmatch(rb"[0-9a-f]{64}\n", answer)
        answers.add(answer)
        run.wait_event("svm-resumed", 60, epoch=1 + count)
        get_1k(protection)  # whatever the divergence left behind has shown by the time this is answered
        assert checkpoints(run) == {"start": 1, "tcp-payload": count}
    assert len(answers) == 2

    assert protection.stop() == 0


@pytest.mark.long
def test_answers_that_are_alike_leave_at_once(protection: Protection) -> None:
    protection.ensure_guest()
    protection.start_daemon()
    run = protection.protect(**ONLY_DIVERGENCE)
    assert client_faults(protection.load(15, rate=4)) == []
    assert protection.stop() == 0
    assert checkpoints(run) == {"start": 1}
    share = scenario_figures.released_share(run.events)
    assert share is not None and share >= 0.95
