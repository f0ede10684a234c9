# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compression of Remus's checkpoints gives back what it was given, in C as in Python, and refuses what is damaged."""

from __future__ import annotations

import itertools
import struct
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remus_colo.adapters import zeros
from remus_colo.checkpoint import fullcopy
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
    body = (
        libxc.PAGE_DATA_PREFIX.pack(len(entries), 0)
        + struct.pack(f"<{len(entries)}Q", *entries)
        + b"".join(contents)
    )
    return record(libxc.PAGE_DATA, body) + record(3, extra) + record(libxc.CHECKPOINT, b"")


def record(kind: int, body: bytes) -> bytes:
    return libxc.RECORD.pack(kind, len(body)) + body + bytes(-len(body) % libxc.ALIGNMENT)


@given(
    st.lists(st.tuples(PAGES, st.binary(max_size=30)), max_size=5), st.integers(1, 4), st.integers(1, 5000)
)
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


@given(
    st.lists(st.tuples(st.binary(min_size=16, max_size=16), st.integers(0, 2), st.booleans()), max_size=6),
    st.binary(min_size=48, max_size=48),
)
def test_delta_and_back(pages: list[tuple[bytes, int, bool]], before: bytes) -> None:
    size = 16
    plain = b"".join(b"between!" + content for content, _, _ in pages)
    offsets = array("Q", range(8, len(plain), size + 8))
    slots = array("I", [slot | zeros.SLOT_FRESH * fresh for _, slot, fresh in pages])
    stream, here, there = bytearray(plain), bytearray(before), bytearray(before)
    zeros.delta_out(stream, offsets, here, slots, size)
    known = [before[at : at + size] for at in range(0, len(before), size)]
    for offset, (content, slot, fresh) in zip(offsets, pages, strict=True):
        was = bytes(size) if fresh else known[slot]
        assert stream[offset : offset + size] == bytes(a ^ b for a, b in zip(content, was, strict=True))
        known[slot] = content
    assert here == b"".join(known)
    zeros.delta_in(stream, offsets, there, slots, size)
    assert stream == plain and there == here


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


def image(contents: list[int], types: list[int], state: bytes) -> bytes:
    """A whole copy of a guest with a page of each content, in records of two pages."""
    stream = [bytes(fullcopy.HEADERS_BYTES), record(0x10, b"static")]
    pages = list(enumerate(zip(contents, types, strict=True)))
    for start in range(0, len(pages), 2):
        some = pages[start : start + 2]
        entries = b"".join((pfn | kind << libxc.TYPE_SHIFT).to_bytes(8, "little") for pfn, (_, kind) in some)
        bodies = b"".join(bytes([content]) * libxc.PAGE_SIZE for _, (content, kind) in some if kind != 0xF)
        stream.append(record(libxc.PAGE_DATA, libxc.PAGE_DATA_PREFIX.pack(len(some), 0) + entries + bodies))
    return b"".join([*stream, record(4, state), record(libxc.END, b"")])


def replay(streams: list[bytes]) -> tuple[dict[int, tuple[int, bytes]], list[bytes]]:
    """What a receiver has at the end: page by number, and the state records of the last checkpoint."""
    pages: dict[int, tuple[int, bytes]] = {}
    state: list[bytes] = []
    for number, stream in enumerate(streams):
        body = stream[fullcopy.HEADERS_BYTES :] if number == 0 else stream
        state = []
        for entry in libxc.records(body):
            if entry.kind == libxc.PAGE_DATA:
                for which, offset in libxc.all_pages(body, entry):
                    content = b"" if offset is None else body[offset : offset + libxc.PAGE_SIZE]
                    pages[which & libxc.PFN_MASK] = which >> libxc.TYPE_SHIFT, content
            elif entry.kind == 4:
                state.append(body[entry.offset : entry.offset + entry.length])
        assert body.endswith(fullcopy.CHECKPOINT_RECORD)
    return pages, state


GUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 3), min_size=7, max_size=7),
        st.lists(st.sampled_from([0, 1, 0xF]), min_size=7, max_size=7),
    ),
    min_size=1,
    max_size=4,
)


@given(GUESTS)
def test_differences_of_whole_copies_make_the_last_copy(guests: list[tuple[list[int], list[int]]]) -> None:
    images = [image(contents, types, bytes([number])) for number, (contents, types) in enumerate(guests)]
    streams = [b"".join(fullcopy.whole(memoryview(images[0])))]
    for before, now in itertools.pairwise(images):
        streams.append(b"".join(fullcopy.difference(memoryview(now), memoryview(before))))
    pages, state = replay(streams)
    contents, types = guests[-1]
    assert state == [bytes([len(guests) - 1])]
    for pfn, (content, kind) in enumerate(zip(contents, types, strict=True)):
        assert pages[pfn] == (kind, b"" if kind == 0xF else bytes([content]) * libxc.PAGE_SIZE)
