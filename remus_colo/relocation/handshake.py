# SPDX-License-Identifier: LGPL-2.1-or-later
"""The text lines that open a connection on the relocation port, as xend's relocation protocol has them.

The client names an operation in one line; the server answers that it is ready for it, or with an error.
xend itself wrote its answers as S-expressions, ``(ready receive)`` and ``(err (type ...) (value ...))``:
both spellings are understood.  See docs/protocol.rst, section "Opening a connection".
"""

from __future__ import annotations

import re

from remus_colo import sxp
from remus_colo.errors import FramingError, PeerError

COLO = "colo"
# xend's: a domain comes, as xen.xend.XendCheckpoint.save sends it, and lives here.
RECEIVE, SSL_RECEIVE = "receive", "sslreceive"
LINE_LIMIT_BYTES = 512
# What a host of Xen 4.4 or before asks for (tools/python/xen/xend/server/relocate.py).
XEND_OPERATIONS = frozenset({RECEIVE, SSL_RECEIVE, "help", "quit"})
# It reads so much of the answer, without looking at it, and what comes after when its sending has failed
# (domain_migrate in XendDomain.py).
XEND_ANSWER_BYTES = 80
# First octets of what TLS says in place of a line: alert, handshake (RFC 8446, 5.1). No line begins with one.
TLS_RECORD_TYPES = b"\x15\x16"

_OPERATION = re.compile(r"[a-z][a-z0-9._-]{0,31}")
_VALUE = re.compile(r"\(value\s+(?P<quote>['\"]?)(?P<text>.*?)(?P=quote)\)+\s*$")


def request_line(operation: str = COLO) -> bytes:
    return f"{operation}\n".encode("ascii")


def ready_line(operation: str = COLO) -> bytes:
    """In the asker's own language."""
    text = sxp.to_string(["ready", operation]) if operation in XEND_OPERATIONS else f"ready {operation}"
    return f"{text}\n".encode("ascii")


def error_line(reason: str) -> bytes:
    """One line, whatever ``reason`` holds, and never too long for :func:`check_reply`."""
    sentence = " ".join(reason.split()).encode("utf-8")[: LINE_LIMIT_BYTES - len(b"error \n")]
    return b"error " + sentence.decode("utf-8", "ignore").encode("utf-8") + b"\n"


def refusal(operation: str, reason: str) -> bytes:
    """What to answer to an operation that is not offered, in the asker's own language.

    xend reads the first 80 octets and drops them, sends the guest, and looks for what went wrong only when that
    fails: so it is told twice, the second time where it looks.
    """
    if operation not in XEND_OPERATIONS:
        return error_line(reason)
    value = f"Invalid operation: {operation}: here is remusd, not xend"
    line = sxp.to_string(["err", ["type", "XendError"], ["value", value]])
    short = sxp.to_string(["err", ["type", "XendError"], ["value", f"Invalid operation: {operation}"]])
    return f"{short:<{XEND_ANSWER_BYTES - 1}}\n{line}\n".encode("ascii")


def _text(line: bytes, what: str) -> str:
    if len(line) > LINE_LIMIT_BYTES:
        raise FramingError(f"expected {what} of at most {LINE_LIMIT_BYTES} bytes, got {len(line)}")
    try:
        return line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise FramingError(f"expected {what} in UTF-8, got {line[:40]!r}") from error


def parse_request(line: bytes) -> str:
    """The operation that a client asks for; whether it is offered is the server's to decide.

    :raise FramingError: the line names no operation.
    """
    operation = _text(line, "an operation line")
    if operation.startswith("(") and operation.endswith(")"):
        operation = operation[1:-1].strip()
    if not _OPERATION.fullmatch(operation):
        raise FramingError(f"expected the name of an operation, got {line[:40]!r}")
    return operation


def check_reply(line: bytes, operation: str = COLO) -> None:
    """Returns if the server is ready for ``operation``.

    :raise PeerError: the server refused, in its own words.
    :raise FramingError: it said something else.
    """
    text = _text(line, "an answer line")
    word, _, rest = text.removeprefix("(").partition(" ")
    if word == "ready" and rest.removesuffix(")").strip() == operation:
        return
    if word in ("error", "err"):
        value = _VALUE.search(rest)
        reason = value["text"] if value else rest.strip()
        reason = reason or "no reason given"
        raise PeerError(f"the backup host does not offer {operation!r} on its relocation port: {reason}")
    raise FramingError(f"expected 'ready {operation}', got {line[:40]!r}: no relocation server listens there")
