# SPDX-License-Identifier: LGPL-2.1-or-later
"""One connection under load: connects, asks, waits for the check's verdict, and says what went wrong.

A connection that breaks is counted, never replaced in silence; the next one goes on where it ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import struct
import time
from collections import deque
from collections.abc import Callable

from remus_colo.testbed.load_check import Check
from remus_colo.testbed.load_report import Recorder

# struct linger of <sys/socket.h>, on with zero seconds: closing sends a reset. What was given up must not be
# delivered any more, and above all not be retried by the kernel behind the back of the next connection.
_LINGER_NONE = struct.pack("ii", 1, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Pace:
    """When a connection asks.

    :ivar depth: requests sent in a row, without waiting for replies between them: one turn.
    :ivar period_s: from one turn to the next, at least; 0 for no pause.
    :ivar timeout_s: how long to wait for a connection, or for a turn's replies.
    :ivar retry_s: pause before a broken connection is made anew.
    """

    depth: int = 1
    period_s: float = 0.0
    timeout_s: float = 60.0
    retry_s: float = 0.2


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """What a connection does.

    :ivar service: under which name the figures are kept.
    :ivar name: which connection it is, for the log.
    :ivar address: host and port.
    :ivar new_check: makes the check of the n-th connection, from 0.
    :ivar on_reply: called with the check, and when the request of a completed reply left and the reply came.
    """

    service: str
    name: str
    address: tuple[str, int]
    new_check: Callable[[int], Check]
    pace: Pace
    on_reply: Callable[[Check, float, float], None] = lambda check, sent_s, now_s: None


class _Link(asyncio.Protocol):
    """The events of one TCP connection, until its worker has given it up."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def data_received(self, data: bytes) -> None:
        if self._worker.link is self:
            self._worker.received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._worker.link is self:
            self._worker.lost("reset" if exc else "eof")


class Worker:
    """Carries out a :class:`Task` over one connection at a time."""

    def __init__(self, recorder: Recorder, task: Task) -> None:
        self.link: _Link | None = None
        self._recorder = recorder
        self._task = task
        self._pace = task.pace
        self._check: Check | None = None
        self._transport: asyncio.Transport | None = None
        self._connections = 0
        self._sent_s: deque[float] = deque()
        self._turn: asyncio.Future[str] | None = None
        self._nap: asyncio.Future[None] | None = None
        self._waiting = False
        self._stopping = False

    async def open(self) -> bool:
        """Makes the connection; counts an error and returns False if that fails."""
        loop = asyncio.get_running_loop()
        link = _Link(self)
        try:
            async with asyncio.timeout(self._pace.timeout_s):
                transport, _ = await loop.create_connection(lambda: link, *self._task.address)
        except (OSError, TimeoutError) as failure:
            detail = str(failure) or f"no answer within {self._pace.timeout_s} s"
            self._error("connect", detail)
            return False
        self.link, self._transport = link, transport
        self._check = self._task.new_check(self._connections)
        self._connections += 1
        self._recorder.services[self._task.service].connections += 1
        return True

    async def run(self, first_after_s: float = 0.0) -> None:
        """Turn after turn, over the open connection or one that is made now, until :meth:`stop`."""
        await self._pause(first_after_s)
        while not self._stopping:
            begun_s = time.monotonic()
            if not self._transport:
                # Since the last connection broke, the next reply has been waited for.
                self._wait(begun_s)
                ready = await self.open()
            else:
                ready = True
            if ready and await self._take_turn(begun_s):
                await self._pause(begun_s + self._pace.period_s - time.monotonic())
            else:
                await self._pause(self._pace.retry_s)
        self.close()

    async def once(self) -> None:
        """One connection, one turn; latency counts from the start of connecting."""
        begun_s = time.monotonic()
        self._wait(begun_s)
        try:
            if await self.open() and await self._take_turn(begun_s):
                self.close()
        finally:
            self._rest(time.monotonic())

    def stop(self) -> None:
        """No more turns; the one that is under way is finished."""
        self._stopping = True
        if self._nap and not self._nap.done():
            self._nap.set_result(None)

    def close(self) -> None:
        """Ends the connection in order, if there is one."""
        transport, self._transport, self.link = self._transport, None, None
        if transport:
            transport.close()

    def received(self, data: bytes) -> None:
        """Called by the link."""
        assert self._check
        now_s = time.monotonic()
        verdict = self._check.feed(data)
        for _ in range(verdict.completed):
            sent_s = self._sent_s.popleft()
            self._recorder.reply(self._task.service, now_s, now_s - sent_s)
            self._task.on_reply(self._check, sent_s, now_s)
        self._recorder.verdict(self._task.service, self._task.name, verdict, now_s)
        if verdict.out_of_step:
            self._fail("wrong")
        elif not self._check.outstanding:
            self._rest(now_s)
            self._end_turn("")

    def lost(self, kind: str) -> None:
        """Called by the link."""
        self._fail(kind)

    async def _take_turn(self, begun_s: float) -> bool:
        """Asks, and waits for all replies.  False, with the connection gone and the error counted, if that fails."""
        assert self._check and self._transport
        loop = asyncio.get_running_loop()
        self._turn = loop.create_future()
        late = loop.call_later(self._pace.timeout_s, self._fail, "timeout")
        try:
            self._wait(begun_s)
            for _ in range(self._pace.depth):
                self._sent_s.append(begun_s)
                # One write each, for a pipelined stream is not to be one segment.
                self._transport.write(self._check.request())
            return not await self._turn
        except asyncio.CancelledError:
            self._fail("unfinished")
            raise
        finally:
            late.cancel()
            self._turn = None

    def _fail(self, kind: str) -> None:
        """The connection is of no more use: counts why, unless the verdict was counted, and drops it."""
        assert self._check
        if kind != "wrong":
            self._error(kind, f"{self._check.outstanding} requests unanswered")
        self._check.broken()
        self._sent_s.clear()
        if self._transport:
            tcp = self._transport.get_extra_info("socket")
            with contextlib.suppress(OSError):  # the peer may have closed it already
                tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
            self._transport.abort()
        self._transport = self.link = None
        # Idle or not, from now on this client waits for service.
        self._wait(time.monotonic())
        self._end_turn(kind)

    def _end_turn(self, failure: str) -> None:
        if self._turn and not self._turn.done():
            self._turn.set_result(failure)

    def _error(self, kind: str, detail: str) -> None:
        self._recorder.error(self._task.service, self._task.name, kind, detail, time.monotonic())

    def _wait(self, now_s: float) -> None:
        if not self._waiting:
            self._waiting = True
            self._recorder.begin(self._task.service, now_s)

    def _rest(self, now_s: float) -> None:
        if self._waiting:
            self._waiting = False
            self._recorder.end(self._task.service, now_s)

    async def _pause(self, duration_s: float) -> None:
        if duration_s > 0 and not self._stopping:
            self._nap = asyncio.get_running_loop().create_future()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(duration_s):
                    await self._nap
