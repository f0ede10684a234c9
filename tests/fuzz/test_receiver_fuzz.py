# SPDX-License-Identifier: LGPL-2.1-or-later
"""The receiver under attack: no crash, nothing left behind, nothing that hangs, and a protection beside it
that goes on.

``fuzz_receiver.py`` does the same for as long as it is told.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from receiver_attack import attack, carry_out
from receiver_harness import Healthy, Receiver, descriptors, eventually, under_attack

CERTIFICATES = Path(__file__).parents[1] / "data" / "tls"
# Another run tries others; REMUS_COLO_TEST_SEED repeats one.
SEED = int(os.environ.get("REMUS_COLO_TEST_SEED", random.randrange(1 << 32)))


@pytest.fixture(scope="module")
def attacked() -> Iterator[tuple[Receiver, Healthy]]:
    with under_attack(CERTIFICATES) as made:
        made[1].checkpoint()
        yield made


@pytest.mark.parametrize("round_", range(3))
def test_attacks_one_at_a_time(attacked: tuple[Receiver, Healthy], round_: int) -> None:
    """Each leaves nothing: so what does can be named."""
    receiver, healthy = attacked
    before = descriptors(), threading.active_count()
    for index in range(15):
        seed = SEED + 15 * round_ + index
        carry_out(receiver, attack(random.Random(seed), 1 + seed))
        # all that is left is the healthy protection's own
        eventually(lambda: receiver.server.threads() == 1, f"a connection's thread did not end: seed {seed}")
        eventually(
            lambda: (descriptors(), threading.active_count()) == before,
            f"something was left behind: seed {seed}",
        )
        assert receiver.server.admission.taken() == 0, f"seed {seed}"
        assert receiver.failures.found == [], f"seed {seed}"
    healthy.checkpoint()


def test_attacks_many_at_a_time(attacked: tuple[Receiver, Healthy]) -> None:
    receiver, healthy = attacked

    def run(number: int) -> None:
        first = SEED + 1000 * number
        for seed in range(first, first + 10):
            carry_out(receiver, attack(random.Random(seed), 1 + seed), f"127.0.0.{number}")

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2, 10)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        healthy.checkpoint()
    eventually(lambda: receiver.server.threads() == 1, f"a connection's thread did not end: seed {SEED}")
    assert receiver.server.admission.taken() == 0
    assert receiver.failures.found == [], f"seed {SEED}"


def test_the_attacks_get_far(attacked: tuple[Receiver, Healthy]) -> None:
    """A fuzzer that never gets past the door finds nothing."""
    receiver, _ = attacked
    served, applied, refused = receiver.served, receiver.applied, receiver.refused
    for seed in range(40):
        carry_out(receiver, attack(random.Random(seed), 1000 + seed))
    eventually(lambda: receiver.server.threads() == 1, "a connection's thread did not end")
    assert receiver.served - served >= 10
    assert receiver.applied - applied >= 3
    assert receiver.refused - refused >= 5
