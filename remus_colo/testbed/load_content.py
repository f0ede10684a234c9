# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the guest's web server holds: the same bytes for the image's recipe and for the load generator.

Every static file is a pure function of its name and size, and its headers of its size, so a client can tell
a wrong byte anywhere in a response without asking the server first.
"""

from __future__ import annotations

import functools
import hashlib
from email.utils import formatdate

# File modification time inside the guest, seconds since the epoch (2024-01-01 00:00:00 UTC). It shows in
# Last-Modified and in the ETag, so both are the same for every build of the image.
MTIME_S = 1_704_067_200

#: Name of a static file to its size in bytes.
SIZES: dict[str, int] = {
    "1k": 1_000,
    "10k": 10_000,
    "100k": 100_000,
    "1m": 1_000_000,
    "10m": 10_000_000,
}

#: Bytes of the body of ``/random``: 64 hex digits and a newline.
RANDOM_BODY_BYTES = 65

#: Bytes of the body of ``/time``: seconds, a dot, nine digits and a newline (right until the year 2286).
TIME_BODY_BYTES = 21


@functools.lru_cache(maxsize=16)
def content(name: str, size: int) -> bytes:
    """The ``size`` bytes of the static file ``name``: SHAKE-128 (FIPS 202) of both."""
    return hashlib.shake_128(f"remus_colo:{name}:{size}".encode()).digest(size)


def static_header(size: int) -> bytes:
    """The exact header block, with its blank line, of a 200 answer to a keep-alive GET of a static file.

    nginx writes the ETag as modification time and size, both in hex.
    """
    lines = (
        "HTTP/1.1 200 OK",
        "Server: nginx",
        "Content-Type: application/octet-stream",
        f"Content-Length: {size}",
        f"Last-Modified: {formatdate(MTIME_S, usegmt=True)}",
        "Connection: keep-alive",
        f'ETag: "{MTIME_S:x}-{size:x}"',
        "Accept-Ranges: bytes",
    )
    return "\r\n".join((*lines, "", "")).encode()


def volatile_header(size: int) -> bytes:
    """The exact header block of a 200 answer to a keep-alive GET of ``/random`` or ``/time``."""
    lines = (
        "HTTP/1.1 200 OK",
        "Server: nginx",
        "Content-Type: text/plain",
        f"Content-Length: {size}",
        "Connection: keep-alive",
        "Cache-Control: no-store",
    )
    return "\r\n".join((*lines, "", "")).encode()
