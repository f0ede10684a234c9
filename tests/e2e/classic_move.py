# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run in a dom0: send a domain to another host over xend's relocation protocol, as xend did.

classic_move.py DOMAIN HOST
"""

import socket
import sys

from xen.remus import vm
from xen.xend import XendCheckpoint
from xen.xend.XendOptions import instance

name, host = sys.argv[1:]
with socket.create_connection((host, instance().get_xend_relocation_port())) as sock:
    sock.send(b"receive\n")
    answer = sock.recv(80)
    assert answer == b"(ready receive)\n", answer
    XendCheckpoint.save(sock.fileno(), vm.VM(name), None, True, host, sock=sock)
