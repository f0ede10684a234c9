# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections that ``remusd`` maps since a failover, for the ``remus`` that protects the guest from there.

It tells the next backup host, which would not know otherwise in which numbers clients speak: the guest's
memory, of which that host gets a copy, has the SVM's own.  After the failover no connection gets a mapping
any more, so what is told once is enough.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from remus_colo.proxy.rewriter import CONNECTIONS_LIMIT, Connection
from remus_colo.session.lock import RUN_DIR

log = logging.getLogger(__name__)

PUBLISH_S = 10.0  # what has ended may be told of so long


def _file(domid: int) -> Path:
    return RUN_DIR / f"connections-{domid}.json"


def publish(domid: int, connections: Mapping[int, Sequence[Connection]]) -> None:
    """:param connections: by vif handle."""
    left, told = CONNECTIONS_LIMIT, {}
    for handle, mapped in connections.items():
        if mapped[:left]:
            told[str(handle)] = [connection.listed() for connection in mapped[:left]]
            left -= len(told[str(handle)])
    if not told:
        remove(domid)
        return
    target = _file(domid)
    fresh = target.with_suffix(".new")
    try:
        RUN_DIR.mkdir(mode=0o755, exist_ok=True)
        fresh.write_text(json.dumps(told), encoding="ascii")
        os.replace(fresh, target)
    except OSError as error:
        log.warning("connections that would not live through another failover cannot be told: %s", error)


def remove(domid: int) -> None:
    """Idempotent."""
    try:
        _file(domid).unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s", error)


def read(domid: int) -> dict[str, Any]:
    """As CREATE has it; empty if there are none."""
    try:
        told = json.loads(_file(domid).read_text(encoding="ascii"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("connections that have lived through a failover will not do so again: %s", error)
        return {}
    return told if isinstance(told, dict) else {}
