# SPDX-License-Identifier: LGPL-2.1-or-later
"""Running commands of this machine, with a deadline and an error that shows their output."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from remus_colo.testbed.errors import BedError, BedTimeout, CommandFailed

log = logging.getLogger(__name__)


def run(
    argv: Sequence[str | Path],
    *,
    timeout_s: float,
    check: bool = True,
    stdin: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run to its end and return it, with stdout and stderr as text.

    :raise CommandFailed: it ended with a status other than 0, and ``check`` is true.
    :raise BedTimeout: it did not end in time (it is killed then).
    :raise BedError: there is no such program.
    """
    words = [str(word) for word in argv]
    log.debug("run %s", words)
    try:
        done = subprocess.run(
            words,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            check=False,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as cause:
        raise BedTimeout(f"'{' '.join(words)[:300]}' did not end within {timeout_s:g} s") from cause
    except FileNotFoundError as cause:
        raise BedError(f"{words[0]} is not installed: run 'python3 -m remus_colo.testbed setup'") from cause
    if check and done.returncode != 0:
        raise CommandFailed(words, done.returncode, done.stdout + done.stderr)
    return done


def need(*programs: str) -> None:
    """Check that programs exist, before a long job that needs them starts.

    :raise BedError: naming all that are missing.
    """
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    missing = [p for p in programs if shutil.which(p) is None and shutil.which(p, path=path) is None]
    if missing:
        raise BedError(
            f"not installed on this machine: {', '.join(missing)}: run 'python3 -m remus_colo.testbed setup'"
        )
