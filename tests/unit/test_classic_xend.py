# SPDX-License-Identifier: LGPL-2.1-or-later
"""xen.xend.XendOptions, .sxp and .XendError, as scripts of Xen 4.4's time use them."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import remus_colo.classic.finder  # noqa: F401
from remus_colo import config, config_keys, dominfo
from remus_colo import sxp as ours
from remus_colo.checkpoint import libxlformat
from remus_colo.errors import ConfigError, HostError, RemusError

from xen.xend import XendOptions, sxp  # isort: skip
from xen.xend.XendError import XendError  # isort: skip

HEADER = b"LinuxGuestRecord"
EXAMPLE = Path(__file__).parents[2] / "examples" / "xend-config.sxp"


@pytest.fixture
def options(tmp_path: Path) -> Callable[[str], XendOptions.XendOptions]:
    def make(text: str) -> XendOptions.XendOptions:
        path = tmp_path / "xend-config.sxp"
        path.write_text(text)
        return XendOptions.XendOptions(str(path))

    return make


def test_the_instance_is_one_and_reads_where_xend_did(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "other.sxp"
    path.write_text("(xend-relocation-port 9000)")
    monkeypatch.setenv(config.ENVIRONMENT, str(path))
    XendOptions.instance.cache_clear()
    try:
        assert XendOptions.instance().get_xend_relocation_port() == 9000
        assert XendOptions.instance() is XendOptions.instance()
        assert XendOptions.instance().config_path == str(path)
    finally:
        XendOptions.instance.cache_clear()


def test_without_a_file_the_defaults_are_xends() -> None:
    options = XendOptions.XendOptions()
    assert options.config == ["xend-config"]
    assert options.get_xend_relocation_port() == 8002
    assert options.get_xend_relocation_ssl_port() == 8003
    assert options.get_xend_relocation_server() is False
    assert options.get_xend_relocation_hosts_allow() == options.get_xend_relocation_address() == ""
    assert options.get_vif_script() == "vif-bridge"
    assert options.get_network_script() is None
    assert options.get_xend_unix_xmlrpc_server() is True
    assert options.get_xen_api_server() == [["unix"]]
    assert options.get_enable_dom0_ballooning() is False
    assert options.get_reserved_memory() == 0
    assert options.get_xend_relocation_server_ssl_key_file() is None


def test_a_subclass_has_defaults_of_its_own(tmp_path: Path) -> None:
    class Options(XendOptions.XendOptions):
        xend_relocation_server_default = "yes"
        xend_relocation_port_default = 9000
        dom0_min_mem_default = 196
        vnc_tls_default = 1

    assert XendOptions.XendOptions.xend_relocation_ssl_server_default == "no"
    (tmp_path / "config").write_text("(xend-relocation-port 9001)")
    options = Options(str(tmp_path / "config"))
    assert options.get_xend_relocation_server() is True
    assert (options.get_xend_relocation_port(), options.get_xend_relocation_ssl_port()) == (9001, 8003)
    assert (options.get_dom0_min_mem(), options.get_enable_dom0_ballooning()) == (196, True)
    assert options.get_vnc_tls() == 1
    assert Options().get_xend_relocation_port() == 9000


def test_what_the_file_says(options: Callable[[str], XendOptions.XendOptions], tmp_path: Path) -> None:
    got = options(
        "(network-script 'network-bridge netdev=eth1')(dom0-min-mem 196)(total_available_memory 3)"
        "(xen-api-server ((9363 pam '^a$') (unix none)))(my-own 'x y')(console-limit many)(enable-dump perhaps)"
        f"(xend-relocation-server-ssl-key-file {tmp_path})(xend-relocation-server-ssl-cert-file absent.crt)"
    )
    assert got.get_network_script() == ["/etc/xen/scripts/network-bridge", "netdev=eth1"]
    assert (got.get_enable_dom0_ballooning(), got.get_reserved_memory()) == (True, 3)
    assert got.get_xen_api_server() == [["9363", "pam", "^a$"], ["unix", "none"]]
    assert got.get_config_string("my-own") == "x y"
    assert got.get_config_value("nothing", 5) == 5
    assert got.get_xend_relocation_server_ssl_key_file() == str(tmp_path)
    for method, said in (
        (got.get_xend_relocation_server_ssl_cert_file, "names /etc/xen/absent.crt, which does not exist"),
        (got.get_console_limit, "console-limit cannot be many: a whole number is allowed"),
        (got.get_enable_dump, "enable-dump cannot be perhaps: yes or no is allowed"),
    ):
        with pytest.raises(XendError, match=said) as caught:
            method()
        assert isinstance(caught.value, RemusError) and said in caught.value.value


def test_a_file_that_cannot_be_meant_is_refused(options: Callable[[str], XendOptions.XendOptions]) -> None:
    with pytest.raises(ConfigError, match="line 1 column 1"):
        options("(")
    with pytest.raises(AttributeError, match="get_nothing"):
        options("").get_nothing()


def test_every_key_of_xends_has_its_method(options: Callable[[str], XendOptions.XendOptions]) -> None:
    asked = {key for _, key, _, _ in XendOptions._GETTERS} | {
        "enable-dom0-ballooning",
        "total_available_memory",
    }
    assert asked | {"logfile", "loglevel"} == set(config_keys.XEND_KEYS) | config_keys.OTHER_XEND_KEYS
    example = XendOptions.XendOptions(str(EXAMPLE))
    for name in dir(example):
        if name.startswith("get_xend_relocation") and "file" not in name:
            getattr(example, name)()


def test_sxp_is_ours() -> None:
    assert sxp.Parser is ours.Parser
    parser = sxp.Parser()
    parser.input("(domain (name web) (vif 'a b'))")
    assert parser.ready()
    domain = parser.get_val()
    assert sxp.child_value(domain, "name") == "web"
    assert sxp.to_string(domain) == "(domain (name web) (vif 'a b'))"
    # what xend's module offered
    for name in (
        *(
            "mime_type",
            "ParseError",
            "Parser",
            "atomp",
            "show",
            "show_xml",
            "elementp",
            "name",
            "attributes",
            "attribute",
        ),
        *(
            "children",
            "child",
            "child_at",
            "child0",
            "child1",
            "child2",
            "child3",
            "child4",
            "child_value",
            "has_id",
        ),
        *(
            "with_id",
            "child_with_id",
            "elements",
            "merge",
            "to_string",
            "from_string",
            "all_from_string",
            "parse",
        ),
    ):
        assert hasattr(sxp, name)


# -- saved domains ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "signature read"),
        (b"QemuDeviceModelRecord", "found b'QemuDeviceModelR'"),
        (HEADER + b"\0\0", "config size read"),
        (HEADER + b"\xff\xff\xff\xff", "a configuration of -1 bytes"),
        (HEADER + b"\0\0\0\4(a)", "config read"),
        (HEADER + b"\0\0\0\3(a ", "config parse"),
        (HEADER + b"\0\0\0\3abc", "config parse"),
        (HEADER + b"\0\0\0\3(a)", "config parse"),
        (b"LinuxColoRecord2", "send it to remusd"),
    ],
)
def test_what_is_no_saved_domain(tmp_path: Path, content: bytes, said: str) -> None:
    pytest.importorskip("pyxs", reason="pyxs is not installed (Debian: python3-pyxs)")
    from xen.xend import XendCheckpoint

    (tmp_path / "saved").write_bytes(content)
    with open(tmp_path / "saved", "rb") as saved, pytest.raises(XendError, match=re.escape(said)):
        XendCheckpoint.restore(None, saved.fileno())


def test_reading_and_writing_exactly() -> None:
    pytest.importorskip("pyxs", reason="pyxs is not installed (Debian: python3-pyxs)")
    from xen.xend import XendCheckpoint

    read_fd, write_fd = os.pipe()
    with open(read_fd, "rb"), open(write_fd, "wb", closefd=False):
        XendCheckpoint.write_exact(write_fd, XendCheckpoint.SIGNATURE, "signature")
        XendCheckpoint.write_exact(write_fd, b"\0\0\0\3", "length")
        os.close(write_fd)
        assert XendCheckpoint.read_exact(read_fd, len(HEADER), "signature read") == HEADER
        with pytest.raises(XendError, match=r"^config read$"):
            XendCheckpoint.read_exact(read_fd, 5, "config read")
    with open(os.devnull, "rb") as unwritable, pytest.raises(XendError, match="could not write"):
        XendCheckpoint.write_exact(unwritable.fileno(), b"x", "could not write")


def test_the_end_of_a_secondary(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyxs", reason="pyxs is not installed (Debian: python3-pyxs)")
    from xen.xend import XendCheckpoint

    class Session:
        def __init__(self, domid: int | None, error: str = "") -> None:
            self.domid = domid
            self._error = error

        def run(self) -> None:
            if self._error:
                raise HostError(self._error)

    monkeypatch.setattr(XendCheckpoint.vm, "VM", lambda domid: ("VM", domid))
    assert XendCheckpoint.restore(None, -1, colo=Session(5)) == ("VM", 5)
    for colo, said in (
        (Session(None), "goes on elsewhere"),
        (Session(None, "there is no xl"), "there is no xl"),
        (True, "give its session"),
    ):
        with pytest.raises(XendError, match=said):
            XendCheckpoint.restore(None, -1, colo=colo)
    # as save() has it: no COLO
    with open(os.devnull, "rb") as nothing, pytest.raises(XendError, match="signature read"):
        XendCheckpoint.restore(None, nothing.fileno(), colo=False)


@pytest.mark.parametrize(
    ("kind", "said"),
    [("hvm", "web is an HVM guest"), ("pvh", "web is suspended"), ("pv", "web is suspended")],
)
def test_what_is_not_saved(kind: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be saved of an HVM guest lacks its device model, and the domain is destroyed when it is
    saved.  One that a remus left suspended may run on the backup, and would be resumed if saving failed.
    """
    pytest.importorskip("pyxs", reason="pyxs is not installed (Debian: python3-pyxs)")
    from xen.xend import XendCheckpoint

    domain = XendCheckpoint.vm.VM(dominfo=["domain", ["domid", "7"], ["name", "web"]])
    left = SimpleNamespace(shutdown=True, shutdown_reason=2, dying=False, paused=False)
    guest = contextlib.nullcontext(SimpleNamespace(info=lambda: left))
    monkeypatch.setattr(XendCheckpoint, "Guest", lambda *_, **__: guest)
    monkeypatch.setattr(XendCheckpoint.toolstack, "domain_config", lambda _: {"c_info": {"type": kind}})
    with open(tmp_path / "saved", "wb") as saved, pytest.raises(XendError, match=said):
        XendCheckpoint.save(saved, domain)
    assert (tmp_path / "saved").read_bytes() == b""


def test_the_connection_is_closed_before_a_domain_that_has_moved_is_destroyed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who receives it may wait for the end, and a script may keep its socket for long."""
    pytest.importorskip("pyxs", reason="pyxs is not installed (Debian: python3-pyxs)")
    from xen.xend import XendCheckpoint

    class Suspender(contextlib.AbstractContextManager["Suspender"]):
        suspended = True

        def __init__(self, *_: object) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

        def resume(self) -> None:
            done.append("resumed")

    done: list[str] = []
    running = SimpleNamespace(shutdown=False, dying=False, paused=False)
    guest = contextlib.nullcontext(SimpleNamespace(info=lambda: running))
    domain = XendCheckpoint.vm.VM(dominfo=["domain", ["domid", "7"], ["name", "web"]])
    monkeypatch.setattr(XendCheckpoint, "Guest", lambda *_, **__: guest)
    monkeypatch.setattr(XendCheckpoint, "Store", contextlib.nullcontext)
    monkeypatch.setattr(XendCheckpoint, "Suspender", Suspender)
    monkeypatch.setattr(XendCheckpoint.toolstack, "domain_config", lambda _: {"c_info": {"type": "pvh"}})
    monkeypatch.setattr(
        XendCheckpoint.birth, "send_guest", lambda domid, config, suspend, write, *, live: write(b"guest")
    )
    for live, checkpoint, ended, expected in (
        (True, False, True, ["destroyed"]),
        (False, False, False, ["destroyed"]),
        (True, True, False, ["resumed"]),
    ):
        theirs, ours = socket.socketpair()
        theirs.setblocking(False)
        kept = ours.dup()  # as a process that the script has forked has one

        def destroy(domid: int, theirs: socket.socket = theirs, ended: bool = ended) -> None:
            assert theirs.recv(1 << 16).endswith(b"guest")
            with contextlib.nullcontext() if ended else pytest.raises(BlockingIOError):
                assert theirs.recv(1) == b""
            done.append("destroyed")

        monkeypatch.setattr(XendCheckpoint.toolstack, "destroy", destroy)
        done.clear()
        with theirs, ours, kept:
            XendCheckpoint.save(ours.fileno(), domain, None, live, None, checkpoint, sock=ours)
            assert (ours.fileno() < 0) is ended
        assert done == expected


class Restorer:
    """``xl restore``, which ends when it has seen "end". :cvar fed: the last one's."""

    fed = b""
    made = False

    def __init__(self, name: str) -> None:
        assert name == "web"
        Restorer.fed = b""

    @property
    def complete(self) -> bool:
        return self.fed.endswith(b"end")

    def feed(self, piece: bytes) -> None:
        Restorer.fed += piece

    def finish(self, store: object) -> int:
        return 9

    def abort(self) -> None:
        pass


@pytest.fixture
def restoring(monkeypatch: pytest.MonkeyPatch) -> Any:
    """XendCheckpoint, with that for xl."""
    pytest.importorskip("pyxs", reason="pyxs is not installed (Debian: python3-pyxs)")
    from xen.xend import XendCheckpoint

    monkeypatch.setattr(XendCheckpoint.incoming.birth, "Restorer", Restorer)
    monkeypatch.setattr(XendCheckpoint.incoming, "Store", contextlib.nullcontext)
    monkeypatch.setattr(XendCheckpoint.incoming, "check_free", lambda name: None)
    monkeypatch.setattr(XendCheckpoint.vm, "VM", lambda domid: ("VM", domid))
    return XendCheckpoint


def test_what_is_restored_ends_where_it_says_so(restoring: Any) -> None:
    read_fd, write_fd = os.pipe()
    os.write(write_fd, restoring.image.makeheader(["domain", ["name", "web"]]) + b"guest and its end")
    stuck = threading.Timer(30, os.close, [write_fd])
    stuck.start()
    try:
        assert restoring.restore(None, read_fd, paused=True) == ("VM", 9)
        assert stuck.is_alive()
    finally:
        stuck.cancel()
        os.close(read_fd)
    os.close(write_fd)
    assert Restorer.fed == b"guest and its end"


CONFIG = {"c_info": {"name": "web", "type": "pvh"}, "b_info": {"cmdline": 'a "b" \\ (c) \u00e9 #'}}


@pytest.mark.parametrize(
    ("libxl", "said"),
    [
        (CONFIG, None),
        (None, "without libxl's configuration of web in the header"),
        ({"c_info": {"name": "other"}}, "config parse"),
        ("no dictionary", "config parse"),
    ],
)
def test_an_image_of_checkpoints_is_restored(
    restoring: Any, tmp_path: Path, libxl: Any, said: str | None
) -> None:
    """It is libxenguest's stream, and xl takes that with libxl's around it only."""
    description = ["domain", ["name", "web"]]
    if libxl is not None:
        description = dominfo.with_libxl(description, libxl)
    header = restoring.image.makeheader(description)
    stream = restoring.image.STREAM_MARKER + bytes(32) + b"\0" * 8
    (tmp_path / "checkpoints").write_bytes(header + stream)
    with open(tmp_path / "image", "wb") as image:
        writer = restoring.image.Writer(image)
        writer.slurp(str(tmp_path / "checkpoints"))
        writer.close()
    with open(tmp_path / "image", "rb") as image:
        if said is None:
            assert restoring.restore(None, image.fileno(), paused=True) == ("VM", 9)
            assert Restorer.fed == libxlformat.prologue(CONFIG) + stream + libxlformat.epilogue()
        else:
            with pytest.raises(XendError, match=said):
                restoring.restore(None, image.fileno())
            assert Restorer.fed == b""
