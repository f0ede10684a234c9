# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every public name of Xen 4.4's modules: it is there with its parameters, or the table in docs/classic.rst
says that it is gone.
"""

from __future__ import annotations

import importlib
import inspect
import re
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import remus_colo.classic.finder

assert remus_colo.classic.finder.XenFinder

pytest.importorskip("pyroute2", reason="pyroute2 is not installed (Debian: python3-pyroute2)")
pytest.importorskip("pyxs", reason="pyxs is not installed (Debian: python3-pyxs)")

REPOSITORY = Path(__file__).parents[2]
LINE = re.compile(r"(?P<module>[\w.]+) (?P<name>[\w.]+)(?:\((?P<parameters>.*)\))?")
NAMES = [
    found.groups()
    for line in (REPOSITORY / "tests/data/classic/names.txt").read_text().splitlines()
    if not line.startswith("#") and (found := LINE.fullmatch(line))
]
MODULES = sorted({module for module, _, _ in NAMES})


@cache
def table() -> dict[str, set[str]]:
    """What is between double back-quotes in docs/classic.rst, by heading."""
    text = (REPOSITORY / "docs/classic.rst").read_text()
    parts = re.split(r"\n([^\n]+)\n-{5,}\n", text)
    return {
        heading: set(re.findall(r"``([^`]+)``", body))
        for heading, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def mentioned(module: str) -> set[str]:
    for heading, names in table().items():
        if f"``{module}``" in heading:
            return names
    package, _, _ = module.rpartition(".")
    return next(
        names for heading, names in table().items() if f"``{'.'.join(package.split('.')[:2])}``" in heading
    )


def find(module: Any, name: str) -> tuple[bool, Any]:
    """Whether it is there, and what it is, if that can be had without an object."""
    holder, _, attribute = name.rpartition(".")
    if not holder:
        return hasattr(module, name), getattr(module, name, None)
    kind = getattr(module, holder, None)
    if kind is None:
        return False, None
    if hasattr(kind, attribute):
        return True, getattr(kind, attribute)
    if any(f"get_{getter}" == attribute for getter, *_ in getattr(module, "_GETTERS", ())):
        return True, None
    sources = [
        inspect.getsource(base)
        for base in kind.__mro__
        if base.__module__.startswith(("xen.", "remus_colo."))
    ]
    return any(re.search(rf"\bself\.{attribute}\b.*=", source) for source in sources), None


def test_the_list_is_read_whole() -> None:
    lines = (REPOSITORY / "tests/data/classic/names.txt").read_text().splitlines()
    assert len(NAMES) == sum(not line.startswith("#") for line in lines) > 600


@pytest.mark.parametrize("module", MODULES)
def test_every_name_is_there_or_said_to_be_gone(module: str) -> None:
    said = mentioned(module)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        assert module.split(".", 2)[2] in said
        return
    missing = []
    for _, name, _ in (entry for entry in NAMES if entry[0] == module):
        there, _ = find(found, name)
        # an attribute may be left out where its class is named
        named = [pattern for pattern in said if fnmatchcase(name, pattern)]
        if not named and (not there or "." not in name):
            missing.append(name)
    # what goes with a class that is gone need not be named
    assert [
        name for name in missing if name.partition(".")[0] == name or hasattr(found, name.partition(".")[0])
    ] == []


@pytest.mark.parametrize(
    "entry", [entry for entry in NAMES if entry[2] is not None], ids=lambda entry: ".".join(entry[:2])
)
def test_every_parameter_is_there(entry: tuple[str, str, str]) -> None:
    module, name, parameters = entry
    try:
        _, found = find(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return
    if found is None or not callable(found):
        return
    ours = list(inspect.signature(found).parameters.values())
    if inspect.isfunction(found) and "." in name and ours and ours[0].name == "self":
        ours = ours[1:]
    for old, new in zip(filter(None, parameters.split(", ")), ours, strict=False):
        assert new.name == old.strip("*=")
        assert new.kind in (new.POSITIONAL_OR_KEYWORD, new.VAR_POSITIONAL, new.VAR_KEYWORD)
        assert not old.endswith("=") or new.default is not new.empty
    count = len(list(filter(None, parameters.split(", "))))
    assert len(ours) >= count
    assert all(
        new.default is not new.empty or new.kind in (new.VAR_POSITIONAL, new.VAR_KEYWORD)
        for new in ours[count:]
    )
