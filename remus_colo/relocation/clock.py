# SPDX-License-Identifier: LGPL-2.1-or-later
"""The difference of the two hosts' Xen clocks, from exchanges of CLOCK_PROBE and CLOCK_REPLY.

The arithmetic is NTP's (RFC 5905, section 8).  Pure: the time stamps come from the caller.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from remus_colo.errors import MessageError


@dataclass(frozen=True, slots=True)
class ClockSample:
    """One exchange. All stamps are Xen system time in nanoseconds, each of the host that took it.

    :raise MessageError: the stamps run backwards.
    """

    sent_ns: int  # primary: CLOCK_PROBE leaves
    received_ns: int  # backup: CLOCK_PROBE has come
    replied_ns: int  # backup: CLOCK_REPLY leaves
    returned_ns: int  # primary: CLOCK_REPLY has come

    def __post_init__(self) -> None:
        if self.replied_ns < self.received_ns or self.round_trip_ns < 0:
            raise MessageError(f"the time stamps of a clock probe run backwards: {self}")

    @property
    def round_trip_ns(self) -> int:
        """Time on the network, there and back."""
        return (self.returned_ns - self.sent_ns) - (self.replied_ns - self.received_ns)

    @property
    def offset_ns(self) -> int:
        """Backup's clock minus primary's; off by at most :attr:`error_ns`."""
        return ((self.received_ns - self.sent_ns) + (self.replied_ns - self.returned_ns)) // 2

    @property
    def error_ns(self) -> int:
        """Bound of the error: the whole network time may have been spent one way."""
        return (self.round_trip_ns + 1) // 2


def best_sample(samples: Iterable[ClockSample]) -> ClockSample:
    """The exchange with the shortest round trip, hence the smallest error.

    :raise MessageError: there is none.
    """
    best = min(samples, key=lambda sample: sample.round_trip_ns, default=None)
    if best is None:
        raise MessageError("the backup host answered no clock probe")
    return best
