# SPDX-License-Identifier: LGPL-2.1-or-later
"""The system's tools, each run to its end."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence


def run_apart(
    command: Sequence[str], timeout_s: float, *, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a tool in a session of its own, as Ctrl-C is for us alone; whatever its exit status, what it said is kept.

    :param text: for its standard input, which is empty otherwise.
    :raise subprocess.TimeoutExpired: it did not end in time, and was killed.
    """
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL if text is None else None,
        input=text,
        capture_output=True,
        text=True,
        errors="replace",  # a domain's name may be in any encoding
        timeout=timeout_s,
        check=False,
        start_new_session=True,
    )
