# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compression of Remus's checkpoints gives back what it was given, in C as in Python, and refuses what is damaged."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remus_colo.adapters import zeros
from remus_colo.checkpoint import libxcrecords as libxc
from remus_colo.checkpoint.delta import DeltaDecoder, DeltaEncoder
from remus_colo.errors import FramingError

WORDS = st.lists(st.sampled_from([bytes(8), b"\0" * 7 + b"\1", b"\xff" * 8]), max_size=60).map(b"".join)
PFNS = st.integers(0, 5)
PAGES = st.lists(st.tuples(PFNS, st.binary(max_size=20), st.integers(0, 4000)), max_size=6)


def checkpoint(pages: list[tuple[int, bytes, int]], extra: bytes) -> bytes:
    """A stream: a record of pages, some of them without content, and another record."""
    entries, contents = [], []
    for pfn, data, offset in pages:
        if pfn == 5:
            entries.append(pfn | 0xF << libxc.TYPE_SHIFT)
            continue
        entries.append(pfn)
        contents.append((bytes(offset) + data + bytes(libxc.PAGE_SIZE))[: libxc.PAGE_SIZE])
    body = libxc.PAGE_DATA_PREFIX.pack(len(entries), 0) + struct.pack(f"<{len(entries)}Q", *entries) + b"".join(contents)
    return record(libxc.PAGE_DATA, body) + record(3, extra) + record(libxc.CHECKPOINT, b"")


def record(kind: int, body: bytes) -> bytes:
    return libxc.RECORD.pack(kind, len(body)) + body + bytes(-len(body) % libxc.ALIGNMENT)


@given(st.lists(st.tuples(PAGES, st.binary(max_size=30)), max_size=5), st.integers(1, 4), st.integers(1, 5000))
def test_a_series_of_checkpoints_comes_back(
    series: list[tuple[list[tuple[int, bytes, int]], bytes]], limit_pages: int, piece: int
) -> None:
    encoder, decoder = DeltaEncoder(limit_pages), DeltaDecoder(limit_pages)
    for pages, extra in series:
        stream = checkpoint(pages, extra)
        packed = encoder.encode(memoryview(stream))
        pieces = [packed[at : at + piece] for at in range(0, len(packed), piece)]
        assert decoder.decode(pieces, len(stream)) == stream


@given(WORDS)
def test_both_implementations_agree(data: bytes) -> None:
    packed = zeros.pack_reference(data)
    assert bytes(zeros.pack(bytearray(data))) == packed
    assert zeros.unpack(packed, len(data)) == zeros.unpack_reference(packed, len(data)) == data


@given(st.binary(max_size=64), st.integers(0, 20).map(lambda words: words * 8))
def test_both_refuse_the_same(packed: bytes, size: int) -> None:
    def outcome(unpack: object) -> object:
        try:
            return unpack(packed, size)  # type: ignore[operator]
        except FramingError:
            return None

    assert outcome(zeros.unpack) == outcome(zeros.unpack_reference)


@given(st.binary(min_size=8, max_size=8 * 512), st.binary(min_size=8, max_size=8 * 512))
def test_delta_and_back(one: bytes, other: bytes) -> None:
    size = min(len(one), len(other)) // 8 * 8
    now, before = one[:size], other[:size]
    page, stored = bytearray(now), bytearray(before)
    zeros.delta_out(memoryview(page), memoryview(stored))
    assert stored == now
    assert page == bytes(a ^ b for a, b in zip(now, before, strict=True))
    far = bytearray(before)
    zeros.delta_in(memoryview(page), memoryview(far))
    assert page == far == now


@given(PAGES, st.integers(0, 10_000))
def test_what_is_cut_off_is_refused(pages: list[tuple[int, bytes, int]], at: int) -> None:
    stream = checkpoint(pages, b"x")
    packed = DeltaEncoder().encode(memoryview(stream))
    with pytest.raises(FramingError):
        DeltaDecoder().decode([packed[: at % len(packed)]], len(stream))
    with pytest.raises(FramingError):
        DeltaDecoder().decode([packed], len(stream) + 8)
    with pytest.raises(FramingError):
        DeltaDecoder().decode([packed], len(stream) - 8)


@given(st.binary(max_size=200))
def test_records_never_run_past_their_stream(stream: bytes) -> None:
    try:
        for entry in libxc.records(stream):
            assert entry.offset + entry.length <= len(stream)
            if entry.kind == libxc.PAGE_DATA:
                for page in libxc.pages(stream, entry):
                    assert page.offset + libxc.PAGE_SIZE <= entry.offset + entry.length
    except FramingError:
        pass
