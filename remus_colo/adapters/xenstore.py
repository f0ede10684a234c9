# SPDX-License-Identifier: LGPL-2.1-or-later
"""xenstore through pyxs: text in and out, deadlines on every wait, errors of ours."""

from __future__ import annotations

import contextlib
import errno
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import pyxs

from remus_colo.errors import HostError, XenError

SOCKETS = ("/run/xenstored/socket", "/var/run/xenstored/socket")


class Store:
    """A connection to xenstored, as the control domain.

    :raise HostError: if xenstored does not answer.
    """

    def __init__(self) -> None:
        self._client: pyxs.Client | None = None
        reason: Exception | None = None
        for path in SOCKETS:
            client = pyxs.Client(unix_socket_path=path)
            try:
                client.connect()
            except (pyxs.ConnectionError, OSError) as error:
                reason = error
                continue
            self._client = client
            return
        raise HostError(
            f"cannot reach xenstored ({reason}): is this a Xen control domain, and is the xen service running?"
        )

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def client(self) -> pyxs.Client:
        if self._client is None:
            raise XenError("the xenstore connection is closed", operation="xenstore")
        return self._client

    @contextlib.contextmanager
    def _errors(self, operation: str, path: str) -> Iterator[None]:
        try:
            yield
        except pyxs.PyXSError as error:
            number = error.args[0] if error.args and isinstance(error.args[0], int) else 0
            raise XenError(
                f"xenstore {operation} of {path} failed: {error}", operation=operation, errno=number
            ) from error

    def read(self, path: str) -> str | None:
        """The node's value, or None if there is no such node."""
        try:
            with self._errors("read", path):
                value: bytes = self.client.read(path.encode())
                return value.decode("utf-8", "replace")
        except XenError as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    def write(self, path: str, value: str) -> None:
        with self._errors("write", path):
            self.client.write(path.encode(), value.encode())

    def replace(self, path: str, old: str, new: str) -> bool:
        """Write ``new`` if the node has ``old``, as one step. Whether it had.

        In a connection of its own: a transaction takes all that goes through its connection.
        """
        with Store() as store:
            while True:
                with self._errors("transaction", path):
                    store.client.transaction()
                    if store.read(path) != old:
                        store.client.rollback()
                        return False
                    store.write(path, new)
                    if store.client.commit():
                        return True

    def remove(self, path: str) -> None:
        """Remove the node and what is below it; nothing happens if there is none."""
        try:
            with self._errors("rm", path):
                self.client.delete(path.encode())
        except XenError as error:
            if error.errno != errno.ENOENT:
                raise

    def list(self, path: str) -> list[str]:
        """Names of the node's children, none if there is no such node."""
        try:
            with self._errors("directory", path):
                return [name.decode() for name in self.client.list(path.encode())]
        except XenError as error:
            if error.errno == errno.ENOENT:
                return []
            raise

    def introduce_domain(self, domid: int, gfn: int, port: int) -> None:
        """Tell xenstored of a domain, or of the new port of one that it knows."""
        with self._errors("introduce", f"domain {domid}"):
            self.client.introduce_domain(domid, gfn, port)

    def resumed_domain(self, domid: int) -> None:
        """Tell xenstored that a domain that was shut down runs again; else it never tells of its next shutdown."""
        with self._errors("resume", f"domain {domid}"):
            self.client.resume_domain(domid)

    @contextlib.contextmanager
    def watch(self, paths: Sequence[str]) -> Iterator[Watch]:
        """See changes below ``paths``, for as long as the context lasts."""
        with self.client.monitor() as monitor:
            for path in paths:
                with self._errors("watch", path):
                    monitor.watch(path.encode(), b"remus_colo")
            yield Watch(monitor)

    def wait(
        self,
        paths: Sequence[str],
        condition: Callable[[], bool],
        *,
        timeout_s: float,
    ) -> bool:
        """Wait until ``condition()`` holds, looking again at each change below ``paths``.

        :return: False if ``timeout_s`` passed first.
        """
        with self.watch(paths) as watch:
            return watch.wait(condition, timeout_s=timeout_s)


class Watch:
    """Watches that stand, from :meth:`Store.watch`."""

    def __init__(self, monitor: pyxs.Monitor) -> None:
        self._monitor = monitor

    def wait(self, condition: Callable[[], bool], *, timeout_s: float) -> bool:
        """Wait until ``condition()`` holds, looking again at each change.

        :return: False if ``timeout_s`` passed first.
        """
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0:
                return False
            with contextlib.suppress(queue.Empty):
                self._monitor.events.get(timeout=remaining_s)
        return True


def domain_named(store: Store, name: str) -> int | None:
    """The domid of the domain that has a name, a numeral or not; None if none has."""
    for domid in store.list("/local/domain"):
        if store.read(f"/local/domain/{domid}/name") == name:
            return int(domid)
    return None
