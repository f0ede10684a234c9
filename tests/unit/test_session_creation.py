# SPDX-License-Identifier: LGPL-2.1-or-later
"""CREATE and checkpoints that a primary may send, and those that are refused before anything is done with them."""

from __future__ import annotations

from typing import Any

import pytest

from remus_colo.checkpoint.transfer import Assembler
from remus_colo.errors import MessageError
from remus_colo.relocation import bulk
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.wire import Message
from remus_colo.session.creation import Creation, RemusCreation


def fields(mode: str = "transparent") -> dict[str, Any]:
    vif = {"handle": 0, "vni": 16, "port": 4789, "local": "10.7.0.2", "remote": "fe80::1", "mtu": 1500}
    return {
        "name": "web",
        "mode": mode,
        "config": {"c_info": {"name": "web"}, "b_info": {"max_memkb": 1024}},
        "tunnel": {"tag": "abcdef", "same_host": False, "vifs": [vif] if mode != "remus" else [0]},
        "heartbeat": {"interval_s": 0.25, "timeout_s": 2},
    }


def message(changed: dict[str, Any]) -> Message:
    return Message(MessageType.CREATE, 1, 0, fields=changed)


def test_a_good_one() -> None:
    creation = Creation.parse(message(fields()))
    assert (creation.name, creation.tag, creation.heartbeat.timeout_s) == ("web", "abcdef", 2.0)
    assert (creation.tunnels[0].local, creation.tunnels[0].remote) == ("10.7.0.2", "fe80::1")
    assert creation.limit_pages == 512 + 16384
    assert RemusCreation.parse(message(fields("remus"))).heartbeat == creation.heartbeat


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(
            (("heartbeat", "interval_s"), value)
            for value in (0, -1, 1e-300, float("inf"), 2, 3, None, "x", [])
        ),
        *((("heartbeat", "timeout_s"), value) for value in (0, float("inf"), 1e9)),
        *(
            (("tunnel", "tag"), value)
            for value in ("", "abc", "ABCDEF", "../../", "+1_0a0", "abcdefa", 5, None)
        ),
        *((("tunnel", "vifs", 0, "handle"), value) for value in (float("inf"), None, "x")),
        *((("tunnel", "vifs", 0, "local"), value) for value in ("", "x", {}, "10.7.0.2; reboot")),
        *((("config", "c_info", "name"), value) for value in ("", "-x", "a b", "a\n", None, 5)),
        *((("name",), value) for value in ("", "-x", "web\n<2>root: all is well", "web\0")),
        *((("mode",), value) for value in ("", "fast")),
        *((("host_addresses",), value) for value in ("10.0.0.1", None, ["x"], [None], [{}], {})),
        *((("connections",), value) for value in (None, [], {"0": None}, {"x": []}, {"0": [["10.0.0.1"]]})),
        *((("clock_offset_ns",), value) for value in (1.5, "5", True, [], 1 << 63, -(1 << 63) - 1)),
    ],
)
def test_what_is_refused(path: tuple[Any, ...], value: Any) -> None:
    """An interval of 0 kept the session's loop from ever coming round."""
    changed = holder = fields()
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    with pytest.raises(MessageError, match="CREATE lacks a part or has a malformed one"):
        Creation.parse(message(changed))
    if path[-1] == "name":
        with pytest.raises(MessageError, match="CREATE lacks a part or has a malformed one"):
            RemusCreation.parse(message({**changed, "mode": "remus", "tunnel": fields("remus")["tunnel"]}))


@pytest.mark.parametrize("config", [{}, {"b_info": {}}, {"b_info": {"max_memkb": "x"}}, {"b_info": 5}])
def test_a_guest_of_unknown_size_has_no_limit(config: dict[str, Any]) -> None:
    changed = fields()
    changed["config"] = {"c_info": {"name": "web"}, **config}
    assert Creation.parse(message(changed)).limit_pages is None


@pytest.mark.parametrize("offset_ns", [None, 0, 600 * 10**9, -600 * 10**9])
def test_the_clock_that_the_svm_gets(offset_ns: int | None) -> None:
    assert Creation.parse(message(fields() | {"clock_offset_ns": offset_ns})).clock_offset_ns == offset_ns
    assert Creation.parse(message(fields())).clock_offset_ns is None


def test_the_primarys_own_addresses() -> None:
    created = Creation.parse(message(fields() | {"host_addresses": ["10.77.0.1", "fe80::1"]}))
    assert [str(address) for address in created.host_addresses] == ["10.77.0.1", "fe80::1"]
    assert Creation.parse(message(fields())).host_addresses == ()


def test_connections_that_the_primary_maps() -> None:
    listed = ["10.77.0.5", 80, "10.77.0.9", 40000, 0xFFFFFFFF]
    created = Creation.parse(message(fields() | {"connections": {"0": [listed]}}))
    assert [connection.listed() for connection in created.connections[0]] == [listed]
    assert Creation.parse(message(fields())).connections == {}


def begin(pages: int) -> Message:
    announced = {"pages": pages, "vifs": [], "events": [], "shared_info_gfn": 1, "xen_time_ns": 1}
    return Message(MessageType.CHECKPOINT_BEGIN, 1, 1, fields=announced)


def bulk_message(kind: MessageType, buffers: list[Any]) -> Message:
    return Message(kind, 1, 1, data=b"".join(bytes(buffer) for buffer in buffers))


def test_a_checkpoint_is_no_larger_than_announced_and_no_larger_than_the_guest() -> None:
    with pytest.raises(MessageError, match="is to have 11 pages, at most 10 can be"):
        Assembler(begin(11), 10)
    assembler = Assembler(begin(2), 10)
    pages = bulk_message(MessageType.PAGES, bulk.pages_buffers(bytes(16), bytes(2 * 4096)))
    assembler.add(pages)
    with pytest.raises(MessageError, match="has more than the 2 pages announced"):
        assembler.add(pages)


def test_a_state_that_nobody_knows() -> None:
    with pytest.raises(MessageError, match="has a state 'other', which nobody knows"):
        Assembler(begin(0)).add(bulk_message(MessageType.STATE, bulk.state_buffers("other", b"x")))
