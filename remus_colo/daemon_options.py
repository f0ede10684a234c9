# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line of ``remusd``, the backup host's receiver."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from remus_colo import options as defaults
from remus_colo._version import __version__
from remus_colo.errors import ConfigError, ExitStatus
from remus_colo.failover.backup import UnknownPolicy
from remus_colo.options import Parser, check_port, split_command

# IFNAMSIZ of linux/if.h, less the terminating zero; dev_valid_name() in net/core/dev.c
_INTERFACE_NAME = re.compile(r"(?!\.{1,2}$)[^\s/:]{1,15}")

DESCRIPTION = """\
Waits on the relocation port for hosts that protect a domain with "remus --colo
domain this-host", runs the second copy of the guest, and takes over when the
other host dies. Whoever may connect can start domains here: limit the port to
the replication link with --address, and to known hosts with --hosts-allow."""


@dataclass(frozen=True, slots=True)
class DaemonOptions:
    """What ``remusd`` is to do.

    :param address: to listen at; empty: every address of this host.
    :param hosts_allow: patterns of hosts that may connect; empty: every host.
    :param bridge: the LAN bridge of a guest whose configuration names none.
    :param fence: the hook's command line, empty for none.
    """

    address: str = ""
    port: int = defaults.DEFAULT_PORT
    hosts_allow: tuple[re.Pattern[str], ...] = ()
    bridge: str = ""
    fence: tuple[str, ...] = ()
    unknown_primary: UnknownPolicy = UnknownPolicy.STAND_DOWN
    foreground: bool = False
    log: Path | None = None
    pid_file: Path | None = None
    verbose: bool = False

    def __post_init__(self) -> None:
        check_port(self.port)
        if self.bridge and not _INTERFACE_NAME.fullmatch(self.bridge):
            raise ConfigError(f"--bridge: {self.bridge!r} is no name of a network interface")

    def allows(self, address: str, name: str = "") -> bool:
        """Whether a host may connect, as xend decided for ``xend-relocation-hosts-allow``.

        A pattern has to match at the beginning of the address or of the name, so that one without a final
        ``$`` allows more than it shows.

        :param address: the peer's address, as text.
        :param name: its fully qualified name, empty if it has none.
        """
        if not self.hosts_allow:
            return True
        return any(pattern.match(host) for pattern in self.hosts_allow for host in (name, address) if host)


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
        epilog=f"{defaults.FENCE_HELP}\n\n{defaults.exit_status_text(*statuses)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-a", "--address", default="", help="listen at ADDRESS only (default: at all)")
    parser.add_argument(
        "-p", "--port", type=int, default=defaults.DEFAULT_PORT, help="relocation port (default %(default)s)"
    )
    parser.add_argument(
        "--hosts-allow",
        metavar="REGEXPS",
        default="",
        help="hosts that may connect: regular expressions with blanks between them, matched against name and "
        "address (default: every host)",
    )
    parser.add_argument("--bridge", default="", help="LAN bridge for a guest whose configuration names none")
    parser.add_argument(
        "--fence",
        metavar="CMD",
        help="ask CMD whether a silent primary host is dead, before taking over; see below",
    )
    parser.add_argument(
        "--unknown-primary",
        metavar="POLICY",
        choices=[policy.value for policy in UnknownPolicy],
        default=UnknownPolicy.STAND_DOWN.value,
        help="if nobody can tell whether the primary host is dead: stand-down (default; the guest may stop) "
        "or take-over (it may run twice)",
    )
    parser.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground")
    parser.add_argument("--pid-file", metavar="FILE", type=Path, help="write the process id to FILE")
    parser.add_argument("--log", metavar="FILE", type=Path, help="append every event to FILE, as JSON lines")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="say more, and show where errors come from"
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def parse(argv: Sequence[str]) -> DaemonOptions:
    """The options of a command line.

    :raise ConfigError: they are wrong.
    :raise SystemExit: --help or --version, which have been printed.
    """
    given = build_parser().parse_args(argv)
    return DaemonOptions(
        address=given.address,
        port=given.port,
        hosts_allow=compile_hosts(given.hosts_allow),
        bridge=given.bridge,
        fence=split_command("--fence", given.fence),
        unknown_primary=UnknownPolicy(given.unknown_primary),
        foreground=given.foreground,
        log=given.log,
        pid_file=given.pid_file,
        verbose=given.verbose,
    )
