# SPDX-License-Identifier: LGPL-2.1-or-later
"""Commands in a dom0: ssh over the management net, all through one connection per host.

The connection (ssh's ControlMaster) is made inside the management namespace; its clients come
through a socket in the state directory, so a command costs no new key exchange under emulation.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from remus_colo.testbed import cache
from remus_colo.testbed.commands import run
from remus_colo.testbed.errors import BedError, BedTimeout, CommandFailed
from remus_colo.testbed.netns import NETNS_DIR
from remus_colo.testbed.process import ProcessId

CONNECT_TIMEOUT_S = 60


def key_pair() -> tuple[Path, str]:
    """The private key that beds log in with, and the base64 part of its public key; made once per cache."""

    def build(path: Path) -> None:
        path.mkdir(mode=0o700)
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "testbed", "-f", path / "id"], timeout_s=30)

    directory = cache.entry("ssh-key", {"version": 1}, build)
    return directory / "id", (directory / "id.pub").read_text().split()[1]


class Remote:
    """ssh to one host.

    :param address: in the management net.
    :param namespace: the management net's namespace.
    :param socket: path of the connection's socket.
    """

    def __init__(self, host: str, address: str, namespace: str, socket: Path) -> None:
        self.host = host
        self._address = address
        self._namespace = namespace
        self._socket = socket

    def connect(self) -> None:
        """Make the shared connection unless it is there.

        :raise BedError: the host's sshd cannot be reached.
        """
        if self._socket.exists() and self._control("check").returncode == 0:
            return
        with cache.locked(self._socket.with_suffix(".lock")):
            if self._socket.exists() and self._control("check").returncode == 0:
                return
            self._socket.unlink(missing_ok=True)
            key, _ = key_pair()
            argv = ["nsenter", f"--net={NETNS_DIR / self._namespace}", "ssh", "-F", "none", "-f", "-N", "-M",
                    "-S", str(self._socket), "-i", str(key), "-o", "ControlPersist=yes", "-o", "BatchMode=yes",
                    "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
                    "-o", "GSSAPIAuthentication=no", "-o", "PreferredAuthentications=publickey",
                    "-o", "KexAlgorithms=curve25519-sha256", "-o", "Ciphers=chacha20-poly1305@openssh.com",
                    "-o", "LogLevel=ERROR", "-o", "TCPKeepAlive=no", "-o", f"ConnectTimeout={CONNECT_TIMEOUT_S}",
                    f"root@{self._address}"]  # fmt: skip
            # Not through a pipe: the connection stays in the background and would hold it open.
            log = self._socket.with_suffix(".log")
            with log.open("wb") as output:
                try:
                    status = subprocess.run(
                        argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                        timeout=CONNECT_TIMEOUT_S + 30, check=False,
                    ).returncode  # fmt: skip
                except subprocess.TimeoutExpired as cause:
                    raise BedTimeout(f"cannot log in to {self.host}: no answer") from cause
            if status != 0:
                raise BedError(f"cannot log in to {self.host}: {log.read_text(errors='replace').strip()}")

    def disconnect(self) -> None:
        """End the shared connection, if there; needs no answer from the host."""
        if not self._socket.exists():
            return
        found = re.search(r"pid=(\d+)", self._control("check").stderr)
        if found:
            try:
                master = ProcessId.of(int(found[1]))
            except BedError:
                pass
            else:
                master.kill()
        self._socket.unlink(missing_ok=True)

    def argv(self, command: str, *, terminal: bool = False) -> list[str]:
        """The local command line that runs shell command ``command`` there; connects first if need be."""
        self.connect()
        return ["ssh", "-F", "none", "-S", str(self._socket), "-o", "ControlMaster=no", "-o", "BatchMode=yes",
                "-o", "LogLevel=ERROR", *(["-t"] if terminal else ["-T"]), f"root@{self._address}", "--",
                command]  # fmt: skip

    def run(
        self, command: str, *, timeout_s: float, check: bool = True, stdin: bytes | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command there; stdout and stderr as text.

        :raise CommandFailed: it failed, and ``check`` is true.
        :raise BedTimeout: it did not end in time.  It may still be running there.
        :raise BedError: the host went off meanwhile.
        """
        argv = self.argv(command)
        try:
            # Empty input closes the command's stdin at once, as /dev/null would.
            done = subprocess.run(
                argv, input=stdin or b"", capture_output=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired as cause:
            raise BedTimeout(
                f"'{command[:300]}' on {self.host} did not end within {timeout_s:g} s"
            ) from cause
        stdout, stderr = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        # ssh's own failures end with 255 too, but then its connection is gone.
        if done.returncode == 255 and self._control("check").returncode != 0:
            raise BedError(f"the connection to {self.host} broke: '{command[:300]}' may have run or not")
        if check and done.returncode != 0:
            raise CommandFailed([self.host, command], done.returncode, stdout + stderr)
        return subprocess.CompletedProcess([self.host, command], done.returncode, stdout, stderr)

    def _control(self, action: str) -> subprocess.CompletedProcess[str]:
        return run(["ssh", "-F", "none", "-S", self._socket, "-O", action, f"root@{self._address}"],
                   timeout_s=15, check=False)  # fmt: skip
