# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading ``/etc/xen/xend-config.sxp``: docs/configuration.rst.

The file is a sequence of lists ``(key value)``.  As for xend, the first of several with one key counts, and
of several values the first; keys that nobody knows are accepted.  Unlike xend, we tell of each such case, and
refuse what cannot be meant.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remus_colo import sxp
from remus_colo.config_keys import COLO_KEYS, CONFIG_DIR, GROUP, OTHER_XEND_KEYS, XEND_KEYS, Key
from remus_colo.errors import ConfigError
from remus_colo.options import HEARTBEATS_PER_TIMEOUT
from remus_colo.sxp import Located, Parser, Sxpr, elementp

DEFAULT_PATH = CONFIG_DIR / "xend-config.sxp"
# names another file, as it did for xend
ENVIRONMENT = "XEND_CONFIG"
LIMIT_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Setting:
    """A value that the file gives.

    :param text: as it stands there.
    :param where: ``file line n``.
    """

    value: Any
    text: str
    where: str


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a file says, or none (then all is default).

    :param xend: settings by key; ``colo`` those of our group.
    :param tree: the whole file as ``["xend-config", ...]``, for scripts.
    :param notes: sentences for the user.
    """

    path: Path | None = None
    xend: Mapping[str, Setting] = field(default_factory=dict)
    colo: Mapping[str, Setting] = field(default_factory=dict)
    tree: Sxpr = ("xend-config",)
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Any:
        """The value of one of xend's keys that we use, or its default."""
        return self.xend[name].value if name in self.xend else _default(XEND_KEYS[name])

    def ours(self, name: str) -> Any:
        """The value of a key of our group, or its default."""
        return self.colo[name].value if name in self.colo else _default(COLO_KEYS[name])

    @property
    def bridge(self) -> str:
        """Our ``bridge``, else the ``bridge=`` of vif-script or network-script, which was xend's way to say it."""
        for word in (*self["vif-script"], *self["network-script"]):
            if not self.ours("bridge") and word.startswith("bridge="):
                return str(word.removeprefix("bridge="))
        return str(self.ours("bridge"))


def _default(key: Key) -> Any:
    return key.kind.read(key.default)


def default_path() -> Path:
    return Path(os.environ.get(ENVIRONMENT) or DEFAULT_PATH)


def load(path: Path | None = None) -> Configuration:
    """Read a file.

    :param path: that must be there; None: the one that xend would have read, if there is one, or the one that
        XEND_CONFIG names.
    :raise ConfigError: it cannot be read, is no sequence of S-expressions, or has a value that is not
        allowed.
    """
    source = default_path() if path is None else path
    try:
        with open(source, "rb") as file:
            text = file.read(LIMIT_BYTES + 1)
    except FileNotFoundError:
        if path is None and not os.environ.get(ENVIRONMENT):
            return Configuration()
        named = f": {ENVIRONMENT} names it" if path is None else ""
        raise ConfigError(f"there is no configuration file {source}{named}") from None
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {source}: {error.strerror}") from error
    if len(text) > LIMIT_BYTES:
        raise ConfigError(f"{source} has more than {LIMIT_BYTES} bytes: that is no configuration file")
    return read(text, source)


def read(text: str | bytes, source: Path) -> Configuration:
    """As :func:`load`, of a text.

    :param source: its name in messages.
    """
    parser = Parser(located=True)
    try:
        if data := sxp.without_mark(text):
            parser.input(data)
        parser.input_eof()
    except sxp.ParseError as error:
        raise ConfigError(f"{source} {error}") from error
    reader = _Reader(source)
    reader.notes += [f"{source} line {note.line} column {note.column}: {note.text}" for note in parser.notes]
    items = parser.get_all()
    xend, groups = reader.settings(items, XEND_KEYS, OTHER_XEND_KEYS | {GROUP})
    colo, _ = reader.settings(groups, COLO_KEYS, frozenset())
    _check_heartbeat(colo)
    return Configuration(source, xend, colo, ["xend-config", *items], tuple(reader.notes))


class _Reader:
    """Makes settings of lists, and gathers notes."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.notes: list[str] = []

    def _where(self, item: Located) -> str:
        return f"{self.source} line {item.line}"

    def settings(
        self, items: Iterable[Sxpr], keys: Mapping[str, Key], known: frozenset[str]
    ) -> tuple[dict[str, Setting], list[Sxpr]]:
        """The settings of a level of the file, and what is in the lists of our group there."""
        found: dict[str, Setting] = {}
        group: list[Sxpr] = []
        seen: dict[str, int] = {}
        for item in items:
            if not isinstance(item, Located):
                self.notes.append(f"{self.source}: {item!r} stands alone and says nothing: write (key value)")
                continue
            if not elementp(item) or not isinstance(item[0], str):
                raise ConfigError(f"{self._where(item)}: a list begins with the name of a key")
            name = item[0]
            if name == GROUP and name in known:
                group += item[1:]
                continue
            if name in seen:
                shown = sxp.to_string(name)  # one that nobody knows may hold anything
                self.notes.append(
                    f"{self._where(item)}: {shown} is set in line {seen[name]} already, and that one counts"
                )
                continue
            seen[name] = item.line
            if name in keys:
                if (setting := self._setting(name, keys[name], item)) is not None:
                    found[name] = setting
            elif name not in known:
                self._unknown(name, item, keys)
        return found, group

    def _setting(self, name: str, key: Key, item: Located) -> Setting | None:
        where = self._where(item)
        if len(item) < 2:
            self.notes.append(f"{where}: {name} has no value, so its default counts")
            return None
        if len(item) > 2:
            self.notes.append(
                f"{where}: {name} has more than one value, and only the first counts: put all between quotes"
            )
        text = item[1]
        shown = sxp.to_string(text)
        if not isinstance(text, str):
            raise ConfigError(
                f"{where}: {name} cannot be {shown}: {key.kind.allowed} is allowed, and no list"
            )
        try:
            return Setting(key.kind.read(text), text, where)
        except re.error as error:
            # what xend made of one is told by a note, and those are not shown with an error
            hint = "; between quotes a backslash is written twice" if "\\" in text else ""
            raise ConfigError(
                f"{where}: {name} cannot be {shown}: it is no regular expression: {error}{hint}"
            ) from error
        except ValueError as error:
            raise ConfigError(f"{where}: {name} cannot be {shown}: {key.kind.allowed} is allowed") from error

    def _unknown(self, name: str, item: Located, keys: Mapping[str, Key]) -> None:
        near = difflib.get_close_matches(name, keys, 1, 0.8)
        if not near and keys is XEND_KEYS and name in COLO_KEYS:
            hint = f"; it belongs into the group ({GROUP} ...)"
        else:
            hint = f"; is {near[0]} meant?" if near else ""
        self.notes.append(f"{self._where(item)}: nobody knows the key {sxp.to_string(name)}{hint}")


def _check_heartbeat(colo: Mapping[str, Setting]) -> None:
    """:raise ConfigError: what the file sets cannot go together, whatever the command line adds to it."""
    timeout, interval = colo.get("heartbeat-timeout"), colo.get("heartbeat-interval")
    if (
        timeout is not None
        and interval is not None
        and timeout.value < HEARTBEATS_PER_TIMEOUT * interval.value
    ):
        raise ConfigError(
            f"{timeout.where}: heartbeat-timeout cannot be {timeout.value}: "
            f"{HEARTBEATS_PER_TIMEOUT} times heartbeat-interval, which is {interval.value}, or more is allowed"
        )
