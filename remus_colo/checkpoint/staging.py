# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where libxenguest writes to: a pipe for the live rounds, memory for each checkpoint.

libxenguest writes a checkpoint's pages while the guest is suspended, into one descriptor that it is given at
the start.  What is behind the descriptor changes after the first checkpoint: a pipe, whose reader sends a
whole guest's memory as it comes; then a file in memory, into which a checkpoint is copied at the speed of
memory, to be sent when the guest runs again.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable

from remus_colo.checkpoint.pipes import wide_pipe

READ_BYTES = 1 << 20


class Staging:
    """A descriptor to write a stream of checkpoints to.

    :param live: takes what is written before the first :meth:`take`, piece by piece, in a thread of its own.
    """

    def __init__(self, live: Callable[[bytes], None]) -> None:
        self._live = live
        self._memory = os.memfd_create("remus-checkpoint", os.MFD_CLOEXEC)
        self._read_fd, self.fd = wide_pipe()
        self._failure: BaseException | None = None
        self._map: mmap.mmap | None = None
        self._staged = False
        self._pump = threading.Thread(target=self._run, name="live-rounds", daemon=True)
        self._pump.start()

    def _run(self) -> None:
        try:
            while chunk := os.read(self._read_fd, READ_BYTES):
                self._live(chunk)
        except BaseException as error:  # raised by take()
            self._failure = error
        finally:
            os.close(self._read_fd)  # whoever still writes gets EPIPE, and ends

    @property
    def failure(self) -> BaseException | None:
        """What ``live`` raised: the reason for which a writer got EPIPE."""
        return self._failure

    def take(self) -> memoryview:
        """All that was written since the last call, valid until the next one; nothing after the first call.

        Nobody may be writing.

        :raise BaseException: what ``live`` raised.
        """
        if not self._staged:
            self._staged = True
            os.dup2(self._memory, self.fd, inheritable=False)  # the pipe's last writer goes: the pump ends
            self._pump.join()
            if self._failure is not None:
                raise self._failure
            return memoryview(b"")
        length = os.lseek(self.fd, 0, os.SEEK_CUR)
        # The file keeps its size, as memory that is there already is written faster.
        os.lseek(self.fd, 0, os.SEEK_SET)
        size = os.fstat(self._memory).st_size
        if not size:
            return memoryview(b"")
        if self._map is None or len(self._map) < size:
            self._map = mmap.mmap(self._memory, size, prot=mmap.PROT_READ)
        return memoryview(self._map)[:length]

    def close(self) -> None:
        """Nobody may be writing."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        self._pump.join()
        os.close(self._memory)
