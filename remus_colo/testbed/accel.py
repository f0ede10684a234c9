# SPDX-License-Identifier: LGPL-2.1-or-later
"""KVM or TCG: KVM only where a host really runs Xen, and Xen a PVH guest, under it.

A ``/dev/kvm`` that opens says little: Xen needs nested virtualization for its guests, and some KVMs
claim it and hang.  So the cheap conditions are checked first, and then a host is booted for a bounded
time; the outcome is kept in the cache, since it does not change until kernel, QEMU or image do.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from remus_colo.testbed import cache
from remus_colo.testbed.commands import run
from remus_colo.testbed.errors import BedError
from remus_colo.testbed.qemu import QEMU, Host, HostSpec

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 90.0
# dom0's init says this when the kernel command line has testbed.probe=1 and the guest has come up.
GUEST_RAN_MARK = "testbed: guest ran"


def missing(root: Path = Path("/")) -> str | None:
    """Why KVM cannot run Xen guests, as far as can be told without trying; None if it might.

    :param root: where ``dev``, ``proc`` and ``sys`` are.
    """
    if not os.access(root / "dev/kvm", os.R_OK | os.W_OK):
        return "there is no /dev/kvm that can be opened"
    flags = re.search(r"^flags\s*:(.*)$", (root / "proc/cpuinfo").read_text(), re.MULTILINE)
    words = set(flags[1].split()) if flags else set()
    module = "kvm_amd" if "svm" in words else "kvm_intel" if "vmx" in words else None
    if module is None:
        return "the CPU shows neither svm nor vmx"
    nested = root / "sys/module" / module / "parameters/nested"
    if not nested.exists() or nested.read_text().strip() not in ("1", "Y", "y"):
        return f"nested virtualization is off in {module}"
    return None


def choose(wanted: str, boot: Mapping[str, object]) -> str:
    """``tcg`` or ``kvm`` for ``auto``, ``tcg`` or ``kvm``.

    :param boot: fields of :class:`HostSpec` but ``bed``, ``net`` and ``accel``.
    :raise BedError: ``kvm`` is asked for and does not work.
    """
    if wanted == "tcg":
        return "tcg"
    reason = missing() or _tried(boot)
    if reason is None:
        return "kvm"
    if wanted == "kvm":
        raise BedError(f"Xen does not run under KVM here: {reason}; use --accel tcg")
    log.info("emulating the hosts' CPUs (TCG): %s", reason)
    return "tcg"


def _tried(boot: Mapping[str, object]) -> str | None:
    """Result of the probe, from the cache or by trying: why not, or None if it works."""
    version = run([QEMU, "--version"], timeout_s=20).stdout.splitlines()[0]
    recipe = {"kernel": os.uname().release, "machine": os.uname().version, "qemu": version,
              "disk": boot["disk"], "xen": boot["xen"], "domu": boot["domu_disk"]}  # fmt: skip

    def build(path: Path) -> None:
        log.info("trying whether Xen runs under KVM here (at most %.0f s)", PROBE_TIMEOUT_S)
        path.write_text(probe(boot, "kvm", PROBE_TIMEOUT_S) or "")

    return cache.entry("kvm-probe", recipe, build).read_text() or None


def probe(boot: Mapping[str, object], accel: str, timeout_s: float) -> str | None:
    """Boot a host without networks and start the guest in it; why that failed, or None."""
    with tempfile.TemporaryDirectory(prefix="testbed-probe-") as directory:
        host = Host("the probe", Path(directory))
        try:
            host.start(HostSpec(bed="probe", net=None, accel=accel, **boot), {})  # type: ignore[arg-type]
            host.qmp("cont")
            deadline_s = time.monotonic() + timeout_s
            while GUEST_RAN_MARK not in host.serial():
                if not host.alive():
                    return f"QEMU ended: {host.last_words()[-300:]}"
                if time.monotonic() > deadline_s:
                    return f"no guest ran within {timeout_s:.0f} s: {host.last_words()[-300:]}"
                time.sleep(0.2)
            return None
        except BedError as error:
            return str(error)
        finally:
            host.kill()
