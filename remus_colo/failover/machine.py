# SPDX-License-Identifier: LGPL-2.1-or-later
"""What both failover state machines share: a table, one place that moves, and invariants after each move.

The machines decide, they do not act: an event goes in, the new state and the actions to take, in order,
come out.  The tables are in ``primary.py`` and ``backup.py``.
"""

from __future__ import annotations

import enum
import itertools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from remus_colo.errors import MessageError, StateError

log = logging.getLogger(__name__)

S = TypeVar("S", bound=enum.Enum)
E = TypeVar("E", bound=enum.Enum)
A = TypeVar("A", bound=enum.Enum)


@dataclass(frozen=True, slots=True)
class Step(Generic[S, E, A]):
    """One event's outcome.

    :param actions: to be taken in this order. They are idempotent: one may be asked for again.
    """

    old: S
    event: E
    new: S
    actions: tuple[A, ...]

    @property
    def moved(self) -> bool:
        return self.old is not self.new


Table = Mapping[tuple[S, E], tuple[S, tuple[A, ...]]]

# From any of these states, on any of these events, to this state (None: as it was), with these actions.
Row = tuple[tuple[S, ...], tuple[E, ...], S | None, tuple[A, ...]]


def expand(rows: Iterable[Row[S, E, A]]) -> Table[S, E, A]:
    """The table that the rows describe.

    :raise StateError: two rows decide the same case.
    """
    table: dict[tuple[S, E], tuple[S, tuple[A, ...]]] = {}
    for states, events, new, actions in rows:
        for case in itertools.product(states, events):
            if case in table:
                raise StateError(f"two rows for {case[1].value!r} while {case[0].value!r}")
            table[case] = (case[0] if new is None else new, actions)
    return table


class Machine(Generic[S, E, A]):
    """A state and the table that moves it.

    What the table does not list is not allowed: from the peer it is a
    :class:`~remus_colo.errors.MessageError`, from ourselves a :class:`~remus_colo.errors.StateError`.  The
    state is then as before.
    """

    TABLE: ClassVar[Mapping]  # type: ignore[type-arg]
    PEER_EVENTS: ClassVar[frozenset]  # type: ignore[type-arg]
    FINAL: ClassVar[frozenset]  # type: ignore[type-arg]
    # What a checkpoint goes through, and comes back from: many times a second, and nobody's news.
    CYCLE: ClassVar[frozenset]  # type: ignore[type-arg]

    def __init__(self, initial: S, name: str) -> None:
        self._state = initial
        self._log = log.getChild(name)
        self.visited: set[S] = {initial}
        self.ordered: set[A] = set()

    @property
    def state(self) -> S:
        return self._state

    @property
    def final(self) -> bool:
        """Whether nothing will ever happen again."""
        return self._state in self.FINAL

    def routine(self, step: Step[S, E, A]) -> bool:
        """Whether the move is but part of a checkpoint."""
        return step.old in self.CYCLE and step.new in self.CYCLE

    def handle(self, event: E, *, epoch: int = 0, reason: str = "") -> Step[S, E, A]:
        """Moves the machine.

        :param epoch: the checkpoint concerned, for the log.
        :param reason: why, in words, for the log.
        :raise MessageError: the peer must not say this now.
        :raise StateError: we must not do this now, a bug; or an invariant is broken.
        """
        old = self._state
        new, actions = self._look_up(event)
        self._state = new
        self.visited.add(new)
        self.ordered.update(actions)
        step = Step(old, event, new, actions)
        if step.moved:
            words = f" reason={reason}" if reason else ""
            level = logging.DEBUG if self.routine(step) else logging.INFO
            self._log.log(level, "%s -> %s on %s epoch=%d%s", old.value, new.value, event.value, epoch, words)
        self.check_invariants(step)
        return step

    def _look_up(self, event: E) -> tuple[S, tuple[A, ...]]:
        try:
            new, actions = self.TABLE[self._state, event]
        except KeyError:
            if event in self.PEER_EVENTS:
                raise MessageError(
                    f"the peer sent {event.value!r} while we are {self._state.value!r}"
                ) from None
            raise StateError(f"event {event.value!r} is not allowed while {self._state.value!r}") from None
        return new, actions

    def check_invariants(self, step: Step[S, E, A]) -> None:
        """:raise StateError: ``step`` broke one of those in the class's docstring."""
        raise NotImplementedError


def require(holds: bool, invariant: str) -> None:
    if not holds:
        raise StateError(f"broken invariant: {invariant}")
