# SPDX-License-Identifier: LGPL-2.1-or-later
"""Consoles, and a collection of everything that helps to find out afterwards what happened in a bed."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from remus_colo.errors import RemusError
from remus_colo.testbed.bed import Bed
from remus_colo.testbed.errors import BedError
from remus_colo.testbed.network import HOSTS

log = logging.getLogger(__name__)

GUEST_LOG = "/var/log/xen/console/guest-{domain}.log"
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

    :param target: ``HOST`` for the serial line, ``HOST/DOMAIN`` for a guest's console.
    """
    name, _, domain = target.partition("/")
    if name not in HOSTS:
        raise BedError(f"'{target}' is no console: give HOST or HOST/DOMAIN, HOST being primary or backup")
    options = ["-n", "+1", *(["-F"] if follow else [])]
    if domain:
        path = shlex.quote(GUEST_LOG.format(domain=domain))
        argv = bed.reachable(name).argv(f"exec tail {' '.join(options)} {path}")
    else:
        argv = ["tail", *options, str(bed.hosts[name].serial_log)]
    os.execvp(argv[0], argv)


def collect(bed: Bed, directory: Path) -> None:
    """Write each host's logs and state below ``directory``; what cannot be had is noted there, not raised."""
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
