# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest's watch over its clocks, compiled as for the guest and run here."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from remus_colo.testbed.guest_image import compile_program

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")

LIMIT_S = 30.0


def ask(path: Path, question: bytes = b"/clock") -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(LIMIT_S)
        client.connect(str(path))
        client.sendall(b"GET " + question + b" HTTP/1.0\r\n")
        client.sendall(b"Host: web\r\n\r\n")
        data = b""
        while piece := client.recv(65536):
            data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 OK\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    told: dict[str, Any] = json.loads(body)
    return told


@pytest.fixture
def program(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    compile_program("guest_clock", tmp_path / "guest_clock")
    path = tmp_path / "socket"
    with subprocess.Popen([tmp_path / "guest_clock", path]) as process:
        try:
            deadline_s = time.monotonic() + LIMIT_S
            while not path.exists():
                assert process.poll() is None and time.monotonic() < deadline_s
                time.sleep(0.01)
            yield process, path
        finally:
            process.kill()


def test_it_looks_from_the_first_request_on(program: tuple[subprocess.Popen[bytes], Path]) -> None:
    _, path = program
    before_ns = time.monotonic_ns()
    first = ask(path)
    assert before_ns <= first["started"] <= first["now"]["monotonic"] <= time.monotonic_ns()
    assert first["samples"] == 0
    deadline_s = time.monotonic() + LIMIT_S
    while (told := ask(path))["samples"] < 20:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert told["started"] == first["started"]
    assert told["backward"] == {"monotonic": 0, "realtime": 0, "boottime": 0}
    assert told["miscounted"] == 0
    assert told["expirations"] == told["expected"] > 0
    assert len(told["gaps"]) == min(told["samples"], 64)
    for at_ns, length_ns, late_ns in told["gaps"]:
        assert first["started"] < at_ns <= told["now"]["monotonic"]
        assert length_ns > 0 and late_ns >= 0


def test_a_stop_is_a_gap_and_loses_no_expiration(program: tuple[subprocess.Popen[bytes], Path]) -> None:
    process, path = program
    ask(path)
    time.sleep(0.1)
    process.send_signal(signal.SIGSTOP)
    begun_s = time.monotonic()
    time.sleep(0.5)
    stopped_ns = int((time.monotonic() - begun_s) * 1e9)
    process.send_signal(signal.SIGCONT)
    deadline_s = time.monotonic() + LIMIT_S
    told = ask(path)
    while max(gap[1] for gap in told["gaps"]) < stopped_ns:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
        told = ask(path)
    assert max(gap[2] for gap in told["gaps"]) >= stopped_ns - 2 * told["period_ns"]
    assert told["miscounted"] == 0 and told["backward"]["monotonic"] == 0


@pytest.mark.parametrize(
    ("asked", "period_ms"), [(b"25", 25), (b"0", 10), (b"-4", 10), (b"1000", 10), (b"x", 10)]
)
def test_the_first_request_chooses_the_timer(
    program: tuple[subprocess.Popen[bytes], Path], asked: bytes, period_ms: int
) -> None:
    _, path = program
    assert ask(path, b"/clock?period_ms=" + asked)["period_ns"] == period_ms * 1_000_000
    assert ask(path, b"/clock?period_ms=77")["period_ns"] == period_ms * 1_000_000
