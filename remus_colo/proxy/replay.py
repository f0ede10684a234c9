# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run the comparator over two captures, one of what each VM sent: ``python -m remus_colo.proxy.replay``.

The captures' timestamps are the only clock, so the result is always the same.  Times in it are milliseconds since the
first packet of both captures.  At one moment the order is: what is due, the PVM's packets, the SVM's.

A checkpoint that is asked for begins at once: the epoch is cut, so that what the PVM sends from then on belongs to the
next one.  It completes ``--checkpoint-ms`` later: what was held for the closed epoch leaves, and the SVM goes on as a
copy of the PVM; what it sent meanwhile is dropped.  See ``docs/comparison.rst``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from remus_colo.errors import RemusError
from remus_colo.proxy.comparator import (
    CheckpointRequest,
    Comparator,
    CompareConfig,
    Decision,
    How,
    Reason,
    describe,
    nanoseconds,
)
from remus_colo.proxy.pcap import Capture, Record
from remus_colo.proxy.shown import Packet, carried, first_difference, whole
from remus_colo.proxy.vantage import before_rewriter

ETHERNET_BYTES = 14
ETHERTYPE_IPV4 = 0x0800
LONGER_THAN_ANY_S = 1e9
# How many of the SVM's latest packets an explanation looks through for the one that was meant to be equal.
NEAREST_OF = 1000


@dataclass(frozen=True, slots=True)
class ReplayConfig:
    """:ivar tail_s: how long to go on behind the last packet; None for until nothing can change any more."""

    compare: CompareConfig = field(default_factory=lambda: CompareConfig(own_sequence=True))
    checkpoint_s: float = 0.0
    tail_s: float | None = None


@dataclass(slots=True)
class Fate:
    fate: str = "held"
    at_ns: int = 0
    why: str = ""


@dataclass(slots=True)
class Checkpoint:
    """:ivar waiting: the PVM's oldest packet that was held when it was asked for; -1 for none."""

    at_ns: int
    request: CheckpointRequest
    waiting: int = -1
    seen: int = 0  # packets of the SVM that had come


@dataclass(slots=True)
class Result:
    fates: list[Fate]
    checkpoints: list[Checkpoint] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "packets": [
                {"index": index, "fate": fate.fate, "at_ms": milliseconds(fate.at_ns), "why": fate.why}
                for index, fate in enumerate(self.fates)
            ],
            "checkpoints": [
                {"at_ms": milliseconds(checkpoint.at_ns), "reason": checkpoint.request.reason.value}
                for checkpoint in self.checkpoints
            ],
            "counters": self.counters,
        }


def milliseconds(time_ns: int) -> float:
    return time_ns / 1_000_000


def split_frame(record: Record) -> tuple[bytes, int, int]:
    """What the comparator takes of an Ethernet frame: packet, ethertype, bytes that the packet had.

    A frame without a whole Ethernet header is handed over as it is, as a packet that cannot be parsed.
    """
    if len(record.frame) < ETHERNET_BYTES:
        return record.frame, ETHERTYPE_IPV4, max(record.wire_size, len(record.frame))
    ethertype = int.from_bytes(record.frame[12:14], "big")
    return record.frame[ETHERNET_BYTES:], ethertype, record.wire_size - ETHERNET_BYTES


def _packets(capture: Capture) -> Iterator[tuple[bytes, int]]:
    for index in range(len(capture)):
        yield split_frame(capture.record(index))[:2]


class Replay:
    """One run.

    :param primary: what the PVM sent.
    :param secondary: what the SVM sent, before or behind the rewriter.
    """

    def __init__(self, primary: Capture, secondary: Capture, config: ReplayConfig) -> None:
        self._primary, self._secondary = primary, secondary
        self._timeout_ns = nanoseconds(config.compare.compare_timeout_s)
        self._checkpoint_ns = nanoseconds(config.checkpoint_s)
        self._tail_ns = None if config.tail_s is None else nanoseconds(config.tail_s)
        compare = config.compare
        if compare.own_sequence:
            own = before_rewriter(_packets(primary), _packets(secondary))
            compare = dataclasses.replace(compare, own_sequence=own is not False, before_rewriter=bool(own))
            if own is not False:  # what a flow's SYNs have told of the SVM's numbers is not told again
                compare = dataclasses.replace(compare, idle_flow_s=LONGER_THAN_ANY_S)
        self._comparator = Comparator(compare, 0.0)
        self._commit_ns: int | None = None  # when the checkpoint under way completes
        self._pending: CheckpointRequest | None = None  # asked for meanwhile, of the new epoch
        self._oldest = self._seen = 0
        self.result = Result([Fate() for _ in range(len(primary))])

    def run(self) -> Result:
        time_ns = 0
        for time_ns, is_secondary, index in self._merged():
            self._run_until(time_ns)
            if is_secondary:
                self._seen = index + 1
                packet, ethertype, wire_size = split_frame(self._secondary.record(index))
                self._take(
                    time_ns, self._comparator.secondary(time_ns / 1e9, packet, ethertype, wire_size=wire_size)
                )
            else:
                packet, ethertype, wire_size = split_frame(self._primary.record(index))
                self._take(
                    time_ns,
                    self._comparator.primary(time_ns / 1e9, index, packet, ethertype, wire_size=wire_size),
                )
        tail_ns = 2 * (self._timeout_ns + self._checkpoint_ns) if self._tail_ns is None else self._tail_ns
        self._run_until(time_ns + tail_ns)
        self._finish(time_ns + tail_ns)
        return self.result

    def _merged(self) -> Iterator[tuple[int, bool, int]]:
        """Time since the first of all, side and index of all packets, in order; within a file, one moment's
        in its order.
        """
        both = [(time_ns, False, index) for index, time_ns in enumerate(self._primary.times_ns())]
        both += [(time_ns, True, index) for index, time_ns in enumerate(self._secondary.times_ns())]
        both.sort()
        for time_ns, is_secondary, index in both:
            yield time_ns - both[0][0], is_secondary, index

    def _run_until(self, time_ns: int) -> None:
        """Do all that is due up to and at ``time_ns``."""
        while True:
            deadline_s = self._comparator.next_deadline_s
            if self._commit_ns is not None and self._commit_ns <= time_ns:
                now_ns, self._commit_ns = self._commit_ns, None
                self._complete(now_ns)
            elif deadline_s is not None and nanoseconds(deadline_s) <= time_ns:
                self._take(nanoseconds(deadline_s), self._comparator.tick(deadline_s))
            else:
                return

    def _take(self, now_ns: int, decision: Decision, flushed: str = "") -> None:
        """:param flushed: why packets leave that leave by a checkpoint."""
        for index, how in zip(decision.release, decision.how, strict=True):
            if how == How.COMMITTED:
                fate = Fate("flushed", now_ns, flushed)
            elif how == How.PASSED:
                packet, ethertype, _ = split_frame(self._primary.record(index))
                fate = Fate("released", now_ns, f"not compared: {describe(packet, ethertype)[1]}")
            else:
                fate = Fate("released", now_ns, "the SVM has sent the same")
            self.result.fates[index] = fate
        if decision.checkpoint is None:
            return
        if self._commit_ns is None:
            self._begin(now_ns, decision.checkpoint)
        else:
            self._pending = decision.checkpoint

    def _begin(self, now_ns: int, request: CheckpointRequest) -> None:
        self.result.checkpoints.append(Checkpoint(now_ns, request, self._oldest_waiting(), self._seen))
        self._comparator.cut(now_ns / 1e9)
        self._commit_ns = now_ns + self._checkpoint_ns
        if self._checkpoint_ns == 0:
            self._run_until(now_ns)

    def _complete(self, now_ns: int) -> None:
        request = self.result.checkpoints[-1].request
        committed = self._comparator.commit(now_ns / 1e9)
        resumed = self._comparator.secondary_resumed(now_ns / 1e9)
        # What was asked for since the cut is about the new epoch, which this checkpoint does not cover.
        pending, self._pending = self._pending, None
        self._take(now_ns, dataclasses.replace(committed, checkpoint=committed.checkpoint or resumed.checkpoint or pending),
                   f"checkpoint: {request.reason.value}: {request.detail}")  # fmt: skip

    def _oldest_waiting(self) -> int:
        """The PVM's oldest packet that is held."""
        fates = self.result.fates
        for index in range(self._oldest, len(fates)):
            if fates[index].fate == "held":
                self._oldest = index
                return index if self._comparator.waits_for(index) is not None else -1
        return -1

    def _finish(self, end_ns: int) -> None:
        for index, fate in enumerate(self.result.fates):
            if fate.fate == "held":
                self.result.fates[index] = Fate("held", end_ns, self._comparator.waits_for(index) or "")
        self.result.counters = dataclasses.asdict(self._comparator.counters)


# -- for people ------------------------------------------------------------------------------------------


def explain(result: Result, primary: Capture, secondary: Capture, out: TextIO) -> None:
    """Say for each checkpoint what differed, and where."""
    if not result.checkpoints:
        print("nothing diverged: no checkpoint was asked for", file=out)
    for number, checkpoint in enumerate(result.checkpoints, 1):
        request = checkpoint.request
        print(f"checkpoint {number} at {milliseconds(checkpoint.at_ns)} ms: {request.reason.value}", file=out)
        print(f"  {request.detail}", file=out)
        if checkpoint.waiting >= 0:
            print(
                f"  the PVM's oldest packet that waited: {checkpoint.waiting} (in its file, from 0)", file=out
            )
        if request.reason in (
            Reason.UDP_PAYLOAD,
            Reason.UDP_TIMEOUT,
            Reason.ICMP_TIMEOUT,
            Reason.ICMP_PAYLOAD,
            Reason.OTHER_TIMEOUT,
        ):
            _explain_datagram(checkpoint, primary, secondary, out)


def _explain_datagram(checkpoint: Checkpoint, primary: Capture, secondary: Capture, out: TextIO) -> None:
    """The first byte in which a datagram differs from the SVM's most similar one of its flow."""
    if checkpoint.waiting < 0:
        return
    packet = _whole(primary, checkpoint.waiting)
    flow, mine = describe(*packet)[1], carried(*packet)
    best: tuple[int, int, bytes] | None = None
    for index in range(checkpoint.seen - 1, max(-1, checkpoint.seen - 1 - NEAREST_OF), -1):
        other = _whole(secondary, index)
        if describe(*other)[1] != flow:
            continue
        theirs = carried(*other)
        same = first_difference(mine, theirs)
        if same is not None and (best is None or same > best[0]):
            best = (same, index, theirs)
    if best is None:
        print("  the SVM has sent nothing else in that flow", file=out)
        return
    at, index, theirs = best
    print(f"  most similar: the SVM's packet {index}; first difference at byte {at} behind the IP header: "
          f"PVM {_byte(mine, at)}, SVM {_byte(theirs, at)}", file=out)  # fmt: skip


def _whole(capture: Capture, index: int) -> Packet:
    return whole(lambda at: split_frame(capture.record(at))[:2], len(capture), index)


def _byte(content: bytes, at: int) -> str:
    if at >= len(content):
        return "has ended"
    character = chr(content[at])
    return f"0x{content[at]:02x}" + (
        f" ({character})" if character.isascii() and character.isprintable() else ""
    )


# -- command line ----------------------------------------------------------------------------------------


def _duration(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a duration: give milliseconds, 0 or more")
    return value


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m remus_colo.proxy.replay",
        description="Compare what two copies of a guest sent, as remus --colo would have; prints one JSON object.",
    )
    p.add_argument("primary", metavar="PRIMARY.pcap", help="what the PVM sent (Ethernet, pcap)")
    p.add_argument(
        "secondary", metavar="SECONDARY.pcap", help="what the SVM sent, before or behind the rewriter"
    )
    p.add_argument("--compare-timeout", metavar="MS", type=_duration, default=1000.0,
                   help="how long a packet waits for its equal before a checkpoint is asked for (%(default)s)")  # fmt: skip
    p.add_argument("--checkpoint-ms", metavar="MS", type=_duration, default=0.0,
                   help="how long a checkpoint takes (%(default)s)")  # fmt: skip
    p.add_argument("--tail", metavar="MS", type=_duration, default=None,
                   help="how long to go on behind the last packet (default: until nothing can change any more)")  # fmt: skip
    p.add_argument("--explain", action="store_true", help="say for people what differed (on standard error)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    config = ReplayConfig(
        CompareConfig(compare_timeout_s=options.compare_timeout / 1000, own_sequence=True),
        options.checkpoint_ms / 1000,
        None if options.tail is None else options.tail / 1000,
    )
    try:
        primary, secondary = Capture(options.primary), Capture(options.secondary)
        for capture in (primary, secondary):
            if capture.cut:
                print(
                    f"replay: {capture.path} ends within packet {len(capture)}, which is left out",
                    file=sys.stderr,
                )
        result = Replay(primary, secondary, config).run()
    except RemusError as error:
        print(f"replay: {error}", file=sys.stderr)
        return int(error.exit_status)
    json.dump(result.as_json(), sys.stdout, indent=1)
    print()
    if options.explain:
        explain(result, primary, secondary, sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
