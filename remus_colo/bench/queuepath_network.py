# SPDX-License-Identifier: LGPL-2.1-or-later
"""Three namespaces for :mod:`remus_colo.bench.queuepath`, as they lie around a protected guest::

    client                    host                          guest
    c0 10.77.0.1/24 --- lan0 [bridge br0] vif7.0 --- eth0 10.77.0.2/24
                                          svm0   --- copy

The guest's kernel copies all that leaves ``eth0`` into ``copy`` (tc mirred), so a copy of each packet comes out of
``svm0``: what the SVM of a guest that never diverges would send.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from remus_colo.adapters.netlink import Links
from remus_colo.testbed import netns
from remus_colo.testbed.commands import need, run

VIF, COPY = "vif7.0", "svm0"
CLIENT_IP, GUEST_IP = "10.77.0.1", "10.77.0.2"
CLIENT_MAC, GUEST_MAC = "02:00:00:00:00:01", "02:00:00:00:00:02"
PORT = 7777
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
BUFFER_BYTES = 64 << 20


class Network:
    """:raise RemusError: not root, no ``ip``, or a kernel without what it takes."""

    def __init__(self) -> None:
        need("ip")
        self._tag = f"remus-bench{os.getpid()}"
        self._sockets: list[socket.socket] = []
        try:
            self._up()
        except BaseException:
            self.close()
            raise

    def name(self, part: str) -> str:
        """Of the namespace of ``client``, ``host`` or ``guest``."""
        return f"{self._tag}-{part}"

    def _up(self) -> None:
        for part in ("client", "host", "guest"):
            run(["ip", "netns", "add", self.name(part)], timeout_s=30)
            with netns.entered(self.name(part)), contextlib.suppress(FileNotFoundError):
                Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text(
                    "1"
                )  # nobody speaks but the bench
        self._ip("host", "link add br0 type bridge forward_delay 0 mcast_snooping 0")
        self._ip("host", "link set br0 up")
        for part, port, ifname, address, mac, other, other_mac in (
            ("client", "lan0", "c0", CLIENT_IP, CLIENT_MAC, GUEST_IP, GUEST_MAC),
            ("guest", VIF, "eth0", GUEST_IP, GUEST_MAC, CLIENT_IP, CLIENT_MAC),
        ):
            self._ip(
                "host", f"link add {port} type veth peer name {ifname} netns {self.name(part)} address {mac}"
            )
            self._ip(part, f"addr add {address}/24 dev {ifname}")
            self._ip(part, f"link set {ifname} up")
            self._ip(part, f"neigh add {other} lladdr {other_mac} dev {ifname} nud permanent")
            self._ip("host", f"link set {port} master br0 up")
        self._ip("host", f"link add {COPY} type veth peer name copy netns {self.name('guest')}")
        self._ip("guest", "link set copy up")
        with netns.entered(self.name("host")), Links() as links:
            links.silence(COPY)
            links.set_up(COPY)
        with netns.entered(self.name("guest")), Links() as links:
            links.silence("copy")
            links.mirror_egress("eth0", "copy")

    def _ip(self, part: str, words: str) -> None:
        run(["ip", "-netns", self.name(part), *words.split()], timeout_s=30)

    def receiver(self) -> socket.socket:
        """The client's socket."""
        made = self._socket("client")
        made.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
        made.bind((CLIENT_IP, PORT))
        return made

    def sender(self, number: int) -> socket.socket:
        """One of the guest's, a flow of its own."""
        made = self._socket("guest")
        made.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, BUFFER_BYTES)
        made.bind((GUEST_IP, 10000 + number))
        made.connect((CLIENT_IP, PORT))
        return made

    def _socket(self, part: str) -> socket.socket:
        with netns.entered(self.name(part)):
            made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sockets.append(made)
        return made

    def close(self) -> None:
        for made in self._sockets:
            made.close()
        for part in ("client", "host", "guest"):
            run(["ip", "netns", "del", self.name(part)], timeout_s=30, check=False)
