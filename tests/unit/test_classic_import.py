# SPDX-License-Identifier: LGPL-2.1-or-later
"""``import xen``: ours and the distribution's in one, whichever comes first on ``sys.path`` or is imported first."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
INSTALL = "import remus_colo.classic.finder"  # what the installed remus_colo.pth says
THEIRS = "import xen.lowlevel.marker, xen.migration.marker"
OURS = "import xen.remus.profile, xen.xend.sxp, xen.lowlevel.checkpoint"
CHECK = """
import sys, xen.lowlevel, xen.migration
from xen.lowlevel import marker, checkpoint
from xen.remus import profile
assert xen.lowlevel.marker.WHOSE == xen.migration.marker.WHOSE == "the distribution's"
assert xen.lowlevel.marker is sys.modules["xen.lowlevel.marker"]
print(profile.__file__, checkpoint.__file__, sep="\\n")
"""
OUR_FILES = [
    REPOSITORY / "remus_colo/classic/xen" / name for name in ("remus/profile.py", "lowlevel/checkpoint.py")
]


@pytest.fixture
def distribution(tmp_path: Path) -> Path:
    """A folder like Debian's /usr/lib/xen-*/lib/python."""
    for package in ("xen", "xen/lowlevel", "xen/migration", "xen/remus"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    for package in ("lowlevel", "migration"):
        (tmp_path / "xen" / package / "marker.py").write_text('WHOSE = "the distribution\'s"\n')
    return tmp_path


def imported(path: list[str], *lines: str) -> list[Path]:
    """Where our modules come from, in a process that has these folders first and runs these lines."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join((f"import sys; sys.path[:0] = {path!r}", *lines, CHECK))],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("order", list(itertools.permutations((INSTALL, THEIRS, OURS))))
def test_both_are_one_package(distribution: Path, order: tuple[str, ...]) -> None:
    assert imported([str(REPOSITORY), str(distribution)], *order) == OUR_FILES


# until the finder is there theirs would hide ours
@pytest.mark.parametrize("order", [(INSTALL, THEIRS, OURS), (INSTALL, OURS, THEIRS), (THEIRS, INSTALL, OURS)])
def test_theirs_may_come_first_on_the_path(distribution: Path, order: tuple[str, ...]) -> None:
    assert imported([str(distribution), str(REPOSITORY)], *order) == OUR_FILES


@pytest.mark.parametrize("order", [(THEIRS, OURS), (OURS, THEIRS)])
def test_a_work_tree_on_the_path_is_enough(distribution: Path, order: tuple[str, ...]) -> None:
    assert imported([str(REPOSITORY), str(distribution)], *order) == OUR_FILES
