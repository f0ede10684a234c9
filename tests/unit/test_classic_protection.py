# SPDX-License-Identifier: LGPL-2.1-or-later
"""A script's checkpoints through a MigrationSocket: real session, loop and channels, and a backup that answers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from primary_world import DOMID, PATIENCE_S, VIF, Engine, Faults, join_all
from remus_world import RemusBackup, Rounds

from remus_colo.adapters import xenctrl
from remus_colo.checkpoint.guestinfo import Mode
from remus_colo.classic import protection
from remus_colo.classic.protection import CallingSession, Calls, Link
from remus_colo.errors import XenError
from remus_colo.relocation.channel import Channel
from remus_colo.remus_options import RemusOptions
from remus_colo.session import remus_primary, remus_worker


class NearChannel(Channel):
    addresses = ("10.7.0.1", "10.7.0.2")  # type: ignore[assignment]


class Host:
    """One with a domain that is open for checkpoints.

    :ivar backup: the other end of the last :meth:`link`.
    """

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.at: dict[str, Any] = {}
        self.faults = Faults(self)  # type: ignore[arg-type]
        self.engine: Any = Engine(self.faults, Mode.COOPERATIVE)
        self.engine.suspender, self.engine.dirty_log, self.engine.device_model = mock.Mock(), True, None
        self.domain: Any = SimpleNamespace(domid=DOMID, name="web", engine=self.engine, store=mock.Mock())

    def link(self) -> Any:
        ours, theirs = zip(*(socket.socketpair() for _ in range(2)), strict=True)
        link: Any = Link.__new__(Link)
        link.host, link.options = "backup", RemusOptions("web")
        link.control, link.data = (NearChannel(sock, generation=1, peer="the backup") for sock in ours)
        self.backup = RemusBackup(*(Channel(sock, generation=1) for sock in theirs))
        self.backup.start()
        return SimpleNamespace(link=link)

    def run(self, calls: Calls) -> None:
        iofile = self.link()
        too_long = threading.Timer(PATIENCE_S, self.backup.leave)
        too_long.start()
        try:
            protection.run(self.domain, iofile, calls, interval_s=0, compress=False)
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
        lambda suspender, destination, calls, *, on_round, **_: Rounds(
            made,  # type: ignore[arg-type]
            destination,
            calls,
            on_round,
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
