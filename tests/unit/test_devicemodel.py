# SPDX-License-Identifier: LGPL-2.1-or-later
"""An HVM guest's device model, against a QEMU that is a socket, and its place in the checkpoints."""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("pyxs", reason="pyxs is not installed (Debian: python3-pyxs)")

from remus_colo.adapters import devicemodel
from remus_colo.adapters.devicemodel import DeviceModel, DeviceState
from remus_colo.checkpoint import libxlformat, periodic
from remus_colo.errors import DomainError, HostError, XenError

SAVED = b"QEVM state of all devices"


class Qemu:
    """Serves one client after another, as QEMU does.

    :ivar commands: what it was told, a connection's after the other's, each ending with "bye".
    :ivar refuses: the command that it refuses.
    """

    def __init__(self, path: Path) -> None:
        self.commands: list[Any] = []
        self.refuses = ""
        self._fd = -1
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                self._say(connection, {"QMP": {}})
                while request := self._next(connection):
                    self._answer(connection, request)
            self.commands.append("bye")

    def _next(self, connection: socket.socket) -> dict[str, Any] | None:
        line, controls, _, _ = connection.recvmsg(65536, socket.CMSG_SPACE(4))
        for _, _, data in controls:
            fds = array.array("i", data[:4])
            self._fd = fds[0]
        return json.loads(line) if line else None

    def _answer(self, connection: socket.socket, request: dict[str, Any]) -> None:
        command = request["execute"]
        if command != "qmp_capabilities":
            self.commands.append((command, request["arguments"]) if request["arguments"] else command)
        if command == self.refuses:
            self._say(connection, {"error": {"class": "GenericError", "desc": "not now"}})
            return
        if command == "xen-save-devices-state":
            os.write(self._fd, SAVED)
            os.close(self._fd)
        self._say(connection, {"event": "STOP"})
        self._say(connection, {"return": {"fdset-id": 3, "fd": 9} if command == "add-fd" else {}})

    @staticmethod
    def _say(connection: socket.socket, message: dict[str, Any]) -> None:
        connection.sendall(json.dumps(message).encode() + b"\r\n")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closed already
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(20)


@pytest.fixture
def qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Qemu]:
    monkeypatch.setattr(devicemodel, "SOCKET", f"{tmp_path}/{{domid}}")
    served = Qemu(tmp_path / "7")
    yield served
    served.close()


class Nodes(dict[str, str]):
    def list(self, path: str) -> list[str]:
        return sorted({key[len(path) + 1 :].split("/")[0] for key in self if key.startswith(path + "/")})

    def read(self, path: str) -> str | None:
        return self.get(path)


def test_it_is_saved_while_it_stands_still(qemu: Qemu) -> None:
    model = DeviceModel(7, Nodes())  # type: ignore[arg-type]
    model.log_dirty(True)
    model.prepare()
    assert model.stop() == DeviceState(SAVED)
    model.go_on()
    model.close()
    qemu.close()
    assert qemu.commands == [
        ("xen-set-global-dirty-log", {"enable": True}),
        "bye",
        "stop",
        "add-fd",
        ("xen-save-devices-state", {"filename": "/dev/fdset/3", "live": False}),
        "cont",
        ("remove-fd", {"fdset-id": 3}),
        "bye",
    ]


@pytest.mark.parametrize("command", ["stop", "add-fd", "xen-save-devices-state"])
def test_a_refusal_says_what_was_refused(qemu: Qemu, command: str) -> None:
    qemu.refuses = command
    model = DeviceModel(7, Nodes())  # type: ignore[arg-type]
    with pytest.raises(XenError, match=f"QEMU refuses {command}: not now"):
        model.stop()
    model.go_on()
    qemu.close()
    assert "cont" in qemu.commands[-3:]


def test_what_it_keeps_in_xenstore_goes_along(qemu: Qemu) -> None:
    base = "/local/domain/0/device-model/7/physmap/f0000000"
    nodes = Nodes({f"{base}/start_addr": "0", f"{base}/size": "800000", f"{base}/name": "vga.vram"})
    model = DeviceModel(7, nodes)  # type: ignore[arg-type]
    assert model.stop().xenstore == (
        b"physmap/f0000000/start_addr\0000\0physmap/f0000000/size\000800000\0physmap/f0000000/name\0vga.vram\0"
    )
    del nodes[f"{base}/size"]
    with pytest.raises(XenError, match="lacks"):
        model.stop()
    model.close()


def test_a_guest_whose_device_model_is_elsewhere_is_refused(qemu: Qemu) -> None:
    with pytest.raises(DomainError, match="device_model_stubdomain_override=0"):
        DeviceModel(8, Nodes())  # type: ignore[arg-type]


def test_after_a_remus_that_was_killed_it_runs(qemu: Qemu) -> None:
    qemu.refuses = "xen-set-global-dirty-log"
    devicemodel.let_run(7)
    devicemodel.let_run(8)  # there is none
    qemu.close()
    assert qemu.commands[-2:] == ["cont", "bye"]


def test_a_silent_one_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devicemodel, "SOCKET", f"{tmp_path}/{{domid}}")
    monkeypatch.setattr(devicemodel, "ANSWER_TIMEOUT_S", 0.1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/7")
        listener.listen(1)
        with pytest.raises(XenError, match="does not answer"):
            DeviceModel(7, Nodes()).prepare()  # type: ignore[arg-type]


def test_the_records_are_in_libxls_order() -> None:
    stream = libxlformat.checkpoint_end(SAVED, b"key\0value\0")
    kinds = []
    while stream:
        kind, length = libxlformat.RECORD_HEADER.unpack_from(stream)
        kinds.append((kind, stream[8 + libxlformat.EMULATOR_HEADER.size : 8 + length]))
        stream = stream[8 + (length + 7) // 8 * 8 :]
    assert kinds == [
        (libxlformat.RECORD_EMULATOR_XENSTORE_DATA, b"key\0value\0"),
        (libxlformat.RECORD_EMULATOR_CONTEXT, SAVED),
        (libxlformat.RECORD_CHECKPOINT_END, b""),
    ]


def test_in_a_checkpoint_it_stops_after_the_guest_and_goes_on_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order = mock.Mock()
    order.model.stop.return_value = DeviceState(SAVED)
    order.suspender.suspend.return_value = 1.0
    order.suspender.suspended = False
    order.calls.committed.return_value = False

    def save(domid: int, fd: int, hooks: periodic.PeriodicCheckpoints) -> None:
        hooks.log_dirty(True)
        hooks.suspend()
        hooks.resume()
        assert hooks.device_state == DeviceState(SAVED)
        assert not hooks.checkpoint()
        hooks.log_dirty(False)

    monkeypatch.setattr(periodic.savestream, "save_checkpoints", save)
    periodic.PeriodicCheckpoints(
        order.suspender, order.destination, order.calls, device_model=order.model
    ).run()
    names = [name for name, _, _ in order.mock_calls if name.startswith(("model", "suspender", "calls"))]
    assert names == [
        "model.log_dirty", "model.prepare", "suspender.suspend", "model.stop", "calls.suspended", "calls.resuming",
        "model.go_on", "suspender.resume", "calls.committed", "model.log_dirty", "suspender.call_off", "model.close",
    ]  # fmt: skip


def test_a_guest_whose_device_model_fails_is_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, suspender = mock.Mock(), mock.Mock(suspended=True)
    suspender.suspend.return_value = 1.0
    model.stop.side_effect = model.go_on.side_effect = XenError("QEMU is gone")
    monkeypatch.setattr(periodic.savestream, "save_checkpoints", lambda domid, fd, hooks: hooks.suspend())
    with pytest.raises(XenError, match="QEMU is gone"):
        periodic.PeriodicCheckpoints(suspender, mock.Mock(), mock.Mock(), device_model=model).run()
    suspender.resume.assert_called_once_with()
    model.close.assert_called_once_with()


def test_a_backup_without_qemu_for_xen_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devicemodel, "PROGRAMS", (f"{tmp_path}/xen*/qemu",))
    with pytest.raises(HostError, match="Debian: qemu-system-xen"):
        devicemodel.refuse_without_program({"b_info": {"type": "hvm"}})
    (tmp_path / "xen-4.20").mkdir()
    (tmp_path / "xen-4.20" / "qemu").touch()
    devicemodel.refuse_without_program({"b_info": {"type": "hvm"}})
    with pytest.raises(HostError, match="/opt/qemu"):
        devicemodel.refuse_without_program({"b_info": {"device_model": "/opt/qemu"}})
