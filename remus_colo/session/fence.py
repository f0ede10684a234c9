# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run the fencing hook: the administrator's own answer to whether the other host is really gone."""

from __future__ import annotations

import logging
import subprocess

from remus_colo.failover.arbiter import Verdict, hook_verdict

log = logging.getLogger(__name__)

HOOK_TIMEOUT_S = 60.0


def run_hook(command: tuple[str, ...], domain: str, other_host: str) -> Verdict:
    """Run ``command domain other_host``; its exit status is the verdict (``failover/arbiter.py``)."""
    try:
        done = subprocess.run(
            [*command, domain, other_host],
            timeout=HOOK_TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a hook that Ctrl-C ended has told nothing
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.error("the fencing hook %s gave no answer: %s", command[0], error)
        return hook_verdict(None)
    return hook_verdict(done.returncode)
