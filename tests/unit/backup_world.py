# SPDX-License-Identifier: LGPL-2.1-or-later
"""A protection on the backup host without Xen: real session, loop, state machine, channels; SVM and network
tell what was done to them.

:class:`World` is the host; its ``primary`` speaks as ``remus`` does, in the test's own thread.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import Any
from unittest import mock

from primary_world import join_all

from remus_colo.adapters.backend import Vif
from remus_colo.checkpoint.guestinfo import Mode
from remus_colo.errors import PeerLost
from remus_colo.failover.arbiter import Verdict
from remus_colo.failover.backup import UnknownPolicy
from remus_colo.proxy.primary_path import Tunnel
from remus_colo.proxy.rewriter import Connection
from remus_colo.relocation import bulk
from remus_colo.relocation.channel import Channel
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.wire import Message
from remus_colo.session import backup, colo_backup, svm_lan
from remus_colo.session.backup import BackupConfig
from remus_colo.session.colo_backup import ColoBackupSession
from remus_colo.session.creation import Creation
from remus_colo.session.lan import LanSide
from remus_colo.session.peer import HeartbeatConfig, Peer

PATIENCE_S = 60.0
DOMID = 9
NOW_NS = 700 * 10**9  # this host's clock, which stands still
VIF = Vif(DOMID, 0)


class Faults:
    """What fails, by the name of the step: each once. :ivar steps: what was done, in order."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.planned: dict[str, Exception] = {}
        self.at: dict[str, Callable[[], None]] = {}

    def step(self, name: str) -> None:
        self.steps.append(name)
        call = self.at.pop(name, None)
        if call is not None:
            call()
        error = self.planned.pop(name, None)
        if error is not None:
            raise error


class Engine:
    """As :class:`remus_colo.checkpoint.svm.SvmEngine`."""

    def __init__(self, faults: Faults) -> None:
        self._step = faults.step
        self.mode = Mode.TRANSPARENT
        self.guest = mock.Mock()
        self.guest.info.return_value = mock.Mock(dying=False, shutdown=False)
        self.layout = mock.Mock(vifs=(VIF,))
        self.loaded = False
        self.verified_pages = 0
        self.running = False
        self.closed = False
        self.clock_offsets_ns: list[int] = []

    def set_clock(self, offset_ns: int) -> None:
        assert not self.running
        self._step("set_clock")
        self.clock_offsets_ns.append(offset_ns)

    def start(self) -> None:
        self._step("start")
        self.running = True

    def prepare(self) -> bytes:
        self._step("prepare")
        self.running = False
        return bytes(32)

    def apply(self, received: object) -> None:
        self._step("apply")
        self.loaded = True

    def resume(self) -> None:
        self._step("resume")
        self.running, self.loaded = True, False

    def go_on(self) -> None:
        self._step("go_on")
        self.running = True

    def stop_logging(self) -> None:
        self._step("stop_logging")

    def close(self) -> None:
        self.closed = True


class SvmVifPath:
    """As :class:`remus_colo.proxy.backup_path.SvmVifPath`."""

    def __init__(self, faults: Faults) -> None:
        self._step = faults.step
        self.rewriter = mock.Mock(connections=mock.Mock(return_value=[]))
        self.guest_addresses = mock.Mock(addresses=[])
        self.client_addresses = mock.Mock(addresses=[])
        self.in_lan = False

    def await_forwarding(self) -> None:
        self._step("await_forwarding")

    def mute(self) -> None:
        self._step("mute")

    def reset(self) -> None:
        self._step("reset")

    def open_lan(self, bridge: str) -> None:
        self._step("open_lan")
        self.in_lan = True

    def delete_isolated(self) -> None:
        self._step("delete_isolated")

    def make_good(self, bridge: str) -> dict[str, int]:
        self._step("make_good")
        return {"to_guest": 0, "to_lan": 0}

    def expect_outage(self, uplinks: object) -> None:
        pass

    def no_outage(self) -> None:
        pass


class Path:
    """As :class:`remus_colo.proxy.backup_path.BackupPath`."""

    def __init__(self, faults: Faults, bridges: tuple[str, ...]) -> None:
        self._step = faults.step
        self.links = mock.Mock()
        self.links.exists = lambda name: name in bridges
        self.links.mac.return_value = "02:00:00:00:00:01"
        self.links.addresses.return_value = {ip_address("10.77.0.12")}
        self.links.neighbours.return_value = []
        self.vifs = {0: SvmVifPath(faults)}
        self.closed = False

    def start(self, tunnels: object, mtus: object) -> None:
        self._step("path.start")

    def open_queues(self, vifs: object, macs: object) -> None:
        self._step("open_queues")

    def attach(self, vif: Vif) -> None:
        self._step("attach")

    def each(self, call: Callable[[SvmVifPath], object]) -> None:
        for path in self.vifs.values():
            call(path)

    def close(self) -> None:
        self.closed = True
        self._step("path.close")


class Restorer:
    """As :class:`remus_colo.checkpoint.birth.Restorer`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._step = world.faults.step
        self.made = False

    def feed(self, chunk: bytes) -> None:
        self._step("feed")

    def finish(self, store: object) -> int:
        self._step("finish")
        self._world.svm_exists = self.made = True
        return DOMID

    def abort(self) -> None:
        self._step("restore.abort")
        if self._world.xl_leaves_it:
            self._world.svm_exists = self.made = True


class Primary:
    """The other host's ends of the channels."""

    def __init__(self, control: Channel, data: Channel) -> None:
        self.control, self.data = control, data
        self.received: list[MessageType] = []
        self.epoch = 0
        self.stopped_ns = 0  # the guest's clock at the next checkpoint

    def expect(self, kind: MessageType) -> Message:
        """The next message of a type, whatever comes before it."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            message = self.control.recv(deadline_s)
            if message.type is not MessageType.HEARTBEAT:
                self.received.append(message.type)
            if message.type is kind:
                return message

    def send_guest(self) -> None:
        self.data.send_bulk(MessageType.CREATE_STREAM, 0, [b"guest"])
        self.data.send_bulk(MessageType.CREATE_STREAM, 0, [])

    def begin(self) -> None:
        """As far as the first checkpoint, which is not there yet."""
        self.send_guest()
        self.expect(MessageType.CREATED)

    def prepare(self) -> None:
        self.epoch += 1
        self.control.send_control(MessageType.PREPARE, self.epoch)
        self.expect(MessageType.DIRTY)

    def send_checkpoint(self, *, whole: bool = True) -> None:
        digest = bulk.CheckpointDigest()
        begin = {"pages": 0, "vifs": [], "events": [], "shared_info_gfn": 1, "xen_time_ns": self.stopped_ns}
        self.data.send_control(MessageType.CHECKPOINT_BEGIN, self.epoch, begin)
        for name in ("zero-gfns", "grants", "hvm-context", "hashes"):
            buffers = bulk.state_buffers(name, b"")
            digest.update(buffers)
            self.data.send_bulk(MessageType.STATE, self.epoch, buffers)
        if whole:
            self.data.send_control(MessageType.CHECKPOINT_END, self.epoch, digest.fields())

    def checkpoint(self) -> None:
        self.prepare()
        self.send_checkpoint()
        self.expect(MessageType.ACK)
        self.expect(MessageType.RESUMED)

    def stop(self) -> None:
        self.control.send_control(MessageType.STOP, 0, {"reason": "done"})
        self.expect(MessageType.BYE)

    def leave(self) -> None:
        self.control.close()
        self.data.close()

    def rest(self) -> list[MessageType]:
        """What is still to be heard until the channel is closed there."""
        with contextlib.suppress(PeerLost):
            self.expect(MessageType.HELLO)
        return self.received


class World:
    """:param names: of the domains that are there already, by domid.
    :param clock_offset_ns: as the primary asks for it.
    :ivar verdict: of the LAN.
    :ivar xl_config: libxl's configuration of the SVM.
    :ivar xl_leaves_it: a restore that is given up leaves the domain: xl had it whole, or was killed.
    :ivar ended: what the session's run raised, once it has ended.
    """

    def __init__(
        self,
        *,
        verdict: Verdict | Exception = Verdict.DEAD,
        unknown: UnknownPolicy = UnknownPolicy.STAND_DOWN,
        bridges: tuple[str, ...] = ("xenbr0",),
        names: dict[str, str] | None = None,
        clock_offset_ns: int | None = None,
        connections: dict[int, tuple[Connection, ...]] | None = None,
    ) -> None:
        self.faults = Faults()
        self.verdict = verdict
        self.engine = Engine(self.faults)
        self.path = Path(self.faults, bridges)
        self.svm_exists = False
        self.xl_leaves_it = False
        self.destroyed = 0
        self.claimed: set[str] = set()  # tags
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.asked: list[LanSide] = []  # of the last look at the LAN
        self.ended: Exception | None = None
        ours, theirs = zip(*(socket.socketpair() for _ in range(2)), strict=True)
        control, data = (Channel(sock, generation=1, peer="the primary") for sock in ours)
        self.primary = Primary(*(Channel(sock, generation=1) for sock in theirs))
        self._stack = contextlib.ExitStack()
        nodes = {f"/local/domain/{domid}/name": name for domid, name in (names or {}).items()}
        store = mock.Mock(
            list=lambda path: list(names or {}), read=lambda path: nodes.get(path, "02:00:00:00:00:02")
        )
        patch = lambda *args: self._stack.enter_context(mock.patch.object(*args))  # noqa: E731
        patch(backup, "Store", lambda: store)
        patch(colo_backup, "BackupPath", lambda *_: self.path)
        patch(colo_backup, "Guest", mock.Mock())
        patch(colo_backup, "GuestLayout", mock.Mock())
        patch(colo_backup, "SvmEngine", lambda *_: self.engine)
        patch(colo_backup.birth, "Restorer", lambda name: Restorer(self))
        patch(colo_backup, "domain_named", self._domain_named)
        patch(colo_backup.leftovers, "claim", self._claim)
        patch(colo_backup.toolstack, "destroy", self._destroy)
        patch(colo_backup.toolstack, "rename", lambda domid, name: self.faults.step("rename"))
        self.xl_config: dict[str, Any] = {"nics": [{"bridge": "rcbabcdef.0", "mac": "02:00:00:00:00:02"}]}
        patch(colo_backup.userdata, "change", self._change_config)
        patch(svm_lan, "probe_guest", self._probe)
        patch(svm_lan, "Links", lambda: contextlib.nullcontext(self.path.links))
        patch(svm_lan, "RawLink", mock.MagicMock())
        creation = Creation(
            name="web",
            mode=Mode.TRANSPARENT,
            config={"c_info": {"name": "web"}, "nics": [{"bridge": "xenbr0", "ifname": "web0"}]},
            tag="abcdef",
            same_host=False,
            tunnels={0: Tunnel(16, 4789, "10.7.0.2", "10.7.0.1")},
            mtus={0: 1500},
            heartbeat=HeartbeatConfig(0.5, 30.0),
            clock_offset_ns=clock_offset_ns,
            host_addresses=(ip_address("10.77.0.11"),),
            connections=connections or {},
        )
        self.session = ColoBackupSession(
            BackupConfig(unknown=unknown),
            creation,
            lambda loop, heartbeat, **calls: Peer(loop, control, data, heartbeat, **calls),
            mock.Mock(now_ns=lambda: NOW_NS),
            self._event,
        )
        self._thread = threading.Thread(target=self._run)

    def _event(self, event: str, /, **fields: Any) -> None:
        self.events.append((event, fields))
        self.faults.step(f"event:{event}")

    def _run(self) -> None:
        try:
            self.session.run()
        except Exception as error:
            self.ended = error

    def _change_config(self, domid: int, alter: Callable[[dict[str, Any]], None]) -> None:
        self.faults.step("change_config")
        alter(self.xl_config)

    @contextlib.contextmanager
    def _claim(self, tag: str) -> Iterator[None]:
        """The kernel's is for all processes, and other tests may run beside this one."""
        self.claimed.add(tag)
        yield
        self.claimed.remove(tag)

    def _domain_named(self, _store: object, name: str) -> int | None:
        return DOMID if self.svm_exists and name == "web--secondary" else None

    def _destroy(self, domid: int) -> None:
        assert domid == DOMID
        self.faults.step("destroy")
        self.svm_exists = False
        self.destroyed += 1

    def _probe(self, sides: list[LanSide], _window_s: float) -> Verdict:
        self.asked = sides
        self.faults.step("probe")
        if isinstance(self.verdict, Exception):
            raise self.verdict
        return self.verdict

    @contextlib.contextmanager
    def running(self) -> Iterator[Primary]:
        """The session has ended at the end of this."""
        try:
            self._thread.start()
            yield self.primary
            self._thread.join(PATIENCE_S)
            assert not self._thread.is_alive(), "the session did not end"
        finally:
            self.session.shut_down()
            self.primary.leave()
            self._thread.join(PATIENCE_S)
            join_all()
            self._stack.close()

    def take_over(self) -> None:
        """A whole life: the primary leaves after a checkpoint, the SVM is the guest, and then remusd ends."""
        with self.running() as primary:
            primary.begin()
            primary.checkpoint()
            primary.leave()
            self.await_event("active")
            self.session.shut_down()

    def await_event(self, name: str) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not any(event == name for event, _ in self.events):
            assert time.monotonic() < deadline_s, f"no event {name!r}"
            time.sleep(0.002)

    def await_state_after(self, state: str) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while state not in self.states()[:-1]:
            assert time.monotonic() < deadline_s, f"no state after {state!r}"
            time.sleep(0.002)

    def call(self, call: Callable[[], object]) -> None:
        """In the session's loop, to the end of it."""
        done = threading.Event()

        def run() -> None:
            try:
                call()
            finally:
                done.set()

        self.session.loop.call(run)
        assert done.wait(PATIENCE_S)

    def texts(self) -> list[str]:
        return [fields["text"] for name, fields in self.events if name == "error"]

    def states(self) -> list[str]:
        return [fields["new"] for name, fields in self.events if name == "state"]

    def assert_gone(self) -> None:
        """Nothing is left of it."""
        assert not self.svm_exists
        assert self.path.closed
        assert not self.claimed
        assert self.engine.closed or "start" not in self.faults.steps
        assert self.events[-1][0] == "ended"

    def assert_serving(self) -> None:
        """The SVM is the guest."""
        assert self.svm_exists
        assert self.destroyed == 0
        assert self.path.vifs[0].in_lan
        assert self.engine.running
