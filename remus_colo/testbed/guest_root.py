# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the guest's root holds: the programs and libraries it runs, taken out of Debian's packages, and our files.

The guest has no disk and 256 MB of memory, so the root takes from each package only what is used: no package
manager, no documentation, no second shell.
"""

from __future__ import annotations

import dataclasses
import lzma
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from remus_colo.errors import HostError
from remus_colo.testbed import guest_debian, guest_elf, load_content
from remus_colo.testbed.guest_cpio import Node, character_device, directory, regular, symlink

#: Debian packages that the root is taken from, besides what they depend on.
PACKAGES = ("nginx", "libnginx-mod-http-headers-more-filter", "redis-server", "busybox-static")

#: Kernel modules without which the guest has no network.
MODULES = ("xen-netfront",)

_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_LOADER = "usr/lib64/ld-linux-x86-64.so.2"

_LIBRARY = re.compile(rf"{_LIBRARIES}/[^/]+\.so[^/]*")
_BOOT_IMAGE = re.compile(r"boot/vmlinuz-(.+)")
_MODULE = re.compile(r"usr/lib/modules/.+/([^/]+)\.ko\.xz")

# Path in the packages to path in the root.
_PROGRAMS = {
    "usr/sbin/nginx": "usr/sbin/nginx",
    "usr/lib/nginx/modules/ngx_http_headers_more_filter_module.so": (
        "usr/lib/nginx/modules/ngx_http_headers_more_filter_module.so"
    ),
    # redis is one program that looks at the name it was called by.
    "usr/bin/redis-check-rdb": "usr/bin/redis-server",
    "usr/bin/redis-cli": "usr/bin/redis-cli",
    "usr/bin/busybox": "usr/bin/busybox",
}

_APPLETS = """
[ ash awk basename cat chmod chown cp cut date dd df dmesg du echo env expr false find free grep head
hexdump hostname id ifconfig insmod ip kill killall less ln ls lsmod md5sum mkdir mknod mount mv nc
netstat nice od pidof ping poweroff printf ps pwd readlink reboot rm rmmod route sed seq setsid sh
sha256sum sleep sort start-stop-daemon stat stty sync sysctl tail tee test time timeout top touch tr
traceroute true umount uname uptime vi wc wget which xargs
"""

_PASSWD = """\
root:x:0:0:root:/root:/bin/sh
www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
redis:x:100:100:redis:/run:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
_GROUP = "root:x:0:\nwww-data:x:33:\nredis:x:100:\nnogroup:x:65534:\n"


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel package's parts: the boot image, and modules by name, unpacked."""

    release: str
    image: bytes
    modules: dict[str, bytes]


def kernel(package: Path) -> Kernel:
    """Takes the boot image and MODULES out of the kernel package.

    :raises HostError: the package lacks one of them.
    """
    taken = guest_debian.take(package, lambda path: bool(_BOOT_IMAGE.fullmatch(path) or _module(path)))
    release, image = "", b""
    modules: dict[str, bytes] = {}
    for path, data in taken.files.items():
        if match := _BOOT_IMAGE.fullmatch(path):
            release, image = match[1], data
        else:
            modules[_module(path)] = lzma.decompress(data)
    for name in MODULES:
        if name not in modules:
            raise HostError(f"{package.name} has no module {name}")
        # The loader of the guest's init resolves no dependencies, and the module has none today.
        if depends := re.search(rb"\0depends=([^\0]+)\0", modules[name]):
            raise HostError(f"module {name} of {package.name} needs {depends[1].decode()}: add it to MODULES")
    if not image:
        raise HostError(f"{package.name} has no boot image")
    return Kernel(release, image, modules)


def userland(packages: Iterable[Path]) -> list[Node]:
    """The programs, and all libraries that they need, as nodes of the root.

    :raises HostError: a program or a library is in none of ``packages``.
    """
    programs: dict[str, bytes] = {}
    libraries: dict[str, bytes] = {}
    links: dict[str, str] = {}
    for package in packages:
        taken = guest_debian.take(package, lambda path: path in _PROGRAMS or bool(_LIBRARY.fullmatch(path)))
        for path, data in taken.files.items():
            if path in _PROGRAMS:
                programs[path] = data
            else:
                libraries[path.rpartition("/")[2]] = data
        links |= {path.rpartition("/")[2]: target for path, target in taken.links.items()}
    for name, target in links.items():
        if target in libraries:
            libraries[name] = libraries[target]
    if missing := set(_PROGRAMS) - set(programs):
        raise HostError(f"no fetched package has {', '.join(sorted(missing))}")
    try:
        names = guest_elf.closure(programs.values(), libraries)
    except KeyError as lost:
        raise HostError(f"no fetched package has the library {lost.args[0]}") from lost
    nodes = [regular(_PROGRAMS[path], data, 0o755) for path, data in programs.items()]
    nodes += [regular(f"{_LIBRARIES}/{name}", libraries[name], 0o755) for name in sorted(names)]
    nodes.append(regular(_LOADER, libraries["ld-linux-x86-64.so.2"], 0o755))
    return nodes


def own_files(programs: dict[str, bytes], modules: dict[str, bytes]) -> list[Node]:
    """All nodes of the root that are ours: skeleton, configuration, content, small services, modules.

    :param programs: the compiled C programs of ``services/``, by name.
    """
    nodes = [
        *(
            directory(path)
            for path in ("dev", "proc", "root", "run", "sys", "var/log/nginx", "var/lib/nginx")
        ),
        directory("tmp", 0o1777),
        character_device("dev/console", 5, 1),
        *(symlink(name, f"usr/{name}") for name in ("bin", "lib", "lib64", "sbin")),
        *(symlink(f"usr/bin/{applet}", "busybox") for applet in _APPLETS.split()),
        regular("etc/passwd", _PASSWD.encode()),
        regular("etc/group", _GROUP.encode()),
        regular("etc/hosts", b"127.0.0.1 localhost\n10.77.0.10 web\n"),
        *(regular(f"etc/{name}", source(name)) for name in ("nginx.conf", "redis.conf", "sysctl.conf")),
        regular("init", source("init"), 0o755),
        *(regular(f"usr/bin/{name}", program, 0o755) for name, program in programs.items()),
        *(regular(f"usr/lib/modules/{name}.ko", data) for name, data in modules.items()),
        *(
            regular(f"srv/www/{name}", load_content.content(name, size))
            for name, size in load_content.SIZES.items()
        ),
    ]
    return nodes


def source(name: str) -> bytes:
    """The bytes of a file in ``services``."""
    return (resources.files("remus_colo.testbed") / "services" / name).read_bytes()


def _module(path: str) -> str:
    """The name of the module in MODULES that ``path`` holds, or nothing."""
    match = _MODULE.fullmatch(path)
    return match[1] if match and match[1] in MODULES else ""
