# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain that was saved as xend did it comes in: its header, then what ``xl save`` writes, and it runs here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from remus_colo import dominfo, sxp
from remus_colo.adapters import toolstack
from remus_colo.adapters.xenctrl import Guest
from remus_colo.adapters.xenstore import Store, domain_named
from remus_colo.checkpoint import birth, libxcrecords, libxlformat
from remus_colo.checkpoint.xendheader import COLO_SIGNATURE, DESCRIPTION_LIMIT_BYTES, LENGTH, SIGNATURE
from remus_colo.errors import ConfigError, DomainError, FramingError
from remus_colo.options import check_word

PIECE_BYTES = 1 << 20

_INVALID = "not a valid guest state file"

Read = Callable[[int], bytes]
"""At most so many bytes; none at the end."""
Poll = Callable[[int], bytes | None]
"""The same, but None if nothing has come for a while: whoever reads looks then whether there is more to come."""


class NameTaken(DomainError):
    """A domain of that name is here already."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says of a domain. :ivar config: libxl's configuration, if it is there."""

    name: str
    config: dict[str, Any] | None = None


def read_header(read: Read) -> Header:
    """:raise FramingError: it is no header."""
    signature = _exactly(read, len(SIGNATURE), "signature read")
    if signature == COLO_SIGNATURE:
        raise FramingError(
            "this is a COLO stream: send it to remusd, which runs the second copy of the guest"
        )
    if signature != SIGNATURE:
        raise FramingError(f"{_INVALID}: found {signature!r}")
    (length,) = LENGTH.unpack(_exactly(read, LENGTH.size, "config size read"))
    if not 0 < length <= DESCRIPTION_LIMIT_BYTES:
        raise FramingError(f"{_INVALID}: a configuration of {length} bytes")
    text = _exactly(read, length, "config read")
    try:
        description = sxp.from_string(text)
        if not isinstance(description, list):
            raise TypeError(f"it is {description!r}")
        parsed = dominfo.parse(description)
        header = Header(str(parsed["name"]), dominfo.libxl_of(parsed))
        check_word("the domain", header.name)
    except (ConfigError, IndexError, KeyError, TypeError, ValueError) as error:
        raise FramingError(f"{_INVALID}: config parse") from error
    return header


def check_free(name: str) -> None:
    """:raise NameTaken: here is a domain of that name, or the copy of one, which would take it.
    :raise DomainError: it cannot be a name here.
    """
    if name.isdecimal():
        raise DomainError(f"{name!r} is no name of a domain: xl takes it for a domid")
    with Store() as store:
        for taken in (name, birth.secondary_name(name)):
            domid = domain_named(store, taken)
            if domid is not None:
                raise NameTaken(f"Domain '{taken}' already exists with ID '{domid}'")


def restore(read: Poll, header: Header, *, paused: bool = False) -> int:
    """Make the domain of what follows the header, up to the end. Returns its domid.

    The stream says itself where it ends, and then xl does: a sender that keeps the connection open, but has no
    guest any more, must not cost it.  What checkpoints left in files is libxenguest's stream alone (``image.Writer``),
    which ends with the file, and gets libxl's around it here.

    :param paused: it is not to run yet.
    :raise XenError: it could not be made; what ``read`` raised is raised as it is.  Nothing is left of it then.
    """
    name = header.name
    with Store() as store:
        restorer = birth.Restorer(name)
        try:
            head = _head(read)
            bare = head == libxcrecords.MARKER
            if bare:
                restorer.feed(_prologue(header))
            restorer.feed(head)
            while not restorer.complete:
                piece = read(PIECE_BYTES)
                if piece is None:
                    continue
                if not piece:
                    break
                restorer.feed(piece)
            if bare:
                restorer.feed(libxlformat.epilogue())
            domid = restorer.finish(store)
            if not paused:
                with Guest(domid, writable=False) as guest:
                    guest.unpause()
        except BaseException:
            restorer.abort()
            made = domain_named(store, name) if restorer.made else None
            if made is not None:
                toolstack.destroy(made)
            raise
        return domid


def _head(read: Poll) -> bytes:
    """So much as tells what stream it is; less at the end."""
    found = b""
    while len(found) < len(libxcrecords.MARKER):
        piece = read(len(libxcrecords.MARKER) - len(found))
        if piece is None:
            continue
        if not piece:
            break
        found += piece
    return found


def _prologue(header: Header) -> bytes:
    if header.config is None:
        raise FramingError(
            f"{_INVALID}: libxenguest's stream without libxl's configuration of {header.name} in the header: "
            "it was saved by an older version"
        )
    return libxlformat.prologue(header.config)


def _exactly(read: Read, size: int, what: str) -> bytes:
    found = b""
    while len(found) < size:
        piece = read(size - len(found))
        if not piece:
            raise FramingError(f"{_INVALID}: {what}")
        found += piece
    return found
