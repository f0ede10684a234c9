# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ``remus`` runs with when it is not asked for COLO."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from remus_colo import options as defaults
from remus_colo.errors import ConfigError
from remus_colo.options import ProtectionOptions, protection_arguments


@dataclass(frozen=True, slots=True)
class RemusOptions(ProtectionOptions):
    """What ``remus`` without ``--colo`` is to do. Times are in seconds.

    :param interval_s: from one checkpoint to the next.
    :param blackhole: checkpoints go nowhere: what they cost, without a backup.
    :param buffer_network: hold the guest's output until the backup has the checkpoint that it belongs to.
    :param timer: suspend the guest at each interval by a clock, whatever the checkpoint before has come to.
    :param no_disk: leave out disks that are not replicated.
    """

    interval_s: float = defaults.DEFAULT_INTERVAL_MS / 1000
    blackhole: bool = False
    buffer_network: bool = True
    compression: bool = True
    timer: bool = False
    no_disk: bool = False

    def __post_init__(self) -> None:
        ProtectionOptions.__post_init__(self)  # slots make a new class, which super() does not know
        if not self.interval_s > 0:
            raise ConfigError("--interval must be at least 1 ms")


def from_arguments(given: argparse.Namespace, notes: list[str]) -> RemusOptions:
    """:raise ConfigError: they are wrong."""
    interval_ms = defaults.DEFAULT_INTERVAL_MS if given.interval is None else given.interval
    return RemusOptions(
        **protection_arguments(given, notes),
        interval_s=interval_ms / 1000,
        blackhole=given.blackhole,
        buffer_network=not given.no_net,
        compression=given.compression,
        timer=given.timer,
        no_disk=given.no_disk,
    )
