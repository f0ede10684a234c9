# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks of blktap, which Xen has no more: the class is there, no disk is of it."""

from __future__ import annotations

from xen.remus.blkdev import BlkDev

__all__ = ["TapDisk"]


class TapDisk(BlkDev):
    pass
