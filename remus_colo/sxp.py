# SPDX-License-Identifier: LGPL-2.1-or-later
"""S-expressions as xend wrote and read them: configuration files, domains, answers of the relocation port.

An expression is a ``str`` (an atom or a string: xend did not keep them apart) or a ``list`` of expressions.  The
format is what ``tools/python/xen/xend/sxp.py`` of Xen 4.4 accepted and produced, in octets::

    # a comment, to the end of the line
    (name  'a string with \\' and \\n'  "another one"  an-atom  () (nested (lists)))

Octets are UTF-8 here; those that are not become lone surrogates (PEP 383), so that nothing is lost.  What xend
wrote reads back as the same octets, and :func:`to_string` writes the same text again.

Quirks that are kept, because files rely on them: a quote within an atom is part of it; ``{ } < > [ ] ;`` end an atom,
and may begin one; ctrl-D ends the input; and a backslash before a character that it gives no meaning to stands for
itself *and swallows that character*, of which :attr:`Parser.notes` tells.  Mended: xend misread hexadecimal digits
above 9 in ``\\x..``, and so its own non-ASCII strings; and it took a list that the end of the file cut off in an atom
for no list at all.

Unlike xend's, this parser has limits, because it reads what strangers send: depth, and octets of one expression.
"""

from __future__ import annotations

import enum
import re
from typing import Any, NamedTuple, Protocol

from remus_colo.errors import ConfigError
from remus_colo.sxp_elements import (
    ATTRIBUTES,
    Sxpr,
    attribute,
    attributes,
    child,
    child0,
    child1,
    child2,
    child3,
    child4,
    child_at,
    child_map,
    child_value,
    child_with_id,
    children,
    elementp,
    elements,
    has_id,
    merge,
    merge_list,
    name,
    with_id,
)
from remus_colo.sxp_text import atomp, octets, show, show_xml, text_of, to_string

__all__ = [
    "ATTRIBUTES",
    "Note",
    "ParseError",
    "Parser",
    "Sxpr",
    "all_from_string",
    "atomp",
    "attribute",
    "attributes",
    "child",
    "child0",
    "child1",
    "child2",
    "child3",
    "child4",
    "child_at",
    "child_map",
    "child_value",
    "child_with_id",
    "children",
    "elementp",
    "elements",
    "from_string",
    "has_id",
    "merge",
    "merge_list",
    "mime_type",
    "name",
    "parse",
    "show",
    "show_xml",
    "to_string",
    "with_id",
]

mime_type = "application/sxp"

# xend's own nest about six deep, and a domain's is some KiB.  What is this deep can still be walked by recursion.
MAX_DEPTH = 200
LIMIT_BYTES = 16 * 1024 * 1024
# An editor's mark that a file is UTF-8; xend's files had none.
_MARK = b"\xef\xbb\xbf"

_ESCAPES = dict(zip(b"abtnvfr\\'\"", b"\a\b\t\n\v\f\r\\'\"", strict=True))
_SPACE = b" \t\n\v\f\r"
_OPEN, _CLOSE, _COMMENT, _END_OF_TEXT = b"()#\x04"
_QUOTES = b"'\""
_PRINTABLE = range(0x20, 0x7F)
_ATOM_END = re.compile(rb"[{}()<>\[\];\s#]")
_STRING_STOP = {quote: re.compile(rb"[%c\\]" % quote) for quote in _QUOTES}
_OCTAL_DIGITS = b"01234567"
_HEX_DIGITS = b"0123456789abcdefABCDEF"


class Note(NamedTuple):
    """Something in the text that is allowed, but hardly meant. Lines and columns count from 1."""

    line: int
    column: int
    text: str


class ParseError(ConfigError):
    """Text that is no S-expression.

    :ivar line: where, from 1; ``column`` likewise, in characters.
    :ivar value: what is wrong, without the place.
    """

    def __init__(self, parser: Parser, value: str, line: int = 0, column: int = 0) -> None:
        self.parser = parser
        self.value = value
        self.line = line or parser.line
        self.column = column or parser.column
        super().__init__(f"line {self.line} column {self.column}: {value}")


class Located(list[Any]):
    """A list that knows where its parenthesis stands; see :class:`Parser`."""

    __slots__ = ("column", "line")

    def __init__(self, line: int, column: int) -> None:
        super().__init__()
        self.line = line
        self.column = column


class _In(enum.Enum):
    """What the next octet belongs to."""

    LIST = enum.auto()  # or no list at all
    ATOM = enum.auto()
    STRING = enum.auto()
    ESCAPE = enum.auto()
    OCTAL = enum.auto()
    HEX = enum.auto()
    COMMENT = enum.auto()


class Parser:
    """Takes text in pieces of any size and gives expressions as soon as they are complete.

    :param located: lists are :class:`Located`.
    :param max_depth: lists within lists; more is a :class:`ParseError`.
    :param limit_bytes: octets of one expression that is not within another; more is a :class:`ParseError`.
    :ivar notes: what the author of the text should be told.
    :ivar line: of the next character, from 1; ``column`` likewise.
    """

    def __init__(
        self, *, located: bool = False, max_depth: int = MAX_DEPTH, limit_bytes: int = LIMIT_BYTES
    ) -> None:
        self._located = located
        self._max_depth = max_depth
        self._limit_bytes = limit_bytes
        self.error: Any = None
        self.reset()

    # -- for the caller

    def reset(self) -> None:
        """As new."""
        self.notes: list[Note] = []
        self.line, self.column = 1, 1
        self._values: list[Sxpr] = []
        self._open: list[list[Sxpr]] = []
        self._places: list[tuple[int, int]] = []  # of the open lists
        self._in = _In.LIST
        self._text = bytearray()  # of the atom or string
        self._quote = 0
        self._began = (1, 1)  # the atom, string or escape
        self._digits = bytearray()
        self._size_bytes = 0  # of the expression that has begun
        self._eof = False
        self._failure: ParseError | None = None

    def input(self, buf: str | bytes) -> None:
        """Take the next piece; an empty one is the end.

        :raise ParseError: here or in an earlier piece; what was complete before it can still be had.
        """
        if not buf:
            self.input_eof()
            return
        data = buf if isinstance(buf, bytes) else octets(buf)
        if self._failure is not None:
            raise self._failure
        at = 0
        while at < len(data) and not self._eof:
            end = self._step(data, at)
            chunk = data[at:end]
            at = end
            if self._open or self._in not in (_In.LIST, _In.COMMENT):
                self._size_bytes += len(chunk)
                if self._size_bytes > self._limit_bytes:
                    self._fail(f"an expression of more than {self._limit_bytes} bytes")
            else:
                self._size_bytes = 0
            self._advance(chunk)

    def input_eof(self) -> None:
        """There is no more.

        :raise ParseError: something is not complete.
        """
        if self._failure is not None:
            raise self._failure
        self._eof = True
        if self._in is _In.ATOM:
            self._end_text()
        elif self._in not in (_In.LIST, _In.COMMENT):
            self._fail("unexpected end: this string is not closed", *self._began)
        if self._open:
            self._fail("unexpected end: this list is not closed", *self._places[-1])

    def ready(self) -> bool:
        """Whether there is an expression to get."""
        return bool(self._values)

    def get_val(self) -> Sxpr:
        """The first expression, which is taken out.

        :raise IndexError: there is none.
        """
        return self._values.pop(0)

    def get_all(self) -> list[Sxpr]:
        """All expressions that are there, which stay."""
        return self._values

    def at_eof(self) -> bool:
        return self._eof

    def has_error(self) -> bool:
        return self._failure is not None

    def set_error_stream(self, error: Any) -> None:
        """For scripts that call it; errors are exceptions."""
        self.error = error

    # -- octets

    def _advance(self, chunk: bytes) -> None:
        newlines = chunk.count(b"\n")
        if newlines:
            self.line += newlines
            self.column = 1
            chunk = chunk[chunk.rindex(b"\n") + 1 :]
        self.column += sum(octet & 0xC0 != 0x80 for octet in chunk)  # UTF-8: continuations are no characters

    def _fail(self, text: str, line: int = 0, column: int = 0) -> None:
        self._failure = ParseError(self, text, line, column)
        raise self._failure

    def _step(self, data: bytes, at: int) -> int:
        """Take what belongs together from ``data[at:]``; return where the rest begins."""
        octet = data[at]
        match self._in:
            case _In.LIST:
                return at + self._between(octet)
            case _In.COMMENT:
                end = data.find(b"\n", at)
                if end < 0:
                    return len(data)
                self._in = _In.LIST
                return end + 1
            case _In.ATOM:
                found = _ATOM_END.search(data, at)
                end = found.start() if found else len(data)
                self._text += data[at:end]
                if found:
                    self._end_text()
                return end
            case _In.STRING:
                return self._string(data, at)
            case _In.ESCAPE:
                return at + self._escape(octet)
            case _In.OCTAL:
                return at + self._octal(octet)
            case _In.HEX:
                return at + self._hex(octet)

    def _between(self, octet: int) -> int:
        """Neither in an atom nor in a string. Returns how many octets were taken."""
        if octet in _SPACE:
            pass
        elif octet == _COMMENT:
            self._in = _In.COMMENT
        elif octet == _OPEN:
            if len(self._open) >= self._max_depth:
                self._fail(f"more than {self._max_depth} lists within each other")
            self._open.append(Located(self.line, self.column) if self._located else [])
            self._places.append((self.line, self.column))
        elif octet == _CLOSE:
            if not self._open:
                self._fail("syntax error: ) without a (")
            self._places.pop()
            self._put(self._open.pop())
        elif octet in _QUOTES:
            self._in, self._quote, self._began = _In.STRING, octet, (self.line, self.column)
        elif octet in _PRINTABLE:
            # whatever it is, a closing bracket among them: it is the first of an atom
            self._in, self._began = _In.ATOM, (self.line, self.column)
            self._text.append(octet)
        elif octet == _END_OF_TEXT:
            self.input_eof()
        else:
            self._fail(f"invalid character: code {octet}; put it between quotes")
        return 1

    def _put(self, value: Sxpr) -> None:
        (self._open[-1] if self._open else self._values).append(value)

    def _end_text(self) -> None:
        self._put(text_of(bytes(self._text)))
        self._text.clear()
        self._in = _In.LIST

    def _string(self, data: bytes, at: int) -> int:
        found = _STRING_STOP[self._quote].search(data, at)
        end = found.start() if found else len(data)
        self._text += data[at:end]
        if found is None:
            return end
        if data[end] == self._quote:
            self._end_text()
        else:
            self._in = _In.ESCAPE
        return end + 1

    def _escape(self, octet: int) -> int:
        self._in = _In.STRING
        if octet in _ESCAPES:
            self._text.append(_ESCAPES[octet])
        elif octet == ord("x"):
            self._in = _In.HEX
        elif octet in _OCTAL_DIGITS:
            self._in = _In.OCTAL
            return 0
        else:
            self._text += b"\\"
            shown = text_of(bytes([octet]))
            self.notes.append(
                Note(
                    self.line,
                    self.column,
                    f"\\{shown} means a lone backslash, as it did to xend: write \\\\{shown} for a backslash and {shown}",
                )
            )
        return 1

    def _octal(self, octet: int) -> int:
        if octet in _OCTAL_DIGITS:
            self._digits.append(octet)
            if len(self._digits) < 3:
                return 1
            taken = 1
        else:
            taken = 0
        value = int(self._digits, 8)
        if value > 0xFF:
            self._fail(f"invalid octal escape: \\{self._digits.decode()} is more than \\377")
        self._end_escape(value)
        return taken

    def _hex(self, octet: int) -> int:
        if octet not in _HEX_DIGITS:
            self._fail("invalid hex escape: \\x needs two digits")
        self._digits.append(octet)
        if len(self._digits) == 2:
            self._end_escape(int(self._digits, 16))
        return 1

    def _end_escape(self, value: int) -> None:
        self._text.append(value)
        self._digits.clear()
        self._in = _In.STRING


# -- reading -------------------------------------------------------------------------------------------------


def without_mark(text: str | bytes) -> bytes:
    """The octets of a text, less the byte order mark that it may begin with."""
    return (text if isinstance(text, bytes) else octets(text)).removeprefix(_MARK)


class _Lines(Protocol):
    def readline(self) -> str | bytes: ...


def parse(io: _Lines) -> list[Sxpr] | None:
    """All expressions of a file; None if it holds none.

    :raise ParseError: it is no sequence of S-expressions.
    """
    parser = Parser()
    if line := io.readline():
        parser.input(without_mark(line) or b" ")
    while line := io.readline():
        parser.input(line)
    parser.input_eof()
    return parser.get_all() if parser.ready() else None


def all_from_string(s: str | bytes) -> list[Sxpr] | None:
    """As :func:`parse`, of a text."""
    parser = Parser()
    if text := without_mark(s):
        parser.input(text)
    parser.input_eof()
    return parser.get_all() if parser.ready() else None


def from_string(s: str | bytes) -> Sxpr:
    """The first expression of a text; ``[]`` of an empty one, as xend had it, None of one that holds nothing."""
    if not s:
        return []
    values = all_from_string(s)
    return values[0] if values else None
