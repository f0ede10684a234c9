# SPDX-License-Identifier: LGPL-2.1-or-later
"""The relocation port without Xen, over real sockets: what gets in, what is refused, and that nothing stays behind."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from remus_colo.daemon_options import DaemonOptions, compile_hosts
from remus_colo.errors import ConfigError, HostError, MessageError, PeerError, PeerLost
from remus_colo.options import TlsFiles
from remus_colo.relocation import listen, tls
from remus_colo.relocation.admission import Admission, Throttle
from remus_colo.relocation.channel import Channel
from remus_colo.relocation.handshake import COLO, XEND_ANSWER_BYTES
from remus_colo.relocation.pairing import Pairing
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.server import Server
from remus_colo.relocation.wire import HEADER, MAGIC, Message, encode

FILES = Path(__file__).parents[1] / "data" / "tls"
HOST = TlsFiles(FILES / "host.crt", FILES / "host.key")
TRUSTING = TlsFiles(FILES / "host.crt", FILES / "host.key", FILES / "ca.crt")
# A wait that a working machine never uses up.
PATIENCE_S = 20.0

CREATE = {"name": "web", "mode": "transparent", "config": {}, "tunnel": {}}


def soon() -> float:
    return time.monotonic() + PATIENCE_S


def eventually(condition: Callable[[], bool]) -> None:
    deadline_s = soon()
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true"
        time.sleep(0.005)


class Receiver:
    """A server with sessions that only wait until their peer leaves."""

    def __init__(self, options: DaemonOptions, **timeouts: float) -> None:
        self.events: list[dict[str, Any]] = []
        self.sessions: list[tuple[str, Channel, Channel]] = []
        self.pairing = Pairing(
            time.monotonic_ns,
            self.serve,
            **{key: value for key, value in timeouts.items() if key != "open_timeout_s"},
        )
        contexts = (None,) if options.tls is None else (None, tls.server_context(options.tls))
        self.server = Server(
            [listen.listen("127.0.0.1", 0, context) for context in contexts],
            {COLO: self.pairing.handle},
            allows=options.allows,
            half_open_limit=options.half_open_limit,
            event=self.event,
            **{key: value for key, value in timeouts.items() if key == "open_timeout_s"},
        )
        self.port = self.server.listeners[0].port
        self.ssl_port = self.server.listeners[-1].port
        self.ending = threading.Event()
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._thread.start()

    def event(self, name: str, /, **fields: Any) -> None:
        self.events.append({"event": name, **fields})

    def serve(self, create: Message, control: Channel, data: Channel, host: str) -> None:
        if create.fields["name"] == "bad":
            raise MessageError("CREATE is bad")
        self.sessions.append((str(create.fields["name"]), control, data))
        with contextlib.suppress(PeerLost):
            while not self.ending.is_set():
                control.poll(time.monotonic() + 0.05)

    def reasons(self) -> list[str]:
        return [event["reason"] for event in self.events]

    def close(self) -> None:
        self.ending.set()
        self.server.stop()
        self._thread.join(PATIENCE_S)
        self.pairing.stop()
        assert self.server.close(PATIENCE_S)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def receiver() -> Iterator[Callable[..., Receiver]]:
    """Makes receivers; at the end every descriptor and thread of theirs must be gone."""
    before = descriptors(), threading.active_count()
    made: list[Receiver] = []

    def make(timeouts: dict[str, float] | None = None, **options: Any) -> Receiver:
        made.append(Receiver(DaemonOptions(**options), **(timeouts or {})))
        return made[-1]

    yield make
    for each in made:
        each.close()
    eventually(lambda: (descriptors(), threading.active_count()) == before)


def connect(port: int, files: TlsFiles | None = None, generation: int = 7) -> Channel:
    context = None if files is None else tls.client_context(files)
    return Channel.connect("127.0.0.1", port, deadline_s=soon(), generation=generation, tls_context=context)


def hello(channel: Channel, kind: str, versions: list[int] | None = None) -> Message:
    channel.send_control(MessageType.HELLO, 0, {"versions": versions or [1], "host": "h", "channel": kind})
    return channel.recv(soon())


@contextlib.contextmanager
def protection(
    port: int, files: TlsFiles | None = None, generation: int = 7, name: str = "web"
) -> Iterator[tuple[Channel, Channel]]:
    with connect(port, files, generation) as control:
        assert hello(control, "control").type is MessageType.HELLO
        with connect(port, files, generation) as data:
            assert hello(data, "data").type is MessageType.HELLO
            control.send_control(MessageType.CREATE, 0, {**CREATE, "name": name})
            yield control, data


def lost(sock: socket.socket) -> bytes:
    """All that still comes, until the other side has closed."""
    sock.settimeout(PATIENCE_S)
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(4096):
            received += chunk
    return received


# -- what gets in ----------------------------------------------------------------------------------------


def test_a_protection_begins(receiver: Callable[..., Receiver]) -> None:
    here = receiver()
    with connect(here.port) as control:
        assert hello(control, "control").fields["channel"] == "control"
        with connect(here.port) as data:
            assert hello(data, "data").fields["channel"] == "data"
            control.send_control(MessageType.CLOCK_PROBE, 0, {"sent_ns": 5})
            reply = control.recv(soon())
            assert reply.type is MessageType.CLOCK_REPLY
            assert reply.fields["sent_ns"] == 5
            assert reply.fields["received_ns"] <= reply.fields["replied_ns"]
            control.send_control(MessageType.CREATE, 0, CREATE)
            eventually(lambda: len(here.sessions) == 1)
            eventually(lambda: here.server.admission.taken() == 0)
            # a session's channels take everything, and in both directions
            _, _, theirs = here.sessions[0]
            data.send_bulk(MessageType.STATE, 1, [b"x" * 100_000])
            assert len(theirs.recv(soon()).data) == 100_000
    assert here.events == []


def test_several_at_once(receiver: Callable[..., Receiver]) -> None:
    here = receiver()
    with contextlib.ExitStack() as stack:
        for generation in range(1, 21):
            stack.enter_context(protection(here.port, generation=generation, name=f"web{generation}"))
        eventually(lambda: len(here.sessions) == 20)
        assert {name for name, _, _ in here.sessions} == {f"web{generation}" for generation in range(1, 21)}
        assert here.server.admission.taken() == 0
    assert here.events == []


def test_over_tls(receiver: Callable[..., Receiver]) -> None:
    here = receiver(tls=HOST)
    block = os.urandom(3_000_000)
    with protection(here.ssl_port, TlsFiles()) as (control, data):
        eventually(lambda: len(here.sessions) == 1)
        _, _, theirs = here.sessions[0]
        received: list[bytes] = []
        reader = threading.Thread(target=lambda: received.append(bytes(theirs.recv(soon()).data)))
        reader.start()
        data.send_bulk(MessageType.PAGES, 1, [b"head", block[:10], block[10:], b"tail"])
        reader.join(PATIENCE_S)
        assert received == [b"head" + block + b"tail"]
        theirs.send_control(MessageType.RESUMED, 1)
        assert data.recv(soon()).type is MessageType.RESUMED
        assert control.addresses == ("127.0.0.1", "127.0.0.1")


def test_over_tls_both_know_each_other(receiver: Callable[..., Receiver]) -> None:
    here = receiver(tls=TRUSTING)
    with protection(here.ssl_port, TRUSTING):
        eventually(lambda: len(here.sessions) == 1)


def test_tls_sends_and_receives_at_once(receiver: Callable[..., Receiver]) -> None:
    """Both directions full, from two threads on each side: OpenSSL allows one call at a time."""
    here = receiver(tls=HOST)
    block, times = os.urandom(1_000_000), 20
    with protection(here.ssl_port, TlsFiles()) as (_, data):
        eventually(lambda: len(here.sessions) == 1)
        theirs = here.sessions[0][2]
        failures: list[BaseException] = []

        def run(work: Callable[[], None]) -> threading.Thread:
            def guarded() -> None:
                try:
                    work()
                except BaseException as error:
                    failures.append(error)

            thread = threading.Thread(target=guarded)
            thread.start()
            return thread

        def send(channel: Channel) -> None:
            for _ in range(times):
                channel.send_bulk(MessageType.PAGES, 1, [block], deadline_s=soon())

        def receive(channel: Channel) -> None:
            for _ in range(times):
                assert channel.recv(soon()).data == block

        threads = [run(lambda w=w, c=c: w(c)) for c in (data, theirs) for w in (send, receive)]  # type: ignore[misc]
        for thread in threads:
            thread.join(3 * PATIENCE_S)
        assert failures == []


# -- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "ours", "said"),
    [
        (
            HOST,
            TlsFiles(authority=FILES / "other-ca.crt"),
            "certificate of 127.0.0.1 port \\d+ is not one to be trusted",
        ),
        (TRUSTING, TlsFiles(authority=FILES / "ca.crt"), "refused us within TLS: .*certificate"),
        (TlsFiles(FILES / "elsewhere.crt", FILES / "elsewhere.key"), TRUSTING, "IP address mismatch"),
        (TlsFiles(HOST.certificate, HOST.key, FILES / "other-ca.crt"), TRUSTING, "refused us within TLS: .*"),
    ],
    ids=["unknown server", "no client certificate", "another host's", "unknown client"],
)
def test_who_cannot_be_trusted(
    receiver: Callable[..., Receiver], files: TlsFiles, ours: TlsFiles, said: str
) -> None:
    here = receiver(tls=files)
    with pytest.raises(PeerError, match=said):
        connect(here.ssl_port, ours)
    eventually(lambda: len(here.events) == 1)


def test_tls_where_there_is_none_and_none_where_there_is(receiver: Callable[..., Receiver]) -> None:
    here = receiver(tls=HOST)
    with pytest.raises(
        PeerError, match=r"cannot speak TLS with us; is that its port with TLS\? \(see --ssl\)"
    ):
        connect(here.port, TlsFiles())
    with pytest.raises(
        PeerLost, match=r"does it allow this host to connect, and is that port one with TLS \(see --ssl\)\?"
    ):
        connect(here.ssl_port)
    eventually(lambda: len(here.events) == 2)
    assert sorted(here.reasons()) == [
        "127.0.0.1 cannot speak TLS with us: wrong version number",
        "127.0.0.1 speaks TLS where we do not: check --ssl, and the port",
    ]


@pytest.mark.parametrize("pattern", ["^192[.]0[.]2[.]", "^127[.]0[.]0[.]2$", "^$"])
def test_a_host_that_is_not_allowed(receiver: Callable[..., Receiver], pattern: str) -> None:
    here = receiver(hosts_allow=compile_hosts(pattern), tls=HOST)
    with pytest.raises(PeerLost):
        connect(here.port)
    with pytest.raises(PeerLost):
        connect(here.ssl_port, TlsFiles())
    eventually(lambda: here.reasons() == ["it is not among the hosts allowed"] * 2)


def test_a_host_that_is_allowed_by_its_name(
    receiver: Callable[..., Receiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getfqdn", lambda address: {"127.0.0.1": "alpha.example.org"}[address])
    here = receiver(hosts_allow=compile_hosts(r"^alpha\.example\.org$"))
    with protection(here.port):
        eventually(lambda: len(here.sessions) == 1)


def test_a_resolver_that_does_not_answer_holds_no_place(
    receiver: Callable[..., Receiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()
    monkeypatch.setattr(socket, "getfqdn", lambda address: answered.wait(PATIENCE_S) and address)
    here = receiver(hosts_allow=compile_hosts(r"^alpha\.example\.org$"), timeouts={"open_timeout_s": 0.1})
    with socket.create_connection(("127.0.0.1", here.port)) as stranger:
        stranger.settimeout(PATIENCE_S)
        assert stranger.recv(1) == b""
    answered.set()
    eventually(lambda: here.reasons() == ["it is not among the hosts allowed"])


@pytest.mark.parametrize("operation", ["receive", "sslreceive", "help"])
def test_an_xend_is_told_in_its_own_words(receiver: Callable[..., Receiver], operation: str) -> None:
    """As XendDomain.domain_migrate of Xen 4.4 speaks: what it drops, and where it looks for the reason."""
    here = receiver()
    with socket.create_connection(("127.0.0.1", here.port), PATIENCE_S) as sock:
        sock.sendall(f"{operation}\n".encode())
        first = sock.recv(80)
        assert first.startswith(b"(err (type XendError) ")
        assert len(first) == XEND_ANSWER_BYTES
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(10_000):
                sock.sendall(b"the guest" * 10_000)
        found = re.match(rb"^\(err\s\(type\s(.+)\)\s\(value\s'(.+)'\)\)", sock.recv(1024))
        assert found is not None
        assert found[2] == f"Invalid operation: {operation}: here is remusd, not xend".encode()


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (b"GET / HTTP/1.0\r\n\r\n", b"error expected the name of an operation"),
        (b"x" * 600, b"error expected a line of at most 512 bytes"),
        (b"\xff\xfe\n", b"error expected an operation line in UTF-8"),
        (b"\n", b"error expected the name of an operation"),
        (b"save\n", b"error expected one of the operations ['colo'], got 'save'"),
        (b"colo\n" + b"x" * 24, b"ready colo\n"),
        (b"colo\n" + HEADER.pack(MAGIC, 1, MessageType.STATE, 0, 1, 0, 16 * 1024 * 1024), b"ready colo\n"),
        (b"colo\n" + HEADER.pack(MAGIC, 1, MessageType.HELLO, 0, 1, 0, 3) + b"[1]", b"ready colo\n"),
        (b"colo\n" + encode(Message(MessageType.PREPARE, 1)), b"ready colo\n"),
    ],
)
def test_what_is_no_beginning(receiver: Callable[..., Receiver], sent: bytes, answered: bytes) -> None:
    here = receiver()
    with socket.create_connection(("127.0.0.1", here.port), PATIENCE_S) as sock:
        sock.sendall(sent)
        assert lost(sock).startswith(answered)
    eventually(lambda: len(here.events) == 1)
    assert here.events[0]["host"] == "127.0.0.1"


def test_versions_without_one_in_common(receiver: Callable[..., Receiver]) -> None:
    here = receiver()
    with connect(here.port) as channel:
        answer = hello(channel, "control", [200])
        assert answer.type is MessageType.REFUSE
        assert "the peer speaks versions [200]" in answer.fields["reason"]


@pytest.mark.parametrize("kind", ["control", "data"])
def test_a_protection_without_a_number(receiver: Callable[..., Receiver], kind: str) -> None:
    here = receiver()
    with connect(here.port, generation=0) as channel:
        assert hello(channel, kind).type is MessageType.REFUSE


def test_a_number_that_is_taken(receiver: Callable[..., Receiver]) -> None:
    here = receiver()
    with connect(here.port) as waiting:
        hello(waiting, "control")
        with connect(here.port) as second:
            answer = hello(second, "control")
            assert (answer.type, answer.fields["reason"]) == (
                MessageType.REFUSE,
                "this session exists already",
            )
    with protection(here.port, generation=8):
        eventually(lambda: len(here.sessions) == 1)
        with connect(here.port, generation=8) as second:
            assert hello(second, "control").type is MessageType.REFUSE
        # its data channel is there: another one cannot put itself in between
        with connect(here.port, generation=8) as second:
            assert hello(second, "data").type is MessageType.REFUSE


def test_a_second_data_channel(receiver: Callable[..., Receiver]) -> None:
    here = receiver()
    with connect(here.port) as control, connect(here.port) as data, connect(here.port) as second:
        hello(control, "control")
        assert hello(data, "data").type is MessageType.HELLO
        assert hello(second, "data").type is MessageType.REFUSE
        control.send_control(MessageType.CREATE, 0, CREATE)
        eventually(lambda: len(here.sessions) == 1)


def test_a_data_channel_from_another_host(receiver: Callable[..., Receiver]) -> None:
    here = receiver()
    with connect(here.port) as control:
        hello(control, "control")
        sock = socket.create_connection(("127.0.0.1", here.port), PATIENCE_S, source_address=("127.0.0.2", 0))
        with Channel(sock, generation=7) as data:
            data._send_all([b"colo\n"], soon())
            assert data.read_line(soon()) == b"ready colo\n"
            assert hello(data, "data").type is MessageType.REFUSE


def test_a_data_channel_alone(receiver: Callable[..., Receiver]) -> None:
    here = receiver()
    with connect(here.port) as data:
        assert hello(data, "data").fields["reason"] == "a data channel came without its control channel"


def test_a_bad_create_is_answered(receiver: Callable[..., Receiver]) -> None:
    here = receiver()
    with protection(here.port, name="bad") as (control, _):
        answer = control.recv(soon())
        assert (answer.type, answer.fields["reason"]) == (MessageType.REFUSE, "CREATE is bad")


@pytest.mark.parametrize(
    "kind", [MessageType.PREPARE, MessageType.PAGES, MessageType.CREATE_STREAM, MessageType.HELLO]
)
def test_before_create_nothing_else(receiver: Callable[..., Receiver], kind: MessageType) -> None:
    here = receiver()
    with connect(here.port) as control, connect(here.port) as data:
        hello(control, "control")
        hello(data, "data")
        if kind is MessageType.HELLO:
            control.send_control(kind, 0, {"versions": [1], "host": "h", "channel": "control"})
        elif kind is MessageType.PREPARE:
            control.send_control(kind)
        else:
            control.send_bulk(kind, 0, [b"x"])
        with pytest.raises(PeerLost):
            control.recv(soon())
        with pytest.raises(PeerLost):
            data.recv(soon())
    eventually(lambda: here.reasons() == [f"{kind.name} is not allowed at this point of the conversation"])


# -- slow, many, and the end -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent", [b"", b"co", b"colo\n", b"colo\nRCOL", b"colo\n" + HEADER.pack(MAGIC, 1, 1, 0, 1, 0, 50) + b"{"]
)
@pytest.mark.parametrize("secure", [False, True])
def test_who_is_slow_is_left(receiver: Callable[..., Receiver], sent: bytes, secure: bool) -> None:
    here = receiver({"open_timeout_s": 0.2}, tls=HOST)
    port = here.ssl_port if secure else here.port
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as sock:
        sock.sendall(b"\x16" if secure and sent else sent)
        lost(sock)
    eventually(lambda: len(here.events) == 1)


def test_a_drip_does_not_extend_the_deadline(receiver: Callable[..., Receiver]) -> None:
    here = receiver({"open_timeout_s": 0.3})
    with socket.create_connection(("127.0.0.1", here.port), PATIENCE_S) as sock:
        deadline_s = soon()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while time.monotonic() < deadline_s:
                sock.sendall(b"c")
                time.sleep(0.01)
    eventually(lambda: len(here.events) == 1)


def test_no_data_channel_in_time(receiver: Callable[..., Receiver]) -> None:
    here = receiver({"pair_timeout_s": 0.1})
    with connect(here.port) as control:
        hello(control, "control")
        with pytest.raises(PeerLost):
            control.recv(soon())
    eventually(lambda: here.reasons() == ["its data channel did not come in time"])
    with connect(here.port) as data:
        assert hello(data, "data").type is MessageType.REFUSE


def test_probes_do_not_extend_the_deadline(receiver: Callable[..., Receiver]) -> None:
    here = receiver({"create_timeout_s": 0.3})
    with connect(here.port) as control, connect(here.port) as data:
        hello(control, "control")
        hello(data, "data")
        deadline_s = soon()
        with pytest.raises(PeerLost):
            while time.monotonic() < deadline_s:
                control.send_control(MessageType.CLOCK_PROBE, 0, {"sent_ns": 1})
                control.recv(soon())
                time.sleep(0.01)
    eventually(lambda: len(here.events) == 1)


def test_the_primary_leaves_before_it_begins(receiver: Callable[..., Receiver]) -> None:
    here = receiver()
    with connect(here.port) as control, connect(here.port) as data:
        hello(control, "control")
        hello(data, "data")
        control.send_control(MessageType.STOP, 0, {"reason": "changed my mind"})
        with pytest.raises(PeerLost):
            data.recv(soon())
    assert here.events == here.sessions == []


def test_too_many_half_open(receiver: Callable[..., Receiver]) -> None:
    here = receiver(half_open_limit=8)
    assert here.server.admission.limit_per_host == 2
    with contextlib.ExitStack() as stack:
        for last in range(1, 7):
            for _ in range(3 if last == 1 else 2):
                sock = socket.create_connection(
                    ("127.0.0.1", here.port), PATIENCE_S, source_address=(f"127.0.0.{last}", 0)
                )
                stack.enter_context(sock)
        eventually(lambda: len(here.events) == 5)
        assert here.server.admission.taken() == 8
        assert sorted(here.reasons()) == [
            "2 of its connections are half open already",
            *["8 connections are half open already"] * 4,
        ]
    # they have gone: there are places again
    eventually(lambda: here.server.admission.taken() == 0)
    with protection(here.port):
        eventually(lambda: len(here.sessions) == 1)


def test_who_resets_at_once(receiver: Callable[..., Receiver]) -> None:
    here = receiver(tls=HOST)
    for port in (here.port, here.ssl_port):
        for _ in range(20):
            sock = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
    with protection(here.port):
        eventually(lambda: len(here.sessions) == 1)


def test_the_end_cuts_what_is_half_open(receiver: Callable[..., Receiver]) -> None:
    here = receiver({"pair_timeout_s": 3600, "open_timeout_s": 3600}, tls=HOST)
    with connect(here.port) as control, contextlib.ExitStack() as stack:
        hello(control, "control")
        for port in (here.port, here.ssl_port):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE_S))
        eventually(lambda: here.server.threads() == 3)
        here.close()
        with pytest.raises(PeerLost):
            control.recv(soon())
        with pytest.raises(PeerLost, match="is remusd running there"):
            connect(here.port)


def test_no_descriptors_left_in_the_process(
    receiver: Callable[..., Receiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """accept() fails for a while: the connection waits, and is served when there is room again."""
    here = receiver()
    listener = here.server.listeners[0]
    full = threading.Event()
    full.set()

    class Full:
        def __getattr__(self, name: str) -> Any:
            return getattr(listener.sock, name)

        def accept(self) -> Any:
            if full.is_set():
                raise OSError(24, "Too many open files")
            return listener.sock.accept()

    accept = here.server._accept
    monkeypatch.setattr(here.server, "_accept", lambda found: accept(listen.Listener(Full(), "", 0)))  # type: ignore[arg-type]
    with socket.create_connection(("127.0.0.1", here.port), PATIENCE_S) as sock:
        eventually(lambda: len(here.events) >= 1)
        full.clear()
        sock.sendall(b"colo\n")
        assert sock.recv(100) == b"ready colo\n"
    assert "Too many open files" in here.reasons()[0]


def test_refusals_do_not_fill_the_log(
    receiver: Callable[..., Receiver], caplog: pytest.LogCaptureFixture
) -> None:
    here = receiver(hosts_allow=compile_hosts("^$"))
    with caplog.at_level(logging.WARNING, "remus_colo.relocation.server"):
        for _ in range(60):
            with socket.create_connection(("127.0.0.1", here.port), PATIENCE_S) as sock:
                lost(sock)
        eventually(lambda: here.server.threads() == 0)
    assert 20 <= len(caplog.records) < 60


# -- where to listen -------------------------------------------------------------------------------------


def test_addresses() -> None:
    assert listen.resolve("") == ""
    assert listen.resolve("10.7.0.1") == "10.7.0.1"
    assert listen.resolve("::1") == "::1"
    assert listen.resolve("localhost") == "127.0.0.1"
    assert listen.resolve("lo") == "127.0.0.1"
    for bad in ("no such thing", "999.1.1.1", "a" * 300):
        with pytest.raises(ConfigError, match="is no address, no network interface, and no host's name"):
            listen.resolve(bad)


def test_a_port_that_is_taken() -> None:
    first = listen.listen("127.0.0.1", 0)
    with first.sock, pytest.raises(HostError, match="does another remusd run"):
        listen.listen("127.0.0.1", first.port)


def test_both_families_at_once() -> None:
    listener = listen.listen("::", 0)
    with listener.sock, socket.create_connection(("127.0.0.1", listener.port), PATIENCE_S):
        listener.sock.setblocking(True)
        sock, address = listener.sock.accept()
        assert DaemonOptions(hosts_allow=compile_hosts(r"^127\.0\.0\.1$")).allows(address[0])
        # what tunnels between the hosts are made with
        with Channel(sock) as channel:
            assert channel.addresses == ("127.0.0.1", "127.0.0.1")


@pytest.mark.parametrize(
    ("shown", "meant"),
    [("::ffff:10.0.0.1", "10.0.0.1"), ("::FFFF:10.0.0.1", "10.0.0.1"), ("10.0.0.1", "10.0.0.1"), ("::1", "::1"),
     ("fe80::1%eth0", "fe80::1%eth0"), ("::ffff:1", "::ffff:1")],
)  # fmt: skip
def test_addresses_of_sockets(shown: str, meant: str) -> None:
    assert listen.plain(shown) == meant


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (TlsFiles(FILES / "absent", FILES / "host.key"), "cannot read .*absent: No such file"),
        (TlsFiles(FILES / "host.crt", FILES / "absent"), "cannot read .*absent"),
        (TlsFiles(FILES / "host.crt", FILES / "elsewhere.key"), "are no certificate and its private key"),
        (TlsFiles(FILES / "README.rst", FILES / "host.key"), "are no certificate and its private key"),
        (TlsFiles(FILES / "host.crt", FILES / "encrypted.key"), "the private key is encrypted"),
        (TlsFiles(HOST.certificate, HOST.key, FILES / "README.rst"), "holds no certificate"),
        (TlsFiles(HOST.certificate, HOST.key, FILES / "absent"), "cannot read .*absent"),
    ],
)
def test_files_that_are_not_what_they_should_be(files: TlsFiles, said: str) -> None:
    for context in (tls.server_context, tls.client_context):
        with pytest.raises(ConfigError, match=said):
            context(files)


# -- the parts that need no socket -----------------------------------------------------------------------


def test_admission() -> None:
    places = Admission(8)
    assert [places.enter("a") for _ in range(3)] == [None, None, "2 of its connections are half open already"]
    places.leave("a")
    assert places.enter("a") is None
    for host in "bcd":
        assert places.enter(host) is places.enter(host) is None
    assert places.enter("e") == "8 connections are half open already"
    for host in "aabbccdd":
        places.leave(host)
    assert (places.taken(), len(places._taken)) == (0, 0)
    assert Admission(1).limit_per_host == 1


def test_throttle() -> None:
    throttle = Throttle(burst=2, window_s=10)
    moments_s = (0.0, 1.0, 2.0, 9.9, 10.0, 11.0, 12.0, 21.0)
    assert [throttle.passes("a", now_s) for now_s in moments_s] == [0, 0, None, None, 2, 0, None, 1]


def test_a_host_that_knocks_without_end_hides_no_other() -> None:
    throttle = Throttle(burst=2, window_s=10)
    hosts = ("a", "a", "a", "b", "b", "c", "a")
    # "c" is one too many: an attack from many addresses is not to fill the log
    assert [throttle.passes(host, 1.0) for host in hosts] == [0, 0, None, 1, None, None, None]
