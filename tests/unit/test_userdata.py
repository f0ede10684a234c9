# SPDX-License-Identifier: LGPL-2.1-or-later
"""libxl's record of a domain's configuration, in a directory of ours."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from remus_colo.adapters import userdata
from remus_colo.errors import HostError

UUID = "0b8b4567-327b-23c6-643c-986966334873"


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    store = mock.MagicMock()
    store.__enter__.return_value.read = {"/local/domain/7/vm": f"/vm/{UUID}"}.get
    with (
        mock.patch.object(userdata, "DIRECTORY", tmp_path),
        mock.patch.object(userdata, "Store", lambda: store),
    ):
        yield tmp_path


def record(directory: Path) -> Path:
    return directory / f"userdata-d.7.{UUID}.libxl-json"


def move(config: dict[str, Any]) -> None:
    config["nics"][0]["bridge"] = "xenbr0"


def test_a_change(directory: Path) -> None:
    record(directory).write_text(
        '{"nics": [{"bridge": "rcb1.0", "devid": 0}], "big": 18446744073709551615}\0'
    )
    userdata.change(7, move)
    text = record(directory).read_text()
    assert text.endswith("\0")
    assert json.loads(text[:-1]) == {
        "nics": [{"bridge": "xenbr0", "devid": 0}],
        "big": (1 << 64) - 1,
    }
    assert os.listdir(directory) == [record(directory).name]
    assert record(directory).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [None, b"", b"[", b"{}"])
def test_what_is_no_configuration_stays_as_it_is(directory: Path, content: bytes | None) -> None:
    if content is not None:
        record(directory).write_bytes(content)
    with pytest.raises(HostError, match="stays as it was"):
        userdata.change(7, move)
    assert (record(directory).read_bytes() if record(directory).exists() else None) == content
    assert set(os.listdir(directory)) <= {record(directory).name}


def test_a_domain_that_xenstore_does_not_know(directory: Path) -> None:
    with pytest.raises(HostError, match="domain 8 has no UUID"):
        userdata.change(8, move)


def test_waits_for_who_has_the_lock(directory: Path) -> None:
    """As libxl does: the lock's file goes with the lock, and another one comes."""
    record(directory).write_text('{"nics": [{"bridge": "rcb1.0"}]}\0')
    lock = directory / f"userdata-l.7.{UUID}.domain-userdata-lock"
    held = os.open(lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    began = threading.Event()

    def change() -> None:
        began.set()
        userdata.change(7, move)

    thread = threading.Thread(target=change)
    thread.start()
    began.wait()
    assert "rcb1.0" in record(directory).read_text()
    lock.unlink()
    os.close(held)
    thread.join(30)
    assert "xenbr0" in record(directory).read_text()
    assert not lock.exists()
