# SPDX-License-Identifier: LGPL-2.1-or-later
"""Channels over real sockets: every way of losing the peer is PeerLost, and no frame is torn."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from remus_colo.errors import FramingError, MessageError, PeerError, PeerLost
from remus_colo.relocation import handshake
from remus_colo.relocation.channel import Channel
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.wire import HEADER_BYTES, Buffer, Message, encode


def soon(seconds: float = 10.0) -> float:
    """A deadline that a working machine never meets; 0 has passed at once."""
    return time.monotonic() + seconds


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    left, right = socket.socketpair()
    with (
        Channel(left, generation=5, peer="backup") as one,
        Channel(right, generation=5, peer="primary") as other,
    ):
        yield one, other


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        yield server


@pytest.fixture
def raw() -> Iterator[tuple[Channel, socket.socket]]:
    """A channel, and the bare socket of a peer that need not keep to the protocol."""
    left, right = socket.socketpair()
    with Channel(left, generation=5, peer="backup") as channel, right:
        yield channel, right


def test_messages_go_both_ways(pair: tuple[Channel, Channel]) -> None:
    one, other = pair
    one.send_control(MessageType.PREPARE, 3)
    assert other.recv(soon()) == Message(MessageType.PREPARE, 5, 3)
    other.send_control(MessageType.ABORT, 3, {"reason": "no"})
    assert one.recv(soon()) == Message(MessageType.ABORT, 5, 3, fields={"reason": "no"})


def test_bulk_is_gathered_from_many_buffers(pair: tuple[Channel, Channel]) -> None:
    one, other = pair
    buffers: list[Buffer] = [
        b"",
        b"head",
        memoryview(bytearray(b"x" * 700)),
        *[bytes([i % 256]) for i in range(1500)],
    ]
    expected = b"".join(bytes(buffer) for buffer in buffers)
    assert one.send_bulk(MessageType.STATE, 9, buffers) == HEADER_BYTES + len(expected)
    message = other.recv(soon())
    assert (message.type, message.epoch, bytes(message.data)) == (MessageType.STATE, 9, expected)


def test_items_wider_than_a_byte_are_sent_as_bytes(pair: tuple[Channel, Channel]) -> None:
    one, other = pair
    gfns = memoryview(struct.pack("<3Q", 1, 2, 3)).cast("Q")
    one.send_bulk(MessageType.DIRTY, 0, [gfns])
    assert bytes(other.recv(soon()).data) == gfns.tobytes()


def test_a_bulk_message_keeps_its_bytes(pair: tuple[Channel, Channel]) -> None:
    one, other = pair
    one.send_bulk(MessageType.PAGES, 1, [b"a" * 100])
    first = other.recv(soon())
    one.send_bulk(MessageType.PAGES, 1, [b"b" * 100])
    other.recv(soon())
    assert bytes(first.data) == b"a" * 100


def test_more_than_the_socket_holds(pair: tuple[Channel, Channel]) -> None:
    one, other = pair
    block = os.urandom(4 * 1024 * 1024)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(one.send_bulk, MessageType.PAGES, 1, [block])
        assert bytes(other.recv(soon()).data) == block
        sending.result(10)


def test_threads_do_not_tear_frames(pair: tuple[Channel, Channel]) -> None:
    one, other = pair
    senders, each = 4, 50

    def send(mark: int) -> None:
        for epoch in range(each):
            one.send_bulk(MessageType.STATE, epoch, [bytes([mark]) * 3000, bytes([mark]) * 3000])

    with ThreadPoolExecutor(senders) as pool:
        jobs = [pool.submit(send, mark) for mark in range(senders)]
        epochs: dict[int, list[int]] = {mark: [] for mark in range(senders)}
        for _ in range(senders * each):
            message = other.recv(soon())
            (mark,) = set(bytes(message.data))
            epochs[mark].append(message.epoch)
        for job in jobs:
            job.result(10)
    assert all(got == list(range(each)) for got in epochs.values())


def test_a_frame_may_come_in_pieces_across_calls(raw: tuple[Channel, socket.socket]) -> None:
    channel, peer = raw
    frame = encode(Message(MessageType.ABORT, 5, 1, fields={"reason": "slow"}))
    for i in range(len(frame) - 1):
        peer.sendall(frame[i : i + 1])
        assert channel.poll(0) is None
    peer.sendall(frame[-1:])
    assert channel.recv(0).fields == {"reason": "slow"}


def test_silence_is_a_lost_peer(pair: tuple[Channel, Channel]) -> None:
    with pytest.raises(PeerLost, match="backup sent nothing in time"):
        pair[0].recv(0)
    with pytest.raises(PeerLost, match="backup sent nothing in time"):
        pair[0].recv(soon(0.01))


def test_end_of_stream_is_a_lost_peer(raw: tuple[Channel, socket.socket]) -> None:
    channel, peer = raw
    peer.sendall(encode(Message(MessageType.ACK, 5, 1))[:10])
    peer.close()
    with pytest.raises(PeerLost, match="backup closed the connection"):
        channel.recv(soon())
    with pytest.raises(PeerLost):
        channel.send_control(MessageType.PREPARE)


def test_a_reset_is_a_lost_peer(listener: socket.socket) -> None:
    client = socket.create_connection(listener.getsockname())
    channel = Channel(client, peer="backup")
    served, _ = listener.accept()
    served.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() sends RST
    served.close()
    with channel, pytest.raises(PeerLost, match="connection to backup is lost: Connection reset"):
        channel.recv(soon())


def test_a_peer_that_takes_nothing_is_lost_and_the_channel_broken(pair: tuple[Channel, Channel]) -> None:
    one, _ = pair
    with pytest.raises(PeerLost, match="backup does not take"):
        one.send_bulk(MessageType.PAGES, 1, [bytes(8 * 1024 * 1024)], deadline_s=soon(0.05))
    # part of the frame is out: nothing may follow it
    with pytest.raises(PeerLost, match="broken"):
        one.send_control(MessageType.PREPARE)
    with pytest.raises(PeerLost, match="broken"):
        one.recv(soon())


def test_a_sender_waits_for_the_lock_no_longer_than_its_deadline(pair: tuple[Channel, Channel]) -> None:
    one, other = pair
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(one.send_bulk, MessageType.PAGES, 1, [bytes(8 * 1024 * 1024)], deadline_s=soon())
        # bytes have come, so the other thread has the lock, and keeps it until somebody reads
        assert select.select([other], [], [], 10)[0]
        with pytest.raises(PeerLost, match="does not take"):
            one.send_control(MessageType.PREPARE, deadline_s=soon(0.05))
        assert other.recv(soon()).type is MessageType.PAGES
        slow.result(10)
    one.send_control(MessageType.PREPARE)
    assert other.recv(soon()).type is MessageType.PREPARE


def test_what_breaks_the_protocol_breaks_the_channel(raw: tuple[Channel, socket.socket]) -> None:
    channel, peer = raw
    peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(FramingError, match="expected magic"):
        channel.recv(soon())
    with pytest.raises(PeerLost, match="expected magic"):
        channel.recv(soon())


def test_bulk_must_be_bulk_and_fit(pair: tuple[Channel, Channel]) -> None:
    one, other = pair
    with pytest.raises(MessageError, match="control message"):
        one.send_bulk(MessageType.ACK, 0, [b"{}"])
    with pytest.raises(MessageError, match="at most"):
        one.send_bulk(MessageType.DIRTY, 0, [bytes(8 * 1024 * 1024), b"x"])
    # nothing was sent, so the channel still works
    one.send_control(MessageType.PREPARE)
    assert other.recv(soon()).type is MessageType.PREPARE


def test_other_sessions_are_dropped_and_counted(raw: tuple[Channel, socket.socket]) -> None:
    channel, peer = raw
    channel.expect_generation(6)
    peer.sendall(encode(Message(MessageType.ACK, 5, 1)) + encode(Message(MessageType.ACK, 6, 2)))
    assert channel.recv(soon()).epoch == 2
    assert channel.sessions.stale == 1
    channel.send_control(MessageType.PREPARE)
    assert peer.recv(100)[8:12] == b"\0\0\0\6"


def test_close_ends_a_wait_in_another_thread(pair: tuple[Channel, Channel]) -> None:
    one, _ = pair
    waiting = threading.Event()

    def receive() -> None:
        waiting.set()
        one.recv(soon(60))

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(receive)
        waiting.wait(10)
        one.close()
        with pytest.raises(PeerLost, match="closed"):
            job.result(10)


def test_close_is_idempotent_and_final(pair: tuple[Channel, Channel]) -> None:
    one, other = pair
    assert one.fileno() >= 0
    one.close()
    one.close()
    assert one.fileno() == -1
    with pytest.raises(PeerLost, match="closed here"):
        one.send_control(MessageType.PREPARE)
    with pytest.raises(PeerLost, match="closed here"):
        one.recv(soon())
    with pytest.raises(PeerLost, match="primary closed"):
        other.recv(soon())


# -- opening over TCP -----------------------------------------------------------------------------


def test_opening(listener: socket.socket) -> None:
    with ThreadPoolExecutor(1) as pool:
        port = listener.getsockname()[1]
        opening = pool.submit(Channel.connect, "127.0.0.1", port, deadline_s=soon(), generation=5)
        with Channel(listener.accept()[0], generation=5) as server:
            assert server.answer({"colo", "receive"}, soon()) == "colo"
            server.send_control(MessageType.PREPARE)
            with opening.result(10) as client:
                # the frame right behind the line is not swallowed with it
                assert client.recv(soon()).type is MessageType.PREPARE


def test_tcp_is_tuned(listener: socket.socket) -> None:
    sock = socket.create_connection(listener.getsockname())
    with Channel(sock):
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


@pytest.mark.parametrize(
    ("request_line", "said"), [(b"save\n", "expected one of .*'colo'.*got 'save'"), (b"\xff\n", "UTF-8")]
)
def test_the_server_says_what_it_does_not_offer(
    raw: tuple[Channel, socket.socket], request_line: bytes, said: str
) -> None:
    server, client = raw
    client.sendall(request_line)
    with pytest.raises((FramingError, MessageError), match=said):
        server.answer({"colo"}, soon())
    with pytest.raises(PeerError, match=said):
        handshake.check_reply(client.recv(1000))


def test_a_line_without_end_is_refused(raw: tuple[Channel, socket.socket]) -> None:
    server, client = raw
    client.sendall(b"c" * 600)
    with pytest.raises(FramingError, match="at most 512"):
        server.answer({"colo"}, soon())


def test_a_client_that_says_nothing_is_lost(raw: tuple[Channel, socket.socket]) -> None:
    with pytest.raises(PeerLost, match="did not finish its line"):
        raw[0].answer({"colo"}, soon(0.01))


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b"error this host is full\n", PeerError),
        (b"SSH-2.0-OpenSSH\r\n", FramingError),
        (b"", PeerLost),
        (b"rea", PeerLost),
    ],
)
def test_a_failed_opening_leaves_no_socket(
    listener: socket.socket, reply: bytes, error: type[Exception]
) -> None:
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(Channel.connect, "127.0.0.1", listener.getsockname()[1], deadline_s=soon())
        served, _ = listener.accept()
        with served:
            served.settimeout(10)
            assert served.recv(100) == b"colo\n"
            served.sendall(reply)
            served.shutdown(socket.SHUT_WR)
            with pytest.raises(error):
                opening.result(10)
            assert served.recv(100) == b""  # the client has closed


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(
        PeerLost, match=f"cannot connect to 127.0.0.1 port {port}: Connection refused; is remusd running"
    ):
        Channel.connect("127.0.0.1", port, deadline_s=soon())


@pytest.mark.parametrize(
    ("host", "said"), [("fe80::1%nolink", "check the destination's name"), ("backup..", "is no host name")]
)
def test_no_such_host(host: str, said: str) -> None:
    with pytest.raises(PeerLost, match=said):
        Channel.connect(host, 8002, deadline_s=soon())


def test_no_time_left_to_connect() -> None:
    with pytest.raises(PeerLost, match="no time left"):
        Channel.connect("127.0.0.1", 8002, deadline_s=time.monotonic() - 1)
