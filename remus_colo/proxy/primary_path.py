# SPDX-License-Identifier: LGPL-2.1-or-later
"""The network of the PVM: its output held and compared, its input mirrored to the SVM.

::

    LAN bridge --+--> plug --> vif(PVM)         input; a copy goes into the tunnel's plug
                 |                |
                 |                v
                 +<-- NFQUEUE <---+             output; leaves when the comparator says so
                                  ^
    tunnel --> raw link ----------+             the SVM's output

The output is :class:`remus_colo.proxy.output.Output`.  One :class:`VifPath` a vif; :class:`PrimaryPath` is all of them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

from remus_colo.adapters.backend import Vif
from remus_colo.adapters.netlink import Links, Plug
from remus_colo.adapters.nft import QueueRules
from remus_colo.adapters.packetqueue import queues_in_use
from remus_colo.adapters.rawlink import CopyingTap
from remus_colo.errors import NetworkError, RemusError
from remus_colo.proxy.comparator import CheckpointRequest, CompareConfig
from remus_colo.proxy.output import Output
from remus_colo.proxy.queue_numbers import PVM_NUMBERS, queue_numbers
from remus_colo.session.loop import Loop

log = logging.getLogger(__name__)

PLUG_LIMIT_BYTES = 64 << 20  # input of one checkpoint at 10 Gbit/s for 50 ms


@dataclass(frozen=True, slots=True)
class Tunnel:
    """How the two hosts' ends of a vif's tunnel find each other.

    :param local: this host's address on the replication link, None if both VMs are on this host.
    """

    vni: int
    port: int
    local: str | None
    remote: str | None


def primary_ifname(tag: str, handle: int | str = "") -> str:
    """:param handle: of the vif; without one, how the names of all begin."""
    return f"rcp{tag}.{handle}"


def rules_owner(domid: int) -> str:
    """Of the packet rules of a protected guest."""
    return f"pvm_{domid}"


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
        self.output = Output(loop, vif.ifname, ifname, config, on_request)
        self._links = links
        self._input = Plug(links, vif.ifname, PLUG_LIMIT_BYTES)
        self._mirror = Plug(links, ifname, PLUG_LIMIT_BYTES)
        self._tap: CopyingTap | None = None

    def start(self, rules: QueueRules) -> None:
        self._links.set_up(self.ifname)
        self._mirror.install()
        self._input.install()
        self._tap = CopyingTap(self.vif.ifname)
        (number,) = queue_numbers(PVM_NUMBERS, 1, self.vif.domid, self.vif.handle, queues_in_use())
        self.output.start(number, rules)
        self._links.mirror_egress(self.vif.ifname, self.ifname)

    def counters(self) -> dict[str, int]:
        return self.output.counters()

    @property
    def waiting_since_s(self) -> float | None:
        """Since when the oldest packet that is held waits, by ``time.monotonic()``; None if none is held."""
        return self.output.waiting_since_s

    def check_losses(self) -> None:
        self.output.check_losses()

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

    def give_input(self) -> None:
        """What :meth:`hold_input` held: both VMs are given it, as before."""
        self.release_input()
        self.release_mirror()

    def cut(self) -> int:
        """The PVM is stopped: what it sent is all in the queue, and belongs to the closing epoch."""
        return self.output.cut()

    def commit(self) -> None:
        self.output.commit()

    def secondary_resumed(self) -> None:
        self.output.secondary_resumed()
        self.release_mirror()

    def abort(self) -> None:
        """The checkpoint did not take place, whether it came to a cut or not."""
        self.give_input()
        self.output.abort()

    # -- the end ---------------------------------------------------------------------------------------

    def release_all(self) -> None:
        """Protection has ended and the PVM goes on: everything leaves, and is held no more."""
        self.output.release_all()
        for plug in (self._input, self._mirror):
            with contextlib.suppress(NetworkError):  # the tunnel may be gone with its link
                plug.release()

    def stop_reading(self) -> None:
        self.output.stop_reading()

    def close(self, *, drop_held: bool) -> None:
        """Take everything down; what is held leaves first, unless the guest went on elsewhere."""
        self.stop_reading()
        steps: list[Callable[[], object]] = [
            lambda: self._links.remove_mirror(self.vif.ifname),
            self._input.remove,
            self._mirror.remove,
            lambda: self.output.close(drop_held=drop_held),
            self._close_tap,
            lambda: self._links.delete_link(self.ifname),
        ]
        for close in steps:
            try:
                close()
            except RemusError as error:
                log.warning("while taking down the path of %s: %s", self.vif.ifname, error)

    def _close_tap(self) -> None:
        if self._tap is not None:
            self._tap.close()


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
        self.rules = QueueRules(rules_owner(domid))
        self.tag = tag
        self.vifs = [
            VifPath(loop, self.links, vif, primary_ifname(tag, vif.handle), config, on_request)
            for vif in vifs
        ]

    def start(self, tunnels: dict[int, Tunnel]) -> None:
        """:raise NetworkError, HostError: something cannot be set up; :meth:`close` takes down the rest."""
        self.rules.remove_stale()
        for path in self.vifs:
            tunnel = tunnels[path.vif.handle]
            mtu = self.links.mtu(path.vif.ifname)
            if tunnel.remote is not None and tunnel.local is not None:
                self.links.create_vxlan(
                    path.ifname,
                    vni=tunnel.vni,
                    local=tunnel.local,
                    remote=tunnel.remote,
                    port=tunnel.port,
                    mtu=mtu,
                )
            # On one host the backup's side makes a pair of links, this end among them.
            path.start(self.rules)

    def each(self, call: Callable[[VifPath], object]) -> None:
        for path in self.vifs:
            call(path)

    def release_all(self) -> None:
        """Protection has ended and the PVM goes on: everything leaves, and is held no more."""
        self.each(lambda path: path.release_all())
        self._let_pass()

    def _let_pass(self) -> None:
        """Nothing goes into a queue from now on: one that is closed loses what came after it was last read."""
        try:
            self.rules.let_pass()
            self.each(lambda path: path.output.release_all())
        except RemusError as error:
            log.warning("some of the guest's packets may be lost, for it to repeat: %s", error)

    def close(self, *, drop_held: bool) -> None:
        """Take everything down; what is held leaves first, unless the guest went on elsewhere."""
        if not drop_held:
            self._let_pass()
        for path in self.vifs:
            path.stop_reading()
        for path in self.vifs:
            path.close(drop_held=drop_held)
        try:
            self.rules.remove()
        except RemusError as error:
            log.warning("while removing the packet rules: %s", error)
        self.links.close()
