# SPDX-License-Identifier: LGPL-2.1-or-later
"""Framing of the replication protocol: golden bytes, limits, and each kind of refusal."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from remus_colo.errors import FramingError, MessageError, PeerError
from remus_colo.relocation import bulk, clock, handshake, wire
from remus_colo.relocation.schema import SCHEMAS, MessageType
from remus_colo.relocation.wire import Decoder, Message, encode

# The least that each control message must carry.
EXAMPLES: dict[MessageType, dict[str, Any]] = {
    MessageType.HELLO: {"versions": [1], "host": "alpha", "channel": "control"},
    MessageType.REFUSE: {"reason": "no memory for the domain", "exit_status": 5},
    MessageType.CLOCK_PROBE: {"sent_ns": 1},
    MessageType.CLOCK_REPLY: {"sent_ns": 1, "received_ns": -5, "replied_ns": -4},
    MessageType.CREATE: {"name": "web", "mode": "transparent", "config": {}, "tunnel": {}},
    MessageType.CREATED: {"domid": 7, "ports": {"store": 1}, "addresses": {}},
    MessageType.PREPARE: {},
    MessageType.CHECKPOINT_BEGIN: {"pages": 484, "vifs": [{"devid": 0}]},
    MessageType.CHECKPOINT_END: {"digest": "crc32:00000000", "frames": 0, "bytes": 0, "pages": 0},
    MessageType.ACK: {},
    MessageType.RESUMED: {},
    MessageType.ABORT: {"reason": "the PVM is gone"},
    MessageType.HEARTBEAT: {"sequence": 1, "seen": 0, "sent_ns": 2, "state": "protected"},
    MessageType.TAKEOVER: {},
    MessageType.STOP: {"reason": "asked to stop"},
    MessageType.BYE: {},
}


def frame(
    payload: bytes = b"{}",
    *,
    magic: bytes = b"RCOL",
    version: int = 1,
    kind: int = MessageType.ACK,
    flags: int = 0,
    generation: int = 1,
    epoch: int = 1,
    length: int | None = None,
) -> bytes:
    """A frame put together by hand from the specification."""
    return (
        magic
        + bytes([version, kind])
        + flags.to_bytes(2, "big")
        + generation.to_bytes(4, "big")
        + epoch.to_bytes(8, "big")
        + (len(payload) if length is None else length).to_bytes(4, "big")
        + payload
    )


def test_golden_frame() -> None:
    message = Message(MessageType.ABORT, 0xA1B2C3D4, 0x0102030405060708, fields={"reason": "é"})
    expected = bytes.fromhex("52434f4c 01 10 0000 a1b2c3d4 0102030405060708 00000013")
    assert encode(message) == expected + b'{"reason":"\\u00e9"}'
    assert Decoder().feed(encode(message)) == [message]


def test_every_type_has_a_schema_and_a_number_of_its_own() -> None:
    assert set(SCHEMAS) == set(MessageType)
    assert {kind for kind in MessageType if not SCHEMAS[kind].bulk} == set(EXAMPLES)
    assert sorted(MessageType) == list(range(1, 22))


@pytest.mark.parametrize("kind", EXAMPLES)
def test_control_messages_survive(kind: MessageType) -> None:
    message = Message(kind, 3, 4, fields=EXAMPLES[kind])
    assert Decoder().feed(encode(message)) == [message]


@pytest.mark.parametrize("kind", EXAMPLES)
def test_unknown_fields_are_left_to_newer_releases(kind: MessageType) -> None:
    message = Message(kind, 3, 4, fields={**EXAMPLES[kind], "later": [1]})
    assert Decoder().feed(encode(message))[0].fields["later"] == [1]


@pytest.mark.parametrize(("kind", "name"), [(k, name) for k in EXAMPLES for name in SCHEMAS[k].fields])
def test_missing_and_wrong_fields_are_refused(kind: MessageType, name: str) -> None:
    fields = dict(EXAMPLES[kind])
    del fields[name]
    with pytest.raises(MessageError, match=f"{kind.name} lacks its field '{name}'"):
        Decoder().feed(frame(json.dumps(fields).encode(), kind=kind))
    wrong_values: list[Any] = [None, True, 1.5, [[]]]
    for wrong in wrong_values:
        with pytest.raises(MessageError, match=f"field '{name}' must be .*, got"):
            Decoder().feed(frame(json.dumps({**fields, name: wrong}).encode(), kind=kind))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (frame(magic=b"HTTP"), r"expected magic b'RCOL', got b'HTTP'"),
        (frame(version=2), "expected protocol version 1, got 2"),
        (frame(flags=0x8001), "expected 0x0000, got 0x8001"),
        (frame(kind=0), "unknown message type: expected 1 to 21, got 0"),
        (frame(kind=22), "unknown message type: expected 1 to 21, got 22"),
        (frame(length=64 * 1024 + 1), "ACK: expected a payload of at most 65536 bytes, got 65537"),
        (
            frame(kind=MessageType.PAGES, length=2**32 - 1),
            "PAGES: expected a payload of at most 8388608 bytes",
        ),
    ],
)
def test_bad_framing_says_expected_and_got(data: bytes, said: str) -> None:
    decoder = Decoder()
    with pytest.raises(FramingError, match=said):
        # the payload is not awaited: the header alone condemns the frame
        decoder.feed(data[: wire.HEADER_BYTES])
    with pytest.raises(FramingError, match=said):
        decoder.feed(b"")
    with pytest.raises(FramingError, match=said):
        decoder.end()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b"\xff{}",
        b'{"a":' + b"9" * 5000 + b"}",
        b"[" * 60000,
    ],
)
def test_bad_json_is_refused(payload: bytes) -> None:
    with pytest.raises(MessageError, match="ACK: expected a JSON object"):
        Decoder().feed(frame(payload))


def test_messages_before_a_fault_are_returned_first() -> None:
    good = Message(MessageType.ACK, 1, 1)
    decoder = Decoder()
    assert decoder.feed(encode(good) * 2 + frame(magic=b"oops")) == [good, good]
    with pytest.raises(FramingError):
        decoder.feed(encode(good))


def test_end_within_a_frame_is_a_fault() -> None:
    decoder = Decoder()
    decoder.feed(frame()[:-1])
    with pytest.raises(FramingError, match="ended within a frame, after 25"):
        decoder.end()
    whole = Decoder()
    whole.feed(frame())
    whole.end()


def test_stale_sessions_are_dropped_and_counted() -> None:
    decoder = Decoder()
    old, new = Message(MessageType.ACK, 1, 9), Message(MessageType.ACK, 2, 1)
    refusal = Message(MessageType.REFUSE, 0, 0, fields=EXAMPLES[MessageType.REFUSE])
    assert decoder.feed(encode(old)) == [old]
    decoder.sessions.expect(2)
    assert decoder.feed(encode(old) + encode(new) + encode(refusal) + encode(old)) == [new, refusal]
    assert decoder.sessions.stale == 2


def test_messages_are_validated_when_made() -> None:
    with pytest.raises(MessageError, match="PAGES is a bulk message and has no fields"):
        Message(MessageType.PAGES, fields={"a": 1})
    with pytest.raises(MessageError, match="ACK is a control message and has no data"):
        Message(MessageType.ACK, data=b"x")
    with pytest.raises(MessageError, match="ABORT lacks its field 'reason'"):
        Message(MessageType.ABORT)


def test_what_cannot_be_sent_is_refused() -> None:
    with pytest.raises(MessageError, match="at most 65536"):
        encode(Message(MessageType.ABORT, fields={"reason": "x" * 65536}))
    with pytest.raises(MessageError, match="no JSON object"):
        encode(Message(MessageType.ACK, fields={"a": {1, 2}}))
    with pytest.raises(MessageError, match="no JSON object"):
        encode(Message(MessageType.ACK, fields={"a": float("nan")}))
    for numbers in ((-1, 0), (2**32, 0), (0, -1), (0, 2**64)):
        with pytest.raises(MessageError, match="no unsigned"):
            wire.pack_header(MessageType.ACK, *numbers, 0)
    with pytest.raises(MessageError, match="at most"):
        wire.pack_header(MessageType.DIRTY, 0, 0, 8 * 1024 * 1024 + 1)


def test_versions() -> None:
    assert wire.common_version([3, 2, 1]) == 1
    with pytest.raises(PeerError, match=r"versions \[2, 3\]"):
        wire.common_version([3, 2])


# -- bulk payloads --------------------------------------------------------------------------------


def test_pages_layout() -> None:
    gfns = struct.pack("<2Q", 0x10, 0xFEFFC)
    pages = b"a" * 4096 + b"b" * 4096
    payload = b"".join(bulk.pages_buffers(gfns, pages))
    assert payload[:16].hex() == "0000000200000000" + "1000000000000000"
    parsed = bulk.parse_pages(payload)
    assert (parsed.count, bytes(parsed.gfns), bytes(parsed.pages)) == (2, gfns, pages)


def test_a_full_frame_of_pages_fits_its_limit() -> None:
    count = bulk.MAX_PAGES_PER_FRAME
    buffers = bulk.pages_buffers(bytes(8 * count), memoryview(bytearray(4096 * count)))
    wire.pack_header(MessageType.PAGES, 0, 0, sum(len(buffer) for buffer in buffers))
    with pytest.raises(MessageError, match="2045 pages in a frame, at most 2044"):
        bulk.pages_buffers(bytes(8 * (count + 1)), bytes(4096 * (count + 1)))


@pytest.mark.parametrize(("gfns", "pages"), [(8, 4095), (7, 4096), (16, 4096), (0, 1)])
def test_pages_that_do_not_fit_each_other(gfns: int, pages: int) -> None:
    with pytest.raises(MessageError, match="do not go with"):
        bulk.pages_buffers(bytes(gfns), bytes(pages))


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (b"", "expected at least 8 bytes, got 0"),
        (struct.pack(">II", 0, 1), "reserved bytes are set: expected 0, got 0x1"),
        (struct.pack(">II", 1, 0) + bytes(4103), "1 pages need 4112 bytes, got 4111"),
        (struct.pack(">II", 2**32 - 1, 0), "4294967295 pages need"),
    ],
)
def test_bad_pages(payload: bytes, said: str) -> None:
    with pytest.raises(MessageError, match=said):
        bulk.parse_pages(payload)


def test_state_layout() -> None:
    payload = b"".join(bulk.state_buffers("hvm-context", b"\x00\x01"))
    assert payload == b"\x0bhvm-context\x00\x01"
    name, data = bulk.parse_state(payload)
    assert (name, bytes(data)) == ("hvm-context", b"\x00\x01")


@pytest.mark.parametrize(
    "payload", [b"", b"\x00", b"\x05abc", b"\x01A", b"\xff" + b"a" * 255, b"\x02\xc3\xa9"]
)
def test_bad_states(payload: bytes) -> None:
    with pytest.raises(MessageError, match="STATE"):
        bulk.parse_state(payload)


@pytest.mark.parametrize("name", ["", "A", "é", "a" * 65, "a/b"])
def test_bad_state_names(name: str) -> None:
    with pytest.raises(MessageError, match="STATE"):
        bulk.state_buffers(name, b"")


def test_digest_does_not_depend_on_how_a_frame_is_gathered() -> None:
    split, whole = bulk.CheckpointDigest(), bulk.CheckpointDigest()
    split.update([b"ab", b"", b"c"], pages=1)
    whole.update([b"abc"], pages=1)
    assert (
        split.fields() == whole.fields() == {"digest": "crc32:352441c2", "frames": 1, "bytes": 3, "pages": 1}
    )
    whole.verify(split.fields())


@pytest.mark.parametrize(
    "frames", [[b"ab"], [b"ab", b"cd", b"cd"], [b"cd", b"ab"], [b"ab", b"ce"], [b"abcd"], []]
)
def test_digest_tells_lost_doubled_swapped_and_changed_frames(frames: list[bytes]) -> None:
    sent, got = bulk.CheckpointDigest(), bulk.CheckpointDigest()
    for one in (b"ab", b"cd"):
        sent.update([one])
    for one in frames:
        got.update([one])
    with pytest.raises(MessageError, match="arrived damaged: expected"):
        got.verify(sent.fields())


# -- opening lines --------------------------------------------------------------------------------


def test_opening_lines() -> None:
    assert handshake.request_line() == b"colo\n"
    assert handshake.parse_request(b"colo\n") == handshake.parse_request(b"(colo)\r\n") == "colo"
    assert handshake.ready_line() == b"ready colo\n"
    assert handshake.ready_line("receive") == b"(ready receive)\n"
    handshake.check_reply(handshake.ready_line())
    handshake.check_reply(b"(ready colo)\n")


@pytest.mark.parametrize(
    "line", [b"\n", b"GET / HTTP/1.1\n", b"colo now\n", b"\xff\n", b"Colo\n", b"a" * 600]
)
def test_bad_requests(line: bytes) -> None:
    with pytest.raises(FramingError):
        handshake.parse_request(line)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (handshake.error_line("unknown operation"), "unknown operation"),
        (
            b"(err (type xen.xend.XendError.XendError) (value 'Invalid operation: colo'))\n",
            "Invalid operation: colo",
        ),
        (b"error\n", "no reason given"),
    ],
)
def test_a_servers_refusal_is_told_in_its_words(line: bytes, reason: str) -> None:
    with pytest.raises(PeerError, match=f"relocation port: {reason}$"):
        handshake.check_reply(line)


@pytest.mark.parametrize("line", [b"ready receive\n", b"SSH-2.0-OpenSSH_9.2\n", b"\n", b"\xff\n", b"x" * 600])
def test_other_servers(line: bytes) -> None:
    with pytest.raises(FramingError):
        handshake.check_reply(line)


def test_an_error_line_is_one_short_line() -> None:
    line = handshake.error_line("first\nsecond " + "é" * 600)
    assert line.count(b"\n") == 1
    assert len(line) <= handshake.LINE_LIMIT_BYTES
    with pytest.raises(PeerError, match="first second"):
        handshake.check_reply(line)


# -- clock probes ---------------------------------------------------------------------------------


def test_clock_offset() -> None:
    # the backup is 1,000 ahead; 10 there, 30 back, 5 inside
    sample = clock.ClockSample(sent_ns=0, received_ns=1010, replied_ns=1015, returned_ns=45)
    assert (sample.round_trip_ns, sample.offset_ns, sample.error_ns) == (40, 990, 20)


def test_best_sample_has_the_shortest_round_trip() -> None:
    slow = clock.ClockSample(0, 50, 50, 100)
    fast = clock.ClockSample(0, -500, -500, 2)
    assert clock.best_sample([slow, fast]) is fast
    with pytest.raises(MessageError, match="no clock probe"):
        clock.best_sample([])


@pytest.mark.parametrize("stamps", [(0, 2, 1, 5), (0, 0, 10, 5)])
def test_impossible_stamps(stamps: tuple[int, int, int, int]) -> None:
    with pytest.raises(MessageError, match="run backwards"):
        clock.ClockSample(*stamps)
