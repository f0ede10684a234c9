# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest that stands still since its ``remus`` was killed, at whatever point of a checkpoint or of its
resume as a new domain.
"""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest

from remus_colo.adapters.xenctrl import DomainInfo, ShutdownReason
from remus_colo.checkpoint.guestinfo import refuse_stopped
from remus_colo.errors import DomainError, XenError
from remus_colo.session import recovery

RUNNING = DomainInfo(
    domid=7, tot_pages=1, shared_info_gfn=1, vcpus=1, hvm=True, hap=True, dying=False, paused=False, shutdown=False,
    shutdown_reason=0, blocked=True,
)  # fmt: skip
SUSPENDED: dict[str, Any] = {"shutdown": True, "shutdown_reason": int(ShutdownReason.SUSPEND)}


class Guest:
    """Xen's rules, as far as they matter here: pauses nest, a soft reset wants a domain that is shut down,
    and ends that.
    """

    domid = 7

    def __init__(self, *, pauses: int = 0, reset: bool = False, **changes: Any) -> None:
        self._info = dataclasses.replace(RUNNING, **changes)
        self.pauses = pauses
        self.reset = reset  # its event channels are gone: running on like this, it would crash
        self.resumed: list[bool] = []

    def info(self) -> DomainInfo:
        return dataclasses.replace(self._info, paused=self.pauses > 0)

    def disable_dirty_log(self) -> None:
        raise XenError("there is none")

    def pause(self) -> None:
        self.pauses += 1

    def unpause(self) -> None:
        assert not self.reset
        self.pauses -= 1

    def shutdown(self, reason: ShutdownReason) -> None:
        assert self.pauses
        self._info = dataclasses.replace(self._info, shutdown=True, shutdown_reason=int(reason))

    def soft_reset(self) -> None:
        assert self._info.shutdown
        assert self.pauses
        self.reset = True
        self._info = RUNNING

    def resume(self, *, cancelled: bool) -> None:
        self.resumed.append(cancelled)
        self._info = RUNNING

    def alloc_unbound(self) -> int:
        return 1

    def set_hvm_param(self, param: int, value: int) -> None:
        pass

    @property
    def running(self) -> bool:
        return not self.pauses and not self._info.shutdown and not self.reset


def store_of(guest: Guest) -> mock.Mock:
    def introduce(*_: object) -> None:
        guest.reset = False  # its ports are known again

    return mock.Mock(introduce_domain=introduce)


def test_a_guest_that_runs_is_left_alone() -> None:
    guest = Guest()
    store = store_of(guest)
    recovery.let_run(guest, store)  # type: ignore[arg-type]
    assert (guest.running, guest.resumed, store.mock_calls) == (True, [], [])


def test_a_guest_that_was_paused_for_a_checkpoint() -> None:
    guest = Guest(pauses=1)
    recovery.let_run(guest, store_of(guest))  # type: ignore[arg-type]
    assert (guest.running, guest.resumed) == (True, [])


def test_a_guest_that_has_suspended_itself() -> None:
    """Its devices stay connected; and xenstored is to tell of its next suspend."""
    guest = Guest(**SUSPENDED)
    store = store_of(guest)
    recovery.let_run(guest, store)  # type: ignore[arg-type]
    assert (guest.running, guest.resumed) == (True, [True])
    store.resumed_domain.assert_called_once_with(7)


@pytest.mark.parametrize(
    ("state", "resumed"),
    [
        (SUSPENDED, [True]),  # before the first step
        ({"pauses": 1, **SUSPENDED}, [False]),  # before the soft reset
        ({"pauses": 1, "reset": True}, [False]),  # after it
        ({"pauses": 1}, [False]),  # before the last step
        ({}, []),  # after it
    ],
)
def test_a_guest_in_the_midst_of_its_resume_as_a_new_domain(
    state: dict[str, Any], resumed: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery.GuestLayout, "read", lambda guest, store: mock.Mock(vifs=()))
    monkeypatch.setattr(recovery.xentime, "GuestClock", mock.Mock())
    guest = Guest(**state)
    recovery.let_run(guest, store_of(guest), reborn=True)  # type: ignore[arg-type]
    assert (guest.running, guest.resumed) == (True, resumed)


@pytest.mark.parametrize("reason", [ShutdownReason.POWEROFF, ShutdownReason.CRASH])
def test_a_guest_that_has_shut_down_is_not_resumed(reason: ShutdownReason) -> None:
    guest = Guest(shutdown=True, shutdown_reason=int(reason))
    recovery.let_run(guest, store_of(guest))  # type: ignore[arg-type]
    assert guest.resumed == []


class World:
    """The host, for :func:`recovery.recover`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, guest: Guest) -> None:
        self.guest = guest
        self.cleaned = 0
        self.store = mock.MagicMock()
        self.store.__enter__.return_value = self.store
        self.watch = self.store.watch.return_value.__enter__.return_value
        opened = mock.MagicMock()
        opened.__enter__.return_value = guest
        monkeypatch.setattr(recovery, "Store", lambda: self.store)
        monkeypatch.setattr(recovery, "Guest", lambda domid, writable: opened)
        monkeypatch.setattr(recovery, "Links", mock.MagicMock())
        monkeypatch.setattr(recovery.backend, "vifs", lambda store, domid: [])
        monkeypatch.setattr(recovery, "clean_network", self._clean)

    def _clean(self, *_: object) -> None:
        self.cleaned += 1


def test_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, Guest(pauses=1))
    assert recovery.recover(7, ("abcdef",)) == ("paused", True)
    assert world.guest.running
    assert world.cleaned == 1
    world.store.replace.assert_called_once_with("/local/domain/7/control/shutdown", "suspend", "")


def test_a_guest_that_may_run_elsewhere_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, Guest(**SUSPENDED))
    assert recovery.recover(7, (), may_resume=lambda: False) == ("suspended", False)
    assert not world.guest.running
    assert world.cleaned == 1
    world.store.replace.assert_not_called()


def test_a_guest_that_was_just_about_to_suspend(monkeypatch: pytest.MonkeyPatch) -> None:
    """It had taken the request: there is nothing to withdraw, and it stands still some time later."""
    guest = Guest()
    world = World(monkeypatch, guest)

    def wait(condition: Any, *, timeout_s: float) -> bool:
        assert not condition()
        guest._info = dataclasses.replace(RUNNING, **SUSPENDED)
        assert condition()
        return True

    world.watch.wait = wait
    assert recovery.recover(7, ()) == ("suspended", True)
    assert guest.running


def test_a_guest_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest()
    monkeypatch.setattr(guest, "info", mock.Mock(side_effect=XenError("no such domain", errno=3)))
    world = World(monkeypatch, guest)
    assert recovery.recover(7, ("abcdef",)) == (recovery.GONE, True)
    world.store.watch.assert_not_called()
    assert world.cleaned == 1


def test_the_network_is_cleaned_whatever_becomes_of_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(pauses=1)
    monkeypatch.setattr(guest, "unpause", mock.Mock(side_effect=XenError("refused", errno=1)))
    world = World(monkeypatch, guest)
    with pytest.raises(XenError):
        recovery.recover(7, ())
    assert world.cleaned == 1


def test_a_suspended_guest_is_refused_with_what_to_do() -> None:
    with pytest.raises(DomainError, match=r"web is suspended: .*python3 -m remus_colo.recover web"):
        refuse_stopped("web", dataclasses.replace(RUNNING, **SUSPENDED))
