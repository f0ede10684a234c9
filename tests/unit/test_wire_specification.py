# SPDX-License-Identifier: LGPL-2.1-or-later
"""docs/protocol.rst and the code that executes it say the same."""

from __future__ import annotations

import re
from pathlib import Path

from remus_colo.relocation import bulk, wire
from remus_colo.relocation.schema import SCHEMAS, MessageType

SPECIFICATION = (Path(__file__).parents[2] / "docs" / "protocol.rst").read_text(encoding="utf-8")
UNITS = {"KiB": 1024, "MiB": 1024 * 1024}
ROW = re.compile(
    r"^(?P<number>\d+) +(?P<name>[A-Z_]+) +(?:both|P to B|B to P) +(?:both|control|data) +"
    r"(?P<limit>\d+) (?P<unit>KiB|MiB) *(?P<payload>.*)$",
    re.M,
)


def test_message_table() -> None:
    rows = {row["name"]: row for row in ROW.finditer(SPECIFICATION)}
    assert list(rows) == [kind.name for kind in MessageType]
    for kind, schema in SCHEMAS.items():
        row = rows[kind.name]
        assert int(row["number"]) == kind
        assert int(row["limit"]) * UNITS[row["unit"]] == schema.limit_bytes
        assert (row["payload"] == "raw") == schema.bulk
        assert re.findall(r"``(\w+)``", row["payload"]) == list(schema.fields)


def test_every_message_is_explained() -> None:
    for kind in MessageType:
        assert re.search(rf"^(?:[A-Z_]+, )*{kind.name}(?:, [A-Z_]+)*\n    \S", SPECIFICATION, re.M), kind.name


def test_numbers() -> None:
    assert f"``{wire.MAGIC.decode()}``" in SPECIFICATION
    assert f"({wire.MAGIC.hex(' ')})" in SPECIFICATION
    assert f"{wire.HEADER_BYTES} bytes, then the payload" in SPECIFICATION
    assert f"at most {bulk.MAX_PAGES_PER_FRAME} pages" in SPECIFICATION
