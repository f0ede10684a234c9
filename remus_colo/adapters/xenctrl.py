# SPDX-License-Identifier: LGPL-2.1-or-later
"""Domains, their memory and their Xen-held state: the only module that makes hypercalls.

Calls that the distribution's bindings (``xen.lowlevel.xc``) offer go through them; the rest through
the compiled module ``remus_colo._native._xen``.  Foreign objects do not leave this module.
"""

from __future__ import annotations

import enum
import errno
import mmap
import os
from dataclasses import dataclass
from typing import Any, Protocol, Self

from remus_colo.adapters import bindings
from remus_colo.adapters.native import compiled_for_xen
from remus_colo.errors import XenError

PAGE_SIZE = 4096

# HVM_PARAM_* of xen/include/public/hvm/params.h
HVM_PARAM_CALLBACK_IRQ = 0
HVM_PARAM_STORE_PFN = 1
HVM_PARAM_STORE_EVTCHN = 2
HVM_PARAM_CONSOLE_PFN = 17
HVM_PARAM_CONSOLE_EVTCHN = 18
CALLBACK_TYPE_VECTOR = 2  # bits 63:56 of HVM_PARAM_CALLBACK_IRQ: the low byte is a vector

VIRQ_TIMER = 0  # public/xen.h
FIRST_DYNAMIC_GRANT = 8  # GNTTAB_NR_RESERVED_ENTRIES of public/grant_table.h


class ShutdownReason(enum.IntEnum):
    """``SHUTDOWN_*`` of public/sched.h."""

    POWEROFF = 0
    REBOOT = 1
    SUSPEND = 2
    CRASH = 3
    WATCHDOG = 4
    SOFT_RESET = 5


class EvtchnKind(enum.IntEnum):
    """``EVTCHNSTAT_*`` of public/event_channel.h."""

    CLOSED = 0
    UNBOUND = 1
    INTERDOMAIN = 2
    PIRQ = 3
    VIRQ = 4
    IPI = 5


@dataclass(frozen=True, slots=True)
class EventChannel:
    """One port of a domain. ``detail`` is the VIRQ number of a VIRQ, the far port of an interdomain one."""

    port: int
    kind: EvtchnKind
    vcpu: int
    detail: int


@dataclass(frozen=True, slots=True)
class DomainInfo:
    domid: int
    tot_pages: int
    shared_info_gfn: int
    vcpus: int
    hvm: bool  # HVM or PVH: hardware-assisted paging and an HVM context
    hap: bool
    dying: bool
    shutdown: bool
    shutdown_reason: int
    paused: bool
    blocked: bool


class Clock(Protocol):
    """Reads a host's Xen system time."""

    def now_ns(self) -> int: ...


def _fail(ffi: Any, operation: str, domid: int | None, what: str) -> XenError:
    number = ffi.errno
    where = f" for domain {domid}" if domid is not None else ""
    return XenError(
        f"{what}{where}: {operation} failed: {os.strerror(number)}",
        operation=operation,
        domid=domid,
        errno=number,
    )


def runstate() -> tuple[int, int]:
    """``(state_entry_time, sum of all state times)`` of this domain's vCPU 0, both ns of Xen system time."""
    lib, ffi = compiled_for_xen()
    entry, total = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    if lib.rc_runstate(0, entry, total) < 0:
        raise _fail(ffi, "VCPUOP_get_runstate_info", None, "could not read Xen system time")
    return int(entry[0]), int(total[0])


# What an older Xen answers to a domctl that it does not know, or that its security policy does not.
_UNKNOWN_DOMCTL = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES})


@dataclass(frozen=True, slots=True)
class SystemTime:
    """A domain's clock: Xen's system time plus ``offset_ns``, 0 unless it was set; it reads ``now_ns``."""

    offset_ns: int
    now_ns: int


def system_time(domid: int) -> SystemTime | None:
    """A domain's clock; None if this host's Xen cannot tell or set it (it lacks the interface of ``patches/``).

    :raise XenError: errno ESRCH if the domain does not exist.
    """
    lib, ffi = compiled_for_xen()
    offset, now = ffi.new("int64_t *"), ffi.new("uint64_t *")
    if lib.rc_system_time_get(domid, offset, now) < 0:
        if ffi.errno in _UNKNOWN_DOMCTL:
            return None
        raise _fail(ffi, "XEN_DOMCTL_get_system_time_offset", domid, "could not read the system time offset")
    return SystemTime(int(offset[0]), int(now[0]))


def set_system_time_offset(domid: int, offset_ns: int) -> None:
    """Have Xen add so much to its system time for a domain, which should be paused: its clock steps.

    :raise XenError: errno ERANGE if the domain's time would be negative, or the offset is beyond Xen's time.
    """
    lib, ffi = compiled_for_xen()
    # It may be made of what a peer said, and not fit the call.
    if not -(1 << 63) <= offset_ns < 1 << 63:
        ffi.errno = errno.ERANGE
        raise _fail(ffi, "XEN_DOMCTL_set_system_time_offset", domid, "could not set the system time offset")
    if lib.rc_system_time_set(domid, offset_ns) < 0:
        raise _fail(ffi, "XEN_DOMCTL_set_system_time_offset", domid, "could not set the system time offset")


class Guest:
    """One domain, its memory mapped for as long as the object is open.

    :param domid: the domain.
    :param writable: map its memory for writing too (the SVM).
    :raise XenError: if the domain does not exist or Xen refuses.
    """

    def __init__(self, domid: int, *, writable: bool) -> None:
        self._lib, self._ffi = compiled_for_xen()
        self._xc = bindings.lowlevel("xc").xc()
        self._xc_error: type[Exception] = bindings.lowlevel("xc").Error
        self.domid = domid
        self._handle = self._lib.rc_guest_open(domid, int(writable))
        if self._handle == self._ffi.NULL:
            raise _fail(self._ffi, "xc_interface_open", domid, "could not open Xen's interfaces")
        self.mapped_pages = 0

    def close(self) -> None:
        if self._handle != self._ffi.NULL:
            self._lib.rc_guest_close(self._handle)
            self._handle = self._ffi.NULL

    @property
    def _guest(self) -> Any:
        """The handle, for calls of the compiled module: those would read from address 0 after :meth:`close`.

        :raise XenError: it is closed.
        """
        if self._handle == self._ffi.NULL:
            raise XenError(
                f"domain {self.domid} is not open here any more: open it again",
                operation="rc_guest_open",
                domid=self.domid,
                errno=errno.EBADF,
            )
        return self._handle

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, rc: int, operation: str, what: str) -> int:
        if rc < 0:
            raise _fail(self._ffi, operation, self.domid, what)
        return int(rc)

    def _binding(self, what: str, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the distribution's bindings, their errors translated."""
        try:
            return getattr(self._xc, name)(*args, **kwargs)
        except self._xc_error as error:
            number = error.args[0] if error.args and isinstance(error.args[0], int) else 0
            raise XenError(
                f"{what} for domain {self.domid}: {name} failed: {error}",
                operation=name,
                domid=self.domid,
                errno=number,
            ) from error

    # -- state ---------------------------------------------------------------------------------------

    def info(self) -> DomainInfo:
        """:raise XenError: errno ESRCH if the domain is gone."""
        raw = self._ffi.new("struct rc_domain_info *")
        self._check(
            self._lib.rc_guest_info(self._guest, raw), "xc_domain_getinfolist", "could not look it up"
        )
        return DomainInfo(
            domid=self.domid,
            tot_pages=raw.tot_pages,
            shared_info_gfn=raw.shared_info_gfn,
            vcpus=raw.max_vcpu_id + 1,
            hvm=bool(raw.hvm),
            hap=bool(raw.hap),
            dying=bool(raw.dying),
            shutdown=bool(raw.shutdown),
            shutdown_reason=raw.shutdown_reason,
            paused=bool(raw.paused),
            blocked=bool(raw.blocked),
        )

    def pause(self) -> None:
        """Stop the vCPUs; pauses nest, each needs its unpause."""
        self._binding("could not pause", "domain_pause", self.domid)

    def unpause(self) -> None:
        self._binding("could not unpause", "domain_unpause", self.domid)

    def resume(self, *, cancelled: bool) -> None:
        """Resume from a suspend: ``cancelled`` makes the suspend hypercall return 1 (devices stay), else 0."""
        self._binding("could not resume", "domain_resume", self.domid, int(cancelled))

    def shutdown(self, reason: ShutdownReason) -> None:
        """Put the domain into shutdown from outside, as if it had made the hypercall."""
        self._binding("could not shut down", "domain_shutdown", self.domid, int(reason))

    def soft_reset(self) -> None:
        """Clear event channels and what the guest registered by address. It must be shut down; it is
        resumed by Xen at the end, so it should be paused too."""
        self._check(self._lib.rc_soft_reset(self._guest), "xc_domain_soft_reset", "could not soft-reset")

    def hvm_param(self, param: int) -> int:
        return int(self._binding("could not read an HVM parameter", "hvm_get_param", self.domid, param))

    def set_hvm_param(self, param: int, value: int) -> None:
        self._binding("could not set an HVM parameter", "hvm_set_param", self.domid, param, value)

    def alloc_unbound(self, remote_domid: int = 0) -> int:
        """Allocate the domain's lowest free event channel port for ``remote_domid`` to bind to."""
        return int(
            self._binding(
                "could not allocate an event channel", "evtchn_alloc_unbound", self.domid, remote_domid
            )
        )

    def event_channels(self, limit: int = 4096) -> list[EventChannel]:
        """All open ports below ``limit``; reading ends after 64 closed ones in a row."""
        raw = self._ffi.new("struct rc_evtchn_status *")
        found: list[EventChannel] = []
        closed = 0
        for port in range(limit):
            if self._lib.rc_evtchn_status(self._guest, port, raw) < 0 or raw.status == EvtchnKind.CLOSED:
                closed += 1
                if closed == 64:
                    break
                continue
            closed = 0
            found.append(EventChannel(port, EvtchnKind(raw.status), raw.vcpu, raw.detail))
        return found

    def inject_vector(self, apic_id: int, vector: int) -> None:
        """Assert an interrupt vector at one local APIC; wakes a vCPU that is halted."""
        self._check(
            self._lib.rc_inject_vector(self._guest, apic_id, vector),
            "xendevicemodel_inject_msi",
            "could not kick",
        )

    # -- memory --------------------------------------------------------------------------------------

    def map_memory(self) -> int:
        """(Re)map all memory that is there now. Returns the number of pages."""
        self.mapped_pages = self._check(
            self._lib.rc_guest_map(self._guest), "xenforeignmemory_map", "could not map its memory"
        )
        return self.mapped_pages

    def remap(self, gfn: int) -> None:
        """The page behind ``gfn`` is another one now: map it again."""
        self._check(
            self._lib.rc_guest_remap(self._guest, gfn),
            "xenforeignmemory_map",
            f"could not remap gfn {gfn:#x}",
        )

    @property
    def nr_gfns(self) -> int:
        """Size of the mapped gfn space, a multiple of 512; bitmaps have ``nr_gfns // 8`` bytes."""
        return int(self._lib.rc_guest_nr_gfns(self._guest))

    def page(self, gfn: int) -> memoryview:
        """The page itself (4096 bytes, live), valid until the next remap or close."""
        pointer = self._lib.rc_guest_page(self._guest, gfn)
        if pointer == self._ffi.NULL:
            raise XenError(
                f"gfn {gfn:#x} of domain {self.domid} is not mapped", operation="page", domid=self.domid
            )
        return memoryview(self._ffi.buffer(pointer, PAGE_SIZE))

    def present(self) -> bytearray:
        """Bitmap of the gfns that map (bit ``n % 8`` of byte ``n // 8``)."""
        bitmap = bytearray(self.nr_gfns // 8)
        self._lib.rc_guest_present(self._guest, self._ffi.from_buffer("uint8_t[]", bitmap))
        return bitmap

    def collect(
        self, bitmap: bytes | bytearray, gfns: bytearray, pages: bytearray | memoryview | mmap.mmap
    ) -> int:
        """Copy the pages set in ``bitmap`` into ``pages`` and their numbers (u64, host order) into ``gfns``.

        :return: the number of pages.
        :raise XenError: errno ENOSPC if the buffers are too small.
        """
        capacity = min(len(gfns) // 8, len(pages) // PAGE_SIZE)
        return self._check(
            self._lib.rc_guest_collect(
                self._guest,
                self._ffi.from_buffer("uint8_t[]", bitmap),
                self._ffi.cast("uint64_t *", self._ffi.from_buffer(gfns)),
                self._ffi.cast("uint8_t *", self._ffi.from_buffer(pages)),
                capacity,
            ),
            "collect",
            "could not copy its pages",
        )

    def apply(self, gfns: bytes | memoryview, pages: bytes | memoryview | None) -> tuple[int, int]:
        """Write pages (``None``: pages of zeros) at ``gfns`` (u64 each, host order).

        :return: ``(how many gfns do not map here and were passed over, the last of them)``.
        """
        count = len(gfns) // 8
        if pages is not None and len(pages) != count * PAGE_SIZE:
            raise ValueError(f"{count} gfns with {len(pages)} bytes of pages")
        last = self._ffi.new("uint64_t *")
        absent = self._lib.rc_guest_apply(
            self._guest,
            self._ffi.cast("const uint64_t *", self._ffi.from_buffer(gfns)),
            self._ffi.NULL
            if pages is None
            else self._ffi.cast("const uint8_t *", self._ffi.from_buffer(pages)),
            count,
            last,
        )
        return int(absent), int(last[0])

    def hashes(self) -> bytearray:
        """A u64 a gfn, 0 where nothing maps: for comparing memory, not for security."""
        out = bytearray(self.nr_gfns * 8)
        self._lib.rc_guest_hash(self._guest, self._ffi.cast("uint64_t *", self._ffi.from_buffer(out)))
        return out

    # -- dirty log -----------------------------------------------------------------------------------

    def enable_dirty_log(self) -> None:
        self._check(
            self._lib.rc_logdirty_enable(self._guest), "xc_shadow_control", "could not start the dirty log"
        )

    def disable_dirty_log(self) -> None:
        self._check(
            self._lib.rc_logdirty_disable(self._guest), "xc_shadow_control", "could not stop the dirty log"
        )

    def take_dirty(self, bitmap: bytearray) -> int:
        """OR what was dirtied since the last call into ``bitmap`` and start anew. Returns Xen's count."""
        if len(bitmap) != self.nr_gfns // 8:
            raise ValueError(f"bitmap of {len(bitmap)} bytes for {self.nr_gfns} gfns")
        return self._check(
            self._lib.rc_logdirty_clean(
                self._guest, self._ffi.from_buffer("uint8_t[]", bitmap), self.nr_gfns
            ),
            "xc_logdirty_control",
            "could not read the dirty log",
        )

    # -- grants and vCPU state -----------------------------------------------------------------------

    def grant_version(self) -> int:
        return self._check(
            self._lib.rc_grants_version(self._guest), "gnttab_get_version", "could not ask for it"
        )

    def map_grants(self) -> int:
        """Map the grant table's frames (again, if it may have grown). Returns their number."""
        return self._check(
            self._lib.rc_grants_map(self._guest),
            "xenforeignmemory_map_resource",
            "could not map its grant table",
        )

    def grants(self, nr_frames: int) -> bytes:
        """The mapped grant table: v1 entries of 8 bytes."""
        out = bytearray(nr_frames * PAGE_SIZE)
        size = self._check(
            self._lib.rc_grants_read(self._guest, self._ffi.from_buffer("uint8_t[]", out), len(out)),
            "grants",
            "could not read its grant table",
        )
        return bytes(out[:size])

    def mark_writable_grants(self, bitmap: bytearray, *, granted: bool = False) -> int:
        """Set the gfns that backends have mapped for writing (their writes are in no dirty log).

        :param granted: also those that a backend may write to by grant copies (which are in the log).
        """
        return int(
            self._lib.rc_grants_mark_writable(
                self._guest, self._ffi.from_buffer("uint8_t[]", bitmap), granted
            )
        )

    def set_grants(self, entries: bytes) -> int:
        """Load v1 entries from reference 8 up, their in-use flags cleared.

        :return: how many replaced entries were still in use by a backend (0 if all had let go).
        """
        return self._check(
            self._lib.rc_grants_write(
                self._guest, self._ffi.from_buffer("uint8_t[]", entries), len(entries), FIRST_DYNAMIC_GRANT
            ),
            "set_grants",
            "could not load its grant table",
        )

    def hvm_context(self) -> bytes:
        """``xc_domain_hvm_getcontext``: vCPUs, local APICs and the rest that Xen emulates."""
        size = self._check(
            self._lib.rc_hvm_context_get(self._guest, self._ffi.NULL, 0),
            "xc_domain_hvm_getcontext",
            "could not size it",
        )
        out = bytearray(size)
        size = self._check(
            self._lib.rc_hvm_context_get(self._guest, self._ffi.from_buffer("uint8_t[]", out), size),
            "xc_domain_hvm_getcontext",
            "could not read the vCPU state",
        )
        return bytes(out[:size])

    def set_hvm_context(self, context: bytes) -> None:
        self._check(
            self._lib.rc_hvm_context_set(
                self._guest, self._ffi.from_buffer("uint8_t[]", context), len(context)
            ),
            "xc_domain_hvm_setcontext",
            "could not load the vCPU state",
        )
