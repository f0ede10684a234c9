# SPDX-License-Identifier: LGPL-2.1-or-later
"""The primary's half of the engine: stop the PVM, copy what changed, let it run again."""

from __future__ import annotations

import bisect
import contextlib
import logging
import mmap
import time
from dataclasses import dataclass, field

from remus_colo.adapters import backend, xenctrl
from remus_colo.adapters.backend import XenbusState
from remus_colo.adapters.pages import bitmap_count, bitmap_or, hash_pages, squeeze_zero_pages
from remus_colo.adapters.xenctrl import (
    HVM_PARAM_CONSOLE_EVTCHN,
    HVM_PARAM_STORE_EVTCHN,
    PAGE_SIZE,
    EventChannel,
    Guest,
)
from remus_colo.adapters.xenstore import Store
from remus_colo.checkpoint import sharedinfo
from remus_colo.checkpoint.guestinfo import GuestLayout, Mode
from remus_colo.checkpoint.suspend import SUSPEND_TIMEOUT_S, Suspender
from remus_colo.errors import DomainError, XenError

log = logging.getLogger(__name__)

BACKEND_TIMEOUT_S = 20.0
RING_TIMEOUT_S = 0.05  # netback answers within microseconds unless a packet is held elsewhere
STOP_TIMEOUT_S = 5.0
INPUT_TIMEOUT_S = 0.1  # a guest that does not take its input now is itself the bottleneck
EVENT_TIMEOUT_S = 1.0
FIRST_CAPACITY_PAGES = 8192
READY_PAGES = 2048  # of them, of memory that is there when the guest is stopped for a checkpoint
MADV_POPULATE_WRITE = 23  # <linux/mman.h>, since 5.14; mmap has no name for it


@dataclass(slots=True)
class Snapshot:
    """One checkpoint's content, in buffers that the next one reuses once ``release`` was called."""

    epoch: int
    gfns: bytearray
    pages: mmap.mmap | bytearray
    count: int
    grants: bytes
    context: bytes
    ring_nodes: dict[int, dict[str, str]]  # per vif handle
    event_channels: list[EventChannel]
    shared_info_gfn: int
    xen_time_ns: int
    collect_s: float = 0.0
    zero_gfns: bytes = b""
    hashes: bytes = b""  # of all pages, a u64 a gfn, if the copies are to be compared

    def squeeze(self) -> None:
        """Take out the pages of zeros; not done while the guest waits."""
        self.count, self.zero_gfns = squeeze_zero_pages(self.gfns, self.pages, self.count)


@dataclass(slots=True)
class _Buffers:
    gfns: bytearray = field(default_factory=bytearray)
    pages: mmap.mmap | bytearray = field(default_factory=bytearray)

    def reserve(self, pages: int) -> None:
        if len(self.gfns) // 8 < pages:
            self.gfns = bytearray(pages * 8)
            # Not a bytearray, which is cleared at once: under emulation that kept a PV dom0 busy for seconds, with the
            # interpreter's lock held. What no checkpoint fills takes no memory.
            self.pages = mmap.mmap(-1, pages * PAGE_SIZE)
            with contextlib.suppress(OSError):
                self.pages.madvise(MADV_POPULATE_WRITE, 0, min(READY_PAGES, pages) * PAGE_SIZE)


class PvmEngine:
    """Checkpoints of one running guest.

    The owner calls, per checkpoint: :meth:`stop`, :meth:`collect`, :meth:`go`.

    :param clock: reads the guest's clock in ns: this host's Xen system time, unless its Xen adds something for it.
    """

    def __init__(self, guest: Guest, store: Store, layout: GuestLayout, clock: xenctrl.Clock) -> None:
        self.guest = guest
        self.store = store
        self.layout = layout
        self.clock = clock
        self.mode = Mode.TRANSPARENT
        self._buffers = _Buffers()
        self._mapped_for: tuple[int, int] | None = None
        self._ring_gfns: dict[int, list[int]] = {}
        self._logging = False
        self._stopped = False

    # -- the guest's own suspend -----------------------------------------------------------------------

    @property
    def _shutdown_node(self) -> str:
        return f"/local/domain/{self.guest.domid}/control/shutdown"

    def suspend(self, timeout_s: float = SUSPEND_TIMEOUT_S) -> None:
        """Ask the guest to suspend itself and wait until it has.

        :raise DomainError: if it does not, or shuts down instead; the request is withdrawn.
        """
        with Suspender(self.guest, self.store) as suspender:
            suspender.suspend(timeout_s)

    def uses_two_level_events(self) -> bool:
        """Whether the guest uses the 2-level event channel ABI, and not FIFO.

        A guest since its boot tells by its masks.  In one that was restored they are all clear, and an event
        tells: it is paused, xenstored is made to notify it, and the port's bit in the shared_info page is set
        or is not, as FIFO events are kept elsewhere.  What makes xenstored notify it is an empty request in
        ``control/shutdown``, which a guest watches and which asks for nothing (public xenstore-paths document).
        """
        gfn = self.guest.info().shared_info_gfn
        self.guest.remap(gfn)
        page = self.guest.page(gfn)
        if sharedinfo.masks_unbound_ports(page):
            return True
        port = self.guest.hvm_param(HVM_PARAM_STORE_EVTCHN)
        try:
            self.guest.pause()  # in here: a signal may interrupt us as soon as that is done
            self.store.write(self._shutdown_node, "")
            deadline_s = time.monotonic() + EVENT_TIMEOUT_S
            while not sharedinfo.is_pending(page, port):
                if time.monotonic() > deadline_s:
                    return False
                time.sleep(0.005)  # nothing notifies dom0 of another domain's pending bit
            return True
        finally:
            self.guest.unpause()

    # -- start -----------------------------------------------------------------------------------------

    def start_logging(self) -> None:
        """Log what the PVM dirties from now on. Call while it is suspended."""
        self.guest.enable_dirty_log()
        self._logging = True

    def resume_as_new(self) -> None:
        """Resume the suspended guest in place as if in a new domain, so that it binds its event channels
        in the order that its restored twin does.

        1. pause, so that the soft reset's resume does not let it run;
        2. soft reset: its old registrations go;
        3. ports 1 and 2 again for xenstore and console;
        4. backends back to InitWait, for the frontends to connect anew;
        5. xenstored learns the new port; the suspend hypercall returns 0.
        """
        guest, store, domid = self.guest, self.store, self.guest.domid
        home = f"/local/domain/{domid}"
        guest.pause()
        guest.soft_reset()
        store_port, console_port = guest.alloc_unbound(), guest.alloc_unbound()
        guest.set_hvm_param(HVM_PARAM_STORE_EVTCHN, store_port)
        guest.set_hvm_param(HVM_PARAM_CONSOLE_EVTCHN, console_port)
        store.write(f"{home}/console/port", "-1")  # makes xenconsoled let go of the old one
        for vif in self.layout.vifs:
            store.write(f"{vif.frontend}/state", str(int(XenbusState.INITIALISING)))
        store.write(f"{home}/console/port", str(console_port))
        store.write(f"{home}/store/port", str(store_port))
        store.introduce_domain(domid, self.layout.store_gfn, store_port)
        for vif in self.layout.vifs:
            self._await_backend(vif, XenbusState.INIT_WAIT)
        guest.resume(cancelled=False)
        store.resumed_domain(domid)
        guest.unpause()

    def resume_cancelled(self) -> None:
        """Resume the suspended guest as if it had never suspended: its devices stay connected."""
        self.guest.resume(cancelled=True)
        self.store.resumed_domain(self.guest.domid)

    def await_connected(self) -> None:
        """Wait until every vif is connected again.

        :raise XenError: if one is not in time.
        """
        for vif in self.layout.vifs:
            self._await_backend(vif, XenbusState.CONNECTED)

    def _await_backend(self, vif: backend.Vif, state: XenbusState) -> None:
        if not self.store.wait(
            [f"{vif.backend}/state"],
            lambda: backend.backend_state(self.store, vif) == state,
            timeout_s=BACKEND_TIMEOUT_S,
        ):
            raise XenError(
                f"the backend of {vif.ifname} did not reach {state.name} within {BACKEND_TIMEOUT_S:g} s "
                f"(it is {backend.backend_state(self.store, vif).name}): see `dmesg`",
                operation="xenbus",
                domid=self.guest.domid,
            )

    # -- a checkpoint ----------------------------------------------------------------------------------

    def prepare(self) -> None:
        """What needs no stopped guest: map its memory, if that is not done or has changed."""
        info = self.guest.info()
        key = (info.tot_pages, info.shared_info_gfn)
        if key != self._mapped_for:
            self.guest.map_memory()
            self._mapped_for = key
        self._buffers.reserve(FIRST_CAPACITY_PAGES)

    def drain_input(self) -> bool:
        """Let the backends hand over what they have taken for the guest; nothing new comes, and the guest runs.

        What stays behind in a backend reaches the PVM but not the copy, and the VMs diverge. True if nothing did.
        """
        deadline_s = time.monotonic() + INPUT_TIMEOUT_S
        while not all(backend.input_idle(vif) for vif in self.layout.vifs):
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.001)  # the backend tells its state, not changes of it
        return True

    def stop(self) -> None:
        """Stop the PVM: a pause, or its own suspend.

        A copy is whole only if nothing is under way between the guest and this host that the copy would not
        show: a request to xenstored, whose ring does not travel, and requests to a backend, which answers in
        any order, in place of the requests, so that no other backend can take the ring over from there.

        :raise DomainError: if no such moment was found.
        """
        if self.mode is Mode.COOPERATIVE:
            self.suspend()  # the guest itself comes to rest first
            self._stopped = True
            # A twin that resumes itself makes its rings anew, without what still lies in this one's: what the
            # guest has sent should be out.  If it is not, the VMs diverge, and nothing worse.
            if (busy := self._busy()) is not None:
                log.info("checkpoint of domain %d while %s", self.guest.domid, busy)
            return
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        while True:
            self.guest.pause()
            self._stopped = True
            busy = self._busy()
            if busy is None:
                return
            self.guest.unpause()
            self._stopped = False
            if time.monotonic() > deadline_s:
                raise DomainError(f"no moment for a checkpoint was found within {STOP_TIMEOUT_S:g} s: {busy}")
            time.sleep(0.002)  # let the guest go on for a while

    def _busy(self) -> str | None:
        """What is under way while the guest is paused, None if nothing is."""
        if not sharedinfo.store_ring_idle(self.guest.page(self.layout.store_gfn)):
            return "the guest is talking to xenstore"
        pages = [self.guest.page(gfns[0]) for gfns in self._find_rings().values()]
        deadline_s = time.monotonic() + RING_TIMEOUT_S
        while not (
            all(sharedinfo.ring_idle(page) for page in pages)
            and all(backend.input_idle(vif) for vif in self.layout.vifs)
        ):
            if time.monotonic() > deadline_s:
                return "a network backend has not answered the guest's requests"
            time.sleep(0.0005)
        return None

    def _find_rings(self) -> dict[int, list[int]]:
        """Per vif handle the gfns of its rings, transmit first."""
        if not self._ring_gfns:
            frames = self.guest.map_grants()
            table = self.guest.grants(frames)
            for vif in self.layout.vifs:
                nodes = backend.ring_nodes(self.store, vif)
                refs = [
                    int(nodes[name]) for name in sorted(nodes, reverse=True) if name.endswith("-ring-ref")
                ]
                gfns = [sharedinfo.grant_frame(table, ref) for ref in refs]
                self._ring_gfns[vif.handle] = [gfn for gfn in gfns if gfn is not None]
        return self._ring_gfns

    def rings_changed(self) -> None:
        """The frontends connected anew: look the rings up again."""
        self._ring_gfns = {}

    def collect(self, epoch: int, dirty_too: bytes, *, verify: bool = False) -> Snapshot:
        """Copy what changed since the last checkpoint; the guest must be stopped.

        :param dirty_too: bitmap of the gfns that the SVM changed; what it changed must come back to what
            the PVM has.
        :param verify: have the backup compare all memory with this one's once it has loaded the checkpoint; the guest
            waits until all of it is read.
        """
        started_s = time.monotonic()
        guest = self.guest
        info = guest.info()
        bitmap = bytearray(guest.nr_gfns // 8)
        # The rings first: a backend that still answers then does so where this copy does not show it, and all
        # data that the copy does show was written before, and so is in the dirty log that is read next.
        rings = {gfn: bytes(guest.page(gfn)) for gfns in self._find_rings().values() for gfn in gfns}
        guest.take_dirty(bitmap)
        bitmap_or(bitmap, dirty_too[: len(bitmap)].ljust(len(bitmap), b"\0"))
        frames = guest.map_grants()
        # What Xen and the backends write is in no dirty log.
        guest.mark_writable_grants(bitmap)
        for gfn in rings:
            bitmap[gfn // 8] |= 1 << gfn % 8
        bitmap[info.shared_info_gfn // 8] |= 1 << info.shared_info_gfn % 8
        for gfn in self.layout.private_gfns:
            bitmap[gfn // 8] &= ~(1 << gfn % 8) & 0xFF
        wanted = bitmap_count(bitmap)
        self._buffers.reserve(wanted)
        count = guest.collect(bitmap, self._buffers.gfns, self._buffers.pages)
        numbers = memoryview(self._buffers.gfns).cast("Q")[:count]
        for gfn, page in rings.items():
            index = bisect.bisect_left(numbers, gfn)
            self._buffers.pages[index * PAGE_SIZE : (index + 1) * PAGE_SIZE] = page
        return Snapshot(
            epoch=epoch,
            gfns=self._buffers.gfns,
            pages=self._buffers.pages,
            count=count,
            grants=guest.grants(frames),
            context=guest.hvm_context(),
            ring_nodes={vif.handle: backend.ring_nodes(self.store, vif) for vif in self.layout.vifs},
            event_channels=guest.event_channels(),
            shared_info_gfn=info.shared_info_gfn,
            xen_time_ns=self.clock.now_ns(),
            collect_s=time.monotonic() - started_s,
            hashes=self._hashes(count) if verify else b"",
        )

    def _hashes(self, copied: int) -> bytes:
        """What the SVM's memory must be equal to: the copies, and where there are none the guest's pages.

        Xen writes to a stopped guest, too (a timer that runs out raises its event in vcpu_info), after a page
        was copied.
        """
        hashes = self.guest.hashes()
        hash_pages(self._buffers.gfns, self._buffers.pages, copied, hashes)
        return bytes(hashes)

    def go(self) -> None:
        """Let the stopped PVM run on; nothing if it runs."""
        if not self._stopped:
            return
        self._stopped = False
        if self.mode is Mode.COOPERATIVE:
            self.resume_cancelled()
        else:
            self.guest.unpause()

    def close(self) -> None:
        """End the dirty log and let the guest run; never raises for a guest that is gone."""
        try:
            self.go()
            if self._logging:
                self._logging = False
                self.guest.disable_dirty_log()
        except XenError as error:
            log.info("while ending the checkpoints of domain %d: %s", self.guest.domid, error)
        self.guest.close()
