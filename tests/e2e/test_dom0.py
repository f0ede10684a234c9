# SPDX-License-Identifier: LGPL-2.1-or-later
"""The network tests once more, in a dom0: its kernel has what that of the machine may lack."""

from __future__ import annotations

import re
from pathlib import Path

from remus_colo.testbed.scenario import Protection

NETNS = Path(__file__).parents[1] / "netns"
# What these test is the bed itself, on the machine on which it runs.
OF_THE_MACHINE = "test_testbed_network.py"
TIMEOUT_S = 600.0


def test_network_tests_in_dom0(protection: Protection) -> None:
    protection.bed.push("primary", NETNS, "/root/netns")
    done = protection.bed.exec(
        "primary",
        f"cd /root && python3 -m pytest -q -ra -p no:cacheprovider --ignore netns/{OF_THE_MACHINE} netns",
        timeout_s=TIMEOUT_S,
        check=False,
    )
    shown = done.stdout + done.stderr
    assert done.returncode == 0, shown
    assert re.search(r"\d+ passed", shown), shown
    assert "skipped" not in shown, shown
