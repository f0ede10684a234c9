# SPDX-License-Identifier: LGPL-2.1-or-later
"""The interface that patches/ add to Xen: whether it is there is asked of Xen, and never of its version."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from remus_colo.adapters import xenctrl, xentime
from remus_colo.errors import XenError
from remus_colo.testbed import xen_build, xen_source

CORE = Path(xenctrl.__file__).parents[1] / "_native" / "core.c"
DOMID = 7


class Xen:
    """The two calls of the compiled part. :ivar error: what both fail with, 0 if they do not."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.offsets = {0: 0, DOMID: 0}
        self.now_ns = 700 * 10**9
        self.ffi = SimpleNamespace(errno=0, new=lambda _: [0])
        self.lib = self

    def _outcome(self, domid: int) -> int:
        self.ffi.errno = self.error or (0 if domid in self.offsets else errno.ESRCH)
        return -1 if self.ffi.errno else 0

    def rc_system_time_get(self, domid: int, offset: list[int], now: list[int]) -> int:
        outcome = self._outcome(domid)
        if outcome == 0:
            offset[0], now[0] = self.offsets[domid], self.now_ns + self.offsets[domid]
        return outcome

    def rc_system_time_set(self, domid: int, offset_ns: int) -> int:
        outcome = self._outcome(domid)
        if outcome == 0:
            self.offsets[domid] = offset_ns
        return outcome

    def rc_runstate(self, vcpu: int, entry: list[int], total: list[int]) -> int:
        entry[0] = total[0] = self.now_ns
        return 0


@pytest.fixture
def xen(monkeypatch: pytest.MonkeyPatch) -> Xen:
    xen = Xen()
    monkeypatch.setattr(xenctrl, "compiled_for_xen", lambda: (xen.lib, xen.ffi))
    return xen


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES])
def test_a_xen_that_does_not_know_it_or_does_not_let_us(xen: Xen, error: int) -> None:
    """A guest's clock is its host's then."""
    xen.error = error
    assert xenctrl.system_time(0) is None
    assert xentime.GuestClock(DOMID).now_ns() == xen.now_ns


def test_a_guest_that_is_not_there_is_no_sign_of_an_older_xen(xen: Xen) -> None:
    with pytest.raises(XenError) as raised:
        xenctrl.system_time(5)
    assert raised.value.errno == errno.ESRCH


@pytest.mark.parametrize("offset_ns", [600 * 10**9, -600 * 10**9])
def test_a_guests_clock_is_its_hosts_and_what_was_added(xen: Xen, offset_ns: int) -> None:
    """So that what a guest brought along from another host counts when it is protected in the other direction."""
    clock = xentime.GuestClock(DOMID)
    assert clock.now_ns() == xen.now_ns
    xenctrl.set_system_time_offset(DOMID, offset_ns)
    assert clock.now_ns() == xen.now_ns + offset_ns
    assert xenctrl.system_time(DOMID) == xenctrl.SystemTime(offset_ns, xen.now_ns + offset_ns)


def test_a_refusal_is_told(xen: Xen) -> None:
    xen.error = errno.ERANGE
    with pytest.raises(XenError, match="could not set the system time offset for domain 7") as raised:
        xenctrl.set_system_time_offset(DOMID, -(10**18))
    assert raised.value.errno == errno.ERANGE


@pytest.mark.parametrize("offset_ns", [1 << 63, -(1 << 63) - 1, 10**30])
def test_an_offset_that_does_not_fit_the_call_is_refused_as_xen_refuses_one(xen: Xen, offset_ns: int) -> None:
    """It was an OverflowError, which a session takes for its own bug."""
    with pytest.raises(XenError) as raised:
        xenctrl.set_system_time_offset(DOMID, offset_ns)
    assert raised.value.errno == errno.ERANGE
    assert xen.offsets[DOMID] == 0


@pytest.mark.parametrize("release", xen_source.SUITES)
def test_what_the_series_declare_is_what_is_called(release: str) -> None:
    """No header that both sides could include has it."""
    added = "".join(
        line[1:]
        for patch in sorted((xen_build.PATCHES / release / "hypervisor").glob("*.patch"))
        for line in patch.read_text().splitlines(keepends=True)
        if line.startswith("+")
    )
    called = CORE.read_text()
    for name in ("SET", "GET"):
        ours = re.search(rf"#define RC_DOMCTL_{name}_SYSTEM_TIME_OFFSET (\d+)u", called)
        theirs = re.search(rf"#define XEN_DOMCTL_{name.lower()}_system_time_offset +(\d+)", added)
        assert ours and theirs and ours[1] == theirs[1]
    fields = [
        re.findall(r"(\w+_t|\w+_aligned_t) (\w+);", text.partition(struct)[2].partition("};")[0])
        for text, struct in (
            (called, "struct rc_domctl_system_time_offset {"),
            (added, "struct xen_domctl_system_time_offset {"),
        )
    ]
    assert fields[0] == [(kind.replace("_aligned", ""), name) for kind, name in fields[1]]
    assert [name for _, name in fields[0]] == ["offset", "system_time", "pad"]
