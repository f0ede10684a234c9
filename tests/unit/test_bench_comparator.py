# SPDX-License-Identifier: LGPL-2.1-or-later
"""The benchmark's parts: both subjects let equal frames through, ours holds what differs; figures are not looked at."""

from __future__ import annotations

import shutil
import socket
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from remus_colo.bench import comparator
from remus_colo.errors import HostError


@pytest.fixture(scope="module")
def bridge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return comparator.build_bridge(tmp_path_factory.mktemp("bridge"))


def split(stream: bytes) -> list[bytes]:
    frames = []
    while stream:
        (size,) = struct.unpack_from(">I", stream)
        frames.append(stream[4 : 4 + size])
        stream = stream[4 + size :]
    return frames


@pytest.mark.parametrize("size", comparator.SIZES)
def test_frames_have_the_size_and_the_flows_that_were_asked_for(size: int) -> None:
    frames = split(comparator.frames(7, size, 20, 3))
    assert [len(frame) for frame in frames] == [size] * 20
    assert len({frame[26:38] for frame in frames}) == 7


@contextmanager
def ours_alone(directory: Path, bridge: Path) -> Iterator[tuple[comparator.Subject, ...]]:
    command = [str(bridge), *(str(directory / role) for role in comparator.ROLES)]
    with closing(comparator.Subject("remus_colo", command, directory)) as subject:
        yield (subject,)


@pytest.mark.parametrize("name", comparator.NAMES)
def test_equal_frames_come_out(name: str, bridge: Path, tmp_path: Path) -> None:
    if name == "QEMU" and shutil.which(comparator.QEMU) is None:
        pytest.skip(f"{comparator.QEMU} is not installed (Debian: qemu-system-x86)")
    with (
        comparator.subjects(tmp_path, bridge) if name == "QEMU" else ours_alone(tmp_path, bridge) as subjects
    ):
        subject = next(subject for subject in subjects if subject.name == name)
        before_s = subject.cpu_s()
        subject.pump([comparator.frames(5, 200, 64, start) for start in (0, 64, 128)])
        assert subject.cpu_s() > before_s


def test_what_has_no_equal_stays_inside(bridge: Path, tmp_path: Path) -> None:
    with ours_alone(tmp_path, bridge) as (subject,):
        primary, secondary, out = subject.sockets
        held, equal = comparator.frames(2, 100, 1, 0), comparator.frames(2, 100, 1, 1)  # of two flows
        primary.sendall(held + equal)
        secondary.sendall(equal)
        out.settimeout(60)
        assert out.recv(len(equal), socket.MSG_WAITALL) == equal


def test_a_subject_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="x did not start: no such thing"):
        comparator.Subject("x", ["sh", "-c", "echo no such thing >&2; exit 3"], tmp_path)
