# SPDX-License-Identifier: LGPL-2.1-or-later
"""Times of a script's sections, on stdout."""

from __future__ import annotations

import time

__all__ = ["NullProfiler", "ProfileBlock", "Profiler"]


class ProfileBlock:
    """A section that is timed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def enter(self) -> None:
        print(f"PROF: entered {self.name} at {time.time():f}")

    def exit(self) -> None:
        print(f"PROF: exited {self.name} at {time.time():f}")


class NullProfiler:
    """Says nothing."""

    def enter(self, name: str) -> None:
        pass

    def exit(self, name: str | None = None) -> None:
        pass


class Profiler:
    """Sections within sections."""

    def __init__(self) -> None:
        self.blocks: dict[str, ProfileBlock] = {}
        self.running: list[ProfileBlock] = []

    def enter(self, name: str) -> None:
        block = self.blocks.setdefault(name, ProfileBlock(name))
        block.enter()
        self.running.append(block)

    def exit(self, name: str | None = None) -> None:
        """Leave the section ``name``, and all within it; without a name the innermost.

        :raise KeyError: it is not running.
        """
        if name is not None and all(block.name != name for block in self.running):
            raise KeyError(f"block {name} not running")
        if not self.running:
            raise KeyError("no block running")
        while True:
            block = self.running.pop()
            block.exit()
            if name is None or block.name == name:
                return
