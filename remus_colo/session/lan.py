# SPDX-License-Identifier: LGPL-2.1-or-later
"""The LAN side of a guest's vifs: who else speaks as the guest, and who answers for it."""

from __future__ import annotations

import logging
import os
import select
import time
from ipaddress import IPv4Address

from remus_colo.adapters import bpf
from remus_colo.adapters.rawlink import RawLink
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


def probe_guest(
    ifname: str,
    own_mac: bytes,
    guest_mac: bytes,
    guest_addresses: list[IPv4Address],
    client_addresses: list[IPv4Address],
    probe: LanProbe,
) -> Verdict:
    """Does the guest answer on the LAN, from another host?  Then that one is alive, and only the link to it is lost.

    :param ifname: probes leave and answers come through it: the LAN's bridge, or, if the guest's vif here is at that, its uplink.
    :param own_mac: the bridge's.
    :param guest_addresses: IPv4 addresses that the guest has been seen to use.
    :param client_addresses: of others, whose answers prove that the LAN works.
    """
    with RawLink(ifname, bpf.ethertype(ETHERTYPE_ARP)) as raw:
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
