# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the adapters over pyroute2 share: the translation of its errors."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from pyroute2.netlink.exceptions import NetlinkError

from remus_colo.adapters import kmod
from remus_colo.errors import HostError, NetworkError


@contextlib.contextmanager
def reporting(action: str, *, module: str = "") -> Iterator[None]:
    """Translate pyroute2's errors.

    :param action: what is tried, to go after "cannot".
    :param module: kernel module that the action needs, if any.
    :raise HostError: no permission, or the module is missing.
    :raise NetworkError: anything else.
    """
    try:
        yield
    except NetlinkError as exc:
        if exc.code in (errno.EPERM, errno.EACCES):
            raise HostError(f"cannot {action}: no permission; run as root") from exc
        # The kernel says ENOENT for an unknown qdisc, classifier or action, EOPNOTSUPP for a link kind.
        if module and exc.code in (errno.EOPNOTSUPP, errno.ENOENT):
            raise kmod.missing(module, f"it to {action}", _reason(exc)) from exc
        raise NetworkError(f"cannot {action}: {_reason(exc)}") from exc
    except OSError as exc:
        raise NetworkError(f"cannot {action}: {exc.strerror or exc}") from exc


@contextlib.contextmanager
def tolerating(*errnos: int) -> Iterator[None]:
    """Let these errors of the kernel pass: what was to go is gone already."""
    try:
        yield
    except NetlinkError as exc:
        if exc.code not in errnos:
            raise


def _reason(exc: NetlinkError) -> str:
    text = str(exc.args[1]) if len(exc.args) > 1 and exc.args[1] else os.strerror(exc.code)
    return text.removesuffix(".")
