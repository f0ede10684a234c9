# SPDX-License-Identifier: LGPL-2.1-or-later
"""The keys of ``xend-config.sxp``: their values, their defaults, who uses them.

Names, defaults and the reading of values are those of ``XendOptions.py`` and ``xend-config.sxp`` of Xen 4.4.  What
``docs/configuration.rst`` says of them is held to these tables by a test.
"""

from __future__ import annotations

import enum
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remus_colo import options
from remus_colo.errors import ConfigError
from remus_colo.failover.backup import UnknownPolicy
from remus_colo.options import CheckpointChoice

CONFIG_DIR = Path("/etc/xen")
GROUP = "remus-colo"

TRUE_WORDS = ("yes", "y", "1", "on", "true", "t")
FALSE_WORDS = ("no", "n", "0", "off", "false", "f")
LEVELS = ("TRACE", "DEBUG", "INFO", "WARNING", "WARN", "ERROR", "CRITICAL", "FATAL")


class Use(enum.StrEnum):
    """Which command a key is for."""

    REMUS = "remus"
    REMUSD = "remusd"
    BOTH = "both"


@dataclass(frozen=True, slots=True)
class Kind:
    """:param allowed: in words, for a refusal; ``read`` makes the value of a text, or raises ValueError."""

    allowed: str
    read: Callable[[str], Any]


def _bool(text: str) -> bool:
    word = text.lower()
    if word not in TRUE_WORDS + FALSE_WORDS:
        raise ValueError(text)
    return word in TRUE_WORDS


def _natural(text: str) -> int:
    # int() would also take "+1", " 1 " and "1_0"
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise ValueError(text)
    return int(text)


def _port(text: str) -> int:
    port = _natural(text)
    if not 0 < port < 65536:
        raise ValueError(text)
    return port


def _positive(text: str) -> int:
    number = _natural(text)
    if not number:
        raise ValueError(text)
    return number


def _limits(text: str) -> str:
    try:
        options.parse_limits(text)
    except ConfigError as error:
        raise ValueError(text) from error
    return text


def _file(text: str) -> Path | None:
    """A name without a directory is one in /etc/xen, as it was to xend."""
    if not text:
        return None
    return CONFIG_DIR / text if "/" not in text else Path(text)


def _absolute(text: str) -> Path | None:
    if text and not text.startswith("/"):
        raise ValueError(text)
    return Path(text) if text else None


def _level(text: str) -> str:
    if text.upper() not in LEVELS:
        raise ValueError(text)
    return text.upper()


def _patterns(text: str) -> tuple[re.Pattern[str], ...]:
    return tuple(map(_pattern, text.split()))


def _pattern(word: str) -> re.Pattern[str]:
    """As xend's Python 2 compiled it, to which a backslash before a letter without a meaning was none.

    Files have such: '\\.example' is read as '\\example', and the comments of Xen 3.0's own file recommended it.
    """
    while True:
        try:
            return re.compile(word)
        except re.error as error:
            # anything else was an error to Python 2, too
            if error.pos is None or not error.msg.startswith("bad escape") or not word[error.pos + 1 :]:
                raise
            word = word[: error.pos] + word[error.pos + 1 :]


def _command(text: str) -> tuple[str, ...]:
    return tuple(shlex.split(text))


def _choice(*words: str) -> Kind:
    def read(text: str) -> str:
        if text not in words:
            raise ValueError(text)
        return text

    return Kind(" or ".join([", ".join(words[:-1]), words[-1]]), read)


def _script(text: str) -> tuple[str, ...]:
    return tuple(text.split())


BOOL = Kind("yes or no", _bool)
PORT = Kind("a port from 1 to 65535", _port)
MILLISECONDS = Kind("a whole number of milliseconds", _natural)
SOME_MILLISECONDS = Kind("a whole number of milliseconds from 1", _positive)
NUMBER = Kind("a whole number", _natural)
COUNT = Kind("a whole number from 1", _positive)
LIMITS = Kind(f"NAME=NUMBER with commas between them, from 1, of {', '.join(options.LIMITS)},", _limits)
TEXT = Kind("a word or a string", str)
FILE = Kind("a file; without a directory it is one in /etc/xen", _file)
ABSOLUTE_FILE = Kind("a path that begins with /", _absolute)
LEVEL = Kind("one of " + ", ".join(LEVELS), _level)
HOSTS = Kind("regular expressions with blanks between them", _patterns)
COMMAND = Kind("a command, quoted as in a shell", _command)
SCRIPT = Kind("a script's name and its arguments", _script)
CHECKPOINT = _choice(*(choice.value for choice in CheckpointChoice))
UNKNOWN_PRIMARY = _choice(*(policy.value for policy in UnknownPolicy))


@dataclass(frozen=True, slots=True)
class Key:
    """:param default: as it would be written in the file."""

    kind: Kind
    default: str
    use: Use


def _number(value: int) -> str:
    return str(value)


# What xend had and we use.
XEND_KEYS: Mapping[str, Key] = {
    # xend's default was no; ours is yes unless the ssl server is on, for whoever starts remusd wants it to listen
    "xend-relocation-server": Key(BOOL, "yes", Use.REMUSD),
    "xend-relocation-port": Key(PORT, _number(options.DEFAULT_PORT), Use.BOTH),
    "xend-relocation-address": Key(TEXT, "", Use.REMUSD),
    "xend-relocation-hosts-allow": Key(HOSTS, "", Use.REMUSD),
    "xend-relocation-ssl-server": Key(BOOL, "no", Use.REMUSD),
    "xend-relocation-ssl-port": Key(PORT, _number(options.DEFAULT_SSL_PORT), Use.BOTH),
    "xend-relocation-server-ssl-key-file": Key(FILE, "", Use.BOTH),
    "xend-relocation-server-ssl-cert-file": Key(FILE, "", Use.BOTH),
    "xend-relocation-ssl": Key(BOOL, "no", Use.REMUS),
    # xend's were /var/log/xen/xend.log and DEBUG; remusd has the journal
    "logfile": Key(ABSOLUTE_FILE, "", Use.REMUSD),
    "loglevel": Key(LEVEL, "INFO", Use.REMUSD),
    "vif-script": Key(SCRIPT, "vif-bridge", Use.REMUSD),
    "network-script": Key(SCRIPT, "", Use.REMUSD),
}

# Ours, in the group (remus-colo ...).
COLO_KEYS: Mapping[str, Key] = {
    "interval": Key(SOME_MILLISECONDS, _number(options.DEFAULT_INTERVAL_MS), Use.REMUS),
    "checkpoint": Key(CHECKPOINT, CheckpointChoice.AUTO.value, Use.REMUS),
    "compare-timeout": Key(SOME_MILLISECONDS, _number(options.DEFAULT_COMPARE_TIMEOUT_MS), Use.REMUS),
    "limits": Key(LIMITS, "", Use.REMUS),
    "period": Key(MILLISECONDS, _number(options.DEFAULT_PERIOD_MS), Use.REMUS),
    "heartbeat-interval": Key(SOME_MILLISECONDS, _number(options.DEFAULT_HEARTBEAT_INTERVAL_MS), Use.REMUS),
    "heartbeat-timeout": Key(MILLISECONDS, _number(options.DEFAULT_HEARTBEAT_TIMEOUT_MS), Use.REMUS),
    "verify": Key(NUMBER, "0", Use.REMUS),
    "compression": Key(BOOL, "yes", Use.REMUS),
    "fence": Key(COMMAND, "", Use.BOTH),
    "ssl-ca-file": Key(FILE, "", Use.BOTH),
    "bridge": Key(TEXT, "", Use.REMUSD),
    "unknown-primary": Key(UNKNOWN_PRIMARY, UnknownPolicy.STAND_DOWN.value, Use.REMUSD),
    "half-open-limit": Key(COUNT, _number(options.DEFAULT_HALF_OPEN_LIMIT), Use.REMUSD),
    "event-log": Key(ABSOLUTE_FILE, "", Use.REMUSD),
}

# What else xend knew: accepted without a word. XendOptions.instance() still tells scripts what the file says.
OTHER_XEND_KEYS = frozenset((
    "console-limit", "device-create-timeout", "device-destroy-timeout", "dom0-cpus", "dom0-min-mem",
    "enable-dom0-ballooning", "enable-dump", "external-migration-tool", "keymap", "pci-passthrough-strict-check",
    "pscsi-device-mask", "qemu-dm-logrotate-count", "resource-label-change-script", "total_available_memory",
    "vnc-listen", "vnc-tls", "vnc-x509-cert-dir", "vnc-x509-verify", "vncpasswd", "xen-api-server", "xend-address",
    "xend-domains-path", "xend-http-server", "xend-port", "xend-security-path", "xend-state-path", "xend-storage-path",
    "xend-tcp-xmlrpc-server", "xend-tcp-xmlrpc-server-address", "xend-tcp-xmlrpc-server-port",
    "xend-tcp-xmlrpc-server-ssl-cert-file", "xend-tcp-xmlrpc-server-ssl-key-file", "xend-udev-event-server",
    "xend-unix-path", "xend-unix-server", "xend-unix-xmlrpc-server", "xsm_module_name",
))  # fmt: skip
