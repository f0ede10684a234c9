# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the SVM is born: the PVM's memory as a libxl save stream, restored under another name.

The primary writes the stream while the guest runs (live rounds) and ends it with the guest suspended by
itself; the backup feeds it to ``xl restore -p``.  The SVM is then a domain like any other for xl.
"""

from __future__ import annotations

import copy
import os
import subprocess
import threading
import uuid
from collections.abc import Callable
from typing import Any

from remus_colo.adapters import savestream, toolstack
from remus_colo.adapters.xenstore import Store, domain_named
from remus_colo.checkpoint import libxlformat
from remus_colo.checkpoint.pipes import wide_pipe
from remus_colo.errors import XenError

SECONDARY_SUFFIX = "--secondary"
READ_BYTES = 1 << 20
RESTORE_TIMEOUT_S = 300.0
ABORT_TIMEOUT_S = 10.0


def secondary_name(name: str) -> str:
    return name + SECONDARY_SUFFIX


def secondary_config(
    config: dict[str, Any], bridge: Callable[[int], str], *, same_host: bool
) -> dict[str, Any]:
    """The SVM's configuration, from libxl's of the PVM.

    :param bridge: the isolated bridge for the vif with a given index.
    :param same_host: PVM and SVM share a host, where a UUID may exist only once.
    """
    secondary = copy.deepcopy(config)
    info = secondary["c_info"]
    info["name"] = secondary_name(info["name"])
    if same_host:
        info["uuid"] = str(uuid.uuid4())
    for index, nic in enumerate(secondary.get("nics", [])):
        nic["bridge"] = bridge(index)
        nic.pop("ifname", None)
    return secondary


def send_guest(
    domid: int,
    config: dict[str, Any],
    suspend: Callable[[], None],
    write: Callable[[bytes], None],
    *,
    live: bool = True,
) -> None:
    """Send the whole save stream of a domain through ``write``; the guest ends suspended.

    :param suspend: suspends the guest; called once, towards the end.
    :param live: let it run while it is copied.
    :raise XenError: if libxenguest fails; what ``write`` or ``suspend`` raised is raised as it is.
    """
    read_fd, write_fd = wide_pipe()
    failures: list[BaseException] = []

    def save() -> None:
        try:
            savestream.save_once(domid, write_fd, suspend, live=live)
        except BaseException as error:  # handed over to the caller's thread
            failures.append(error)
        finally:
            os.close(write_fd)

    saver = threading.Thread(target=save, name=f"save-{domid}", daemon=True)
    try:
        write(libxlformat.prologue(config))
        saver.start()
        while chunk := os.read(read_fd, READ_BYTES):
            write(chunk)
    finally:
        # Without a reader libxenguest gets EPIPE and ends, so that the thread always does.
        os.close(read_fd)
        if saver.ident is not None:
            saver.join()
        else:
            os.close(write_fd)
    if failures:
        raise failures[0]
    write(libxlformat.epilogue())


class Restorer:
    """``xl restore`` of a stream that arrives in pieces."""

    def __init__(self, name: str) -> None:
        self._name = name
        read_fd, self._write_fd = wide_pipe()
        try:
            self._process = toolstack.restore_paused(read_fd)
        finally:
            os.close(read_fd)
        self._output = b""
        self._drain = threading.Thread(target=self._read_output, name="xl-restore", daemon=True)
        self._drain.start()

    def _read_output(self) -> None:
        assert self._process.stdout is not None
        self._output = self._process.stdout.read()

    def feed(self, chunk: bytes | memoryview) -> None:
        """:raise XenError: if xl gave up."""
        view = memoryview(chunk)
        try:
            while view:
                view = view[os.write(self._write_fd, view) :]
        except BrokenPipeError:
            raise self._failure() from None

    def finish(self, store: Store) -> int:
        """The stream is complete: wait for xl. Returns the new domain's id; it is paused.

        :raise XenError: if xl failed.
        """
        self._close_pipe()
        try:
            status = self._process.wait(RESTORE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.abort()
            raise XenError(
                f"xl restore did not end within {RESTORE_TIMEOUT_S:g} s", operation="xl restore"
            ) from None
        if status:
            raise self._failure()
        domid = domain_named(store, self._name)
        if domid is None:
            raise XenError(
                f"xl restore ended well, but there is no domain {self._name}", operation="xl restore"
            )
        return domid

    @property
    def complete(self) -> bool:
        """xl has ended by itself, and well: it wants no more."""
        return self._process.poll() == 0

    @property
    def made(self) -> bool:
        """There is a domain: xl has ended, and well, or was killed, and had no time to destroy the half-made one."""
        return self._process.returncode is not None and self._process.returncode <= 0

    def abort(self) -> None:
        """End xl, whatever it is doing.  libxl destroys the half-made domain in time, or see :attr:`made`."""
        self._close_pipe()
        if self._process.poll() is None:
            try:
                self._process.wait(ABORT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _close_pipe(self) -> None:
        if self._write_fd >= 0:
            os.close(self._write_fd)
            self._write_fd = -1

    def _failure(self) -> XenError:
        self.abort()
        self._drain.join(5)
        lines = self._output.decode("utf-8", "replace").strip().splitlines()
        return XenError(f"xl restore failed: {'; '.join(lines[-3:]) or 'no message'}", operation="xl restore")
