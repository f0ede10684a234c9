# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all commands have in common: root, standard files, and how an error ends them."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from remus_colo.errors import ExitStatus, HostError, RemusError


def check_root(command: str) -> None:
    """:raise HostError: we are not root."""
    if os.geteuid() != 0:
        raise HostError(f"{command} needs root, for Xen and for the network: run it with sudo")


def open_standard_files() -> None:
    """What was closed when the process began is /dev/null from now on.

    Else the next file that is opened gets its number: a lock, a socket, and with that whatever is written to
    that number, or put in its place.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(null, True)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def run_command(
    prog: str, argv: Sequence[str], body: Callable[[Sequence[str]], int], *, verbose: bool
) -> int:
    """Run a command's body, and make one sentence and an exit status of any error.

    :param verbose: show where an error comes from, too.
    """
    open_standard_files()
    try:
        return _run_body(body, argv)
    except SystemExit as error:
        # argparse's --help and --version
        return error.code if isinstance(error.code, int) else int(ExitStatus.OK)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return int(ExitStatus.INTERRUPTED)
    except RemusError as error:
        if verbose:
            traceback.print_exc()
        print(f"{prog}: error: {error}", file=sys.stderr)
        return int(error.exit_status)
    except Exception as error:
        if verbose:
            traceback.print_exc()
        hint = "" if verbose else "; run it again with --verbose and report this"
        print(f"{prog}: error: this is a bug: {type(error).__name__}: {error}{hint}", file=sys.stderr)
        return int(ExitStatus.FAILURE)


def _run_body(body: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    try:
        return int(body(argv))
    finally:
        for handler in logging.getLogger().handlers:
            handler.flush()  # what was said on the way to the end comes before the end's own words
