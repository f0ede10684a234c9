# SPDX-License-Identifier: LGPL-2.1-or-later
"""What was said while nobody carried it: TCP segments between the primary's death and the takeover.

Clients' segments then go to a port of the LAN that is dead; the switch, which has lost the guest's address
with it, shows them to every host.  The SVM's go into a tunnel without an end.  Either side repeats them, but
each time after twice as long (RFC 6298, 5.5): with an outage of 3 s the next repetition comes up to 3 s
later.  So the backup host keeps what it sees from when heartbeats are missing, and says it again when the SVM
takes over.  Whatever was lost before has been repeated by then, since a repetition waits no longer than all
that came before it together.

TCP alone: it takes a segment that comes twice for what it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from remus_colo.adapters import bpf
from remus_colo.adapters.rawlink import Frame, RawLink
from remus_colo.errors import RemusError
from remus_colo.session.loop import Loop

log = logging.getLogger(__name__)

LIMIT_SEGMENTS = 4096
LIMIT_BYTES = 8 << 20
_IPV6_HEADER_BYTES = 40
_SYN_OR_RST = 0x02 | 0x04

Say = Callable[[Frame, bytes], None]
"""Of a frame that was kept: itself, and its packet from the IP header on, without Ethernet padding."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A TCP segment in its IP packet.

    :ivar place: addresses, ports, sequence number, and whether it has data: the same for a repetition of it.
    :ivar opens_or_resets: it has SYN or RST.
    :ivar packet: from the IP header on, without Ethernet padding.
    """

    place: bytes
    opens_or_resets: bool
    packet: bytes

    @classmethod
    def parse(cls, payload: bytes) -> Segment | None:
        """:param payload: of an Ethernet frame, padding allowed.
        :return: None if it is no whole TCP segment right behind its IP header.
        """
        if len(payload) < 20:
            return None
        if payload[0] >> 4 == 4:
            start, end = (payload[0] & 0xF) * 4, int.from_bytes(payload[2:4], "big")
            protocol, addresses = payload[9], payload[12:20]
            if int.from_bytes(payload[6:8], "big") & 0x3FFF:
                return None  # a fragment
        elif payload[0] >> 4 == 6:
            start, end = _IPV6_HEADER_BYTES, _IPV6_HEADER_BYTES + int.from_bytes(payload[4:6], "big")
            protocol, addresses = payload[6], payload[8:40]
        else:
            return None
        if protocol != 6 or start < 20 or not start + 20 <= end <= len(payload):
            return None
        data = start + (payload[start + 12] >> 4) * 4
        ports_and_sequence = payload[start : start + 8]
        place = addresses + ports_and_sequence + bytes([data < end])
        return cls(place, bool(payload[start + 13] & _SYN_OR_RST), payload[:end])


class Tail:
    """The latest form of each segment that went one way, in the order in which they first came."""

    def __init__(self, segments: int = LIMIT_SEGMENTS, size: int = LIMIT_BYTES) -> None:
        """:param segments, size: beyond so many, or so many bytes, new ones are left to their sender."""
        self._limit_segments, self._limit_bytes = segments, size
        self._kept: dict[bytes, tuple[Frame, Segment]] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, frame: Frame, segment: Segment) -> None:
        known = self._kept.get(segment.place)
        size = self._bytes + len(segment.packet) - (len(known[1].packet) if known else 0)
        if size > self._limit_bytes or (known is None and len(self._kept) >= self._limit_segments):
            return
        self._kept[segment.place] = frame, segment
        self._bytes = size

    def take(self) -> list[tuple[Frame, Segment]]:
        """All of them; it is empty afterwards."""
        kept = list(self._kept.values())
        self._kept.clear()
        self._bytes = 0
        return kept


@dataclass(frozen=True, slots=True)
class _Ear:
    link: RawLink
    tail: Tail


class Outage:
    """One vif's segments from when the primary's heartbeats are missing.  Belongs to the loop's thread.

    :param mac: the guest's.
    :param vif: the SVM's.
    :param uplinks: where the LAN is on this host.
    """

    def __init__(self, loop: Loop, mac: bytes, vif: str, uplinks: Iterable[str]) -> None:
        self._loop = loop
        self._ears: list[_Ear] = []
        self._to_guest = Tail()
        self._from_guest = Tail()
        for version in (4, 6):
            for uplink in uplinks:
                self._listen(uplink, bpf.untagged_tcp(version, mac), self._to_guest)
            self._listen(vif, bpf.untagged_tcp(version), self._from_guest)

    def forget_output(self) -> None:
        """The SVM has become another: what it said is no longer so."""
        self._read_all()
        self._from_guest.take()

    def make_good(self, to_guest: Say, to_lan: Say) -> dict[str, int]:
        """Say all of it again, and close.

        :param to_guest: gives the guest what a client said.
        :param to_lan: sends what the guest said.
        :return: how many segments went where: ``to_guest`` and ``to_lan``.
        """
        self._read_all()
        clients = self._to_guest.take()
        # A handshake's first half nobody waits for: whoever begins a connection repeats his SYN himself.
        guest = [
            (frame, segment) for frame, segment in self._from_guest.take() if not segment.opens_or_resets
        ]
        try:
            for frame, segment in clients:
                to_guest(frame, segment.packet)
            for frame, segment in guest:
                to_lan(frame, segment.packet)
        finally:
            self.close()  # in the end: that takes a while, see RawSender
        return {"to_guest": len(clients), "to_lan": len(guest)}

    def close(self) -> None:
        """Idempotent."""
        while self._ears:
            self._drop(self._ears[-1])

    def _listen(self, ifname: str, wanted: Sequence[bpf.Instruction], tail: Tail) -> None:
        try:
            ear = _Ear(RawLink(ifname, wanted, receive_buffer_bytes=LIMIT_BYTES), tail)
        except RemusError as error:
            log.info("what an outage loses at %s is left to TCP: %s", ifname, error)
            return
        self._ears.append(ear)
        self._loop.add_reader(ear.link, lambda: self._read(ear))

    def _read_all(self) -> None:
        for ear in list(self._ears):
            self._read(ear)

    def _read(self, ear: _Ear) -> None:
        try:
            while (frame := ear.link.recv()) is not None:
                segment = Segment.parse(frame.payload)
                if segment is not None:
                    ear.tail.add(frame, segment)
        except RemusError as error:
            log.info("%s", error)
            self._drop(ear)

    def _drop(self, ear: _Ear) -> None:
        self._ears.remove(ear)
        self._loop.remove_reader(ear.link)
        ear.link.close()
