# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run in a dom0: take checkpoints of a domain into a file, make one image of them, and the domain anew from that.

classic_image.py DOMAIN FILE
"""

import os
import subprocess
import sys

from xen.remus import image, save, vm
from xen.xend import XendCheckpoint

ROUNDS = 3

name, path = sys.argv[1:]
old = vm.VM(name)
done = 0


def committed():
    global done
    done += 1
    return done < ROUNDS


with open(path + ".checkpoints", "wb") as out:
    save.Saver(old.domid, out, checkpointcb=committed).start()
with open(path, "wb") as out:
    writer = image.Writer(out, compact=True)
    writer.slurp(path + ".checkpoints")
    writer.close()
os.unlink(path + ".checkpoints")
subprocess.run(["xl", "destroy", name], check=True)
with open(path, "rb") as saved:
    new = XendCheckpoint.restore(None, saved.fileno())
os.unlink(path)
assert done == ROUNDS, done
assert new.domid != old.domid, "the old one was not destroyed"
assert (new.name, str(new.vifs[0])) == (old.name, str(old.vifs[0]))
