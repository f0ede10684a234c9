# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operation ``colo``: from two connections to a protection that begins.  Runs without Xen.

The control connection comes first, says HELLO, and waits for its data connection, which names the same
generation.  Then clocks are compared until CREATE comes (docs/protocol.rst).
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

from remus_colo.errors import ExitStatus, MessageError, PeerError, PeerLost
from remus_colo.relocation.channel import Channel
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.server import Opening
from remus_colo.relocation.wire import SUPPORTED_VERSIONS, Message, common_version

PAIR_TIMEOUT_S = 15.0
CREATE_TIMEOUT_S = 60.0

_BEFORE_CREATE = frozenset(
    {MessageType.CLOCK_PROBE, MessageType.CREATE, MessageType.STOP, MessageType.BYE, MessageType.HEARTBEAT}
)


class Waiting:
    """A control connection whose data connection has not come yet."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.arrived = threading.Event()
        self.data: Channel | None = None


# Runs a protection to its end: CREATE, control and data channel, the primary's address.  A MessageError of it
# is what is wrong with CREATE, and told to the primary.
Serve = Callable[[Message, Channel, Channel, str], None]


class Pairing:
    """Holds what waits for its other half.

    :param now_ns: this host's Xen system time.
    :param serve: called in the control connection's thread.
    :param settable_clock: whether this host's Xen can give a guest another system time, which primaries are told.
    """

    def __init__(
        self,
        now_ns: Callable[[], int],
        serve: Serve,
        *,
        settable_clock: bool = False,
        pair_timeout_s: float = PAIR_TIMEOUT_S,
        create_timeout_s: float = CREATE_TIMEOUT_S,
    ) -> None:
        self._now_ns = now_ns
        self._serve = serve
        self._settable_clock = settable_clock
        self._pair_timeout_s = pair_timeout_s
        self._create_timeout_s = create_timeout_s
        self._lock = threading.Lock()
        self._waiting: dict[int, Waiting] = {}
        self._serving: set[int] = set()
        self._stopping = False

    def stop(self) -> None:
        """Nothing more begins, and nobody waits for a data connection any longer."""
        with self._lock:
            self._stopping = True
            for waiting in self._waiting.values():
                waiting.arrived.set()

    def handle(self, channel: Channel, opening: Opening) -> None:
        """The operation.

        :raise RemusError: the peer broke the protocol, is too slow or too late, or has been refused.
        """
        # nothing large has a place to go before there is a session
        channel.accepts = frozenset({MessageType.HELLO})
        hello = channel.recv(opening.deadline_s)
        try:
            common_version(hello.fields["versions"])
        except PeerError as error:
            self._refuse(channel, str(error))
        if not hello.generation:
            self._refuse(channel, "a protection has a number other than 0")
        channel.expect_generation(hello.generation)
        if hello.fields["channel"] == "data":
            self._pair(channel, hello.generation, opening)
        else:
            self._control(channel, hello.generation, opening)

    @staticmethod
    def _refuse(channel: Channel, reason: str) -> None:
        """:raise PeerError: always, once the peer knows."""
        channel.send_control(
            MessageType.REFUSE, 0, {"reason": reason, "exit_status": int(ExitStatus.PEER_REFUSED)}
        )
        raise PeerError(reason)

    @staticmethod
    def _greet(channel: Channel, kind: str) -> None:
        channel.send_control(
            MessageType.HELLO,
            0,
            {"versions": list(SUPPORTED_VERSIONS), "host": socket.gethostname(), "channel": kind},
        )

    def _pair(self, channel: Channel, generation: int, opening: Opening) -> None:
        with self._lock:
            waiting = self._waiting.get(generation)
            # of the same host: whoever guesses a number must not get at another's guest
            fits = waiting is not None and waiting.data is None and waiting.host == opening.host
            if waiting is not None and fits:
                waiting.data = channel
        if waiting is None or not fits:
            self._refuse(channel, "a data channel came without its control channel")
            return
        try:
            self._greet(channel, "data")
        finally:
            # even if it is lost again: its owner finds out
            waiting.arrived.set()

    def _control(self, channel: Channel, generation: int, opening: Opening) -> None:
        waiting = Waiting(opening.host)
        with self._lock:
            refusal = "this host is ending its service" if self._stopping else ""
            if generation in self._waiting or generation in self._serving:
                refusal = "this session exists already"
            if not refusal:
                self._waiting[generation] = waiting
        if refusal:
            self._refuse(channel, refusal)
        create = None
        try:
            self._greet(channel, "control")
            waiting.arrived.wait(self._pair_timeout_s)
            if waiting.data is None:
                raise PeerLost("its data channel did not come in time")
            create = self._await_create(channel)
        finally:
            with self._lock:
                del self._waiting[generation]
                data = waiting.data
                if create is not None:
                    self._serving.add(generation)
            if create is None and data is not None:
                data.close()
        if create is None or data is None:
            channel.close()
            return
        try:
            channel.accepts = data.accepts = None
            opening.established(channel, data)
            self._serve(create, channel, data, opening.host)
        except MessageError as error:
            with contextlib.suppress(PeerLost):
                self._refuse(channel, str(error))
        finally:
            with self._lock:
                self._serving.discard(generation)
            data.close()
            channel.close()

    def _await_create(self, channel: Channel) -> Message | None:
        """Answer clock probes until CREATE comes; None if the primary leaves."""
        channel.accepts = _BEFORE_CREATE
        deadline_s = time.monotonic() + self._create_timeout_s
        while True:
            message = channel.recv(deadline_s)
            received_ns = self._now_ns()
            match message.type:
                case MessageType.CLOCK_PROBE:
                    channel.send_control(
                        MessageType.CLOCK_REPLY,
                        0,
                        {
                            "sent_ns": message.fields["sent_ns"],
                            "received_ns": received_ns,
                            "replied_ns": self._now_ns(),
                            "settable": self._settable_clock,
                        },
                        deadline_s=deadline_s,
                    )
                case MessageType.CREATE:
                    return message
                case MessageType.STOP | MessageType.BYE:
                    return None
                case MessageType.HEARTBEAT:
                    pass
                case _:
                    raise MessageError(f"the primary sent {message.type.name} where CREATE was expected")
