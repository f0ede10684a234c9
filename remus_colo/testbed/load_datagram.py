# SPDX-License-Identifier: LGPL-2.1-or-later
"""UDP under load: one datagram after the other, each to come back as it was.

A lost datagram is counted on its own, for a network may lose one; a wrong one is an error as everywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from remus_colo.testbed.load_check import DatagramCheck
from remus_colo.testbed.load_link import Task
from remus_colo.testbed.load_report import Recorder

# After this long a datagram is taken for lost.
_LOST_AFTER_S = 2.0


class DatagramWorker(asyncio.DatagramProtocol):
    """Carries out a :class:`Task` whose check is a :class:`DatagramCheck`."""

    def __init__(self, recorder: Recorder, task: Task) -> None:
        self._recorder = recorder
        self._task = task
        self._check = DatagramCheck(task.name)
        self._transport: asyncio.DatagramTransport | None = None
        self._sent_s = 0.0
        self._answered = asyncio.Event()
        self._stopped = asyncio.Event()

    async def open(self) -> bool:
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(lambda: self, remote_addr=self._task.address)
        self._recorder.services[self._task.service].connections += 1
        return True

    async def run(self, first_after_s: float = 0.0) -> None:
        """Datagram after datagram until :meth:`stop`."""
        assert self._transport
        await self._pause(first_after_s)
        while not self._stopped.is_set():
            self._answered.clear()
            self._sent_s = time.monotonic()
            self._recorder.begin(self._task.service, self._sent_s)
            self._transport.sendto(self._check.request())
            try:
                async with asyncio.timeout(_LOST_AFTER_S):
                    await self._answered.wait()
            except TimeoutError:
                self._check.broken()
                self._recorder.services[self._task.service].lost_datagrams += 1
            self._recorder.end(self._task.service, time.monotonic())
            await self._pause(self._sent_s + self._task.pace.period_s - time.monotonic())
        self._transport.close()

    def stop(self) -> None:
        self._stopped.set()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        now_s = time.monotonic()
        verdict = self._check.feed(data)
        if verdict.completed:
            self._recorder.reply(self._task.service, now_s, now_s - self._sent_s)
            self._answered.set()
        self._recorder.verdict(self._task.service, self._task.name, verdict, now_s)

    def error_received(self, exc: Exception) -> None:
        self._recorder.error(self._task.service, self._task.name, "refused", str(exc), time.monotonic())

    async def _pause(self, duration_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, duration_s)):
                await self._stopped.wait()
