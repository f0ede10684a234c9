# SPDX-License-Identifier: LGPL-2.1-or-later
"""The difference of the guest's clock and the backup's Xen clock, from exchanges of CLOCK_PROBE and CLOCK_REPLY.

The arithmetic is NTP's (RFC 5905, section 8).  Pure: the time stamps come from the caller.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from remus_colo.errors import MessageError


@dataclass(frozen=True, slots=True)
class ClockSample:
    """One exchange. All stamps are system time in nanoseconds, each of the clock of the side that took it.

    :raise MessageError: the stamps run backwards.
    """

    sent_ns: int  # who asks: CLOCK_PROBE leaves
    received_ns: int  # who answers: CLOCK_PROBE has come
    replied_ns: int  # who answers: CLOCK_REPLY leaves
    returned_ns: int  # who asks: CLOCK_REPLY has come

    def __post_init__(self) -> None:
        if self.replied_ns < self.received_ns or self.round_trip_ns < 0:
            raise MessageError(f"the time stamps of a clock probe run backwards: {self}")

    @property
    def round_trip_ns(self) -> int:
        """Time on the network, there and back."""
        return (self.returned_ns - self.sent_ns) - (self.replied_ns - self.received_ns)

    @property
    def offset_ns(self) -> int:
        """The clock of who answers minus that of who asks; off by at most :attr:`error_ns`."""
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


# How fast two hosts' Xen clocks may move apart.  They follow crystals that nothing disciplines: RFC 5905 (11.3) has
# 500 ppm as the most that it corrects, and PCs are commonly well within 100 ppm each.
DRIFT_PPM = 200
KEPT_SAMPLES = 64


@dataclass(frozen=True, slots=True)
class Estimate:
    """``offset_ns``: their clock minus ours; right to within ``error_ns``."""

    offset_ns: int
    error_ns: int


class ClockFilter:
    """The best of the latest exchanges: a short round trip is worth more than a late one, up to a point."""

    def __init__(self) -> None:
        self._samples: deque[ClockSample] = deque(maxlen=KEPT_SAMPLES)

    def add(self, sample: ClockSample) -> None:
        self._samples.append(sample)

    def estimate(self, now_ns: int) -> Estimate | None:
        """What the clocks differ by; None before the first exchange.

        :param now_ns: our clock, not before the last sample's ``returned_ns``.
        """

        def error_ns(sample: ClockSample) -> int:
            age_ns = max(0, now_ns - sample.returned_ns)
            return sample.error_ns + age_ns * DRIFT_PPM // 1_000_000

        best = min(tuple(self._samples), key=error_ns, default=None)
        return None if best is None else Estimate(best.offset_ns, error_ns(best))


def secondary_offset(measured_ns: int, stopped_ns: int, now_ns: int) -> int:
    """What Xen has to add to the backup's system time, so that the SVM's clock is the PVM's.

    However badly that was measured, the SVM's clock is not behind the moment at which the PVM was stopped: what
    the guest has seen of its clock lies before it.

    :param measured_ns: the guest's clock less the backup's Xen time.
    :param stopped_ns: the guest's clock when the PVM was stopped for the checkpoint that is being loaded.
    :param now_ns: the backup's Xen time, before the SVM is resumed.
    """
    return max(measured_ns, stopped_ns - now_ns)
