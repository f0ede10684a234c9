# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is said to people goes out in a thread of its own: whoever says it never waits for who reads it.

A terminal that was stopped by Ctrl-S, an ssh connection that is stuck, a pipe whose reader does not read: a write to these waits for
ever, and in the loop of a protection the guest's output would wait with it.
"""

from __future__ import annotations

import collections
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TextIO

WAITING_TEXTS = 1000  # lines, for the most part; more are lost
FLUSH_TIMEOUT_S = 1.0


class Outlet:
    """Text for a stream, which, once broken, is left alone.  No method raises because of the stream.

    What has no descriptor, as in tests, is written to at once, and so is everything in a process that was forked: it has not the
    thread.

    :param broken: called once with what is wrong, in any thread.
    """

    def __init__(self, stream: TextIO, broken: Callable[[Exception], object] = lambda error: None) -> None:
        self._stream: TextIO | None = stream
        self._broken = broken
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._waiting: collections.deque[str] = collections.deque()
        self._thread: threading.Thread | None = None
        try:
            self._fd = stream.fileno()
            stream.flush()
        except (OSError, ValueError):
            self._fd = -1

    def write(self, text: str) -> None:
        if self._stream is None:
            return
        if self._fd < 0 or os.getpid() != self._process:
            self._put(text)
            return
        with self._changed:
            if len(self._waiting) >= WAITING_TEXTS:
                return
            self._waiting.append(text)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="outlet", daemon=True)
                self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether what was said before is not out yet."""
        with self._changed:
            return self._thread is not None

    def flush(self) -> None:
        """Wait until all is out, for a while."""
        deadline_s = time.monotonic() + FLUSH_TIMEOUT_S
        if os.getpid() != self._process:
            return
        with self._changed:
            while self._thread is not None and (left_s := deadline_s - time.monotonic()) > 0:
                self._changed.wait(left_s)

    def _run(self) -> None:
        """Until nothing waits any more: there is something to say a few times a second at most."""
        while True:
            with self._changed:
                if not self._waiting:
                    self._thread = None
                    self._changed.notify_all()
                    return
                text = self._waiting.popleft()
            self._put(text)

    def _put(self, text: str) -> None:
        stream = self._stream
        if stream is None:
            return
        try:
            if self._fd < 0:
                stream.write(text)
                stream.flush()
                return
            # Not by the stream: its lock would be held while this waits, and the process could not end.
            data = memoryview(text.encode(stream.encoding or "utf-8", "backslashreplace"))
            while data:
                data = data[os.write(self._fd, data) :]
        except (OSError, ValueError) as error:
            # the terminal was closed, or the reader of a pipe has gone
            self._stream = None
            self._broken(error)


class LogOutlet(logging.Handler):
    """Log lines by an :class:`Outlet`."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._outlet = Outlet(stream)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._outlet.write(self.format(record) + "\n")
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        self._outlet.flush()
