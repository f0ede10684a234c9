# SPDX-License-Identifier: LGPL-2.1-or-later
"""What xend raised."""

from __future__ import annotations

from remus_colo.errors import RemusError


class XendError(RemusError):
    """:ivar value: what is wrong."""

    def __init__(self, value: str) -> None:
        super().__init__(value)
        self.value = value


class VmError(XendError):
    """A domain cannot be made."""
