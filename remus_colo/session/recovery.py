# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a ``remus`` that was killed has left behind on the primary host: a guest that stands still, a network
that holds packets.

Done by its guard (``guard.py``); by the next ``remus`` of the domain, as far as the network goes; and by hand
(``recover.py``).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
from collections.abc import Callable, Collection, Iterable

from remus_colo.adapters import backend, devicemodel, ifb, xentime
from remus_colo.adapters.backend import Vif
from remus_colo.adapters.netlink import Links, Plug
from remus_colo.adapters.nft import QueueRules
from remus_colo.adapters.xenctrl import Guest, ShutdownReason
from remus_colo.adapters.xenstore import Store
from remus_colo.checkpoint.guestinfo import GuestLayout
from remus_colo.checkpoint.pvm import PvmEngine
from remus_colo.devices.netbuffer import buffer_ifname
from remus_colo.errors import RemusError, XenError
from remus_colo.proxy.primary_path import PLUG_LIMIT_BYTES, primary_ifname, rules_owner

log = logging.getLogger(__name__)

LATE_SUSPEND_S = 10.0
GONE = "gone"


def _standstill(guest: Guest) -> str:
    """How a domain has been stopped: "paused", "suspended", "" if it runs, GONE if it has ended."""
    info = guest.info()
    if info.dying:
        return GONE
    if info.shutdown:
        return "suspended" if info.shutdown_reason == ShutdownReason.SUSPEND else GONE
    return "paused" if info.paused else ""


def suspended(domid: int) -> bool:
    """Whether a guest is there that has suspended itself, and was not resumed."""
    try:
        with Guest(domid, writable=False) as guest:
            return _standstill(guest) == "suspended"
    except RemusError as error:
        log.debug("%s", error)
        return False


def let_run(guest: Guest, store: Store, *, reborn: bool = False) -> None:
    """Let a guest that was stopped at any point of a checkpoint, or of its birth on the backup, run on.

    :param reborn: it was stopped while it was being resumed as if in a new domain
        (``PvmEngine.resume_as_new``), which has to be done anew: after the soft reset there is no other way
        into it.
    :raise RemusError: it could not be resumed.
    """
    with contextlib.suppress(XenError):
        guest.disable_dirty_log()
    info = guest.info()
    if info.dying or not (info.paused or info.shutdown):
        return
    if reborn and info.paused:
        if not info.shutdown:
            guest.shutdown(ShutdownReason.SUSPEND)  # as it was before the soft reset
        layout = GuestLayout.read(guest, store)
        PvmEngine(guest, store, layout, xentime.GuestClock(guest.domid)).resume_as_new()
    elif info.shutdown and info.shutdown_reason == ShutdownReason.SUSPEND:
        try:
            devicemodel.let_run(guest.domid)
        except RemusError as error:
            log.error("domain %d goes on without its device model: %s", guest.domid, error)
        guest.resume(cancelled=True)
        store.resumed_domain(guest.domid)
    while guest.info().paused:  # by us: a paused guest is not protected, so it was not when we began
        guest.unpause()


def withdraw_suspend(domid: int, store: Store) -> None:
    """A guest that was asked to suspend, and has not begun to, is not to."""
    store.replace(f"/local/domain/{domid}/control/shutdown", "suspend", "")


def clean_network(
    links: Links, domid: int, vifs: Iterable[Vif], tags: Iterable[str], *, diverted: Collection[str] = ()
) -> None:
    """Take away what held and copied the guest's packets.  What waited for the guest goes to it; what it has
    said, and nobody has seen, is dropped: who knows whether it went on elsewhere.  Never raises; a second
    time does nothing.

    :param tags: of the links (``ColoConfig.tag``), of all runs that may have left some.
    :param diverted: vifs whose output takes the way that it takes by somebody who is there.
    """
    left = tuple(prefix for tag in tags for prefix in (primary_ifname(tag), buffer_ifname(tag)))
    steps: list[tuple[str, Callable[[], object]]] = []
    for name in links.names():
        if name.startswith(left):
            steps.append((name, functools.partial(links.delete_link, name)))
    for vif in vifs:
        steps += [
            (name, functools.partial(ifb.stop_redirecting, links, name))
            for name in (vif.ifname, vif.emulated_ifname)
            if name not in diverted
        ]
        steps += [
            (vif.ifname, functools.partial(links.remove_mirror, vif.ifname)),
            (vif.ifname, Plug(links, vif.ifname, PLUG_LIMIT_BYTES).remove),
        ]
    steps.append(("the packet rules", QueueRules(rules_owner(domid)).remove_stale))
    for what, step in steps:
        try:
            step()
        except RemusError as error:
            log.warning("while cleaning up %s: %s", what, error)


def recover(
    domid: int, tags: Iterable[str], *, may_resume: Callable[[], bool] = lambda: True, reborn: bool = False
) -> tuple[str, bool]:
    """All of it.  Returns how the guest stood still before, "paused" or "suspended", or "" if it did not, or GONE; and
    whether it was let run.

    :param may_resume: asked at the last moment whether it may; if not, only its network is cleaned.
    :raise RemusError: the guest stands still yet.
    """
    stood, resume = "", True
    with Store() as store:
        try:
            if resume := may_resume():
                withdraw_suspend(domid, store)
            stood = _look_at_guest(domid, store, resume=resume, reborn=reborn)
        finally:
            with Links() as links:
                clean_network(links, domid, backend.vifs(store, domid), tags)
        if resume and not stood:
            # A guest that has taken a request to suspend has emptied the node, and comes to it some time later.
            with store.watch(["@releaseDomain"]) as watch:
                watch.wait(lambda: bool(_look_at_guest(domid, store, resume=False)), timeout_s=LATE_SUSPEND_S)
            stood = _look_at_guest(domid, store, resume=True)
    return stood, resume


def _look_at_guest(domid: int, store: Store, *, resume: bool, reborn: bool = False) -> str:
    try:
        with Guest(domid, writable=False) as guest:
            stood = _standstill(guest)
            if resume:
                let_run(guest, store, reborn=reborn)
            return stood
    except XenError as error:
        if error.errno == errno.ESRCH:
            return GONE
        raise
