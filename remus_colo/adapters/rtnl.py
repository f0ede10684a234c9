# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the adapters over rtnetlink share: the translation of pyroute2's errors, and a short way past it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

from remus_colo.adapters import kmod
from remus_colo.errors import HostError, NetworkError

_NLA_TYPE_MASK = 0x3FFF  # <linux/netlink.h>


def netlink_error() -> Any:
    """pyroute2's, for an ``except``, which asks when there is an error: see :func:`prepare`."""
    from pyroute2.netlink.exceptions import NetlinkError

    return NetlinkError


def prepare() -> None:
    """Import pyroute2, which is not done before it is needed: it takes a quarter of a second, half of what a command needs
    to begin, and some seconds under emulation.
    """
    import pyroute2  # noqa: F401


@contextlib.contextmanager
def reporting(action: str, *, module: str = "") -> Iterator[None]:
    """Translate pyroute2's errors.

    :param action: what is tried, to go after "cannot".
    :param module: kernel module that the action needs, if any.
    :raise HostError: no permission, or the module is missing.
    :raise NetworkError: anything else.
    """
    try:
        yield
    except OSError as exc:
        raise NetworkError(f"cannot {action}: {exc.strerror or exc}") from exc
    except netlink_error() as exc:
        if exc.code in (errno.EPERM, errno.EACCES):
            raise HostError(f"cannot {action}: no permission; run as root") from exc
        # The kernel says ENOENT for an unknown qdisc, classifier or action, EOPNOTSUPP for a link kind.
        if module and exc.code in (errno.EOPNOTSUPP, errno.ENOENT):
            raise kmod.missing(module, f"it to {action}", _reason(exc)) from exc
        raise NetworkError(f"cannot {action}: {_reason(exc)}") from exc


@contextlib.contextmanager
def tolerating(*errnos: int) -> Iterator[None]:
    """Let these errors of the kernel pass: what was to go is gone already."""
    try:
        yield
    except netlink_error() as exc:
        if exc.code not in errnos:
            raise


class Requests:
    """Sends requests that are encoded already.

    pyroute2 takes 0.3 ms to encode a request and 5 ms under emulation; this takes a hundredth.  For what
    happens while the guest is paused.
    """

    _DUMP_TRIES = 10  # a list that changes between two messages is begun again, as Documentation/userspace-api/netlink has it
    _HEADER = struct.Struct("=IHHII")  # <linux/netlink.h>: length, type, flags, sequence number, port
    _NLM_F_REQUEST_ACK = 0x01 | 0x04
    _NLM_F_REQUEST_DUMP = 0x01 | 0x300
    _NLM_F_ECHO = 0x08  # without it kernels before 6.8 tell of a qdisc only those who listen to all changes
    _NLM_F_DUMP_INTR = 0x10  # what is listed has changed meanwhile
    _NLMSG_ERROR, _NLMSG_DONE = 2, 3

    def __init__(self) -> None:
        """:raise OSError: no socket is to be had."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.setblocking(False)
        self._sequence = itertools.count(1)

    def close(self) -> None:
        self._socket.close()

    def send(self, kind: int, body: bytes, *, flags: int = 0) -> None:
        """Send one request, and see the kernel's acknowledgement.

        :raise OSError: the kernel refused, with its errno.
        """
        sequence = self._send(kind, body, flags | self._NLM_F_REQUEST_ACK)
        while True:
            # The kernel answers within send(): EAGAIN would mean that it did not.
            answer = self._socket.recv(65536)
            _, answer_kind, _, answered, _ = self._HEADER.unpack_from(answer)
            if answer_kind == self._NLMSG_ERROR and answered == sequence:
                break
        self._check(answer)

    def get(self, kind: int, body: bytes) -> bytes:
        """Ask for one thing. Returns the kernel's message, with its header.

        :raise OSError: the kernel refused, with its errno; ENOENT: it has said nothing.
        """
        messages, _ = self._answers(self._send(kind, body, self._NLM_F_REQUEST_ACK | self._NLM_F_ECHO))
        if not messages:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return messages[0]

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """Ask for all that there is of something. Returns the kernel's messages, with their headers.

        :raise OSError: the kernel refused, with its errno; EAGAIN: the list has not held still.
        """
        for _ in range(self._DUMP_TRIES):
            messages, interrupted = self._answers(self._send(kind, body, self._NLM_F_REQUEST_DUMP))
            if not interrupted:
                return messages
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def _answers(self, sequence: int) -> tuple[list[bytes], bool]:
        messages: list[bytes] = []
        interrupted = False
        while True:
            answer = self._socket.recv(65536)
            while answer:
                length, kind, flags, answered, _ = self._HEADER.unpack_from(answer)
                message, answer = answer[:length], answer[-(-length // 4) * 4 :]
                if answered != sequence:
                    continue
                interrupted |= bool(flags & self._NLM_F_DUMP_INTR)
                if kind in (self._NLMSG_ERROR, self._NLMSG_DONE):
                    self._check(message)
                    return messages, interrupted
                messages.append(message)

    def _send(self, kind: int, body: bytes, flags: int) -> int:
        sequence = next(self._sequence) & 0xFFFFFFFF
        self._socket.send(self._HEADER.pack(self._HEADER.size + len(body), kind, flags, sequence, 0) + body)
        return sequence

    def _check(self, message: bytes) -> None:
        (negative_errno,) = struct.unpack_from("=i", message, self._HEADER.size)
        if negative_errno:
            raise OSError(-negative_errno, os.strerror(-negative_errno))


def attribute(kind: int, value: bytes) -> bytes:
    """A netlink attribute, padded."""
    length = 4 + len(value)
    return struct.pack("=HH", length, kind) + value + bytes(-length % 4)


def attributes(message: bytes, start: int) -> dict[int, bytes]:
    """The netlink attributes from ``start`` to the message's end, by their kinds; of two of a kind the later."""
    found = {}
    while start + 4 <= len(message):
        length, kind = struct.unpack_from("=HH", message, start)
        if not 4 <= length <= len(message) - start:
            break  # cut off: there is no more to be had
        found[kind & _NLA_TYPE_MASK] = message[start + 4 : start + length]
        start += -(-length // 4) * 4
    return found


def _reason(exc: Any) -> str:
    text = str(exc.args[1]) if len(exc.args) > 1 and exc.args[1] else os.strerror(exc.code)
    return text.removesuffix(".")
