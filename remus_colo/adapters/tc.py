# SPDX-License-Identifier: LGPL-2.1-or-later
"""Traffic control (pyroute2): filters that copy or redirect all frames, and the plug.

Sources: <linux/pkt_sched.h>, net/sched/sch_plug.c, tc-mirred(8), tc-u32(8).
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import socket
import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from remus_colo.adapters.rtnl import attribute, attributes, reporting, tolerating
from remus_colo.errors import NetworkError

if TYPE_CHECKING:
    from remus_colo.adapters.netlink import Links

INGRESS = 0xFFFFFFF2  # clsact's two hooks, as the parent of a filter: TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_*)
EGRESS = 0xFFFFFFF3
_TC_H_ROOT = 0xFFFFFFFF
_RTM_NEWQDISC, _RTM_GETQDISC, _TCA_KIND, _TCA_OPTIONS, _TCA_STATS2 = 36, 38, 1, 2, 7  # <linux/rtnetlink.h>
_TCA_STATS_BASIC, _TCA_STATS_QUEUE = 1, 3  # <linux/gen_stats.h>
_STATS_BASIC = struct.Struct("=QI")  # bytes, packets
_STATS_QUEUE = struct.Struct("=III")  # qlen, backlog, drops
_TCMSG = struct.Struct("=BxxxiIII")  # family, link, handle, parent, info
_NLMSG_HEADER_BYTES = 16
_ETH_P_ALL = 3  # <linux/if_ether.h>
_ETH_P_ARP = 0x0806
_ETH_P_IPV6 = 0x86DD
# Our filters are found again by their priorities, also after a crash: "CO", unlikely to be anyone else's,
# and, looked at before that one, the two that except frames from it.
_FILTER_PRIO = 0x434F
_ARP_PRIO, _IPV6_PRIO = _FILTER_PRIO - 2, _FILTER_PRIO - 1
_PROTOCOLS = {_ARP_PRIO: _ETH_P_ARP, _IPV6_PRIO: _ETH_P_IPV6, _FILTER_PRIO: _ETH_P_ALL}
# u32 with a key that always matches, since u32 is more widely there than matchall.
_ANY_KEY = "0x0/0x0+0"
# Offsets are from the IP header: the next header is ICMPv6, and the type solicitation or advertisement (RFC
# 4861, 4.3 and 4.4).
_NEIGHBOUR_KEYS = (("0x3a00/0xff00+6", "0x8700/0xff00+40"), ("0x3a00/0xff00+6", "0x8800/0xff00+40"))


def add_filter(
    ipr: Any,
    ifname: str,
    index: int,
    hook: int,
    action: Literal["mirror", "redirect"],
    target: str,
    target_index: int,
) -> None:
    """Send each frame at ``hook`` of a link, or a copy of it, out of the link ``target``.

    A mirror is free of effect on the frame, also if ``target`` is down or gone: only the copy is lost.

    :raise HostError: no permission, or the kernel lacks what it takes.
    :raise NetworkError: a link is gone.
    """
    if not _has_clsact(ipr, index):
        with reporting(f"set up filters on {ifname}", module="sch_ingress"):
            ipr.tc("add", "clsact", index)
    with reporting(f"{action} the frames of {ifname} to {target}", module="cls_u32 or act_mirred"):
        mirred = {"kind": "mirred", "direction": "egress", "action": action, "ifindex": target_index}
        ipr.tc("add-filter", "u32", index, parent=hook, action=mirred, **_match(_FILTER_PRIO, _ANY_KEY))


def pass_discovery(ipr: Any, index: int, hook: int) -> None:
    """Have ARP and neighbour discovery pass by our filter, which is there.

    :raise HostError: no permission.
    :raise NetworkError: the link is gone.
    """
    with reporting("except neighbour discovery from a filter"):  # without an action a filter lets frames pass
        ipr.tc("add-filter", "u32", index, parent=hook, **_match(_ARP_PRIO, _ANY_KEY))
        for keys in _NEIGHBOUR_KEYS:
            ipr.tc("add-filter", "u32", index, parent=hook, **_match(_IPV6_PRIO, *keys))


def _match(prio: int, *keys: str) -> dict[str, Any]:
    return {"prio": prio, "protocol": _PROTOCOLS[prio], "target": 0, "keys": list(keys)}


def remove_filter(ipr: Any, ifname: str, index: int, hook: int) -> None:
    """Take our filters away, and clsact if nothing else uses it.  No error if they or the link are gone."""
    with reporting(f"remove the filter of {ifname}"), tolerating(errno.ENODEV, errno.ENOENT):
        if not _has_clsact(ipr, index):
            return
        found = {
            (h, f["info"] >> 16) for h in (INGRESS, EGRESS) for f in ipr.get_filters(index=index, parent=h)
        }
        ours = [prio for prio in _PROTOCOLS if (hook, prio) in found]
        if found and found == {(hook, prio) for prio in ours}:
            ipr.tc("del", "clsact", index)
            return
        for prio in reversed(ours):  # exceptions last: what they let pass would be redirected meanwhile
            ipr.tc("del-filter", "u32", index, parent=hook, **_match(prio, _ANY_KEY))


def _has_clsact(ipr: Any, index: int) -> bool:
    with reporting("list queueing disciplines"):
        return any(q.get_attr("TCA_KIND") == "clsact" for q in ipr.get_qdiscs(index=index))


class _Action(enum.IntEnum):
    """TCQ_PLUG_*"""

    BUFFER = 0
    RELEASE_ONE = 1
    RELEASE_INDEFINITE = 2
    LIMIT = 3


@dataclasses.dataclass(frozen=True, slots=True)
class PlugStats:
    """``backlog_*``: what waits now; ``sent_packets`` and ``dropped_packets`` since installation."""

    backlog_packets: int
    backlog_bytes: int
    sent_packets: int
    dropped_packets: int


class Plug:
    """``sch_plug`` as root of a link's output: passes frames on, or keeps them for a while, in order.

    The limit holds in both states, is in bytes of frames with their Ethernet headers, and what exceeds it
    is dropped (see :meth:`stats`).  The kernel's own default would be ``txqueuelen`` frames, 32 for a vif.
    A plug goes with its link: install it again on a vif that was made anew.  Taking the link down, or its
    carrier going away, empties it.
    """

    def __init__(self, links: Links, ifname: str, limit_bytes: int) -> None:
        if not 0 < limit_bytes < 1 << 32:
            raise ValueError(f"limit_bytes={limit_bytes} is not a positive 32-bit number")
        self._links = links
        self._ifname = ifname
        self._limit_bytes = limit_bytes
        self._index = 0  # looked up once: buffer() falls into the guest's pause

    def install(self) -> None:
        """Put the plug in, passing.  One that is there, as after a crash, is taken over and released.

        :raise HostError: no permission or no sch_plug.
        :raise NetworkError: no such link, or it has another root queueing discipline that someone chose.
        """
        index = self._index = self._links.ifindex(self._ifname)
        root = self._root(index)
        kind = root.get_attr("TCA_KIND") if root else ""
        if kind == "plug":
            self._change(_Action.LIMIT, index)
        elif root and root["handle"]:  # 0 for what the kernel put there by itself
            # The kernel would replace it without a word, NLM_F_EXCL or not.
            raise NetworkError(
                f"{self._ifname} has the root queueing discipline {kind}, which would be lost:"
                f" remove it first ('tc qdisc del dev {self._ifname} root')"
            )
        else:
            with reporting(f"hold the output of {self._ifname}", module="sch_plug"):
                # On creation the kernel looks at the limit alone, and the new plug is closed (plug_init).
                self._links.ipr.tc("add", "plug", index, action="TCQ_PLUG_LIMIT", limit=self._limit_bytes)
        try:
            self._change(_Action.RELEASE_INDEFINITE, index)
        except BaseException:
            with contextlib.suppress(NetworkError):
                self._delete(index)
            raise

    def buffer(self) -> None:
        """Keep frames from now on, apart from those kept before.  Those already in the driver's or guest's
        ring are not called back.

        :raise NetworkError: the plug is gone, with its link or otherwise (:meth:`release` likewise).
        """
        self._change(_Action.BUFFER, self._known_index())

    def release_one(self) -> None:
        """Let go of what was kept before the last :meth:`buffer`, and go on keeping the rest.

        The kernel counts one checkpoint: between two calls of :meth:`buffer` there must be one of this.
        """
        self._change(_Action.RELEASE_ONE, self._known_index())

    def release(self) -> None:
        """Let go of all that is kept, in order, and pass on from now on."""
        self._change(_Action.RELEASE_INDEFINITE, self._known_index())

    def drop(self) -> None:
        """Take the plug away, with all that it keeps.  No error if the link or the plug is gone."""
        if (index := self._plugged()) is not None:
            self._delete(index)

    def remove(self, deadline_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        """Release, wait until all has left or the deadline, and take the plug away.

        Frames that the device still does not take at the deadline, as when the guest is paused, are dropped.
        No error if the link or the plug is gone.

        :param deadline_s: by ``clock``; in the past by default, which does not wait.
        """
        if (index := self._plugged()) is None:
            return
        with contextlib.suppress(NetworkError):  # the link may go at any moment, and the plug with it
            self._change(_Action.RELEASE_INDEFINITE, index)
            while self.stats().backlog_packets and clock() < deadline_s:
                time.sleep(0.001)  # no event tells when a queue has drained
        self._delete(index)

    def stats(self) -> PlugStats:
        """:raise NetworkError: there is no such link, or no plug on it."""
        # pyroute2 would decode all queueing disciplines of this host, a tenth of a second under emulation.
        with reporting(f"look at the plug of {self._ifname}"):
            tcmsg = _TCMSG.pack(socket.AF_UNSPEC, self._links.ifindex(self._ifname), 0, _TC_H_ROOT, 0)
            answer = self._links.requests.get(_RTM_GETQDISC, tcmsg)
        found = attributes(answer, _NLMSG_HEADER_BYTES + _TCMSG.size)
        if found.get(_TCA_KIND) != b"plug\0":
            raise NetworkError(f"there is no plug on {self._ifname}")
        figures = attributes(found[_TCA_STATS2], 0)
        _, sent_packets = _STATS_BASIC.unpack_from(figures[_TCA_STATS_BASIC])
        backlog_packets, backlog_bytes, dropped_packets = _STATS_QUEUE.unpack_from(figures[_TCA_STATS_QUEUE])
        return PlugStats(backlog_packets, backlog_bytes, sent_packets, dropped_packets)

    def _plugged(self) -> int | None:
        """The link's index, if it is there and has a plug."""
        if not self._links.exists(self._ifname):
            return None
        index = self._links.ifindex(self._ifname)
        root = self._root(index)
        return index if root is not None and root.get_attr("TCA_KIND") == "plug" else None

    def _known_index(self) -> int:
        if not self._index:
            self._index = self._links.ifindex(self._ifname)
        return self._index

    def _change(self, action: _Action, index: int) -> None:
        options = struct.pack("=iI", action, self._limit_bytes)  # struct tc_plug_qopt
        tcmsg = _TCMSG.pack(socket.AF_UNSPEC, index, 0, _TC_H_ROOT, 0)
        described = attribute(_TCA_KIND, b"plug\0") + attribute(_TCA_OPTIONS, options)
        # Without NLM_F_CREATE: an error, rather than a new and closed plug, where there is none.
        with reporting(f"change the plug of {self._ifname}"):
            self._links.requests.send(_RTM_NEWQDISC, tcmsg + described)

    def _delete(self, index: int) -> None:
        gone = tolerating(errno.ENODEV, errno.ENOENT, errno.EINVAL)
        with reporting(f"remove the plug of {self._ifname}"), gone:
            self._links.ipr.tc("del", "plug", index)

    def _root(self, index: int) -> Any:
        with reporting(f"look at the queueing discipline of {self._ifname}"):
            for qdisc in self._links.ipr.get_qdiscs(index=index):
                if qdisc["parent"] == _TC_H_ROOT:
                    return qdisc
        return None
