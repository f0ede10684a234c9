# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which of the two checkpoint modes fits a guest and a pair of hosts. Pure.

A guest's clock is its host's Xen system time.  With D the backup's less the primary's, a transparent
checkpoint moves the guest's clock by D: forwards if D is positive, and if it is negative the SVM's clock
stands still until its host has caught up.  A guest that resumes itself starts its clock anew, so that a
co-operative checkpoint bears any D.  So does any checkpoint on a backup whose Xen can give a guest another clock
than its own (``patches/``): the SVM's is then made the PVM's.
"""

from __future__ import annotations

from dataclasses import dataclass

from remus_colo.checkpoint.guestinfo import Mode
from remus_colo.errors import DomainError

# Beyond these a client or a timer of the guest would notice: less than a scheduling delay backwards, which
# the SVM waits out, and less than TCP's shortest retransmission time-out (200 ms in Linux) forwards.
MAX_BEHIND_NS = 20_000_000
MAX_AHEAD_NS = 100_000_000


@dataclass(frozen=True, slots=True)
class Choice:
    mode: Mode
    why: str


def choose(
    requested: str,
    *,
    offset_ns: int,
    two_level_events: bool,
    settable_clock: bool = False,
) -> Choice:
    """:param requested: ``auto``, ``transparent`` or ``cooperative``.
    :param offset_ns: backup's Xen system time less the guest's clock, which is the primary's unless it came from
        another host with it.
    :param two_level_events: the guest uses the 2-level event channel ABI.
    :param settable_clock: the backup's Xen can add an offset to system time for one domain.
    :raise DomainError: transparent checkpoints were asked for and cannot work.
    """
    if requested == Mode.COOPERATIVE:
        return Choice(Mode.COOPERATIVE, "asked for")
    offset = f"{offset_ns / 1e9:+.3f} s"
    if not two_level_events:
        obstacle = "the guest uses FIFO event channels, whose state cannot be copied"
        remedy = "add xen.fifo_events=0 to its kernel command line"
    elif settable_clock:
        return Choice(
            Mode.TRANSPARENT,
            f"the backup's Xen, whose clock is {offset} from the guest's, lets a guest keep its own",
        )
    elif not -MAX_BEHIND_NS <= offset_ns <= MAX_AHEAD_NS:
        effect = "stand still" if offset_ns < 0 else "jump"
        obstacle = f"the backup's Xen clock is {offset} from the guest's, which would {effect}"
        remedy = "boot the backup host with a Xen that has a system time offset (patches/)"
    else:
        return Choice(Mode.TRANSPARENT, f"the backup's Xen clock is {offset} from the guest's")
    if requested == Mode.TRANSPARENT:
        raise DomainError(
            f"transparent checkpoints cannot work: {obstacle}; {remedy}, or use --checkpoint cooperative"
        )
    return Choice(Mode.COOPERATIVE, obstacle)
