# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where checkpoints are written to: a pipe first, memory afterwards, behind one descriptor."""

from __future__ import annotations

import os

import pytest

from remus_colo.checkpoint.staging import Staging


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def test_live_first_then_one_checkpoint_at_a_time() -> None:
    live: list[bytes] = []
    staging = Staging(live.append)
    try:
        whole = os.urandom(3 << 20)  # more than a pipe holds
        write_all(staging.fd, whole)
        assert staging.take() == b""
        assert b"".join(live) == whole
        for size in (5000, 100, 0, 1 << 20):
            data = os.urandom(size)
            write_all(staging.fd, data)
            assert staging.take() == data
        assert b"".join(live) == whole
    finally:
        staging.close()


def test_a_reader_that_fails_ends_the_writer() -> None:
    def refuse(_chunk: bytes) -> None:
        raise ConnectionError("gone")

    staging = Staging(refuse)
    try:
        with pytest.raises(BrokenPipeError):
            write_all(staging.fd, bytes(16 << 20))
        assert isinstance(staging.failure, ConnectionError)
        with pytest.raises(ConnectionError):
            staging.take()
    finally:
        staging.close()


def test_closing_leaves_no_descriptor_behind() -> None:
    before = set(os.listdir("/proc/self/fd"))
    staging = Staging(lambda chunk: None)
    staging.close()
    staging.close()
    assert set(os.listdir("/proc/self/fd")) == before
