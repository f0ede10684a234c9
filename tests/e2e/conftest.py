# SPDX-License-Identifier: LGPL-2.1-or-later
"""End-to-end tests: two Xen hosts in QEMU, a guest, a client, and the commands as a user runs them.

One bed serves all tests.  A test gets a :class:`Protection` on it with both hosts up and nothing running but,
maybe, the guest; after a test that killed a host, failed or left something behind the bed is made anew.

``REMUS_COLO_TEST_BED`` names a bed to use instead of one of our own; if it is up already it is left up, and
made anew as it was.  Logs of tests that failed are kept below ``build/e2e-logs``.  With ``CI=true`` a skipped
test counts as failed.
"""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from remus_colo.testbed.bed import Bed, Options
from remus_colo.testbed.network import HOSTS
from remus_colo.testbed.qemu import QEMU
from remus_colo.testbed.scenario import Protection, destroy_guests, fresh

LOGS = Path(__file__).parents[2] / "build" / "e2e-logs"
# Tests that share a state of the bed stand together; those that need another one come last.
ORDER = (
    "test_dom0",
    "test_bad_input",
    "test_receiver",
    "test_protect",
    "test_random_divergence",
    "test_memory",
    "test_both_modes",
    "test_localhost",
    "test_link",
    "test_frozen",
    "test_classic",
    "test_killed",
    "test_two_domains",
    "test_failover_backup",
    "test_failover_primary",
    "test_ipv6",
    "test_skewed_clocks",
)
# characters of a failure's end
SHOWN_AT_ONCE = 3000
_REPORTS = pytest.StashKey[dict[str, pytest.TestReport]]()


def why_not() -> str | None:
    """Why the test bed cannot be had here, or None."""
    if os.geteuid() != 0:
        return "the test bed needs root: run this with sudo"
    if shutil.which(QEMU) is None:
        return f"{QEMU} is not installed: run 'python3 -m remus_colo.testbed setup'"
    if not Path("/dev/net/tun").exists():
        return "this machine has no /dev/net/tun, which the emulated hosts' networks need"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(item.path).parent == Path(__file__).parent]
    places = [index for index, item in enumerate(items) if item in here]
    here.sort(
        key=lambda item: ORDER.index(Path(item.path).stem) if Path(item.path).stem in ORDER else len(ORDER)
    )
    for place, item in zip(places, here, strict=True):
        items[place] = item


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[Any]:
    report = yield
    if report.skipped and os.environ.get("CI") == "true":
        report.outcome = "failed"
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.longrepr = f"CI does not accept this: {reason}"
    item.stash.setdefault(_REPORTS, {})[report.when] = report
    terminal = item.config.pluginmanager.get_plugin("terminalreporter")
    if report.failed and terminal is not None:
        # Now, too: a run of an hour may be ended before its summary.
        terminal.write_line("")
        terminal.write_line(report.longreprtext[-SHOWN_AT_ONCE:])
    return report


class BedKeeper:
    """Hands out the bed as a test needs it.

    :ivar in_order: both hosts are up, with this skew, and nothing of a protection is left on them.
    """

    def __init__(self) -> None:
        named = os.environ.get("REMUS_COLO_TEST_BED")
        self.bed = Bed(named or f"e2e-{os.getpid()}")
        self._keep = bool(named) and self.bed.network.exists()
        self._options = self.bed.options() if self._keep else Options()
        self._skew_s = 0.0
        self.in_order = False

    def protection(self, skew_s: float) -> Protection:
        if (
            self._keep
            and not self.in_order
            and self.bed.network.exists()
            and self.bed.options().skew_s == skew_s
        ):
            self._take_over()
        if not self.in_order or skew_s != self._skew_s:
            self.in_order = False
            fresh(self.bed, dataclasses.replace(self._options, skew_s=skew_s))
            self._skew_s, self.in_order = skew_s, True
        return Protection(self.bed)

    def _take_over(self) -> None:
        """A bed that was up already, perhaps with a host that was killed: as good as new if nothing is left over."""
        if all(self.bed.hosts[host].state() == "ready" for host in HOSTS):
            self.bed.sync()
            destroy_guests(self.bed)
            protection = Protection(self.bed)
            self.in_order = not any(protection.leftovers(host) for host in HOSTS)
            self._skew_s = self.bed.options().skew_s

    def take_back(self, protection: Protection, *, failed: bool) -> None:
        protection.close()
        self.in_order = not failed and all(
            self.bed.hosts[host].state() == "ready" and not protection.leftovers(host) for host in HOSTS
        )

    def close(self) -> None:
        if not self._keep:
            self.bed.down()


@pytest.fixture(scope="session")
def bed_keeper() -> Iterator[BedKeeper]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    keeper = BedKeeper()
    try:
        yield keeper
    finally:
        keeper.close()


@pytest.fixture
def protection(bed_keeper: BedKeeper, request: pytest.FixtureRequest) -> Iterator[Protection]:
    """The bed, both hosts up; ``@pytest.mark.skew(s)`` sets backup's Xen clock apart from primary's."""
    marker = request.node.get_closest_marker("skew")
    made = bed_keeper.protection(float(marker.args[0]) if marker else 0.0)
    yield made
    reports = request.node.stash.get(_REPORTS, {})
    failed = "call" not in reports or reports["call"].failed
    if failed:
        directory = LOGS / request.node.name.replace("/", "_")
        shutil.rmtree(directory, ignore_errors=True)
        made.save_logs(directory)
    bed_keeper.take_back(made, failed=failed)


@pytest.fixture
def chance(record_property: Any) -> random.Random:
    """For moments; ``REMUS_COLO_TEST_SEED`` repeats those of an earlier run."""
    seed = int(os.environ.get("REMUS_COLO_TEST_SEED", random.randrange(1 << 32)))
    record_property("seed", seed)
    print(f"seed {seed}")  # shown if the test fails
    return random.Random(seed)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "skew(seconds): backup's Xen clock minus primary's")
