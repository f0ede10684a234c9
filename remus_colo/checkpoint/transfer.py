# SPDX-License-Identifier: LGPL-2.1-or-later
"""A checkpoint on the wire: from a snapshot to messages, and from messages to a checkpoint that is whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from remus_colo.adapters.xenctrl import EventChannel, EvtchnKind
from remus_colo.checkpoint.pvm import Snapshot
from remus_colo.checkpoint.svm import Received
from remus_colo.errors import MessageError
from remus_colo.relocation import bulk
from remus_colo.relocation.bulk import GFN_BYTES, PAGE_BYTES, CheckpointDigest, Pages
from remus_colo.relocation.channel import Channel
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.wire import Message

PAGES_PER_FRAME = 256
STATE_GRANTS = "grants"
STATE_CONTEXT = "hvm-context"
STATE_ZERO_GFNS = "zero-gfns"
STATE_HASHES = "hashes"
STATES = frozenset({STATE_GRANTS, STATE_CONTEXT, STATE_ZERO_GFNS, STATE_HASHES})
STATE_PIECE_BYTES = 8 << 20  # half of what a STATE may have: the hashes of a guest of 4 GiB


def begin_fields(snapshot: Snapshot) -> dict[str, Any]:
    """The fields of CHECKPOINT_BEGIN."""
    return {
        "pages": snapshot.count,
        "vifs": [{"handle": handle, "nodes": nodes} for handle, nodes in snapshot.ring_nodes.items()],
        "events": [
            [channel.port, int(channel.kind), channel.vcpu, channel.detail]
            for channel in snapshot.event_channels
        ],
        "shared_info_gfn": snapshot.shared_info_gfn,
        "xen_time_ns": snapshot.xen_time_ns,
    }


def send(channel: Channel, snapshot: Snapshot) -> int:
    """Send a whole checkpoint; blocks as long as the network does. Returns the bytes sent.

    :raise PeerLost: the backup is gone.
    """
    snapshot.squeeze()
    digest = CheckpointDigest()
    channel.send_control(MessageType.CHECKPOINT_BEGIN, snapshot.epoch, begin_fields(snapshot))
    sent = 0
    gfns, pages = memoryview(snapshot.gfns), memoryview(snapshot.pages)
    for start in range(0, snapshot.count, PAGES_PER_FRAME):
        end = min(snapshot.count, start + PAGES_PER_FRAME)
        buffers = bulk.pages_buffers(
            gfns[start * GFN_BYTES : end * GFN_BYTES], pages[start * PAGE_BYTES : end * PAGE_BYTES]
        )
        digest.update(buffers, pages=end - start)
        sent += channel.send_bulk(MessageType.PAGES, snapshot.epoch, buffers)
    for name, data in (
        (STATE_ZERO_GFNS, snapshot.zero_gfns),
        (STATE_GRANTS, snapshot.grants),
        (STATE_CONTEXT, snapshot.context),
        (STATE_HASHES, snapshot.hashes),
    ):
        for start in range(0, max(1, len(data)), STATE_PIECE_BYTES):
            buffers = bulk.state_buffers(name, memoryview(data)[start : start + STATE_PIECE_BYTES])
            digest.update(buffers)
            sent += channel.send_bulk(MessageType.STATE, snapshot.epoch, buffers)
    channel.send_control(MessageType.CHECKPOINT_END, snapshot.epoch, digest.fields())
    return sent


class Assembler:
    """Gathers the messages of one checkpoint until it is whole."""

    def __init__(self, begin: Message, limit_pages: int | None = None) -> None:
        """:raise MessageError: it announces more than ``limit_pages``."""
        self.epoch = begin.epoch
        self._announced = int(begin.fields["pages"])
        if limit_pages is not None and self._announced > limit_pages:
            raise MessageError(
                f"checkpoint {self.epoch} is to have {self._announced} pages, at most {limit_pages} can be"
            )
        self._fields = begin.fields
        self._digest = CheckpointDigest()
        self._pages: list[Pages] = []
        self._states: dict[str, bytes] = {}

    def add(self, message: Message) -> None:
        """:raise MessageError: the message is malformed or of another checkpoint."""
        if message.epoch != self.epoch:
            raise MessageError(f"{message.type.name} of epoch {message.epoch} within checkpoint {self.epoch}")
        if message.type is MessageType.PAGES:
            pages = bulk.parse_pages(message.data)
            if self._digest.pages + pages.count > self._announced:
                raise MessageError(
                    f"checkpoint {self.epoch} has more than the {self._announced} pages announced"
                )
            self._pages.append(pages)
            self._digest.update([message.data], pages=pages.count)
        else:
            name, data = bulk.parse_state(message.data)
            if name not in STATES:
                raise MessageError(f"checkpoint {self.epoch} has a state {name!r}, which nobody knows")
            self._states[name] = self._states.get(name, b"") + bytes(data)
            self._digest.update([message.data])

    def finish(self, end: Message) -> Received:
        """:raise MessageError: something is missing or damaged."""
        if end.epoch != self.epoch:
            raise MessageError(f"the end of checkpoint {end.epoch} within checkpoint {self.epoch}")
        self._digest.verify(end.fields)
        try:
            return Received(
                epoch=self.epoch,
                pages=self._pages,
                zero_gfns=self._states[STATE_ZERO_GFNS],
                grants=self._states[STATE_GRANTS],
                context=self._states[STATE_CONTEXT],
                hashes=self._states[STATE_HASHES],
                ring_nodes={int(vif["handle"]): dict(vif["nodes"]) for vif in self._fields["vifs"]},
                event_channels=_events(self._fields["events"]),
                shared_info_gfn=int(self._fields["shared_info_gfn"]),
                xen_time_ns=int(self._fields["xen_time_ns"]),
            )
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise MessageError(
                f"checkpoint {self.epoch} lacks a part or has a malformed one: {error!r}"
            ) from error


def _events(raw: Sequence[Sequence[int]]) -> list[EventChannel]:
    return [
        EventChannel(int(port), EvtchnKind(int(kind)), int(vcpu), int(detail))
        for port, kind, vcpu, detail in raw
    ]
