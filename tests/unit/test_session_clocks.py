# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two sides that measure each other's clock over a slow link."""

from __future__ import annotations

import pytest

from remus_colo.errors import MessageError, XenError
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.wire import Message
from remus_colo.session.clocks import ClockWatch

GUEST_AHEAD_NS = 600 * 10**9


class World:
    """Time passes only where it is told to."""

    def __init__(self) -> None:
        self.now_ns = 10**12

    def clock(self, ahead_ns: int) -> Clock:
        return Clock(self, ahead_ns)


class Clock:
    def __init__(self, world: World, ahead_ns: int) -> None:
        self._world = world
        self._ahead_ns = ahead_ns

    def now_ns(self) -> int:
        return self._world.now_ns + self._ahead_ns


def message(kind: MessageType, fields: dict[str, object]) -> Message:
    return Message(kind, generation=1, fields=fields)


class Link:
    """Carries messages between two watches, each way taking its time."""

    def __init__(self, there_ns: int, back_ns: int) -> None:
        self.world = World()
        self.backup = ClockWatch(self.world.clock(0), self._to_primary)
        self.primary = ClockWatch(self.world.clock(GUEST_AHEAD_NS), self._to_backup)
        self._there_ns, self._back_ns = there_ns, back_ns

    def _to_primary(self, kind: MessageType, fields: dict[str, object]) -> None:
        self.world.now_ns += self._there_ns
        assert self.primary.take(message(kind, fields))

    def _to_backup(self, kind: MessageType, fields: dict[str, object]) -> None:
        self.world.now_ns += self._back_ns
        assert self.backup.take(message(kind, fields))


@pytest.mark.parametrize(("there_ns", "back_ns"), [(0, 0), (3_000_000, 1_000_000), (0, 40_000_000)])
def test_the_backup_learns_the_guests_clock(there_ns: int, back_ns: int) -> None:
    link = Link(there_ns, back_ns)
    assert link.backup.estimate() is None
    link.backup.ask()
    found = link.backup.estimate()
    assert found is not None
    assert found.offset_ns == GUEST_AHEAD_NS + (there_ns - back_ns) // 2
    assert abs(found.offset_ns - GUEST_AHEAD_NS) <= found.error_ns
    assert link.primary.estimate() is None  # who answers learns nothing


def test_other_messages_are_left_to_others() -> None:
    link = Link(0, 0)
    assert not link.backup.take(message(MessageType.ACK, {}))


def test_stamps_that_run_backwards_are_refused() -> None:
    link = Link(0, 0)
    reply = {"sent_ns": link.world.now_ns + 1, "received_ns": 5, "replied_ns": 5}
    with pytest.raises(MessageError, match="run backwards"):
        link.backup.take(message(MessageType.CLOCK_REPLY, reply))


def test_a_guest_that_has_ended_gives_no_answer_and_does_no_harm() -> None:
    class Gone:
        def now_ns(self) -> int:
            raise XenError("no such domain", operation="XEN_DOMCTL_get_system_time_offset", domid=7, errno=3)

    sent: list[MessageType] = []
    watch = ClockWatch(Gone(), lambda kind, fields: sent.append(kind))
    assert watch.take(message(MessageType.CLOCK_PROBE, {"sent_ns": 1}))
    assert sent == []
