# SPDX-License-Identifier: LGPL-2.1-or-later
"""The two compiled modules: what needs no Xen (comparator, packet queue, frames, compression), and the calls into Xen's libraries."""

from __future__ import annotations

from typing import Any

from remus_colo._native import compare_module
from remus_colo.errors import HostError


def compiled() -> tuple[Any, Any]:
    """``(lib, ffi)`` of ``remus_colo._native._compare``.

    :raise HostError: it is not installed and cannot be built here.
    """
    module = compare_module.load()
    return module.lib, module.ffi


def compiled_for_xen() -> tuple[Any, Any]:
    """``(lib, ffi)`` of ``remus_colo._native._xen``.

    :raise HostError: it is not installed, or is for another Xen.
    """
    try:
        from remus_colo._native import _xen  # type: ignore[attr-defined]
    except ImportError as error:
        raise HostError(
            f"the compiled part of remus_colo is missing or does not fit this Xen ({error}): "
            "install libxen-dev and reinstall the package"
        ) from error
    return _xen.lib, _xen.ffi
