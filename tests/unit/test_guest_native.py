# SPDX-License-Identifier: LGPL-2.1-or-later
"""The built image's own nginx, redis and services under load, in a namespace of this machine instead of a VM."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from remus_colo.testbed import guest_image, load_content

IMAGE_DIR = guest_image.default_cache_dir() / f"guest-{guest_image.recipe_key()}"

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a chroot and namespaces"),
    pytest.mark.skipif(not IMAGE_DIR.exists(), reason=f"the guest image {IMAGE_DIR} has not been built"),
    pytest.mark.skipif(not shutil.which("cpio"), reason="the command cpio is not installed"),
]

# Argument 1 is the unpacked root; the rest is the client's command. The services are started as in init.
SCRIPT = r"""
set -e
root=$1
shift
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/run"
touch "$root/run/redis.log"
chmod 666 "$root/run/redis.log"
mount --rbind /dev "$root/dev"
ip link set lo up
ip addr add 10.77.0.10/24 dev lo
ip addr add fd77::10/64 dev lo nodad
in_root() { env -i PATH=/usr/sbin:/usr/bin chroot "$root" "$@"; }
in_root guest_services 7 /run/guest_services.socket &
in_root start-stop-daemon -S -q -c redis:redis -x /usr/bin/redis-server -- /etc/redis.conf &
in_root nginx -c /etc/nginx.conf &
tries=0
for port in 0050 18EB 0007; do
    until grep -q "00000000:$port 00000000:0000 0A" /proc/net/tcp; do
        tries=$((tries + 1))
        [ $tries -lt 300 ]
        sleep 0.1
    done
done
"$@"
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    folder.chmod(0o755)
    folder.parent.chmod(0o755)  # the services' users must reach their root
    with open(IMAGE_DIR / "initrd", "rb") as initrd:
        subprocess.run(["cpio", "-idm", "--quiet"], stdin=initrd, cwd=folder, check=True)
    return folder


def in_guest(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs ``command`` beside the guest's services; all of them end with it."""
    words = [
        "unshare",
        "--net",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "sh",
        "-c",
        SCRIPT,
        "sh",
    ]
    return subprocess.run(
        [*words, str(root), *command], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("target", ["10.77.0.10", "fd77::10"])
def test_the_load_finds_nothing_wrong(root: Path, target: str) -> None:
    done = in_guest(
        root, sys.executable, "-m", "remus_colo.testbed.load", f"--target={target}", "--seconds=2", "--udp=2",
        f"--sizes={','.join(load_content.SIZES)}", "--churn=20", "--random-every=0.2", "--time-every=0.2", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads(done.stdout.splitlines()[-1])  # redis has its say first
    assert result["redis_verified"] is True
    assert len(result["services"]) == 7
    assert all(figures["requests"] > 0 for figures in result["services"].values())


def test_the_unpacked_root_is_small(root: Path) -> None:
    total = sum(path.lstat().st_size for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    assert total < 70_000_000
