# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run in a dom0: a script as people wrote them for Xen 4.4's Remus, of nothing but its interface.

classic_script.py DOMAIN ROUNDS
"""

import json
import sys
import time

from xen.remus import save, vm
from xen.remus.device import BufferedNIC, CheckpointedDevice


class Watcher(CheckpointedDevice):
    """Notes when it is called."""

    def __init__(self):
        self.calls = []

    def postsuspend(self):
        self.calls.append("postsuspend")

    def preresume(self):
        self.calls.append("preresume")

    def commit(self):
        self.calls.append("commit")


def main(name, rounds):
    dom = vm.VM(name)
    watcher = Watcher()
    nics = [BufferedNIC(vif) for vif in dom.vifs]
    bufs = [watcher, *nics]
    times = []

    def postsuspend():
        times.append({"suspended_s": time.monotonic()})
        for buf in bufs:
            buf.postsuspend()

    def preresume():
        times[-1]["resuming_s"] = time.monotonic()
        for buf in bufs:
            buf.preresume()

    def commit():
        times[-1]["committed_s"] = time.monotonic()
        for buf in bufs:
            buf.commit()
        return len(times) < rounds

    try:
        save.Saver(name, save.NullSocket(("nowhere", 8002)), postsuspend, preresume, commit, 0, 1).start()
    finally:
        for nic in nics:
            nic.uninstall()
    print(
        json.dumps(
            {
                "domain": dom.name,
                "nics": len(nics),
                "rounds": len(times),
                "calls": watcher.calls,
                "times": times,
            }
        )
    )


main(sys.argv[1], int(sys.argv[2]))
