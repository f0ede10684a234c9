# SPDX-License-Identifier: LGPL-2.1-or-later
"""A replication channel: messages over one connected stream socket, the same class on both hosts.

Deadlines are absolute, in seconds of ``time.monotonic()``.  Every way in which the peer can be gone (end of
stream, reset, a deadline that passed) is :class:`~remus_colo.errors.PeerLost`.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Self

from remus_colo.errors import FramingError, MessageError, PeerError, PeerLost
from remus_colo.relocation import handshake, tls
from remus_colo.relocation.listen import plain
from remus_colo.relocation.schema import SCHEMAS, MessageType
from remus_colo.relocation.wire import (
    HEADER_BYTES,
    Buffer,
    Header,
    Message,
    SessionFilter,
    decode_payload,
    encode,
    pack_header,
    parse_header,
)

log = logging.getLogger(__name__)

# A frame that the peer does not take within this time means that it is gone, heartbeat or not.
SEND_TIMEOUT_S = 10.0
# Buffers in one sendmsg: IOV_MAX of limits.h is 1024, and a frame rarely has more than four.
MAX_BUFFERS_PER_CALL = 512

KEEPALIVE_IDLE_S = 5
KEEPALIVE_INTERVAL_S = 2
KEEPALIVE_PROBES = 5


Socket = socket.socket | tls.TlsSocket


def _tune(sock: Socket) -> None:
    sock.setblocking(False)
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    # an ACK must not wait for Nagle's algorithm: the PVM's output waits for it
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


class Channel:
    """Sends from any thread, one frame at a time; receives in one thread.

    After a failed or half-done send, and after a fault in what was received, the channel is broken: each
    later call raises :class:`~remus_colo.errors.PeerLost`.

    :param sock: a connected stream socket, which the channel owns from now on.
    :param generation: the protection session, put into each frame sent by :meth:`send_control` and
        :meth:`send_bulk`.
    :param peer: the peer's name in messages.
    :ivar accepts: the types of messages that may come, or None: all.  A frame of another type is refused as soon
        as its header is there.
    """

    def __init__(self, sock: Socket, *, generation: int = 0, peer: str = "the peer") -> None:
        _tune(sock)
        self.peer = peer
        self.generation = generation
        self.sessions = SessionFilter()
        self.accepts: Collection[MessageType] | None = None
        self._sock = sock
        self._send_lock = threading.Lock()
        self._state_lock = threading.Lock()
        self._users = 0
        self._closed = False
        self._broken: str | None = None
        self._header_buffer = bytearray(HEADER_BYTES)
        self._header_have = 0
        self._header: Header | None = None
        self._payload = bytearray()
        self._payload_have = 0

    # -- opening ---------------------------------------------------------------------------------

    @classmethod
    def connect(
        cls,
        host: str,
        port: int,
        *,
        deadline_s: float,
        generation: int = 0,
        tls_context: ssl.SSLContext | None = None,
    ) -> Self:
        """Connects to the relocation port and opens the ``colo`` operation.

        :param tls_context: None: without TLS.
        :raise PeerLost: nobody answers there in time.
        :raise PeerError: the server does not offer the operation, or TLS, or cannot be trusted.
        :raise FramingError: no relocation server answers there.
        """
        peer = f"{host} port {port}"
        remaining_s = deadline_s - time.monotonic()
        if remaining_s <= 0:
            raise PeerLost(f"cannot connect to {peer}: no time left")
        try:
            sock = socket.create_connection((host, port), timeout=remaining_s)
        except TimeoutError as error:
            cause = f"no answer within {remaining_s:.1f} s; is the host up?"
            raise PeerLost(f"cannot connect to {peer}: {cause}") from error
        except socket.gaierror as error:
            cause = f"{error.strerror}; check the destination's name"
            raise PeerLost(f"cannot connect to {peer}: {cause}") from error
        except UnicodeError as error:
            raise PeerLost(f"cannot connect to {peer}: {host!r} is no host name") from error
        except OSError as error:
            hint = "; is remusd running there?" if error.errno == errno.ECONNREFUSED else ""
            raise PeerLost(f"cannot connect to {peer}: {error.strerror or error}{hint}") from error
        connected: Socket = sock
        if tls_context is not None:
            connected = tls.wrap_client(sock, tls_context, deadline_s, host, peer)
        channel = cls(connected, generation=generation, peer=peer)
        try:
            channel._send_all([handshake.request_line()], deadline_s)
            handshake.check_reply(channel.read_line(deadline_s))
        except BaseException as error:
            channel.close()
            if isinstance(error.__cause__, ssl.SSLError):
                # with TLS 1.3 a server looks at our certificate only when we take the connection for open
                why = tls.reason(error.__cause__)
                raise PeerError(f"{peer} refused us within TLS: {why}; see ssl-ca-file there") from error
            if isinstance(error, PeerLost):
                hint = "does it allow this host to connect, and is that port one with TLS (see --ssl)?"
                raise PeerLost(f"{error}; {hint}") from error
            raise
        return channel

    def answer(self, operations: Collection[str], deadline_s: float) -> str:
        """The server's half of opening: reads the client's line and answers it.

        :return: the operation asked for, which the client has been told is ready.
        :raise FramingError, MessageError: it asked for none, or for one not in ``operations``, and has been
            told so.
        """
        try:
            operation = handshake.parse_request(self.read_line(deadline_s))
        except FramingError as error:
            self._send_all([handshake.error_line(str(error))], deadline_s)
            raise
        if operation not in operations:
            refusal = MessageError(f"expected one of the operations {sorted(operations)}, got {operation!r}")
            self._send_all([handshake.refusal(operation, str(refusal))], deadline_s)
            raise refusal
        self._send_all([handshake.ready_line(operation)], deadline_s)
        return operation

    @property
    def encrypted(self) -> bool:
        return isinstance(self._sock, tls.TlsSocket)

    def read_line(self, deadline_s: float) -> bytes:
        """One line of text, without what follows it; only before the first frame.

        :raise FramingError: the line is too long.
        """
        line = bytearray()
        while not line.endswith(b"\n"):
            # byte by byte: what comes after the newline is a frame, which recv() must find
            chunk = bytearray(1)
            if not self._receive_into(memoryview(chunk), deadline_s):
                raise PeerLost(f"{self.peer} did not finish its line in time")
            line += chunk
            if line[0] in handshake.TLS_RECORD_TYPES:
                raise FramingError(f"{self.peer} speaks TLS where we do not: check --ssl, and the port")
            if len(line) > handshake.LINE_LIMIT_BYTES:
                limit = handshake.LINE_LIMIT_BYTES
                raise FramingError(f"expected a line of at most {limit} bytes from {self.peer}")
        return bytes(line)

    def read(self, size: int, deadline_s: float) -> bytes:
        """Bytes that are no frames, in an operation that has none: at most so many, none at the end.

        :raise PeerLost: none came before the deadline, or the connection is lost.
        """
        found = self.poll_bytes(size, deadline_s)
        if found is None:
            raise PeerLost(f"{self.peer} sent nothing in time")
        return found

    def poll_bytes(self, size: int, deadline_s: float) -> bytes | None:
        """As :meth:`read`, but None if none came before the deadline."""
        buffer = bytearray(size)
        count = self._call_when(select.POLLIN, deadline_s, partial(self._sock.recv_into, memoryview(buffer)))
        if count is None:
            return None
        if not count and self._closed:
            raise PeerLost("our own side closed the connection")
        return bytes(memoryview(buffer)[:count])

    # -- sending ---------------------------------------------------------------------------------

    def send(self, message: Message, *, deadline_s: float | None = None) -> None:
        """:raise PeerLost: the peer is gone, or did not take the frame before the deadline."""
        self._send_all([encode(message)], self._send_deadline(deadline_s))

    def send_control(
        self,
        kind: MessageType,
        epoch: int = 0,
        fields: Mapping[str, Any] | None = None,
        *,
        deadline_s: float | None = None,
    ) -> None:
        """Sends a control message of this channel's generation."""
        self.send(Message(kind, self.generation, epoch, fields=fields or {}), deadline_s=deadline_s)

    def send_bulk(
        self, kind: MessageType, epoch: int, buffers: Sequence[Buffer], *, deadline_s: float | None = None
    ) -> int:
        """Sends one bulk frame of this channel's generation, gathered from ``buffers`` without a copy.

        :return: the bytes sent, header included.
        :raise MessageError: the type is no bulk type, or the payload too large; nothing was sent.
        """
        if not SCHEMAS[kind].bulk:
            raise MessageError(f"{kind.name} is a control message and cannot be sent as bulk data")
        length = sum(memoryview(buffer).nbytes for buffer in buffers)
        header = pack_header(kind, self.generation, epoch, length)
        self._send_all([header, *buffers], self._send_deadline(deadline_s))
        return HEADER_BYTES + length

    @staticmethod
    def _send_deadline(deadline_s: float | None) -> float:
        return time.monotonic() + SEND_TIMEOUT_S if deadline_s is None else deadline_s

    def _send_all(self, buffers: Iterable[Buffer], deadline_s: float) -> None:
        if not self._send_lock.acquire(timeout=max(0.0, deadline_s - time.monotonic())):
            raise PeerLost(f"{self.peer} does not take what is sent to it")
        try:
            self._check_usable()
            pending = [view for view in (memoryview(buffer).cast("B") for buffer in buffers) if view.nbytes]
            try:
                self._send_pending(pending, deadline_s)
            except BaseException as error:
                # part of a frame may be out: whatever followed it would be garbage to the peer
                self._break(str(error) or "a frame was cut short here")
                raise
        finally:
            self._send_lock.release()

    def _send_pending(self, pending: list[memoryview], deadline_s: float) -> None:
        first = 0
        while first < len(pending):
            batch = pending[first : first + MAX_BUFFERS_PER_CALL]
            sent = self._call_when(select.POLLOUT, deadline_s, partial(self._sock.sendmsg, batch))
            if sent is None:
                raise PeerLost(f"{self.peer} does not take what is sent to it")
            while sent:
                if sent < pending[first].nbytes:
                    pending[first] = pending[first][sent:]
                    break
                sent -= pending[first].nbytes
                first += 1

    # -- receiving -------------------------------------------------------------------------------

    def recv(self, deadline_s: float) -> Message:
        """The next message.

        :raise PeerLost: the peer is gone, or sent no whole message before the deadline.
        :raise FramingError, MessageError: it broke the protocol; the channel is broken.
        """
        message = self.poll(deadline_s)
        if message is None:
            raise PeerLost(f"{self.peer} sent nothing in time")
        return message

    def poll(self, deadline_s: float) -> Message | None:
        """As :meth:`recv`, but None if there is no whole message yet at the deadline.

        The deadline may have passed already.  What has come of a message is kept for the next call.
        """
        self._check_usable()
        try:
            while True:
                message = self._receive_frame(deadline_s)
                if message is None or self.sessions.passes(message):
                    return message
        except (FramingError, MessageError) as error:
            self._break(str(error))
            raise

    def expect_generation(self, generation: int) -> None:
        """From now on sends as, and receives only messages of, this protection session."""
        self.generation = generation
        self.sessions.expect(generation)

    def _receive_frame(self, deadline_s: float) -> Message | None:
        if self._header is None:
            while self._header_have < HEADER_BYTES:
                count = self._receive_into(memoryview(self._header_buffer)[self._header_have :], deadline_s)
                if not count:
                    return None
                self._header_have += count
            header = parse_header(bytes(self._header_buffer))
            if self.accepts is not None and header.type not in self.accepts:
                raise MessageError(f"{header.type.name} is not allowed at this point of the conversation")
            self._header = header
            # a new one for each frame: a bulk message goes on owning its bytes
            self._payload = bytearray(self._header.length_bytes)
            self._payload_have = 0
        while self._payload_have < self._header.length_bytes:
            count = self._receive_into(memoryview(self._payload)[self._payload_have :], deadline_s)
            if not count:
                return None
            self._payload_have += count
        header, payload = self._header, self._payload
        self._header, self._header_have, self._payload = None, 0, bytearray()
        return decode_payload(header, payload)

    def _receive_into(self, view: memoryview, deadline_s: float) -> int:
        """:return: bytes received, or 0 at the deadline."""
        count = self._call_when(select.POLLIN, deadline_s, partial(self._sock.recv_into, view))
        if count is None:
            return 0
        if count == 0:
            who = "our own side" if self._closed else self.peer
            raise PeerLost(f"{who} closed the connection")
        return count

    # -- the socket ------------------------------------------------------------------------------

    def _call_when(self, event: int, deadline_s: float, call: Callable[[], int]) -> int | None:
        """Result of ``call`` as soon as the socket is ready for it; None at the deadline."""
        self._enter()
        try:
            poller = select.poll()
            poller.register(self._sock, event)
            while True:
                try:
                    return call()
                except tls.WouldBlock as error:
                    if error.event != event:
                        event = error.event
                        poller.modify(self._sock, event)
                except BlockingIOError:
                    pass
                remaining_s = deadline_s - time.monotonic()
                if remaining_s <= 0:
                    return None
                # rounded up: poll() counts in ms, and a rest below one must not become a busy loop
                poller.poll(int(remaining_s * 1000) + 1)
        except OSError as error:
            raise PeerLost(f"the connection to {self.peer} is lost: {error.strerror or error}") from error
        finally:
            self._leave()

    def _check_usable(self) -> None:
        if self._broken is not None:
            raise PeerLost(f"the channel to {self.peer} is broken: {self._broken}")

    def _break(self, reason: str) -> None:
        if self._broken is None:
            self._broken = reason

    @property
    def addresses(self) -> tuple[str, str]:
        """Our and the peer's address of the connection, without the port; IPv4 as IPv4."""
        try:
            return plain(self._sock.getsockname()[0]), plain(self._sock.getpeername()[0])
        except OSError as error:
            raise PeerLost(f"the connection to {self.peer} is lost: {error.strerror or error}") from error

    def fileno(self) -> int:
        """For select and poll; -1 once closed."""
        return self._sock.fileno()

    def close(self) -> None:
        """Idempotent, from any thread; a call that waits in another thread ends with PeerLost."""
        with self._state_lock:
            if self._closed:
                return
            self._closed = True
            self._break("it was closed here")
            try:
                self._sock.shutdown(socket.SHUT_RDWR)
            except OSError as error:
                log.debug("shutdown of the channel to %s: %s", self.peer, error)
            if not self._users:
                self._sock.close()

    def _enter(self) -> None:
        with self._state_lock:
            if self._closed:
                raise PeerLost(f"the channel to {self.peer} is broken: it was closed here")
            self._users += 1

    def _leave(self) -> None:
        # the last user closes: the kernel may give a closed descriptor's number to another file at once
        with self._state_lock:
            self._users -= 1
            if self._closed and not self._users:
                self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
