# SPDX-License-Identifier: LGPL-2.1-or-later
"""DRBD's tools and the two ioctls of Remus's DRBD (8.3-remus, its protocol D; later releases have no such protocol)."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess

from remus_colo.adapters.commands import run_apart
from remus_colo.errors import HostError, NetworkError

# Request numbers of the block device in Remus's DRBD, as libxl and Xen 4.4's tools use them.
SEND_CHECKPOINT = 20
WAIT_CHECKPOINT_ACK = 30
TIMEOUT_S = 30.0
_PROTOCOL = re.compile(r"\bprotocol\s+([A-Z])\s*;")


def _run(*command: str) -> str:
    """:raise HostError: there is no such tool, or it failed."""
    if shutil.which(command[0]) is None:
        raise HostError(
            f"the {command[0]} command was not found: install drbd-utils, or detach the DRBD disk"
        )
    try:
        done = run_apart(command, TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise HostError(f"{' '.join(command)} did not end within {TIMEOUT_S:g} s") from error
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise HostError(f"{' '.join(command)} failed: {words[-1] if words else 'no message'}")
    return done.stdout


def device_of(resource: str) -> str:
    """Path of the block device of a resource."""
    return _run("drbdadm", "sh-dev", resource).strip()


def protocol_of(device: str) -> str:
    """A, B, C or D; empty if it is not told."""
    return parse_protocol(_run("drbdsetup", device, "show"))


def parse_protocol(shown: str) -> str:
    """The protocol in what ``drbdsetup show`` prints."""
    found = _PROTOCOL.search(shown)
    return found[1] if found else ""


def connection_of(resource: str) -> str:
    """As in ``Connected``."""
    return _run("drbdadm", "cstate", resource).strip()


class CheckpointedDrbd:
    """The block device of a resource in protocol D."""

    def __init__(self, device: str) -> None:
        """:raise HostError: it cannot be opened."""
        try:
            self._fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"cannot open the DRBD device {device}: {error.strerror}") from error
        self._device = device

    def send_checkpoint(self) -> bool:
        """End the epoch of writes. Whether an acknowledgement is to be waited for."""
        return self._ioctl(SEND_CHECKPOINT) <= 0

    def wait_for_acknowledgement(self) -> None:
        self._ioctl(WAIT_CHECKPOINT_ACK)

    def _ioctl(self, request: int) -> int:
        try:
            return fcntl.ioctl(self._fd, request, 0)
        except OSError as error:
            raise NetworkError(
                f"the disk {self._device} did not take a checkpoint: {error.strerror}"
            ) from error

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
