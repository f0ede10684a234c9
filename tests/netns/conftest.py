# SPDX-License-Identifier: LGPL-2.1-or-later
"""Network-namespace tests: real bridges, queues and queueing disciplines, no Xen.

Three namespaces of our own, gone after each test::

    client                    host                          guest
    c0 10.77.0.1/24 --- lan0 [bridge br0] vif7.0 --- eth0 10.77.0.2/24

A veth pair stands for the guest's vif.  The test itself runs inside ``host``; sockets of the other two are
made there and used from the test, so everything is one thread and nothing needs to be waited for by sleeping.

Run as root: ``python3 -m pytest tests/netns``.  What a kernel lacks is skipped with the reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from remus_colo.adapters.native import compiled
from remus_colo.adapters.netlink import Links
from remus_colo.adapters.nft import QueueRules
from remus_colo.adapters.packetqueue import ENVIRONMENT, Form
from remus_colo.errors import HostError

CLONE_NEWNET = 0x40000000
CLIENT_IP, GUEST_IP = "10.77.0.1", "10.77.0.2"
VIF = "vif7.0"
DEADLINE_S = 20.0  # far beyond what anything here takes, also under emulation
_OWN_NAMESPACE = "/proc/thread-self/ns/net"
_libc = ctypes.CDLL(None, use_errno=True)


def setns(namespace: str | int) -> None:
    """Enter a namespace, given by path or by descriptor."""
    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC) if isinstance(namespace, str) else os.dup(namespace)
    try:
        if _libc.setns(fd, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns to {namespace}")
    finally:
        os.close(fd)


def run(*command: str) -> str:
    """Run a command in the current namespace; its output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    deadline_s = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"in vain: {what}"
        time.sleep(0.002)
    return value


class Network:
    """The three namespaces.  ``host`` is the current one."""

    def __init__(self) -> None:
        self.tag = f"remus{os.getpid()}"
        self.names: dict[str, str] = {}
        self._sockets: list[socket.socket] = []
        self._home = os.open(_OWN_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)

    def up(self) -> None:
        for name in ("client", "guest", "host"):
            self.add_namespace(name)
        setns(self.path("host"))
        run("ip", "link", "add", "br0", "type", "bridge", "forward_delay", "0", "mcast_snooping", "0")
        run("ip", "link", "set", "br0", "up")
        self.add_port("lan0", "client", "c0", CLIENT_IP, "02:00:00:00:00:01")
        self.add_port(VIF, "guest", "eth0", GUEST_IP, "02:00:00:00:00:02")
        self.neighbour("client", "c0", GUEST_IP, "02:00:00:00:00:02")
        self.neighbour("guest", "eth0", CLIENT_IP, "02:00:00:00:00:01")

    def add_namespace(self, name: str) -> None:
        self.names[name] = f"{self.tag}-{name}"
        run("ip", "netns", "add", self.names[name])
        with self.inside(name):
            run("ip", "link", "set", "lo", "up")
            set_ipv6(enabled=False)  # nobody shall speak but the tests

    def add_port(
        self, port: str, name: str, ifname: str, address: str, mac: str, *, bridge: str = "br0"
    ) -> None:
        """A veth pair between a bridge of ``host`` and another namespace; what is sent at either end arrives at once.

        The far end was up before it had a carrier: until the kernel has attached its queueing discipline,
        which it does in its own time, all that is sent there is dropped.
        """
        other = ["peer", "name", ifname, "netns", self.names[name], "address", mac]
        # a backend's, as Xen's scripts set it: with a lower one the bridge would take it, and lose it with the vif
        own = ["address", "fe:ff:ff:ff:ff:ff"] if port.startswith("vif") else []
        run("ip", "link", "add", port, *own, "type", "veth", *other)
        with self.inside(name):
            run("ip", "addr", "add", f"{address}/24", "dev", ifname)
            run("ip", "link", "set", ifname, "up")
        run("ip", "link", "set", port, "master", bridge, "up")
        with self.inside(name):
            wait_until(lambda: "state UP" in run("ip", "link", "show", ifname), f"{ifname} is up")

    def neighbour(self, name: str, ifname: str, address: str, mac: str) -> None:
        """Fixed, so that tests which count packets see no ARP."""
        with self.inside(name):
            run("ip", "neigh", "replace", address, "lladdr", mac, "dev", ifname, "nud", "permanent")

    def path(self, name: str) -> str:
        return f"/run/netns/{self.names[name]}"

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        before = os.open(_OWN_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
        setns(self.path(name))
        try:
            yield
        finally:
            setns(before)
            os.close(before)

    def socket(self, name: str, kind: int = socket.SOCK_DGRAM, family: int = socket.AF_INET) -> socket.socket:
        with self.inside(name):
            made = socket.socket(family, kind)
        return self.adopt(made)

    def adopt(self, made: socket.socket) -> socket.socket:
        """Never blocking, and closed in the end."""
        made.setblocking(False)
        self._sockets.append(made)
        return made

    def sniffer(self, name: str, ifname: str) -> socket.socket:
        """Every frame that comes in at ``ifname``."""
        sniffer = self.socket(name, socket.SOCK_RAW, socket.AF_PACKET)
        sniffer.setsockopt(socket.SOL_SOCKET, 33, 32 << 20)  # SO_RCVBUFFORCE
        sniffer.setsockopt(263, 23, 1)  # SOL_PACKET, PACKET_IGNORE_OUTGOING
        with self.inside(name):
            sniffer.bind((ifname, 3))
        return sniffer

    def down(self) -> None:
        for made in self._sockets:
            made.close()
        setns(self._home)
        os.close(self._home)
        for name in self.names.values():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def set_ipv6(*, enabled: bool) -> None:
    """For links made from now on, in the current namespace."""
    with (
        contextlib.suppress(FileNotFoundError),
        open("/proc/sys/net/ipv6/conf/default/disable_ipv6", "w") as f,
    ):
        f.write("0" if enabled else "1")


def no_offload(ifname: str) -> None:
    """As a plain network card: packets leave split to the MTU and with their checksums (ETHTOOL_S*)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for command in (0x1F, 0x24, 0x17):  # STSO, SGSO, STXCSUM
            value = ctypes.create_string_buffer(struct.pack("=II", command, 0))
            request = struct.pack("16sP8x", ifname.encode(), ctypes.addressof(value))
            fcntl.ioctl(s, 0x8946, request)  # SIOCETHTOOL


def snapshot() -> tuple[str, str, str]:
    """What must be the same before and after: rules, queueing disciplines and filters, links."""
    links = "\n".join(sorted(line.split(": ", 1)[1] for line in run("ip", "-o", "link").splitlines()))
    return run("nft", "list", "ruleset"), run("tc", "qdisc"), links


@pytest.fixture
def net() -> Iterator[Network]:
    if os.geteuid() != 0:
        pytest.skip("needs root, for network namespaces")
    if not shutil.which("ip") or not shutil.which("nft"):
        pytest.skip("needs ip and nft: install iproute2 and nftables")
    network = Network()
    try:
        network.up()
        yield network
    finally:
        network.down()


@pytest.fixture(params=list(Form), ids=lambda form: form.value)
def queue_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Form:
    """Both forms of the packet queue, chosen as a user does."""
    form: Form = request.param
    if form is Form.NATIVE:
        try:
            compiled()
        except HostError as exc:
            pytest.skip(str(exc))
    monkeypatch.setenv(ENVIRONMENT, form.value)
    return form


@pytest.fixture
def links(net: Network) -> Iterator[Links]:
    with Links() as made:
        yield made


@pytest.fixture
def rules(net: Network) -> Iterator[QueueRules]:
    """Queue rules, where this kernel can have them in any way."""
    made = QueueRules(f"test_{os.getpid()}")
    try:
        made.hold_from_guest("probe0", 65535)
    except HostError as exc:
        pytest.skip(str(exc))
    made.remove()
    yield made
    made.remove()


@pytest.fixture
def plug_support(links: Links) -> None:
    probe = subprocess.run(
        ["tc", "qdisc", "add", "dev", "lo", "root", "plug", "limit", "1000"],
        capture_output=True,
        text=True,
        check=False,
    )
    if probe.returncode != 0:
        pytest.skip(f"this kernel has no sch_plug: {probe.stderr.strip()}")
    run("tc", "qdisc", "del", "dev", "lo", "root")


def receive(sock: socket.socket, number: int, pump: Callable[[], Any] = lambda: None) -> list[bytes]:
    """Exactly ``number`` datagrams, calling ``pump`` while waiting."""
    got: list[bytes] = []
    deadline_s = time.monotonic() + DEADLINE_S
    while len(got) < number:
        pump()
        assert time.monotonic() < deadline_s, f"{len(got)} of {number} came: {got[-3:]}"
        select.select([sock], [], [], 0.01)
        got += pending(sock)
    return got


def pending(sock: socket.socket) -> list[bytes]:
    got = []
    with contextlib.suppress(BlockingIOError):
        while True:
            got.append(sock.recv(70000))
    return got


def internet_sum(data: bytes) -> int:
    """RFC 1071, for tests only: 0 over data that contains its right checksum."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def transport_sum(packet: bytes) -> int:
    """0 if the TCP or UDP checksum of an IPv4 packet is right."""
    header = (packet[0] & 15) * 4
    body = packet[header : int.from_bytes(packet[2:4], "big")]
    return internet_sum(packet[12:20] + struct.pack("!BBH", 0, packet[9], len(body)) + body)


def with_checksums(packet: bytes) -> bytes:
    """An IPv4 TCP or UDP packet with both checksums filled in."""
    header = (packet[0] & 15) * 4
    at = header + (16 if packet[9] == socket.IPPROTO_TCP else 6)
    fresh = bytearray(packet[: int.from_bytes(packet[2:4], "big")])
    fresh[10:12] = fresh[at : at + 2] = b"\0\0"
    fresh[10:12] = internet_sum(bytes(fresh[:header])).to_bytes(2, "big")
    fresh[at : at + 2] = transport_sum(bytes(fresh)).to_bytes(2, "big")
    return bytes(fresh)
