# SPDX-License-Identifier: LGPL-2.1-or-later
"""The architecture, held to the imports: what each package may use, and which modules are pure.

An import counts wherever it stands: in a function, or for type checkers only.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "remus_colo"

# What a package may import from this project, besides itself.  A package that is not here (the commands, the
# modules for scripts, the test bed) is on top: nothing of what is here imports it.
MAY_IMPORT = {
    "_native": {"errors"},
    "adapters": {"_native", "errors"},
    "failover": {"errors"},
    "relocation": {"errors", "options", "sxp"},
    "devices": {"adapters", "errors"},
    # The loop is a session's, but its packets come to it by the path.
    "proxy": {"_native", "adapters", "errors", "session.loop"},
    "checkpoint": {"adapters", "dominfo", "errors", "options", "relocation", "sxp"},
    "session": {
        "adapters",
        "checkpoint",
        "devices",
        "errors",
        "failover",
        "options",
        "proxy",
        "relocation",
        "remus_options",
        "report",
    },
}

# Plain values in, plain values out; whoever calls says what time it is.  What they import must be as pure.
PURE = {
    "checkpoint.hvmcontext",
    "checkpoint.libxcrecords",
    "checkpoint.libxlformat",
    "checkpoint.sharedinfo",
    "checkpoint.xendheader",
    "dominfo",
    "errors",
    "failover.arbiter",
    "failover.backup",
    "failover.heartbeat",
    "failover.machine",
    "failover.primary",
    "proxy.announce",
    "proxy.comparator",
    "proxy.queue_numbers",
    "proxy.rewriter",
    "proxy.shown",
    "proxy.vantage",
    "relocation.bulk",
    "relocation.clock",
    "relocation.handshake",
    "relocation.schema",
    "relocation.wire",
    "sxp",
    "sxp_elements",
    "sxp_text",
}
# The compiled comparator and rewriter are pure, too; this module loads them.
LOADER = "_native.compare_module"
IMPURE_STDLIB = {
    "fcntl",
    "mmap",
    "multiprocessing",
    "os",
    "pathlib",
    "random",
    "secrets",
    "select",
    "selectors",
    "shutil",
    "signal",
    "socket",
    "ssl",
    "subprocess",
    "sys",
    "tempfile",
    "threading",
    "time",
}
# The comparator draws the key of its hash once; sxp.show writes to standard output if it is told nothing else.
EXCEPTED = {("proxy.comparator", "os"), ("sxp_text", "sys")}

# Of other projects: only adapters use them, and translate their types and errors.
FOREIGN = {"netfilterqueue", "pyroute2", "pyxs"}
COMPILED_FOR_XEN = "remus_colo._native._xen"


def modules_of(folder: Path) -> Iterator[tuple[str, Path]]:
    """``(name below remus_colo, file)`` of all modules below a folder."""
    for file in sorted(folder.rglob("*.py")):
        yield ".".join(file.relative_to(PACKAGE).with_suffix("").parts), file


def imports(file: Path) -> Iterator[str]:
    """The full names of all that a file imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # only scripts' modules have those, among themselves
                continue
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from names


def ours(file: Path) -> Iterator[str]:
    """Modules of this project that a file imports, ``errors`` for ``remus_colo.errors.XenError``."""
    for name in imports(file):
        if name.startswith("remus_colo."):
            parts = name.split(".")[1:]
            while parts and not (PACKAGE.joinpath(*parts).is_dir() or module_file(".".join(parts)).exists()):
                parts.pop()
            if parts:
                yield ".".join(parts)


def module_file(name: str) -> Path:
    return PACKAGE.joinpath(*name.split(".")).with_suffix(".py")


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_is_below_it(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package, "_version"}
    wrong = [
        f"{name} imports {used}"
        for name, file in modules_of(PACKAGE / package)
        for used in ours(file)
        if used not in allowed and used.partition(".")[0] not in allowed
    ]
    assert not wrong


@pytest.mark.parametrize("name", sorted(PURE))
def test_a_pure_module_does_nothing_but_compute(name: str) -> None:
    file = module_file(name)
    used = {used.partition(".")[0] for used in imports(file)}
    assert not {module for module in used & IMPURE_STDLIB if (name, module) not in EXCEPTED}
    assert set(ours(file)) <= PURE | {LOADER, "_native"}


def test_foreign_libraries_are_imported_by_adapters_alone() -> None:
    wrong = [
        f"{name} imports {used}"
        for name, file in modules_of(PACKAGE)
        for used in imports(file)
        if used.partition(".")[0] in FOREIGN and not name.startswith(("adapters.", "bench."))
    ]
    assert not wrong


def test_one_module_loads_the_calls_into_xens_libraries() -> None:
    loaders = [name for name, file in modules_of(PACKAGE) if COMPILED_FOR_XEN in imports(file)]
    assert loaders == ["adapters.native"]
