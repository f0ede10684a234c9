# SPDX-License-Identifier: LGPL-2.1-or-later
"""The last step of a load: reads every redis key back over a fresh connection, and compares."""

from __future__ import annotations

import asyncio
import re
import time

from remus_colo.errors import ProtocolError
from remus_colo.testbed.load_counter import Counter
from remus_colo.testbed.load_report import Recorder

_BULK_HEADER = re.compile(rb"\$(-1|[0-9]{1,9})\r\n")
# Keys asked for in one go, so that requests and replies cannot fill both directions' buffers.
_BATCH = 100


async def verify(
    recorder: Recorder, service: str, address: tuple[str, int], counters: list[Counter], timeout_s: float
) -> bool:
    """Records each key that is not what was acknowledged.  False, with an error, if the keys cannot be read."""
    try:
        async with asyncio.timeout(timeout_s):
            values = await _read_values(address, [counter.key for counter in counters])
    except (OSError, EOFError, asyncio.LimitOverrunError, ProtocolError) as failure:
        detail = f"keys cannot be read back: {str(failure) or f'no answer within {timeout_s} s'}"
        recorder.error(service, "verify", "verify", detail, time.monotonic())
        return False
    for counter, value in zip(counters, values, strict=True):
        recorder.verdict(service, "verify", counter.finally_is(value), time.monotonic())
    return True


async def _read_values(address: tuple[str, int], keys: list[str]) -> list[int]:
    reader, writer = await asyncio.open_connection(*address)
    try:
        values = []
        for begin in range(0, len(keys), _BATCH):
            batch = keys[begin : begin + _BATCH]
            writer.write(b"".join(f"*2\r\n$3\r\nGET\r\n${len(key)}\r\n{key}\r\n".encode() for key in batch))
            for _ in batch:
                values.append(await _bulk_integer(reader))
        return values
    finally:
        writer.close()


async def _bulk_integer(reader: asyncio.StreamReader) -> int:
    """A bulk string that holds an integer; no such key is 0."""
    header = await reader.readuntil(b"\r\n")
    match = _BULK_HEADER.fullmatch(header)
    if not match:
        raise ProtocolError(f"no bulk string: {header!r}")
    if match[1] == b"-1":
        return 0
    body = await reader.readexactly(int(match[1]) + 2)
    if not re.fullmatch(rb"-?[0-9]+\r\n", body):
        raise ProtocolError(f"no integer: {body!r}")
    return int(body)
