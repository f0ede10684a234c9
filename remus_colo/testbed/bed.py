# SPDX-License-Identifier: LGPL-2.1-or-later
"""A bed: two emulated Xen hosts, their networks and a client, for the command line and for tests.

Its state lies in a directory (``/run/remus_colo-testbed/NAME``), not in a process: any process may
open a :class:`Bed` by name and use it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from remus_colo.testbed import accel, cache, dom0_image, domu_disk, host_config, skew, worktree
from remus_colo.testbed.errors import BedError
from remus_colo.testbed.netns import NETNS_DIR
from remus_colo.testbed.network import HOSTS, BedNetwork
from remus_colo.testbed.process import find_by_argument
from remus_colo.testbed.qemu import Host, HostSpec
from remus_colo.testbed.remote_process import RemoteProcess
from remus_colo.testbed.ssh import Remote, key_pair

log = logging.getLogger(__name__)

STATE_ROOT = Path("/run/remus_colo-testbed")
RECORD = "bed.json"  # how a bed was brought up, in its directory
BOOT_TIMEOUT_S = 600.0
PAUSE_TIMEOUT_S = 10.0
DEFAULT_MEMORY_MB = 3000
DEFAULT_DOM0_MB = 1500
DEFAULT_RELEASE = "debian-13"
RELEASES = tuple(dom0_image.RELEASES)
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")


@dataclass(frozen=True, slots=True)
class Options:
    """How a bed was brought up; kept with it, so that ``boot`` boots a host the same way again.

    :ivar release: of Debian, for dom0: one of :data:`RELEASES`.
    """

    xen: str = "debian"
    memory_mb: int = DEFAULT_MEMORY_MB
    dom0_mb: int = DEFAULT_DOM0_MB
    skew_s: float = 0.0
    accel: str = "auto"
    release: str = DEFAULT_RELEASE
    device_model: bool = False  # dom0 has the QEMU that HVM guests need


class Bed:
    """One bed, up or not.

    :param name: lower-case letters, digits and dashes.
    :param state_root: where beds keep their state; default :data:`STATE_ROOT`.
    """

    def __init__(self, name: str = "default", state_root: Path | None = None) -> None:
        if not NAME_PATTERN.fullmatch(name):
            raise BedError(
                f"'{name}' is no name for a bed: use lower-case letters, digits and dashes, at most 31"
            )
        self.name = name
        self.directory = (STATE_ROOT if state_root is None else state_root.resolve()) / name
        self.network = BedNetwork(name)
        self.hosts = {host: Host(host, self.directory / host) for host in HOSTS}

    # -- life

    def up(self, options: Options | None = None) -> None:
        """Bring it up, and wait until both hosts' toolstacks are ready.

        On failure the bed is taken down again, and its logs stay in the state directory.
        """
        _need_root()
        options = Options() if options is None else options
        with self._locked():
            if self.network.exists() or any(host.alive() for host in self.hosts.values()):
                raise BedError(
                    f"the bed '{self.name}' is up already, or left over: take it down first ('down')"
                )
            self._check_directory()
            (self.directory / RECORD).write_text(json.dumps(asdict(options)))
            began_s = time.monotonic()
            try:
                self._prepare(options)
                self.network.create()
                log.info("starting the hosts primary and backup (15 to 30 seconds under emulation)")
                for name in HOSTS:
                    self._start(name, options)
                self._power_on(options.skew_s)
                code = worktree.archive(options.release)
                for name in HOSTS:
                    self._wait_ready(name)
                _each_host(lambda name: _furnish(self.remote(name), code))
                self._set_skew(options.skew_s)
            except BaseException:
                self._down()
                raise
            log.info("the bed '%s' is up (%.0f s)", self.name, time.monotonic() - began_s)

    def down(self) -> list[str]:
        """Take it down, whatever is left of it, also after a crash of this program; says what was removed."""
        _need_root()
        with self._locked():
            self._check_directory()
            removed = self._down()
            for path in self.directory.iterdir():
                if path.name != RECORD:  # the last to go: it says that the directory is ours to remove
                    cache.remove(path)
            cache.remove(self.directory)
        return removed

    def _down(self) -> list[str]:
        removed = []
        for name, host in self.hosts.items():
            self.remote(name).disconnect()
            if host.kill():
                removed.append(f"host {name}")
            for process in find_by_argument(
                host.qmp_argument
            ):  # started, but its record was not written any more
                process.kill()
                removed.append(f"process {process.pid}")
        removed += [f"namespace {name}" for name in self.network.remove()]
        return removed

    def boot(self, host: str) -> None:
        """Power on a host that is off, and wait until it is ready."""
        _need_root()
        self._need_up()
        options = self.options()
        with self._locked():
            self._start(host, options)
            self._host(host).qmp("cont")
            code = worktree.archive(options.release)
            self._wait_ready(host)
            _furnish(self.remote(host), code)

    def sync(self) -> None:
        """Install the work tree's code, as it is now, in the hosts that run."""
        self._need_up()
        code = worktree.archive(self.options().release)

        def install(name: str) -> None:
            state = self.hosts[name].state()
            if state == "ready":
                worktree.install(self.remote(name), code)
                log.info("%s has the work tree's code", name)
            else:
                log.info("%s is %s: left as it is", name, state)

        _each_host(install)

    def kill(self, host: str) -> None:
        """Power loss: the host's QEMU is killed, without warning.

        :raise BedError: it is off already.
        """
        if not self._host(host).kill():
            raise BedError(f"{host} is off already")
        self.remote(host).disconnect()

    def pause(self, host: str) -> None:
        """Freeze a host (SIGSTOP): it answers nothing, and keeps its state and, on the LAN, its carrier."""
        self._host(host).signal(signal.SIGSTOP)
        self._host(host).wait_paused(PAUSE_TIMEOUT_S)

    def resume(self, host: str) -> None:
        """Let a frozen host go on.  Its clocks show the time that has passed."""
        self._host(host).signal(signal.SIGCONT)

    def link(self, *, up: bool) -> None:
        """Cut or restore the replication link."""
        self._need_up()
        self.network.set_link(up=up)

    def skew(self) -> skew.Reading:
        """Measure backup's Xen time minus primary's; takes 2 to 3 seconds."""
        with skew.SkewMeter(self.reachable("primary"), self.reachable("backup")) as meter:
            return meter.measure()

    # -- use

    def exec(
        self, host: str, command: str | Sequence[str], timeout_s: float = 120.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command line in a host's dom0; a sequence of words is joined with spaces, as ssh does.

        :raise CommandFailed: it failed, and ``check`` is true.
        :raise BedTimeout: it did not end in time.
        """
        return self.reachable(host).run(_line(command), timeout_s=timeout_s, check=check)

    def popen(self, host: str, command: str, **popen: Any) -> RemoteProcess:
        """Start a program in a host's dom0; keywords as for :class:`subprocess.Popen`."""
        return RemoteProcess(self.reachable(host), command, **popen)

    def push(self, host: str, source: Path, target: str) -> None:
        """Copy a file to the path ``target``, or a directory's content into the directory ``target``, in dom0."""
        where = shlex.quote(target)
        if source.is_dir():
            packed = subprocess.run(
                ["tar", "-C", str(source), "-czf", "-", "."], stdout=subprocess.PIPE, check=True
            )
            command, content = f"mkdir -p {where} && tar -C {where} -xzf - --no-same-owner", packed.stdout
        elif source.is_file():
            mode = source.stat().st_mode & 0o777
            command, content = f"cat > {where} && chmod {mode:o} {where}", source.read_bytes()
        else:
            raise BedError(f"{source} is neither a file nor a directory")
        self.reachable(host).run(command, timeout_s=600, stdin=content)

    def reachable(self, host: str) -> Remote:
        """ssh to a host.  :raise BedError: the bed is not up, or the host does not answer: it is off, still
        booting or paused.
        """
        self._need_up()
        state = self._host(host).state()
        if state != "ready":
            remedy = {"off": f": run 'boot {host}'", "paused": f": run 'resume {host}'"}.get(state, "")
            raise BedError(f"{host} is {state}{remedy}")
        return self.remote(host)

    def remote(self, host: str) -> Remote:
        """ssh to a host, whatever its state."""
        self._host(host)
        net = HOSTS[host]
        return Remote(host, net.mgmt, self.network.namespace("mgmt"), self.directory / host / "ssh.sock")

    def client_argv(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs ``argv`` in the client's namespace."""
        self._need_up()
        return ["nsenter", f"--net={NETNS_DIR / self.network.namespace('client')}", "--", *argv]

    def client_popen(self, argv: Sequence[str], **popen: Any) -> subprocess.Popen[bytes]:
        """Start a program in the client's namespace; keywords as for :class:`subprocess.Popen`."""
        return subprocess.Popen(self.client_argv(argv), **popen)

    # -- inside

    def options(self) -> Options:
        """:raise BedError: the bed is not up."""
        try:
            return Options(**json.loads((self.directory / RECORD).read_text()))
        except FileNotFoundError as cause:
            raise BedError(f"there is no bed '{self.name}': run 'up'") from cause

    def _prepare(self, options: Options) -> None:
        """Build what is missing, and note what the hosts are booted from."""
        image = dom0_image.image(options.release, device_model=options.device_model)
        _, key = key_pair()
        spec = {
            "xen": str(dom0_image.xen_binary(options.xen, options.release)), "vmlinuz": str(image.vmlinuz),
            "initrd": str(image.initrd), "disk": str(image.disk), "domu_disk": str(domu_disk.domu_disk()), "key": key,
            "memory_mb": options.memory_mb, "dom0_mb": options.dom0_mb,
        }  # fmt: skip
        spec["accel"] = accel.choose(options.accel, spec)
        (self.directory / "boot.json").write_text(json.dumps(spec))

    def _start(self, name: str, options: Options) -> None:
        if self._host(name).alive():
            raise BedError(f"{name} is running already")
        spec = json.loads((self.directory / "boot.json").read_text())
        self._host(name).start(HostSpec(bed=self.name, net=HOSTS[name], **spec), self.network.open_taps(name))

    def _power_on(self, skew_s: float) -> None:
        """Let both hosts go, the one that shall be behind later; the rest is corrected when they are ready."""
        first, second = ("backup", "primary") if skew_s > 0 else ("primary", "backup")
        self.hosts[first].qmp("cont")
        if abs(skew_s) >= 1:
            log.info("%s is powered on %.0f s after %s", second, abs(skew_s), first)
            time.sleep(abs(skew_s))
        self.hosts[second].qmp("cont")

    def _set_skew(self, wanted_s: float) -> None:
        def hold(step: skew.Hold) -> None:
            with skew.stopped(self.hosts[step.host].qmp):
                time.sleep(step.for_s)

        try:
            with skew.SkewMeter(self.remote("primary"), self.remote("backup")) as meter:
                reached = skew.set_skew(meter, wanted_s, hold)
        except skew.NoXenClock as error:
            # The clocks are read by the code under test: if that is broken the bed is still good to find out why.
            log.warning("the hosts' Xen clocks are not set, only about right: %s", error)
            return
        log.info(
            "backup's Xen clock is %+.4f s from primary's (to within %.4f s)",
            reached.offset_s,
            reached.error_s,
        )

    def _wait_ready(self, name: str) -> None:
        self.hosts[name].wait_ready(BOOT_TIMEOUT_S)
        self.remote(name).connect()

    def _host(self, name: str) -> Host:
        try:
            return self.hosts[name]
        except KeyError as cause:
            raise BedError(f"there is no host '{name}': it is 'primary' or 'backup'") from cause

    def _need_up(self) -> None:
        if not self.network.exists():
            raise BedError(f"the bed '{self.name}' is not up: run 'up'")

    def _check_directory(self) -> None:
        """:raise BedError: the directory is not a bed's: a user's that --state leads to by mistake."""
        if not _may_be_a_bed(self.directory):
            raise BedError(
                f"{self.directory} has something else than a bed in it: give another --state or --bed"
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.directory.mkdir(parents=True, exist_ok=True)
        with cache.locked(self.directory.parent / f"{self.name}.lock"):
            self.directory.mkdir(parents=True, exist_ok=True)
            yield


def bed_names(state_root: Path | None = None) -> list[str]:
    """Names of the beds that have state, up or crashed."""
    root = STATE_ROOT if state_root is None else state_root
    paths = root.iterdir() if root.is_dir() else ()
    return sorted(p.name for p in paths if p.is_dir() and NAME_PATTERN.fullmatch(p.name) and _may_be_a_bed(p))


def _may_be_a_bed(directory: Path) -> bool:
    """One that crashed at once has left an empty directory."""
    return (directory / RECORD).exists() or not any(directory.iterdir())


def _furnish(remote: Remote, code: Path) -> None:
    """What a host that has booted lacks."""
    worktree.install(remote, code)
    host_config.install(remote)


def _each_host(action: Callable[[str], None]) -> None:
    """Do it for both hosts at the same time; the first error is raised when both have ended."""
    with ThreadPoolExecutor(len(HOSTS)) as pool:
        for future in [pool.submit(action, name) for name in HOSTS]:
            future.result()


def _line(command: str | Sequence[str]) -> str:
    return command if isinstance(command, str) else " ".join(command)


def _need_root() -> None:
    if os.geteuid() != 0:
        raise BedError("the test bed makes network namespaces and taps: run it as root (sudo)")
