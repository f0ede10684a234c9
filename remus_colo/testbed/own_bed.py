# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the commands that bring up a bed of their own have in common: it goes with them, however they end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from remus_colo.testbed import machine
from remus_colo.testbed.bed import Bed
from remus_colo.testbed.errors import BedError


def new_bed(name: str) -> Bed:
    """:raise BedError: there is one of that name."""
    bed = Bed(name)
    if bed.directory.exists():
        raise BedError(f"the bed '{bed.name}' exists: take another name, or take it down first")
    return bed


@contextlib.contextmanager
def own_bed(name: str) -> Iterator[Bed]:
    """A bed that is up, on a machine that has what it needs; down afterwards.

    :raise BedError: it cannot be had.
    """
    machine.setup()
    bed = new_bed(name)
    try:
        bed.up()
        yield bed
    finally:
        bed.down()
