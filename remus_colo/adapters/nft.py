# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules that send a vif's packets to packet queues (nft, or iptables where the kernel has no nft_queue).

Rules match the vif by name, wherever it is a port: they hold before the vif exists, in whatever bridge it is, and for
a new vif of the same name.  All say *bypass*: with nobody on the queue, packets pass.

Removing a base chain makes the kernel drop the packets that are held at that moment, **in all queues of the
namespace** (``nf_queue_nf_hook_drop`` in net/netfilter/core.c), so accept what is held before.  Adding does not, nor
does removing the rules alone: whoever wants nothing lost calls :meth:`QueueRules.let_pass`, reads what is in the queue
still, accepts it, closes the queue and removes the rest.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Sequence

from remus_colo.adapters import physdev
from remus_colo.adapters.commands import run_apart
from remus_colo.errors import HostError, NetworkError, RemusError

log = logging.getLogger(__name__)

TABLE_PREFIX = physdev.MARK_PREFIX
_COMMAND_TIMEOUT_S = 30
_OWNER = re.compile(r"[A-Za-z0-9_]{1,40}")
_VIF = re.compile(r"[A-Za-z0-9_.:-]{1,15}")  # what may stand between quotes in nft's language
# Before other people's filters, as the guest's frames come out of the vif; and after them, as frames go in.
_FROM_GUEST = "type filter hook prerouting priority -250; policy accept;"
_TO_GUEST = "type filter hook postrouting priority 350; policy accept;"


@dataclasses.dataclass(frozen=True, slots=True)
class QueueRule:
    """Packets that come out of the guest behind ``vif`` (``from_guest``), or go to it, are held in ``queue``."""

    vif: str
    queue: int
    from_guest: bool

    def __post_init__(self) -> None:
        if not _VIF.fullmatch(self.vif):
            raise NetworkError(f"{self.vif!r} is no name of a vif")
        if not 0 <= self.queue <= 0xFFFF:
            raise ValueError(f"queue={self.queue} is not in 0 to 65535")


class QueueRules:
    """The rules of one owner: a run of ``remus``, or one protected guest on the backup.

    ``backend`` is None before the first rule, then ``"nft"`` (all packets, in the bridge family) or ``"iptables"``
    (through br_netfilter: IPv4 and IPv6 only, with up to one VLAN tag; ARP passes).
    """

    def __init__(self, owner: str) -> None:
        """:param owner: letters, digits and underscores, 40 at most.  Tells leftovers of a crashed run from others'
        rules, so it must be the same in the next run.
        """
        if not _OWNER.fullmatch(owner):
            raise ValueError(f"owner={owner!r} may have up to 40 letters, digits and underscores")
        self._owner = owner
        self._table = TABLE_PREFIX + owner
        self._fallback = physdev.PhysdevRules(self._table)
        self.backend: str | None = None

    def hold_from_guest(self, vif: str, queue: int) -> None:
        """Hold what comes out of the guest, before any bridge has seen it.

        Replaces what a crashed run of the same owner left, the first time.

        :raise HostError: no permission, no tool, or a kernel that can queue by neither way.
        """
        self._add([QueueRule(vif, queue, from_guest=True)])

    def rewriter(self, vif: str, queue_from: int, queue_to: int) -> None:
        """Hold both directions: what comes out of the guest in ``queue_from``, what goes to it in ``queue_to``.

        :raise HostError: as :meth:`hold_from_guest`.
        """
        self._add([QueueRule(vif, queue_from, from_guest=True), QueueRule(vif, queue_to, from_guest=False)])

    def let_pass(self) -> None:
        """What comes from now on is held no more; what is held stays so, and :meth:`remove` is still to be called."""
        if self.backend == "nft":
            _nft(f"flush table bridge {self._table}\n")
        elif self.backend == "iptables":
            self._fallback.let_pass()

    def remove(self) -> None:
        """Remove all rules of this owner.  No error if there are none."""
        if self.backend != "iptables":
            self._remove_table()
        if self.backend != "nft":
            self._fallback.remove()
        self.backend = None

    def remove_stale(self) -> bool:
        """Remove what a crashed run of this owner left.  True if there was something."""
        stale = self._owner in owners() or self._fallback.exist()
        if stale:
            log.warning("removing the packet rules of an earlier run (%s)", self._table)
            self.remove()
        return stale

    def _add(self, rules: Sequence[QueueRule]) -> None:
        if os.geteuid() != 0:
            raise HostError("cannot hold a guest's packets: run as root")
        if self.backend is None:
            self.remove_stale()
        refusal = "not tried again"
        if self.backend != "iptables":
            try:
                _nft(_script(self._table, rules))
                self.backend = "nft"
                return
            except HostError as exc:
                if self.backend == "nft":
                    raise
                refusal = str(exc)
                log.info("no queueing by nftables (%s), trying iptables and br_netfilter", refusal)
        try:
            for rule in rules:
                self._fallback.add(rule.vif, rule.queue, from_guest=rule.from_guest)
        except RemusError as exc:
            if self.backend is None:
                self._fallback.remove()
            raise HostError(
                "this kernel cannot hold a guest's packets: load nft_queue ('modprobe nft_queue'; Debian's"
                " linux-image-amd64 has it), or br_netfilter and xt_NFQUEUE with iptables installed."
                f" nft: {refusal}; iptables: {exc}"
            ) from exc
        self.backend = "iptables"

    def _remove_table(self) -> None:
        if self._owner in owners():
            _nft(f"delete table bridge {self._table}\n")


def owners() -> list[str]:
    """Owners that have rules by nft in this namespace, those of crashed runs included.

    :raise HostError: nft cannot be run.
    """
    listing = json.loads(_nft("list tables bridge\n", "-j") or "{}")
    names = [item["table"]["name"] for item in listing.get("nftables", []) if "table" in item]
    return [name.removeprefix(TABLE_PREFIX) for name in names if name.startswith(TABLE_PREFIX)]


def _script(table: str, rules: Sequence[QueueRule]) -> str:
    """One transaction.  ``add`` lets what is there be, so held packets stay held."""
    lines = [f"add table bridge {table}"]
    for rule in rules:
        chain, hook, key = (
            ("from_guest", _FROM_GUEST, "iifname") if rule.from_guest else ("to_guest", _TO_GUEST, "oifname")
        )
        lines.append(f"add chain bridge {table} {chain} {{ {hook} }}")
        lines.append(f'add rule bridge {table} {chain} {key} "{rule.vif}" queue num {rule.queue} bypass')
    return "\n".join(lines) + "\n"


def _nft(script: str, *options: str) -> str:
    """:raise HostError: nft is not there, or refused."""
    nft = shutil.which("nft", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if nft is None:
        raise HostError("nft is not installed: install the package nftables")
    try:
        done = run_apart([nft, *options, "-f", "-"], _COMMAND_TIMEOUT_S, text=script)
    except subprocess.TimeoutExpired as exc:
        raise HostError(f"nft did not end within {_COMMAND_TIMEOUT_S} s") from exc
    if done.returncode != 0:
        # Only the first line says something; below it nft repeats the input.
        raise HostError(f"nft refused: {(done.stderr.strip().splitlines() or ['no reason given'])[0]}")
    return done.stdout
