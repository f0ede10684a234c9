# SPDX-License-Identifier: LGPL-2.1-or-later
"""A ``remus`` or ``remusd`` that runs in a dom0, with what it prints and the events that it logs.

Both are read as they are written, so what is known of a host that lost its power is known here.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Self

from remus_colo.testbed.bed import Bed
from remus_colo.testbed.errors import BedError, BedTimeout
from remus_colo.testbed.remote_process import RemoteProcess

# From the end of a command to the last of its lines here: ssh under emulation.
DRAIN_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 120.0
# How soon a waiter notices that the command has ended; events wake it at once.
_LOOK_S = 0.5
_SHOWN_LINES = 15

Event = dict[str, Any]


class Run:
    """One command under way.

    :param host: whose dom0 it runs in.
    :param command: ``remus`` or ``remusd`` with its options; ``--log`` is added.
    :param log: path of its event log, there.
    """

    def __init__(self, bed: Bed, host: str, command: str, log: str) -> None:
        self.host = host
        self.command = command
        self.events: list[Event] = []
        self.output: deque[str] = deque(maxlen=5000)
        self._bed = bed
        self._log = log
        self._arrived = threading.Condition()
        self._drained = False
        bed.exec(host, f": > {log}")
        self._tail = bed.popen(host, f"tail -n +1 -f {log}", stderr=subprocess.DEVNULL)
        self._process = bed.popen(host, f"{command} --log {log}", stderr=subprocess.STDOUT)
        self._readers = [
            _reader(self._tail, self._take_event),
            _reader(self._process, self.output.append),
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_event(self, line: str) -> None:
        event = json.loads(line)
        with self._arrived:
            self.events.append(event)
            self._arrived.notify_all()

    # -- waiting

    @property
    def pid(self) -> int:
        """In dom0."""
        return self._process.pid

    def running(self) -> bool:
        return self._process.poll() is None

    def wait_event(self, name: str, timeout_s: float, *, after: int = 0, **fields: Any) -> Event:
        """The first event of that name and with these fields.

        :param after: index in :attr:`events` to begin at.
        :raise BedError: the command ended without; :raise BedTimeout: it has not come in time.
        """

        def find() -> Event | None:
            for event in self.events[after:]:
                if event["event"] == name and all(event.get(key) == value for key, value in fields.items()):
                    return event
            return None

        deadline_s = time.monotonic() + timeout_s
        while True:
            alive = self.running()
            if not alive:
                self._drain()
            with self._arrived:
                if (event := find()) is not None:
                    return event
                if not alive:
                    raise BedError(f"'{self.command}' ended without the event '{name}'; {self.tail()}")
                remaining_s = deadline_s - time.monotonic()
                if remaining_s <= 0:
                    raise BedTimeout(
                        f"no event '{name}' of '{self.command}' within {timeout_s:g} s; {self.tail()}"
                    )
                self._arrived.wait(min(remaining_s, _LOOK_S))

    def wait(self, timeout_s: float) -> int:
        """Its exit status, with all events and output here.

        :raise BedTimeout: it is still running.
        """
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as cause:
            raise BedTimeout(f"'{self.command}' did not end within {timeout_s:g} s; {self.tail()}") from cause
        self._drain()
        return status

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """SIGTERM, and its exit status."""
        self._process.signal(signal.SIGTERM)
        return self.wait(timeout_s)

    def _drain(self) -> None:
        """The command has ended: wait until the last of its events is here."""
        self._readers[1].join(DRAIN_TIMEOUT_S)
        if self._drained:
            return
        self._drained = True
        if self._bed.hosts[self.host].state() != "ready":
            self._readers[0].join(DRAIN_TIMEOUT_S)
            return
        count = int(self._bed.exec(self.host, f"wc -l < {self._log}").stdout)
        deadline_s = time.monotonic() + DRAIN_TIMEOUT_S
        with self._arrived:
            while len(self.events) < count and self._readers[0].is_alive() and time.monotonic() < deadline_s:
                self._arrived.wait(_LOOK_S)

    # -- the end

    def tail(self) -> str:
        """The end of what it said, for an error's message."""
        telling = [event for event in self.events if event["event"] != "counters"]
        events = "\n".join(json.dumps(event) for event in telling[-_SHOWN_LINES:])
        printed = "\n".join(list(self.output)[-_SHOWN_LINES:])
        return f"its last events:\n{events}\nits last output:\n{printed}"

    def close(self) -> None:
        """Ends it at once, if it still runs."""
        for process in (self._process, self._tail):
            if self._bed.hosts[self.host].state() == "off":
                # Its connection was ended with it; what is left here follows by itself.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(DRAIN_TIMEOUT_S)
            process.kill()


def _reader(process: RemoteProcess, take: Callable[[str], object]) -> threading.Thread:
    """A thread that hands over each line of a program's stdout."""

    def read() -> None:
        for line in process.stdout:
            if line.endswith(b"\n"):  # the last one of a host that died may be cut off
                take(line.decode(errors="replace").rstrip("\n"))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def words(options: dict[str, Any]) -> list[str]:
    """Keyword arguments as command-line options: ``random_every=2`` is ``--random-every 2``, True a flag."""
    made: list[str] = []
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if value is True:
            made.append(option)
        elif value is not None and value is not False:
            made += [option, str(value)]
    return made
