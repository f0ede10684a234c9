# SPDX-License-Identifier: LGPL-2.1-or-later
"""The compiled comparator: the one that was installed, or one that is built from this checkout's sources.

In a checkout nobody should have to remember to build: what was compiled from other sources than these is not used, and
the module is built, within a few seconds, into the user's cache (``$XDG_CACHE_HOME/remus_colo``).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from remus_colo.errors import HostError

NAME = "remus_colo._native._compare"
BUILDER = "remus_colo._native.build_compare"


def load() -> Any:
    """The module, with ``ffi`` and ``lib``.

    :raise HostError: it is not installed and cannot be built here.
    """
    found = _found()
    if isinstance(found, HostError):
        raise found
    return found


@functools.cache
def _found() -> Any:
    """The module, or why there is none: what cannot be built is not tried again and again."""
    try:
        return _find()
    except HostError as error:
        return error


def _find() -> Any:
    try:
        builder: Any = importlib.import_module(BUILDER)
        wanted = builder.source_hash() if builder.SOURCES else None
    except ImportError:
        builder = wanted = None  # installed without what builds it
    module: Any = None
    with contextlib.suppress(ImportError):
        module = importlib.import_module(NAME)
    if module is not None:
        built_from = module.ffi.string(module.lib.colo_source_hash).decode()
        if wanted is None or built_from == wanted:
            return module
        sys.modules.pop(NAME, None)
    if wanted is None:
        raise HostError(
            "the compiled comparator is missing: install cffi and a C compiler, then remus_colo again"
        )
    return _load_from(_cached(builder, wanted))


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) / "remus_colo" if base else Path.home() / ".cache" / "remus_colo"


def _cached(builder: Any, wanted: str) -> Path:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    path = _cache_dir() / f"compare-{wanted}" / f"_compare{suffix}"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Built aside and moved into place, so that another process never sees half of it.
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        shutil.move(_compile(builder, scratch), path)
    return path


def _compile(builder: Any, scratch: str) -> str:
    try:
        return str(builder.make_builder().compile(tmpdir=scratch, verbose=False))
    except Exception as cause:  # distutils and setuptools raise what they like
        raise HostError(
            f"the comparator cannot be compiled here ({cause}): install a C compiler, Python's headers and setuptools "
            "(Debian: apt install gcc libc6-dev python3-dev python3-setuptools)"
        ) from cause


def _load_from(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(NAME, path)
    if spec is None or spec.loader is None:
        raise HostError(f"{path} is no Python module: remove it")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
