# SPDX-License-Identifier: LGPL-2.1-or-later
"""remusd as a service: what systemd and its journal see, and the classic way into the background."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from remus_colo import daemon, service
from remus_colo.errors import ConfigError, ExitStatus, HostError

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 30.0


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """As it was, afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield root
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:], root.level = handlers, level


# -- systemd ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(abstract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"@remus_colo-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + name[1:] if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        service.notify("READY=1")
        assert systemd.recv(100) == b"READY=1"


def test_systemd_need_not_be_there(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    service.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "vsock:2:1234")
    service.notify("READY=1")
    assert caplog.records == []
    monkeypatch.setenv("NOTIFY_SOCKET", "/no/such/socket")
    service.notify("READY=1")
    assert "cannot tell systemd 'READY=1'" in caplog.text


def test_the_journal_gets_priorities() -> None:
    formatter = service.JournalFormatter("%(name)s: %(message)s")
    for level, priority in ((50, 2), (40, 3), (30, 4), (20, 6), (10, 7), (5, 7)):
        record = logging.LogRecord("a.b", level, "", 0, "what is wrong", None, None)
        record.exc_text = "Traceback:\n  Error"
        lines = ("a.b: what is wrong", "Traceback:", "  Error")
        assert formatter.format(record).splitlines() == [f"<{priority}>{line}" for line in lines]


def test_no_peer_writes_lines_of_its_own() -> None:
    said = "the primary: \x1b[2J\n<2>all is well\r \udcff caf\xe9"
    record = logging.LogRecord("a", 20, "", 0, "%s", (said,), None)
    shown = r"the primary: \x1b[2J\n<2>all is well\r \udcff café"
    for formatter in (service.LineFormatter("%(message)s"), service.JournalFormatter("%(message)s")):
        assert formatter.format(record).removeprefix("<6>") == shown


def test_the_journal_is_known_by_its_inode() -> None:
    found = os.fstat(2)
    assert service.is_journal(2, f"{found.st_dev}:{found.st_ino}")
    assert not service.is_journal(2, f"{found.st_dev}:{found.st_ino + 1}")
    assert not service.is_journal(2, None)
    assert not service.is_journal(10_000, "1:2")


# -- files -----------------------------------------------------------------------------------------------


def test_the_log_file(tmp_path: Path, root_logger: logging.Logger) -> None:
    path = tmp_path / "xen" / "xend.log"
    service.set_up_logging(logging.INFO, path)
    logging.getLogger("remus_colo.x").info("hello")
    logging.getLogger("remus_colo.x").debug("not this")
    (line,) = path.read_text().splitlines()
    assert re.fullmatch(rf"\[\S+ \S+ {os.getpid()}\] INFO \(test_service:\d+\) hello", line)


def test_a_log_file_that_cannot_be_written(root_logger: logging.Logger) -> None:
    with pytest.raises(ConfigError, match="cannot write the logfile /proc/nowhere/log"):
        service.set_up_logging(logging.INFO, Path("/proc/nowhere/log"))


def test_the_pid_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with service.pid_file(Path("pid")):
        assert (tmp_path / "pid").read_text() == f"{os.getpid()}\n"
        monkeypatch.chdir("/")
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(ConfigError, match="cannot write the pid file"),
        service.pid_file(Path("/proc/nowhere/pid")),
    ):
        pass
    with service.pid_file(None):
        pass


# -- into the background ---------------------------------------------------------------------------------

BEGIN = """
import logging, os, signal, sys, time
from pathlib import Path
from remus_colo import daemon, service
folder = Path(sys.argv[1])
service.set_up_logging(logging.INFO, folder / "log")
background = service.Background()
"""


def command(program: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BEGIN + program, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_the_command_ends_when_the_service_is_ready(tmp_path: Path) -> None:
    program = """
print("before", flush=True)
background.ready()
logging.warning("after")
print("lost", flush=True)
with service.pid_file(folder / "pid"):
    signal.pause()
"""
    # its pipes end with the command only if the service has let them go
    done = command(program, tmp_path)
    assert (done.returncode, done.stdout) == (0, "before\n")
    deadline_s = time.monotonic() + PATIENCE_S
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    pid = int((tmp_path / "pid").read_text())
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.getsid(pid) == pid
    os.kill(pid, signal.SIGKILL)
    assert (tmp_path / "log").read_text().endswith("after\n")


@pytest.mark.parametrize(
    ("end", "status"), [("sys.exit(3)", 3), ("raise SystemExit", 1), ("os.kill(os.getpid(), 9)", 1)]
)
def test_the_command_ends_with_the_service_that_could_not_begin(
    end: str, status: int, tmp_path: Path
) -> None:
    done = command(f"print('cannot', file=sys.stderr, flush=True)\n{end}\n", tmp_path)
    assert (done.returncode, done.stderr) == (status, "cannot\n")


def test_a_second_remusd_leaves_the_firsts_pid_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds the port taken, and nothing else tells that the first one is there."""

    def taken(options: object) -> None:
        raise HostError("cannot listen on * port 8002: Address already in use")

    monkeypatch.setattr(daemon, "Daemon", taken)
    monkeypatch.setattr(daemon, "check_root", lambda command: None)
    monkeypatch.setattr(daemon.bindings, "lowlevel", lambda name: None)
    monkeypatch.setattr(daemon.kmod, "load", lambda module, purpose: None)
    monkeypatch.setattr(daemon.service, "set_up_logging", lambda level, log_file: None)
    pid = tmp_path / "pid"
    pid.write_text("77\n")
    assert daemon.main(["--foreground", "--pid-file", str(pid)]) == ExitStatus.HOST
    assert pid.read_text() == "77\n"
