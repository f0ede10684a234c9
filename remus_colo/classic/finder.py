# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes ``import xen`` find the package below this one, with the distribution's own ``xen`` merged into it.

Installation puts ``remus_colo.pth`` beside the package, with which ``site`` imports this module when Python
starts.  A second package ``xen`` in the same folder would do as well on Debian, which keeps its own elsewhere, but
overwrite files of distributions that do not; and whichever came first on ``sys.path`` would hide the other.  So
the name ``xen``, and no other, is looked up here first, whatever the order of ``sys.path``.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import MutableSequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path

HERE = Path(__file__).resolve().parent


class XenFinder(MetaPathFinder):
    """Finds the top-level package ``xen``; its parts are then found through its ``__path__``."""

    @classmethod
    def find_spec(cls, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != "xen":
            return None
        folder = HERE / "xen"
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def install() -> None:
    """Look ``xen`` up here first, from now on; once, however often it is called."""
    if not any(finder is XenFinder for finder in sys.meta_path):
        sys.meta_path.insert(0, XenFinder)


def extend(path: MutableSequence[str], name: str) -> None:
    """Append the folders of the distribution's package ``name`` to ours of the same name.

    :param path: the ``__path__`` of our package.
    """
    from remus_colo.adapters import bindings  # not before somebody imports xen: this runs at Python's start

    relative = os.path.join(*name.split("."))
    for folder in (*bindings.candidates(), *sys.path):
        found = os.path.join(folder, relative)
        if found not in path and os.path.isdir(found) and not os.path.samefile(found, path[0]):
            path.append(found)


install()
