# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guard acts when what it guards has gone without a word, and then only.  With real processes."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from remus_colo.errors import DomainError, HostError, PeerLost
from remus_colo.session import lock
from remus_colo.session.guard import Guard
from remus_colo.session.lock import only_one

PATIENCE_S = 60
TREE = Path(__file__).parents[2]


class Guarded:
    """A process with a guard, which tells in a file what it was called with."""

    def __init__(self, told: Path, script: str) -> None:
        self.told = told
        text = """
            import json, os, signal, socket, sys
            from remus_colo.session.guard import Guard
            def recover(remains):
                os.set_blocking(left.fileno(), False)
                try:
                    held = left.recv(1) != b""
                except BlockingIOError:
                    held = True
                with open(sys.argv[1], "w") as told:
                    json.dump([remains.pid, remains.tags, remains.reborn, remains.silence_s, held], told)
            left, right = socket.socketpair()
            guard = Guard("web", recover)
            guard.hold(right.fileno())
            def die():
                os.kill(os.getpid(), signal.SIGKILL)
        """
        program = textwrap.dedent(text) + textwrap.dedent(script)
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(told)], cwd=TREE, stderr=subprocess.PIPE
        )

    def wait(self) -> int:
        """The exit status, once guard and guarded have gone: only then is stderr at its end."""
        _, said = self.process.communicate(timeout=PATIENCE_S)
        assert said == b""
        return self.process.returncode

    def remains(self) -> Any:
        return json.loads(self.told.read_text())


def test_a_process_that_is_killed(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path / "told", "guard.note_tag('abcdef'); guard.note_tag('123456'); die()")
    assert guarded.wait() == -signal.SIGKILL
    pid, tags, reborn, silence_s, _ = guarded.remains()
    assert (pid, tags, reborn, silence_s) == (guarded.process.pid, ["abcdef", "123456"], False, 0.0)


def test_connections_are_open_until_the_guard_has_done_its_work(tmp_path: Path) -> None:
    """The process closes its own copy first: the one that is left is the guard's."""
    guarded = Guarded(tmp_path / "told", "right.close(); die()")
    guarded.wait()
    assert guarded.remains()[4] is True


def test_how_long_ago_the_backup_was_sure_to_hear_us(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path / "told", "import time; guard.sure(); time.sleep(0.2); die()")
    guarded.wait()
    assert guarded.remains()[3] >= 0.2


@pytest.mark.parametrize(
    ("script", "reborn"),
    [
        ("with guard.rebirth(): die()", True),
        ("with guard.rebirth(): pass\ndie()", False),
        ("try:\n    with guard.rebirth(): 1 // 0\nexcept ZeroDivisionError: die()", True),
    ],
)
def test_a_guest_in_the_midst_of_its_resume(tmp_path: Path, script: str, reborn: bool) -> None:
    guarded = Guarded(tmp_path / "told", script)
    guarded.wait()
    assert guarded.remains()[2] is reborn


def test_a_process_that_ends_in_order(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path / "told", "guard.note_tag('abcdef'); guard.end()")
    assert guarded.wait() == 0
    assert not guarded.told.exists()


@pytest.mark.parametrize("error", ["RuntimeError", "KeyboardInterrupt"])
def test_a_rebirth_that_broke_off_is_never_in_order(tmp_path: Path, error: str) -> None:
    """However the process makes of that an end of its own."""
    script = f"""
        try:
            with guard.rebirth():
                raise {error}
        except {error}:
            guard.end()
        sys.exit(0 if os.path.exists(sys.argv[1]) else 3)
    """
    guarded = Guarded(tmp_path / "told", textwrap.dedent(script))
    assert guarded.wait() == 0
    assert guarded.remains()[2] is True


def test_a_process_that_gives_up_waits_for_its_guard(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path / "told", "guard.give_up(); sys.exit(0 if os.path.exists(sys.argv[1]) else 3)")
    assert guarded.wait() == 0


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_guard_is_not_ended_with_what_it_guards(tmp_path: Path, number: str) -> None:
    script = f"""
        import time
        signal.signal(signal.{number}, signal.SIG_IGN)
        while open(f"/proc/{{guard._pid}}/comm").read() != "guard-web\\n":
            time.sleep(0.001)
        os.kill(guard._pid, signal.{number})
        die()
    """
    guarded = Guarded(tmp_path / "told", script)
    guarded.wait()
    assert guarded.remains()[0] == guarded.process.pid


@pytest.mark.parametrize("name", ["café", "ein langer Name mit Umlauten: äöü", "x" * 200, "\udcff"])
def test_a_guest_with_an_odd_name(name: str) -> None:
    """The guard bears its name, as far as a process can."""
    guard = Guard(name, lambda remains: None)
    try:
        deadline_s = time.monotonic() + PATIENCE_S
        while not Path(f"/proc/{guard._pid}/comm").read_bytes().startswith(b"guard-"):
            assert time.monotonic() < deadline_s, "it has no name, if it is there at all"
            time.sleep(0.002)
        guard.note_tag("abcdef")
    finally:
        guard.end()


def test_a_guard_that_is_killed_before_protection_begins() -> None:
    guard = Guard("web", lambda remains: None)
    os.kill(guard._pid, signal.SIGKILL)
    os.waitid(os.P_PID, guard._pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(HostError, match=f"the process {guard._pid} that was to guard this one is gone"):
        guard.note_tag("abcdef")
    with pytest.raises(HostError):
        guard.hold(0)
    guard.end()


def test_a_guard_that_fails_says_so(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path / "no folder" / "told", "die()")
    _, said = guarded.process.communicate(timeout=PATIENCE_S)
    assert b"while cleaning up after process" in said


def test_a_guard_leaves_no_process_and_no_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    guard = Guard("web", lambda remains: None)
    guard.end()
    with pytest.raises(ChildProcessError):
        os.waitpid(guard._pid, os.WNOHANG)
    assert os.listdir("/proc/self/fd") == before


# -- the lock --------------------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(lock, "RUN_DIR", tmp_path)
    return tmp_path


@pytest.fixture
def cleaned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []

    class Context:
        def __enter__(self) -> Context:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(lock, "Store", Context)
    monkeypatch.setattr(lock, "Links", Context)
    monkeypatch.setattr(lock.backend, "vifs", lambda store, domid: [])
    monkeypatch.setattr(
        lock.recovery, "clean_network", lambda links, domid, vifs, tags, **_: found.append(tags)
    )
    return found


def test_two_at_a_time(run_dir: Path, cleaned: list[tuple[str, ...]]) -> None:
    with (
        only_one(7, "web"),
        only_one(8, "other"),
        pytest.raises(DomainError, match=f"already, by process {os.getpid()}:"),
        only_one(7, "web"),
    ):
        pass
    with only_one(7, "web"):
        pass
    assert cleaned == []


def test_one_after_one_that_failed(run_dir: Path, cleaned: list[tuple[str, ...]]) -> None:
    """In order, that is: it has cleaned up itself."""
    with pytest.raises(PeerLost), only_one(7, "web") as record:
        record.note_tag("abcdef")
        raise PeerLost("gone")
    with only_one(7, "web"):
        pass
    assert cleaned == []


def test_one_after_one_that_was_killed(run_dir: Path, cleaned: list[tuple[str, ...]]) -> None:
    script = f"""
        import os, pathlib, signal
        from remus_colo.session import lock
        lock.RUN_DIR = pathlib.Path({str(run_dir)!r})
        with lock.only_one(7, "web") as record:
            record.note_tag("abcdef")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=TREE, timeout=PATIENCE_S, check=False)
    with only_one(7, "web"):
        assert cleaned == [("abcdef",)]
    with only_one(7, "web"):
        assert len(cleaned) == 1


def test_one_while_a_guard_cleans_up(run_dir: Path, cleaned: list[tuple[str, ...]]) -> None:
    """It has the lock of the process that was killed."""
    (run_dir / "protect-7.lock").write_text("4194305\n")  # beyond PID_MAX_LIMIT
    with open(run_dir / "protect-7.lock", "a+") as held:
        lock.fcntl.flock(held, lock.fcntl.LOCK_EX)
        with (
            pytest.raises(DomainError, match=r"by process 4194305, which was killed; .* try again"),
            only_one(7, "web"),
        ):
            pass


@pytest.mark.parametrize("room", [0, 1])
def test_a_full_file_system(
    run_dir: Path, cleaned: list[tuple[str, ...]], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told in a sentence, whether it is so at once or later; the next one finds all in order."""

    class Full(io.FileIO):
        room_lines = room

        def write(self, line: Any, /) -> int:
            self.room_lines -= 1
            if self.room_lines < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(line)

    monkeypatch.setattr(lock, "open", lambda path, mode, buffering: Full(path, mode), raising=False)
    with (
        pytest.raises(HostError, match=f"cannot write to {run_dir}.*No space left on device; see `df "),
        only_one(7, "web") as record,
    ):
        record.note_tag("abcdef")
    assert (run_dir / "protect-7.lock").read_text() == ""


def test_a_run_directory_that_cannot_be_made(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_dir / "file").write_text("")
    monkeypatch.setattr(lock, "RUN_DIR", run_dir / "file" / "remus_colo")
    with pytest.raises(HostError, match="Not a directory"), only_one(7, "web"):
        pass
