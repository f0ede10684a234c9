# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain as xend described it: an S-expression, from libxl's configuration.  Pure.

The names are those of xend's configuration (``tools/python/xen/xend/XendConfig.py`` of Xen 4.4), as far as Remus's
tools and people's scripts for it read them.
"""

from __future__ import annotations

import json
from typing import Any

Sxpr = Any  # a string, or a list of these

KIB_PER_MIB = 1024
LIBXL = "libxl"  # an element of ours


def from_libxl(domid: int, config: dict[str, Any]) -> list[Sxpr]:
    """``['domain', ['domid', 1], ['name', 'web'], ...]``.

    :param config: libxl's JSON configuration of the domain (``xl list -l``).
    """
    create, build = config.get("c_info", {}), config.get("b_info", {})
    kind = build.get("type") or create.get("type") or "pvh"
    sxpr: list[Sxpr] = [
        "domain",
        ["domid", domid],
        ["name", create.get("name", f"Domain-{domid}")],
        ["uuid", create.get("uuid", "")],
        ["vcpus", build.get("max_vcpus", 1)],
        ["maxmem", build.get("max_memkb", 0) // KIB_PER_MIB],
        ["memory", build.get("target_memkb", 0) // KIB_PER_MIB],
        ["shadow_memory", build.get("shadow_memkb", 0) // KIB_PER_MIB],
        ["image", ["linux" if kind == "pv" else str(kind)]],
    ]
    sxpr += [["device", _vif(nic)] for nic in config.get("nics", [])]
    sxpr += [["device", _vbd(disk)] for disk in config.get("disks", [])]
    return sxpr


def _vif(nic: dict[str, Any]) -> list[Sxpr]:
    found: list[Sxpr] = ["vif"]
    for name in ("mac", "bridge", "script"):
        if nic.get(name):
            found.append([name, str(nic[name])])
    return found


def _vbd(disk: dict[str, Any]) -> list[Sxpr]:
    path, script = str(disk.get("pdev_path", "")), str(disk.get("script", "")).rpartition("/")[2]
    if ":" in path.partition("/")[0]:
        uname = path
    elif script.startswith("block-"):
        uname = f"{script.removeprefix('block-')}:{path}"  # as xl has it: "drbd:r0" is r0 with the script block-drbd
    else:
        uname = f"phy:{path}" if disk.get("backend") == "phy" or path.startswith("/dev/") else f"file:{path}"
    kind = "cdrom" if disk.get("is_cdrom") else "disk"
    return [
        "vbd",
        ["uname", uname],
        ["dev", f"{disk.get('vdev', '')}:{kind}"],
        ["mode", "w" if disk.get("readwrite") else "r"],
    ]


def with_libxl(sxpr: list[Sxpr], config: dict[str, Any]) -> list[Sxpr]:
    """A description from which the domain can be made anew, too: libxl's configuration is one more element."""
    return [*sxpr, [LIBXL, json.dumps(config)]]


def libxl_of(parsed: dict[str, Any]) -> dict[str, Any] | None:
    """libxl's configuration in a description; None if it has none.

    :raise ValueError: it is none, or another domain's.
    """
    text = parsed.get(LIBXL)
    if text is None:
        return None
    try:
        config = json.loads(str(text))
    except RecursionError as error:
        raise ValueError("lists within lists without end") from error
    create = config.get("c_info") if isinstance(config, dict) else None
    if not isinstance(create, dict) or create.get("name") != parsed.get("name"):
        raise ValueError("a configuration of libxl's that is another domain's")
    return dict(config)


def parse(dominfo: list[Sxpr]) -> dict[str, Any]:
    """A domain's S-expression as nested dictionaries.

    An element with a list behind its name is a dictionary of these; elements of one name are merged, and what
    several of them have becomes a list: two devices ``vif`` are ``{'device': {'vif': [{...}, {...}]}}``, one is
    ``{'device': {'vif': {...}}}``.
    """
    return _dictionary(dominfo[1:])


def _dictionary(elements: list[Sxpr]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for element in elements:
        if not isinstance(element, list):
            found[str(element)] = None  # a word by itself
            continue
        if not element:
            continue
        if isinstance(element[0], list):
            return _dictionary(element)  # xend's ['cpus', [[1]]]
        name, value = str(element[0]), element[1] if len(element) > 1 else None
        if isinstance(value, list):
            value = _dictionary(element[1:])
        if isinstance(value, dict) and isinstance(found.get(name), dict):
            _merge(found[name], value)
        else:
            found[name] = value
    return found


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        if name not in into:
            into[name] = value
        elif isinstance(into[name], list):
            into[name].append(value)
        else:
            into[name] = [into[name], value]


def unparse(dom: dict[str, Any]) -> list[Sxpr]:
    """The way back from :func:`parse`."""
    return ["domain", *_elements(dom)]


def _elements(found: dict[str, Any]) -> list[Sxpr]:
    elements: list[Sxpr] = []
    for name, value in found.items():
        if isinstance(value, dict):
            singles = {key: item for key, item in value.items() if not isinstance(item, list)}
            if singles:
                elements.append([name, *_elements(singles)])
            elif not value:
                elements.append([name, []])  # xend's ['cpus', [[]]]; without a list it would be no dictionary
            # What was merged is told apart by an element for each.
            for key, items in value.items():
                if isinstance(items, list):
                    elements += [[name, *_elements({key: item})] for item in items]
        else:
            elements.append([name] if value is None else [name, value])
    return elements
