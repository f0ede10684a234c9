# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a bed looks like, for people and as JSON (stable: keys are added, not changed)."""

from __future__ import annotations

from typing import Any

from remus_colo.testbed.bed import Bed
from remus_colo.testbed.network import CLIENT_ADDRESS, HOSTS


def status(bed: Bed) -> dict[str, Any]:
    """``up`` is true if the networks exist and both hosts are ready or paused."""
    hosts: dict[str, Any] = {}
    for name, net in HOSTS.items():
        host = bed.hosts[name]
        process = host.process()
        hosts[name] = {
            "state": host.state(),
            "pid": process.pid if process is not None and process.alive() else None,
            "addresses": {"management": net.mgmt, "lan": net.lan, "replication": net.repl},
            "serial_log": str(host.serial_log),
        }
    exists = bed.network.exists()
    return {
        "bed": bed.name,
        "up": exists and all(host["state"] in ("ready", "paused") for host in hosts.values()),
        "hosts": hosts,
        "replication_link": ("up" if bed.network.link_is_up() else "down") if exists else None,
        "client": {"namespace": bed.network.namespace("client"), "address": CLIENT_ADDRESS}
        if exists
        else None,
        "directory": str(bed.directory),
    }


def text(found: dict[str, Any]) -> str:
    lines = [f"bed {found['bed']}: {'up' if found['up'] else 'not up'} ({found['directory']})"]
    for name, host in found["hosts"].items():
        where = host["addresses"]
        pid = f"pid {host['pid']}, " if host["pid"] is not None else ""
        lines.append(
            f"  {name:8} {host['state']:8} {pid}LAN {where['lan']}, replication {where['replication']}"
        )
    if found["client"] is not None:
        lines.append(f"  client   {found['client']['address']} in namespace {found['client']['namespace']}")
        lines.append(f"  replication link {found['replication_link']}")
    return "\n".join(lines)
