# SPDX-License-Identifier: LGPL-2.1-or-later
"""On the primary: has the backup taken the guest over?  Asked when it is lost, and may rightly hold this host
for dead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from remus_colo.errors import RemusError
from remus_colo.failover.arbiter import ACTIVE
from remus_colo.failover.primary import PrimaryEvent
from remus_colo.session.addresses import Known
from remus_colo.session.fence import run_hook
from remus_colo.session.lan import ANNOUNCE_INTERVAL_S
from remus_colo.session.lan_watch import LanWatch
from remus_colo.session.loop import Loop
from remus_colo.session.parts import Terms

log = logging.getLogger(__name__)

INTERVAL_S = 0.5  # between two tries to find out


class Doubt:
    """Belongs to the loop's thread.

    :param decided: called with BACKUP_ACTIVE or BACKUP_INACTIVE, or, some time after nobody could tell, BACKUP_UNKNOWN.
    """

    def __init__(
        self, loop: Loop, terms: Terms, lan: LanWatch, decided: Callable[[PrimaryEvent], None]
    ) -> None:
        self._loop = loop
        self._terms = terms
        self._lan = lan
        self._decided = decided
        self._told = False

    def ask(self) -> None:
        """Is the SVM active?  It would answer for the guest's addresses from beyond this host."""
        known = self._lan.known()
        self._loop.thread("arbiter", lambda: self._judge(known), self._on_verdict)

    def _judge(self, known: dict[int, Known]) -> bool | None:
        """In a thread: None if nobody can tell."""
        terms = self._terms
        if terms.fence:
            return ACTIVE[run_hook(terms.fence, terms.name, terms.destination)]
        return self._lan.secondary_active(max(terms.heartbeat.timeout_s, 3 * ANNOUNCE_INTERVAL_S), known)

    def _on_verdict(self, active: bool | None, error: BaseException | None) -> None:
        if error is not None and not isinstance(error, RemusError):
            # Raised on it would end nothing, as no other end comes before a verdict, and nobody would ask again.
            log.error("the arbiter failed: %s", error, exc_info=error)
        if error is not None or active is None:
            self._tell()
            self._loop.call_later(INTERVAL_S, lambda: self._decided(PrimaryEvent.BACKUP_UNKNOWN))
        else:
            self._decided(PrimaryEvent.BACKUP_ACTIVE if active else PrimaryEvent.BACKUP_INACTIVE)

    def _tell(self) -> None:
        """Once: it may last, and nothing else shows why the guest does not answer."""
        if self._told:
            return
        self._told = True
        name, there = self._terms.name, self._terms.destination
        log.warning(
            "nobody can tell whether %s has taken %s over: what %s says is held until that is known. "
            "If `xl list` there shows %s, destroy it here; if that host is dead, kill this remus (SIGKILL) and run "
            "python3 -m remus_colo.recover %s",
            there, name, name, name, name,
        )  # fmt: skip
