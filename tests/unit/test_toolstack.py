# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is made of what xl says, with a program in its place."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from remus_colo import primary, remus
from remus_colo.adapters import toolstack
from remus_colo.checkpoint import birth
from remus_colo.errors import DomainError, HostError


@pytest.fixture
def xl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program; it is not there yet."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path / "xl"


def says(xl: Path, text: str, status: int = 1) -> None:
    xl.write_text(f"#!/bin/sh\nprintf %s {shlex.quote(text)} >&2\nexit {status}\n")
    xl.chmod(0o755)


NO_XEN = {
    "xl": (
        "xencall: error: Could not obtain handle on privileged command interface: No such file or directory\n"
        "libxl: error: libxl.c:101:libxl_ctx_alloc: cannot open libxc handle: No such file or directory\n"
        "cannot init xl context\n"
    ),
    "Debian's": "ERROR:  Can't find hypervisor information in sysfs!\n",
}


@pytest.mark.parametrize("text", NO_XEN.values(), ids=NO_XEN)
@pytest.mark.parametrize("domain", ["web", "7", "4e7a4b1e-0000-4000-8000-00000000000a"])
def test_a_host_without_xen_is_not_one_without_the_domain(xl: Path, domain: str, text: str) -> None:
    says(xl, text)
    with pytest.raises(
        HostError, match=r"xl cannot work here \(.*(libxc handle|sysfs).*\): boot this host with Xen"
    ):
        toolstack.find_domain(domain)


def test_a_domain_that_is_not_there(xl: Path) -> None:
    says(xl, "web is an invalid domain identifier (rc=-6)\n")
    with pytest.raises(DomainError, match="there is no domain named 'web'"):
        toolstack.find_domain("web")


@pytest.mark.parametrize("run", [primary.run, remus.run], ids=["COLO", "Remus"])
@pytest.mark.parametrize("suffix", ["--secondary", "--incoming"])
def test_a_copy_is_not_what_is_to_be_protected(xl: Path, suffix: str, run: Callable[[object], int]) -> None:
    """A hint to unpause it would have it run beside the guest."""
    xl.write_text(f"#!/bin/sh\ncase $1 in domid) echo 7;; domname) echo web{suffix};; *) exit 1;; esac\n")
    xl.chmod(0o755)
    with pytest.raises(DomainError, match=f"web{suffix} is the copy of a guest .*xl rename web{suffix} web"):
        run(mock.Mock(domain=f"web{suffix}"))


@pytest.mark.parametrize(
    ("xl_does", "made"),
    [("exit 0", True), ("exit 1", False), ("kill -9 $$", True), ("exec sleep 1000", True)],
)
def test_what_a_restore_that_was_given_up_may_have_left(
    xl: Path, monkeypatch: pytest.MonkeyPatch, xl_does: str, made: bool
) -> None:
    """An xl that was killed has not destroyed what it had half made."""
    monkeypatch.setattr(birth, "ABORT_TIMEOUT_S", 0.1 if "sleep" in xl_does else 60.0)
    xl.write_text(f"#!/bin/sh\n{xl_does}\n")
    xl.chmod(0o755)
    restorer = birth.Restorer("web--secondary")
    assert not restorer.made
    restorer.abort()
    assert restorer.made is made


def test_a_domain_with_a_name_in_another_encoding_is_in_nobodys_way(xl: Path) -> None:
    """xl prints names as they are."""
    uuid = "4e7a4b1e-0000-4000-8000-00000000000a"
    xl.write_bytes(
        b"#!/bin/sh\nprintf 'UUID ID name\\n%s 3 caf\\351\\n%s 7 web\\n' 00000000 " + uuid.encode()
    )
    xl.chmod(0o755)
    assert toolstack.find_domain(uuid) == 7


@pytest.mark.parametrize("run", [primary.run, remus.run], ids=["COLO", "Remus"])
@pytest.mark.parametrize("name", ["my guest", "-web", "web\u200b"])
def test_a_name_that_the_backup_would_refuse(xl: Path, name: str, run: Callable[[object], int]) -> None:
    """It would call the message malformed, which helps nobody."""
    xl.write_text(f"#!/bin/sh\nprintf '%s\\n' {shlex.quote(name)}\n")
    xl.chmod(0o755)
    with pytest.raises(DomainError, match=r"domain 7 has the name .*\(xl rename 7 NAME\)"):
        run(mock.Mock(domain="7"))
