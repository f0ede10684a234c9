# SPDX-License-Identifier: LGPL-2.1-or-later
"""The compiled module that needs no Xen: comparator, packet queue, frames."""

from __future__ import annotations

from typing import Any

from remus_colo._native import compare_module


def compiled() -> tuple[Any, Any]:
    """``(lib, ffi)`` of ``remus_colo._native._compare``.

    :raise HostError: it is not installed and cannot be built here.
    """
    module = compare_module.load()
    return module.lib, module.ffi
