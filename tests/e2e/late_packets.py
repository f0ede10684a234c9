# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run in the backup's dom0: packets for a copy of the guest that its original never gets, also while it is stopped.

    late_packets.py INTERFACE MAC

Until it is killed. The guest's kernel knows no such protocol and drops them, so that nothing but the buffers changes.
"""

from __future__ import annotations

import itertools
import select
import socket
import sys

ETHERTYPE = 0x88B5  # IEEE 802: for experiments within one LAN
BURST = 2
PAUSE_S = 0.02


def main(ifname: str, mac: str) -> None:
    header = bytes.fromhex(mac.replace(":", "")) + bytes(6) + ETHERTYPE.to_bytes(2, "big")
    numbers = itertools.count()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        while True:
            for _ in range(BURST):
                # now and then there is no such interface: a checkpoint gives the copy another of the same name
                try:
                    raw.sendto(header + next(numbers).to_bytes(46, "big"), (ifname, ETHERTYPE))
                except OSError:
                    break
            select.select([], [], [], PAUSE_S)


main(*sys.argv[1:])
