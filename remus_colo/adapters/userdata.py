# SPDX-License-Identifier: LGPL-2.1-or-later
"""libxl's record of a running domain's configuration: what ``xl`` reboots, saves and migrates the domain with.

xl has no command that changes it in place.  Files, their names and their lock are those of libxl (libxl__userdata_path,
libxl__userdata_store in libxl_dom.c; libxl__lock_domain_userdata in libxl_internal.c), from Xen 4.5 on.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from remus_colo.adapters.xenstore import Store
from remus_colo.errors import HostError

DIRECTORY = Path("/var/lib/xen")  # XEN_LIB_DIR
_RECORD, _LOCK = "libxl-json", "domain-userdata-lock"
_END = b"\0"  # part of the file: libxl reads it as a string of C


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """libxl's kind of lock: the file goes with it, so whoever waited for one that is gone begins again."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            try:
                current = os.path.samestat(os.fstat(fd), os.stat(path))
            except FileNotFoundError:
                current = False
            if not current:
                continue
            try:
                yield
                return
            finally:
                path.unlink(missing_ok=True)  # before it is closed: nobody else can have taken it
        finally:
            os.close(fd)


def _uuid(domid: int) -> str:
    """:raise HostError: xenstore does not tell it."""
    with Store() as store:
        place = store.read(f"/local/domain/{domid}/vm")
    if not place:
        raise HostError(f"domain {domid} has no UUID in xenstore")
    return place.rpartition("/")[2]


def change(domid: int, alter: Callable[[dict[str, Any]], None]) -> None:
    """Change a domain's configuration as libxl has it; at any moment it is there as a whole.

    :param alter: changes what ``xl list -l`` shows as ``config``.
    :raise HostError: it cannot be read or written; it is as it was.
    """

    uuid = _uuid(domid)

    def path(kind: str, name: str) -> Path:
        return DIRECTORY / f"userdata-{kind}.{domid}.{uuid}.{name}"

    record, fresh = path("d", _RECORD), path("n", _RECORD)
    try:
        with _locked(path("l", _LOCK)):
            config = json.loads(record.read_bytes().removesuffix(_END))
            alter(config)
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(json.dumps(config, indent=4).encode() + _END)
            fresh.rename(record)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise HostError(
            f"libxl's configuration of domain {domid} ({record}) stays as it was: {error}"
        ) from error
