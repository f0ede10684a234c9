# SPDX-License-Identifier: LGPL-2.1-or-later
"""Decides whether the bytes that a server sent are the only right ones.

Pure: each check makes the requests of one connection, is fed what comes back in pieces of any size, and answers
with a :class:`Verdict`.  A check makes no exception for anything: a byte too many is as wrong as a byte changed.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from collections import deque
from typing import Protocol

from remus_colo.testbed import load_content

_RANDOM_BODY = re.compile(rb"[0-9a-f]{64}\n")
_TIME_BODY = re.compile(rb"([0-9]{10})\.([0-9]{9})\n")
_SHOWN_BYTES = 60


@dataclasses.dataclass(slots=True)
class Verdict:
    """What a piece of received bytes meant.

    :ivar completed: replies that ended in it, right or wrong.
    :ivar wrong_bytes: bytes that differ from the right ones, or should not have come.
    :ivar lost_writes: acknowledged increments that the server has forgotten.
    :ivar repeated_writes: increments that the server made and nobody asked for.
    :ivar fault: what is wrong, for people; empty if all is right.
    :ivar out_of_step: later bytes cannot be told to belong to a request: the connection is of no more use.
    """

    completed: int = 0
    wrong_bytes: int = 0
    lost_writes: int = 0
    repeated_writes: int = 0
    fault: str = ""
    out_of_step: bool = False


class Check(Protocol):
    """The requests of one connection, and the check of its replies."""

    @property
    def outstanding(self) -> int:
        """Requests whose replies have not come yet."""

    def request(self) -> bytes:
        """The next request, which from now on is outstanding."""

    def feed(self, data: bytes) -> Verdict:
        """Takes the next received bytes."""

    def broken(self) -> None:
        """The connection ended: what is outstanding will never be answered."""


class ExactReplies:
    """Replies that are known to the last byte before they come.  Any wrong byte puts the connection out of step."""

    def __init__(self) -> None:
        self._expected: deque[memoryview] = deque()

    @property
    def outstanding(self) -> int:
        return len(self._expected)

    def expect(self, reply: bytes) -> None:
        """:param reply: not empty; comes after all replies expected so far."""
        self._expected.append(memoryview(reply))

    def feed(self, data: bytes) -> Verdict:
        verdict = Verdict()
        view = memoryview(data)
        while view:
            if not self._expected:
                verdict.wrong_bytes += len(view)
                return out_of_step(verdict, f"{len(view)} bytes that nothing asked for: {shown(view)}")
            reply = self._expected.popleft()
            got, right = view[: len(reply)], reply[: len(view)]
            view = view[len(got) :]
            if got != right:
                verdict.wrong_bytes += sum(a != b for a, b in zip(got, right, strict=True))
                return out_of_step(verdict, f"wrong bytes: got {shown(got)}, not {shown(right)}")
            if len(got) < len(reply):
                self._expected.appendleft(reply[len(got) :])
            else:
                verdict.completed += 1
        return verdict

    def broken(self) -> None:
        self._expected.clear()


class EchoCheck(ExactReplies):
    """A stream of pseudo-random bytes that must come back as it is.

    :param seed: gives the stream; two connections with different seeds cannot be mistaken for each other.
    :param chunk_bytes: the largest chunk; sizes vary from 1 on.
    """

    def __init__(self, seed: str, chunk_bytes: int = 2000) -> None:
        super().__init__()
        self._random = random.Random(seed)
        self._chunk_bytes = chunk_bytes

    def request(self) -> bytes:
        chunk = self._random.randbytes(self._random.randint(1, self._chunk_bytes))
        self.expect(chunk)
        return chunk


class HttpCheck(ExactReplies):
    """GETs of static files, header block and body exact.

    :param names: of :data:`load_content.SIZES`; asked for in this order, again and again.
    :param start: index of the first one.
    """

    def __init__(self, names: list[str], start: int = 0) -> None:
        super().__init__()
        self._names = names
        self._next = start

    def request(self) -> bytes:
        name = self._names[self._next % len(self._names)]
        self._next += 1
        self.expect(_static_reply(name))
        return http_request(name)


@functools.cache
def _static_reply(name: str) -> bytes:
    size = load_content.SIZES[name]
    return load_content.static_header(size) + load_content.content(name, size)


def http_request(path: str) -> bytes:
    """A keep-alive GET of ``/path``."""
    return f"GET /{path} HTTP/1.1\r\nHost: web\r\n\r\n".encode()


class VolatileCheck:
    """GETs of ``/random`` or ``/time``: header block exact, body of the right form, and never an old answer again.

    :param name: ``random`` or ``time``.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        size = {"random": load_content.RANDOM_BODY_BYTES, "time": load_content.TIME_BODY_BYTES}[name]
        self._header = load_content.volatile_header(size)
        self._reply_bytes = len(self._header) + size
        self._reply = b""
        self._seen: set[bytes] = set()
        self.outstanding = 0
        #: The guest's clock at the last ``/time``, nanoseconds since the epoch; 0 before the first.
        self.guest_time_ns = 0

    def request(self) -> bytes:
        self.outstanding += 1
        return http_request(self._name)

    def feed(self, data: bytes) -> Verdict:
        verdict = Verdict()
        self._reply += data
        while self._reply:
            head = self._reply[: len(self._header)]
            if not self.outstanding or not self._header.startswith(head):
                verdict.wrong_bytes += len(self._reply)
                return out_of_step(verdict, f"no answer to GET /{self._name}: {shown(self._reply)}")
            if len(self._reply) < self._reply_bytes:
                return verdict
            body = self._reply[len(self._header) : self._reply_bytes]
            self._reply = self._reply[self._reply_bytes :]
            self.outstanding -= 1
            verdict.completed += 1
            verdict.fault = verdict.fault or self._body_fault(body)
        return verdict

    def broken(self) -> None:
        self.outstanding = 0
        self._reply = b""

    def _body_fault(self, body: bytes) -> str:
        if self._name == "random":
            if not _RANDOM_BODY.fullmatch(body):
                return f"no random number: {shown(body)}"
            if body in self._seen:
                return f"a random number came twice: {shown(body)}"
            self._seen.add(body)
            return ""
        match = _TIME_BODY.fullmatch(body)
        if not match:
            return f"no time: {shown(body)}"
        before, self.guest_time_ns = self.guest_time_ns, int(match[1] + match[2])
        if self.guest_time_ns <= before:
            return f"guest time went from {before} ns to {self.guest_time_ns} ns"
        return ""


class DatagramCheck:
    """Datagrams that must come back as they are; each carries its number, and one at a time is outstanding."""

    def __init__(self, seed: str, payload_bytes: int = 200) -> None:
        self._random = random.Random(seed)
        self._payload_bytes = payload_bytes
        self._sent: deque[bytes] = deque(maxlen=1000)
        self._last = b""

    @property
    def outstanding(self) -> int:
        return int(bool(self._last))

    def request(self) -> bytes:
        self._last = self._random.randbytes(self._payload_bytes)
        return self._last

    def feed(self, datagram: bytes) -> Verdict:
        """Takes one datagram.  A late or second copy of an older one is right, too: UDP may do that."""
        if datagram == self._last:
            self._sent.append(datagram)
            self._last = b""
            return Verdict(completed=1)
        if datagram in self._sent:
            return Verdict()
        return Verdict(wrong_bytes=len(datagram), fault=f"a datagram that was never sent: {shown(datagram)}")

    def broken(self) -> None:
        """The datagram is taken for lost; it may still come."""
        self._sent.append(self._last)
        self._last = b""


def out_of_step(verdict: Verdict, fault: str) -> Verdict:
    """Marks ``verdict`` with ``fault``, after which no byte of the connection can be judged."""
    verdict.fault = verdict.fault or fault
    verdict.out_of_step = True
    return verdict


def shown(data: bytes | memoryview) -> str:
    """The first bytes, as they go into a message."""
    more = "..." if len(data) > _SHOWN_BYTES else ""
    return f"{bytes(data[:_SHOWN_BYTES])!r}{more}"
