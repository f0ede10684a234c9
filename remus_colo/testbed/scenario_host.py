# SPDX-License-Identifier: LGPL-2.1-or-later
"""What of a protection can be seen on a host: links, queueing disciplines, packet rules, processes, domains.

A protection that has ended leaves a host as it was, so two looks at it are equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from remus_colo.testbed.bed import Bed

# Section of the report: what prints it. Each line becomes one fact.
_COMMANDS = {
    "link": "ip -o link show",
    "qdisc": "tc qdisc show",
    "table": "nft list tables",
    "process": "ps -eo args",
    "domain": "xl list",
}
_MARK = "== "
_LINK = re.compile(r"\d+: (?P<name>[^:@]+)[:@].*?(?: master (?P<master>\S+))?(?: state .*)?$")
_OURS_LINK = re.compile(r"rc[ptbi][0-9a-f]{6}\.\d+")
# The commands themselves, by whatever interpreter, and the xl that restores or saves a guest for them.
_OURS_PROCESS = re.compile(r"(\S*python\S* )?\S*/?remusd?( |$)|(\S*/)?xl (restore|save|migrate-receive)( |$)")
_OURS_QDISC = re.compile(
    r"qdisc (plug \S+ dev |(ingress|clsact) \S+ dev vif|\S+ \S+ dev rc[ptbi][0-9a-f]{6}\.)"
)
_OURS_TABLE = re.compile(r"table \S+ remus_colo_")


@dataclass(frozen=True, slots=True)
class HostState:
    """Facts about a host, as sorted as their order allows.

    :ivar links: ``name`` or ``name in bridge``.
    :ivar domains: domid by name, Domain-0 left out.
    """

    links: frozenset[str]
    qdiscs: frozenset[str]
    tables: frozenset[str]
    processes: frozenset[str]
    domains: tuple[tuple[str, int], ...]

    def leftovers(self) -> list[str]:
        """What belongs to a protection: all of it must be gone when that has ended."""
        found = [f"link {link}" for link in self.links if _OURS_LINK.match(link)]
        found += [line for line in self.qdiscs if _OURS_QDISC.match(line)]
        found += [line for line in self.tables if _OURS_TABLE.match(line)]
        found += [f"process {line}" for line in self.processes]
        found += [
            f"domain {name}" for name, _ in self.domains if name.endswith(("--secondary", "--incoming"))
        ]
        return sorted(found)


def observe(bed: Bed, host: str) -> HostState:
    """Look at a host that is up."""
    script = "; ".join(f"echo '{_MARK}{name}'; {command}" for name, command in _COMMANDS.items())
    return parse(bed.exec(host, script).stdout)


def parse(report: str) -> HostState:
    """:param report: what the commands printed, each below its mark."""
    sections: dict[str, list[str]] = {}
    for line in report.splitlines():
        if line.startswith(_MARK):
            sections[line.removeprefix(_MARK)] = []
        elif line.strip():
            next(reversed(sections.values())).append(line.strip())
    return HostState(
        links=frozenset(_links(sections["link"])),
        # handles of qdiscs that the kernel gives by itself are 0
        qdiscs=frozenset(sections["qdisc"]),
        tables=frozenset(sections["table"]),
        processes=frozenset(line for line in sections["process"] if _OURS_PROCESS.match(line)),
        domains=tuple(domains("\n".join(sections["domain"])).items()),
    )


def _links(lines: Iterable[str]) -> Iterable[str]:
    for line in lines:
        found = _LINK.match(line)
        if found is None:
            raise ValueError(f"not a line of 'ip -o link': {line!r}")
        yield found["name"] + (f" in {found['master']}" if found["master"] else "")


def domains(shown: str) -> dict[str, int]:
    """Domid by name from what ``xl list`` prints, Domain-0 left out."""
    found = {}
    for line in shown.splitlines()[1:]:
        name, domid = line.split()[:2]
        if domid != "0":
            found[name] = int(domid)
    return found
