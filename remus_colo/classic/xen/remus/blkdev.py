# SPDX-License-Identifier: LGPL-2.1-or-later
"""A virtual disk, as a domain's description has it."""

from __future__ import annotations

from typing import Any

__all__ = ["BlkDev", "BlkDevException", "handlers", "parse", "register"]

handlers: list[type[BlkDev]] = []


class BlkDevException(Exception):
    """A description lacks something."""


class BlkDev:
    """``uname`` is what it is made of (``phy:/dev/vg/web``), ``dev`` its name in the guest, ``mode`` ``r`` or ``w``;
    all that the description says is an attribute."""

    def __init__(self, **props: Any) -> None:
        self.uname = ""
        self.mode = ""
        for name, missing in (("dev", "no device"), ("mode", "no mode")):
            if name not in props:
                raise BlkDevException(missing)
        self.__dict__.update(props)
        self.dev = str(props["dev"]).removesuffix(":disk")

    @classmethod
    def handles(cls, **props: Any) -> bool:
        """Whether this class is the one for such a disk."""
        return False

    def __str__(self) -> str:
        return f"{self.uname},{self.dev},{self.mode}"


def register(handler: type[BlkDev]) -> None:
    """Have :func:`parse` ask this class first."""
    if handler not in handlers:
        handlers.insert(0, handler)


def parse(props: dict[str, Any]) -> BlkDev:
    """A disk from its description, of the class that handles it."""
    for handler in handlers:
        if handler.handles(**props):
            return handler(**props)
    return BlkDev(**props)
