# SPDX-License-Identifier: LGPL-2.1-or-later
"""Devices that go along with a domain's checkpoints.

A script makes them, and calls their hooks in its own: ``postsuspend`` after the guest has suspended,
``preresume`` before it is resumed, ``commit`` when the backup has the checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from xen.remus import blkdev, netlink, qdisc, util
from xen.remus.vif import VIF

from remus_colo.adapters import drbd, ifb, kmod
from remus_colo.adapters.netlink import Links, Plug
from remus_colo.adapters.rawlink import CopyingTap
from remus_colo.classic import protection
from remus_colo.devices.device import CheckpointedDevice
from remus_colo.devices.disk import DRBD_PREFIX, DrbdDisk
from remus_colo.devices.netbuffer import DRAIN_TIMEOUT_S, LIMIT_BYTES
from remus_colo.errors import NetworkError, RemusError
from remus_colo.proxy.primary_path import VifPath

__all__ = [
    "BufferedNIC",
    "BufferedNICException",
    "CheckpointedDevice",
    "ColoNIC",
    "IFBBuffer",
    "IMQBuffer",
    "Netbuf",
    "Netbufpool",
    "ReplicatedDisk",
    "ReplicatedDiskException",
    "getrth",
    "netbuftypes",
    "selectnetbuf",
]

log = logging.getLogger(__name__)

POOL_DIR = "/run/remus"
# Of the tap of the network card that a device model emulates beside a vif (TAP_DEVICE_SUFFIX of libxl).
EMULATED_SUFFIX = "-emu"


class ReplicatedDiskException(Exception):
    """A disk is not replicated, or cannot be."""


class BufferedNICException(Exception):
    """Output cannot be held."""


class _Refused(NetworkError, OSError):
    """The kernel did not take what a hook told it, of which the old hooks let IOError out."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(number, message)

    def __str__(self) -> str:
        return str(self.strerror)


class _BufferRefused(_Refused, BufferedNICException):
    """The same, of a buffer."""


class _DetourRefused(NetworkError, util.PipeException):
    """Output cannot be led through a device, or past it; the old module had commands do that."""

    def __init__(self, message: str, number: int) -> None:
        Exception.__init__(self, message)
        self.errno = number


@contextlib.contextmanager
def _refusals(kind: type[_Refused | _DetourRefused]) -> Iterator[None]:
    """Errors of ours as scripts expect them."""
    try:
        yield
    except RemusError as error:
        number = getattr(error.__cause__, "errno", None) or getattr(error.__cause__, "code", None)
        raise kind(str(error), number if isinstance(number, int) else errno.EIO) from error


class ReplicatedDisk(CheckpointedDevice):
    """A disk that DRBD replicates, told of each checkpoint.

    :param disk: with ``uname`` ``drbd:RESOURCE``.
    :raise ReplicatedDiskException: it is not on DRBD with protocol D; blktap's ``tap:remus:`` is gone from Xen.
    """

    FIFODIR = "/var/run/tap"
    SEND_CHECKPOINT = drbd.SEND_CHECKPOINT
    WAIT_CHECKPOINT_ACK = drbd.WAIT_CHECKPOINT_ACK

    def __init__(self, disk: blkdev.BlkDev) -> None:
        self._disk: DrbdDisk | None = None
        self.is_drbd = disk.uname.startswith(DRBD_PREFIX)
        if disk.uname.startswith(("tap:remus:", "tap:tapdisk:remus:")):
            raise ReplicatedDiskException(
                f"Disk {disk} is of blktap, which Xen has no more: put it on DRBD with protocol D"
            )
        if not self.is_drbd:
            raise ReplicatedDiskException(f"Disk is not replicated: {disk}")
        replicated = DrbdDisk(disk.uname.removeprefix(DRBD_PREFIX))
        try:
            replicated.setup()
        except RemusError as error:
            raise ReplicatedDiskException(str(error)) from error
        self._disk = replicated

    @property
    def ctlfd(self) -> drbd.CheckpointedDrbd | None:
        """What the ioctls go to, with a ``fileno``; None after :meth:`uninstall`."""
        return None if self._disk is None else self._disk.device

    @property
    def ackwait(self) -> bool:
        """Whether :meth:`preresume` will wait for the peer."""
        return self._disk is not None and self._disk.waiting

    def __del__(self) -> None:
        self.uninstall()

    def uninstall(self) -> None:
        if self._disk is not None:
            self._disk.teardown()
            self._disk = None

    def postsuspend(self) -> None:
        """:raise OSError: DRBD does not take the checkpoint; so does :meth:`preresume`."""
        if self._disk is not None:
            with _refusals(_Refused):
                self._disk.postsuspend()

    def preresume(self) -> None:
        if self._disk is not None:
            with _refusals(_Refused):
                self._disk.preresume()


_rth: netlink.rtnl | None = None


def getrth() -> netlink.rtnl:
    """One handle for all."""
    global _rth
    if _rth is None:
        _rth = netlink.rtnl()
    return _rth


class Netbuf:
    """A device that a vif's output goes through, and where it can be held.

    :param devname: its name, as of an interface.
    """

    def __init__(self, devname: str) -> None:
        self.devname = devname
        self.vif: VIF | None = None

    @staticmethod
    def devclass() -> str:
        """What names of such devices begin with."""
        return "unknown"

    @classmethod
    def available(cls) -> bool:
        """Whether this kernel can have such devices."""
        return cls._hasdev(cls.devclass())

    def install(self, vif: VIF) -> None:
        """Have the output of ``vif`` go through."""
        raise BufferedNICException("unimplemented")

    def uninstall(self) -> None:
        """Let it take its own way again."""
        raise BufferedNICException("unimplemented")

    @staticmethod
    def _hasdev(devclass: str) -> bool:
        name = f"{devclass}0"
        if getrth().getlink(name):
            return True
        return util.modprobe(devclass) and bool(getrth().getlink(name))


class IFBBuffer(Netbuf):
    """An ifb device; it is made if there is none of that name, and then goes at the end.

    What the network card says that a device model emulates beside the vif goes through it, too.
    :meth:`install` and :meth:`uninstall` raise ``util.PipeException`` if the kernel refuses.
    """

    def __init__(self, devname: str) -> None:
        super().__init__(devname)
        self._stack: contextlib.ExitStack | None = None

    @staticmethod
    def devclass() -> str:
        return "ifb"

    @classmethod
    def available(cls) -> bool:
        # one that is there; or a module that makes none by itself, and then they are made when they are wanted
        return cls._hasdev(cls.devclass()) or kmod.is_present(cls.devclass())

    def install(self, vif: VIF) -> None:
        self.vif = vif
        with _refusals(_DetourRefused), contextlib.ExitStack() as stack:
            links = stack.enter_context(Links())
            if links.exists(self.devname):
                # Of a process that was killed: who knows whether its guest went on elsewhere.
                Plug(links, self.devname, LIMIT_BYTES).drop()
                links.set_up(self.devname)
                stack.callback(links.set_down, self.devname)
            else:
                ifb.create(links, self.devname)
                stack.callback(links.delete_link, self.devname)
            self._divert(stack, links, vif.dev)
            emulated = vif.dev + EMULATED_SUFFIX
            if links.exists(emulated):
                self._divert(stack, links, emulated)
            self._stack = stack.pop_all()

    def _divert(self, stack: contextlib.ExitStack, links: Links, ifname: str) -> None:
        tap = CopyingTap(ifname)
        stack.callback(tap.close)
        stack.callback(ifb.stop_redirecting, links, ifname)
        ifb.redirect_input(links, ifname, self.devname)
        protection.diverted.add(ifname)
        stack.callback(protection.diverted.discard, ifname)

    def uninstall(self) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            with _refusals(_DetourRefused):
                stack.close()


class IMQBuffer(Netbuf):
    """An imq device, which no kernel of today has."""

    @staticmethod
    def devclass() -> str:
        return "imq"

    @classmethod
    def available(cls) -> bool:
        return False

    def install(self, vif: VIF) -> None:
        raise BufferedNICException("no kernel of today has imq devices: use IFBBuffer")

    def uninstall(self) -> None:
        pass


# in order of desirability
netbuftypes: list[type[Netbuf]] = [IFBBuffer, IMQBuffer]


def selectnetbuf() -> type[Netbuf]:
    """The best that this kernel has.

    :raise BufferedNICException: it has none.
    """
    for driver in netbuftypes:
        if driver.available():
            return driver
    raise BufferedNICException("no net buffer available: this kernel has no ifb module")


class Netbufpool:
    """Gives each process devices of its own, by a file with a line ``DEVICE PID`` for each that is taken."""

    def __init__(self, netbufclass: type[Netbuf]) -> None:
        self.netbufclass = netbufclass
        self.path = os.path.join(POOL_DIR, netbufclass.devclass())
        os.makedirs(POOL_DIR, 0o755, exist_ok=True)
        self.devices = self.getdevs()

    def get(self) -> Netbuf:
        """A device that nobody has, or whose owner is gone."""
        with util.Lock(self.path):
            table = self.load()
            candidates = [
                *self.devices,
                *(f"{self.netbufclass.devclass()}{n}" for n in range(len(table) + len(self.devices) + 1)),
            ]
            name = next(name for name in candidates if name not in table or not util.checkpid(table[name]))
            table[name] = os.getpid()
            self.save(table)
        return self.netbufclass(name)

    def put(self, dev: Netbuf) -> None:
        """The device is free again."""
        with util.Lock(self.path):
            table = self.load()
            table.pop(dev.devname, None)
            self.save(table)

    def load(self) -> dict[str, int]:
        """Without lines that somebody who was killed has left half written."""
        try:
            with open(self.path, encoding="ascii", errors="replace") as lines:
                entries = [line.split() for line in lines]
        except FileNotFoundError:
            return {}
        return {entry[0]: int(entry[1]) for entry in entries if len(entry) == 2 and entry[1].isdecimal()}

    def save(self, table: dict[str, int]) -> None:
        with open(self.path, "w", encoding="ascii") as lines:
            lines.writelines(f"{name} {pid}\n" for name, pid in sorted(table.items()))

    def getdevs(self) -> list[str]:
        """Those that are there."""
        pattern = re.compile(rf"{self.netbufclass.devclass()}\d+")
        return sorted(name for _, name in socket.if_nameindex() if pattern.fullmatch(name))


class BufferedNIC(CheckpointedDevice):
    """Holds a domain's output between checkpoints, so that nothing is seen that a failover might not know about.

    Where a script does not get to :meth:`uninstall`, that is done when the object goes, or the process ends:
    otherwise the guest would be cut off for good.

    :ivar bufdev: the device that the output goes through, and ``bufdevno`` its index.
    :ivar q: the plug, as a message has it; its ``action`` is the last one, and its ``limit``, in bytes, the one that
        :meth:`install` gives it.
    :raise BufferedNICException: it cannot be held.  What the hooks raise if the kernel refuses is OSError, too.
    """

    def __init__(self, vif: VIF) -> None:
        self.installed = False
        self.vif = vif
        self.pool = Netbufpool(selectnetbuf())
        self.rth = getrth()
        self._plug: Plug | None = None
        self._undo = contextlib.ExitStack()
        self._uninstall = weakref.finalize(self, _undo_here, self._undo, os.getpid())
        self.setup()

    def setup(self) -> None:
        """Have the output go through a device of the pool; done when the object is made."""
        if hasattr(self, "bufdev"):
            return
        self.bufdev = self.pool.get()
        self._undo.callback(self.pool.put, self.bufdev)
        try:
            kmod.load("sch_plug", "holding the guest's output")
            self.bufdev.install(self.vif)
            self._undo.callback(_tell, self.bufdev.uninstall)
            self.bufdevno = socket.if_nametoindex(self.bufdev.devname)
        except (RemusError, OSError, util.PipeException) as error:
            self._undo.close()
            raise BufferedNICException(str(error)) from error
        self.handle = qdisc.TC_H_ROOT
        self.q = qdisc.PlugQdisc()

    def install(self) -> None:
        """Put the plug in; the first ``postsuspend`` does so."""
        if self.installed:
            return
        with _refusals(_BufferRefused), contextlib.ExitStack() as stack:
            links = stack.enter_context(Links())
            plug = Plug(links, self.bufdev.devname, self.q.limit)
            plug.install()
            stack.callback(_tell, functools.partial(_take_out, plug, self.vif.dev))
            self._undo.push(stack.pop_all())
        self._plug = plug
        self.installed = True

    def postsuspend(self) -> None:
        if not self.installed:
            self.install()
        self._sendqmsg(qdisc.TC_PLUG_BUFFER)

    def commit(self) -> None:
        if self.installed:
            self._sendqmsg(qdisc.TC_PLUG_RELEASE_ONE)

    def _sendqmsg(self, action: int) -> bool:
        if self._plug is None:
            raise BufferedNICException(f"there is no plug on {self.bufdev.devname}")
        self.q.action = action
        tell = {
            qdisc.TC_PLUG_BUFFER: self._plug.buffer,
            qdisc.TC_PLUG_RELEASE_ONE: self._plug.release_one,
            qdisc.TC_PLUG_RELEASE_INDEFINITE: self._plug.release,
        }[action]
        with _refusals(_BufferRefused):
            tell()
        return True

    def uninstall(self) -> None:
        """Let go of what is held, and hold no more; within a callback of the checkpoints what is held is dropped."""
        self._plug = None
        self.installed = False
        self._uninstall()

    def teardown(self, *, drop_held: bool = False) -> None:
        self.uninstall()


def _undo_here(undo: contextlib.ExitStack, pid: int) -> None:
    """What a script has forked has it from its parent, where it is still in use."""
    if os.getpid() == pid:
        undo.close()


def _take_out(plug: Plug, ifname: str) -> None:
    """What is held gets time to leave: removed at once, the plug would drop it.  Not while checkpoints are
    under way, or when the guest goes on elsewhere: what no complete checkpoint has would then have been seen.
    """
    if protection.withholds(ifname):
        plug.drop()
    else:
        plug.remove(time.monotonic() + DRAIN_TIMEOUT_S)


def _tell(take_down: Callable[[], None]) -> None:
    """What cannot be taken down is no reason to leave the rest."""
    try:
        take_down()
    except (RemusError, util.PipeException) as error:
        log.warning("%s", error)


class ColoNIC(CheckpointedDevice):
    """A vif whose output leaves when the second copy's is equal; at a checkpoint, what is left of it.

    :param path: of a COLO session, which makes these itself: see ``save.ColoSaver.nics``.
    """

    def __init__(self, vif: VIF, path: VifPath) -> None:
        self.vif = vif
        self._path = path

    def postsuspend(self) -> None:
        """What was sent until now belongs to this checkpoint."""
        self._path.cut()

    def commit(self) -> None:
        """The backup has it: what was held may leave."""
        self._path.commit()

    def counters(self) -> dict[str, Any]:
        """Packets released, held and diverged."""
        return self._path.counters()
