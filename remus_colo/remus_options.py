# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ``remus`` runs with when it is not asked for COLO."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from remus_colo import options as defaults
from remus_colo.errors import ConfigError
from remus_colo.options import TlsFiles, check_heartbeat, check_port, check_word, split_command, tls_files


@dataclass(frozen=True, slots=True)
class RemusOptions:
    """What ``remus`` without ``--colo`` is to do. Times are in seconds.

    :param domain: name or domid.
    :param interval_s: from one checkpoint to the next.
    :param blackhole: checkpoints go nowhere: what they cost, without a backup.
    :param buffer_network: hold the guest's output until the backup has the checkpoint that it belongs to.
    :param timer: suspend the guest at each interval by a clock, whatever the checkpoint before has come to.
    :param no_disk: leave out disks that are not replicated.
    :param fence: the hook's command line, empty for none.
    :param tls: None: the connections are plain.
    """

    domain: str
    destination: str = "localhost"
    port: int = defaults.DEFAULT_PORT
    interval_s: float = defaults.DEFAULT_INTERVAL_MS / 1000
    blackhole: bool = False
    buffer_network: bool = True
    compression: bool = True
    timer: bool = False
    no_disk: bool = False
    heartbeat_interval_s: float = defaults.DEFAULT_HEARTBEAT_INTERVAL_MS / 1000
    heartbeat_timeout_s: float = defaults.DEFAULT_HEARTBEAT_TIMEOUT_MS / 1000
    fence: tuple[str, ...] = ()
    tls: TlsFiles | None = None
    log: Path | None = None
    status_json: bool = False
    verbose: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_word("the domain", self.domain)
        check_word("the destination", self.destination)
        check_port(self.port)
        check_heartbeat(self.heartbeat_interval_s, self.heartbeat_timeout_s)
        if not self.interval_s > 0:
            raise ConfigError("--interval must be at least 1 ms")


def from_arguments(given: argparse.Namespace, notes: list[str]) -> RemusOptions:
    """:raise ConfigError: they are wrong."""
    interval_ms = defaults.DEFAULT_INTERVAL_MS if given.interval is None else given.interval
    return RemusOptions(
        domain=given.domain,
        destination=given.destination,
        port=given.port,
        interval_s=interval_ms / 1000,
        blackhole=given.blackhole,
        buffer_network=not given.no_net,
        compression=given.compression,
        timer=given.timer,
        no_disk=given.no_disk,
        heartbeat_interval_s=given.heartbeat_interval / 1000,
        heartbeat_timeout_s=given.heartbeat_timeout / 1000,
        fence=split_command("--fence", given.fence),
        tls=tls_files(given),
        log=given.log,
        status_json=given.status_json,
        verbose=given.verbose,
        notes=tuple(notes),
    )
