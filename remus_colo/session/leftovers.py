# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a ``remusd`` that was killed has left on the backup host: bridges and tunnels without a session, rules
without a guest.

A session has a name in the kernel for as long as its process lives, by the tag of its links: so those of a
session that lives, in this ``remusd`` or another, are left alone.  So is the SVM, and whatever it is attached
to: if the primary's host is dead, it is all that there is of the guest.
"""

from __future__ import annotations

import errno
import logging
import re
import socket

from remus_colo.adapters import nft
from remus_colo.adapters.netlink import Links
from remus_colo.adapters.nft import QueueRules
from remus_colo.adapters.xenstore import Store
from remus_colo.errors import NetworkError, RemusError
from remus_colo.session.lan import ports

log = logging.getLogger(__name__)

# backup_path.bridge_name and primary_path.backup_ifname; what create_vxlan makes beside a tunnel goes with it
_LINK = re.compile(r"rc[bt](?P<tag>[0-9a-f]{6})\.\d+")
_RULES = re.compile(r"svm_(?P<domid>\d+)")


def claim(tag: str) -> socket.socket:
    """Until it is closed, or this process ends, links with this tag belong to a session.

    :raise NetworkError: they do already.
    """
    # An abstract name of unix(7): of the network namespace, as links are, and with nothing that could be left
    # of itself.
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sock.bind(f"\0remus_colo/backup-{tag}")
    except OSError as error:
        sock.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise NetworkError(f"a session with the tag {tag} is here already: try again") from error
    return sock


def clean_up() -> None:
    """Take it away.  Never raises a RemusError: what cannot be taken away harms nobody."""
    try:
        with Links() as links, Store() as store:
            _clean_links(links)
            _clean_rules(store)
    except RemusError as error:
        log.warning("while cleaning up after a remusd that was killed: %s", error)


def _clean_links(links: Links) -> None:
    found = {name: match["tag"] for name in links.names() if (match := _LINK.fullmatch(name))}
    for tag in set(found.values()):
        names = sorted(name for name, of in found.items() if of == tag)
        try:
            claimed = claim(tag)
        except NetworkError:
            continue
        with claimed:
            if any(port.startswith("vif") for name in names for port in ports(name)):
                log.warning(
                    "a remusd that was killed has left a copy of a guest on the bridge %s: see `xl list`",
                    names[0],
                )
                continue
            log.warning("removing what a remusd that was killed has left: %s", ", ".join(names))
            for name in reversed(names):  # tunnels first
                links.delete_link(name)


def _clean_rules(store: Store) -> None:
    for owner in nft.owners():
        match = _RULES.fullmatch(owner)
        if match and store.read(f"/local/domain/{match['domid']}/name") is None:
            QueueRules(owner).remove_stale()
