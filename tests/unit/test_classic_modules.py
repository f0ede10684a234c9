# SPDX-License-Identifier: LGPL-2.1-or-later
"""The modules of Xen 4.4's Remus, as far as they need no Xen: names, formats, files, pipes."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

import remus_colo.classic.finder
from remus_colo import config, dominfo
from remus_colo.adapters import ifb, toolstack
from remus_colo.adapters.backend import Vif
from remus_colo.adapters.xenctrl import DomainInfo, ShutdownReason
from remus_colo.checkpoint import libxcrecords as libxc
from remus_colo.classic import colo, protection
from remus_colo.classic.colo import CallingDevice
from remus_colo.classic.protection import Calls, Plain, goes_on
from remus_colo.devices import netbuffer
from remus_colo.errors import DomainError, ExitStatus, NetworkError, PeerLost
from remus_colo.remus_options import RemusOptions
from remus_colo.session import lock, recovery

assert remus_colo.classic.finder.XenFinder

pytest.importorskip("pyroute2", reason="pyroute2 is not installed (Debian: python3-pyroute2)")
pytest.importorskip("pyxs", reason="pyxs is not installed (Debian: python3-pyxs)")

from xen.lowlevel import checkpoint  # noqa: E402
from xen.remus import blkdev, device, image, netlink, profile, qdisc, save, util, vbd, vif, vm  # noqa: E402

CONFIG: dict[str, Any] = {
    "c_info": {"name": "web", "uuid": "1-2", "type": "pvh"},
    "b_info": {"max_vcpus": 1, "max_memkb": 262144, "target_memkb": 262144, "shadow_memkb": 3072},
    "nics": [{"mac": "00:16:3e:77:00:10", "bridge": "xenbr0"}, {"mac": "00:16:3e:77:00:11"}],
    "disks": [
        {"pdev_path": "/dev/vg/web", "vdev": "xvda", "backend": "phy", "readwrite": 1},
        {"pdev_path": "r0", "script": "/etc/xen/scripts/block-drbd", "vdev": "xvdd", "readwrite": 1},
        {"pdev_path": "/srv/a.iso", "vdev": "xvdc", "backend": "qdisk", "is_cdrom": 1},
    ],
}
NAMES = {
    "save": "Saver ColoSaver CheckpointError MigrationSocket NullSocket CheckpointingFile Keepalive XCFLAGS_LIVE",
    "vm": "VM VMException parsedominfo domtosxpr strtosxpr sxprtostr getvifs getdisks fromxend getshadowmem",
    "device": "CheckpointedDevice ReplicatedDisk ReplicatedDiskException BufferedNIC BufferedNICException Netbuf "
    "IFBBuffer IMQBuffer Netbufpool selectnetbuf netbuftypes getrth ColoNIC",
    "image": "makeheader parseheader VMImage Writer VMParseException readbatch parsebatch SIGNATURE",
    "netlink": "rtnl rtattr rtattrlist nlmsg ifinfomsg tcmsg newlinkmsg newqdiscmsg RTNLException align",
    "qdisc": "request addrequest delrequest changerequest Qdisc PrioQdisc CfifoQdisc PlugQdisc QdiscException TC_H_ROOT",
    "util": "PipeException Lock canonifymac checkpid runcmd modprobe",
    "vif": "VIF parse",
    "blkdev": "BlkDev BlkDevException register parse handlers",
    "vbd": "VBD",
    "profile": "ProfileBlock NullProfiler Profiler",
}


@pytest.mark.parametrize("module", NAMES)
def test_every_classic_name_is_there(module: str) -> None:
    found = __import__(f"xen.remus.{module}", fromlist=["*"])
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


def test_a_domain_as_xend_described_it() -> None:
    domain = vm.VM(dominfo=dominfo.from_libxl(7, CONFIG))
    assert (domain.domid, domain.name) == (7, "web")
    assert [(nic.dev, nic.mac, getattr(nic, "bridge", None)) for nic in domain.vifs] == [
        ("vif7.0", "00:16:3e:77:00:10", "xenbr0"),
        ("vif7.1", "00:16:3e:77:00:11", None),
    ]
    assert [str(disk) for disk in domain.disks] == [
        "phy:/dev/vg/web,xvda,w",
        "drbd:r0,xvdd,w",
        "file:/srv/a.iso,xvdc:cdrom,r",
    ]
    assert isinstance(domain.disks[0], vbd.VBD)
    assert str(domain).startswith("VM 7 (web), vifs: [00:16:3e:77:00:10, ")


XL = """#!/bin/sh
case "$*" in
    "domid web" | "domname 7") echo 7 ;;
    vm-list)
        echo "UUID                                  ID    name"
        echo "00000000-0000-0000-0000-000000000000  0    Domain-0"
        echo "0e8b1a55-7d0f-4d3c-9d6a-0123456789ab  7    web and more" ;;
    "list -l 7") echo '[{"domid": 7, "config": {"c_info": {"name": "web"}, "b_info": {"type": "pvh"}}}]' ;;
    *) echo "$*: no such thing" >&2; exit 1 ;;
esac
"""


@pytest.mark.parametrize("domid", [7, "7", "web", "0e8b1a55-7d0f-4d3c-9d6a-0123456789AB"])
def test_a_domain_is_found_by_name_number_or_uuid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, domid: int | str
) -> None:
    (tmp_path / "xl").write_text(XL)
    (tmp_path / "xl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    domain = vm.VM(domid)
    assert (domain.domid, domain.name) == (7, "web")
    for absent in (
        "nosuch",
        8,
        "0e8b1a55-7d0f-4d3c-9d6a-000000000000",
        "00000000-0000-0000-0000-000000000000",
    ):
        with pytest.raises(vm.VMException, match="error looking up domain"):
            vm.VM(absent)


def test_one_device_is_a_dictionary_several_are_a_list() -> None:
    one = vm.parsedominfo(["domain", ["domid", 1], ["device", ["vif", ["mac", "a"]]]])
    assert one == {"domid": 1, "device": {"vif": {"mac": "a"}}}
    two = vm.parsedominfo(
        ["domain", ["device", ["vif", ["mac", "a"]]], ["device", ["vif", ["mac", "b"]]], ["cpus", [[1]]], []]
    )
    assert two["device"]["vif"] == [{"mac": "a"}, {"mac": "b"}]


def test_a_description_survives_its_way_through_dictionaries_and_text() -> None:
    sxpr = dominfo.from_libxl(7, CONFIG)
    parsed = vm.parsedominfo(sxpr)
    assert vm.parsedominfo(vm.domtosxpr(parsed)) == parsed
    assert image.parseheader(vm.sxprtostr(sxpr).encode())["name"] == "web"


def test_a_description_of_a_domain_that_does_not_run() -> None:
    text = "(domain (name web) (vcpus 1) (cpus ()) (image (linux (kernel ) bare)) (device (vif (mac 0:16:3e:0:0:1))))"
    domain = vm.VM(dominfo=vm.strtosxpr(text))
    assert (domain.domid, domain.name, domain.disks) == (-1, "web", [])
    assert str(domain) == "VM -1 (web), vifs: [00:16:3e:00:00:01], disks: []"
    assert domain.dom["image"] == {"linux": {"kernel": None, "bare": None}}


def test_devices_of_which_nothing_is_said() -> None:
    assert (vm.getvifs({}), vm.getvifs({"device": None}), vm.getdisks({"device": None})) == ([], [], [])
    text = "(vm (name web) (device (vif)) (device (vif (mac 0:16:3e:0:0:1))))"
    bare, told = vm.VM(dominfo=vm.strtosxpr(text)).vifs
    assert (bare.dev, bare.mac, told.dev, told.mac) == ("vif-1.0", "", "vif-1.1", "00:16:3e:00:00:01")
    with pytest.raises(blkdev.BlkDevException, match="no device"):
        vm.VM(dominfo=vm.strtosxpr("(vm (name web) (device (vbd)))"))


def test_the_name_of_a_disk_keeps_its_last_letters() -> None:
    # the old module's rstrip(':disk') took them away
    assert blkdev.BlkDev(dev="xvdd:disk", mode="w").dev == "xvdd"
    with pytest.raises(blkdev.BlkDevException, match="no mode"):
        blkdev.parse({"dev": "xvda"})


# -- images ----------------------------------------------------------------------------------------


def test_headers() -> None:
    sxpr = dominfo.from_libxl(7, CONFIG)
    header = image.makeheader(sxpr)
    assert header.startswith(b"LinuxGuestRecord" + struct.pack("!i", len(header) - 20))
    found = image.VMImage(io.BytesIO(header))
    assert found.dom is not None
    assert (found.dom["name"], found.colo) == ("web", False)
    colo = image.makeheader(sxpr, colo=True)
    assert len(colo) == len(header)
    assert not colo.startswith(image.SIGNATURE.encode())
    assert image.VMImage(io.BytesIO(colo)).colo
    empty = b"LinuxGuestRecord" + struct.pack("!i", 1)
    for broken in (
        b"",
        b"LinuxGuestRecor",
        header[:30],
        b"X" + header[1:],
        empty,
        empty + b" ",
        empty + b"(",
        empty + b"a",
    ):
        with pytest.raises(image.VMParseException):
            image.VMImage(io.BytesIO(broken))


def record(kind: int, body: bytes) -> bytes:
    return libxc.RECORD.pack(kind, len(body)) + body + bytes(-len(body) % libxc.ALIGNMENT)


def page_data(*pages: tuple[int, int]) -> bytes:
    numbers = b"".join(struct.pack("<Q", pfn) for pfn, _ in pages)
    body = b"".join(bytes([content]) * libxc.PAGE_SIZE for _, content in pages)
    return record(libxc.PAGE_DATA, libxc.PAGE_DATA_PREFIX.pack(len(pages), 0) + numbers + body)


CHECKPOINT = record(libxc.CHECKPOINT, b"")


def test_files_that_2to3_has_left_as_they_were(tmp_path: Path) -> None:
    header = image.makeheader(dominfo.from_libxl(7, CONFIG)) + image.STREAM_MARKER + bytes(32)
    (tmp_path / "saved").write_bytes(header + page_data((0, 0xFF)) + CHECKPOINT)
    with open(tmp_path / "saved") as saved, open(tmp_path / "image", "w") as out:
        assert image.VMImage(saved).dom == image.parseheader(header[20:-40])
        saved.buffer.seek(0)
        writer = image.Writer(out)
        writer.slurp(saved)
        writer.close()
    assert (tmp_path / "image").read_bytes() == header + page_data((0, 0xFF)) + libxc.END_RECORD


def test_a_saver_writes_its_header_to_a_file_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Checkpointer(checkpoint.checkpointer):
        def open(self, domid: int) -> None:
            assert domid == 7

        def start(self, iofile: Any, *args: Any, **options: Any) -> None:
            os.write(iofile.fileno(), b"checkpoints")

    monkeypatch.setattr(toolstack, "find_domain", lambda _: 7)
    monkeypatch.setattr(toolstack, "domain_config", lambda _: CONFIG)
    monkeypatch.setattr(checkpoint, "checkpointer", Checkpointer)
    with open(tmp_path / "image", "w") as out:
        save.Saver("web", out).start()
    with open(tmp_path / "image", "rb") as made:
        header = image.VMImage(made)
        assert made.read() == b"checkpoints"
    assert header.dom is not None
    assert json.loads(header.dom.pop("libxl")) == CONFIG  # what the domain can be made of anew
    assert header.dom == vm.parsedominfo(vm.strtosxpr(vm.sxprtostr(dominfo.from_libxl(7, CONFIG))))


@pytest.mark.parametrize("compact", [False, True])
def test_a_series_of_checkpoints_becomes_the_last_of_them(tmp_path: Path, compact: bool) -> None:
    start = (
        image.makeheader(dominfo.from_libxl(7, CONFIG)) + image.STREAM_MARKER + bytes(32) + record(0x10, b"")
    )
    (tmp_path / "0").write_bytes(start + page_data((0, 1), (1, 1)) + record(4, b"first") + CHECKPOINT)
    (tmp_path / "1").write_bytes(page_data((1, 2)) + record(4, b"second") + CHECKPOINT)
    (tmp_path / "2").write_bytes(page_data((0, 3)) + record(4, b"broken off"))
    with open(tmp_path / "image", "wb") as out:
        writer = image.Writer(out, compact)
        for name in "012":
            writer.slurp(str(tmp_path / name))
        writer.close()
    with open(tmp_path / "image", "rb") as made:
        image.VMImage(made)
        assert made.read(image.STREAM_HEADERS_BYTES).startswith(image.STREAM_MARKER)
        pages, states, count = {}, [], 0
        while True:
            kind, batch = image.readbatch(made)
            if kind == libxc.END:
                break
            if kind == libxc.PAGE_DATA:
                for entry, page in image.parsebatch(batch):
                    pages[entry] = page[0]
                    count += 1
            elif kind == 4:
                states.append(batch[8:])
        assert made.read() == b""
    assert pages == {0: 1, 1: 2}
    assert states == [b"second\0\0"]
    assert count == (2 if compact else 3)


def test_a_page_that_has_lost_its_content_does_not_get_it_back() -> None:
    header = image.makeheader(dominfo.from_libxl(7, CONFIG)) + image.STREAM_MARKER + bytes(32)
    gone = 0xF << libxc.TYPE_SHIFT | 1  # XTAB
    without_content = record(libxc.PAGE_DATA, libxc.PAGE_DATA_PREFIX.pack(1, 0) + struct.pack("<Q", gone))
    out = io.BytesIO()
    writer = image.Writer(out, compact=True)
    writer.slurp(io.BytesIO(header + page_data((0, 1), (1, 1)) + CHECKPOINT + without_content + CHECKPOINT))
    writer.close()
    both = libxc.PAGE_DATA_PREFIX.pack(2, 0) + struct.pack("<QQ", 0, gone) + b"\1" * image.PAGE_SIZE
    assert out.getvalue() == header + record(libxc.PAGE_DATA, both) + libxc.END_RECORD


def test_an_image_whose_writer_just_goes_is_complete() -> None:
    header = image.makeheader(dominfo.from_libxl(7, CONFIG)) + image.STREAM_MARKER + bytes(32)
    out = io.BytesIO()
    writer = image.Writer(out)
    writer.slurp(io.BytesIO(header + page_data((0, 1)) + record(4, b"state") + CHECKPOINT))
    del writer
    gc.collect()
    expected = header + page_data((0, 1)) + record(4, b"state") + libxc.END_RECORD
    assert out.getvalue() == expected
    # one that was closed adds nothing, and still tells of what it is
    out = io.BytesIO()
    writer = image.Writer(out)
    writer.slurp(io.BytesIO(header + page_data((0, 1)) + record(4, b"state") + CHECKPOINT))
    writer.close()
    assert writer.vm is not None and writer.vm.dom is not None and writer.vm.dom["name"] == "web"
    writer.close()
    del writer
    gc.collect()
    assert out.getvalue() == expected
    # and one whose file is closed has nowhere to put it
    closed = io.BytesIO()
    writer = image.Writer(closed)
    writer.slurp(io.BytesIO(header))
    closed.close()
    del writer
    gc.collect()


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"\1\0",
        CHECKPOINT * 2,
        record(libxc.PAGE_DATA, b""),
        record(libxc.PAGE_DATA, libxc.PAGE_DATA_PREFIX.pack(9, 0)),
        # of the stream of Xen 4.4: a count, numbers, pages
        struct.pack("<iQ", 1, 5) + bytes(libxc.PAGE_SIZE),
    ],
)
def test_what_is_no_batch(broken: bytes) -> None:
    with pytest.raises(image.VMParseException):
        image.parsebatch(broken)


# -- where checkpoints go --------------------------------------------------------------------------


def test_a_file_for_each_round(tmp_path: Path) -> None:
    path = tmp_path / "cp"
    out = save.CheckpointingFile(str(path))
    rounds = [os.urandom(300_000), b"", os.urandom(5)]
    for number, data in enumerate(rounds):
        if number:
            out.checkpoint()
        Plain(out.fileno()).deliver(number, memoryview(data))
    out.close()
    out.close()
    names = [str(path), f"{path}.1", f"{path}.2"]
    assert [Path(name).read_bytes() for name in names] == rounds


@pytest.mark.parametrize("size", [1, 1_000_000])
def test_a_round_that_its_disk_does_not_take(tmp_path: Path, size: int) -> None:
    path = tmp_path / "cp"
    path.symlink_to("/dev/full")
    out = save.CheckpointingFile(str(path))
    # the pipe takes what is little, and breaks under what is much
    with contextlib.nullcontext() if size == 1 else pytest.raises(PeerLost):
        Plain(out.fileno()).deliver(0, memoryview(bytes(size)))
    told: list[int | None] = []

    def checkpoint() -> None:
        try:
            out.checkpoint()
        except OSError as error:
            told.append(error.errno)

    waiting = threading.Thread(target=checkpoint, daemon=True)
    waiting.start()
    waiting.join(30)
    assert told == [errno.ENOSPC]
    with pytest.raises(OSError, match="No space left"):
        out.close()
    out.close()


def test_nothing_comes_of_a_null_socket() -> None:
    null = save.NullSocket(("nowhere", 1))
    assert (null.write(b"gone"), null.write("gone")) == (4, 4)
    null.flush()
    assert os.fstat(null.fileno()).st_rdev == os.stat("/dev/null").st_rdev


def test_a_migration_socket_says_who_does_not_answer() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(OSError, match=r"cannot connect to 127\.0\.0\.1 port"):
        save.MigrationSocket(("127.0.0.1", port))


@pytest.mark.parametrize(
    ("text", "port", "used", "with_tls"),
    [("", 8002, 8002, False), ("(xend-relocation-port 9000)", 8002, 8002, False), ("(xend-relocation-ssl yes)", 8002, 8003, True),
     ("(xend-relocation-ssl yes)(xend-relocation-port 9000)(xend-relocation-ssl-port 9001)", 9000, 9001, True),
     ("(xend-relocation-ssl yes)", 9005, 9005, True)],
)  # fmt: skip
def test_a_migration_socket_goes_where_the_configuration_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, port: int, used: int, with_tls: bool
) -> None:
    (tmp_path / "config").write_text(text)
    monkeypatch.setenv(config.ENVIRONMENT, str(tmp_path / "config"))
    seen = []

    def refuse(options: Any, *_: object) -> None:
        seen.append(options)
        raise PeerLost("that is all")

    monkeypatch.setattr(protection, "connect", refuse)
    with pytest.raises(OSError, match="that is all"):
        save.MigrationSocket(("backup", port))
    assert [(options.destination, options.port, options.tls is not None) for options in seen] == [
        ("backup", used, with_tls)
    ]


def test_a_reader_that_is_gone() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    try:
        with pytest.raises(PeerLost):
            Plain(write_fd).live(b"x")
    finally:
        os.close(write_fd)


def test_keepalive() -> None:
    called = threading.Event()
    calls: list[dict[str, Any]] = []

    def method(**options: Any) -> None:
        calls.append(options)
        called.set()

    keepalive = save.Keepalive(method, 0.001)
    keepalive.start()
    assert called.wait(30)
    keepalive.stop()
    keepalive.stop()
    assert calls[-1] == {"stop": True}


@pytest.mark.parametrize(
    ("answer", "on"), [(None, True), (True, True), (1, True), (False, False), (0, False)]
)
def test_what_a_callback_says(answer: object, on: bool) -> None:
    assert goes_on(lambda: answer) is on
    assert Calls(checkpoint=lambda: answer).committed() is on
    if not on:
        with pytest.raises(DomainError):
            Calls(suspend=lambda: answer).suspended()
    # libxenguest of Xen 4.4 did not look at what this one said
    Calls(resume=lambda: answer).resuming()
    CallingDevice(colo.Calls(resume=lambda: answer), lambda: None).preresume()
    assert goes_on(None)
    assert not Calls().committed()  # one checkpoint, without a callback


def test_a_checkpointer_wants_to_be_opened_first() -> None:
    with pytest.raises(checkpoint.error, match="not opened"):
        checkpoint.checkpointer().start(open(os.devnull, "wb"))  # noqa: SIM115


def test_a_checkpointer_that_just_goes_lets_go_of_its_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []
    monkeypatch.setattr(
        protection, "Domain", lambda domid: SimpleNamespace(close=lambda: closed.append(domid))
    )

    class Checkpointer(checkpoint.checkpointer):
        def __init__(self) -> None:
            """What the old module's object needed was done before this."""

    for domid, kind in ((7, checkpoint.checkpointer), (8, Checkpointer)):
        checkpointer = kind()
        checkpointer.open(domid)
        assert domid not in closed
        del checkpointer
        gc.collect()
        assert closed.count(domid) == 1


def test_a_domain_that_does_not_run_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoints' first suspend would find it done, and then resume a guest that may run on the backup."""
    left = DomainInfo(
        7,
        1,
        0,
        1,
        True,
        True,
        False,
        shutdown=True,
        shutdown_reason=ShutdownReason.SUSPEND,
        paused=False,
        blocked=False,
    )

    @contextlib.contextmanager
    def entered(*_: object, **__: object) -> Iterator[Any]:
        yield SimpleNamespace(info=lambda: left)

    monkeypatch.setattr(toolstack, "find_domain", lambda _: 7)
    monkeypatch.setattr(toolstack, "domain_name", lambda _: "web")
    monkeypatch.setattr(toolstack, "domain_config", lambda _: CONFIG)
    for name in ("only_one", "Store", "Guest"):
        monkeypatch.setattr(protection, name, entered)
    with pytest.raises(checkpoint.error, match="web is suspended"):
        checkpoint.checkpointer().open(7)


@pytest.fixture
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Those of a domain 7 that can be opened; links that are there, and those whose output is diverted and no more."""
    found = SimpleNamespace(
        links={"ifb0"}, diverted=[], straight=[], dropped=[], engines=[], config=dict(CONFIG)
    )

    class Links:
        names = staticmethod(list)
        set_up = set_down = remove_mirror = staticmethod(lambda name: None)

        def exists(self, name: str) -> bool:
            return name in found.links

        def __enter__(self) -> Links:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    @contextlib.contextmanager
    def entered(*_: object, **__: object) -> Iterator[Any]:
        yield SimpleNamespace(info=lambda: None)

    def engine(*_: object, device_model: bool) -> SimpleNamespace:
        found.engines.append(device_model)
        return SimpleNamespace(
            close=lambda: None, suspender=None, dirty_log=True, device_model=device_model or None
        )

    monkeypatch.setattr(toolstack, "find_domain", lambda _: 7)
    monkeypatch.setattr(toolstack, "domain_name", lambda _: "web")
    monkeypatch.setattr(toolstack, "domain_config", lambda _: found.config)
    for module in (protection, lock):
        monkeypatch.setattr(module, "Store", entered)
    monkeypatch.setattr(protection, "Guest", entered)
    monkeypatch.setattr(protection, "refuse_stopped", lambda *_: None)
    monkeypatch.setattr(protection, "RemusEngine", engine)
    monkeypatch.setattr(lock, "RUN_DIR", tmp_path)
    monkeypatch.setattr(lock.backend, "vifs", lambda *_: [Vif(7, 0), Vif(7, 1)])
    monkeypatch.setattr(recovery, "QueueRules", lambda _: SimpleNamespace(remove_stale=lambda: None))
    for module in (lock, device):
        monkeypatch.setattr(module, "Links", Links)
    monkeypatch.setattr(
        device, "Plug", lambda _, name, *__: SimpleNamespace(drop=lambda: found.dropped.append(name))
    )
    monkeypatch.setattr(device, "CopyingTap", lambda _: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(ifb, "redirect_input", lambda _, name, target: found.diverted.append((name, target)))
    monkeypatch.setattr(ifb, "stop_redirecting", lambda _, name: found.straight.append(name))
    return found


def test_cleaning_up_after_a_killed_protection_leaves_this_scripts_buffers(
    tmp_path: Path, surroundings: SimpleNamespace
) -> None:
    """Which are there before the domain is opened; without its detour the guest's output would be held no more."""
    straight = surroundings.straight
    (tmp_path / "protect-7.lock").write_text("1\nabcdef\n")
    buffer = device.IFBBuffer("ifb0")
    buffer.install(vif.parse({}, 7, 0))
    protection.Domain(7).close()
    assert "vif7.0" not in straight
    assert "vif7.1" in straight
    buffer.uninstall()
    assert "vif7.0" in straight
    (tmp_path / "protect-7.lock").write_text("1\n")
    straight.clear()
    protection.Domain(7).close()
    assert "vif7.0" in straight


def test_an_hvm_guest_needs_a_place_for_its_device_model(
    tmp_path: Path, surroundings: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    class Checkpoints:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def run(self) -> None:
            ran.append("nowhere")

    monkeypatch.setattr(protection, "PeriodicCheckpoints", Checkpoints)
    monkeypatch.setattr(protection, "_run_linked", lambda *_, **__: ran.append("backup"))
    link = protection.Link.__new__(protection.Link)
    for kind, has_one in (("pvh", False), ("hvm", True)):
        surroundings.config["b_info"] = {**CONFIG["b_info"], "type": kind}
        checkpointer = checkpoint.checkpointer()
        checkpointer.open(7)
        assert surroundings.engines.pop() is has_one
        checkpointer.start(SimpleNamespace(link=link))
        checkpointer.start(save.NullSocket(("", 0)))
        with (
            open(tmp_path / "checkpoints", "wb") as file,
            pytest.raises(checkpoint.error, match="whose state is not saved here")
            if has_one
            else contextlib.nullcontext(),
        ):
            checkpointer.start(file)
        checkpointer.close()
    assert ran == ["backup", "nowhere", "nowhere", "backup", "nowhere"]


def test_what_a_killed_script_has_held_is_dropped(surroundings: SimpleNamespace) -> None:
    """Whether that guest went on elsewhere, nobody knows; and this one's output is not to wait in a plug that is closed."""
    buffer = device.IFBBuffer("ifb0")
    buffer.install(vif.parse({}, 7, 0))
    assert surroundings.dropped == ["ifb0"]
    buffer.uninstall()


def test_what_an_emulated_network_card_says_is_held_with_the_vifs(surroundings: SimpleNamespace) -> None:
    buffer = device.IFBBuffer("ifb0")
    buffer.install(vif.parse({}, 7, 0))
    buffer.uninstall()
    assert surroundings.diverted == [("vif7.0", "ifb0")]
    surroundings.diverted.clear()
    surroundings.straight.clear()
    surroundings.links.add("vif7.0-emu")
    buffer.install(vif.parse({}, 7, 0))
    assert surroundings.diverted == [("vif7.0", "ifb0"), ("vif7.0-emu", "ifb0")]
    assert protection.diverted == {"vif7.0", "vif7.0-emu"}
    buffer.uninstall()
    assert sorted(surroundings.straight) == ["vif7.0", "vif7.0-emu"]
    assert not protection.diverted


# -- devices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("uname", ["phy:/dev/vg/web", "file:/x", "tap:remus:host|aio:/x"])
def test_disks_that_nothing_replicates(uname: str) -> None:
    with pytest.raises(device.ReplicatedDiskException, match="Disk"):
        device.ReplicatedDisk(blkdev.BlkDev(uname=uname, dev="xvda", mode="w"))


DRBD = """#!/bin/sh
echo "$(basename $0) $*" >> {log}
case "$*" in
    "sh-dev r0") echo {device} ;;
    "{device} show") echo 'net {{ protocol '{protocol}'; }}' ;;
    "cstate r0") echo {state} ;;
    *) exit 1 ;;
esac
"""


@pytest.fixture
def drbd_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Tools that say what DRBD's would, and a file that takes none of its ioctls."""

    def make(protocol: str, state: str) -> Path:
        (tmp_path / "device").touch()
        log = tmp_path / "log"
        for tool in ("drbdadm", "drbdsetup"):
            path = tmp_path / tool
            path.write_text(DRBD.format(log=log, device=tmp_path / "device", protocol=protocol, state=state))
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return log

    return make


def test_a_disk_on_drbd(drbd_tools: Callable[[str, str], Path]) -> None:
    log = drbd_tools("D", "Connected")
    disk = device.ReplicatedDisk(blkdev.parse({"uname": "drbd:r0", "dev": "xvda:disk", "mode": "w"}))
    path = log.parent / "device"
    assert log.read_text().splitlines() == [
        "drbdadm sh-dev r0",
        f"drbdsetup {path} show",
        "drbdadm cstate r0",
    ]
    assert disk.ctlfd is not None and os.path.samestat(os.fstat(disk.ctlfd.fileno()), path.stat())
    assert (disk.is_drbd, disk.ackwait) == (True, False)
    with pytest.raises(NetworkError, match="did not take a checkpoint") as refused:
        disk.postsuspend()
    assert isinstance(refused.value, OSError)  # as a script catches it
    assert refused.value.errno == errno.ENOTTY
    disk.preresume()  # nothing to wait for
    disk.commit()
    disk.uninstall()
    disk.uninstall()
    assert disk.ctlfd is None
    other = device.ReplicatedDisk(blkdev.parse({"uname": "drbd:r0", "dev": "xvda:disk", "mode": "w"}))
    assert other.ctlfd is not None
    fd = other.ctlfd.fileno()
    del other
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize(
    ("protocol", "state", "said"), [("C", "Connected", "protocol C"), ("D", "StandAlone", "is StandAlone")]
)
def test_a_disk_that_drbd_does_not_keep(
    drbd_tools: Callable[[str, str], Path], protocol: str, state: str, said: str
) -> None:
    drbd_tools(protocol, state)
    with pytest.raises(device.ReplicatedDiskException, match=said):
        device.ReplicatedDisk(blkdev.BlkDev(uname="drbd:r0", dev="xvda", mode="w"))


def test_a_pool_gives_each_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "POOL_DIR", str(tmp_path / "remus"))
    pool = device.Netbufpool(device.IFBBuffer)
    one, other = pool.get(), device.Netbufpool(device.IFBBuffer).get()
    assert one.devname != other.devname
    pool.put(one)
    assert pool.get().devname == one.devname
    # an owner that is gone has nothing
    pool.save({one.devname: 2**22 + 1, other.devname: 2**22 + 1})
    assert pool.get().devname == one.devname
    # what a killed process has left half written is nothing
    Path(pool.path).write_text(f"{one.devname}\n{other.devname} x\n\n")
    assert pool.load() == {}
    assert pool.get().devname == one.devname


@pytest.fixture
def buffer_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done to the plug and the device of a BufferedNIC made now."""
    calls: list[str] = []

    class Plug:
        def __init__(self, *_: object) -> None:
            pass

        def __getattr__(self, name: str) -> Callable[[], None]:
            return lambda: calls.append(name)

        def remove(self, deadline_s: float = 0.0) -> None:
            calls.append("remove" if deadline_s > time.monotonic() else "remove at once")

    class Buffer(device.Netbuf):
        def install(self, vif: object) -> None:
            calls.append("divert")

        def uninstall(self) -> None:
            calls.append("straight")

    pool = SimpleNamespace(get=lambda: Buffer("lo"), put=lambda buffer: calls.append("put"))
    monkeypatch.setattr(device, "selectnetbuf", lambda: Buffer)
    monkeypatch.setattr(device, "Netbufpool", lambda kind: pool)
    monkeypatch.setattr(device, "Plug", Plug)
    monkeypatch.setattr(device, "Links", contextlib.nullcontext)
    monkeypatch.setattr(device.kmod, "load", lambda *_: None)
    return calls


def test_what_the_kernel_refuses_is_raised_as_it_was(
    buffer_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By netlink, IOError; by what were commands, util.PipeException."""

    def refuse(*_: object) -> None:
        raise NetworkError("the kernel refused") from OSError(errno.ENODEV, "no such device")

    nic = device.BufferedNIC(vif.parse({}, 7, 0))
    monkeypatch.setattr(device, "Plug", lambda *_: SimpleNamespace(install=refuse))
    with pytest.raises(OSError, match=r"^the kernel refused$") as refused:
        nic.postsuspend()
    assert isinstance(refused.value, device.BufferedNICException)
    assert refused.value.errno == errno.ENODEV
    plug = mock.Mock(**{"release_one.side_effect": refuse, "remove.side_effect": refuse})
    monkeypatch.setattr(device, "Plug", lambda *_: plug)
    nic.postsuspend()
    with pytest.raises(OSError, match="the kernel refused"):
        nic.commit()
    nic.uninstall()
    assert buffer_calls[-2:] == ["straight", "put"]


def test_what_no_detour_can_be_made_of_is_raised_as_a_command_that_failed(
    surroundings: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise NetworkError("the kernel refused")

    monkeypatch.setattr(ifb, "stop_redirecting", refuse)
    buffer = device.IFBBuffer("ifb0")
    buffer.install(vif.parse({}, 7, 0))
    with pytest.raises(util.PipeException, match="the kernel refused"):
        buffer.uninstall()
    monkeypatch.setattr(ifb, "redirect_input", refuse)
    with pytest.raises(util.PipeException, match="the kernel refused") as failed:
        buffer.install(vif.parse({}, 7, 0))
    assert failed.value.errno == errno.EIO
    protection.diverted.clear()


def test_what_a_scripts_own_buffer_raises_keeps_nothing_else_from_being_taken_down(
    buffer_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own(device.Netbuf):
        def install(self, vif: object) -> None:
            pass

        def uninstall(self) -> None:
            raise util.PipeException("tc failed", 2)

    pool = SimpleNamespace(get=lambda: Own("lo"), put=lambda buffer: buffer_calls.append("put"))
    monkeypatch.setattr(device, "Netbufpool", lambda kind: pool)
    device.BufferedNIC(vif.parse({}, 7, 0)).uninstall()
    assert buffer_calls == ["put"]


def test_a_buffer_holds_as_much_as_its_script_wants(
    buffer_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []

    def plug(links: object, name: str, limit_bytes: int) -> mock.Mock:
        limits.append(limit_bytes)
        return mock.Mock()

    monkeypatch.setattr(device, "Plug", plug)
    for wanted in (None, 4 << 20):
        nic = device.BufferedNIC(vif.parse({}, 7, 0))
        nic.q.limit = wanted or nic.q.limit
        nic.postsuspend()
        nic.uninstall()
    assert limits == [netbuffer.LIMIT_BYTES, 4 << 20]


def test_what_a_buffer_holds_at_its_end_has_time_to_leave(buffer_calls: list[str]) -> None:
    nic = device.BufferedNIC(vif.parse({}, 7, 0))
    nic.postsuspend()
    nic.commit()
    nic.uninstall()
    nic.uninstall()
    assert buffer_calls == ["divert", "install", "buffer", "release_one", "remove", "straight", "put"]


def test_what_a_buffer_holds_of_no_complete_checkpoint_is_dropped(
    buffer_calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By a script that takes it down in a callback, to die as the old command's test commands had it die."""
    nics = [device.BufferedNIC(vif.parse({}, domid, 0)) for domid in (7, 71)]
    for nic in nics:
        nic.postsuspend()

    class Checkpoints:
        def __init__(self, suspender: object, writer: object, calls: Calls, **_: object) -> None:
            self.calls = calls

        def run(self) -> None:
            self.calls.suspended()

    monkeypatch.setattr(protection, "PeriodicCheckpoints", Checkpoints)
    buffer_calls.clear()
    domain: Any = SimpleNamespace(
        domid=7, engine=SimpleNamespace(suspender=None, dirty_log=True, device_model=None)
    )

    def die() -> None:
        for nic in nics:
            nic.uninstall()

    with open(tmp_path / "checkpoints", "wb") as file:
        protection.run(domain, file, Calls(suspend=die), interval_s=0, compress=True)
        other = device.BufferedNIC(vif.parse({}, 7, 0))
        other.postsuspend()
        other.uninstall()
    assert [call for call in buffer_calls if call in ("drop", "remove")] == ["drop", "remove", "remove"]


@pytest.mark.parametrize(
    ("ended", "what"),
    [(ExitStatus.OK, "remove"), (ExitStatus.UNPROTECTED, "remove"), (ExitStatus.FENCED, "drop")],
)
def test_what_a_buffer_holds_when_the_guest_goes_on_elsewhere_is_dropped(
    buffer_calls: list[str], monkeypatch: pytest.MonkeyPatch, ended: ExitStatus, what: str
) -> None:
    class Session:
        failure = None
        worker = SimpleNamespace(run=lambda: None)
        goes_on_here = ended is not ExitStatus.FENCED
        request_stop = staticmethod(lambda: None)
        worker_ended = staticmethod(lambda failure: None)

        def __init__(self, *_: object) -> None:
            self.started = threading.Event()

        def run(self) -> ExitStatus:
            return ended

    monkeypatch.setattr(protection, "CallingSession", Session)
    nic = device.BufferedNIC(vif.parse({}, 7, 0))
    nic.postsuspend()
    domain: Any = SimpleNamespace(domid=7, name="web", engine=None, store=None)
    link: Any = protection.Link.__new__(protection.Link)
    link.host, link.options = "backup", RemusOptions("web")
    link.control = SimpleNamespace(addresses=("10.78.0.1", "10.78.0.2"))
    with contextlib.nullcontext() if ended is ExitStatus.OK else pytest.raises(PeerLost):
        protection.run(domain, SimpleNamespace(link=link), Calls(), interval_s=0, compress=True)
    nic.uninstall()
    assert [call for call in buffer_calls if call in ("drop", "remove")] == [what]
    protection.withheld.clear()


def test_vifs() -> None:
    nic = vif.parse({"mac": "0:16:3E:1:2:3", "bridge": "br0"}, 3, 1)
    assert (nic.dev, str(nic), nic.bridge) == ("vif3.1", "00:16:3e:01:02:03", "br0")  # type: ignore[attr-defined]


# -- messages --------------------------------------------------------------------------------------


def test_a_plug_request() -> None:
    plug = qdisc.PlugQdisc()
    plug.action = qdisc.TC_PLUG_RELEASE_ONE
    packed = qdisc.changerequest(5, qdisc.TC_H_ROOT, plug).pack()
    message = netlink.nlmsg(packed)
    assert (message.nlmsg_len, message.nlmsg_type, message.nlmsg_flags) == (
        len(packed),
        netlink.RTM_NEWQDISC,
        1,
    )
    about = netlink.tcmsg(message.body)
    assert (about.tcm_ifindex, about.tcm_parent) == (5, 0xFFFFFFFF)
    attributes = {found.rta_type: found.body for found in netlink.rtattrlist(about.rta)}
    assert attributes == {netlink.TCA_KIND: b"plug\0", netlink.TCA_OPTIONS: struct.pack("=iI", 1, plug.limit)}


def test_qdiscs_by_kind() -> None:
    assert isinstance(qdisc.Qdisc({"kind": "prio", "handle": 0x10000}), qdisc.PrioQdisc)
    plug = qdisc.PlugQdisc()
    plug.parse(["release"])
    assert plug.action == qdisc.TC_PLUG_RELEASE_ONE == qdisc.TC_PLUG_RELEASE
    assert plug.action != qdisc.TC_PLUG_BUFFER == qdisc.TC_PLUG_CHECKPOINT
    with pytest.raises(qdisc.QdiscException):
        plug.parse(["nonsense"])
    cfifo = qdisc.Qdisc({"kind": "cfifo", "handle": 0})
    cfifo.parse(["epoch", "4", "vmid", "2"])
    assert cfifo.optstr() == "epoch 4 vmID 2"
    # as getqdisc() tells of one without options
    for nothing in (None, b""):
        assert qdisc.Qdisc({"kind": "cfifo", "handle": 0, "options": nothing}).optstr() == "epoch 0 vmID 0"
        assert qdisc.Qdisc({"kind": "prio", "handle": 0, "options": nothing}).optstr().startswith("bands 3 ")


@pytest.mark.parametrize("broken", [b"\x01\x00\x01\x00", b"\xff\x00\x01\x00abcd"])
def test_attributes_that_cannot_be(broken: bytes) -> None:
    with pytest.raises(netlink.RTNLException):
        list(netlink.rtattrlist(broken))


# -- helpers ---------------------------------------------------------------------------------------


def test_commands() -> None:
    assert util.runcmd(["echo", "a b"]) == "a b\n"
    assert util.runcmd("echo 'a b'") == "a b\n"
    with pytest.raises(util.PipeException, match="could not run nothing-of-that-name"):
        util.runcmd("nothing-of-that-name")
    with pytest.raises(util.PipeException) as failed:
        util.runcmd(["sh", "-c", "echo why >&2; exit 3"])
    assert failed.value.errno == 3
    assert "why" in str(failed.value)
    assert util.runcmd(["printf", r"\303"]) == "\udcc3"
    with pytest.raises(util.PipeException, match="empty"):
        util.runcmd("")
    with pytest.raises(util.PipeException, match="quot"):
        util.runcmd("echo it's")
    assert not util.modprobe("no name")
    assert util.checkpid(os.getpid())
    assert not util.checkpid(2**22 + 1)


def test_a_lock_keeps_others_out(tmp_path: Path) -> None:
    path = str(tmp_path / "pool")
    with util.Lock(path):
        child = os.fork()
        if child == 0:
            util.Lock(path)
            os._exit(0)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    assert os.waitpid(child, 0)[1] == 0


def test_profiler(capsys: pytest.CaptureFixture[str]) -> None:
    profiler = profile.Profiler()
    profiler.enter("a")
    profiler.enter("b")
    profiler.exit("a")
    words = [line.split()[1:3] for line in capsys.readouterr().out.splitlines()]
    assert words == [["entered", "a"], ["entered", "b"], ["exited", "b"], ["exited", "a"]]
    with pytest.raises(KeyError):
        profiler.exit()
