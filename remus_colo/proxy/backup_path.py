# SPDX-License-Identifier: LGPL-2.1-or-later
"""The network of the SVM: an isolated bridge with its vif and the tunnel, and the rewriter between.

::

    tunnel <--> isolated bridge <--> NFQUEUE, both directions <--> vif(SVM)

At failover the vif moves to the LAN's bridge; its rules, and so the rewriter, go with it by name.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from remus_colo.adapters.backend import Vif
from remus_colo.adapters.netlink import Links
from remus_colo.adapters.nft import QueueRules
from remus_colo.adapters.packetqueue import PacketQueue, open_queue, queues_in_use
from remus_colo.adapters.packetqueue_native import NativeQueue
from remus_colo.adapters.rawlink import Frame, RawSender
from remus_colo.adapters.rewriting_native import RewritingTurns
from remus_colo.errors import RemusError
from remus_colo.proxy import announce
from remus_colo.proxy.announce import AddressBook
from remus_colo.proxy.outage import Outage
from remus_colo.proxy.primary_path import Tunnel, backup_ifname, primary_ifname
from remus_colo.proxy.queue_numbers import SVM_NUMBERS, queue_numbers
from remus_colo.proxy.rewriter import Rewriter, finish_checksum
from remus_colo.session.loop import Loop

log = logging.getLogger(__name__)

QUEUE_PACKETS = 16384
LINK_TIMEOUT_S = 10.0
EXPIRE_S = 10.0
ETHERTYPE_IP = 0x0800
ETHERTYPE_ARP = 0x0806
ETHERTYPE_IPV6 = 0x86DD
NO_MAC = bytes(6)
LOCAL_MAC = bytes.fromhex("020000000001")  # locally administered: nobody answers to it


def bridge_name(tag: str, handle: int) -> str:
    return f"rcb{tag}.{handle}"


class SvmVifPath:
    """One vif of the SVM."""

    def __init__(self, loop: Loop, links: Links, sender: RawSender, tag: str, handle: int) -> None:
        self.bridge = bridge_name(tag, handle)
        self.tunnel_ifname = backup_ifname(tag, handle)
        self.handle = handle
        self.vif: Vif | None = None
        self.rewriter = Rewriter()
        self.guest_addresses = AddressBook(NO_MAC)
        self.client_addresses = AddressBook(NO_MAC)
        self._tag = tag
        self._mac = NO_MAC
        self._loop = loop
        self._links = links
        self._sender = sender
        self._outage: Outage | None = None
        self._from_guest: PacketQueue | None = None
        self._to_guest: PacketQueue | None = None
        self._muted = False
        self._turns_from_guest: RewritingTurns | None = None

    def start(self, tunnel: Tunnel, mtu: int) -> None:
        """Make bridge and tunnel; the vif comes later."""
        links = self._links
        links.create_isolated_bridge(self.bridge)
        if tunnel.remote is not None and tunnel.local is not None:
            links.create_vxlan(
                self.tunnel_ifname,
                vni=tunnel.vni,
                local=tunnel.local,
                remote=tunnel.remote,
                port=tunnel.port,
                mtu=mtu,
                bridge_port=True,
            )
        else:
            links.create_veth(self.tunnel_ifname, primary_ifname(self._tag, self.handle), mtu)
        links.set_master(self.tunnel_ifname, self.bridge)
        links.set_up(self.tunnel_ifname)
        links.set_up(self.bridge)

    def open_queues(self, vif: Vif, mac: bytes, rules: QueueRules) -> None:
        self.vif = vif
        self.guest_addresses = AddressBook(mac)
        self._mac = mac
        out, back = queue_numbers(SVM_NUMBERS, 2, vif.domid, vif.handle, queues_in_use())
        self._from_guest = open_queue(out, self._packet_from_guest, QUEUE_PACKETS)
        self._to_guest = open_queue(back, self._packet_to_guest, QUEUE_PACKETS)
        for queue, look in ((self._from_guest, self._look_at_guest), (self._to_guest, self._look_at_client)):
            read: Callable[[], object] = queue.process
            if isinstance(queue, NativeQueue):
                turns = RewritingTurns(
                    queue, self.rewriter.native, look, self._give_held, from_guest=queue is self._from_guest
                )
                if queue is self._from_guest:
                    self._turns_from_guest = turns
                read = turns.turn
            self._loop.add_reader(queue, read)
        rules.rewriter(vif.ifname, out, back)

    def attach(self) -> None:
        """Put the vif, which a backend has just made anew, into its bridge. From any thread: own socket."""
        assert self.vif is not None
        with Links() as links:
            links.wait_for_link(self.vif.ifname, time.monotonic() + LINK_TIMEOUT_S)
            links.silence(self.vif.ifname)
            links.set_master(self.vif.ifname, self.bridge)
            links.set_up(self.vif.ifname)

    def await_forwarding(self) -> None:
        """Wait until input reaches the vif: what is sent before is lost. From any thread: own socket.

        :raise NetworkError: it does not.
        """
        assert self.vif is not None
        with Links() as links:
            links.wait_forwarding(self.vif.ifname, time.monotonic() + LINK_TIMEOUT_S)

    # What is done per packet, in the reference form of the queue; the native one does the same in C, and
    # looks at fewer.

    def _packet_from_guest(self, packet_id: int, packet: bytes, ethertype: int) -> None:
        queue = self._from_guest
        assert queue is not None
        if self._muted:
            queue.drop(packet_id)
            return
        self._look_at_guest(packet, ethertype)
        if ethertype in (ETHERTYPE_IP, ETHERTYPE_IPV6):
            changed = self.rewriter.from_guest(time.monotonic(), packet)
            self._give_held()
            if changed is not None:
                self._verdict(queue, packet_id, changed)
                return
        queue.accept(packet_id)

    def _packet_to_guest(self, packet_id: int, packet: bytes, ethertype: int) -> None:
        queue = self._to_guest
        assert queue is not None
        self._look_at_client(packet, ethertype)
        if ethertype in (ETHERTYPE_IP, ETHERTYPE_IPV6):
            # It may be kept, and this form of the queue does not tell whether the checksum is there already.
            changed = self.rewriter.to_guest(time.monotonic(), finish_checksum(packet))
            if changed is not None:
                self._verdict(queue, packet_id, changed)
                return
        queue.accept(packet_id)

    def _look_at_guest(self, packet: bytes, ethertype: int) -> None:
        if ethertype == ETHERTYPE_ARP:
            self.guest_addresses.learn_arp(packet)
        elif ethertype in (ETHERTYPE_IP, ETHERTYPE_IPV6):
            self.guest_addresses.learn_packet(packet)

    def _look_at_client(self, packet: bytes, ethertype: int) -> None:
        """Who talks to the guest from its LAN can be asked later whether that works; who talks to all may be
        a host that is asleep.
        """
        if ethertype in (ETHERTYPE_IP, ETHERTYPE_IPV6) and not announce.is_to_many(packet):
            self.client_addresses.learn_packet(packet)

    def _give_held(self) -> None:
        for held in self.rewriter.take_held():
            self._give(held)

    def _give(self, packet: bytes) -> None:
        """Give the guest a packet that the rewriter had kept back: past the bridge, straight into the vif."""
        assert self.vif is not None
        ethertype = ETHERTYPE_IPV6 if packet[0] >> 4 == 6 else ETHERTYPE_IP
        frame = announce.ethernet(self._mac, LOCAL_MAC, ethertype, packet)
        try:
            self._sender.send(self.vif.ifname, frame)
        except RemusError as error:
            log.debug("a packet kept back was lost: %s", error)

    @staticmethod
    def _verdict(queue: PacketQueue, packet_id: int, changed: bytes) -> None:
        if changed:
            # The kernel may not have filled the checksum in yet, and takes a changed packet's as it is.
            queue.accept_modified(packet_id, finish_checksum(changed))
        else:
            queue.drop(packet_id)

    def open_lan(self, lan_bridge: str) -> None:
        """The SVM is the guest now: its vif moves to the LAN."""
        assert self.vif is not None
        self._links.set_master(self.vif.ifname, lan_bridge)

    def delete_isolated(self) -> None:
        """The vif has moved: the tunnel and the isolated bridge go. From any thread: own socket, and it takes
        a while.
        """
        with Links() as links:
            links.delete_link(self.tunnel_ifname)
            links.delete_link(self.bridge)

    # -- an outage, see outage.py

    def expect_outage(self, uplinks: Iterable[str]) -> None:
        """The primary is late: keep from now on what is said.  Idempotent.

        :param uplinks: where the LAN is on this host.
        """
        assert self.vif is not None
        if self._outage is None:
            self._outage = Outage(self._loop, self._mac, self.vif.ifname, uplinks)

    def no_outage(self) -> None:
        """The primary is back."""
        if self._outage is not None:
            self._outage.close()
            self._outage = None

    def make_good(self, lan_bridge: str) -> dict[str, int]:
        """The SVM is the guest now, and its vif is in the LAN: say again what an outage has swallowed.

        :return: how many segments went ``to_guest`` and ``to_lan``.
        """
        outage, self._outage = self._outage, None
        if outage is None:
            return {"to_guest": 0, "to_lan": 0}

        def to_guest(frame: Frame, packet: bytes) -> None:
            packet = _summed(frame, packet)
            changed = self.rewriter.to_guest(time.monotonic(), packet)
            if changed != b"":
                self._give(packet if changed is None else changed)

        def to_lan(frame: Frame, packet: bytes) -> None:
            packet = _summed(frame, packet)
            changed = self.rewriter.from_guest(time.monotonic(), packet)
            if changed == b"":
                return
            packet = packet if changed is None else changed
            try:
                self._sender.send(
                    lan_bridge, announce.ethernet(frame.destination_mac, self._mac, frame.ethertype, packet)
                )
            except RemusError as error:
                log.debug("left to the guest to repeat: %s", error)

        return outage.make_good(to_guest, to_lan)

    def mute(self) -> None:
        """The primary is about to be told that the checkpoint is complete: it listens to what the SVM says as
        the copy of it.

        So what is on its way still, of the SVM as it was, must not come to it after that.
        """
        self._set_muted(True)

    def _set_muted(self, muted: bool) -> None:
        self._muted = muted
        if self._turns_from_guest is not None:
            self._turns_from_guest.mute(muted)

    def reset(self) -> None:
        """The SVM is a copy of the PVM as it is now."""
        if self._from_guest is not None and self._muted:
            self._from_guest.process()
        self._set_muted(False)
        self.rewriter.reset()
        if self._outage is not None:
            self._outage.forget_output()

    def close(self) -> None:
        self.no_outage()
        for queue in (self._from_guest, self._to_guest):
            if queue is not None:
                self._loop.remove_reader(queue)
                queue.process()
                queue.accept_all()
                queue.close()
        self._from_guest = self._to_guest = None
        for ifname in (self.tunnel_ifname, self.bridge):
            try:
                self._links.delete_link(ifname)
            except RemusError as error:
                log.warning("while taking down %s: %s", ifname, error)


def _summed(frame: Frame, packet: bytes) -> bytes:
    return packet if frame.summed else finish_checksum(packet)


class BackupPath:
    """All vifs of the SVM.

    :param handles: of the PVM's vifs; the SVM's are the same.
    """

    def __init__(self, loop: Loop, tag: str, handles: list[int]) -> None:
        self.links = Links()
        self._sender = RawSender()
        self.tag = tag
        self.rules: QueueRules | None = None
        self.vifs = {handle: SvmVifPath(loop, self.links, self._sender, tag, handle) for handle in handles}
        self._loop = loop
        self._expire()

    def _expire(self) -> None:
        for path in self.vifs.values():
            path.rewriter.expire(time.monotonic())
        self._timer = self._loop.call_later(EXPIRE_S, self._expire)

    def start(self, tunnels: dict[int, Tunnel], mtus: dict[int, int]) -> None:
        for handle, path in self.vifs.items():
            path.start(tunnels[handle], mtus.get(handle, 1500))

    def open_queues(self, vifs: tuple[Vif, ...], macs: dict[int, bytes]) -> None:
        """:param macs: of the guest, by vif handle."""
        domid = vifs[0].domid if vifs else 0
        self.rules = QueueRules(f"svm_{domid}")
        self.rules.remove_stale()
        for vif in vifs:
            self.vifs[vif.handle].open_queues(vif, macs[vif.handle], self.rules)

    def attach(self, vif: Vif) -> None:
        self.vifs[vif.handle].attach()

    def each(self, call: Callable[[SvmVifPath], object]) -> None:
        for path in self.vifs.values():
            call(path)

    def close(self) -> None:
        self._timer.cancel()
        if self.rules is not None:
            try:
                self.rules.let_pass()  # before the queues are closed: the guest may live on
            except RemusError as error:
                log.warning("the guest's packets still take the way through a queue: %s", error)
        for path in self.vifs.values():
            path.close()
        if self.rules is not None:
            try:
                self.rules.remove()
            except RemusError as error:
                log.warning("while removing the packet rules: %s", error)
        self._sender.close()
        self.links.close()
