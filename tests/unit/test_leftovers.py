# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a remusd that was killed has left goes when the next one starts, but nothing that lives."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from remus_colo.errors import NetworkError
from remus_colo.session import leftovers

TAG = f"{os.getpid():06x}"  # other tests may run beside these
TREE = Path(__file__).parents[2]


class Host:
    """:ivar ports: of bridges. :ivar rules: owners of packet rules. :ivar domids: of the domains that there are."""

    def __init__(self) -> None:
        self.links: list[str] = []
        self.ports: dict[str, list[str]] = {}
        self.rules: list[str] = []
        self.domids: list[int] = []

    def delete(self, name: str) -> None:
        self.links.remove(name)

    def name_of(self, path: str) -> str | None:
        return "web" if int(path.split("/")[3]) in self.domids else None


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host()

    def context(**attributes: Any) -> Callable[[], Any]:
        inner = mock.MagicMock(**attributes)
        inner.__enter__.return_value = inner
        return lambda: inner

    monkeypatch.setattr(leftovers, "Links", context(names=lambda: list(made.links), delete_link=made.delete))
    monkeypatch.setattr(leftovers, "Store", context(read=made.name_of))
    monkeypatch.setattr(leftovers, "ports", lambda bridge: made.ports.get(bridge, []))
    monkeypatch.setattr(leftovers.nft, "owners", lambda: list(made.rules))
    monkeypatch.setattr(
        leftovers,
        "QueueRules",
        lambda owner: mock.Mock(remove_stale=lambda: made.rules.remove(owner)),
    )
    return made


def test_links_without_a_session_and_rules_without_a_guest(host: Host) -> None:
    others = ["eth0", "xenbr0", "vif7.0", "rcpabcdef.0", "rcb.0", "rcbabcdef", "rcbABCDEF.0"]
    host.links = [*others, "rcbabcdef.0", "rctabcdef.0", "rctabcdef.1"]
    host.rules = ["pvm_7", "svm_8", "svm_9", "other"]
    host.domids = [7, 9]
    leftovers.clean_up()
    assert host.links == others
    assert host.rules == ["pvm_7", "svm_9", "other"]


def test_a_session_that_lives(host: Host) -> None:
    host.links = [f"rcb{TAG}.0", f"rct{TAG}.0"]
    with leftovers.claim(TAG):
        leftovers.clean_up()
        with pytest.raises(NetworkError, match=f"{TAG} is here already"):
            leftovers.claim(TAG)
    assert len(host.links) == 2
    leftovers.clean_up()
    assert host.links == []


def test_a_session_whose_process_is_killed(host: Host) -> None:
    program = (
        "import os; from remus_colo.session import leftovers; "
        f"claimed = leftovers.claim({TAG!r}); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=TREE, check=False, timeout=60)
    leftovers.claim(TAG).close()


def test_a_copy_that_may_be_all_that_there_is_of_its_guest(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    host.links = ["rcbabcdef.0", "rctabcdef.0"]
    host.ports = {"rcbabcdef.0": ["rctabcdef.0", "vif9.0"]}
    leftovers.clean_up()
    assert len(host.links) == 2
    assert "has left a copy of a guest on the bridge rcbabcdef.0" in caplog.text


def test_what_cannot_be_taken_away(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    host.links = ["rcbabcdef.0"]
    monkeypatch.setattr(host, "delete", mock.Mock(side_effect=NetworkError("it is busy")))
    monkeypatch.setattr(leftovers.Links(), "delete_link", host.delete)
    before = os.listdir("/proc/self/fd")
    leftovers.clean_up()
    assert "it is busy" in caplog.text
    assert os.listdir("/proc/self/fd") == before
