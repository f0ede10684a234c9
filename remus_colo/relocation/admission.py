# SPDX-License-Identifier: LGPL-2.1-or-later
"""How many connections may be under way to a session at a time, and how often refusals are worth a line in the log.

No I/O; time is an argument.
"""

from __future__ import annotations

import collections
import threading

# Of all places; a host that protects several domains at once needs two for each, for some seconds.
SHARE_PER_HOST = 0.25


class Admission:
    """Places for connections that are no session yet: so many, and a part of them for one host.  Thread-safe.

    A host that is slow, broken or hostile keeps neither memory nor threads beyond its part, and leaves places
    to the others.

    :param limit: places.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.limit_per_host = max(1, int(limit * SHARE_PER_HOST))
        self._lock = threading.Lock()
        self._taken: collections.Counter[str] = collections.Counter()

    def enter(self, host: str) -> str | None:
        """Take a place.

        :return: why there is none, or None if there was.
        """
        with self._lock:
            if self._taken[host] >= self.limit_per_host:
                return f"{self.limit_per_host} of its connections are half open already"
            if self._taken.total() >= self.limit:
                return f"{self.limit} connections are half open already"
            self._taken[host] += 1
        return None

    def leave(self, host: str) -> None:
        """Give a place back."""
        with self._lock:
            self._taken[host] -= 1
            # or the counter would grow by one entry for each address that ever came
            if self._taken[host] <= 0:
                del self._taken[host]

    def taken(self) -> int:
        with self._lock:
            return self._taken.total()


class Throttle:
    """Lets so many through in a while, and counts the others.  Thread-safe.

    A host that knocks without end uses that up.  So the first time of each of so many hosts passes, too.

    :param burst: how many in ``window_s`` seconds.
    """

    def __init__(self, burst: int = 20, window_s: float = 10.0) -> None:
        self._burst = burst
        self._window_s = window_s
        self._lock = threading.Lock()
        self._began_s = float("-inf")
        self._passed = 0
        self._dropped = 0
        self._hosts: set[str] = set()

    def passes(self, host: str, now_s: float) -> int | None:
        """Whether this one may pass.

        :return: None if not; else how many have been dropped since the last one that passed.
        """
        with self._lock:
            if now_s - self._began_s >= self._window_s:
                self._began_s, self._passed = now_s, 0
                self._hosts.clear()
            first = host not in self._hosts and len(self._hosts) < self._burst
            if self._passed >= self._burst and not first:
                self._dropped += 1
                return None
            self._passed += 1
            if first:
                self._hosts.add(host)
            dropped, self._dropped = self._dropped, 0
            return dropped
