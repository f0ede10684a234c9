# SPDX-License-Identifier: LGPL-2.1-or-later
"""Being a service: systemd's readiness and journal, or the classic way into the background, a pid file, a log file."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from remus_colo.errors import ConfigError, ExitStatus
from remus_colo.outlet import LogOutlet

# as xend's (XendLogging.py)
LOG_FILE_BYTES = 1024 * 1024
LOG_FILES = 5
SYSLOG = "/dev/log"

# sd-daemon(3): syslog's priorities
_PRIORITIES = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
    (logging.DEBUG, 7),
)


# -- what it says --------------------------------------------------------------------------------------------


class LineFormatter(logging.Formatter):
    """One line for each record, but for a traceback: what a peer gave as its reason must not look like a line
    of ours.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = super().formatMessage(record)
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class JournalFormatter(LineFormatter):
    """Puts ``<priority>`` before each line, which the journal takes off again (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in _PRIORITIES if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def is_journal(fd: int, variable: str | None) -> bool:
    """Whether a file is the journal.

    :param variable: ``$JOURNAL_STREAM``, device and inode of what systemd gave the service (systemd.exec(5)).
    """
    if not variable:
        return False
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return variable == f"{found.st_dev}:{found.st_ino}"


def set_up_logging(level: int, log_file: Path | None = None) -> None:
    """Log to the standard error, in the form that its reader likes, and to a file if there is one.

    :raise ConfigError: the file cannot be written.
    """
    stream = LogOutlet(sys.stderr)
    if is_journal(sys.stderr.fileno(), os.environ.get("JOURNAL_STREAM")):
        stream.setFormatter(JournalFormatter("%(name)s: %(message)s"))
    else:
        # others, like a container's log, have time stamps of their own
        stamp = "%(asctime)s " if sys.stderr.isatty() else ""
        stream.setFormatter(LineFormatter(f"{stamp}%(levelname)s %(name)s: %(message)s"))
    handlers: list[logging.Handler] = [stream]
    if log_file is not None:
        handlers.append(_log_file(log_file))
    logging.basicConfig(level=level, handlers=handlers, force=True)


def _log_file(path: Path) -> logging.Handler:
    try:
        path.parent.mkdir(mode=0o755, exist_ok=True)
        handler = logging.handlers.RotatingFileHandler(path, maxBytes=LOG_FILE_BYTES, backupCount=LOG_FILES)
    except OSError as error:
        raise ConfigError(f"cannot write the logfile {path}: {error.strerror}") from error
    handler.setFormatter(
        LineFormatter("[%(asctime)s %(process)d] %(levelname)s (%(module)s:%(lineno)d) %(message)s")
    )
    return handler


# -- systemd -------------------------------------------------------------------------------------------------


def notify(state: str) -> None:
    """Tell systemd, if it has started us and wants to know (sd_notify(3)).

    :param state: ``READY=1``, ``STOPPING=1``, ``STATUS=...``, lines of them.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            # @ stands for the zero octet of an abstract name
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.sendall(state.encode())
        except OSError as error:
            logging.getLogger(__name__).warning("cannot tell systemd %r: %s", state, error)


# -- without systemd -----------------------------------------------------------------------------------------


class Background:
    """The way into the background: the command ends when the service is ready, or with the service's error.

    Before any thread is started::

        background = Background()       # from here on in a process of its own, with the terminal still there
        ...                             # whatever fails is seen by who started the command
        background.ready()              # the command ends; the terminal is let go
    """

    def __init__(self) -> None:
        waiting, self._pipe = os.pipe()
        child = os.fork()
        if child:
            os.close(self._pipe)
            self._await(child, waiting)
        os.close(waiting)
        os.setsid()

    @staticmethod
    def _await(child: int, waiting: int) -> NoReturn:
        """In the command: end as the service begins."""
        try:
            ready = os.read(waiting, 1)
        except KeyboardInterrupt:
            os._exit(ExitStatus.INTERRUPTED)  # the service gets the signal itself
        if ready:
            os._exit(ExitStatus.OK)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code > 0 else ExitStatus.FAILURE)

    def ready(self) -> None:
        """The service is ready. What it says from now on goes to its log files, or to syslog if it has none."""
        root = logging.getLogger()
        for handler in list(root.handlers):
            if isinstance(handler, LogOutlet):
                root.removeHandler(handler)
        if not root.handlers and os.path.exists(SYSLOG):
            syslog = logging.handlers.SysLogHandler(SYSLOG, logging.handlers.SysLogHandler.LOG_DAEMON)
            syslog.setFormatter(LineFormatter(f"remusd[{os.getpid()}]: %(message)s"))
            root.addHandler(syslog)
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.close(null)
        os.write(self._pipe, b"\0")
        os.close(self._pipe)


@contextlib.contextmanager
def pid_file(path: Path | None) -> Iterator[None]:
    """The process's number in a file, for as long as the context lasts.

    :raise ConfigError: it cannot be written.
    """
    if path is None:
        yield
        return
    path = path.absolute()  # the service may go elsewhere
    try:
        path.write_text(f"{os.getpid()}\n")
    except OSError as error:
        raise ConfigError(f"cannot write the pid file {path}: {error.strerror}") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
