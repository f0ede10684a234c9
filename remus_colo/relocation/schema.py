# SPDX-License-Identifier: LGPL-2.1-or-later
"""Message types of the replication protocol: which are control, which are bulk, how large, with which fields.

The specification is docs/protocol.rst, section "Messages"; this table executes it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from remus_colo.errors import MessageError

KIB = 1024
MIB = 1024 * KIB

CONTROL_LIMIT_BYTES = 64 * KIB


class MessageType(enum.IntEnum):
    HELLO = 1
    REFUSE = 2
    CLOCK_PROBE = 3
    CLOCK_REPLY = 4
    CREATE = 5
    CREATE_STREAM = 6
    CREATED = 7
    PREPARE = 8
    DIRTY = 9
    CHECKPOINT_BEGIN = 10
    PAGES = 11
    STATE = 12
    CHECKPOINT_END = 13
    ACK = 14
    RESUMED = 15
    ABORT = 16
    HEARTBEAT = 17
    TAKEOVER = 18
    STOP = 19
    BYE = 20
    CHECKPOINT_STREAM = 21


Check = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_natural(value: Any) -> bool:
    # bool is an int to Python, not to the protocol
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_versions(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_natural(item) for item in value)


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _is_channel(value: Any) -> bool:
    return value in ("control", "data") and isinstance(value, str)


# What a field must be: in words, for the refusal, and as a test.
Rule = tuple[str, Check]

TEXT: Rule = ("a string", _is_text)
NATURAL: Rule = ("an integer, zero or more", _is_natural)
INTEGER: Rule = ("an integer", _is_integer)
OBJECT: Rule = ("an object", _is_object)
VERSIONS: Rule = ("a list of version numbers, not empty", _is_versions)
OBJECTS: Rule = ("a list of objects", _is_list_of_objects)
CHANNEL: Rule = ('"control" or "data"', _is_channel)


@dataclass(frozen=True, slots=True)
class Schema:
    """What one message type may carry.

    ``fields`` are those that must be there; a control message may carry more, which an older
    receiver ignores.  ``limit_bytes`` caps the payload.
    """

    bulk: bool
    limit_bytes: int
    fields: Mapping[str, Rule] = field(default_factory=dict)

    def check_fields(self, kind: MessageType, fields: Mapping[str, Any]) -> None:
        """:raise MessageError: a field is missing or of another kind than the specification's."""
        for name, (wanted, is_valid) in self.fields.items():
            if name not in fields:
                raise MessageError(f"{kind.name} lacks its field {name!r} (expected {wanted})")
            if not is_valid(fields[name]):
                raise MessageError(f"{kind.name}: field {name!r} must be {wanted}, got {fields[name]!r:.80}")


def _control(limit_bytes: int = CONTROL_LIMIT_BYTES, **fields: Rule) -> Schema:
    return Schema(bulk=False, limit_bytes=limit_bytes, fields=fields)


def _bulk(limit_bytes: int) -> Schema:
    return Schema(bulk=True, limit_bytes=limit_bytes)


SCHEMAS: Mapping[MessageType, Schema] = {
    MessageType.HELLO: _control(versions=VERSIONS, host=TEXT, channel=CHANNEL),
    MessageType.REFUSE: _control(reason=TEXT, exit_status=NATURAL),
    MessageType.CLOCK_PROBE: _control(sent_ns=INTEGER),
    MessageType.CLOCK_REPLY: _control(sent_ns=INTEGER, received_ns=INTEGER, replied_ns=INTEGER),
    MessageType.CREATE: _control(MIB, name=TEXT, mode=TEXT, config=OBJECT, tunnel=OBJECT),
    MessageType.CREATE_STREAM: _bulk(4 * MIB),
    MessageType.CREATED: _control(domid=NATURAL, ports=OBJECT, addresses=OBJECT),
    MessageType.PREPARE: _control(),
    # one bit per gfn: 8 MiB are a guest of 256 GiB
    MessageType.DIRTY: _bulk(8 * MIB),
    MessageType.CHECKPOINT_BEGIN: _control(256 * KIB, pages=NATURAL, vifs=OBJECTS),
    MessageType.PAGES: _bulk(8 * MIB),
    MessageType.STATE: _bulk(16 * MIB),
    MessageType.CHECKPOINT_END: _control(digest=TEXT, frames=NATURAL, bytes=NATURAL, pages=NATURAL),
    MessageType.ACK: _control(),
    MessageType.RESUMED: _control(),
    MessageType.ABORT: _control(reason=TEXT),
    MessageType.HEARTBEAT: _control(sequence=NATURAL, seen=NATURAL, sent_ns=INTEGER, state=TEXT),
    MessageType.TAKEOVER: _control(),
    MessageType.STOP: _control(reason=TEXT),
    MessageType.BYE: _control(),
    MessageType.CHECKPOINT_STREAM: _bulk(8 * MIB),
}
