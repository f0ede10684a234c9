# SPDX-License-Identifier: LGPL-2.1-or-later
"""The image's recipe and its cache, and the root that it is made of; package files here are small real ones."""

from __future__ import annotations

import lzma
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from remus_colo.errors import HostError
from remus_colo.testbed import guest_debian, guest_image, guest_root, load_content
from remus_colo.testbed.load_check import HttpCheck

needs_dpkg = pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="the command dpkg-deb is not installed")


def package(folder: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    """Builds a Debian package that installs ``files``."""
    tree = folder / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: x\nVersion: 1\nArchitecture: amd64\nMaintainer: x\nDescription: x\n"
    )
    for path, data in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(data)
    for path, target in (links or {}).items():
        (tree / path).symlink_to(target)
    subprocess.run(["dpkg-deb", "--build", tree, folder / "x.deb"], check=True, capture_output=True)
    return folder / "x.deb"


# -- the domain configuration


def test_the_domain_is_told_not_to_use_fifo_event_channels() -> None:
    assert re.search(
        r'^cmdline="console=hvc0 .*\bxen\.fifo_events=0"$', guest_image.domain_config(), re.MULTILINE
    )


def test_the_other_configuration_differs_in_nothing_else() -> None:
    other = guest_image.domain_config(fifo_events=True)
    assert "fifo" not in other
    assert other == guest_image.domain_config().replace(" xen.fifo_events=0", "")


def test_the_domain_is_as_the_test_bed_expects_it() -> None:
    lines = guest_image.domain_config().splitlines()
    for line in (
        'name="web"', 'type="pvh"', 'kernel="/domu/vmlinuz"', 'ramdisk="/domu/initrd"', "memory=256", "vcpus=1",
        'vif=["bridge=xenbr0,mac=00:16:3e:77:00:10"]',
    ):  # fmt: skip
        assert line in lines


def test_a_second_guest_has_a_name_and_addresses_of_its_own() -> None:
    first = guest_image.domain_config().splitlines()
    second = guest_image.second_guest(guest_image.domain_config()).splitlines()
    changed = [line for line in second if line not in first]
    assert changed[0] == 'name="web2"'
    assert changed[1].startswith('cmdline="guest.address=10.77.0.11 console=hvc0 ')
    assert changed[2:] == ['vif=["bridge=xenbr0,mac=00:16:3e:77:00:11"]']


# The part of the guest's init that finds its address.
ADDRESS_LINES = re.compile(r"^address=.*?^done$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("cmdline", "address"),
    [("quiet a=b", "10.77.0.10"), ("guest.address=10.77.0.11 console=hvc0 quiet * a", "10.77.0.11")],
)
def test_the_guest_takes_the_address_that_it_is_given(tmp_path: Path, cmdline: str, address: str) -> None:
    (tmp_path / "cmdline").write_text(cmdline + "\n")
    found = ADDRESS_LINES.search(guest_root.source("init").decode())
    assert found is not None
    script = found[0].replace("/proc/cmdline", str(tmp_path / "cmdline")) + '\necho "$address"'
    assert (
        subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
        == f"{address}\n"
    )


# -- the cache


def test_an_image_that_is_there_is_not_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = tmp_path / f"guest-{guest_image.recipe_key()}"
    ready.mkdir()
    monkeypatch.setattr(guest_image, "_build_into", None)
    assert guest_image.build(tmp_path, log=pytest.fail) == ready


def test_a_build_that_fails_leaves_nothing_half_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(building: Path, cache_dir: Path, log: object) -> None:
        (building / "vmlinuz").write_bytes(b"half")
        raise HostError("no mirror")

    monkeypatch.setattr(guest_image, "_build_into", fail)
    with pytest.raises(HostError, match="no mirror"):
        guest_image.build(tmp_path, log=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["guest.lock"]


def test_what_a_killed_build_left_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "guest-building-dead").mkdir()
    (tmp_path / "guest-building-dead/vmlinuz").write_bytes(b"half")
    monkeypatch.setattr(
        guest_image, "_build_into", lambda building, *_: (building / "vmlinuz").write_bytes(b"whole")
    )
    image_dir = guest_image.build(tmp_path, log=lambda line: None)
    assert (image_dir / "vmlinuz").read_bytes() == b"whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == [image_dir.name, "guest.lock"]


def test_two_that_want_the_image_build_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, builds, waits = threading.Event(), threading.Event(), [], []

    def slowly(building: Path, cache_dir: Path, log: object) -> None:
        builds.append(building)
        begun.set()
        assert go_on.wait(30)

    def waiting(line: str) -> None:
        waits.append(line)
        go_on.set()

    monkeypatch.setattr(guest_image, "_build_into", slowly)
    first = threading.Thread(target=guest_image.build, args=(tmp_path, lambda line: None))
    first.start()
    assert begun.wait(30)
    guest_image.build(tmp_path, log=waiting)
    first.join(30)
    assert len(builds) == 1
    assert waits == ["Waiting for another process that builds the guest image"]


def test_the_key_names_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    key = guest_image.recipe_key()
    assert re.fullmatch(r"[0-9a-f]{12}", key)
    guest_image.recipe_key.cache_clear()
    assert guest_image.recipe_key() == key
    monkeypatch.setattr(guest_image, "_RECIPE", guest_image._RECIPE[1:])
    guest_image.recipe_key.cache_clear()
    assert guest_image.recipe_key() != key
    guest_image.recipe_key.cache_clear()


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("REMUS_COLO_CACHE", "/own")
    assert guest_image.default_cache_dir() == Path("/own")
    monkeypatch.delenv("REMUS_COLO_CACHE")
    assert guest_image.default_cache_dir() == Path("/xdg/remus_colo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert guest_image.default_cache_dir() == Path("/home/me/.cache/remus_colo")


def test_the_mirror_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMUS_COLO_MIRROR", "http://mirror.example/debian")
    assert guest_debian.mirror() == "http://mirror.example/debian"


# -- the root


def test_the_root_serves_what_the_load_asks_for() -> None:
    nodes = {
        node.path: node
        for node in guest_root.own_files({"guest_services": b"program"}, {"xen-netfront": b"module"})
    }
    for name, size in load_content.SIZES.items():
        assert nodes[f"srv/www/{name}"].data == load_content.content(name, size)
        assert len(nodes[f"srv/www/{name}"].data) == size
    check = HttpCheck(["1k"])
    check.request()
    assert check.feed(load_content.static_header(1000) + nodes["srv/www/1k"].data).completed == 1
    assert nodes["usr/lib/modules/xen-netfront.ko"].data == b"module"
    assert nodes["init"].mode & 0o111


def test_every_command_of_init_is_in_the_root() -> None:
    nodes = {
        node.path for node in guest_root.own_files({"guest_services": b"", "guest_clock": b""}, {})
    } | set(guest_root._PROGRAMS.values())
    script = guest_root.source("init").decode()
    used = re.findall(
        r"^\s*(?:until |if |while |\( ?)*(mount|mkdir|hostname|sysctl|insmod|sleep|ip|grep|setsid|sh|touch|chown)\b",
        script,
        re.MULTILINE,
    )
    used += re.findall(r"^run \w+ (\S+)", script, re.MULTILINE)
    assert {"mount", "ip", "nginx", "guest_services", "start-stop-daemon"} <= set(used)
    for command in used:
        assert f"usr/bin/{command}" in nodes or f"usr/sbin/{command}" in nodes, command


def test_init_is_a_script_that_a_shell_can_read() -> None:
    subprocess.run(["sh", "-n"], input=guest_root.source("init"), check=True)


@needs_dpkg
def test_the_kernel_is_taken_out_of_its_package(tmp_path: Path) -> None:
    module = b"\x7fELF\0depends=\0name=xen_netfront\0"
    made = package(
        tmp_path,
        {
            "boot/vmlinuz-6.12-amd64": b"kernel",
            "usr/lib/modules/6.12-amd64/kernel/drivers/net/xen-netfront.ko.xz": lzma.compress(module),
            "usr/lib/modules/6.12-amd64/kernel/drivers/net/e1000.ko.xz": b"not even looked at",
        },
    )
    assert guest_root.kernel(made) == guest_root.Kernel("6.12-amd64", b"kernel", {"xen-netfront": module})


@needs_dpkg
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"boot/vmlinuz-1": b"k"}, "has no module xen-netfront"),
        ({"usr/lib/modules/1/xen-netfront.ko.xz": lzma.compress(b"m")}, "has no boot image"),
        (
            {
                "boot/vmlinuz-1": b"k",
                "usr/lib/modules/1/xen-netfront.ko.xz": lzma.compress(b"\0depends=libeth\0"),
            },
            "needs libeth",
        ),
    ],
)
def test_a_kernel_that_would_not_work_is_refused(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    with pytest.raises(HostError, match=message):
        guest_root.kernel(package(tmp_path, files))


@needs_dpkg
def test_a_program_that_no_package_has_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="usr/sbin/nginx"):
        guest_root.userland([package(tmp_path, {"usr/bin/busybox": b"x"})])


@needs_dpkg
def test_a_damaged_package_is_named(tmp_path: Path) -> None:
    made = package(tmp_path, {"usr/bin/busybox": os.urandom(100_000)})
    made.write_bytes(made.read_bytes()[:50_000])
    with pytest.raises(HostError, match=r"x\.deb is damaged"):
        guest_root.userland([made])


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_a_source_that_does_not_compile_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_root, "source", lambda name: b"int main(void) { return nonsense; }")
    with pytest.raises(HostError, match="nonsense"):
        guest_image.compile_program("guest_services", tmp_path / "program")


def test_a_machine_without_a_compiler_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="install the packages gcc and libc6-dev"):
        guest_image.compile_program("guest_services", tmp_path / "program")
