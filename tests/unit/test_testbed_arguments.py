# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the long runs of the test bed refuse before they install or boot anything."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from remus_colo.errors import ExitStatus
from remus_colo.testbed import bench, machine, soak, verdicts


@pytest.mark.parametrize(
    ("main", "line"),
    [
        (soak.main, "-n -3"),  # nothing would be tried, and all would be well
        (soak.main, "-n 0"),
        (soak.main, "--skew nan"),
        (soak.main, "--kind clock --checkpoints 0"),
        (soak.main, "--mode remus --interval 0"),
        (bench.main, "--rounds 0"),
        (bench.main, "--seconds -1"),
        (bench.main, "--rate nan"),
        (verdicts.main, "--seconds 0"),
        (verdicts.main, "--downloads -1"),
    ],
)
def test_what_cannot_be_meant(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    main: Callable[[list[str]], int],
    line: str,
) -> None:
    monkeypatch.setattr(machine, "setup", lambda: pytest.fail("it has begun"))
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == ExitStatus.USAGE
    said = capsys.readouterr()
    assert said.out == ""
    assert f"argument {line.split()[-2]}: " in said.err
