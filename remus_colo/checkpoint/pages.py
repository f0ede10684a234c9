# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guest pages on the wire: how a checkpoint's pages are cut into PAGES messages. Pure.

One message body is ``HEADER``, ``count`` gfns (u64, little endian) and, unless they are pages of zeros,
``count`` pages of 4096 bytes in the same order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from remus_colo.errors import MessageError

PAGE_SIZE = 4096
HEADER = struct.Struct("<II")  # count, kind
assert HEADER.size == 8
KIND_DATA = 0
KIND_ZERO = 1
PAGES_PER_MESSAGE = 128
ZEROS_PER_MESSAGE = 16384


@dataclass(frozen=True, slots=True)
class PageRun:
    """Some pages: ``gfns`` as u64s, ``pages`` their contents or None for zeros."""

    gfns: memoryview
    pages: memoryview | None

    @property
    def count(self) -> int:
        return len(self.gfns) // 8


def messages(
    gfns: bytes | bytearray, pages: bytes | bytearray | memoryview, count: int, zero_gfns: bytes
) -> Iterator[list[bytes | memoryview]]:
    """The bodies of PAGES messages, each as buffers to be sent one after the other (nothing is copied)."""
    gfn_view, page_view = memoryview(gfns), memoryview(pages)
    for start in range(0, count, PAGES_PER_MESSAGE):
        end = min(count, start + PAGES_PER_MESSAGE)
        yield [
            HEADER.pack(end - start, KIND_DATA),
            gfn_view[start * 8 : end * 8],
            page_view[start * PAGE_SIZE : end * PAGE_SIZE],
        ]
    zero_view = memoryview(zero_gfns)
    for start in range(0, len(zero_gfns) // 8, ZEROS_PER_MESSAGE):
        chunk = zero_view[start * 8 : (start + ZEROS_PER_MESSAGE) * 8]
        yield [HEADER.pack(len(chunk) // 8, KIND_ZERO), chunk]


def parse(body: bytes | bytearray | memoryview) -> PageRun:
    """The run of pages in one message body (views into it, nothing is copied).

    :raise MessageError: if its size does not fit its header.
    """
    view = memoryview(body)
    if len(view) < HEADER.size:
        raise MessageError(f"PAGES message of {len(view)} bytes, shorter than its header")
    count, kind = HEADER.unpack_from(view)
    if kind not in (KIND_DATA, KIND_ZERO):
        raise MessageError(f"PAGES message of unknown kind {kind}")
    gfn_end = HEADER.size + count * 8
    expected = gfn_end + (count * PAGE_SIZE if kind == KIND_DATA else 0)
    if len(view) != expected:
        raise MessageError(f"PAGES message of {len(view)} bytes where {count} pages make {expected}")
    return PageRun(view[HEADER.size : gfn_end], view[gfn_end:] if kind == KIND_DATA else None)
