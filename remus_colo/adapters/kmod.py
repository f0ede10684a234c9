# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernel modules: is one there, load one, and say what to do when it is not.

Most of what we need is loaded by the kernel itself on first use (qdiscs, classifiers, link kinds,
nftables expressions).  The adapters therefore try the operation first, and come here for what the kernel
does not load by itself (``br_netfilter``) and for the message when an operation is not known.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
from pathlib import Path

from remus_colo.adapters.commands import run_apart
from remus_colo.errors import HostError

log = logging.getLogger(__name__)

_SYS_MODULE = Path("/sys/module")
_MODPROBE_TIMEOUT_S = 30
_NAME = re.compile(r"[A-Za-z0-9_-]+")


def is_present(module: str) -> bool:
    """True if ``module`` is loaded or built in.

    A built-in module without parameters shows neither in ``/sys/module`` nor, on a kernel that came
    without its ``modules.builtin``, anywhere else: False means "not known to be there".
    """
    name = _checked(module).replace("-", "_")
    return (_SYS_MODULE / name).is_dir() or name in _built_in()


def load(module: str, purpose: str) -> None:
    """See to it that ``module`` is there, loading it with modprobe if need be.

    :param purpose: what it is for, as in "holding packets of a bridge port"; goes into the message.
    :raise HostError: it is not there and cannot be loaded.
    """
    if is_present(module):
        return
    modprobe = shutil.which("modprobe", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if modprobe is None:
        raise missing(module, purpose, "modprobe is not installed")
    try:
        done = run_apart([modprobe, "--", module], _MODPROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired as exc:
        raise missing(module, purpose, f"modprobe did not end within {_MODPROBE_TIMEOUT_S} s") from exc
    if done.returncode != 0:
        # modprobe may say more than one line; ours is one sentence.
        reason = "; ".join(done.stderr.split("\n")).strip("; ")
        raise missing(module, purpose, reason or f"modprobe ended with {done.returncode}")
    log.info("loaded kernel module %s for %s", module, purpose)


def missing(module: str, purpose: str, detail: str = "") -> HostError:
    """The error that names the module, what it is needed for and what to do."""
    return HostError(
        f"this kernel has no {module}, which is needed for {purpose}"
        + (f" ({detail})" if detail else "")
        + f": try 'modprobe {module}'; if there is no such module, boot a kernel that has it"
        " (Debian's linux-image-amd64 does, its -cloud kernels do not)"
    )


def _checked(module: str) -> str:
    if not _NAME.fullmatch(module):
        raise ValueError(f"{module!r} is no name of a kernel module")
    return module


def _built_in() -> frozenset[str]:
    listing = Path("/lib/modules", os.uname().release, "modules.builtin")
    try:
        lines = listing.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(Path(line).name.partition(".ko")[0].replace("-", "_") for line in lines)
