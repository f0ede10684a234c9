# SPDX-License-Identifier: LGPL-2.1-or-later
"""What hooks of a save raise gets past C, at whatever moment: here qsort() calls back in libxenguest's place."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from remus_colo.adapters import savestream

cffi = pytest.importorskip("cffi", reason="cffi is not installed (Debian: python3-cffi)")
ELEMENTS = 20_000


class Signalled(Exception):
    pass


class Hooks:
    """Count what is called, and fail where it is told."""

    def __init__(self, fail_at: range = range(0)) -> None:
        self.calls = 0
        self._fail_at = fail_at

    def suspend(self) -> None:
        self.calls += 1
        if self.calls in self._fail_at:
            raise ValueError(f"call {self.calls}")


ffi = cffi.FFI()
ffi.cdef("void qsort(void *, size_t, size_t, int (*)(const void *, const void *));")
libc = ffi.dlopen(None)
function, failed = savestream._EXTERNS["suspend"]
compare = ffi.callback(
    "int(const void *, const void *)",
    lambda one, other: function(one),
    error=failed,
    onerror=savestream._raised_outside,
)
array = ffi.new("char[]", ELEMENTS)


def called_back(hooks: Any) -> savestream._Calls:
    """Many calls of ``suspend`` out of C."""
    with savestream._calling(hooks) as calls:
        libc.qsort(array, ELEMENTS, 1, compare)
    return calls


def test_all_is_called() -> None:
    hooks = Hooks()
    calls = called_back(hooks)
    assert (calls.error, hooks.calls >= ELEMENTS - 1) == (None, True)


def test_the_first_failure_counts(capfd: pytest.CaptureFixture[str]) -> None:
    hooks = Hooks(fail_at=range(10, 12))
    calls = called_back(hooks)
    assert str(calls.error) == "call 10"
    assert hooks.calls > 12  # libxenguest still has an HVM guest's device model log no more
    assert capfd.readouterr().err == ""


def test_what_a_signal_handler_raises_is_never_lost(capfd: pytest.CaptureFixture[str]) -> None:
    def handle(number: int, frame: object) -> None:
        raise Signalled

    before = signal.signal(signal.SIGALRM, handle)
    try:
        for attempt in range(40):
            hooks = Hooks()
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.002 + attempt * 0.000_05)
                calls = called_back(hooks)
            except Signalled:
                continue  # before or after C, where it does no harm
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert isinstance(calls.error, Signalled)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert capfd.readouterr().err == ""
