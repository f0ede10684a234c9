# SPDX-License-Identifier: LGPL-2.1-or-later
"""Queueing disciplines for scripts, as messages for :meth:`xen.remus.netlink.rtnl.talk`.

Layouts: <linux/pkt_sched.h>, net/sched/sch_plug.c.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from typing import Any

from xen.remus import netlink

from remus_colo.devices.netbuffer import LIMIT_BYTES

TC_H_ROOT = 0xFFFFFFFF
TC_PRIO_MAX = 15
TC_PLUG_BUFFER = 0
TC_PLUG_RELEASE_ONE = 1
TC_PLUG_RELEASE_INDEFINITE = 2
TC_PLUG_LIMIT = 3
# what Xen 4.1 and 4.2 called the first two
TC_PLUG_CHECKPOINT = TC_PLUG_BUFFER
TC_PLUG_RELEASE = TC_PLUG_RELEASE_ONE
# In bytes, as the kernel reads it.
PLUG_LIMIT_BYTES = LIMIT_BYTES

qdisc_kinds: dict[str, type[Qdisc]] = {}


class QdiscException(Exception):
    """Parameters that a queueing discipline does not have."""


class request:
    """A message about a queueing discipline; ``pack`` it for ``talk``."""

    def __init__(self, cmd: int, flags: int = 0, dev: int | None = None, handle: int = 0) -> None:
        self.n = netlink.nlmsg()
        self.t = netlink.tcmsg()
        self.n.nlmsg_flags = netlink.NLM_F_REQUEST | flags
        self.n.nlmsg_type = cmd
        self.t.tcm_family = int(socket.AF_UNSPEC)
        self.t.tcm_parent = handle or TC_H_ROOT
        if dev:
            self.t.tcm_ifindex = dev

    def pack(self) -> bytes:
        self.n.body = self.t.pack()
        return self.n.pack()

    def _describe(self, qdisc: Qdisc) -> None:
        self.n.addattr(netlink.TCA_KIND, qdisc.kind + "\0")
        options = qdisc.pack()
        if options:
            self.n.addattr(netlink.TCA_OPTIONS, options)


class addrequest(request):
    def __init__(self, dev: int, handle: int, qdisc: Qdisc) -> None:
        super().__init__(netlink.RTM_NEWQDISC, netlink.NLM_F_EXCL | netlink.NLM_F_CREATE, dev, handle)
        self._describe(qdisc)


class delrequest(request):
    def __init__(self, dev: int, handle: int) -> None:
        super().__init__(netlink.RTM_DELQDISC, dev=dev, handle=handle)


class changerequest(request):
    def __init__(self, dev: int, handle: int, qdisc: Qdisc) -> None:
        super().__init__(netlink.RTM_NEWQDISC, dev=dev, handle=handle)
        self._describe(qdisc)


class Qdisc:
    """One, from what ``rtnl.getqdisc`` tells; of the class that knows its kind."""

    def __new__(cls, qdict: dict[str, Any] | None = None, *args: Any, **opts: Any) -> Qdisc:
        chosen = qdisc_kinds.get(str(qdict.get("kind")), cls) if qdict else cls
        return super().__new__(chosen)

    def __init__(self, qdict: dict[str, Any]) -> None:
        self._qdict = qdict
        self.kind = str(qdict["kind"])
        self.handle = int(qdict["handle"]) >> 16

    def parse(self, opts: Sequence[str]) -> None:
        if opts:
            raise QdiscException("cannot parse qdisc parameters")

    def optstr(self) -> str:
        return "[cannot parse qdisc parameters]" if self._qdict.get("options") else ""

    def pack(self) -> bytes:
        return b""


class PrioQdisc(Qdisc):
    fmt = f"=i{TC_PRIO_MAX + 1}B"

    def __init__(self, qdict: dict[str, Any]) -> None:
        super().__init__(qdict)
        self.bands = 3
        # pfifo_fast's bands by priority (<linux/pkt_sched.h>)
        self.priomap = [1, 2, 2, 2, 1, 2, 0, 0, *[1] * 8]
        if qdict.get("options"):
            self.unpack(qdict["options"])

    def unpack(self, opts: bytes) -> None:
        self.bands, *self.priomap = struct.unpack(self.fmt, opts)

    def optstr(self) -> str:
        return f"bands {self.bands} priomap  {' '.join(map(str, self.priomap))}"


class CfifoQdisc(Qdisc):
    """Remus's first queueing discipline, which no kernel has; for what a script says of it."""

    fmt = "=II"

    def __init__(self, qdict: dict[str, Any]) -> None:
        super().__init__(qdict)
        self.epoch = self.vmid = 0
        if qdict.get("options"):
            self.unpack(qdict["options"])

    def pack(self) -> bytes:
        return struct.pack(self.fmt, self.epoch, self.vmid)

    def unpack(self, opts: bytes) -> None:
        self.epoch, self.vmid = struct.unpack(self.fmt, opts)

    def parse(self, opts: Sequence[str]) -> None:
        try:
            for name, value in zip(opts[::2], opts[1::2], strict=True):
                if name == "epoch":
                    self.epoch = int(value)
                elif name.lower() == "vmid":
                    self.vmid = int(value)
        except ValueError as error:
            raise QdiscException(str(error)) from error

    def optstr(self) -> str:
        return f"epoch {self.epoch} vmID {self.vmid}"


class PlugQdisc(Qdisc):
    """Holds what is sent; ``action`` is one of ``TC_PLUG_*``, ``limit`` in bytes."""

    fmt = "=iI"

    def __init__(self, qdict: dict[str, Any] | None = None) -> None:
        super().__init__(qdict or {"kind": "plug", "handle": TC_H_ROOT})
        self.limit = PLUG_LIMIT_BYTES
        self.action = TC_PLUG_BUFFER

    def pack(self) -> bytes:
        return struct.pack(self.fmt, self.action, self.limit)

    def parse(self, args: Sequence[str]) -> None:
        actions = {"checkpoint": TC_PLUG_BUFFER, "release": TC_PLUG_RELEASE_ONE}
        if not args:
            raise QdiscException("no action given")
        if args[0] not in actions:
            raise QdiscException("unknown action")
        self.action = actions[args[0]]


qdisc_kinds.update(prio=PrioQdisc, pfifo_fast=PrioQdisc, cfifo=CfifoQdisc, plug=PlugQdisc)
