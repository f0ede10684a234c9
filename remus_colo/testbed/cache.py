# SPDX-License-Identifier: LGPL-2.1-or-later
"""Results of long builds, kept outside the checkout and named by the recipe that made them.

An entry is a file or a directory ``KIND-HASH``.  It is built under another name and renamed when it is
complete, so what has the name is whole; a lock per kind lets the second of two builders wait for
the first and use its result.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

KEEP_ENTRIES = 3
KEEP_UNUSED_S = 24 * 3600.0


def cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """``$REMUS_COLO_CACHE``, else ``$XDG_CACHE_HOME/remus_colo``, else ``~/.cache/remus_colo``; made if absent."""
    env = os.environ if environ is None else environ
    if env.get("REMUS_COLO_CACHE"):
        path = Path(env["REMUS_COLO_CACHE"])
    elif env.get("XDG_CACHE_HOME"):
        path = Path(env["XDG_CACHE_HOME"]) / "remus_colo"
    else:
        path = Path(env.get("HOME", "/root")) / ".cache" / "remus_colo"
    path.mkdir(parents=True, exist_ok=True)
    return path.resolve()


def recipe_hash(recipe: Any) -> str:
    """16 hex digits for a recipe: anything that JSON can write."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; waits for whoever holds it (the kernel frees it if they die)."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process holds %s: waiting for it", path)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def entry(kind: str, recipe: Any, build: Callable[[Path], None], root: Path | None = None) -> Path:
    """The entry for ``recipe``, built by ``build(path)`` if it is not there yet.

    ``build`` gets a path that does not exist and makes a file or a directory there.  If it raises,
    nothing is left behind.
    """
    root = cache_dir() if root is None else root
    final = root / f"{kind}-{recipe_hash(recipe)}"
    if not final.exists():
        with locked(root / f"{kind}.lock"):
            for stale in root.glob(f".partial-{kind}-*"):  # a builder that died: the lock is ours
                remove(stale)
            if not final.exists():
                partial = root / f".partial-{kind}-{os.getpid()}"
                try:
                    build(partial)
                    partial.rename(final)
                finally:
                    remove(partial)
            _prune(root, kind, final)
    os.utime(final)
    return final


def remove(path: Path) -> None:
    """Remove a file or tree, if there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _prune(root: Path, kind: str, used: Path) -> None:
    """Drop old entries of a kind: not among the newest, and not used for a day."""
    prefix_len = len(kind) + 1
    entries = [p for p in root.glob(f"{kind}-*") if len(p.name) == prefix_len + 16 and p != used]
    entries.sort(key=lambda p: p.stat().st_mtime, reverse=True)
    for old in entries[KEEP_ENTRIES:]:
        # Wall-clock time: file times are. A wrong clock only keeps an entry longer.
        if time.time() - old.stat().st_mtime > KEEP_UNUSED_S:
            log.info("removing %s from the cache: unused for a day", old.name)
            remove(old)
