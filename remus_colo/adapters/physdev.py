# SPDX-License-Identifier: LGPL-2.1-or-later
"""Queue rules by way of iptables, for kernels without nft_queue: br_netfilter, physdev and NFQUEUE.

br_netfilter passes a bridge's IPv4 and IPv6 packets, with up to one VLAN tag, through the hooks of those
families; other packets, ARP among them, are not held.  Used by :mod:`remus_colo.adapters.nft` alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from remus_colo.adapters import kmod
from remus_colo.adapters.commands import run_apart
from remus_colo.errors import HostError

MARK_PREFIX = "remus_colo_"
_PURPOSE = "holding a bridge port's packets by iptables"
_COMMAND_TIMEOUT_S = 30
# The tools of each family, and the switch that makes br_netfilter call its hooks.
_FAMILIES = {
    "iptables": Path("/proc/sys/net/bridge/bridge-nf-call-iptables"),
    "ip6tables": Path("/proc/sys/net/bridge/bridge-nf-call-ip6tables"),
}
# Without it, what a guest sends with a VLAN tag would pass unseen.
_VLAN_SWITCH = Path("/proc/sys/net/bridge/bridge-nf-filter-vlan-tagged")
# Once a queue has let a packet go, the other rules of its table do not see it any more.
_TABLES = {"raw": ("PREROUTING",), "mangle": ("PREROUTING", "POSTROUTING")}
_NFT_TABLES = tuple(f"{family} {table}" for family in ("ip", "ip6") for table in _TABLES)


class PhysdevRules:
    """Rules that carry ``mark`` as their comment, in the mangle table's PREROUTING and POSTROUTING.

    What another owner's rule queues there already is queued in the raw table as well, which comes before: of a guest that is
    protected anew, and still lives by the rewriter.
    """

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._switched_on: list[Path] = []
        self._made_tables: list[str] = []

    def add(self, vif: str, queue: int, *, from_guest: bool) -> None:
        """:raise HostError: iptables or the kernel cannot do it.  What was added before stays: :meth:`remove`."""
        self._switch_on()
        before = _nft_tables()
        if from_guest:
            where, match = "PREROUTING", ["--physdev-in", vif]
        else:
            where, match = "POSTROUTING", ["--physdev-out", vif, "--physdev-is-bridged"]
        for tool in _FAMILIES:
            taken = any(
                chain == where and vif in rule for chain, *rule in self._rules(tool, "mangle", any_owner=True)
            )
            table = "raw" if from_guest and taken else "mangle"
            _run(
                tool, "-t", table, "-A", where, "-m", "physdev", *match, "-m", "comment", "--comment", self._mark,
                "-j", "NFQUEUE", "--queue-num", str(queue), "--queue-bypass",
            )  # fmt: skip
        self._made_tables += [table for table in _nft_tables() if table not in before]

    def exist(self) -> bool:
        return any(self._rules(tool, table) for tool in _FAMILIES if _find(tool) for table in _TABLES)

    def let_pass(self) -> None:
        """Remove all rules with this mark."""
        for tool in _FAMILIES:
            if _find(tool):
                for table in _TABLES:
                    for rule in self._rules(tool, table):
                        _run(tool, "-t", table, "-D", *rule)

    def remove(self) -> None:
        """The same, and undo what :meth:`add` of this object changed besides."""
        self.let_pass()
        while self._made_tables:
            self._remove_if_empty(self._made_tables.pop())
        if any(
            self._rules(tool, table, any_owner=True) for tool in _FAMILIES if _find(tool) for table in _TABLES
        ):
            self._switched_on.clear()  # others hold packets by it now: without it their guests' output would pass
        while self._switched_on:
            self._switched_on.pop().write_text("0")

    def _rules(self, tool: str, table: str, *, any_owner: bool = False) -> list[list[str]]:
        """Chain and specification of each of our rules, or all owners'.  Without br_netfilter there can be none."""
        rules: list[list[str]] = []
        if not _FAMILIES[tool].exists():
            return rules
        for chain in _TABLES[table]:
            with contextlib.suppress(HostError):  # no such table, hence no rules
                for line in _run(tool, "-t", table, "-S", chain).splitlines():
                    words = shlex.split(line)
                    mine = (
                        any(word.startswith(MARK_PREFIX) for word in words)
                        if any_owner
                        else self._mark in words
                    )
                    if words[0] == "-A" and mine:
                        rules.append(words[1:])
        return rules

    def _switch_on(self) -> None:
        for switch in (*_FAMILIES.values(), _VLAN_SWITCH):
            if not switch.exists():
                kmod.load("br_netfilter", _PURPOSE)
            try:
                if switch.read_text().strip() == "0":
                    switch.write_text("1")
                    self._switched_on.append(switch)
            except OSError as exc:
                raise HostError(f"cannot make bridges call iptables ({switch}): {exc.strerror}") from exc

    def _remove_if_empty(self, table: str) -> None:
        """iptables-nft leaves its table behind, empty."""
        with contextlib.suppress(HostError):
            listing = _run("nft", "list", "table", *table.split())
            if not re.search(r"^\t\t(?!type )\S", listing, re.MULTILINE):
                _run("nft", "delete", "table", *table.split())


def _nft_tables() -> list[str]:
    """Those of iptables' tables that nftables knows, as ``ip mangle``; none with the legacy iptables."""
    with contextlib.suppress(HostError):
        lines = _run("nft", "list", "tables").splitlines()
        return [table for table in _NFT_TABLES if f"table {table}" in lines]
    return []


def _find(tool: str) -> str | None:
    return shutil.which(tool, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


def _run(tool: str, *arguments: str) -> str:
    path = _find(tool)
    if path is None:
        raise HostError(f"{tool} is not installed: install the package {tool.replace('ip6', 'ip')}")
    wait = [] if tool == "nft" else ["-w", str(_COMMAND_TIMEOUT_S)]
    try:
        done = run_apart([path, *wait, *arguments], 2 * _COMMAND_TIMEOUT_S)
    except subprocess.TimeoutExpired as exc:
        raise HostError(f"{tool} did not end within {2 * _COMMAND_TIMEOUT_S} s") from exc
    if done.returncode != 0:
        raise HostError(f"{tool} refused: {(done.stderr.strip().splitlines() or ['no reason given'])[0]}")
    return done.stdout
