# SPDX-License-Identifier: LGPL-2.1-or-later
"""The network of the PVM: its output held and compared, its input mirrored to the SVM.

::

    LAN bridge --+--> plug --> vif(PVM)         input; a copy goes into the tunnel's plug
                 |                |
                 |                v
                 +<-- NFQUEUE <---+             output; leaves when the comparator says so
                                  ^
    tunnel --> raw link ----------+             the SVM's output

One :class:`VifPath` a vif; :class:`PrimaryPath` is all of them.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from remus_colo.adapters.backend import Vif
from remus_colo.adapters.netlink import Links, Plug
from remus_colo.adapters.nft import QueueRules
from remus_colo.adapters.packetqueue import PacketQueue
from remus_colo.adapters.rawlink import CopyingTap, RawLink
from remus_colo.errors import NetworkError, RemusError
from remus_colo.proxy.comparator import CheckpointRequest, Comparator, CompareConfig, Decision, Reason
from remus_colo.session.loop import Loop, Timer

log = logging.getLogger(__name__)

PLUG_LIMIT_BYTES = 64 << 20  # input of one checkpoint at 10 Gbit/s for 50 ms
QUEUE_PACKETS = 16384  # what the kernel holds at most; the comparator asks for a checkpoint long before
FIRST_QUEUE = 20000  # queue numbers below are people's own

COUNTERS = (
    "released_equal",
    "released_commit",
    "released_passed",
    "diverged",
    "held",
    "held_bytes",
    "secondary_seen",
    "secondary_dropped",
    "malformed",
)


@dataclass(frozen=True, slots=True)
class Tunnel:
    """How the two hosts' ends of a vif's tunnel find each other.

    :param local: this host's address on the replication link, None if both VMs are on this host.
    """

    vni: int
    port: int
    local: str | None
    remote: str | None


def primary_ifname(tag: str, handle: int) -> str:
    return f"rcp{tag}.{handle}"


def backup_ifname(tag: str, handle: int) -> str:
    return f"rct{tag}.{handle}"


class VifPath:
    """One vif of the PVM.

    :param on_request: called when the comparator asks for a checkpoint.
    """

    def __init__(
        self,
        loop: Loop,
        links: Links,
        vif: Vif,
        ifname: str,
        config: CompareConfig,
        on_request: Callable[[CheckpointRequest], None],
    ) -> None:
        self.vif = vif
        self.ifname = ifname
        self.comparator = Comparator(config, time.monotonic())
        self.comparator.release_all(time.monotonic())  # nothing is protected before the first cut
        self._config = config
        self._loop = loop
        self._links = links
        self._on_request = on_request
        self._input = Plug(links, vif.ifname, PLUG_LIMIT_BYTES)
        self._mirror = Plug(links, ifname, PLUG_LIMIT_BYTES)
        self._queue: PacketQueue | None = None
        self._raw: RawLink | None = None
        self._tap: CopyingTap | None = None
        self._timer: Timer | None = None
        self._protecting = False
        self._uncommitted = False  # a cut was made and has neither been committed nor given up
        self._lost_packets = 0

    @property
    def queue_number(self) -> int:
        return FIRST_QUEUE + (self.vif.domid * 16 + self.vif.handle) % 20000

    def start(self, rules: QueueRules) -> None:
        self._links.set_up(self.ifname)
        self._mirror.install()
        self._input.install()
        self._tap = CopyingTap(self.vif.ifname)
        self._raw = RawLink(self.ifname)
        self._loop.add_reader(self._raw, self.read_secondary)
        self._queue = PacketQueue(self.queue_number, self._on_packet, QUEUE_PACKETS)
        self._loop.add_reader(self._queue, self.read_primary)
        rules.hold_from_guest(self.vif.ifname, self.queue_number)
        self._links.mirror_egress(self.vif.ifname, self.ifname)

    def counters(self) -> dict[str, int]:
        counters = self.comparator.counters
        return {name: int(getattr(counters, name)) for name in COUNTERS}

    # -- packets ---------------------------------------------------------------------------------------

    def read_primary(self) -> None:
        """Hand the PVM's waiting output to the comparator."""
        if self._queue is not None:
            self._queue.process()
            self._arm()

    def _on_packet(self, packet_id: int, payload: bytes, ethertype: int) -> None:
        self._apply(self.comparator.primary(time.monotonic(), packet_id, payload, ethertype))

    def read_secondary(self) -> None:
        """Hand the SVM's waiting output to the comparator."""
        if self._raw is None:
            return
        try:
            while (frame := self._raw.recv()) is not None:
                self._apply(self.comparator.secondary(time.monotonic(), frame.payload, frame.ethertype))
        except NetworkError as error:
            log.info("the tunnel of %s is gone: %s", self.vif.ifname, error)
            self._loop.remove_reader(self._raw)
            self._raw.close()
            self._raw = None
        self._arm()

    def _apply(self, decision: Decision) -> None:
        if self._queue is not None:
            for packet_id in decision.release:
                self._queue.accept(packet_id)
        if decision.checkpoint is not None:
            self._on_request(decision.checkpoint)

    def _arm(self) -> None:
        """Have :meth:`_tick` called when the comparator's next deadline comes."""
        deadline_s = self.comparator.next_deadline_s
        if self._timer is not None and self._timer.call is not None:
            if deadline_s is not None and self._timer.due_s <= deadline_s:
                return
            self._timer.cancel()
        self._timer = None
        if deadline_s is not None:
            self._timer = self._loop.call_later(max(0.0, deadline_s - time.monotonic()), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._apply(self.comparator.tick(time.monotonic()))
        self._arm()

    def check_losses(self) -> None:
        """Packets that the kernel dropped were never compared: they call for a checkpoint."""
        if self._queue is None or not self._protecting:
            return
        counters = self._queue.counters()
        lost = counters.dropped_queue_full + counters.dropped_buffer_full + counters.truncated
        if lost > self._lost_packets:
            detail = f"{lost - self._lost_packets} packets of {self.vif.ifname} were dropped or cut by the kernel"
            self._on_request(CheckpointRequest(Reason.QUEUE_DROPPED, detail))
        self._lost_packets = lost

    # -- a checkpoint ----------------------------------------------------------------------------------

    def hold_input(self) -> None:
        """The guest is about to stop: what comes for it waits, for both VMs."""
        self._mirror.buffer()
        self._input.buffer()

    def release_input(self) -> None:
        """The PVM runs again."""
        self._input.release()

    def release_mirror(self) -> None:
        """The SVM runs from the new state."""
        self._mirror.release()

    def cut(self) -> int:
        """The PVM is stopped: what it sent is all in the queue, and belongs to the closing epoch."""
        self.read_primary()
        now_s = time.monotonic()
        if not self._protecting:
            self._protecting = True
            self.comparator = Comparator(self._config, now_s)
        self._uncommitted = True
        return self.comparator.cut(now_s)

    def commit(self) -> None:
        self._uncommitted = False
        self._apply(self.comparator.commit(time.monotonic()))
        self._arm()

    def secondary_resumed(self) -> None:
        self.read_secondary()  # what is there was sent before
        self._apply(self.comparator.secondary_resumed(time.monotonic()))
        self.release_mirror()
        self._arm()

    def abort(self) -> None:
        """The checkpoint did not take place, whether it came to a cut or not."""
        self.release_input()
        self.release_mirror()
        if self._uncommitted:
            self._uncommitted = False
            self._apply(self.comparator.abort_cut(time.monotonic()))
            self._arm()

    # -- the end ---------------------------------------------------------------------------------------

    def release_all(self) -> None:
        """Protection has ended and the PVM goes on: everything leaves, and is held no more."""
        self._protecting = False
        self._apply(self.comparator.release_all(time.monotonic()))
        self.read_primary()
        for plug in (self._input, self._mirror):
            with contextlib.suppress(NetworkError):  # the tunnel may be gone with its link
                plug.release()

    def stop_reading(self) -> None:
        for file in (self._queue, self._raw):
            if file is not None:
                self._loop.remove_reader(file)
        if self._timer is not None:
            self._timer.cancel()

    def close(self, *, drop_held: bool) -> None:
        """Take everything down; what is held leaves first, unless the guest went on elsewhere."""
        self.stop_reading()
        for close in (
            lambda: self._links.remove_mirror(self.vif.ifname),
            self._input.remove,
            self._mirror.remove,
            *((lambda: self._queue and self._queue.accept_all(),) if not drop_held else ()),
            lambda: self._queue and self._queue.close(),
            lambda: self._raw and self._raw.close(),
            lambda: self._tap and self._tap.close(),
            lambda: self._links.delete_link(self.ifname),
        ):
            try:
                close()
            except RemusError as error:
                log.warning("while taking down the path of %s: %s", self.vif.ifname, error)
        self._queue = self._raw = None


class PrimaryPath:
    """All vifs of the PVM.

    :param tag: names the links of this protection on both hosts, 6 hexadecimal digits.
    """

    def __init__(
        self,
        loop: Loop,
        vifs: tuple[Vif, ...],
        tag: str,
        config: CompareConfig,
        on_request: Callable[[CheckpointRequest], None],
    ) -> None:
        self.links = Links()
        domid = vifs[0].domid if vifs else 0
        self.rules = QueueRules(f"pvm_{domid}")
        self.tag = tag
        self.vifs = [
            VifPath(loop, self.links, vif, primary_ifname(tag, vif.handle), config, on_request) for vif in vifs
        ]

    def start(self, tunnels: dict[int, Tunnel]) -> None:
        """:raise NetworkError, HostError: something cannot be set up; :meth:`close` takes down the rest."""
        self.rules.remove_stale()
        for path in self.vifs:
            tunnel = tunnels[path.vif.handle]
            mtu = self.links.mtu(path.vif.ifname)
            if tunnel.remote is not None and tunnel.local is not None:
                self.links.create_vxlan(
                    path.ifname, vni=tunnel.vni, local=tunnel.local, remote=tunnel.remote, port=tunnel.port, mtu=mtu
                )
            # On one host the backup's side makes a pair of links, this end among them.
            path.start(self.rules)

    def each(self, call: Callable[[VifPath], object]) -> None:
        for path in self.vifs:
            call(path)

    def close(self, *, drop_held: bool) -> None:
        for path in self.vifs:
            path.stop_reading()
        for path in self.vifs:
            path.close(drop_held=drop_held)
        try:
            self.rules.remove()
        except RemusError as error:
            log.warning("while removing the packet rules: %s", error)
        self.links.close()
