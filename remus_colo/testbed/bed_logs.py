# SPDX-License-Identifier: LGPL-2.1-or-later
"""Consoles, and a collection of everything that helps to find out afterwards what happened in a bed."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from remus_colo.errors import RemusError
from remus_colo.testbed.bed import Bed
from remus_colo.testbed.errors import BedError
from remus_colo.testbed.network import HOSTS
from remus_colo.testbed.ssh import Remote

log = logging.getLogger(__name__)

GUEST_LOG = "/var/log/xen/console/guest-{domain}.log"
# A copy's name, until it has become the guest: by COLO, and by xl for Remus.
COPY_SUFFIXES = ("--secondary", "--incoming")
COLLECT_TIMEOUT_S = 60.0

# File in the collection: what prints it in dom0.
REPORTS = {
    "xl-dmesg.txt": "xl dmesg",
    "xl-list.txt": "xl list; xl list -l; xl info",
    "dmesg.txt": "dmesg",
    "processes.txt": "ps axfww -o pid,ppid,stat,etime,time,rss,args; free -m",
    "xenstore.txt": "xenstore-ls -fp",
    "network.txt": "ip -d addr; ip -s link; tc -s qdisc; for i in /sys/class/net/*; do "
    "tc -s filter show dev ${i##*/} ingress; done; bridge fdb; nft list ruleset; ss -tuanp; "
    "cat /proc/net/netfilter/nfnetlink_queue",
}
LOG_PATHS = "/var/log/xen /var/log/remus* /var/log/remus_colo* /run/remus* /tmp/*.log"


def console(bed: Bed, target: str, *, follow: bool) -> None:
    """Print a console, by becoming ``tail``.

    :param target: ``HOST`` for the serial line, ``DOMAIN`` or ``HOST/DOMAIN`` for a guest's console.
    :raise BedError: there is none.
    """
    name, slash, domain = target.partition("/")
    options = ["-n", "+1", *(["-F"] if follow else [])]
    if name in HOSTS and not domain:
        path = bed.hosts[name].serial_log
        if not path.exists():
            raise BedError(f"{name} of the bed '{bed.name}' has no console: run 'up'")
        argv = ["tail", *options, str(path)]
    elif slash and (name not in HOSTS or "/" in domain):
        raise BedError(
            f"'{target}' is no console: give HOST, DOMAIN or HOST/DOMAIN, HOST being primary or backup"
        )
    else:
        hosts = [name] if slash else [host for host in HOSTS if bed.hosts[host].state() == "ready"]
        remotes = [bed.reachable(host) for host in hosts or HOSTS]
        remote, log_file = _find_guest(remotes, domain if slash else name)
        argv = remote.argv(f"exec tail {' '.join(options)} {shlex.quote(log_file)}")
    os.execvp(argv[0], argv)


def _find_guest(remotes: Sequence[Remote], domain: str) -> tuple[Remote, str]:
    """The host that a guest runs on, or has run on, and the file with its console's output.

    That of a guest that was taken over has the name that the guest had as a copy.

    :raise BedError: no host knows it.
    """
    files = [GUEST_LOG.format(domain=domain + suffix) for suffix in ("", *COPY_SUFFIXES)]
    look = (
        f"ls -t {' '.join(map(shlex.quote, files))} 2>/dev/null | head -n 1; "
        f"xl domid {shlex.quote(domain)} >/dev/null 2>&1 && echo runs; true"
    )
    found = []
    for remote in remotes:
        lines = remote.run(look, timeout_s=COLLECT_TIMEOUT_S).stdout.splitlines()
        if lines and lines[0] != "runs":
            found.append(("runs" not in lines, remote, lines[0]))
    if not found:
        hosts = " or ".join(remote.host for remote in remotes)
        raise BedError(
            f"there is no guest '{domain}' on {hosts}, and has been none: see 'exec HOST -- xl list'"
        )
    _, remote, log_file = min(found, key=lambda entry: entry[0])
    return remote, log_file


def collect(bed: Bed, directory: Path) -> None:
    """Write each host's logs and state below ``directory``; what cannot be had is noted there, not raised.

    :raise BedError: there is no bed, up or left over.
    """
    if not bed.directory.exists():
        raise BedError(f"there is no bed '{bed.name}': run 'up'")
    with ThreadPoolExecutor(len(HOSTS)) as pool:
        for _ in pool.map(lambda host: _collect_host(bed, host, directory / host), HOSTS):
            pass
    log.info("logs are in %s", directory)


def _collect_host(bed: Bed, name: str, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    host = bed.hosts[name]
    for path in (host.serial_log, host.directory / "qemu.log"):
        if path.exists():
            shutil.copyfile(path, target / path.name)
    (target / "state.txt").write_text(host.state() + "\n")
    if host.state() != "ready":
        return
    remote = bed.remote(name)
    for file, command in REPORTS.items():
        try:
            shown = remote.run(f"( {command} ) 2>&1", timeout_s=COLLECT_TIMEOUT_S, check=False).stdout
        except RemusError as error:
            shown = f"not collected: {error}\n"
        (target / file).write_text(shown)
    try:
        argv = remote.argv(f"tar -cf - --ignore-failed-read {LOG_PATHS} 2>/dev/null")
        with (target / "logs.tar").open("wb") as output:
            # tar's status tells of files that changed while they were read: no matter here.
            subprocess.run(
                argv, stdin=subprocess.DEVNULL, stdout=output, timeout=COLLECT_TIMEOUT_S, check=False
            )
    except (RemusError, subprocess.TimeoutExpired) as error:
        (target / "logs.tar.txt").write_text(f"not collected: {error}\n")
