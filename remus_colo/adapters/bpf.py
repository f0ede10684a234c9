# SPDX-License-Identifier: LGPL-2.1-or-later
"""Classic BPF filters on packet sockets, so that the kernel drops what nobody wants (<linux/filter.h>,
<linux/bpf_common.h>).
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Sequence

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, operand.  Jumps are relative to the next instruction."""

# Codes: BPF_LD | BPF_ABS with a size, BPF_JMP | BPF_JEQ, BPF_RET.
_LOAD_WORD = 0x20
_LOAD_HALF = 0x28
_LOAD_BYTE = 0x30
_JUMP_EQUAL = 0x15
_RETURN = 0x06

_DESTINATION, _ETHERTYPE = 0, 12
_IPV4_PROTOCOL = 14 + 9
_IPV6_NEXT_HEADER = 14 + 6
_ETHERTYPE_IPV4, _ETHERTYPE_ARP, _ETHERTYPE_IPV6 = 0x0800, 0x0806, 0x86DD
# SKF_AD_OFF + SKF_AD_VLAN_TAG_PRESENT: the kernel takes a tag out of the frame before a filter sees it.
_TAGGED = 0xFFFFF000 + 48
_SO_ATTACH_FILTER = 26  # <asm-generic/socket.h>

_WHOLE_FRAME = (_RETURN, 0, 0, 0xFFFFFFFF)
_NOTHING = (_RETURN, 0, 0, 0)

nothing: Sequence[Instruction] = (_NOTHING,)
everything: Sequence[Instruction] = (_WHOLE_FRAME,)
# ARP, and ICMPv6 directly behind the IP header, which neighbour discovery is (RFC 4861)
discovery: Sequence[Instruction] = (
    (_LOAD_HALF, 0, 0, _ETHERTYPE),
    (_JUMP_EQUAL, 3, 0, _ETHERTYPE_ARP),
    (_JUMP_EQUAL, 0, 3, _ETHERTYPE_IPV6),
    (_LOAD_BYTE, 0, 0, _IPV6_NEXT_HEADER),
    (_JUMP_EQUAL, 0, 1, socket.IPPROTO_ICMPV6),
    _WHOLE_FRAME,
    _NOTHING,
)


def untagged_tcp(version: int, destination: bytes | None = None) -> Sequence[Instruction]:
    """TCP directly behind the IP header, in frames without a VLAN tag.

    :param version: of IP, 4 or 6.
    :param destination: the only MAC address (6 bytes) that frames may go to, or None for any.
    """
    tests = [(_LOAD_BYTE, _TAGGED, 0)]
    if version == 4:
        tests += [(_LOAD_HALF, _ETHERTYPE, _ETHERTYPE_IPV4), (_LOAD_BYTE, _IPV4_PROTOCOL, socket.IPPROTO_TCP)]
    else:
        tests += [
            (_LOAD_HALF, _ETHERTYPE, _ETHERTYPE_IPV6),
            (_LOAD_BYTE, _IPV6_NEXT_HEADER, socket.IPPROTO_TCP),
        ]
    if destination is not None:
        high, low = struct.unpack("!IH", destination)
        tests += [(_LOAD_WORD, _DESTINATION, high), (_LOAD_HALF, _DESTINATION + 4, low)]
    return _all(tests)


def _all(tests: Sequence[tuple[int, int, int]]) -> Sequence[Instruction]:
    """Frames for which each load (code, operand) gives its value."""
    program: list[Instruction] = []
    for left, (load, operand, value) in zip(range(len(tests) - 1, -1, -1), tests, strict=True):
        # On a mismatch, past the other tests' two instructions each and the acceptance.
        program += [(load, 0, 0, operand), (_JUMP_EQUAL, 0, 2 * left + 1, value)]
    return (*program, _WHOLE_FRAME, _NOTHING)


def attach(sock: socket.socket, program: Sequence[Instruction]) -> None:
    """:raise OSError: the kernel does not take it."""
    packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    code = ctypes.create_string_buffer(packed)
    sock_fprog = struct.pack("HL", len(program), ctypes.addressof(code))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, sock_fprog)
