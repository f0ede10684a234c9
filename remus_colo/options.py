# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the command lines of ``remus`` and ``remusd`` share, and the options that ``remus --colo`` runs with.

A command line becomes one frozen dataclass, or a :class:`~remus_colo.errors.ConfigError` that says what to
change.
"""

from __future__ import annotations

import argparse
import enum
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from remus_colo.errors import ConfigError, ExitStatus

DEFAULT_PORT = 8002  # xend-relocation-port's default
DEFAULT_SSL_PORT = 8003  # xend-relocation-ssl-port's
DEFAULT_INTERVAL_MS = 200
DEFAULT_PERIOD_MS = 10_000
DEFAULT_COMPARE_TIMEOUT_MS = 1_000
DEFAULT_HEARTBEAT_INTERVAL_MS = 250
DEFAULT_HEARTBEAT_TIMEOUT_MS = 2_000
# Fewer, and one heartbeat that is late is taken for a dead host.
HEARTBEATS_PER_TIMEOUT = 3
# Bounds of what the comparison holds; those of docs/comparison.rst if they are not given.
LIMITS = ("held-bytes", "held-packets", "flows", "secondary-bytes", "idle-flow-ms")
# Connections to remusd that are no session yet.
DEFAULT_HALF_OPEN_LIMIT = 32

EXIT_STATUS_HELP = {
    ExitStatus.OK: "done: ended as asked, or because the guest has ended",
    ExitStatus.FAILURE: "an error that has no status of its own",
    ExitStatus.USAGE: "wrong options or configuration",
    ExitStatus.HOST: "this host lacks something: privilege, Xen, a kernel module, a tool",
    ExitStatus.DOMAIN: "the domain does not exist, or cannot be protected as it is",
    ExitStatus.PEER_REFUSED: "the other host refused, and said why",
    ExitStatus.PEER_UNREACHABLE: "the other host does not answer",
    ExitStatus.PROTOCOL: "the other host broke the replication protocol",
    ExitStatus.UNPROTECTED: "protection was lost: the guest goes on here, alone",
    ExitStatus.FENCED: "the backup host has taken over: the guest here was stopped",
    ExitStatus.INTERRUPTED: "interrupted before protection began",
}


class CheckpointChoice(enum.StrEnum):
    TRANSPARENT = "transparent"
    COOPERATIVE = "cooperative"
    AUTO = "auto"  # decided by the difference of the hosts' Xen clocks


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for TLS on the relocation connections.

    :param certificate: this host's, with those that lead to its authority, if any.
    :param authority: certificates that the other host's must be signed by; None: it is not asked who it is, as
        with xend.
    """

    certificate: Path | None = None
    key: Path | None = None
    authority: Path | None = None


@dataclass(frozen=True, slots=True)
class ProtectionOptions:
    """What ``remus`` is to do, with COLO or without. Times are in seconds.

    :param domain: name, domid or UUID.
    :param fence: the hook's command line, empty for none.
    :param tls: None: the connections are plain.
    :param notes: what the user should be told about the options given.
    """

    domain: str
    destination: str = "localhost"
    port: int = DEFAULT_PORT
    heartbeat_interval_s: float = DEFAULT_HEARTBEAT_INTERVAL_MS / 1000
    heartbeat_timeout_s: float = DEFAULT_HEARTBEAT_TIMEOUT_MS / 1000
    fence: tuple[str, ...] = ()
    tls: TlsFiles | None = None
    log: Path | None = None
    status_json: bool = False
    verbose: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_word("the domain", self.domain)
        check_word("the destination", self.destination)
        check_port(self.port)
        check_heartbeat(self.heartbeat_interval_s, self.heartbeat_timeout_s)


@dataclass(frozen=True, slots=True)
class ColoOptions(ProtectionOptions):
    """What ``remus --colo`` is to do.

    :param limits: (name of :data:`LIMITS`, number) for each that is not the default.
    :param period_s: a checkpoint at least so often; None: only when outputs differ.
    :param verify_every: compare both VMs' memory after each so many checkpoints, 0 for never.
    """

    checkpoint: CheckpointChoice = CheckpointChoice.AUTO
    compare_timeout_s: float = DEFAULT_COMPARE_TIMEOUT_MS / 1000
    limits: tuple[tuple[str, int], ...] = ()
    period_s: float | None = DEFAULT_PERIOD_MS / 1000
    verify_every: int = 0

    def __post_init__(self) -> None:
        ProtectionOptions.__post_init__(self)  # slots make a new class, which super() does not know
        if not self.compare_timeout_s > 0:
            raise ConfigError("--compare-timeout must be at least 1 ms")
        if self.period_s is not None and not self.period_s > 0:
            raise ConfigError("--period must be 0 (never) or more ms")


def parse_limits(text: str) -> tuple[tuple[str, int], ...]:
    """``name=number`` with commas between them.

    :raise ConfigError: no such limit, or no number from 1 to 10**12.
    """
    limits = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = part.partition("=")
        if name not in LIMITS:
            raise ConfigError(
                f"--limits: there is no limit {name!r}: give {', '.join(LIMITS[:-1])} or {LIMITS[-1]}"
            )
        if not (number.isascii() and number.isdecimal() and 0 < int(number) <= 10**12):
            raise ConfigError(f"--limits: {name} must be a whole number from 1, got {number!r}")
        limits.append((name, int(number)))
    return tuple(limits)


def check_word(what: str, word: str) -> None:
    """:raise ConfigError: ``word`` can be no name of a domain or host."""
    if not word or word.startswith("-") or any(char.isspace() or not char.isprintable() for char in word):
        raise ConfigError(f"{what} {word!r} is no name")


def check_port(port: int) -> None:
    """:raise ConfigError: no TCP port to connect to."""
    if not 0 < port < 65536:
        raise ConfigError(f"port {port} does not exist: give one from 1 to 65535")


def check_heartbeat(interval_s: float, timeout_s: float) -> None:
    """:raise ConfigError: a heartbeat or two that are late would look like a dead host."""
    if not interval_s > 0:
        raise ConfigError("--heartbeat-interval must be at least 1 ms")
    # whole ms, as on the command line: 0.3 < 3 * 0.1 in floating point
    if round(timeout_s * 1000) < HEARTBEATS_PER_TIMEOUT * round(interval_s * 1000):
        raise ConfigError(
            f"--heartbeat-timeout must be at least {HEARTBEATS_PER_TIMEOUT} times --heartbeat-interval, "
            f"got {timeout_s * 1000:.0f} ms and {interval_s * 1000:.0f} ms"
        )


def split_command(option: str, command: str | None) -> tuple[str, ...]:
    """A hook's command line, split as a shell would, but run without one.

    :raise ConfigError: it cannot be split, or names no program.
    """
    if command is None:
        return ()
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"{option}: {error} in {command!r}") from error
    if not words:
        raise ConfigError(f"{option}: give a program to run")
    return tuple(words)


def check_hook(option: str, command: tuple[str, ...]) -> None:
    """Now, not when the other host is silent: a hook that cannot be run tells nothing, and the guest would
    wait for it for ever.

    :raise ConfigError: there is no such program here.
    """
    if command and shutil.which(command[0]) is None:
        raise ConfigError(f"{option}: there is no program {command[0]!r} that could be run")


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are a ConfigError, and whose help ends with the exit statuses."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


class UnlessZero(argparse.Action):
    """0 is as good as the option not given, as it was to Xen's ``remus``."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values or self.default)


def exit_status_text(*statuses: ExitStatus) -> str:
    """The part of ``--help`` on exit statuses.

    :param statuses: those that the command can end with.
    """
    lines = [f"  {int(status):3d}  {EXIT_STATUS_HELP[status]}" for status in statuses]
    return "\n".join(["exit status:", *lines])


FENCE_HELP = """\
fencing hook:
  CMD is run, without a shell, with two more arguments: the domain's name and
  the other host. It answers by its exit status: 0, the other host does not run
  the guest and will not (it is switched off, say); 1, it does run it; anything
  else, it cannot tell. If one host's hook switches the other host off, give
  both hosts one."""


def add_config_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """What both commands take to find their configuration and TLS files."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="read FILE (default: /etc/xen/xend-config.sxp, if there is one); options win over what it says",
    )
    parser.add_argument("--ssl-key-file", metavar="FILE", type=Path, help="this host's private key, PEM")
    parser.add_argument("--ssl-cert-file", metavar="FILE", type=Path, help="this host's certificate, PEM")
    parser.add_argument(
        "--ssl-ca-file",
        metavar="FILE",
        type=Path,
        help="the other host's certificate must be signed by one in FILE (default: any will do)",
    )


def count(text: str) -> int:
    """An argparse type: a whole number, 0 or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def protection_arguments(given: argparse.Namespace, notes: list[str]) -> dict[str, Any]:
    """A command line's :class:`ProtectionOptions`, by name.

    :raise ConfigError: the hook cannot be split into words.
    """
    return {
        "domain": given.domain,
        "destination": given.destination,
        "port": given.port,
        "heartbeat_interval_s": given.heartbeat_interval / 1000,
        "heartbeat_timeout_s": given.heartbeat_timeout / 1000,
        "fence": split_command("--fence", given.fence),
        "tls": tls_files(given),
        "log": given.log,
        "status_json": given.status_json,
        "verbose": given.verbose,
        "notes": tuple(notes),
    }


def tls_files(given: argparse.Namespace) -> TlsFiles | None:
    """What a command line, with ``--ssl`` or not, says of TLS."""
    return TlsFiles(given.ssl_cert_file, given.ssl_key_file, given.ssl_ca_file) if given.ssl else None


def milliseconds(text: str) -> int:
    """An argparse type: a whole number of milliseconds, 0 or more."""
    return count(text)
