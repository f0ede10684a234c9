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
RECORD_EMULATOR_XENSTORE_DATA = 2
RECORD_EMULATOR_CONTEXT = 3
RECORD_CHECKPOINT_END = 4
RECORD_ALIGNMENT = 8
EMULATOR_HEADER = struct.Struct("<II")  # which emulator, its index
EMULATOR_QEMU_UPSTREAM = 2


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


def checkpoint_end(device_model: bytes = b"", device_model_xenstore: bytes = b"") -> bytes:
    """What follows libxenguest's CHECKPOINT record in a checkpointed stream.

    :param device_model: state of an HVM guest's QEMU, as it saves it; empty for a guest without one.
    :param device_model_xenstore: its xenstore nodes, each a path and a value that end with a zero byte.
    """
    records = []
    if device_model:
        header = EMULATOR_HEADER.pack(EMULATOR_QEMU_UPSTREAM, 0)
        if device_model_xenstore:
            records.append(_record(RECORD_EMULATOR_XENSTORE_DATA, header + device_model_xenstore))
        records.append(_record(RECORD_EMULATOR_CONTEXT, header + device_model))
    records.append(_record(RECORD_CHECKPOINT_END, b""))
    return b"".join(records)


def _record(kind: int, body: bytes) -> bytes:
    return RECORD_HEADER.pack(kind, len(body)) + body + bytes(-len(body) % RECORD_ALIGNMENT)
