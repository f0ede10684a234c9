# SPDX-License-Identifier: LGPL-2.1-or-later
"""Listening sockets of the relocation port, at what ``xend-relocation-address`` may say."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import ssl
import struct
from dataclasses import dataclass

from remus_colo.errors import ConfigError, HostError

BACKLOG = 64

# linux/sockios.h; struct ifreq of net/if.h: 16 octets of name, then a sockaddr_in, whose address is at 4
_SIOCGIFADDR = 0x8915
_IFREQ = struct.Struct("16s24x")
_ADDRESS = slice(20, 24)


@dataclass(frozen=True, slots=True)
class Listener:
    """:param tls: None: connections are plain."""

    sock: socket.socket
    address: str
    port: int
    tls: ssl.SSLContext | None = None

    def __str__(self) -> str:
        return f"{self.address or '*'} port {self.port}{' with TLS' if self.tls else ''}"


def resolve(address: str) -> str:
    """A numeric address of what a user may have written: an address, an interface's name, a host's; empty stays empty.

    :raise ConfigError: it is none of these.
    """
    if not address:
        return ""
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        pass
    try:
        socket.if_nametoindex(address)
    except OSError:
        return _look_up(address)
    return _interface_address(address)


def _look_up(name: str) -> str:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{name!r} is no address, no network interface, and no host's name: {reason}"
        ) from error
    # xend knew IPv4 alone: a name that has both means that
    return str(min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][0])


def _interface_address(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            answer = fcntl.ioctl(sock, _SIOCGIFADDR, _IFREQ.pack(interface.encode()))
        except OSError as error:
            raise ConfigError(
                f"the network interface {interface} has no IPv4 address: {error.strerror}"
            ) from error
    return socket.inet_ntoa(answer[_ADDRESS])


def plain(address: str) -> str:
    """An address of a socket, with IPv4 as such: one that listens at ``::`` has it in the form of IPv6 (RFC
    4291, 2.5.5.2).
    """
    prefix, _, rest = address.rpartition(":")
    return rest if prefix.lower() == "::ffff" and "." in rest else address


def listen(address: str, port: int, tls: ssl.SSLContext | None = None) -> Listener:
    """:raise HostError: the port is taken, or the address is not this host's; ConfigError: it is no address."""
    numeric = resolve(address)
    sock = socket.socket(socket.AF_INET6 if ":" in numeric else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sock.family == socket.AF_INET6:
            # "::" means everywhere, as "" does for IPv4, whatever the host's default
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((numeric, port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise HostError(
            f"cannot listen on {address or '*'} port {port}: {error.strerror}; "
            "does another remusd run, or is it not this host's address?"
        ) from error
    sock.setblocking(False)
    return Listener(sock, address, sock.getsockname()[1], tls)
