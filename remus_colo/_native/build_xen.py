# SPDX-License-Identifier: LGPL-2.1-or-later
"""cffi builder of ``remus_colo._native._xen``: core.c and save.c over libxenctrl and its sisters."""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent

# Interfaces of libxenctrl that came or went between Xen 4.17 and 4.20 are not used, so one source fits all.
LIBRARIES = ["xenctrl", "xenguest", "xenforeignmemory", "xendevicemodel", "xencall", "xentoollog"]
HEADERS = ("core.h", "save.h")
CALLBACKS = """
extern "Python" int rc_save_round(void *, uint32_t, int64_t);
extern "Python" int rc_save_suspend(void *);
extern "Python" int rc_save_resume(void *);
extern "Python" int rc_save_checkpoint(void *);
extern "Python" int rc_save_log_dirty(void *, int);
"""


def declarations() -> str:
    """The declarations of our headers, without what the C preprocessor reads."""
    text = "".join((HERE / name).read_text(encoding="utf-8") for name in HEADERS)
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


ffibuilder = FFI()
ffibuilder.cdef(declarations() + CALLBACKS)
ffibuilder.set_source(
    "remus_colo._native._xen",
    "".join(f'#include "{name}"\n' for name in HEADERS),
    sources=["remus_colo/_native/core.c", "remus_colo/_native/save.c"],
    include_dirs=[str(HERE)],
    define_macros=[("__XEN_TOOLS__", "1")],
    libraries=LIBRARIES,
    extra_compile_args=["-O2", "-Wall", "-Wextra"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
