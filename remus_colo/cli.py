# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ``remus`` command: reads its command line, and hands over to the primary host's session."""

from __future__ import annotations

import argparse
import importlib
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remus_colo import options as defaults
from remus_colo import remus_options
from remus_colo._version import __version__
from remus_colo.command import check_root, run_command
from remus_colo.config import Configuration
from remus_colo.config import load as load_config
from remus_colo.errors import ConfigError, ExitStatus, HostError
from remus_colo.options import (
    CheckpointChoice,
    ColoOptions,
    Parser,
    UnlessZero,
    check_hook,
    count,
    milliseconds,
    parse_limits,
    protection_arguments,
)
from remus_colo.outlet import LogOutlet
from remus_colo.remus_options import RemusOptions
from remus_colo.session import signals

log = logging.getLogger(__name__)

DESCRIPTION = """\
Protects a running Xen domain against the loss of this host. Checkpoints go to
the destination, where remusd waits, and the guest's output is held until the
checkpoint that it belongs to is there. If this host dies the guest goes on over
there from the last one, with its memory, its addresses and its connections.
With --colo a second copy of the guest runs there: output that both copies agree
on leaves at once, and a checkpoint is made when they differ. Ctrl-C or SIGTERM
end protection; the guest goes on."""


def build_parser() -> Parser:
    parser = Parser(
        prog="remus",
        usage="%(prog)s [options] domain [destination]",
        description=DESCRIPTION,
        epilog=f"{defaults.FENCE_HELP}\n\n{defaults.exit_status_text(*ExitStatus)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("domain", help="name, domid or UUID of the running domain to protect")
    parser.add_argument(
        "destination",
        nargs="?",
        default="localhost",
        help="backup host; this host if not given, for trying things out",
    )
    _add_classic_options(parser.add_argument_group("options of Remus"))
    _add_colo_options(parser.add_argument_group("COLO"))
    _add_failover_options(parser.add_argument_group("failover"))
    _add_connection_options(parser.add_argument_group("configuration and connection"))
    _add_output_options(parser.add_argument_group("output"))
    return parser


def _add_classic_options(group: argparse._ArgumentGroup) -> None:
    """Those that Xen's ``remus`` had, and one more."""
    group.add_argument(
        "-i",
        "--interval",
        metavar="MS",
        type=milliseconds,
        action=UnlessZero,
        help=f"checkpoint every MS milliseconds (default {defaults.DEFAULT_INTERVAL_MS}; not used with --colo)",
    )
    group.add_argument(
        "-p",
        "--port",
        metavar="PORT",
        type=int,
        action=UnlessZero,
        help=f"relocation port of the destination (default {defaults.DEFAULT_PORT}, "
        f"with --ssl {defaults.DEFAULT_SSL_PORT})",
    )
    group.add_argument("--blackhole", action="store_true", help="replicate to nowhere (not with --colo)")
    group.add_argument("--no-net", action="store_true", help="do not hold network output (not with --colo)")
    group.add_argument(
        "--compression",
        action=argparse.BooleanOptionalAction,
        help="compress checkpoints, or do not (not used with --colo)",
    )
    group.add_argument(
        "--timer",
        action="store_true",
        help="pause the guest by a timer at each interval (not used with --colo)",
    )
    group.add_argument(
        "--no-disk",
        action="store_true",
        help="protect a domain whose disks are not replicated, without them (not with --colo)",
    )


def _add_colo_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--colo", action="store_true", help="compare the output of two running copies")
    group.add_argument(
        "--checkpoint",
        metavar="MODE",
        choices=[str(choice) for choice in CheckpointChoice],
        default=str(CheckpointChoice.AUTO),
        help="transparent, cooperative or auto (default): what the difference of the hosts' clocks allows",
    )
    group.add_argument(
        "--compare-timeout",
        metavar="MS",
        type=milliseconds,
        default=defaults.DEFAULT_COMPARE_TIMEOUT_MS,
        help="checkpoint if a packet's counterpart has not come for MS milliseconds (default %(default)s)",
    )
    group.add_argument(
        "--limits",
        metavar="NAME=N,...",
        default="",
        help="checkpoint if the comparison holds more than that: held-bytes and held-packets of the primary "
        "VM, secondary-bytes of the other, flows; idle-flow-ms forgets flows (docs/comparison.rst has the "
        "defaults)",
    )
    group.add_argument(
        "--period",
        metavar="MS",
        type=milliseconds,
        default=defaults.DEFAULT_PERIOD_MS,
        help="checkpoint every MS milliseconds even if nothing differs (default %(default)s; 0: never)",
    )
    group.add_argument(
        "--verify",
        metavar="N",
        type=count,
        default=0,
        help="after every Nth checkpoint compare the whole memory of both copies, while the guest waits; "
        "for those who doubt (default: never)",
    )


def _add_failover_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--heartbeat-interval",
        metavar="MS",
        type=milliseconds,
        default=defaults.DEFAULT_HEARTBEAT_INTERVAL_MS,
        help="heartbeat every MS milliseconds (default %(default)s)",
    )
    group.add_argument(
        "--heartbeat-timeout",
        metavar="MS",
        type=milliseconds,
        default=defaults.DEFAULT_HEARTBEAT_TIMEOUT_MS,
        help="the other host is lost after MS milliseconds of silence (default %(default)s)",
    )
    group.add_argument("--fence", metavar="CMD", help="ask CMD before the guest goes on alone; see below")


def _add_connection_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ssl",
        action=argparse.BooleanOptionalAction,
        help="speak TLS with the destination, or do not; heartbeats and checkpoints are covered, the guest's "
        "mirrored packets are not",
    )
    defaults.add_config_options(group)


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--log", metavar="FILE", type=Path, help="append every event to FILE, as JSON lines")
    group.add_argument("--status-json", action="store_true", help="show the status as JSON lines")
    group.add_argument(
        "-v", "--verbose", action="store_true", help="say more, and show where errors come from"
    )
    group.add_argument("--version", action="version", version=f"%(prog)s {__version__}")


def from_file(config: Configuration) -> dict[str, Any]:
    """What a configuration says, as defaults of the command line."""
    return {
        "interval": config.ours("interval") if "interval" in config.colo else None,
        "compression": config.ours("compression"),
        "checkpoint": config.ours("checkpoint"),
        "compare_timeout": config.ours("compare-timeout"),
        "limits": config.ours("limits"),
        "period": config.ours("period"),
        "heartbeat_interval": config.ours("heartbeat-interval"),
        "heartbeat_timeout": config.ours("heartbeat-timeout"),
        "verify": config.ours("verify"),
        "fence": shlex.join(config.ours("fence")) or None,
        "ssl": config["xend-relocation-ssl"],
        "ssl_key_file": config["xend-relocation-server-ssl-key-file"],
        "ssl_cert_file": config["xend-relocation-server-ssl-cert-file"],
        "ssl_ca_file": config.ours("ssl-ca-file"),
    }


def parse(argv: Sequence[str]) -> ColoOptions | RemusOptions:
    """The options of a command line, and of the configuration file.

    :raise ConfigError: they are wrong.
    :raise SystemExit: --help or --version, which have been printed.
    """
    parser = build_parser()
    # first for --config, and so that nothing is read for a command line that is wrong, or wants --help
    typed = parser.parse_intermixed_args(argv)
    config = load_config(typed.config)
    parser.set_defaults(**from_file(config))
    given = parser.parse_intermixed_args(argv)
    notes = list(config.notes)
    if given.port is None:
        given.port = config["xend-relocation-ssl-port" if given.ssl else "xend-relocation-port"]
    if given.ssl and given.ssl_ca_file is None:
        notes.append(
            "--ssl without --ssl-ca-file: the connection is encrypted, but whoever answers as the destination is believed"
        )
    if not given.colo:
        return remus_options.from_arguments(given, notes)
    for option, because in (
        ("blackhole", "COLO compares with a copy that runs on the destination"),
        ("no_net", "COLO is about the network output"),
        ("no_disk", "both copies run, and would write to it"),
    ):
        if getattr(given, option):
            raise ConfigError(f"--{option.replace('_', '-')} cannot be used with --colo: {because}")
    if typed.interval is not None:
        notes.append("--interval is not used with --colo: see --period")
    if given.timer:
        notes.append("--timer is not used with --colo")
    if typed.compression is not None:
        option = "--compression" if typed.compression else "--no-compression"
        notes.append(f"{option} is not used with --colo")
    return ColoOptions(
        **protection_arguments(given, notes),
        checkpoint=CheckpointChoice(given.checkpoint),
        compare_timeout_s=given.compare_timeout / 1000,
        limits=parse_limits(given.limits),
        period_s=given.period / 1000 or None,
        verify_every=given.verify,
    )


def load(module: str, needs: str) -> Any:
    """A part of the package that only runs where Xen is.

    :param needs: what to install if it is missing.
    :raise HostError: a library is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise HostError(f"cannot load {error.name or module}: {error}; {needs}") from error


def _body(argv: Sequence[str]) -> int:
    options = parse(argv)
    logging.basicConfig(
        handlers=[LogOutlet(sys.stderr)],
        level=logging.DEBUG if options.verbose else logging.WARNING,
        format="remus: %(message)s"
        if not options.verbose
        else "%(asctime)s %(name)s %(levelname)s %(message)s",
    )
    check_root("remus")
    check_hook("--fence", options.fence)
    for note in options.notes:
        print(f"remus: note: {note}", file=sys.stderr)
    module = "remus_colo.remus" if isinstance(options, RemusOptions) else "remus_colo.primary"
    with signals.interrupting():
        return int(load(module, "install remus_colo with what it depends on").run(options))


def main(argv: Sequence[str] | None = None) -> int:
    """The console command.

    :return: the exit status.
    """
    arguments = sys.argv[1:] if argv is None else argv
    return run_command("remus", arguments, _body, verbose="--verbose" in arguments or "-v" in arguments)


if __name__ == "__main__":
    sys.exit(main())
