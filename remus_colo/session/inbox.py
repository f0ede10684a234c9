# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a channel's reader has received and the loop has not handled yet: so much, and then the reader waits.

A reader that waits does not read, so TCP's window closes and the sender waits, too: a backup that is slower
than the network slows checkpoints down, instead of gathering them in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from remus_colo.relocation.schema import CONTROL_LIMIT_BYTES
from remus_colo.relocation.wire import Message
from remus_colo.session.loop import Loop

LIMIT_BYTES = 32 << 20
# Besides a message's bulk data: the most that a control message may have.  None but a few are ever under way.
OVERHEAD_BYTES = CONTROL_LIMIT_BYTES


class Inbox:
    """One channel's. The reader's thread puts in, the loop's takes out.

    Two hosts cannot wait for each other in a circle by this: neither loop ever waits for a reader, and what a
    loop itself sends has a deadline (``SEND_TIMEOUT_S`` of channel.py).
    """

    def __init__(self, loop: Loop, take: Callable[[Message], None], limit_bytes: int = LIMIT_BYTES) -> None:
        self._loop = loop
        self._take = take
        self._limit_bytes = limit_bytes
        self._changed = threading.Condition()
        self._waiting_bytes = 0
        self._full = False
        self._closed = False

    @property
    def full(self) -> bool:
        """Whether the reader waits: what the peer says now is not heard, which is not the peer's silence."""
        return self._full

    def put(self, message: Message) -> bool:
        """Hand a message to the loop, when there is room for it; a message of any size when there is nothing else.

        :return: False if the inbox was closed.
        """
        size = len(message.data) + OVERHEAD_BYTES
        with self._changed:
            while self._waiting_bytes and self._waiting_bytes + size > self._limit_bytes and not self._closed:
                self._full = True
                self._changed.wait()
            self._full = False
            if self._closed:
                return False
            self._waiting_bytes += size
        self._loop.call(lambda: self._deliver(message, size))
        return True

    def _deliver(self, message: Message, size: int) -> None:
        with self._changed:
            self._waiting_bytes -= size
            self._changed.notify()
        self._take(message)

    def close(self) -> None:
        """From any thread: a reader that waits is let go, without its message."""
        with self._changed:
            self._closed = True
            self._changed.notify()
