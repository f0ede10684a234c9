# SPDX-License-Identifier: LGPL-2.1-or-later
"""One netfilter queue: packets held by the kernel until we give a verdict.  The interface; it has two forms.

``native``
    our own reader (``_native/queue.c``): many packets to a system call, verdicts in lots.  The default.
``netfilterqueue``
    the reference path, over NetfilterQueue: a Python call and two system calls for each packet.

``REMUS_COLO_QUEUE`` in the environment chooses.  Both pass the same tests.

Packets are taken whole, as the kernel has them (NFQA_CFG_F_GSO): a bulk TCP transfer comes in packets of up
to 64 kB, not split to the MTU.  There is no choice: for the bridge family the kernel's own splitting in
net/netfilter/nfnetlink_queue.c loses the Ethernet header (``nf_bridge_adjust_skb_data`` saves it for
br_netfilter's packets alone), so each segment would go to a random address.

Two consequences for what a caller sees:

* TCP and UDP checksums may not be filled in yet (CHECKSUM_PARTIAL).  Compare content, not checksums.
* A payload given to :meth:`PacketQueue.accept_modified` must carry complete checksums: the kernel then
  no longer computes them, except for TCP packets that it still has to split.

What the kernel drops instead of holding it, because it holds ``max_packets`` or our socket is full, it counts, and
:meth:`PacketQueue.counters` shows.  After the socket was full, the kernel puts nothing more on it until it is empty
(NETLINK_S_CONGESTED), so the buffer should be larger than what ``max_packets`` can take.

Sources: <linux/netfilter/nfnetlink_queue.h>, net/netfilter/nfnetlink_queue.c, net/netlink/af_netlink.c.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import enum
import os
from collections.abc import Callable, Sequence

from remus_colo.adapters import kmod
from remus_colo.errors import ConfigError, HostError, NetworkError

ETHERTYPE_IPV4 = 0x0800
ETHERTYPE_IPV6 = 0x86DD
ENVIRONMENT = "REMUS_COLO_QUEUE"
RECEIVE_BUFFER_BYTES = 32 << 20

OnPacket = Callable[[int, bytes, int], None]

_TABLE = "/proc/thread-self/net/netfilter/nfnetlink_queue"
# Columns: queue number, port, queued, copy mode, copy range, dropped, user dropped, last id, 1 (seq_show).
_PORT_COLUMN, _COPY_RANGE_COLUMN, _DROPPED_COLUMN, _USER_DROPPED_COLUMN = 1, 4, 5, 6


class Form(enum.StrEnum):
    """What reads the queue."""

    NATIVE = "native"
    NETFILTERQUEUE = "netfilterqueue"

    @classmethod
    def chosen(cls) -> Form:
        """By the environment.

        :raise ConfigError: there is no such form.
        """
        name = os.environ.get(ENVIRONMENT) or cls.NATIVE.value
        try:
            return cls(name)
        except ValueError:
            forms = " or ".join(form.value for form in cls)
            raise ConfigError(
                f"{ENVIRONMENT}={name} is not known: set it to {forms}, or not at all"
            ) from None


@dataclasses.dataclass(frozen=True, slots=True)
class QueueCounters:
    """Since the queue was opened, but for ``held``: now.

    Any of the middle four says that packets were lost, or may not have been compared as a whole.
    """

    received: int
    truncated: int  # handed over cut off; the reference form judges by the length that the IP header says
    dropped_queue_full: int  # by the kernel: max_packets were held
    dropped_buffer_full: int  # by the kernel: our socket's buffer was full
    flushed: int  # verdicts that came too late: the kernel had dropped the packet (see PacketQueue)
    held: int


class PacketQueue(abc.ABC):
    """Holds packets of one queue.  Belongs to one thread, and to the network namespace it was made in.

    The kernel drops what it holds when the queue is closed, when the packet's link goes down or away, and
    **when anyone removes a base chain of nftables in this namespace** (``nf_queue_nf_hook_drop``).  A verdict for such
    a packet is accepted here and shows in ``counters().flushed``.
    """

    @abc.abstractmethod
    def fileno(self) -> int:
        """To be polled for reading."""

    @abc.abstractmethod
    def process(self) -> int:
        """Hand what waits to ``on_packet``, without blocking; about ``max_packets`` packets at most.

        Verdicts that ``on_packet`` gives are with the kernel when this returns.

        :return: the number of packets handed over.
        """

    @abc.abstractmethod
    def accept(self, packet_id: int) -> None:
        """Let a packet go on its way as it is.

        :raise StateError: it is not held (so do the others): it has had its verdict.
        """

    @abc.abstractmethod
    def accept_modified(self, packet_id: int, payload: bytes) -> None:
        """Let a packet go on its way with another payload, from its network header on, checksums complete."""

    @abc.abstractmethod
    def drop(self, packet_id: int) -> None: ...

    @abc.abstractmethod
    def accept_each(self, packet_ids: Sequence[int]) -> None:
        """Let packets go, in this order.

        :raise StateError: some are not held; the others leave.
        """

    @abc.abstractmethod
    def accept_all(self) -> int:
        """Let all held packets go, in the order in which they came.  Returns their number.

        What :meth:`process` has not handed over yet is not among them.
        """

    @abc.abstractmethod
    def counters(self) -> QueueCounters:
        """Works on a closed queue, too: the last figures."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close the queue.  The kernel drops what is still held: :meth:`accept_all` first, if that matters."""


def open_queue(
    queue_num: int,
    on_packet: OnPacket,
    max_packets: int,
    *,
    receive_buffer_bytes: int = RECEIVE_BUFFER_BYTES,
    form: Form | None = None,
) -> PacketQueue:
    """Open a queue; packets that rules send there are held from now on.

    :param queue_num: 0 to 65535; must be free.
    :param on_packet: called from :meth:`PacketQueue.process` with packet id, payload and ethertype.  The payload starts
        at the network header (for IP; for ARP at the ARP header) and has no Ethernet padding removed.  It may give a
        verdict at once.  Ids are ours, from 1 up, never used again.
    :param max_packets: what the kernel holds at most; more are dropped and counted.
    :param receive_buffer_bytes: for packets not yet seen by :meth:`PacketQueue.process`.
    :param form: by the environment if not given.
    :raise NetworkError: the queue number is taken.
    :raise HostError: no permission, no nfnetlink_queue in this kernel, or the form is not installed.
    :raise ConfigError: the environment names no form.
    """
    if not 0 <= queue_num <= 0xFFFF or not 0 < max_packets < 1 << 32:
        raise ValueError(f"queue_num={queue_num} or max_packets={max_packets} is out of range")
    # Imported here: a host needs what one of them is made of, not both.
    if (form or Form.chosen()) is Form.NATIVE:
        from remus_colo.adapters.packetqueue_native import NativeQueue

        return NativeQueue(queue_num, on_packet, max_packets, receive_buffer_bytes)
    from remus_colo.adapters.packetqueue_reference import ReferenceQueue

    return ReferenceQueue(queue_num, on_packet, max_packets, receive_buffer_bytes)


def queues_in_use() -> set[int]:
    """The numbers of all queues of this network namespace.

    :raise HostError: this kernel has no such table, or no permission.
    """
    with os.fdopen(_open_table()) as table:
        return {int(line.split()[0]) for line in table}


def _open_table() -> int:
    try:
        return os.open(_TABLE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        if os.geteuid() != 0:
            raise HostError("cannot open a packet queue: run as root") from exc
        raise kmod.missing("nfnetlink_queue", "holding packets", str(exc)) from exc


class KernelTable:
    """The row of one queue in the kernel's table of them, for the namespace in which this was made."""

    def __init__(self, queue_num: int) -> None:
        """:raise HostError: this kernel has no such table, or no permission."""
        self._queue_num = queue_num
        self._dropped = (0, 0)
        # Kept open, since it shows the namespace in which it was opened.
        self._file = _open_table()

    def check_free(self) -> None:
        """:raise NetworkError: another process has the queue."""
        if (row := self._row()) is not None:
            raise NetworkError(
                f"packet queue {self._queue_num} is taken by another process"
                f" (netlink port {row[_PORT_COLUMN]}, often its pid): end it or choose another number"
            )

    def copy_range(self) -> int:
        """How many bytes of a packet the kernel hands over; 0 if the queue is not there."""
        row = self._row()
        return 0 if row is None else int(row[_COPY_RANGE_COLUMN])

    def dropped(self) -> tuple[int, int]:
        """Packets dropped so far because the queue was full, and because our socket was; the last figures if closed."""
        if (row := self._row()) is not None:
            self._dropped = int(row[_DROPPED_COLUMN]), int(row[_USER_DROPPED_COLUMN])
        return self._dropped

    def close(self) -> None:
        if self._file >= 0:
            self.dropped()
            os.close(self._file)
            self._file = -1

    def _row(self) -> list[str] | None:
        if self._file < 0:
            return None
        with contextlib.suppress(OSError):
            os.lseek(self._file, 0, os.SEEK_SET)
            with os.fdopen(os.dup(self._file)) as table:
                for line in table:
                    row = line.split()
                    if int(row[0]) == self._queue_num:
                        return row
        return None
