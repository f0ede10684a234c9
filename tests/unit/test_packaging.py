# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is installed: every module, every data file, the commands; with or without Xen's headers."""

from __future__ import annotations

import base64
import configparser
import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from remus_colo._version import __version__

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "remus_colo"
SPDX = "SPDX-License-Identifier: LGPL-2.1-or-later"
# what a work tree holds besides the sources
BUILT = shutil.ignore_patterns("__pycache__", ".*_cache", "*.so", "*.o", "_xen.c", "_compare.c")

pytest.importorskip("setuptools", reason="setuptools is not installed (Debian: python3-setuptools)")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in: setuptools writes into the source tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    (copy / "README.rst").write_text("remus_colo\n==========\n")
    shutil.copytree(PACKAGE, copy / "remus_colo", ignore=BUILT)
    return copy


def run_setup(source: Path, native: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=source,
        env={**os.environ, "REMUS_COLO_NATIVE": native},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def built(source: Path) -> Path:
    done = run_setup(source, "off", "egg_info", "build_py", "--build-lib", "out")
    assert done.returncode == 0, done.stderr
    assert "warning: not building remus_colo._native._xen" in done.stderr
    return source / "out" / "remus_colo"


def files(folder: Path) -> Iterator[str]:
    return (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_every_file_of_the_package_is_installed(source: Path, built: Path) -> None:
    assert sorted(files(built)) == sorted(files(source / "remus_colo"))


def test_a_source_distribution_is_a_work_tree(tmp_path: Path) -> None:
    """With all that the README tells of, but git's and CI's files."""
    tree = tmp_path / "tree"
    left_out = shutil.ignore_patterns(
        ".*", "*.egg-info", "build", "dist", "__pycache__", "*.so", "*.o", "*_xen.c", "*_compare.c"
    )
    shutil.copytree(REPOSITORY, tree, ignore=left_out)
    wanted = {
        "xen.py",
        "Makefile",
        "CONTRIBUTING.rst",
        "docs/index.rst",
        "examples/web.cfg",
        "tests/e2e/conftest.py",
    }
    done = run_setup(tree, "off", "-q", "sdist", "--formats=tar", "--dist-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (made,) = tmp_path.glob("*.tar")
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert wanted <= names
    assert {name for name in files(tree) if "egg-info" not in name} <= names


def test_python_finds_the_package_xen_by_itself(built: Path) -> None:
    assert (built.parent / "remus_colo.pth").read_text() == "import remus_colo.classic.finder\n"


def test_so_it_does_in_an_editable_installation(source: Path) -> None:
    try:
        import wheel  # noqa: F401
    except ImportError:
        pytest.importorskip(
            "setuptools.command.bdist_wheel", reason="wheel is not installed (Debian: python3-wheel)"
        )
    done = run_setup(source, "off", "editable_wheel", "--dist-dir", "editable")
    assert done.returncode == 0, done.stderr
    (made,) = (source / "editable").glob("*.whl")
    with zipfile.ZipFile(made) as archive:
        assert archive.testzip() is None
        content = archive.read("remus_colo.pth")
        (record,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/RECORD"))
        listed = [line.split(",")[0] for line in record.splitlines()]
        assert sorted(listed) == sorted(archive.namelist())
    assert content == b"import remus_colo.classic.finder\n"
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    assert f"remus_colo.pth,sha256={digest},{len(content)}" in record.splitlines()


def test_metadata(source: Path, built: Path) -> None:
    metadata = (source / "remus_colo.egg-info" / "PKG-INFO").read_text()
    assert f"\nVersion: {__version__}\n" in metadata
    assert (
        "\nLicense: LGPL-2.1-or-later\n" in metadata
        or "\nLicense-Expression: LGPL-2.1-or-later\n" in metadata
    )
    assert "\nRequires-Python: >=3.11\n" in metadata
    entries = configparser.ConfigParser()
    entries.read(source / "remus_colo.egg-info" / "entry_points.txt")
    assert dict(entries["console_scripts"]) == {
        "remus": "remus_colo.cli:main",
        "remusd": "remus_colo.daemon:main",
    }


def test_the_compiled_module_can_be_required(source: Path, tmp_path: Path) -> None:
    shutil.copy(source / "setup.py", tmp_path)
    (tmp_path / "remus_colo").mkdir()
    done = run_setup(tmp_path, "required", "--version")
    assert done.returncode == 1
    assert done.stderr == (
        "cannot build remus_colo._native._xen: remus_colo/_native/build_xen.py is not in this source tree\n"
    )


def test_an_unknown_policy_is_refused(source: Path) -> None:
    done = run_setup(source, "maybe", "--version")
    assert (done.returncode, done.stderr) == (
        1,
        "REMUS_COLO_NATIVE must be auto, required or off, not 'maybe'\n",
    )


def test_the_licence_is_the_one_that_is_declared() -> None:
    text = (REPOSITORY / "LICENSE").read_text()
    assert "GNU LESSER GENERAL PUBLIC LICENSE" in text
    assert "Version 2.1, February 1999" in text


def test_the_change_log_begins_with_this_version() -> None:
    lines = (REPOSITORY / "CHANGELOG.rst").read_text().splitlines()
    titles = [line for line, below in itertools.pairwise(lines) if below.startswith("---")]
    assert titles[0].split()[0] == __version__


def test_every_source_file_names_its_licence() -> None:
    sources = [*PACKAGE.rglob("*.py"), *(REPOSITORY / "tests").rglob("*.py"), *PACKAGE.rglob("*.[ch]")]
    unnamed = [
        path
        for path in sources
        if path.name not in ("_xen.c", "_compare.c") and SPDX not in path.read_text().partition("\n")[0]
    ]
    assert unnamed == []
