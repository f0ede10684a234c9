# SPDX-License-Identifier: LGPL-2.1-or-later
"""cffi builder of ``remus_colo._native._xen``: core.c over libxenctrl and its sisters."""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent

# Interfaces of libxenctrl that came or went between Xen 4.17 and 4.20 are not used, so one source fits all.
LIBRARIES = ["xenctrl", "xenguest", "xenforeignmemory", "xendevicemodel", "xencall"]


def declarations() -> str:
    """The declarations of core.h, without what the C preprocessor reads."""
    text = (HERE / "core.h").read_text(encoding="utf-8")
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


ffibuilder = FFI()
ffibuilder.cdef(declarations() + '\nextern "Python" int rc_suspend_callback(void *);\n')
ffibuilder.set_source(
    "remus_colo._native._xen",
    '#include "core.h"',
    sources=["remus_colo/_native/core.c"],
    include_dirs=[str(HERE)],
    define_macros=[("__XEN_TOOLS__", "1")],
    libraries=LIBRARIES,
    extra_compile_args=["-O2", "-Wall", "-Wextra"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
