# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a session on the primary host is made of, as far as COLO's and Remus's have it in common."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Protocol

from remus_colo.adapters.backend import Vif
from remus_colo.adapters.netlink import Links
from remus_colo.adapters.xenctrl import Clock, Guest
from remus_colo.session.peer import HeartbeatConfig

EventSink = Callable[..., None]


class Terms(Protocol):
    """What every protection runs with."""

    @property
    def name(self) -> str: ...

    @property
    def heartbeat(self) -> HeartbeatConfig: ...

    @property
    def destination(self) -> str: ...

    @property
    def fence(self) -> tuple[str, ...]: ...


class Layout(Protocol):
    @property
    def vifs(self) -> tuple[Vif, ...]: ...


class Engine(Protocol):
    """The guest: alive or not, with which vifs, and how it is checkpointed."""

    @property
    def guest(self) -> Guest: ...

    @property
    def layout(self) -> Layout: ...

    @property
    def mode(self) -> enum.Enum: ...

    @property
    def clock(self) -> Clock | None: ...

    def close(self) -> None:
        """The guest runs on."""


class VifEnd(Protocol):
    @property
    def vif(self) -> Vif: ...


class Path(Protocol):
    """The guest's network on this host."""

    @property
    def links(self) -> Links: ...

    @property
    def vifs(self) -> Sequence[VifEnd]: ...
