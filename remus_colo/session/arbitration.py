# SPDX-License-Identifier: LGPL-2.1-or-later
"""On the backup: is the primary really dead?  Asked when it is lost, and looked into as soon as it is late."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from remus_colo.errors import RemusError
from remus_colo.failover.arbiter import Verdict
from remus_colo.session.loop import Loop
from remus_colo.session.parts import EventSink

log = logging.getLogger(__name__)


@dataclass(slots=True)
class EarlyVerdict:
    """A look that began while the primary was only late."""

    verdict: Verdict | None = None
    waiting: Callable[[Verdict | None, BaseException | None], None] | None = None


class Arbitration:
    """Belongs to the loop's thread.

    :param judge: called in a thread of its own; an error of it is the verdict "unknown".
    :param decided: called with each verdict that was asked for.
    """

    def __init__(
        self, loop: Loop, judge: Callable[[], Verdict], decided: Callable[[Verdict], None], event: EventSink
    ) -> None:
        self._loop = loop
        self._judge = judge
        self._decided = decided
        self._event = event
        self._early: EarlyVerdict | None = None

    def look_early(self) -> None:
        """The primary is late: begin, so that the verdict is there when it counts as lost.  Idempotent."""
        if self._early is not None:
            return
        self._early = early = EarlyVerdict()

        def looked(verdict: Verdict | None, error: BaseException | None) -> None:
            early.verdict = verdict if error is None else Verdict.UNKNOWN
            if early.waiting is not None:
                early.waiting(early.verdict, None)

        self._loop.thread("look", self._judge, looked)

    def forget(self) -> None:
        """It was late, not lost; the next silence is looked at anew."""
        if self._early is not None and self._early.verdict is not None:
            self._early = None

    def ask(self) -> None:
        """The primary is lost."""
        started_s = time.monotonic()

        def decided(verdict: Verdict | None, error: BaseException | None) -> None:
            if error is not None or verdict is None:
                log.error(
                    "the arbiter failed: %s", error, exc_info=None if isinstance(error, RemusError) else error
                )
                verdict = Verdict.UNKNOWN
            self._event(
                "verdict", verdict=verdict.value, took_ms=round((time.monotonic() - started_s) * 1000)
            )
            self._decided(verdict)

        early, self._early = self._early, None
        if early is None or early.verdict is Verdict.ALIVE:  # it may have died since
            self._loop.thread("arbiter", self._judge, decided)
        elif early.verdict is None:
            early.waiting = decided
        else:
            decided(early.verdict, None)
