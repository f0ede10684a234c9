# SPDX-License-Identifier: LGPL-2.1-or-later
"""A checkpoint through a real socket pair: what is sent arrives whole, and what is damaged is refused."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import replace

import pytest

from remus_colo.adapters.xenctrl import EventChannel, EvtchnKind
from remus_colo.checkpoint import pvm, transfer
from remus_colo.checkpoint.svm import Received, port_table
from remus_colo.errors import MessageError
from remus_colo.relocation.channel import Channel
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.wire import Message

PAGES = 700  # more than one frame


class Whole(pvm.Snapshot):
    """A snapshot whose pages of zeros are taken out already, which the compiled part does."""

    def squeeze(self) -> None:
        pass


def snapshot() -> pvm.Snapshot:
    gfns = b"".join(gfn.to_bytes(8, "little") for gfn in range(0x100, 0x100 + PAGES))
    pages = b"".join(bytes([n % 251]) * 4096 for n in range(PAGES))
    return Whole(
        epoch=7,
        gfns=bytearray(gfns + bytes(80)),  # the buffers are larger than what is in them
        pages=bytearray(pages + bytes(4096)),
        count=PAGES,
        grants=b"g" * 4096,
        context=b"c" * 5000,
        ring_nodes={0: {"tx-ring-ref": "768"}},
        event_channels=[
            EventChannel(3, EvtchnKind.VIRQ, 0, 0),
            EventChannel(8, EvtchnKind.INTERDOMAIN, 0, 31),
        ],
        shared_info_gfn=16,
        xen_time_ns=123,
        zero_gfns=(0x5000).to_bytes(8, "little"),
        hashes=bytes(range(256)) * 40_000,  # more than one piece
    )


def transmit() -> list[Message]:
    left, right = socket.socketpair()
    with Channel(left) as sender, Channel(right) as receiver:
        thread = threading.Thread(target=transfer.send, args=(sender, snapshot()))
        thread.start()
        messages = []
        while not messages or messages[-1].type is not MessageType.CHECKPOINT_END:
            messages.append(receiver.recv(time.monotonic() + 20))
        thread.join()
    return messages


def assemble(messages: list[Message]) -> Received:
    assembler = transfer.Assembler(messages[0])
    for message in messages[1:-1]:
        assembler.add(message)
    return assembler.finish(messages[-1])


def test_arrives_whole() -> None:
    received = assemble(transmit())
    sent = snapshot()
    assert received.epoch == 7
    assert b"".join(bytes(run.gfns) for run in received.pages) == bytes(sent.gfns[: PAGES * 8])
    assert b"".join(bytes(run.pages) for run in received.pages) == bytes(sent.pages[: PAGES * 4096])
    assert (received.zero_gfns, received.grants, received.context) == (
        sent.zero_gfns,
        sent.grants,
        sent.context,
    )
    assert received.hashes == sent.hashes
    assert received.ring_nodes == sent.ring_nodes
    assert received.event_channels == sent.event_channels
    assert (received.shared_info_gfn, received.xen_time_ns) == (16, 123)


def test_any_lost_frame_is_noticed() -> None:
    messages = transmit()
    for lost in range(1, len(messages) - 1):
        with pytest.raises(MessageError):
            assemble(messages[:lost] + messages[lost + 1 :])


def test_swapped_frames_are_noticed() -> None:
    messages = transmit()
    messages[1], messages[2] = messages[2], messages[1]
    with pytest.raises(MessageError, match="damaged"):
        assemble(messages)


def test_a_changed_byte_is_noticed() -> None:
    messages = transmit()
    data = bytearray(messages[1].data)
    data[-1] ^= 1
    messages[1] = replace(messages[1], data=bytes(data))
    with pytest.raises(MessageError, match="damaged"):
        assemble(messages)


def test_frames_of_another_checkpoint_are_refused() -> None:
    messages = transmit()
    messages[1] = replace(messages[1], epoch=8)
    with pytest.raises(MessageError, match="within checkpoint 7"):
        assemble(messages)


def test_port_tables_ignore_the_far_end_only() -> None:
    here = [EventChannel(1, EvtchnKind.INTERDOMAIN, 0, 29), EventChannel(3, EvtchnKind.VIRQ, 0, 0)]
    there = [EventChannel(1, EvtchnKind.UNBOUND, 0, 0), EventChannel(3, EvtchnKind.VIRQ, 0, 0)]
    assert port_table(here) == port_table(there)
    assert port_table(here) != port_table([here[0], EventChannel(3, EvtchnKind.VIRQ, 0, 1)])
    assert port_table(here) != port_table([here[1], EventChannel(4, EvtchnKind.INTERDOMAIN, 0, 29)])
