# SPDX-License-Identifier: LGPL-2.1-or-later
"""Framing of the replication protocol (docs/protocol.rst): frames in bytes, messages out, no I/O.

Every frame is a header of 24 bytes and a payload: a JSON object for a control message, raw bytes for
a bulk one.  A sender of bulk data needs no copy: :func:`pack_header`, then its own buffers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from remus_colo.errors import FramingError, MessageError, PeerError, ProtocolError
from remus_colo.relocation.schema import SCHEMAS, MessageType

MAGIC = b"RCOL"
VERSION = 1
SUPPORTED_VERSIONS = (VERSION,)

# docs/protocol.rst, "Frame header": magic, version u8, type u8, flags u16, generation u32, epoch u64,
# payload length u32, all big-endian.
HEADER = struct.Struct(">4sBBHIQI")
HEADER_BYTES = 24
if HEADER.size != HEADER_BYTES:
    raise ImportError(f"the frame header is {HEADER.size} bytes, the specification says {HEADER_BYTES}")

U32_MAX = 2**32 - 1
U64_MAX = 2**64 - 1

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Header:
    type: MessageType
    generation: int
    epoch: int
    length_bytes: int


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    :param generation: the protection session that it belongs to; 0 before there is one.
    :param epoch: the checkpoint epoch that it is about; 0 where none is.
    :param fields: of a control message; checked against the schema.
    :param data: of a bulk message; may be a view on the receiver's buffer, which the message then owns.
    :raise MessageError: on construction, if the specification does not allow the message.
    """

    type: MessageType
    generation: int = 0
    epoch: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)
    data: Buffer = b""

    def __post_init__(self) -> None:
        schema = SCHEMAS[self.type]
        if schema.bulk and self.fields:
            raise MessageError(f"{self.type.name} is a bulk message and has no fields")
        if not schema.bulk and len(self.data):
            raise MessageError(f"{self.type.name} is a control message and has no data")
        schema.check_fields(self.type, self.fields)


def pack_header(kind: MessageType, generation: int, epoch: int, length_bytes: int) -> bytes:
    """The header of a frame whose payload the caller sends itself.

    :raise MessageError: a number is out of its range or the payload too large for its type.
    """
    limit = SCHEMAS[kind].limit_bytes
    if not 0 <= length_bytes <= limit:
        raise MessageError(f"{kind.name}: payload of {length_bytes} bytes, at most {limit} are allowed")
    if not 0 <= generation <= U32_MAX:
        raise MessageError(f"{kind.name}: generation {generation} is no unsigned 32-bit number")
    if not 0 <= epoch <= U64_MAX:
        raise MessageError(f"{kind.name}: epoch {epoch} is no unsigned 64-bit number")
    return HEADER.pack(MAGIC, VERSION, kind, 0, generation, epoch, length_bytes)


def encode(message: Message) -> bytes:
    """The whole frame of a message.

    :raise MessageError: the fields cannot be written as JSON, or are too large.
    """
    payload: Buffer = message.data
    if not SCHEMAS[message.type].bulk:
        try:
            text = json.dumps(message.fields, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise MessageError(f"{message.type.name}: the fields are no JSON object: {error}") from error
        payload = text.encode("ascii")
    header = pack_header(message.type, message.generation, message.epoch, len(payload))
    return header + bytes(payload)


def parse_header(data: Buffer) -> Header:
    """The header at the start of ``data``, which holds at least ``HEADER_BYTES`` bytes.

    :raise FramingError: this is no header of this protocol and version.
    """
    magic, version, kind, flags, generation, epoch, length = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise FramingError(f"no frame starts here: expected magic {MAGIC!r}, got {magic!r}")
    if version != VERSION:
        raise FramingError(
            f"expected protocol version {VERSION}, got {version}: install the same release on both hosts"
        )
    if flags:
        raise FramingError(f"reserved flags are set: expected 0x0000, got {flags:#06x}")
    try:
        message_type = MessageType(kind)
    except ValueError:
        raise FramingError(f"unknown message type: expected 1 to {max(MessageType):d}, got {kind}") from None
    limit = SCHEMAS[message_type].limit_bytes
    if length > limit:
        raise FramingError(f"{message_type.name}: expected a payload of at most {limit} bytes, got {length}")
    return Header(message_type, generation, epoch, length)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def decode_payload(header: Header, payload: Buffer) -> Message:
    """The message of a header and its whole payload. Bulk data is not copied.

    :raise MessageError: the payload is not what the header's type must carry.
    """
    if SCHEMAS[header.type].bulk:
        return Message(header.type, header.generation, header.epoch, data=payload)
    try:
        fields = json.loads(str(payload, "utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"{header.type.name}: expected a JSON object in UTF-8, got {error}") from error
    if not isinstance(fields, dict):
        raise MessageError(f"{header.type.name}: expected a JSON object, got {type(fields).__name__}")
    return Message(header.type, header.generation, header.epoch, fields=fields)


def common_version(theirs: Iterable[int]) -> int:
    """The highest version that both sides speak, of those that the peer's HELLO lists.

    :raise PeerError: there is none.
    """
    common = set(SUPPORTED_VERSIONS).intersection(theirs)
    if not common:
        raise PeerError(
            f"the peer speaks versions {sorted(theirs)} of the replication protocol, "
            f"we speak {list(SUPPORTED_VERSIONS)}: install the same release on both hosts"
        )
    return max(common)


class SessionFilter:
    """Drops what belongs to another protection session, and counts it.

    Until :meth:`expect` is called everything passes: the first HELLO brings the generation.  REFUSE always
    passes: a peer that refuses may never have learnt the generation.
    """

    def __init__(self) -> None:
        self.generation: int | None = None
        self.stale = 0

    def expect(self, generation: int) -> None:
        self.generation = generation

    def passes(self, message: Message) -> bool:
        if self.generation in (None, message.generation) or message.type is MessageType.REFUSE:
            return True
        self.stale += 1
        return False


class Decoder:
    """Turns a byte stream, split anywhere, into messages.

    A fault ends the stream for good: where the next frame starts is no longer known, or the peer
    cannot be trusted.  Messages before the fault are returned first, whatever the split; the fault is raised
    by the next call of :meth:`feed` (``feed(b"")`` will do), and by each one after it.
    """

    def __init__(self) -> None:
        self.sessions = SessionFilter()
        self._buffer = bytearray()
        self._fault: ProtocolError | None = None

    def feed(self, data: Buffer) -> list[Message]:
        """:raise FramingError, MessageError: the stream broke the protocol, here or earlier."""
        if self._fault is not None:
            raise self._fault
        self._buffer += data
        messages: list[Message] = []
        start = 0
        try:
            while len(self._buffer) - start >= HEADER_BYTES:
                header = parse_header(bytes(self._buffer[start : start + HEADER_BYTES]))
                end = start + HEADER_BYTES + header.length_bytes
                if len(self._buffer) < end:
                    break
                message = decode_payload(header, bytes(memoryview(self._buffer)[start + HEADER_BYTES : end]))
                start = end
                if self.sessions.passes(message):
                    messages.append(message)
        except ProtocolError as error:
            self._fault = error
            self._buffer.clear()
            if not messages:
                raise
            return messages
        del self._buffer[:start]
        return messages

    def end(self) -> None:
        """To be called at the end of the stream.

        :raise FramingError: it ended within a frame.
        """
        if self._fault is not None:
            raise self._fault
        if self._buffer:
            raise FramingError(f"the stream ended within a frame, after {len(self._buffer)} of its bytes")
