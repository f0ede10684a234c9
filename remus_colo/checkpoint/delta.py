# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compression of Remus's checkpoints: each page against what was last sent of it, runs of zeros, then zlib.

Both ends keep the pages that were sent last, in caches that see the same pages in the same order and so hold the same.
A page that is in the cache travels as the exclusive or of both, which is zero wherever it has not changed.
The stream keeps its length and layout by that, so that its receiver finds the pages by parsing what it got.  Runs of
zeros are taken out before zlib, which is a hundred times slower at it.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator

from remus_colo.adapters import zeros
from remus_colo.checkpoint import libxcrecords
from remus_colo.checkpoint.libxcrecords import PAGE_SIZE
from remus_colo.errors import FramingError

CACHE_PAGES = 16384  # 64 MiB on each host, as much as most guests write between some checkpoints
LEVEL = 1  # what zlib gains beyond it is not worth the time that output waits for it
WORD = 8


class PageCache:
    """The last content of the pages that were sent most recently; of a page that is not there, zeros."""

    def __init__(self, limit_pages: int = CACHE_PAGES) -> None:
        self._limit_pages = limit_pages
        self._pages: OrderedDict[int, bytearray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def slot(self, pfn: int) -> memoryview:
        """Where the page's content is kept, to be read and replaced by the caller."""
        page = self._pages.pop(pfn, None)
        if page is None:
            if len(self._pages) >= self._limit_pages:
                self._pages.popitem(last=False)
            page = bytearray(PAGE_SIZE)
        self._pages[pfn] = page
        return memoryview(page)


class DeltaEncoder:
    """The sender's end of one session: checkpoints must be decoded in the order in which they were encoded."""

    def __init__(self, limit_pages: int = CACHE_PAGES) -> None:
        self._cache = PageCache(limit_pages)

    def encode(self, stream: memoryview) -> bytes:
        """:param stream: one checkpoint, whole records of libxenguest's."""
        changed = bytearray(stream)
        view = memoryview(changed)
        for page in _pages(stream):
            zeros.delta_out(view[page.offset : page.offset + PAGE_SIZE], self._cache.slot(page.pfn))
        return zlib.compress(zeros.pack(changed), LEVEL)


class DeltaDecoder:
    """The receiver's end of one session."""

    def __init__(self, limit_pages: int = CACHE_PAGES) -> None:
        self._cache = PageCache(limit_pages)

    def decode(self, pieces: Iterable[bytes | memoryview], length: int) -> bytearray:
        """The checkpoint that :meth:`DeltaEncoder.encode` was given.

        :param pieces: what it returned, in pieces.
        :param length: of the checkpoint, in bytes.
        :raise FramingError: it is not what an encoder makes.
        """
        if length % WORD:
            raise FramingError(f"a checkpoint of {length} bytes, which is no number of whole words")
        unpacker = zlib.decompressobj()
        limit = length + length // zeros.GAP_WORDS + 4 * WORD
        try:
            packed = unpacker.decompress(b"".join(pieces), limit + 1)
        except zlib.error as error:
            raise FramingError(f"a compressed checkpoint is damaged: {error}") from error
        if len(packed) > limit or not unpacker.eof or unpacker.unused_data:
            raise FramingError(f"a compressed checkpoint is no {length} bytes when it is unpacked")
        stream = zeros.unpack(packed, length)
        view = memoryview(stream)
        for page in _pages(view):
            zeros.delta_in(view[page.offset : page.offset + PAGE_SIZE], self._cache.slot(page.pfn))
        view.release()
        return stream


def _pages(stream: memoryview) -> Iterator[libxcrecords.PageAt]:
    """Before a page is decoded the records' headers and numbers must be as they were: only pages are changed."""
    for record in libxcrecords.records(stream):
        if record.kind == libxcrecords.PAGE_DATA:
            yield from libxcrecords.pages(stream, record)
