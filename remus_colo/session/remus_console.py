# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the user of ``remus`` without ``--colo`` sees."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from remus_colo import report
from remus_colo.devices.netbuffer import held_and_sent
from remus_colo.session.console import REFRESH_S, Console
from remus_colo.session.loop import Loop
from remus_colo.session.remus_sender import MODE
from remus_colo.session.remus_worker import REASON

if TYPE_CHECKING:
    from remus_colo.session.remus_worker import CheckpointWorker

SENTENCES = {
    "creating": "copying the guest to the backup host",
    "protected": "PROTECTED: output is held until the backup has the checkpoint that it belongs to",
    "no-dirty-log": "this Xen, built without shadow page tables, does not tell what a PV guest writes: each checkpoint copies "
    "all of its memory, and stops it for that long",
    "blackhole": "checkpoints go nowhere: NOT protected",
}


class RemusConsole(Console):
    def sentence(self, event: str) -> str | None:
        return SENTENCES.get(event) or super().sentence(event)

    def watch_worker(self, loop: Loop, worker: CheckpointWorker) -> None:
        """Refresh the status from now on, of checkpoints that go nowhere."""

        def refresh() -> None:
            stats = worker.stats
            held, sent = held_and_sent(worker.devices)
            self._status.update(
                report.Stats(
                    domain=self._name,
                    state="blackhole",
                    mode=MODE,
                    epoch=stats.checkpoints,
                    checkpoints=((REASON, stats.checkpoints),),
                    pause_ms=stats.pause_s[-1] * 1000 if stats.pause_s else None,
                    released=sent,
                    held=held,
                ),
                time.monotonic(),
            )
            loop.call_later(REFRESH_S, refresh)

        refresh()
