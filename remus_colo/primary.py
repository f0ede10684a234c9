# SPDX-License-Identifier: LGPL-2.1-or-later
"""``remus --colo domain host``: check, connect, protect, and report; and what ``remus.py`` does in the same way."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import logging
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remus_colo import report
from remus_colo.adapters import backend, kmod, rtnl, toolstack, xenctrl, xentime
from remus_colo.adapters.xenstore import Store
from remus_colo.checkpoint.guestinfo import GuestLayout, Mode, refuse_config, refuse_guest, refuse_name
from remus_colo.checkpoint.mode import Choice, choose
from remus_colo.checkpoint.pvm import PvmEngine
from remus_colo.errors import ExitStatus, PeerError, RemusError
from remus_colo.proxy.comparator import CompareConfig
from remus_colo.proxy.primary_path import Tunnel
from remus_colo.relocation import tls
from remus_colo.relocation.channel import Channel
from remus_colo.relocation.clock import ClockSample, best_sample
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.wire import VERSION, Message
from remus_colo.session import recovery, signals
from remus_colo.session.colo_primary import ColoConfig, ColoSession
from remus_colo.session.console import Console
from remus_colo.session.guard import Guard, Remains
from remus_colo.session.lock import Record, only_one
from remus_colo.session.loop import Loop
from remus_colo.session.peer import HeartbeatConfig, Peer
from remus_colo.session.primary import PrimarySession

if TYPE_CHECKING:
    from remus_colo.options import ColoOptions, ProtectionOptions

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
# Of the heartbeat time-out, since the backup was last sure to hear us: until then it has not taken over, nor
# will it before the guard has done its work.
SURE_TIMEOUTS = 0.8
CLOCK_PROBES = 16
TUNNEL_PORT = 4789  # VXLAN's (RFC 7348); tunnels of several guests differ by their VNI
MODULES = (
    ("xen_netback", "the guest's network"),
    ("sch_plug", "holding the guest's input during a checkpoint"),
    ("cls_u32", "mirroring the guest's input"),
    ("act_mirred", "mirroring the guest's input"),
    ("nfnetlink_queue", "holding the guest's output"),
)


def run(options: ColoOptions) -> int:
    """Protect a domain until something ends it. Returns the exit status.

    :raise RemusError: protection could not begin; nothing is left behind.
    """
    domid = toolstack.find_domain(options.domain)
    name = toolstack.domain_name(domid)
    refuse_name(name, domid)
    with contextlib.ExitStack() as stack:
        record = stack.enter_context(only_one(domid, name))
        guard = stack.enter_context(guarded(domid, name, record, options))
        store = stack.enter_context(Store())
        engine = open_engine(stack, domid, name, store)
        generation = secrets.randbits(31) | 1
        console = stack.enter_context(Console(options, name))
        control = stack.enter_context(connect(options, generation, "control"))
        data = stack.enter_context(connect(options, generation, "data"))
        guard.hold(control.fileno(), data.fileno())
        config = agree(options, name, engine, control, generation, console.event)
        guard.note_tag(config.tag)
        record.note_tag(config.tag)
        return _protect(config, engine, store, control, data, console, guard)


def open_engine(stack: contextlib.ExitStack, domid: int, name: str, store: Store) -> PvmEngine:
    """Take hold of a domain that COLO can protect.

    :param stack: closes it again.
    :raise DomainError: the domain cannot be protected.
    :raise HostError: this host lacks something.
    """
    guest = stack.enter_context(xenctrl.Guest(domid, writable=False))
    refuse_config(name, toolstack.domain_config(domid))
    refuse_guest(name, guest.info(), guest, store)
    for module, purpose in MODULES:
        kmod.load(module, purpose)
    backend.mount_debugfs()
    return PvmEngine(guest, store, GuestLayout.read(guest, store), xentime.GuestClock(domid))


def agree(
    options: ColoOptions,
    name: str,
    engine: PvmEngine,
    control: Channel,
    generation: int,
    event: Callable[..., None],
) -> ColoConfig:
    """Measure the hosts' clocks, and choose how checkpoints are taken."""
    sample, settable = _measure_clocks(control, engine.clock)
    engine.guest.map_memory()
    choice = choose(
        options.checkpoint,
        offset_ns=sample.offset_ns,
        two_level_events=engine.uses_two_level_events(),
        settable_clock=settable,
    )
    engine.mode = choice.mode
    event("mode", mode=choice.mode.value, why=choice.why, clock_offset_ms=round(sample.offset_ns / 1e6, 3))
    handles = [vif.handle for vif in engine.layout.vifs]
    config = _session_config(options, name, generation, control, choice, handles)
    if settable and choice.mode is Mode.TRANSPARENT:
        config = dataclasses.replace(config, clock_offset_ns=-sample.offset_ns)
    return config


def _protect(
    config: ColoConfig,
    engine: PvmEngine,
    store: Store,
    control: Channel,
    data: Channel,
    console: Console,
    guard: Guard,
) -> int:
    loop = Loop()

    def make_peer(loop: Loop, heartbeat: HeartbeatConfig, **callbacks: Any) -> Peer:
        return Peer(loop, control, data, heartbeat, sure=guard.sure, **callbacks)

    session = ColoSession(loop, config, engine, store, make_peer, console.event, rebirth=guard.rebirth)
    console.watch(loop, session)
    return run_session(loop, session, console)


def run_session(loop: Loop, session: PrimarySession, console: Console) -> int:
    """Run a session until something, or a signal, ends it. Returns the exit status, and closes the loop.

    :raise RemusError: what has ended protection, unless that is that the backup has taken over.
    """
    try:
        with signals.ending(signals.telling(loop, console.event, session.request_stop)):
            status = session.run()
    finally:
        loop.close()
    console.event("ended", status=int(status), meaning=status.name.lower())
    if session.failure is not None and status is not ExitStatus.FENCED:
        raise session.failure
    return int(status)


def is_same_host(control: Channel) -> bool:
    """Whether the backup host is this one, for trying things out."""
    local, remote = control.addresses
    return local == remote or ipaddress.ip_address(remote).is_loopback


@contextlib.contextmanager
def guarded(domid: int, name: str, record: Record, options: ProtectionOptions) -> Iterator[Guard]:
    """Have a guard, from before anything is done to the guest until all is in order again.

    After a bug in here the guard is not dismissed: it looks at the guest, too.
    """
    timeout_s = options.heartbeat_timeout_s

    def recover(remains: Remains) -> None:
        """In the guard."""
        found_s = time.monotonic()

        def sure() -> bool:
            """Now; the log and xenstore may have taken a while.

            A guest is reborn before the first checkpoint, without which the backup does not take over.
            """
            silence_s = remains.silence_s + time.monotonic() - found_s
            return remains.reborn or not remains.silence_s or silence_s <= timeout_s * SURE_TIMEOUTS

        events = _event_log(options.log)
        stood, resumed = recovery.recover(domid, remains.tags, may_resume=sure, reborn=remains.reborn)
        still = stood in ("paused", "suspended")
        events.event("recovered", pid=remains.pid, guest=stood, resumed=still and resumed)
        if still and not resumed:
            log.error(
                "remus (process %d) was killed after the backup had lost it: %s stays %s, as it may run there. If it does not: "
                "python3 -m remus_colo.recover %s", remains.pid, name, stood, name,
            )  # fmt: skip
            return
        outcome = "has ended" if stood == recovery.GONE else "goes on UNPROTECTED"
        log.error("remus (process %d) did not end in order: %s %s", remains.pid, name, outcome)
        record.clear()

    def end() -> None:
        """A resume that failed is the guard's to try again."""
        if recovery.suspended(domid):
            guard.give_up()
        else:
            guard.end()

    rtnl.prepare()  # the guard has a copy of us, and no time for it when it is needed
    guard = Guard(name, recover)
    try:
        yield guard
    except (RemusError, KeyboardInterrupt):
        end()
        raise
    except BaseException:
        guard.give_up()
        raise
    else:
        end()


def _event_log(path: Path | None) -> report.EventLog:
    """One that cannot be opened any more, as on a disk that has failed, keeps no guest from being let run."""
    try:
        return report.EventLog(path)
    except RemusError as error:
        log.warning("%s", error)
        return report.EventLog(None)


def connect(options: ProtectionOptions, generation: int, channel_name: str) -> Channel:
    """Open one of the two channels and introduce ourselves.

    :raise PeerLost, PeerError: nobody is there, or it refused.
    :raise ConfigError: a file for TLS is not what it should be.
    """
    context = None if options.tls is None else tls.client_context(options.tls)
    deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
    channel = Channel.connect(
        options.destination, options.port, deadline_s=deadline_s, generation=generation, tls_context=context
    )
    try:
        channel.send_control(
            MessageType.HELLO,
            0,
            {"versions": [VERSION], "host": socket.gethostname(), "channel": channel_name},
        )
        reply = channel.recv(deadline_s)
        _expect(reply, MessageType.HELLO, options.destination)
        channel.expect_generation(generation)
    except BaseException:
        channel.close()
        raise
    return channel


def _expect(message: Message, kind: MessageType, host: str) -> None:
    if message.type is MessageType.REFUSE:
        raise PeerError(f"{host} refused: {message.fields['reason']}")
    if message.type is not kind:
        raise PeerError(f"{host} answered {message.type.name} where {kind.name} was expected")


def _measure_clocks(control: Channel, clock: xenctrl.Clock) -> tuple[ClockSample, bool]:
    """The backup's Xen clock against the guest's, and whether the backup can give a guest another one.

    The quickest of some exchanges.
    """
    samples = []
    settable = False
    for _ in range(CLOCK_PROBES):
        sent_ns = clock.now_ns()
        control.send_control(MessageType.CLOCK_PROBE, 0, {"sent_ns": sent_ns})
        reply = control.recv(time.monotonic() + CONNECT_TIMEOUT_S)
        returned_ns = clock.now_ns()
        _expect(reply, MessageType.CLOCK_REPLY, control.peer)
        samples.append(
            ClockSample(
                sent_ns, int(reply.fields["received_ns"]), int(reply.fields["replied_ns"]), returned_ns
            )
        )
        settable = reply.fields.get("settable") is True
    return best_sample(samples), settable


def _session_config(
    options: ColoOptions, name: str, generation: int, control: Channel, choice: Choice, handles: list[int]
) -> ColoConfig:
    local, remote = control.addresses
    same_host = is_same_host(control)
    # VNIs have 24 bits (RFC 7348); 16 vifs of one guest follow each other.
    first_vni = generation % (1 << 20) << 4
    tunnels, backup_tunnels = {}, {}
    for index, handle in enumerate(handles):
        vni = first_vni + index
        ours, theirs = (None, None) if same_host else (local, remote)
        tunnels[handle] = Tunnel(vni, TUNNEL_PORT, ours, theirs)
        backup_tunnels[handle] = Tunnel(vni, TUNNEL_PORT, theirs, ours)
    return ColoConfig(
        name=name,
        mode=choice.mode,
        heartbeat=HeartbeatConfig(options.heartbeat_interval_s, options.heartbeat_timeout_s),
        compare=CompareConfig.from_limits(options.compare_timeout_s, dict(options.limits)),
        period_s=options.period_s or 0.0,
        verify_every=options.verify_every,
        tunnels=tunnels,
        backup_tunnels=backup_tunnels,
        tag=f"{generation % (1 << 24) | 1 << 23:06x}",
        same_host=same_host,
        destination=options.destination,
        fence=options.fence,
    )
