# SPDX-License-Identifier: LGPL-2.1-or-later
"""The load generator in the client's namespace, as one thing that is started, watched and asked for its result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from remus_colo.testbed.bed import Bed
from remus_colo.testbed.errors import BedError, BedTimeout
from remus_colo.testbed.guest_image import ADDRESS
from remus_colo.testbed.scenario_run import words
from remus_colo.testbed.worktree import CHECKOUT

START_TIMEOUT_S = 90.0
# Beyond its own time: it drains, for two minutes at most, and reads all redis keys back.
END_TIMEOUT_S = 240.0
_LOOK_S = 0.05

Result = dict[str, Any]


class LoadRun:
    """A load under way.

    :param seconds: how long it lasts, from when all its connections stand.
    :param target: the guest's address.
    :param options: of ``remus_colo.testbed.load``, with underscores.
    """

    def __init__(self, bed: Bed, seconds: float, target: str = ADDRESS, **options: Any) -> None:
        self.seconds = seconds
        self._files = tempfile.TemporaryDirectory(prefix="testbed-load-")
        self._path = Path(self._files.name)
        argv = [sys.executable, "-m", "remus_colo.testbed.load", "--target", target, "--seconds", f"{seconds:g}",
                "--json", "--progress", "--log", str(self._path / "log"), *words(options)]  # fmt: skip
        with open(self._path / "out", "wb") as out, open(self._path / "err", "wb") as err:
            self._process = bed.client_popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_started(self) -> None:
        """Until all connections stand and the first requests go out.

        :raise BedError: the guest does not answer.
        """
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not any(event["event"] == "start" for event in self.log()):
            self._check_running()
            if time.monotonic() > deadline_s:
                raise BedTimeout(f"the load did not begin within {START_TIMEOUT_S:g} s")
            time.sleep(_LOOK_S)

    def let_run(self, seconds: float) -> None:
        """Let it go on for so long.  :raise BedError: it has ended."""
        deadline_s = time.monotonic() + seconds
        while (remaining_s := deadline_s - time.monotonic()) > 0:
            self._check_running()
            time.sleep(min(remaining_s, _LOOK_S))

    def result(self) -> Result:
        """Wait for its end.  :raise BedError: it has none, because the guest did not answer at the start."""
        try:
            self._process.wait(self.seconds + START_TIMEOUT_S + END_TIMEOUT_S)
        except subprocess.TimeoutExpired as cause:
            raise BedTimeout("the load did not end in time") from cause
        last: Result | None = None
        for found in self._objects("out"):
            last = found
        if last is None or last.get("progress"):
            raise BedError(f"the load gave no result: {self._errors()}")
        return last

    def progress(self) -> Result | None:
        """The counts as of a second ago at most; None before the first."""
        last = None
        for found in self._objects("out"):
            if found.get("progress"):
                last = found
        return last

    def log(self) -> list[Result]:
        """What it logged so far: ``start``, ``error``, ``gap``, ``end``."""
        return list(self._objects("log"))

    def gaps(self) -> list[tuple[float, float]]:
        """Begin and end of the gaps so far without any reply, of all services together, CLOCK_MONOTONIC in seconds."""
        return [
            (float(event["start_s"]), float(event["t"]))
            for event in self.log()
            if event["event"] == "gap" and event["service"] == "all"
        ]

    def save(self, directory: Path, name: str) -> None:
        """Keep what it logged and printed."""
        for part in ("log", "out", "err"):
            if (self._path / part).exists():
                (directory / f"{name}.{part}").write_bytes((self._path / part).read_bytes())

    def close(self) -> None:
        """Ends it, if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._files.cleanup()

    def _check_running(self) -> None:
        if self._process.poll() is not None:
            raise BedError(f"the load has ended with status {self._process.returncode}: {self._errors()}")

    def _errors(self) -> str:
        return (self._path / "err").read_text(errors="replace").strip()[-1500:] or "it printed no error"

    def _objects(self, part: str) -> Iterator[Result]:
        path = self._path / part
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines(keepends=True):
            if line.startswith("{") and line.endswith("\n"):
                yield json.loads(line)
