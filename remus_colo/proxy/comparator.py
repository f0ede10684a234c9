# SPDX-License-Identifier: LGPL-2.1-or-later
"""Decides when the PVM's output may leave: once the SVM has said the same, or once its epoch is committed.

Pure: no I/O, no clock.  Each call says what happened and when (``now_s``, monotonic seconds, never going
back), and gets back which packets leave now and whether a checkpoint is needed.  See ``docs/comparison.rst``
for the rules and why.

The work is done in C (``_native/compare.h``, which a C loop may call directly); this is its face for Python.

The invariant, which :meth:`Comparator.check_invariants` and the tests check: no packet of the PVM leaves before the SVM
agreed with it or its epoch was committed; the packets of a TCP flow leave in order; each leaves once.
"""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from remus_colo._native import compare_module
from remus_colo.errors import StateError

_DETAIL_BYTES = 512


class Reason(enum.StrEnum):
    """Why a checkpoint is taken."""

    START = "start"
    PERIOD = "period"
    TCP_PAYLOAD = "tcp-payload"
    TCP_RESET = "tcp-reset"
    ICMP_PAYLOAD = "icmp-payload"
    TCP_PORTS = "tcp-ports"
    UDP_PAYLOAD = "udp-payload"
    TCP_TIMEOUT = "tcp-timeout"
    UDP_TIMEOUT = "udp-timeout"
    ICMP_TIMEOUT = "icmp-timeout"
    OTHER_TIMEOUT = "other-timeout"
    LIMIT_BYTES = "limit-bytes"
    LIMIT_PACKETS = "limit-packets"
    LIMIT_FLOWS = "limit-flows"
    LIMIT_SECONDARY = "limit-secondary"
    TRUNCATED = "truncated"
    QUEUE_DROPPED = "queue-dropped"
    USER = "user"


# In the order of enum colo_reason in compare.h, from COLO_TCP_PAYLOAD (1) on.
REASONS = (
    Reason.TCP_PAYLOAD,
    Reason.TCP_RESET,
    Reason.ICMP_PAYLOAD,
    Reason.TCP_PORTS,
    Reason.UDP_PAYLOAD,
    Reason.TCP_TIMEOUT,
    Reason.UDP_TIMEOUT,
    Reason.ICMP_TIMEOUT,
    Reason.OTHER_TIMEOUT,
    Reason.LIMIT_BYTES,
    Reason.LIMIT_PACKETS,
    Reason.LIMIT_FLOWS,
    Reason.LIMIT_SECONDARY,
    Reason.TRUNCATED,
)


class How(enum.IntEnum):
    """How a packet leaves: ``enum colo_how``."""

    EQUAL = 0
    PASSED = 1
    COMMITTED = 2
    UNPROTECTED = 3


@dataclass(frozen=True, slots=True)
class CheckpointRequest:
    """:ivar detail: the flow and the first position that differs, or the limit: for people."""

    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What a call decided.

    :ivar release: ids of the packets that leave now, in the order in which they must leave.
    :ivar how: for each of them, a :class:`How`.
    """

    release: tuple[int, ...]
    checkpoint: CheckpointRequest | None
    how: tuple[int, ...] = ()


_NOTHING = Decision((), None)


@dataclass(frozen=True, slots=True)
class CompareConfig:
    """Limits of the comparison.

    :ivar compare_timeout_s: how long a PVM packet waits for its equal before a checkpoint is asked for, how long the
        SVM may be ahead in a TCP stream before one is, and how long an SVM datagram is kept for the PVM's.
    :ivar held_bytes: PVM packets held in the running epoch, in bytes; more ask for a checkpoint.
    :ivar held_packets: the same in packets.
    :ivar flows: flows known at a time; if none of them can be forgotten without loss, more ask for a checkpoint, which
        forgets the least recently used.
    :ivar secondary_bytes: SVM output kept because the SVM is ahead; more ask for a checkpoint, and are dropped.
    :ivar idle_flow_s: a flow without packets for so long is forgotten, within as long again.
    :ivar own_sequence: the SVM's TCP may come in its own sequence space, because there is no rewriter in between.  For
        captures: live, such a connection would not survive a failover.
    :ivar before_rewriter: it does so in every connection whose SYN the SVM is seen to send.
    """

    compare_timeout_s: float = 1.0
    held_bytes: int = 8 << 20
    held_packets: int = 4096
    flows: int = 65536
    secondary_bytes: int = 8 << 20
    idle_flow_s: float = 300.0
    own_sequence: bool = False
    before_rewriter: bool = False

    @classmethod
    def from_limits(cls, compare_timeout_s: float, limits: Mapping[str, int]) -> CompareConfig:
        """What ``remus --colo`` is given.

        :param limits: by the names of :data:`remus_colo.options.LIMITS`; the defaults for those that are missing.
        """
        fields: dict[str, Any] = {name.replace("-", "_"): number for name, number in limits.items()}
        if "idle_flow_ms" in fields:
            fields["idle_flow_s"] = fields.pop("idle_flow_ms") / 1000
        return cls(compare_timeout_s=compare_timeout_s, **fields)


@dataclass(slots=True)
class Counters:
    """What the comparator has done so far; ``held``, ``held_bytes`` and ``flows`` are as of now.

    :ivar released_equal: packets released because the SVM agreed.
    :ivar released_commit: packets released because their epoch was committed.
    :ivar released_passed: packets that are not compared (ARP and the like), or that left by or after ``release_all()``.
    :ivar diverged: differences found: contents that differ, and time-outs.
    :ivar secondary_dropped: SVM packets that were never compared: link chatter, over a limit, aged, or sent
        around a cut.
    :ivar malformed: packets of either side that could not be parsed.
    :ivar truncated: packets of either side that came cut off.
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
    truncated: int = 0
    flows: int = 0


_COUNTERS = tuple(Counters.__dataclass_fields__)


def nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def make_config(ffi: Any, config: CompareConfig) -> Any:
    """``struct colo_config``, with a new secret."""
    seed = os.urandom(16)
    return ffi.new(
        "struct colo_config *",
        {
            "compare_timeout_ns": nanoseconds(config.compare_timeout_s),
            "idle_flow_ns": nanoseconds(config.idle_flow_s),
            "held_bytes": config.held_bytes,
            "held_packets": config.held_packets,
            "flows": config.flows,
            "secondary_bytes": config.secondary_bytes,
            "own_sequence": 2 if config.before_rewriter else int(config.own_sequence),
            "seed": (int.from_bytes(seed[:8], "little"), int.from_bytes(seed[8:], "little")),
        },
    )


class Comparator:
    """Compares the output of PVM and SVM.

    :param now_s: the SVM runs, and is a copy of the PVM, as of now.
    :raise HostError: the compiled part is missing and cannot be built.
    """

    def __init__(self, config: CompareConfig, now_s: float) -> None:
        module = compare_module.load()
        self._ffi, self._lib = module.ffi, module.lib
        handle = self._lib.colo_new(make_config(self._ffi, config), nanoseconds(now_s))
        if handle == self._ffi.NULL:
            raise MemoryError("no memory for a comparator")
        self._colo = self._ffi.gc(handle, self._lib.colo_free)
        self._frame = self._ffi.new("struct colo_frame *")
        self._out = self._ffi.new("struct colo_release **")
        self._out_const = self._ffi.cast("const struct colo_release **", self._out)

    @property
    def native(self) -> Any:
        """The ``struct colo *``, for a C loop of the same module; valid as long as this object lives."""
        return self._colo

    # -- what the VMs send ------------------------------------------------------------------------

    def primary(
        self,
        now_s: float,
        packet_id: int,
        packet: bytes,
        ethertype: int = 0x0800,
        *,
        vlan: int = 0,
        wire_size: int = 0,
    ) -> Decision:
        """Take a packet that the PVM sent; it is held until its id is in a :class:`Decision`.

        :param packet_id: unique among the held packets, below 2**64.
        :param packet: from the network header on.
        :param vlan: VLAN id that was taken out of the frame, 0 for none.
        :param wire_size: bytes that the packet had, if the reader cut some off.
        """
        self._lib.colo_primary(
            self._colo, nanoseconds(now_s), packet_id, self._as_frame(packet, ethertype, vlan, wire_size)
        )
        return self.take()

    def secondary(
        self, now_s: float, packet: bytes, ethertype: int = 0x0800, *, vlan: int = 0, wire_size: int = 0
    ) -> Decision:
        """Take a packet that the SVM sent, in the PVM's sequence space.

        :param packet: from the network header on; may be a superpacket of several segments.
        """
        self._lib.colo_secondary(
            self._colo, nanoseconds(now_s), self._as_frame(packet, ethertype, vlan, wire_size)
        )
        return self.take()

    def tick(self, now_s: float) -> Decision:
        """Act on what is due at ``now_s``: time-outs, ageing, idle flows."""
        self._lib.colo_tick(self._colo, nanoseconds(now_s))
        return self.take()

    @property
    def next_deadline_s(self) -> float | None:
        """When :meth:`tick` has something to ask for next; None if not before another call."""
        deadline_ns: int = self._lib.colo_deadline(self._colo)
        if deadline_ns == self._lib.COLO_NEVER:
            return None
        deadline_s = deadline_ns / 1e9
        while nanoseconds(deadline_s) < deadline_ns:  # a tick at what is rounded down would come too early
            deadline_s = math.nextafter(deadline_s, math.inf)
        return deadline_s

    @property
    def oldest_s(self) -> float | None:
        """When the oldest of the packets that are held came; None if none is held."""
        oldest_ns: int = self._lib.colo_oldest(self._colo)
        return None if oldest_ns == self._lib.COLO_NEVER else oldest_ns / 1e9

    # -- checkpoints --------------------------------------------------------------------------------

    def cut(self, now_s: float) -> int:
        """Close the epoch: the PVM is paused, and all that it sent has been given to :meth:`primary`.

        The SVM's output is ignored until :meth:`secondary_resumed`.

        :return: packets held for the closing epoch.
        :raise StateError: the last cut is neither committed nor aborted.
        """
        held = int(self._lib.colo_cut(self._colo, nanoseconds(now_s)))
        if held < 0:
            raise StateError("cut() with an uncommitted cut: call commit() or abort_cut() first")
        return held

    def commit(self, now_s: float) -> Decision:
        """The backup has acknowledged the checkpoint of the last :meth:`cut`: what was held for it leaves.

        :raise StateError: there is no uncommitted cut.
        """
        if self._lib.colo_commit(self._colo, nanoseconds(now_s)) < 0:
            raise StateError("commit() without an uncommitted cut: call cut() first")
        return self.take()

    def secondary_resumed(self, now_s: float) -> Decision:
        """The SVM, a copy of the PVM as of the cut, runs: its output counts again, and time-outs start now."""
        self._lib.colo_secondary_resumed(self._colo, nanoseconds(now_s))
        return self.take()

    def abort_cut(self, now_s: float) -> Decision:
        """The checkpoint of the last :meth:`cut` did not take place: both VMs go on as they were.

        What the PVM sent since is compared with the old SVM, like what the closing epoch held.  Time-outs start now.

        :raise StateError: there is no uncommitted cut, or :meth:`secondary_resumed` said that it took place.
        """
        if self._lib.colo_abort_cut(self._colo, nanoseconds(now_s)) < 0:
            raise StateError("abort_cut() without an uncommitted cut, or after secondary_resumed()")
        return self.take()

    def release_all(self, now_s: float) -> Decision:
        """Protection has ended: everything leaves, and from now on at once."""
        self._lib.colo_release_all(self._colo, nanoseconds(now_s))
        return self.take()

    def take(self) -> Decision:
        """What has been decided since the last call; of use to who lets a C loop call the comparator."""
        lib, colo = self._lib, self._colo
        count = lib.colo_released(colo, self._out_const)
        reason = lib.colo_requested(colo)
        if not count and not reason:
            return _NOTHING
        request = None
        if reason:
            detail = self._ffi.new("char[]", _DETAIL_BYTES)
            lib.colo_request(colo, detail, _DETAIL_BYTES)
            request = CheckpointRequest(REASONS[reason - 1], self._ffi.string(detail).decode())
        out = self._out[0]
        decision = Decision(
            tuple(out[index].id for index in range(count)),
            request,
            tuple(out[index].how for index in range(count)),
        )
        lib.colo_drained(colo)
        return decision

    # -- what people and tests look at ------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        """A copy of the counters as of now."""
        raw = self._ffi.new("struct colo_counters *")
        self._lib.colo_counters(self._colo, raw)
        return Counters(*(getattr(raw, name) for name in _COUNTERS))

    def waits_for(self, packet_id: int) -> str | None:
        """What a held packet waits for, in words for people; None if it is not held."""
        text = self._ffi.new("char[]", _DETAIL_BYTES)
        if self._lib.colo_waits_for(self._colo, packet_id, text, _DETAIL_BYTES) < 0:
            return None
        return str(self._ffi.string(text).decode())

    def check_invariants(self) -> None:
        """Costs time in proportion to everything that is known: for tests.

        :raise AssertionError: a state that must not be.
        """
        wrong = self._lib.colo_check(self._colo)
        if wrong != self._ffi.NULL:
            raise AssertionError(self._ffi.string(wrong).decode())

    def _as_frame(self, packet: bytes, ethertype: int, vlan: int, wire_size: int) -> Any:
        frame = self._frame
        frame.data = self._ffi.from_buffer("uint8_t[]", packet)
        frame.size = len(packet)
        frame.wire_size = wire_size
        frame.ethertype = ethertype
        frame.vlan = vlan
        return frame


def describe(packet: bytes, ethertype: int = 0x0800, *, vlan: int = 0) -> tuple[bool, str]:
    """Whether a packet is compared, and its flow, or what it is, in words for people."""
    module = compare_module.load()
    text = module.ffi.new("char[]", _DETAIL_BYTES)
    frame = module.ffi.new(
        "struct colo_frame *", (module.ffi.from_buffer("uint8_t[]", packet), len(packet), 0, ethertype, vlan)
    )
    compared = module.lib.colo_describe(frame, text, _DETAIL_BYTES)
    return bool(compared), str(module.ffi.string(text).decode())
