# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain's checkpoints, and where they go."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from typing import IO, Any

from xen.lowlevel import checkpoint
from xen.remus import device, image, vm

from remus_colo import dominfo
from remus_colo.adapters.xenctrl import Guest
from remus_colo.adapters.xenstore import Store
from remus_colo.checkpoint.suspend import Suspender
from remus_colo.classic import colo
from remus_colo.classic.protection import Heard, Link
from remus_colo.errors import RemusError
from remus_colo.session.colo_primary import ColoSession

__all__ = [
    "XCFLAGS_LIVE",
    "CheckpointError",
    "CheckpointingFile",
    "ColoSaver",
    "Keepalive",
    "MigrationSocket",
    "NullSocket",
    "Saver",
]

XCFLAGS_LIVE = 1
READ_BYTES = 256 * 1024


class CheckpointError(Exception):
    """Checkpoints could not begin, or failed."""


class _Proxy:
    """Has what the object behind it has; which one that is may change."""

    def __init__(self, obj: Any) -> None:
        self._obj = obj

    def __getattr__(self, name: str) -> Any:
        return getattr(self._obj, name)

    def proxy(self, obj: Any) -> None:
        self._obj = obj


class CheckpointingFile(_Proxy):
    """A file for each round: ``path`` first, then ``path.1``, ``path.2``, ...

    Saving has one descriptor for all of it: a pipe here, whose reader changes files at each
    :meth:`checkpoint`.  If a file takes no more, the pipe is broken, and :meth:`checkpoint` and :meth:`close`
    raise the reason.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.round = 0
        self.fd: IO[bytes] = open(path, "wb")  # noqa: SIM115 (one a round)
        super().__init__(self.fd)
        self.rfd, self.wfd = os.pipe()
        self.cprfd, self.cpwfd = os.pipe()
        self._changed = threading.Event()
        self._failure: OSError | None = None
        os.set_blocking(self.rfd, False)
        self.wt: threading.Thread | None = threading.Thread(
            target=self._copy, name="disk-write-thread", daemon=True
        )
        self.wt.start()

    def fileno(self) -> int:
        return self.wfd

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self.wfd, view) :]

    def flush(self) -> None:
        """What was written is on its way."""

    def checkpoint(self) -> None:
        """What is written from now on belongs to the next file. Nobody may be writing meanwhile.

        :raise OSError: a file did not take what was written.
        """
        self._changed.clear()
        self._check()
        os.write(self.cpwfd, b"1")
        self._changed.wait()
        self._check()

    def close(self) -> None:
        """:raise OSError: as :meth:`checkpoint`."""
        if self.wt is None:
            return
        os.close(self.wfd)
        self.wt.join()
        self.wt = None
        for fd in (self.cprfd, self.cpwfd):
            os.close(fd)
        try:
            self.fd.close()
        finally:
            self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _copy(self) -> None:
        try:
            self._copy_rounds()
        except OSError as error:
            self._failure = error
        # who writes must not wait for a reader that is gone, nor who waits for the next file
        os.close(self.rfd)
        self._changed.set()

    def _copy_rounds(self) -> None:
        while True:
            ready, _, _ = select.select((self.rfd, self.cprfd), (), ())
            # First what was written before the mark: a pipe keeps no order with another.
            if not self._drain():
                return
            if self.cprfd in ready:
                os.read(self.cprfd, 1)
                if not self._drain():
                    return
                self.fd.close()
                self.round += 1
                self.fd = open(f"{self.path}.{self.round}", "wb")  # noqa: SIM115
                self.proxy(self.fd)
                self._changed.set()

    def _drain(self) -> bool:
        """Copy what is there; False at the end."""
        while True:
            try:
                data = os.read(self.rfd, READ_BYTES)
            except BlockingIOError:
                return True
            if not data:
                return False
            self.fd.write(data)


class MigrationSocket(_Proxy):
    """A backup host, where ``remusd`` waits.

    :param address: its name or address, and port.
    :raise OSError: nobody answers there, or not to this.
    """

    def __init__(self, address: tuple[str, int]) -> None:
        host, port = address
        try:
            self.link = Link(host, port)
        except RemusError as error:
            raise ConnectionError(str(error)) from error
        self.sock = self.link
        super().__init__(self.link)

    def write(self, data: bytes | str) -> int:
        """A header; the backup has the domain's configuration from the protocol."""
        return len(data)

    def flush(self) -> None:
        """Nothing waits."""


class NullSocket(_Proxy):
    """Takes all, and keeps nothing."""

    def __init__(self, address: tuple[str, int] | None = None) -> None:
        super().__init__(open("/dev/null", "r+b", buffering=0))  # noqa: SIM115

    def write(self, data: bytes | str) -> int:
        """Text, too: to a script of Python 2's time there was no difference."""
        return len(data)


class Keepalive:
    """Calls ``method`` every ``interval`` seconds, and with ``stop=True`` at the end."""

    def __init__(self, method: Callable[..., Any], interval: float = 0.1) -> None:
        self.keepalive = method
        self.interval = interval
        self.thread: threading.Thread | None = None
        self.running = False
        self._stopped = threading.Event()

    def start(self) -> None:
        if not self.interval:
            return
        self.running = True
        self._stopped.clear()
        self.thread = threading.Thread(target=self.run, name="keepalive-thread", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        if self.thread is None:
            return
        self.running = False
        self._stopped.set()
        self.thread.join()
        self.thread = None

    def run(self) -> None:
        while self.running:
            self.keepalive()
            self._stopped.wait(self.interval)
        self.keepalive(stop=True)


class Saver:
    """Checkpoints of a domain, in the caller's thread.

    :param domid: name, number or UUID of a running domain.
    :param fd: a stream that they are written to: a ``MigrationSocket`` or any file with a descriptor.
    :param suspendcb: called after the guest has suspended.
    :param resumecb: called before it is resumed.
    :param checkpointcb: called when a checkpoint is complete; whether to take another.
    :param interval: ms; suspend by a clock instead of when ``checkpointcb`` returns.
    :param flags: 1: compress.
    :raise VMException: there is no such domain.
    """

    def __init__(
        self,
        domid: int | str,
        fd: Any,
        suspendcb: Callable[[], Any] | None = None,
        resumecb: Callable[[], Any] | None = None,
        checkpointcb: Callable[[], Any] | None = None,
        interval: int = 0,
        flags: int = 0,
    ) -> None:
        self.fd = fd
        self.suspendcb = suspendcb
        self.resumecb = resumecb
        self.checkpointcb = checkpointcb
        self.interval = interval
        self.flags = flags
        self.vm = vm.VM(domid)
        self.checkpointer: checkpoint.checkpointer | None = None

    def start(self) -> None:
        """Until ``checkpointcb`` ends it.

        :raise CheckpointError: it failed.
        """
        vm.getshadowmem(self.vm)
        out = image.of_octets(self.fd)
        out.write(image.makeheader(dominfo.with_libxl(self.vm.dominfo or [], self.vm.config or {})))
        out.flush()
        self.checkpointer = checkpoint.checkpointer()
        try:
            self.checkpointer.open(self.vm.domid)
            self.checkpointer.start(
                self.fd, self.suspendcb, self.resumecb, self.checkpointcb, self.interval, self.flags
            )
        except checkpoint.error as error:
            raise CheckpointError(str(error)) from error
        finally:
            self.checkpointer.close()

    def _resume(self) -> None:
        """Let the suspended guest go on as if it had not been."""
        with (
            Store() as store,
            Guest(self.vm.domid, writable=False) as guest,
            Suspender(guest, store) as suspender,
        ):
            suspender.resume()


class ColoSaver(Saver):
    """As :class:`Saver`, with a second copy of the guest that runs on the backup, and output that is compared.

    :param fd: a ``MigrationSocket``.
    :param waitcheckpointcb: called in a thread of its own after each checkpoint: when it returns something
        true, the next one is taken, if the guest's output has not asked for one before; something false ends
        it all.  Without it output alone decides, and the period.  ``nics`` are then its vifs, with their
        counters.
    :param interval: ms; a checkpoint at least so often, 0 for never.
    """

    def __init__(
        self,
        domid: int | str,
        fd: Any,
        suspendcb: Callable[[], Any] | None = None,
        resumecb: Callable[[], Any] | None = None,
        checkpointcb: Callable[[], Any] | None = None,
        interval: int = 10_000,
        flags: int = 0,
        waitcheckpointcb: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__(domid, fd, suspendcb, resumecb, checkpointcb, interval, flags)
        self.waitcheckpointcb = waitcheckpointcb
        self.nics: list[device.ColoNIC] = []

    def start(self) -> None:
        link = getattr(self.fd, "link", None)
        if not isinstance(link, Link):
            raise CheckpointError("COLO needs a backup that answers: give a MigrationSocket")
        self.fd.write(image.makeheader(self.vm.dominfo or [], colo=True))
        self.fd.flush()
        heard = Heard()
        calls = colo.Calls(
            heard.of(self.suspendcb),
            heard.of(self.resumecb),
            heard.of(self.checkpointcb),
            self.waitcheckpointcb,
        )
        try:
            colo.run(self.vm.domid, link, calls, period_s=self.interval / 1000, on_session=self._meet)
        except RemusError as error:
            if heard.error is not None:
                raise heard.error  # noqa: B904 (it has its own cause)
            raise CheckpointError(str(error)) from error

    def _meet(self, session: ColoSession) -> None:
        self.nics = [
            device.ColoNIC(vif, path) for vif, path in zip(self.vm.vifs, session.path.vifs, strict=False)
        ]
