# SPDX-License-Identifier: LGPL-2.1-or-later
"""The network tests once more, in a dom0: its kernel has what that of the machine may lack."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from remus_colo.testbed.scenario import Protection

NETNS = Path(__file__).parents[1] / "netns"
# What needs a kernel with sch_plug, as a host in the field has, and many a machine that has the test bed has not.
PLUG = "test_plug.py test_output_buffer.py test_primary_path.py test_classic_netlink.py test_recovery.py"
# With nft_queue: most machines have it, and run these themselves.
QUEUE = "test_queue.py test_queue_traffic.py test_output.py test_path.py test_backup_path.py"
# The reference form of the packet queue is the same with any rules: this machine's kernel is enough for it.
LEFT_OUT = "netfilterqueue"
# For kernels that lack sch_plug. Whatever else is skipped here is tested nowhere.
SKIPPED = ("this kernel has sch_plug",)
TIMEOUT_S = 1800.0  # emulated


@pytest.mark.parametrize(
    "modules", [PLUG, pytest.param(QUEUE, marks=pytest.mark.long)], ids=["plug", "queue"]
)
def test_network_tests_in_dom0(protection: Protection, modules: str) -> None:
    protection.bed.push("primary", NETNS, "/root/netns")
    done = protection.bed.exec(
        "primary",
        f"cd /root/netns && python3 -m pytest -q -ra -p no:cacheprovider -k 'not {LEFT_OUT}' {modules}",
        timeout_s=TIMEOUT_S,
        check=False,
    )
    shown = done.stdout + done.stderr
    assert done.returncode == 0, shown
    assert re.search(r"\d+ passed", shown), shown
    skipped = [line for line in shown.splitlines() if line.startswith("SKIPPED")]
    assert [line for line in skipped if not any(reason in line for reason in SKIPPED)] == [], shown
