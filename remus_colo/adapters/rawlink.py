# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ethernet frames of one link, in and out (AF_PACKET, packet(7))."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
from collections.abc import Sequence
from typing import NamedTuple, Self

from remus_colo.adapters import bpf
from remus_colo.errors import HostError, NetworkError, StateError

_ETHERTYPE_ALL = 0x0003  # <linux/if_ether.h>
_HEADER = struct.Struct("!6s6sH")
# A frame may come before it is split to the MTU: 64 kB of IP, 14 of Ethernet, and a VLAN tag.
_MAX_FRAME_BYTES = 65536 + 18
_SOL_PACKET = 263  # <linux/socket.h>; these are from <linux/if_packet.h>
_PACKET_STATISTICS = 6
_PACKET_AUXDATA = 8
_PACKET_IGNORE_OUTGOING = 23
_PACKET_OUTGOING = 4
_TP_STATUS_CSUMNOTREADY = 8  # in the first word of struct tpacket_auxdata
_ABOUT_BYTES = socket.CMSG_SPACE(20)
_SO_RCVBUFFORCE = 33  # <asm-generic/socket.h>


class LinkGone(NetworkError):
    """The link was deleted.  A new one of the same name takes a new RawLink."""


class Frame(NamedTuple):
    """A frame that came in.  ``payload`` may have Ethernet padding at its end, and a VLAN tag is not shown.

    :ivar summed: false if the transport checksum was left to a device to fill in (a veth's frames, a guest's).
    """

    ethertype: int
    payload: bytes
    source_mac: bytes
    destination_mac: bytes
    summed: bool


class RawLink:
    """Reads and writes the frames of one link, never blocking.  Belongs to one thread."""

    def __init__(
        self, ifname: str, wanted: Sequence[bpf.Instruction] = (), *, receive_buffer_bytes: int = 16 << 20
    ) -> None:
        """:param wanted: the frames to be read, if not all.  (Binding to an ethertype will not do: a bridge takes the
            frames of its ports before such sockets see them; ``__netif_receive_skb_core``: rx_handler comes first.)
        :raise NetworkError: there is no such link.
        :raise HostError: no permission.
        """
        self.ifname = ifname
        self._dropped = 0
        self._was_down = False
        try:
            # Protocol 0 at first: nothing is received before the socket is bound to its link.
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        except OSError as exc:
            raise HostError(f"cannot read frames of {ifname}: {exc.strerror}; run as root") from exc
        try:
            self._socket.setblocking(False)
            self._socket.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
            self._socket.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
            with contextlib.suppress(PermissionError):  # then the system's default size does
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, receive_buffer_bytes)
            if wanted:
                bpf.attach(self._socket, wanted)
            self._socket.bind((ifname, _ETHERTYPE_ALL))
        except OSError as exc:
            self._socket.close()
            raise NetworkError(f"cannot read frames of {ifname}: {exc.strerror}") from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def fileno(self) -> int:
        """To be polled for reading."""
        return self._socket.fileno()

    def want(self, wanted: Sequence[bpf.Instruction]) -> None:
        """From now on other frames; what came before stays to be read.

        :raise NetworkError: the kernel does not take that.
        """
        self._check_open()
        try:
            bpf.attach(self._socket, wanted)
        except OSError as exc:
            raise NetworkError(f"cannot choose the frames of {self.ifname}: {exc.strerror}") from exc

    def recv(self) -> Frame | None:
        """The next frame that came in over the link, or None if there is none now.

        A link that is down has none; frames go on when it is up again.

        :raise LinkGone: the link was deleted.
        """
        self._check_open()
        while True:
            try:
                frame, about, _, address = self._socket.recvmsg(_MAX_FRAME_BYTES, _ABOUT_BYTES)
            except BlockingIOError:
                if self._was_down:
                    self._check_link()
                return None
            except OSError as exc:
                self.failed(exc.errno or 0)
                continue
            self._was_down = False
            if address[2] == _PACKET_OUTGOING or len(frame) < _HEADER.size:
                continue
            destination_mac, source_mac, ethertype = _HEADER.unpack_from(frame)
            status = int.from_bytes(about[0][2][:4], sys.byteorder) if about else 0
            return Frame(
                ethertype,
                frame[_HEADER.size :],
                source_mac,
                destination_mac,
                not status & _TP_STATUS_CSUMNOTREADY,
            )

    def failed(self, error: int) -> None:
        """Somebody who reads :meth:`fileno` got this errno.

        :raise NetworkError: that was no mere going down of the link.
        :raise LinkGone: the link was deleted.
        """
        if error != errno.ENETDOWN:
            raise NetworkError(f"cannot read frames of {self.ifname}: {os.strerror(error)}")
        self._was_down = True  # said once, for a link that went down and for one that went away
        self._check_link()

    def send(self, frame: bytes) -> None:
        """Send a whole frame, from the destination address on, without checksum.

        :raise NetworkError: the link is down or gone, its queue is full, or the frame exceeds its MTU.
        """
        self._check_open()
        try:
            self._socket.send(frame)
        except OSError as exc:
            raise NetworkError(f"cannot send {len(frame)} bytes on {self.ifname}: {exc.strerror}") from exc

    def dropped(self) -> int:
        """Frames lost so far because they were not read in time."""
        if self._socket.fileno() >= 0:
            # Reading them sets them back to 0.
            figures = self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
            self._dropped += struct.unpack("=II", figures)[1]
        return self._dropped

    def close(self) -> None:
        self._socket.close()

    def _check_open(self) -> None:
        if self._socket.fileno() < 0:
            raise StateError(f"the frames of {self.ifname} are no longer read: it was closed")

    def _check_link(self) -> None:
        # The kernel unbinds the socket from a link that goes away; the name is then empty.
        if not self._socket.getsockname()[0]:
            raise LinkGone(f"the link {self.ifname} was deleted")


class CopyingTap:
    """Makes the kernel copy each frame that comes in over a link, instead of passing a guest's own pages on.

    A Xen backend answers a guest's transmit request when the frame has been freed.  Held frames would keep the
    requests of a vif open, and its shared ring could never be idle for a checkpoint.  With a packet socket on
    the link, one that accepts nothing, the kernel copies the pages first (``deliver_skb`` of net/core/dev.c:
    ``skb_orphan_frags_rx``), and the request is answered at once.
    """

    def __init__(self, ifname: str) -> None:
        """:raise NetworkError: there is no such link.
        :raise HostError: no permission.
        """
        try:
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        except OSError as exc:
            raise HostError(f"cannot tap {ifname}: {exc.strerror}; run as root") from exc
        try:
            self._socket.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
            bpf.attach(self._socket, bpf.nothing)
            self._socket.bind((ifname, _ETHERTYPE_ALL))
        except OSError as exc:
            self._socket.close()
            raise NetworkError(f"cannot tap {ifname}: {exc.strerror}") from exc

    def close(self) -> None:
        self._socket.close()


class RawSender:
    """Sends frames through links, each by its name, never blocking.  Belongs to one thread.

    To be kept, where frames are sent now and again: the close of any such socket waits for an RCU grace period
    (``packet_release`` of Linux: ``synchronize_net``), 10 ms and more.

    :raise HostError: no permission.
    """

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # protocol 0: receives nothing
        except OSError as exc:
            raise HostError(f"cannot send frames: {exc.strerror}; run as root") from exc
        self._socket.setblocking(False)

    def send(self, ifname: str, frame: bytes) -> None:
        """Send a whole frame, from the destination address on, without checksum.

        :raise NetworkError: the link is down or gone, its queue is full, or the frame exceeds its MTU.
        """
        _, _, ethertype = _HEADER.unpack_from(frame)
        try:
            self._socket.sendto(frame, (ifname, ethertype))
        except OSError as exc:
            raise NetworkError(f"cannot send {len(frame)} bytes on {ifname}: {exc.strerror}") from exc

    def close(self) -> None:
        self._socket.close()
