# SPDX-License-Identifier: LGPL-2.1-or-later
"""The header of a domain that was saved as xend did it: a signature, a length, and so many bytes that
describe the domain.

Source: Xen 4.4, tools/python/xen/xend/XendCheckpoint.py.
"""

from __future__ import annotations

import struct

SIGNATURE = b"LinuxGuestRecord"
# As long, and another: a receiver that knows only the first says at once that it is no guest's state.
COLO_SIGNATURE = b"LinuxColoRecord2"
LENGTH = struct.Struct("!i")
DESCRIPTION_LIMIT_BYTES = 1 << 20
