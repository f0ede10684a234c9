# SPDX-License-Identifier: LGPL-2.1-or-later
"""remusd's receiving side without Xen: real ports, channels, sessions and state machine; only what touches a
domain is left out.

:class:`Receiver` is the process under attack.  :class:`Healthy` is a protection that has to live through all of it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self
from unittest import mock

from remus_colo.checkpoint.transfer import STATE_CONTEXT, STATE_GRANTS, STATE_HASHES, STATE_ZERO_GFNS
from remus_colo.daemon_options import DaemonOptions
from remus_colo.errors import PeerLost
from remus_colo.failover.arbiter import Verdict
from remus_colo.failover.backup import BackupEvent, BackupState
from remus_colo.options import TlsFiles
from remus_colo.relocation import bulk, listen, tls
from remus_colo.relocation.admission import Throttle
from remus_colo.relocation.channel import Channel
from remus_colo.relocation.handshake import COLO
from remus_colo.relocation.pairing import Pairing
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.server import Server
from remus_colo.relocation.wire import Message
from remus_colo.session import backup
from remus_colo.session.backup import BackupConfig, BackupSession
from remus_colo.session.colo_backup import ColoBackupSession
from remus_colo.session.creation import Creation
from remus_colo.session.loop import Loop
from remus_colo.session.peer import HeartbeatConfig, Peer

# What a working machine never uses up, however busy.
PATIENCE_S = 60.0
# Short, so that what is slow is over soon.
OPEN_TIMEOUT_S = 1.0
PAIR_TIMEOUT_S = 1.0
CREATE_TIMEOUT_S = 2.0
PAGE_BYTES = 4096


def create_fields(name: str, *, interval_s: float = 0.05, timeout_s: float = 30.0) -> dict[str, Any]:
    """CREATE of a guest with one vif and 1 MiB."""
    vif = {"handle": 0, "vni": 16, "port": 4789, "local": "10.7.0.2", "remote": "10.7.0.1", "mtu": 1500}
    return {
        "name": name,
        "mode": "transparent",
        "config": {"c_info": {"name": name}, "b_info": {"max_memkb": 1024}, "nics": [{"bridge": "xenbr0"}]},
        "tunnel": {"tag": "abcdef", "same_host": False, "vifs": [vif]},
        "heartbeat": {"interval_s": interval_s, "timeout_s": timeout_s},
    }


def begin_fields(pages: int) -> dict[str, Any]:
    return {
        "pages": pages,
        "vifs": [{"handle": 0, "nodes": {"tx-ring-ref": "8", "rx-ring-ref": "9"}}],
        "events": [[1, 1, 0, 0]],
        "shared_info_gfn": 16,
        "xen_time_ns": 5,
    }


class Session(ColoBackupSession):
    """A session whose SVM is thin air: it is made, paused, loaded and destroyed at once."""

    def _create_svm(self) -> None:
        def restore() -> None:
            while self._chunks.get() is not None and not self._peer_lost:
                pass
            self._restored.set()

        def restored(_: object, error: BaseException | None) -> None:
            assert error is None
            self.domid = 5
            self.handle(BackupEvent.SVM_CREATED)

        self.loop.thread("restore", restore, restored)

    def _pause_svm(self) -> None:
        self._dirty = bytes(32)

    def _apply_checkpoint(self) -> None:
        received, self._received = self._received, None
        assert received is not None
        self.loop.call(lambda: self.handle(BackupEvent.APPLIED))

    def _resume_svm(self) -> None:
        pass

    def _send_ack(self) -> None:
        BackupSession._send_ack(self)  # thin air has said nothing that is to be dropped first

    def _send_resumed(self) -> None:
        self.event("applied", epoch=self._epoch)
        self.peer.send(MessageType.RESUMED, self._epoch)

    def _judge(self) -> Verdict:
        # the other host lives: a session that took over would never end
        return Verdict.ALIVE

    def _suspect(self) -> None:
        pass

    def _destroy_svm(self) -> None:
        self._end_stream()
        self.loop.call(lambda: self.handle(BackupEvent.SVM_DESTROYED))


class Failures(logging.Handler):
    """Gathers what must not happen: exceptions that nobody expected, in threads or in the log."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.found.append(logging.Formatter().format(record))

    def thread_failed(self, args: Any) -> None:
        self.found.append(f"{args.thread}: {args.exc_type.__name__}: {args.exc_value}")


class Receiver:
    """The receiving side of a remusd, with a port without TLS and one with."""

    def __init__(self, certificates: Path) -> None:
        context = tls.server_context(TlsFiles(certificates / "host.crt", certificates / "host.key"))
        self.failures = Failures()
        self.refused = 0
        self.served = 0
        self.applied = 0
        self.sessions: dict[int, Session] = {}
        self._lock = threading.Lock()
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(mock.patch.object(backup, "Store", mock.Mock))
        self._stack.enter_context(mock.patch.object(threading, "excepthook", self.failures.thread_failed))
        logging.getLogger("remus_colo").addHandler(self.failures)
        self._stack.callback(logging.getLogger("remus_colo").removeHandler, self.failures)
        self.pairing = Pairing(
            time.monotonic_ns, self._serve, pair_timeout_s=PAIR_TIMEOUT_S, create_timeout_s=CREATE_TIMEOUT_S
        )
        self.server = Server(
            [listen.listen("127.0.0.1", 0), listen.listen("127.0.0.1", 0, context)],
            {COLO: self.pairing.handle},
            allows=DaemonOptions().allows,
            half_open_limit=64,
            open_timeout_s=OPEN_TIMEOUT_S,
            event=self._event,
            throttle=Throttle(burst=1 << 62),  # they are to be counted
        )
        self.port, self.ssl_port = (listener.port for listener in self.server.listeners)
        self._thread = threading.Thread(target=self.server.run, name="accept", daemon=True)
        self._thread.start()

    def _event(self, name: str, /, **fields: Any) -> None:
        if name == "refused":
            self.refused += 1
        elif name == "applied":
            self.applied += 1

    def _serve(self, create: Message, control: Channel, data: Channel, host: str) -> None:
        def make_peer(loop: Loop, heartbeat: HeartbeatConfig, **callbacks: Any) -> Peer:
            return Peer(loop, control, data, heartbeat, **callbacks)

        session = Session(BackupConfig(), Creation.parse(create), make_peer, mock.Mock(), self._event)  # type: ignore[arg-type]
        with self._lock:
            self.served += 1
            self.sessions[create.generation] = session
        try:
            session.run()
        finally:
            with self._lock:
                del self.sessions[create.generation]

    def close(self) -> None:
        self.server.stop()
        self._thread.join(PATIENCE_S)
        self.pairing.stop()
        for session in list(self.sessions.values()):
            session.shut_down()
        ended = self.server.close(PATIENCE_S)
        self._stack.close()
        assert ended, "a connection's thread did not end"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Healthy:
    """A protection as ``remus`` has one: heartbeats both ways, and checkpoints when asked for."""

    GENERATION = 0x7EA17

    def __init__(self, receiver: Receiver) -> None:
        self.epoch = 0
        self._receiver = receiver
        self._stack = contextlib.ExitStack()
        self.control = self._stack.enter_context(self._open("control"))
        self.data = self._stack.enter_context(self._open("data"))
        self._ending = threading.Event()
        self._beats = 0
        self.control.send_control(MessageType.CREATE, 0, create_fields("healthy"))
        self.data.send_bulk(MessageType.CREATE_STREAM, 0, [b"guest"])
        self.data.send_bulk(MessageType.CREATE_STREAM, 0, [])
        self._expect(MessageType.CREATED)
        self._beat = threading.Thread(target=self._send_beats, name="healthy", daemon=True)
        self._beat.start()

    def _open(self, kind: str) -> Channel:
        deadline_s = time.monotonic() + PATIENCE_S
        channel = Channel.connect(
            "127.0.0.1", self._receiver.port, deadline_s=deadline_s, generation=self.GENERATION
        )
        channel.send_control(MessageType.HELLO, 0, {"versions": [1], "host": "h", "channel": kind})
        assert channel.recv(deadline_s).type is MessageType.HELLO
        return channel

    def _send_beats(self) -> None:
        sequence = 0
        while not self._ending.wait(0.05):
            sequence += 1
            with contextlib.suppress(PeerLost):  # whoever waits for an answer notices
                self.control.send_control(
                    MessageType.HEARTBEAT,
                    0,
                    {"sequence": sequence, "seen": 0, "sent_ns": 0, "state": "protected"},
                )

    def _expect(self, kind: MessageType) -> Message:
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            message = self.control.recv(deadline_s)
            if message.type is kind:
                return message
            assert message.type is MessageType.HEARTBEAT, message
            self._beats += 1

    def checkpoint(self) -> None:
        """A whole one, through all that the backup must do for it."""
        self.epoch += 1
        self.control.send_control(MessageType.PREPARE, self.epoch)
        assert len(self._expect(MessageType.DIRTY).data) == 32
        for frame in checkpoint_frames(2):
            kind, payload = frame
            if isinstance(payload, dict):
                self.data.send_control(kind, self.epoch, payload)
            else:
                self.data.send_bulk(kind, self.epoch, payload)
        assert self._expect(MessageType.ACK).epoch == self.epoch
        assert self._expect(MessageType.RESUMED).epoch == self.epoch
        assert self._receiver.sessions[self.GENERATION].machine.state is BackupState.STANDBY

    def close(self) -> None:
        """End it as remus does; the backup has to agree."""
        self.control.send_control(MessageType.STOP, 0, {"reason": "done"})
        self._expect(MessageType.BYE)
        self._ending.set()
        self._beat.join(PATIENCE_S)
        assert self._beats, "the backup sent no heartbeat"
        self._stack.close()


def checkpoint_frames(pages: int) -> list[tuple[MessageType, Any]]:
    """Types and payloads: fields of control messages, buffers of bulk ones."""
    digest = bulk.CheckpointDigest()
    frames: list[tuple[MessageType, Any]] = [(MessageType.CHECKPOINT_BEGIN, begin_fields(pages))]
    gfns = b"".join(gfn.to_bytes(8, "little") for gfn in range(pages))
    buffers = bulk.pages_buffers(gfns, bytes(pages * PAGE_BYTES))
    digest.update(buffers, pages=pages)
    frames.append((MessageType.PAGES, buffers))
    for name in (STATE_ZERO_GFNS, STATE_GRANTS, STATE_CONTEXT, STATE_HASHES):
        buffers = bulk.state_buffers(name, name.encode())
        digest.update(buffers)
        frames.append((MessageType.STATE, buffers))
    return [*frames, (MessageType.CHECKPOINT_END, digest.fields())]


# -- what must not grow --------------------------------------------------------------------------------------


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() >= deadline_s:
            faulthandler.dump_traceback()  # of all threads: where does it hang?
            raise AssertionError(what)
        time.sleep(0.002)


@contextlib.contextmanager
def under_attack(certificates: Path) -> Iterator[tuple[Receiver, Healthy]]:
    """A receiver with a healthy protection. At the end that must have gone in order, and left nothing."""
    before = descriptors(), threading.active_count()
    with Receiver(certificates) as receiver:
        healthy = Healthy(receiver)
        yield receiver, healthy
        healthy.checkpoint()
        healthy.close()
        eventually(lambda: receiver.server.threads() == 0, "a session did not end")
        assert receiver.failures.found == []
    eventually(lambda: (descriptors(), threading.active_count()) == before, "something was left behind")
