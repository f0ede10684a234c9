# SPDX-License-Identifier: LGPL-2.1-or-later
"""A Remus protection on the backup host: what it looks for before it takes over, and what the LAN hears of that."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import Any
from unittest import mock

import pytest
from primary_world import join_all

from remus_colo.adapters.devicemodel import DeviceState
from remus_colo.errors import PeerLost, XenError
from remus_colo.failover.arbiter import Verdict
from remus_colo.relocation.channel import Channel
from remus_colo.relocation.schema import MessageType
from remus_colo.session import backup, lan, remus_backup
from remus_colo.session.backup import BackupConfig
from remus_colo.session.creation import RemusCreation
from remus_colo.session.lan import LanSide
from remus_colo.session.peer import HeartbeatConfig, Peer
from remus_colo.session.remus_backup import RemusBackupSession
from remus_colo.session.remus_sender import CheckpointSender

PATIENCE_S = 60.0
DOMID = 9
GUEST_MAC = "02:00:00:00:00:02"
THIS_HOST, ROUTER, CLIENT, GUEST = "10.77.0.12", "10.77.0.1", "10.77.0.5", "10.77.0.10"


class Receiver:
    """As :class:`remus_colo.checkpoint.receiver.Receiver`; the guest is there when the test says so."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.fed = b""
        self.may_start = threading.Event()
        self.fails: Exception | None = None
        self.aborted = False

    def running(self) -> bool:
        return True

    def feed(self, piece: bytes) -> None:
        self.fed += bytes(piece)

    def take_over(self, store: object) -> int:
        assert self.may_start.wait(PATIENCE_S)
        if self.fails is not None:
            raise self.fails
        return DOMID

    def abort(self, store: object) -> None:
        self.aborted = True


class World:
    """:ivar said: frames with which the LAN was told of the guest.
    :ivar asked, windows_s: of each look at the LAN.
    """

    def __init__(self, *, same_host: bool = False) -> None:
        self.receiver = Receiver({})
        self.said: list[bytes] = []
        self.asked: list[LanSide] = []
        self.windows_s: list[float] = []
        self.events: list[str] = []
        ours, theirs = zip(*(socket.socketpair() for _ in range(2)), strict=True)
        control, data = (Channel(sock, generation=1, peer="the primary") for sock in ours)
        self.control, self.data = (Channel(sock, generation=1) for sock in theirs)
        self._stack = contextlib.ExitStack()
        links = mock.Mock()
        links.addresses.return_value = {ip_address(THIS_HOST)}
        links.neighbours.return_value = [ip_address(text) for text in (ROUTER, THIS_HOST, GUEST)]
        links.mac.return_value = "02:00:00:00:00:0c"
        links.__enter__ = lambda links: links
        links.__exit__ = lambda *_: None
        patch = lambda *args: self._stack.enter_context(mock.patch.object(*args))  # noqa: E731
        patch(backup, "Store", lambda: mock.Mock(list=lambda path: [], read=lambda path: "web"))
        patch(remus_backup, "Links", mock.MagicMock(return_value=links))
        patch(remus_backup, "Receiver", lambda config: self.receiver)
        patch(lan, "ways_to_lan", lambda bridge: [f"uplink of {bridge}"])
        patch(remus_backup, "probe_guest", self._probe)
        raw = mock.MagicMock()
        raw.__enter__.return_value.send = self.said.append
        patch(remus_backup, "RawLink", lambda ifname: raw)
        creation = RemusCreation(
            name="web",
            config={
                "c_info": {"name": "web", "type": "pvh"},
                "nics": [{"bridge": "xenbr0", "mac": GUEST_MAC}],
            },
            same_host=same_host,
            handles=(0,),
            heartbeat=HeartbeatConfig(0.5, 30.0),
        )
        self.session = RemusBackupSession(
            BackupConfig(),
            creation,
            lambda loop, heartbeat, **calls: Peer(loop, control, data, heartbeat, **calls),
            mock.Mock(now_ns=lambda: 1),
            self._event,
        )
        self._thread = threading.Thread(target=self.session.run)

    def _event(self, event: str, /, **fields: Any) -> None:
        self.events.append(event)

    def _probe(self, sides: list[LanSide], window_s: float) -> Verdict:
        self.asked += sides
        self.windows_s.append(window_s)
        return Verdict.DEAD

    @contextlib.contextmanager
    def protected(self, longest_pause_s: float = 0.0) -> Iterator[None]:
        """There is one whole checkpoint; the session has ended at the end of this."""
        try:
            self._thread.start()
            self._expect(self.control, MessageType.CREATED)
            sender = CheckpointSender(
                self.data,
                compress=False,
                describe=lambda: {
                    "longest_pause_s": longest_pause_s,
                    "addresses": {"0": [GUEST]},
                    "neighbours": {"0": [CLIENT, THIS_HOST]},
                },
            )
            sender.begin_first()
            sender.live(b"guest")
            sender.finish_first(DeviceState())
            self._expect(self.control, MessageType.RESUMED)
            yield
            self._thread.join(PATIENCE_S)
            assert not self._thread.is_alive(), "the session did not end"
        finally:
            self.receiver.may_start.set()
            self.session.shut_down()
            self.leave()
            self._thread.join(PATIENCE_S)
            join_all()
            self._stack.close()

    @staticmethod
    def _expect(channel: Channel, kind: MessageType) -> None:
        while channel.recv(time.monotonic() + PATIENCE_S).type is not kind:
            pass

    def leave(self) -> None:
        with contextlib.suppress(PeerLost):
            self.control.close()
            self.data.close()

    def await_true(self, condition: Callable[[], object]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline_s
            time.sleep(0.002)


@pytest.mark.parametrize("same_host", [False, True])
@pytest.mark.parametrize(("pause_s", "window_s"), [(0.0, 15.0), (20.0, 30.0)])
def test_who_is_asked_before_a_takeover(same_host: bool, pause_s: float, window_s: float) -> None:
    """The guest; its clients, this host's router besides; for longer than it has stood still."""
    world = World(same_host=same_host)
    world.receiver.may_start.set()
    with world.protected(pause_s):
        world.leave()
        world.await_true(lambda: "active" in world.events)
        world.session.shut_down()
    (side,) = world.asked
    assert side.ifnames == (["xenbr0"] if same_host else ["uplink of xenbr0"])
    assert [str(address) for address in side.guest_addresses] == [GUEST]
    assert [str(address) for address in side.client_addresses] == [CLIENT]
    assert [str(address) for address in side.neighbours] == [ROUTER]
    assert world.windows_s == [window_s]


def test_a_guest_is_announced_until_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """xl needs seconds to build it: a primary that was only frozen looks for it meanwhile."""
    monkeypatch.setattr(backup, "ANNOUNCE_INTERVAL_S", 0.01)
    world = World()
    with world.protected():
        assert world.said == []
        world.leave()
        world.await_true(lambda: len(world.said) > 5 * 2 * backup.ANNOUNCE_REPEATS)  # two frames each time
        assert "active" not in world.events
        world.receiver.may_start.set()
        world.await_true(lambda: "active" in world.events)
        said: list[int] = []

        def silent() -> bool:
            said.append(len(world.said))
            time.sleep(0.1)  # ten times the interval
            return len(world.said) == said[-1]

        world.await_true(silent)
        world.session.shut_down()
    assert {frame[6:12].hex(":") for frame in world.said} == {GUEST_MAC}


def test_a_guest_that_does_not_start_is_no_longer_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup, "ANNOUNCE_INTERVAL_S", 0.01)
    world = World()
    world.receiver.fails = XenError("xl failed")
    with world.protected():
        world.leave()
        world.await_true(lambda: world.said)
        world.receiver.may_start.set()
    assert "active" not in world.events
    assert world.events[-1] == "ended"
