# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's checkpoints on their way to the backup: frames, digest, compression.  In the checkpoints' own thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from remus_colo.adapters.devicemodel import DeviceState
from remus_colo.checkpoint.delta import DeltaEncoder
from remus_colo.relocation.bulk import CheckpointDigest, state_buffers
from remus_colo.relocation.channel import Channel
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.wire import Buffer
from remus_colo.session.peer import STREAM_TIMEOUT_S

MODE = "remus"  # of CREATE
FRAME_BYTES = 4 << 20
CODEC_NONE, CODEC_DELTA = "none", "delta"
DEVICE_MODEL_STATE = "device-model"
DEVICE_MODEL_XENSTORE = "device-model-xenstore"


class CheckpointSender:
    """:param describe: fields of CHECKPOINT_BEGIN that tell more than the checkpoint itself."""

    def __init__(self, channel: Channel, *, compress: bool, describe: Callable[[], dict[str, Any]]) -> None:
        self._channel = channel
        self._encoder = DeltaEncoder() if compress else None
        self._describe = describe
        self._digest = CheckpointDigest()
        self.sent_bytes = 0  # of all checkpoints, frames' headers included

    def begin_first(self) -> None:
        """The whole guest is coming, by :meth:`live`."""
        self._begin(1, 0)

    def live(self, chunk: bytes) -> None:
        """:raise PeerLost: the backup does not take it."""
        self._digest.update([chunk])
        deadline_s = time.monotonic() + STREAM_TIMEOUT_S
        self.sent_bytes += self._channel.send_bulk(
            MessageType.CREATE_STREAM, 1, [chunk], deadline_s=deadline_s
        )

    def finish_first(self, device_state: DeviceState) -> None:
        self._finish(1, device_state)

    def send(self, epoch: int, staged: memoryview, device_state: DeviceState) -> None:
        """A whole later checkpoint.

        :raise PeerLost: the backup does not take it.
        """
        self._begin(epoch, len(staged))
        packed = memoryview(staged if self._encoder is None else self._encoder.encode(staged))
        for start in range(0, len(packed), FRAME_BYTES):
            self._bulk(MessageType.CHECKPOINT_STREAM, epoch, [packed[start : start + FRAME_BYTES]])
        self._finish(epoch, device_state)

    def _begin(self, epoch: int, length: int) -> None:
        self._digest = CheckpointDigest()
        fields = {
            "pages": 0,
            "vifs": [],
            "codec": CODEC_NONE if self._encoder is None else CODEC_DELTA,
            "length": length,
            **self._describe(),
        }
        # Both on the channel of the data, so that neither can overtake the other.
        self._channel.send_control(MessageType.PREPARE, epoch)
        self._channel.send_control(MessageType.CHECKPOINT_BEGIN, epoch, fields)

    def _bulk(self, kind: MessageType, epoch: int, buffers: list[Buffer]) -> None:
        self._digest.update(buffers)
        self.sent_bytes += self._channel.send_bulk(kind, epoch, buffers)

    def _finish(self, epoch: int, device_state: DeviceState) -> None:
        for name, state in (
            (DEVICE_MODEL_STATE, device_state.emulator),
            (DEVICE_MODEL_XENSTORE, device_state.xenstore),
        ):
            if state:
                self._bulk(MessageType.STATE, epoch, state_buffers(name, state))
        self._channel.send_control(MessageType.CHECKPOINT_END, epoch, self._digest.fields())
