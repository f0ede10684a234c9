# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which packet queues a vif's packets go through: numbers of a network namespace, 16 bits wide (``nfnetlink_queue.h``).

A vif always gets the same numbers unless another has them, so that they tell people whose they are.
"""

from __future__ import annotations

from collections.abc import Set

from remus_colo.errors import NetworkError

# Numbers below are people's own.
PVM_NUMBERS = range(20000, 40000)
SVM_NUMBERS = range(42000, 62000)


def queue_numbers(numbers: range, width: int, domid: int, handle: int, taken: Set[int]) -> range:
    """So many neighbouring queue numbers for a vif.

    :param numbers: to choose from.
    :param width: how many.
    :param taken: numbers of the queues that there are.
    :raise NetworkError: there are no more.
    """
    places = len(numbers) // width
    for step in range(places):
        first = numbers.start + (domid * 16 + handle + step) % places * width
        chosen = range(first, first + width)
        if taken.isdisjoint(chosen):
            return chosen
    raise NetworkError(
        f"no packet queue is free for vif{domid}.{handle}: all numbers from {numbers.start} to {numbers.stop - 1} are taken"
        " (/proc/net/netfilter/nfnetlink_queue): end what uses them"
    )
