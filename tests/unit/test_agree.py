# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ``remus`` and the backup agree on before a guest is copied: the clocks are measured, and the mode
follows from them.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from remus_colo import cli, primary
from remus_colo.checkpoint.guestinfo import Mode
from remus_colo.errors import PeerLost
from remus_colo.options import ColoOptions
from remus_colo.relocation.channel import Channel
from remus_colo.relocation.pairing import Pairing
from remus_colo.session.colo_primary import ColoConfig

TEN_MINUTES_NS = 600 * 10**9
# The two ends are threads of one process, and the machine may be busy.
CLOSE_NS = 2 * 10**9


class Engine:
    """As :class:`remus_colo.checkpoint.pvm.PvmEngine`, of a guest whose clock is ``ahead_ns`` of the backup's Xen."""

    def __init__(self, ahead_ns: int) -> None:
        self.mode = Mode.TRANSPARENT
        self.clock = SimpleNamespace(now_ns=lambda: time.monotonic_ns() + ahead_ns)
        self.guest = SimpleNamespace(map_memory=lambda: None)
        self.layout = SimpleNamespace(vifs=())

    def uses_two_level_events(self) -> bool:
        return True


def agree(
    ahead_ns: int, *, settable: bool, checkpoint: str = "auto"
) -> tuple[ColoConfig, Engine, dict[str, Any]]:
    """What comes of it, the engine, and what was told of the mode."""
    told: dict[str, Any] = {}
    pairing = Pairing(time.monotonic_ns, lambda *_: None, settable_clock=settable)
    listener = socket.create_server(("127.0.0.1", 0))
    ours = socket.create_connection(listener.getsockname())
    theirs, _ = listener.accept()
    listener.close()
    control, peer = Channel(ours, generation=1, peer="backup"), Channel(theirs, generation=1, peer="primary")

    def answer() -> None:
        with contextlib.suppress(PeerLost):  # it has heard all that it wants
            pairing._await_create(peer)

    backup = threading.Thread(target=answer)
    backup.start()
    options = cli.parse(["--colo", "--checkpoint", checkpoint, "web", "backup"])
    assert isinstance(options, ColoOptions)
    engine: Any = Engine(ahead_ns)
    try:
        config = primary.agree(
            options, "web", engine, control, 1, lambda event, **fields: told.update(fields)
        )
    finally:
        control.close()
        backup.join()
        peer.close()
    return config, engine, told


@pytest.mark.parametrize("ahead_ns", [TEN_MINUTES_NS, -TEN_MINUTES_NS, 0])
def test_a_backup_that_can_set_the_clock_is_asked_for_the_guests(ahead_ns: int) -> None:
    config, engine, told = agree(ahead_ns, settable=True)
    assert config.mode is engine.mode is Mode.TRANSPARENT
    assert config.clock_offset_ns is not None
    assert (
        abs(config.clock_offset_ns - ahead_ns) < CLOSE_NS
    )  # added to the backup's Xen time it is the guest's
    assert told["clock_offset_ms"] == round(-config.clock_offset_ns / 1e6, 3)
    assert "lets a guest keep its own" in told["why"]


@pytest.mark.parametrize(("ahead_ns", "effect"), [(TEN_MINUTES_NS, "stand still"), (-TEN_MINUTES_NS, "jump")])
def test_one_that_cannot_gets_a_guest_that_suspends_itself(ahead_ns: int, effect: str) -> None:
    config, engine, told = agree(ahead_ns, settable=False)
    assert config.mode is engine.mode is Mode.COOPERATIVE
    assert config.clock_offset_ns is None
    assert effect in told["why"]


def test_a_guest_that_suspends_itself_keeps_its_hosts_clock() -> None:
    config, _, _ = agree(TEN_MINUTES_NS, settable=True, checkpoint="cooperative")
    assert config.mode is Mode.COOPERATIVE
    assert config.clock_offset_ns is None
