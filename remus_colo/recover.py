# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python3 -m remus_colo.recover DOMAIN``: put right by hand what a ``remus`` has left whose guard was killed, too."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from remus_colo.adapters import toolstack
from remus_colo.command import check_root, run_command
from remus_colo.errors import ExitStatus
from remus_colo.session import recovery
from remus_colo.session.lock import only_one


def _body(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m remus_colo.recover",
        description="Let a guest run on that stands still since a remus was killed.",
        epilog="First see that the guest does not run on the backup host.",
    )
    parser.add_argument("domain", help="name or number, on this host")
    domain = parser.parse_args(argv).domain
    check_root("this")
    domid = toolstack.find_domain(domain)
    with only_one(domid, domain) as record:
        stood, _ = recovery.recover(domid, record.tags)
    print(
        {"": f"{domain} runs", recovery.GONE: f"{domain} has ended"}.get(
            stood, f"{domain} was {stood}, and runs on"
        )
    )
    return int(ExitStatus.OK)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    return run_command("recover", sys.argv[1:] if argv is None else argv, _body, verbose=False)


if __name__ == "__main__":
    sys.exit(main())
