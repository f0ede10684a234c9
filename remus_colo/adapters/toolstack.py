# SPDX-License-Identifier: LGPL-2.1-or-later
"""xl, for what only libxl does: a domain's configuration, its restore, its end, its name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any

from remus_colo.adapters.commands import run_apart
from remus_colo.errors import DomainError, HostError, XenError

XL_TIMEOUT_S = 120.0
# How main() of xl (tools/xl/xl.c) ends where there is no hypervisor, or no xenstored, and how all words of Debian's
# wrapper (xen-utils-wrapper of xen-utils-common) begin, which looks for the xl of the Xen that runs.
NO_CONTEXT = "cannot init xl context"
WRAPPER_ERROR = "ERROR:  "
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def _xl(*args: str, timeout_s: float = XL_TIMEOUT_S) -> str:
    if shutil.which("xl") is None:
        raise HostError("the xl command was not found: install your distribution's xen-utils package")
    try:
        done = run_apart(("xl", *args), timeout_s)
    except subprocess.TimeoutExpired as error:
        raise XenError(
            f"xl {args[0]} did not end within {timeout_s:g} s", operation=f"xl {args[0]}"
        ) from error
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip().splitlines()
        if words and (words[-1] == NO_CONTEXT or words[-1].startswith(WRAPPER_ERROR)):
            reason = (
                (words[-2:-1] or words)[0]
                if words[-1] == NO_CONTEXT
                else words[-1].removeprefix(WRAPPER_ERROR)
            )
            raise HostError(
                f"xl cannot work here ({reason.strip()}): boot this host with Xen, and see that its services run "
                "(xenstored, xenconsoled)"
            )
        raise XenError(
            f"xl {args[0]} failed: {words[-1] if words else 'no message'}", operation=f"xl {args[0]}"
        )
    return done.stdout


def find_domain(name_or_domid: str) -> int:
    """The domid of a domain given by name, number or UUID.

    :raise DomainError: if there is none.
    """
    if name_or_domid.isdecimal():
        domid = int(name_or_domid)
        try:
            _xl("domname", name_or_domid)
        except XenError as error:
            raise DomainError(f"there is no domain with id {domid}: see `xl list`") from error
    elif _UUID.fullmatch(name_or_domid):
        domid = _of_uuid(name_or_domid.lower())
    else:
        try:
            domid = int(_xl("domid", name_or_domid))
        except (XenError, ValueError) as error:
            raise DomainError(
                f"there is no domain named {name_or_domid!r} on this host: see `xl list`"
            ) from error
    if domid == 0:
        raise DomainError("domain 0 is this host's control domain: name a guest")
    return domid


def _of_uuid(uuid: str) -> int:
    # lines "UUID  domid  name" (list_vm in xl's xl_info.c); xl finds domains by name and number only
    for line in _xl("vm-list").splitlines():
        words = line.split(maxsplit=2)
        if words and words[0].lower() == uuid:
            return int(words[1])
    raise DomainError(f"there is no domain with the UUID {uuid} on this host: see `xl vm-list`")


def domain_name(domid: int) -> str:
    return _xl("domname", str(domid)).strip()


def domain_config(domid: int) -> dict[str, Any]:
    """libxl's own configuration of a running domain, as ``xl list -l`` prints it."""
    entries = json.loads(_xl("list", "-l", str(domid)))
    for entry in entries if isinstance(entries, list) else [entries]:
        if entry.get("domid") == domid:
            config: dict[str, Any] = entry["config"]
            return config
    raise DomainError(f"xl knows no configuration of domain {domid}: was it created by xl?")


def restore_paused(stream_fd: int) -> subprocess.Popen[bytes]:
    """Start ``xl restore`` of a save stream; the domain is left paused. The caller closes ``stream_fd``."""
    if shutil.which("xl") is None:
        raise HostError("the xl command was not found: install your distribution's xen-utils package")
    return subprocess.Popen(
        ("xl", "restore", "-p", f"/proc/self/fd/{stream_fd}"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(stream_fd,),
        start_new_session=True,  # an xl that Ctrl-C ends leaves half a domain
    )


def receive_checkpoints(stream_fd: int) -> subprocess.Popen[bytes]:
    """Start ``xl migrate-receive`` of a Remus stream, in a session of its own. The caller closes ``stream_fd``."""
    if shutil.which("xl") is None:
        raise HostError("the xl command was not found: install your distribution's xen-utils package")
    return subprocess.Popen(
        ("xl", "migrate-receive", "-r"),
        stdin=stream_fd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def destroy(domid: int) -> None:
    """Destroy a domain and its devices; nothing happens if it is gone."""
    try:
        _xl("destroy", str(domid))
    except XenError as error:
        if "not" in str(error) and (
            "exist" in str(error) or "found" in str(error) or "invalid" in str(error)
        ):
            return
        try:
            _xl("domname", str(domid))
        except XenError:
            return
        raise


def rename(domid: int, name: str) -> None:
    _xl("rename", str(domid), name)
