# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the SVM's vifs belong once it is the guest: the LAN, as this host has it, and the way there."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from remus_colo.adapters.backend import Vif
from remus_colo.adapters.netlink import Links
from remus_colo.adapters.rawlink import RawLink
from remus_colo.adapters.xenstore import Store
from remus_colo.errors import DomainError, RemusError
from remus_colo.failover.arbiter import Verdict
from remus_colo.proxy import announce
from remus_colo.proxy.backup_path import BackupPath
from remus_colo.session.creation import Creation
from remus_colo.session.lan import LanSide, bridge_here, mac_bytes, probe_guest, side_of, uplinks
from remus_colo.session.steps import each

log = logging.getLogger(__name__)


class SvmLan:
    """:param bridge: for vifs whose bridge, by the primary's configuration, this host has not."""

    def __init__(self, creation: Creation, path: BackupPath, store: Store, bridge: str) -> None:
        self._creation = creation
        self._path = path
        self._store = store
        self._bridge = bridge
        self._vifs: tuple[Vif, ...] = ()  # none before the SVM has them
        self._opened: dict[int, str] = {}  # bridges by handle

    def check(self) -> None:
        """:raise DomainError: a vif would have no place in the LAN."""
        for handle in self._creation.tunnels:
            self.bridge_of(handle)

    def bridge_of(self, handle: int, links: Links | None = None) -> str:
        """:param links: of the thread that asks, if that is not the path's.
        :raise DomainError: there is none.
        """
        index = sorted(self._creation.tunnels).index(handle)
        return bridge_here(links or self._path.links, self._creation.config, index, self._bridge)

    def mac_of(self, vif: Vif) -> bytes:
        """:raise DomainError: the vif has none."""
        mac = self._store.read(f"{vif.backend}/mac")
        if mac is None:
            raise DomainError(f"{vif.ifname} has no MAC address in xenstore")
        return mac_bytes(mac)

    def vifs_are(self, vifs: tuple[Vif, ...]) -> None:
        """The SVM's, as soon as it has them."""
        self._vifs = vifs

    def look(self, window_s: float) -> Verdict:
        """In a thread: does the guest still answer on the LAN?

        :param window_s: so long a silence means that it does not.
        """
        with Links() as links:
            # neither host can prove that this one's LAN works: it does not answer itself, and the other may be dead
            hosts = links.addresses() | set(self._creation.host_addresses)
            sides = [self._side_of(vif, links, hosts) for vif in self._vifs]
        return probe_guest(sides, window_s)

    def _side_of(self, vif: Vif, links: Links, hosts: Collection[announce.Address]) -> LanSide:
        path, bridge = self._path.vifs[vif.handle], self.bridge_of(vif.handle, links)
        return side_of(
            links,
            bridge,
            self.mac_of(vif),
            path.guest_addresses.addresses,
            path.client_addresses.addresses,
            hosts,
            same_host=self._creation.same_host,
        )

    def expect_outage(self) -> None:
        """The primary is late: from now on what is said on either side is kept."""
        for vif in self._vifs:
            try:
                self._path.vifs[vif.handle].expect_outage(uplinks(self.bridge_of(vif.handle)))
            except RemusError as error:
                log.info("what an outage loses at %s is left to TCP: %s", vif.ifname, error)

    def no_outage(self) -> None:
        """It was only late."""
        self._path.each(lambda path: path.no_outage())

    def open(self, vif: Vif) -> dict[str, int]:
        """The SVM is the guest now. Returns how many segments were said again, by where they went.

        :raise RemusError: the vif did not get to the LAN, or not all was told to it.
        """
        path = self._path.vifs[vif.handle]
        path.rewriter.stop_learning()
        bridge = self.bridge_of(vif.handle)
        path.open_lan(bridge)
        self._opened[vif.handle] = bridge
        made_good = path.make_good(bridge)
        self._store.write(f"{vif.backend}/bridge", bridge)
        return made_good

    def close_isolated(self) -> None:
        """What led from the primary to the vifs goes. From any thread."""
        each([self._path.vifs[handle].delete_isolated for handle in self._opened])

    def settle(self, config: dict[str, Any]) -> None:
        """Have the vifs where they are now in the SVM's configuration, which has them in a bridge of protection's.

        From any thread.
        """
        of_primary = self._creation.config.get("nics", [])
        for nic, handle, named in zip(
            config["nics"], sorted(self._creation.tunnels), of_primary, strict=True
        ):
            nic["bridge"] = self._opened.get(handle, named.get("bridge"))
            if "ifname" in named:
                nic["ifname"] = named["ifname"]

    def announce(self) -> None:
        """Tell the LAN where the guest is now."""
        for vif in self._vifs:
            try:
                with RawLink(self.bridge_of(vif.handle)) as raw:
                    for frame in announce.announcements(
                        self.mac_of(vif), self._path.vifs[vif.handle].guest_addresses.addresses
                    ):
                        raw.send(frame)
            except RemusError as error:
                log.error("could not announce the guest: %s", error)
