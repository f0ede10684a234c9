# SPDX-License-Identifier: LGPL-2.1-or-later
"""The memory for whole copies of a guest.  What goes into them: property/test_delta_properties.py."""

from __future__ import annotations

import os

import pytest

from remus_colo.adapters import memory
from remus_colo.checkpoint import fullcopy
from remus_colo.errors import HostError


def test_two_copies_of_a_guest_that_this_host_has_no_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < memory.available_bytes() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(memory, "available_bytes", lambda: 300 << 20)
    fullcopy.refuse_without_memory(300 << 20)
    with pytest.raises(
        HostError, match="takes 301 MiB of dom0's memory, and 300 MiB are left: give dom0 more"
    ):
        fullcopy.refuse_without_memory(301 << 20)


def test_an_images_room_is_there_before_it_is_taken() -> None:
    image = fullcopy.Image()
    image.reserve(1 << 20)
    assert os.fstat(image._fd).st_blocks * 512 >= 1 << 20
    os.pwrite(image._fd, b"guest", 0)
    image._length = 5
    assert bytes(image.view()) == b"guest"
    image.close()
