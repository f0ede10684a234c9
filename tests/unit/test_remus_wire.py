# SPDX-License-Identifier: LGPL-2.1-or-later
"""A Remus checkpoint over a real channel: what the sender makes of it, and what the backup takes."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("pyxs", reason="pyxs is not installed (Debian: python3-pyxs)")
pytest.importorskip("pyroute2", reason="pyroute2 is not installed (Debian: python3-pyroute2)")

from remus_colo.adapters.devicemodel import DeviceState
from remus_colo.checkpoint import libxcrecords as libxc
from remus_colo.checkpoint import libxlformat
from remus_colo.checkpoint.delta import DeltaDecoder
from remus_colo.errors import MessageError
from remus_colo.relocation.bulk import CheckpointDigest, parse_state
from remus_colo.relocation.channel import Channel
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.wire import Message
from remus_colo.session.remus_backup import RemusCreation
from remus_colo.session.remus_sender import CheckpointSender

DESCRIPTION = {"addresses": {"0": ["10.77.0.10"]}, "neighbours": {"0": []}, "longest_pause_s": 0.1}
CREATE: dict[str, Any] = {
    "name": "web",
    "mode": "remus",
    "config": {"c_info": {"name": "web"}},
    "tunnel": {"same_host": False, "vifs": [0]},
    "heartbeat": {"interval_s": 0.25, "timeout_s": 2.0},
}


@pytest.fixture
def channels() -> Iterator[tuple[Channel, Channel]]:
    ends = socket.socketpair()
    with Channel(ends[0], generation=7) as near, Channel(ends[1], generation=7) as far:
        yield near, far


def stream(content: int) -> bytes:
    body = libxc.PAGE_DATA_PREFIX.pack(1, 0) + struct.pack("<Q", 5) + bytes([content]) * libxc.PAGE_SIZE
    return libxc.RECORD.pack(libxc.PAGE_DATA, len(body)) + body + libxc.RECORD.pack(libxc.CHECKPOINT, 0)


def receive(channel: Channel) -> list[Message]:
    """All messages of one checkpoint."""
    found = []
    while True:
        found.append(channel.recv(time.monotonic() + 20))
        if found[-1].type is MessageType.CHECKPOINT_END:
            return found


@pytest.mark.parametrize("compress", [False, True])
def test_checkpoints_over_a_channel(channels: tuple[Channel, Channel], compress: bool) -> None:
    near, far = channels
    sender = CheckpointSender(near, compress=compress, describe=lambda: DESCRIPTION)
    sender.begin_first()
    sender.live(b"all of it")
    sender.finish_first(DeviceState())
    first = receive(far)
    assert [message.type.name for message in first] == [
        "PREPARE",
        "CHECKPOINT_BEGIN",
        "CREATE_STREAM",
        "CHECKPOINT_END",
    ]
    assert {message.epoch for message in first} == {1}
    decoder = DeltaDecoder()
    for epoch, content in ((2, 1), (3, 1), (4, 2)):
        staged = stream(content)
        sender.send(
            epoch, memoryview(staged), DeviceState(b"QEMU", b"nodes") if epoch == 3 else DeviceState()
        )
        prepare, begin, *middle, end = receive(far)
        assert (prepare.type, begin.type) == (MessageType.PREPARE, MessageType.CHECKPOINT_BEGIN)
        assert begin.fields["length"] == len(staged)
        assert begin.fields["codec"] == ("delta" if compress else "none")
        assert begin.fields["addresses"] == DESCRIPTION["addresses"]
        digest = CheckpointDigest()
        for message in middle:
            digest.update([message.data])
        digest.verify(end.fields)
        pieces = [bytes(message.data) for message in middle if message.type is MessageType.CHECKPOINT_STREAM]
        assert (decoder.decode(pieces, len(staged)) if compress else b"".join(pieces)) == staged
        states = [parse_state(message.data) for message in middle if message.type is MessageType.STATE]
        assert [(name, bytes(data)) for name, data in states] == (
            [("device-model", b"QEMU"), ("device-model-xenstore", b"nodes")] if epoch == 3 else []
        )


def test_a_creation() -> None:
    made = RemusCreation.parse(Message(MessageType.CREATE, 1, 0, fields=CREATE))
    assert (made.name, made.handles, made.same_host, made.heartbeat.timeout_s) == ("web", (0,), False, 2.0)


@pytest.mark.parametrize(
    "change",
    [
        {"config": {}},
        {"config": {"c_info": {"name": ""}}},
        {"config": {"c_info": 3}},
        {"tunnel": {"same_host": False}},
        {"tunnel": {"same_host": False, "vifs": ["x"]}},
        {"heartbeat": {"interval_s": "soon", "timeout_s": 2}},
    ],
)
def test_a_creation_that_lacks_something(change: dict[str, Any]) -> None:
    with pytest.raises(MessageError, match="CREATE"):
        RemusCreation.parse(Message(MessageType.CREATE, 1, 0, fields=CREATE | change))


def test_records_around_the_stream() -> None:
    assert libxlformat.checkpoint_end() == struct.pack("<II", 4, 0)
    with_qemu = libxlformat.checkpoint_end(b"state")
    assert with_qemu == struct.pack("<IIII", 3, 13, 2, 0) + b"state" + bytes(3) + struct.pack("<II", 4, 0)
