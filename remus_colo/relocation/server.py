# SPDX-License-Identifier: LGPL-2.1-or-later
"""The relocation ports: from a connection of a stranger to an operation that it may begin.  Runs without Xen.

Each connection has a thread of its own, so that nothing that one peer does or leaves undone keeps another
waiting.  Until its operation says that it is established, it has a place among few
(:mod:`remus_colo.relocation.admission`) and a deadline.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from remus_colo.errors import PeerLost, RemusError
from remus_colo.relocation import tls
from remus_colo.relocation.admission import Admission, Throttle
from remus_colo.relocation.channel import Channel
from remus_colo.relocation.listen import Listener, plain

log = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 30.0
# How long and how much we go on listening to a peer that was told why it is refused: if we closed at once, what it is
# still sending would make the kernel reset the connection, and throw away what we said.
LINGER_S = 1.0
LINGER_BYTES = 1024 * 1024
# No descriptor or memory for a connection that waits: it keeps waiting, and we must not spin.
EXHAUSTED_PAUSE_S = 0.5
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Opening:
    """A connection on its way to a session.

    :param host: the peer's address.
    :param deadline_s: until when it must have got on; operations extend it.
    """

    def __init__(self, host: str, deadline_s: float, leave: Callable[[Sequence[Channel]], None]) -> None:
        self.host = host
        self.deadline_s = deadline_s
        self._leave: Callable[[Sequence[Channel]], None] | None = leave

    @property
    def half_open(self) -> bool:
        return self._leave is not None

    def established(self, *channels: Channel) -> None:
        """It is a session now, or over: it no longer counts. Calling this again does nothing.

        :param channels: the session's own from now on: the server does not close them when it ends.
        """
        leave, self._leave = self._leave, None
        if leave is not None:
            leave(channels)


# Called in the connection's thread with a channel that has been told that the operation is ready.  Owns the
# channel; one that is left behind by an exception is closed.
Operation = Callable[[Channel, Opening], None]


class Server:
    """Accepts connections until it is told to stop.

    :param listeners: owned from now on.
    :param operations: by name, as clients ask for them.
    :param allows: decides about an address and the name that it has, empty if it has not been looked up or has none.
    :param event: told of each refusal that is logged.
    :param throttle: which those are.
    """

    def __init__(
        self,
        listeners: Sequence[Listener],
        operations: Mapping[str, Operation],
        *,
        allows: Callable[[str, str], bool],
        half_open_limit: int,
        open_timeout_s: float = OPEN_TIMEOUT_S,
        event: Callable[..., None] = lambda name, /, **fields: None,
        throttle: Throttle | None = None,
    ) -> None:
        self.listeners = tuple(listeners)
        self.admission = Admission(half_open_limit)
        self._operations = operations
        self._allows = allows
        self._open_timeout_s = open_timeout_s
        self._event = event
        self._throttle = throttle or Throttle()
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._half_open: set[socket.socket | Channel] = set()
        # no Event: its lock is not for signal handlers
        self._stopping = False
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_in.setblocking(False)

    # -- accepting ---------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End :meth:`run`; from a signal handler or any thread, any number of times."""
        self._stopping = True
        with contextlib.suppress(OSError):
            self._wake_in.send(b"\0")

    def run(self) -> None:
        """Accept until :meth:`stop`; then close the ports. Sessions go on."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_out, selectors.EVENT_READ)
            for listener in self.listeners:
                selector.register(listener.sock, selectors.EVENT_READ, listener)
            while not self._stopping:
                for key, _ in selector.select():
                    if key.data is not None and not self._stopping:
                        self._accept(key.data)
        for listener in self.listeners:
            listener.sock.close()

    def _accept(self, listener: Listener) -> None:
        try:
            sock, address = listener.sock.accept()
        except BlockingIOError:
            return  # it has gone again
        except OSError as error:
            self._refused("a connection", f"it was lost before it was accepted: {error.strerror}")
            if error.errno in _EXHAUSTED:
                _readable(self._wake_out, EXHAUSTED_PAUSE_S)
            return
        host = plain(str(address[0]))
        reason = self.admission.enter(host)
        if reason is not None:
            sock.close()
            self._refused(host, reason)
            return

        def leave(channels: Sequence[Channel]) -> None:
            self.admission.leave(host)
            with self._lock:
                self._half_open.difference_update(channels)

        opening = Opening(host, time.monotonic() + self._open_timeout_s, leave)
        thread = threading.Thread(
            target=self._serve, args=(sock, listener, opening), name=f"open-{host}", daemon=True
        )
        with self._lock:
            self._threads.add(thread)
            self._half_open.add(sock)
        try:
            thread.start()
        except RuntimeError as error:  # the system's limit of threads
            self._gone(thread, sock, opening)
            sock.close()
            self._refused(host, str(error))

    def close(self, timeout_s: float = STOP_TIMEOUT_S) -> bool:
        """After :meth:`run`: end what is half open, and wait for the threads of sessions, which end by themselves.

        :return: whether all have ended.
        """
        with self._lock:
            half_open, threads = list(self._half_open), list(self._threads)
        for connection in half_open:
            _cut(connection)
        deadline_s = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        self._wake_out.close()
        self._wake_in.close()
        return not any(thread.is_alive() for thread in threads)

    def threads(self) -> int:
        """Connections that have a thread now."""
        with self._lock:
            return len(self._threads)

    # -- one connection ----------------------------------------------------------------------------------

    def _serve(self, sock: socket.socket, listener: Listener, opening: Opening) -> None:
        host = opening.host
        connection: socket.socket | Channel = sock

        def track(new: socket.socket | Channel) -> None:
            nonlocal connection
            with self._lock:
                self._half_open.discard(connection)
                self._half_open.add(new)
                connection = new
            if self._stopping:
                _cut(new)  # close() may have looked before it was there

        try:
            if not self._may(host, opening.deadline_s):
                self._refused(host, "it is not among the hosts allowed")
                sock.close()
                return
            wrapped: socket.socket | tls.TlsSocket = sock
            if listener.tls is not None:
                wrapped = tls.wrap_server(sock, listener.tls, opening.deadline_s, host, track)
            channel = Channel(wrapped, peer=host)
            track(channel)
            operation = channel.answer(self._operations, opening.deadline_s)
            self._operations[operation](channel, opening)
        except RemusError as error:
            if not opening.half_open:
                log.error("the session of %s has ended: %s", host, error)
            elif not self._stopping:
                self._refused(host, str(error))
                if not isinstance(error, PeerLost):
                    _linger(connection)
            connection.close()
        except Exception:
            connection.close()
            log.exception("connection from %s", host)
        finally:
            self._gone(threading.current_thread(), connection, opening)

    def _gone(self, thread: threading.Thread, connection: socket.socket | Channel, opening: Opening) -> None:
        opening.established()
        with self._lock:
            self._half_open.discard(connection)
            self._threads.discard(thread)

    def _may(self, host: str, deadline_s: float) -> bool:
        # by address first: a look-up of its name takes time, and is answered by who owns the address
        if self._allows(host, ""):
            return True
        name = _name_of(host, deadline_s)
        return name != host and self._allows(host, name)

    def _refused(self, host: str, reason: str) -> None:
        dropped = self._throttle.passes(host, time.monotonic())
        if dropped is None:
            return
        more = f" ({dropped} more were refused since the last such line)" if dropped else ""
        log.warning("refused %s: %s%s", host, reason, more)
        self._event("refused", host=host, reason=reason, unlogged=dropped)


def _name_of(host: str, deadline_s: float) -> str:
    """The name that an address has; the address itself if none is found before the deadline.

    In a thread, because the resolver takes no deadline.
    """
    names: list[str] = []
    thread = threading.Thread(
        target=lambda: names.append(socket.getfqdn(host)), name=f"name-{host}", daemon=True
    )
    thread.start()
    thread.join(max(0.0, deadline_s - time.monotonic()))
    return names[0] if names else host


def _readable(sock: socket.socket, timeout_s: float) -> bool:
    poller = select.poll()  # select() knows no descriptor above 1023
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(int(timeout_s * 1000) + 1))


def _linger(connection: socket.socket | Channel) -> None:
    """Say that there is no more to come, and wait until the peer has nothing more to say either."""
    try:
        sock = socket.socket(fileno=os.dup(connection.fileno()))
    except OSError:
        return  # it is closed already
    deadline_s, left_bytes = time.monotonic() + LINGER_S, LINGER_BYTES
    with sock, contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
        while left_bytes > 0 and (remaining_s := deadline_s - time.monotonic()) > 0:
            # MSG_DONTWAIT: the descriptor's own mode is shared with the connection
            if not _readable(sock, remaining_s):
                return
            received = len(sock.recv(64 * 1024, socket.MSG_DONTWAIT))
            if not received:
                return
            left_bytes -= received


def _cut(connection: socket.socket | Channel) -> None:
    """Wake whoever waits for it."""
    if isinstance(connection, Channel):
        connection.close()
        return
    with contextlib.suppress(OSError):
        # not an SSLSocket's own, which would go on in plain text
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
