# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processes are told apart by pid and start time, and killed for certain."""

import os
import signal
import subprocess
import sys

import pytest

from remus_colo.testbed.errors import BedError
from remus_colo.testbed.process import ProcessId, find_by_argument

SLEEPER = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]


@pytest.fixture
def child():
    process = subprocess.Popen(
        [*SLEEPER, f"marker-{os.getpid()}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    # Popen returns when the new program has begun to be, which is before /proc shows its arguments.
    process.stdout.readline()
    yield process
    process.kill()
    process.stdin.close()
    process.stdout.close()
    process.wait()


def test_a_running_process_is_alive_and_dies_of_kill(child):
    found = ProcessId.of(child.pid)
    assert found.alive()
    assert found.kill()
    assert not found.alive()
    assert not found.kill()


def test_a_stopped_process_dies_of_kill_as_well(child):
    found = ProcessId.of(child.pid)
    assert found.signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    assert found.state() == "T"
    assert found.kill()


def test_another_process_with_the_same_pid_is_left_alone(child):
    found = ProcessId.of(child.pid)
    other = ProcessId(found.pid, found.start_ticks + 1)
    assert not other.alive()
    assert not other.signal(signal.SIGKILL)
    assert not other.kill()
    assert found.alive()


def test_a_zombie_counts_as_gone(child):
    found = ProcessId.of(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not found.alive()


def test_a_process_that_is_gone_has_no_identity(child):
    child.kill()
    child.wait()
    with pytest.raises(BedError, match="ended right away"):
        ProcessId.of(child.pid)


def test_processes_are_found_by_a_whole_argument_only(child):
    assert find_by_argument(f"marker-{os.getpid()}") == [ProcessId.of(child.pid)]
    assert find_by_argument(f"marker-{os.getpid()}"[:-1]) == []
