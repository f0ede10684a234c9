# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the bed's hosts are set up for emulation: ``xend-config.sxp``, with what ``remus`` and ``remusd`` take for granted on
an emulated machine, and dom0's share of its only CPU.
"""

from __future__ import annotations

import shlex

from remus_colo.testbed.ssh import Remote

PATH = "/etc/xen/xend-config.sxp"

# On a machine that is slow or busy, an emulated host that lives has been silent for 3.1 s.
HEARTBEAT_TIMEOUT_MS = 5000
# An emulated SVM needs a second or two to fault its pages in again after each checkpoint: it is slow, not diverged, and a
# checkpoint for that would make it slow once more.
COMPARE_TIMEOUT_MS = 5000

# A guest has 256.  dom0 shares the host's only CPU with a guest that a checkpoint keeps busy for seconds; with equal parts
# packets and heartbeats wait for as long.
DOM0_WEIGHT = 512

TEXT = f"""\
# Of the test bed.  These hosts are emulated: real ones need no more than the defaults, 2000 and 1000 ms.
(remus-colo
    (heartbeat-timeout {HEARTBEAT_TIMEOUT_MS})
    (compare-timeout {COMPARE_TIMEOUT_MS}))
"""


def install(remote: Remote) -> None:
    """Set up a running dom0; a configuration that is there is left alone."""
    configuration = f"[ -e {PATH} ] || printf %s {shlex.quote(TEXT)} > {PATH}"
    remote.run(f"{configuration}; xl sched-credit2 -d Domain-0 -w {DOM0_WEIGHT}", timeout_s=60)
