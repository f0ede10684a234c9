# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks under Remus: those that DRBD replicates in epochs go along, what nothing replicates so is refused.

A guest that starts on the backup from a checkpoint must find its disk as it was at that checkpoint.  Remus's
DRBD 8.3 has a protocol D for it: the peer buffers writes, in epochs that an ioctl ends at each checkpoint,
and drops an epoch that was not ended.  The other protocols write through: after a failover the disk is
*newer* than the guest's memory, which no journal expects, and which destroys file systems.  So they are
refused, as anything else is that the guest can write to, unless the user takes the responsibility
(``--no-disk``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from remus_colo.adapters import drbd
from remus_colo.devices.device import DISK_ORDER, CheckpointedDevice
from remus_colo.errors import DomainError

log = logging.getLogger(__name__)

DRBD_SCRIPT = "block-drbd"  # that xl runs for a disk "drbd:RESOURCE"
DRBD_PREFIX = "drbd:"


class DrbdDisk(CheckpointedDevice):
    """A disk on a DRBD resource in protocol D.

    :param resource: DRBD's name of it.
    """

    ORDER = DISK_ORDER

    def __init__(self, resource: str) -> None:
        self.resource = resource
        self._device: drbd.CheckpointedDrbd | None = None
        self._waiting = False

    @property
    def device(self) -> drbd.CheckpointedDrbd | None:
        """What is open, between setup and teardown."""
        return self._device

    @property
    def waiting(self) -> bool:
        """Whether an acknowledgement is to be waited for before the guest is resumed."""
        return self._waiting

    def setup(self) -> None:
        """:raise DomainError: it is not replicated in epochs, or not at the moment."""
        path = drbd.device_of(self.resource)
        protocol = drbd.protocol_of(path)
        if protocol != "D":
            raise DomainError(
                f"the DRBD resource {self.resource} uses protocol {protocol or '?'}, which writes to the backup's disk what its "
                "checkpoint does not have yet: Remus needs protocol D, of the DRBD made for it; or use --no-disk"
            )
        state = drbd.connection_of(self.resource)
        if state != "Connected":
            raise DomainError(f"the DRBD resource {self.resource} is {state}: see to it that it is Connected")
        self._device = drbd.CheckpointedDrbd(path)

    def postsuspend(self) -> None:
        if self._device is not None and not self._waiting:
            self._waiting = self._device.send_checkpoint()

    def preresume(self) -> None:
        if self._device is not None and self._waiting:
            self._device.wait_for_acknowledgement()
            self._waiting = False

    def teardown(self, *, drop_held: bool = False) -> None:
        if self._device is not None:
            self._device.close()
            self._device = None


def drbd_resource(disk: dict[str, Any]) -> str | None:
    """The DRBD resource of a disk in libxl's JSON configuration, None if it is on none."""
    path = str(disk.get("pdev_path", ""))
    if path.startswith(DRBD_PREFIX):
        return path.removeprefix(DRBD_PREFIX)
    if str(disk.get("script", "")).rpartition("/")[2] == DRBD_SCRIPT:
        return path
    return None


def replicated_disks(
    name: str, disks: Iterable[dict[str, Any]], *, blackhole: bool = False, no_disk: bool = False
) -> list[CheckpointedDevice]:
    """The disks that go along with the domain's checkpoints; those that it cannot write to need nothing.

    :param disks: of libxl's JSON configuration.
    :param blackhole: there is no backup, so no disk of one.
    :param no_disk: leave out what is not replicated, instead of refusing it.
    :raise DomainError: a disk is not replicated.
    """
    found: list[CheckpointedDevice] = []
    for disk in disks:
        if blackhole or not disk.get("readwrite", 0):
            continue
        resource = drbd_resource(disk)
        if resource is not None and not no_disk:
            found.append(DrbdDisk(resource))
        elif no_disk:
            log.warning(
                "the disk %s of %s is not replicated, as --no-disk has it", disk.get("vdev", "?"), name
            )
        else:
            raise DomainError(
                f"{name} has a writable disk ({disk.get('vdev', '?')}) that nothing replicates: put it on DRBD with protocol D, "
                "make it read-only, or use --no-disk if the guest may lose what is on it"
            )
    return found
