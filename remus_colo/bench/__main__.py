# SPDX-License-Identifier: LGPL-2.1-or-later
"""How fast the comparison is, beside QEMU's and beside a bare packet queue: ``make bench-compare``.

The last line of the output is one JSON object with all figures.  docs/comparison.rst says what they mean.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import platform
import sys
from pathlib import Path

from remus_colo.errors import RemusError

PARTS = {"comparator": "remus_colo.bench.comparator", "nfqueue": "remus_colo.bench.queuepath"}


def machine() -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )
    return {
        "cpu": model,
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m remus_colo.bench", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="shorter and less exact")
    parser.add_argument("--only", choices=tuple(PARTS), help="one part of it")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    found: dict[str, object] = {"machine": machine(), "quick": args.quick}
    try:
        for name, module in PARTS.items():
            if args.only in (None, name):
                found[name] = importlib.import_module(module).run(quick=args.quick)
    except RemusError as error:
        print(f"bench: {error}", file=sys.stderr)
        return int(error.exit_status)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
