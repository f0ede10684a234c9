# SPDX-License-Identifier: LGPL-2.1-or-later
"""Properties of the framing: the split never matters, and no input does more than raise its own errors."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from remus_colo.errors import ProtocolError
from remus_colo.relocation import bulk, handshake, wire
from remus_colo.relocation.clock import ClockSample
from remus_colo.relocation.schema import (
    CHANNEL,
    INTEGER,
    NATURAL,
    OBJECT,
    OBJECTS,
    SCHEMAS,
    TEXT,
    VERSIONS,
    MessageType,
)
from remus_colo.relocation.wire import Decoder, Message, encode

# quotes, escapes, controls, two to four bytes of UTF-8, and half a surrogate pair
texts = st.text(alphabet='a"\\\n\x00é€😀\ud800', max_size=6)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(texts, json_values, max_size=3)
FIELD_VALUES = {
    TEXT: texts,
    NATURAL: st.integers(0, 2**64),
    INTEGER: st.integers(),
    OBJECT: objects,
    OBJECTS: st.lists(objects, max_size=3),
    VERSIONS: st.lists(st.integers(0, 255), min_size=1),
    CHANNEL: st.sampled_from(["control", "data"]),
}


@st.composite
def messages(draw: st.DrawFn) -> Message:
    kind = draw(st.sampled_from(MessageType))
    generation, epoch = draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 2**64 - 1))
    if SCHEMAS[kind].bulk:
        return Message(kind, generation, epoch, data=draw(st.binary(max_size=200)))
    fields = draw(objects) | {name: draw(FIELD_VALUES[check]) for name, check in SCHEMAS[kind].fields.items()}
    return Message(kind, generation, epoch, fields=fields)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def outcome(parts: list[bytes]) -> tuple[list[Message], str | None]:
    """Messages until the fault, and the fault."""
    decoder, got = Decoder(), []
    try:
        for part in parts:
            got += decoder.feed(part)
        decoder.end()
    except ProtocolError as error:
        return got, f"{type(error).__name__}: {error}"
    return got, None


cuts_lists = st.lists(st.integers(0, 10**6), max_size=12)


@given(st.lists(messages(), max_size=6), cuts_lists)
def test_any_split_decodes_the_same(sent: list[Message], cuts: list[int]) -> None:
    stream = b"".join(map(encode, sent))
    assert outcome(pieces(stream, cuts)) == (sent, None)


@given(messages())
def test_byte_by_byte(message: Message) -> None:
    stream = encode(message)
    assert outcome([stream[i : i + 1] for i in range(len(stream))]) == ([message], None)


@given(st.lists(messages(), max_size=4), st.integers(0, 10**6), st.integers(1, 255), cuts_lists)
def test_a_changed_byte_does_the_same_for_any_split(
    sent: list[Message], where: int, change: int, cuts: list[int]
) -> None:
    stream = bytearray(b"".join(map(encode, sent)) or b"x")
    stream[where % len(stream)] ^= change
    assert outcome(pieces(bytes(stream), cuts)) == outcome([bytes(stream)])


@given(st.binary(max_size=300), cuts_lists)
def test_noise_is_refused_or_awaited_never_believed(noise: bytes, cuts: list[int]) -> None:
    got, fault = outcome(pieces(b"\x00" + noise, cuts))
    assert got == []
    assert fault is not None


@given(st.sampled_from([kind for kind in MessageType if not SCHEMAS[kind].bulk]), st.binary(max_size=80))
def test_any_payload_is_a_message_or_a_fault(kind: MessageType, payload: bytes) -> None:
    outcome([wire.pack_header(kind, 0, 0, len(payload)) + payload])


@given(st.lists(st.tuples(messages(), st.booleans()), max_size=6))
def test_every_message_passes_or_is_counted(drawn: list[tuple[Message, bool]]) -> None:
    decoder = Decoder()
    decoder.sessions.expect(7)
    sent = [
        Message(message.type, 7 if ours else 8, message.epoch, message.fields, message.data)
        for message, ours in drawn
    ]
    got = decoder.feed(b"".join(map(encode, sent)))
    assert got == [
        message for message in sent if message.generation == 7 or message.type is MessageType.REFUSE
    ]
    assert decoder.sessions.stale == len(sent) - len(got)


@given(st.integers(0, 3), st.data())
def test_pages_survive(count: int, data: st.DataObject) -> None:
    gfns = data.draw(st.binary(min_size=8 * count, max_size=8 * count))
    pages = bytes([data.draw(st.integers(0, 255))]) * (4096 * count)
    parsed = bulk.parse_pages(b"".join(bulk.pages_buffers(gfns, pages)))
    assert (parsed.count, parsed.gfns.tobytes(), parsed.pages.tobytes()) == (count, gfns, pages)


@given(st.binary(max_size=100))
def test_any_bulk_payload_is_parsed_or_refused(payload: bytes) -> None:
    for parse in (bulk.parse_pages, bulk.parse_state, handshake.parse_request, handshake.check_reply):
        try:
            parse(payload)
        except ProtocolError:
            pass
        except Exception as error:
            assert type(error).__name__ == "PeerError"


@given(st.integers(-(10**15), 10**15), st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9))
def test_the_clock_error_is_bounded(offset: int, there: int, inside: int, back: int) -> None:
    received = there + offset
    sample = ClockSample(0, received, received + inside, there + inside + back)
    assert abs(sample.offset_ns - offset) <= sample.error_ns
