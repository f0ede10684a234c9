# SPDX-License-Identifier: LGPL-2.1-or-later
"""Builds the test bed's guest: a PVH Linux without a disk that serves nginx, redis and echo out of its initramfs.

::

    python3 -m remus_colo.testbed.guest_image [CACHE]

prints the directory with ``vmlinuz``, ``initrd``, ``web.cfg``, ``web-fifo.cfg`` and ``manifest.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

from remus_colo.errors import HostError, RemusError
from remus_colo.testbed import guest_cpio, guest_debian, guest_root, load_content

NAME = "web"
ADDRESS = "10.77.0.10"
MAC = "00:16:3e:77:00:10"
# Of a second guest from the same image; see second_guest().
SECOND_NAME = "web2"
SECOND_ADDRESS = "10.77.0.11"
SECOND_MAC = "00:16:3e:77:00:11"
MEMORY_MB = 256
SUITE = "trixie"
KERNEL_PACKAGE = "linux-image-amd64"
PROGRAMS = ("guest_services", "guest_clock")  # of services/, in C

_CMDLINE = (
    "console=hvc0",
    "quiet loglevel=4",
    # Emulated processors gain nothing from mitigations and run many times slower with them.
    "mitigations=off",
    # What takes time to set up, or memory to keep, for nothing that is used here.
    "cgroup_disable=memory transparent_hugepage=never audit=0 lsm=capability init_on_alloc=0",
    # Self-tests, an entropy source and hardware probes that together take a quarter of the time to boot.
    "cryptomgr.notests initcall_blacklist=jent_mod_init pci=noearly 8250.nr_uarts=0",
    # A VM that stands still for a checkpoint is no lock-up; and the watchdog wakes an idle guest.
    "nowatchdog",
)
# A toolstack cannot copy the state of FIFO event channels, so the guest is told to use the two-level ABI.
_NO_FIFO = "xen.fifo_events=0"


# Besides services/, the modules that decide what the image holds.
_RECIPE = ("guest_cpio.py", "guest_elf.py", "guest_image.py", "guest_root.py", "load_content.py")


def default_cache_dir() -> Path:
    """$REMUS_COLO_CACHE, or ``remus_colo`` in the user's cache directory."""
    if chosen := os.environ.get("REMUS_COLO_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remus_colo"


def build(cache_dir: Path, log: Callable[[str], object] = print) -> Path:
    """Returns the image's directory in ``cache_dir``, built now if this recipe's is not there yet.

    Safe to call from several processes: one builds, the others wait.

    :param log: gets one line per step.
    :raises HostError: a tool is missing, or a package cannot be fetched; nothing half-built stays behind.
    """
    image_dir = cache_dir / f"guest-{recipe_key()}"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _locked(cache_dir / "guest.lock", log):
        if image_dir.exists():
            return image_dir
        begun_s = time.monotonic()
        log("Building the guest image: less than a minute, plus 125 MB to fetch the first time")
        with tempfile.TemporaryDirectory(prefix="guest-building-", dir=cache_dir) as building:
            _build_into(Path(building), cache_dir, log)
            os.chmod(building, 0o755)
            os.rename(building, image_dir)
            # What the context manager removes is a fresh directory of the old name.
            os.mkdir(building)
        log(f"Guest image ready after {time.monotonic() - begun_s:.0f} s: {image_dir}")
    return image_dir


@functools.cache
def recipe_key() -> str:
    """Twelve hex digits of a hash over all that decides what the image holds, Debian's package versions aside."""
    package = resources.files("remus_colo.testbed")
    files = [package / name for name in _RECIPE]
    files += [entry for entry in (package / "services").iterdir() if not entry.name.startswith("__")]
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda entry: entry.name):
        digest.update(f"{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def domain_config(*, fifo_events: bool = False) -> str:
    """The guest's xl configuration, for a host that has the image in ``/domu`` and a bridge ``xenbr0``."""
    cmdline = " ".join(_CMDLINE if fifo_events else (*_CMDLINE, _NO_FIFO))
    return (
        f'name="{NAME}"\n'
        'type="pvh"\n'
        'kernel="/domu/vmlinuz"\n'
        'ramdisk="/domu/initrd"\n'
        f'cmdline="{cmdline}"\n'
        f"memory={MEMORY_MB}\n"
        "vcpus=1\n"
        f'vif=["bridge=xenbr0,mac={MAC}"]\n'
        # A guest that died must not come back as another domain behind a client's back.
        'on_reboot="destroy"\n'
        'on_crash="destroy"\n'
    )


def second_guest(config: str) -> str:
    """The configuration of a second guest, beside the one with this configuration."""
    return (
        config.replace(f'name="{NAME}"', f'name="{SECOND_NAME}"')
        .replace(MAC, SECOND_MAC)
        .replace('cmdline="', f'cmdline="guest.address={SECOND_ADDRESS} ')
    )


def compile_program(name: str, target: Path) -> None:
    """Compiles ``services/NAME.c`` into the static program ``target``.

    :raises HostError: there is no C compiler, or it fails.
    """
    words = ["cc", "-O2", "-static", "-Wall", "-Wextra", "-s", "-x", "c", "-o", str(target), "-"]
    try:
        subprocess.run(
            words, input=guest_root.source(f"{name}.c"), capture_output=True, timeout=300, check=True
        )
    except FileNotFoundError as missing:
        raise HostError("no C compiler: install the packages gcc and libc6-dev") from missing
    except subprocess.CalledProcessError as failed:
        reason = failed.stderr.decode(errors="replace").strip()
        raise HostError(f"{name}.c does not compile: {reason}") from failed


def _build_into(building: Path, cache_dir: Path, log: Callable[[str], object]) -> None:
    release = guest_debian.Release(SUITE, cache_dir / f"guest-apt-{SUITE}", log)
    release.update()
    packages = release.fetch_with_dependencies(guest_root.PACKAGES)
    kernel_name = release.dependency(KERNEL_PACKAGE, r"linux-image-.*-amd64")
    kernel_package = release.fetch(kernel_name)
    log("Putting the root together")
    kernel = guest_root.kernel(kernel_package)
    with tempfile.TemporaryDirectory() as scratch:
        for name in PROGRAMS:
            compile_program(name, Path(scratch) / name)
        programs = {name: (Path(scratch) / name).read_bytes() for name in PROGRAMS}
        nodes = guest_root.own_files(programs, kernel.modules)
    nodes += guest_root.userland(packages)
    # Not compressed: unpacking costs an emulated processor more than reading.
    (building / "initrd").write_bytes(guest_cpio.archive(nodes, load_content.MTIME_S))
    (building / "vmlinuz").write_bytes(kernel.image)
    (building / "web.cfg").write_text(domain_config())
    (building / "web-fifo.cfg").write_text(domain_config(fifo_events=True))
    manifest = {
        "kernel": kernel.release,
        "packages": sorted(package.stem for package in (*packages, kernel_package)),
        "root_bytes": sum(len(node.data) for node in nodes),
    }
    (building / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


@contextlib.contextmanager
def _locked(path: Path, log: Callable[[str], object]) -> Iterator[None]:
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log("Waiting for another process that builds the guest image")
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Whoever holds the lock is alone, so a half-built image is a dead process's.
        for leftover in path.parent.glob("guest-building-*"):
            shutil.rmtree(leftover)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m remus_colo.testbed.guest_image", description=__doc__)
    parser.add_argument(
        "cache", nargs="?", type=Path, default=default_cache_dir(), help="default: %(default)s"
    )
    try:
        image_dir = build(parser.parse_args().cache, log=lambda line: print(line, file=sys.stderr))
    except RemusError as error:
        print(f"guest_image: {error}", file=sys.stderr)
        return error.exit_status
    print(image_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
