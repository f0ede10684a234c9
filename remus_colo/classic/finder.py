# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes ``import xen`` find the package below this one, with the distribution's own ``xen`` merged into it.

Installation puts ``remus_colo.pth`` beside the package, with which ``site`` imports this module when Python
starts.  A second package ``xen`` in the same folder would do as well on Debian, which keeps its own
elsewhere, but overwrite files of distributions that do not; and whichever came first on ``sys.path`` would
hide the other.  So the name ``xen``, and no other, is looked up here first, whatever the order of
``sys.path``.  In a work tree that nobody has installed, ``xen.py`` in its root does so when ``xen`` is
imported, and ours is added to a ``xen`` that was there before.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableSequence
from importlib.machinery import ModuleSpec, PathFinder

# NB: every Python program of a host on which this is installed imports this module: no pathlib, no importlib.abc, which
# take longer than all of the rest of Python's start.
HERE = os.path.dirname(os.path.realpath(__file__))
# Packages that both we and distributions have.
MERGED = ("xen", "xen.lowlevel")


class XenFinder:
    """Finds the top-level package ``xen``; its parts are then found through its ``__path__``."""

    @classmethod
    def find_spec(cls, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != "xen":
            return None
        return PathFinder.find_spec(fullname, [HERE])


def install() -> None:
    """Look ``xen`` up here first, from now on; once, however often it is called."""
    if not any(finder is XenFinder for finder in sys.meta_path):
        sys.meta_path.insert(0, XenFinder)
    # What was imported before, from somewhere else, stays, and finds ours from now on.
    for name in MERGED:
        module, folder = sys.modules.get(name), os.path.join(HERE, *name.split("."))
        path = getattr(module, "__path__", [folder])  # while it is being imported it has none
        if module is not None and folder not in path:
            module.__path__ = [folder, *path]


def extend(path: MutableSequence[str], name: str) -> None:
    """Append the folders of the distribution's package ``name`` to ours of the same name; one on ``sys.path``
    is meant, and goes first.

    :param path: the ``__path__`` of our package.
    """
    from remus_colo.adapters import bindings  # not before somebody imports xen: this runs at Python's start

    package, _, leaf = name.rpartition(".")
    beside = [os.path.join(folder, leaf) for folder in sys.modules[package].__path__] if package else []
    relative = os.path.join(*name.split("."))
    for found in (
        *beside,
        *(os.path.join(folder, relative) for folder in (*sys.path, *bindings.candidates())),
    ):
        if found not in path and os.path.isdir(found) and not os.path.samefile(found, path[0]):
            path.append(found)


install()
