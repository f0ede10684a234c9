# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading what this machine is."""

import pytest

from remus_colo.testbed import machine
from remus_colo.testbed.errors import BedError


def test_os_release_fields_lose_their_quotes():
    text = 'NAME="Debian GNU/Linux"\nVERSION_ID="12"\n# comment=1\nID=debian\n\nVERSION_CODENAME=bookworm\n'
    assert machine.os_release(text) == {
        "NAME": "Debian GNU/Linux", "VERSION_ID": "12", "ID": "debian", "VERSION_CODENAME": "bookworm",
    }  # fmt: skip


@pytest.mark.parametrize(
    "shown, major",
    [
        ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)\nCopyright", 10),
        ("QEMU emulator version 7.2.19 (Debian 1:7.2+dfsg-7+deb12u16)", 7),
        ("", 0),
    ],
)
def test_the_version_of_qemu(shown, major):
    assert machine.qemu_major(shown) == major


def test_other_distributions_are_told_what_to_install():
    with pytest.raises(BedError, match="not Debian: install what these Debian packages have: mmdebstrap"):
        machine._install_packages({"ID": "fedora"}, {"mmdebstrap": "/nonexistent"})


def test_a_python_without_the_modules_is_not_taken_for_one(monkeypatch, tmp_path):
    monkeypatch.setenv("REMUS_COLO_CACHE", str(tmp_path))
    monkeypatch.setattr(machine, "PYTHON_MODULES", {"no_such_module_here": "no-such"})
    with pytest.raises(BedError, match="lacks no-such: run"):
        machine.python_for_tests(install=False)
