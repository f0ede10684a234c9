# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checkpoints of a guest of which Xen does not tell what it has written: all of its memory each time.

That is so for PV guests on a Xen without shadow page tables, as Debian 13's is: it has no dirty log for them,
and no live migration either.  The guest is copied whole while it is suspended, by libxenguest's ordinary
save, and compared with the copy before when it runs again.  What differs goes into a stream as libxenguest's
checkpointed save would have written it.  The guest stands still for as long as all its memory takes to copy.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

from remus_colo.adapters import memory, savestream, zeros
from remus_colo.adapters.savestream import SaveHooks
from remus_colo.adapters.xenctrl import Guest
from remus_colo.checkpoint import libxcrecords as libxc
from remus_colo.checkpoint.libxcrecords import HEADERS_BYTES, PAGE_SIZE, Record
from remus_colo.errors import FramingError, HostError

# Of an image: with each page a number, and for each batch of them a header; besides, the guest's state and its table of
# frames.
PAGE_ENTRY_BYTES = 8
STATE_BYTES = 4 << 20
CHECKPOINT_RECORD = libxc.RECORD.pack(libxc.CHECKPOINT, 0)


def save_checkpoints(domid: int, fd: int, hooks: SaveHooks) -> None:
    """As :func:`remus_colo.adapters.savestream.save_checkpoints`, without a dirty log.

    :raise XenError: libxenguest failed.
    :raise HostError: this host has no memory for two copies of the guest.
    """
    with Guest(domid, writable=False) as guest:
        size = guest.info().tot_pages * (PAGE_SIZE + PAGE_ENTRY_BYTES) + STATE_BYTES
    refuse_without_memory(2 * size)
    images = [Image(), Image()]
    try:
        for image in images:
            # While the guest runs: to find memory page by page takes longer than to copy it.
            image.reserve(size)
        number = 0
        while True:
            now, before = images[number % 2], images[(number + 1) % 2]
            hooks.suspend()
            now.take(domid)
            hooks.resume()
            pieces = whole(now.view()) if number == 0 else difference(now.view(), before.view())
            for piece in pieces:
                _write(fd, piece)
            number += 1
            if not hooks.checkpoint():
                return
    finally:
        for image in images:
            image.close()


def refuse_without_memory(size: int) -> None:
    """:raise HostError: dom0 has not so many bytes, and to take them would have the kernel kill something."""
    available = memory.available_bytes()
    if size > available:
        raise HostError(
            f"Xen does not tell what this guest writes, so two copies of it are kept here, which takes {size >> 20} MiB of dom0's "
            f"memory, and {available >> 20} MiB are left: give dom0 more (xl mem-set 0)"
        )


class Image:
    """One copy of the guest, in memory."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("remus-copy", os.MFD_CLOEXEC)
        self._length = 0
        self._map: mmap.mmap | None = None

    def reserve(self, size: int) -> None:
        """Have room for so many bytes."""
        os.posix_fallocate(self._fd, 0, size)
        self._map = mmap.mmap(self._fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)

    def take(self, domid: int) -> None:
        """Copy the guest, which is suspended."""
        os.lseek(self._fd, 0, os.SEEK_SET)
        savestream.save_once(domid, self._fd, lambda: None, live=False)
        self._length = os.lseek(self._fd, 0, os.SEEK_CUR)

    def view(self) -> memoryview:
        """The copy, until the next."""
        if self._map is None or len(self._map) < self._length:
            self._map = mmap.mmap(self._fd, self._length, prot=mmap.PROT_READ)
        return memoryview(self._map)[: self._length]

    def close(self) -> None:
        os.close(self._fd)


def _write(fd: int, piece: bytes | memoryview) -> None:
    view = memoryview(piece)
    while view:
        view = view[os.write(fd, view) :]


def whole(image: memoryview) -> Iterator[bytes | memoryview]:
    """The first checkpoint: all of it, up to its END."""
    last = None
    for record in libxc.records(image[HEADERS_BYTES:]):
        last = record
    if last is None or last.kind != libxc.END:
        raise FramingError("a copy of the guest has no end")
    yield image[: HEADERS_BYTES + last.offset - libxc.RECORD.size]
    yield CHECKPOINT_RECORD


def difference(now: memoryview, before: memoryview) -> Iterator[bytes | memoryview]:
    """A later checkpoint: the pages that differ, and the state that comes after pages."""
    now, before = now[HEADERS_BYTES:], before[HEADERS_BYTES:]
    old_pages = [record for record in libxc.records(before) if record.kind == libxc.PAGE_DATA]
    changed: list[tuple[int, memoryview | None]] = []
    state: list[memoryview] = []
    seen = 0
    for record in libxc.records(now):
        if record.kind == libxc.PAGE_DATA:
            old = old_pages[seen] if seen < len(old_pages) else None
            seen += 1
            changed += _changed(now, record, before, old)
        elif seen and record.kind != libxc.END:
            state.append(now[record.offset - libxc.RECORD.size : record.end])
    yield from libxc.page_data(changed)
    yield from state
    yield CHECKPOINT_RECORD


def _changed(
    now: memoryview, record: Record, before: memoryview, old: Record | None
) -> list[tuple[int, memoryview | None]]:
    """The pages of a record that are not as they were, or are of another type: entry and content."""
    entries = libxc.entries(now, record)
    if old is None or libxc.entries(before, old) != entries:
        # Other pages than before, or of other types: a rare case, and taking them all does no harm.
        return [(entry, _content(now, offset)) for entry, offset in libxc.all_pages(now, record)]
    new_block, old_block = libxc.contents(now, record), libxc.contents(before, old)
    differing = zeros.differing(new_block, old_block, PAGE_SIZE)
    if not differing:
        return []
    pages = list(libxc.pages(now, record))
    return [(pages[index].entry, _content(now, pages[index].offset)) for index in differing]


def _content(stream: memoryview, offset: int | None) -> memoryview | None:
    return None if offset is None else stream[offset : offset + PAGE_SIZE]
