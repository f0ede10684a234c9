# SPDX-License-Identifier: LGPL-2.1-or-later
"""The work tree's code, built for dom0: installed inside the dom0 root tree at this machine's own speed,
kept as a tar archive, and unpacked into running dom0s."""

from __future__ import annotations

import logging
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from remus_colo.testbed import cache, dom0_image
from remus_colo.testbed.commands import run
from remus_colo.testbed.ssh import Remote

log = logging.getLogger(__name__)

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGE_FILES = ("pyproject.toml", "setup.cfg", "setup.py", "MANIFEST.in", "README.rst", "LICENSE")
BUILT_SUFFIXES = (".pyc", ".so", ".o")
BUILT_FILES = ("_xen.c", "_compare.c")
# Where Debian's pip installs what is not the distribution's own.
SITE = "usr/local/lib/python3*/dist-packages"

# Run with the tree's root as $1, the copy of the checkout as $2 and the archive to write as $3. The private
# mount namespace takes the scratch space away with it, so the cached root tree stays as it was.
BUILD_SCRIPT = """
set -e
mount -t tmpfs -o mode=755 scratch "$1/mnt"
mkdir "$1/mnt/out"
cp -r "$2" "$1/mnt/src"
mount -t devtmpfs dev "$1/dev" || mount --rbind /dev "$1/dev"
mount -t proc proc "$1/proc"
chroot "$1" /usr/bin/env -i PATH=/usr/bin:/bin LC_ALL=C.UTF-8 HOME=/mnt sh -ec '
cd /mnt/src
if [ -e pyproject.toml ] || [ -e setup.py ]; then
    python3 -m pip install --quiet --no-deps --no-build-isolation --no-index --disable-pip-version-check \
        --root-user-action=ignore --break-system-packages --no-compile --root /mnt/out .
else
    for build in remus_colo/_native/build_*.py; do [ ! -e $build ] || python3 $build; done
    site=/mnt/out/usr/local/lib/$(python3 -c "import sys; print(\\"python%d.%d\\" % sys.version_info[:2])")/dist-packages
    mkdir -p $site
    cp -r remus_colo $site/
fi
cd /mnt/out
find . -name "*.o" -delete
find . -name "*.so" -exec strip --strip-debug {} +
python3 -m compileall -q -s /mnt/out -p / .
'
tar -C "$1/mnt/out" -czf "$3" .
"""


def sources(checkout: Path = CHECKOUT) -> Iterator[Path]:
    """The files that the built package depends on, relative to the checkout, in order of name."""
    found = [path.relative_to(checkout) for path in (checkout / "remus_colo").rglob("*") if path.is_file()]
    found = [
        path for path in found
        if path.suffix not in BUILT_SUFFIXES and path.name not in BUILT_FILES
        and not any(part == "__pycache__" or part.startswith(".") for part in path.parts)
    ]  # fmt: skip
    found += [Path(name) for name in PACKAGE_FILES if (checkout / name).is_file()]
    yield from sorted(found)


def archive(release: str, checkout: Path = CHECKOUT) -> Path:
    """A tar archive of the installed package, relative to dom0's root; built when the sources have changed.

    :param release: dom0's, a key of :data:`~remus_colo.testbed.dom0_image.RELEASES`.
    """
    with tempfile.TemporaryDirectory(prefix="testbed-code-") as directory:
        # Of a copy, since somebody may be at work in the checkout: what is hashed is what is built.
        copy = Path(directory) / "src"
        files = {}
        for name in sources(checkout):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copy2(checkout / name, copy / name)
            except FileNotFoundError:
                continue  # removed just now
            files[str(name)] = cache.file_hash(copy / name)
        recipe = {"root": dom0_image.root_recipe(release), "files": files, "script": BUILD_SCRIPT}

        def build(path: Path) -> None:
            root = dom0_image.root_tree(release)
            log.info("building the work tree's code for dom0 (some seconds)")
            run(["unshare", "--mount", "sh", "-c", BUILD_SCRIPT, "build", root, copy, path], timeout_s=300)

        return cache.entry("code", recipe, build)


def install(remote: Remote, built: Path) -> None:
    """Replace the package in a running dom0 by the one in ``built``."""
    remote.run(
        f"set -e; rm -rf /{SITE}/remus_colo* /{SITE}/*remus*.dist-info; "
        f"tar -C / -xzf - --no-same-owner; echo {shlex.quote(built.name)} > /run/testbed-code",
        timeout_s=120,
        stdin=built.read_bytes(),
    )


def installed(remote: Remote) -> str:
    """Name of the archive that a dom0 runs, empty if none."""
    return remote.run("cat /run/testbed-code", timeout_s=60, check=False).stdout.strip()
