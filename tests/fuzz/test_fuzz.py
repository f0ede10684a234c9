# SPDX-License-Identifier: LGPL-2.1-or-later
"""A short run of the fuzzer, sanitizers and all; CONTRIBUTING.rst has the long one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FUZZER = Path(__file__).parent / "fuzz_compare.py"
SECONDS = int(os.environ.get("REMUS_COLO_FUZZ_SECONDS", "20"))


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (Debian: apt install gcc libc6-dev)")
def test_no_input_breaks_the_comparator(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, FUZZER, "--seconds", str(SECONDS), "--artifacts", str(tmp_path)],
                          capture_output=True, text=True, timeout=SECONDS + 600, check=False)  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0 and not list(tmp_path.glob("crash-*")), said[-4000:]
    ran = re.search(r"Done (\d+) runs", said)
    assert ran is not None and int(ran[1]) > 0, said[-4000:]
    if "guided by coverage" not in said:
        added = re.search(r"stat::new_units_added:\s+(\d+)", said)
        assert added is not None and int(added[1]) > 0, "the fuzzer does not see what the comparator does"
