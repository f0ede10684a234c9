# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operations ``receive`` and ``sslreceive`` of xend's relocation protocol: a domain moves here.

The peer learns no more than that we are ready: the protocol has no word for the end.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from remus_colo.checkpoint import incoming
from remus_colo.errors import DomainError, MessageError, PeerLost
from remus_colo.relocation.channel import Channel
from remus_colo.relocation.handshake import SSL_RECEIVE
from remus_colo.relocation.server import Opening
from remus_colo.session.parts import EventSink

log = logging.getLogger(__name__)

# Whoever sends a domain has something to say all the time, but for the guest's suspend.
SILENCE_S = 60.0
LOOK_S = 0.5  # how often is looked whether xl, which knows where the stream ends, has ended
AT_ONCE = 4  # each has a process of xl


class Migrations:
    """:param event: called with a name and fields at everything that a user may want to know."""

    def __init__(self, event: EventSink) -> None:
        self._event = event
        self._lock = threading.Lock()
        self._coming: dict[str, Channel] = {}
        self._stopping = False

    def stop(self) -> None:
        """Those that have not come whole will not."""
        with self._lock:
            self._stopping = True
            for channel in self._coming.values():
                channel.close()

    def handle(self, channel: Channel, opening: Opening) -> None:
        """The operation ``receive``.

        :raise RemusError: no domain came of it, and nothing is left of what did come.
        """
        header = incoming.read_header(lambda size: channel.read(size, opening.deadline_s))
        name = header.name
        with self._claim(name, channel):
            incoming.check_free(name)
            opening.established(channel)
            self._event("receiving", domain=name, host=opening.host)
            log.info("%s sends %s here", opening.host, name)
            domid = incoming.restore(_until_silent(channel), header)
            self._event("received", domain=name, host=opening.host, domid=domid)
            log.info("%s has come from %s: it is domain %d", name, opening.host, domid)
        channel.close()

    def handle_encrypted(self, channel: Channel, opening: Opening) -> None:
        """The operation ``sslreceive``."""
        if not channel.encrypted:
            raise MessageError(f"{SSL_RECEIVE} is for the port with TLS")
        self.handle(channel, opening)

    @contextlib.contextmanager
    def _claim(self, name: str, channel: Channel) -> Iterator[None]:
        with self._lock:
            if name in self._coming:
                raise DomainError(f"{name} is coming here already")
            if self._stopping or len(self._coming) >= AT_ONCE:
                raise DomainError(
                    f"{name} does not come now: remusd {'ends' if self._stopping else 'has its hands full'}"
                )
            self._coming[name] = channel
        try:
            yield
        finally:
            with self._lock:
                del self._coming[name]


def _until_silent(channel: Channel) -> incoming.Poll:
    """Reads.

    :raise PeerLost: from what is returned: nothing has come for too long.
    """
    heard_s = time.monotonic()

    def read(size: int) -> bytes | None:
        nonlocal heard_s
        silent_s = heard_s + SILENCE_S
        found = channel.poll_bytes(size, min(silent_s, time.monotonic() + LOOK_S))
        if found is not None:
            heard_s = time.monotonic()
        elif time.monotonic() >= silent_s:
            raise PeerLost(f"{channel.peer} sent nothing for {SILENCE_S:g} s")
        return found

    return read
