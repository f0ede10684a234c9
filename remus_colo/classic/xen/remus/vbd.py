# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks that are block devices of domain 0."""

from __future__ import annotations

from typing import Any

from xen.remus import blkdev

__all__ = ["VBD"]


class VBD(blkdev.BlkDev):
    @classmethod
    def handles(cls, **props: Any) -> bool:
        return str(props.get("uname", "")).startswith("phy:")


blkdev.register(VBD)
