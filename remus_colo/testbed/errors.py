# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can go wrong with a test bed.  All are :class:`remus_colo.errors.HostError` by meaning."""

from __future__ import annotations

from remus_colo.errors import HostError


class BedError(HostError):
    """The test bed cannot do what was asked; the message says why and what to do."""


class BedTimeout(BedError):
    """Something in the bed did not happen within its deadline."""


class CommandFailed(BedError):
    """A command ended with a status other than 0.

    :param argv: the command, as it was given.
    :param status: its exit status, negative for a signal, as in :mod:`subprocess`.
    :param output: the end of what it wrote.
    """

    def __init__(self, argv: list[str], status: int, output: str) -> None:
        shown = " ".join(argv)
        super().__init__(
            f"'{shown[:300]}' ended with status {status}: {output.strip()[-1500:] or 'no output'}"
        )
        self.argv = argv
        self.status = status
        self.output = output
