# SPDX-License-Identifier: LGPL-2.1-or-later
"""One emulated host: QEMU's command line, its process and what it left in the bed's state directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from remus_colo.testbed.commands import need
from remus_colo.testbed.errors import BedError, BedTimeout
from remus_colo.testbed.network import NIC_ROLES, REPL_MTU, HostNet, mac
from remus_colo.testbed.process import ProcessId
from remus_colo.testbed.qmp import Qmp

QEMU = "qemu-system-x86_64"
# sun_path of unix(7), with its closing zero
UNIX_PATH_MAX = 108

# SVM is for the guests.  The emulator carries AES out on this machine's own instructions: 100 MB/s, and 6 without, which made
# a protection over TLS take minutes to begin.  The rest is what any CPU with AES has, and is not known to matter.
EMULATED_CPU = "qemu64,+svm,+npt,+ssse3,+sse4.1,+sse4.2,+popcnt,+aes,+pclmulqdq,+fsgsbase"

# Xen: no memory scrubbing, no real-mode calls, no mitigations: each is seconds under emulation.
XEN_ARGS = (
    "console=com1 com1=115200,8n1 dom0_mem={dom0_mb}M,max:{dom0_mb}M loglvl=warning guest_loglvl=warning "
    "no-real-mode bootscrub=0 ucode=no spec-ctrl=no xpti=no watchdog=0 iommu=off vpmu=0 cpuidle=0"
)
DOM0_ARGS = (
    "console=hvc0 mitigations=off net.ifnames=0 quiet loglevel=4 random.trust_cpu=on nowatchdog "
    "raid=noautodetect testbed.key={key} {identity}"
)
READY_MARK = "testbed: ready at"


def qmp_argument(directory: Path) -> str:
    return f"unix:{directory}/qmp.sock,server=on,wait=off"


def serial_argument(directory: Path) -> str:
    return f"socket,id=serial,path={directory}/serial.sock,server=on,wait=off,logfile={directory}/serial.log"


@dataclass(frozen=True, slots=True)
class HostSpec:
    """What a host is booted from.  Paths are absolute; ``key`` is the base64 part of an ed25519 public key.

    ``net`` is None for a probe: no interfaces, and dom0 starts the guest by itself and says so.
    """

    bed: str
    net: HostNet | None
    xen: str
    vmlinuz: str
    initrd: str
    disk: str
    domu_disk: str | None
    key: str
    memory_mb: int
    dom0_mb: int
    accel: str

    def argv(self, directory: Path, taps: dict[str, int]) -> list[str]:
        """QEMU's command line; it starts stopped (``-S``), and ``cont`` powers the host on."""
        net = self.net
        host = net.host if net else "probe"
        identity = (
            f"testbed.host={net.host} testbed.n={net.number}" if net else "testbed.host=probe testbed.probe=1"
        )
        dom0 = DOM0_ARGS.format(identity=identity, key=self.key).replace(",", ",,")
        accel = {"tcg": "tcg,thread=multi", "kvm": "kvm"}[self.accel]
        argv = [QEMU, "-name", f"testbed-{self.bed}-{host}", "-machine", "q35",
                "-cpu", "host" if self.accel == "kvm" else EMULATED_CPU, "-accel", accel,
                "-smp", "1", "-m", str(self.memory_mb), "-nodefaults", "-display", "none", "-no-reboot", "-S",
                "-chardev", serial_argument(directory),
                "-serial", "chardev:serial",
                "-qmp", qmp_argument(directory),
                "-kernel", self.xen, "-append", XEN_ARGS.format(dom0_mb=self.dom0_mb),
                "-initrd", f"{self.vmlinuz} {dom0},{self.initrd}",
                "-drive", f"file={self.disk},if=virtio,format=raw,snapshot=on"]  # fmt: skip
        if self.domu_disk is not None:
            argv += ["-drive", f"file={self.domu_disk},if=virtio,format=raw,snapshot=on"]
        argv += ["-device", "virtio-rng-pci"]
        for role in NIC_ROLES if net else ():
            address = mac(self.bed, host, role)
            mtu = f",host_mtu={REPL_MTU}" if role == "repl" else ""
            argv += ["-netdev", f"tap,id={role},fd={taps[role]},vhost=off",
                     "-device", f"virtio-net-pci,netdev={role},mac={address},romfile={mtu}"]  # fmt: skip
        return argv


class Host:
    """A host's QEMU, as found in ``directory``; any process may look at it and control it."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.directory = directory

    @property
    def serial_log(self) -> Path:
        return self.directory / "serial.log"

    @property
    def qmp_argument(self) -> str:
        """An argument that only this host's QEMU has."""
        return qmp_argument(self.directory)

    @property
    def qmp_path(self) -> Path:
        return self.directory / "qmp.sock"

    def process(self) -> ProcessId | None:
        """The recorded QEMU, alive or not; None if it was never started."""
        try:
            record = json.loads((self.directory / "process.json").read_text())
        except FileNotFoundError:
            return None
        return ProcessId(**record)

    def alive(self) -> bool:
        process = self.process()
        return process is not None and process.alive()

    def start(self, spec: HostSpec, taps: dict[str, int]) -> None:
        """Start QEMU, stopped.  The taps are closed here whatever happens; QEMU has its own copies."""
        try:
            need(QEMU)
            if self.alive():
                raise BedError(f"{self.name} is running already")
            self.directory.mkdir(parents=True, exist_ok=True)
            if len(str(self.directory / "serial.sock")) >= UNIX_PATH_MAX:
                raise BedError(f"the state directory's path is too long for sockets: {self.directory}")
            for name in ("process.json", "qmp.sock", "serial.sock", "serial.log"):
                (self.directory / name).unlink(missing_ok=True)
            with (self.directory / "qemu.log").open("ab") as output:
                child = subprocess.Popen(
                    spec.argv(self.directory, taps),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=tuple(taps.values()),
                    start_new_session=True,
                    cwd="/",
                )
            # The bed outlives this process: nobody waits for the child here, ProcessId.kill() reaps it.
            child.returncode = 0
            try:
                record = ProcessId.of(child.pid)
                (self.directory / "process.json").write_text(json.dumps(asdict(record)))
            except BaseException:
                os.kill(child.pid, signal.SIGKILL)
                raise
        finally:
            for fd in taps.values():
                os.close(fd)

    def qmp(self, command: str, *, timeout_s: float = 30.0, **arguments: Any) -> Any:
        """Run one QMP command.  :raise BedError: also when QEMU has ended, with its last words."""
        if not self.alive():
            raise BedError(f"{self.name} is not running: {self.last_words()}")
        try:
            with Qmp(self.qmp_path, timeout_s) as connection:
                return connection.execute(command, **arguments)
        except BedError as cause:
            if self.alive():
                raise
            raise BedError(f"{self.name}'s QEMU ended: {self.last_words()}") from cause

    def kill(self) -> bool:
        """Cut its power: SIGKILL.  False if it was off."""
        process = self.process()
        if process is None:
            return False
        # A stopped process dies of SIGKILL as well.
        return process.kill()

    def signal(self, number: signal.Signals) -> None:
        """:raise BedError: it is not running."""
        process = self.process()
        if process is None or not process.signal(number):
            raise BedError(f"{self.name} is not running")

    def serial(self) -> str:
        """What Xen and dom0 wrote to the serial line since power-on."""
        try:
            return self.serial_log.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def state(self) -> str:
        """``off``, ``booting``, ``ready`` or ``paused``."""
        process = self.process()
        letter = process.state() if process is not None else None
        if letter is None:
            return "off"
        if letter == "T":
            return "paused"
        return "ready" if READY_MARK in self.serial() else "booting"

    def wait_paused(self, timeout_s: float) -> None:
        """Wait until all of QEMU stands still: a signal takes effect a moment after it is sent."""
        deadline_s = time.monotonic() + timeout_s
        while self.state() != "paused":
            if not self.alive():
                raise BedError(f"{self.name} is not running")
            if time.monotonic() > deadline_s:
                raise BedTimeout(f"{self.name} did not stop within {timeout_s:g} s")
            time.sleep(0.001)

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until dom0's toolstack is up.

        :raise BedTimeout: it is not in time; :raise BedError: it died.  Both show the end of the serial log.
        """
        deadline_s = time.monotonic() + timeout_s
        while READY_MARK not in self.serial():
            if not self.alive():
                raise BedError(f"{self.name} died while it booted: {self.last_words()}")
            if time.monotonic() > deadline_s:
                raise BedTimeout(
                    f"{self.name} is not ready after {timeout_s:g} s; it last said: {self.last_words()}"
                )
            time.sleep(0.1)

    def last_words(self) -> str:
        """The end of what the host and its QEMU wrote."""
        try:
            own = (self.directory / "qemu.log").read_text(errors="replace")
        except FileNotFoundError:
            own = ""
        return (self.serial()[-1000:] + own[-1000:]).strip() or "nothing"
