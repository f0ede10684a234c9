# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes an initramfs: the "newc" cpio format of the kernel's Documentation/driver-api/early-userspace/buffer-format.

Pure: nodes in, bytes out, and the same nodes give the same bytes.  Needs no root, since owners, modes and device
nodes are only written, never made.
"""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Iterable, Iterator

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
_ALIGN_BYTES = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """One file of the root.

    :param path: relative to the root, without a leading slash.
    :param mode: type and permissions, as in ``st_mode``.
    :param data: a regular file's bytes, or a symbolic link's target.
    :param device: (major, minor) of a device node.
    """

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(path: str, mode: int = 0o755) -> Node:
    return Node(path, stat.S_IFDIR | mode)


def regular(path: str, data: bytes, mode: int = 0o644) -> Node:
    return Node(path, stat.S_IFREG | mode, data)


def symlink(path: str, target: str) -> Node:
    return Node(path, stat.S_IFLNK | 0o777, target.encode())


def character_device(path: str, major: int, minor: int, mode: int = 0o600) -> Node:
    return Node(path, stat.S_IFCHR | mode, device=(major, minor))


def archive(nodes: Iterable[Node], mtime_s: int) -> bytes:
    """The archive of ``nodes`` in path order, all owned by root, with the directories they need.

    :param mtime_s: modification time of every node, seconds since the epoch.
    :raises ValueError: two nodes have the same path, or one lies below something that is no directory.
    """
    by_path: dict[str, Node] = {}
    for node in nodes:
        if node.path in by_path:
            raise ValueError(f"two files for {node.path!r} in one root")
        by_path[node.path] = node
    for path in list(by_path):
        for parent in _parents(path):
            above = by_path.setdefault(parent, directory(parent))
            if not stat.S_ISDIR(above.mode):
                raise ValueError(f"{path!r} lies below {parent!r}, which is no directory")
    # A parent sorts before what is in it, as the kernel's unpacker needs.
    pieces = [_member(number, by_path[path], mtime_s) for number, path in enumerate(sorted(by_path), start=1)]
    pieces.append(_member(0, Node(_TRAILER, 0), 0))
    return b"".join(pieces)


def _parents(path: str) -> Iterator[str]:
    parts = path.split("/")[:-1]
    for depth in range(1, len(parts) + 1):
        yield "/".join(parts[:depth])


def _member(inode: int, node: Node, mtime_s: int) -> bytes:
    name = node.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(node.mode) else 1
    fields = (
        inode, node.mode, 0, 0, links, mtime_s, len(node.data), 0, 0, *node.device, len(name), 0,
    )  # fmt: skip
    header = _MAGIC + b"".join(b"%08X" % field for field in fields) + name
    return _padded(header) + _padded(node.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGN_BYTES)
