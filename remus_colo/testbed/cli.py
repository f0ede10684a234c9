# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python3 -m remus_colo.testbed``: parse, call, print.  docs/testbed.rst describes the commands."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from remus_colo.errors import ExitStatus, RemusError
from remus_colo.testbed import bed_logs, bed_status
from remus_colo.testbed.arguments import finite
from remus_colo.testbed.bed import (
    DEFAULT_DOM0_MB,
    DEFAULT_MEMORY_MB,
    DEFAULT_RELEASE,
    RELEASES,
    Bed,
    Options,
    bed_names,
)
from remus_colo.testbed.ending import exit_on_signals
from remus_colo.testbed.network import HOSTS


def _add_host(command: argparse.ArgumentParser) -> None:
    command.add_argument("host", metavar="HOST", choices=tuple(HOSTS), help="primary or backup")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python3 -m remus_colo.testbed",
        description="Two Xen hosts in QEMU, a replication link, a LAN and a client, for trying and testing remus_colo.",
    )
    top.add_argument("--bed", default="default", metavar="NAME", help="which bed (default: default)")
    top.add_argument(
        "--state", type=Path, metavar="DIR", help="where beds keep their state while they are up"
    )
    top.add_argument("--verbose", action="store_true", help="show the commands that are run")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    add("setup", "install what this machine needs (Debian packages, Python packages)")
    add("python", "print the path of the Python that has what the tests need")
    up = add("up", "build what is missing and boot both hosts")
    up.add_argument(
        "--skew", type=finite, default=0.0, metavar="SECONDS", help="backup's Xen time minus primary's"
    )
    up.add_argument(
        "--xen", default="debian", metavar="XEN", help="'debian', 'patched', or the path of a hypervisor"
    )
    up.add_argument(
        "--release", choices=RELEASES, default=DEFAULT_RELEASE, help="Debian's, for the hosts (%(default)s)"
    )
    up.add_argument("--memory", type=int, default=DEFAULT_MEMORY_MB, metavar="MB", help="memory of each host")
    up.add_argument(
        "--dom0-memory", type=int, default=DEFAULT_DOM0_MB, metavar="MB", help="dom0's share of it"
    )
    up.add_argument(
        "--accel", choices=("auto", "tcg", "kvm"), default="auto", help="auto probes whether KVM can run Xen"
    )
    up.add_argument("--device-model", action="store_true", help="hosts that can run HVM guests, too")
    add("down", "end the bed and remove all of it")
    clean = add("clean", "remove what is left of a bed that crashed")
    clean.add_argument(
        "--all", action="store_true", help="every bed of this state directory, running ones too"
    )
    add("status", "show the bed").add_argument("--json", action="store_true", help="as one JSON object")
    add("skew", "measure backup's Xen time minus primary's, in seconds")
    add("sync", "install the work tree's code in the running hosts again")
    run = add("exec", "run a shell command line in a host's dom0")
    _add_host(run)
    run.add_argument("words", nargs=argparse.REMAINDER, metavar="-- CMD")
    push = add("push", "copy a file or directory into a host's dom0")
    _add_host(push)
    push.add_argument("source", type=Path, metavar="SRC")
    push.add_argument("target", metavar="DST")
    add("client", "run a command in the client's network namespace").add_argument(
        "words", nargs=argparse.REMAINDER, metavar="-- CMD"
    )
    for name, text in (
        ("kill", "cut a host's power (SIGKILL to its QEMU)"),
        ("boot", "boot a host that is off"),
        ("pause", "freeze a host (SIGSTOP)"),
        ("resume", "let a frozen host go on (SIGCONT)"),
    ):
        _add_host(add(name, text))
    add("link", "cut or restore the replication link").add_argument("position", choices=("up", "down"))
    console = add("console", "print a console: a host's serial line, or a guest's")
    console.add_argument("target", metavar="HOST|DOMAIN|HOST/DOMAIN")
    console.add_argument("--follow", "-f", action="store_true", help="go on as it grows")
    add("logs", "collect logs and state of both hosts").add_argument("directory", type=Path, metavar="DIR")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    reader = parser()
    args = reader.parse_args(argv)
    if args.command in ("exec", "client") and not _words(args.words):
        reader.error(f"{args.command}: give a command to run, after --")
    if args.command == "up" and not 0 < args.dom0_memory < args.memory:
        reader.error("up: --dom0-memory is a part of --memory")
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.INFO, format="%(message)s", stream=sys.stderr
    )
    # An interrupted 'up' takes the bed down again: make these signals exceptions, as SIGINT is.
    exit_on_signals()
    try:
        return _run(args) or 0
    except RemusError as error:
        print(f"testbed: {error}", file=sys.stderr)
        return int(error.exit_status)
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"testbed: {where}{error.strerror or error}", file=sys.stderr)
        return int(ExitStatus.HOST)
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace) -> int | None:
    if args.command == "setup":
        from remus_colo.testbed import machine

        machine.setup()
        return 0
    if args.command == "python":
        from remus_colo.testbed import machine

        print(machine.python_for_tests(install=False))
        return 0
    bed = Bed(args.bed, args.state)
    match args.command:
        case "up":
            bed.up(Options(xen=args.xen, memory_mb=args.memory, dom0_mb=args.dom0_memory, skew_s=args.skew, release=args.release,
                           accel=args.accel, device_model=args.device_model))  # fmt: skip
        case "down":
            bed.down()
        case "clean":
            names = bed_names(args.state) if args.all else [args.bed]
            for name in names:
                for removed in Bed(name, args.state).down():
                    print(f"{name}: removed {removed}")
        case "status":
            found = bed_status.status(bed)
            print(json.dumps(found, indent=2) if args.json else bed_status.text(found))
            return 0 if found["up"] else 1
        case "skew":
            reading = bed.skew()
            print(f"{reading.offset_s:+.6f} (to within {reading.error_s:.6f})")
        case "sync":
            bed.sync()
        case "exec":
            terminal = sys.stdin.isatty() and sys.stdout.isatty()
            _become(bed.reachable(args.host).argv(" ".join(_words(args.words)), terminal=terminal))
        case "push":
            bed.push(args.host, args.source, args.target)
        case "client":
            _become(bed.client_argv(_words(args.words)))
        case "kill":
            bed.kill(args.host)
        case "boot":
            bed.boot(args.host)
        case "pause":
            bed.pause(args.host)
        case "resume":
            bed.resume(args.host)
        case "link":
            bed.link(up=args.position == "up")
        case "console":
            bed_logs.console(bed, args.target, follow=args.follow)
        case "logs":
            bed_logs.collect(bed, args.directory)
    return None


def _words(words: list[str]) -> list[str]:
    return words[1:] if words[:1] == ["--"] else words


def _become(argv: list[str]) -> None:
    """Be replaced by a command, so that its exit status and streams are ours."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvp(argv[0], argv)
