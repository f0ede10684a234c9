# SPDX-License-Identifier: LGPL-2.1-or-later
"""What of the network adapters can be told without root; the rest is in tests/netns."""

from __future__ import annotations

import os

import pytest

from remus_colo.adapters import kmod, nft
from remus_colo.adapters.nft import QueueRule, QueueRules
from remus_colo.adapters.packetqueue import ENVIRONMENT, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Form, open_queue
from remus_colo.adapters.packetqueue_reference import _ip_length
from remus_colo.errors import ConfigError, HostError, NetworkError


def test_missing_module_names_it_its_purpose_and_the_way_out() -> None:
    with pytest.raises(HostError) as caught:
        kmod.load("remus_no_such_module", "this test")
    for part in ("remus_no_such_module", "this test", "modprobe remus_no_such_module"):
        assert part in str(caught.value)
    assert not kmod.is_present("remus_no_such_module")


def test_missing_modprobe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmod.shutil, "which", lambda *_args, **_kwargs: None)
    with pytest.raises(HostError, match="modprobe is not installed"):
        kmod.load("remus_no_such_module", "this test")


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "a b", "x;y"])
def test_what_is_no_module_name(name: str) -> None:
    with pytest.raises(ValueError, match="no name of a kernel module"):
        kmod.load(name, "this test")


def test_missing_nft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nft.shutil, "which", lambda *_args, **_kwargs: None)
    monkeypatch.setattr(nft.os, "geteuid", lambda: 0)
    with pytest.raises(HostError, match="install the package nftables"):
        QueueRules("test").hold_from_guest("vif1.0", 1)


def test_rules_are_one_transaction() -> None:
    script = nft._script("remus_colo_x", [QueueRule("vif1.0", 7, True), QueueRule("vif1.0", 8, False)])
    assert script.splitlines() == [
        "add table bridge remus_colo_x",
        "add chain bridge remus_colo_x from_guest { type filter hook prerouting priority -250; policy accept; }",
        'add rule bridge remus_colo_x from_guest iifname "vif1.0" queue num 7 bypass',
        "add chain bridge remus_colo_x to_guest { type filter hook postrouting priority 350; policy accept; }",
        'add rule bridge remus_colo_x to_guest oifname "vif1.0" queue num 8 bypass',
    ]


@pytest.mark.parametrize("vif", ["", 'a"b', "a b", "x" * 16, "a;flush ruleset", "vif1.0*"])
def test_what_cannot_stand_in_a_rule(vif: str) -> None:
    with pytest.raises(NetworkError, match="no name of a vif"):
        QueueRule(vif, 1, from_guest=True)


@pytest.mark.parametrize("owner", ["", "a b", "a;b", "a.b", "x" * 41])
def test_what_cannot_be_an_owner(owner: str) -> None:
    with pytest.raises(ValueError, match="owner="):
        QueueRules(owner)


@pytest.mark.parametrize("queue", [-1, 65536])
def test_queue_numbers_out_of_range(queue: int) -> None:
    with pytest.raises(ValueError, match="queue"):
        QueueRule("vif1.0", queue, from_guest=True)
    with pytest.raises(ValueError, match="queue_num"):
        open_queue(queue, lambda *_: None, 1)


def test_the_form_of_the_queue_is_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert Form.chosen() is Form.NATIVE
    monkeypatch.setenv(ENVIRONMENT, "netfilterqueue")
    assert Form.chosen() is Form.NETFILTERQUEUE
    monkeypatch.setenv(ENVIRONMENT, "fast")
    with pytest.raises(
        ConfigError, match="REMUS_COLO_QUEUE=fast is not known: set it to native or netfilterqueue"
    ):
        open_queue(7, lambda *_: None, 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="as an ordinary user only")
def test_queue_without_permission() -> None:
    with pytest.raises(HostError, match="run as root"):
        open_queue(7, lambda *_: None, 1)


def test_rules_without_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nft.os, "geteuid", lambda: 65534)
    with pytest.raises(HostError, match="run as root"):
        QueueRules("test").hold_from_guest("vif1.0", 1)


def test_length_by_the_ip_header() -> None:
    assert _ip_length(bytes([0x45, 0, 0x12, 0x34]), ETHERTYPE_IPV4) == 0x1234
    assert _ip_length(bytes([0x60, 0, 0, 0, 0x01, 0x00]), ETHERTYPE_IPV6) == 0x128
    assert _ip_length(b"\x45", ETHERTYPE_IPV4) == 0
    assert _ip_length(bytes(46), 0x0806) == 0
