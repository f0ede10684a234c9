# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run in a dom0: a control program of the classic interface alone, that protects a domain until SIGTERM.

classic_control.py DOMAIN HOST INTERVAL_MS
"""

import signal
import sys
import time

from xen.remus import save, vm
from xen.remus.device import BufferedNIC, ReplicatedDisk, ReplicatedDiskException
from xen.xend import XendOptions


class Signalled(Exception):
    pass


def on_signal(number, frame):
    raise Signalled(number)


class Rounds:
    """The three hooks, and the time between them."""

    def __init__(self, devices, interval_ms):
        self.devices = devices
        self.interval_s = interval_ms / 1000
        self.count = 0
        self.began_s = 0.0

    def postsuspend(self):
        self.began_s = time.time()
        for device in self.devices:
            device.postsuspend()

    def preresume(self):
        for device in self.devices:
            device.preresume()

    def commit(self):
        for device in self.devices:
            device.commit()
        self.count += 1
        print("committed", self.count, flush=True)
        time.sleep(max(0, self.interval_s - (time.time() - self.began_s)))
        return True


def main(name, host, interval_ms):
    signal.signal(signal.SIGTERM, on_signal)
    dom = vm.VM(name)
    devices = []
    # disks before the network, which is let go when they are safe
    for disk in dom.disks:
        try:
            devices.append(ReplicatedDisk(disk))
        except ReplicatedDiskException as error:
            print(error)
    devices += [BufferedNIC(vif) for vif in dom.vifs]
    rounds = Rounds(devices, interval_ms)
    fd = save.MigrationSocket((host, XendOptions.instance().get_xend_relocation_port()))
    status = 0
    try:
        save.Saver(name, fd, rounds.postsuspend, rounds.preresume, rounds.commit, 0, 1).start()
    except save.CheckpointError as error:
        print("failed:", error)
        status = 1
    except Signalled:
        print("signalled")
    for device in devices:
        device.uninstall()
    return status


sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
