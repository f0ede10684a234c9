# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain: its name, numbers, vifs and disks, from libxl where xend used to be asked."""

from __future__ import annotations

from typing import Any

from xen.remus import blkdev, vif
from xen.remus import vbd as vbd  # its disks register themselves
from xen.xend import sxp

from remus_colo import dominfo as description
from remus_colo.adapters import toolstack
from remus_colo.errors import RemusError

__all__ = [
    "VM",
    "VMException",
    "domtosxpr",
    "fromxend",
    "getdisks",
    "getshadowmem",
    "getvifs",
    "parsedominfo",
    "strtosxpr",
    "sxprtostr",
]


class VMException(Exception):
    """There is no such domain."""


class VM:
    """One domain.

    :param domid: number, name or UUID of a domain that runs here.
    :param dominfo: its description as an S-expression, instead.
    :ivar config: libxl's configuration of one that runs here.
    """

    def __init__(self, domid: int | str | None = None, dominfo: list[Any] | None = None) -> None:
        self.dominfo = dominfo
        self.config: dict[str, Any] | None = None
        self.domid = -1
        self.name = "unknown"
        self.dom: dict[str, Any] = {}
        self.disks: list[blkdev.BlkDev] = []
        self.vifs: list[vif.VIF] = []
        if domid:
            try:
                number = toolstack.find_domain(str(domid))
                self.config = toolstack.domain_config(number)
                self.dominfo = description.from_libxl(number, self.config)
            except RemusError as error:
                raise VMException(f"error looking up domain {domid}: {error}") from error
        if self.dominfo:
            self.loaddominfo()

    def loaddominfo(self) -> None:
        assert self.dominfo is not None
        self.dom = parsedominfo(self.dominfo)
        self.domid = _number(self.dom)
        self.name = self.dom["name"]
        self.disks = getdisks(self.dom)
        self.vifs = getvifs(self.dom)

    def __str__(self) -> str:
        vifs, disks = ", ".join(map(str, self.vifs)), ", ".join(map(str, self.disks))
        return f"VM {self.domid} ({self.name}), vifs: [{vifs}], disks: [{disks}]"


parsedominfo = description.parse
domtosxpr = description.unparse


def strtosxpr(s: str | bytes) -> list[Any]:
    """The first S-expression of a text."""
    parser = sxp.Parser()
    parser.input(s)
    parser.input_eof()
    found: list[Any] = parser.get_val()
    return found


def sxprtostr(sxpr: list[Any]) -> str:
    return sxp.to_string(sxpr)


def _number(dom: dict[str, Any]) -> int:
    """Of a domain; -1 if it does not run, and so has none."""
    return int(dom.get("domid", -1))


def _devices(dom: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    found = (dom.get("device") or {}).get(kind, [])
    # (device (vif)) is what xm made of vif = ['']
    return [props or {} for props in (found if isinstance(found, list) else [found])]


def getvifs(dom: dict[str, Any]) -> list[vif.VIF]:
    """The vifs of a parsed description."""
    return [vif.parse(props, _number(dom), index) for index, props in enumerate(_devices(dom, "vif"))]


def getdisks(dom: dict[str, Any]) -> list[blkdev.BlkDev]:
    """Its disks; those of blktap, which old descriptions have, after the others."""
    return [blkdev.parse(props) for kind in ("vbd", "tap", "tap2") for props in _devices(dom, kind)]


def fromxend(domid: int | str) -> VM:
    return VM(domid)


def getshadowmem(vm: VM) -> None:
    """Nothing is to be done any more: libxl gives each domain what its dirty log needs when it makes it.

    xend gave it to a domain only now, and took it from domain 0.

    :raise VMException: the domain has not been looked up.
    """
    if vm.domid < 0:
        raise VMException("the domain has not been looked up")
