# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ``xend-config.sxp`` of the bed's hosts: what ``remus`` and ``remusd`` take for granted on an emulated machine."""

from __future__ import annotations

import shlex

from remus_colo.testbed.ssh import Remote

PATH = "/etc/xen/xend-config.sxp"

# An emulated host on a shared CPU now and then stands still for more than a second: that is no dead host.
HEARTBEAT_TIMEOUT_MS = 3000
# An emulated SVM needs a second or two to fault its pages in again after each checkpoint: it is slow, not diverged, and a
# checkpoint for that would make it slow once more.
COMPARE_TIMEOUT_MS = 5000

TEXT = f"""\
# Of the test bed.  These hosts are emulated: real ones need no more than the defaults, 2000 and 1000 ms.
(remus-colo
    (heartbeat-timeout {HEARTBEAT_TIMEOUT_MS})
    (compare-timeout {COMPARE_TIMEOUT_MS}))
"""


def install(remote: Remote) -> None:
    """Write it into a running dom0, unless one is there."""
    remote.run(f"[ -e {PATH} ] || printf %s {shlex.quote(TEXT)} > {PATH}", timeout_s=60)
