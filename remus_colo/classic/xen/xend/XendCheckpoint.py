# SPDX-License-Identifier: LGPL-2.1-or-later
"""Save a domain to a file or backup host, and restore it.

The file has xend's header, and behind it what ``xl save`` writes.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from typing import Any

from xen.remus import image, vm
from xen.remus import save as remus_save
from xen.xend.XendError import VmError, XendError

from remus_colo.adapters import toolstack
from remus_colo.adapters.xenctrl import Guest
from remus_colo.adapters.xenstore import Store
from remus_colo.checkpoint import birth, incoming
from remus_colo.checkpoint.guestinfo import refuse_device_model, refuse_stopped
from remus_colo.checkpoint.suspend import Suspender
from remus_colo.errors import RemusError
from remus_colo.sxp_text import octets

__all__ = ["COLO_SIGNATURE", "SIGNATURE", "read_exact", "restore", "save", "write_exact"]

LOOK_MS = 500

SIGNATURE = image.SIGNATURE
COLO_SIGNATURE = image.COLO_SIGNATURE


def write_exact(fd: int, buf: bytes | str, errmsg: str) -> None:
    """Text, too, such as ``SIGNATURE``: to a script of Python 2's time there was no difference.

    :raise XendError: with ``errmsg``, if not all of it could be written.
    """
    view = memoryview(octets(buf) if isinstance(buf, str) else buf)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError as error:
        raise XendError(f"{errmsg}: {error.strerror}") from error


def read_exact(fd: int, size: int, errmsg: str) -> bytes:
    """:raise XendError: with ``errmsg``, if there is less."""
    found = b""
    while len(found) < size:
        piece = os.read(fd, size - len(found))
        if not piece:
            raise XendError(errmsg)
        found += piece
    return found


def save(
    fd: Any,
    dominfo: Any,
    network: Any = None,
    live: bool = False,
    dst: Any = None,
    checkpoint: bool = False,
    node: int = -1,
    sock: Any = None,
    colo: bool = False,
) -> None:
    """Save a domain.

    :param fd: a descriptor; with ``colo`` a ``xen.remus.save.MigrationSocket``.
    :param dominfo: a ``xen.remus.vm.VM``, or what has a ``domid``.
    :param live: copy it while it runs, first.
    :param checkpoint: it goes on here afterwards; else it is destroyed.
    :param sock: the connection that ``fd`` is of: it is closed before a domain that was copied live is destroyed, so that
        the other host sees the end.
    :param colo: protect it by COLO, until the backup is gone or takes over.
    :raise XendError: it failed; the domain goes on here.
    """
    domain = dominfo if isinstance(dominfo, vm.VM) else vm.VM(dominfo.domid)
    try:
        if colo:
            remus_save.ColoSaver(domain.domid, fd).start()
            return
        config = toolstack.domain_config(domain.domid)
        refuse_device_model(
            domain.name, config
        )  # or it would be destroyed, and its device model's state be nowhere
        with Guest(domain.domid, writable=False) as guest:
            refuse_stopped(domain.name, guest.info())
        header = image.makeheader(domain.dominfo or [])
        number = fd if isinstance(fd, int) else fd.fileno()
        write_exact(number, header, "could not write guest state file: header")
        _save(number, domain.domid, config, live=live, go_on=checkpoint)
        if not checkpoint:
            if live and sock is not None:
                _close(sock)
            toolstack.destroy(domain.domid)
    except (RemusError, remus_save.CheckpointError) as error:
        if isinstance(error, XendError):
            raise
        raise XendError(str(error)) from error


def _save(fd: int, domid: int, config: dict[str, Any], *, live: bool, go_on: bool) -> None:
    with Store() as store, Guest(domid, writable=False) as guest, Suspender(guest, store) as suspender:
        saved = False
        try:
            birth.send_guest(
                domid,
                config,
                lambda: _suspend(suspender),
                lambda piece: write_exact(fd, piece, "could not write guest state file"),
                live=live,
            )
            saved = True
        finally:
            if (go_on or not saved) and suspender.suspended:
                suspender.resume()


def _close(sock: Any) -> None:
    """Whatever kind of socket it is: the other host has the domain now, which must not go on here."""
    with contextlib.suppress(Exception):
        sock.shutdown(socket.SHUT_RDWR)  # also of copies of it that others have
    with contextlib.suppress(Exception):
        sock.close()


def _suspend(suspender: Suspender) -> None:
    suspender.suspend()


def restore(
    xd: Any, fd: int, dominfo: Any = None, paused: bool = False, relocating: bool = False, colo: Any = None
) -> vm.VM:
    """Make a domain of what :func:`save` wrote, or ``xen.remus.image.Writer``. Returns it.

    :param xd: xend's; not used.
    :param fd: a descriptor to read from.
    :param paused: it is not to run yet.
    :param colo: what ``remusd`` runs for a COLO stream, an object with a ``run``: the secondary's suspend,
        resume and finish.
    :raise VmError: a domain of that name is here already.
    :raise XendError: the file is none, or the domain could not be made.
    """
    if colo:
        return _restore_colo(colo)
    try:
        header = incoming.read_header(lambda size: os.read(fd, size))
        incoming.check_free(header.name)
        domid = incoming.restore(lambda size: _poll(fd, size), header, paused=paused)
    except incoming.NameTaken as error:
        raise VmError(str(error)) from error
    except RemusError as error:
        raise XendError(str(error)) from error
    return vm.VM(domid)


def _poll(fd: int, size: int) -> bytes | None:
    """What has come, none at the end; None if nothing has for a while."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return os.read(fd, size) if poller.poll(LOOK_MS) else None


def _restore_colo(session: Any) -> vm.VM:
    if not hasattr(session, "run"):
        raise XendError("a COLO stream has two connections, and remusd runs it: give its session as colo")
    try:
        session.run()
    except RemusError as error:
        raise XendError(str(error)) from error
    if session.domid is None:
        raise XendError("the protection has ended, and the guest goes on elsewhere")
    return vm.VM(session.domid)
