# SPDX-License-Identifier: LGPL-2.1-or-later
"""Work on bitmaps of gfns and on copied pages, in C; no domain is touched.

Gfns are u64 each, in host order; bit ``n % 8`` of byte ``n // 8`` of a bitmap is gfn ``n``.
"""

from __future__ import annotations

import mmap

from remus_colo.adapters.native import compiled_for_xen


def bitmap_or(into: bytearray, other: bytes | bytearray) -> int:
    """OR ``other`` into ``into`` (same length). Returns how many bits that added."""
    if len(into) != len(other):
        raise ValueError(f"bitmaps of {len(into)} and {len(other)} bytes")
    lib, ffi = compiled_for_xen()
    return int(
        lib.rc_bitmap_or(ffi.from_buffer("uint8_t[]", into), ffi.from_buffer("uint8_t[]", other), len(into))
    )


def bitmap_count(bitmap: bytes | bytearray) -> int:
    lib, ffi = compiled_for_xen()
    return int(lib.rc_bitmap_count(ffi.from_buffer("uint8_t[]", bitmap), len(bitmap)))


def hash_pages(
    gfns: bytearray, pages: bytearray | memoryview | mmap.mmap, count: int, hashes: bytearray
) -> None:
    """Put the hashes of ``count`` copied pages at their gfns in ``hashes``, as ``xenctrl.Guest.hashes`` made it."""
    lib, ffi = compiled_for_xen()
    if count and max(memoryview(gfns).cast("Q")[:count]) * 8 >= len(hashes):
        raise ValueError("a gfn is beyond the hashes")
    lib.rc_hash_pages(
        ffi.cast("uint64_t *", ffi.from_buffer(gfns)),
        ffi.cast("uint8_t *", ffi.from_buffer(pages)),
        count,
        ffi.cast("uint64_t *", ffi.from_buffer(hashes)),
    )


def squeeze_zero_pages(
    gfns: bytearray, pages: bytearray | memoryview | mmap.mmap, count: int
) -> tuple[int, bytes]:
    """Close the gaps that all-zero pages leave. Returns (pages kept, gfns of the zero pages as u64s)."""
    lib, ffi = compiled_for_xen()
    zeros = bytearray(count * 8)
    kept = int(
        lib.rc_squeeze_zero_pages(
            ffi.cast("uint64_t *", ffi.from_buffer(gfns)),
            ffi.cast("uint8_t *", ffi.from_buffer(pages)),
            count,
            ffi.cast("uint64_t *", ffi.from_buffer(zeros)),
        )
    )
    return kept, bytes(zeros[: (count - kept) * 8])
