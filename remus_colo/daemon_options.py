# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line of ``remusd``, the backup host's receiver, and what the configuration file adds to it."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remus_colo import options as defaults
from remus_colo._version import __version__
from remus_colo.config import Configuration
from remus_colo.config import load as load_config
from remus_colo.errors import ConfigError, ExitStatus
from remus_colo.failover.backup import UnknownPolicy
from remus_colo.options import Parser, TlsFiles, check_port, split_command, tls_files

# IFNAMSIZ of linux/if.h, less the terminating zero; dev_valid_name() in net/core/dev.c
_INTERFACE_NAME = re.compile(r"(?!\.{1,2}$)[^\s/:]{1,15}")

# xend's names of levels, and logging's
_LEVELS = {"TRACE": "DEBUG", "WARN": "WARNING", "FATAL": "CRITICAL"}

DESCRIPTION = """\
Waits on the relocation port for hosts that protect a domain with "remus domain
this-host", and takes over when such a host dies. Until then it keeps the guest's
last checkpoint or, with --colo, runs a second copy of the guest. Whoever may
connect can start domains here: limit the port to the replication link with
--address, and to known hosts with --hosts-allow."""

STOPPING = """\
when it is told to end (SIGTERM, or Ctrl-C with --foreground):
  A guest that it has taken over goes on: it is this host's domain. Of a guest
  that is protected the second copy is destroyed and the primary host told; there
  the guest goes on, unprotected. If a primary host is silent at that moment,
  what is to become of its guest is decided first."""


@dataclass(frozen=True, slots=True)
class DaemonOptions:
    """What ``remusd`` is to do.

    :param address: to listen at; empty: every address of this host. May also be a host's name or a network
        interface's, as for xend.
    :param port: None: the relocation port is not served without TLS.
    :param ssl_port: the one that is served with TLS, unless ``tls`` is None.
    :param hosts_allow: patterns of hosts that may connect; empty: every host.
    :param half_open_limit: connections at a time that are no session yet.
    :param bridge: the LAN bridge of a guest whose configuration names none.
    :param fence: the hook's command line, empty for none.
    :param log: the event log.
    :param log_file: gets what is said on the standard error, too, from ``log_level`` (of :mod:`logging`) up.
    :param notes: what the user should be told about the options given.
    """

    address: str = ""
    port: int | None = defaults.DEFAULT_PORT
    ssl_port: int = defaults.DEFAULT_SSL_PORT
    tls: TlsFiles | None = None
    hosts_allow: tuple[re.Pattern[str], ...] = ()
    half_open_limit: int = defaults.DEFAULT_HALF_OPEN_LIMIT
    bridge: str = ""
    fence: tuple[str, ...] = ()
    unknown_primary: UnknownPolicy = UnknownPolicy.STAND_DOWN
    foreground: bool = False
    log: Path | None = None
    pid_file: Path | None = None
    log_file: Path | None = None
    log_level: int = logging.INFO
    verbose: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for port in (self.port, self.ssl_port):
            if port is not None:
                check_port(port)
        if self.port is None and self.tls is None:
            raise ConfigError(
                "there is nothing to listen at: set xend-relocation-server or xend-relocation-ssl-server to yes"
            )
        if self.tls is not None:
            self._check_tls(self.tls)
        if self.half_open_limit < 1:
            raise ConfigError("--half-open-limit must be at least 1, or nobody could connect")
        if self.bridge and not _INTERFACE_NAME.fullmatch(self.bridge):
            raise ConfigError(f"--bridge: {self.bridge!r} is no name of a network interface")

    def _check_tls(self, tls: TlsFiles) -> None:
        if self.port == self.ssl_port:
            raise ConfigError(f"port {self.port} cannot be served both with TLS and without")
        for file, name in ((tls.key, "key"), (tls.certificate, "cert")):
            if file is None:
                raise ConfigError(
                    f"TLS needs this host's key and certificate: give --ssl-{name}-file, "
                    f"or set xend-relocation-server-ssl-{name}-file"
                )

    def allows(self, address: str, name: str = "") -> bool:
        """Whether a host may connect, as xend decided for ``xend-relocation-hosts-allow``.

        A pattern has to match at the beginning of the address or of the name, so that one without a final
        ``$`` allows more than it shows.

        :param address: the peer's address, as text. IPv4 that comes in over IPv6 is matched as IPv4.
        :param name: its fully qualified name, empty if it has none.
        """
        if not self.hosts_allow:
            return True
        address = plain_address(address)
        return any(pattern.match(host) for pattern in self.hosts_allow for host in (name, address) if host)


def plain_address(address: str) -> str:
    """``::ffff:192.0.2.1`` is 192.0.2.1, which is what people write into patterns."""
    try:
        mapped = getattr(ipaddress.ip_address(address.partition("%")[0]), "ipv4_mapped", None)
    except ValueError:
        return address
    return address if mapped is None else str(mapped)


def compile_hosts(text: str) -> tuple[re.Pattern[str], ...]:
    """Patterns out of a list with blanks between them, as in ``xend-config.sxp``.

    :raise ConfigError: one of them is no regular expression.
    """
    patterns = []
    for word in text.split():
        try:
            patterns.append(re.compile(word))
        except re.error as error:
            raise ConfigError(f"--hosts-allow: {word!r} is no regular expression: {error}") from error
    return tuple(patterns)


def build_parser() -> Parser:
    statuses = (ExitStatus.OK, ExitStatus.FAILURE, ExitStatus.USAGE, ExitStatus.HOST)
    parser = Parser(
        prog="remusd",
        description=DESCRIPTION,
        epilog=f"{STOPPING}\n\n{defaults.FENCE_HELP}\n\n{defaults.exit_status_text(*statuses)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    network = parser.add_argument_group("who may connect, and where")
    network.add_argument(
        "-a",
        "--address",
        help="listen at ADDRESS only: an address, a host's name or a network interface's (default: at every address)",
    )
    network.add_argument("-p", "--port", type=int, help=f"relocation port (default {defaults.DEFAULT_PORT})")
    network.add_argument(
        "--hosts-allow",
        metavar="REGEXPS",
        help="hosts that may connect: regular expressions with blanks between them, matched against name and "
        "address (default: every host)",
    )
    network.add_argument(
        "--half-open-limit",
        metavar="N",
        type=int,
        help=f"at most N connections at a time that protect nothing yet (default {defaults.DEFAULT_HALF_OPEN_LIMIT})",
    )
    network.add_argument(
        "--ssl", action=argparse.BooleanOptionalAction, help="serve a port with TLS, or do not"
    )
    network.add_argument(
        "--ssl-port", metavar="PORT", type=int, help=f"that port (default {defaults.DEFAULT_SSL_PORT})"
    )
    network.add_argument(
        "--plain",
        action=argparse.BooleanOptionalAction,
        help="serve the relocation port, or do not (default: if --port, or no --ssl)",
    )

    failover = parser.add_argument_group("failover")
    failover.add_argument("--bridge", help="LAN bridge for a guest whose configuration names none")
    failover.add_argument(
        "--fence",
        metavar="CMD",
        help="ask CMD whether a silent primary host is dead, before taking over; see below",
    )
    failover.add_argument(
        "--unknown-primary",
        metavar="POLICY",
        choices=[policy.value for policy in UnknownPolicy],
        help="if nobody can tell whether the primary host is dead: stand-down (default; the guest may stop) "
        "or take-over (it may run twice)",
    )

    service = parser.add_argument_group("service")
    defaults.add_config_options(service)
    service.add_argument(
        "-f",
        "--foreground",
        action="store_true",
        help="stay in the foreground (else: leave it, once it listens)",
    )
    service.add_argument("--pid-file", metavar="FILE", type=Path, help="write the process id to FILE")
    service.add_argument("--log", metavar="FILE", type=Path, help="append every event to FILE, as JSON lines")
    service.add_argument(
        "--log-file", metavar="FILE", type=Path, help="append what is said to FILE, too (the classic logfile)"
    )
    service.add_argument(
        "-v", "--verbose", action="store_true", help="say more, and show where errors come from"
    )
    service.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def from_file(config: Configuration) -> dict[str, Any]:
    """What a configuration says, as defaults of the command line."""
    return {
        "address": config["xend-relocation-address"],
        "port": config["xend-relocation-port"],
        "ssl": config["xend-relocation-ssl-server"],
        "ssl_port": config["xend-relocation-ssl-port"],
        "ssl_key_file": config["xend-relocation-server-ssl-key-file"],
        "ssl_cert_file": config["xend-relocation-server-ssl-cert-file"],
        "ssl_ca_file": config.ours("ssl-ca-file"),
        "half_open_limit": config.ours("half-open-limit"),
        "bridge": config.bridge,
        "fence": shlex.join(config.ours("fence")) or None,
        "unknown_primary": config.ours("unknown-primary"),
        "log": config.ours("event-log"),
        "log_file": config["logfile"],
    }


def parse(argv: Sequence[str]) -> DaemonOptions:
    """The options of a command line, and of the configuration file.

    :raise ConfigError: they are wrong.
    :raise SystemExit: --help or --version, which have been printed.
    """
    parser = build_parser()
    # first for --config, and so that nothing is read for a command line that is wrong, or wants --help
    typed = parser.parse_args(argv)
    config = load_config(typed.config)
    parser.set_defaults(**from_file(config))
    given = parser.parse_args(argv)
    if given.plain is None and typed.port is not None:
        given.plain = True
    elif given.plain is None and "xend-relocation-server" in config.xend:
        given.plain = config["xend-relocation-server"]
    elif given.plain is None:
        # xend's default was no: who asks for TLS means that port alone
        given.plain = not given.ssl
    level = config["loglevel"]
    return DaemonOptions(
        address=given.address,
        port=given.port if given.plain else None,
        ssl_port=given.ssl_port,
        tls=tls_files(given),
        hosts_allow=config["xend-relocation-hosts-allow"]
        if given.hosts_allow is None
        else compile_hosts(given.hosts_allow),
        half_open_limit=given.half_open_limit,
        bridge=given.bridge,
        fence=split_command("--fence", given.fence),
        unknown_primary=UnknownPolicy(given.unknown_primary),
        foreground=given.foreground,
        log=given.log,
        pid_file=given.pid_file,
        log_file=given.log_file,
        log_level=logging.DEBUG
        if given.verbose
        else logging.getLevelNamesMapping()[_LEVELS.get(level, level)],
        verbose=given.verbose,
        notes=config.notes,
    )
