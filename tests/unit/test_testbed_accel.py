# SPDX-License-Identifier: LGPL-2.1-or-later
"""When KVM is not even tried."""

import pytest

from remus_colo.testbed import accel
from remus_colo.testbed.errors import BedError


@pytest.fixture
def machine(tmp_path):
    """A machine whose KVM might run Xen."""
    files = {
        "dev/kvm": "",
        "proc/cpuinfo": "processor\t: 0\nflags\t\t: fpu svm npt\n",
        "sys/module/kvm_amd/parameters/nested": "1\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def test_a_machine_with_all_of_it_might_do(machine):
    assert accel.missing(machine) is None


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("dev/kvm", None, "no /dev/kvm"),
        ("proc/cpuinfo", "flags\t\t: fpu sse\n", "neither svm nor vmx"),
        ("proc/cpuinfo", "no flags here\n", "neither svm nor vmx"),
        ("sys/module/kvm_amd/parameters/nested", "0\n", "nested virtualization is off in kvm_amd"),
        ("sys/module/kvm_amd/parameters/nested", None, "nested virtualization is off in kvm_amd"),
        ("proc/cpuinfo", "flags\t\t: fpu vmx\n", "nested virtualization is off in kvm_intel"),
    ],
)
def test_what_is_missing_is_named(machine, name, content, reason):
    if content is None:
        (machine / name).unlink()
    else:
        (machine / name).write_text(content)
    assert reason in accel.missing(machine)


def test_tcg_asks_nothing_and_kvm_insists(monkeypatch):
    monkeypatch.setattr(accel, "missing", lambda: "no /dev/kvm")
    assert accel.choose("tcg", {}) == "tcg"
    assert accel.choose("auto", {}) == "tcg"
    with pytest.raises(BedError, match="no /dev/kvm; use --accel tcg"):
        accel.choose("kvm", {})
