# SPDX-License-Identifier: LGPL-2.1-or-later
"""Looking into S-expressions, under the names that xend's ``sxp`` module had and scripts use.

An *element* is a list that is not empty; its first item is its name.  A list ``(@ (key value) ...)`` right after the
name holds attributes; the other items are children.  None of these functions raises for an expression of another
form: they give what they give for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# str, or a list of the same; numbers where a program made it rather than the parser
Sxpr = Any

ATTRIBUTES = "@"


def _is_list(sxpr: Sxpr) -> bool:
    return isinstance(sxpr, list | tuple)


def elementp(sxpr: Sxpr, elt: str | None = None) -> bool:
    """Whether it is an element, and of that name if one is given."""
    return _is_list(sxpr) and len(sxpr) > 0 and (elt is None or sxpr[0] == elt)


def name(sxpr: Sxpr) -> Sxpr:
    """Of an element; an atom is its own; None for an empty list."""
    if isinstance(sxpr, str):
        return sxpr
    return sxpr[0] if elementp(sxpr) else None


def attributes(sxpr: Sxpr) -> list[Sxpr]:
    """The ``(key value)`` lists of an element."""
    if elementp(sxpr) and len(sxpr) > 1 and elementp(sxpr[1], ATTRIBUTES):
        return list(sxpr[1][1:])
    return []


def attribute(sxpr: Sxpr, key: str, val: Sxpr = None) -> Sxpr:
    """:param val: what is returned if there is none of that key; likewise below."""
    for pair in attributes(sxpr):
        if elementp(pair, key) and len(pair) > 1:
            return pair[1]
    return val


def children(sxpr: Sxpr, elt: str | None = None) -> list[Sxpr]:
    """Of an element; with ``elt`` only those that are elements of that name."""
    if not elementp(sxpr):
        return []
    first = 2 if len(sxpr) > 1 and elementp(sxpr[1], ATTRIBUTES) else 1
    found = list(sxpr[first:])
    return [item for item in found if elementp(item, elt)] if elt else found


def child(sxpr: Sxpr, elt: str, val: Sxpr = None) -> Sxpr:
    """The first child that is an element of that name."""
    return next(iter(children(sxpr, elt)), val)


def child_at(sxpr: Sxpr, index: int, val: Sxpr = None) -> Sxpr:
    """The child at an index, from 0."""
    found = children(sxpr)
    return found[index] if index < len(found) else val


def child0(sxpr: Sxpr, val: Sxpr = None) -> Sxpr:
    return child_at(sxpr, 0, val)


def child1(sxpr: Sxpr, val: Sxpr = None) -> Sxpr:
    return child_at(sxpr, 1, val)


def child2(sxpr: Sxpr, val: Sxpr = None) -> Sxpr:
    return child_at(sxpr, 2, val)


def child3(sxpr: Sxpr, val: Sxpr = None) -> Sxpr:
    return child_at(sxpr, 3, val)


def child4(sxpr: Sxpr, val: Sxpr = None) -> Sxpr:
    return child_at(sxpr, 4, val)


def child_value(sxpr: Sxpr, elt: str, val: Sxpr = None) -> Sxpr:
    """The first item of the child of that name: ``(port 8002)`` has the value ``8002``."""
    return child_at(child(sxpr, elt), 0, val)


def has_id(sxpr: Sxpr, id: str) -> bool:
    """Whether its attribute ``id`` is that."""
    return bool(attribute(sxpr, "id") == id)


def child_with_id(sxpr: Sxpr, id: str, val: Sxpr = None) -> Sxpr:
    """The first item of a list with that id."""
    return next((item for item in sxpr if has_id(item, id)), val) if _is_list(sxpr) else val


def with_id(sxpr: Sxpr, id: str, val: Sxpr = None) -> Sxpr:
    """The first expression with that id within a list, at any depth."""
    if _is_list(sxpr):
        for item in sxpr:
            found = item if has_id(item, id) else with_id(item, id)
            if found is not None:
                return found
    return val


def elements(sxpr: Sxpr, ctxt: Any = None) -> Iterator[tuple[Sxpr, Any]]:
    """An element and all lists below it, each before its own, as ``(element, context)``.

    :param ctxt: context of the first. That of the others is ``(index among the children, parent, its context)``.
    """
    yield sxpr, ctxt
    for index, item in enumerate(children(sxpr)):
        if _is_list(item):
            yield from elements(item, (index, sxpr, ctxt))


def child_map(sxpr: Sxpr) -> tuple[dict[Sxpr, list[Sxpr]], list[Sxpr]]:
    """Children that are elements, by name, and the others."""
    by_name: dict[Sxpr, list[Sxpr]] = {}
    others = []
    for item in children(sxpr):
        if elementp(item) and not _is_list(item[0]):
            by_name.setdefault(item[0], []).append(item)
        else:
            others.append(item)
    return by_name, others


def merge(s1: Sxpr, s2: Sxpr) -> Sxpr:
    """Both in one: what ``s1`` has counts, what only ``s2`` has is added, elements of one name pair by pair."""
    if s1 is None or s2 is None or not elementp(s1):
        return s2 if s1 is None else s1
    merged = [name(s1)]
    ours, values = child_map(s1)
    theirs, _ = child_map(s2)
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        merge_list(merged, ours.get(key, []), theirs.get(key, []))
    return merged + values


def merge_list(sxpr: list[Sxpr], l1: list[Sxpr], l2: list[Sxpr]) -> list[Sxpr]:
    """Append the merged pairs of two lists of elements to ``sxpr``, and what the longer one has more."""
    paired = min(len(l1), len(l2))
    sxpr += [merge(first, second) for first, second in zip(l1[:paired], l2[:paired], strict=True)]
    sxpr += [*l1[paired:], *l2[paired:]]
    return sxpr
