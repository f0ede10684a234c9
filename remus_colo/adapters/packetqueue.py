# SPDX-License-Identifier: LGPL-2.1-or-later
"""One netfilter queue: packets held by the kernel until we give a verdict (NetfilterQueue).

NetfilterQueue 1.1.0 parses messages and sends verdicts.  Configuration of what it lacks and reception are
done here, on its socket: it would cut payloads at 4,016 bytes and pass over lost messages silently.

Packets are taken whole, as the kernel has them (NFQA_CFG_F_GSO): a bulk TCP transfer comes in packets of up to 64 kB, not
split to the MTU.  There is no choice: for the bridge family the kernel's own splitting in
net/netfilter/nfnetlink_queue.c loses the Ethernet header (``nf_bridge_adjust_skb_data`` saves it for
br_netfilter's packets alone), so each segment would go to a random address.

Two consequences for what a caller sees:

* TCP and UDP checksums may not be filled in yet (CHECKSUM_PARTIAL).  Compare content, not checksums.
* A payload given to :meth:`PacketQueue.accept_modified` must carry complete checksums: the kernel then
  no longer computes them, except for TCP packets that it still has to split.

Sources: <linux/netfilter/nfnetlink_queue.h>, <linux/netlink.h>, net/netfilter/nfnetlink_queue.c.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

import netfilterqueue

from remus_colo.adapters import kmod
from remus_colo.adapters.rtnl import attribute
from remus_colo.errors import HostError, NetworkError, StateError

log = logging.getLogger(__name__)

ETHERTYPE_IPV4 = 0x0800
ETHERTYPE_IPV6 = 0x86DD

_MAX_PAYLOAD_BYTES = 0xFFFF - 4  # NFQNL_MAX_COPY_RANGE: nla_len has 16 bits, 4 of its bytes are the header
_MAX_MESSAGE_BYTES = _MAX_PAYLOAD_BYTES + 4096  # the other attributes take some hundred bytes
_NETLINK_NETFILTER = 12
_SO_RCVBUFFORCE = 33
_NLMSG_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
_NLMSG_ERROR = 2
_NLM_F_REQUEST = 0x01
_NFQNL_MSG_CONFIG = 3 << 8 | 2  # NFNL_SUBSYS_QUEUE, message 2
_NFQA_CFG_PARAMS, _NFQA_CFG_MASK, _NFQA_CFG_FLAGS = 2, 4, 5
_NFQNL_COPY_PACKET = 2
_NFQA_CFG_F_GSO = 1 << 2
_TABLE = "/proc/thread-self/net/netfilter/nfnetlink_queue"
# Columns: queue number, port, queued, copy mode, copy range, dropped, user dropped, last id, 1 (seq_show).
_PORT_COLUMN, _COPY_RANGE_COLUMN, _DROPPED_COLUMN, _USER_DROPPED_COLUMN = 1, 4, 5, 6


@dataclasses.dataclass(frozen=True, slots=True)
class QueueCounters:
    """Since the queue was opened, but for ``held``: now.

    Any of the middle four says that packets were lost, or may not have been compared as a whole.
    """

    received: int
    truncated: int  # handed over, but shorter than its IP header says
    dropped_queue_full: int  # by the kernel: max_packets were held
    dropped_buffer_full: int  # by the kernel: our socket's buffer was full
    flushed: int  # verdicts that came too late: the kernel had dropped the packet (see PacketQueue)
    held: int


class PacketQueue:
    """Holds packets of one queue.  Belongs to one thread, and to the network namespace it was made in.

    The kernel drops what it holds when the queue is closed, when the packet's link goes down or away, and
    **when anyone removes a base chain of nftables in this namespace** (``nf_queue_nf_hook_drop``).  A verdict for such
    a packet is accepted here and shows in ``counters().flushed``.
    """

    def __init__(
        self,
        queue_num: int,
        on_packet: Callable[[int, bytes, int], None],
        max_packets: int,
        *,
        receive_buffer_bytes: int = 32 << 20,
    ) -> None:
        """Open the queue; packets that rules send there are held from now on.

        :param queue_num: 0 to 65535; must be free.
        :param on_packet: called from :meth:`process` with packet id, payload and ethertype.  The payload starts at
            the network header (for IP; for ARP at the ARP header) and has no Ethernet padding removed.  It may give a
            verdict at once.  Ids are ours, from 1 up, never used again.
        :param max_packets: what the kernel holds at most; more are dropped and counted.
        :param receive_buffer_bytes: for packets not yet seen by :meth:`process`.
        :raise NetworkError: the queue number is taken.
        :raise HostError: no permission, or no nfnetlink_queue in this kernel.
        """
        if not 0 <= queue_num <= 0xFFFF or not 0 < max_packets < 1 << 32:
            raise ValueError(f"queue_num={queue_num} or max_packets={max_packets} is out of range")
        self._queue_num = queue_num
        self._on_packet = on_packet
        self._max_packets = max_packets
        self._held: dict[int, Any] = {}
        self._last_id = 0
        self._truncated = 0
        self._dropped = (0, 0)
        self._socket: _Receiver | None = None
        self._queue: Any = None
        self._table: int | None = None
        try:
            self._open(receive_buffer_bytes)
        except BaseException:
            self.close()
            raise

    def _open(self, receive_buffer_bytes: int) -> None:
        try:
            self._queue = netfilterqueue.NetfilterQueue()
            # Kept open, since it shows the namespace in which it was opened.
            self._table = os.open(_TABLE, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            if os.geteuid() != 0:
                raise HostError("cannot open a packet queue: run as root") from exc
            raise kmod.missing("nfnetlink_queue", "holding packets", str(exc)) from exc
        taken_by = self._row()
        try:
            self._queue.bind(self._queue_num, self._received, max_len=self._max_packets)
        except OSError as exc:
            if taken_by is not None:
                raise NetworkError(
                    f"packet queue {self._queue_num} is taken by another process"
                    f" (netlink port {taken_by[_PORT_COLUMN]}, often its pid): end it or choose another number"
                ) from exc
            raise HostError(f"cannot open packet queue {self._queue_num}: {exc}; run as root") from exc
        self._socket = _Receiver(self._queue.get_fd(), receive_buffer_bytes, self._max_packets)
        self._socket.ask_for_whole_packets(self._queue_num)
        # The kernel has dealt with it when send() returns, and takes the flags before the length (nfqnl_recv_config).
        row = self._row()
        if row is None or int(row[_COPY_RANGE_COLUMN]) != _MAX_PAYLOAD_BYTES:
            raise NetworkError(f"packet queue {self._queue_num} does not take packets whole on this kernel")

    def fileno(self) -> int:
        """To be polled for reading."""
        if self._queue is None:
            raise StateError(f"packet queue {self._queue_num} is closed")
        return int(self._queue.get_fd())

    def process(self) -> int:
        """Hand what waits to ``on_packet``, without blocking; at most ``max_packets`` packets.

        :return: the number of packets handed over.
        """
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
        """Let a packet go on its way as it is.

        :raise StateError: it is not held (so do the others): it has had its verdict.
        """
        self._take(packet_id).accept()

    def accept_modified(self, packet_id: int, payload: bytes) -> None:
        """Let a packet go on its way with another payload, from its network header on, checksums complete."""
        if not payload:
            raise ValueError("a packet cannot become empty: drop it")
        packet = self._take(packet_id)
        packet.set_payload(payload)
        packet.accept()

    def drop(self, packet_id: int) -> None:
        self._take(packet_id).drop()

    def accept_all(self) -> int:
        """Let all held packets go, in the order in which they came.  Returns their number.

        What :meth:`process` has not handed over yet is not among them.
        """
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
        """Works on a closed queue, too: the last figures."""
        row = self._row()
        if row is not None:
            self._dropped = int(row[_DROPPED_COLUMN]), int(row[_USER_DROPPED_COLUMN])
        return QueueCounters(
            received=self._last_id,
            truncated=self._truncated,
            dropped_queue_full=self._dropped[0],
            dropped_buffer_full=self._dropped[1],
            flushed=self._socket.late_verdicts if self._socket else 0,
            held=len(self._held),
        )

    def _row(self) -> list[str] | None:
        if self._table is None:
            return None
        with contextlib.suppress(OSError):
            os.lseek(self._table, 0, os.SEEK_SET)
            with os.fdopen(os.dup(self._table)) as table:
                for line in table:
                    row = line.split()
                    if int(row[0]) == self._queue_num:
                        return row
        return None

    def close(self) -> None:
        """Close the queue.  The kernel drops what is still held: :meth:`accept_all` first, if that matters."""
        if self._socket is not None:
            self.counters()
            self._socket.close()
        if self._queue is not None:
            self._queue.unbind()
        # NetfilterQueue closes its socket with its last reference, and each packet has one.
        self._held.clear()
        self._queue = None
        if self._table is not None:
            os.close(self._table)
            self._table = None


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
