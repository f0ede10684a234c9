# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a capture of the SVM was taken: before the rewriter, with the SVM's own TCP sequence numbers, or behind it.

A connection that begins in the capture shows it: the stream begins one behind the initial sequence number of
the SVM's SYN (RFC 9293, 3.4), or one behind the PVM's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

SYN, RST = 2, 4
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


class _Begun:
    """A connection that begins in the SVM's capture.

    :ivar begin: where its stream begins in the SVM's own numbers.
    :ivar lowest: the lowest number seen in it, from there on.
    """

    def __init__(self, begin: int) -> None:
        self.begin = begin
        self.lowest: int | None = None

    def take(self, sequence: int, others: set[int]) -> None:
        offset, following = _signed(sequence - self.begin), (sequence + 1) % 2**32
        repeats_syn = following == self.begin or following in others  # as a keepalive does
        if not repeats_syn or sequence == self.begin or sequence in others:
            self.lowest = offset if self.lowest is None else min(offset, self.lowest)

    def own(self, others: set[int]) -> bool | None:
        """Whether it goes on in the SVM's numbers; None if there is no telling.

        The first segments may be missing, so the nearest beginning in front of the lowest one counts.

        :param others: where the PVM's streams begin in this flow.
        """
        if self.lowest is None or self.begin in others:
            return None
        if self.lowest == 0:
            return True
        theirs = [self.lowest - _signed(other - self.begin) for other in others]
        behind = min((offset for offset in theirs if offset >= 0), default=2**32)
        if behind == 2**32:
            return None if self.lowest < 0 or not others else True
        return 0 < self.lowest < behind


def _signed(difference: int) -> int:
    return (difference + 2**31) % 2**32 - 2**31


def _segments(packets: Iterable[tuple[bytes, int]]) -> Iterator[tuple[bytes, int, bool]]:
    """Flow, sequence number, and whether it is a SYN, of all TCP segments but resets."""
    for packet, ethertype in packets:
        parsed = _tcp(packet, ethertype)
        if parsed is not None and not parsed[2] & RST:
            yield parsed[0], parsed[1], bool(parsed[2] & SYN)


def before_rewriter(
    primary: Iterable[tuple[bytes, int]], secondary: Iterable[tuple[bytes, int]]
) -> bool | None:
    """Whether the SVM's numbers in a capture are its own.

    :param primary: packets of the PVM, from the network header on, each with its ethertype.
    :param secondary: those of the SVM.
    :return: False if they are the PVM's, None if that differs, or no connection begins in the capture that
        shows it.  One whose SYN has the PVM's number already, as the rewriter gives it to a late one, does
        not.
    """
    begins: dict[bytes, set[int]] = {}  # the PVM's
    for flow, sequence, syn in _segments(primary):
        if syn:
            begins.setdefault(flow, set()).add((sequence + 1) % 2**32)
    latest: dict[bytes, _Begun] = {}
    found: set[bool | None] = set()
    for flow, sequence, syn in _segments(secondary):
        others = begins.get(flow, set())
        begun = latest.get(flow)
        if not syn:
            if begun is not None:
                begun.take(sequence, others)
        elif begun is None or begun.begin != (sequence + 1) % 2**32:
            if begun is not None:
                found.add(begun.own(others))
            latest[flow] = _Begun((sequence + 1) % 2**32)
    found.update(begun.own(begins.get(flow, set())) for flow, begun in latest.items())
    found.discard(None)
    return found.pop() if len(found) == 1 else None
