# SPDX-License-Identifier: LGPL-2.1-or-later
"""The LAN side of a guest's vifs: who else speaks as the guest, and who answers for it."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remus_colo.adapters import bpf
from remus_colo.adapters.netlink import Links
from remus_colo.adapters.rawlink import RawLink
from remus_colo.errors import DomainError, NetworkError, RemusError
from remus_colo.failover.arbiter import LanProbe, Verdict, of_all
from remus_colo.proxy import announce

log = logging.getLogger(__name__)

PROBE_INTERVAL_S = 0.1
# A guest that is taken over is announced so often until it is there.  Who looks for it, looks for longer.
ANNOUNCE_INTERVAL_S = 0.5
CLIENTS_ASKED = 16


def mac_bytes(text: str) -> bytes:
    """:raise ValueError: it is no MAC address."""
    mac = bytes.fromhex(text.replace(":", ""))
    if len(mac) != 6:
        raise ValueError(f"{text!r} is no MAC address")
    return mac


def bridge_here(links: Links, config: dict[str, Any], index: int, default: str) -> str:
    """The bridge of this host that a guest's vif belongs to.

    :param config: libxl's configuration of the guest, from the primary.
    :param index: of the vif, in that.
    :param default: for a vif whose bridge, by its configuration, this host has not.
    :raise DomainError: this host has neither.
    """
    nics = config.get("nics", [])
    named = nics[index].get("bridge") if index < len(nics) else None
    for bridge in (named, default):
        if bridge and links.exists(bridge):
            return str(bridge)
    raise DomainError(f"there is no bridge {named or default!r} on this host: name one by --bridge")


def ports(bridge: str) -> list[str]:
    """Of a bridge; none if it is not one."""
    try:
        return os.listdir(f"/sys/class/net/{bridge}/brif")
    except OSError:
        return []


def uplinks(bridge: str) -> list[str]:
    """Ports of a bridge that are no guest's: where the LAN is."""
    return [port for port in ports(bridge) if not port.startswith(("vif", "tap")) and not _is_backend(port)]


def _is_backend(ifname: str) -> bool:
    """Whether it is a guest's, by whatever name."""
    try:
        return Path(f"/sys/class/net/{ifname}/device/modalias").read_text().startswith("xen-backend:")
    except OSError:
        return False


def ways_to_lan(bridge: str) -> list[str]:
    """Where to look for other hosts of a bridge's LAN: guests of this one are there however cut off it is.

    The bridge itself, if nothing leads out of it, or if it is for it to say which VLAN that is.
    """
    return [bridge] if _filters_vlans(bridge) else uplinks(bridge) or [bridge]


def _filters_vlans(bridge: str) -> bool:
    try:
        return Path(f"/sys/class/net/{bridge}/bridge/vlan_filtering").read_text() == "1\n"
    except OSError:
        return False


def unplugged(ifname: str) -> bool:
    """Whether nobody can be reached through a link, or through a bridge's uplinks, for want of a carrier."""
    return not any(_has_carrier(link) for link in uplinks(ifname) or [ifname])


def _has_carrier(ifname: str) -> bool:
    try:
        return Path(f"/sys/class/net/{ifname}/carrier").read_text() != "0\n"
    except FileNotFoundError:
        return True  # who knows
    except OSError:
        return False  # EINVAL: it is down


@dataclass(frozen=True, slots=True)
class LanSide:
    """A vif's LAN, to be asked for the guest.

    :ivar ifnames: probes leave and answers come through them: the uplinks of the LAN's bridge, or that.
    :ivar own_mac: the bridge's.
    :ivar guest_addresses: that the guest has been seen to use.
    :ivar client_addresses: of others, whose answers prove that the LAN works; if there are none, a carrier is to do.
    :ivar neighbours: of more of them, as this host has them: clients may be beyond a router, which is one of these.
    """

    ifnames: Sequence[str]
    own_mac: bytes
    guest_mac: bytes
    guest_addresses: Sequence[announce.Address]
    client_addresses: Sequence[announce.Address]
    neighbours: Sequence[announce.Address] = ()


def side_of(
    links: Links,
    bridge: str,
    guest_mac: bytes,
    guest: Sequence[announce.Address],
    clients: Iterable[announce.Address],
    hosts: Collection[announce.Address],
    *,
    same_host: bool,
) -> LanSide:
    """A vif's LAN, as the backup host asks it.

    :param guest, clients: their addresses, as far as they are known.
    :param hosts: addresses of hosts that prove nothing.
    :param same_host: the PVM's vif is at that bridge, too.
    """
    return LanSide(
        [bridge] if same_host else ways_to_lan(bridge),
        mac_bytes(links.mac(bridge)),
        guest_mac,
        guest,
        [address for address in clients if address not in hosts],
        [address for address in links.neighbours(bridge) if address not in hosts and address not in guest],
    )


class _Probed:
    """A LAN while it is asked."""

    def __init__(self, side: LanSide, raws: list[RawLink], window_s: float) -> None:
        self.raws = raws
        self._side = side
        self._probe = LanProbe(window_s, window_s / 2)
        self._peer_answers = False
        self._heard_another = False

    def verdict(self, now_s: float) -> Verdict | None:
        """By what was heard since it was asked for last: before a gap, the probe forgets."""
        side = self._side
        taken_to_work = not side.client_addresses and not all(map(unplugged, side.ifnames))
        lan_works, self._heard_another = self._heard_another or taken_to_work, False
        return self._probe.observe(now_s, peer_answers=self._peer_answers, lan_works=lan_works)

    def ask(self) -> None:
        side = self._side
        guest = side.guest_addresses or [announce.link_local(side.guest_mac)]
        others = [*side.client_addresses[:CLIENTS_ASKED], *side.neighbours[:CLIENTS_ASKED]]
        for raw, address in itertools.product(self.raws, [*guest, *others]):
            try:
                raw.send(announce.probe(side.own_mac, address))
            except RemusError as error:
                log.debug("%s", error)

    def hear(self) -> None:
        """:raise NetworkError: none of the links is there any more."""
        for raw in list(self.raws):
            try:
                while (frame := raw.recv()) is not None:
                    if frame.source_mac == self._side.guest_mac:
                        self._peer_answers = True
                    elif frame.source_mac != self._side.own_mac:
                        self._heard_another = True
            except NetworkError as error:
                self.raws.remove(raw)
                if not self.raws:
                    raise
                log.info("%s", error)


def probe_guest(sides: Sequence[LanSide], window_s: float) -> Verdict:
    """Does the guest answer on one of its LANs, from another host?  Then that one is alive, and only the link
    to it is lost.

    All are asked at the same time: each more would else lengthen the outage by a window.

    :param window_s: so long a silence means that it does not.
    """
    if not sides:
        return Verdict.UNKNOWN
    with contextlib.ExitStack() as stack:
        lans = [
            _Probed(
                side, [stack.enter_context(RawLink(name, bpf.discovery)) for name in side.ifnames], window_s
            )
            for side in sides
        ]
        next_s = 0.0
        while True:
            now_s = time.monotonic()
            verdicts = [verdict for lan in lans if (verdict := lan.verdict(now_s)) is not None]
            if Verdict.ALIVE in verdicts or len(verdicts) == len(lans):
                return of_all(verdicts)
            if now_s >= next_s:
                next_s = now_s + PROBE_INTERVAL_S
                for lan in lans:
                    lan.ask()
            select.select([raw for lan in lans for raw in lan.raws], [], [], max(0.0, next_s - now_s))
            for lan in lans:
                lan.hear()
