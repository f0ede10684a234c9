# SPDX-License-Identifier: LGPL-2.1-or-later
"""Learns which addresses a vif's guest has, and who else is on its LAN: by them the backup finds out who is alive."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from dataclasses import dataclass

from remus_colo.adapters import bpf
from remus_colo.adapters.backend import Vif
from remus_colo.adapters.rawlink import Frame, RawLink
from remus_colo.errors import RemusError
from remus_colo.proxy.announce import ETHERTYPE_ARP, AddressBook, neighbour
from remus_colo.session.loop import Loop

log = logging.getLogger(__name__)

# A look at all that the guest sends, so often and at so many frames; who asks on the LAN for another is seen
# all the time.
LOOK_INTERVAL_S = 5.0
LOOK_FRAMES = 32
NEIGHBOURS = 16


@dataclass(frozen=True, slots=True)
class Known:
    """IP addresses of a vif's guest, and of others on its LAN; those that spoke last first."""

    addresses: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()


class AddressWatch:
    """One vif's. Belongs to the loop's thread."""

    def __init__(self, loop: Loop, vif: Vif, mac: bytes, uplinks: Iterable[str]) -> None:
        """:param mac: the guest's. :param uplinks: where the LAN is."""
        self._loop = loop
        self._vif = vif
        self._mac = mac
        self._book = AddressBook(mac)
        self._neighbours: dict[str, None] = {}  # those that spoke last, oldest first
        self._discovery: list[RawLink] = []
        # Kept, and deaf but for a look: to close one takes a while (see RawSender), in which the loop would
        # stand still.
        self._ears: dict[str, RawLink] = {}
        self._look: RawLink | None = None
        self._looked = 0
        self._looks = 0
        self._closed = False
        try:
            for port in uplinks:
                raw = RawLink(port, bpf.discovery)
                self._discovery.append(raw)
                loop.add_reader(raw, functools.partial(self._read_discovery, raw))
        except RemusError as error:
            log.info("%s", error)
        self._begin_look()

    def known(self) -> Known:
        return Known(
            tuple(str(address) for address in self._book.addresses), tuple(reversed(self._neighbours))
        )

    def _begin_look(self) -> None:
        if self._closed:
            return
        self._end_look()
        self._looked = 0
        # In turn, as a guest speaks through one of them: with drivers for Xen, or without.
        names = self._vif.ifnames or [self._vif.ifname]
        name = names[self._looks % len(names)]
        self._looks += 1
        try:
            self._look = self._ears.get(name) or self._listen(name)
            self._look.want(bpf.everything)
        except RemusError as error:
            log.info("%s", error)
        self._loop.call_later(LOOK_INTERVAL_S, self._begin_look)

    def _listen(self, name: str) -> RawLink:
        raw = self._ears[name] = RawLink(name, bpf.nothing, receive_buffer_bytes=1 << 16)
        self._loop.add_reader(raw, functools.partial(self._read_look, raw))
        return raw

    def _end_look(self) -> None:
        look, self._look = self._look, None
        if look is not None:
            look.want(bpf.nothing)

    def _read_look(self, raw: RawLink) -> None:
        while (frame := self._next(raw)) is not None:
            if raw is not self._look:
                continue  # it came before the look's end
            self._looked += 1
            if frame.source_mac == self._mac:
                if frame.ethertype == ETHERTYPE_ARP:
                    self._book.learn_arp(frame.payload)
                else:
                    self._book.learn_packet(frame.payload)
            if self._looked == LOOK_FRAMES:
                self._end_look()

    def _read_discovery(self, raw: RawLink) -> None:
        while (frame := self._next(raw)) is not None:
            address = neighbour(frame.payload, frame.ethertype)
            if address is None or frame.source_mac == self._mac:
                continue
            self._neighbours.pop(str(address), None)
            self._neighbours[str(address)] = None
            if len(self._neighbours) > NEIGHBOURS:
                del self._neighbours[next(iter(self._neighbours))]

    def _next(self, raw: RawLink) -> Frame | None:
        try:
            return raw.recv()
        except RemusError as error:
            log.info("%s", error)
            self._loop.remove_reader(raw)
            self._forget(raw)
            return None

    def _forget(self, raw: RawLink) -> None:
        """Its link is gone; one of that name is listened to anew."""
        for name in [name for name, ear in self._ears.items() if ear is raw]:
            self._ears.pop(name).close()
        if self._look is raw:
            self._look = None

    def close(self) -> None:
        self._closed = True
        self._look = None
        for raw in [*self._discovery, *self._ears.values()]:
            self._loop.remove_reader(raw)
            raw.close()
        self._discovery = []
        self._ears = {}
