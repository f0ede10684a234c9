# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all commands have in common: root, and how an error ends them."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from remus_colo.errors import ExitStatus, HostError, RemusError


def check_root(command: str) -> None:
    """:raise HostError: we are not root."""
    if os.geteuid() != 0:
        raise HostError(f"{command} needs root, for Xen and for the network: run it with sudo")


def run_command(
    prog: str, argv: Sequence[str], body: Callable[[Sequence[str]], int], *, verbose: bool
) -> int:
    """Run a command's body, and make one sentence and an exit status of any error.

    :param verbose: show where an error comes from, too.
    """
    try:
        return int(body(argv))
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
