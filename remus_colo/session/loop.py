# SPDX-License-Identifier: LGPL-2.1-or-later
"""One thread's event loop: files to read, timers, and calls from other threads.

Not asyncio: pyroute2's netlink calls run an asyncio loop of their own and may not be made inside another.
Nor ``selectors``, whose own work on each wake-up is as much as that of all else that a packet's wake-up does
in Python.
"""

from __future__ import annotations

import collections
import contextlib
import heapq
import itertools
import logging
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

_EVENTS_PER_TURN = 16  # more wait for the next turn; the default makes room for a thousand each time


class Timer:
    """A call in the future, which :meth:`cancel` takes back."""

    __slots__ = ("call", "due_s")

    def __init__(self, due_s: float, call: Callable[[], None]) -> None:
        self.due_s = due_s
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class Loop:
    """Runs callbacks in the thread that calls :meth:`run`, until :meth:`stop`.

    An exception of a callback ends :meth:`run` and is raised from it: the owner decides what is fatal.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._readers: dict[int, tuple[Any, Callable[[], object]]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)
        self.add_reader(self._wake_out, self._drain_wake)
        self._running = False
        self.turn_s = time.monotonic()  # when the loop last came round: how others know that it is alive

    def close(self) -> None:
        self._epoll.close()
        self._wake_in.close()
        self._wake_out.close()

    def add_reader(self, file: Any, call: Callable[[], object]) -> None:
        """Call whenever ``file`` (a descriptor, or what has a ``fileno``) can be read.

        Files that share one ``call`` and can be read at the same time cause one call.
        """
        fd = file if isinstance(file, int) else file.fileno()
        self._epoll.register(fd, select.EPOLLIN)
        self._readers[fd] = file, call

    def remove_reader(self, file: Any) -> None:
        """No error if it is not there, or closed already."""
        for fd, (known, _) in self._readers.items():
            if known is file:
                del self._readers[fd]
                with contextlib.suppress(OSError):
                    self._epoll.unregister(fd)
                return

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        timer = Timer(time.monotonic() + delay_s, call)
        heapq.heappush(self._timers, (timer.due_s, next(self._order), timer))
        return timer

    def call(self, call: Callable[[], None]) -> None:
        """From any thread: run ``call`` in the loop's, soon and in order."""
        self._calls.append(call)
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_in.send(b"\0")

    def thread(
        self, name: str, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]
    ) -> None:
        """Run ``work`` in a thread of its own, then ``done(result, error)`` in the loop's."""

        def run() -> None:
            result, failure = None, None
            try:
                result = work()
            except BaseException as error:  # handed to done()
                failure = error
            self.call(lambda: done(result, failure))

        threading.Thread(target=run, name=name, daemon=True).start()

    def stop(self) -> None:
        self._running = False

    def run(self) -> None:
        self._running = True
        while self._running:
            self.turn_s = time.monotonic()
            timeout_s = self._run_timers()
            if not self._running:
                return
            last_call = None
            for fd, _ in self._epoll.poll(timeout_s, _EVENTS_PER_TURN):
                _, call = self._readers.get(fd, (None, None))
                if (
                    call is None or call == last_call
                ):  # removed by one that was called before, or one for both
                    continue
                last_call = call
                call()
                if not self._running:
                    return
            # Those that are there now: what threads go on adding must not keep files and timers waiting.
            for _ in range(len(self._calls)):
                self._calls.popleft()()
                if not self._running:
                    return

    def _run_timers(self) -> float | None:
        """Run what is due. Returns the time until the next one."""
        while self._timers:
            due_s, _, timer = self._timers[0]
            if timer.call is None:
                heapq.heappop(self._timers)
                continue
            wait_s = due_s - time.monotonic()
            if wait_s > 0:
                return 0.0 if self._calls else wait_s
            heapq.heappop(self._timers)
            timer.call()
            if not self._running:
                return 0.0
        return 0.0 if self._calls else None

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_out.recv(4096):
                pass
