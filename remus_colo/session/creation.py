# SPDX-License-Identifier: LGPL-2.1-or-later
"""CREATE messages, checked: what a primary asks this host to protect."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Any, Protocol

from remus_colo.checkpoint.guestinfo import Mode
from remus_colo.errors import ConfigError, MessageError
from remus_colo.options import check_word
from remus_colo.proxy.announce import Address
from remus_colo.proxy.primary_path import Tunnel
from remus_colo.proxy.rewriter import Connection
from remus_colo.relocation.wire import Message
from remus_colo.session.peer import HeartbeatConfig

# Six hexadecimal digits, which become part of links' names.
_TAG = re.compile(r"[0-9a-f]{6}")
SPECIAL_PAGES = 16384
# Of one checkpoint of Remus's, if its guest's memory is not told.
CHECKPOINT_LIMIT_BYTES = 4 << 30
_MALFORMED = (ConfigError, KeyError, OverflowError, TypeError, ValueError)


class AnyCreation(Protocol):
    """What every CREATE has."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def same_host(self) -> bool: ...

    @property
    def heartbeat(self) -> HeartbeatConfig: ...

    @property
    def clock_offset_ns(self) -> int | None:
        """The SVM gets the PVM's clock, by this at first; None: it takes this host's when it resumes."""


def _check_names(named: Any, config: dict[str, Any]) -> None:
    """That the guest goes by, in the log and for the fencing hook, and that of its domain."""
    for name in (named, config["c_info"]["name"]):
        if not isinstance(name, str):
            raise TypeError(f"the domain's name is {name!r}")
        check_word("the domain", name)


def _address(text: str | None) -> str | None:
    """:raise ValueError: it is no address, or TypeError: it is nothing like one."""
    return None if text is None else str(ipaddress.ip_address(str(text)))


def _host_addresses(listed: object) -> tuple[Address, ...]:
    """:raise ValueError: one is no address, or TypeError: it is no list."""
    if not isinstance(listed, list):
        raise TypeError(f"the primary's addresses are {listed!r:.80}")
    return tuple(ipaddress.ip_address(str(text)) for text in listed)


def _connections(listed: object) -> dict[int, tuple[Connection, ...]]:
    """:raise ValueError, TypeError: it is nothing of the kind."""
    if not isinstance(listed, dict):
        raise TypeError(f"the guest's connections are {listed!r:.80}")
    return {int(handle): tuple(map(Connection.parse, connections)) for handle, connections in listed.items()}


def _offset_ns(value: object) -> int | None:
    """:raise TypeError, ValueError: it is nothing that can be added to a clock of signed 64-bit nanoseconds."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"the clock's offset is {value!r}")
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"the clock's offset of {value} ns is beyond any clock")
    return value


@dataclass(frozen=True, slots=True)
class Creation:
    """A CREATE message, checked."""

    name: str
    mode: Mode
    config: dict[str, Any]
    tag: str
    same_host: bool
    tunnels: dict[int, Tunnel]
    mtus: dict[int, int]
    heartbeat: HeartbeatConfig
    clock_offset_ns: int | None = None  # the SVM gets the PVM's clock, by this at first
    host_addresses: tuple[Address, ...] = ()  # the primary's own
    # that the primary maps, by vif handle, since the guest has lived through a failover
    connections: dict[int, tuple[Connection, ...]] = field(default_factory=dict)

    @classmethod
    def parse(cls, message: Message) -> Creation:
        """:raise MessageError: a part is missing or malformed."""
        fields = message.fields
        try:
            tunnel = fields["tunnel"]
            vifs = tunnel["vifs"]
            config = dict(fields["config"])
            _check_names(fields["name"], config)
            if not _TAG.fullmatch(tunnel["tag"]):
                raise ValueError(f"{tunnel['tag']!r} is no tag")
            return cls(
                name=fields["name"],
                mode=Mode(fields["mode"]),
                config=config,
                tag=tunnel["tag"],
                same_host=bool(tunnel["same_host"]),
                tunnels={
                    int(vif["handle"]): Tunnel(
                        int(vif["vni"]), int(vif["port"]), _address(vif["local"]), _address(vif["remote"])
                    )
                    for vif in vifs
                },
                mtus={int(vif["handle"]): int(vif["mtu"]) for vif in vifs},
                heartbeat=HeartbeatConfig.parse(fields["heartbeat"]),
                clock_offset_ns=_offset_ns(fields.get("clock_offset_ns")),
                host_addresses=_host_addresses(fields.get("host_addresses", [])),
                connections=_connections(fields.get("connections", {})),
            )
        except _MALFORMED as error:
            raise MessageError(f"CREATE lacks a part or has a malformed one: {error!r}") from error

    @property
    def limit_pages(self) -> int | None:
        """More pages than these are no checkpoint of that guest: twice its memory, for what Xen adds to it."""
        try:
            return int(self.config["b_info"]["max_memkb"]) // 2 + SPECIAL_PAGES
        except (KeyError, OverflowError, TypeError, ValueError):
            return None


@dataclass(frozen=True, slots=True)
class RemusCreation:
    """A CREATE message of mode "remus", checked."""

    name: str
    config: dict[str, Any]
    same_host: bool
    handles: tuple[int, ...]
    heartbeat: HeartbeatConfig
    clock_offset_ns: int | None = None  # the guest takes this host's clock when it resumes

    @classmethod
    def parse(cls, message: Message) -> RemusCreation:
        """:raise MessageError: a part is missing or malformed."""
        fields = message.fields
        try:
            config = dict(fields["config"])
            _check_names(fields["name"], config)
            return cls(
                name=fields["name"],
                config=config,
                same_host=bool(fields["tunnel"]["same_host"]),
                handles=tuple(int(handle) for handle in fields["tunnel"]["vifs"]),
                heartbeat=HeartbeatConfig.parse(fields["heartbeat"]),
            )
        except _MALFORMED as error:
            raise MessageError(f"CREATE lacks a part or has a malformed one: {error!r}") from error

    @property
    def limit_bytes(self) -> int:
        """More than this is no checkpoint of that guest: twice its memory, for what the stream has besides."""
        try:
            return int(self.config["b_info"]["max_memkb"]) * 1024 * 2
        except (KeyError, OverflowError, TypeError, ValueError):
            return CHECKPOINT_LIMIT_BYTES
