# SPDX-License-Identifier: LGPL-2.1-or-later
"""The contract between the checkpoint loop and what it takes along: Remus's ``CheckpointedDevice``, and its order."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from remus_colo.errors import RemusError

log = logging.getLogger(__name__)


class CheckpointedDevice:
    """A device of the protected guest. All hooks may raise a RemusError, which ends protection, but teardown.

    ``postsuspend`` and ``preresume`` are called in the thread of the checkpoints, with the guest standing
    still, so they must not block; ``commit`` and ``release_all`` may come from another thread, but never two
    of these at once.
    """

    # The output of a guest must not be seen before what it has written is safe, so disks commit first.
    ORDER = 0

    def setup(self) -> None:
        """Before the first checkpoint; what fails here keeps protection from starting."""

    def postsuspend(self) -> None:
        """The guest has suspended: what it has done until now belongs to the checkpoint that begins."""

    def preresume(self) -> None:
        """The guest is about to be resumed."""

    def commit(self) -> None:
        """The backup has the checkpoint: what belongs to it may be seen."""

    def release_all(self) -> None:
        """Protection has ended and the guest goes on: nothing is held any more."""

    def teardown(self, *, drop_held: bool = False) -> None:
        """The end; also after a setup that failed, and twice. Never raises.

        :param drop_held: the guest goes on elsewhere, so what is held must not be seen.
        """


DISK_ORDER = 0
NETWORK_ORDER = 1


class DeviceSet:
    """All devices of a guest, in the order in which they commit."""

    def __init__(self, devices: Iterable[CheckpointedDevice]) -> None:
        self.devices: Sequence[CheckpointedDevice] = sorted(devices, key=lambda device: device.ORDER)

    def setup(self) -> None:
        """:raise RemusError: one cannot be set up; those before it have been taken down again."""
        try:
            for device in self.devices:
                device.setup()
        except BaseException:
            self.teardown()
            raise

    def postsuspend(self) -> None:
        for device in self.devices:
            device.postsuspend()

    def preresume(self) -> None:
        for device in self.devices:
            device.preresume()

    def commit(self) -> None:
        for device in self.devices:
            device.commit()

    def release_all(self) -> None:
        """Each one, whatever becomes of the others."""
        for device in self.devices:
            try:
                device.release_all()
            except RemusError as error:
                log.warning("%s", error)

    def teardown(self, *, drop_held: bool = False) -> None:
        for device in reversed(self.devices):
            device.teardown(drop_held=drop_held)
