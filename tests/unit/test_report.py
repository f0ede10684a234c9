# SPDX-License-Identifier: LGPL-2.1-or-later
"""The event log and the status line: what they show, and that they never disturb what they report on."""

from __future__ import annotations

import contextlib
import enum
import errno
import io
import json
import logging
import os
import pty
import termios
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import pytest

from remus_colo import outlet, report
from remus_colo.errors import ConfigError
from remus_colo.report import (
    EventLog,
    JsonStatus,
    PlainStatus,
    Stats,
    TerminalStatus,
    format_count,
    format_status,
)

PATIENCE_S = 60

FULL = Stats(
    domain="web",
    state="protected",
    mode="transparent",
    epoch=42,
    checkpoints=(("period", 39), ("divergence", 3)),
    pause_ms=12.34,
    pages=484,
    released=12345,
    held=3,
    diverged=4,
    backup="standby",
    silence_s=0.21,
)
FULL_LINE = (
    "web: protected | epoch 42 | checkpoints 42 (period 39, divergence 3) | pause 12.3 ms | 484 pages | "
    "packets: released 12.3k held 3 diverged 4 | backup standby (0.2 s ago) | transparent"
)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


# -- the event log --------------------------------------------------------------------------------


def test_events_are_json_lines_that_are_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "events"
    log = EventLog(
        path, monotonic_ns=iter([7, 8]).__next__, wall=lambda: datetime(2026, 1, 2, 3, 4, 5, 678900, UTC)
    )
    log.event("start", domain="web")
    assert records(path) == [
        {"t": 7, "wall": "2026-01-02T03:04:05.678+00:00", "event": "start", "domain": "web"}
    ]
    log.event("checkpoint", epoch=1)
    assert [record["t"] for record in records(path)] == [7, 8]
    log.close()


def test_an_existing_log_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "events"
    for name in ("first", "second"):
        log = EventLog(path)
        log.event(name)
        log.close()
    assert [record["event"] for record in records(path)] == ["first", "second"]


class Colour(enum.Enum):
    RED = "red"


def test_any_field_can_be_logged(tmp_path: Path) -> None:
    path = tmp_path / "events"
    log = EventLog(path)
    log.event(
        "odd",
        t="mine",
        event="mine too",
        path=Path("/x"),
        colour=Colour.RED,
        raw=b"\x01\xff",
        nothing=float("nan"),
        many=(1, {2: {3}}),
        text='"\n\ud800',
        error=OSError("gone"),
    )
    (record,) = records(path)
    assert isinstance(record["t"], int)
    assert (record["t_"], record["event"], record["event_"]) == ("mine", "odd", "mine too")
    assert (record["path"], record["colour"], record["raw"], record["nothing"]) == (
        "/x",
        "red",
        "01ff",
        "nan",
    )
    assert (record["many"], record["text"], record["error"]) == ([1, {"2": [3]}], '"\n\ud800', "gone")


def test_no_log_is_no_error() -> None:
    log = EventLog(None)
    log.event("start")
    log.close()


def test_a_log_that_cannot_be_opened_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"cannot write the log file {tmp_path}: Is a directory"):
        EventLog(tmp_path)


def test_a_full_disk_costs_lines_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    log = EventLog("/dev/full")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            log.event("checkpoint")
    assert log.lost == 3
    assert [record.getMessage() for record in caplog.records] == [
        "events are being lost: cannot write the log file /dev/full: No space left on device"
    ]
    log.close()
    log.close()
    log.event("after the end")


def test_lost_lines_are_counted_in_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events"
    log = EventLog(path)
    real_write = os.write
    log.event("whole")
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[:10]))
    log.event("cut off")

    def refuse(fd: int, data: bytes) -> int:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "write", refuse)
    log.event("refused")
    monkeypatch.setattr(os, "write", real_write)
    log.event("next")
    log.event("last")
    lines = path.read_text().splitlines()
    assert [json.loads(line).get("lost_before") for line in (lines[0], *lines[2:])] == [None, 2, None]
    assert json.loads(lines[2])["event"] == "next"


# -- the status line ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.0k"),
        (99_999, "99.9k"),
        (100_000, "100k"),
        (999_999, "999k"),
        (1_000_000, "1.0M"),
        (5 * 10**9, "5.0G"),
    ],
)
def test_counts(count: int, text: str) -> None:
    assert format_count(count) == text


def test_the_whole_line() -> None:
    assert format_status(FULL) == FULL_LINE
    assert format_status(FULL, len(FULL_LINE)) == FULL_LINE
    assert format_status(Stats("web", "connecting")) == (
        "web: connecting | epoch 0 | checkpoints 0 | packets: released 0 held 0 diverged 0"
    )


def test_what_does_not_fit_is_left_out_whole() -> None:
    assert (
        format_status(FULL, 80) == "web: protected | epoch 42 | checkpoints 42 | backup standby (0.2 s ago)"
    )
    assert format_status(FULL, 20) == "web: protected"
    assert format_status(FULL, 10) == "web: pr..."


def test_no_line_is_wider_than_asked() -> None:
    whole = {*FULL_LINE.split(" | "), "checkpoints 42"}
    for width in range(1, len(FULL_LINE) + 1):
        line = format_status(FULL, width)
        assert 0 < len(line) <= width
        assert width < len("web: protected") or set(line.split(" | ")) <= whole


def test_a_terminal_has_one_line_that_is_written_over() -> None:
    stream = io.StringIO()
    status = TerminalStatus(stream, interval_s=1.0, width=lambda: 50)
    status.update(FULL, 10.0)
    status.update(FULL, 10.5)
    status.update(Stats("web", "unprotected"), 10.6)
    status.say("backup lost")
    status.close()
    status.close()
    first = "web: protected | backup standby (0.2 s ago)"
    second = "web: unprotected | epoch 0 | checkpoints 0"
    assert stream.getvalue() == (
        f"\r{first}\r{second.ljust(len(first))}\r{'backup lost'.ljust(len(second))}\n\r{second}\n"
    )


def test_plain_lines_come_now_and_then_and_at_each_change() -> None:
    stream = io.StringIO()
    status = PlainStatus(stream)
    for now_s in (0.0, 1.0, 4.9):
        status.update(FULL, now_s)
    assert stream.getvalue() == FULL_LINE + "\n"
    status.update(FULL, 5.0)
    assert stream.getvalue().count("\n") == 2
    status.update(Stats("web", "unprotected"), 5.1)
    assert stream.getvalue().splitlines()[2].startswith("web: unprotected |")
    status.say("backup lost")
    assert stream.getvalue().endswith("\nbackup lost\n")


def test_json_status_is_one_object_a_line() -> None:
    stream = io.StringIO()
    status = JsonStatus(stream)
    status.update(FULL, 0.0)
    status.say("backup lost")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first["checkpoints"] == {"period": 39, "divergence": 3}
    assert (first["checkpoints_total"], first["epoch"], first["state"]) == (42, 42, "protected")
    assert second == {"message": "backup lost"}


def test_the_form_suits_the_stream() -> None:
    assert isinstance(report.open_status(io.StringIO()), PlainStatus)
    report.open_status(None).say("nobody hears it")
    assert isinstance(report.open_status(io.StringIO(), as_json=True), JsonStatus)
    master, slave = pty.openpty()
    with open(master, "rb"), open(slave, "w") as terminal:
        assert isinstance(report.open_status(terminal), TerminalStatus)


@pytest.mark.parametrize("make", [TerminalStatus, PlainStatus, JsonStatus])
def test_a_broken_stream_is_left_alone(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", closefd=False) as stream:
        status = make(stream)
        status.update(FULL, 0.0)
        status.close()
        status.update(FULL, 100.0)
        status.say("more")
        status.close()
    os.close(writer)
    assert len([record for record in caplog.records if "can no longer be shown" in record.getMessage()]) == 1


@pytest.fixture
def unread() -> Iterator[Callable[[str], TextIO]]:
    """Streams that take no more than they have room for: a pipe without a reader, a terminal stopped by Ctrl-S."""
    with contextlib.ExitStack() as stack:

        def make(kind: str) -> TextIO:
            reader, writer = os.pipe() if kind == "pipe" else pty.openpty()
            stack.callback(os.close, reader)
            if kind == "terminal":
                termios.tcflow(writer, termios.TCOOFF)
            return stack.enter_context(open(writer, "w"))

        yield make


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
@pytest.mark.parametrize("make", [TerminalStatus, PlainStatus, JsonStatus])
def test_nobody_waits_for_who_does_not_read(
    make: Any, kind: str, unread: Callable[[str], TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that reports is the one that releases the guest's output."""
    monkeypatch.setattr(outlet, "FLUSH_TIMEOUT_S", 0.01)
    status = make(unread(kind))

    def talk() -> None:
        for number in range(3000):
            status.update(FULL, 1000.0 * number)
            status.say("x" * 100)
        status.close()

    talker = threading.Thread(target=talk, daemon=True)
    talker.start()
    talker.join(PATIENCE_S)
    assert not talker.is_alive()


def test_an_event_log_that_is_a_pipe_keeps_nobody_waiting(tmp_path: Path) -> None:
    path = tmp_path / "events"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log = EventLog(path)
    talker = threading.Thread(target=lambda: [log.event("x" * 100) for _ in range(3000)], daemon=True)
    talker.start()
    talker.join(PATIENCE_S)
    assert not talker.is_alive()
    assert log.lost > 0
    log.close()
    os.close(reader)


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_nor_do_log_lines_keep_anybody_waiting(kind: str, unread: Callable[[str], TextIO]) -> None:
    handler = outlet.LogOutlet(unread(kind))
    record = logging.makeLogRecord({"msg": "x" * 100})
    talker = threading.Thread(target=lambda: [handler.emit(record) for _ in range(3000)], daemon=True)
    talker.start()
    talker.join(PATIENCE_S)
    assert not talker.is_alive()


def test_what_is_said_comes_out_in_order_and_all_of_it() -> None:
    reader, writer = os.pipe()
    with open(writer, "w", encoding="ascii") as stream:
        status = PlainStatus(stream)
        for number in range(100):
            status.say(f"{number} \u00e9")
        status.close()
    with open(reader, encoding="ascii") as said:
        assert said.read() == "".join(f"{number} \\xe9\n" for number in range(100))


def test_a_process_that_was_forked_says_it_itself() -> None:
    """The guard, which has no thread but its own."""
    reader, writer = os.pipe()
    with open(writer, "w") as stream:
        said = outlet.Outlet(stream)
        said.write("first\n")
        said.flush()
        child = os.fork()
        if not child:
            said.write("second\n")
            said.flush()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with open(reader) as both:
        assert both.read() == "first\nsecond\n"
