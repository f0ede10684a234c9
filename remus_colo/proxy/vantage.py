# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a capture of the SVM was taken: before the rewriter, with the SVM's own TCP sequence numbers, or behind it.

A connection that begins in the capture shows it: the stream begins one behind the initial sequence number of the SVM's SYN
(RFC 9293, 3.4), or one behind the PVM's.
"""

from __future__ import annotations

from collections.abc import Iterable

FIN, SYN, RST = 1, 2, 4
_TYPE_IPV4, _TYPE_IPV6, _VLAN_TYPES = 0x0800, 0x86DD, (0x8100, 0x88A8, 0x9100)
_TCP = 6


def _tcp(packet: bytes, ethertype: int) -> tuple[bytes, int, int] | None:
    """Addresses and ports, sequence number and flags of a plain TCP packet."""
    while ethertype in _VLAN_TYPES and len(packet) >= 4:
        packet, ethertype = packet[4:], int.from_bytes(packet[2:4], "big")
    if (
        ethertype == _TYPE_IPV4
        and len(packet) >= 20
        and packet[9] == _TCP
        and not int.from_bytes(packet[6:8], "big") & 0x3FFF
    ):
        addresses, at = packet[12:20], (packet[0] & 15) * 4
    elif ethertype == _TYPE_IPV6 and len(packet) >= 40 and packet[6] == _TCP:
        addresses, at = packet[8:40], 40
    else:
        return None
    if len(packet) < at + 20:
        return None
    return addresses + packet[at : at + 4], int.from_bytes(packet[at + 4 : at + 8], "big"), packet[at + 13]


def before_rewriter(packets: Iterable[tuple[bytes, int]]) -> bool | None:
    """Whether the SVM's numbers in a capture are its own.

    :param packets: those of the SVM from the network header on, each with its ethertype.
    :return: False if they are the PVM's, None if no connection begins in the capture.
    """
    begins: dict[bytes, int] = {}  # of each flow's latest connection: where its own stream begins
    lowest: dict[bytes, int] = {}  # the lowest number seen in it, from there on
    found: list[int] = []
    for packet, ethertype in packets:
        parsed = _tcp(packet, ethertype)
        if parsed is None:
            continue
        flow, sequence, flags = parsed
        if flags & (SYN | RST) == SYN:
            begin = (sequence + 1) % 2**32
            if begins.get(flow) != begin:
                found.extend([lowest.pop(flow)] if flow in lowest else [])
                begins[flow] = begin
        elif flow in begins and not flags & RST:
            offset = (sequence - begins[flow] + 2**31) % 2**32 - 2**31
            if offset != -1:  # a keepalive repeats the last byte, which may be the SYN
                lowest[flow] = min(offset, lowest.get(flow, offset))
    found.extend(lowest.values())
    return 0 in found if found else None
