# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pipes that take much at once: each time that one is full or empty costs a turn of two programs."""

from __future__ import annotations

import contextlib
import fcntl
import os

PIPE_BYTES = 1 << 20  # what a pipe holds at most without privilege (/proc/sys/fs/pipe-max-size)


def wide_pipe() -> tuple[int, int]:
    """Both ends, to be read from and written to.  The system may refuse the width; the usual 64 KiB are 16 pages."""
    ends = os.pipe()
    with contextlib.suppress(OSError):
        fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return ends
