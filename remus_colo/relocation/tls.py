# SPDX-License-Identifier: LGPL-2.1-or-later
"""TLS under a replication channel: contexts from PEM files, and a socket that a channel can use like a plain one.

What it is good for and what it leaves uncovered: docs/configuration.rst, section "TLS".
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from remus_colo.errors import ConfigError, PeerError, PeerLost
from remus_colo.options import TlsFiles

# One TLS record holds at most 16 KiB (RFC 8446, 5.1): smaller buffers are put together up to that.
GATHER_BYTES = 16 * 1024
# What is handed to OpenSSL at once. It encrypts all of it before it returns, and a receiver waits meanwhile.
PIECE_BYTES = 256 * 1024


class WouldBlock(BlockingIOError):
    """:ivar event: what to poll the socket for; TLS may have to write in order to read, or the other way round."""

    def __init__(self, event: int) -> None:
        super().__init__()
        self.event = event


class TlsSocket:
    """As much of a connected, non-blocking socket as :class:`~remus_colo.relocation.channel.Channel` uses.

    OpenSSL allows one call at a time on a connection, where a channel sends and receives from different threads: so
    there is a lock, held for calls that do not block.

    After :class:`WouldBlock` a send has to be repeated with the same buffers: OpenSSL has begun to take them.
    """

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self.family = sock.family

    def sendmsg(self, buffers: list[memoryview]) -> int:
        """Send from the beginning of the buffers, not always all of them. Returns the bytes taken."""
        first = buffers[0]
        if first.nbytes < GATHER_BYTES:
            gathered = bytearray()
            for buffer in buffers:
                gathered += buffer[: GATHER_BYTES - len(gathered)]
                if len(gathered) == GATHER_BYTES:
                    break
            first = memoryview(gathered)
        with self._lock:
            try:
                return self._sock.send(first[:PIECE_BYTES])
            except ssl.SSLWantWriteError:
                raise WouldBlock(select.POLLOUT) from None
            except ssl.SSLWantReadError:
                raise WouldBlock(select.POLLIN) from None

    def recv_into(self, view: memoryview) -> int:
        with self._lock:
            try:
                return self._sock.recv_into(view)
            except ssl.SSLWantReadError:
                raise WouldBlock(select.POLLIN) from None
            except ssl.SSLWantWriteError:
                raise WouldBlock(select.POLLOUT) from None

    def shutdown(self, how: int) -> None:
        # not SSLSocket's: that one goes on in plain text
        socket.socket.shutdown(self._sock, how)

    def close(self) -> None:
        self._sock.close()

    def fileno(self) -> int:
        return self._sock.fileno()

    def setblocking(self, flag: bool) -> None:
        self._sock.setblocking(flag)

    def setsockopt(self, level: int, option: int, value: int) -> None:
        self._sock.setsockopt(level, option, value)

    def getsockname(self) -> tuple[str, int]:
        name: tuple[str, int] = self._sock.getsockname()
        return name

    def getpeername(self) -> tuple[str, int]:
        name: tuple[str, int] = self._sock.getpeername()
        return name


def reason(error: ssl.SSLError) -> str:
    """OpenSSL's word for what went wrong, readable."""
    return (error.reason or str(error)).replace("_", " ").lower()


# -- contexts ------------------------------------------------------------------------------------------------


def _no_password() -> NoReturn:
    raise ConfigError(
        "the private key is encrypted, and nobody is there to give its password: store it without one"
    )


def _load(context: ssl.SSLContext, files: TlsFiles) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    if files.certificate is not None:
        for path in (files.certificate, files.key):
            _check_readable(path)
        try:
            context.load_cert_chain(files.certificate, files.key, password=_no_password)
        except ssl.SSLError as error:
            raise ConfigError(
                f"{files.certificate} and {files.key} are no certificate and its private key, both PEM: "
                f"{reason(error)}"
            ) from error
    if files.authority is not None:
        _check_readable(files.authority)
        try:
            context.load_verify_locations(files.authority)
        except ssl.SSLError as error:
            raise ConfigError(f"{files.authority} holds no certificate in PEM: {reason(error)}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _check_readable(path: Path | None) -> None:
    if path is None:
        return
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """For the backup host.

    :raise ConfigError: a file is not there, or not what it should be.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # no session is resumed
    return _load(context, files)


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """For the primary host. Without an authority the other side is not asked who it is.

    :raise ConfigError: a file is not there, or not what it should be.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if files.authority is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return _load(context, files)


# -- handshakes ----------------------------------------------------------------------------------------------


def wrap_server(
    sock: socket.socket,
    context: ssl.SSLContext,
    deadline_s: float,
    peer: str,
    began: Callable[[socket.socket], None] = lambda wrapped: None,
) -> TlsSocket:
    """The backup host's half of the handshake.

    :param began: called with what owns the connection's descriptor from now on, and is to be closed if this fails.
    :raise PeerLost: the peer did not finish it in time; :raise PeerError: it does not speak TLS, or may not.
    """

    def wrap() -> ssl.SSLSocket:
        wrapped = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        began(wrapped)
        return wrapped

    return _handshake(wrap, deadline_s, peer, f"{peer} cannot speak TLS with us")


def wrap_client(
    sock: socket.socket, context: ssl.SSLContext, deadline_s: float, host: str, peer: str
) -> TlsSocket:
    """The primary host's half. The socket is closed if it fails.

    :param host: as the user named it; the certificate must be made out for it, if it is looked at.
    :raise PeerLost, PeerError: as :func:`wrap_server`.
    """

    owner = sock

    def wrap() -> ssl.SSLSocket:
        nonlocal owner
        owner = wrapped = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
        return wrapped

    try:
        return _handshake(
            wrap, deadline_s, peer, f"{peer} cannot speak TLS with us; is that its port with TLS? (see --ssl)"
        )
    except BaseException:
        owner.close()
        raise


def _handshake(wrap: Callable[[], ssl.SSLSocket], deadline_s: float, peer: str, failure: str) -> TlsSocket:
    try:
        sock = wrap()
        sock.settimeout(max(0.001, deadline_s - time.monotonic()))
        sock.do_handshake()
    except OSError as error:
        match error:
            case ssl.SSLCertVerificationError():
                raise PeerError(
                    f"the certificate of {peer} is not one to be trusted: {error.verify_message}; see ssl-ca-file"
                ) from error
            case TimeoutError():
                raise PeerLost(f"{peer} did not finish the TLS handshake in time") from error
            case ssl.SSLEOFError():
                raise PeerLost(f"{peer} closed the connection within the TLS handshake") from error
            case ssl.SSLError():
                raise PeerError(f"{failure}: {reason(error)}") from error
        raise PeerLost(f"the connection to {peer} is lost: {error.strerror or error}") from error
    return TlsSocket(sock)
