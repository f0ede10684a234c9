# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attacks on the relocation port: conversations that begin right and go wrong somewhere, on one connection or two.

Everything is drawn from one ``random.Random``, so that a seed or hypothesis repeats an attack.
"""

from __future__ import annotations

import contextlib
import json
import random
import select
import socket
import ssl
import struct
import time
from dataclasses import dataclass, field, replace
from typing import Any

from receiver_harness import PATIENCE_S, Receiver, checkpoint_frames, create_fields

from remus_colo.errors import MessageError
from remus_colo.relocation.schema import SCHEMAS, MessageType
from remus_colo.relocation.wire import HEADER, HEADER_BYTES, MAGIC, VERSION, pack_header

# JSON has no infinity, but a number too large for a float reads as one.
ODD_VALUES = (
    *(
        "null",
        "true",
        "-1",
        "0",
        "1",
        "0.5",
        "1e999",
        "-1e999",
        "1e-300",
        str(2**31),
        str(2**64),
        "1" * 400,
        '""',
        '"x"',
    ),
    *(
        '"' + "y" * 3000 + '"',
        '"\\u0000"',
        '"\\ud800"',
        "[]",
        "[[]]",
        "{}",
        '{"a":1}',
        "[" * 500 + "]" * 500,
        "NaN",
        "",
    ),
)
OPENINGS = (
    b"colo\n",
    b"colo\n",
    b"colo\n",
    b"(colo)\n",
    b"receive\n",
    b"",
    b"COLO\n",
    b"colo",
    b"\x16\x03\x01\x02\x00\x01",
)
CONTROL, DATA = 0, 1
# How long to wait for an answer that would come if nothing had gone wrong before.
ANSWER_S = 0.2


@dataclass(frozen=True)
class Piece:
    """:param answer: what a good peer would wait for, on the control connection, before it goes on."""

    where: int
    data: bytes
    answer: MessageType | None = None


@dataclass
class Attack:
    """What is sent on which of two connections, in order; a connection is opened when it first has something to send.

    :param good: so many pieces at the beginning are as they should be.
    :param secure: through TLS.
    :param reset: end by resetting connections rather than by closing them.
    """

    pieces: list[Piece] = field(default_factory=list)
    good: int = 0
    secure: bool = False
    reset: bool = False


def frame(kind: MessageType, generation: int, epoch: int, payload: Any) -> bytes:
    data = (
        json.dumps(payload).encode()
        if isinstance(payload, dict)
        else b"".join(bytes(part) for part in payload)
    )
    return pack_header(kind, generation, epoch, len(data)) + data


def conversation(chance: random.Random, generation: int) -> list[Piece]:
    """A good one: from the first line to the end of the protection, or to somewhere before."""

    def message(kind: MessageType, epoch: int = 0, **fields: Any) -> bytes:
        return frame(kind, generation, epoch, fields)

    def hello(channel: str) -> bytes:
        return message(MessageType.HELLO, versions=[1], host="h", channel=channel)

    said = [Piece(CONTROL, b"colo\n"), Piece(CONTROL, hello("control"), MessageType.HELLO)]
    said += [Piece(DATA, b"colo\n"), Piece(DATA, hello("data"))]
    for number in range(chance.randrange(3)):
        said.append(Piece(CONTROL, message(MessageType.CLOCK_PROBE, sent_ns=number), MessageType.CLOCK_REPLY))
    said.append(Piece(CONTROL, frame(MessageType.CREATE, generation, 0, create_fields("fuzz"))))
    said += [Piece(DATA, frame(MessageType.CREATE_STREAM, generation, 0, [b"s" * 50]))] * chance.randrange(3)
    said.append(Piece(DATA, frame(MessageType.CREATE_STREAM, generation, 0, []), MessageType.CREATED))
    for epoch in range(1, 1 + chance.randrange(3)):
        beat = {"sequence": epoch, "seen": 0, "sent_ns": 0, "state": "protected"}
        said.append(Piece(CONTROL, frame(MessageType.HEARTBEAT, generation, 0, beat)))
        said.append(Piece(CONTROL, message(MessageType.PREPARE, epoch), MessageType.DIRTY))
        said += [
            Piece(DATA, frame(kind, generation, epoch, payload)) for kind, payload in checkpoint_frames(1)
        ]
        said[-1] = replace(said[-1], answer=MessageType.RESUMED)
    end = chance.choice([MessageType.STOP, MessageType.BYE, MessageType.ABORT])
    said.append(Piece(CONTROL, message(end, **({} if end is MessageType.BYE else {"reason": "done"}))))
    return said[: chance.randrange(1, len(said) + 1)] if chance.random() < 0.3 else said


# -- how it goes wrong ---------------------------------------------------------------------------------------


def _flip(chance: random.Random, piece: bytes) -> bytes:
    if not piece:
        return piece
    changed = bytearray(piece)
    for _ in range(chance.randrange(1, 4)):
        # the header is where it hurts
        limit = min(HEADER_BYTES, len(changed)) if chance.random() < 0.5 else len(changed)
        changed[chance.randrange(limit)] = chance.randrange(256)
    return bytes(changed)


def _odd_field(chance: random.Random, piece: bytes) -> bytes:
    """Another value for one of the values in a control message, at any depth."""
    try:
        header, fields = piece[:HEADER_BYTES], json.loads(piece[HEADER_BYTES:])
        kind, generation, epoch = header[5], *struct.unpack_from(">IQ", header, 8)
        places: list[tuple[Any, Any]] = []

        def walk(value: Any) -> None:
            items = (
                value.items()
                if isinstance(value, dict)
                else enumerate(value)
                if isinstance(value, list)
                else ()
            )
            for key, item in items:
                places.append((value, key))
                walk(item)

        walk(fields)
        holder, key = chance.choice(places)
        if isinstance(holder, dict) and chance.random() < 0.3:
            del holder[key]
        else:
            holder[key] = "@@odd@@"
        text = json.dumps(fields).replace('"@@odd@@"', chance.choice(ODD_VALUES)).encode()
        return pack_header(MessageType(kind), generation, epoch, len(text)) + text
    except (ValueError, IndexError, TypeError, struct.error, MessageError):
        return _flip(chance, piece)


def _rubbish_frame(chance: random.Random, generation: int) -> bytes:
    kind = chance.choice(list(MessageType))
    length = chance.choice(
        [0, 1, 8, 100, SCHEMAS[kind].limit_bytes, SCHEMAS[kind].limit_bytes + 1, 2**32 - 1]
    )
    payload = chance.randbytes(min(length, chance.choice([0, 5, 300, 20_000])))
    return (
        HEADER.pack(MAGIC, VERSION, kind, 0, generation, chance.choice([0, 1, 2, 2**64 - 1]), length)
        + payload
    )


def attack(chance: random.Random, generation: int) -> Attack:
    """One of all kinds."""
    made = Attack(
        conversation(chance, generation), secure=chance.random() < 0.15, reset=chance.random() < 0.3
    )
    pieces = made.pieces
    made.good = len(pieces)
    for _ in range(chance.choice([0, 1, 1, 1, 2, 5])):
        index = chance.randrange(len(pieces))
        piece = pieces[index]
        match chance.randrange(10):
            case 0:
                pieces[index] = replace(piece, data=_flip(chance, piece.data))
            case 1 | 2 | 3:
                if chance.random() < 0.5:
                    # the message with most in it
                    index = next((at for at, each in enumerate(pieces) if b'"config"' in each.data), index)
                pieces[index] = replace(pieces[index], data=_odd_field(chance, pieces[index].data))
            case 4:
                pieces[index] = replace(piece, data=piece.data[: chance.randrange(len(piece.data) + 1)])
            case 5:
                pieces.insert(index, pieces[chance.randrange(len(pieces))])
            case 6:
                pieces[index] = replace(piece, where=1 - piece.where)
            case 7:
                pieces.insert(index, Piece(piece.where, _rubbish_frame(chance, generation)))
            case 8:
                pieces.insert(index, Piece(piece.where, chance.randbytes(chance.randrange(1, 600))))
            case 9 if len(pieces) > 1:
                del pieces[index]
        made.good = min(made.good, index)
    if chance.random() < 0.1:
        pieces[0] = Piece(CONTROL, chance.choice(OPENINGS))
        made.good = 0
    return made


# -- carrying it out -----------------------------------------------------------------------------------------


def _connect(receiver: Receiver, secure: bool, own: str) -> socket.socket:
    port = receiver.ssl_port if secure else receiver.port
    sock = socket.create_connection(("127.0.0.1", port), PATIENCE_S, (own, 0))
    if not secure:
        return sock
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        return context.wrap_socket(sock)
    except BaseException:
        sock.close()
        raise


def _take(sock: socket.socket) -> bytes:
    """What is there, as a peer takes it that listens; nothing if the other side has closed."""
    taken = bytearray()
    sock.settimeout(0.0)
    with contextlib.suppress(OSError):
        while chunk := sock.recv(1 << 16):
            taken += chunk
    sock.settimeout(PATIENCE_S)
    return bytes(taken)


def _await(sock: socket.socket, answer: MessageType, patience_s: float) -> None:
    """It may well be that it does not come."""
    mark = MAGIC + bytes([VERSION, answer])
    seen, end_s = b"", time.monotonic() + patience_s
    while mark not in seen and time.monotonic() < end_s:
        if select.select([sock], [], [], patience_s)[0]:
            taken = _take(sock)
            if not taken:
                return
            seen += taken


def carry_out(receiver: Receiver, planned: Attack, own: str = "127.0.0.1") -> None:
    """Send it all, as far as the receiver takes it, and leave.

    :param own: the address to come from.
    """
    socks: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        for index, piece in enumerate(planned.pieces):
            try:
                if piece.where not in socks:
                    socks[piece.where] = stack.enter_context(_connect(receiver, planned.secure, own))
                socks[piece.where].sendall(piece.data)
            except OSError:
                continue  # it has had enough of us
            if piece.answer is not None and CONTROL in socks:
                _await(socks[CONTROL], piece.answer, PATIENCE_S if index < planned.good else ANSWER_S)
            if DATA in socks:
                _take(socks[DATA])
        if planned.reset:
            for sock in socks.values():
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
