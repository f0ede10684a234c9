# SPDX-License-Identifier: LGPL-2.1-or-later
"""Signals that end a protection in order, and those that must not end or stop it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

from remus_colo.session.loop import Loop

# Ctrl-C, `kill`, and a terminal or ssh connection that is closed: a process that simply died then would look
# to the backup as a host that did.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOPPING = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)


@contextlib.contextmanager
def interrupting() -> Iterator[None]:
    """What would kill the process ends it as Ctrl-C does, by KeyboardInterrupt, so that what has been begun is undone.

    Outside :func:`ending`, while there is no protection yet that could end in order.  In the main thread only.
    """

    def on_signal(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    previous = {
        number: signal.signal(number, on_signal)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def ending(stop: Callable[[str], None]) -> Iterator[None]:
    """Call ``stop`` with the name of the signal that is to end the protection.  In the main thread only.

    SIGHUP stays ignored if it was, as under nohup.  What would stop the process is ignored, for the guest's
    output would wait with it until the backup takes over: Ctrl-Z; SIGTTIN, for a look at the terminal from
    the background, which fails then; SIGTTOU, for a line from there (``stty tostop``).
    """

    def on_signal(number: int, _frame: object) -> None:
        stop(signal.Signals(number).name)

    previous = {number: signal.signal(number, signal.SIG_IGN) for number in STOPPING}
    for number in ENDING:
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            previous[number] = signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def telling(loop: Loop, event: Callable[..., None], stop: Callable[[], None]) -> Callable[[str], None]:
    """For :func:`ending`: tell of the signal and call ``stop``, in the loop: not in the midst of a line that
    is being written.
    """

    def on_signal(name: str) -> None:
        def tell_and_stop() -> None:
            event("signal", name=name)
            stop()

        loop.call(tell_and_stop)

    return on_signal
