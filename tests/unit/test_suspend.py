# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest that is asked to suspend itself, and does not: why, and that it is not to do so later."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from remus_colo.checkpoint.suspend import Suspender
from remus_colo.errors import DomainError


class Store:
    """One node, and watches at which nothing happens."""

    def __init__(self) -> None:
        self.request = ""

    def write(self, _path: str, value: str) -> None:
        self.request = value

    def replace(self, _path: str, old: str, new: str) -> bool:
        found = self.request == old
        self.request = new if found else self.request
        return found

    @contextlib.contextmanager
    def watch(self, _paths: Sequence[str]) -> Iterator[Any]:
        yield self

    def wait(self, condition: Callable[[], bool], *, timeout_s: float) -> bool:
        return condition()


@pytest.mark.parametrize(
    ("paused", "why"),
    [
        (False, "its kernel must support Xen suspend"),
        (True, r"it is paused; a protected guest has to run \(xl unpause 7\)"),
    ],
)
def test_a_guest_that_does_not_suspend(paused: bool, why: str) -> None:
    info = SimpleNamespace(shutdown=False, paused=paused)
    guest: Any = SimpleNamespace(domid=7, info=lambda: info)
    store: Any = Store()
    with (
        Suspender(guest, store) as suspender,
        pytest.raises(DomainError, match=f"did not suspend within 60 s: {why}"),
    ):
        suspender.suspend()
    assert store.request == ""
