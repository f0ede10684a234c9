# SPDX-License-Identifier: LGPL-2.1-or-later
"""What runs the packets of one vif through the comparator: from the queue and the SVM's link to the verdict.

Two forms, as the packet queue has (``REMUS_COLO_QUEUE``): the native one enters Python once per wake-up, the reference
one for each packet.
"""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Callable

from remus_colo.adapters.packetqueue import RECEIVE_BUFFER_BYTES, Form, PacketQueue, open_queue
from remus_colo.adapters.packetqueue_native import NativeQueue
from remus_colo.adapters.pump_native import NativeTurns
from remus_colo.adapters.rawlink import LinkGone, RawLink
from remus_colo.proxy.comparator import Comparator, Decision

PACKETS_PER_TURN = 1024  # then the loop's other events have theirs


class Pump(abc.ABC):
    """Belongs to one thread.

    :ivar queue: what the PVM sends, held.
    :ivar missing: packets of the PVM that the kernel could not hand over, as far as reading has shown it; the rest
        shows in the queue's counters only.
    """

    queue: PacketQueue
    missing = 0

    @abc.abstractmethod
    def turn(self) -> bool:
        """Deal with what both VMs have sent, without blocking; a thousand packets or so at most.

        :return: :attr:`missing` has grown, or :attr:`deadline_s` is before what :meth:`arm` was told.
        :raise LinkGone: the SVM's link was deleted.  It is read no more; the rest goes on.
        :raise NetworkError: the queue cannot be read, or verdicts not sent.
        """

    @abc.abstractmethod
    def drain_primary(self) -> None:
        """Deal with all that the PVM has sent.  To be called when it is stopped."""

    @abc.abstractmethod
    def drain_secondary(self) -> None:
        """Deal with all that the SVM has sent.  To be called when it is stopped."""

    @property
    @abc.abstractmethod
    def deadline_s(self) -> float | None:
        """The comparator's, as of the last call of those."""

    @abc.abstractmethod
    def arm(self, due_s: float | None) -> None:
        """Somebody looks after the comparator's deadlines at that time in any case."""

    @abc.abstractmethod
    def ignore_tags(self) -> None:
        """VLAN ids are not to be compared: the queue's rules are such that the kernel does not tell them."""

    @abc.abstractmethod
    def compare_with(self, comparator: Comparator) -> None:
        """Use a new comparator."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close the queue; the link is its owner's.  The kernel drops what is still held."""


@dataclasses.dataclass(frozen=True, slots=True)
class QueueSize:
    """:ivar packets: what the kernel holds at most.
    :ivar socket_bytes: what it keeps of them on our socket until they are read.
    """

    packets: int = 16384  # the comparator asks for a checkpoint long before
    socket_bytes: int = RECEIVE_BUFFER_BYTES


def open_pump(
    queue_num: int, size: QueueSize, link: RawLink, comparator: Comparator, apply: Callable[[Decision], None]
) -> Pump:
    """Open the queue, in the form that the environment chooses.

    :param apply: called with decisions that release packets or ask for a checkpoint; the native form releases
        by itself.
    :raise NetworkError, HostError, ConfigError: as :func:`remus_colo.adapters.packetqueue.open_queue`.
    """
    kind = NativePump if Form.chosen() is Form.NATIVE else ReferencePump
    return kind(queue_num, size, link, comparator, apply)


class NativePump(Pump):
    """See :func:`open_pump`."""

    def __init__(
        self,
        queue_num: int,
        size: QueueSize,
        link: RawLink,
        comparator: Comparator,
        apply: Callable[[Decision], None],
    ) -> None:
        queue = open_queue(
            queue_num, _not_called, size.packets, receive_buffer_bytes=size.socket_bytes, form=Form.NATIVE
        )
        assert isinstance(queue, NativeQueue)
        self.queue = queue
        self._comparator = comparator
        self._apply = apply
        try:
            self._turns = NativeTurns(queue, link, comparator.native)
        except BaseException:
            queue.close()
            raise

    def turn(self) -> bool:
        return self._turns.both(PACKETS_PER_TURN) and self._attend()

    def drain_primary(self) -> None:
        if self._turns.primary():
            self._attend()

    def drain_secondary(self) -> None:
        if self._turns.secondary():
            self._attend()

    def _attend(self) -> bool:
        turns = self._turns
        self.missing = turns.missing
        if turns.requested:
            turns.requested = False
            self._apply(self._comparator.take())
        return True

    @property
    def deadline_s(self) -> float | None:
        return self._turns.deadline_s

    def arm(self, due_s: float | None) -> None:
        self._turns.arm(due_s)

    def ignore_tags(self) -> None:
        self._turns.ignore_tags()

    def compare_with(self, comparator: Comparator) -> None:
        self._turns.compare_with(comparator.native)
        self._comparator = comparator

    def close(self) -> None:
        self._turns.close()
        self.queue.close()


class ReferencePump(Pump):
    """See :func:`open_pump`."""

    def __init__(
        self,
        queue_num: int,
        size: QueueSize,
        link: RawLink,
        comparator: Comparator,
        apply: Callable[[Decision], None],
    ) -> None:
        self._link: RawLink | None = link
        self._comparator = comparator
        self._apply = apply
        self._due_s: float | None = None
        self.queue = open_queue(
            queue_num, self._on_packet, size.packets, receive_buffer_bytes=size.socket_bytes
        )

    def _on_packet(self, packet_id: int, payload: bytes, ethertype: int) -> None:
        self._apply(self._comparator.primary(time.monotonic(), packet_id, payload, ethertype))

    def turn(self) -> bool:
        self.drain_secondary()
        self.drain_primary()
        deadline_s = self.deadline_s
        return deadline_s is not None and (self._due_s is None or deadline_s < self._due_s)

    def drain_primary(self) -> None:
        self.queue.process()

    def drain_secondary(self) -> None:
        while self._link is not None:
            try:
                frame = self._link.recv()
            except LinkGone:
                self._link = None
                raise
            if frame is None:
                return
            self._apply(self._comparator.secondary(time.monotonic(), frame.payload, frame.ethertype))

    @property
    def deadline_s(self) -> float | None:
        return self._comparator.next_deadline_s

    def arm(self, due_s: float | None) -> None:
        self._due_s = due_s

    def ignore_tags(self) -> None:
        pass  # NetfilterQueue never tells them

    def compare_with(self, comparator: Comparator) -> None:
        self._comparator = comparator

    def close(self) -> None:
        self.queue.close()


def _not_called(_packet_id: int, _payload: bytes, _ethertype: int) -> None:
    raise AssertionError("packets of a native pump are dealt with below Python")
