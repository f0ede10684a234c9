# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which packet queues a vif's packets go through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remus_colo.errors import NetworkError
from remus_colo.proxy.queue_numbers import PVM_NUMBERS, SVM_NUMBERS, queue_numbers

LARGEST_DOMID = 0x7FEF  # DOMID_FIRST_RESERVED less one (xen/include/public/xen.h)

domids = st.integers(0, LARGEST_DOMID)
handles = st.integers(0, 40)


@given(domids, handles)
def test_a_vif_has_the_same_numbers_each_time(domid: int, handle: int) -> None:
    chosen = queue_numbers(SVM_NUMBERS, 2, domid, handle, set())
    assert chosen == queue_numbers(SVM_NUMBERS, 2, domid, handle, set(PVM_NUMBERS))
    assert len(chosen) == 2 and set(chosen) <= set(SVM_NUMBERS)


@given(st.lists(st.tuples(domids, handles), max_size=20))
def test_no_two_vifs_share_a_number(vifs: list[tuple[int, int]]) -> None:
    taken: set[int] = set()
    for domid, handle in vifs:
        chosen = queue_numbers(SVM_NUMBERS, 2, domid, handle, taken)
        assert taken.isdisjoint(chosen)
        taken.update(chosen)


def test_domids_that_fall_together() -> None:
    (first,) = queue_numbers(PVM_NUMBERS, 1, 3, 0, set())
    (second,) = queue_numbers(PVM_NUMBERS, 1, 3 + 1250, 0, {first})
    assert second == first + 1


def test_one_of_a_pair_is_taken() -> None:
    first, second = queue_numbers(SVM_NUMBERS, 2, 3, 0, set())
    assert queue_numbers(SVM_NUMBERS, 2, 3, 0, {second}).start == first + 2


def test_no_number_is_left() -> None:
    with pytest.raises(NetworkError, match=r"no packet queue is free for vif3\.0"):
        queue_numbers(range(10, 14), 2, 3, 0, {10, 13})
