# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the engine must know of a guest, and what it refuses, with words that say why and what to do."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from remus_colo.adapters import backend
from remus_colo.adapters.backend import Vif
from remus_colo.adapters.xenctrl import (
    HVM_PARAM_CONSOLE_PFN,
    HVM_PARAM_STORE_PFN,
    DomainInfo,
    Guest,
    ShutdownReason,
)
from remus_colo.adapters.xenstore import Store
from remus_colo.checkpoint.birth import SECONDARY_SUFFIX
from remus_colo.checkpoint.receiver import INCOMING_SUFFIX
from remus_colo.errors import ConfigError, DomainError
from remus_colo.options import check_word

# Devices without a backend that matters: consoles end in xenconsoled, vkbd and vfb of a guest without a
# display are never connected.
IGNORED_DEVICES = frozenset({"vif", "console", "suspend"})


class Mode(enum.StrEnum):
    """How the VMs are stopped and resumed for a checkpoint."""

    TRANSPARENT = "transparent"
    COOPERATIVE = "cooperative"


@dataclass(frozen=True, slots=True)
class GuestLayout:
    """What stays the same over the guest's life."""

    domid: int
    store_gfn: int
    console_gfn: int
    vifs: tuple[Vif, ...]

    @classmethod
    def read(cls, guest: Guest, store: Store) -> GuestLayout:
        return cls(
            domid=guest.domid,
            store_gfn=guest.hvm_param(HVM_PARAM_STORE_PFN),
            console_gfn=guest.hvm_param(HVM_PARAM_CONSOLE_PFN),
            vifs=tuple(backend.vifs(store, guest.domid)),
        )

    @property
    def private_gfns(self) -> tuple[int, int]:
        """Pages shared with this host's own xenstored and xenconsoled: they never travel."""
        return self.store_gfn, self.console_gfn


def refuse_name(name: str, domid: int) -> None:
    """:raise DomainError: the domain cannot be protected under its name, which is that of a copy, or one that the backup refuses."""
    try:
        check_word("the domain", name)
    except ConfigError as error:
        raise DomainError(
            f"domain {domid} has the name {name!r}, with a blank, an invisible sign or a dash where none may be: "
            f"rename it first (xl rename {domid} NAME)"
        ) from error
    refuse_copy(name)


def refuse_copy(name: str) -> None:
    """:raise DomainError: the domain is what remusd makes of a guest that is protected by another host."""
    for suffix in (SECONDARY_SUFFIX, INCOMING_SUFFIX):
        if name.endswith(suffix):
            raise DomainError(
                f"{name} is the copy of a guest that another remus protects: protect the guest itself; if it has become the guest, "
                f"rename it first (xl rename {name} {name.removesuffix(suffix)})"
            )


def refuse_config(name: str, config: dict[str, Any]) -> None:
    """Refuse a domain whose kind or devices cannot be protected.

    :param config: libxl's JSON configuration.
    :raise DomainError: with the reason.
    """
    kind = domain_kind(config)
    if kind == "pv":
        raise DomainError(
            f'{name} is a PV guest, and COLO needs hardware virtualization: change it to type="pvh" '
            "(any Linux since 4.11 boots so), or protect it without --colo"
        )
    if kind == "hvm":
        raise DomainError(
            f'{name} is an HVM guest, whose device model cannot run on both hosts at once: change it to type="pvh", '
            "or protect it without --colo"
        )
    for disk in config.get("disks", []):
        if disk.get("readwrite", 0):
            raise DomainError(
                f"{name} has a writable disk ({disk.get('vdev', '?')}), which would differ between the hosts: "
                "COLO does not replicate disks; detach it or make it read-only"
            )


def refuse_guest(name: str, info: DomainInfo, guest: Guest, store: Store) -> None:
    """Refuse a running domain that the engine cannot handle.

    :raise DomainError: with the reason.
    """
    refuse_stopped(name, info)
    if not info.hvm:
        raise DomainError(
            f'{name} is a PV guest, and COLO needs hardware virtualization: change it to type="pvh"'
        )
    if not info.hap:
        raise DomainError(f"{name} runs on shadow page tables: start it with hap=1, the dirty log needs it")
    if info.vcpus != 1:
        raise DomainError(
            f"{name} has {info.vcpus} vCPUs: their interleaving differs between the hosts and every reply would diverge; "
            "give it vcpus=1"
        )
    version = guest.grant_version()
    if version != 1:
        raise DomainError(
            f"{name} uses grant table version {version}: add max_grant_version=1 to its configuration and restart it"
        )
    for kind in store.list(f"/local/domain/{info.domid}/device"):
        if kind not in IGNORED_DEVICES and store.list(f"/local/domain/{info.domid}/device/{kind}"):
            raise DomainError(f"{name} has a {kind} device, which cannot be checkpointed: detach it first")


def refuse_stopped(name: str, info: DomainInfo) -> None:
    """:raise DomainError: the domain does not run."""
    if info.shutdown and info.shutdown_reason == ShutdownReason.SUSPEND and not info.dying:
        raise DomainError(
            f"{name} is suspended: if a remus and its guard were killed in a checkpoint, and it does not run on the backup host, "
            f"resume it (python3 -m remus_colo.recover {name})"
        )
    if info.dying or info.shutdown:
        raise DomainError(f"{name} is not running (it is shutting down or crashed): start it first")
    if info.paused:
        raise DomainError(f"{name} is paused: unpause it first (xl unpause {name})")


def refuse_for_remus(name: str, config: dict[str, Any]) -> None:
    """:raise DomainError: the domain is one that Remus without COLO does not take either."""
    if config.get("pcidevs"):
        raise DomainError(
            f"{name} has a PCI device of this host, whose state nobody can copy: detach it first (xl pci-detach)"
        )
    if config.get("usbdevs"):
        raise DomainError(
            f"{name} has a USB device of this host, whose state nobody can copy: detach it first (xl usbdev-detach)"
        )
    if domain_kind(config) != "hvm":
        return
    info = config.get("b_info", {})
    if info.get("device_model_version") == "qemu_xen_traditional":
        raise DomainError(
            f'{name} has the device model qemu-xen-traditional, which cannot be saved: give it device_model_version="qemu-xen"'
        )
    if _is_set(info.get("device_model_stubdomain")):
        raise DomainError(
            f"{name} has its device model in a domain of its own, which cannot be saved: give it device_model_stubdomain_override=0"
        )
    if _is_set(info.get("nested_hvm")) or _is_set(info.get("type.hvm", {}).get("nested_hvm")):
        raise DomainError(
            f"{name} may run virtual machines itself, whose state Xen does not copy: give it nestedhvm=0"
        )


def refuse_device_model(name: str, config: dict[str, Any]) -> None:
    """For streams that libxenguest's alone are.

    :raise DomainError: the domain has a device model, whose state would be missing there.
    """
    if domain_kind(config) == "hvm":
        raise DomainError(
            f'{name} is an HVM guest with a device model, whose state is not saved here: change it to type="pvh", '
            "or protect it by the command remus"
        )


def _is_set(value: object) -> bool:
    """Of a yes or no of libxl's, which may be "<default>"."""
    return value is True or value == "True"


def domain_kind(config: dict[str, Any]) -> str | None:
    """``pv``, ``pvh`` or ``hvm``, of libxl's JSON configuration."""
    kind = config.get("b_info", {}).get("type") or config.get("c_info", {}).get("type")
    return None if kind is None else str(kind)
