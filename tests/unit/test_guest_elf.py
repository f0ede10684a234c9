# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which libraries a program needs: asked of programs that were linked for the question."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from remus_colo.testbed.guest_elf import closure, needed

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")


def link(output: Path, source: str, *options: str) -> bytes:
    words = ["cc", "-x", "c", "-o", str(output), "-", *options]
    subprocess.run(words, input=source.encode(), check=True, capture_output=True)
    return output.read_bytes()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """program -> libone.so -> libtwo.so; and a static program."""
    folder = tmp_path_factory.mktemp("elf")
    shared = ("-shared", "-fPIC", "-nostdlib", "-Wl,--no-as-needed", f"-L{folder}")
    return {
        "libtwo.so": link(folder / "libtwo.so", "int two;", *shared, "-Wl,-soname,libtwo.so"),
        "libone.so": link(folder / "libone.so", "int one;", *shared, "-Wl,-soname,libone.so", "-ltwo"),
        "program": link(
            folder / "program", "int main;", f"-L{folder}", "-nostdlib", "-Wl,--no-as-needed", "-lone", "-Wl,-e,main",
            "-Wl,--allow-shlib-undefined",
        ),
        "static": link(folder / "static", "int main;", "-nostdlib", "-static", "-Wl,-e,main"),
    }  # fmt: skip


def test_the_direct_needs_are_read(built: dict[str, bytes]) -> None:
    assert needed(built["program"]) == ["libone.so"]
    assert needed(built["libone.so"]) == ["libtwo.so"]
    assert needed(built["libtwo.so"]) == []


def test_a_static_program_needs_nothing(built: dict[str, bytes]) -> None:
    assert needed(built["static"]) == []


def test_the_closure_follows_libraries(built: dict[str, bytes]) -> None:
    assert closure([built["program"], built["static"]], built) == {"libone.so", "libtwo.so"}


def test_a_library_that_is_nowhere_is_named(built: dict[str, bytes]) -> None:
    with pytest.raises(KeyError, match=r"libtwo\.so"):
        closure([built["program"]], {"libone.so": built["libone.so"]})


@pytest.mark.parametrize(
    "data", [b"", b"#!/bin/sh\n" * 10, b"\x7fELF\x01\x01" + bytes(100), b"\x7fELF\x02\x02" + bytes(100)]
)
def test_what_is_no_program_of_this_machine_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="ELF file"):
        needed(data)
