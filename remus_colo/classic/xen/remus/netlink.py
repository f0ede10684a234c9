# SPDX-License-Identifier: LGPL-2.1-or-later
"""rtnetlink for scripts: links, queueing disciplines, and messages that a script has made itself.

Constants: <linux/netlink.h>, <linux/rtnetlink.h>.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Any

from remus_colo.adapters.rtnl import Requests, attribute

NETLINK_ROUTE = 0

NLM_F_REQUEST = 1
NLM_F_MULTI = 2
NLM_F_ACK = 4
NLM_F_ECHO = 8

NLM_F_ROOT = 0x100
NLM_F_MATCH = 0x200
NLM_F_ATOMIC = 0x400
NLM_F_DUMP = NLM_F_ROOT | NLM_F_MATCH

NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800

RTM_NEWLINK = 16
RTM_GETLINK = 18
RTM_NEWQDISC = 36
RTM_DELQDISC = 37
RTM_GETQDISC = 38

(
    IFLA_UNSPEC,
    IFLA_ADDRESS,
    IFLA_BROADCAST,
    IFLA_IFNAME,
    IFLA_MTU,
    IFLA_LINK,
    IFLA_QDISC,
    IFLA_STATS,
    IFLA_COST,
    IFLA_PRIORITY,
    IFLA_MASTER,
    IFLA_WIRELESS,
    IFLA_PROTINFO,
    IFLA_TXQLEN,
    IFLA_MAP,
    IFLA_WEIGHT,
) = range(16)

TCA_UNSPEC, TCA_KIND, TCA_OPTIONS, TCA_STATS, TCA_XSTATS, TCA_RATE, TCA_FCNT, TCA_STATS2 = range(8)


TC_H_ROOT = 0xFFFFFFFF


class RTNLException(Exception):
    """A message is not what it should be, or the kernel refused it."""


def align(l: int, alignto: int = 4) -> int:  # noqa: E741 (the old name, which callers may use)
    return (l + alignto - 1) & ~(alignto - 1)


class rtattr:
    """One attribute: ``rta_type`` and ``body``."""

    fmt = "=HH"
    fmtlen = struct.calcsize(fmt)

    def __init__(self, msg: bytes | None = None) -> None:
        self.rta_len = 0
        self.rta_type = 0
        self.body = b""
        if msg:
            self.unpack(msg)

    def __len__(self) -> int:
        return align(self.rta_len)

    def pack(self) -> bytes:
        self.rta_len = self.fmtlen + len(self.body)
        return attribute(self.rta_type, self.body)

    def unpack(self, msg: bytes) -> None:
        if len(msg) < self.fmtlen:
            raise RTNLException("an attribute is cut off")
        self.rta_len, self.rta_type = struct.unpack_from(self.fmt, msg)
        if not self.fmtlen <= self.rta_len <= len(msg):
            raise RTNLException(f"an attribute of {self.rta_len} bytes in {len(msg)}")
        self.body = msg[self.fmtlen : self.rta_len]


class rtattrlist:
    """The attributes that follow each other in some bytes."""

    def __init__(self, msg: bytes) -> None:
        self.start = msg

    def __iter__(self) -> Iterator[rtattr]:
        body = self.start
        while len(body) >= rtattr.fmtlen:
            found = rtattr(body)
            yield found
            body = body[len(found) :]


class nlmsg:
    """A netlink message: header, ``body``, attributes."""

    fmt = "=IHHII"
    fmtlen = struct.calcsize(fmt)

    def __init__(self, msg: bytes | None = None) -> None:
        self.nlmsg_len = self.nlmsg_type = self.nlmsg_flags = self.nlmsg_seq = self.nlmsg_pid = 0
        self.rta = b""
        self.body = b""
        if msg:
            self.unpack(msg)

    def __len__(self) -> int:
        return align(self.fmtlen + len(self.body) + len(self.rta))

    def addattr(self, type: int, data: bytes | str) -> None:  # (the old name)
        attr = rtattr()
        attr.rta_type = type
        attr.body = data.encode() if isinstance(data, str) else data
        self.rta += attr.pack()
        self.nlmsg_len = len(self)

    def settype(self, cmd: int) -> None:
        self.nlmsg_type = cmd

    def pack(self) -> bytes:
        header = struct.pack(
            self.fmt, len(self), self.nlmsg_type, self.nlmsg_flags, self.nlmsg_seq, self.nlmsg_pid
        )
        return header + self.body + self.rta

    def unpack(self, msg: bytes) -> None:
        if len(msg) < self.fmtlen:
            raise RTNLException("a message is cut off")
        (self.nlmsg_len, self.nlmsg_type, self.nlmsg_flags, self.nlmsg_seq, self.nlmsg_pid) = (
            struct.unpack_from(self.fmt, msg)
        )
        self.body = msg[self.fmtlen :]
        self.rta = b""

    def __str__(self) -> str:
        return f"<netlink message, len {self.nlmsg_len}, type {self.nlmsg_type}>"


class ifinfomsg:
    """What a message about a link begins with."""

    fmt = "=BxHiII"
    fmtlen = struct.calcsize(fmt)

    def __init__(self, msg: bytes | None = None) -> None:
        self.ifi_family = self.ifi_type = self.ifi_index = self.ifi_flags = self.ifi_change = 0
        self.body = b""
        if msg:
            self.unpack(msg)

    def unpack(self, msg: bytes) -> None:
        (self.ifi_family, self.ifi_type, self.ifi_index, self.ifi_flags, self.ifi_change) = (
            struct.unpack_from(self.fmt, msg)
        )
        self.body = msg[align(self.fmtlen) :]

    def __str__(self) -> str:
        return f"<ifinfo message, family {self.ifi_family}, type {self.ifi_type}, index {self.ifi_index}>"


class tcmsg:
    """What a message about traffic control begins with."""

    fmt = "=BxxxiIII"
    fmtlen = struct.calcsize(fmt)

    def __init__(self, msg: bytes | None = None) -> None:
        self.tcm_family = int(socket.AF_UNSPEC)
        self.tcm_ifindex = self.tcm_handle = self.tcm_parent = self.tcm_info = 0
        self.rta = b""
        if msg:
            self.unpack(msg)

    def unpack(self, msg: bytes) -> None:
        (self.tcm_family, self.tcm_ifindex, self.tcm_handle, self.tcm_parent, self.tcm_info) = (
            struct.unpack_from(self.fmt, msg)
        )
        self.rta = msg[align(self.fmtlen) :]

    def pack(self) -> bytes:
        return struct.pack(
            self.fmt, self.tcm_family, self.tcm_ifindex, self.tcm_handle, self.tcm_parent, self.tcm_info
        )

    def __str__(self) -> str:
        return f"<tc message, family {self.tcm_family}, index {self.tcm_ifindex}>"


class newlinkmsg:
    def __init__(self, nlmsg: nlmsg) -> None:
        if nlmsg.nlmsg_type != RTM_NEWLINK:
            raise RTNLException("wrong message type")
        self.nlmsg = nlmsg
        self.ifi = ifinfomsg(nlmsg.body)
        self.rtattrs = {found.rta_type: found.body for found in rtattrlist(self.ifi.body)}


class newqdiscmsg:
    def __init__(self, nlmsg: nlmsg) -> None:
        if nlmsg.nlmsg_type != RTM_NEWQDISC:
            raise RTNLException("wrong message type")
        self.nlmsg = nlmsg
        self.t = tcmsg(nlmsg.body)
        self.rtattrs = {found.rta_type: found.body for found in rtattrlist(self.t.rta)}


class rtnl:
    """Asks the kernel."""

    def __init__(self) -> None:
        self._requests = Requests()
        self._linkcache: dict[int, dict[str, Any]] | None = None

    def getlink(self, key: int | str, cached: bool = False) -> dict[str, Any] | None:
        """A link by index or name: ``index``, ``type``, ``name``, ``address`` in octets; None if there is none."""
        if not cached or self._linkcache is None:
            self._linkcache = self.getlinks()
        if isinstance(key, int):
            return self._linkcache.get(key)
        return next((link for link in self._linkcache.values() if link["name"] == key), None)

    def getlinks(self) -> dict[int, dict[str, Any]]:
        """All links by index."""
        links = {}
        about = struct.pack(ifinfomsg.fmt, socket.AF_UNSPEC, 0, 0, 0, 0)
        for message in self._requests.dump(RTM_GETLINK, about):
            found = newlinkmsg(nlmsg(message))
            links[found.ifi.ifi_index] = {
                "index": found.ifi.ifi_index,
                "type": found.ifi.ifi_type,
                "name": _text(found.rtattrs[IFLA_IFNAME]),
                "address": found.rtattrs.get(IFLA_ADDRESS),
            }
        return links

    def getqdisc(self, dev: int | str) -> dict[str, Any] | None:
        """The queueing discipline of a link, by index or name; None if it has none.

        :raise RTNLException: there is no such link.
        """
        return next(iter(self.getqdiscs(dev).values()), None)

    def getqdiscs(self, dev: int | str | None = None) -> dict[int, dict[str, Any]]:
        """Root queueing disciplines by the index of their links: ``index``, ``handle``, ``kind``, ``options``
        in octets.
        """
        about = tcmsg()
        if dev is not None:
            link = self.getlink(dev)
            if link is None:
                raise RTNLException(f"device {dev} not found")
            about.tcm_ifindex = link["index"]
        found = {}
        for message in self._requests.dump(RTM_GETQDISC, about.pack()):
            qdisc = newqdiscmsg(nlmsg(message))
            # the kernel lists those of all links, whichever was asked for, and those below the root
            if qdisc.t.tcm_parent == TC_H_ROOT and about.tcm_ifindex in (0, qdisc.t.tcm_ifindex):
                found[qdisc.t.tcm_ifindex] = {
                    "index": qdisc.t.tcm_ifindex,
                    "handle": qdisc.t.tcm_handle,
                    "kind": _text(qdisc.rtattrs[TCA_KIND]),
                    "options": qdisc.rtattrs.get(TCA_OPTIONS),
                }
        return found

    def talk(self, req: bytes) -> None:
        """Send a message, and see the kernel's acknowledgement.

        :raise OSError: the kernel refused.
        """
        msg = nlmsg(req)
        flags = msg.nlmsg_flags & ~(NLM_F_REQUEST | NLM_F_ACK)
        self._requests.send(msg.nlmsg_type, req[nlmsg.fmtlen :], flags=flags)


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="surrogateescape")
