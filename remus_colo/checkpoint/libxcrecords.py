# SPDX-License-Identifier: LGPL-2.1-or-later
"""The records of libxenguest's stream, as far as a checkpoint's pages are concerned: pure bytes.

Source: docs/specs/libxc-migration-stream.pandoc of Xen, version 3 of the format.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from remus_colo.errors import FramingError

PAGE_SIZE = 4096
MARKER = b"\xff" * 8  # what a stream begins with
HEADERS_BYTES = 24 + 16  # image header and domain header, before the first record
RECORD = struct.Struct("<II")  # type, length of the body, which is padded to a multiple of 8
ALIGNMENT = 8
END, PAGE_DATA, CHECKPOINT = 0x00000000, 0x00000001, 0x0000000E
PAGES_PER_RECORD = 1024  # as libxenguest's MAX_BATCH_SIZE
PAGE_DATA_PREFIX = struct.Struct("<II")  # count, reserved
PFN_MASK = (1 << 52) - 1
TYPE_SHIFT = 60
# XEN_DOMCTL_PFINFO_BROKEN, XALLOC and XTAB: pages without content
NO_CONTENT = frozenset({0xD, 0xE, 0xF})
END_RECORD = RECORD.pack(END, 0)


class PageAt(NamedTuple):
    entry: int  # its number, and its type in bits 60 to 63
    offset: int  # of its 4096 bytes in the buffer

    @property
    def pfn(self) -> int:
        return self.entry & PFN_MASK


class Record(NamedTuple):
    kind: int
    offset: int  # of its body in the buffer
    length: int  # of the body, without padding

    @property
    def end(self) -> int:
        """Where the next one begins."""
        return self.offset + (self.length + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


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
            raise FramingError(
                f"a record of type {kind:#x} ends at byte {position}, the stream at {len(view)}"
            )
        yield Record(kind, body, length)


def entries(stream: memoryview | bytes | bytearray, record: Record) -> memoryview:
    """The numbers and types of a PAGE_DATA record's pages, 8 bytes each.

    :raise FramingError: it is not laid out as one.
    """
    view = memoryview(stream)
    if record.length < PAGE_DATA_PREFIX.size:
        raise FramingError("a PAGE_DATA record without a count")
    count, _ = PAGE_DATA_PREFIX.unpack_from(view, record.offset)
    start = record.offset + PAGE_DATA_PREFIX.size
    if start + 8 * count > record.offset + record.length:
        raise FramingError(
            f"a PAGE_DATA record of {record.length} bytes has no room for {count} pages' numbers"
        )
    return view[start : start + 8 * count]


def contents(stream: memoryview | bytes | bytearray, record: Record) -> memoryview:
    """The contents of a PAGE_DATA record's pages, one after the other."""
    start = record.offset + PAGE_DATA_PREFIX.size + len(entries(stream, record))
    return memoryview(stream)[start : record.offset + record.length]


def all_pages(stream: memoryview | bytes | bytearray, record: Record) -> Iterator[tuple[int, int | None]]:
    """Entry of each page of a PAGE_DATA record, and where its content lies, None for those without.

    :raise FramingError: it is not laid out as one.
    """
    numbers = entries(stream, record)
    offset = record.offset + PAGE_DATA_PREFIX.size + len(numbers)
    end = record.offset + record.length
    for (entry,) in struct.iter_unpack("<Q", numbers):
        if entry >> TYPE_SHIFT in NO_CONTENT:
            yield entry, None
            continue
        if offset + PAGE_SIZE > end:
            raise FramingError(f"a PAGE_DATA record of {record.length} bytes lacks pages")
        yield entry, offset
        offset += PAGE_SIZE
    if offset != end:
        raise FramingError(f"a PAGE_DATA record has {end - offset} bytes too many")


def pages(stream: memoryview | bytes | bytearray, record: Record) -> Iterator[PageAt]:
    """The pages of a PAGE_DATA record that have content.

    :raise FramingError: it is not laid out as one.
    """
    for entry, offset in all_pages(stream, record):
        if offset is not None:
            yield PageAt(entry, offset)


def page_data(found: Sequence[tuple[int, bytes | memoryview | None]]) -> Iterator[bytes]:
    """PAGE_DATA records of pages, each an entry and its content, if it has one; few records, as a receiver maps the
    pages of each anew.
    """
    for start in range(0, len(found), PAGES_PER_RECORD):
        some = found[start : start + PAGES_PER_RECORD]
        numbers = b"".join(entry.to_bytes(8, "little") for entry, _ in some)
        body = (
            PAGE_DATA_PREFIX.pack(len(some), 0)
            + numbers
            + b"".join([page for _, page in some if page is not None])
        )
        yield RECORD.pack(PAGE_DATA, len(body)) + body
