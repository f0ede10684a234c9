# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which shared libraries a program needs, read from its ELF file: 64-bit, little endian, as amd64 has them.

Structures and constants are those of ``<elf.h>``.  Pure: bytes in, names out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

_HEADER = struct.Struct("<4sBB10xHHIQQQIHHHHHH")  # Elf64_Ehdr
_SEGMENT = struct.Struct("<IIQQQQQQ")  # Elf64_Phdr
_DYNAMIC = struct.Struct("<qQ")  # Elf64_Dyn
_CLASS_64, _LITTLE_ENDIAN = 2, 1
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NULL, _DT_NEEDED, _DT_STRTAB = 0, 1, 5


def needed(image: bytes) -> list[str]:
    """The names of the libraries that the ELF file ``image`` is linked with; empty for a static one.

    :raises ValueError: ``image`` is not an ELF file of this machine's kind.
    """
    if len(image) < _HEADER.size or image[:4] != b"\x7fELF":
        raise ValueError("not an ELF file")
    fields = _HEADER.unpack_from(image)
    if fields[1:3] != (_CLASS_64, _LITTLE_ENDIAN):
        raise ValueError("not a 64-bit little-endian ELF file")
    offset, count = fields[7], fields[12]
    segments = [_SEGMENT.unpack_from(image, offset + i * _SEGMENT.size) for i in range(count)]
    tags: list[tuple[int, int]] = []
    for kind, _, start, _, _, in_file_bytes, _, _ in segments:
        if kind == _PT_DYNAMIC:
            tags = list(_DYNAMIC.iter_unpack(image[start : start + in_file_bytes]))
    names: list[int] = []
    strings = 0
    for tag, value in tags:
        if tag == _DT_NULL:
            break
        if tag == _DT_NEEDED:
            names.append(value)
        elif tag == _DT_STRTAB:
            strings = _file_offset(segments, value)
    return [_string(image, strings + name) for name in names]


def _file_offset(segments: Iterable[tuple[int, ...]], address: int) -> int:
    for kind, _, start, virtual, _, in_file_bytes, _, _ in segments:
        if kind == _PT_LOAD and virtual <= address < virtual + in_file_bytes:
            return start + address - virtual
    raise ValueError(f"address {address:#x} lies in no loaded segment")


def _string(image: bytes, offset: int) -> str:
    return image[offset : image.index(b"\0", offset)].decode()


def closure(programs: Iterable[bytes], libraries: Mapping[str, bytes]) -> set[str]:
    """Names of all libraries that the ELF files ``programs`` need, directly or through another library.

    :param libraries: every library there is, by the name that programs link with.
    :raises KeyError: a needed library is not among them.
    """
    found: set[str] = set()
    waiting = list(programs)
    while waiting:
        for name in needed(waiting.pop()):
            if name not in found:
                found.add(name)
                waiting.append(libraries[name])
    return found
