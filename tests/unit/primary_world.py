# SPDX-License-Identifier: LGPL-2.1-or-later
"""A protection on the primary host without Xen: real session, loop, state machine, channels; guest and
network are told of, and tell.

:class:`World` is the host, :class:`Backup` the other one, as docs/protocol.rst has it, with a thread for each channel.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any
from unittest import mock

from remus_colo.adapters.backend import Vif
from remus_colo.adapters.xenctrl import DomainInfo, ShutdownReason
from remus_colo.checkpoint.guestinfo import Mode
from remus_colo.checkpoint.pvm import Snapshot
from remus_colo.errors import PeerLost, XenError
from remus_colo.proxy.comparator import CompareConfig
from remus_colo.proxy.primary_path import Tunnel
from remus_colo.relocation.channel import Channel
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.wire import Message
from remus_colo.session import colo_primary
from remus_colo.session.colo_primary import ColoConfig, ColoSession
from remus_colo.session.loop import Loop
from remus_colo.session.peer import HeartbeatConfig, Peer

PATIENCE_S = 60.0
DOMID = 7
VIF = Vif(DOMID, 0)


def join_all() -> None:
    """What a session leaves ends by itself, but a test that counts threads may come next."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), thread


class Faults:
    """What fails, by the name of the step: each once."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.planned: dict[str, Exception] = {}

    def step(self, name: str) -> None:
        self._world.steps.append(name)
        call = self._world.at.pop(name, None)
        if call is not None:
            call()
        error = self.planned.pop(name, None)
        if error is not None:
            raise error


class Guest:
    """Runs unless it is paused, suspended or gone."""

    domid = DOMID

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self.pauses = 0
        self.suspended = False
        self.gone = False
        self.logging = False

    @property
    def running(self) -> bool:
        return not (self.pauses or self.suspended or self.gone)

    def info(self) -> DomainInfo:
        if self.gone:
            raise XenError("there is no such domain", domid=DOMID, errno=3)
        return DomainInfo(
            domid=DOMID, tot_pages=1, shared_info_gfn=1, vcpus=1, hvm=True, hap=True, dying=False, paused=bool(self.pauses),
            shutdown=self.suspended, shutdown_reason=int(ShutdownReason.SUSPEND), blocked=True,
        )  # fmt: skip

    def _check(self) -> None:
        if self.gone:
            raise XenError("there is no such domain", domid=DOMID, errno=3)

    def pause(self) -> None:
        self._faults.step("pause")
        self._check()
        self.pauses += 1

    def unpause(self) -> None:
        self._check()
        self.pauses -= 1


class NoSqueeze(Snapshot):
    def squeeze(self) -> None:
        pass


class Engine:
    """As :class:`remus_colo.checkpoint.pvm.PvmEngine`."""

    clock = None

    def __init__(self, faults: Faults, mode: Mode) -> None:
        self.guest = Guest(faults)
        self.layout = mock.Mock(vifs=(VIF,))
        self.mode = mode
        self._step = faults.step
        self._stopped = False
        self.closed = False

    def suspend(self) -> None:
        self._step("suspend")
        self.guest._check()
        self.guest.suspended = True

    def start_logging(self) -> None:
        self._step("start_logging")
        self.guest.logging = True

    def resume_as_new(self) -> None:
        self._step("resume_as_new")
        self.guest.suspended = False

    def resume_cancelled(self) -> None:
        self.guest._check()
        self.guest.suspended = False

    def await_connected(self) -> None:
        self._step("await_connected")

    def rings_changed(self) -> None:
        pass

    def prepare(self) -> None:
        self._step("prepare")

    def drain_input(self) -> bool:
        self._step("drain_input")
        return True

    def stop(self) -> None:
        if self.mode is Mode.COOPERATIVE:
            self.suspend()
        else:
            self.guest.pause()
        self._stopped = True

    def collect(self, epoch: int, dirty_too: bytes, *, verify: bool = False) -> Snapshot:
        assert not self.guest.running
        self._step("collect")
        return NoSqueeze(
            epoch=epoch, gfns=bytearray(), pages=bytearray(), count=0, grants=b"", context=b"", ring_nodes={},
            event_channels=[], shared_info_gfn=1, xen_time_ns=1,
        )  # fmt: skip

    def go(self) -> None:
        if not self._stopped:
            return
        self._stopped = False
        if self.mode is Mode.COOPERATIVE:
            self.resume_cancelled()
        else:
            self.guest.unpause()

    def close(self) -> None:
        with contextlib.suppress(XenError):
            self.go()
        self.guest.logging = False
        self.closed = True


class VifPath:
    """As :class:`remus_colo.proxy.primary_path.VifPath`."""

    vif = VIF

    def __init__(self, faults: Faults) -> None:
        self._step = faults.step
        self.input_held = self.mirror_held = self.output_held = False
        self.waiting_since_s: float | None = None

    def hold_input(self) -> None:
        self._step("hold_input")
        self.input_held = self.mirror_held = True

    def release_input(self) -> None:
        self._step("release_input")
        self.input_held = False

    def give_input(self) -> None:
        self._step("give_input")
        self.input_held = self.mirror_held = False

    def cut(self) -> None:
        self._step("cut")
        self.output_held = True

    def commit(self) -> None:
        self._step("commit")
        self.output_held = False

    def secondary_resumed(self) -> None:
        self._step("secondary_resumed")
        self.mirror_held = False

    def abort(self) -> None:
        self.input_held = self.mirror_held = False

    def check_losses(self) -> None:
        pass

    def release_all(self) -> None:
        self._step("release_all")
        self.input_held = self.mirror_held = self.output_held = False

    def counters(self) -> dict[str, int]:
        return {}


class Path:
    """As :class:`remus_colo.proxy.primary_path.PrimaryPath`."""

    def __init__(self, faults: Faults) -> None:
        self._step = faults.step
        self.links = mock.Mock()
        self.links.master_of.return_value = None
        self.links.mtu.return_value = 1500
        self.links.addresses.return_value = {ip_address("10.77.0.11")}
        self.vifs = [VifPath(faults)]
        self.started = False
        self.closed = False
        self.dropped = False

    def start(self, tunnels: dict[int, Tunnel]) -> None:
        self._step("path.start")
        self.started = True

    def each(self, call: Callable[[VifPath], object]) -> None:
        for vif in self.vifs:
            call(vif)

    def release_all(self) -> None:
        self.each(lambda vif: vif.release_all())

    def close(self, *, drop_held: bool) -> None:
        self.closed, self.dropped = True, drop_held
        for vif in self.vifs:
            vif.input_held = vif.mirror_held = vif.output_held = False
        self._step("path.close")


class Session(ColoSession):
    def __init__(self, path: Path, *args: Any) -> None:
        self._fake_path = path
        super().__init__(*args)

    def _make_path(self) -> Any:
        return self._fake_path


class Backup:
    """Answers as ``remusd`` does.

    :ivar at: what to do, instead of an answer, when a message of a type comes for the nth time.
    """

    def __init__(self, control: Channel, data: Channel) -> None:
        self.control, self.data = control, data
        self.received: list[MessageType] = []
        self.at: dict[tuple[MessageType, int], Callable[[Message], None]] = {}
        self._threads = [threading.Thread(target=self._read, args=(channel,)) for channel in (control, data)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """After the session, which has closed its ends: hear the rest."""
        for thread in self._threads:
            thread.join(PATIENCE_S)
        self.leave()

    def leave(self) -> None:
        """As when the host dies, but that its kernel says so."""
        self.control.close()
        self.data.close()

    def say(self, kind: MessageType, epoch: int = 0, **fields: object) -> None:
        with contextlib.suppress(PeerLost):
            self.control.send_control(kind, epoch, fields)

    def _read(self, channel: Channel) -> None:
        with contextlib.suppress(PeerLost):
            while True:
                message = channel.recv(time.monotonic() + 2 * PATIENCE_S)
                self.received.append(message.type)
                call = self.at.get((message.type, self.received.count(message.type)))
                (call or self.answer)(message)

    def answer(self, message: Message) -> None:
        match message.type:
            case MessageType.CREATE:
                self.say(MessageType.CREATED, domid=9, ports={}, addresses={})
            case MessageType.PREPARE:
                with contextlib.suppress(PeerLost):
                    self.control.send_bulk(MessageType.DIRTY, message.epoch, [b""])
            case MessageType.CHECKPOINT_END:
                self.say(MessageType.ACK, message.epoch)
                self.say(MessageType.RESUMED, message.epoch)
            case MessageType.STOP | MessageType.BYE:
                self.say(MessageType.BYE)


class World:
    """:ivar steps: what was done to guest and network, in order.
    :ivar at: what happens when a step is taken, once.
    """

    def __init__(
        self, mode: Mode = Mode.TRANSPARENT, *, timeout_s: float = 30.0, fence: tuple[str, ...] = ()
    ) -> None:
        self.steps: list[str] = []
        self.at: dict[str, Callable[[], None]] = {}
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.faults = Faults(self)
        self.loop = Loop()
        self.engine = Engine(self.faults, mode)
        self.path = Path(self.faults)
        ours, theirs = zip(*(socket.socketpair() for _ in range(2)), strict=True)
        control, data = (Channel(sock, generation=1, peer="the backup") for sock in ours)
        self.backup = Backup(*(Channel(sock, generation=1) for sock in theirs))
        self.session = self._make_session(
            lambda loop, heartbeat, **calls: Peer(loop, control, data, heartbeat, **calls),
            mode,
            HeartbeatConfig(timeout_s / 8, timeout_s),
            fence,
        )
        self.on_event: dict[str, Callable[[], None]] = {}

    def _make_session(
        self, make_peer: Callable[..., Peer], mode: Mode, heartbeat: HeartbeatConfig, fence: tuple[str, ...]
    ) -> Any:
        tunnel = Tunnel(16, 4789, "10.7.0.1", "10.7.0.2")
        config = ColoConfig(
            name="web", mode=mode, heartbeat=heartbeat, compare=CompareConfig(), period_s=0.0, verify_every=0,
            tunnels={0: tunnel}, backup_tunnels={0: tunnel}, tag="abcdef", same_host=False, destination="backup", fence=fence,
        )  # fmt: skip
        return Session(self.path, self.loop, config, self.engine, mock.Mock(), make_peer, self._event)

    def _event(self, event: str, /, **fields: Any) -> None:
        self.events.append((event, fields))
        call = self.on_event.pop(event, None)
        if call is not None:
            call()

    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    def states(self) -> list[str]:
        """The states that were reached, in order."""
        return [fields["new"] for name, fields in self.events if name == "state"]

    def run(self) -> Any:
        """Protect until the end. Returns the exit status, or the exception."""

        def send_guest(
            domid: int, config: object, suspend: Callable[[], None], write: Callable[[bytes], None]
        ) -> None:
            write(b"live")
            suspend()
            write(b"end")

        too_long = threading.Timer(PATIENCE_S, lambda: self.loop.call(self.loop.stop))
        with (
            mock.patch.object(
                colo_primary.toolstack, "domain_config", lambda domid: {"c_info": {"name": "web"}}
            ),
            mock.patch.object(colo_primary.birth, "send_guest", send_guest),
            mock.patch("remus_colo.session.primary.toolstack.destroy", self._destroy),
        ):
            self.backup.start()
            too_long.start()
            try:
                return self.session.run()
            except Exception as error:
                return error
            finally:
                assert too_long.is_alive(), "the session did not end"
                too_long.cancel()
                self.backup.close()
                join_all()
                self.loop.close()

    def _destroy(self, domid: int) -> None:
        self.engine.guest.gone = True

    def assert_clean(self) -> None:
        """The guest runs on, with its network as it was."""
        assert self.engine.guest.running, (self.engine.guest.pauses, self.engine.guest.suspended)
        assert self.engine.closed
        assert not self.engine.guest.logging
        assert self.path.closed
        (vif,) = self.path.vifs
        assert not (vif.input_held or vif.mirror_held or vif.output_held)
