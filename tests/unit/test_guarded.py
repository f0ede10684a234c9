# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the guard of a ``remus`` that was killed decides, and what it says.  With real processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

TREE = Path(__file__).parents[2]
PATIENCE_S = 60

PROGRAM = """
    import os, pathlib, signal, sys, time
    from unittest import mock
    from remus_colo import errors, primary
    from remus_colo.session import lock, recovery

    folder = pathlib.Path(sys.argv[1])
    lock.RUN_DIR = folder
    def recover(domid, tags, *, may_resume, reborn):
        resume = may_resume()
        (folder / "recover").write_text(repr((domid, tags, {"resume": resume, "reborn": reborn})))
        return STOOD, resume
    recovery.recover = recover
    recovery.suspended = lambda domid: SUSPENDED
    options = mock.Mock(heartbeat_timeout_s=TIMEOUT_S, log=folder / "log")
    def die():
        os.kill(os.getpid(), signal.SIGKILL)
    with primary.only_one(7, "web") as record, primary.guarded(7, "web", record, options) as guard:
        record.note_tag("abcdef")
        guard.note_tag("abcdef")
"""


def program(body: str, *, stood: str = "suspended", timeout_s: float = 60.0, suspended: bool = False) -> str:
    return textwrap.dedent(PROGRAM).replace("STOOD", repr(stood)).replace(
        "TIMEOUT_S", str(timeout_s)
    ).replace("SUSPENDED", repr(suspended)) + textwrap.indent(textwrap.dedent(body), " " * 4)


def run(
    folder: Path, body: str, *, stood: str = "suspended", timeout_s: float = 60.0, suspended: bool = False
) -> tuple[int, str]:
    """Exit status, and what was said."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            program(body, stood=stood, timeout_s=timeout_s, suspended=suspended),
            str(folder),
        ],
        cwd=TREE,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return done.returncode, done.stderr


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def record(folder: Path) -> str:
    return (folder / "protect-7.lock").read_text()


@pytest.mark.parametrize("sure", ["", "guard.sure()"])
def test_a_guest_that_the_backup_cannot_have(tmp_path: Path, sure: str) -> None:
    """There was none yet, or it has just heard from us."""
    status, said = run(tmp_path, f"{sure}\ndie()")
    assert status == -signal.SIGKILL
    assert "web goes on UNPROTECTED" in said
    assert "'resume': True" in (tmp_path / "recover").read_text()
    assert "('abcdef',)" in (tmp_path / "recover").read_text()
    (event,) = events(tmp_path)
    assert (event["event"], event["guest"], event["resumed"]) == ("recovered", "suspended", True)
    assert record(tmp_path) == ""


def test_a_guest_that_the_backup_may_have(tmp_path: Path) -> None:
    """The next remus is told that there was something: the record stays."""
    status, said = run(tmp_path, "guard.sure()\ntime.sleep(0.2)\ndie()", timeout_s=0.1)
    assert status == -signal.SIGKILL
    assert "web stays suspended, as it may run there" in said
    assert "python3 -m remus_colo.recover web" in said
    assert "'resume': False" in (tmp_path / "recover").read_text()
    assert events(tmp_path)[0]["resumed"] is False
    assert record(tmp_path).split()[1:] == ["abcdef"]


@pytest.mark.parametrize("end", ["die()", "guard.sure()\n    raise errors.XenError('no backend')"])
def test_a_guest_whose_rebirth_broke_off(tmp_path: Path, end: str) -> None:
    """Killed, or failed: it stands still.  However long the backup was silent: it has no checkpoint yet."""
    run(tmp_path, f"guard.sure()\ntime.sleep(0.2)\nwith guard.rebirth():\n    {end}", timeout_s=0.1)
    assert "'resume': True, 'reborn': True" in (tmp_path / "recover").read_text()
    assert record(tmp_path) == ""


def test_a_guest_that_runs_although_the_backup_may_have_it(tmp_path: Path) -> None:
    """There is nothing to decide."""
    _, said = run(tmp_path, "guard.sure()\ntime.sleep(0.2)\ndie()", stood="", timeout_s=0.1)
    assert "web goes on UNPROTECTED" in said


def test_a_guest_that_is_no_more(tmp_path: Path) -> None:
    _, said = run(tmp_path, "die()", stood="gone")
    assert "web has ended" in said
    assert events(tmp_path)[0]["resumed"] is False


@pytest.mark.parametrize("body", ["pass", "raise errors.PeerLost('gone')", "raise KeyboardInterrupt"])
def test_an_end_in_order(tmp_path: Path, body: str) -> None:
    run(tmp_path, body)
    assert not (tmp_path / "recover").exists()
    assert record(tmp_path) == ""


def test_a_bug_has_the_guard_look_as_well(tmp_path: Path) -> None:
    status, said = run(tmp_path, "1 // 0")
    assert status == 1
    assert "ZeroDivisionError" in said
    assert (tmp_path / "recover").exists()
    assert record(tmp_path) == ""


@pytest.mark.parametrize("body", ["pass", "raise errors.XenError('the guest cannot be resumed')"])
def test_a_guest_that_is_left_suspended_is_resumed(tmp_path: Path, body: str) -> None:
    _, said = run(tmp_path, body, suspended=True)
    assert "web goes on UNPROTECTED" in said
    assert "'resume': True" in (tmp_path / "recover").read_text()


def test_a_log_that_cannot_be_written_any_more(tmp_path: Path) -> None:
    """The guest is let run all the same."""
    (tmp_path / "log").mkdir()
    _, said = run(tmp_path, "die()")
    assert "cannot write the log file" in said
    assert "web goes on UNPROTECTED" in said
    assert (tmp_path / "recover").exists()
    assert record(tmp_path) == ""


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_a_standard_file_that_was_closed_is_no_other_file(tmp_path: Path, closed: tuple[int, ...]) -> None:
    """As cron jobs and daemons start commands: the lock would have got its number, and the guard put /dev/null in its place."""
    starter = f"""
        import os, sys
        sys.path.insert(0, {str(TREE)!r})
        for number in {closed}:
            os.close(number)
        os.execv(sys.executable, [sys.executable, "-c", {inside_a_command("die()")!r}, {str(tmp_path)!r}])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(starter)], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert "Traceback" not in done.stderr
    deadline_s = time.monotonic() + PATIENCE_S
    while not (tmp_path / "recover").exists() or record(tmp_path):
        assert time.monotonic() < deadline_s, "the guard did not do all of its work"
        time.sleep(0.01)
    assert events(tmp_path)[0]["event"] == "recovered"


def inside_a_command(body: str) -> str:
    """The program, as the body of a command."""
    lines = program(body).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("with "))
    inner = [*lines[:start], "def run(argv):", *(f"    {line}" for line in lines[start:])]
    return "\n".join(
        [
            f"import sys; sys.path.insert(0, {str(TREE)!r})",
            *inner,
            "from remus_colo import command",
            "sys.exit(command.run_command('remus', [], run, verbose=True))",
        ]
    )
