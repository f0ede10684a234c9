# SPDX-License-Identifier: LGPL-2.1-or-later
"""How much memory this host, which is dom0, has left (proc_meminfo(5))."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")


def available_bytes() -> int:
    """What programs can have before others are swapped out, or killed.

    :raise OSError: the kernel does not tell.
    """
    for line in _MEMINFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise OSError(f"{_MEMINFO} has no MemAvailable")
