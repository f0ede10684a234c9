# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writing S-expressions as xend did, and the octets that texts in them stand for: the other half of
:mod:`remus_colo.sxp`.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

from remus_colo.sxp_elements import Sxpr, attributes, children, name


def octets(text: str) -> bytes:
    """:raise ValueError: the text holds half a surrogate pair, which stands for no octet."""
    return text.encode("utf-8", "surrogateescape")


def text_of(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


_ATOM = re.compile(r"[A-Za-z0-9._:/~-]+|@")


def atomp(sxpr: str) -> bool:
    """Whether a text is written without quotes."""
    return _ATOM.fullmatch(sxpr) is not None


class _Out(Protocol):
    def write(self, text: str, /) -> object: ...


def _word(value: object) -> str:
    if isinstance(value, int | float):
        return str(value)
    text = text_of(value) if isinstance(value, bytes) else str(value)
    if isinstance(value, str | bytes) and atomp(text):
        return text
    # Python 2's repr() of a str, which xend wrote, is that of bytes today
    return repr(octets(text))[1:]


def show(sxpr: Sxpr, out: _Out | None = None) -> None:
    """Write an expression to ``out`` (standard output if None), on one line, as xend did."""
    _write(sxpr, sys.stdout if out is None else out, lambda sxpr: ("(", sxpr, ")"), _word)


def _write(
    sxpr: Sxpr,
    out: _Out,
    of_list: Callable[[Sxpr], tuple[str, Sequence[Sxpr], str]],
    of_atom: Callable[[Sxpr], str],
) -> None:
    """Write a tree: what is before, in and behind a list, with blanks between. Any depth: scripts make what
    they like.
    """
    waiting: list[tuple[bool, Sxpr]] = [(False, sxpr)]  # text to be written as it is, or an expression
    while waiting:
        is_text, item = waiting.pop()
        if is_text:
            out.write(item)
        elif isinstance(item, list | tuple):
            before, items, behind = of_list(item)
            out.write(before)
            waiting.append((True, behind))
            for index in reversed(range(len(items))):
                waiting.append((False, items[index]))
                if index:
                    waiting.append((True, " "))
        else:
            out.write(of_atom(item))


def show_xml(sxpr: Sxpr, out: _Out | None = None) -> None:
    """Write an expression in the likeness of XML. For people: nothing is escaped, and it cannot be read back."""
    _write(sxpr, sys.stdout if out is None else out, _tags, str)


def _tags(sxpr: Sxpr) -> tuple[str, Sequence[Sxpr], str]:
    pairs = "".join(f" {pair[0]}={pair[1]}" for pair in attributes(sxpr))
    return f"<{name(sxpr)}{pairs}>", children(sxpr), f"</{name(sxpr)}>"


def to_string(sxpr: Sxpr) -> str:
    """The text of an expression: ASCII, whatever is in it.

    :raise ValueError: a text in it holds half a surrogate pair.
    """
    out = io.StringIO()
    show(sxpr, out)
    return out.getvalue()
