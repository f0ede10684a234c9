# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bed's networks: a LAN, a replication link and a management net, each a bridge in a namespace of its own.

::

    namespace BED-lan     bridge "lan":  lan-primary, lan-backup (taps), lan-client (veth)
    namespace BED-client  eth0 10.77.0.100/24, the other end of lan-client
    namespace BED-repl    bridge "repl": repl-primary, repl-backup (taps), MTU 9000
    namespace BED-mgmt    bridge "mgmt" 10.79.0.254/24: mgmt-primary, mgmt-backup (taps)

QEMU stays in the main namespace and gets its taps as descriptors.  Nothing routes between
them, and nothing leaves this machine.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

from remus_colo.testbed import netns
from remus_colo.testbed.commands import run
from remus_colo.testbed.errors import BedError

LAN_MTU = 1500
REPL_MTU = 9000
CLIENT_ADDRESS = "10.77.0.100"
MGMT_GATEWAY = "10.79.0.254"
IP_TIMEOUT_S = 20.0
# bridge/port settings that keep a quiet net quiet and a new port usable at once
BRIDGE = "type bridge stp_state 0 forward_delay 0"
QUIET = "mcast_snooping 0"
# NB: QEMU's TCG now and then forgets an interrupt (seen with 10.0: a halted CPU with interrupts on, and the timer's vector in
# its IRR) until the next one comes.  A host that nobody talks to may stand still for minutes then; and Xen, whose platform
# timer has wrapped meanwhile, takes some more to find its time again.  So nobody is left alone for longer than a second:
# the management bridge asks for multicast listeners that often (IGMP; in hundredths of a second), without a process that
# would have to live as long as the bed.
PULSE = "mcast_snooping 1 mcast_querier 1 mcast_router 0 mcast_query_interval 100 mcast_startup_query_interval 100"

SYSCTLS = {
    # Nobody speaks IPv6 by itself here: router and neighbour discovery would wake emulated CPUs.
    "net/ipv6/conf/all/disable_ipv6": "1",
    "net/ipv6/conf/default/disable_ipv6": "1",
    # A switch does not look into packets.
    "net/bridge/bridge-nf-call-iptables": "0",
    "net/bridge/bridge-nf-call-ip6tables": "0",
    "net/bridge/bridge-nf-call-arptables": "0",
}


@dataclass(frozen=True, slots=True)
class HostNet:
    """What a host's number (1 primary, 2 backup) decides."""

    host: str
    number: int

    @property
    def mgmt(self) -> str:
        return f"10.79.0.{self.number}"

    @property
    def lan(self) -> str:
        return f"10.77.0.{self.number + 1}"

    @property
    def repl(self) -> str:
        return f"10.78.0.{self.number}"


HOSTS = {"primary": HostNet("primary", 1), "backup": HostNet("backup", 2)}
NIC_ROLES = ("mgmt", "lan", "repl")


def mac(bed: str, host: str, role: str) -> str:
    """52:54:00 and two octets of the bed and host, last octet 1 management, 2 LAN, 3 replication.

    dom0's init tells its interfaces apart by the last octet.
    """
    digest = hashlib.sha256(f"{bed}/{host}".encode()).digest()
    return f"52:54:00:{digest[0]:02x}:{digest[1]:02x}:{NIC_ROLES.index(role) + 1:02x}"


class BedNetwork:
    """The namespaces of one bed.  Every operation can be repeated."""

    def __init__(self, bed: str) -> None:
        self.bed = bed

    def namespace(self, role: str) -> str:
        return f"testbed-{self.bed}-{role}"

    @property
    def namespaces(self) -> list[str]:
        return [self.namespace(role) for role in (*NIC_ROLES, "client")]

    def exists(self) -> bool:
        return (netns.NETNS_DIR / self.namespace("lan")).exists()

    def create(self) -> None:
        """Make all namespaces, bridges and the client's link; :class:`BedError` if some exist."""
        for name in self.namespaces:
            if (netns.NETNS_DIR / name).exists():
                raise BedError(f"the network namespace {name} exists: run 'clean' for the bed {self.bed}")
        for name in self.namespaces:
            run(["ip", "netns", "add", name], timeout_s=IP_TIMEOUT_S)
            for key, value in SYSCTLS.items():
                netns.write_sysctl(name, key, value)
        for role in NIC_ROLES:
            mtu = REPL_MTU if role == "repl" else LAN_MTU
            settings = f"{BRIDGE} {PULSE if role == 'mgmt' else QUIET}"
            self._batch(
                role, "link set lo up", f"link add {role} mtu {mtu} {settings}", f"link set {role} up"
            )
        # A host that boots is looked for from the first moment.  One that has not answered ARP by then would
        # be "no route".
        known = [
            f"neigh replace {net.mgmt} lladdr {mac(self.bed, net.host, 'mgmt')} dev mgmt nud permanent"
            for net in HOSTS.values()
        ]
        # A bridge takes over the address of a port, and forgets its neighbours each time, unless it has one of its own.
        own = f"link set mgmt address {mac(self.bed, 'bridge', 'mgmt')}"
        self._batch("mgmt", own, f"addr add {MGMT_GATEWAY}/24 dev mgmt", *known)
        client = self.namespace("client")
        self._batch("lan", f"link add lan-client type veth peer name eth0 netns {client}",
                    "link set lan-client master lan", "link set lan-client up")  # fmt: skip
        self._batch("client", "link set lo up", f"addr add {CLIENT_ADDRESS}/24 dev eth0", "link set eth0 up")

    def open_taps(self, host: str) -> dict[str, int]:
        """Make and plug in the taps of a host; role -> descriptor, which the caller closes."""
        taps: dict[str, int] = {}
        try:
            for role in NIC_ROLES:
                name = f"{role}-{host}"
                taps[role] = netns.open_tap(name, namespace=self.namespace(role))
                mtu = REPL_MTU if role == "repl" else LAN_MTU
                self._batch(role, f"link set {name} mtu {mtu} master {role} up")
        except BaseException:
            for fd in taps.values():
                os.close(fd)
            raise
        return taps

    def set_link(self, *, up: bool) -> None:
        """Cut or restore the replication link.  Packets are lost while it is cut; no host loses its carrier,
        as when a switch between them fails."""
        self._batch("repl", f"link set repl {'up' if up else 'down'}")

    def link_is_up(self) -> bool:
        with netns.entered(self.namespace("repl")):
            shown = run(["ip", "-o", "link", "show", "repl"], timeout_s=IP_TIMEOUT_S).stdout
        return ",UP" in shown.partition("<")[2].partition(">")[0]

    def remove(self) -> list[str]:
        """Remove what exists; returns the names removed."""
        removed = []
        for name in self.namespaces:
            if (netns.NETNS_DIR / name).exists():
                run(["ip", "netns", "delete", name], timeout_s=IP_TIMEOUT_S)
                removed.append(name)
        return removed

    def _batch(self, role: str, *lines: str) -> None:
        # Not "ip -n", which remounts file systems as well and cannot in a chroot.
        with netns.entered(self.namespace(role)):
            run(["ip", "-batch", "-"], stdin="\n".join(lines) + "\n", timeout_s=IP_TIMEOUT_S)
