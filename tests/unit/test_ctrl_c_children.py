# SPDX-License-Identifier: LGPL-2.1-or-later
"""A terminal sends Ctrl-C, and its own end, to all processes of its foreground: not to the programs that we run, with one in their place."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from remus_colo.adapters import drbd, kmod, nft, physdev, toolstack
from remus_colo.session.fence import run_hook

PATIENCE_S = 60


def restore() -> None:
    reader, writer = os.pipe()
    with toolstack.restore_paused(reader):
        os.close(writer)
    os.close(reader)


RUNS: dict[str, tuple[str, Callable[[], object]]] = {
    "xl": ("xl", lambda: toolstack.rename(7, "web")),
    "xl restore": ("xl", restore),
    "nft": ("nft", nft.owners),
    "iptables": ("iptables", lambda: physdev._run("iptables", "-S")),
    "modprobe": ("modprobe", lambda: kmod.load("no_module_of_this_name", "a test")),
    "drbdadm": ("drbdadm", lambda: drbd.device_of("r0")),
    "hook": ("hook", lambda: run_hook(("hook",), "web", "beta")),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_program_that_we_run_is_not_in_our_terminals_foreground(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rules that a second Ctrl-C would have left behind, as it ended the nft that was taking them away."""
    tool, run = RUNS[name]
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    told = tmp_path / "told"
    program = tmp_path / tool
    program.write_text(f"#!/bin/sh\ncat /proc/$$/stat > {told}.new && mv {told}.new {told}\n")
    program.chmod(0o755)
    run()
    deadline_s = time.monotonic() + PATIENCE_S
    while not told.exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
    # after the name in brackets: state, parent, process group, session (proc(5))
    _, _, group, session = told.read_text().rpartition(")")[2].split()[:4]
    assert int(group) != os.getpgid(0)
    assert int(session) != os.getsid(0)
