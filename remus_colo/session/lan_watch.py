# SPDX-License-Identifier: LGPL-2.1-or-later
"""On the primary: has another host taken the guest over?

Such a host announces it by ARP or neighbour discovery, once.  A primary that was frozen then has missed that;
so when it is in doubt it asks the LAN for the guest's addresses, past its own bridge, where its own copy
would answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from remus_colo.adapters import bpf
from remus_colo.adapters.backend import Vif
from remus_colo.adapters.netlink import Links
from remus_colo.adapters.rawlink import RawLink
from remus_colo.adapters.xenstore import Store
from remus_colo.errors import RemusError
from remus_colo.failover.arbiter import ACTIVE
from remus_colo.session.addresses import AddressWatch, Known
from remus_colo.session.lan import LanSide, mac_bytes, probe_guest, unplugged, uplinks
from remus_colo.session.loop import Loop

log = logging.getLogger(__name__)

DEAF_S = 60.0  # after the last frame with the guest's MAC that was no other host's guest


@dataclass(frozen=True, slots=True)
class Uplink:
    """Where the LAN of one vif is.

    :ivar own_mac: the bridge's.
    """

    raw: RawLink
    ifname: str
    own_mac: bytes
    guest_mac: bytes
    handle: int


class LanWatch:
    """Belongs to the loop's thread, but for :meth:`secondary_active`.

    :param vifs: the guest's.
    """

    def __init__(self, loop: Loop, links: Links, vifs: Iterable[Vif], store: Store) -> None:
        self._loop = loop
        self._links = links
        self._vifs = list(vifs)
        self._store = store
        self._uplinks: list[Uplink] = []
        self._conflict = False
        self._deaf_until_s = 0.0
        self._addresses: dict[int, AddressWatch] = {}

    def start(self) -> None:
        """The vifs are where they are to be."""
        for vif in self._vifs:
            bridge = self._links.master_of(vif.ifname)
            mac = self._store.read(f"{vif.backend}/mac")
            if bridge is None or mac is None:
                continue
            self._addresses[vif.handle] = AddressWatch(self._loop, vif, mac_bytes(mac), uplinks(bridge))
            own_mac = mac_bytes(self._links.mac(bridge))
            for port in uplinks(bridge):
                raw = RawLink(port, bpf.discovery)
                self._uplinks.append(Uplink(raw, port, own_mac, mac_bytes(mac), vif.handle))

    def known(self) -> dict[int, Known]:
        """By vif handle."""
        return {handle: watch.known() for handle, watch in self._addresses.items()}

    def conflict(self) -> bool:
        """Whether a frame with a vif's MAC has come in from that vif's LAN.

        Not from another vif's: the two may be one, where it comes round.
        """
        for uplink in self._uplinks:
            try:
                while (frame := uplink.raw.recv()) is not None:
                    if frame.source_mac == uplink.guest_mac:
                        if self._deaf():
                            self.no_conflict()
                        else:
                            self._conflict = True
            except RemusError as error:
                log.debug("%s", error)
        return self._conflict

    def _deaf(self) -> bool:
        return time.monotonic() < self._deaf_until_s

    def no_conflict(self) -> None:
        """It is known that it was none: the guest's own frames come round, or others have its address.  For a while such
        frames tell nothing.
        """
        self._conflict = False
        self._deaf_until_s = time.monotonic() + DEAF_S

    def unplugged(self) -> bool:
        """Whether the guest can reach nobody on any of its LANs: then nobody there sees that it is alive."""
        return bool(self._uplinks) and all(unplugged(uplink.ifname) for uplink in self._uplinks)

    def secondary_active(self, window_s: float, known: Mapping[int, Known]) -> bool | None:
        """Ask the LAN for the guest; in any thread.

        :param window_s: so long a silence means that it is nowhere else.
        :param known: see :meth:`known`.
        :return: None if nobody can tell: there is no LAN to look at, or it does not work.
        """
        if self.conflict():
            return True
        if self._deaf():
            return None
        if not self._uplinks:
            return False if not self._vifs else None
        verdict = probe_guest([self._side_of(handle, known) for handle in self._handles()], window_s)
        return True if self.conflict() else ACTIVE[verdict]

    def _handles(self) -> list[int]:
        """Of vifs that have a way to the LAN."""
        return sorted({uplink.handle for uplink in self._uplinks})

    def _side_of(self, handle: int, known: Mapping[int, Known]) -> LanSide:
        seen = known.get(handle, Known())
        ways = [uplink for uplink in self._uplinks if uplink.handle == handle]
        return LanSide(
            [way.ifname for way in ways],
            ways[0].own_mac,
            ways[0].guest_mac,
            [ip_address(address) for address in seen.addresses],
            [ip_address(address) for address in seen.neighbours],
        )

    def close(self) -> None:
        for watch in self._addresses.values():
            watch.close()
        for uplink in self._uplinks:
            uplink.raw.close()
        self._uplinks = []
