# SPDX-License-Identifier: LGPL-2.1-or-later
"""Work on the bytes of checkpoints: the compiled module's, or the same in Python where there is none.

The latter says what the former must do, and is held against it by tests.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from typing import Any

from remus_colo.adapters.native import compiled
from remus_colo.errors import FramingError, HostError

WORD = 8
GAP_WORDS = 2
SLOT_FRESH = 0x80000000  # RC_SLOT_FRESH
_HEADER = struct.Struct("<II")


def _native() -> tuple[Any, Any] | None:
    try:
        return compiled()
    except HostError:
        return None


NATIVE = _native()


def delta_out(
    stream: bytearray, offsets: array[int], store: mmap.mmap | bytearray, slots: array[int], page_size: int
) -> None:
    """For each page of ``stream`` in turn: its slot gets what it has, the page the exclusive or of both.

    :param offsets: where the pages lie, ``array("Q")``.
    :param store: the slots, each of ``page_size`` bytes, a multiple of 8.
    :param slots: which one each page has, ``array("I")``; with :data:`SLOT_FRESH` one that is to count as zeros.
    """
    _delta(True, stream, offsets, store, slots, page_size)


def delta_in(
    stream: bytearray, offsets: array[int], store: mmap.mmap | bytearray, slots: array[int], page_size: int
) -> None:
    """The way back: both get what the page had before :func:`delta_out`."""
    _delta(False, stream, offsets, store, slots, page_size)


def _delta(
    out: bool,
    stream: bytearray,
    offsets: array[int],
    store: mmap.mmap | bytearray,
    slots: array[int],
    page_size: int,
) -> None:
    if NATIVE is None:
        for offset, slot in zip(offsets, slots, strict=True):
            start = (slot & ~SLOT_FRESH) * page_size
            given = bytes(stream[offset : offset + page_size])
            before = bytes(page_size if slot & SLOT_FRESH else store[start : start + page_size])
            made = _xor(given, before)
            stream[offset : offset + page_size] = made
            store[start : start + page_size] = given if out else made
        return
    lib, ffi = NATIVE
    call = lib.rc_delta_out if out else lib.rc_delta_in
    call(
        ffi.from_buffer("uint8_t[]", stream),
        ffi.from_buffer("uint64_t[]", offsets),
        ffi.from_buffer("uint8_t[]", store),
        ffi.from_buffer("uint32_t[]", slots),
        len(offsets),
        page_size,
    )


def _xor(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(len(one), "little")


def pack(data: bytearray) -> bytes | memoryview:
    """Runs of zero words become their number. ``data`` has a multiple of 8 bytes."""
    if NATIVE is None:
        return pack_reference(data)
    lib, ffi = NATIVE
    # Each run has at least two words, but the first and the last, and takes no more than one word besides.
    out = bytearray(len(data) + len(data) // GAP_WORDS + 4 * _HEADER.size)
    size = lib.rc_zeros_pack(
        ffi.from_buffer("uint8_t[]", data), len(data), ffi.from_buffer("uint8_t[]", out), len(out)
    )
    if size < 0:
        raise MemoryError("a packed checkpoint was longer than it can be")
    return memoryview(out)[:size]


def pack_reference(data: bytes | bytearray) -> bytes:
    words = [data[at : at + WORD] for at in range(0, len(data), WORD)]
    empty = bytes(WORD)
    out: list[bytes | bytearray] = []
    at = 0
    while at < len(words):
        first = at
        while first < len(words) and words[first] == empty:
            first += 1
        end = first
        while end < len(words):
            gap = 0
            while gap < GAP_WORDS and end + gap < len(words) and words[end + gap] == empty:
                gap += 1
            if gap == GAP_WORDS or (gap and end + gap == len(words)):
                break
            end += gap or 1
        out.append(_HEADER.pack(first - at, end - first))
        out += words[first:end]
        at = end
    return b"".join(out)


def unpack(packed: bytes | memoryview, size: int) -> bytearray:
    """What :func:`pack` was given.

    :param size: its length in bytes.
    :raise FramingError: ``packed`` is not what makes it.
    """
    if NATIVE is None:
        return unpack_reference(packed, size)
    lib, ffi = NATIVE
    out = bytearray(size)
    if lib.rc_zeros_unpack(
        ffi.from_buffer("uint8_t[]", packed), len(packed), ffi.from_buffer("uint8_t[]", out), size
    ):
        raise FramingError(f"{len(packed)} packed bytes do not make {size}")
    return out


def unpack_reference(packed: bytes | memoryview, size: int) -> bytearray:
    out, at = bytearray(), 0
    while at < len(packed):
        if len(packed) - at < _HEADER.size:
            raise FramingError("a packed checkpoint is cut off")
        zeros, literal = _HEADER.unpack_from(packed, at)
        at += _HEADER.size
        end = at + literal * WORD
        if not zeros + literal or len(out) + (zeros + literal) * WORD > size or end > len(packed):
            raise FramingError(f"{len(packed)} packed bytes do not make {size}")
        out += bytes(zeros * WORD) + packed[at:end]
        at = end
    if len(out) != size:
        raise FramingError(f"{len(packed)} packed bytes make {len(out)}, not {size}")
    return out


def differing(one: memoryview, other: memoryview, page_size: int) -> list[int]:
    """The indices of the pages that are not the same in both; two runs of pages of one length."""
    count = len(one) // page_size
    if NATIVE is None:
        starts = range(0, count * page_size, page_size)
        return [at // page_size for at in starts if one[at : at + page_size] != other[at : at + page_size]]
    lib, ffi = NATIVE
    differ = bytearray(count)
    if not lib.rc_pages_differ(
        ffi.from_buffer("uint8_t[]", one),
        ffi.from_buffer("uint8_t[]", other),
        count,
        page_size,
        ffi.from_buffer("uint8_t[]", differ),
    ):
        return []
    return [index for index, differs in enumerate(differ) if differs]
