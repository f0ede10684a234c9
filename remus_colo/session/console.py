# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the user of ``remus`` sees: the status line, sentences for what matters, and the event log."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Self

from remus_colo import report
from remus_colo.session.loop import Loop

if TYPE_CHECKING:
    from remus_colo.options import ColoOptions
    from remus_colo.remus_options import RemusOptions
    from remus_colo.session.primary import PrimarySession

REFRESH_S = 0.5
COUNT_S = 1.0

# Events that are told at once, as sentences; all events go to the log.
SENTENCES = {
    "mode": "checkpoints: {mode} ({why})",
    "creating": "copying the guest to the backup host",
    "resumed-in-place": "guest resumed in place after {pause_ms} ms",
    "protected": "PROTECTED: both VMs run, equal output leaves at once",
    "unprotected": "WARNING: UNPROTECTED: the backup is gone, the guest goes on alone",
    "peer-lost": "WARNING: {text}",
    "backup-error": "the backup host says: {text}",
    "fenced": "FENCED: the backup host has taken over, the guest was stopped here",
    "lan-conflict": "another host on the LAN speaks with the guest's address",
    "guest-gone": "the guest has ended",
    "signal": "{name}: ending protection",
    "ended": "ended: {meaning}",
}


class Console:
    """:param options: of the run: log file, form of the status."""

    def __init__(self, options: ColoOptions | RemusOptions, name: str) -> None:
        self._name = name
        self._log = report.EventLog(options.log)
        self._status = report.open_status(sys.stdout, as_json=options.status_json)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._status.close()
        self._log.close()

    def event(self, event: str, /, **fields: Any) -> None:
        self._log.event(event, **fields)
        sentence = self.sentence(event)
        if sentence is not None:
            self._status.say(f"{self._name}: {sentence.format(**fields)}")

    def sentence(self, event: str) -> str | None:
        """What the user is told of an event, None for nothing; a format for its fields."""
        return SENTENCES.get(event)

    def watch(self, loop: Loop, session: PrimarySession) -> None:
        """Refresh the status from now on, in the loop's thread."""

        def refresh() -> None:
            self._status.update(self._stats(session), time.monotonic())
            loop.call_later(REFRESH_S, refresh)

        def count() -> None:
            self._log.event(
                "counters", **session.packet_counters(), silence_ms=round(session.peer.silence_s() * 1000)
            )
            loop.call_later(COUNT_S, count)

        refresh()
        count()

    def _stats(self, session: PrimarySession) -> report.Stats:
        counters = session.packet_counters()
        stats = session.stats
        return report.Stats(
            domain=self._name,
            state=session.machine.state.value,
            mode=session.engine.mode.value,
            epoch=stats.epoch,
            checkpoints=tuple(sorted(stats.reasons.items())),
            pause_ms=None if stats.pause_s is None else stats.pause_s * 1000,
            pages=None if stats.pause_s is None else stats.pages,
            released=counters["released_equal"] + counters["released_commit"],
            held=counters["held"],
            diverged=counters["diverged"],
            backup=session.peer.peer_state,
            silence_s=session.peer.silence_s(),
        )
