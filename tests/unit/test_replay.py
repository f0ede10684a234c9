# SPDX-License-Identifier: LGPL-2.1-or-later
"""The replay command, as a user runs it, over captures written here."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from remus_colo.errors import ConfigError
from remus_colo.proxy.pcap import Capture

FIN, SYN, RST, ACK = 1, 2, 4, 16
ETHERNET = bytes(6) + b"\x02" * 6


def ipv4(protocol: int, body: bytes, fragment: int = 0, ident: int = 0) -> bytes:
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), ident, fragment, 64, protocol, 0)
    return ETHERNET + b"\x08\0" + head + b"\x0a\0\0\1\x0a\0\0\2" + body


def tcp(seq: int, ack: int, flags: int = ACK, data: bytes = b"", port: int = 4000) -> bytes:
    return ipv4(6, struct.pack(">HHIIBBHHH", 80, port, seq % 2**32, ack, 0x50, flags, 1000, 0, 0) + data)


def udp(payload: bytes, port: int = 53) -> bytes:
    return ipv4(17, struct.pack(">HHHH", 5353, port, 8 + len(payload), 0) + payload)


ARP = ETHERNET + b"\x08\x06" + bytes(28)


def pcap(
    path: Path,
    packets: list[tuple[float, bytes]],
    *,
    order: str = "<",
    nano: bool = False,
    snaplen: int = 0xFFFF,
    linktype: int = 1,
    base_s: int = 1_700_000_000,
) -> Path:
    """Times in ms."""
    out = struct.pack(order + "IHHiIII", 0xA1B23C4D if nano else 0xA1B2C3D4, 2, 4, 0, 0, snaplen, linktype)
    for time_ms, frame in packets:
        time_ns = round(time_ms * 1e6)
        fraction = time_ns % 10**9 if nano else time_ns % 10**9 // 1000
        part = frame[:snaplen]
        out += struct.pack(order + "IIII", base_s + time_ns // 10**9, fraction, len(part), len(frame)) + part
    path.write_bytes(out)
    return path


def run(
    tmp_path: Path,
    ours: list[tuple[float, bytes]],
    theirs: list[tuple[float, bytes]],
    *options: str,
    **file: Any,
) -> dict[str, Any]:
    one, other = pcap(tmp_path / "p.pcap", ours, **file), pcap(tmp_path / "s.pcap", theirs)
    done = command(one, other, *options)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [packet["index"] for packet in result["packets"]] == list(range(len(ours)))
    return result


def command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "remus_colo.proxy.replay", *map(str, arguments)], capture_output=True,
                          text=True, timeout=120, cwd=Path(__file__).parents[2])  # fmt: skip


def fates(result: dict[str, Any]) -> list[tuple[str, float]]:
    return [(packet["fate"], packet["at_ms"]) for packet in result["packets"]]


def test_equal_streams_leave_without_a_checkpoint(tmp_path: Path) -> None:
    ours = [(0, tcp(99, 50, SYN | ACK)), (10, tcp(100, 50, ACK, b"abcdef")), (20, ARP)]
    theirs = [
        (1, tcp(5000, 50, SYN | ACK)),
        (12.5, tcp(100, 50, ACK, b"abc")),
        (13, tcp(103, 50, ACK, b"def")),
    ]
    result = run(tmp_path, ours, theirs)
    assert fates(result) == [("released", 1.0), ("released", 13.0), ("released", 20.0)]
    assert result["checkpoints"] == [] and result["counters"]["released_equal"] == 2
    assert result["packets"][2]["why"] == "not compared: ARP"


def test_the_svm_may_be_captured_before_the_rewriter(tmp_path: Path) -> None:
    isn = 2**32 - 3  # both numbers wrap on the way
    ours = [(0, tcp(99, 50, SYN | ACK)), (10, tcp(100, 50, ACK, b"abcdef")), (20, tcp(106, 50, FIN | ACK))]
    theirs = [(1, tcp(isn, 50, SYN | ACK)), (2, tcp(isn + 1, 50, ACK, b"abc")), (13, tcp(isn + 4, 50, ACK, b"def")),
              (21, tcp(isn + 7, 50, FIN | ACK))]  # fmt: skip
    assert fates(run(tmp_path, ours, theirs)) == [("released", 1.0), ("released", 13.0), ("released", 21.0)]
    early = [(time_ms - 15, frame) for time_ms, frame in ours]  # both begin together in the result
    late = [(time_ms + 15, frame) for time_ms, frame in ours]
    assert run(tmp_path, early, theirs)["checkpoints"] == []
    assert run(tmp_path, late, theirs)["checkpoints"] == []


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("isn", "secondary_isn"), [(1000, 3000), (3000, 1000), (0, 1), (1, 0), (2**32 - 50, 77)]
)
def test_numbers_close_to_each_other_and_segments_out_of_order(
    tmp_path: Path, before: bool, isn: int, secondary_isn: int
) -> None:
    content = bytes(range(256)) * 30
    base = secondary_isn if before else isn

    def segments(start: int, size: int) -> list[bytes]:
        return [tcp(start + 1 + at, 60, ACK, content[at : at + size]) for at in range(0, len(content), size)]

    ours = [(0, tcp(isn, 50, SYN | ACK)), *((1 + at, part) for at, part in enumerate(segments(isn, 700)))]
    theirs = [
        (0, tcp(secondary_isn, 50, SYN | ACK)),
        *((1.5 + at, part) for at, part in enumerate(segments(base, 1460)[::-1])),
    ]
    result = run(tmp_path, ours, theirs)
    assert result["checkpoints"] == [] and {packet["fate"] for packet in result["packets"]} == {"released"}


CONTENT = b"0123456789"


@pytest.mark.parametrize(
    "theirs",
    [
        [(8800, SYN | ACK, b""), (101, ACK, CONTENT)],
        [(100, SYN | ACK, b""), (101, ACK, CONTENT)],
        [(8800, SYN | ACK, b""), (100, SYN | ACK, b""), (101, ACK, CONTENT)],
    ],
    ids=["own", "mapped", "own, then mapped"],
)
def test_behind_the_rewriter_a_late_syn_has_the_pvms_number(
    tmp_path: Path, theirs: list[tuple[int, int, bytes]]
) -> None:
    ours = [(100, SYN | ACK, b""), (101, ACK, CONTENT)]
    other = [(5000, SYN | ACK, b""), (5001, ACK, CONTENT)]
    for beside in ([(9900, SYN | ACK, b""), (5001, ACK, CONTENT)], other):
        result = run(
            tmp_path,
            [
                (at, tcp(seq, 50, *rest, port=port))
                for port, packets in ((1, ours), (2, other))
                for at, (seq, *rest) in enumerate(packets)
            ],
            [
                (at + 5, tcp(seq, 50, *rest, port=port))
                for port, packets in ((1, theirs), (2, beside))
                for at, (seq, *rest) in enumerate(packets)
            ],
        )
        assert result["checkpoints"] == []


@pytest.mark.parametrize("isn", [100, 7000, 2**32 - 5])
def test_before_the_rewriter_the_first_segment_may_be_missing(tmp_path: Path, isn: int) -> None:
    ours = [
        (0, tcp(3000, 50, SYN | ACK)),
        (1, tcp(3001, 50, ACK, b"first")),
        (2000, tcp(3006, 50, ACK, b"second")),
    ]
    theirs = [(0, tcp(isn, 50, SYN | ACK)), (2001, tcp(isn + 6, 50, ACK, b"second"))]
    result = run(tmp_path, ours, theirs)
    assert fates(result) == [("released", 0), ("flushed", 1001), ("released", 2001)]
    # TCP fast open: data comes with the SYN
    ours = [(0, tcp(3000, 50, SYN | ACK, b"first")), (1, tcp(3006, 50, ACK, b"second"))]
    theirs = [(0, tcp(isn, 50, SYN | ACK, b"first")), (2, tcp(isn + 6, 50, ACK, b"second"))]
    assert run(tmp_path, ours, theirs)["checkpoints"] == []


def test_before_the_rewriter_a_connection_may_have_been_idle(tmp_path: Path) -> None:
    day_ms = 86_400_000

    def side(isn: int, late_ms: int) -> list[tuple[float, bytes]]:
        return [
            (late_ms, tcp(isn, 50, SYN | ACK)),
            (late_ms + 1, tcp(isn + 1, 50, ACK, b"first")),
            (late_ms + day_ms, tcp(isn + 6, 60, ACK, b"second")),
        ]

    ours = [*side(3000, 0), (day_ms / 2, udp(b"alone"))]  # what time brings is looked for then
    result = run(tmp_path, ours, side(880_000, 2))
    assert [checkpoint["reason"] for checkpoint in result["checkpoints"]] == ["udp-timeout"]


@pytest.mark.parametrize("flags", [SYN, SYN | ACK])
def test_a_checkpoint_within_a_handshake_of_which_the_capture_shows_both(tmp_path: Path, flags: int) -> None:
    """The SVM of the capture was no copy of the PVM when the replay takes its checkpoint: its own SYN comes
    behind it.
    """
    ours = [
        (0, udp(b"alone")),
        (990, tcp(1000, 50, flags)),
        (1010, tcp(1001, 60, ACK, b"data")),
        (1020, tcp(1005, 61, FIN | ACK)),
    ]
    theirs = [
        (1000.5, tcp(7000, 50, flags)),
        (1011, tcp(7001, 60, ACK, b"data")),
        (1021, tcp(7005, 61, FIN | ACK)),
    ]
    result = run(tmp_path, ours, theirs)
    assert fates(result) == [("flushed", 1000), ("flushed", 1000), ("released", 1011), ("released", 1021)]
    assert len(result["checkpoints"]) == 1


def test_a_difference_flushes_by_a_checkpoint(tmp_path: Path) -> None:
    ours = [
        (0, tcp(100, 50, ACK, b"abcdef")),
        (5, udp(b"other")),
        (7, tcp(106, 50, ACK, b"g")),
        (40, tcp(107, 50, ACK, b"h")),
    ]
    theirs = [
        (2, tcp(100, 50, ACK, b"abcdeX")),
        (4, tcp(106, 50, ACK, b"stale")),
        (41, tcp(106, 50, ACK, b"gh")),
    ]
    result = run(tmp_path, ours, theirs, "--checkpoint-ms", "30")
    # what comes while the checkpoint is under way belongs to the next epoch
    assert fates(result)[0] == ("flushed", 32.0)
    assert fates(result)[2] == fates(result)[3] == ("released", 41.0)
    assert result["checkpoints"][0] == {"at_ms": 2.0, "reason": "tcp-payload"}
    assert "byte 5 (sequence 105): PVM 0x66, SVM 0x58" in result["packets"][0]["why"]
    assert result["checkpoints"][1] == {"at_ms": 1032.0, "reason": "udp-timeout"}
    assert fates(result)[1] == ("flushed", 1062.0)


def test_timeout_and_tail(tmp_path: Path) -> None:
    ours, theirs = [(0, udp(b"only"))], [(0, udp(b"other"))]
    result = run(tmp_path, ours, theirs, "--compare-timeout", "200", "--tail", "199")
    assert fates(result) == [("held", 199.0)] and result["checkpoints"] == []
    assert result["packets"][0]["why"] == "the SVM has sent no equal datagram"
    result = run(tmp_path, ours, theirs, "--compare-timeout", "200", "--tail", "200")
    assert fates(result) == [("flushed", 200.0)]
    assert result["checkpoints"] == [{"at_ms": 200.0, "reason": "udp-timeout"}]


@pytest.mark.parametrize("later_s", [1_700_000_000, 2**32 - 1])
def test_times_that_no_floating_point_number_has(tmp_path: Path, later_s: int) -> None:
    def record(seconds: int, nanoseconds: int, frame: bytes) -> bytes:
        return struct.pack("<IIII", seconds, nanoseconds, len(frame), len(frame)) + frame

    one, other = tmp_path / "p.pcap", pcap(tmp_path / "s.pcap", [])
    header = struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 0xFFFF, 1)
    for nanoseconds in range(123_456_789, 123_456_789 + 7 * 37, 37):
        one.write_bytes(header + record(0, 0, ARP) + record(later_s, nanoseconds, udp(b"abc")))
        result = json.loads(command(one, other, "--compare-timeout", "3.3").stdout)
        assert [packet["fate"] for packet in result["packets"]] == ["released", "flushed"]


def test_what_the_svm_alone_says_in_a_stream_ends_in_a_checkpoint(tmp_path: Path) -> None:
    ours = [(0, tcp(100, 50, ACK, b"abc"))]
    result = run(tmp_path, ours, [(1, tcp(100, 50, ACK, b"abcd"))])
    assert fates(result) == [("released", 1.0)]
    assert result["checkpoints"] == [{"at_ms": 1001.0, "reason": "tcp-timeout"}]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("nano", [False, True])
def test_all_pcap_forms(tmp_path: Path, order: str, nano: bool) -> None:
    result = run(
        tmp_path,
        [(0, udp(b"a")), (1000.5, udp(b"b"))],
        [(0.001, udp(b"a")), (1001, udp(b"b"))],
        order=order,
        nano=nano,
    )
    assert fates(result) == [("released", 0.001), ("released", 1001.0)]


def test_a_packet_cut_by_the_snapshot_length_is_never_taken_for_equal(tmp_path: Path) -> None:
    frame = udp(bytes(100))
    result = run(tmp_path, [(0, frame), (1, udp(b"x"))], [(0, frame), (1, udp(b"x"))], snaplen=90)
    assert fates(result) == [("flushed", 0.0), ("released", 1.0)]
    assert result["checkpoints"] == [{"at_ms": 0.0, "reason": "truncated"}]


def test_runts_and_unknown_types(tmp_path: Path) -> None:
    stp = bytes(12) + b"\0\x26" + bytes(38)
    result = run(tmp_path, [(0, b"\1\2\3"), (1, b""), (2, stp)], [(5, b"\1\2\3"), (6, b"")])
    assert fates(result) == [("released", 5.0), ("released", 6.0), ("released", 2.0)]
    assert result["counters"]["malformed"] == 4


def test_unsorted_captures_are_taken_by_time(tmp_path: Path) -> None:
    result = run(
        tmp_path, [(9, udp(b"late")), (1, udp(b"early", 54))], [(2, udp(b"early", 54)), (10, udp(b"late"))]
    )
    assert fates(result) == [("released", 9.0), ("released", 1.0)], "since the first of both"


def test_empty_captures(tmp_path: Path) -> None:
    assert run(tmp_path, [], [])["packets"] == []
    assert run(tmp_path, [(0, udp(b"x"))], [], "--tail", "0")["packets"][0]["fate"] == "held"


def test_a_file_that_ends_within_a_packet(tmp_path: Path) -> None:
    path = pcap(tmp_path / "p.pcap", [(0, udp(b"a")), (1, udp(b"b"))])
    for cut in (1, 20, len(udp(b"b")) + 3):
        (tmp_path / "cut.pcap").write_bytes(path.read_bytes()[:-cut])
        done = command(tmp_path / "cut.pcap", path)
        assert done.returncode == 0 and len(json.loads(done.stdout)["packets"]) == 1
        assert "cut.pcap ends within packet 1, which is left out" in done.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is no pcap file"),
        (b"\xd4\xc3\xb2\xa1", "is no pcap file"),
        (b"GIF89a" + bytes(30), "is no pcap file"),
        (b"\x0a\x0d\x0d\x0a" + bytes(30), "is a pcapng file: convert it"),
        (struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 99, 113), "has link type 113, not Ethernet"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_capture_of_ethernet_is_refused(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "x.pcap"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        Capture(path)
    done = command(path, pcap(tmp_path / "s.pcap", []))
    assert (
        done.returncode == 2 and done.stdout == "" and words in done.stderr and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize("words", ["soon", "-1", "nan", "inf", ""])
def test_what_is_no_duration_is_refused(tmp_path: Path, words: str) -> None:
    path = pcap(tmp_path / "p.pcap", [])
    done = command(path, path, f"--tail={words}")
    assert done.returncode == 2 and done.stdout == ""
    assert f"argument --tail: {words} is not a duration: give milliseconds" in done.stderr


def test_explanations_name_the_first_differing_byte(tmp_path: Path) -> None:
    one = pcap(tmp_path / "p.pcap", [(0, udp(b"12:30:01 o'clock")), (1, tcp(100, 50, ACK, b"abc"))])
    other = pcap(
        tmp_path / "s.pcap",
        [(0, udp(b"nothing alike")), (1, udp(b"12:30:02 o'clock")), (2, tcp(100, 50, ACK, b"aBc"))],
    )
    done = command(one, other, "--explain")
    assert "TCP 10.0.0.1:80 > 10.0.0.2:4000, byte 1 (sequence 101): PVM 0x62, SVM 0x42" in done.stderr
    (tmp_path / "t.pcap").write_bytes(one.read_bytes())
    done = command(pcap(tmp_path / "t.pcap", [(0, udp(b"12:30:01 o'clock"))]), other, "--explain")
    assert "first difference at byte 15 behind the IP header: PVM 0x31 (1), SVM 0x32 (2)" in done.stderr
    json.loads(done.stdout)


def fragments(body: bytes, ident: int) -> list[bytes]:
    return [ipv4(17, body[:24], 0x2000, ident), ipv4(17, body[24:], 3, ident)]


def tagged(frame: bytes) -> list[bytes]:
    return [frame[:12] + b"\x81\0\0\5" + frame[12:]]


def behind_options(body: bytes) -> list[bytes]:
    options = bytes([17, 0, 1, 4, 0, 0, 0, 0])
    head = struct.pack(">IHBB", 6 << 28, len(options + body), 60, 64) + bytes(31) + b"\1"
    return [ETHERNET + b"\x86\xdd" + head + options + body]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda body: fragments(body, 1), lambda body: fragments(body, 2)[::-1]),
        (lambda body: fragments(body, 1), lambda body: [ipv4(17, body)]),
        (lambda body: tagged(ipv4(17, body)), lambda body: tagged(ipv4(17, body))),
        (behind_options, behind_options),
    ],
    ids=["fragments", "fragments and a whole one", "VLAN", "IPv6 options"],
)
def test_explanations_look_behind_all_headers(tmp_path: Path, ours: Any, theirs: Any) -> None:
    def body(content: bytes) -> bytes:
        return struct.pack(">HHHH", 5353, 53, 8 + len(content), 0) + content

    one = pcap(tmp_path / "p.pcap", [(0, frame) for frame in ours(body(b"a" * 20 + b"x" + b"a" * 19))])
    other = pcap(tmp_path / "s.pcap", [(0, frame) for frame in theirs(body(b"a" * 20 + b"y" + b"a" * 19))])
    done = command(one, other, "--explain")
    assert "first difference at byte 28 behind the IP header: PVM 0x78 (x), SVM 0x79 (y)" in done.stderr
