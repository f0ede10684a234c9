# SPDX-License-Identifier: LGPL-2.1-or-later
"""Xen system time, read from dom0: the clock that a guest's timers and time info are made of.

No hypercall tells it directly.  ``VCPUOP_get_runstate_info`` (public/vcpu.h) tells how long a vCPU has
been in each state, and the sum of these does not drift from system time.  So

    system time = creation time of the vCPU + sum

and the creation time, a constant, is found from below: ``state_entry_time - sum`` of one call is
creation time less how long ago the present state was entered, which is microseconds if the vCPU has
just been woken.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

RunstateReader = Callable[[], tuple[int, int]]


class XenClock:
    """Reads Xen system time in nanoseconds.

    :param runstate: returns ``(state_entry_time_ns, sum_ns)`` of vCPU 0.
    :param samples: how many fresh wake-ups calibrate the constant.
    """

    def __init__(self, runstate: RunstateReader, samples: int = 20) -> None:
        self._runstate = runstate
        self._lock = threading.Lock()
        self._created_ns: int | None = None
        for _ in range(samples):
            time.sleep(0.001)  # give up the vCPU, so that its present state is a new one
            self.now_ns()

    def now_ns(self) -> int:
        entry_ns, sum_ns = self._runstate()
        with self._lock:
            created_ns = entry_ns - sum_ns
            if self._created_ns is None or created_ns > self._created_ns:
                self._created_ns = created_ns
            return self._created_ns + sum_ns


def host_clock() -> XenClock:
    """The clock of this host.

    :raise HostError: if this is no Xen control domain or the compiled part is missing.
    """
    from remus_colo.adapters import xenctrl

    return XenClock(xenctrl.runstate)


class GuestClock:
    """Reads the clock of a guest, which is Xen system time unless Xen was told to add something to it."""

    def __init__(self, domid: int) -> None:
        from remus_colo.adapters import xenctrl

        self._domid = domid
        self._read = xenctrl.system_time
        self._host = None if self._read(domid) is not None else host_clock()

    def now_ns(self) -> int:
        """:raise XenError: errno ESRCH if the guest is gone."""
        if self._host is not None:
            return self._host.now_ns()
        time = self._read(self._domid)
        assert time is not None  # an interface of the running Xen does not go away
        return time.now_ns


def main() -> None:
    clock = host_clock()
    print(clock.now_ns(), time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW))


if __name__ == "__main__":
    main()
