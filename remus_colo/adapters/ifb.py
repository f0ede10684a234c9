# SPDX-License-Identifier: LGPL-2.1-or-later
"""Intermediate functional block devices: a place to queue what comes *in* over a link, which has no queue for it.

For a vif that is the guest's output.  Frames that are redirected to an ifb leave its queue as if they had just
come in over the link that they are from (drivers/net/ifb.c).
"""

from __future__ import annotations

from remus_colo.adapters import tc
from remus_colo.adapters.netlink import Links
from remus_colo.adapters.rtnl import reporting

QUEUE_FRAMES = 1000


def create(links: Links, name: str) -> None:
    """Make one, up, without this host's own ARP and IPv6 on it.

    :raise NetworkError: the name is taken.
    :raise HostError: no permission or no ifb module.
    """
    with reporting(f"create the buffer device {name}", module="ifb"):
        links.ipr.link("add", ifname=name, kind="ifb", txqlen=QUEUE_FRAMES)
    try:
        links.silence(name)
        links.set_up(name)
    except BaseException:
        links.delete_link(name)
        raise


def redirect_input(links: Links, source: str, target: str) -> None:
    """Have what comes in over ``source`` pass through the ifb ``target`` first; replaces one that is there.

    But for ARP and neighbour discovery, which tell nothing of a guest but its addresses: an answer that comes
    later than 3 s means to who has asked that the guest is gone.
    """
    index, target_index = links.ifindex(source), links.ifindex(target)
    tc.remove_filter(links.ipr, source, index, tc.INGRESS)
    tc.add_filter(links.ipr, source, index, tc.INGRESS, "redirect", target, target_index)
    tc.pass_discovery(links.ipr, index, tc.INGRESS)


def stop_redirecting(links: Links, source: str) -> None:
    """No error if nothing is redirected, or the link is gone."""
    if links.exists(source):
        tc.remove_filter(links.ipr, source, links.ifindex(source), tc.INGRESS)
