# SPDX-License-Identifier: LGPL-2.1-or-later
"""Payloads of the bulk messages PAGES and STATE, and the digest over a checkpoint's bulk data.

Layouts: docs/protocol.rst, section "Bulk payloads".  Nothing here copies pages.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from remus_colo.errors import MessageError
from remus_colo.relocation.schema import SCHEMAS, MessageType
from remus_colo.relocation.wire import Buffer

PAGE_BYTES = 4096
GFN_BYTES = 8

# count u32 and a reserved u32 that must be 0 and puts the gfns at a multiple of 8
PAGES_PREFIX = struct.Struct(">II")
PAGES_PREFIX_BYTES = 8
STATE_PREFIX = struct.Struct(">B")
STATE_NAME_LIMIT_BYTES = 64

_PAGES_LIMIT_BYTES = SCHEMAS[MessageType.PAGES].limit_bytes
MAX_PAGES_PER_FRAME = (_PAGES_LIMIT_BYTES - PAGES_PREFIX_BYTES) // (GFN_BYTES + PAGE_BYTES)

_STATE_NAME = re.compile(r"[a-z][a-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class Pages:
    """Pages of one frame.

    :param gfns: ``count`` unsigned 64-bit *little-endian* numbers, as x86 holds them, so that both ends
        hand the array to C as it is.
    :param pages: ``count`` pages of 4096 bytes, in the order of ``gfns``.
    """

    count: int
    gfns: memoryview
    pages: memoryview


def pages_buffers(gfns: Buffer, pages: Buffer) -> list[Buffer]:
    """The buffers of a PAGES payload, to be sent one after the other.

    :raise MessageError: the two arrays do not fit each other, or one frame.
    """
    gfns_bytes, pages_bytes = memoryview(gfns).nbytes, memoryview(pages).nbytes
    count, rest = divmod(gfns_bytes, GFN_BYTES)
    if rest or pages_bytes != count * PAGE_BYTES:
        raise MessageError(f"PAGES: {gfns_bytes} bytes of gfns do not go with {pages_bytes} bytes of pages")
    if count > MAX_PAGES_PER_FRAME:
        raise MessageError(f"PAGES: {count} pages in a frame, at most {MAX_PAGES_PER_FRAME} are allowed")
    return [PAGES_PREFIX.pack(count, 0), gfns, pages]


def parse_pages(payload: Buffer) -> Pages:
    """:raise MessageError: the payload is not laid out as PAGES."""
    view = memoryview(payload)
    if view.nbytes < PAGES_PREFIX_BYTES:
        raise MessageError(f"PAGES: expected at least {PAGES_PREFIX_BYTES} bytes, got {view.nbytes}")
    count, reserved = PAGES_PREFIX.unpack_from(view)
    if reserved:
        raise MessageError(f"PAGES: reserved bytes are set: expected 0, got {reserved:#x}")
    expected_bytes = PAGES_PREFIX_BYTES + count * (GFN_BYTES + PAGE_BYTES)
    if view.nbytes != expected_bytes:
        raise MessageError(f"PAGES: {count} pages need {expected_bytes} bytes, got {view.nbytes}")
    first_page = PAGES_PREFIX_BYTES + count * GFN_BYTES
    return Pages(count, view[PAGES_PREFIX_BYTES:first_page], view[first_page:])


def state_buffers(name: str, data: Buffer) -> list[Buffer]:
    """The buffers of a STATE payload.

    :raise MessageError: the name is not allowed.
    """
    raw_name = name.encode("ascii", "replace")
    if not _STATE_NAME.fullmatch(name) or len(raw_name) > STATE_NAME_LIMIT_BYTES:
        raise MessageError(f"STATE: {name!r} is no name of a state")
    return [STATE_PREFIX.pack(len(raw_name)) + raw_name, data]


def parse_state(payload: Buffer) -> tuple[str, memoryview]:
    """Name and bytes of a STATE payload.

    :raise MessageError: the payload is not laid out as STATE.
    """
    view = memoryview(payload)
    if not view.nbytes:
        raise MessageError("STATE: expected a name, got no bytes")
    (name_bytes,) = STATE_PREFIX.unpack_from(view)
    if not 0 < name_bytes <= STATE_NAME_LIMIT_BYTES or view.nbytes < 1 + name_bytes:
        limit = STATE_NAME_LIMIT_BYTES
        raise MessageError(
            f"STATE: expected a name of 1 to {limit} bytes, got {name_bytes} of {view.nbytes - 1}"
        )
    name = bytes(view[1 : 1 + name_bytes]).decode("ascii", "replace")
    if not _STATE_NAME.fullmatch(name):
        raise MessageError(f"STATE: {name!r} is no name of a state")
    return name, view[1 + name_bytes :]


class CheckpointDigest:
    """Guards a checkpoint against a frame lost, doubled, changed or out of order between the two programs.

    TCP's own checksum is weak and ends at the socket.  CRC-32 (zlib's) over all payload bytes of PAGES and
    STATE in the order in which they were sent; it is no defence against a peer that lies.
    """

    ALGORITHM = "crc32"

    def __init__(self) -> None:
        self._crc = 0
        self.frames = 0
        self.bytes = 0
        self.pages = 0

    def update(self, buffers: Iterable[Buffer], *, pages: int = 0) -> None:
        """Takes one frame's payload.

        :param pages: how many guest pages the frame carries.
        """
        for buffer in buffers:
            self._crc = zlib.crc32(buffer, self._crc)
            self.bytes += memoryview(buffer).nbytes
        self.frames += 1
        self.pages += pages

    def fields(self) -> dict[str, Any]:
        """The fields of CHECKPOINT_END."""
        return {
            "digest": f"{self.ALGORITHM}:{self._crc:08x}",
            "frames": self.frames,
            "bytes": self.bytes,
            "pages": self.pages,
        }

    def verify(self, end_fields: Mapping[str, Any]) -> None:
        """:raise MessageError: what arrived is not what CHECKPOINT_END says was sent."""
        for name, got in self.fields().items():
            if end_fields[name] != got:
                raise MessageError(
                    f"the checkpoint arrived damaged: expected {name} {end_fields[name]}, got {got}"
                )
