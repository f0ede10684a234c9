# SPDX-License-Identifier: LGPL-2.1-or-later
"""Linux's Xen backends in dom0: unbind from and bind to a frontend, and the xenstore nodes of both ends.

Backends since Linux 5.5 attach to the ring indices that they find in the shared ring, so that one may
be unbound from a frontend that is connected and bound again, without the guest's knowledge.
"""

from __future__ import annotations

import enum
import os
import re
import subprocess
from dataclasses import dataclass

from remus_colo.adapters.xenstore import Store
from remus_colo.errors import DomainError, HostError, XenError


class XenbusState(enum.IntEnum):
    """``enum xenbus_state`` of public/io/xenbus.h."""

    UNKNOWN = 0
    INITIALISING = 1
    INIT_WAIT = 2
    INITIALISED = 3
    CONNECTED = 4
    CLOSING = 5
    CLOSED = 6


# Frontend nodes that tell a network backend where the rings are (public/io/netif.h).
RING_NODES = (
    "tx-ring-ref",
    "rx-ring-ref",
    "event-channel",
    "event-channel-tx",
    "event-channel-rx",
)
DRIVER = "/sys/bus/xen-backend/drivers/vif"


@dataclass(frozen=True, slots=True)
class Vif:
    """One network interface of a domain, with its backend in this domain 0."""

    domid: int
    handle: int

    @property
    def ifname(self) -> str:
        return f"vif{self.domid}.{self.handle}"

    @property
    def emulated_ifname(self) -> str:
        """Of the tap of the network card that a device model emulates beside it (TAP_DEVICE_SUFFIX of libxl)."""
        return f"{self.ifname}-emu"

    @property
    def ifnames(self) -> list[str]:
        """Of all interfaces through which the guest's frames come and that are there."""
        names = (self.ifname, self.emulated_ifname)
        return [name for name in names if os.path.exists(f"/sys/class/net/{name}")]

    @property
    def device(self) -> str:
        """Name on the xen-backend bus."""
        return f"vif-{self.domid}-{self.handle}"

    @property
    def frontend(self) -> str:
        return f"/local/domain/{self.domid}/device/vif/{self.handle}"

    @property
    def backend(self) -> str:
        return f"/local/domain/0/backend/vif/{self.domid}/{self.handle}"


def vifs(store: Store, domid: int) -> list[Vif]:
    """The domain's vifs in the order of their handles.

    :raise DomainError: if one has its backend in another domain or several queues.
    """
    found = []
    for name in store.list(f"/local/domain/{domid}/device/vif"):
        vif = Vif(domid, int(name))
        backend_id = store.read(f"{vif.frontend}/backend-id")
        if backend_id != "0":
            raise DomainError(
                f"{vif.ifname} has its backend in domain {backend_id}: only backends in domain 0 can be protected"
            )
        found.append(vif)
    return sorted(found, key=lambda vif: vif.handle)


def interfaces(domid: int) -> set[str]:
    """Names of all network interfaces in this domain 0 that a domain's frames come through, the taps of a device model among them."""
    return {name for name in os.listdir("/sys/class/net") if name.startswith(f"vif{domid}.")}


def frontend_state(store: Store, vif: Vif) -> XenbusState:
    return XenbusState(int(store.read(f"{vif.frontend}/state") or 0))


def backend_state(store: Store, vif: Vif) -> XenbusState:
    return XenbusState(int(store.read(f"{vif.backend}/state") or 0))


def queue_count(store: Store, vif: Vif) -> int:
    return int(store.read(f"{vif.frontend}/multi-queue-num-queues") or 1)


def ring_nodes(store: Store, vif: Vif) -> dict[str, str]:
    """The frontend's ring nodes; with several queues each has them in ``queue-N``."""
    count = queue_count(store, vif)
    prefixes = [""] if count == 1 else [f"queue-{n}/" for n in range(count)]
    nodes = {}
    for prefix in prefixes:
        for name in RING_NODES:
            value = store.read(f"{vif.frontend}/{prefix}{name}")
            if value is not None:
                nodes[prefix + name] = value
    return nodes


def set_ring_nodes(store: Store, vif: Vif, nodes: dict[str, str]) -> None:
    for name, value in nodes.items():
        store.write(f"{vif.frontend}/{name}", value)


def is_bound(vif: Vif) -> bool:
    return os.path.exists(f"{DRIVER}/{vif.device}")


def _sysfs(action: str, vif: Vif) -> None:
    path = f"{DRIVER}/{action}"
    try:
        fd = os.open(path, os.O_WRONLY)
        try:
            os.write(fd, vif.device.encode())
        finally:
            os.close(fd)
    except FileNotFoundError as error:
        raise HostError(f"{path} is missing: load the xen-netback module") from error
    except OSError as error:
        raise XenError(
            f"could not {action} the backend of {vif.ifname}: {error.strerror}",
            operation=action,
            domid=vif.domid,
            errno=error.errno or 0,
        ) from error


def unbind(vif: Vif) -> None:
    """Take the backend away from the frontend; its network interface goes. Nothing if there is none."""
    if is_bound(vif):
        _sysfs("unbind", vif)


def bind(vif: Vif) -> None:
    """Let the backend driver find the device again; its network interface is made anew."""
    if not is_bound(vif):
        _sysfs("bind", vif)


_DEBUGFS = "/sys/kernel/debug"
_IO_RING = _DEBUGFS + "/xen-netback/{ifname}/io_ring_q0"
_RX_CONSUMER = re.compile(r"RX:.*?cons \d+ \((-?\d+)\)", re.DOTALL)
_RX_QUEUED = re.compile(r"Rx internal queue: .*?pkts (\d+)")


def mount_debugfs() -> None:
    """Have debugfs where it belongs, for :func:`input_idle`.

    :raise HostError: this kernel or its lockdown does not allow it.
    """
    if os.path.isdir(f"{_DEBUGFS}/xen-netback"):
        return
    done = subprocess.run(
        ("mount", "-t", "debugfs", "debugfs", _DEBUGFS),
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    if not os.path.isdir(f"{_DEBUGFS}/xen-netback"):
        reason = done.stderr.strip() or "netback has no folder there"
        raise HostError(
            f"cannot see the state of the network backends in {_DEBUGFS} ({reason}): mount debugfs there "
            "and use a kernel that is not locked down to confidentiality"
        )


def input_idle(vif: Vif) -> bool:
    """Whether the backend has handed over all that it has taken for the guest.

    Linux's netback tells in debugfs (``xenvif_read_io_ring`` in its xenbus.c) how many packets it has queued, and how
    many requests it has consumed but not answered.

    :raise XenError: it does not tell.
    """
    path = _IO_RING.format(ifname=vif.ifname)
    try:
        with open(path, encoding="ascii") as ring:
            text = ring.read()
    except OSError as error:
        raise XenError(
            f"cannot read {path}: {error.strerror}", operation="debugfs", domid=vif.domid
        ) from error
    consumed, queued = _RX_CONSUMER.search(text), _RX_QUEUED.search(text)
    if consumed is None or queued is None:
        raise XenError(f"{path} is not what was expected", operation="debugfs", domid=vif.domid)
    return consumed[1] == "0" and queued[1] == "0"
