# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's command line, and the host's state as files tell it."""

import json
import os
from pathlib import Path

import pytest

from remus_colo.testbed.errors import BedError
from remus_colo.testbed.network import HOSTS, mac
from remus_colo.testbed.process import ProcessId
from remus_colo.testbed.qemu import READY_MARK, Host, HostSpec

SPEC = {
    "bed": "b", "xen": "/c/xen", "vmlinuz": "/c/vmlinuz", "initrd": "/c/initrd", "disk": "/c/disk.img",
    "domu_disk": "/c/domu", "key": "AAAA", "memory_mb": 3000, "dom0_mb": 1500, "accel": "tcg",
}  # fmt: skip


def after(argv, option):
    return [argv[i + 1] for i, word in enumerate(argv) if word == option]


def test_a_host_starts_stopped_with_its_taps_and_identity():
    argv = HostSpec(**SPEC, net=HOSTS["backup"]).argv(Path("/run/b/backup"), {"mgmt": 7, "lan": 8, "repl": 9})
    assert "-S" in argv
    assert after(argv, "-cpu") == [
        "qemu64,+svm,+npt,+ssse3,+sse4.1,+sse4.2,+popcnt,+aes,+pclmulqdq,+fsgsbase"
    ]
    assert after(argv, "-netdev") == [
        f"tap,id={r},fd={n},vhost=off" for r, n in (("mgmt", 7), ("lan", 8), ("repl", 9))
    ]
    modules = after(argv, "-initrd")[0]
    # QEMU splits modules at single commas
    assert modules.replace(",,", "").split(",")[1:] == ["/c/initrd"]
    assert "testbed.host=backup testbed.n=2" in modules
    assert all("snapshot=on" in drive for drive in after(argv, "-drive"))


def test_a_probe_has_no_network():
    argv = HostSpec(**SPEC, net=None).argv(Path("/run/p"), {})
    assert after(argv, "-netdev") == []
    assert "testbed.probe=1" in after(argv, "-initrd")[0]


def test_macs_differ_by_bed_host_and_role_and_end_with_the_role():
    macs = {mac(bed, host, role) for bed in ("a", "b") for host in HOSTS for role in ("mgmt", "lan", "repl")}
    assert len(macs) == 12
    assert all(address.startswith("52:54:00:") for address in macs)
    assert [mac("a", "primary", role)[-2:] for role in ("mgmt", "lan", "repl")] == ["01", "02", "03"]


def test_the_state_of_a_host(tmp_path):
    host = Host("primary", tmp_path)
    assert host.state() == "off"
    me = ProcessId.of(os.getpid())
    (tmp_path / "process.json").write_text(json.dumps({"pid": me.pid, "start_ticks": me.start_ticks}))
    assert host.state() == "booting"
    (tmp_path / "serial.log").write_text(f"...\n{READY_MARK} 9.64 s\n")
    assert host.state() == "ready"
    (tmp_path / "process.json").write_text(json.dumps({"pid": me.pid, "start_ticks": me.start_ticks + 1}))
    assert host.state() == "off"
    assert not host.kill()


def test_a_host_that_dies_while_booting_says_its_last_words(tmp_path):
    (tmp_path / "serial.log").write_text("(XEN) Panic on CPU 0")
    with pytest.raises(BedError, match=r"died while it booted: .*Panic on CPU 0"):
        Host("primary", tmp_path).wait_ready(20)


def test_taps_are_closed_when_qemu_cannot_start(tmp_path):
    deep = tmp_path / ("x" * 100)
    read_fd, write_fd = os.pipe()
    with pytest.raises(BedError):
        Host("primary", deep).start(HostSpec(**SPEC, net=HOSTS["primary"]), {"lan": read_fd})
    os.close(write_fd)
    with pytest.raises(OSError):
        os.fstat(read_fd)
