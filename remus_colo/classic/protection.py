# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checkpoints whose phases a script is called in, in the thread that started them, as Xen 4.4's module did it.

To a plain file descriptor, or through a :class:`Link` to ``remusd``, with all that ``remus`` itself does
there: heartbeats, acknowledgements, and a backup that takes over.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from remus_colo import cli, config
from remus_colo import options as defaults
from remus_colo.adapters import toolstack
from remus_colo.adapters.xenctrl import Guest
from remus_colo.adapters.xenstore import Store
from remus_colo.checkpoint.guestinfo import (
    domain_kind,
    refuse_device_model,
    refuse_for_remus,
    refuse_stopped,
)
from remus_colo.checkpoint.periodic import Ended, PeriodicCheckpoints
from remus_colo.devices.device import DeviceSet
from remus_colo.errors import DomainError, ExitStatus, PeerLost, RemusError
from remus_colo.primary import connect
from remus_colo.relocation.channel import Channel
from remus_colo.remus_options import RemusOptions
from remus_colo.session.lock import only_one
from remus_colo.session.loop import Loop
from remus_colo.session.peer import HeartbeatConfig, Peer
from remus_colo.session.remus_primary import RemusConfig, RemusEngine, RemusSession, SendingWorker

LIVE_PIECE_BYTES = 1 << 20
# Vifs whose output the script's own devices hold. It has made these before it opens the domain, and only then
# is cleaned up what a protection has left that was killed.
diverted: set[str] = set()
# Domains whose held output must not be seen: their checkpoints are under way, or they go on elsewhere.
withheld: set[int] = set()


@dataclass(frozen=True, slots=True)
class Calls:
    """What a script wants to be called with. None and what is true: go on; ``resume`` may return anything."""

    suspend: Callable[[], Any] | None = None
    resume: Callable[[], Any] | None = None
    checkpoint: Callable[[], Any] | None = None

    def suspended(self) -> None:
        if not goes_on(self.suspend):
            raise DomainError("the suspend callback ended the checkpoints")

    def resuming(self) -> None:
        goes_on(self.resume)  # whatever it says: libxenguest of Xen 4.4 did not look at it

    def committed(self) -> bool:
        return self.checkpoint is not None and goes_on(self.checkpoint)

    def going_on(self) -> bool:
        return True


class Heard:
    """What a script's callbacks raise is the script's own, whatever is made of it on the way out.

    :ivar error: the first that one has raised.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def of(self, call: Callable[[], Any] | None) -> Callable[[], Any] | None:
        """The callback, listened to."""
        if call is None:
            return None

        def heard() -> Any:
            try:
                return call()
            except BaseException as error:
                self.error = self.error or error
                raise

        return heard


def goes_on(call: Callable[[], Any] | None) -> bool:
    """Whether a callback, if there is one, lets the checkpoints go on: by None, or by something true."""
    if call is None:
        return True
    answer = call()
    return answer is None or bool(answer)


class Domain:
    """One domain, open for checkpoints."""

    def __init__(self, domid: int) -> None:
        """:raise RemusError: there is none, it is protected already or cannot be, or Xen refuses."""
        self.domid = toolstack.find_domain(str(domid))
        self.name = toolstack.domain_name(self.domid)
        self.config = toolstack.domain_config(self.domid)
        refuse_for_remus(self.name, self.config)
        self._stack = contextlib.ExitStack()
        try:
            self._stack.enter_context(only_one(self.domid, self.name, diverted=diverted))
            self.store = self._stack.enter_context(Store())
            # one that has been left suspended would pass for one that has just done so, and be resumed
            with Guest(self.domid, writable=False) as guest:
                refuse_stopped(self.name, guest.info())
            self.engine = RemusEngine(self.domid, self.store, device_model=domain_kind(self.config) == "hvm")
            self._stack.callback(self.engine.close)
        except BaseException:
            self._stack.close()
            raise

    def close(self) -> None:
        self._stack.close()


class Link:
    """The two channels to ``remusd`` on a backup host.

    :raise RemusError: nobody answers there, or it refuses; or the configuration file is wrong.
    """

    def __init__(self, host: str, port: int = defaults.DEFAULT_PORT) -> None:
        self.host = host
        self.generation = secrets.randbits(31) | 1
        # As on a command line without options: the configuration file decides, also which of its two ports is
        # meant by the one that scripts knew, that of xend-relocation-port. Which domain, CREATE tells.
        known = port == config.load()["xend-relocation-port"]
        options = cli.parse([*(() if known else ("--port", str(port))), "any", host])
        assert isinstance(options, RemusOptions)
        self.options = options
        self._stack = contextlib.ExitStack()
        try:
            self.control: Channel = self._stack.enter_context(connect(options, self.generation, "control"))
            self.data: Channel = self._stack.enter_context(connect(options, self.generation, "data"))
        except BaseException:
            self._stack.close()
            raise

    def fileno(self) -> int:
        return self.data.fileno()

    def close(self) -> None:
        self._stack.close()


def withholds(ifname: str) -> bool:
    """Whether what is held of a vif's output has to be dropped, should it be held no more now."""
    return any(ifname.startswith(f"vif{domid}.") for domid in withheld)


def run(domain: Domain, iofile: Any, calls: Calls, *, interval_s: float, compress: bool) -> None:
    """Take checkpoints until a call ends it, or something fails.

    :raise RemusError: what failed.
    """
    link = getattr(iofile, "link", None)
    if isinstance(link, Link):
        _run_linked(domain, link, calls, interval_s=interval_s, compress=compress)
        return
    fd = _descriptor(iofile)
    if domain.engine.device_model is not None and not os.path.samestat(os.fstat(fd), os.stat(os.devnull)):
        refuse_device_model(domain.name, domain.config)
    checkpoints = PeriodicCheckpoints(
        domain.engine.suspender,
        Plain(fd),
        calls,
        timer_s=interval_s,
        device_model=domain.engine.device_model,
        dirty_log=domain.engine.dirty_log,
    )
    withheld.add(domain.domid)
    try:
        checkpoints.run()
    finally:
        withheld.discard(domain.domid)


def _descriptor(iofile: Any) -> int:
    fd = iofile if isinstance(iofile, int) else getattr(iofile, "fileno", lambda: -1)()
    if not isinstance(fd, int) or fd < 0:
        raise TypeError("invalid file handle")
    return fd


class Plain:
    """A descriptor, into which libxenguest's stream goes as it is."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def live(self, chunk: bytes) -> None:
        self._write(memoryview(chunk))

    def deliver(self, number: int, staged: memoryview) -> None:
        self._write(staged)

    def _write(self, view: memoryview) -> None:
        try:
            while view:
                view = view[os.write(self._fd, view[:LIVE_PIECE_BYTES]) :]
        except OSError as error:
            raise PeerLost(f"the checkpoint's file does not take it: {error.strerror}") from error


class CallingWorker(SendingWorker):
    """As :class:`SendingWorker`, but the phases are the script's."""

    def __init__(self, calls: Calls, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._calls = calls

    def suspended(self) -> None:
        self._calls.suspended()

    def resuming(self) -> None:
        self._calls.resuming()

    def go_on(self) -> bool:
        return self._calls.committed()


class CallingSession(RemusSession):
    """Its checkpoints are taken by whoever waits for :attr:`started`, not by a thread of the session's."""

    def __init__(self, calls: Calls, *args: Any, **options: Any) -> None:
        self._calls = calls
        self.started = threading.Event()
        super().__init__(*args, **options)

    @property
    def goes_on_here(self) -> bool:
        """Whether at the end what is held may be seen."""
        return not self._drops_held

    def _make_worker(self, *args: Any, **options: Any) -> SendingWorker:
        return CallingWorker(self._calls, *args, **options)

    def _end_steps(self) -> list[Callable[[], object]]:
        """The engine is the domain's: as long as that is open, a script may protect it once more."""
        return [step for step in super()._end_steps() if step != self.engine.close]

    def _start_worker(self) -> None:
        self._guest_at_rest.clear()
        self.started.set()

    def worker_ended(self, error: BaseException | None) -> None:
        """In the thread of the checkpoints."""
        self._guest_at_rest.set()
        self.loop.call(lambda: self._on_worker_ended(None, error if isinstance(error, RemusError) else None))


def _run_linked(domain: Domain, link: Link, calls: Calls, *, interval_s: float, compress: bool) -> None:
    loop = Loop()

    def make_peer(loop: Loop, heartbeat: HeartbeatConfig, **callbacks: Any) -> Peer:
        return Peer(loop, link.control, link.data, heartbeat, **callbacks)

    local, remote = link.control.addresses
    config = RemusConfig(
        name=domain.name,
        heartbeat=HeartbeatConfig(link.options.heartbeat_interval_s, link.options.heartbeat_timeout_s),
        interval_s=interval_s,
        timer=interval_s > 0,
        compression=compress,
        same_host=local == remote or ipaddress.ip_address(remote).is_loopback,
        destination=link.host,
        fence=link.options.fence,
    )
    session = CallingSession(
        calls, loop, config, domain.engine, domain.store, make_peer, lambda *_, **__: None, DeviceSet([])
    )
    ended: list[ExitStatus | BaseException] = []

    def protect() -> None:
        try:
            ended.append(session.run())
        except BaseException as error:  # raised below, in the caller's thread
            ended.append(error)
        finally:
            session.started.set()

    thread = threading.Thread(target=protect, name="remus-session", daemon=True)
    withheld.add(domain.domid)
    thread.start()
    failure: BaseException | None = None
    try:
        session.started.wait()
        if not ended:
            session.worker.run()
    except BaseException as error:  # raised below, if it is not what came of another
        failure = error
    session.worker_ended(failure)
    session.request_stop()
    thread.join()
    loop.close()
    if session.goes_on_here:
        withheld.discard(domain.domid)
    (status,) = ended
    reason = _reason(domain.name, session, status, failure)
    if reason is failure and failure is not None:
        raise failure
    if reason is not None:
        raise reason from failure


def _reason(
    name: str, session: CallingSession, status: ExitStatus | BaseException, failure: BaseException | None
) -> BaseException | None:
    """Why a protection has ended; None if a call of the script's has ended it.

    :param failure: what the checkpoints ended with.  Where the session knows more, this only came of it: a channel
        that was closed here, a copy that was given up.
    """
    if failure is not None and not isinstance(failure, (RemusError, OSError, Ended)):
        return failure  # the script's own, as Ctrl-C is
    if isinstance(status, BaseException):
        return status
    if session.failure is not None:
        return session.failure
    if status is ExitStatus.FENCED:
        return PeerLost(f"the backup has taken over {name}: it was stopped here")
    if status is ExitStatus.UNPROTECTED:
        return PeerLost(f"the backup is gone, {name} goes on unprotected")
    if isinstance(failure, Ended):
        return DomainError(f"{name} has ended before it was copied: start it again, and protect it then")
    if failure is None and status is not ExitStatus.OK:
        return RemusError(f"the protection of {name} has failed, and left no reason: see the log")
    return failure
