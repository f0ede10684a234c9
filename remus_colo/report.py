# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a running protection tells: every event into a log of JSON lines, and one status line for people.

Reporting never disturbs what it reports on: once a log is open, a full disk, or a terminal that is closed or stopped, costs lines,
not protection.
"""

from __future__ import annotations

import enum
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TextIO

from remus_colo.errors import ConfigError
from remus_colo.outlet import Outlet

log = logging.getLogger(__name__)

TERMINAL_INTERVAL_S = 0.2
PLAIN_INTERVAL_S = 5.0
DEFAULT_WIDTH = 80


# -- the event log -------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """``value`` as JSON has it; what JSON has no form for becomes text."""
    match value:
        case None | bool() | int() | str():
            # a StrEnum is a str, and an IntEnum an int, but their names say more
            return value.value if isinstance(value, enum.Enum) else value
        case float():
            return value if math.isfinite(value) else str(value)
        case enum.Enum():
            return _plain(value.value)
        case Mapping():
            return {str(_plain(key)): _plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(item) for item in value]
        case bytes() | bytearray() | memoryview():
            return bytes(value).hex()
    return str(value)


class EventLog:
    """Events as JSON lines, one ``write`` each: no event is lost or torn if the program is killed.

    Every line has ``t`` (``time.monotonic_ns()``), ``wall`` (UTC, ISO 8601) and ``event``; the rest are the
    event's own fields.  A line that follows lost ones has ``lost_before``, their number.

    :param path: the file, which is appended to; None: no log.
    :raise ConfigError: it cannot be opened.  From then on nothing is raised.
    """

    def __init__(
        self,
        path: Path | str | None,
        *,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._path = path
        self._monotonic_ns = monotonic_ns
        self._wall = wall
        self._fd: int | None = None
        self._torn = False
        self.lost = 0
        if path is None:
            return
        try:
            # A pipe that nobody reads must keep nobody waiting either; for files O_NONBLOCK means nothing.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
            self._fd = os.open(path, flags, 0o640)
        except OSError as error:
            raise ConfigError(f"cannot write the log file {path}: {error.strerror}") from error

    def event(self, event: str, /, **fields: Any) -> None:
        """Writes one event. A field that has a name of ours gets an underscore behind it."""
        fd = self._fd
        if fd is None:
            return
        record: dict[str, Any] = {
            "t": self._monotonic_ns(),
            "wall": self._wall().isoformat(timespec="milliseconds"),
            "event": event,
        }
        if self.lost:
            record["lost_before"] = self.lost
        for name, value in fields.items():
            record[f"{name}_" if name in record else name] = _plain(value)
        # a line that was cut off by a full disk must not swallow this one
        line = ("\n" if self._torn else "") + json.dumps(record, separators=(",", ":")) + "\n"
        self._write(fd, line.encode("ascii"))

    def _write(self, fd: int, line: bytes) -> None:
        try:
            written = os.write(fd, line)
        except OSError as error:
            self._lose(error.strerror or str(error))
            return
        if written < len(line):
            self._torn = True
            self._lose("the line was cut off")
            return
        self._torn = False
        self.lost = 0

    def _lose(self, reason: str) -> None:
        if not self.lost:
            log.warning("events are being lost: cannot write the log file %s: %s", self._path, reason)
        self.lost += 1

    def close(self) -> None:
        """Idempotent."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


# -- the status ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stats:
    """A protection at one moment. Counts are since its start."""

    domain: str
    state: str
    mode: str = ""  # of checkpoints: transparent or cooperative
    epoch: int = 0
    checkpoints: tuple[
        tuple[str, int], ...
    ] = ()  # reason and count, most frequent first or as the caller likes
    pause_ms: float | None = None  # of the last checkpoint
    pages: int | None = None  # of the last checkpoint
    released: int = 0  # packets that left because they compared equal, or were committed
    held: int = 0  # packets waiting now
    diverged: int = 0  # packets whose difference asked for a checkpoint
    backup: str = ""  # its state, as its heartbeats say
    silence_s: float | None = None  # since the backup was heard

    @property
    def checkpoints_total(self) -> int:
        return sum(count for _, count in self.checkpoints)


def format_count(count: int) -> str:
    """At most five characters up to a billion: 999, 12.3k, 4.5M."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            scaled = count / size
            # cut, not rounded: 999,999 is 999k, never 1000k
            return (
                f"{math.floor(scaled * 10) / 10:.1f}{unit}" if scaled < 100 else f"{math.floor(scaled)}{unit}"
            )
    return str(count)


def format_status(stats: Stats, width: int = 0) -> str:
    """One line, at most ``width`` characters if that is not 0.

    What does not fit is left out whole, the least important first; what is left is cut as a last resort.
    """
    # in the order in which they are shown; the number is the rank in which they are given up, 0 last
    segments: list[tuple[int, str]] = [(0, f"{stats.domain}: {stats.state}"), (2, f"epoch {stats.epoch}")]
    total = format_count(stats.checkpoints_total)
    segments.append((3, f"checkpoints {total}"))
    if stats.checkpoints:
        reasons = ", ".join(f"{reason} {format_count(count)}" for reason, count in stats.checkpoints)
        segments.append((8, f"({reasons})"))
    if stats.pause_ms is not None:
        segments.append((4, f"pause {stats.pause_ms:.1f} ms"))
    if stats.pages is not None:
        segments.append((7, f"{format_count(stats.pages)} pages"))
    segments.append(
        (
            5,
            f"packets: released {format_count(stats.released)} held {format_count(stats.held)} "
            f"diverged {format_count(stats.diverged)}",
        )
    )
    if stats.backup:
        silence = "" if stats.silence_s is None else f" ({stats.silence_s:.1f} s ago)"
        segments.append((1, f"backup {stats.backup}{silence}"))
    if stats.mode:
        segments.append((6, stats.mode))

    line = _join(segments)
    while width and len(line) > width and len(segments) > 1:
        segments.remove(max(segments))
        line = _join(segments)
    return line if not width or len(line) <= width else line[: max(0, width - 3)] + "..."[:width]


def _join(segments: list[tuple[int, str]]) -> str:
    # the reasons belong to the count before them
    return " | ".join(text for _, text in segments).replace(" | (", " (")


def status_object(stats: Stats) -> dict[str, Any]:
    """The stable form of ``--status-json``: the fields of :class:`Stats`, ``checkpoints`` by reason."""
    return {
        **asdict(stats),
        "checkpoints": dict(stats.checkpoints),
        "checkpoints_total": stats.checkpoints_total,
    }


class Status(Protocol):
    """Where the status goes. No method raises because of the stream."""

    def update(self, stats: Stats, now_s: float) -> None:
        """To be called as often as one likes; shows what is due."""

    def say(self, text: str) -> None:
        """A sentence that must not be missed: a change of state, a warning."""

    def close(self) -> None:
        """Idempotent; leaves a terminal at the beginning of a line."""


def _outlet(stream: TextIO) -> Outlet:
    return Outlet(stream, lambda error: log.warning("the status can no longer be shown: %s", error))


class TerminalStatus:
    """One live line that is written over, for a terminal."""

    def __init__(
        self,
        stream: TextIO,
        *,
        interval_s: float = TERMINAL_INTERVAL_S,
        width: Callable[[], int] | None = None,
    ) -> None:
        self._stream = _outlet(stream)
        self._interval_s = interval_s
        self._width = width or (lambda: shutil.get_terminal_size((DEFAULT_WIDTH, 24)).columns)
        self._next_s = -math.inf
        self._state: str | None = None
        self._line = ""

    def update(self, stats: Stats, now_s: float) -> None:
        if (now_s < self._next_s and stats.state == self._state) or self._stream.busy:
            return
        self._next_s = now_s + self._interval_s
        self._state = stats.state
        # the last column stays free: a terminal may wrap when it is written to
        self._draw(format_status(stats, max(1, self._width() - 1)))

    def _draw(self, line: str) -> None:
        # blanks instead of an escape sequence: they work on every terminal
        self._stream.write("\r" + line.ljust(len(self._line)))
        self._line = line

    def say(self, text: str) -> None:
        line = self._line
        self._stream.write("\r" + text.ljust(len(line)) + "\n")
        self._line = ""
        if line:
            self._draw(line)

    def close(self) -> None:
        if self._line:
            self._stream.write("\n")
            self._line = ""
        self._stream.flush()


class PlainStatus:
    """Whole lines now and then, and at each change of state: for a file, a pipe or a journal."""

    def __init__(self, stream: TextIO, *, interval_s: float = PLAIN_INTERVAL_S) -> None:
        self._stream = _outlet(stream)
        self._interval_s = interval_s
        self._next_s = -math.inf
        self._state: str | None = None

    def update(self, stats: Stats, now_s: float) -> None:
        if (now_s < self._next_s and stats.state == self._state) or self._stream.busy:
            return
        self._next_s = now_s + self._interval_s
        self._state = stats.state
        self._stream.write(self.line(stats) + "\n")

    def line(self, stats: Stats) -> str:
        return format_status(stats)

    def say(self, text: str) -> None:
        self._stream.write(text + "\n")

    def close(self) -> None:
        self._stream.flush()


class JsonStatus(PlainStatus):
    """As :class:`PlainStatus`, each line one JSON object; a sentence is ``{"message": ...}``."""

    def line(self, stats: Stats) -> str:
        return json.dumps(_plain(status_object(stats)))

    def say(self, text: str) -> None:
        self._stream.write(json.dumps({"message": text}) + "\n")


def open_status(stream: TextIO | None, *, as_json: bool = False) -> Status:
    """The form of status that suits ``stream``; None: it was closed when we began."""
    if stream is None:
        stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if as_json:
        return JsonStatus(stream)
    return TerminalStatus(stream) if stream.isatty() else PlainStatus(stream)
