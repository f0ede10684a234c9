# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unit tests do not see this machine's configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from remus_colo import config


@pytest.fixture(autouse=True)
def no_configuration_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(config.ENVIRONMENT, raising=False)
    monkeypatch.setattr(config, "DEFAULT_PATH", str(tmp_path / "no-such-file.sxp"))
