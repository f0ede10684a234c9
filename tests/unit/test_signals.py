# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ends a protection in order, and what must neither end nor stop it."""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from remus_colo.devices.device import DeviceSet
from remus_colo.session import signals
from remus_colo.session.loop import Loop
from remus_colo.session.testpoints import LINE_BYTES, POINTS, TestPoints

PATIENCE_S = 30


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """As in a shell, also if the tests run under nohup; and as before when a test has ended."""
    numbers = (*signals.ENDING, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
    of_whoever_runs_it = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before
    signal.signal(signal.SIGHUP, of_whoever_runs_it)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_it_is_told_to_end(name: str) -> None:
    told: list[str] = []
    with signals.ending(told.append):
        os.kill(os.getpid(), getattr(signal, name))
        os.kill(os.getpid(), getattr(signal, name))
    assert told == [name, name]


def test_what_nohup_ignores_stays_ignored() -> None:
    told: list[str] = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.ending(told.append):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert told == []


def read_in_the_background() -> int:
    """In a session's leader whose terminal is stdin: a child in the background reads commands; how it fares."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        loop = Loop()
        points = TestPoints(0, DeviceSet([]))
        with signals.ending(lambda name: None):
            points.listen(loop, sys.stdin)
            loop.call_later(0, lambda: os.write(1, b"listening\n"))
            # the reader that finds no more takes itself out, and then there is nothing to be waited for
            loop.call_later(0.01, lambda: watch())

            def watch() -> None:
                if 0 not in loop._readers:
                    loop.stop()
                else:
                    loop.call_later(0.01, watch)

            loop.run()
        os._exit(7)
    _, status = os.waitpid(child, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return 1
    return os.waitstatus_to_exitcode(status)


def test_a_look_at_the_terminal_from_the_background_does_not_stop_it() -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 (pytest has put another in its place)
        os._exit(read_in_the_background())
    try:
        said = b""
        while b"listening" not in said:
            assert select.select([terminal], [], [], PATIENCE_S)[0]
            said += os.read(terminal, 1000)
        os.write(terminal, b"s\n")
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 7
    finally:
        os.close(terminal)


@pytest.mark.parametrize("name", ["SIGTSTP", "SIGTTIN", "SIGTTOU"])
def test_what_would_stop_it_does_not(name: str) -> None:
    """Ctrl-Z is no wish to have the backup take over."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        with signals.ending(lambda name: None):
            os.kill(os.getpid(), getattr(signal, name))
        os._exit(7)
    _, status = os.waitpid(child, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert os.WIFEXITED(status)
    assert os.waitstatus_to_exitcode(status) == 7


def test_a_line_without_an_end_is_not_kept() -> None:
    read_fd, write_fd = os.pipe()
    loop = Loop()
    points = TestPoints(0, DeviceSet([]))
    try:
        for _ in range(10):
            os.write(write_fd, b"x" * LINE_BYTES)
            points._read(loop, read_fd)
        assert len(points._partial) == LINE_BYTES
        os.write(write_fd, b"\nc2\n")
        points._read(loop, read_fd)
        assert points._command == "c2"
    finally:
        loop.close()
        os.close(read_fd)
        os.close(write_fd)


@pytest.mark.parametrize("command", POINTS)
def test_a_test_command_waits_until_the_backup_has_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The guest is destroyed here: without one it would be nowhere."""
    points = TestPoints(0, DeviceSet([]))
    points._command = command
    died: list[str] = []
    monkeypatch.setattr(points, "_die", lambda: died.append("dead"))
    for deaths in ([], ["dead"]):
        for point in POINTS:
            points.reached(point)
        assert died == deaths


@pytest.mark.parametrize(("text", "command"), [("s2\nr2\n", "s2"), ("no\nc", "c"), ("", "")])
def test_commands_in_a_file(tmp_path: Path, text: str, command: str) -> None:
    """epoll takes none."""
    (tmp_path / "commands").write_text(text)
    points = TestPoints(0, DeviceSet([]))
    loop = Loop()
    try:
        with open(tmp_path / "commands") as stream:
            points.listen(loop, stream)
    finally:
        loop.close()
    assert points._command == command
