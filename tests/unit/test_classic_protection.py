# SPDX-License-Identifier: LGPL-2.1-or-later
"""A script's checkpoints through a MigrationSocket: real session, loop and channels, and a backup that answers."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from primary_world import DOMID, PATIENCE_S, VIF, Engine, Faults, join_all
from remus_world import RemusBackup, Rounds

import remus_colo.classic.finder
from remus_colo.adapters import xenctrl
from remus_colo.checkpoint.guestinfo import Mode
from remus_colo.checkpoint.periodic import Ended
from remus_colo.classic import colo, protection
from remus_colo.classic.protection import CallingSession, Calls, Link
from remus_colo.errors import DomainError, ExitStatus, NetworkError, PeerError, PeerLost, RemusError, XenError
from remus_colo.relocation.channel import Channel
from remus_colo.relocation.schema import MessageType
from remus_colo.remus_options import RemusOptions
from remus_colo.session import remus_primary, remus_worker

assert remus_colo.classic.finder.XenFinder

pytest.importorskip("pyroute2", reason="pyroute2 is not installed (Debian: python3-pyroute2)")
pytest.importorskip("pyxs", reason="pyxs is not installed (Debian: python3-pyxs)")

from xen.lowlevel import checkpoint  # noqa: E402
from xen.remus import save  # noqa: E402


class NearChannel(Channel):
    addresses = ("10.7.0.1", "10.7.0.2")  # type: ignore[assignment]


class Host:
    """One with a domain that is open for checkpoints.

    :ivar backup: the other end of the last :meth:`link`.
    """

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.before_run: Callable[[], object] = lambda: None
        self.at: dict[str, Any] = {}
        self.faults = Faults(self)  # type: ignore[arg-type]
        self.engine: Any = Engine(self.faults, Mode.COOPERATIVE)
        self.engine.suspender, self.engine.dirty_log, self.engine.device_model = mock.Mock(), True, None
        self.domain: Any = SimpleNamespace(
            domid=DOMID, name="web", engine=self.engine, store=mock.Mock(), close=lambda: None
        )

    def link(self) -> Any:
        ours, theirs = zip(*(socket.socketpair() for _ in range(2)), strict=True)
        link: Any = Link.__new__(Link)
        link.host, link.options = "backup", RemusOptions("web")
        link.control, link.data = (NearChannel(sock, generation=1, peer="the backup") for sock in ours)
        self.backup = RemusBackup(*(Channel(sock, generation=1) for sock in theirs))
        return SimpleNamespace(link=link)

    def run(self, calls: Calls) -> None:
        self._until_the_end(
            lambda iofile: protection.run(self.domain, iofile, calls, interval_s=0, compress=False)
        )

    def start(self, **callbacks: Any) -> None:
        """As a script does."""
        checkpointer = checkpoint.checkpointer()
        checkpointer._domain = self.domain
        self._until_the_end(lambda iofile: checkpointer.start(iofile, **callbacks))

    def _until_the_end(self, protect: Callable[[Any], None]) -> None:
        iofile = self.link()
        self.before_run()
        too_long = threading.Timer(PATIENCE_S, self.backup.leave)
        self.backup.start()
        too_long.start()
        try:
            protect(iofile)
        finally:
            assert too_long.is_alive(), "the protection did not end"
            too_long.cancel()
            self.backup.close()
            join_all()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    made = Host()
    watched = mock.Mock(vifs=[mock.Mock(vif=VIF)])
    watched.links.master_of.return_value = None
    monkeypatch.setattr(CallingSession, "_make_path", lambda _: watched)
    monkeypatch.setattr(remus_primary.toolstack, "domain_config", lambda _: {"c_info": {"name": "web"}})
    monkeypatch.setattr(
        "remus_colo.session.primary.toolstack.destroy", lambda _: setattr(made.engine.guest, "gone", True)
    )
    monkeypatch.setattr(
        remus_worker,
        "PeriodicCheckpoints",
        lambda suspender, destination, calls, *, on_round, on_standstill, **_: Rounds(
            made,  # type: ignore[arg-type]
            destination,
            calls,
            on_round,
            on_standstill,
        ),
    )
    yield made
    protection.withheld.clear()


def test_a_domain_that_is_open_can_be_protected_twice(host: Host) -> None:
    for _ in range(2):
        host.run(Calls(checkpoint=lambda: False))
        assert host.engine.guest.running
        assert not host.engine.closed
    assert host.steps.count("suspend") == 2


@pytest.mark.parametrize("callback", ["suspend", "resume", "checkpoint"])
@pytest.mark.parametrize(
    "mine", [NetworkError("mine"), ValueError("mine")], ids=lambda error: type(error).__name__
)
def test_what_a_callback_raises_comes_out_as_it_is(host: Host, callback: str, mine: Exception) -> None:
    """Also what a device of ours has raised in one."""

    def fail() -> None:
        raise mine

    with pytest.raises(type(mine)) as raised:
        host.start(
            **{
                {"suspend": "suspend_cb", "resume": "postcopy_cb", "checkpoint": "checkpoint_cb"}[
                    callback
                ]: fail
            }
        )
    assert raised.value is mine
    assert host.engine.guest.running


def test_what_a_callback_raises_under_colo_comes_out_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = NetworkError("mine")

    def fail() -> None:
        raise mine

    def run(domid: int, link: Any, calls: Any, **_: object) -> None:
        with pytest.raises(NetworkError):
            calls.suspend()
        raise DomainError("the session ended because of that")

    monkeypatch.setattr(save.vm, "VM", lambda domid: SimpleNamespace(domid=domid, dominfo=[]))
    monkeypatch.setattr(save.colo, "run", run)
    socket_to_backup = save.MigrationSocket.__new__(save.MigrationSocket)
    socket_to_backup.link = Link.__new__(Link)
    with pytest.raises(NetworkError) as raised:
        save.ColoSaver(DOMID, socket_to_backup, fail).start()
    assert raised.value is mine


def test_a_backup_that_gives_up_while_the_guest_is_copied(host: Host) -> None:
    """Its reason counts, and not that no more could be sent."""
    host.before_run = lambda: host.backup.at.update(
        {
            (MessageType.CREATE_STREAM, 1): lambda _: host.backup.say(MessageType.ABORT, reason="no memory"),
            (MessageType.CHECKPOINT_END, 1): lambda _: None,
        }
    )
    with pytest.raises(PeerError, match="the backup host gave up: no memory"):
        host.run(Calls(checkpoint=lambda: True))
    assert host.engine.guest.running


@pytest.mark.parametrize("kind", [MessageType.CHECKPOINT_BEGIN, MessageType.CHECKPOINT_END])
def test_a_backup_that_goes(host: Host, kind: MessageType) -> None:
    host.before_run = lambda: host.backup.at.update({(kind, 3): lambda _: host.backup.leave()})
    with pytest.raises(PeerLost, match="the backup is gone, web goes on unprotected"):
        host.run(Calls(checkpoint=lambda: True))
    assert host.engine.guest.running


STOP = KeyboardInterrupt()
LOST = PeerLost("the channel to the backup is broken: it was closed here")
REFUSED = PeerError("no memory")


@pytest.mark.parametrize(
    ("status", "told", "failure", "expected"),
    [
        (ExitStatus.OK, None, None, None),
        (ExitStatus.OK, None, LOST, LOST),
        (ExitStatus.PEER_REFUSED, REFUSED, LOST, REFUSED),
        (ExitStatus.PEER_REFUSED, REFUSED, Ended(), REFUSED),
        (ExitStatus.PEER_REFUSED, REFUSED, STOP, STOP),
        (ExitStatus.UNPROTECTED, None, LOST, "goes on unprotected"),
        (ExitStatus.FENCED, None, LOST, "has taken over web"),
        (ExitStatus.FENCED, None, None, "has taken over web"),
        (ExitStatus.OK, None, Ended(), "web has ended before it was copied"),
        (ExitStatus.FAILURE, None, None, "left no reason"),
        (REFUSED, None, LOST, REFUSED),
    ],
)
def test_the_reason_that_a_script_is_told(
    status: Any, told: RemusError | None, failure: BaseException | None, expected: BaseException | str | None
) -> None:
    session: Any = SimpleNamespace(failure=told)
    reason = protection._reason("web", session, status, failure)
    if isinstance(expected, str):
        assert isinstance(reason, RemusError) and expected in str(reason)
    else:
        assert reason is expected


@pytest.mark.parametrize(
    ("fails", "again", "said"),
    [
        (None, None, None),
        ("Xen refused", None, "^Xen refused$"),
        ("Xen refused", "still", "web stands still.*Xen refused; then still"),
    ],
)
def test_a_guest_that_stopped_half_way_into_its_resume(
    monkeypatch: pytest.MonkeyPatch, fails: str | None, again: str | None, said: str | None
) -> None:
    """A script has no guard, which puts that right for remus."""
    resumed: list[bool] = []

    def let_run(guest: Any, store: Any, *, reborn: bool) -> None:
        assert (guest.domid, store) == (DOMID, "store")
        resumed.append(reborn)
        if again:
            raise XenError(again)

    class Session:
        failure = None

        def __init__(self, *_: object, rebirth: Callable[[], Any]) -> None:
            self._rebirth = rebirth

        def run(self) -> ExitStatus:
            with self._rebirth():
                if fails:
                    raise XenError(fails)
            return ExitStatus.OK

    guest = mock.Mock(domid=DOMID)
    monkeypatch.setattr(colo.toolstack, "domain_name", lambda _: "web")
    monkeypatch.setattr(colo, "only_one", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(colo, "Store", lambda: contextlib.nullcontext("store"))
    monkeypatch.setattr(colo.primary, "open_engine", lambda *_: SimpleNamespace(guest=guest))
    monkeypatch.setattr(colo.primary, "agree", lambda *_: None)
    monkeypatch.setattr(colo, "ColoSession", Session)
    monkeypatch.setattr(colo.recovery, "let_run", let_run)
    link: Any = SimpleNamespace(host="backup", control=None, generation=1)
    with contextlib.nullcontext() if said is None else pytest.raises(XenError, match=said):
        colo.run(DOMID, link, colo.Calls(), period_s=0)
    assert resumed == ([True] if fails else [])


def test_a_guest_that_is_closed_is_an_error_and_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    ffi = SimpleNamespace(NULL=None, new=lambda _: None)
    lib = mock.Mock(**{"rc_guest_open.return_value": "handle", "rc_guest_close.side_effect": closed.append})
    monkeypatch.setattr(xenctrl, "compiled_for_xen", lambda: (lib, ffi))
    monkeypatch.setattr(xenctrl.bindings, "lowlevel", lambda _: mock.Mock(Error=OSError))
    guest = xenctrl.Guest(DOMID, writable=False)
    guest.close()
    guest.close()
    assert closed == ["handle"]
    for call in (
        guest.info,
        guest.event_channels,
        guest.map_memory,
        lambda: guest.nr_gfns,
        guest.grant_version,
    ):
        with pytest.raises(XenError, match="not open here any more"):
            call()
