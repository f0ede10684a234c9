# SPDX-License-Identifier: LGPL-2.1-or-later
"""Links: bridges, tunnels, their state, and the mirror of a guest's input (pyroute2, rtnetlink).

One :class:`Links` wraps one netlink socket and belongs to one thread.  It acts in the network namespace in
which it was made, and must be used there too, since the per-interface settings are in /proc/sys.  With
pyroute2 0.9 it must not be called from inside a running asyncio loop: that release runs a loop of its own.

pyroute2 0.7.2 (Debian 12) and later are supported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import ipaddress
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

from remus_colo.adapters import tc
from remus_colo.adapters.rtnl import Requests, netlink_error, reporting
from remus_colo.adapters.tc import Plug, PlugStats
from remus_colo.errors import HostError, NetworkError

__all__ = ["IFNAMSIZ", "LinkStats", "Links", "Plug", "PlugStats"]

IFNAMSIZ = 16  # <linux/if.h>, the final zero byte included
_IFF_UP = 0x1  # <linux/if.h>
_IFF_NOARP = 0x80  # <linux/if.h>
_RTMGRP_LINK = 1  # <linux/rtnetlink.h>
_BR_STATE_FORWARDING = 3  # <linux/if_bridge.h>
# <linux/neighbour.h>: reachable, stale, delay, probe, permanent
_NUD_FOUND = 0x02 | 0x04 | 0x08 | 0x10 | 0x80
_CARRIER_ALIAS = "remus_colo carrier of "
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, slots=True)
class LinkStats:
    """Counters of a link since it was made.  For a vif, rx is what the guest sent."""

    rx_packets: int
    rx_bytes: int
    rx_dropped: int
    tx_packets: int
    tx_bytes: int
    tx_dropped: int


class Links:
    """The links of this network namespace."""

    def __init__(self) -> None:
        """:raise HostError: no netlink socket is to be had."""
        from pyroute2 import IPRoute  # see rtnl.prepare()

        try:
            self._requests = Requests()
            try:
                self._ipr: Any = IPRoute()
            except BaseException:
                self._requests.close()
                raise
        except OSError as exc:
            raise HostError(f"cannot open a netlink socket: {exc.strerror or exc}") from exc
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket.  Links made through it stay."""
        if not self._closed:
            self._closed = True
            self._requests.close()
            self._ipr.close()

    @property
    def ipr(self) -> Any:
        """The pyroute2 object, for the other adapters on the same socket; not for callers outside."""
        return self._ipr

    @property
    def requests(self) -> Requests:
        """As :attr:`ipr`."""
        return self._requests

    # --- making and deleting ---

    def create_vxlan(
        self, name: str, *, vni: int, local: str, remote: str, port: int, mtu: int, bridge_port: bool = False
    ) -> None:
        """Make a point-to-point VXLAN tunnel, down, without IPv6 or ARP of its own.

        :param local: address of this host on the replication link; ``remote`` the other's; both of one family.
        :param mtu: of the tunnel, in bytes without the Ethernet header.  It may exceed what fits the outer path:
            outer packets are then fragmented.
        :param bridge_port: the tunnel will be put into a bridge.  Linux's VXLAN answers, *as a bridge port only*,
            frames with DF that exceed the outer path with a forged ICMP "fragmentation needed" and drops
            them (``skb_tunnel_check_pmtu`` in net/ipv4/ip_tunnel_core.c).  So ``name`` becomes one end of a veth pair
            whose other end is tied to the VXLAN device by tc.  :meth:`delete_link` takes all of them away.
        :raise NetworkError: the name is taken, or the kernel refused.
        :raise HostError: no permission or no vxlan module.
        """
        if not bridge_port:
            self._add_vxlan(name, vni=vni, local=local, remote=remote, port=port, mtu=mtu)
            return
        carrier, inner = _carrier_of(name), _inner_of(name)
        try:
            self.create_veth(name, inner, mtu)
            self._add_vxlan(carrier, vni=vni, local=local, remote=remote, port=port, mtu=mtu)
            index = self.ifindex(carrier)
            with reporting(f"mark {carrier}"):
                self._ipr.link("set", index=index, ifalias=_CARRIER_ALIAS + name)
            self._tie(carrier, inner)
            self._tie(inner, carrier)
            self.set_up(carrier)
            self.set_up(inner)
        except BaseException:
            self.delete_link(name)
            raise

    def _add_vxlan(self, name: str, *, vni: int, local: str, remote: str, port: int, mtu: int) -> None:
        v6 = "6" if ":" in remote else ""
        with reporting(f"create the tunnel {_checked(name)} to {remote}", module="vxlan"):
            self._ipr.link(
                "add",
                ifname=name,
                kind="vxlan",
                mtu=mtu,
                vxlan_id=vni,
                vxlan_port=port,
                vxlan_learning=False,
                **{f"vxlan_local{v6}": local, f"vxlan_group{v6}": remote},
            )
        self._finish(name)

    def create_veth(self, name: str, peer: str, mtu: int) -> None:
        """Make a veth pair, both ends down, without IPv6 or ARP of their own."""
        with reporting(f"create the pair {_checked(name)} and {_checked(peer)}", module="veth"):
            self._ipr.link("add", ifname=name, kind="veth", mtu=mtu, peer={"ifname": peer, "mtu": mtu})
        self._finish(name, peer)

    def create_isolated_bridge(self, name: str) -> None:
        """Make a bridge, down, that forwards at once and has no part in this host's own networking: no
        address, ARP, IPv6, spanning tree or multicast snooping."""
        with reporting(f"create the bridge {_checked(name)}", module="bridge"):
            self._ipr.link(
                "add", ifname=name, kind="bridge", br_forward_delay=0, br_stp_state=0, br_mcast_snooping=0
            )
        self._finish(name)

    def _finish(self, *names: str) -> None:
        try:
            for name in names:
                self.silence(name)
        except BaseException:
            self.delete_link(names[0])
            raise

    def delete_link(self, ifname: str) -> None:
        """Delete a link, and what :meth:`create_vxlan` made with it.  No error if it is not there."""
        self._delete(ifname)
        if len(ifname) < IFNAMSIZ - 1:
            carrier = self._find(_carrier_of(ifname))
            if carrier is not None and carrier.get_attr("IFLA_IFALIAS") == _CARRIER_ALIAS + ifname:
                self._delete(_carrier_of(ifname))

    def _delete(self, ifname: str) -> None:
        link = self._find(ifname)
        if link is None:
            return
        with reporting(f"delete the link {ifname}"):
            try:
                self._ipr.link("del", index=link["index"])
            except netlink_error() as exc:
                if exc.code != errno.ENODEV:  # a vif goes by itself when its domain does
                    raise

    # --- state ---

    def silence(self, ifname: str) -> None:
        """Keep this host's own stack off a link: no ARP, no IPv6 (no link-local address, no router
        solicitation, no MLD report).  For ports and tunnels that carry only the guest's frames."""
        index = self.ifindex(ifname)
        with reporting(f"turn off ARP on {ifname}"):
            self._ipr.link("set", index=index, flags=_IFF_NOARP, change=_IFF_NOARP)
        sysctl = Path("/proc/sys/net/ipv6/conf", ifname, "disable_ipv6")
        with reporting(f"turn off IPv6 on {ifname}"), contextlib.suppress(FileNotFoundError):
            sysctl.write_text("1")  # not there: a kernel without IPv6

    def set_up(self, ifname: str) -> None:
        index = self.ifindex(ifname)
        with reporting(f"bring up {ifname}"):
            self._ipr.link("set", index=index, state="up")

    def set_down(self, ifname: str) -> None:
        index = self.ifindex(ifname)
        with reporting(f"bring down {ifname}"):
            self._ipr.link("set", index=index, state="down")

    def set_master(self, ifname: str, bridge: str | None) -> None:
        """Make ``ifname`` a port of ``bridge``, or of none.  Moves it if it is a port of another."""
        index, master = self.ifindex(ifname), 0 if bridge is None else self.ifindex(bridge)
        with reporting(f"put {ifname} into {bridge}" if bridge else f"take {ifname} out of its bridge"):
            self._ipr.link("set", index=index, master=master)

    def names(self) -> list[str]:
        """Of all links that there are."""
        with reporting("list the links"):
            return [str(link.get_attr("IFLA_IFNAME")) for link in self._ipr.get_links()]

    def exists(self, ifname: str) -> bool:
        return _index_of(ifname) is not None

    def ifindex(self, ifname: str) -> int:
        """:raise NetworkError: there is no such link (so do all below)."""
        index = _index_of(ifname)
        if index is None:
            raise NetworkError(f"there is no link {ifname}")
        return index

    def is_up(self, ifname: str) -> bool:
        return bool(self._get(ifname)["flags"] & _IFF_UP)

    def mac(self, ifname: str) -> str:
        """As in ``00:16:3e:01:02:03``."""
        return str(self._get(ifname).get_attr("IFLA_ADDRESS"))

    def mtu(self, ifname: str) -> int:
        return int(self._get(ifname).get_attr("IFLA_MTU"))

    def master_of(self, ifname: str) -> str | None:
        """Name of the bridge that ``ifname`` is a port of, None if of none."""
        index = self._get(ifname).get_attr("IFLA_MASTER")
        if not index:
            return None
        with reporting(f"find the bridge of {ifname}"):
            return str(self._ipr.link("get", index=index)[0].get_attr("IFLA_IFNAME"))

    def addresses(self) -> set[ipaddress.IPv4Address | ipaddress.IPv6Address]:
        """This host's own, of all links."""
        with reporting("list this host's addresses"):
            found = self._ipr.get_addr()
        # a point-to-point link has the other end's under the second name
        texts = (entry.get_attr("IFA_LOCAL") or entry.get_attr("IFA_ADDRESS") for entry in found)
        return {ipaddress.ip_address(text) for text in texts if text}

    def neighbours(self, ifname: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
        """Who this host has found on a link, and has not missed since: its router, for one.

        :raise NetworkError: there is no such link.
        """
        with reporting(f"list the neighbours on {ifname}"):
            found = self._ipr.get_neighbours(ifindex=self.ifindex(ifname))
        return [
            ipaddress.ip_address(entry.get_attr("NDA_DST")) for entry in found if entry["state"] & _NUD_FOUND
        ]

    def stats(self, ifname: str) -> LinkStats:
        counters = self._get(ifname).get_attr("IFLA_STATS64")
        return LinkStats(**{field.name: counters[field.name] for field in dataclasses.fields(LinkStats)})

    def wait_for_link(
        self, ifname: str, deadline_s: float, clock: Callable[[], float] = time.monotonic
    ) -> int:
        """Wait until a link of this name exists, and return its index.

        :param deadline_s: by ``clock``.
        :raise NetworkError: there is none at the deadline.
        """
        link = self._wait(lambda: self._find(ifname), deadline_s, clock)
        if link is None:
            raise NetworkError(
                f"the link {ifname} did not appear in time: see the backend's state in xenstore"
            )
        return int(link["index"])

    def wait_forwarding(
        self, ifname: str, deadline_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Wait until a port of a bridge passes frames, which it does some time after its carrier came.

        :param deadline_s: by ``clock``.
        :raise NetworkError: it does not at the deadline.
        """
        if self._wait(lambda: self._is_forwarding(ifname), deadline_s, clock) is None:
            raise NetworkError(
                f"the bridge of {ifname} did not begin to forward in time: has the link a carrier?"
            )

    def _is_forwarding(self, ifname: str) -> bool | None:
        info = self._get(ifname).get_attr("IFLA_LINKINFO")
        port = info.get_attr("IFLA_INFO_SLAVE_DATA") if info is not None else None
        if port is None:
            raise NetworkError(f"{ifname} is no port of a bridge")
        return True if port.get_attr("IFLA_BRPORT_STATE") == _BR_STATE_FORWARDING else None

    @staticmethod
    def _wait(look: Callable[[], _T | None], deadline_s: float, clock: Callable[[], float]) -> _T | None:
        """What ``look`` finds, looked for whenever a link changes; None if nothing at the deadline."""
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as monitor:
            monitor.setblocking(False)
            # Before the first look, so that no change falls in between.  What a message says does not
            # matter, nor that some are lost in an overrun: each is but the reason to look again.
            monitor.bind((0, _RTMGRP_LINK))
            poller = select.poll()
            poller.register(monitor, select.POLLIN)
            while (found := look()) is None and (left_s := deadline_s - clock()) > 0:
                poller.poll(left_s * 1000 + 1)
                _drain(monitor)
            return found

    def _find(self, ifname: str) -> Any:
        with reporting(f"look up the link {ifname}"):
            try:
                return self._ipr.link("get", ifname=_checked(ifname))[0]
            except netlink_error() as exc:
                if exc.code == errno.ENODEV:
                    return None
                raise

    def _get(self, ifname: str) -> Any:
        link = self._find(ifname)
        if link is None:
            raise NetworkError(f"there is no link {ifname}")
        return link

    # --- mirror ---

    def mirror_egress(self, source: str, target: str) -> None:
        """Copy each frame that leaves ``source`` (for a vif: the guest's input) to ``target``'s output.

        The copy is made before ``source``'s queueing discipline sees the frame.  A mirror that is there
        is replaced.

        :raise NetworkError: no such link.
        :raise HostError: no permission, or the kernel lacks clsact, u32 or mirred.
        """
        index, target_index = self.ifindex(source), self.ifindex(target)
        tc.remove_filter(self._ipr, source, index, tc.EGRESS)
        tc.add_filter(self._ipr, source, index, tc.EGRESS, "mirror", target, target_index)

    def remove_mirror(self, source: str) -> None:
        """Take the mirror away, and clsact if nothing else uses it.  No error if there is none or no link."""
        link = self._find(source)
        if link is not None:
            tc.remove_filter(self._ipr, source, link["index"], tc.EGRESS)

    def _tie(self, source: str, target: str) -> None:
        index, target_index = self.ifindex(source), self.ifindex(target)
        tc.add_filter(self._ipr, source, index, tc.INGRESS, "redirect", target, target_index)


def _checked(ifname: str) -> str:
    if not 0 < len(ifname.encode()) < IFNAMSIZ or "/" in ifname or any(c.isspace() for c in ifname):
        raise NetworkError(
            f"{ifname!r} cannot be the name of a link: 1 to {IFNAMSIZ - 1} characters, no / or blank"
        )
    return ifname


def _index_of(ifname: str) -> int | None:
    """By an ioctl: pyroute2 decodes all that there is to know of a link, 5 ms under emulation."""
    with reporting(f"look up the link {ifname}"):
        try:
            return socket.if_nametoindex(_checked(ifname))
        except OSError as exc:
            if exc.errno in (errno.ENODEV, None):  # Python before 3.13 gives no number, and only for this
                return None
            raise


def _carrier_of(name: str) -> str:
    return _checked(name + "x")


def _inner_of(name: str) -> str:
    return _checked(name + "i")


def _drain(monitor: socket.socket) -> None:
    while True:
        try:
            monitor.recv(65536)
        except BlockingIOError:
            return
        except OSError as exc:
            if exc.errno != errno.ENOBUFS:
                raise NetworkError(f"cannot read link events: {exc.strerror}") from exc
