# SPDX-License-Identifier: LGPL-2.1-or-later
"""The packaging series tried: Debian's ``xen`` source package with this checkout as a component of it.

Building all of Xen takes an hour and 60 more packages, so what is run is the step that the series adds, against this
machine's Xen libraries in place of those that the build would just have made; and what it installed is used.
"""

from __future__ import annotations

import logging
import re
import subprocess
import tempfile
from pathlib import Path

from remus_colo.errors import HostError
from remus_colo.testbed import cache, xen_source
from remus_colo.testbed.commands import run
from remus_colo.testbed.errors import CommandFailed
from remus_colo.testbed.xen_source import XenSource

log = logging.getLogger(__name__)

CHECKOUT = Path(__file__).resolve().parents[2]
COMPONENT = "remus-colo"  # the directory, and the part of the archive's name
SITE = "usr/lib/python3/dist-packages"
BUILD_LIMIT_S = 900
# What a user of classic Remus has: the modules beside the distribution's own, and the command.
USE = """
import site, sys
site.addsitedir(sys.argv[1])  # which it is once the package is installed: the .pth file in it counts
import remus_colo._native._xen
import xen.remus, xen.lowlevel, xen.xend
for module in (remus_colo, xen.remus, remus_colo._native._xen):
    print(module.__file__)
"""


def check(source: XenSource, series: Path) -> list[str]:
    """Apply the series, run its step, use the result; what was found out, a line each.

    :raise HostError: something of it does not work.
    """
    with tempfile.TemporaryDirectory(prefix="xen-packaging-", dir=cache.cache_dir()) as scratch:
        tree = Path(scratch) / f"xen-{source.version}"
        source.unpack(tree)
        applied = xen_source.apply_series(tree, series)
        files = _add_component(tree / COMPONENT)
        root = tree / "debian" / "xen-remus"
        libraries = run(["gcc", "-print-multiarch"], timeout_s=60).stdout.strip()
        _step(
            "debian/rules install-remus",
            ["make", "-f", "debian/rules", "install-remus", "remus_includedir=/usr/include",
             f"remus_libdir=/usr/lib/{libraries}"],
            tree,
        )  # fmt: skip
        shown = _step(
            "import xen.remus",
            ["/usr/bin/python3", "-c", USE, str(root / SITE)],
            tree,
            PYTHONPATH=str(root / SITE),
        )
        strangers = [line for line in shown.splitlines() if not line.startswith(str(root))]
        if strangers:
            raise HostError(f"what was imported is not what was installed: {', '.join(strangers)}")
        usage = _step("remus --help", ["/usr/bin/python3", str(root / "usr/bin/remus"), "--help"], tree,
                      PYTHONPATH=str(root / SITE))  # fmt: skip
        if "usage: remus" not in usage:
            raise HostError(f"the installed remus says {usage[:200]!r}")
        unit = root / "usr/lib/systemd/system/remusd.service"
        command = re.search(r"^ExecStart=(\S+)", unit.read_text(), re.MULTILINE) if unit.exists() else None
        if command is None or not (root / command[1].lstrip("/")).exists():
            raise HostError(
                f"remusd.service starts {command[1] if command else 'nothing'}, which was not installed"
            )
        return [
            f"applied to xen {source.version}: {', '.join(applied)}",
            f"its step built and installed remus_colo ({files} files of this checkout as the component {COMPONENT})",
            "xen.remus, xen.xend and the compiled module import from the installed tree; remus runs, and remusd has its unit",
        ]


def _add_component(target: Path) -> int:
    """Copy what git tracks of this checkout; the number of files."""
    try:
        names = run(["git", "-C", CHECKOUT, "ls-files", "-z"], timeout_s=60).stdout.split("\0")
    except CommandFailed as error:
        raise HostError(f"{CHECKOUT} is no git checkout, so what belongs to it is not known") from error
    count = 0
    for name in filter(None, names):
        if (CHECKOUT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((CHECKOUT / name).read_bytes())
            count += 1
    return count


def _step(name: str, words: list[str], tree: Path, **environ: str) -> str:
    """Run in the tree, with nothing of ours in the environment; its stdout."""
    plain = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(tree), "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(words, cwd=tree, env=plain | environ, stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, errors="replace", timeout=BUILD_LIMIT_S, check=False)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"{name} did not run: {error}") from error
    if done.returncode != 0:
        shown = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise HostError(f"{name} failed:\n{shown}")
    return done.stdout
