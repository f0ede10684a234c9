# SPDX-License-Identifier: LGPL-2.1-or-later
"""The wrapping that ``xl restore`` expects around libxenguest's stream: pure bytes.

Sources: ``tools/xl/xl.h`` (the save file's header) and ``docs/specs/libxl-migration-stream.pandoc``.
"""

from __future__ import annotations

import json
import struct
from typing import Any

SAVE_MAGIC = b"Xen saved domain, xl format\n \0 \r"
SAVE_HEADER = struct.Struct("<32sIIII")  # magic, byte order, mandatory flags, optional flags, optional size
assert SAVE_HEADER.size == 48
BYTE_ORDER = 0x01020304
FLAG_JSON = 1 << 0
FLAG_STREAM_V2 = 1 << 1

STREAM_HEADER = struct.Struct(">QII")  # ident, version, options: big endian whatever the body is
STREAM_IDENT = 0x4C6962786C466D74  # "LibxlFmt"
STREAM_VERSION = 2
RECORD_HEADER = struct.Struct("<II")  # type, length
RECORD_END = 0
RECORD_LIBXC_CONTEXT = 1


def prologue(config: dict[str, Any]) -> bytes:
    """All that comes before libxenguest's stream.

    :param config: libxl's JSON configuration of the domain to be made.
    """
    text = json.dumps(config).encode() + b"\0"
    optional = struct.pack("<I", len(text)) + text
    return (
        SAVE_HEADER.pack(SAVE_MAGIC, BYTE_ORDER, FLAG_JSON | FLAG_STREAM_V2, 0, len(optional))
        + optional
        + STREAM_HEADER.pack(STREAM_IDENT, STREAM_VERSION, 0)
        + RECORD_HEADER.pack(RECORD_LIBXC_CONTEXT, 0)
    )


def epilogue() -> bytes:
    """What comes after it."""
    return RECORD_HEADER.pack(RECORD_END, 0)
