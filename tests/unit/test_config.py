# SPDX-License-Identifier: LGPL-2.1-or-later
"""xend-config.sxp: what counts, what is told, what is refused and in which words; and the command line's word
over it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from remus_colo import cli, config, daemon_options
from remus_colo.config_keys import COLO_KEYS, XEND_KEYS
from remus_colo.errors import ConfigError
from remus_colo.failover.backup import UnknownPolicy
from remus_colo.options import CheckpointChoice, TlsFiles

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "examples" / "xend-config.sxp"
SOURCE = Path("/etc/xen/xend-config.sxp")

Written = Callable[[str], str]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Writes a file; its path, as text."""

    def write(text: str) -> str:
        path = tmp_path / "xend-config.sxp"
        path.write_text(text)
        return str(path)

    return write


# -- the file --------------------------------------------------------------------------------------------


def test_no_file_is_all_defaults() -> None:
    assert config.load() == config.Configuration()
    assert config.load()["xend-relocation-port"] == 8002
    assert config.load().ours("heartbeat-timeout") == 2000


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no configuration file"):
        config.load(tmp_path / "absent.sxp")
    with pytest.raises(ConfigError, match=r"cannot read the configuration file .*: Is a directory"):
        config.load(tmp_path)


def test_the_environment_names_another_file(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(config.ENVIRONMENT, written("(xend-relocation-port 9000)"))
    assert config.load()["xend-relocation-port"] == 9000
    monkeypatch.setenv(config.ENVIRONMENT, "/nonexistent/x.sxp")
    with pytest.raises(ConfigError, match=r"no configuration file /nonexistent/x\.sxp: XEND_CONFIG names it"):
        config.load()
    monkeypatch.delenv(config.ENVIRONMENT)
    assert config.default_path().name == "no-such-file.sxp"


def test_a_file_that_cannot_be_one(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"#" * (config.LIMIT_BYTES + 1))
    with pytest.raises(ConfigError, match="that is no configuration file"):
        config.load(path)


@pytest.mark.parametrize("word", ["yes", "Y", "1", "on", "TRUE", "t"])
def test_what_xend_took_for_yes(word: str) -> None:
    assert config.read(f"(xend-relocation-ssl {word})", SOURCE)["xend-relocation-ssl"] is True


@pytest.mark.parametrize("word", ["no", "N", "0", "off", "False", "f"])
def test_what_xend_took_for_no(word: str) -> None:
    assert config.read(f"(xend-relocation-server {word})", SOURCE)["xend-relocation-server"] is False


def test_a_file_without_a_directory_is_beside_the_configuration() -> None:
    found = config.read("(xend-relocation-server-ssl-key-file a.key)(remus-colo (ssl-ca-file /b/c))", SOURCE)
    assert found["xend-relocation-server-ssl-key-file"] == Path("/etc/xen/a.key")
    assert found.ours("ssl-ca-file") == Path("/b/c")


def test_groups_add_up_and_the_first_of_a_key_counts() -> None:
    found = config.read(
        "(remus-colo (period 1))\n(logfile /a)\n(remus-colo (period 2) (verify 3))\n(logfile /b)", SOURCE
    )
    assert (found.ours("period"), found.ours("verify"), found["logfile"]) == (1, 3, Path("/a"))
    assert found.notes == (
        f"{SOURCE} line 4: logfile is set in line 2 already, and that one counts",
        f"{SOURCE} line 3: period is set in line 1 already, and that one counts",
    )


def test_the_bridge_may_come_from_xends_scripts() -> None:
    assert config.read("(vif-script vif-bridge)", SOURCE).bridge == ""
    assert config.read("(network-script 'network-bridge netdev=eth1 bridge=br1')", SOURCE).bridge == "br1"
    assert config.read("(network-script 'x bridge=br1')(vif-script 'y bridge=br2')", SOURCE).bridge == "br2"
    assert config.read("(vif-script 'y bridge=br2')(remus-colo (bridge br3))", SOURCE).bridge == "br3"


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("(dom0-cpus 0) (xen-api-server ((unix)))", None),
        ("\n(frobnicate 1)", "line 2: nobody knows the key frobnicate"),
        (
            "(xend-relocation-prot 1)",
            "line 1: nobody knows the key xend-relocation-prot; is xend-relocation-port meant?",
        ),
        ("(period 5)", "line 1: nobody knows the key period; it belongs into the group (remus-colo ...)"),
        ("(remus-colo (perriod 5))", "line 1: nobody knows the key perriod; is period meant?"),
        ("logfile", "'logfile' stands alone and says nothing: write (key value)"),
        ("(logfile)", "line 1: logfile has no value, so its default counts"),
        (
            "(xend-relocation-hosts-allow ^a$ ^b$)",
            "line 1: xend-relocation-hosts-allow has more than one value, and only the first counts: put all between quotes",
        ),
        (
            "(xend-relocation-hosts-allow '^a\\.b$')",
            "line 1 column 34: \\. means a lone backslash, as it did to xend: write \\\\. for a backslash and .",
        ),
    ],
)
def test_what_is_told(text: str, note: str | None) -> None:
    notes = config.read(text, SOURCE).notes
    assert [told.removeprefix(str(SOURCE)).lstrip(": ") for told in notes] == ([] if note is None else [note])


def test_a_key_that_is_told_of_stays_on_its_line() -> None:
    notes = config.read("('a\\nb' 1)\n('a\\nb' 2)", SOURCE).notes
    assert [note.removeprefix(f"{SOURCE} ") for note in notes] == [
        "line 1: nobody knows the key 'a\\nb'",
        "line 2: 'a\\nb' is set in line 1 already, and that one counts",
    ]


@pytest.mark.parametrize(
    ("text", "host", "allowed"),
    [
        # from the comments of Xen 3.0's own file
        (r"'^localhost$ ^.*\.example\.org$'", "localhost", True),
        (r"'^localhost$ ^.*\.example\.org$'", "alpha.example.org", False),
        (r"'^localhost$ ^.*\.example\.org$'", "exampleorg", True),
        (r"'^localhost$ ^.*\\.example\\.org$'", "alpha.example.org", True),
        (r"'^[\.h]ost$'", "host", True),
        (r"^10[.]\d", "10.7", True),
        (r"^\\host", "\\host", True),
    ],
)
def test_a_backslash_that_means_nothing_in_a_pattern_is_dropped_as_for_xend(
    text: str, host: str, allowed: bool
) -> None:
    (*patterns,) = config.read(f"(xend-relocation-hosts-allow {text})", SOURCE)["xend-relocation-hosts-allow"]
    assert any(pattern.match(host) for pattern in patterns) is allowed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("(a\n(b)", "line 1 column 1: unexpected end: this list is not closed"),
        ("(a)\n (b))", "line 2 column 5: syntax error: ) without a ("),
        ("\n()", "line 2: a list begins with the name of a key"),
        ("((a))", "line 1: a list begins with the name of a key"),
        (
            "(xend-relocation-port 80x2)",
            "line 1: xend-relocation-port cannot be 80x2: a port from 1 to 65535 is allowed",
        ),
        ("(xend-relocation-port 0)", "xend-relocation-port cannot be 0:"),
        ("(xend-relocation-port ' 1')", "xend-relocation-port cannot be ' 1':"),
        ("(xend-relocation-ssl maybe)", "xend-relocation-ssl cannot be maybe: yes or no is allowed"),
        (
            "(xend-relocation-ssl (yes))",
            "xend-relocation-ssl cannot be (yes): yes or no is allowed, and no list",
        ),
        (
            "(loglevel loud)",
            "loglevel cannot be loud: one of TRACE, DEBUG, INFO, WARNING, WARN, ERROR, CRITICAL, FATAL is allowed",
        ),
        ("(logfile xend.log)", "logfile cannot be xend.log: a path that begins with / is allowed"),
        (
            "(xend-relocation-hosts-allow 'a [')",
            "xend-relocation-hosts-allow cannot be 'a [': it is no regular expression: unterminated character set at position 0",
        ),
        (
            "(remus-colo\n (checkpoint fast))",
            "line 2: checkpoint cannot be fast: transparent, cooperative or auto is allowed",
        ),
        (
            "(remus-colo (unknown-primary die))",
            "unknown-primary cannot be die: stand-down or take-over is allowed",
        ),
        ("(remus-colo (period -1))", "period cannot be -1: a whole number of milliseconds is allowed"),
        ("(remus-colo (half-open-limit 0))", "half-open-limit cannot be 0: a whole number from 1 is allowed"),
        (
            '(remus-colo (fence "it\'s"))',
            'fence cannot be "it\'s": a command, quoted as in a shell is allowed',
        ),
        ("(remus-colo (heartbeat-interval 0))", "heartbeat-interval cannot be 0:"),
        (
            "(remus-colo (interval 0))",
            "interval cannot be 0: a whole number of milliseconds from 1 is allowed",
        ),
        ("(remus-colo\n(compare-timeout 0))", "line 2: compare-timeout cannot be 0:"),
        ("(remus-colo (limits 'flows=0'))", "line 1: limits cannot be 'flows=0': NAME=NUMBER"),
        (
            "\n(xend-relocation-hosts-allow '^10\\.78$')",
            "line 2: xend-relocation-hosts-allow cannot be '^10\\\\78$': it is no regular expression: invalid group reference "
            "78 at position 4; between quotes a backslash is written twice",
        ),
        (
            "(remus-colo (heartbeat-interval 500)\n(heartbeat-timeout 1000))",
            "line 2: heartbeat-timeout cannot be 1000: 3 times heartbeat-interval, which is 500, or more is allowed",
        ),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config.read(text, SOURCE)
    assert str(refused.value).startswith(f"{SOURCE} line ")
    assert said in str(refused.value)


# -- the commands ----------------------------------------------------------------------------------------


def test_the_example_is_without_a_fault() -> None:
    found = config.load(EXAMPLE)
    assert found.notes == ()
    assert found.bridge == "xenbr0"
    daemon = daemon_options.parse(["--config", str(EXAMPLE)])
    assert (daemon.address, daemon.port, daemon.tls) == ("10.78.0.2", 8002, None)
    assert daemon.allows("10.78.0.1") and daemon.allows("10.78.0.9", "alpha.example.org")
    assert not daemon.allows("10.78.0.12")
    assert cli.parse(["--config", str(EXAMPLE), "--colo", "web"]) == cli.parse(["--colo", "web"])


def test_remus_takes_from_the_file_what_is_not_given(written: Written) -> None:
    path = written(
        "(xend-relocation-port 9000)(xend-relocation-ssl-port 9001)(remus-colo (checkpoint cooperative)"
        "(compare-timeout 500)(limits 'flows=7,idle-flow-ms=900')(period 0)(heartbeat-interval 100)(heartbeat-timeout 400)(compression no)(verify 7)"
        "(fence \"/f 'a b'\")(ssl-ca-file /ca))"
    )
    base = ["--colo", "--config", path, "web", "backup"]
    options = cli.parse(base)
    assert (options.port, options.tls, options.checkpoint) == (9000, None, CheckpointChoice.COOPERATIVE)
    assert options.limits == (("flows", 7), ("idle-flow-ms", 900))
    assert (options.compare_timeout_s, options.period_s, options.heartbeat_interval_s) == (0.5, None, 0.1)
    assert (options.heartbeat_timeout_s, options.verify_every) == (0.4, 7)
    assert (options.fence, options.notes) == (("/f", "a b"), ())
    line = (
        "--port 1 --checkpoint auto --period 3 --heartbeat-timeout 9000 --compression --verify 0 --fence /g"
    )
    options = cli.parse([*base, *line.split()])
    assert (options.port, options.checkpoint, options.period_s) == (1, CheckpointChoice.AUTO, 0.003)
    assert (options.heartbeat_timeout_s, options.verify_every) == (9.0, 0)
    assert options.fence == ("/g",)
    tls = cli.parse([*base, "--ssl", "--ssl-cert-file", "/c"])
    assert (tls.port, tls.tls, tls.notes) == (9001, TlsFiles(Path("/c"), None, Path("/ca")), ())
    without_colo = ["--config", path, "web", "backup"]
    assert not cli.parse(without_colo).compression
    assert cli.parse([*without_colo, "--compression"]).compression


def test_xend_relocation_ssl_is_the_senders(written: Written) -> None:
    path = written("(xend-relocation-ssl yes)")
    options = cli.parse(["--colo", "--config", path, "web"])
    assert (options.port, options.tls) == (8003, TlsFiles())
    assert "whoever answers as the destination is believed" in options.notes[0]
    assert cli.parse(["--colo", "--config", path, "--no-ssl", "web"]).tls is None
    assert daemon_options.parse(["--config", path]).tls is None


def test_the_file_and_the_command_line_must_fit_each_other(written: Written) -> None:
    path = written("(remus-colo (heartbeat-timeout 300))")
    with pytest.raises(
        ConfigError, match="--heartbeat-timeout must be at least 3 times --heartbeat-interval"
    ):
        cli.parse(["--colo", "--config", path, "web"])
    cli.parse(["--colo", "--config", path, "--heartbeat-interval", "100", "web"])


def test_remusd_takes_from_the_file_what_is_not_given(written: Written) -> None:
    path = written(
        "(xend-relocation-address eth1)(xend-relocation-port 9000)(xend-relocation-hosts-allow '^a$ ^b$')(logfile /l)"
        "(loglevel trace)(remus-colo (bridge br0)(unknown-primary take-over)(half-open-limit 3)(event-log /e)(fence /f))"
    )
    options = daemon_options.parse(["--config", path])
    assert (options.address, options.port, options.half_open_limit) == ("eth1", 9000, 3)
    assert options.hosts_allow == (re.compile("^a$"), re.compile("^b$"))
    assert (options.log_file, options.log_level, options.log) == (Path("/l"), logging.DEBUG, Path("/e"))
    assert (options.bridge, options.unknown_primary, options.fence) == (
        "br0",
        UnknownPolicy.TAKE_OVER,
        ("/f",),
    )
    line = "-a :: -p 1 --half-open-limit 4 --bridge br1 --unknown-primary stand-down --log /f --log-file /m --fence /g"
    options = daemon_options.parse(["--config", path, *line.split(), "--hosts-allow", ""])
    assert (options.address, options.port, options.half_open_limit, options.hosts_allow) == ("::", 1, 4, ())
    assert (options.bridge, options.unknown_primary, options.fence) == (
        "br1",
        UnknownPolicy.STAND_DOWN,
        ("/g",),
    )
    assert (options.log, options.log_file) == (Path("/f"), Path("/m"))


TLS = "(xend-relocation-ssl-server yes)(xend-relocation-server-ssl-key-file k)(xend-relocation-server-ssl-cert-file c)"
FILES = TlsFiles(Path("/etc/xen/c"), Path("/etc/xen/k"), None)


@pytest.mark.parametrize(
    ("text", "line", "port", "tls"),
    [
        ("", "", 8002, None),
        ("(xend-relocation-server yes)", "", 8002, None),
        (TLS, "", None, FILES),
        (TLS, "--plain", 8002, FILES),
        (TLS + "(xend-relocation-server yes)", "", 8002, FILES),
        (TLS + "(xend-relocation-server yes)", "--no-plain", None, FILES),
        (TLS + "(xend-relocation-server no)", "", None, FILES),
        (TLS, "--no-ssl", 8002, None),
        ("", "--ssl --ssl-key-file /etc/xen/k --ssl-cert-file /etc/xen/c", None, FILES),
    ],
)
def test_with_tls_and_without(
    text: str, line: str, port: int | None, tls: TlsFiles | None, written: Written
) -> None:
    options = daemon_options.parse(["--config", written(text), *line.split()])
    assert (options.port, options.tls) == (port, tls)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("(xend-relocation-server no)", "", "there is nothing to listen at"),
        (
            "(xend-relocation-ssl-server yes)",
            "",
            "give --ssl-key-file, or set xend-relocation-server-ssl-key-file",
        ),
        (TLS, "--plain -p 8003", "port 8003 cannot be served both with TLS and without"),
        ("", "--half-open-limit 0", "--half-open-limit must be at least 1"),
    ],
)
def test_what_remusd_refuses(text: str, line: str, said: str, written: Written) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        daemon_options.parse(["--config", written(text), *line.split()])


def test_a_broken_file_does_not_hide_the_help(written: Written, capsys: pytest.CaptureFixture[str]) -> None:
    path = written("(")
    assert cli.main(["--config", path, "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: remus ")
    assert cli.main(["--config", path, "--colo", "web"]) == 2
    assert capsys.readouterr().err == (
        f"remus: error: {path} line 1 column 1: unexpected end: this list is not closed\n"
    )


def test_a_mapped_address_is_matched_as_ipv4() -> None:
    options = daemon_options.DaemonOptions(hosts_allow=daemon_options.compile_hosts(r"^10\.7\.0\.1$"))
    assert options.allows("::ffff:10.7.0.1")
    assert not options.allows("::ffff:10.7.0.2")
    assert not options.allows("fe80::1%eth0")


# -- the documentation ---------------------------------------------------------------------------------------

ROW = re.compile(r"^``(?P<key>[a-z-]+)`` +(?P<use>remus|remusd|both) +(?P<default>``\S*``|-) +\S", re.M)


def test_the_documents_have_every_key_with_its_default_and_use() -> None:
    text = (REPOSITORY / "docs" / "configuration.rst").read_text()
    rows = {
        row["key"]: (row["use"], "" if row["default"] == "-" else row["default"].strip("`"))
        for row in ROW.finditer(text)
    }
    assert rows == {name: (str(key.use), key.default) for name, key in (XEND_KEYS | COLO_KEYS).items()}
