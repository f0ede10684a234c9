# SPDX-License-Identifier: LGPL-2.1-or-later
"""Debian's source package: apt's records, and series of patches."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from remus_colo.errors import HostError
from remus_colo.testbed import xen_build, xen_source

PATIENCE_S = 60.0

# As apt-cache(8) showsrc prints it, shortened.
SHOWN = """\
Package: xen
Format: 3.0 (quilt)
Binary: libxen-dev, xen-hypervisor-4.20-amd64
Version: 4.20.3+127-g0123456789-0+deb13u1
Checksums-Sha256:
 1111 5001 xen_4.20.3+127-g0123456789.orig.tar.xz
 2222 140 xen_4.20.3+127-g0123456789-0+deb13u1.debian.tar.xz
 3333 4 xen_4.20.3+127-g0123456789-0+deb13u1.dsc
Directory: pool/main/x/xen

Package: xen
Version: 4.20.10-1
Checksums-Sha256:
 4444 5001 xen_4.20.10.orig.tar.xz
 5555 140 xen_4.20.10-1.debian.tar.xz

Package: xen-tools
Version: 9.0-1
Checksums-Sha256:
 6666 1 xen-tools_9.0.orig.tar.xz
 7777 1 xen-tools_9.0-1.debian.tar.xz

Package: xen
Version: 4.99-1
Checksums-Sha256:
 8888 1 xen_4.99.tar.gz
"""


@pytest.mark.skipif(not shutil.which("dpkg"), reason="no dpkg to compare versions")
def test_the_newest_version_comes_first_and_what_is_no_quilt_package_not_at_all() -> None:
    found = xen_source.records(SHOWN)
    assert [record.version for record in found] == ["4.20.10-1", "4.20.3+127-g0123456789-0+deb13u1"]
    assert found[1].archives == {
        "xen_4.20.3+127-g0123456789.orig.tar.xz": "1111",
        "xen_4.20.3+127-g0123456789-0+deb13u1.debian.tar.xz": "2222",
    }


def series(directory: Path, *patches: str) -> Path:
    directory.mkdir()
    names = []
    for number, text in enumerate(patches):
        names.append(f"{number}.patch")
        (directory / names[-1]).write_text(text)
    (directory / "series").write_text("# in order\n\n" + "".join(f"{name}  # why\n" for name in names))
    return directory


def change(old: str, new: str, context: str = "same") -> str:
    return f"--- a/file\n+++ b/file\n@@ -1,2 +1,2 @@\n {context}\n-{old}\n+{new}\n"


@pytest.mark.skipif(not shutil.which("patch"), reason="no patch program")
def test_a_series_is_applied_in_order(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_text("same\none\n")
    patches = series(tmp_path / "patches", change("one", "two"), change("two", "three"))
    assert xen_source.apply_series(tree, patches) == ["0.patch", "1.patch"]
    assert (tree / "file").read_text() == "same\nthree\n"
    with pytest.raises(HostError, match=r"0\.patch does not apply to tree"):
        xen_source.apply_series(tree, patches)


@pytest.mark.skipif(not shutil.which("patch"), reason="no patch program")
def test_a_patch_whose_context_has_changed_is_refused(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_text("other\none\n")
    with pytest.raises(HostError, match="does not apply"):
        xen_source.apply_series(tree, series(tmp_path / "patches", change("one", "two")))


@pytest.mark.parametrize("release", xen_source.SUITES)
def test_every_series_of_this_checkout_names_just_what_is_there(release: str) -> None:
    directories = [path.parent for path in (xen_build.PATCHES / release).glob("*/series")]
    assert xen_build.PATCHES / release / "hypervisor" in directories
    for directory in directories:
        named = (directory / "series").read_text().split()
        assert sorted(named) == sorted(path.name for path in directory.glob("*.patch"))
        for name in named:
            assert "\nSigned-off-by: " in (directory / name).read_text()


def tree(directory: Path, makefile: str) -> Path:
    (directory / "xen").mkdir()
    (directory / "xen" / "Makefile").write_text(makefile)
    return directory


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_a_build_that_fails_shows_why(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"does not build \(make all\):\n(.*\n)*no such thing"):
        xen_build._make(tree(tmp_path, "all:\n\t@echo no such thing; false\n"), "all")


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_a_build_that_takes_too_long_is_ended_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xen_build, "BUILD_LIMIT_S", 5)
    with pytest.raises(HostError, match="not built within 5 s"):
        xen_build._make(tree(tmp_path, "all:\n\t@sleep 1000 & echo $$! > ../pid; wait\n"), "all")
    compiler = int((tmp_path / "pid").read_text())
    # Killed, but it ends only when it gets the processor.
    deadline_s = time.monotonic() + PATIENCE_S
    while not ended(compiler):
        assert time.monotonic() < deadline_s, "it goes on"
        time.sleep(0.01)


def ended(pid: int) -> bool:
    """Gone, or a zombie until whoever adopted it looks."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


class Archives:
    """As :class:`guest_debian.Release`, whose index names what its pool has not got.

    :param pool: files by name.
    """

    def __init__(self, pool: dict[str, bytes]) -> None:
        self.pool = pool
        self.asked: list[str] = []

    def __call__(self, *_: object, **__: object) -> Archives:
        return self

    def update(self) -> None:
        pass

    def show_source(self, package: str) -> str:
        return SHOWN

    def fetch_source(self, package: str, version: str, target: Path) -> str:
        self.asked.append(version)
        return "404 Not Found"

    def fetch_pool(self, directory: str, name: str, sha256: str, target: Path) -> None:
        assert directory == "pool/main/x/xen"
        if name not in self.pool:
            raise HostError(f"404 for {name}")
        (target / name).write_bytes(self.pool[name])


@pytest.mark.skipif(not shutil.which("dpkg"), reason="no dpkg to compare versions")
@pytest.mark.parametrize("there", [True, False])
def test_an_index_ahead_of_its_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    base = xen_source._base("debian-13")
    archives = Archives(dict.fromkeys(base.archives, b"content") if there else {})
    monkeypatch.setenv("REMUS_COLO_CACHE", str(tmp_path))
    monkeypatch.setattr(xen_source.guest_debian, "Release", archives)
    if there:
        found = xen_source.source("debian-13")
        assert (found.version, found.upstream.read_bytes()) == (base.version, b"content")
    else:
        with pytest.raises(
            HostError, match=r"404 Not Found; nor can 4[.]20.*for which the series was made: 404 for"
        ):
            xen_source.source("debian-13")
    assert archives.asked[0] == "4.20.10-1"


@pytest.mark.parametrize("release", xen_source.SUITES)
def test_each_series_tells_what_it_was_made_for(release: str) -> None:
    base = xen_source._base(release)
    assert sorted(name.partition(".orig")[0].endswith(".debian.tar.xz") for name in base.archives) == [
        False,
        True,
    ]
    assert all(len(digest) == 64 for digest in base.archives.values())
