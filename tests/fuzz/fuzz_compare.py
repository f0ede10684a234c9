# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fuzz the comparator and the rewriter: ``python3 tests/fuzz/fuzz_compare.py --seconds 600``.

Builds it with AddressSanitizer, UndefinedBehaviorSanitizer and coverage, and lets atheris look for inputs
that reach new code.  Where there is no atheris, random inputs are tried; it says so.  What is found is
written to ``crash-*`` in the current directory (or that of ``--artifacts``); run it again with
``--input FILE``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

SANITIZERS = (
    "-O1",
    "-g",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-DCOLO_SANITIZED",
)
COVERAGE = "-fsanitize-coverage=trace-pc,trace-cmp"


def have_atheris() -> bool:
    return importlib.util.find_spec("atheris") is not None


def build(directory: Path) -> Path:
    """The instrumented module."""
    from remus_colo._native import build_compare

    if not have_atheris():
        return Path(build_compare.make_builder(extra_args=SANITIZERS).compile(tmpdir=str(directory)))
    shim = directory / "coverage.o"
    subprocess.run(["cc", "-O2", "-fPIC", "-c", HERE / "coverage.c", "-o", shim], check=True)
    builder = build_compare.make_builder(extra_args=(*SANITIZERS, COVERAGE), extra_objects=[str(shim)])
    return Path(builder.compile(tmpdir=str(directory)))


def use(path: Path) -> None:
    """Have the package use the module at ``path``."""
    name = "remus_colo._native._compare"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module


def sanitized(options: argparse.Namespace) -> int:
    """Run this program again with the sanitizers' library in front of everything else."""
    library = subprocess.run(
        ["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="remus-fuzz-") as scratch:
        module = build(Path(scratch))
        environ = os.environ | {
            "LD_PRELOAD": library,
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",  # the interpreter's own leaks would hide ours
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        argv = [sys.executable, __file__, *sys.argv[1:], "--module", str(module)]
        return subprocess.run(argv, env=environ, check=False, timeout=options.seconds + 300).returncode


def with_atheris(options: argparse.Namespace) -> None:
    import atheris

    libfuzzer = importlib.import_module("atheris.core_with_libfuzzer")
    os.environ["LIBFUZZER"] = str(libfuzzer.__file__)  # for coverage.c
    use(Path(options.module))
    import drive

    argv = [sys.argv[0], f"-max_total_time={options.seconds}", "-max_len=4096", "-use_value_profile=1",
            f"-artifact_prefix={options.artifacts}/crash-", "-timeout=60", "-rss_limit_mb=4096", "-print_final_stats=1"]  # fmt: skip
    if options.corpus:
        Path(options.corpus).mkdir(parents=True, exist_ok=True)
        argv.append(options.corpus)
    atheris.Setup(argv, drive.run)
    atheris.Fuzz()


def at_random(options: argparse.Namespace) -> None:
    use(Path(options.module))
    import drive

    seed, end_s = 0, time.monotonic() + options.seconds
    while time.monotonic() < end_s:
        source = random.Random(seed)
        data = source.randbytes(source.randrange(16, 4096))
        try:
            drive.run(data)
        except BaseException:
            Path(options.artifacts, f"crash-{seed}").write_bytes(data)
            raise
        seed += 1
    print(f"Done {seed} runs without atheris, which is not installed: random inputs, not guided by coverage")


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--seconds", type=int, default=600)
    p.add_argument("--corpus", help="directory to keep interesting inputs in")
    p.add_argument("--artifacts", default=".", help="directory for what makes it fail")
    p.add_argument("--input", help="run this one input, without sanitizers")
    p.add_argument("--module", help=argparse.SUPPRESS)
    options = p.parse_args()
    if options.input:
        drive: Any = importlib.import_module("drive")
        drive.run(Path(options.input).read_bytes())
        return 0
    if options.module is None:
        return sanitized(options)
    with contextlib.suppress(KeyboardInterrupt):
        (with_atheris if have_atheris() else at_random)(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
