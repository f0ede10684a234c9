# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a client may believe of redis: no acknowledged increment is ever lost, and none is made twice.  Pure."""

from __future__ import annotations

import re

from remus_colo.testbed.load_check import Verdict, out_of_step, shown

# ":", at most 20 digits, CR LF: the longest integer reply of the redis protocol.
_INTEGER_LINE_BYTES = 23
_INTEGER_LINE = re.compile(rb":(0|[1-9][0-9]*)\r\n")


class Counter:
    """What the client may believe about one redis key that only it increments.

    Outlives the connections that it is incremented over.  An increment whose reply never came may have been made
    or not: ``unknown`` counts those.

    :ivar acknowledged: the value that the server last answered.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.acknowledged = 0
        self.unknown = 0

    def replied(self, value: int) -> Verdict:
        """The server answered an increment with ``value``."""
        lowest = self.acknowledged + 1
        highest = lowest + self.unknown
        # From here on the server's word counts, so that one loss is not reported for each later reply.
        self.acknowledged, self.unknown = value, 0
        return self._judge(value, lowest, highest)

    def finally_is(self, value: int) -> Verdict:
        """A read after the load found ``value``, 0 for no such key."""
        return self._judge(value, self.acknowledged, self.acknowledged + self.unknown)

    def _judge(self, value: int, lowest: int, highest: int) -> Verdict:
        lost, repeated = max(0, lowest - value), max(0, value - highest)
        allowed = str(lowest) if lowest == highest else f"{lowest} to {highest}"
        fault = f"{self.key} is {value}, not {allowed}" if lost or repeated else ""
        return Verdict(lost_writes=lost, repeated_writes=repeated, fault=fault)


class IncrementCheck:
    """INCR of one key, one at a time."""

    def __init__(self, counter: Counter) -> None:
        self.counter = counter
        self.outstanding = 0
        self._line = b""

    def request(self) -> bytes:
        self.outstanding += 1
        key = self.counter.key
        return f"*2\r\n$4\r\nINCR\r\n${len(key)}\r\n{key}\r\n".encode()

    def feed(self, data: bytes) -> Verdict:
        total = Verdict()
        self._line += data
        while self._line:
            end = self._line.find(b"\n") + 1
            if not end and len(self._line) <= _INTEGER_LINE_BYTES:
                return total
            line = self._line[: end or None]
            match = _INTEGER_LINE.fullmatch(line)
            if not match or not self.outstanding:
                total.wrong_bytes += len(line)
                return out_of_step(total, f"no answer to an increment: {shown(line)}")
            self._line = self._line[end:]
            self.outstanding -= 1
            verdict = self.counter.replied(int(match[1]))
            total.completed += 1
            total.lost_writes += verdict.lost_writes
            total.repeated_writes += verdict.repeated_writes
            total.fault = total.fault or verdict.fault
        return total

    def broken(self) -> None:
        self.counter.unknown += self.outstanding
        self.outstanding = 0
        self._line = b""
