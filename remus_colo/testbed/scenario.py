# SPDX-License-Identifier: LGPL-2.1-or-later
"""A protection in the test bed: guest, ``remusd``, ``remus`` and load, for the demo, the tests, soak and bench."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import logging
import shlex
import socket
import time
from pathlib import Path
from typing import Any, Self

from remus_colo.errors import RemusError
from remus_colo.testbed import bed_logs, scenario_figures, scenario_host
from remus_colo.testbed.bed import Bed, Options
from remus_colo.testbed.bed_logs import GUEST_LOG
from remus_colo.testbed.errors import BedError
from remus_colo.testbed.guest_image import ADDRESS, second_guest
from remus_colo.testbed.guest_image import NAME as GUEST
from remus_colo.testbed.guest_image import SECOND_NAME as SECOND_GUEST
from remus_colo.testbed.host_config import HEARTBEAT_TIMEOUT_MS
from remus_colo.testbed.netns import entered
from remus_colo.testbed.network import HOSTS
from remus_colo.testbed.scenario_host import HostState
from remus_colo.testbed.scenario_load import LoadRun, Result
from remus_colo.testbed.scenario_run import Run, words

log = logging.getLogger(__name__)

# A dead host is noticed at the earliest when the heartbeats that came just before its death are this old, so
# a shorter gap in the replies is no failover.
FAILOVER_MIN_S = HEARTBEAT_TIMEOUT_MS / 1000 / 2

GUEST_TIMEOUT_S = 240.0
PV_MEMORY_MB = 192
PROTECT_TIMEOUT_S = 240.0
DAEMON_TIMEOUT_S = 60.0
CLIENT_TIMEOUT_S = 60.0


class Protection:
    """What is done with one bed that is up.  Nothing is started by making one; :meth:`close` ends what was.

    :ivar runs: every ``remus`` and ``remusd`` that was started here.
    :ivar loads: every load.
    :ivar killed: when hosts were killed, by name, CLOCK_MONOTONIC in seconds.
    """

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self.runs: list[Run] = []
        self.loads: list[LoadRun] = []
        self.killed: dict[str, float] = {}
        self.daemon: Run | None = None
        self.primary: Run | None = None
        self._numbers = itertools.count(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the parts

    def start_guest(
        self, host: str = "primary", name: str = GUEST, *, kind: str = "pvh", address6: str = ""
    ) -> None:
        """Create the guest and wait until all its services listen (10 to 20 s).

        :param name: or ``SECOND_GUEST``, which has its own address.
        :param kind: ``pvh``; ``pv``, smaller: it is copied whole at each checkpoint; or ``hvm``, for which
            the bed must have been brought up with a device model.
        :param address6: its IPv6 address besides, with which it does what hosts do by themselves: solicit
            routers, report groups.
        """
        console = shlex.quote(GUEST_LOG.format(domain=name))
        config = f"/domu/{shlex.quote(name)}.cfg"
        if name == SECOND_GUEST:
            text = second_guest(self.bed.exec(host, f"cat /domu/{GUEST}.cfg").stdout)
            config = f"/run/{name}.cfg"
            self.bed.exec(host, f"printf %s {shlex.quote(text)} > {config}")
        changes = []
        if kind != "pvh":
            changes.append(f's/^type=.*/type="{kind}"/')
        if kind == "pv":
            changes.append(f"s/^memory=.*/memory={PV_MEMORY_MB}/")
        if address6:
            changes.append(f's/^cmdline="/&guest.address6={address6} /')
        if changes:
            self.bed.exec(host, f"sed {shlex.quote('; '.join(changes))} {config} > /run/{name}-changed.cfg")
            config = f"/run/{name}-changed.cfg"
        self.bed.exec(host, f"rm -f {console}; xl create -q {config}", GUEST_TIMEOUT_S)
        # tail sleeps until there is more to read: programs that look again and again would take the guest's processor.
        follow = f"coproc exec timeout {GUEST_TIMEOUT_S:.0f} tail -n +1 -F {console} 2> /dev/null"
        ready = "grep -qm1 'GUEST READY' <&${COPROC[0]}"
        self.bed.exec(
            host,
            f"{follow}; tail=$COPROC_PID; if {ready}; then kill $tail; else tail {console}; xl list; false; fi",
            GUEST_TIMEOUT_S + 30,
        )

    def ensure_guest(self, *, kind: str = "pvh") -> None:
        """The guest runs on the primary and answers; a guest that is there is taken as it is."""
        if GUEST not in self.domains("primary"):
            self.start_guest(kind=kind)
        self.http_get("/1k")

    def start_daemon(self, host: str = "backup", **options: Any) -> Run:
        """``remusd``, once it listens."""
        run = self._start(host, ["remusd", "--foreground", *words(options)])
        run.wait_event("listening", DAEMON_TIMEOUT_S)
        self.daemon = run
        return run

    def protect(
        self,
        domain: str = GUEST,
        destination: str = "backup",
        *,
        host: str = "primary",
        colo: bool = True,
        **options: Any,
    ) -> Run:
        """``remus --colo``, or without ``colo`` plain ``remus``, once the guest is protected.

        :raise BedError: it ended before; :raise BedTimeout: it takes too long. Both show the ends of its logs.
        """
        run = self.start_remus(domain, destination, host=host, colo=colo, **options)
        run.wait_event("protected", PROTECT_TIMEOUT_S)
        return run

    def start_remus(
        self,
        domain: str = GUEST,
        destination: str = "backup",
        *,
        host: str = "primary",
        colo: bool = True,
        **options: Any,
    ) -> Run:
        """As :meth:`protect`, without waiting."""
        given = {"colo": True} if colo else {}
        run = self._start(host, ["remus", *words(given | options), domain, destination])
        self.primary = run
        return run

    def start_load(self, seconds: float, **options: Any) -> LoadRun:
        """The client's load, once all its connections stand."""
        load = LoadRun(self.bed, seconds, **options)
        self.loads.append(load)
        load.wait_started()
        return load

    def load(self, seconds: float, **options: Any) -> Result:
        """A whole load; its result."""
        return self.start_load(seconds, **options).result()

    def _start(self, host: str, command: list[str]) -> Run:
        name = f"{command[0]}-{next(self._numbers)}"
        run = Run(self.bed, host, shlex.join(command), f"/var/log/{name}.json")
        self.runs.append(run)
        return run

    # -- what happens to it

    def kill(self, host: str) -> float:
        """Cut a host's power; the moment, CLOCK_MONOTONIC in seconds."""
        moment_s = time.monotonic()
        self.bed.kill(host)
        self.killed[host] = moment_s
        return moment_s

    def stop(self) -> int:
        """End the protection as a user would, by SIGTERM to ``remus``; its exit status."""
        if self.primary is None:
            raise BedError("there is no remus to be stopped")
        return self.primary.stop()

    # -- what can be seen of it

    def events(self, host: str) -> list[dict[str, Any]]:
        """Events of the last ``remus`` or ``remusd`` that was started on a host."""
        for run in reversed(self.runs):
            if run.host == host:
                return list(run.events)
        return []

    def domains(self, host: str) -> dict[str, int]:
        """Domid by name."""
        return scenario_host.domains(self.bed.exec(host, "xl list").stdout)

    def state(self, host: str) -> HostState:
        return scenario_host.observe(self.bed, host)

    def leftovers(self, host: str) -> list[str]:
        """What of a protection is on a host that is up: links, packet rules, qdiscs, processes, the SVM."""
        return self.state(host).leftovers()

    def http_get(self, path: str, address: str = ADDRESS) -> bytes:
        """One GET by the client, over a connection of its own; the body.

        :raise BedError: no answer, or not status 200.
        """
        connection = http.client.HTTPConnection(address, timeout=CLIENT_TIMEOUT_S)
        try:
            # A socket stays in the namespace in which it was made.
            with entered(self.bed.network.namespace("client")):
                connection.sock = socket.create_connection((address, 80), timeout=CLIENT_TIMEOUT_S)
            connection.request("GET", path)
            reply = connection.getresponse()
            body = reply.read()
        except (OSError, http.client.HTTPException) as cause:
            raise BedError(f"the guest did not answer GET {path}: {cause}") from cause
        finally:
            connection.close()
        if reply.status != 200:
            raise BedError(f"the guest answered GET {path} with status {reply.status}")
        return body

    def failover_ms(self, load: LoadRun, killed_s: float) -> float | None:
        """From the death of a host to the first reply of the other's VM; None if there was none."""
        found = scenario_figures.failover_s(load.gaps(), killed_s, FAILOVER_MIN_S)
        return None if found is None else round(found * 1000, 1)

    # -- the end

    def save_logs(self, directory: Path) -> None:
        """Everything that helps to find out what happened, also of hosts that are dead by now."""
        directory.mkdir(parents=True, exist_ok=True)
        for number, run in enumerate(self.runs):
            base = f"{number}-{run.command.split()[0]}-{run.host}"
            (directory / f"{base}.json").write_text("".join(json.dumps(event) + "\n" for event in run.events))
            (directory / f"{base}.out").write_text("\n".join([run.command, *run.output]) + "\n")
        for number, load in enumerate(self.loads):
            load.save(directory, f"load-{number}")
        bed_logs.collect(self.bed, directory)

    def close(self) -> None:
        """End what still runs of what was started here, ``remus`` first; the guest stays."""
        for load in self.loads:
            load.close()
        for run in reversed(self.runs):
            if self.bed.hosts[run.host].state() == "ready" and run.running():
                with contextlib.suppress(RemusError):
                    run.stop()
            run.close()


def fresh(bed: Bed, options: Options | None = None) -> None:
    """The bed anew, with both hosts booted and their clocks set, whatever it was before.

    As quick as booting one killed host, whose clock would then be behind the other's for good.
    """
    bed.down()
    bed.up(options)


def destroy_guests(bed: Bed) -> None:
    """End every guest of the hosts that are up."""
    for host in HOSTS:
        if bed.hosts[host].state() == "ready":
            for domid in scenario_host.domains(bed.exec(host, "xl list").stdout).values():
                bed.exec(host, f"xl destroy {domid}", check=False)
