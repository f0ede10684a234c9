# SPDX-License-Identifier: LGPL-2.1-or-later
"""Map the SVM's TCP sequence space onto the PVM's, which is the one that the client knows.

Runs on the backup host, between the SVM and everything else.  For a connection made since the last checkpoint
the two VMs chose different initial sequence numbers; ``offset = PVM's ISN - SVM's ISN`` (mod 2**32) is added
to the sequence numbers that the SVM sends, and taken from acknowledgements and SACK blocks that the client
sends.

* The SVM's ISN comes from its SYN-ACK, or its SYN if the guest opens the connection.  The SVM is trusted: only
  what *it* sends starts, restarts or (with a reset) ends a mapping.
* The PVM's ISN comes from what the client acknowledges.  A client's packet is trusted with that only if its sequence
  number is exactly the one that the SVM's SYN-ACK acknowledges (client's ISN + 1): older duplicates on a reused
  4-tuple have another one.  Output commit makes that acknowledgement the PVM's ISN + 1: nothing after the
  PVM's SYN-ACK leaves before the SVM sent the same, which it cannot before it saw that packet.

Why each decision is as it is: ``docs/rewriter.rst``.

Packets start at the IP header and must have finished checksums.  IPv4, and IPv6 without extension headers;
fragments, and whatever is no TCP (nor an ICMP error about TCP), are left as they are.

This is the face of ``_native/rewrite.h``, which does it in C.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from remus_colo._native import compare_module
from remus_colo.errors import HostError
from remus_colo.proxy.announce import Address

# A closed connection's last acknowledgements and FIN retransmissions still need the mapping.
LINGER_S = 60.0
# Hosts keep silent connections alive every two hours (RFC 1122, 4.2.3.6), Linux up to two minutes late; many
# say nothing at all.  As long as Linux's connection tracking, and at the limit of flows those that were
# silent longest go.
IDLE_S = 5 * 86400.0
# Linux gives up a SYN after 127 s and a SYN-ACK after 63 s (tcp_syn_retries 6, tcp_synack_retries 5).
HANDSHAKE_S = 180.0
# How long a client's packet waits for an SVM that lags with its SYN-ACK.
SYN_ANSWER_S = 3.0
HELD_PER_FLOW = 8
HELD_LIMIT = 4096

# Handed to the next backup host at most: far more than live through a failover, and no load for a message.
CONNECTIONS_LIMIT = 4096


@dataclass(frozen=True, slots=True)
class Connection:
    """One that goes on with a mapping.

    :ivar offset: is added to the sequence numbers that the guest sends.
    """

    guest: Address
    guest_port: int
    client: Address
    client_port: int
    offset: int

    def listed(self) -> list[str | int]:
        """As a message has it."""
        return [str(self.guest), self.guest_port, str(self.client), self.client_port, self.offset]

    @classmethod
    def parse(cls, listed: object) -> Connection:
        """:raise TypeError, ValueError: it is none."""
        if not isinstance(listed, list) or len(listed) != 5:
            raise TypeError(f"{listed!r:.80} is no connection")
        guest, client = (ip_address(str(text)) for text in (listed[0], listed[2]))
        numbers = listed[1], listed[3], listed[4]
        for number, bits in zip(numbers, (16, 16, 32), strict=True):
            if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 1 << bits:
                raise ValueError(f"{number!r:.80} has no place in a connection")
        if guest.version != client.version:
            raise ValueError(f"{guest} and {client} cannot be connected")
        return cls(guest, numbers[0], client, numbers[1], numbers[2])


class Rewriter:
    """All flows of one SVM.  Not thread-safe.

    :param idle_s: a mapped connection without a packet for so long is forgotten.
    :param limit_flows: at the limit, flows without a mapping go first.
    :ivar native: the ``struct rewriter *``, for compiled callers; valid as long as this object is.
    """

    def __init__(self, idle_s: float = IDLE_S, limit_flows: int = 65536) -> None:
        module = compare_module.load()
        self._lib, self._ffi = module.lib, module.ffi
        limits = self._ffi.new("struct rewrite_limits *")
        limits.idle_s, limits.linger_s, limits.handshake_s, limits.answer_s = (
            idle_s,
            LINGER_S,
            HANDSHAKE_S,
            SYN_ANSWER_S,
        )
        limits.flows, limits.held_per_flow, limits.held = max(1, limit_flows), HELD_PER_FLOW, HELD_LIMIT
        made = self._lib.rewriter_new(limits)
        if made == self._ffi.NULL:
            raise HostError(
                "there is no memory for the rewriter's table of flows: free some, and protect the guest anew"
            )
        self.native = self._ffi.gc(made, self._lib.rewriter_free)

    @property
    def counters(self) -> Any:
        """``struct rewrite_counters``, live: what happened since the rewriter was made."""
        return self._lib.rewriter_counters(self.native)

    @property
    def flows(self) -> int:
        """Flows known, those in a handshake and those with offset zero included."""
        return int(self._lib.rewriter_flows(self.native))

    @property
    def rewritten_flows(self) -> int:
        """Flows with an offset that is not zero."""
        return int(self._lib.rewriter_rewritten_flows(self.native))

    # -- the packet path

    def from_guest(self, now_s: float, packet: bytes) -> bytes | None:
        """A packet that the SVM sent: what to send in its place; None: as it is."""
        return self._rewrite(self._lib.rewriter_from_guest, now_s, packet)

    def to_guest(self, now_s: float, packet: bytes) -> bytes | None:
        """A packet of the client for the SVM: what to send in its place; None: as it is; ``b""``: drop it."""
        return self._rewrite(self._lib.rewriter_to_guest, now_s, packet)

    def _rewrite(self, call: Any, now_s: float, packet: bytes) -> bytes | None:
        buffer = bytearray(packet)
        verdict = call(self.native, now_s, self._ffi.from_buffer("uint8_t[]", buffer), len(buffer))
        if verdict == self._lib.REWRITE_AS_IS:
            return None
        return bytes(buffer) if verdict == self._lib.REWRITE_CHANGED else b""

    def take_held(self) -> list[bytes]:
        """Client's packets that waited for the SVM's SYN-ACK and may go to the SVM now, in order.

        To be called after :meth:`from_guest`.  A caller that never does loses what TCP sends again.
        """
        held = []
        while size := self._lib.rewriter_held_size(self.native):
            packet = bytearray(size)
            self._lib.rewriter_take_held(self.native, self._ffi.from_buffer("uint8_t[]", packet))
            held.append(bytes(packet))
        return held

    # -- events

    def reset(self) -> None:
        """A checkpoint was applied: the SVM is a copy of the PVM, and every offset is zero.

        What the SVM sent before must not come to :meth:`from_guest` any more.
        """
        self._lib.rewriter_reset(self.native)

    def stop_learning(self) -> None:
        """Failover: there is no PVM any more, connections from now on have the SVM's own numbers.

        Flows that are known, also those in a handshake, stay.  Final.  Without this call, a sender with a forged source
        address could finish a handshake with the SVM without having seen its SYN-ACK.
        """
        self._lib.rewriter_stop_learning(self.native)

    def connections(self) -> list[Connection]:
        """Those with a mapping that have not ended, as far as they can be handed on."""
        room = min(self.rewritten_flows, CONNECTIONS_LIMIT)
        found = self._ffi.new("struct rewrite_connection[]", max(1, room))
        count = self._lib.rewriter_connections(self.native, found, room)
        size = {4: 4, 6: 16}
        return [
            Connection(
                ip_address(bytes(item.guest[0 : size[item.version]])),
                item.guest_port,
                ip_address(bytes(item.client[0 : size[item.version]])),
                item.client_port,
                item.offset,
            )
            for item in found[0:count]
        ]

    def inherit(self, now_s: float, connections: Iterable[Connection]) -> None:
        """What the PVM's own host maps, since the guest has lived through a failover before.

        Here it is mapped from :meth:`stop_learning` on, unless the SVM begins another connection in its place.
        """
        one = self._ffi.new("struct rewrite_connection *")
        for connection in connections:
            one.version = connection.guest.version
            one.guest, one.client = (
                address.packed.ljust(16, b"\0") for address in (connection.guest, connection.client)
            )
            one.guest_port, one.client_port = connection.guest_port, connection.client_port
            one.offset = connection.offset
            self._lib.rewriter_inherit(self.native, now_s, one)

    def expire(self, now_s: float) -> None:
        """Forget flows whose time is over.  To be called every few seconds."""
        self._lib.rewriter_expire(self.native, now_s)


def finish_checksum(packet: bytes) -> bytes:
    """The packet with its TCP checksum computed anew, as one that a guest left to its device."""
    module = compare_module.load()
    buffer = bytearray(packet)
    module.lib.rewriter_finish_checksum(module.ffi.from_buffer("uint8_t[]", buffer), len(buffer))
    return bytes(buffer)
