# SPDX-License-Identifier: LGPL-2.1-or-later
"""The receiving end of Remus's stream: ``xl migrate-receive -r``, told by us when it is to begin.

xl restores the guest's memory and then takes one checkpoint after another, each as a whole, until the stream
ends; then it makes the devices and lets the guest run.  For xl the *end of its input* means that the primary
is dead.  That must not be what the death of this daemon looks like.  So its input is a pipe that it holds
open for writing itself: it never sees an end, and begins only when it reads libxenguest's END record, which
nobody but :meth:`Receiver.take_over` writes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import threading
from typing import Any

from remus_colo.adapters import toolstack
from remus_colo.adapters.xenstore import Store, domain_named
from remus_colo.checkpoint import libxcrecords, libxlformat
from remus_colo.checkpoint.pipes import wide_pipe
from remus_colo.errors import XenError

log = logging.getLogger(__name__)

# xl's name for a domain that is being received
INCOMING_SUFFIX = "--incoming"
START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 10.0
OUTPUT_BYTES = 8192  # of what xl says, the end


class Receiver:
    """One guest being received; nothing of it runs before :meth:`take_over`.

    :param config: libxl's JSON configuration of the domain to be made.
    :raise HostError: there is no xl.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.name = str(config["c_info"]["name"])
        self._lock = threading.Lock()
        self._ended = False
        read_fd, self._write_fd = wide_pipe()
        try:
            # Opened anew for both: as long as xl lives, its pipe has a writer.
            held_fd = os.open(f"/proc/self/fd/{read_fd}", os.O_RDWR | os.O_CLOEXEC)
            try:
                self._process = toolstack.receive_checkpoints(held_fd)
            finally:
                os.close(held_fd)
        except BaseException:
            os.close(self._write_fd)
            raise
        finally:
            os.close(read_fd)
        self._output = b""
        self._drain = threading.Thread(target=self._read_output, name="xl-receive", daemon=True)
        self._drain.start()
        self.feed(libxlformat.prologue(config))

    def _read_output(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            while piece := os.read(output.fileno(), 4096):
                self._output = (self._output + piece)[-OUTPUT_BYTES:]

    def running(self) -> bool:
        return self._process.poll() is None

    def feed(self, piece: bytes | bytearray | memoryview) -> None:
        """The next piece of the stream; blocks for as long as xl is busy.

        :raise XenError: xl gave up.
        """
        view = memoryview(piece)
        try:
            while view:
                view = view[os.write(self._write_fd, view) :]
        except OSError as error:
            raise self.failure() from error

    def take_over(self, store: Store) -> int:
        """The guest is to run here from its last checkpoint. Returns its domid.

        :raise XenError: xl failed.
        """
        self.feed(libxcrecords.END_RECORD)
        try:
            status = self._process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise XenError(
                f"xl did not start {self.name} within {START_TIMEOUT_S:g} s", operation="xl migrate-receive"
            ) from None
        with self._lock:
            self._ended = True
        self._close_pipe()
        if status:
            raise self.failure()
        # The plain name may be another's, if both hosts are one: then it keeps xl's.
        for name in (self.name + INCOMING_SUFFIX, self.name):
            domid = domain_named(store, name)
            if domid is not None:
                return domid
        raise XenError(f"xl ended well, but there is no domain {self.name}", operation="xl migrate-receive")

    def abort(self, store: Store) -> None:
        """The guest is not wanted any more: end xl and its helpers, and destroy what they have made."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
        # All of them are in a session of their own; a helper would wait for its input for ever.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(END_TIMEOUT_S)
        self._close_pipe()
        domid = domain_named(store, self.name + INCOMING_SUFFIX)
        if domid is not None:
            toolstack.destroy(domid)

    def _close_pipe(self) -> None:
        with self._lock:
            if self._write_fd >= 0:
                os.close(self._write_fd)
                self._write_fd = -1

    def failure(self) -> XenError:
        """What xl said before it ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_TIMEOUT_S)
        self._drain.join(END_TIMEOUT_S)
        lines = self._output.decode("utf-8", "replace").strip().splitlines()
        return XenError(
            f"xl migrate-receive failed: {'; '.join(lines[-3:]) or 'no message'}",
            operation="xl migrate-receive",
        )
