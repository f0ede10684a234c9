# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading captures: the classic pcap format (draft-ietf-opsawg-pcap), microseconds or nanoseconds, either byte order.

Record times are nanoseconds since the epoch.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from remus_colo.errors import ConfigError

LINKTYPE_ETHERNET = 1
_MAGIC_US, _MAGIC_NS, _MAGIC_PCAPNG = 0xA1B2C3D4, 0xA1B23C4D, 0x0A0D0D0A
_HEADER = "IHHiIII"  # magic, version (2), zone, accuracy, snapshot length, link type
_RECORD = "IIII"  # seconds, fraction, bytes in the file, bytes on the wire
_HEADER_BYTES, _RECORD_BYTES = 24, 16


@dataclass(frozen=True, slots=True)
class Record:
    """One packet.

    :ivar index: its place in the file, from 0.
    :ivar frame: from the Ethernet header on, as far as it was captured.
    :ivar wire_size: bytes that the frame had.
    """

    index: int
    time_ns: int
    frame: bytes
    wire_size: int


class Capture:
    """A capture file, in memory only as far as it is read.

    :ivar cut: the file ends within a packet, which is left out.
    :raise ConfigError: the file cannot be read, is no pcap, or is not of Ethernet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(path, "rb") as file:
                size = file.seek(0, 2)
                self._data: mmap.mmap | bytes = (
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
                )
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        self._order, self._tick_ns = self._read_header()
        self._entries: list[
            tuple[int, int, int, int]
        ] = []  # time, offset of the frame, bytes of it, bytes on the wire
        self.cut = self._read_entries()

    def __len__(self) -> int:
        return len(self._entries)

    def times_ns(self) -> list[int]:
        return [entry[0] for entry in self._entries]

    def record(self, index: int) -> Record:
        time_ns, offset, size, wire_size = self._entries[index]
        return Record(index, time_ns, bytes(self._data[offset : offset + size]), wire_size)

    def close(self) -> None:
        if isinstance(self._data, mmap.mmap):
            self._data.close()

    def _read_header(self) -> tuple[str, int]:
        head = bytes(self._data[:_HEADER_BYTES])
        for order in "<>":
            if len(head) >= 4:
                (magic,) = struct.unpack_from(order + "I", head)
                if magic == _MAGIC_PCAPNG:
                    raise ConfigError(f"{self.path} is a pcapng file: convert it with 'editcap -F pcap'")
                if magic in (_MAGIC_US, _MAGIC_NS) and len(head) == _HEADER_BYTES:
                    linktype = (
                        struct.unpack(order + _HEADER, head)[-1] & 0xFFFF
                    )  # the rest is about checksums
                    if linktype != LINKTYPE_ETHERNET:
                        raise ConfigError(
                            f"{self.path} has link type {linktype}, not Ethernet (1): capture on the vif or the bridge, "
                            "not on 'any'"
                        )
                    return order, 1000 if magic == _MAGIC_US else 1
        raise ConfigError(f"{self.path} is no pcap file: write it with 'tcpdump -w'")

    def _read_entries(self) -> bool:
        record = struct.Struct(self._order + _RECORD)
        at, end = _HEADER_BYTES, len(self._data)
        while at + _RECORD_BYTES <= end:
            seconds, fraction, size, wire_size = record.unpack_from(self._data, at)
            at += _RECORD_BYTES
            if size > end - at:
                return True
            self._entries.append(
                (seconds * 1_000_000_000 + fraction * self._tick_ns, at, size, max(size, wire_size))
            )
            at += size
        return at != end
