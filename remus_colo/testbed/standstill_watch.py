# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long a domain is stopped, again and again, as its host sees it; run in a dom0::

    python3 -m remus_colo.testbed.standstill_watch DOMID SECONDS

A checkpoint stops the guest from its own suspend call, or Xen's pause, until it is resumed.  Xen is asked for
the domain's state as often as it can be, whoever stops it, so that two toolstacks are measured alike.  Prints
one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

from remus_colo.adapters import bindings

# Between two looks: the guest and what checkpoints it need the processor, too.
PERIOD_S = 0.0005


@dataclass(frozen=True, slots=True)
class Seen:
    """:param stops_ms: each time that the domain was stopped, from the first look that saw it so to the first
        that did not.
    :param resolution_ms: between two looks, in the mean.
    """

    stops_ms: list[float]
    resolution_ms: float


def evaluate(looks: Iterable[tuple[float, bool]]) -> Seen:
    """What came of looks at a domain: when, in seconds, and whether it was stopped.

    A stop that was under way at the first look, or is at the last, has no known length and does not count.
    """
    stops_ms: list[float] = []
    since_s: float | None = None
    first_s = last_s = 0.0
    count, was_stopped = 0, True
    for now_s, is_stopped in looks:
        if is_stopped and not was_stopped:
            since_s = now_s
        elif not is_stopped and since_s is not None:
            stops_ms.append(round((now_s - since_s) * 1000, 3))
            since_s = None
        was_stopped, last_s = is_stopped, now_s
        first_s = first_s if count else now_s
        count += 1
    return Seen(stops_ms, round((last_s - first_s) * 1000 / max(1, count - 1), 3))


def look(stopped: Callable[[], bool], seconds: float) -> Iterator[tuple[float, bool]]:
    end_s = time.monotonic() + seconds
    while (now_s := time.monotonic()) < end_s:
        yield now_s, stopped()
        time.sleep(PERIOD_S)


def main() -> int:
    domid, seconds = int(sys.argv[1]), float(sys.argv[2])
    xc = bindings.lowlevel("xc").xc()

    def stopped() -> bool:
        (info,) = xc.domain_getinfo(domid, 1)
        if info["domid"] != domid:
            raise SystemExit(f"there is no domain {domid} any more")
        return bool(info["paused"] or info["shutdown"])

    print(json.dumps(asdict(evaluate(look(stopped, seconds)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
