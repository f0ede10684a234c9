# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compression of Remus's checkpoints: each page against what was last sent of it, then runs of zeros.

Both ends keep the pages that were sent last, in caches that see the same pages in the same order and so hold the same.
A page that is in the cache travels as the exclusive or of both, which is zero wherever it has not changed.
The stream keeps its length and layout by that, so that its receiver finds the pages by parsing what it got.  Nothing
more is done: a general compressor takes longer for what is left than a gigabit link takes to send it, while output
waits for both.
"""

from __future__ import annotations

import mmap
from array import array
from collections import OrderedDict
from collections.abc import Iterable

from remus_colo.adapters import zeros
from remus_colo.checkpoint import libxcrecords
from remus_colo.checkpoint.libxcrecords import PAGE_SIZE
from remus_colo.errors import FramingError

CACHE_PAGES = 16384  # 64 MiB on each host, as much as most guests write between some checkpoints
WORD = 8


class PageCache:
    """The last content of the pages that were sent most recently; of a page that is not there, zeros."""

    def __init__(self, limit_pages: int = CACHE_PAGES) -> None:
        self._limit_pages = limit_pages
        self._slots: OrderedDict[int, int] = OrderedDict()  # by page number, the one used last at the end
        # Memory that nobody has written to takes none.
        self.store = mmap.mmap(-1, limit_pages * PAGE_SIZE)

    def __len__(self) -> int:
        return len(self._slots)

    def slot(self, pfn: int) -> int:
        """Where in ``store`` the page's content is kept, to be read and replaced by the caller; for ``zeros``."""
        slot = self._slots.get(pfn)
        if slot is not None:
            self._slots.move_to_end(pfn)
            return slot
        if len(self._slots) < self._limit_pages:
            slot = len(self._slots)
        else:
            _, slot = self._slots.popitem(last=False)
        self._slots[pfn] = slot
        return slot | zeros.SLOT_FRESH


class DeltaEncoder:
    """The sender's end of one session: checkpoints must be decoded in the order in which they were encoded."""

    def __init__(self, limit_pages: int = CACHE_PAGES) -> None:
        self._cache = PageCache(limit_pages)

    def encode(self, stream: memoryview) -> bytes | memoryview:
        """:param stream: one checkpoint, whole records of libxenguest's."""
        changed = bytearray(stream)
        offsets, slots = _places(changed, self._cache)
        zeros.delta_out(changed, offsets, self._cache.store, slots, PAGE_SIZE)
        return zeros.pack(changed)


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
        stream = zeros.unpack(b"".join(pieces), length)
        offsets, slots = _places(stream, self._cache)
        zeros.delta_in(stream, offsets, self._cache.store, slots, PAGE_SIZE)
        return stream


def _places(stream: bytearray, cache: PageCache) -> tuple[array[int], array[int]]:
    """Where in the stream its pages lie, and where in the cache: only these change, records' headers never do."""
    offsets, slots = array("Q"), array("I")
    for record in libxcrecords.records(stream):
        if record.kind == libxcrecords.PAGE_DATA:
            for page in libxcrecords.pages(stream, record):
                offsets.append(page.offset)
                slots.append(cache.slot(page.pfn))
    return offsets, slots
