# SPDX-License-Identifier: LGPL-2.1-or-later
"""The initramfs writer: read back by a small reader of the kernel's rules, and by cpio itself where there is one."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remus_colo.testbed.guest_cpio import Node, archive, character_device, directory, regular, symlink

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

names = st.text("abcxyz.-_0", min_size=1, max_size=12).filter(lambda name: name not in (".", ".."))


def read(data: bytes) -> list[tuple[Node, int]]:
    """The nodes of an archive with their modification times, checking what the kernel relies on."""
    found = []
    offset = 0
    while True:
        assert offset % 4 == 0
        assert data[offset : offset + 6] == b"070701"
        fields = [int(data[offset + 6 + 8 * i : offset + 14 + 8 * i], 16) for i in range(13)]
        _, mode, uid, gid, links, mtime_s, size, _, _, major, minor, name_bytes, checksum = fields
        assert (uid, gid, checksum) == (0, 0, 0)
        begin = offset + 110
        name = data[begin : begin + name_bytes]
        assert name[-1:] == b"\0"
        begin += name_bytes + -(110 + name_bytes) % 4
        offset = begin + size + -size % 4
        if name == b"TRAILER!!!\0":
            assert offset == len(data)
            return found
        assert links == (2 if stat.S_ISDIR(mode) else 1)
        found.append((Node(name[:-1].decode(), mode, data[begin : begin + size], (major, minor)), mtime_s))


@given(st.dictionaries(names, st.binary(max_size=50), max_size=10))
def test_files_of_any_size_come_back(files: dict[str, bytes]) -> None:
    nodes = [regular(f"in/{name}", data, 0o755) for name, data in files.items()]
    back = read(archive(nodes, 1234))
    expected = ([directory("in")] if files else []) + sorted(nodes, key=lambda node: node.path)
    assert [node for node, _ in back] == expected
    assert {mtime_s for _, mtime_s in back} <= {1234}


def test_the_same_nodes_in_another_order_give_the_same_bytes() -> None:
    nodes = [regular("a/b", b"1"), symlink("c", "a/b"), character_device("dev/console", 5, 1)]
    assert archive(nodes, 0) == archive(reversed(nodes), 0)


def test_a_directory_comes_before_what_is_in_it() -> None:
    paths = [
        node.path for node, _ in read(archive([regular("usr/lib/x.so", b""), directory("usr-local")], 0))
    ]
    assert paths.index("usr") < paths.index("usr/lib") < paths.index("usr/lib/x.so")


def test_a_directorys_own_mode_stands() -> None:
    nodes = {
        node.path: node for node, _ in read(archive([regular("tmp/x", b""), directory("tmp", 0o1777)], 0))
    }
    assert nodes["tmp"].mode == stat.S_IFDIR | 0o1777


def test_two_files_for_one_path_are_refused() -> None:
    with pytest.raises(ValueError, match="two files for 'a'"):
        archive([regular("a", b""), symlink("a", "b")], 0)


def test_a_file_below_a_file_is_refused() -> None:
    with pytest.raises(ValueError, match="'bin', which is no directory"):
        archive([symlink("bin", "usr/bin"), regular("bin/sh", b"")], 0)


@pytest.mark.skipif(not shutil.which("cpio"), reason="the command cpio is not installed")
def test_cpio_reads_it(tmp_path: Path) -> None:
    data = archive([regular("etc/hosts", b"hello", 0o640), symlink("bin", "usr/bin")], 1_700_000_000)
    subprocess.run(["cpio", "-idm", "--quiet"], input=data, cwd=tmp_path, check=True)
    assert (tmp_path / "etc/hosts").read_bytes() == b"hello"
    assert (tmp_path / "etc/hosts").stat().st_mode == stat.S_IFREG | 0o640
    assert (tmp_path / "etc/hosts").stat().st_mtime == 1_700_000_000
    assert (tmp_path / "bin").readlink() == Path("usr/bin")
