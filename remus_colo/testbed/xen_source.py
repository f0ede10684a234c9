# SPDX-License-Identifier: LGPL-2.1-or-later
"""Debian's source package of Xen: fetched through apt, kept in the cache, unpacked with Debian's own changes.

The package has the format "3.0 (quilt)" (dpkg-source(1)): an upstream archive, and one with the directory
``debian``, whose ``patches/series`` names what is applied in order.  What is fetched is checked against the index
that Debian signs.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from remus_colo.errors import HostError
from remus_colo.testbed import cache, guest_debian
from remus_colo.testbed.commands import run

log = logging.getLogger(__name__)

PATCHES = Path(__file__).resolve().parents[2] / "patches"
PACKAGE = "xen"
SUITES = {"debian-13": "trixie", "debian-12": "bookworm"}
_ARCHIVES = (".orig.tar.xz", ".debian.tar.xz")  # XenSource's upstream and debian


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """One version of the package in apt's index.

    :ivar archives: SHA-256 of the two archives, by file name.
    """

    version: str
    archives: dict[str, str]


@dataclass(frozen=True, slots=True)
class XenSource:
    """A source package in the cache."""

    release: str  # debian-12, debian-13
    version: str
    upstream: Path
    debian: Path

    def unpack(self, target: Path) -> None:
        """Make the directory ``target`` the tree that Debian builds."""
        target.mkdir(parents=True)
        run(["tar", "-xJf", self.upstream, "-C", target, "--strip-components=1"], timeout_s=300)
        run(["tar", "-xJf", self.debian, "-C", target], timeout_s=60)
        apply_series(target, target / "debian" / "patches")


def records(shown: str) -> list[SourceRecord]:
    """What ``apt-cache showsrc`` printed, the newest version first; other packages are left out."""
    found = []
    for stanza in re.split(r"\n\s*\n", shown):
        name = re.search(r"^Package: (\S+)$", stanza, re.MULTILINE)
        version = re.search(r"^Version: (\S+)$", stanza, re.MULTILINE)
        sums = re.search(r"^Checksums-Sha256:\s*\n((?: .*\n?)+)", stanza, re.MULTILINE)
        if not (name and version and sums) or name[1] != PACKAGE:
            continue
        words = [line.split() for line in sums[1].splitlines()]
        archives = {file: digest for digest, _, file in words if file.endswith(_ARCHIVES)}
        if len(archives) == len(_ARCHIVES):
            found.append(SourceRecord(version[1], archives))
    return sorted(found, key=functools.cmp_to_key(_compare), reverse=True)


def _compare(one: SourceRecord, other: SourceRecord) -> int:
    if one.version == other.version:
        return 0
    words = ["dpkg", "--compare-versions", one.version, "lt", other.version]
    return -1 if run(words, timeout_s=20, check=False).returncode == 0 else 1


def source(release: str, *, fresh: bool = False) -> XenSource:
    """The source package of a Debian release.

    :param release: a key of ``SUITES``.
    :param fresh: look for a newer version than the one that is in the cache.
    :raise HostError: apt has no sources of this release, or they cannot be fetched.
    """
    pointer = cache.cache_dir() / f"xen-source-{release}.json"
    if not fresh and pointer.exists():
        known = json.loads(pointer.read_text())
        found = _in_cache(release, SourceRecord(known["version"], known["archives"]))
        if found is not None:
            return found
    with cache.locked(cache.cache_dir() / "xen-source-apt.lock"):
        record = _fetch_newest(release)
    pointer.write_text(json.dumps({"version": record.version, "archives": record.archives}))
    found = _in_cache(release, record)
    assert found is not None
    return found


def _entry_recipe(record: SourceRecord) -> dict[str, object]:
    return {"version": record.version, "archives": record.archives}


def _in_cache(release: str, record: SourceRecord) -> XenSource | None:
    path = cache.cache_dir() / f"xen-source-{cache.recipe_hash(_entry_recipe(record))}"
    if not path.exists():
        return None
    os.utime(path)
    upstream, debian = (path / file for end in _ARCHIVES for file in record.archives if file.endswith(end))
    return XenSource(release, record.version, upstream, debian)


def _fetch_newest(release: str) -> SourceRecord:
    """Put the newest version that can be had into the cache.

    A mirror may lag behind its own index, or lack what only the security archive has: then the next older version
    is taken, and said so; at last the one for which the series was made, which archives keep for a while.
    """
    suite = SUITES[release]
    apt = guest_debian.Release(suite, cache.cache_dir() / f"source-apt-{suite}", log.info, sources=True)
    apt.update()
    shown = apt.show_source(PACKAGE)
    candidates = records(shown)
    if not candidates:
        raise HostError(
            f"apt found no source package {PACKAGE} of Debian {suite}: name another mirror in REMUS_COLO_MIRROR"
        )
    failures = []
    for record in candidates:
        try:
            cache.entry("xen-source", _entry_recipe(record), functools.partial(_fetch, apt, record))
            return record
        except HostError as error:
            log.warning("version %s of %s cannot be had: %s", record.version, PACKAGE, error)
            failures.append(str(error))
    base = _base(release)
    places = set(re.findall(r"^Directory: (\S+)$", shown, re.MULTILINE))
    for place in sorted(places):
        try:
            cache.entry("xen-source", _entry_recipe(base), functools.partial(_fetch_base, apt, place, base))
        except HostError as error:
            failures.append(str(error))
        else:
            log.warning("taking version %s, for which the series was made", base.version)
            return base
    raise HostError(
        f"no version of Debian {suite}'s source package {PACKAGE} can be had: {failures[0]}; nor can {base.version}, "
        f"for which the series was made: {failures[-1]}"
    )


def _base(release: str) -> SourceRecord:
    """The version for which our series of patches was made."""
    known = json.loads((PATCHES / release / "base.json").read_text())
    return SourceRecord(known["version"], known["archives"])


def _fetch_base(apt: guest_debian.Release, directory: str, record: SourceRecord, path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="xen-fetching-", dir=cache.cache_dir()) as scratch:
        for name, digest in record.archives.items():
            apt.fetch_pool(directory, name, digest, Path(scratch))
        path.mkdir()
        for name in record.archives:
            shutil.move(Path(scratch) / name, path / name)


def _fetch(apt: guest_debian.Release, record: SourceRecord, path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="xen-fetching-", dir=cache.cache_dir()) as scratch:
        said = apt.fetch_source(PACKAGE, record.version, Path(scratch))
        path.mkdir()
        for name, digest in record.archives.items():
            file = Path(scratch) / name
            if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
                shutil.rmtree(path)
                raise HostError(said or f"{name} is not what Debian's index says")
            shutil.move(file, path / name)


def apply_series(tree: Path, patches: Path) -> list[str]:
    """Apply the patches that ``series`` in a directory names, each exactly where it says (no fuzz); their names.

    :raise HostError: one does not fit.
    """
    applied = []
    for line in (patches / "series").read_text().splitlines():
        name = line.partition("#")[0].strip()
        if not name:
            continue
        words = [
            "patch",
            "--quiet",
            "--batch",
            "--forward",
            "--fuzz=0",
            "--strip=1",
            "--no-backup-if-mismatch",
        ]
        with open(patches / name, "rb") as patch:
            done = subprocess.run(
                words, cwd=tree, stdin=patch, capture_output=True, text=True, timeout=120, check=False
            )
        if done.returncode != 0:
            raise HostError(
                f"{patches / name} does not apply to {tree.name}: {(done.stdout + done.stderr).strip()}"
            )
        applied.append(name)
    return applied
