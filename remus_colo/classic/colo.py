# SPDX-License-Identifier: LGPL-2.1-or-later
"""COLO for scripts: the session of ``remus --colo``, with a call around each phase of its checkpoints."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from remus_colo import cli, primary
from remus_colo.adapters import toolstack
from remus_colo.adapters.xenctrl import Guest
from remus_colo.adapters.xenstore import Store
from remus_colo.classic.protection import Link, goes_on
from remus_colo.devices.device import CheckpointedDevice, DeviceSet
from remus_colo.errors import DomainError, ExitStatus, PeerLost, RemusError, XenError
from remus_colo.options import ColoOptions
from remus_colo.proxy.comparator import CheckpointRequest, Reason
from remus_colo.session import recovery
from remus_colo.session.colo_primary import ColoSession
from remus_colo.session.lock import only_one
from remus_colo.session.loop import Loop
from remus_colo.session.peer import HeartbeatConfig, Peer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Calls:
    """What a script wants to be called with, in the session's thread but ``wait``. None and what is true: go
    on; ``resume`` may return anything.
    """

    suspend: Callable[[], Any] | None = None
    resume: Callable[[], Any] | None = None
    checkpoint: Callable[[], Any] | None = None
    wait: Callable[[], Any] | None = None


class CallingDevice(CheckpointedDevice):
    """A script's calls as one more device."""

    def __init__(self, calls: Calls, stop: Callable[[], None]) -> None:
        self._calls = calls
        self._stop = stop

    def postsuspend(self) -> None:
        if not goes_on(self._calls.suspend):
            raise DomainError("the suspend callback ended the checkpoints")

    def preresume(self) -> None:
        goes_on(self._calls.resume)  # as for Remus

    def commit(self) -> None:
        if not goes_on(self._calls.checkpoint):
            self._stop()


def run(
    domid: int,
    link: Link,
    calls: Calls,
    *,
    period_s: float,
    on_session: Callable[[ColoSession], None] = lambda session: None,
) -> None:
    """Protect a domain until a call ends it, or something fails.

    :param period_s: a checkpoint at least so often, 0 for never.
    :param on_session: called with the session before it runs.
    :raise RemusError: what failed, or that the backup is gone.
    """
    name = toolstack.domain_name(domid)
    options = cli.parse(["--colo", "--period", str(round(period_s * 1000)), str(domid), link.host])
    assert isinstance(options, ColoOptions)
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_one(domid, name))
        store = stack.enter_context(Store())
        engine = primary.open_engine(stack, domid, name, store)
        config = primary.agree(options, name, engine, link.control, link.generation, lambda *_, **__: None)
        loop = Loop()
        stack.callback(loop.close)

        def make_peer(loop: Loop, heartbeat: HeartbeatConfig, **callbacks: Any) -> Peer:
            return Peer(loop, link.control, link.data, heartbeat, **callbacks)

        waiter = Waiter(calls.wait)
        devices = DeviceSet([CallingDevice(calls, lambda: session.request_stop()), waiter])
        session = ColoSession(
            loop,
            config,
            engine,
            store,
            make_peer,
            lambda *_, **__: None,
            devices,
            rebirth=functools.partial(rebirth, name, engine.guest, store),
        )
        waiter.session = session
        on_session(session)
        try:
            status = session.run()
        finally:
            waiter.end()
        if session.failure is not None:
            raise session.failure
        if status is ExitStatus.FENCED:
            raise PeerLost(f"the backup has taken over {name}: it was stopped here")
        if status is ExitStatus.UNPROTECTED:
            raise PeerLost(f"the backup is gone, {name} goes on unprotected")


@contextlib.contextmanager
def rebirth(name: str, guest: Guest, store: Store) -> Iterator[None]:
    """Around the guest's resume as if in a new domain: if it breaks off half-way, it is done anew, once.  What does that
    for ``remus`` is its guard, which a script has not.

    :raise XenError: the guest stands still for good.
    """
    try:
        yield
    except Exception as error:
        log.warning("%s was not resumed, which is tried once more: %s", name, error)
        try:
            recovery.let_run(guest, store, reborn=True)
        except RemusError as last:
            if isinstance(last, XenError) and last.errno == errno.ESRCH:
                raise error from error.__cause__  # the guest is gone, by whomever
            raise XenError(
                f"{name} stands still, half-way into its resume, and cannot be resumed ({error}; then {last}): "
                f"start it anew (xl destroy {name}, then xl create)",
                domid=guest.domid,
            ) from error
        raise


class Waiter(CheckpointedDevice):
    """Calls a script after each checkpoint, in a thread of its own, to wait for the next."""

    def __init__(self, wait: Callable[[], Any] | None) -> None:
        self.session: ColoSession | None = None
        self._wait = wait
        self._wanted = threading.Event()
        self._ended = False
        if wait is not None:
            threading.Thread(target=self._run, name="wait-checkpoint", daemon=True).start()

    def commit(self) -> None:
        self._wanted.set()

    def end(self) -> None:
        self._ended = True
        self._wanted.set()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            session = self.session
            if self._ended or session is None:
                return
            if goes_on(self._wait):
                session.request_checkpoint(CheckpointRequest(Reason.USER, "the script's"))
            else:
                session.request_stop()
                return
