# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest's network output, held until the checkpoint that produced it is safe.

::

    bridge <--- vif <--- (filter at vif's input: redirect) <--- guest
                 ^                  |
                 |                  v
                 +---- ifb: plug as root queueing discipline
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from remus_colo.adapters import ifb, kmod
from remus_colo.adapters.netlink import Links, Plug, PlugStats
from remus_colo.adapters.rawlink import CopyingTap
from remus_colo.devices.device import NETWORK_ORDER, CheckpointedDevice, DeviceSet
from remus_colo.errors import NetworkError, RemusError

log = logging.getLogger(__name__)

# Output of one interval, at 10 Gbit/s and 200 ms; beyond it frames are dropped, as by any full queue.
LIMIT_BYTES = 256 << 20
DRAIN_TIMEOUT_S = 2.0
MODULES = (
    ("ifb", "holding the guest's output"),
    ("sch_plug", "holding the guest's output"),
    ("act_mirred", "holding the guest's output"),
)


def load_modules() -> None:
    """:raise HostError: the kernel has no means to hold output."""
    for module, purpose in MODULES:
        kmod.load(module, purpose)


def buffer_ifname(tag: str, handle: int | str = "") -> str:
    """Of the ifb device of a vif.

    :param tag: 6 hexadecimal digits.
    :param handle: of the vif; without one, how the names of all begin.
    """
    return f"rci{tag}.{handle}"


class BufferedVif(CheckpointedDevice):
    """One vif's output.

    :param ifname: of the vif.
    :param buffer_name: of the ifb device; it is made by ``setup``, unless it is there, and then stays at the end.
    """

    ORDER = NETWORK_ORDER

    def __init__(self, ifname: str, buffer_name: str, limit_bytes: int = LIMIT_BYTES) -> None:
        self.ifname = ifname
        self.buffer_name = buffer_name
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._links: Links | None = None
        self._plug: Plug | None = None
        self._tap: CopyingTap | None = None
        self._created = False
        self._buffering = False

    def setup(self) -> None:
        """From here on output takes the detour, and passes."""
        self._links = Links()
        try:
            if not self._links.exists(self.buffer_name):
                ifb.create(self._links, self.buffer_name)
                self._created = True
            else:
                self._links.set_up(self.buffer_name)
            self._plug = Plug(self._links, self.buffer_name, self._limit_bytes)
            self._plug.install()
            # Held frames must not keep the guest's requests open: its ring has only 256.
            self._tap = CopyingTap(self.ifname)
            ifb.redirect_input(self._links, self.ifname, self.buffer_name)
        except BaseException:
            self.teardown()
            raise

    def postsuspend(self) -> None:
        with self._lock:
            if self._plug is not None:
                self._plug.buffer()
                self._buffering = True

    def commit(self) -> None:
        with self._lock:
            if self._plug is not None and self._buffering:
                self._plug.release_one()

    def release_all(self) -> None:
        with self._lock:
            if self._plug is not None:
                self._plug.release()
                self._buffering = False

    def stats(self) -> PlugStats | None:
        """None if it cannot be told."""
        with self._lock:
            try:
                return self._plug.stats() if self._plug is not None else None
            except RemusError:
                return None

    def teardown(self, *, drop_held: bool = False) -> None:
        with self._lock:
            links, self._links = self._links, None
            plug, self._plug = self._plug, None
            if links is None:
                return
            steps: list[Callable[[], object]] = []
            if plug is not None and not drop_held:
                steps.append(plug.release)
                steps.append(lambda: _drain(plug))
            # A vif whose frames go nowhere keeps the guest silent until it is gone.
            if not drop_held:
                steps.append(lambda: ifb.stop_redirecting(links, self.ifname))
            if self._created:
                steps.append(lambda: links.delete_link(self.buffer_name))
            elif plug is not None:
                steps.append(plug.remove)
                steps.append(lambda: links.set_down(self.buffer_name))
            if drop_held:
                steps.append(lambda: ifb.stop_redirecting(links, self.ifname))
            for step in steps:
                try:
                    step()
                except RemusError as error:
                    log.warning("while taking down the buffer of %s: %s", self.ifname, error)
            if self._tap is not None:
                self._tap.close()
                self._tap = None
            self._created = False
            links.close()


def held_and_sent(devices: DeviceSet) -> tuple[int, int]:
    """How many frames of the guest's wait now, and how many have been let go."""
    buffers = [device for device in devices.devices if isinstance(device, BufferedVif)]
    found = [stats for buffer in buffers if (stats := buffer.stats()) is not None]
    return sum(stats.backlog_packets for stats in found), sum(stats.sent_packets for stats in found)


def _drain(plug: Plug) -> None:
    """So that no frame that takes the direct way overtakes one that was held."""
    deadline_s = time.monotonic() + DRAIN_TIMEOUT_S
    try:
        while plug.stats().backlog_packets and time.monotonic() < deadline_s:
            time.sleep(0.001)  # no event tells when a queue has drained
    except NetworkError as error:
        log.debug("%s", error)
