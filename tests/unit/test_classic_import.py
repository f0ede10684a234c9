# SPDX-License-Identifier: LGPL-2.1-or-later
"""``import xen``: ours and the distribution's in one, whichever comes first on ``sys.path``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROBE = """
import remus_colo.classic.finder
import xen.lowlevel.marker, xen.migration.marker
import xen.remus, xen.xend
assert xen.lowlevel.marker.WHOSE == xen.migration.marker.WHOSE == "the distribution's"
print(xen.remus.__file__)
"""


@pytest.fixture
def distribution(tmp_path: Path) -> Path:
    """A folder like Debian's /usr/lib/xen-*/lib/python."""
    for package in ("xen", "xen/lowlevel", "xen/migration", "xen/remus"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    for package in ("lowlevel", "migration"):
        (tmp_path / "xen" / package / "marker.py").write_text("WHOSE = \"the distribution's\"\n")
    return tmp_path


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_both_are_one_package(distribution: Path, first: str) -> None:
    folders = [str(REPOSITORY), str(distribution)]
    if first == "theirs":
        folders.reverse()
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {folders!r}\n{PROBE}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == REPOSITORY / "remus_colo/classic/xen/remus/__init__.py"
