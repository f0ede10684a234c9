# SPDX-License-Identifier: LGPL-2.1-or-later
"""cffi builder of ``remus_colo._native._compare``: the comparator, what runs packets through it, and compression.

Needs a C compiler and the kernel's headers (linux-libc-dev), and nothing of Xen.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cffi import FFI

HERE = Path(__file__).resolve().parent
# What Python sees; each needs only those before it.
HEADERS = ("compare.h", "rewrite.h", "queue.h", "frames.h", "pump.h", "rewriting.h", "zeros.h")
FOLDERS = ("compare", "rewrite", "path", "checkpoint")
SOURCES = sorted(path for folder in FOLDERS for path in (HERE / folder).glob("*.c"))
INNER_HEADERS = sorted(path for folder in FOLDERS for path in (HERE / folder).glob("*.h"))
COMPILE_ARGS = ["-std=gnu11", "-O2", "-Wall", "-Wextra"]


def declarations() -> str:
    """The headers' declarations; of what the C preprocessor reads, only the names of numbers."""
    text = "".join((HERE / name).read_text(encoding="utf-8") for name in HEADERS)
    lines = re.sub(r"/\*.*?\*/", "", text, flags=re.S).splitlines()
    names = [match[1] for line in lines if (match := re.match(r"#define (\w+) +\S", line))]
    return "\n".join(
        [*(f"#define {name} ..." for name in names), *(line for line in lines if not line.startswith("#"))]
    )


def source_hash() -> str:
    """Tells one state of the sources from another."""
    digest = hashlib.sha256()
    for path in (*(HERE / name for name in HEADERS), *INNER_HEADERS, *SOURCES, Path(__file__)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def make_builder(
    base: Path | None = None, extra_args: Sequence[str] = (), extra_objects: Sequence[str] = ()
) -> FFI:
    """The builder.

    :param base: what the names of the sources are relative to; None: they are absolute.
    :param extra_args: for the compiler and the linker, such as ``-fsanitize=address``.
    :param extra_objects: object files to link in.
    """

    from cffi import FFI  # not needed to find out that all is built

    def name(path: Path) -> str:
        return str(path if base is None else path.relative_to(base))

    builder = FFI()
    builder.cdef(declarations() + "\nextern const char *const colo_source_hash;\n")
    builder.set_source(
        "remus_colo._native._compare",
        "".join(f'#include "{name}"\n' for name in HEADERS)
        + f'static const char *const colo_source_hash = "{source_hash()}";\n',
        sources=[name(path) for path in SOURCES],
        include_dirs=[str(HERE)],
        depends=[name(path) for path in (*(HERE / header for header in HEADERS), *INNER_HEADERS)],
        extra_compile_args=[*COMPILE_ARGS, *extra_args],
        extra_link_args=list(extra_args),
        extra_objects=list(extra_objects),
    )
    return builder


def ffibuilder() -> FFI:
    """For setuptools, which wants the names of sources relative to the project."""
    return make_builder(HERE.parents[1])


if __name__ == "__main__":
    make_builder().compile(verbose=True)
