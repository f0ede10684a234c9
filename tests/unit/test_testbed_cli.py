# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line: what it accepts, and how it ends when there is nothing to work on."""

import os
import signal
import subprocess

import pytest

from remus_colo.errors import ExitStatus
from remus_colo.testbed import bed_logs, cli
from remus_colo.testbed.bed import Bed, bed_names
from remus_colo.testbed.errors import BedError
from remus_colo.testbed.network import BedNetwork
from remus_colo.testbed.qemu import Host
from remus_colo.testbed.ssh import Remote


@pytest.fixture(autouse=True)
def signals():
    """main() sets handlers: put them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(tmp_path):
    def call(*words):
        return cli.main(["--bed", f"unit-{os.getpid()}", "--state", str(tmp_path), *words])

    return call


@pytest.mark.parametrize(
    "words",
    [
        ("exec", "primary", "--", "true"), ("push", "backup", "/etc/hostname", "/tmp/x"), ("link", "down"),
        ("client", "--", "true"), ("sync",), ("skew",), ("boot", "primary"), ("kill", "primary"),
        ("pause", "backup"), ("resume", "backup"), ("console", "nohost"), ("console", "primary/web"),
        ("console", "primary"), ("console", "web"), ("logs", "/nonexistent/logs"),
    ],
)  # fmt: skip
def test_without_a_bed_each_command_says_so(run, capsys, words):
    assert run(*words) == ExitStatus.HOST
    said = capsys.readouterr().err
    assert said.startswith("testbed: ")
    assert len(said.splitlines()) == 1


def test_status_of_a_bed_that_is_not_up(run, capsys):
    assert run("status") == 1
    assert "not up" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ("exec", "third", "--", "true"), ("link", "sideways"), (), ("up", "--skew", "x"), ("up", "--skew", "nan"),
        ("up", "--memory", "500"), ("up", "--dom0-memory", "0"), ("exec", "primary"), ("exec", "primary", "--"),
        ("client",), ("client", "--"),
    ],
)  # fmt: skip
def test_wrong_usage_is_refused(run, words):
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == ExitStatus.USAGE


def test_words_after_the_dashes_are_the_command():
    args = cli.parser().parse_args(["exec", "primary", "--", "ls", "-l", "--", "x"])
    assert cli._words(args.words) == ["ls", "-l", "--", "x"]


@pytest.mark.parametrize(
    ("state", "remedy"), [("paused", "'resume primary'"), ("off", "'boot primary'"), ("booting", "")]
)
def test_a_host_that_does_not_answer_is_not_waited_for(run, capsys, monkeypatch, state, remedy):
    """A command in a frozen host would hang until that goes on."""
    monkeypatch.setattr(BedNetwork, "exists", lambda network: True)
    monkeypatch.setattr(Host, "state", lambda host: state)
    monkeypatch.setattr(cli, "_become", lambda argv: pytest.fail("it is being waited for"))
    monkeypatch.setattr(Remote, "connect", lambda remote: None)
    assert run("exec", "primary", "--", "true") == ExitStatus.HOST
    said = capsys.readouterr().err
    assert f"primary is {state}" in said
    assert remedy in said


def test_a_directory_that_cannot_be_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["--state", str(tmp_path / "file"), "status"]) == ExitStatus.HOST
    said = capsys.readouterr().err
    assert str(tmp_path / "file") in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("name", ["", "Upper", "a/b", "..", "x" * 32, "-x"])
def test_names_that_cannot_be_in_a_namespace_or_path_are_refused(name, tmp_path):
    with pytest.raises(BedError, match="no name for a bed"):
        Bed(name, tmp_path)


def test_beds_are_listed_by_their_state(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one.lock").write_text("")
    for other in ("documents", "lost+found"):
        (tmp_path / other).mkdir()
    (tmp_path / "documents" / "thesis").write_text("")
    assert bed_names(tmp_path) == ["one"]
    assert bed_names(tmp_path / "none") == []


@pytest.mark.parametrize("words", [("down",), ("clean",), ("clean", "--all")])
def test_what_is_no_bed_is_not_removed(run, tmp_path, capsys, monkeypatch, words):
    """A home directory, say, to which --state leads by mistake."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    mine = tmp_path / f"unit-{os.getpid()}" / "primary"
    mine.mkdir(parents=True)
    assert run(*words) == (0 if "--all" in words else ExitStatus.HOST)
    assert mine.exists()
    assert ("something else than a bed" in capsys.readouterr().err) is ("--all" not in words)


@pytest.mark.parametrize("left", ["all", "record", "nothing"])
def test_what_a_crash_has_left_of_a_bed_is_removed(run, tmp_path, monkeypatch, left):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    directory = tmp_path / f"unit-{os.getpid()}"
    directory.mkdir()
    if left != "nothing":
        (directory / "bed.json").write_text("{}")
    if left == "all":
        (directory / "primary").mkdir()
        (directory / "primary" / "serial.log").write_text("x")
    assert run("clean") == 0
    assert not directory.exists()


class Dom0:
    """Runs what is to be run in a host here, with the consoles below ``folder``."""

    def __init__(self, host, folder, domains=()):
        self.host, self.folder, self.domains = host, folder, domains

    def run(self, command, *, timeout_s):
        xl = f"xl() {{ case $2 in {'|'.join(self.domains) or '-'}) echo 1;; *) return 1;; esac; }}; "
        done = subprocess.run(
            ["sh", "-c", xl + command], cwd=self.folder, capture_output=True, text=True, timeout=timeout_s
        )
        assert done.returncode == 0
        return done


def test_a_guest_is_found_where_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(bed_logs, "GUEST_LOG", "guest-{domain}.log")
    hosts = {name: tmp_path / name for name in ("primary", "backup")}
    for folder in hosts.values():
        folder.mkdir()
    (hosts["primary"] / "guest-web.log").write_text("")
    (hosts["backup"] / "guest-web--secondary.log").write_text("")
    protected = [Dom0("primary", hosts["primary"], ["web"]), Dom0("backup", hosts["backup"])]
    assert bed_logs._find_guest(protected, "web") == (protected[0], "guest-web.log")
    over = [Dom0("primary", hosts["primary"]), Dom0("backup", hosts["backup"], ["web"])]
    assert bed_logs._find_guest(over, "web") == (over[1], "guest-web--secondary.log")
    ended = [Dom0("primary", hosts["primary"])]
    assert bed_logs._find_guest(ended, "web") == (ended[0], "guest-web.log")
    with pytest.raises(BedError, match="there is no guest 'other' on primary or backup"):
        bed_logs._find_guest(protected, "other")
