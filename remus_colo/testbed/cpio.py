# SPDX-License-Identifier: LGPL-2.1-or-later
"""Write an initramfs archive: the "newc" format of the kernel's
Documentation/driver-api/early-userspace/buffer-format.rst, uncompressed."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Member:
    """One file (``content``) or directory (``content`` None); ``name`` without a leading slash."""

    name: str
    content: bytes | None = None
    mode: int = 0o755


def archive(members: Iterable[Member]) -> bytes:
    """The archive's bytes, parent directories included; the order of ``members`` is kept."""
    out = bytearray()
    for inode, member in enumerate(_with_parents(members), start=1):
        if member.content is None:
            _add(out, inode, member.name, stat.S_IFDIR | member.mode, b"")
        else:
            _add(out, inode, member.name, stat.S_IFREG | member.mode, member.content)
    _add(out, 0, "TRAILER!!!", 0, b"")
    return bytes(out)


def _with_parents(members: Iterable[Member]) -> Iterator[Member]:
    seen: set[str] = set()
    for member in members:
        parts = member.name.split("/")
        for depth in range(1, len(parts)):
            parent = "/".join(parts[:depth])
            if parent not in seen:
                seen.add(parent)
                yield Member(parent)
        if member.name not in seen:
            seen.add(member.name)
            yield member


def _add(out: bytearray, inode: int, name: str, mode: int, content: bytes) -> None:
    encoded = name.encode() + b"\0"
    # magic, ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
    out += b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
    out += bytes(-len(out) % 4)
    out += content
    out += bytes(-len(out) % 4)
