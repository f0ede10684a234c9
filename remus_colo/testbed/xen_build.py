# SPDX-License-Identifier: LGPL-2.1-or-later
"""Debian's hypervisor built from its source package, with the patches of this checkout (``patches/``).

Only the hypervisor, which needs no library: the toolstack of Debian's packages goes on using it.  The result is in
the cache, named by the content of the source, of the patches and of what builds it.  ``make check-patches`` is this
module as a program.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from remus_colo.errors import HostError, RemusError
from remus_colo.testbed import cache, machine, xen_packaging, xen_source
from remus_colo.testbed.ending import exit_on_signals
from remus_colo.testbed.xen_source import PATCHES, SUITES, XenSource

log = logging.getLogger(__name__)

JOBS = 2
SCRATCH = "xen-building-"
BUILD_LIMIT_S = 3600
SHOWN_LINES = 15
# What Debian's own rules (debian/rules, make_args_xen) pass on, but for the mapping of path names in debug information;
# nothing may be downloaded while it builds.
MAKE_ARGUMENTS = ("XEN_TARGET_ARCH=x86_64", "XEN_COMPILE_ARCH=x86_64")
ENVIRONMENT = {"WGET": "/bin/false", "GIT": "/bin/false", "LC_ALL": "C.UTF-8", "PYTHON": "python3"}


def patched(release: str, *, fresh: bool = False) -> Path:
    """The patched hypervisor's ELF file, built when absent (2 to 4 minutes).

    :param release: a key of ``SUITES``.
    :param fresh: build it of the newest source that Debian has.
    :raise HostError: no checkout with patches is at hand, the source cannot be had, or a patch does not apply.
    """
    series = PATCHES / release / "hypervisor"
    if not (series / "series").exists():
        raise HostError(f"{series} is missing: a patched Xen can only be built in a checkout of remus_colo")
    source = xen_source.source(release, fresh=fresh)
    recipe = {
        "version": source.version,
        "sources": [cache.file_hash(source.upstream), cache.file_hash(source.debian)],
        "patches": {file.name: cache.file_hash(file) for file in sorted(series.iterdir())},
        "compiler": _compiler(),
        "make": [MAKE_ARGUMENTS, ENVIRONMENT],
    }
    return cache.entry("xen-patched", recipe, lambda path: _build(source, series, path))


def _compiler() -> str:
    try:
        done = subprocess.run(["gcc", "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise HostError("there is no gcc: run 'python3 -m remus_colo.testbed setup'") from error
    return done.stdout.partition("\n")[0]


def _build(source: XenSource, series: Path, target: Path) -> None:
    machine.install_for_builds()
    log.info("building Xen %s with the patches of %s (2 to 4 minutes)", source.version, series)
    began_s = time.monotonic()
    for stale in cache.cache_dir().glob(f"{SCRATCH}*"):  # of a builder that died: the entry's lock is ours
        cache.remove(stale)
    # The tree takes 100 MB; the cache has room where /tmp may be in memory.
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=cache.cache_dir()) as scratch:
        tree = Path(scratch) / f"xen-{source.version}"
        source.unpack(tree)
        for name in xen_source.apply_series(tree, series):
            log.info("applied %s", name)
        shutil.copyfile(tree / "debian" / "xen-kconfig", tree / "xen" / ".config")
        _make(tree, "olddefconfig")
        _make(tree, f"-j{JOBS}")
        shutil.copyfile(tree / "xen" / "xen", target)
    log.info("Xen %s is built (%.0f s)", source.version, time.monotonic() - began_s)


def _make(tree: Path, *targets: str) -> None:
    words = ["make", "-C", str(tree / "xen"), *MAKE_ARGUMENTS, *targets]
    environ = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MAKEFLAGS", "MAKELEVEL", "CFLAGS", "LDFLAGS")
    }
    # A session of its own, so that the compilers can be ended with make, and do not write into what is being removed.
    with subprocess.Popen(
        words, env=environ | ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    ) as process:  # fmt: skip
        try:
            said, _ = process.communicate(timeout=BUILD_LIMIT_S)
        except BaseException as reason:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(reason, subprocess.TimeoutExpired):
                raise HostError(f"Xen was not built within {BUILD_LIMIT_S} s") from reason
            raise
    if process.returncode != 0:
        shown = "\n".join(said.splitlines()[-SHOWN_LINES:])
        raise HostError(f"Xen does not build (make {' '.join(targets)}):\n{shown}")


def main(arguments: list[str] | None = None) -> int:
    """``make check-patches``: does every series apply to what Debian has today, and does it build?"""
    parser = argparse.ArgumentParser(prog="python3 -m remus_colo.testbed.xen_build", description=main.__doc__)
    parser.add_argument(
        "releases", nargs="*", metavar="RELEASE", help=f"of {', '.join(SUITES)}; all if none is named"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="    %(message)s", stream=sys.stdout)
    wrong = [name for name in options.releases if name not in SUITES]
    exit_on_signals()
    if wrong:
        parser.error(f"no such release: {', '.join(wrong)}")
    try:
        machine.install_for_builds()
        for release in options.releases or SUITES:
            print(f"{release}: the hypervisor's series", flush=True)
            built = patched(release, fresh=True)
            version = xen_source.source(release).version
            print(
                f"{release}: applies to xen {version} and builds: {built.stat().st_size} bytes, {built}",
                flush=True,
            )
            packaging = PATCHES / release / "packaging"
            if packaging.exists():
                machine.install_for_builds(machine.PACKAGING_PACKAGES)
                for line in xen_packaging.check(xen_source.source(release), packaging):
                    print(f"{release}: packaging: {line}", flush=True)
    except RemusError as error:
        print(f"check-patches: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
