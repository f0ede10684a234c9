# SPDX-License-Identifier: LGPL-2.1-or-later
"""``remusd``: the relocation port of a backup host. One session a protected domain, several at once."""

from __future__ import annotations

import contextlib
import logging
import ssl
import sys
import threading
from collections.abc import Sequence
from typing import Any

from remus_colo import report, service
from remus_colo.adapters import bindings, kmod, xenctrl, xentime
from remus_colo.command import check_root, run_command
from remus_colo.daemon_options import DaemonOptions, parse
from remus_colo.errors import ExitStatus
from remus_colo.options import check_hook
from remus_colo.relocation import listen, tls
from remus_colo.relocation.channel import Channel
from remus_colo.relocation.handshake import COLO, RECEIVE, SSL_RECEIVE
from remus_colo.relocation.pairing import Pairing
from remus_colo.relocation.server import Server
from remus_colo.relocation.wire import Message
from remus_colo.session import leftovers, signals
from remus_colo.session.backup import BackupConfig, BackupSession
from remus_colo.session.colo_backup import ColoBackupSession
from remus_colo.session.creation import Creation, RemusCreation
from remus_colo.session.loop import Loop
from remus_colo.session.migration import Migrations
from remus_colo.session.peer import HeartbeatConfig, Peer
from remus_colo.session.remus_backup import RemusBackupSession
from remus_colo.session.remus_sender import MODE as REMUS_MODE

log = logging.getLogger(__name__)

MODULES = (
    ("xen_netback", "the guest's network"),
    ("bridge", "keeping the secondary VM off the LAN"),
    ("nfnetlink_queue", "rewriting the secondary VM's packets"),
)


def open_ports(options: DaemonOptions) -> list[listen.Listener]:
    """:raise ConfigError, HostError: one cannot be opened; then none is open."""
    ports: list[tuple[int, ssl.SSLContext | None]] = [] if options.port is None else [(options.port, None)]
    if options.tls is not None:
        ports.append((options.ssl_port, tls.server_context(options.tls)))
    with contextlib.ExitStack() as stack:
        listeners = []
        for port, context in ports:
            listeners.append(listen.listen(options.address, port, context))
            stack.callback(listeners[-1].sock.close)
        stack.pop_all()
    return listeners


class Daemon:
    """Serves the relocation ports, and runs the sessions that begin there.

    :param options: from the command line and the configuration.
    """

    def __init__(self, options: DaemonOptions) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._sessions: dict[int, BackupSession] = {}
        self._stopping = False
        self._log = report.EventLog(options.log)
        self._clock = xentime.host_clock()
        self._pairing = Pairing(
            self._clock.now_ns, self._serve, settable_clock=xenctrl.system_time(0) is not None
        )
        self._migrations = Migrations(self._log.event)
        self._server = Server(
            open_ports(options),
            {
                COLO: self._pairing.handle,
                RECEIVE: self._migrations.handle,
                SSL_RECEIVE: self._migrations.handle_encrypted,
            },
            allows=options.allows,
            half_open_limit=options.half_open_limit,
            event=self._log.event,
        )

    def stop(self) -> None:
        """End the service; from a signal handler."""
        self._server.stop()

    def run(self) -> None:
        """Serve until :meth:`stop`; then see sessions to their end, as ``remusd --help`` says."""
        for listener in self._server.listeners:
            log.info("listening on %s", listener)
            self._log.event(
                "listening", address=listener.address, port=listener.port, tls=listener.tls is not None
            )
        if not self._options.hosts_allow:
            log.warning(
                "every host that reaches this port may start domains here: set xend-relocation-hosts-allow"
            )
        self._server.run()
        log.info("ending")
        service.notify("STOPPING=1")
        with self._lock:
            self._stopping = True
            sessions = list(self._sessions.values())
        self._pairing.stop()
        self._migrations.stop()
        for session in sessions:
            session.shut_down()
        if not self._server.close():
            log.error("a session has not ended in time: see docs/configuration.rst, 'remusd as a service'")
        self._log.event("stopped")
        self._log.close()

    def _serve(self, create: Message, control: Channel, data: Channel, host: str) -> None:
        """In the control connection's thread.

        :raise MessageError: CREATE is not what it should be.
        """

        def make_peer(loop: Loop, heartbeat: HeartbeatConfig, **callbacks: Any) -> Peer:
            return Peer(loop, control, data, heartbeat, **callbacks)

        remus = create.fields["mode"] == REMUS_MODE
        creation = RemusCreation.parse(create) if remus else Creation.parse(create)
        log.info("%s protects %s here", host, creation.name)

        def event(name: str, /, **fields: Any) -> None:
            self._log.event(name, domain=creation.name, **fields)
            log.info(
                "%s: %s %s", creation.name, name, " ".join(f"{key}={value}" for key, value in fields.items())
            )

        config = BackupConfig(
            lan_bridge=self._options.bridge, fence=self._options.fence, unknown=self._options.unknown_primary
        )
        session: BackupSession
        if isinstance(creation, RemusCreation):
            session = RemusBackupSession(config, creation, make_peer, self._clock, event)
        else:
            session = ColoBackupSession(config, creation, make_peer, self._clock, event)
        with self._lock:
            self._sessions[create.generation] = session
            stopping = self._stopping
        try:
            if stopping:  # nobody else will tell it
                session.shut_down()
            session.run()
        finally:
            with self._lock:
                del self._sessions[create.generation]


def _body(argv: Sequence[str]) -> int:
    options = parse(argv)
    check_root("remusd")
    check_hook("--fence", options.fence)
    service.set_up_logging(options.log_level, options.log_file)
    bindings.lowlevel("xc")
    for module, purpose in MODULES:
        kmod.load(module, purpose)
    for note in options.notes:
        log.warning("%s", note)
    background = None if options.foreground else service.Background()
    leftovers.clean_up()
    daemon = Daemon(options)  # first, as it fails if one runs already, whose the file is
    with service.pid_file(options.pid_file), signals.ending(lambda _: daemon.stop()):
        if background is not None:
            background.ready()
        service.notify("READY=1")
        daemon.run()
    return int(ExitStatus.OK)


def main(argv: Sequence[str] | None = None) -> int:
    """The ``remusd`` command. Returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_command("remusd", arguments, _body, verbose="--verbose" in arguments or "-v" in arguments)


if __name__ == "__main__":
    sys.exit(main())
