# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command lines of remus and remusd: what they mean, and one clear sentence for what they cannot mean."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from remus_colo import cli, daemon, daemon_options
from remus_colo._version import __version__
from remus_colo.daemon_options import DaemonOptions
from remus_colo.errors import ConfigError, DomainError, ExitStatus
from remus_colo.failover.backup import UnknownPolicy
from remus_colo.options import EXIT_STATUS_HELP, CheckpointChoice, ColoOptions

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, root: None) -> Callable[[Callable[[ColoOptions], int]], None]:
    """Puts a function in the place of the primary host's session."""

    def install(run: Callable[[ColoOptions], int]) -> None:
        module = types.ModuleType("remus_colo.primary")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "remus_colo.primary", module)

    return install


# -- remus ----------------------------------------------------------------------------------------


def test_defaults() -> None:
    assert cli.parse(["--colo", "web"]) == ColoOptions(
        domain="web",
        destination="localhost",
        port=8002,
        checkpoint=CheckpointChoice.AUTO,
        compare_timeout_s=1.0,
        period_s=10.0,
        heartbeat_interval_s=0.25,
        heartbeat_timeout_s=2.0,
    )


def test_everything_given() -> None:
    line = (
        "--colo -p 9000 --checkpoint cooperative --compare-timeout 500 --limits flows=9,held-bytes=5 "
        "--period 0 --heartbeat-interval 100 --heartbeat-timeout 300 --verify 5 --log /tmp/x --status-json --verbose web backup"
    )
    assert cli.parse([*line.split(), "--fence", "/sbin/fence 'a b'"]) == ColoOptions(
        domain="web",
        destination="backup",
        port=9000,
        checkpoint=CheckpointChoice.COOPERATIVE,
        compare_timeout_s=0.5,
        limits=(("flows", 9), ("held-bytes", 5)),
        period_s=None,
        heartbeat_interval_s=0.1,
        heartbeat_timeout_s=0.3,
        verify_every=5,
        fence=("/sbin/fence", "a b"),
        log=Path("/tmp/x"),
        status_json=True,
        verbose=True,
    )


@pytest.mark.parametrize(
    "line",
    [
        "web backup --colo -p 9000",
        "web --colo backup -p 9000",
        "web -p 9000 --colo backup",
        "--colo --port=9000 web backup",
        "--colo -p9000 web backup",
        "--colo --por 9000 -- web backup",
    ],
)
def test_options_may_stand_anywhere_and_be_shortened_as_ever(line: str) -> None:
    options = cli.parse(line.split())
    assert (options.domain, options.destination, options.port) == ("web", "backup", 9000)


def test_classic_options_without_a_meaning_for_colo_are_noted() -> None:
    options = cli.parse(["-i", "100", "--timer", "--no-compression", "--colo", "web", "backup"])
    assert options.notes == (
        "--interval is not used with --colo: see --period",
        "--timer is not used with --colo",
        "--no-compression is not used with --colo",
    )
    options = cli.parse(["--compression", "--colo", "web", "backup"])
    assert options.notes == ("--compression is not used with --colo",)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--colo --no-disk web", "--no-disk cannot be used with --colo"),
        ("--colo", "required: domain"),
        ("--colo a b c", "unrecognized arguments: c"),
        ("--colo --blackhole web", "--blackhole cannot be used with --colo"),
        ("--colo --no-net web", "--no-net cannot be used with --colo"),
        ("--colo -p -1 web", "port -1 does not exist"),
        ("--colo -p 65536 web", "port 65536 does not exist"),
        ("--colo -p http web", "-p/--port: invalid int value: 'http'"),
        ("--colo -i -5 web", "-5 is negative"),
        ("--colo -i soon web", "--interval: invalid milliseconds value: 'soon'"),
        ("--colo --checkpoint fast web", "--checkpoint: invalid choice: 'fast'"),
        ("--colo --compare-timeout 0 web", "--compare-timeout must be at least 1 ms"),
        (
            "--colo --limits bytes=5 web",
            "--limits: there is no limit 'bytes': give held-bytes, held-packets, flows,",
        ),
        ("--colo --limits flows=0 web", "--limits: flows must be a whole number from 1, got '0'"),
        ("--colo --limits flows web", "--limits: flows must be a whole number from 1, got ''"),
        ("--colo --heartbeat-interval 0 web", "--heartbeat-interval must be at least 1 ms"),
        (
            "--colo --heartbeat-interval 500 --heartbeat-timeout 1000 web",
            "--heartbeat-timeout must be at least 3 times --heartbeat-interval, got 1000 ms and 500 ms",
        ),
        ("--colo --fence ' web", "--fence: No closing quotation"),
        ("--colo --frobnicate web", "unrecognized arguments: --frobnicate"),
    ],
)
def test_bad_options_end_with_status_2_and_one_sentence(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(line.split()) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("remus: error: ")
    assert error.count("\n") == 1
    assert said in error


@pytest.mark.parametrize(
    ("domain", "destination"), [("", "b"), ("a b", "b"), ("a", ""), ("a", "-b"), ("a", "b\n")]
)
def test_names(domain: str, destination: str) -> None:
    with pytest.raises(ConfigError, match="is no name"):
        ColoOptions(domain, destination)


def test_an_empty_hook_is_refused() -> None:
    with pytest.raises(ConfigError, match="give a program to run"):
        cli.parse(["--colo", "--fence", " ", "web"])


@pytest.mark.parametrize("main", [cli.main, daemon.main], ids=["remus", "remusd"])
@pytest.mark.parametrize("name", ["no-such-hook", "/no/such/hook", "{tmp}/plain", "{tmp}"])
def test_a_hook_that_cannot_be_run_is_refused_at_the_start(
    root: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    main: Callable[[list[str]], int],
    name: str,
) -> None:
    (tmp_path / "plain").write_text("not to be executed")
    hook = name.format(tmp=tmp_path)
    domain = ["web"] if main is cli.main else ["--foreground"]
    assert main(["--fence", f"{hook} now", *domain]) == ExitStatus.USAGE
    assert f": error: --fence: there is no program '{hook}'" in capsys.readouterr().err


def test_not_root(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cli.main(["--colo", "web"]) == 3
    assert (
        capsys.readouterr().err
        == "remus: error: remus needs root, for Xen and for the network: run it with sudo\n"
    )


def test_the_session_gets_the_options_and_gives_the_status(
    session: Callable[[Callable[[ColoOptions], int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    got = []

    def run(options: ColoOptions) -> int:
        got.append(options)
        return ExitStatus.FENCED

    session(run)
    assert cli.main(["--colo", "-i", "5", "web", "backup"]) == 9
    assert got == [cli.parse(["--colo", "-i", "5", "web", "backup"])]
    assert capsys.readouterr().err == "remus: note: --interval is not used with --colo: see --period\n"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (DomainError("no domain 'web': see xl list"), 4, "remus: error: no domain 'web': see xl list\n"),
        (KeyboardInterrupt(), 130, "remus: interrupted\n"),
        (
            ZeroDivisionError("oops"),
            1,
            "remus: error: this is a bug: ZeroDivisionError: oops; "
            "run it again with --verbose and report this\n",
        ),
    ],
)
def test_errors_become_one_sentence_and_a_status(
    session: Callable[[Callable[[ColoOptions], int]], None],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    said: str,
) -> None:
    def run(options: ColoOptions) -> int:
        raise error

    session(run)
    assert cli.main(["--colo", "web"]) == status
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_what_would_kill_it_before_protection_begins_ends_it_in_order(
    session: Callable[[Callable[[ColoOptions], int]], None], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """With what it has begun undone, and the status that is documented; a guard would have to do it otherwise."""
    number = getattr(signal, name)
    undone = []

    def run(options: ColoOptions) -> int:
        try:
            os.kill(os.getpid(), number)
            return ExitStatus.OK
        finally:
            undone.append(True)

    def killed(*_: object) -> None:
        pytest.fail("nobody has taken the signal")

    session(run)
    before = signal.signal(number, killed)
    try:
        assert cli.main(["--colo", "web"]) == ExitStatus.INTERRUPTED
        assert signal.getsignal(number) is killed
    finally:
        signal.signal(number, before)
    assert undone == [True]
    assert capsys.readouterr().err == "remus: interrupted\n"


def test_verbose_shows_where_an_error_comes_from(
    session: Callable[[Callable[[ColoOptions], int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(options: ColoOptions) -> int:
        raise DomainError("no domain 'web'")

    session(run)
    assert cli.main(["--colo", "-v", "web"]) == 4
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("\nremus: error: no domain 'web'\n")


def test_a_missing_library_is_the_hosts_fault(
    root: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "remus_colo.primary", None)
    assert cli.main(["--colo", "web"]) == 3
    assert "cannot load remus_colo.primary" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"remus {__version__}\n"


def test_help_documents_every_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(EXIT_STATUS_HELP) == set(ExitStatus)
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for status, words in EXIT_STATUS_HELP.items():
        assert f"{int(status):3d}  {words}\n" in text


def test_help_needs_no_xen_and_no_library() -> None:
    """Only the standard library is loaded before the command line is known to be right."""
    program = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['cffi', 'pyxs', 'pyroute2', 'netfilterqueue', 'xen']))\n"
        "from remus_colo import cli\n"
        "sys.exit(cli.main(['--help']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: remus [options] domain [destination]\n")


# -- remusd ---------------------------------------------------------------------------------------


def test_daemon_defaults() -> None:
    assert daemon_options.parse([]) == DaemonOptions(
        address="", port=8002, hosts_allow=(), bridge="", fence=(), unknown_primary=UnknownPolicy.STAND_DOWN
    )


def test_daemon_a_port_that_is_named_is_served(tmp_path: Path) -> None:
    (tmp_path / "config.sxp").write_text("(xend-relocation-server no)")
    given = ["--config", str(tmp_path / "config.sxp")]
    with pytest.raises(ConfigError, match="nothing to listen at"):
        daemon_options.parse(given)
    assert daemon_options.parse([*given, "-p", "9000"]).port == 9000


def test_daemon_everything_given() -> None:
    line = "-a 10.7.0.2 -p 9000 --bridge xenbr0 --unknown-primary take-over -f --pid-file /p --log /l -v"
    options = daemon_options.parse(
        [*line.split(), "--fence", "/f x", "--hosts-allow", r"^10\.7\.0\.1$ ^alpha$"]
    )
    assert options == DaemonOptions(
        address="10.7.0.2",
        port=9000,
        hosts_allow=daemon_options.compile_hosts(r"^10\.7\.0\.1$ ^alpha$"),
        bridge="xenbr0",
        fence=("/f", "x"),
        unknown_primary=UnknownPolicy.TAKE_OVER,
        foreground=True,
        log=Path("/l"),
        pid_file=Path("/p"),
        log_level=logging.DEBUG,
        verbose=True,
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("-p 70000", "port 70000 does not exist"),
        ("--hosts-allow [", "--hosts-allow: '\\[' is no regular expression"),
        ("--bridge waytoolongforlinux", "is no name of a network interface"),
        ("--bridge a/b", "is no name of a network interface"),
        ("--bridge ..", "is no name of a network interface"),
        ("--unknown-primary maybe", "--unknown-primary: invalid choice"),
        ("extra", "unrecognized arguments: extra"),
    ],
)
def test_daemon_bad_options(line: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        daemon_options.parse(line.split())


@pytest.mark.parametrize(
    ("patterns", "address", "name", "allowed"),
    [
        ("", "192.0.2.1", "", True),
        ("   ", "192.0.2.1", "", True),
        (r"^localhost$ ^localhost\.localdomain$", "127.0.0.1", "localhost", True),
        (r"^localhost$", "192.0.2.1", "localhost.evil.example", False),
        (r"10\.7\.0\.1", "10.7.0.12", "", True),  # as xend: matched at the beginning only
        (r"0\.1", "10.7.0.1", "", False),
        (r"^$", "192.0.2.1", "", False),  # a host without a name does not match the empty one
        (r"^alpha$ ^10\.7\.0\.1$", "10.7.0.1", "", True),
    ],
)
def test_hosts_allow_is_xends(patterns: str, address: str, name: str, allowed: bool) -> None:
    options = DaemonOptions(hosts_allow=daemon_options.compile_hosts(patterns))
    assert options.allows(address, name) is allowed


def test_daemon_help_documents_its_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        daemon_options.parse(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "    3  this host lacks something" in text
    assert "fencing hook:" in text
