# SPDX-License-Identifier: LGPL-2.1-or-later
"""Network namespaces, entered for the time of a call; taps opened in them."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from remus_colo.testbed.errors import BedError

NETNS_DIR = Path("/run/netns")
CLONE_NEWNET = 0x40000000  # linux/sched.h
TUNSETIFF = 0x400454CA  # linux/if_tun.h
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
IFNAMSIZ = 16

_libc = ctypes.CDLL(None, use_errno=True)


def _setns(fd: int, what: str) -> None:
    if _libc.setns(fd, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise BedError(f"cannot enter {what}: {os.strerror(number)}")


@contextlib.contextmanager
def entered(name: str) -> Iterator[None]:
    """The calling thread is in namespace ``name`` inside, and back in its own after.

    :raise BedError: there is no such namespace, or we are not root.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            there = os.open(NETNS_DIR / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as cause:
            raise BedError(f"the network namespace {name} is gone: take the bed down and up again") from cause
        try:
            _setns(there, f"the network namespace {name}")
        finally:
            os.close(there)
        try:
            yield
        finally:
            _setns(home, "this process's own network namespace")
    finally:
        os.close(home)


def open_tap(name: str, *, namespace: str) -> int:
    """A new tap in ``namespace``, with offload headers; it lives as long as the returned descriptor.

    The caller owns the descriptor.  A name in use (another open tap) raises :class:`BedError`.
    """
    if len(name) >= IFNAMSIZ:
        raise BedError(f"{name} is too long for an interface")
    with entered(namespace):
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        try:
            # struct ifreq: name, then flags; 40 bytes on 64-bit.
            request = struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
            fcntl.ioctl(fd, TUNSETIFF, request)
        except OSError as cause:
            os.close(fd)
            raise BedError(f"cannot make the tap {name} in {namespace}: {cause.strerror}") from cause
    return fd


def write_sysctl(namespace: str, key: str, value: str) -> None:
    """Set ``net/...`` of a namespace; a key that this kernel lacks is left alone."""
    with entered(namespace):
        path = Path("/proc/sys") / key
        if path.exists():
            path.write_text(value)
