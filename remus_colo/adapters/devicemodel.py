# SPDX-License-Identifier: LGPL-2.1-or-later
"""An HVM guest's device model: QEMU in domain 0, by QMP at the socket that it has for libxl.

It is stopped and saved when the guest has suspended, and goes on before the guest is resumed, as libxl does it
(tools/libs/light/libxl_qmp.c and libxl_dom_save.c of Xen).
"""

from __future__ import annotations

import contextlib
import glob
import os
from pathlib import Path
from typing import Any, NamedTuple

from remus_colo.adapters.qmp import Qmp
from remus_colo.adapters.xenstore import Store
from remus_colo.errors import DomainError, HostError, XenError

SOCKET = "/var/run/xen/qmp-libxl-{domid}"
# QEMU serves one client at a time, and an xl may be at it; emulated hosts need seconds.
ANSWER_TIMEOUT_S = 20.0
PHYSMAP = "/local/domain/0/device-model/{domid}/physmap"
PHYSMAP_NODES = ("start_addr", "size", "name")


# Where distributions have it; libxl has one of them built in, and does not tell which.
PROGRAMS = (
    "/usr/libexec/xen-qemu-system-i386",  # Debian
    "/usr/lib/xen*/bin/qemu-system-i386",
    "/usr/lib/xen*/bin/qemu-system-x86_64",
    "/usr/libexec/xen*/bin/qemu-system-i386",
    "/usr/local/lib/xen*/bin/qemu-system-i386",
    "/usr/bin/qemu-system-i386",
    "/usr/bin/qemu-system-x86_64",
)


class DeviceState(NamedTuple):
    """:ivar emulator: as QEMU saves it.
    :ivar xenstore: what QEMU keeps in xenstore, as libxl's record has it; most keep nothing there.
    """

    emulator: bytes = b""
    xenstore: bytes = b""


class DeviceModel:
    """One guest's. Its methods may be called from different threads, one at a time."""

    def __init__(self, domid: int, store: Store) -> None:
        """:raise DomainError: there is none in this domain 0."""
        self._domid = domid
        self._store = store
        self._path = Path(SOCKET.format(domid=domid))
        self._qmp: Qmp | None = None
        self._fdset: int | None = (
            None  # into which it has saved, and which it keeps until it is told to forget it
        )
        if not self._path.exists():
            raise DomainError(
                f"domain {domid} is an HVM guest without a device model that listens at {self._path}: only QEMU "
                "in domain 0 can be saved, not one in a domain of its own (device_model_stubdomain_override=0)"
            )

    def prepare(self) -> None:
        """Connect, while the guest still runs."""
        if self._qmp is None:
            self._qmp = self._connect()

    def log_dirty(self, enable: bool) -> None:
        """Have it report the pages that it writes, or stop."""
        if self._qmp is not None:
            self._qmp.execute("xen-set-global-dirty-log", enable=enable)
            return
        with self._connect() as qmp:
            qmp.execute("xen-set-global-dirty-log", enable=enable)

    def stop(self) -> DeviceState:
        """Stop it, and save it; the guest is suspended.

        :raise XenError: it does not answer, or cannot be saved.
        """
        self.prepare()
        assert self._qmp is not None
        self._qmp.execute("stop")
        return DeviceState(self._save(self._qmp), _physmap(self._store, self._domid))

    def go_on(self) -> None:
        """Before the guest is resumed; nothing happens if it runs."""
        self.prepare()
        assert self._qmp is not None
        try:
            self._qmp.execute("cont")
            if self._fdset is not None:
                # Only now: older ones forget nothing while they stand still.
                self._qmp.execute_with("remove-fd", {"fdset-id": self._fdset})
                self._fdset = None
        finally:
            self.close()

    def close(self) -> None:
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None

    def _save(self, qmp: Qmp) -> bytes:
        """By a descriptor, as QEMU may run where it sees no files of this host."""
        saved = os.memfd_create("device-model", os.MFD_CLOEXEC)
        try:
            # QEMU wants it open for nothing but writing.
            target = os.open(f"/proc/self/fd/{saved}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                answer = qmp.execute_with("add-fd", {}, target)
            finally:
                os.close(target)
            try:
                self._fdset = int(answer["fdset-id"])
            except (KeyError, TypeError, ValueError) as cause:
                raise XenError(f"QEMU answered add-fd by {answer!r}", operation="add-fd") from cause
            # Not "live": its disks stay this host's.
            qmp.execute("xen-save-devices-state", filename=f"/dev/fdset/{self._fdset}", live=False)
            size = os.fstat(saved).st_size
            if not size:
                raise XenError("QEMU saved a state of no bytes", operation="xen-save-devices-state")
            return os.pread(saved, size, 0)
        finally:
            os.close(saved)

    def _connect(self) -> Qmp:
        return Qmp(self._path, ANSWER_TIMEOUT_S)


def refuse_without_program(config: dict[str, Any]) -> None:
    """On the backup, before anything is protected.

    :param config: libxl's JSON configuration of an HVM guest.
    :raise HostError: this host has no device model to start it with.
    """
    named = config.get("b_info", {}).get("device_model")
    programs = [named] if isinstance(named, str) else PROGRAMS
    if not any(glob.glob(program) for program in programs):
        raise HostError(
            f"this host has no device model for an HVM guest ({named or 'QEMU for Xen'}): install it (Debian: qemu-system-xen)"
        )


def let_run(domid: int) -> None:
    """After a ``remus`` that was killed: it is to run, if there is one.

    :raise XenError: it does not answer.
    """
    path = Path(SOCKET.format(domid=domid))
    if path.exists():
        with Qmp(path, ANSWER_TIMEOUT_S) as qmp:
            with contextlib.suppress(XenError):
                qmp.execute("xen-set-global-dirty-log", enable=False)
            qmp.execute("cont")


def _physmap(store: Store, domid: int) -> bytes:
    base = PHYSMAP.format(domid=domid)
    words = []
    for entry in store.list(base):
        for node in PHYSMAP_NODES:
            value = store.read(f"{base}/{entry}/{node}")
            if value is None:
                raise XenError(f"xenstore lacks {base}/{entry}/{node}", operation="read", domid=domid)
            words += [f"physmap/{entry}/{node}", value]
    return b"".join(word.encode() + b"\0" for word in words)
