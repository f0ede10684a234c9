# SPDX-License-Identifier: LGPL-2.1-or-later
"""Several things that each have to be done, whatever becomes of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def each(steps: Iterable[Callable[[], object]]) -> None:
    """Take all steps in their order.

    :raise Exception: what the first one raised that failed, after the last one.
    """
    failure: Exception | None = None
    for step in steps:
        try:
            step()
        except Exception as error:
            failure = failure or error
    if failure is not None:
        raise failure
