# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run in a dom0: save a domain to a file by xen.xend.XendCheckpoint, and make it anew from that.

classic_save.py DOMAIN FILE
"""

import os
import sys

from xen.remus import vm
from xen.xend import XendCheckpoint

name, path = sys.argv[1:]
old = vm.VM(name)
out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
XendCheckpoint.save(out, old, None, False, None)
os.close(out)
saved = os.open(path, os.O_RDONLY)
new = XendCheckpoint.restore(None, saved)
os.close(saved)
os.unlink(path)
assert new.domid != old.domid, "the old one was not destroyed"
assert (new.name, str(new.vifs[0])) == (old.name, str(old.vifs[0]))
print(new)
