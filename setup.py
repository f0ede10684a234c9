# SPDX-License-Identifier: LGPL-2.1-or-later
"""The compiled modules, and what makes ``import xen`` work; all else is in setup.cfg.

``REMUS_COLO_NATIVE`` decides about them: ``auto`` (the default) builds what can be built here, ``required`` fails where
anything cannot, ``off`` leaves all out.

``remus_colo._native._compare``, the comparator, needs cffi and a C compiler.  ``remus_colo._native._xen``
needs Xen's headers, too; without it the package installs anywhere, for its pure parts and their tests, but
protects nothing.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import os
import shlex
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

NATIVE = "remus_colo/_native"
HEADER = "xenctrl.h"


def include_dirs() -> list[Path]:
    """Where the compiler looks for headers, besides its own."""
    named = [os.environ.get(name, "") for name in ("CPATH", "C_INCLUDE_PATH")]
    dirs = [part for value in named for part in value.split(os.pathsep) if part]
    flags = [flag for name in ("CPPFLAGS", "CFLAGS") for flag in shlex.split(os.environ.get(name, ""))]
    for flag, following in itertools.zip_longest(flags, flags[1:], fillvalue=""):
        if flag.startswith("-I"):
            dirs.append(flag[2:] or following)
    return [Path(name) for name in (*dirs, "/usr/local/include", "/usr/include")]


def missing_for(module: str) -> str | None:
    """Why a module cannot be built here, or None."""
    builder = f"{NATIVE}/build{module}.py"
    if not Path(builder).exists():
        return f"{builder} is not in this source tree"
    if module == "_xen" and not any((directory / HEADER).exists() for directory in include_dirs()):
        return f"Xen's header {HEADER} is not installed (Debian: apt install libxen-dev)"
    try:
        import cffi  # noqa: F401
    except ImportError:
        return "cffi is not installed (Debian: apt install python3-cffi)"
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    if shutil.which(compiler) is None:
        return f"there is no C compiler: {compiler} was not found (Debian: apt install gcc libc6-dev)"
    return None


def cffi_modules() -> list[str]:
    policy = os.environ.get("REMUS_COLO_NATIVE", "auto")
    if policy not in ("auto", "required", "off"):
        sys.exit(f"REMUS_COLO_NATIVE must be auto, required or off, not {policy!r}")
    modules = []
    for module, what_for in (("_xen", "Xen hosts need"), ("_compare", "comparing output needs")):
        missing = "it is switched off by REMUS_COLO_NATIVE" if policy == "off" else missing_for(module)
        if missing is None:
            modules.append(f"{NATIVE}/build{module}.py:ffibuilder")
        elif policy == "required":
            sys.exit(f"cannot build remus_colo._native.{module}: {missing}")
        else:
            print(
                f"warning: not building remus_colo._native.{module}, which {what_for}: {missing}",
                file=sys.stderr,
            )
    return modules


# What makes ``import xen`` find our part of it: see remus_colo/classic/finder.py.
PTH = "remus_colo.pth"
PTH_LINE = "import remus_colo.classic.finder\n"


class BuildPy(build_py):
    """Also installs the file above."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            Path(self.build_lib, PTH).write_text(PTH_LINE, encoding="ascii")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs: list[str] = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, str(Path(self.build_lib, PTH))]


class EditableWheel(editable_wheel):
    """Also puts that file into the wheel of an editable installation, in which setuptools leaves it out."""

    def run(self) -> None:
        super().run()
        for wheel in Path(self.dist_dir).glob(f"{self.distribution.get_name()}-*.editable-*.whl"):
            add_to_wheel(wheel, PTH, PTH_LINE.encode())


def add_to_wheel(wheel: Path, name: str, content: bytes) -> None:
    """Add a file, and its line to RECORD (packaging.python.org, "Binary distribution format")."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    with zipfile.ZipFile(wheel) as archive:
        files = {info: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, data in files.items():
            if info.filename.endswith(".dist-info/RECORD"):
                data += f"{name},sha256={digest},{len(content)}\n".encode()
            archive.writestr(info, data)
        archive.writestr(name, content)


modules = cffi_modules()
# without cffi setuptools does not know the keyword
setup(
    cmdclass={"build_py": BuildPy, "editable_wheel": EditableWheel},
    **({"cffi_modules": modules} if modules else {}),
)
