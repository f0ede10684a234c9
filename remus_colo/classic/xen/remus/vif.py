# SPDX-License-Identifier: LGPL-2.1-or-later
"""A virtual network interface, as a domain's description has it."""

from __future__ import annotations

from typing import Any

from xen.remus.util import canonifymac

__all__ = ["VIF", "parse"]


class VIF:
    """``dev`` is its name in domain 0; all that the description says is an attribute."""

    def __init__(self, **props: Any) -> None:
        self.dev = "unknown"
        self.mac = ""
        self.__dict__.update(props)
        if "mac" in props:
            self.mac = canonifymac(props["mac"])

    def __str__(self) -> str:
        return self.mac


def parse(props: dict[str, Any], domid: int, index: int) -> VIF:
    """The domain's vif of that index, from its description."""
    vif = VIF(**props)
    vif.dev = f"vif{domid}.{index}"
    return vif
