# SPDX-License-Identifier: LGPL-2.1-or-later
"""What cannot work is refused with one sentence and the documented exit status, and leaves nothing behind."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from remus_colo.errors import ExitStatus
from remus_colo.testbed.network import HOSTS
from remus_colo.testbed.scenario import GUEST, Protection

NOBODY = 65534
# Of the replication network, and nobody's.
ABSENT = "10.78.0.77"
# Each takes an emulated host half a minute, and is like another one here or has a unit test.
ALIKE = pytest.mark.long


def refused(
    protection: Protection, arguments: str, *, prefix: str = "", host: str = "primary"
) -> tuple[int, str]:
    """Exit status and sentence of a ``remus`` that is to fail; the host must be as it was."""
    before = protection.state(host)
    done = protection.bed.exec(host, f"{prefix}remus {arguments}", check=False)
    assert protection.state(host) == before
    sentence = done.stderr.strip()
    assert "\n" not in sentence, sentence
    assert sentence.startswith("remus: error: "), sentence
    assert "this is a bug" not in sentence, sentence
    return done.returncode, sentence.removeprefix("remus: error: ")


REFUSALS = [
    ("--colo nosuch backup", ExitStatus.DOMAIN, "no domain named 'nosuch'"),
    (f"--colo {GUEST} {ABSENT}", ExitStatus.PEER_UNREACHABLE, ABSENT),
]
LIKE_THESE = [
    ("--colo 4711 backup", ExitStatus.DOMAIN, "no domain with id 4711"),
    ("--colo 0 backup", ExitStatus.DOMAIN, "domain 0"),
    (f"--colo {GUEST} no.such.host.invalid", ExitStatus.PEER_UNREACHABLE, "no.such.host.invalid"),
    (f"--colo {GUEST} backup --port 8003", ExitStatus.PEER_UNREACHABLE, "8003"),
    (f"--colo {GUEST} backup --port 22", ExitStatus.PROTOCOL, "no relocation server"),
    (f"--colo {GUEST} backup --port 99999", ExitStatus.USAGE, "99999"),
    (f"--colo {GUEST} backup --log /no/such/dir/log", ExitStatus.USAGE, "/no/such/dir/log"),
]


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [*REFUSALS, *(pytest.param(*refusal, marks=ALIKE) for refusal in LIKE_THESE)],
)
def test_refused(protection: Protection, arguments: str, status: ExitStatus, says: str) -> None:
    protection.ensure_guest()
    code, sentence = refused(protection, arguments)
    assert (code, says in sentence) == (status, True), sentence


def test_not_root(protection: Protection) -> None:
    prefix = f"setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups "
    code, sentence = refused(protection, f"--colo {GUEST} backup", prefix=prefix)
    assert code == ExitStatus.HOST
    assert "root" in sentence


def test_no_daemon_on_the_backup(protection: Protection) -> None:
    protection.ensure_guest()
    code, sentence = refused(protection, f"--colo {GUEST} backup")
    assert code == ExitStatus.PEER_UNREACHABLE
    assert "8002" in sentence or "remusd" in sentence


@ALIKE
def test_a_host_that_may_not_connect(protection: Protection) -> None:
    protection.ensure_guest()
    protection.start_daemon(hosts_allow="^192[.]0[.]2[.]")
    code, _ = refused(protection, f"--colo {GUEST} backup")
    assert code in (ExitStatus.PEER_REFUSED, ExitStatus.PEER_UNREACHABLE)


@contextmanager
def paused_domain(protection: Protection, name: str, config: str) -> Iterator[None]:
    """A small domain made from the guest's kernel, which never runs."""
    config = f'name="{name}"\nkernel="/domu/vmlinuz"\nmemory=128\non_crash="preserve"\n{config}\n'
    path = f"/tmp/{name}.cfg"
    protection.bed.exec("primary", f"printf %s {shlex.quote(config)} > {path}")
    protection.bed.exec("primary", f"xl create -q -p {path}")
    try:
        yield
    finally:
        protection.bed.exec("primary", f"xl destroy {name}; rm -f {path}")


@ALIKE
def test_pv_guest(protection: Protection) -> None:
    with paused_domain(protection, "oldstyle", 'type="pv"\nvcpus=1'):
        code, sentence = refused(protection, "--colo oldstyle backup")
    assert code == ExitStatus.DOMAIN
    assert "PV guest" in sentence and 'type="pvh"' in sentence


def test_paused_guest(protection: Protection) -> None:
    with paused_domain(protection, "paused", 'type="pvh"\nvcpus=1'):
        code, sentence = refused(protection, "--colo paused backup")
    assert code == ExitStatus.DOMAIN
    assert "xl unpause paused" in sentence


def test_protected_already(protection: Protection) -> None:
    protection.ensure_guest()
    protection.start_daemon()
    run = protection.protect()
    code, sentence = refused(protection, f"--colo {GUEST} backup")
    assert code == ExitStatus.DOMAIN
    assert "protected already" in sentence and str(run.pid) in sentence
    # ... and that protection has not been disturbed
    assert run.running()
    assert protection.http_get("/1k")
    assert protection.stop() == ExitStatus.OK


def test_second_daemon(protection: Protection) -> None:
    protection.start_daemon()
    done = protection.bed.exec("backup", "remusd --foreground", check=False)
    assert done.returncode == ExitStatus.HOST
    assert "another remusd" in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture
def no_plug(protection: Protection) -> Iterator[None]:
    """Both hosts' kernels lack sch_plug."""
    for host in HOSTS:
        protection.bed.exec(
            host, "modprobe -r sch_plug && echo install sch_plug /bin/false > /etc/modprobe.d/test.conf"
        )
    yield
    for host in HOSTS:
        protection.bed.exec(host, "rm /etc/modprobe.d/test.conf && modprobe sch_plug")


def test_missing_kernel_module(protection: Protection, no_plug: None) -> None:
    protection.ensure_guest()
    protection.start_daemon()
    code, sentence = refused(protection, f"--colo {GUEST} backup")
    assert code == ExitStatus.HOST
    assert "sch_plug" in sentence and "modprobe" in sentence
