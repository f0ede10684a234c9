# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's own suspend, as for migration, and its resume in place as if that had been cancelled."""

from __future__ import annotations

import contextlib
import time
from typing import Self

from remus_colo.adapters.xenctrl import HVM_PARAM_CALLBACK_IRQ, Guest, ShutdownReason
from remus_colo.adapters.xenstore import Store, Watch
from remus_colo.errors import DomainError

SUSPEND_TIMEOUT_S = 60.0  # a guest that has not suspended by then never will; emulated hosts need seconds
SUSPEND = "suspend"  # of control/shutdown (docs/misc/xenstore-paths.pandoc of Xen)
HVM_PARAM_ACPI_S_STATE = 14  # public/hvm/params.h


class Suspender:
    """Suspends one domain again and again.

    :param device_model: the guest is HVM, with a device model: if it has no drivers for Xen, it is stopped from
        outside, as libxl does.
    """

    def __init__(self, guest: Guest, store: Store, *, device_model: bool = False) -> None:
        self.guest = guest
        self.store = store
        self._device_model = device_model
        self._asked = False  # the guest may suspend at any moment, and nobody waits for it
        self._stack = contextlib.ExitStack()
        # Kept, as setting a watch up costs as much as the suspend itself.
        self._released: Watch = self._stack.enter_context(store.watch(["@releaseDomain"]))
        self._node = f"/local/domain/{guest.domid}/control/shutdown"

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def suspend(self, timeout_s: float = SUSPEND_TIMEOUT_S) -> float:
        """Have the guest suspend itself, and wait until it has. Returns the moment, ``time.monotonic()``.

        :raise DomainError: if it does not, or shuts down instead; the request is withdrawn.
        """
        forced = self._must_be_forced()
        self._asked = not forced
        if forced:
            self.guest.shutdown(ShutdownReason.SUSPEND)
        else:
            self.store.write(self._node, SUSPEND)
        if not self._await_shutdown(timeout_s):
            paused = self.guest.info().paused
            self.call_off()
            raise DomainError(
                f"the guest did not suspend within {timeout_s:g} s: "
                + (
                    f"it is paused; a protected guest has to run (xl unpause {self.guest.domid})"
                    if paused
                    else "its kernel must support Xen suspend (CONFIG_HIBERNATE_CALLBACKS), as live migration does"
                )
            )
        moment_s = time.monotonic()
        self._asked = False
        reason = self.guest.info().shutdown_reason
        if reason != ShutdownReason.SUSPEND:
            raise DomainError(f"the guest shut down (reason {reason}) while it was asked to suspend")
        return moment_s

    def call_off(self) -> None:
        """After a suspend that was not waited for to its end: the guest is not to suspend, or else to go on.

        A guest empties the node of the request when it takes it (drivers/xen/manage.c of Linux), and suspends then.
        """
        if not self._asked:
            return
        self._asked = False
        if self.store.replace(self._node, SUSPEND, ""):
            return
        if self._await_shutdown(SUSPEND_TIMEOUT_S) and self.suspended:
            self.resume()

    def _await_shutdown(self, timeout_s: float) -> bool:
        return self._released.wait(lambda: self.guest.info().shutdown, timeout_s=timeout_s)

    def _must_be_forced(self) -> bool:
        """As libxl: a guest without drivers for Xen, or in an ACPI sleep state, does not listen."""
        return self._device_model and (
            not self.guest.hvm_param(HVM_PARAM_CALLBACK_IRQ)
            or bool(self.guest.hvm_param(HVM_PARAM_ACPI_S_STATE))
        )

    def resume(self) -> None:
        """Let the suspended guest go on as if it had never suspended: its devices stay connected."""
        self.guest.resume(cancelled=True)
        # Else xenstored never tells of its next suspend.
        self.store.resumed_domain(self.guest.domid)

    @property
    def suspended(self) -> bool:
        info = self.guest.info()
        return info.shutdown and info.shutdown_reason == ShutdownReason.SUSPEND
