# SPDX-License-Identifier: LGPL-2.1-or-later
"""remusd with a configuration file: a protection over TLS while strangers knock, and what the other host does
not take.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from remus_colo.errors import ExitStatus
from remus_colo.testbed.network import HOSTS
from remus_colo.testbed.scenario import GUEST, Protection
from remus_colo.testbed.scenario_trial import LOAD, client_faults

FILES = Path(__file__).parents[1] / "data" / "tls"
CONFIG = "/tmp/test-xend-config.sxp"
TEXT = """\
(xend-relocation-ssl-server yes)
(xend-relocation-address 10.78.0.2)
(xend-relocation-hosts-allow '^10\\\\.78\\\\.0\\\\.1$')
(xend-relocation-server-ssl-key-file /tmp/test-host.key)
(xend-relocation-server-ssl-cert-file /tmp/test-host.crt)
(xend-relocation-ssl yes)
(remus-colo (ssl-ca-file /tmp/test-ca.crt) (half-open-limit 8)
  # TLS and strangers beside a guest on one emulated processor
  (heartbeat-timeout 20000) (compare-timeout 10000))
"""
# What a stranger in dom0 does to the port for a while: nothing, rubbish, and half a beginning.
KNOCK = """
import random, socket, struct, sys, time
host, port, own, seconds = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
chance, end, count = random.Random(1), time.monotonic() + seconds, 0
while time.monotonic() < end:
    try:
        sock = socket.create_connection((host, port), 2, (own, 0))
        sock.sendall(chance.choice([b"", b"colo\\n", b"receive\\n", b"\\x16\\x03\\x01\\x02", chance.randbytes(2000)]))
        count += 1
        time.sleep(0.02)
        sock.close()
    except OSError:
        time.sleep(0.02)
print(count)
"""


@pytest.fixture
def configured(protection: Protection) -> Iterator[Protection]:
    """Both hosts have the file and certificates."""
    made = (CONFIG, "/tmp/test-knock.py", "/tmp/test-ca.crt", "/tmp/test-host.crt", "/tmp/test-host.key")
    for host in HOSTS:
        for name in ("ca.crt", "host.crt", "host.key"):
            protection.bed.push(host, FILES / name, f"/tmp/test-{name}")
        protection.bed.exec(
            host,
            f"printf %s {shlex.quote(TEXT)} > {CONFIG}; printf %s {shlex.quote(KNOCK)} > /tmp/test-knock.py",
        )
    yield protection
    protection.close()
    for host in HOSTS:
        protection.bed.exec(host, f"rm -f {' '.join(made)}")


def knock(protection: Protection, host: str, own: str, seconds: float) -> int:
    command = f"python3 /tmp/test-knock.py 10.78.0.2 8003 {own} {seconds}"
    return int(protection.bed.exec(host, command, seconds + 60).stdout)


@pytest.mark.long
def test_over_tls_while_strangers_knock(configured: Protection) -> None:
    configured.ensure_guest()
    daemon = configured.start_daemon(config=CONFIG)
    ports = [event["port"] for event in daemon.events if event["event"] == "listening"]
    assert ports == [8003], "who asks for TLS means that port alone"
    run = configured.protect(config=CONFIG)

    load = configured.start_load(15, **LOAD)
    # from a host that may connect but says nonsense, and from one that may not
    assert knock(configured, "primary", "10.78.0.1", 5) > 0
    assert knock(configured, "backup", "10.78.0.2", 5) > 0
    assert client_faults(load.result()) == []
    refused = [event for event in daemon.events if event["event"] == "refused"]
    assert {event["host"] for event in refused} == {"10.78.0.1", "10.78.0.2"}
    assert {event["reason"] for event in refused if event["host"] == "10.78.0.2"} <= {
        "it is not among the hosts allowed",
        "2 of its connections are half open already",
    }

    assert run.running()
    assert run.stop() == ExitStatus.OK
    assert daemon.stop() == ExitStatus.OK
    assert [configured.leftovers(host) for host in HOSTS] == [[], []]


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        ("--no-ssl --port 8003", ExitStatus.PEER_UNREACHABLE, "is that port one with TLS (see --ssl)?"),
        ("--ssl-cert-file /tmp/absent", ExitStatus.USAGE, "cannot read /tmp/absent"),
    ],
)
def test_what_the_other_host_does_not_take(
    configured: Protection, options: str, status: ExitStatus, said: str
) -> None:
    configured.ensure_guest()
    configured.start_daemon(config=CONFIG)
    done = configured.bed.exec(
        "primary", f"remus --colo --config {CONFIG} {options} {GUEST} backup", check=False
    )
    assert (done.returncode, said in done.stderr) == (status, True), done.stderr
    assert done.stderr.count("\n") == 1


def test_a_configuration_that_cannot_be_meant(configured: Protection) -> None:
    configured.bed.exec("backup", f"printf '(xend-relocation-port 8002)\\n (x' > {CONFIG}")
    done = configured.bed.exec("backup", f"remusd --foreground --config {CONFIG}", check=False)
    assert done.returncode == ExitStatus.USAGE
    assert (
        done.stderr == f"remusd: error: {CONFIG} line 2 column 2: unexpected end: this list is not closed\n"
    )


def test_into_the_background_and_back(protection: Protection) -> None:
    """The classic way: the command ends when the port is open, and SIGTERM ends the service."""
    pid_file = "/tmp/test-remusd.pid"
    protection.bed.exec(
        "backup", f"remusd --address 10.78.0.2 --pid-file {pid_file} --log-file /tmp/test-remusd.log"
    )
    try:
        protection.bed.exec(
            "backup", "python3 -c \"import socket; socket.create_connection(('10.78.0.2', 8002), 5)\""
        )
        again = protection.bed.exec("backup", "remusd --address 10.78.0.2", check=False)
        assert (again.returncode, "another remusd" in again.stderr) == (ExitStatus.HOST, True), again.stderr
    finally:
        protection.bed.exec(
            "backup",
            f'pid=$(cat {pid_file}); kill $pid; timeout 60 sh -c "while kill -0 $pid; do sleep 0.1; done" 2> /dev/null; '
            f"cat /tmp/test-remusd.log; ! test -e {pid_file}",
        )
    assert protection.leftovers("backup") == []
