# SPDX-License-Identifier: LGPL-2.1-or-later
"""QMP as the bed uses it, with the bed's errors."""

from __future__ import annotations

from remus_colo.adapters import qmp
from remus_colo.testbed.errors import BedError, BedTimeout


class Qmp(qmp.Qmp):
    """:raise BedTimeout: QEMU does not answer; :raise BedError: it is gone, or refuses."""

    LATE = BedTimeout
    FAILED = BedError
