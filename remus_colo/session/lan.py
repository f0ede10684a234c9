# SPDX-License-Identifier: LGPL-2.1-or-later
"""The LAN side of a guest's vifs: who else speaks as the guest, and who answers for it."""

from __future__ import annotations

import logging
import os
import select
import time
from collections.abc import Iterable
from ipaddress import IPv4Address

from remus_colo.adapters import bpf
from remus_colo.adapters.backend import Vif
from remus_colo.adapters.netlink import Links
from remus_colo.adapters.rawlink import RawLink
from remus_colo.adapters.xenstore import Store
from remus_colo.errors import RemusError
from remus_colo.failover.arbiter import LanProbe, Verdict
from remus_colo.proxy import announce

log = logging.getLogger(__name__)

ETHERTYPE_ARP = 0x0806
PROBE_INTERVAL_S = 0.1


def mac_bytes(text: str) -> bytes:
    """:raise ValueError: it is no MAC address."""
    mac = bytes.fromhex(text.replace(":", ""))
    if len(mac) != 6:
        raise ValueError(f"{text!r} is no MAC address")
    return mac


def ipv4_of(book: announce.AddressBook) -> list[IPv4Address]:
    return [address for address in book.addresses if isinstance(address, IPv4Address)]


def uplinks(bridge: str) -> list[str]:
    """Ports of a bridge that are no guest's: where the LAN is."""
    try:
        ports = os.listdir(f"/sys/class/net/{bridge}/brif")
    except OSError:
        return []
    return [port for port in ports if not port.startswith(("vif", "tap"))]


class LanWatch:
    """On the primary: does another host speak with the MAC of the guest?

    Only ARP is watched: a host that takes the guest over announces it so.
    """

    def __init__(self, links: Links, vifs: Iterable[Vif], store: Store) -> None:
        self._links = links
        self._vifs = list(vifs)
        self._store = store
        self._macs: set[bytes] = set()
        self._raw: list[RawLink] = []
        self._conflict = False
        self._bridges: list[str] = []

    def start(self) -> None:
        for vif in self._vifs:
            bridge = self._links.master_of(vif.ifname)
            mac = self._store.read(f"{vif.backend}/mac")
            if bridge is None or mac is None:
                continue
            self._macs.add(mac_bytes(mac))
            for port in uplinks(bridge):
                self._raw.append(RawLink(port, bpf.ethertype(ETHERTYPE_ARP)))

    def conflict(self) -> bool:
        """Whether a frame with the guest's MAC has come in from the LAN."""
        for raw in self._raw:
            try:
                while (frame := raw.recv()) is not None:
                    if frame.source_mac in self._macs:
                        self._conflict = True
            except RemusError as error:
                log.debug("%s", error)
        return self._conflict

    def secondary_active(self, window_s: float) -> bool | None:
        """Wait for signs of an active SVM. None if this host has no LAN to look at."""
        if not self._raw:
            return False if not self._vifs else None
        deadline_s = time.monotonic() + window_s
        while not self.conflict():
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0:
                return False
            select.select(self._raw, [], [], min(remaining_s, 0.2))
        return True

    def close(self) -> None:
        for raw in self._raw:
            raw.close()
        self._raw = []


def probe_guest(
    bridge: str,
    own_mac: bytes,
    guest_mac: bytes,
    guest_addresses: list[IPv4Address],
    client_addresses: list[IPv4Address],
    probe: LanProbe,
) -> Verdict:
    """On the backup: does the guest still answer on the LAN?  Then its host is alive, and only the link is lost.

    :param bridge: of the LAN; probes leave and answers come through it.
    :param own_mac: the bridge's.
    :param guest_addresses: IPv4 addresses that the guest has been seen to use.
    :param client_addresses: of others, whose answers prove that the LAN works.
    """
    with RawLink(bridge, bpf.ethertype(ETHERTYPE_ARP)) as raw:
        next_s = 0.0
        peer_answers = lan_works = False
        lan_works = not client_addresses  # nobody is known who could prove it
        while True:
            now_s = time.monotonic()
            verdict = probe.observe(now_s, peer_answers=peer_answers, lan_works=lan_works)
            if verdict is not None:
                return verdict
            if now_s >= next_s:
                next_s = now_s + PROBE_INTERVAL_S
                for address in [*guest_addresses, *client_addresses[:4]]:
                    try:
                        raw.send(announce.arp_probe(own_mac, address))
                    except RemusError as error:
                        log.debug("%s", error)
            select.select([raw], [], [], max(0.0, next_s - now_s))
            peer_answers = False
            while (frame := raw.recv()) is not None:
                if frame.source_mac == guest_mac:
                    peer_answers = True
                elif frame.source_mac != own_mac:
                    lan_works = True
