# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attacks the receiver for as long as it is told, and tells what it has held out against.  ``make fuzz`` runs it.

Many attackers at a time, of different addresses, beside one protection that makes checkpoints all the while.
Memory is read when nobody attacks, once after the warm-up and once at the end.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import logging
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from receiver_attack import attack, carry_out
from receiver_harness import PATIENCE_S, Receiver, descriptors, eventually, resident_bytes, under_attack

CERTIFICATES = Path(__file__).parents[1] / "data" / "tls"
WARM_UP = 0.2  # of the whole time
# In ten minutes a leak of 1 KiB an attack comes to far more.
SLACK_BYTES = 4 * 1024 * 1024
M_ARENA_MAX = -8  # malloc.h


def steady_memory() -> Callable[[], None]:
    """Keep glibc from giving each thread an arena of its own, which grow for a long time without a leak.

    :return: gives back to the system what is free.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_ARENA_MAX, 1)

    def trim() -> None:
        gc.collect()
        libc.malloc_trim(0)

    return trim


def assault(receiver: Receiver, seeds: itertools.count[int], attackers: int, seconds: float) -> int:
    """Attack from several threads; the number of attacks."""
    end_s = time.monotonic() + seconds
    done = itertools.count()

    def run(number: int) -> None:
        while time.monotonic() < end_s:
            seed = next(seeds)
            carry_out(receiver, attack(random.Random(seed), 1 + seed % (2**32 - 1)), f"127.0.0.{2 + number}")
            next(done)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(attackers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads), "an attacker hangs, so the receiver does"
    return next(done)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--attackers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    logging.getLogger("remus_colo").propagate = False
    logging.getLogger("remus_colo").addHandler(logging.NullHandler())
    print(f"seed {options.seed}, {options.seconds:.0f} s", flush=True)
    seeds = itertools.count(options.seed)
    trim = steady_memory()
    with under_attack(CERTIFICATES) as (receiver, healthy):
        healthy.checkpoint()
        idle = descriptors(), threading.active_count()
        checkpoints, slowest_s, running = 0, 0.0, True

        def protect() -> None:
            nonlocal checkpoints, slowest_s
            while running:
                started_s = time.monotonic()
                healthy.checkpoint()
                slowest_s = max(slowest_s, time.monotonic() - started_s)
                checkpoints += 1
                time.sleep(0.02)

        protection = threading.Thread(target=protect)
        protection.start()
        figures = []
        attacks = 0
        for part in (WARM_UP, 1 - WARM_UP):
            attacks += assault(receiver, seeds, options.attackers, options.seconds * part)
            eventually(lambda: receiver.server.threads() == 1, "a connection's thread did not end")
            trim()
            figures.append((resident_bytes(), attacks))
        running = False
        protection.join(PATIENCE_S)
        assert not protection.is_alive(), "the healthy protection hangs"
        eventually(lambda: (descriptors(), threading.active_count()) == idle, "something was left behind")
        grown = figures[1][0] - figures[0][0]
        result = {
            "attacks": attacks,
            "refused": receiver.refused,
            "sessions": receiver.served,
            "checkpoints_applied": receiver.applied,
            "healthy_checkpoints": checkpoints,
            "slowest_healthy_checkpoint_s": round(slowest_s, 2),
            "descriptors_left": descriptors() - idle[0],
            "threads_left": threading.active_count() - idle[1],
            "resident_mib": [round(resident / 2**20, 1) for resident, _ in figures],
            "grown_bytes_per_attack": round(grown / max(1, figures[1][1] - figures[0][1])),
            "unexpected_exceptions": len(receiver.failures.found),
        }
        print("\n".join(receiver.failures.found[:5]), file=sys.stderr)
    print(json.dumps(result))
    return 0 if grown <= SLACK_BYTES and not result["unexpected_exceptions"] else 1


if __name__ == "__main__":
    sys.exit(main())
