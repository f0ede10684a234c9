# SPDX-License-Identifier: LGPL-2.1-or-later
"""The whole load against small servers that serve as the guest does, until told to go wrong in one way."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from remus_colo.errors import NetworkError
from remus_colo.testbed import load, load_content, load_report
from remus_colo.testbed.load_check import EchoCheck

# What becomes of a reply: the bytes to send, or None to reset the connection. Gets the reply and its number.
Tamper = Callable[[bytes, int], "bytes | None"]
SILENCE = b""
# Replies after which what goes wrong in an earlier one has shown.
ENOUGH = 12
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Guest:
    """redis, web and echo server on ports of their own; ``tamper`` goes over every reply of a service."""

    def __init__(self, **tamper: Tamper) -> None:
        self.keys: dict[bytes, int] = {}
        self.ports: dict[str, int] = {}
        self._tamper = tamper
        self._numbers = {"redis": 0, "get": 0, "http": 0, "echo": 0, "udp": 0}
        self._random = 0
        self._connections: set[asyncio.Task[None]] = set()
        self.until: str | None = None

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Guest]:
        handlers = {"redis": self._redis, "http": self._http, "echo": self._echo}
        servers = {
            name: await asyncio.start_server(functools.partial(self._serve, handler), "127.0.0.1", 0)
            for name, handler in handlers.items()
        }
        self.ports = {name: server.sockets[0].getsockname()[1] for name, server in servers.items()}
        loop = asyncio.get_running_loop()
        datagrams, _ = await loop.create_datagram_endpoint(
            lambda: Datagrams(self), local_addr=("127.0.0.1", self.ports["echo"])
        )
        try:
            yield self
        finally:
            datagrams.close()
            for server in servers.values():
                server.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(
        self, handler: Handler, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task
        self._connections.add(task)
        try:
            with contextlib.suppress(EOFError, OSError):
                await handler(reader, writer)
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def reply(self, service: str, right: bytes) -> bytes | None:
        number = self._numbers[service]
        self._numbers[service] += 1
        if service == self.until and number == ENOUGH:
            os.kill(os.getpid(), signal.SIGTERM)  # ends the load, as a user would
        return self._tamper.get(service, lambda reply, number: reply)(right, number)

    def _send(self, writer: asyncio.StreamWriter, service: str, right: bytes) -> None:
        data = self.reply(service, right)
        if data is None:
            writer.transport.abort()
        else:
            writer.write(data)

    async def _redis(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            words = []
            for _ in range(int((await reader.readuntil())[1:])):
                length = int((await reader.readuntil())[1:])
                words.append((await reader.readexactly(length + 2))[:-2])
            if words[0] == b"INCR":
                self.keys[words[1]] = self.keys.get(words[1], 0) + 1
                self._send(writer, "redis", b":%d\r\n" % self.keys[words[1]])
            elif words[1] in self.keys:
                value = b"%d" % self.keys[words[1]]
                self._send(writer, "get", b"$%d\r\n%s\r\n" % (len(value), value))
            else:
                self._send(writer, "get", b"$-1\r\n")

    async def _http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            name = (await reader.readuntil(b"\r\n\r\n")).split()[1][1:].decode()
            if name == "random":
                self._random += 1
                body = b"%064x\n" % self._random
                header = load_content.volatile_header(len(body))
            else:
                body = load_content.content(name, load_content.SIZES[name])
                header = load_content.static_header(len(body))
            self._send(writer, "http", header + body)

    async def _echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            self._send(writer, "echo", data)


class Datagrams(asyncio.DatagramProtocol):
    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if reply := self._guest.reply("udp", data):
            self._transport.sendto(reply, addr)


def words(guest: Guest, *more: str) -> list[str]:
    return [
        "--target", "127.0.0.1", "--sizes", "1k,10k", "--rate", "100", "--seconds", "0.5", "--drain", "5",
        *(f"--{name}-port={port}" for name, port in guest.ports.items()), *more,
    ]  # fmt: skip


def run(guest: Guest, *more: str, log: io.StringIO | None = None, until: str | None = None) -> dict[str, Any]:
    """The result of half a second of load.

    :param until: load until this service has given enough replies instead, however long a busy machine takes.
    """
    guest.until = until
    if until is not None:
        more = (*more, "--seconds", "60")

    async def scenario() -> dict[str, Any]:
        async with guest.serving():
            return await load.Load(load.parser().parse_args(words(guest, *more)), log).run()

    return asyncio.run(scenario())


def at(number: int, wrong: bytes | None) -> Tamper:
    """Sends ``wrong`` in place of the reply with this number."""
    return lambda right, count: wrong if count == number else right


def test_a_good_guest_gives_a_clean_result() -> None:
    guest = Guest()
    result = run(guest, "--udp", "1", "--churn", "30", "--random-every", "0.1")
    assert load_report.clean(result)
    assert result["redis_verified"] is True
    assert all(figures["requests"] > 0 for figures in result["services"].values())
    assert set(result["services"]) == {"redis", "http", "echo", "udp", "churn", "random"}
    standing = sum(result["services"][name]["connections"] for name in ("redis", "http", "echo"))
    assert standing == 20
    churned = result["services"]["churn"]
    assert churned["connections"] == churned["requests"]


def test_a_reset_is_counted_and_the_load_goes_on() -> None:
    log = io.StringIO()
    result = run(Guest(echo=at(3, None)), "--redis=0", "--http=0", "--echo=1", log=log, until="echo")
    figures = result["services"]["echo"]
    assert figures["resets"] == 1
    assert result["errors"] == 1
    assert figures["connections"] == 2
    assert figures["requests"] > 4
    assert not load_report.clean(result)
    assert [json.loads(line)["kind"] for line in log.getvalue().splitlines() if '"error"' in line] == [
        next(iter(figures["error_kinds"]))
    ]


@pytest.mark.parametrize("service", ["redis", "http", "echo"])
def test_a_changed_byte_is_found_in_every_service(service: str) -> None:
    def change(right: bytes, number: int) -> bytes:
        return bytes([right[0] ^ 1]) + right[1:] if number == 5 else right

    result = run(Guest(**{service: change}), "--redis=1", "--http=1", "--echo=1", until=service)
    assert result["services"][service]["wrong_bytes"] > 0
    assert result["errors"] == result["services"][service]["errors"] == 1
    assert not load_report.clean(result)


def test_a_forgotten_increment_is_found_by_the_next_reply() -> None:
    guest = Guest()

    def forget(right: bytes, number: int) -> bytes:
        if number == 5:
            guest.keys = dict.fromkeys(guest.keys, 2)
        return right

    guest._tamper["redis"] = forget
    result = run(guest, "--redis=1", "--http=0", "--echo=0", until="redis")
    assert result["lost_writes"] == 4
    assert not load_report.clean(result)


def test_a_repeated_increment_is_found() -> None:
    guest = Guest()

    def repeat(right: bytes, number: int) -> bytes:
        if number == 5:
            guest.keys = {key: value + 1 for key, value in guest.keys.items()}
        return right

    guest._tamper["redis"] = repeat
    result = run(guest, "--redis=1", "--http=0", "--echo=0", until="redis")
    assert (result["lost_writes"], result["repeated_writes"]) == (0, 1)
    assert not load_report.clean(result)


def test_an_increment_lost_after_the_last_reply_is_found_by_reading_back() -> None:
    guest = Guest(get=lambda right, number: b"$1\r\n1\r\n")
    result = run(guest, "--redis=1", "--http=0", "--echo=0")
    assert result["lost_writes"] == result["requests"] - 1 > 0
    assert not load_report.clean(result)


@pytest.mark.parametrize(
    "answer", [b"-ERR\r\n", b"$3\r\nabc\r\n", b"x" * 100_000, None], ids=["error", "text", "endless", "reset"]
)
def test_keys_that_cannot_be_read_back_are_no_success(answer: bytes | None) -> None:
    result = run(Guest(get=lambda right, number: answer), "--redis=1", "--http=0", "--echo=0")
    assert result["redis_verified"] is False
    assert not load_report.clean(result)


def test_churn_alone_is_read_back_too() -> None:
    result = run(
        Guest(get=lambda right, number: b"$-1\r\n"), "--redis=0", "--http=0", "--echo=0", "--churn=30"
    )
    assert result["lost_writes"] > 0


def test_silence_is_a_time_out_and_a_gap() -> None:
    guest = Guest(echo=lambda right, number: right if number < 3 else SILENCE)
    result = run(guest, "--redis=0", "--http=0", "--echo=1", "--timeout=0.2")
    figures = result["services"]["echo"]
    assert figures["error_kinds"]["timeout"] > 0
    assert figures["longest_gap_ms"] >= 200
    assert result["longest_gap_ms"] >= 200


def test_requests_unanswered_at_the_end_are_errors_and_unknown_writes() -> None:
    guest = Guest(redis=lambda right, number: right if number < 3 else SILENCE)
    result = run(guest, "--redis=1", "--http=0", "--echo=0", "--drain=0.1")
    assert result["services"]["redis"]["error_kinds"] == {"unfinished": 1}
    assert result["unknown_writes"] == 1
    assert result["redis_verified"] is True
    assert (result["lost_writes"], result["repeated_writes"]) == (0, 0)


def test_a_lost_datagram_is_counted_apart() -> None:
    result = run(Guest(udp=at(2, SILENCE)), "--redis=0", "--http=0", "--echo=0", "--udp=1", until="udp")
    assert result["lost_datagrams"] == 1
    assert result["errors"] == 0


def test_a_wrong_datagram_is_an_error() -> None:
    result = run(Guest(udp=at(2, b"wrong")), "--redis=0", "--http=0", "--echo=0", "--udp=1", until="udp")
    assert result["wrong_bytes"] == 5
    assert not load_report.clean(result)


def test_a_guest_that_is_not_there_is_one_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    async def free_ports() -> Guest:
        guest = Guest()
        async with guest.serving():
            return guest

    guest = asyncio.run(free_ports())
    assert load.main(words(guest)) == NetworkError.exit_status
    assert "20 of 20 connections to 127.0.0.1 could not be made" in capsys.readouterr().err


def test_a_bug_in_the_load_itself_never_looks_like_success(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: EchoCheck, data: bytes) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(EchoCheck, "feed", fail)
    with pytest.raises(ZeroDivisionError):
        run(Guest(), "--drain=0.1")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_load_with_its_result(number: signal.Signals) -> None:
    async def scenario() -> tuple[list[bytes], int]:
        async with Guest().serving() as guest:
            command = [
                sys.executable,
                "-m",
                "remus_colo.testbed.load",
                *words(guest, "--seconds=600", "--progress"),
            ]
            process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
            assert process.stdout
            async with asyncio.timeout(60):
                first = await process.stdout.readline()
                process.send_signal(number)
                rest = await process.stdout.read()
                return [first, *rest.splitlines()], await process.wait()

    lines, status = asyncio.run(scenario())
    progress, result = json.loads(lines[0]), json.loads(lines[-1])
    assert progress["progress"] is True
    assert progress["requests"] > 0
    assert result["requests"] >= progress["requests"]
    assert status == 0
    assert load_report.clean(result)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--seconds=0"], ["--redis=-1"], ["--sizes=2k"], ["--rate=-1"], ["--rate=inf"], ["--timeout=nan"],
        ["--redis=0", "--http=0", "--echo=0"],
    ],
)  # fmt: skip
def test_wrong_options_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load.main(["--target=127.0.0.1", "--seconds=1", *wrong])
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err
