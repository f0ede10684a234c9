# SPDX-License-Identifier: LGPL-2.1-or-later
"""``remus domain host`` without ``--colo``: check, connect, take checkpoints, and report."""

from __future__ import annotations

import contextlib
import logging
import secrets
from typing import Any

from remus_colo.adapters import kmod, toolstack
from remus_colo.adapters.backend import Vif
from remus_colo.adapters.xenctrl import Guest
from remus_colo.adapters.xenstore import Store
from remus_colo.checkpoint.guestinfo import domain_kind, refuse_for_remus, refuse_name, refuse_stopped
from remus_colo.checkpoint.periodic import RoundTimes
from remus_colo.devices import netbuffer
from remus_colo.devices.device import CheckpointedDevice, DeviceSet
from remus_colo.devices.disk import replicated_disks
from remus_colo.devices.netbuffer import BufferedVif
from remus_colo.errors import ExitStatus
from remus_colo.primary import connect, guarded, is_same_host, run_session
from remus_colo.relocation.channel import Channel
from remus_colo.remus_options import RemusOptions
from remus_colo.session import signals
from remus_colo.session.guard import Guard
from remus_colo.session.lock import only_one
from remus_colo.session.loop import Loop
from remus_colo.session.peer import HeartbeatConfig, Peer
from remus_colo.session.remus_console import RemusConsole
from remus_colo.session.remus_primary import RemusConfig, RemusEngine, RemusSession
from remus_colo.session.remus_worker import CheckpointWorker, checkpoint_fields
from remus_colo.session.testpoints import TestPoints

log = logging.getLogger(__name__)


def run(options: RemusOptions) -> int:
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
        with Guest(domid, writable=False) as guest:
            refuse_stopped(name, guest.info())
        config = toolstack.domain_config(domid)
        refuse_for_remus(name, config)
        disks = replicated_disks(
            name, config.get("disks", []), blackhole=options.blackhole, no_disk=options.no_disk
        )
        kmod.load("xen_netback", "the guest's network")
        console = stack.enter_context(RemusConsole(options, name))
        engine = RemusEngine(domid, store, device_model=domain_kind(config) == "hvm")
        try:
            if not engine.dirty_log:
                console.event("no-dirty-log")
            tag = f"{secrets.randbits(24):06x}"
            guard.note_tag(tag)
            record.note_tag(tag)
            devices = DeviceSet([*disks, *_buffers(engine.layout.vifs, options, tag)])
            if options.blackhole:
                return _run_blackhole(options, engine, devices, console)
            generation = secrets.randbits(31) | 1
            control = stack.enter_context(connect(options, generation, "control"))
            data = stack.enter_context(connect(options, generation, "data"))
            guard.hold(control.fileno(), data.fileno())
            devices.setup()
            stack.callback(devices.teardown)  # the session does so; this is for what fails before
            return _protect(options, name, engine, store, devices, control, data, console, guard)
        finally:
            engine.close()


def _buffers(vifs: tuple[Vif, ...], options: RemusOptions, tag: str) -> list[CheckpointedDevice]:
    """What holds the guest's output; nothing with ``--no-net``."""
    if not options.buffer_network or not vifs:
        return []
    netbuffer.load_modules()
    buffers: list[CheckpointedDevice] = []
    for vif in vifs:
        buffers.append(BufferedVif(vif.ifname, netbuffer.buffer_ifname(tag, vif.handle)))
        if vif.emulated_ifname in vif.ifnames:
            buffers.append(BufferedVif(vif.emulated_ifname, netbuffer.buffer_ifname(tag, f"{vif.handle}e")))
    return buffers


def _protect(
    options: RemusOptions,
    name: str,
    engine: RemusEngine,
    store: Store,
    devices: DeviceSet,
    control: Channel,
    data: Channel,
    console: RemusConsole,
    guard: Guard,
) -> int:
    loop = Loop()
    points = TestPoints(engine.guest.domid, devices)

    def make_peer(loop: Loop, heartbeat: HeartbeatConfig, **callbacks: Any) -> Peer:
        return Peer(loop, control, data, heartbeat, sure=guard.sure, **callbacks)

    config = RemusConfig(
        name=name,
        heartbeat=HeartbeatConfig(options.heartbeat_interval_s, options.heartbeat_timeout_s),
        interval_s=options.interval_s,
        timer=options.timer,
        compression=options.compression,
        same_host=is_same_host(control),
        destination=options.destination,
        fence=options.fence,
    )
    session = RemusSession(loop, config, engine, store, make_peer, console.event, devices, points.reached)
    console.watch(loop, session)
    points.listen(loop)
    return run_session(loop, session, console)


def _run_blackhole(
    options: RemusOptions, engine: RemusEngine, devices: DeviceSet, console: RemusConsole
) -> int:
    """Checkpoints without a backup: for what they cost the guest."""
    loop = Loop()
    points = TestPoints(engine.guest.domid, devices)
    failure: list[BaseException] = []

    def note(times: RoundTimes) -> None:
        if times.number == 1:
            console.event("blackhole")
        console.event("checkpoint", **checkpoint_fields(times))

    worker = CheckpointWorker(
        engine.suspender,
        devices,
        interval_s=options.interval_s,
        timer=options.timer,
        dirty_log=engine.dirty_log,
        device_model=engine.device_model,
        on_checkpoint=note,
        probe=points.reached,
    )

    def ended(_: object, error: BaseException | None) -> None:
        if error is not None:
            failure.append(error)
        loop.stop()

    devices.setup()
    try:
        points.listen(loop)
        console.watch_worker(loop, worker)
        with signals.ending(signals.telling(loop, console.event, worker.end)):
            loop.thread("checkpoints", worker.run, ended)
            loop.run()
    finally:
        devices.teardown()
        loop.close()
    if failure:
        raise failure[0]
    console.event("ended", status=0, meaning=ExitStatus.OK.name.lower())
    return int(ExitStatus.OK)
