# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one exception tree.

::

    RemusError                what the user did or has cannot work; the message says what to do
    ├── ConfigError           options or configuration are wrong
    ├── HostError             this host lacks something: privilege, kernel module, service, tool
    ├── DomainError           the domain cannot be protected as it is
    ├── XenError              a Xen or toolstack call failed (``operation``, ``domid``, ``errno``)
    ├── NetworkError          a link, qdisc, rule or queue could not be set up or failed
    ├── ProtocolError         the peer broke the replication protocol
    │   ├── FramingError      bytes that are no message
    │   └── MessageError      a message that is not allowed or not valid here
    ├── PeerError             the peer refused, with its reason
    ├── PeerLost              the peer is silent or the link is gone
    └── StateError            our own bug: an illegal transition

Callers handle meanings, not libraries: adapters translate every foreign error into one of these and
chain the cause.  Each kind has the exit status that ``remus --help`` documents.
"""

from __future__ import annotations

import enum


class ExitStatus(enum.IntEnum):
    """Exit statuses of ``remus`` and ``remusd``, documented in ``--help``."""

    OK = 0
    FAILURE = 1  # an error with no status of its own, a bug among them
    USAGE = 2  # as argparse and getopt commands do
    HOST = 3
    DOMAIN = 4
    PEER_REFUSED = 5
    PEER_UNREACHABLE = 6
    PROTOCOL = 7
    UNPROTECTED = 8  # protection was on and was lost: the guest goes on alone
    FENCED = 9  # the backup took over: the guest here was stopped
    INTERRUPTED = 130  # before there was anything to end in order: 128 + SIGINT, as shells have it


class RemusError(Exception):
    """Root of the tree."""

    exit_status = ExitStatus.FAILURE


class ConfigError(RemusError):
    exit_status = ExitStatus.USAGE


class HostError(RemusError):
    exit_status = ExitStatus.HOST


class DomainError(RemusError):
    exit_status = ExitStatus.DOMAIN


class XenError(RemusError):
    """A hypercall, xenstore or toolstack operation failed.

    :param operation: the call, as the library names it.
    :param domid: the domain concerned, or None.
    :param errno: errno of the failure, 0 where there is none.
    """

    exit_status = ExitStatus.HOST

    def __init__(
        self, message: str, *, operation: str = "", domid: int | None = None, errno: int = 0
    ) -> None:
        super().__init__(message)
        self.operation = operation
        self.domid = domid
        self.errno = errno


class NetworkError(RemusError):
    exit_status = ExitStatus.HOST


class ProtocolError(RemusError):
    exit_status = ExitStatus.PROTOCOL


class FramingError(ProtocolError):
    """Bytes that do not frame a message."""


class MessageError(ProtocolError):
    """A well-framed message that is not allowed or not valid here."""


class PeerError(RemusError):
    """The peer answered no, and said why."""

    exit_status = ExitStatus.PEER_REFUSED


class PeerLost(RemusError):
    """The peer does not answer, or the link to it is gone."""

    exit_status = ExitStatus.PEER_UNREACHABLE


class StateError(RemusError):
    """A transition that the state machine does not allow: a bug of ours."""
