# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records of an HVM context, as ``xc_domain_hvm_getcontext`` gives them. Pure.

Sources: ``struct hvm_save_descriptor`` of public/hvm/save.h; ``HVM_SAVE_TYPE(LAPIC_REGS)`` of
public/arch-x86/hvm/save.h; the local APIC's register page of the Intel SDM, volume 3A, table 10-1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from remus_colo.errors import MessageError

DESCRIPTOR = struct.Struct("<HHI")  # typecode, instance, length
assert DESCRIPTOR.size == 8
TYPE_END = 0
TYPE_LAPIC_REGS = 6
IRR_OFFSET = 0x200  # eight 32-bit registers, one each 16 bytes


def records(context: bytes | bytearray) -> Iterator[tuple[int, int, int, int]]:
    """``(typecode, instance, offset of the body, length)`` of each record.

    :raise MessageError: if the context ends within a record or has no end.
    """
    offset = 0
    while offset + DESCRIPTOR.size <= len(context):
        typecode, instance, length = DESCRIPTOR.unpack_from(context, offset)
        offset += DESCRIPTOR.size
        if offset + length > len(context):
            break
        if typecode == TYPE_END:
            return
        yield typecode, instance, offset, length
        offset += length
    raise MessageError(f"an HVM context of {len(context)} bytes ends within a record")


def without_request(context: bytes, vector: int) -> bytes:
    """The context with no interrupt of ``vector`` requested at any local APIC.

    :param vector: 16 to 255.
    """
    if not 16 <= vector <= 255:
        raise ValueError(f"{vector} is no interrupt vector")
    edited = bytearray(context)
    place = IRR_OFFSET + vector // 32 * 16 + vector % 32 // 8
    for typecode, _instance, offset, length in records(context):
        if typecode == TYPE_LAPIC_REGS and place < length:
            edited[offset + place] &= ~(1 << vector % 8) & 0xFF
    return bytes(edited)
