# SPDX-License-Identifier: LGPL-2.1-or-later
"""A LAN that is unplugged here tells nothing of the guest."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from unittest import mock

import pytest

from remus_colo.failover.arbiter import Verdict
from remus_colo.session import lan
from remus_colo.session.lan import LanSide, probe_guest, unplugged


@pytest.fixture
def carriers(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | OSError]:
    """By link: what the kernel tells of it."""
    found: dict[str, str | OSError] = {}

    def read(path: Path) -> str:
        told = found.get(path.parent.name if path.name == "carrier" else str(path), FileNotFoundError())
        if isinstance(told, OSError):
            raise told
        return told

    monkeypatch.setattr(lan.Path, "read_text", read)
    monkeypatch.setattr(lan, "ports", lambda bridge: ["eth0", "eth1", "vif7.0"] if bridge == "xenbr0" else [])
    return found


@pytest.mark.parametrize(
    ("eth0", "eth1", "gone"),
    [("1\n", "0\n", False), ("0\n", OSError(22, "down"), True), ("0\n", "0\n", True)],
)
def test_a_bridge_all_of_whose_uplinks_have_no_carrier(
    carriers: dict[str, str | OSError], eth0: str, eth1: str | OSError, gone: bool
) -> None:
    carriers.update({"eth0": eth0, "eth1": eth1, "xenbr0": "1\n", "vif7.0": "1\n"})
    assert unplugged("xenbr0") is gone
    assert unplugged("eth0") is (eth0 == "0\n")
    assert not unplugged("one that nothing is known of")


def test_where_the_lan_is(carriers: dict[str, str | OSError]) -> None:
    """Where a guest is, is none, whatever its vif is called (vifname=); a bridge with VLANs is asked for its own."""
    assert lan.ways_to_lan("xenbr0") == ["eth0", "eth1"]
    carriers["/sys/class/net/eth1/device/modalias"] = "xen-backend:vif\n"
    carriers["/sys/class/net/eth0/device/modalias"] = "pci:v00008086d0000100E\n"
    assert lan.ways_to_lan("xenbr0") == ["eth0"]
    assert lan.ways_to_lan("internal") == ["internal"]
    for filtering, ways in (("0\n", ["eth0"]), ("1\n", ["xenbr0"])):
        carriers["/sys/class/net/xenbr0/bridge/vlan_filtering"] = filtering
        assert lan.ways_to_lan("xenbr0") == ways


@pytest.mark.parametrize(("carrier", "verdict"), [("1\n", Verdict.DEAD), ("0\n", Verdict.UNKNOWN)])
def test_silence_where_nobody_is_known(
    carriers: dict[str, str | OSError],
    monkeypatch: pytest.MonkeyPatch,
    carrier: str,
    verdict: Verdict,
) -> None:
    """Such a LAN is taken to work, but not without a carrier: this host may be the one that is cut off."""
    carriers.update({"eth0": carrier, "eth1": carrier})
    raw = mock.MagicMock()
    raw.__enter__.return_value.recv.return_value = None
    monkeypatch.setattr(lan, "RawLink", lambda *_: raw)
    monkeypatch.setattr(lan.select, "select", lambda *_: None)
    side = LanSide(["xenbr0"], bytes(6), bytes(6), [ip_address("10.77.0.20")], [])
    assert probe_guest([side], 0.2) is verdict
