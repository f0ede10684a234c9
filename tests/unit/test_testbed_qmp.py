# SPDX-License-Identifier: LGPL-2.1-or-later
"""The QMP client against a server that answers, refuses, is silent, and dies."""

import contextlib
import json
import socket
import threading

import pytest

from remus_colo.testbed.errors import BedError, BedTimeout
from remus_colo.testbed.qmp import Qmp

GREETING = {"QMP": {"version": {}, "capabilities": []}}


@contextlib.contextmanager
def server(path, *script):
    """Serve one client: send each item of the script, after a line from the client for all but the first."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(1)
    received = []

    def serve():
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as lines:
            for index, item in enumerate(script):
                if index:
                    line = lines.readline()
                    if not line:
                        return
                    received.append(json.loads(line))
                connection.sendall(b"".join(json.dumps(m).encode() + b"\r\n" for m in item))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield received
    finally:
        thread.join(20)
        listener.close()


def test_a_command_is_negotiated_sent_and_answered_events_or_not(tmp_path):
    event = {"event": "RESUME", "data": {}}
    with (
        server(
            tmp_path / "s", [GREETING], [{"return": {}}], [event, {"return": {"status": "running"}}]
        ) as received,
        Qmp(tmp_path / "s", 20) as qmp,
    ):
        assert qmp.execute("query-status") == {"status": "running"}
    assert [line["execute"] for line in received] == ["qmp_capabilities", "query-status"]


def test_a_refusal_is_an_error_with_qemus_reason(tmp_path):
    refusal = {"error": {"class": "GenericError", "desc": "no such device"}}
    with (
        server(tmp_path / "s", [GREETING], [{"return": {}}], [refusal]),
        Qmp(tmp_path / "s", 20) as qmp,
        pytest.raises(BedError, match="refuses device_del: no such device"),
    ):
        qmp.execute("device_del", id="x")


def test_a_qemu_that_dies_is_an_error(tmp_path):
    with (
        server(tmp_path / "s", [GREETING], [{"return": {}}]),
        Qmp(tmp_path / "s", 20) as qmp,
        pytest.raises(BedError, match="closed"),
    ):
        qmp.execute("query-status")


def test_a_silent_qemu_times_out(tmp_path):
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "s"))
    listener.listen(1)
    with contextlib.closing(listener), pytest.raises(BedTimeout, match="does not answer"):
        Qmp(tmp_path / "s", 0.2)


def test_a_socket_that_never_appears_times_out(tmp_path):
    with pytest.raises(BedTimeout, match="does not listen"):
        Qmp(tmp_path / "none", 0.2)
