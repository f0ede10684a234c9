# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the test bed's commands end: in order, with a status and a sentence."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from remus_colo.errors import ExitStatus, RemusError


def exit_on_signals() -> None:
    """Make exceptions of SIGTERM and SIGHUP, as SIGINT is one: what was begun is undone then."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit)


def _exit(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


def exit_status(command: str, body: Callable[[], int]) -> int:
    """The body's, or, with a sentence on stderr, that of the error that ended it."""
    try:
        return body()
    except RemusError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return int(error.exit_status)
    except KeyboardInterrupt:
        return ExitStatus.INTERRUPTED
