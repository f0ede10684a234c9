# SPDX-License-Identifier: LGPL-2.1-or-later
"""What this machine needs for the bed and the tests, on Debian 12 and 13.

Debian packages for programs; the Python packages of the tests go into a virtual environment in the cache
unless the Python in use has them all, so that nothing of the user's is changed.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from remus_colo.testbed import cache
from remus_colo.testbed.commands import run
from remus_colo.testbed.errors import BedError
from remus_colo.testbed.qemu import QEMU

log = logging.getLogger(__name__)

QEMU_MAJOR_MIN = 10
BACKPORTS_FILE = Path("/etc/apt/sources.list.d/remus-colo-backports.sources")

# Package: the file that shows it is there already.
PACKAGES = {
    "mmdebstrap": "/usr/bin/mmdebstrap",
    "debian-archive-keyring": "/usr/share/keyrings/debian-archive-keyring.gpg",
    "e2fsprogs": "/usr/sbin/mke2fs",
    "iproute2": "/usr/bin/ip",
    "nftables": "/usr/sbin/nft",
    "iptables": "/usr/sbin/iptables",
    "openssh-client": "/usr/bin/ssh",
    "util-linux": "/usr/bin/nsenter",
    "xz-utils": "/usr/bin/xz",
    "gcc": "/usr/bin/gcc",
    "libc6-dev": "/usr/include/stdio.h",
    "libxen-dev": "/usr/include/xenctrl.h",
    "libnetfilter-queue-dev": "/usr/include/libnetfilter_queue/libnetfilter_queue.h",
    "libnfnetlink-dev": "/usr/include/libnfnetlink/libnfnetlink.h",
}
# Only when the hypervisor is built (xen_build.py).
BUILD_PACKAGES = {
    "make": "/usr/bin/make",
    "gcc": "/usr/bin/gcc",
    "binutils": "/usr/bin/ld",
    "bison": "/usr/bin/bison",
    "flex": "/usr/bin/flex",
    "patch": "/usr/bin/patch",
    "xz-utils": "/usr/bin/xz",
    "python3": "/usr/bin/python3",
    "debian-archive-keyring": "/usr/share/keyrings/debian-archive-keyring.gpg",
}
# Only when the packaging series is tried (xen_packaging.py), with the distribution's own Python.
PACKAGING_PACKAGES = {
    "debhelper": "/usr/bin/dh_listpackages",
    "dpkg-dev": "/usr/share/dpkg/pkg-info.mk",
    "git": "/usr/bin/git",
    "libxen-dev": "/usr/include/xenctrl.h",
    "libnetfilter-queue-dev": "/usr/include/libnetfilter_queue/libnetfilter_queue.h",
    "python3-cffi": "/usr/lib/python3/dist-packages/cffi/__init__.py",
    "python3-dev": "/usr/bin/python3-config",
    "python3-setuptools": "/usr/lib/python3/dist-packages/setuptools/__init__.py",
}
# Only when a virtual environment must be made: for the distribution's own Python.
VENV_PACKAGES = ("python3-venv", "python3-dev")

# Module: what pip calls it.
PYTHON_MODULES = {
    "pytest": "pytest",
    "hypothesis": "hypothesis",
    "pyroute2": "pyroute2",
    "pyxs": "pyxs",
    "netfilterqueue": "NetfilterQueue",
    "cffi": "cffi",
    "setuptools": "setuptools",
}
# Built for these versions only; the fuzzer does without it elsewhere.
if (3, 11) <= sys.version_info < (3, 14) and platform.machine() == "x86_64":
    PYTHON_MODULES["atheris"] = "atheris"


def setup() -> None:
    """Install what is missing; says what it does.  Can be repeated: the second time does nothing.

    :raise BedError: not root, not Debian, or an installation failed.
    """
    began_s = time.monotonic()
    release = os_release(Path("/etc/os-release").read_text())
    _install_packages(release, PACKAGES)
    _install_qemu(release)
    log.info("this machine has all programs that the test bed needs")
    python = python_for_tests(install=True)
    log.info("Python for the tests: %s", python)
    log.info("set-up is complete (%.0f s)", time.monotonic() - began_s)


def install_for_builds(packages: Mapping[str, str] = BUILD_PACKAGES) -> None:
    """Install what building the hypervisor, or trying its packaging, needs and this machine lacks.

    :raise BedError: not root, not Debian, or an installation failed.
    """
    _install_packages(os_release(Path("/etc/os-release").read_text()), packages)


def os_release(text: str) -> Mapping[str, str]:
    """Fields of os-release(5)."""
    fields = (line.partition("=") for line in text.splitlines() if "=" in line and not line.startswith("#"))
    return {name: value.strip("\"'") for name, _, value in fields}


def qemu_major(shown: str) -> int:
    """The major version in what ``qemu-system-x86_64 --version`` prints; 0 if there is none."""
    found = re.search(r"version (\d+)\.", shown)
    return int(found[1]) if found else 0


def python_for_tests(*, install: bool) -> str:
    """Path of a Python that has all modules of the tests.

    :param install: make one if there is none; otherwise :class:`BedError` is raised then.
    """
    missing = [pip for module, pip in PYTHON_MODULES.items() if importlib.util.find_spec(module) is None]
    if not missing:
        return sys.executable
    recipe = {"python": sys.version, "executable": sys.executable, "modules": PYTHON_MODULES}
    path = cache.cache_dir() / f"venv-{cache.recipe_hash(recipe)}"
    python = path / "bin" / "python"
    # A virtual environment cannot be renamed: a marker says that it is complete.
    if not (path / "complete").exists():
        if not install:
            raise BedError(
                f"this Python lacks {', '.join(missing)}: run 'python3 -m remus_colo.testbed setup'"
            )
        with cache.locked(cache.cache_dir() / "venv.lock"):
            if not (path / "complete").exists():
                _make_venv(path, python)
    return str(python)


def _make_venv(path: Path, python: Path) -> None:
    cache.remove(path)
    if sys.executable.startswith("/usr/bin/"):
        _apt_install([name for name in VENV_PACKAGES if not _is_installed(name)])
    log.info("installing %s for the tests (less than a minute)", ", ".join(PYTHON_MODULES.values()))
    run([sys.executable, "-m", "venv", path], timeout_s=120)
    # NetfilterQueue is built from source and needs setuptools and the interpreter's headers.
    run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PYTHON_MODULES.values()],
        timeout_s=900)  # fmt: skip
    (path / "complete").touch()


def _install_packages(release: Mapping[str, str], packages: Mapping[str, str]) -> None:
    missing = [name for name, file in packages.items() if not Path(file).exists()]
    if missing and release.get("ID") != "debian":
        raise BedError(f"this is not Debian: install what these Debian packages have: {', '.join(missing)}")
    _apt_install(missing)


def _install_qemu(release: Mapping[str, str]) -> None:
    if _installed_qemu() >= QEMU_MAJOR_MIN:
        return
    if release.get("ID") != "debian":
        raise BedError(f"this is not Debian: install QEMU {QEMU_MAJOR_MIN} or later ({QEMU})")
    options: list[str] = []
    if release.get("VERSION_ID", "") == "12":
        # Debian 12's own QEMU is 7.2, whose SVM emulation makes guests triple-fault now and then.
        _enable_backports(release["VERSION_CODENAME"])
        options = ["-t", f"{release['VERSION_CODENAME']}-backports"]
    _apt_install(["qemu-system-x86"], options)
    if _installed_qemu() < QEMU_MAJOR_MIN:
        raise BedError(
            f"Debian {release.get('VERSION_ID')} gave no QEMU {QEMU_MAJOR_MIN} or later: use Debian 12 or 13"
        )


def _installed_qemu() -> int:
    try:
        return qemu_major(run([QEMU, "--version"], timeout_s=20).stdout)
    except BedError:
        return 0


def _enable_backports(codename: str) -> None:
    shown = run(["apt-get", "indextargets", "--format", "$(SUITE) $(CODENAME)"], timeout_s=60).stdout
    if f"{codename}-backports" in shown.split():
        return
    from remus_colo.testbed import guest_debian

    _need_root()
    log.info("adding %s-backports to apt's sources (%s)", codename, BACKPORTS_FILE)
    BACKPORTS_FILE.write_text(
        f"Types: deb\nURIs: {guest_debian.mirror()}\nSuites: {codename}-backports\nComponents: main\n"
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    )


def _is_installed(package: str) -> bool:
    shown = run(["dpkg-query", "-W", "-f", "${db:Status-Status}", package], timeout_s=30, check=False)
    return shown.stdout == "installed"


def _apt_install(packages: list[str], options: list[str] | None = None) -> None:
    if not packages:
        return
    _need_root()
    log.info("installing with apt: %s (1 to 3 minutes)", " ".join(packages))
    environ = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for argv in (["apt-get", "-q", "update"],
                 ["apt-get", "-q", "-y", "--no-install-recommends", *(options or []), "install", *packages]):  # fmt: skip
        try:
            done = subprocess.run(argv, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                                  errors="replace", timeout=1800, check=False)  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as cause:
            raise BedError(f"{' '.join(argv[:3])} did not work: {cause}") from cause
        if done.returncode != 0:
            raise BedError(f"{' '.join(argv[:3])} failed: {(done.stdout + done.stderr).strip()[-800:]}")


def _need_root() -> None:
    if os.geteuid() != 0:
        raise BedError("installing packages needs root: run this with sudo")
