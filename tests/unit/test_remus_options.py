# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ``remus`` without ``--colo`` means, and which disks it takes along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from remus_colo import cli
from remus_colo.adapters.drbd import parse_protocol
from remus_colo.devices.device import CheckpointedDevice, DeviceSet
from remus_colo.devices.disk import DrbdDisk, replicated_disks
from remus_colo.devices.netbuffer import BufferedVif
from remus_colo.errors import DomainError, NetworkError
from remus_colo.remus_options import RemusOptions

WRITABLE = {"pdev_path": "/dev/vg/web", "vdev": "xvda", "readwrite": 1}


def test_classic_defaults() -> None:
    assert cli.parse(["web"]) == RemusOptions(
        domain="web", destination="localhost", port=8002, interval_s=0.2
    )


def test_every_classic_option() -> None:
    line = "-i 25 -p 9000 --blackhole --no-net --no-compression --timer web backup"
    assert cli.parse(line.split()) == RemusOptions(
        domain="web",
        destination="backup",
        port=9000,
        interval_s=0.025,
        blackhole=True,
        buffer_network=False,
        compression=False,
        timer=True,
    )


def test_zero_is_the_default_as_it_was(tmp_path: Path) -> None:
    assert cli.parse(["-i", "0", "-p", "0", "web"]) == cli.parse(["web"])
    (tmp_path / "config").write_text("(xend-relocation-port 9000)(remus-colo (interval 50))")
    options = cli.parse(["--config", str(tmp_path / "config"), "--interval=0", "--port=0", "web"])
    assert isinstance(options, RemusOptions)
    assert (options.port, options.interval_s) == (9000, 0.05)


def test_a_writable_disk_that_nothing_replicates_is_refused() -> None:
    with pytest.raises(
        DomainError, match=r"web has a writable disk \(xvda\) that nothing replicates.*--no-disk"
    ):
        replicated_disks("web", [WRITABLE])


@pytest.mark.parametrize("options", [{"no_disk": True}, {"blackhole": True}])
def test_unless_the_user_says_so(options: dict[str, bool]) -> None:
    assert replicated_disks("web", [WRITABLE], **options) == []


@pytest.mark.parametrize(
    "disk",
    [
        {"pdev_path": "drbd:r0", "vdev": "xvda", "readwrite": 1},
        {"pdev_path": "r0", "script": "/etc/xen/scripts/block-drbd", "vdev": "xvda", "readwrite": 1},
    ],
)
def test_a_disk_on_drbd_goes_along(disk: dict[str, Any]) -> None:
    (found,) = replicated_disks("web", [disk, {**WRITABLE, "readwrite": 0}])
    assert isinstance(found, DrbdDisk)
    assert found.resource == "r0"


@pytest.mark.parametrize(
    ("shown", "protocol"),
    [("net {\n    protocol D;\n}", "D"), ("\tprotocol           C;\n", "C"), ("syncer { rate 1; }", "")],
)
def test_drbd_tells_its_protocol(shown: str, protocol: str) -> None:
    assert parse_protocol(shown) == protocol


class Recorder(CheckpointedDevice):
    def __init__(self, name: str, order: int, calls: list[str], *, fails: bool = False) -> None:
        self.name, self.calls, self.fails = name, calls, fails
        self.ORDER = order  # type: ignore[misc]

    def setup(self) -> None:
        self.calls.append(f"setup {self.name}")
        if self.fails:
            raise NetworkError("no")

    def commit(self) -> None:
        self.calls.append(f"commit {self.name}")

    def teardown(self, *, drop_held: bool = False) -> None:
        self.calls.append(f"teardown {self.name}")


def test_disks_commit_before_the_network() -> None:
    assert DrbdDisk.ORDER < BufferedVif.ORDER
    calls: list[str] = []
    DeviceSet([Recorder("net", BufferedVif.ORDER, calls), Recorder("disk", DrbdDisk.ORDER, calls)]).commit()
    assert calls == ["commit disk", "commit net"]


def test_a_device_that_cannot_be_set_up_keeps_protection_from_starting() -> None:
    calls: list[str] = []
    devices = DeviceSet(
        [Recorder("a", 0, calls), Recorder("b", 0, calls, fails=True), Recorder("c", 0, calls)]
    )
    with pytest.raises(NetworkError):
        devices.setup()
    assert calls == ["setup a", "setup b", "teardown c", "teardown b", "teardown a"]
