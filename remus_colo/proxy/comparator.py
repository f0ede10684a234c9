# SPDX-License-Identifier: LGPL-2.1-or-later
"""Decides when the PVM's output may leave: once the SVM has said the same, or once its epoch is committed.

Pure: no I/O, no clock.  Each call says what happened and when (``now_s``, monotonic seconds, never going back), and gets
back which packets leave now and whether a checkpoint is needed.  See ``docs/comparison.rst`` for the rules and why.

The invariant, which :meth:`Comparator.check_invariants` and the tests check: no packet of the PVM leaves before the SVM
agreed with it or its epoch was committed; the packets of a flow leave in order; each leaves once.

Epochs.  :meth:`Comparator.cut` costs the same however many flows there are, because the guest is paused: it sets the
held packets and the SVM's output aside and advances the epoch number.  A flow steps into the new epoch when it is next
touched.  Until :meth:`Comparator.commit`, its old state is kept for :meth:`Comparator.abort_cut`.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from dataclasses import dataclass

from ..errors import StateError
from .datagrams import DATAGRAM_OVERHEAD_BYTES, DatagramQueue, FragmentSet, SecondaryDatagram
from .packets import RST, Fragment, Held, Kind, Packet, describe, parse
from .tcpstream import Connection, TcpStream

_FORGET_PER_TICK = 1024


class Reason(enum.StrEnum):
    """Why a checkpoint is taken."""

    START = "start"
    PERIOD = "period"
    TCP_PAYLOAD = "tcp-payload"
    TCP_TIMEOUT = "tcp-timeout"
    UDP_TIMEOUT = "udp-timeout"
    ICMP_TIMEOUT = "icmp-timeout"
    OTHER_TIMEOUT = "other-timeout"
    LIMIT_BYTES = "limit-bytes"
    LIMIT_PACKETS = "limit-packets"
    LIMIT_FLOWS = "limit-flows"
    QUEUE_DROPPED = "queue-dropped"
    USER = "user"


_TIMEOUTS = {
    Kind.TCP: Reason.TCP_TIMEOUT,
    Kind.UDP: Reason.UDP_TIMEOUT,
    Kind.ICMP: Reason.ICMP_TIMEOUT,
    Kind.OTHER: Reason.OTHER_TIMEOUT,
}


@dataclass(frozen=True, slots=True)
class CheckpointRequest:
    """:ivar detail: the flow and the first position that differs, or the limit: for people."""

    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Decision:
    """:ivar release: ids of the packets that leave now, in the order in which they must leave."""

    release: tuple[int, ...]
    checkpoint: CheckpointRequest | None


_NOTHING = Decision((), None)


@dataclass(frozen=True, slots=True)
class CompareConfig:
    """Limits of the comparison.

    :ivar compare_timeout_s: how long a PVM packet waits for its equal before a checkpoint is asked for, and how
        long an SVM datagram is kept for the PVM's.
    :ivar held_bytes: PVM packets held in the running epoch, in bytes; more ask for a checkpoint.
    :ivar held_packets: the same in packets.
    :ivar flows: flows known at a time; more ask for a checkpoint, which forgets the least recently used.
    :ivar secondary_bytes: SVM output kept because the SVM is ahead; what is over it is dropped.
    :ivar idle_flow_s: a flow without packets for so long is forgotten.
    """

    compare_timeout_s: float = 1.0
    held_bytes: int = 8 << 20
    held_packets: int = 4096
    flows: int = 65536
    secondary_bytes: int = 8 << 20
    idle_flow_s: float = 300.0


@dataclass(slots=True)
class Counters:
    """What the comparator has done so far; ``held`` and ``held_bytes`` are as of now.

    :ivar released_equal: packets released because the SVM agreed.
    :ivar released_commit: packets released because their epoch was committed.
    :ivar released_passed: packets that are not compared (ARP and the like), or that left by or after ``release_all()``.
    :ivar diverged: differences found: contents that differ, and time-outs.
    :ivar secondary_dropped: SVM packets that were never compared: not IP, over a limit, aged, or sent around a cut.
    :ivar malformed: packets of either side that could not be parsed.
    """

    released_equal: int = 0
    released_commit: int = 0
    released_passed: int = 0
    diverged: int = 0
    held: int = 0
    held_bytes: int = 0
    secondary_seen: int = 0
    secondary_dropped: int = 0
    malformed: int = 0


class _Flow:
    """A flow: its held packets, and its state in the epoch ``epoch``.

    :ivar saved: epoch and state from before an uncommitted cut; None if it has not been touched since.
    """

    __slots__ = ("epoch", "held", "key", "last_s", "saved", "state")

    def __init__(self, key: bytes, epoch: int, state: TcpStream | DatagramQueue, now_s: float) -> None:
        self.key = key
        self.epoch = epoch
        self.state = state
        self.last_s = now_s
        self.held: deque[Held] = deque()
        self.saved: tuple[int, TcpStream | DatagramQueue] | None = None


class _Epoch:
    """What belongs to the running epoch as a whole, and is set aside at a cut."""

    __slots__ = ("buffered", "early", "fragments", "held", "held_bytes", "held_packets", "resets",
                 "secondary_bytes", "secondary_fragment_bytes", "secondary_fragments")

    def __init__(self) -> None:
        self.held: OrderedDict[int, Held] = OrderedDict()  # by arrival number, so by deadline, too
        self.held_bytes = 0
        self.held_packets = 0
        self.fragments: dict[bytes, tuple[FragmentSet, Held]] = {}
        self.early: deque[SecondaryDatagram] = deque()
        self.buffered: set[_Flow] = set()  # flows that may have SVM output kept
        self.secondary_bytes = 0
        self.secondary_fragments: OrderedDict[bytes, FragmentSet] = OrderedDict()
        self.secondary_fragment_bytes = 0
        self.resets: deque[tuple[float, _Flow, Connection]] = deque()  # RSTs of the SVM that the PVM has not sent


class _Cut:
    """An uncommitted cut.

    :ivar epoch: the closing epoch.
    :ivar running: the SVM ran before the cut.
    :ivar touched: flows that have stepped into the new epoch.
    :ivar stash: SVM output since the cut, for the case that the cut is aborted.
    """

    __slots__ = ("epoch", "running", "stash", "stash_bytes", "touched")

    def __init__(self, epoch: _Epoch, running: bool) -> None:
        self.epoch = epoch
        self.running = running
        self.touched: list[_Flow] = []
        self.stash: list[tuple[bytes, int]] = []
        self.stash_bytes = 0


class Comparator:
    """Compares the output of PVM and SVM.

    :param now_s: the SVM runs, and is a copy of the PVM, as of now.
    """

    def __init__(self, config: CompareConfig, now_s: float) -> None:
        self._config = config
        self._counters = Counters()
        self._protecting = True
        self._running = True  # the SVM's output counts
        self._resumed_s = now_s
        self._requested = False
        self._order = 0
        self._number = 0  # of the running epoch
        self._epoch = _Epoch()
        self._cut: _Cut | None = None
        self._flows: OrderedDict[bytes, _Flow] = OrderedDict()  # least recently used first

    # -- what the VMs send ------------------------------------------------------------------------

    def primary(self, now_s: float, packet_id: int, packet: bytes, ethertype: int = 0x0800) -> Decision:
        """Take a packet that the PVM sent; it is held until its id is in a :class:`Decision`.

        :param packet_id: unique among the held packets.
        :param packet: from the network header on.
        """
        if not self._protecting:
            self._counters.released_passed += 1
            return Decision((packet_id,), None)
        parsed = parse(packet, ethertype)
        if parsed is None:
            self._counters.released_passed += 1
            return Decision((packet_id,), None)
        if self._epoch.early:
            self._age_datagrams(now_s)
        order = self._order
        self._order = order + 1
        if parsed.__class__ is Fragment:
            return self._primary_fragment(now_s, packet_id, order, len(packet), parsed)
        held = Held(packet_id, order, len(packet), now_s, parsed.kind, parsed)
        if parsed.malformed:
            self._counters.malformed += 1
        return self._compare_primary(now_s, held, False)

    def secondary(self, now_s: float, packet: bytes, ethertype: int = 0x0800) -> Decision:
        """Take a packet that the SVM sent, in the PVM's sequence space.

        :param packet: from the network header on; may be a superpacket of several segments.
        """
        counters = self._counters
        counters.secondary_seen += 1
        if not self._running:
            cut = self._cut
            if cut is not None and cut.running and cut.stash_bytes + len(packet) <= self._config.secondary_bytes:
                cut.stash.append((packet, ethertype))
                cut.stash_bytes += len(packet) + DATAGRAM_OVERHEAD_BYTES
            else:
                counters.secondary_dropped += 1
            return _NOTHING
        if self._epoch.early:
            self._age_datagrams(now_s)
        parsed = parse(packet, ethertype)
        if parsed.__class__ is Fragment:
            parsed = self._secondary_fragment(now_s, parsed)
            if parsed is None:
                return _NOTHING
        if parsed is None:
            counters.secondary_dropped += 1
            return _NOTHING
        if parsed.malformed:
            counters.malformed += 1
        return self._compare_secondary(now_s, parsed)

    def tick(self, now_s: float) -> Decision:
        """Act on what is due at ``now_s``: time-outs, ageing, idle flows."""
        if not self._protecting:
            return _NOTHING
        self._age_datagrams(now_s)
        self._age_fragments(now_s)
        self._forget_idle(now_s)
        if self._requested or not self._running:
            return _NOTHING
        held = self._oldest()
        if held is not None and now_s >= self._deadline(held.arrived_s):
            self._counters.diverged += 1
            return Decision((), self._time_out(held))
        reset = self._oldest_reset()
        if reset is not None and now_s >= self._deadline(reset[0]):
            self._counters.diverged += 1
            detail = f"{describe(reset[1].key)}: the SVM reset the connection, the PVM did not"
            self._epoch.resets.popleft()
            return Decision((), self._request(Reason.TCP_TIMEOUT, detail))
        return _NOTHING

    @property
    def next_deadline_s(self) -> float | None:
        """When :meth:`tick` has something to ask for next; None if not before another call."""
        if self._requested or not self._running:
            return None
        held = self._oldest()
        deadline = None if held is None else self._deadline(held.arrived_s)
        reset = self._oldest_reset()
        if reset is not None:
            other = self._deadline(reset[0])
            if deadline is None or other < deadline:
                return other
        return deadline

    # -- checkpoints --------------------------------------------------------------------------------

    def cut(self, now_s: float) -> int:
        """Close the epoch: the PVM is paused, and all that it sent has been given to :meth:`primary`.

        The SVM's output is ignored until :meth:`secondary_resumed`.

        :return: packets held for the closing epoch.
        :raise StateError: the last cut is neither committed nor aborted.
        """
        if not self._protecting:
            return 0
        if self._cut is not None:
            raise StateError("cut() with an uncommitted cut: call commit() or abort_cut() first")
        self._cut = _Cut(self._epoch, self._running)
        self._epoch = _Epoch()
        self._number += 1
        self._running = False
        self._requested = False
        return self._cut.epoch.held_packets

    def commit(self, now_s: float) -> Decision:
        """The backup has acknowledged the checkpoint of the last :meth:`cut`: what was held for it leaves.

        :raise StateError: there is no uncommitted cut.
        """
        if not self._protecting:
            return _NOTHING
        cut = self._take_cut("commit()")
        closing = cut.epoch
        stale = closing.buffered
        leaving: list[tuple[int, int]] = []
        for held in closing.held.values():
            leaving.extend(zip(held.orders, held.ids, strict=True))
            if held.flow is not None:
                held.flow.held.popleft()
                stale.add(held.flow)
        leaving.sort()  # only fragments of one datagram are not in order of arrival already
        release = [packet_id for _, packet_id in leaving]
        self._counters.released_commit += len(release)
        for flow in stale:  # so that flows that stay silent do not keep what is of no more use
            if flow.epoch != self._number:
                flow.state = flow.state.rebased()
                flow.epoch = self._number
        self._counters.secondary_dropped += len(cut.stash)
        for flow in cut.touched:
            flow.saved = None
            release.extend(self._drain(flow))
        if len(self._flows) >= self._config.flows:
            self._forget_to(self._config.flows // 2)
        return Decision(tuple(release), None)

    def secondary_resumed(self, now_s: float) -> Decision:
        """The SVM, a copy of the PVM as of the cut, runs: its output counts again, and time-outs start now."""
        if self._protecting and not self._running:
            self._running = True
            self._resumed_s = now_s
            if self._cut is not None:
                self._counters.secondary_dropped += len(self._cut.stash)
                self._cut.stash.clear()
        return _NOTHING

    def abort_cut(self, now_s: float) -> Decision:
        """The checkpoint of the last :meth:`cut` did not take place: both VMs go on as they were.

        What the PVM sent since is compared with the old SVM, like what the closing epoch held.  Time-outs start now.

        :raise StateError: there is no uncommitted cut, or :meth:`secondary_resumed` said that it took place.
        """
        if not self._protecting:
            return _NOTHING
        if self._running:
            raise StateError("abort_cut() after secondary_resumed(): that checkpoint has taken place")
        cut = self._take_cut("abort_cut()")
        since, self._epoch = self._epoch, cut.epoch
        self._number -= 1
        self._running = cut.running
        self._resumed_s = now_s
        self._requested = False
        for entry in self._epoch.early:
            entry.seen_s = now_s
        for fragments in self._epoch.secondary_fragments.values():
            fragments.seen_s = now_s
        for held in since.held.values():
            if held.flow is not None:
                held.flow.held.pop()
        for flow in cut.touched:
            assert flow.saved is not None
            flow.epoch, flow.state = flow.saved
            flow.saved = None

        decisions: list[Decision] = []
        # A datagram's place in its flow is where its last fragment came.
        for held in sorted(since.held.values(), key=lambda held: held.orders[-1]):
            if held.packet is not None:
                self._enter(held)
                decisions.append(self._compare_primary(now_s, held, True))
        for key, (fragments, held) in since.fragments.items():
            decisions.append(self._rejoin(now_s, key, fragments, held))
        self._epoch.held = OrderedDict(sorted(self._epoch.held.items()))
        for packet, ethertype in cut.stash:
            self._counters.secondary_seen -= 1
            decisions.append(self.secondary(now_s, packet, ethertype))
        release = tuple(packet_id for decision in decisions for packet_id in decision.release)
        requests = [decision.checkpoint for decision in decisions if decision.checkpoint is not None]
        return Decision(release, requests[0] if requests else None)

    def release_all(self, now_s: float) -> Decision:
        """Protection has ended: everything leaves, and from now on at once."""
        epochs = [self._epoch] if self._cut is None else [self._cut.epoch, self._epoch]
        leaving = sorted(
            pair for epoch in epochs for held in epoch.held.values() for pair in zip(held.orders, held.ids, strict=True)
        )
        self._counters.released_passed += len(leaving)
        self._protecting = self._running = self._requested = False
        self._cut = None
        self._epoch = _Epoch()
        self._flows.clear()
        return Decision(tuple(packet_id for _, packet_id in leaving), None)

    # -- what people and tests look at ------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        """The live counters; read, do not write."""
        counters = self._counters
        counters.held = self._epoch.held_packets
        counters.held_bytes = self._epoch.held_bytes
        if self._cut is not None:
            counters.held += self._cut.epoch.held_packets
            counters.held_bytes += self._cut.epoch.held_bytes
        return counters

    def check_invariants(self) -> None:
        """Costs time in proportion to everything that is held: for tests.

        :raise AssertionError: a state that must not be.
        """
        epochs = [self._epoch] if self._cut is None else [self._cut.epoch, self._epoch]
        in_flows = [held for flow in self._flows.values() for held in flow.held]
        in_epochs = [held for epoch in epochs for held in epoch.held.values() if held.flow is not None]
        assert sorted(map(id, in_flows)) == sorted(map(id, in_epochs))
        ids = [packet_id for epoch in epochs for held in epoch.held.values() for packet_id in held.ids]
        for epoch in epochs:
            assert epoch.held_packets == sum(len(held.ids) for held in epoch.held.values())
            assert epoch.held_bytes == sum(held.size for held in epoch.held.values())
            assert list(epoch.held) == sorted(epoch.held)
            assert all(held.orders[0] == order for order, held in epoch.held.items())
            waiting = {id(held) for held in epoch.held.values() if held.flow is None}
            assert waiting == {id(held) for _, held in epoch.fragments.values()}
        assert len(ids) == self.counters.held
        kept = 0
        for key, flow in self._flows.items():
            assert key == flow.key and flow.epoch <= self._number
            flow.state.check_invariants()
            orders = [held.orders[-1] for held in flow.held]
            assert orders == sorted(orders)
            if flow.epoch == self._number:
                kept += flow.state.secondary_bytes
                assert not flow.state.secondary_bytes or flow in self._epoch.buffered
                assert self._cut is not None or not (flow.held and flow.state.ready(flow.held[0]))
            else:
                assert flow.saved is None and (self._cut is not None or not flow.held)
        assert kept == self._epoch.secondary_bytes <= max(self._config.secondary_bytes, 0)
        assert sum(
            fragments.size + len(fragments.fragments) * DATAGRAM_OVERHEAD_BYTES
            for fragments in self._epoch.secondary_fragments.values()
        ) == self._epoch.secondary_fragment_bytes <= max(self._config.secondary_bytes, 0)
        assert self._protecting or not (ids or self._flows)

    # -- comparing ----------------------------------------------------------------------------------

    def _compare_primary(self, now_s: float, held: Held, entered: bool) -> Decision:
        """Give ``held`` to its flow; ``entered``: it is among the held packets already."""
        packet = held.packet
        assert packet is not None
        request = None
        flow = self._flows.get(packet.key)
        if flow is None:
            if len(self._flows) >= self._config.flows and self._cut is None:
                request = self._request(Reason.LIMIT_FLOWS, f"{self._config.flows} flows are known")
            flow = self._new_flow(packet, now_s)
        else:
            self._flows.move_to_end(packet.key)
            flow.last_s = now_s
        state = flow.state if flow.epoch == self._number else self._step(flow)
        held.flow = flow
        diverged = state.diverged
        before = state.secondary_bytes
        state.primary(held)
        if before:
            self._epoch.secondary_bytes += state.secondary_bytes - before
        if state.diverged is not diverged:
            self._counters.diverged += 1
            request = self._request(Reason.TCP_PAYLOAD, f"{describe(flow.key)}, {state.diverged}")
        if not flow.held and self._cut is None and not entered and state.ready(held):
            self._counters.released_equal += 1
            return Decision(held.ids, request)
        flow.held.append(held)
        if not entered:
            self._enter(held)
        # A PVM segment can complete what earlier ones of its flow wait for.
        release = self._drain(flow)
        return Decision(release, request or self._limit()) if release or request or self._over_limit() else _NOTHING

    def _compare_secondary(self, now_s: float, packet: Packet) -> Decision:
        flow = self._flows.get(packet.key)
        if flow is None:
            if len(self._flows) >= self._config.flows:
                self._counters.secondary_dropped += 1
                return _NOTHING
            flow = self._new_flow(packet, now_s)
        else:
            self._flows.move_to_end(packet.key)
            flow.last_s = now_s
        state = flow.state if flow.epoch == self._number else self._step(flow)
        epoch = self._epoch
        request = None
        before = state.secondary_bytes
        if state.__class__ is TcpStream:
            diverged = state.diverged
            state.secondary(packet)
            if state.diverged is not diverged:
                self._counters.diverged += 1
                request = self._request(Reason.TCP_PAYLOAD, f"{describe(flow.key)}, {state.diverged}")
            if packet.flags & RST and not state.secondary_connection.primary_rst:
                epoch.resets.append((now_s, flow, state.secondary_connection))
        else:
            entry = state.secondary(packet, now_s)
            if entry is not None:
                epoch.early.append(entry)
        after = state.secondary_bytes
        if after:
            epoch.buffered.add(flow)
        if after != before:
            epoch.secondary_bytes += after - before
            if epoch.secondary_bytes > self._config.secondary_bytes:
                self._shrink(state)
        release = self._drain(flow) if flow.held else ()
        return Decision(release, request) if release or request else _NOTHING

    def _drain(self, flow: _Flow) -> tuple[int, ...]:
        """Release what may leave at the head of the flow; nothing while an older epoch is not committed."""
        if self._cut is not None:
            return ()
        waiting = flow.held
        ready = flow.state.ready
        epoch = self._epoch
        release: list[int] = []
        while waiting and ready(waiting[0]):
            held = waiting.popleft()
            del epoch.held[held.orders[0]]
            epoch.held_bytes -= held.size
            epoch.held_packets -= len(held.ids)
            release += held.ids
        if not release:
            return ()
        self._counters.released_equal += len(release)
        return tuple(release)

    def _enter(self, held: Held) -> None:
        epoch = self._epoch
        epoch.held[held.orders[0]] = held
        epoch.held_bytes += held.size
        epoch.held_packets += len(held.ids)

    def _new_flow(self, packet: Packet, now_s: float) -> _Flow:
        state = TcpStream() if packet.kind is Kind.TCP else DatagramQueue()
        flow = self._flows[packet.key] = _Flow(packet.key, self._number, state, now_s)
        if self._cut is not None:
            flow.saved = (self._number - 1, state.rebased())
            self._cut.touched.append(flow)
        return flow

    def _step(self, flow: _Flow) -> TcpStream | DatagramQueue:
        """Take the flow into the running epoch."""
        if self._cut is not None:
            flow.saved = (flow.epoch, flow.state)
            self._cut.touched.append(flow)
        flow.epoch = self._number
        flow.state = flow.state.rebased()
        return flow.state

    def _take_cut(self, call: str) -> _Cut:
        cut = self._cut
        if cut is None:
            raise StateError(f"{call} without an uncommitted cut: call cut() first")
        self._cut = None
        return cut

    # -- fragments ------------------------------------------------------------------------------------

    def _primary_fragment(self, now_s: float, packet_id: int, order: int, size: int, fragment: Fragment) -> Decision:
        epoch = self._epoch
        known = epoch.fragments.get(fragment.key)
        if known is None:
            fragments, held = FragmentSet(now_s), Held(packet_id, order, size, now_s, fragment.kind, None)
            epoch.fragments[fragment.key] = (fragments, held)
            self._enter(held)
        else:
            fragments, held = known
            held.ids += (packet_id,)
            held.orders += (order,)
            held.size += size
            epoch.held_bytes += size
            epoch.held_packets += 1
        whole = fragments.add(fragment)
        if whole is not None:
            return self._complete(now_s, fragment.key, held, whole)
        request = self._limit()
        return _NOTHING if request is None else Decision((), request)

    def _complete(self, now_s: float, key: bytes, held: Held, whole: bytes) -> Decision:
        del self._epoch.fragments[key]
        packet = parse(whole)
        assert packet.__class__ is Packet
        held.packet = packet
        if packet.malformed:
            self._counters.malformed += 1
        return self._compare_primary(now_s, held, True)

    def _rejoin(self, now_s: float, key: bytes, fragments: FragmentSet, held: Held) -> Decision:
        """After an aborted cut: put fragments that came since to those that came before."""
        epoch = self._epoch
        known = epoch.fragments.get(key)
        if known is None:
            epoch.fragments[key] = (fragments, held)
            self._enter(held)
            return _NOTHING
        older, into = known
        into.ids += held.ids
        into.orders += held.orders
        into.size += held.size
        epoch.held_bytes += held.size
        epoch.held_packets += len(held.ids)
        for fragment in fragments.fragments.values():
            whole = older.add(fragment)
            if whole is not None:
                return self._complete(now_s, key, into, whole)
        return _NOTHING

    def _secondary_fragment(self, now_s: float, fragment: Fragment) -> Packet | None:
        epoch = self._epoch
        self._age_fragments(now_s)
        fragments = epoch.secondary_fragments.get(fragment.key)
        if fragments is None:
            fragments = epoch.secondary_fragments[fragment.key] = FragmentSet(now_s)
        epoch.secondary_fragment_bytes -= self._fragments_cost(fragments)
        whole = fragments.add(fragment)
        if whole is not None:
            del epoch.secondary_fragments[fragment.key]
            packet = parse(whole)
            assert packet.__class__ is Packet
            return packet
        epoch.secondary_fragment_bytes += self._fragments_cost(fragments)
        while epoch.secondary_fragment_bytes > self._config.secondary_bytes:
            self._drop_oldest_fragments()
        return None

    def _age_fragments(self, now_s: float) -> None:
        known = self._epoch.secondary_fragments
        while known and next(iter(known.values())).seen_s + self._config.compare_timeout_s <= now_s:
            self._drop_oldest_fragments()

    def _drop_oldest_fragments(self) -> None:
        _, fragments = self._epoch.secondary_fragments.popitem(last=False)
        self._epoch.secondary_fragment_bytes -= self._fragments_cost(fragments)
        self._counters.secondary_dropped += len(fragments.fragments)

    @staticmethod
    def _fragments_cost(fragments: FragmentSet) -> int:
        return fragments.size + len(fragments.fragments) * DATAGRAM_OVERHEAD_BYTES

    # -- limits, time-outs, ageing ----------------------------------------------------------------

    def _request(self, reason: Reason, detail: str) -> CheckpointRequest | None:
        """A request, unless one is under way."""
        if self._requested:
            return None
        self._requested = True
        return CheckpointRequest(reason, detail)

    def _over_limit(self) -> bool:
        epoch, config = self._epoch, self._config
        return epoch.held_bytes > config.held_bytes or epoch.held_packets > config.held_packets

    def _limit(self) -> CheckpointRequest | None:
        epoch, config = self._epoch, self._config
        if epoch.held_bytes > config.held_bytes:
            return self._request(Reason.LIMIT_BYTES, f"{epoch.held_bytes} bytes held, the limit is {config.held_bytes}")
        if epoch.held_packets > config.held_packets:
            return self._request(
                Reason.LIMIT_PACKETS, f"{epoch.held_packets} packets held, the limit is {config.held_packets}"
            )
        return None

    def _shrink(self, state: TcpStream | DatagramQueue) -> None:
        """SVM output over the limit: drop the oldest datagrams, then the latest bytes of the stream that just grew."""
        epoch = self._epoch
        early = epoch.early
        while early and epoch.secondary_bytes > self._config.secondary_bytes:
            entry = early.popleft()
            if entry.live:
                self._drop_datagram(entry)
        excess = epoch.secondary_bytes - self._config.secondary_bytes
        if excess > 0:
            assert state.__class__ is TcpStream
            epoch.secondary_bytes -= state.shrink(excess)
            self._counters.secondary_dropped += 1

    def _age_datagrams(self, now_s: float) -> None:
        early = self._epoch.early
        while early:
            entry = early[0]
            if entry.live:
                if entry.seen_s + self._config.compare_timeout_s > now_s:
                    return
                self._drop_datagram(entry)
            early.popleft()

    def _drop_datagram(self, entry: SecondaryDatagram) -> None:
        entry.queue.discard(entry)
        self._epoch.secondary_bytes -= entry.size
        self._counters.secondary_dropped += 1

    def _deadline(self, since_s: float) -> float:
        return max(since_s, self._resumed_s) + self._config.compare_timeout_s

    def _oldest(self) -> Held | None:
        held = self._epoch.held
        return next(iter(held.values())) if held else None

    def _oldest_reset(self) -> tuple[float, _Flow, Connection] | None:
        resets = self._epoch.resets
        while resets and resets[0][2].primary_rst:
            resets.popleft()
        return resets[0] if resets else None

    def _time_out(self, held: Held) -> CheckpointRequest | None:
        flow: _Flow | None = held.flow
        if flow is None:
            return self._request(_TIMEOUTS[held.kind], "a fragmented datagram of the PVM lacks fragments")
        reason = _TIMEOUTS[held.kind]
        if flow.state.diverged is not None:  # asked for before, in vain: that checkpoint did not take place
            reason = Reason.TCP_PAYLOAD
        return self._request(reason, f"{describe(flow.key)}, {flow.state.waits_for(held)}")

    def _forget_idle(self, now_s: float) -> None:
        if self._cut is not None:
            return
        flows = self._flows
        for _ in range(min(_FORGET_PER_TICK, len(flows))):
            flow = next(iter(flows.values()))
            if flow.last_s + self._config.idle_flow_s > now_s:
                return
            if self._in_use(flow):
                flow.last_s = now_s
                flows.move_to_end(flow.key)
            else:
                self._forget(flow)

    def _forget_to(self, count: int) -> None:
        """Forget least recently used flows until ``count`` are left, as far as they can be forgotten."""
        for flow in list(self._flows.values()):
            if len(self._flows) <= count:
                return
            if not self._in_use(flow):
                self._forget(flow)

    def _in_use(self, flow: _Flow) -> bool:
        """It holds packets, or SVM datagrams that the ageing will come back for."""
        return bool(flow.held) or (flow.state.__class__ is DatagramQueue and flow.state.secondary_bytes > 0)

    def _forget(self, flow: _Flow) -> None:
        if flow.epoch == self._number:
            self._epoch.secondary_bytes -= flow.state.secondary_bytes
        self._epoch.buffered.discard(flow)
        del self._flows[flow.key]
