# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which files of a checkout make the code in dom0."""

from remus_colo.testbed import worktree


def test_sources_are_what_is_written_not_what_is_made(tmp_path):
    written = ["remus_colo/__init__.py", "remus_colo/_native/core.c", "remus_colo/testbed/init", "setup.cfg"]
    made = [
        "remus_colo/__pycache__/x.cpython-311.pyc", "remus_colo/_native/_xen.c", "remus_colo/_native/core.o",
        "remus_colo/_native/_xen.cpython-311-x86_64-linux-gnu.so", "remus_colo/.mypy_cache/3.11/cache.db",
        "remus_colo/.cli.py.swp", "tests/unit/test_x.py", "notes.txt",
    ]  # fmt: skip
    for name in written + made:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert [str(path) for path in worktree.sources(tmp_path)] == written


def test_this_checkout_has_this_package():
    names = {str(path) for path in worktree.sources()}
    assert {"remus_colo/errors.py", "remus_colo/testbed/worktree.py"} <= names
