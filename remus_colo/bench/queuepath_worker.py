# SPDX-License-Identifier: LGPL-2.1-or-later
"""What holds and releases the packets in :mod:`remus_colo.bench.queuepath`: a process in the host's namespace.

``python3 -m remus_colo.bench.queuepath_worker bare|colo QUEUE VIF LINK``.  Prints "ready", runs until
SIGTERM, and prints its counters as one JSON object.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from typing import Any, NoReturn

from remus_colo.adapters.nft import QueueRules


def _end(*_: object) -> NoReturn:
    raise SystemExit


def bare(queue_number: int, vif: str) -> dict[str, Any]:
    """As short as NetfilterQueue lets a program be: accept everything."""
    import netfilterqueue

    def accept(packet: Any) -> None:
        packet.accept()

    queue = netfilterqueue.NetfilterQueue()
    queue.bind(queue_number, accept, max_len=16384, sock_len=32 << 20)
    rules = QueueRules("bench")
    rules.hold_from_guest(vif, queue_number)
    print("ready", flush=True)
    try:
        queue.run()
    except SystemExit:
        queue.unbind()
    rules.remove()
    return {}


def colo(queue_number: int, vif: str, link: str) -> dict[str, Any]:
    """The PVM's output as ``remus --colo`` treats it: its loop, its comparator, protected since the first
    checkpoint.
    """
    from remus_colo.proxy.comparator import CheckpointRequest, CompareConfig
    from remus_colo.proxy.output import Output
    from remus_colo.session.loop import Loop

    rules = QueueRules("bench")
    requests: list[CheckpointRequest] = []
    loop = Loop()
    output = Output(loop, vif, link, CompareConfig(), requests.append)
    output.start(queue_number, rules)
    output.cut()
    output.commit()
    output.secondary_resumed()
    print("ready", flush=True)
    with contextlib.suppress(SystemExit):
        loop.run()
    counters = output.counters()
    output.close(drop_held=False)
    rules.remove()
    loop.close()
    return {"counters": counters, "requests": [f"{request.reason}: {request.detail}" for request in requests]}


def main(argv: list[str]) -> int:
    form, queue_number, vif, link = argv
    signal.signal(signal.SIGTERM, _end)
    figures = bare(int(queue_number), vif) if form == "bare" else colo(int(queue_number), vif, link)
    print(json.dumps(figures), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
