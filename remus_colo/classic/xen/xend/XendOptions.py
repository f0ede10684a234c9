# SPDX-License-Identifier: LGPL-2.1-or-later
"""``XendOptions.instance()``: what ``xend-config.sxp`` says, by the methods and with the defaults that xend had.

A thin face of :mod:`remus_colo.config`.  The methods are those of xend's class, made from the table below.
"""

from __future__ import annotations

import functools
import os.path
from pathlib import Path
from typing import Any

from remus_colo import config
from remus_colo.config_keys import CONFIG_DIR, FALSE_WORDS, TRUE_WORDS
from remus_colo.sxp import child_value

from .XendError import XendError  # of the package under the name that we were imported by

SCRIPTS_DIR = str(CONFIG_DIR / "scripts")

# Method less its get_, key of the file, form of the value, xend's default.
_GETTERS: tuple[tuple[str, str, str, Any], ...] = (
    ("console_limit", "console-limit", "int", 1024),
    ("device_create_timeout", "device-create-timeout", "int", 100),
    ("device_destroy_timeout", "device-destroy-timeout", "int", 100),
    ("dom0_min_mem", "dom0-min-mem", "int", 0),
    ("dom0_vcpus", "dom0-cpus", "int", 0),
    ("enable_dump", "enable-dump", "bool", "no"),
    ("external_migration_tool", "external-migration-tool", "string", ""),
    ("keymap", "keymap", "string", None),
    ("network_script", "network-script", "script", None),
    ("pci_dev_assign_strict_check", "pci-passthrough-strict-check", "bool", "yes"),
    ("pscsi_device_mask", "pscsi-device-mask", "value", ["*"]),
    ("qemu_dm_logrotate_count", "qemu-dm-logrotate-count", "int", 10),
    ("resource_label_change_script", "resource-label-change-script", "script", None),
    ("vif_script", "vif-script", "string", "vif-bridge"),
    ("vnc_tls", "vnc-tls", "string", 0),
    ("vnc_x509_cert_dir", "vnc-x509-cert-dir", "file", "vnc"),
    ("vnc_x509_verify", "vnc-x509-verify", "string", 0),
    ("vnclisten_address", "vnc-listen", "string", "127.0.0.1"),
    ("vncpasswd_default", "vncpasswd", "string", None),
    ("xen_api_server", "xen-api-server", "value", [["unix"]]),
    ("xend_address", "xend-address", "string", ""),
    ("xend_domains_path", "xend-domains-path", "string", "/var/lib/xend/domains"),
    ("xend_http_server", "xend-http-server", "bool", "no"),
    ("xend_port", "xend-port", "int", 8000),
    ("xend_relocation_address", "xend-relocation-address", "string", ""),
    ("xend_relocation_hosts_allow", "xend-relocation-hosts-allow", "string", ""),
    ("xend_relocation_port", "xend-relocation-port", "int", 8002),
    ("xend_relocation_server", "xend-relocation-server", "bool", "no"),
    ("xend_relocation_server_ssl_cert_file", "xend-relocation-server-ssl-cert-file", "file", None),
    ("xend_relocation_server_ssl_key_file", "xend-relocation-server-ssl-key-file", "file", None),
    ("xend_relocation_ssl", "xend-relocation-ssl", "bool", "no"),
    ("xend_relocation_ssl_port", "xend-relocation-ssl-port", "int", 8003),
    ("xend_relocation_ssl_server", "xend-relocation-ssl-server", "bool", "no"),
    ("xend_security_path", "xend-security-path", "string", "/var/lib/xend/security"),
    ("xend_state_path", "xend-state-path", "string", "/var/lib/xend/state"),
    ("xend_storage_path", "xend-storage-path", "string", "/var/lib/xend/storage"),
    ("xend_tcp_xmlrpc_server", "xend-tcp-xmlrpc-server", "bool", "no"),
    ("xend_tcp_xmlrpc_server_address", "xend-tcp-xmlrpc-server-address", "string", "localhost"),
    ("xend_tcp_xmlrpc_server_port", "xend-tcp-xmlrpc-server-port", "int", 8006),
    ("xend_tcp_xmlrpc_server_ssl_cert_file", "xend-tcp-xmlrpc-server-ssl-cert-file", "file", None),
    ("xend_tcp_xmlrpc_server_ssl_key_file", "xend-tcp-xmlrpc-server-ssl-key-file", "file", None),
    ("xend_udev_event_server", "xend-udev-event-server", "bool", "no"),
    ("xend_unix_path", "xend-unix-path", "string", "/var/lib/xend/xend-socket"),
    ("xend_unix_server", "xend-unix-server", "bool", "no"),
    ("xend_unix_xmlrpc_server", "xend-unix-xmlrpc-server", "bool", "yes"),
    ("xsm_module_name", "xsm_module_name", "string", "dummy"),
)


class XendOptions:
    """What one file says.

    :param path: None: where xend looked, :func:`remus_colo.config.default_path`.
    :raise ConfigError: the file cannot be meant.
    """

    config_default = str(config.DEFAULT_PATH)
    config_var = config.ENVIRONMENT
    network_script_dir = SCRIPTS_DIR
    block_script_dir = SCRIPTS_DIR
    xend_relocation_server_default = "no"
    xend_relocation_ssl_server_default = "no"
    xend_relocation_port_default = 8002
    xend_relocation_ssl_port_default = 8003
    xend_relocation_address_default = ""
    xend_relocation_hosts_allow_default = ""

    def __init__(self, path: str | None = None) -> None:
        self._path = None if path is None else Path(path)
        self.set_config()

    def set_config(self) -> None:
        """Read the file, again if it was read before."""
        self.configuration = config.load(self._path)
        self.config_path = str(self.configuration.path or config.default_path())
        self.config = list(self.configuration.tree)

    def get_config_value(self, name: str, val: Any = None) -> Any:
        """What the file says first of a key: text, or a list of texts and lists; ``val`` if nothing."""
        return child_value(self.config, name, val)

    def get_config_string(self, name: str, val: Any = None) -> Any:
        return self.get_config_value(name, val)

    def get_config_bool(self, name: str, val: Any = None) -> bool:
        """:raise XendError: the file says neither yes nor no, in any of xend's ways."""
        word = str(self.get_config_value(name, val)).lower()
        if word not in TRUE_WORDS + FALSE_WORDS:
            raise XendError(f"{self.config_path}: {name} cannot be {word}: yes or no is allowed")
        return word in TRUE_WORDS

    def get_config_int(self, name: str, val: Any = None) -> int:
        """:raise XendError: it is no whole number."""
        value = self.get_config_value(name, val)
        try:
            return int(value)
        except (TypeError, ValueError):
            raise XendError(
                f"{self.config_path}: {name} cannot be {value}: a whole number is allowed"
            ) from None

    def get_config_file(self, name: str, val: Any = None) -> str | None:
        """A path; a name without a directory is one in /etc/xen.

        :raise XendError: the file is not there.
        """
        value = self.get_config_string(name, val)
        if not value:
            return None
        path = str(value) if os.path.dirname(value) else str(CONFIG_DIR / value)
        if not os.path.exists(path):
            raise XendError(f"{self.config_path}: {name} names {path}, which does not exist")
        return path

    def get_config_script(self, name: str, val: Any = None) -> list[str] | None:
        """A script's path and its arguments; None for none."""
        words = str(self.get_config_string(name, val) or "").split()
        return [os.path.join(SCRIPTS_DIR, words[0]), *words[1:]] if words else None

    def get_enable_dom0_ballooning(self) -> bool:
        """Off by default where dom0 has no minimum."""
        default = "yes" if self.get_dom0_min_mem() else "no"
        return self.get_config_bool("enable-dom0-ballooning", default)

    def get_reserved_memory(self) -> int:
        """GiB for 32-bit guests."""
        return self.get_config_int("total_available_memory", 0) if self.get_enable_dom0_ballooning() else 0

    def __getattr__(self, attribute: str) -> Any:
        """The methods of the table; a subclass has defaults of its own by attributes ``NAME_default``."""
        for name, key, form, default in _GETTERS:
            if attribute == f"get_{name}":
                preferred = getattr(self, f"{name}_default", default)
                return functools.partial(getattr(self, f"get_config_{form}"), key, preferred)
        raise AttributeError(f"XendOptions has no {attribute}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(f"get_{name}" for name, *_ in _GETTERS)]


# xend had a class for each place where a configuration may be, and this place is the only one that is left.
XendOptionsFile = XendOptions


@functools.cache
def instance() -> XendOptions:
    """The one of this process."""
    return XendOptions()
