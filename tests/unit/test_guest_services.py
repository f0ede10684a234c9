# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest's small services, compiled as for the guest and run here."""

from __future__ import annotations

import random
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from remus_colo.testbed.guest_image import compile_program

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")

LIMIT_S = 30.0


class Services:
    def __init__(self, port: int, path: Path) -> None:
        self.port, self.path = port, path

    def stream(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT_S)

    def http(self, *pieces: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(LIMIT_S)
            client.connect(str(self.path))
            for piece in pieces:
                client.sendall(piece)
            return receive_all(client)


def receive_all(client: socket.socket) -> bytes:
    data = b""
    while piece := client.recv(65536):
        data += piece
    return data


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    folder = tmp_path_factory.mktemp("services")
    compile_program("guest_services", folder / "guest_services")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = Services(port, folder / "socket")
    with subprocess.Popen([folder / "guest_services", str(port), running.path]) as process:
        try:
            deadline_s = time.monotonic() + LIMIT_S
            while not running.path.exists():  # bound last
                assert process.poll() is None
                assert time.monotonic() < deadline_s
                time.sleep(0.01)
            yield running
            assert process.poll() is None, "the services died"
        finally:
            process.kill()


def test_a_stream_comes_back_though_the_client_reads_late(services: Services) -> None:
    sent = random.Random(1).randbytes(20_000_000)  # more than all buffers on the way hold
    with services.stream() as client:
        sender = threading.Thread(target=lambda: (client.sendall(sent), client.shutdown(socket.SHUT_WR)))
        sender.start()
        received = receive_all(client)
        sender.join(LIMIT_S)
    assert received == sent


def test_many_streams_at_once_are_kept_apart(services: Services) -> None:
    clients = [services.stream() for _ in range(100)]
    for i, client in enumerate(clients):
        client.sendall(b"%03d" % i)
    for i, client in enumerate(clients):
        assert client.recv(3, socket.MSG_WAITALL) == b"%03d" % i
        client.close()


def test_a_client_that_resets_disturbs_nobody(services: Services) -> None:
    with services.stream() as other:
        client = services.stream()
        client.sendall(bytes(1_000_000))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        other.sendall(b"hello")
        assert other.recv(5, socket.MSG_WAITALL) == b"hello"


@pytest.mark.parametrize("size", [0, 1, 1472, 60_000])
def test_a_datagram_comes_back(services: Services, size: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(LIMIT_S)
        client.connect(("127.0.0.1", services.port))
        sent = random.Random(size).randbytes(size)
        client.send(sent)
        assert client.recv(65536) == sent


def test_every_random_number_is_another(services: Services) -> None:
    replies = {services.http(b"GET /random HTTP/1.0\r\n\r\n") for _ in range(100)}
    assert len(replies) == 100
    for reply in replies:
        head, _, body = reply.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.0 200 OK\r\n")
        assert b"Content-Length: 65" in head
        assert re.fullmatch(rb"[0-9a-f]{64}\n", body)


def test_time_goes_on_in_nanoseconds(services: Services) -> None:
    bodies = [services.http(b"GET /time HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")[2] for _ in range(20)]
    assert all(re.fullmatch(rb"[0-9]{10}\.[0-9]{9}\n", body) for body in bodies)
    assert sorted(set(bodies)) == bodies


def test_a_request_in_pieces_is_answered(services: Services) -> None:
    assert b"200 OK" in services.http(b"GET /ti", b"me HTTP/1.0\r\nHost: x\r\n", b"\r\n")


def test_anything_else_is_not_found(services: Services) -> None:
    assert services.http(b"GET /randomly HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 404 ")


def test_an_endless_request_is_cut_off(services: Services) -> None:
    with pytest.raises(ConnectionError):
        services.http(b"x" * 16_383, b"x" * 100_000, b"x" * 10_000_000)
