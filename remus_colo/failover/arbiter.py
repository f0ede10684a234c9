# SPDX-License-Identifier: LGPL-2.1-or-later
"""Is the silent peer really gone? What a fencing hook's exit status and a LAN probe's observations mean.

Pure: running the hook and sending the probes is done elsewhere.

Both hosts may ask.  With a *passive* arbiter, such as the LAN probe, a primary that ran on time need not
ask: it is seen to be alive.  With a hook that *switches the other host off*, both hosts must ask before they
act, since otherwise the primary releases output that the backup, having switched it off, does not know of.
"""

from __future__ import annotations

import enum
from collections.abc import Collection

from remus_colo.errors import ConfigError


class Verdict(enum.Enum):
    DEAD = "dead"  # the peer does not run the guest, and will not
    ALIVE = "alive"
    UNKNOWN = "unknown"


# To a primary that asks about its backup: whether the SVM is the guest now; None if nobody can tell.
ACTIVE = {Verdict.DEAD: False, Verdict.ALIVE: True, Verdict.UNKNOWN: None}


def of_all(verdicts: Collection[Verdict]) -> Verdict:
    """What looks at several LANs come to: one that sees the peer is enough, one that cannot tell leaves it open."""
    return next((v for v in (Verdict.ALIVE, Verdict.UNKNOWN) if v in verdicts), Verdict.DEAD)


# The hook's exit statuses; every other one, a signal and a time-out are UNKNOWN.
HOOK_DEAD = 0
HOOK_ALIVE = 1


def hook_verdict(exit_status: int | None) -> Verdict:
    """:param exit_status: the hook's, None if it was not done in time or could not be started."""
    return {HOOK_DEAD: Verdict.DEAD, HOOK_ALIVE: Verdict.ALIVE}.get(
        -1 if exit_status is None else exit_status, Verdict.UNKNOWN
    )


class LanProbe:
    """Decides by who answers on the LAN.

    One answer from the peer's guest (or from the peer itself) proves it alive at once.  Silence proves it
    dead only if it lasts for a whole window in which we ran without a gap and that began with a LAN that was seen to
    work: a host that was frozen, or that has lost its own LAN, knows nothing.

    :param window_s: must exceed the longest pause of a PVM that is still alive: the longest checkpoint
        pause, and the limit of the primary's ``SelfMonitor``.
    :param gap_s: a longer time between two observations starts the window again.
    """

    def __init__(self, window_s: float, gap_s: float) -> None:
        if not 0 < gap_s < window_s:
            raise ConfigError(f"a LAN probe of {window_s} s cannot bear gaps of {gap_s} s")
        self.window_s = window_s
        self.gap_s = gap_s
        self._begun_s: float | None = None
        self._last_s = 0.0
        self._lan_works = False

    def observe(self, now_s: float, *, peer_answers: bool, lan_works: bool) -> Verdict | None:
        """Takes what was seen since the last call.

        :param peer_answers: the guest, or the peer's host, answered a probe sent after the first call.
        :param lan_works: something else proved that our LAN side works, such as another host's answer.
        :return: the verdict, or None: go on probing.
        """
        if peer_answers:
            return Verdict.ALIVE
        if self._begun_s is None or now_s - self._last_s > self.gap_s:
            self._begun_s = now_s
            self._lan_works = False
        self._last_s = now_s
        if lan_works and not self._lan_works:
            self._lan_works = True
            self._begun_s = now_s  # up to now silence told nothing
        if now_s - self._begun_s < self.window_s:
            return None
        return Verdict.DEAD if self._lan_works else Verdict.UNKNOWN
