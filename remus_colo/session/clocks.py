# SPDX-License-Identifier: LGPL-2.1-or-later
"""The two sides' clocks while a guest is protected: the backup asks, the primary answers with the guest's."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from remus_colo.adapters.xenctrl import Clock
from remus_colo.errors import XenError
from remus_colo.relocation.clock import ClockFilter, ClockSample, Estimate
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.wire import Message

log = logging.getLogger(__name__)

Send = Callable[[MessageType, dict[str, object]], None]


class ClockWatch:
    """Asks for the peer's clock, or answers who asks for ours.

    Stamps are taken where messages come in and go out, in the reader's thread: a stay in the loop's queue would
    count as time on the network.

    :param clock: ours; it answers and asks in nanoseconds.
    :param send: sends a control message; may raise PeerLost.
    """

    def __init__(self, clock: Clock, send: Send) -> None:
        self._clock = clock
        self._send = send
        self._filter = ClockFilter()
        self._lock = threading.Lock()

    def ask(self) -> None:
        """Send a probe; its reply comes to :meth:`take`."""
        self._send(MessageType.CLOCK_PROBE, {"sent_ns": self._clock.now_ns()})

    def take(self, message: Message) -> bool:
        """Handle a message that is about clocks; False if it is not.

        :raise PeerLost: the answer could not be sent.
        :raise MessageError: the peer's stamps run backwards.
        """
        if message.type not in (MessageType.CLOCK_PROBE, MessageType.CLOCK_REPLY):
            return False
        fields = message.fields
        try:
            now_ns = self._clock.now_ns()
            replied_ns = self._clock.now_ns()
        except XenError as error:
            # A guest that has ended has no clock; that it has is for the session to notice, and no fault of the peer's.
            log.info("no clock to tell: %s", error)
            return True
        if message.type is MessageType.CLOCK_PROBE:
            answer = {"sent_ns": fields["sent_ns"], "received_ns": now_ns, "replied_ns": replied_ns}
            self._send(MessageType.CLOCK_REPLY, answer)
            return True
        sample = ClockSample(fields["sent_ns"], fields["received_ns"], fields["replied_ns"], now_ns)
        with self._lock:
            self._filter.add(sample)
        return True

    def estimate(self) -> Estimate | None:
        """The peer's clock minus ours; None before the first answer."""
        with self._lock:
            return self._filter.estimate(self._clock.now_ns())
