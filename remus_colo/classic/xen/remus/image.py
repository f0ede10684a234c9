# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files of a saved domain: a header with its description, and libxenguest's stream with one checkpoint after another.

The header is xend's.  The stream is that of today's Xen (docs/specs/libxc-migration-stream.pandoc), in records.
"""

from __future__ import annotations

import contextlib
import io
from typing import IO, Any

from xen.remus import vm
from xen.xend import sxp

from remus_colo.checkpoint import libxcrecords as libxc
from remus_colo.checkpoint import xendheader
from remus_colo.errors import FramingError

__all__ = [
    "COLO_SIGNATURE",
    "INTLEN",
    "PAGE_SIZE",
    "SIGNATURE",
    "VMImage",
    "VMParseException",
    "Writer",
    "makeheader",
    "parsebatch",
    "parseheader",
    "readbatch",
]

SIGNATURE = xendheader.SIGNATURE.decode()
COLO_SIGNATURE = xendheader.COLO_SIGNATURE.decode()
PAGE_SIZE = libxc.PAGE_SIZE
INTLEN = xendheader.LENGTH.size
STREAM_MARKER = libxc.MARKER
STREAM_HEADERS_BYTES = libxc.HEADERS_BYTES


class VMParseException(Exception):
    """This is no saved domain."""


def of_octets(file: Any) -> Any:
    """The file, or what is beneath it if it is one of text: ``open(path, 'w')`` and ``sys.stdout``, which
    2to3 leaves as they are, took octets in Python 2.
    """
    return getattr(file, "buffer", file) if isinstance(file, io.TextIOBase) else file


def makeheader(dominfo: list[Any], colo: bool = False) -> bytes:
    """A header from a domain's description.

    :param colo: what follows is for a receiver that knows COLO.
    """
    text = vm.sxprtostr(dominfo).encode()
    return (COLO_SIGNATURE if colo else SIGNATURE).encode() + xendheader.LENGTH.pack(len(text)) + text


def parseheader(header: str | bytes) -> dict[str, Any]:
    """The description in a header, without signature and length, as dictionaries.

    :raise VMParseException: it is none.
    """
    try:
        description = vm.strtosxpr(header)
    except (sxp.ParseError, IndexError) as error:
        raise VMParseException(f"the header describes no domain: {error or 'it is empty'}") from error
    if not isinstance(description, list):
        raise VMParseException(f"the header describes no domain: {description!r}")
    return vm.parsedominfo(description)


def _exactly(fd: IO[bytes], size: int, what: str) -> bytes:
    data = fd.read(size)
    if len(data) != size:
        raise VMParseException(f"{what} is cut off: expected {size} bytes, got {len(data)}")
    return data


class VMImage:
    """A file of a saved domain, read up to its stream.

    :param img: its path, or a file that is open for reading bytes.
    """

    def __init__(self, img: str | IO[Any] | None = None) -> None:
        self.img = img
        self.dom: dict[str, Any] | None = None
        self.fd: IO[bytes] | None = None
        self.header: bytes | None = None
        self.colo = False
        if img:
            self.open(img)

    def open(self, img: str | IO[Any]) -> None:
        self.fd = open(img, "rb") if isinstance(img, str) else of_octets(img)  # noqa: SIM115 (it is kept)
        self.readheader()

    def readheader(self) -> None:
        """:raise VMParseException: it has none."""
        assert self.fd is not None
        signature = self.fd.read(len(SIGNATURE))
        if signature not in (SIGNATURE.encode(), COLO_SIGNATURE.encode()):
            raise VMParseException("Bad signature in image")
        self.colo = signature == COLO_SIGNATURE.encode()
        (length,) = xendheader.LENGTH.unpack(_exactly(self.fd, INTLEN, "the header"))
        if not 0 < length <= xendheader.DESCRIPTION_LIMIT_BYTES:
            raise VMParseException(f"a header of {length} bytes")
        self.header = _exactly(self.fd, length, "the header")
        self.dom = parseheader(self.header)


def readbatch(fd: IO[bytes]) -> tuple[int, bytes]:
    """The next record of a stream: its type and all its bytes; ``(0, b'')`` at the end of the file.

    :raise VMParseException: the file ends within it.
    """
    header = fd.read(libxc.RECORD.size)
    if not header:
        return libxc.END, b""
    if len(header) < libxc.RECORD.size:
        raise VMParseException("a record is cut off")
    kind, length = libxc.RECORD.unpack(header)
    body = _exactly(fd, (length + libxc.ALIGNMENT - 1) // libxc.ALIGNMENT * libxc.ALIGNMENT, "a record")
    return kind, header + body


def parsebatch(batch: bytes) -> list[tuple[int, bytes]]:
    """The pages of a record, each with its entry: its number, and its type in the highest 4 bits.

    :raise VMParseException: this is no record of today's stream.
    """
    return [(entry, page) for entry, page in _entries(batch) if page]


def _entries(batch: bytes) -> list[tuple[int, bytes]]:
    """As :func:`parsebatch`, with the pages that have no content, too: here they have none."""
    try:
        found = list(libxc.records(batch))
        if len(found) != 1:
            raise VMParseException(f"expected one record, got {len(found)}")
        if found[0].kind != libxc.PAGE_DATA:
            return []
        return [
            (entry, b"" if offset is None else batch[offset : offset + PAGE_SIZE])
            for entry, offset in libxc.all_pages(batch, found[0])
        ]
    except FramingError as error:
        raise VMParseException(str(error)) from error


class Writer:
    """Makes one image of a series of checkpoints: the domain as it was at the last one.

    :param fd: where it goes, open for writing bytes.
    :param compact: each page once, as it was last, instead of all that came.
    """

    def __init__(self, fd: IO[Any], compact: bool = False) -> None:
        self.fd: IO[bytes] = of_octets(fd)
        self.compact = compact
        self.vm: VMImage | None = None
        self._ended = True  # nothing to be written at the end
        # Of the last whole checkpoint, and what has come since.
        self._pages: dict[int, tuple[int, bytes]] = {}
        self._state: list[bytes] = []
        self._new_pages: list[bytes] = []
        self._new_state: list[bytes] = []
        self._begun = False

    def slurp(self, ifd: str | IO[Any]) -> None:
        """Take what a file has: the first begins with the header, the following ones with a checkpoint.

        :raise VMParseException: it is neither.
        """
        source: IO[bytes] = open(ifd, "rb") if isinstance(ifd, str) else of_octets(ifd)  # noqa: SIM115
        try:
            if self._ended:
                self.vm = VMImage(source)
                self._ended = False
                assert self.vm.header is not None
                signature = COLO_SIGNATURE if self.vm.colo else SIGNATURE
                self.fd.write(
                    signature.encode() + xendheader.LENGTH.pack(len(self.vm.header)) + self.vm.header
                )
                headers = _exactly(source, STREAM_HEADERS_BYTES, "the stream's header")
                if not headers.startswith(STREAM_MARKER):
                    raise VMParseException("the header is not followed by a stream of today's Xen")
                self.fd.write(headers)
            while True:
                kind, batch = readbatch(source)
                if not batch:
                    return  # what came since the last checkpoint is none
                self._take(kind, batch)
                if kind == libxc.END:
                    return
        finally:
            if isinstance(ifd, str):
                source.close()

    def _take(self, kind: int, batch: bytes) -> None:
        if kind in (libxc.CHECKPOINT, libxc.END):
            if self._new_pages or self._new_state:
                self._complete()
        elif kind == libxc.PAGE_DATA:
            self._begun = True
            self._new_pages.append(batch)
        elif self._begun:
            self._new_state.append(batch)  # of the CPUs, as of this checkpoint
        else:
            self.fd.write(batch)  # what comes before all pages comes once

    def _complete(self) -> None:
        for batch in self._new_pages:
            if self.compact:
                # one that has lost its content, as ballooning does it, must not get back what it had
                self._pages.update((entry & libxc.PFN_MASK, (entry, page)) for entry, page in _entries(batch))
            else:
                self.fd.write(batch)
        self._state = self._new_state
        self._new_pages, self._new_state = [], []

    def flush(self) -> None:
        """Write the domain as of the last whole checkpoint, and the end; what came after it is left out."""
        if self._ended:
            return
        for batch in libxc.page_data([page for _, page in sorted(self._pages.items())]):
            self.fd.write(batch)
        for batch in self._state:
            self.fd.write(batch)
        self.fd.write(libxc.END_RECORD)
        self.fd.flush()
        self._ended = True

    def close(self) -> None:
        self.flush()

    def __del__(self) -> None:
        # scripts leave it to this; a file that they have closed before takes no more
        with contextlib.suppress(OSError, ValueError):
            self.close()
