# SPDX-License-Identifier: LGPL-2.1-or-later
"""The second disk of each host, mounted at /domu: the guest's kernel, initrd and xl configurations."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from remus_colo.testbed import cache
from remus_colo.testbed.commands import run

log = logging.getLogger(__name__)

SPARE_BYTES = 64 << 20


def domu_disk() -> Path:
    """A file system with the guest's files, built when absent."""
    # Only here: a running bed is controlled without the guest's builder.
    from remus_colo.testbed import guest_image

    guest = guest_image.build(cache.cache_dir())
    files = {path.name: cache.file_hash(path) for path in sorted(guest.iterdir()) if path.suffix != ".json"}

    def build(path: Path) -> None:
        stage = path.with_name(path.name + "-stage")
        stage.mkdir()
        try:
            for name in files:
                shutil.copyfile(guest / name, stage / name)
            size_kb = (sum((stage / name).stat().st_size for name in files) + SPARE_BYTES) >> 10
            run(["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", stage, path, f"{size_kb}k"],
                timeout_s=120)  # fmt: skip
        finally:
            cache.remove(stage)

    return cache.entry("domu-disk", {"files": files, "version": 1}, build)
