# SPDX-License-Identifier: LGPL-2.1-or-later
"""Puts a client's load on the test bed's guest, and checks every byte that comes back.

::

    python3 -m remus_colo.testbed.load --target 10.77.0.10 --seconds 60

Prints the figures, and as the last line all of them as one JSON object; so too when SIGTERM or SIGINT ends the load
early.  Exit status: 0 if a client had nothing to complain of, 1 if it had, 2 for wrong options, 3 if the guest
did not answer at the start.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import secrets
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TextIO

from remus_colo.errors import ExitStatus, NetworkError, RemusError
from remus_colo.testbed import load_content, load_report, load_verify
from remus_colo.testbed.arguments import count, not_negative, positive
from remus_colo.testbed.load_check import Check, EchoCheck, HttpCheck, VolatileCheck
from remus_colo.testbed.load_counter import Counter, IncrementCheck
from remus_colo.testbed.load_datagram import DatagramWorker
from remus_colo.testbed.load_link import Pace, Task, Worker

# Chunks that an echo stream has under way at once.
_ECHO_DEPTH = 4
_PROGRESS_PERIOD_S = 1.0
_DEFAULT_SIZES = "1k,1k,10k,1k,1k,10k,1k,100k"


class Load:
    """One run: its connections, its redis keys, its figures."""

    def __init__(self, options: argparse.Namespace, log: TextIO | None) -> None:
        self._options = options
        self._run = secrets.token_hex(4)
        self._counters: list[Counter] = []
        self._churned = 0
        self._one_shots: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()
        self._failure: BaseException | None = None
        wanted = {
            "redis": options.redis, "http": options.http, "echo": options.echo, "udp": options.udp,
            "churn": options.churn, "random": options.random_every, "time": options.time_every,
        }  # fmt: skip
        services = [name for name, amount in wanted.items() if amount]
        self.recorder = load_report.Recorder(services, options.gap_ms / 1e3, log)

    async def run(self) -> dict[str, object]:
        """Runs the load to its end; returns the result.

        :raises NetworkError: a connection could not be made at the start.
        """
        options = self._options
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.set_exception_handler(self._failed_inside)
        workers = list(self._workers())
        opened = await asyncio.gather(*(worker.open() for worker, _ in workers))
        if not all(opened):
            missing = opened.count(False)
            raise NetworkError(
                f"{missing} of {len(opened)} connections to {options.target} could not be made: is the guest up?"
            )
        self.recorder.start(time.monotonic(), self._run)
        running = {asyncio.create_task(worker.run(first_after_s)) for worker, first_after_s in workers}
        helpers = [asyncio.create_task(helper) for helper in self._helpers()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(options.seconds):
                await self._stop.wait()
        for helper in helpers:
            helper.cancel()
        for worker, _ in workers:
            worker.stop()
        await self._drain(running | self._one_shots)
        self.recorder.close(time.monotonic())
        if self._failure:
            raise self._failure
        if self._counters:
            service = "redis" if options.redis else "churn"
            address = (options.target, options.redis_port)
            self.recorder.redis_verified = await load_verify.verify(
                self.recorder, service, address, self._counters, options.timeout
            )
        for counter in self._counters:
            self.recorder.services["redis" if options.redis else "churn"].unknown_writes += counter.unknown
        return self.recorder.result()

    def _failed_inside(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A bug of ours in a callback: the load must not go on and look well."""
        self._failure = self._failure or context.get("exception") or RuntimeError(context["message"])
        self._stop.set()

    async def _drain(self, running: set[asyncio.Task[None]]) -> None:
        """Lets requests under way end, then ends the rest; a failure inside the load itself comes out here."""
        if running:
            _, late = await asyncio.wait(running, timeout=self._options.drain)
            for task in late:
                task.cancel()
        for outcome in await asyncio.gather(*running, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    def _workers(self) -> Iterator[tuple[Worker | DatagramWorker, float]]:
        """All standing connections, with the delay before their first request, which spreads them evenly."""
        options = self._options
        period_s = 1 / options.rate if options.rate else 0.0
        pace = Pace(period_s=period_s, timeout_s=options.timeout)
        deep = Pace(_ECHO_DEPTH, period_s * _ECHO_DEPTH, options.timeout)
        plan: list[tuple[Task, Pace]] = []
        for i in range(options.redis):
            plan.append((self._task("redis", i, self._increments(f"redis-{i}"), pace), pace))
        for i in range(options.http):
            plan.append((self._task("http", i, self._gets(i), pace), pace))
        for i in range(options.echo):
            plan.append((self._task("echo", i, self._echoes(f"echo-{i}"), deep), deep))
        for i, (task, its_pace) in enumerate(plan):
            yield Worker(self.recorder, task), its_pace.period_s * i / len(plan)
        for i in range(options.udp):
            task = self._task("udp", i, self._echoes(f"udp-{i}"), pace)
            yield DatagramWorker(self.recorder, task), period_s * i / options.udp
        for name in ("random", "time"):
            every_s = getattr(options, f"{name}_every")
            if every_s:
                task = self._task(
                    name, 0, self._volatile(name), Pace(period_s=every_s, timeout_s=options.timeout)
                )
                yield Worker(self.recorder, task), every_s

    def _task(
        self, service: str, number: int, new_check: Callable[[int], Check], pace: Pace, kind: str = ""
    ) -> Task:
        options = self._options
        ports = {
            "redis": options.redis_port, "http": options.http_port, "random": options.http_port,
            "time": options.http_port, "echo": options.echo_port, "udp": options.echo_port,
        }  # fmt: skip
        address = (options.target, ports[kind or service])
        on_reply = self._read_clock if service == "time" else lambda check, sent_s, now_s: None
        return Task(service, f"{service}-{number}", address, new_check, pace, on_reply)

    def _increments(self, name: str) -> Callable[[int], Check]:
        counter = Counter(f"load:{self._run}:{name}")
        self._counters.append(counter)
        return lambda connection: IncrementCheck(counter)

    def _gets(self, start: int) -> Callable[[int], Check]:
        return lambda connection: HttpCheck(self._options.sizes, start + connection)

    def _echoes(self, name: str) -> Callable[[int], Check]:
        return lambda connection: EchoCheck(f"{self._run}:{name}:{connection}")

    def _volatile(self, name: str) -> Callable[[int], Check]:
        check = VolatileCheck(name)  # one for all connections, since it remembers earlier answers
        return lambda connection: check

    def _read_clock(self, check: Check, sent_s: float, now_s: float) -> None:
        assert isinstance(check, VolatileCheck)
        self.recorder.clock.read(check.guest_time_ns, sent_s, now_s)

    def _helpers(self) -> Iterator[Coroutine[Any, Any, None]]:
        if self._options.progress:
            yield self._report_progress()
        if self._options.churn:
            yield self._churn()

    async def _report_progress(self) -> None:
        while True:
            await asyncio.sleep(_PROGRESS_PERIOD_S)
            print(json.dumps(self.recorder.progress(time.monotonic())), flush=True)

    async def _churn(self) -> None:
        """Opens short-lived connections at an even rate, of each kind in turn."""
        pace = Pace(timeout_s=self._options.timeout)
        while True:
            number = self._churned
            self._churned += 1
            kind = ("redis", "http", "echo")[number % 3]
            if kind == "redis":
                new_check = self._increments(f"churn-{number}")
            elif kind == "http":
                new_check = self._gets(number)
            else:
                new_check = self._echoes(f"churn-{number}")
            task = self._task("churn", number, new_check, pace, kind)
            one_shot = asyncio.create_task(Worker(self.recorder, task).once())
            self._one_shots.add(one_shot)
            one_shot.add_done_callback(self._one_shots.discard)
            await asyncio.sleep(1 / self._options.churn)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    description = "Puts load on the test bed's guest and checks every byte that comes back."
    made = argparse.ArgumentParser(prog="python3 -m remus_colo.testbed.load", description=description)
    add = made.add_argument
    add("--target", required=True, metavar="ADDRESS", help="the guest's address")
    add("--seconds", type=positive, required=True, help="how long")
    add("--redis", type=count, default=8, metavar="N", help="connections that do INCR (%(default)s)")
    add("--http", type=count, default=8, metavar="N", help="connections that GET static files (%(default)s)")
    add("--echo", type=count, default=4, metavar="N", help="pipelined TCP echo streams (%(default)s)")
    add("--udp", type=count, default=0, metavar="N", help="UDP echo sockets (%(default)s)")
    add("--rate", type=not_negative, default=10.0, metavar="R",
        help="requests per second and connection, 0 for as fast as replies come (%(default)s)")  # fmt: skip
    add("--sizes", type=_sizes, default=_DEFAULT_SIZES, metavar="NAMES",
        help=f"files that a connection asks for in turn, of {', '.join(load_content.SIZES)} (%(default)s)")  # fmt: skip
    add("--churn", type=not_negative, default=0.0, metavar="N",
        help="short-lived connections per second: connect, one request, close (%(default)s)")  # fmt: skip
    add("--random-every", type=not_negative, default=0.0, metavar="S", help="GET /random each S seconds")
    add("--time-every", type=not_negative, default=0.0, metavar="S", help="GET /time each S seconds")
    add("--timeout", type=positive, default=60.0, metavar="S",
        help="a reply or connection that takes longer is an error (%(default)s)")  # fmt: skip
    add("--drain", type=positive, default=10.0, metavar="S",
        help="how long to wait for outstanding replies at the end (%(default)s)")  # fmt: skip
    add("--gap-ms", type=positive, default=200.0, metavar="MS", help="log longer gaps (%(default)s)")
    add("--log", metavar="FILE", help="write gaps and errors as JSON lines")
    add("--progress", action="store_true", help="print a JSON line each second")
    add("--json", action="store_true", help="print no table, only the JSON object")
    add("--redis-port", type=int, default=6379, help=argparse.SUPPRESS)
    add("--http-port", type=int, default=80, help=argparse.SUPPRESS)
    add("--echo-port", type=int, default=7, help=argparse.SUPPRESS)
    return made


def main(arguments: list[str] | None = None) -> int:
    made = parser()
    options = made.parse_args(arguments)
    if not any((options.redis, options.http, options.echo, options.udp, options.churn)):
        made.error("no load: all kinds of connection are 0")
    try:
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(open(options.log, "w")) if options.log else None
            result = asyncio.run(_run(options, log))
    except RemusError as error:
        print(f"load: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"load: {error}", file=sys.stderr)
        return ExitStatus.FAILURE
    if not options.json:
        print(load_report.table(result))
    print(json.dumps(result), flush=True)
    return ExitStatus.OK if load_report.clean(result) else ExitStatus.FAILURE


async def _run(options: argparse.Namespace, log: TextIO | None) -> dict[str, object]:
    return await Load(options, log).run()


def _sizes(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in load_content.SIZES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(load_content.SIZES)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
