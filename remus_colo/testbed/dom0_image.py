# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hosts' dom0: a Debian release with its Xen, all from Debian's packages.

Two cached results.  The *root tree* is what the packages install, ready for chroot (the work tree's
code is built in it).  The *image* is a directory with ``disk.img``, ``xen``, ``vmlinuz`` and ``initrd``, for QEMU.
"""

from __future__ import annotations

import functools
import gzip
import logging
import lzma
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from remus_colo.testbed import cache, guest_cpio, xen_build
from remus_colo.testbed.commands import need, run
from remus_colo.testbed.errors import BedError
from remus_colo.testbed.xen_source import SUITES

log = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
DISK_BYTES = 3 << 30

PACKAGES = (
    "xenstore-utils", "linux-image-amd64",
    # what remus_colo depends on, and what builds it
    "python3", "python3-pyxs", "python3-cffi", "python3-pyroute2",
    "python3-setuptools", "python3-wheel", "python3-pip", "python3-dev", "libxen-dev", "gcc", "libc6-dev",
    # the bed
    "openssh-server", "busybox-static", "iproute2", "nftables", "kmod", "procps", "udev",
    # for tests that need this kernel, which has what a machine's own may lack (nft_queue)
    "iptables", "python3-pytest", "python3-hypothesis",
    # for people who look into it
    "tcpdump", "ethtool", "iputils-ping", "strace", "gdb-minimal", "bridge-utils", "less",
)  # fmt: skip

# Only in the variant for HVM guests.
DEVICE_MODEL_PACKAGES = ("qemu-system-xen",)

APT_OPTIONS = ('APT::Install-Recommends "false"', 'Acquire::Languages "none"')
DPKG_OPTIONS = (
    "force-confold", "force-unsafe-io",
    "path-exclude=/usr/share/doc/*", "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/locale/*", "path-exclude=/usr/share/info/*",
)  # fmt: skip

# Drivers that no QEMU machine here has; a third of the image.
DROPPED_DRIVERS = (
    "accel", "android", "bluetooth", "comedi", "dma", "edac", "firewire", "gpu", "hid", "hwmon", "i2c", "iio",
    "infiniband", "input", "isdn", "leds", "media", "memstick", "mfd", "misc", "mmc", "mtd", "net/can",
    "net/dsa", "net/ethernet", "net/phy", "net/usb", "net/wireless", "nfc", "parport", "pcmcia", "platform",
    "power", "regulator", "rtc", "scsi", "soundwire", "spi", "staging", "thunderbolt", "usb", "video", "watchdog",
)  # fmt: skip
DROPPED_TREES = ("sound", "fs/xfs", "fs/btrfs", "fs/ocfs2", "fs/gfs2", "fs/ceph", "fs/smb", "fs/nfs", "fs/nfsd",
                 "fs/f2fs", "fs/jfs", "fs/dlm", "net/bluetooth", "net/mac80211", "net/wireless", "net/batman-adv",
                 "net/ceph", "net/smc", "net/tipc")  # fmt: skip

INITRD_MODULES = ("virtio_pci", "virtio_blk", "ext4", "crc32c_generic")

# br_netfilter stays out: loading it sends bridged packets through the IP hooks, which changes the path under test.
DOM0_MODULES = (
    "virtio_net", "virtio_rng", "xenfs", "xen-privcmd", "xen-evtchn", "xen-gntdev", "xen-gntalloc",
    "xen-netback", "xen-blkback", "af_packet", "bridge", "veth", "tun", "vxlan", "ifb",
    "sch_plug", "sch_ingress", "cls_u32", "cls_matchall", "act_mirred", "act_gact",
    "nfnetlink", "nfnetlink_queue", "nf_tables", "nft_queue",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Release:
    """A release of Debian.

    :ivar xen: version of its Xen, as its packages' names have it.
    :ivar packages: that only it has.
    """

    suite: str
    xen: str
    packages: tuple[str, ...] = ()

    def all_packages(self, *, device_model: bool) -> tuple[str, ...]:
        xen = (f"xen-utils-{self.xen}", f"xen-hypervisor-{self.xen}-amd64")
        return xen + PACKAGES + self.packages + (DEVICE_MODEL_PACKAGES if device_model else ())


# Debian 12 has no NetfilterQueue: our own reader of queues needs none.
RELEASES = {
    "debian-13": Release(SUITES["debian-13"], "4.20", ("python3-netfilterqueue",)),
    "debian-12": Release(SUITES["debian-12"], "4.17"),
}

SSHD_CONFIG = """\
Port 22
HostKey /etc/ssh/ssh_host_ed25519_key
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
PrintMotd no
PrintLastLog no
MaxSessions 200
MaxStartups 100
StrictModes no
SetEnv PATH=/usr/lib/xen-{xen}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
Subsystem sftp internal-sftp
"""


@dataclass(frozen=True, slots=True)
class Dom0Image:
    """Files for QEMU.  ``disk`` is shared by all hosts of all beds, each with its own overlay."""

    disk: Path
    xen: Path
    vmlinuz: Path
    initrd: Path


def root_recipe(release: str, *, device_model: bool = False) -> dict[str, object]:
    """What :func:`root_tree` is made of."""
    debian = RELEASES[release]
    return {
        "suite": debian.suite,
        "packages": debian.all_packages(device_model=device_model),
        "mirror": os.environ.get("REMUS_COLO_MIRROR", ""),
        "apt": APT_OPTIONS,
        "dpkg": DPKG_OPTIONS,
        "dropped": DROPPED_DRIVERS + DROPPED_TREES,
        "version": 2,
    }


def root_tree(release: str, *, device_model: bool = False) -> Path:
    """The dom0's root tree, built when absent (1 to 2 minutes, downloads about 200 MB).

    :param release: a key of :data:`RELEASES`.
    :param device_model: the variant that runs HVM guests, too.
    """
    debian = RELEASES[release]
    build = functools.partial(_build_root, debian.suite, debian.all_packages(device_model=device_model))
    return cache.entry("dom0-root", root_recipe(release, device_model=device_model), build)


def image(release: str, *, device_model: bool = False) -> Dom0Image:
    """The dom0's disk and boot files, built when absent; parameters as for :func:`root_tree`."""
    sshd = SSHD_CONFIG.format(xen=RELEASES[release].xen)
    recipe = {
        "root": root_recipe(release, device_model=device_model), "init": (HERE / "dom0_init.sh").read_text(), "modules": DOM0_MODULES,
        "initrd": (HERE / "dom0_initrd.sh").read_text(), "initrd_modules": INITRD_MODULES,
        "sshd": sshd, "disk_bytes": DISK_BYTES, "version": 1,
    }  # fmt: skip
    path = cache.entry(
        "dom0-image",
        recipe,
        lambda path: _build_image(root_tree(release, device_model=device_model), sshd, path),
    )
    return Dom0Image(path / "disk.img", path / "xen", path / "vmlinuz", path / "initrd")


def xen_binary(xen: str, release: str) -> Path:
    """The hypervisor to boot: ``debian``, ``patched`` (built here), or the path of another one (gzipped or not)."""
    if xen == "debian":
        return image(release).xen
    if xen == "patched":
        return xen_build.patched(release)
    source = Path(xen)
    if not source.is_file():
        raise BedError(f"--xen {xen}: neither 'debian' nor 'patched' nor a hypervisor file")

    def build(path: Path) -> None:
        _copy_gunzipped(source, path)

    return cache.entry("xen", {"sha256": cache.file_hash(source)}, build)


def _build_root(suite: str, packages: Sequence[str], path: Path) -> None:
    need("mmdebstrap")
    if not KEYRING.exists():
        raise BedError(f"{KEYRING} is missing: install the package debian-archive-keyring")
    log.info(
        "installing Debian %s with Xen for the hosts' dom0 (about 1 to 2 minutes, 200 MB to download)", suite
    )
    began = time.monotonic()
    argv: list[str | Path] = ["nice", "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase",
                              "--components=main", f"--keyring={KEYRING}"]  # fmt: skip
    argv += [f"--aptopt={option}" for option in APT_OPTIONS]
    argv += [f"--dpkgopt={option}" for option in DPKG_OPTIONS]
    # The initrd is ours; Debian's would take longer to make than all the rest.
    no_initrd = "echo update_initramfs=no > $1/etc/initramfs-tools/update-initramfs.conf"
    argv += [f"--setup-hook=mkdir -p $1/etc/initramfs-tools && {no_initrd}"]
    argv += ["--include=" + ",".join(packages), suite, path]
    # Without a mirror mmdebstrap takes Debian's own, with security updates.
    argv += [m for m in (os.environ.get("REMUS_COLO_MIRROR"),) if m]
    run(argv, timeout_s=1800)
    _trim_modules(path)
    log.info("dom0's packages are installed (%.0f s)", time.monotonic() - began)


def _modules_dir(root: Path) -> Path:
    found = sorted((root / "usr/lib/modules").iterdir())
    if not found:
        raise BedError("the dom0 tree has no kernel modules: remove it from the cache and try again")
    return found[-1]


def _trim_modules(root: Path) -> None:
    """Drop drivers of absent hardware, and unpack the rest: xz is slow under emulation."""
    modules = _modules_dir(root)
    for name in [f"drivers/{driver}" for driver in DROPPED_DRIVERS] + list(DROPPED_TREES):
        cache.remove(modules / "kernel" / name)
    for packed in list(modules.glob("kernel/**/*.ko.xz")):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()
    run(["chroot", root, "depmod", modules.name], timeout_s=120)


def _build_image(root: Path, sshd: str, path: Path) -> None:
    need("mke2fs")
    log.info("making the hosts' disk image (about 15 seconds)")
    path.mkdir()
    version = _modules_dir(root).name
    shutil.copyfile(root / "boot" / f"vmlinuz-{version}", path / "vmlinuz")
    hypervisors = sorted((root / "boot").glob("xen-4*.gz"))
    if not hypervisors:
        raise BedError("the dom0 tree has no Xen: remove it from the cache and try again")
    _copy_gunzipped(hypervisors[-1], path / "xen")
    (path / "initrd").write_bytes(_initrd(root))
    stage = path / "stage"
    # Hard links cost no space; every file that differs from the package's is replaced, never written into.
    run(["cp", "-al", root, stage], timeout_s=120)
    try:
        _put(stage / "usr/local/sbin/testbed-init", (HERE / "dom0_init.sh").read_text(), 0o755)
        _put(stage / "etc/ssh/sshd_config", sshd)
        _put(stage / "etc/testbed-modules", "\n".join(DOM0_MODULES) + "\n")
        _put(stage / "etc/resolv.conf", "")
        _put(stage / "etc/hostname", "dom0\n")
        _put(stage / "etc/xen/xl.conf", 'autoballoon="off"\nvif.default.bridge="xenbr0"\n')
        for name in ("boot", "var/cache/apt", "var/lib/apt/lists"):
            cache.remove(stage / name)
            (stage / name).mkdir()
        # dom0's root is thrown away with the overlay: no journal, no checks.
        run(["nice", "mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1", "-m", "0",
             "-d", stage, path / "disk.img", f"{DISK_BYTES >> 10}k"], timeout_s=600)  # fmt: skip
    finally:
        cache.remove(stage)


def _put(path: Path, content: str, mode: int = 0o644) -> None:
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(mode)


def _initrd(root: Path) -> bytes:
    """A busybox and the modules that the disk needs, in the order in which they load."""
    version = _modules_dir(root).name
    wanted: list[Path] = []
    for name in INITRD_MODULES:
        shown = run(
            ["chroot", root, "modprobe", "--set-version", version, "--show-depends", name], timeout_s=30
        )
        for line in shown.stdout.splitlines():
            words = line.split()
            if words[0] == "insmod":
                module = root / words[1].lstrip("/")
                # Checksums by instructions that the emulated CPU lacks.
                if module not in wanted and not module.stem.endswith(("-intel", "-pclmul")):
                    wanted.append(module)
    nodes = [
        guest_cpio.regular("init", (HERE / "dom0_initrd.sh").read_bytes(), 0o755),
        guest_cpio.regular("bin/busybox", (root / "usr/bin/busybox").read_bytes(), 0o755),
        guest_cpio.regular("modules.order", "".join(f"{m.name}\n" for m in wanted).encode()),
    ]
    nodes += [guest_cpio.regular(f"modules/{m.name}", m.read_bytes()) for m in wanted]
    return guest_cpio.archive(nodes, 0)


def _copy_gunzipped(source: Path, target: Path) -> None:
    content = source.read_bytes()
    target.write_bytes(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
