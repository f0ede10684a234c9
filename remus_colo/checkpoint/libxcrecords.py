# SPDX-License-Identifier: LGPL-2.1-or-later
"""The records of libxenguest's stream, as far as a checkpoint's pages are concerned: pure bytes.

Source: docs/specs/libxc-migration-stream.pandoc of Xen, version 3 of the format.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from remus_colo.errors import FramingError

PAGE_SIZE = 4096
RECORD = struct.Struct("<II")  # type, length of the body, which is padded to a multiple of 8
ALIGNMENT = 8
END, PAGE_DATA, CHECKPOINT = 0x00000000, 0x00000001, 0x0000000E
PAGE_DATA_PREFIX = struct.Struct("<II")  # count, reserved
PFN_MASK = (1 << 52) - 1
TYPE_SHIFT = 60
# XEN_DOMCTL_PFINFO_BROKEN, XALLOC and XTAB: pages without content
NO_CONTENT = frozenset({0xD, 0xE, 0xF})
END_RECORD = RECORD.pack(END, 0)


class PageAt(NamedTuple):
    pfn: int
    offset: int  # of its 4096 bytes in the buffer


class Record(NamedTuple):
    kind: int
    offset: int  # of its body in the buffer
    length: int  # of the body, without padding


def records(stream: memoryview | bytes | bytearray) -> Iterator[Record]:
    """The records that ``stream`` consists of.

    :raise FramingError: it ends within one.
    """
    view = memoryview(stream)
    position = 0
    while position < len(view):
        if position + RECORD.size > len(view):
            raise FramingError(f"a record's header is cut off at byte {position} of {len(view)}")
        kind, length = RECORD.unpack_from(view, position)
        body = position + RECORD.size
        position = body + (length + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        if position > len(view):
            raise FramingError(f"a record of type {kind:#x} ends at byte {position}, the stream at {len(view)}")
        yield Record(kind, body, length)


def pages(stream: memoryview | bytes | bytearray, record: Record) -> Iterator[PageAt]:
    """Where the pages of a PAGE_DATA record lie.

    :raise FramingError: it is not laid out as one.
    """
    view = memoryview(stream)
    if record.length < PAGE_DATA_PREFIX.size:
        raise FramingError("a PAGE_DATA record without a count")
    count, _ = PAGE_DATA_PREFIX.unpack_from(view, record.offset)
    offset = record.offset + PAGE_DATA_PREFIX.size + 8 * count
    end = record.offset + record.length
    if offset > end:
        raise FramingError(f"a PAGE_DATA record of {record.length} bytes has no room for {count} pages' numbers")
    for (entry,) in struct.iter_unpack("<Q", view[offset - 8 * count : offset]):
        if entry >> TYPE_SHIFT in NO_CONTENT:
            continue
        if offset + PAGE_SIZE > end:
            raise FramingError(f"a PAGE_DATA record of {record.length} bytes lacks pages")
        yield PageAt(entry & PFN_MASK, offset)
        offset += PAGE_SIZE
    if offset != end:
        raise FramingError(f"a PAGE_DATA record has {end - offset} bytes too many")
