# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fetches Debian packages of another release through apt, without touching the machine's own package state.

apt runs with its lists, caches and status in a directory of ours; proxies, certificates and the like are
still the machine's.  Needs no root.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from remus_colo.errors import HostError

_APT_HELPER = "/usr/lib/apt/apt-helper"
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_RUN_LIMIT_S = 1800


def mirror() -> str:
    """The Debian mirror: $REMUS_COLO_MIRROR, else the one that this machine's apt uses.

    :raise HostError: neither names one.
    """
    chosen = os.environ.get("REMUS_COLO_MIRROR") or _repository("Debian")
    if chosen:
        return chosen
    raise HostError(
        "apt has no Debian mirror on this machine: add one to its sources, or set REMUS_COLO_MIRROR"
    )


def _repository(label: str) -> str | None:
    """Where this machine's apt finds the archive whose Release file has this label."""
    answer = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(LABEL)|$(REPO_URI)", "Identifier: Packages"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    for line in answer.stdout.splitlines():
        found, _, uri = line.partition("|")
        if found == label and uri:
            return uri
    return None


class Release:
    """One Debian release's packages for amd64, fetched into ``state_dir``, which stays for the next time.

    :param state_dir: apt's lists and downloaded packages; one process at a time.
    :param sources: source packages, with security updates if this machine's apt has them, in place of binary ones.
    :raises HostError: apt is missing, the archive's keys are, or fetching fails.
    """

    def __init__(
        self, suite: str, state_dir: Path, log: Callable[[str], object], *, sources: bool = False
    ) -> None:
        if not _KEYRING.exists():
            raise HostError(f"{_KEYRING} is missing: install the package debian-archive-keyring")
        self._dir = state_dir
        self._log = log
        self._archives = [mirror()]
        if sources:
            self._source = f"deb-src [signed-by={_KEYRING}] {mirror()} {suite} main\n"
            if security := _repository("Debian-Security"):
                self._archives.append(security)
                self._source += f"deb-src [signed-by={_KEYRING}] {security} {suite}-security main\n"
        else:
            self._source = f"deb [arch=amd64 signed-by={_KEYRING}] {mirror()} {suite} main\n"

    def update(self) -> None:
        """Fetches the release's index."""
        for part in ("lists/partial", "archives/partial", "empty.d"):
            (self._dir / part).mkdir(parents=True, exist_ok=True)
        (self._dir / "sources.list").write_text(self._source)
        (self._dir / "status").write_text("")
        self._log(f"Fetching the package index: {self._source.strip()}")
        self._apt("apt-get", "update")

    def fetch_with_dependencies(self, packages: Sequence[str]) -> list[Path]:
        """Fetches ``packages`` and all that they depend on; returns the package files."""
        install = ("apt-get", "install", "--yes", "--no-install-recommends")
        plan = self._apt(*install, "--simulate", *packages)
        chosen = re.findall(r"^Inst (\S+) \((\S+)", plan, re.MULTILINE)
        self._log(f"Fetching {len(chosen)} packages")
        self._apt(*install, "--download-only", *packages)
        return [self._archived(name, version) for name, version in chosen]

    def fetch(self, package: str) -> Path:
        """Fetches ``package`` alone; returns the package file."""
        shown = self._apt("apt-cache", "show", "--no-all-versions", package)
        version = _field(shown, "Version", package)
        if archived := self._find(package, version):
            return archived
        self._log(f"Fetching {package} ({int(_field(shown, 'Size', package)) / 1e6:.0f} MB)")
        with tempfile.TemporaryDirectory(dir=self._dir) as partial:
            self._apt("apt-get", "download", package, cwd=Path(partial))
            for file in Path(partial).glob("*.deb"):
                file.rename(self._dir / "archives" / file.name)
        return self._archived(package, version)

    def show_source(self, package: str) -> str:
        """apt's records of a source package, as apt-cache(8) showsrc prints them."""
        return self._apt("apt-cache", "showsrc", package)

    def fetch_source(self, package: str, version: str, target: Path) -> str | None:
        """Fetches a source package's files into ``target``.  Returns why some are missing, None if all are there.

        It is not for this to judge which are needed: of what was unpacked by other means a mirror may lack parts.
        """
        try:
            self._apt(
                "apt-get", "source", "--download-only", "--only-source", f"{package}={version}", cwd=target
            )
        except HostError as error:
            return str(error)
        return None

    def fetch_pool(self, directory: str, name: str, sha256: str, target: Path) -> None:
        """Fetches a file that the index does not name any more; archives keep files for some time.

        :param directory: in the archive, as the index says of a version that it names.
        :raise HostError: no archive has it, or it is another one.
        """
        failure: HostError | None = None
        for archive in self._archives:
            place = f"{archive.rstrip('/')}/{directory}/{name}"
            try:
                self._apt(_APT_HELPER, "download-file", place, str(target / name), f"SHA256:{sha256}")
                return
            except HostError as error:
                failure = error
        assert failure is not None
        raise failure

    def dependency(self, package: str, pattern: str) -> str:
        """The one package that ``package`` depends on and whose name matches ``pattern``."""
        names = re.findall(r"^ +Depends: (\S+)", self._apt("apt-cache", "depends", package), re.MULTILINE)
        found = [name for name in names if re.fullmatch(pattern, name)]
        if len(found) != 1:
            raise HostError(
                f"{package} of this release names {found or 'nothing'} where {pattern} was expected"
            )
        return str(found[0])

    def _find(self, package: str, version: str) -> Path | None:
        # apt writes the colon of an epoch as %3a, and the architecture may be "all".
        found = (self._dir / "archives").glob(f"{package}_{version.replace(':', '%3a')}_*.deb")
        return next(found, None)

    def _archived(self, package: str, version: str) -> Path:
        archived = self._find(package, version)
        if archived is None:
            raise HostError(f"{package} {version} was not fetched: remove {self._dir} and try again")
        return archived

    def _apt(self, *command: str, cwd: Path | None = None) -> str:
        options = {
            "Dir::Etc::SourceList": self._dir / "sources.list",
            "Dir::Etc::SourceParts": self._dir / "empty.d",
            "Dir::Etc::Preferences": "/dev/null",
            "Dir::Etc::PreferencesParts": self._dir / "empty.d",
            "Dir::State": self._dir,
            "Dir::State::Lists": self._dir / "lists",
            "Dir::State::Status": self._dir / "status",
            "Dir::Cache": self._dir,
            "Dir::Cache::Archives": self._dir / "archives",
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "APT::Sandbox::User": "root",  # the usual user cannot write into a directory of ours
            "APT::Get::List-Cleanup": "true",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "APT::Keep-Downloaded-Packages": "true",
        }
        words = [command[0], *(f"-o{name}={value}" for name, value in options.items()), *command[1:]]
        try:
            done = subprocess.run(
                words, cwd=cwd, capture_output=True, text=True, timeout=_RUN_LIMIT_S, check=False,
                env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
            )  # fmt: skip
        except FileNotFoundError as missing:
            raise HostError(
                f"{command[0]} is missing: the guest image is built with Debian's apt"
            ) from missing
        except subprocess.TimeoutExpired as late:
            raise HostError(
                f"{' '.join(command)} did not end within {_RUN_LIMIT_S} s: check the mirror"
            ) from late
        if done.returncode != 0:
            reason = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise HostError(f"{' '.join(command)} failed: {reason}")
        return done.stdout


def _field(record: str, name: str, package: str) -> str:
    found = re.search(rf"^{name}: (.+)$", record, re.MULTILINE)
    if not found:
        raise HostError(f"apt knows no {name} of {package}: run again, the index may be incomplete")
    return found.group(1)


@dataclasses.dataclass(frozen=True, slots=True)
class Contents:
    """What was taken out of a package: regular files' bytes and symbolic links' targets, by path."""

    files: dict[str, bytes]
    links: dict[str, str]


def take(package_file: Path, wanted: Callable[[str], bool]) -> Contents:
    """Takes the files out of a package whose path, without a leading slash, is ``wanted``.

    :raises HostError: the package file is damaged.
    """
    taken = Contents({}, {})
    words = ["dpkg-deb", "--fsys-tarfile", str(package_file)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as unpacker:
        assert unpacker.stdout is not None
        try:
            with tarfile.open(fileobj=unpacker.stdout, mode="r|") as archive:
                for entry in archive:
                    path = entry.name.removeprefix("./")
                    if entry.issym() and wanted(path):
                        taken.links[path] = entry.linkname
                    elif (file := archive.extractfile(entry) if entry.isreg() else None) and wanted(path):
                        taken.files[path] = file.read()
        except (tarfile.TarError, EOFError) as broken:
            raise HostError(f"{package_file} is damaged: remove it and try again") from broken
        unpacker.stdout.read()  # the padding after the last entry, so that dpkg-deb ends well
    if unpacker.returncode != 0:
        raise HostError(f"{package_file} is damaged: remove it and try again")
    return taken
