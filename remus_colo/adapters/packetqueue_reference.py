# SPDX-License-Identifier: LGPL-2.1-or-later
"""A packet queue over NetfilterQueue: the reference path (see :mod:`remus_colo.adapters.packetqueue`).

NetfilterQueue 1.1.0 parses messages and sends verdicts.  Configuration of what it lacks and reception are
done here, on its socket: it would cut payloads at 4,016 bytes and pass over lost messages silently.

Sources: <linux/netfilter/nfnetlink_queue.h>, <linux/netlink.h>, net/netfilter/nfnetlink_queue.c.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

import netfilterqueue

from remus_colo.adapters import kmod
from remus_colo.adapters.packetqueue import (
    ETHERTYPE_IPV4,
    ETHERTYPE_IPV6,
    KernelTable,
    OnPacket,
    PacketQueue,
    QueueCounters,
)
from remus_colo.adapters.rtnl import attribute
from remus_colo.errors import HostError, NetworkError, StateError

log = logging.getLogger(__name__)

_MAX_PAYLOAD_BYTES = 0xFFFF - 4  # NFQNL_MAX_COPY_RANGE: nla_len has 16 bits, 4 of its bytes are the header
_MAX_MESSAGE_BYTES = _MAX_PAYLOAD_BYTES + 4096  # the other attributes take some hundred bytes
_NETLINK_NETFILTER = 12
_SO_RCVBUFFORCE = 33  # <asm-generic/socket.h>
_NLMSG_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
_NLMSG_ERROR = 2
_NLM_F_REQUEST = 0x01
_NFQNL_MSG_CONFIG = 3 << 8 | 2  # NFNL_SUBSYS_QUEUE, message 2
_NFQA_CFG_PARAMS, _NFQA_CFG_MASK, _NFQA_CFG_FLAGS = 2, 4, 5
_NFQNL_COPY_PACKET = 2
_NFQA_CFG_F_GSO = 1 << 2


class ReferenceQueue(PacketQueue):
    """Parameters and errors as of :func:`remus_colo.adapters.packetqueue.open_queue`."""

    def __init__(
        self, queue_num: int, on_packet: OnPacket, max_packets: int, receive_buffer_bytes: int
    ) -> None:
        self._queue_num = queue_num
        self._on_packet = on_packet
        self._max_packets = max_packets
        self._held: dict[int, Any] = {}
        self._last_id = 0
        self._truncated = 0
        self._table = KernelTable(queue_num)
        self._socket: _Receiver | None = None
        self._queue: Any = None
        try:
            self._open(receive_buffer_bytes)
        except BaseException:
            self.close()
            raise

    def _open(self, receive_buffer_bytes: int) -> None:
        self._table.check_free()
        try:
            self._queue = netfilterqueue.NetfilterQueue()
        except OSError as exc:
            raise kmod.missing("nfnetlink_queue", "holding packets", str(exc)) from exc
        try:
            self._queue.bind(self._queue_num, self._received, max_len=self._max_packets)
        except OSError as exc:
            raise HostError(f"cannot open packet queue {self._queue_num}: {exc}; run as root") from exc
        self._socket = _Receiver(self._queue.get_fd(), receive_buffer_bytes, self._max_packets)
        self._socket.ask_for_whole_packets(self._queue_num)
        # The kernel has dealt with it when send() returns, and takes the flags before the length (nfqnl_recv_config).
        if self._table.copy_range() != _MAX_PAYLOAD_BYTES:
            raise NetworkError(f"packet queue {self._queue_num} does not take packets whole on this kernel")

    def fileno(self) -> int:
        if self._queue is None:
            raise StateError(f"packet queue {self._queue_num} is closed")
        return int(self._queue.get_fd())

    def process(self) -> int:
        if self._queue is None or self._socket is None:
            raise StateError(f"packet queue {self._queue_num} is closed")
        before = self._last_id
        self._socket.allowance = self._max_packets
        try:
            self._queue.run_socket(self._socket)
        except OSError as exc:
            raise NetworkError(f"cannot read packet queue {self._queue_num}: {exc.strerror}") from exc
        return self._last_id - before

    def _received(self, packet: Any) -> None:
        payload = packet.get_payload()
        ethertype = packet.hw_protocol
        self._last_id += 1
        packet_id = self._last_id
        self._held[packet_id] = packet
        if _ip_length(payload, ethertype) > len(payload):
            self._truncated += 1
        self._on_packet(packet_id, payload, ethertype)

    def accept(self, packet_id: int) -> None:
        self._take(packet_id).accept()

    def accept_modified(self, packet_id: int, payload: bytes) -> None:
        if not payload:
            raise ValueError("a packet cannot become empty: drop it")
        packet = self._take(packet_id)
        packet.set_payload(payload)
        packet.accept()

    def drop(self, packet_id: int) -> None:
        self._take(packet_id).drop()

    def accept_each(self, packet_ids: Sequence[int]) -> None:
        missing = None
        for packet_id in packet_ids:
            try:
                self.accept(packet_id)
            except StateError as error:
                missing = error
        if missing is not None:
            raise missing

    def accept_all(self) -> int:
        number = len(self._held)
        while self._held:
            self.accept(next(iter(self._held)))
        return number

    def _take(self, packet_id: int) -> Any:
        try:
            return self._held.pop(packet_id)
        except KeyError:
            raise StateError(f"packet {packet_id} is not held by queue {self._queue_num}") from None

    def counters(self) -> QueueCounters:
        queue_full, buffer_full = self._table.dropped()
        return QueueCounters(
            received=self._last_id,
            truncated=self._truncated,
            dropped_queue_full=queue_full,
            dropped_buffer_full=buffer_full,
            flushed=self._socket.late_verdicts if self._socket else 0,
            held=len(self._held),
        )

    def close(self) -> None:
        self._table.close()
        if self._socket is not None:
            self._socket.close()
        if self._queue is not None:
            self._queue.unbind()
        # NetfilterQueue closes its socket with its last reference, and each packet has one.
        self._held.clear()
        self._queue = None


class _Receiver:
    """What NetfilterQueue reads from in place of a socket: passes on packet messages, keeps count of the rest."""

    def __init__(self, fd: int, buffer_bytes: int, allowance: int) -> None:
        self.allowance = allowance
        self.late_verdicts = 0
        self._socket = socket.fromfd(fd, socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer_bytes)

    def close(self) -> None:
        self._socket.close()

    def recv(self, _size: int) -> bytes:
        """One packet message.  EAGAIN if there is none, or ``allowance`` of them were given out."""
        if self.allowance <= 0:
            raise BlockingIOError(errno.EAGAIN, "enough for now")
        while True:
            message = self._read()
            if _NLMSG_HEADER.unpack_from(message)[1] != _NLMSG_ERROR:
                self.allowance -= 1
                return message
            self._note_error(message)

    def _read(self) -> bytes:
        while True:
            try:
                return self._socket.recv(_MAX_MESSAGE_BYTES, socket.MSG_DONTWAIT)
            except OSError as exc:
                # Said once after messages were lost, which the kernel counts as dropped packets.
                if exc.errno != errno.ENOBUFS:
                    raise

    def _note_error(self, message: bytes) -> None:
        (negative_errno,) = struct.unpack_from("=i", message, _NLMSG_HEADER.size)
        if negative_errno == -errno.ENOENT:
            self.late_verdicts += 1
        elif negative_errno:
            log.warning("a request was refused: %s", os.strerror(-negative_errno))

    def ask_for_whole_packets(self, queue_num: int) -> None:
        """No acknowledgement is asked for: packets may be in front of it already, and taking them off the socket here
        would leave them unseen by whoever polls it."""
        body = struct.pack("=BBH", socket.AF_UNSPEC, 0, socket.htons(queue_num))
        body += attribute(_NFQA_CFG_PARAMS, struct.pack(">IB", _MAX_PAYLOAD_BYTES, _NFQNL_COPY_PACKET))
        body += attribute(_NFQA_CFG_FLAGS, struct.pack(">I", _NFQA_CFG_F_GSO))
        body += attribute(_NFQA_CFG_MASK, struct.pack(">I", _NFQA_CFG_F_GSO))
        header = _NLMSG_HEADER.pack(_NLMSG_HEADER.size + len(body), _NFQNL_MSG_CONFIG, _NLM_F_REQUEST, 0, 0)
        self._socket.send(header + body)


def _ip_length(payload: bytes, ethertype: int) -> int:
    """What the IP header says the packet's length is; 0 if it is no IP packet or says nothing."""
    if ethertype == ETHERTYPE_IPV4 and len(payload) >= 4:
        return int.from_bytes(payload[2:4], "big")
    if ethertype == ETHERTYPE_IPV6 and len(payload) >= 6:
        return 40 + int.from_bytes(payload[4:6], "big")
    return 0
