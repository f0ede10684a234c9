# SPDX-License-Identifier: LGPL-2.1-or-later
"""The backup's half of the engine: load a complete checkpoint into the SVM and let it run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from remus_colo.adapters import backend, xenctrl
from remus_colo.adapters.backend import Vif, XenbusState
from remus_colo.adapters.pages import bitmap_count
from remus_colo.adapters.xenctrl import (
    CALLBACK_TYPE_VECTOR,
    HVM_PARAM_CALLBACK_IRQ,
    HVM_PARAM_CONSOLE_EVTCHN,
    HVM_PARAM_STORE_EVTCHN,
    PAGE_SIZE,
    VIRQ_TIMER,
    EventChannel,
    EvtchnKind,
    Guest,
    ShutdownReason,
)
from remus_colo.adapters.xenstore import Store
from remus_colo.checkpoint import hvmcontext, sharedinfo
from remus_colo.checkpoint.guestinfo import GuestLayout, Mode
from remus_colo.errors import DomainError, XenError
from remus_colo.relocation.bulk import Pages

log = logging.getLogger(__name__)

BACKEND_TIMEOUT_S = 20.0
# Linux's vector for event upcalls (HYPERVISOR_CALLBACK_VECTOR of its asm/irq_vectors.h), used where the
# guest has not told Xen another by HVM_PARAM_CALLBACK_IRQ.
LINUX_CALLBACK_VECTOR = 0xF3


@dataclass(frozen=True, slots=True)
class Received:
    """A whole checkpoint as it arrived."""

    epoch: int
    pages: Sequence[Pages]
    zero_gfns: bytes  # u64 little-endian each
    grants: bytes
    context: bytes
    hashes: bytes  # of all pages of the PVM, u64 a gfn; empty if they are not to be compared
    ring_nodes: dict[int, dict[str, str]]
    event_channels: list[EventChannel]
    shared_info_gfn: int
    xen_time_ns: int  # the guest's clock when the PVM was stopped


def port_table(channels: Sequence[EventChannel]) -> list[tuple[int, EvtchnKind, int, int]]:
    """What of the ports must be equal on both sides: the far end of a channel may differ."""
    table: list[tuple[int, EvtchnKind, int, int]] = []
    for channel in channels:
        kind = EvtchnKind.UNBOUND if channel.kind is EvtchnKind.INTERDOMAIN else channel.kind
        table.append((channel.port, kind, channel.vcpu, channel.detail if kind is EvtchnKind.VIRQ else 0))
    return table


class SvmEngine:
    """The secondary VM of one protected guest.

    :param attach: called with each vif after its backend was bound anew: puts the new interface in its
        place and brings it up.
    """

    def __init__(
        self, guest: Guest, store: Store, layout: GuestLayout, attach: Callable[[Vif], None]
    ) -> None:
        self.guest = guest
        self.store = store
        self.layout = layout
        self.attach = attach
        self.mode = Mode.TRANSPARENT
        self._dirty = bytearray()
        self._granted: tuple[bytes | memoryview, bytes | memoryview] = (
            b"",
            b"",
        )  # gfns and pages, see _keep_granted
        self._paused = True  # xl restored it paused
        self._logging = False
        self._ever_ran = False
        self.loaded = False  # a checkpoint was applied since it last ran
        self.verified_pages = 0  # at the last checkpoint that was compared

    def start(self) -> None:
        """Map it, log what it dirties, and, for transparent checkpoints, let it resume by itself."""
        self.guest.map_memory()
        self.guest.enable_dirty_log()
        self._logging = True
        self._dirty = bytearray(self.guest.nr_gfns // 8)
        if self.mode is Mode.TRANSPARENT:
            self.guest.unpause()
            self._paused = False
            self._ever_ran = True
            for vif in self.layout.vifs:
                self._await(vif, XenbusState.CONNECTED)

    def _await(self, vif: Vif, state: XenbusState) -> None:
        if not self.store.wait(
            [f"{vif.backend}/state"],
            lambda: backend.backend_state(self.store, vif) == state,
            timeout_s=BACKEND_TIMEOUT_S,
        ):
            raise XenError(
                f"the SVM's backend {vif.ifname} did not reach {state.name} within {BACKEND_TIMEOUT_S:g} s "
                f"(it is {backend.backend_state(self.store, vif).name})",
                operation="xenbus",
                domid=self.guest.domid,
            )

    def prepare(self) -> bytes:
        """Stop the SVM and tell what it changed since the last checkpoint (bitmap of gfns)."""
        if not self._paused:
            self.guest.pause()
            self._paused = True
        self.guest.map_grants()
        self._keep_granted()  # before the log is read: what is written in between is in both
        self.guest.take_dirty(self._dirty)
        self.guest.mark_writable_grants(self._dirty)
        return bytes(self._dirty)

    def _keep_granted(self) -> None:
        """Keep the pages that a backend may still write to, as a packet that is on its way arrives: the
        primary will not be told.

        Where the PVM has no buffer in such a page, nor has changed it, the checkpoint lacks it, and what it has to be
        is what it is now.
        """
        bitmap = bytearray(len(self._dirty))
        self.guest.mark_writable_grants(bitmap, granted=True)
        for gfn in self.layout.private_gfns:
            bitmap[gfn // 8] &= ~(1 << gfn % 8) & 0xFF
        room = bitmap_count(bitmap)
        gfns, pages = bytearray(room * 8), bytearray(room * PAGE_SIZE)
        count = self.guest.collect(bitmap, gfns, pages)
        self._granted = memoryview(gfns)[: count * 8], memoryview(pages)[: count * PAGE_SIZE]

    def _put_granted_back(self) -> None:
        """The backends are gone."""
        gfns, pages = self._granted
        self._granted = (b"", b"")
        self.guest.apply(gfns, pages)

    def go_on(self) -> None:
        """Run again as it was: the checkpoint that :meth:`prepare` began did not come."""
        self._granted = (b"", b"")
        if self._paused and self._ever_ran:
            self.guest.unpause()
            self._paused = False

    def apply(self, checkpoint: Received) -> None:
        """Load a complete checkpoint; the SVM is paused before and after.

        :raise DomainError: if the guest's event channels differ from the PVM's (transparent mode).
        """
        if self.mode is Mode.TRANSPARENT:
            self._check_ports(checkpoint.event_channels)
        # A vCPU that is halted stays so for Xen, whatever state is loaded; an interrupt ends that, and does
        # nothing else, as the domain is paused and the state that it changes is about to be replaced.
        self._interrupt()
        for vif in self.layout.vifs:
            backend.unbind(vif)
        self._put_granted_back()
        if self.mode is Mode.COOPERATIVE:
            self._reset()
        # The guest's own resume replaces the page behind this gfn; where it lies may differ until now.
        for gfn in {checkpoint.shared_info_gfn, self.guest.info().shared_info_gfn}:
            if gfn < self.guest.nr_gfns:
                self.guest.remap(gfn)
        self.guest.map_grants()
        self._write_pages(checkpoint, len(checkpoint.grants) // PAGE_SIZE)
        if checkpoint.hashes:
            self._verify(checkpoint)  # now: the backends, once bound, raise events in the guest's vcpu_info
        # A guest that resumes itself grants anew, and its twin's table may have more frames than this one's.
        busy = self.guest.set_grants(checkpoint.grants if self.mode is Mode.TRANSPARENT else b"")
        if busy:
            log.warning(
                "%d grants of domain %d were still mapped while its state was replaced",
                busy,
                self.guest.domid,
            )
        # Without a request that was there already, the interrupt that resume() makes is a new one.
        self.guest.set_hvm_context(hvmcontext.without_request(checkpoint.context, self._callback_vector()))
        if self.mode is Mode.TRANSPARENT:
            self._mark_timers(checkpoint)
            for vif in self.layout.vifs:
                backend.set_ring_nodes(self.store, vif, checkpoint.ring_nodes[vif.handle])
        self._connect()
        self._dirty = bytearray(len(self._dirty))
        self.loaded = True

    def _verify(self, checkpoint: Received) -> None:
        """Compare all memory with the PVM's as it was at the checkpoint.

        Not compared: the rings of xenstore and the console, which stay the SVM's own; shared_info, which Xen itself
        writes; and in co-operative mode what :meth:`_write_pages` may pass over.

        :raise DomainError: a page differs; the SVM is no replica.
        """
        ours, theirs = memoryview(self.guest.hashes()).cast("Q"), memoryview(checkpoint.hashes).cast("Q")
        excluded = {*self.layout.private_gfns, checkpoint.shared_info_gfn, self.guest.info().shared_info_gfn}
        differing = [
            gfn
            for gfn in range(max(len(ours), len(theirs)))
            if gfn not in excluded
            and (theirs[gfn] if gfn < len(theirs) else 0) != (mine := ours[gfn] if gfn < len(ours) else 0)
            and (mine or self.mode is Mode.TRANSPARENT)
        ]
        if differing:
            named = ", ".join(f"{gfn:#x}" for gfn in differing[:8])
            raise DomainError(
                f"{len(differing)} pages of the backup's copy differ from the guest's after checkpoint {checkpoint.epoch} "
                f"(gfns {named}{' ...' if len(differing) > 8 else ''}): this is a defect, please report it with both logs"
            )
        self.verified_pages = sum(1 for value in ours if value)

    def _write_pages(self, checkpoint: Received, grant_frames: int) -> None:
        absent = 0
        runs: list[tuple[bytes | memoryview, bytes | memoryview | None]] = [
            (run.gfns, run.pages) for run in checkpoint.pages
        ]
        for gfns, pages in [*runs, (checkpoint.zero_gfns, None)]:
            number, last_gfn = self.guest.apply(gfns, pages)
            absent += number
            # The guest maps its grant table and shared_info itself. An SVM that has not resumed yet lacks
            # them, and makes them when it does; nothing else may be missing.
            if absent > (grant_frames + 1 if self.mode is Mode.COOPERATIVE else 0):
                raise DomainError(
                    f"the guest's memory map changed: the backup has no page {last_gfn:#x}; "
                    "do not balloon a protected guest, and start its protection anew"
                )

    def _check_ports(self, channels: Sequence[EventChannel]) -> None:
        ours, theirs = port_table(self.guest.event_channels()), port_table(channels)
        if ours != theirs:
            raise DomainError(
                "the guest's event channels differ between the hosts, so that transparent checkpoints cannot work: "
                f"primary {theirs}, backup {ours}; use --checkpoint cooperative"
            )

    def _mark_timers(self, checkpoint: Received) -> None:
        """The PVM's armed timer stays in its host's Xen: have the guest look at its timers now."""
        page = self.guest.page(checkpoint.shared_info_gfn)
        for channel in checkpoint.event_channels:
            if channel.kind is EvtchnKind.VIRQ and channel.detail == VIRQ_TIMER:
                sharedinfo.set_pending(page, channel.port)

    def _connect(self) -> None:
        """Bind the backends, which attach to the rings as they lie in the loaded memory."""
        for vif in self.layout.vifs:
            if self.mode is Mode.COOPERATIVE:
                # Only the frontend's: the backend's driver writes its own state where it differs from the
                # one that it remembers, and a state written behind its back would stay.
                self.store.write(f"{vif.frontend}/state", str(int(XenbusState.INITIALISING)))
            backend.bind(vif)
        for vif in self.layout.vifs:
            self.attach(vif)
            self.store.write(f"{vif.backend}/hotplug-status", "connected")
            self._await(
                vif, XenbusState.CONNECTED if self.mode is Mode.TRANSPARENT else XenbusState.INIT_WAIT
            )

    def _reset(self) -> None:
        """Make the SVM what a domain is that a suspended guest is about to be resumed in."""
        guest, store, domid = self.guest, self.store, self.guest.domid
        home = f"/local/domain/{domid}"
        guest.shutdown(ShutdownReason.SUSPEND)
        guest.soft_reset()
        # The guest finds an empty ring, as in a restored domain: what its former life had begun to say to
        # xenstored would be read as part of what it says next.
        guest.apply(self.layout.store_gfn.to_bytes(8, "little"), None)
        store_port, console_port = guest.alloc_unbound(), guest.alloc_unbound()
        guest.set_hvm_param(HVM_PARAM_STORE_EVTCHN, store_port)
        guest.set_hvm_param(HVM_PARAM_CONSOLE_EVTCHN, console_port)
        store.write(f"{home}/console/port", "-1")
        store.write(f"{home}/console/port", str(console_port))
        store.write(f"{home}/store/port", str(store_port))
        store.write(f"{home}/control/shutdown", "")
        store.introduce_domain(domid, self.layout.store_gfn, store_port)
        store.resumed_domain(domid)

    def set_clock(self, offset_ns: int) -> None:
        """Have this host's Xen add so much to system time for the SVM, which is stopped.

        After its state was loaded: Xen's part of the shared_info page that came with it says what was right at
        the primary, and is brought up to date by this.
        """
        xenctrl.set_system_time_offset(self.guest.domid, offset_ns)

    def resume(self) -> None:
        """Let the SVM run from the state that :meth:`apply` loaded."""
        self.guest.unpause()
        self._paused = False
        self._ever_ran = True
        self.loaded = False
        if self.mode is Mode.TRANSPARENT:
            self._interrupt()  # its handler finds the timer's event pending

    def _interrupt(self) -> None:
        for vcpu in range(self.guest.info().vcpus):
            self.guest.inject_vector(vcpu * 2, self._callback_vector())

    def _callback_vector(self) -> int:
        via = self.guest.hvm_param(HVM_PARAM_CALLBACK_IRQ)
        return via & 0xFF if via >> 56 == CALLBACK_TYPE_VECTOR else LINUX_CALLBACK_VECTOR

    def await_devices(self) -> None:
        """Cooperative mode: wait until the guest has connected its devices again."""
        for vif in self.layout.vifs:
            self._await(vif, XenbusState.CONNECTED)

    def stop_logging(self) -> None:
        """The SVM is the guest now: nobody asks any more what it dirties."""
        if self._logging:
            self._logging = False
            self.guest.disable_dirty_log()

    def close(self) -> None:
        """End the dirty log; the domain stays. A second call does nothing."""
        try:
            self.stop_logging()
        except XenError as error:
            log.info("while ending the dirty log of domain %d: %s", self.guest.domid, error)
        self.guest.close()
