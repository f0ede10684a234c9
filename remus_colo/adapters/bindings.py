# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find the distribution's ``xen`` Python bindings, which Debian keeps outside ``sys.path``."""

from __future__ import annotations

import functools
import glob
import importlib
import re
import sys
from types import ModuleType

from remus_colo.errors import HostError

# Where distributions put them: Debian per Xen version, others in a prefix.
PATTERNS = (
    "/usr/lib/xen-*/lib/python",
    "/usr/lib/xen-*/lib/python3*/site-packages",
    "/usr/lib/xen*/lib64/python",
    "/usr/local/lib/python3*/site-packages",
    "/usr/local/lib/python3*/dist-packages",
)


def _version_key(path: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", path))


def candidates() -> list[str]:
    """Folders that may hold ``xen.lowlevel``, the one of the running Xen first, then newest first."""
    found = [path for pattern in PATTERNS for path in glob.glob(pattern)]
    found.sort(key=_version_key, reverse=True)
    try:
        with open("/sys/hypervisor/version/major", encoding="ascii") as major_file:
            major = major_file.read().strip()
        with open("/sys/hypervisor/version/minor", encoding="ascii") as minor_file:
            running = f"/xen-{major}.{minor_file.read().strip()}/"
        found.sort(key=lambda path: running not in path)
    except OSError:
        pass  # not on Xen: any order will do
    return found


@functools.cache
def lowlevel(name: str) -> ModuleType:
    """Import ``xen.lowlevel.<name>`` (``xc`` or ``xs``).

    :raise HostError: if no folder holds bindings for this Python.
    """
    try:
        return importlib.import_module(f"xen.lowlevel.{name}")
    except ImportError as first:
        reason: ImportError = first
    for path in candidates():
        sys.path.append(path)
        sys.modules.pop("xen.lowlevel", None)
        sys.modules.pop("xen", None)
        try:
            return importlib.import_module(f"xen.lowlevel.{name}")
        except ImportError as error:
            sys.path.remove(path)
            reason = error
    raise HostError(
        f"the Xen Python bindings (xen.lowlevel.{name}) were not found ({reason}): "
        "install your distribution's xen-utils package for the running Xen"
    ) from reason
