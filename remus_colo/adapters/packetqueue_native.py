# SPDX-License-Identifier: LGPL-2.1-or-later
"""A packet queue over our own reader, ``_native/queue.c`` (see :mod:`remus_colo.adapters.packetqueue`)."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Sequence
from typing import Any

from remus_colo.adapters import kmod
from remus_colo.adapters.native import compiled
from remus_colo.adapters.packetqueue import KernelTable, OnPacket, PacketQueue, QueueCounters
from remus_colo.errors import HostError, NetworkError, StateError

log = logging.getLogger(__name__)


class NativeQueue(PacketQueue):
    """Parameters and errors as of :func:`remus_colo.adapters.packetqueue.open_queue`."""

    def __init__(
        self, queue_num: int, on_packet: OnPacket, max_packets: int, receive_buffer_bytes: int
    ) -> None:
        self._lib, self._ffi = compiled()
        self._queue_num = queue_num
        self._on_packet = on_packet
        self._max_packets = max_packets
        self._packets = self._ffi.new("struct rq_packet[]", self._lib.RQ_BATCH)
        self._counters = self._ffi.new("struct rq_counters *")
        self._processing = False
        self._refused = 0
        self._table = KernelTable(queue_num)
        self._queue: Any = None
        try:
            self._table.check_free()
            self._open(receive_buffer_bytes)
        except BaseException:
            self.close()
            raise

    def _open(self, receive_buffer_bytes: int) -> None:
        queue = self._lib.rq_open(self._queue_num, self._max_packets, receive_buffer_bytes)
        if queue == self._ffi.NULL:
            error = self._ffi.errno
            if error in (errno.EPROTONOSUPPORT, errno.EINVAL, errno.EOPNOTSUPP):
                raise kmod.missing("nfnetlink_queue", "holding packets", os.strerror(error))
            raise HostError(f"cannot open packet queue {self._queue_num}: {os.strerror(error)}; run as root")
        self._queue = queue

    @property
    def handle(self) -> Any:
        """The ``struct rq_queue *``, for other compiled parts.

        :raise StateError: it is closed.
        """
        if self._queue is None:
            raise StateError(f"packet queue {self._queue_num} is closed")
        return self._queue

    def fileno(self) -> int:
        return int(self._lib.rq_fd(self.handle))

    def process(self) -> int:
        queue, packets, buffer = self.handle, self._packets, self._ffi.buffer
        number = 0
        self._processing = True
        try:
            while number < self._max_packets:
                got = self._lib.rq_read(queue, packets, self._lib.RQ_BATCH)
                if got < 0:
                    if got == -errno.EAGAIN:
                        break
                    raise NetworkError(f"cannot read packet queue {self._queue_num}: {os.strerror(-got)}")
                number += got
                for packet in packets[0:got]:
                    frame = packet.frame
                    self._on_packet(packet.id, buffer(frame.data, frame.size)[:], frame.ethertype)
        finally:
            self._processing = False
            self._flush()
        self._note_refusals()
        return number

    def accept(self, packet_id: int) -> None:
        self._verdict(self._lib.rq_accept(self.handle, packet_id), packet_id)

    def accept_modified(self, packet_id: int, payload: bytes) -> None:
        if not payload:
            raise ValueError("a packet cannot become empty: drop it")
        self._verdict(self._lib.rq_accept_modified(self.handle, packet_id, payload, len(payload)), packet_id)

    def drop(self, packet_id: int) -> None:
        self._verdict(self._lib.rq_drop(self.handle, packet_id), packet_id)

    def accept_each(self, packet_ids: Sequence[int]) -> None:
        ids = self._ffi.new("uint64_t[]", packet_ids)
        error = self._lib.rq_accept_each(self.handle, ids, len(packet_ids))
        if error == -errno.ENOENT:
            raise StateError(f"not all of {len(packet_ids)} packets are held by queue {self._queue_num}")
        if error:
            raise self._not_sent(error)

    def accept_all(self) -> int:
        number = int(self._lib.rq_accept_all(self.handle))
        if number < 0:
            raise self._not_sent(number)
        return number

    def _verdict(self, error: int, packet_id: int) -> None:
        if error == -errno.ENOENT:
            raise StateError(f"packet {packet_id} is not held by queue {self._queue_num}")
        if error == -errno.EMSGSIZE:
            raise ValueError(
                f"a packet of more than {self._lib.RQ_MAX_PAYLOAD} bytes does not go through a queue"
            )
        if error:
            raise self._not_sent(error)
        if not self._processing:
            self._flush()

    def _flush(self) -> None:
        if error := self._lib.rq_flush(self.handle):
            raise self._not_sent(error)

    def _not_sent(self, error: int) -> NetworkError:
        return NetworkError(f"cannot let packets of queue {self._queue_num} go: {os.strerror(-error)}")

    def _note_refusals(self) -> None:
        counters = self._read_counters()
        if counters.refused > self._refused:
            self._refused = counters.refused
            log.warning(
                "a request to packet queue %d was refused: %s", self._queue_num, os.strerror(counters.refusal)
            )

    def _read_counters(self) -> Any:
        if self._queue is not None:
            self._lib.rq_get_counters(self._queue, self._counters)
        return self._counters

    def counters(self) -> QueueCounters:
        queue_full, buffer_full = self._table.dropped()
        counters = self._read_counters()
        return QueueCounters(
            received=counters.received,
            truncated=counters.truncated,
            dropped_queue_full=queue_full,
            dropped_buffer_full=buffer_full,
            flushed=counters.late,
            held=counters.held,
        )

    def close(self) -> None:
        self._table.close()
        if self._queue is not None:
            self._read_counters()
            self._counters.held = 0
            self._lib.rq_close(self._queue)
            self._queue = None
