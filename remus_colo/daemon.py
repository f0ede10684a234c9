# SPDX-License-Identifier: LGPL-2.1-or-later
"""``remusd``: the relocation port of a backup host. One session a protected domain, several at once."""

from __future__ import annotations

import logging
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from remus_colo import report
from remus_colo.adapters import bindings, kmod, xenctrl, xentime
from remus_colo.cli import check_root, run_command
from remus_colo.daemon_options import DaemonOptions, parse
from remus_colo.errors import ExitStatus, HostError, PeerLost, RemusError
from remus_colo.relocation.channel import Channel
from remus_colo.relocation.handshake import COLO
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.wire import VERSION, Message
from remus_colo.session.backup import BackupConfig, BackupSession, Creation
from remus_colo.session.loop import Loop
from remus_colo.session.peer import HeartbeatConfig, Peer
from remus_colo.session.remus_backup import RemusBackupSession, RemusCreation
from remus_colo.session.remus_sender import MODE as REMUS_MODE

log = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 10.0
CREATE_TIMEOUT_S = 60.0
PAIR_TIMEOUT_S = 15.0
BACKLOG = 16
STOP_TIMEOUT_S = 30.0
MODULES = (
    ("xen_netback", "the guest's network"),
    ("bridge", "keeping the secondary VM off the LAN"),
    ("nfnetlink_queue", "rewriting the secondary VM's packets"),
)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A control channel whose data channel has not come yet."""

    channel: Channel
    arrived: threading.Event
    data: list[Channel]


class Daemon:
    """Accepts connections and pairs them into sessions.

    :param options: from the command line and the configuration.
    """

    def __init__(self, options: DaemonOptions) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._waiting: dict[int, Waiting] = {}
        self._sessions: dict[int, BackupSession] = {}
        self._threads: list[threading.Thread] = []
        self._log = report.EventLog(options.log)
        self._clock = xentime.host_clock()
        self._settable_clock = xenctrl.system_time(0) is not None
        self._listener = self._listen()
        self._wake_out, self._wake_in = socket.socketpair()

    def _listen(self) -> socket.socket:
        address = (self._options.address, self._options.port)
        try:
            family = socket.AF_INET6 if ":" in self._options.address else socket.AF_INET
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError as error:
            raise HostError(
                f"cannot listen on {address[0] or '*'} port {address[1]}: {error.strerror}; "
                "does another remusd run, or is it not this host's address?"
            ) from error
        return listener

    def stop(self) -> None:
        """From a signal handler: end the accept loop."""
        self._wake_in.send(b"\0")

    def run(self) -> None:
        log.info("listening on %s port %d", self._options.address or "*", self._options.port)
        self._log.event("listening", address=self._options.address, port=self._options.port)
        while True:
            ready, _, _ = select.select([self._listener, self._wake_out], [], [])
            if self._wake_out in ready:
                break
            try:
                connection, address = self._listener.accept()
            except OSError as error:
                log.warning("a connection was lost before it was accepted: %s", error)
                continue
            self._thread(f"open-{address[0]}", self._open, connection, str(address[0]))
        self._shut_down()

    def _thread(self, name: str, target: Any, *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        self._threads = [other for other in self._threads if other.is_alive()]
        self._threads.append(thread)
        thread.start()

    def _shut_down(self) -> None:
        self._listener.close()
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            session.shut_down()
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        self._log.event("stopped")
        self._log.close()

    # -- one connection ----------------------------------------------------------------------------------

    def _open(self, connection: socket.socket, host: str) -> None:
        """In a thread of its own: until the connection is paired, refused, or has become a session."""
        channel = Channel(connection, peer=host)
        try:
            if not self._options.allows(host):
                log.warning("refused a connection from %s: it is not among the hosts allowed", host)
                return
            deadline_s = time.monotonic() + OPEN_TIMEOUT_S
            channel.answer([COLO], deadline_s)
            hello = channel.recv(deadline_s)
            if hello.type is not MessageType.HELLO:
                raise PeerLost(f"{host} began with {hello.type.name}")
            if VERSION not in hello.fields["versions"]:
                self._refuse(channel, f"this host speaks protocol version {VERSION}: install the same release on both")
                return
            channel.expect_generation(hello.generation)
            if hello.fields["channel"] == "data":
                self._pair(channel, hello.generation)
                return
            self._control(channel, hello, host)
        except RemusError as error:
            log.warning("connection from %s: %s", host, error)
            channel.close()
        except Exception:
            log.exception("connection from %s", host)
            channel.close()

    @staticmethod
    def _greet(channel: Channel, kind: str) -> None:
        channel.send_control(MessageType.HELLO, 0, {"versions": [VERSION], "host": socket.gethostname(), "channel": kind})

    @staticmethod
    def _refuse(channel: Channel, reason: str) -> None:
        channel.send_control(MessageType.REFUSE, 0, {"reason": reason, "exit_status": int(ExitStatus.PEER_REFUSED)})
        channel.close()

    def _pair(self, channel: Channel, generation: int) -> None:
        with self._lock:
            waiting = self._waiting.get(generation)
        if waiting is None:
            self._refuse(channel, "a data channel came without its control channel")
            return
        self._greet(channel, "data")
        waiting.data.append(channel)
        waiting.arrived.set()

    def _control(self, channel: Channel, hello: Message, host: str) -> None:
        generation = hello.generation
        waiting = Waiting(channel, threading.Event(), [])
        with self._lock:
            if generation in self._waiting or generation in self._sessions:
                self._refuse(channel, "this session exists already")
                return
            self._waiting[generation] = waiting
        try:
            self._greet(channel, "control")
            if not waiting.arrived.wait(PAIR_TIMEOUT_S):
                raise PeerLost(f"{host} opened no data channel in time")
            create = self._await_create(channel)
        finally:
            with self._lock:
                del self._waiting[generation]
        if create is not None:
            self._serve(create, channel, waiting.data[0], host)
        else:
            waiting.data[0].close()
            channel.close()

    def _await_create(self, channel: Channel) -> Message | None:
        """Answer clock probes until CREATE comes; None if the primary leaves."""
        while True:
            message = channel.recv(time.monotonic() + CREATE_TIMEOUT_S)
            received_ns = self._clock.now_ns()
            if message.type is MessageType.CLOCK_PROBE:
                channel.send_control(
                    MessageType.CLOCK_REPLY,
                    0,
                    {
                        "sent_ns": message.fields["sent_ns"],
                        "received_ns": received_ns,
                        "replied_ns": self._clock.now_ns(),
                        "settable": self._settable_clock,
                    },
                )
            elif message.type is MessageType.CREATE:
                return message
            elif message.type in (MessageType.STOP, MessageType.BYE):
                return None
            elif message.type is not MessageType.HEARTBEAT:
                raise PeerLost(f"the primary sent {message.type.name} where CREATE was expected")

    def _serve(self, create: Message, control: Channel, data: Channel, host: str) -> None:
        def make_peer(loop: Loop, heartbeat: HeartbeatConfig, **callbacks: Any) -> Peer:
            return Peer(loop, control, data, heartbeat, **callbacks)

        remus = create.fields["mode"] == REMUS_MODE
        creation = RemusCreation.parse(create) if remus else Creation.parse(create)
        log.info("%s protects %s here", host, creation.name)

        def event(name: str, /, **fields: Any) -> None:
            self._log.event(name, domain=creation.name, **fields)
            log.info("%s: %s %s", creation.name, name, " ".join(f"{key}={value}" for key, value in fields.items()))

        config = BackupConfig(
            lan_bridge=self._options.bridge, fence=self._options.fence, unknown=self._options.unknown_primary
        )
        session: BackupSession
        if isinstance(creation, RemusCreation):
            session = RemusBackupSession(config, creation, make_peer, self._clock, event)
        else:
            session = BackupSession(config, creation, make_peer, self._clock, event)
        with self._lock:
            self._sessions[create.generation] = session
        try:
            session.run()
        finally:
            with self._lock:
                del self._sessions[create.generation]


def _body(argv: Sequence[str]) -> int:
    options = parse(argv)
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO,
        # A journal has its own time stamps.
        format=("%(asctime)s " if sys.stderr.isatty() else "") + "%(levelname)s %(name)s: %(message)s",
    )
    check_root("remusd")
    bindings.lowlevel("xc")
    for module, purpose in MODULES:
        kmod.load(module, purpose)
    daemon = Daemon(options)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: daemon.stop())
    daemon.run()
    return int(ExitStatus.OK)


def main(argv: Sequence[str] | None = None) -> int:
    """The ``remusd`` command. Returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_command("remusd", arguments, _body, verbose="--verbose" in arguments or "-v" in arguments)


if __name__ == "__main__":
    sys.exit(main())
