# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domain comes over xend's operation ``receive``, whole or not; xl is the only part that is not real."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from remus_colo.checkpoint import incoming, xendheader
from remus_colo.errors import FramingError, MessageError, PeerLost, RemusError, XenError
from remus_colo.relocation.channel import Channel
from remus_colo.relocation.server import Opening
from remus_colo.session import migration
from remus_colo.session.migration import Migrations

DOMAIN = b"(domain (domid 3) (name web))"
HEADER = xendheader.SIGNATURE + xendheader.LENGTH.pack(len(DOMAIN)) + DOMAIN
STREAM = bytes(range(256)) * 5000
PATIENCE_S = 30.0


class Xen:
    """Domains by name, and ``xl restore``."""

    def __init__(self) -> None:
        self.domains: dict[str, int] = {}
        self.fed = b""
        self.unpaused: list[int] = []
        self.refuses = ""
        self.aborted = False
        self.ends_after: bytes | None = None

    def store(self) -> Any:
        store = mock.MagicMock()
        store.__enter__.return_value = store
        store.list.side_effect = lambda path: [str(domid) for domid in self.domains.values()]
        store.read.side_effect = lambda path: {str(domid): name for name, domid in self.domains.items()}.get(
            path.split("/")[3]
        )
        return store

    def destroy(self, domid: int) -> None:
        self.domains = {name: other for name, other in self.domains.items() if other != domid}

    def restorer(self, name: str) -> Any:
        made = mock.Mock(made=False, complete=False)

        def feed(piece: bytes) -> None:
            self.fed += piece
            made.complete = self.fed == self.ends_after
            if self.refuses == "feed":
                raise XenError("xl restore failed: no memory")

        def finish(_: object) -> int:
            self.domains[name] = 9
            made.made = True
            return 9

        def abort() -> None:
            self.aborted = True

        made.feed.side_effect, made.finish.side_effect, made.abort.side_effect = feed, finish, abort
        return made

    def guest(self, domid: int, *, writable: bool) -> Any:
        def unpause() -> None:
            if self.refuses == "unpause":
                raise XenError("no such domain")
            self.unpaused.append(domid)

        guest = mock.MagicMock()
        guest.__enter__.return_value.unpause.side_effect = unpause
        return guest


@pytest.fixture
def xen(monkeypatch: pytest.MonkeyPatch) -> Xen:
    made = Xen()
    monkeypatch.setattr(incoming.toolstack, "destroy", made.destroy)
    monkeypatch.setattr(incoming.birth, "Restorer", made.restorer)
    monkeypatch.setattr(incoming, "Guest", made.guest)
    monkeypatch.setattr(incoming, "Store", made.store)
    return made


class Arrival:
    """One connection on which a domain comes."""

    def __init__(self, migrations: Migrations) -> None:
        self.theirs, ours = socket.socketpair()
        self.channel = Channel(ours, peer="10.7.0.1")
        self.opening = Opening("10.7.0.1", time.monotonic() + PATIENCE_S, lambda channels: None)
        self.error: RemusError | None = None
        self._migrations = migrations
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._migrations.handle(self.channel, self.opening)
        except RemusError as error:
            self.error = error
        finally:
            self.channel.close()

    def send(self, data: bytes) -> None:
        self.theirs.sendall(data)

    def end(self) -> RemusError | None:
        self.theirs.shutdown(socket.SHUT_WR)
        return self.join()

    def join(self) -> RemusError | None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        self.theirs.close()
        return self.error


@pytest.fixture
def migrations() -> Iterator[Migrations]:
    made = Migrations(mock.Mock())
    yield made
    made.stop()


def test_a_domain_comes_and_runs(xen: Xen, migrations: Migrations) -> None:
    arrival = Arrival(migrations)
    arrival.send(HEADER + STREAM)
    assert arrival.end() is None
    assert xen.fed == STREAM
    assert (xen.domains, xen.unpaused) == ({"web": 9}, [9])
    assert not arrival.opening.half_open


@pytest.mark.parametrize("sent", [b"", HEADER[:10], b"QemuDeviceModelRecord", HEADER[:-1] + b" "])
def test_what_is_no_domain(xen: Xen, migrations: Migrations, sent: bytes) -> None:
    arrival = Arrival(migrations)
    arrival.send(sent)
    assert isinstance(arrival.end(), FramingError)
    assert arrival.opening.half_open
    assert xen.domains == {}


@pytest.mark.parametrize("taken", ["web", "web--secondary"])
def test_a_name_that_is_taken_harms_nobody(xen: Xen, migrations: Migrations, taken: str) -> None:
    xen.domains = {taken: 4}
    arrival = Arrival(migrations)
    arrival.send(HEADER)
    assert isinstance(arrival.end(), incoming.NameTaken)
    assert xen.domains == {taken: 4}


@pytest.mark.parametrize("refuses", ["feed", "unpause"])
def test_a_domain_that_cannot_be_made_is_not_left(xen: Xen, migrations: Migrations, refuses: str) -> None:
    xen.refuses = refuses
    arrival = Arrival(migrations)
    arrival.send(HEADER + STREAM[:1000])
    assert isinstance(arrival.end(), XenError)
    assert xen.aborted and xen.domains == {}


def test_a_sender_that_falls_silent(
    xen: Xen, migrations: Migrations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migration, "SILENCE_S", 0.05)
    arrival = Arrival(migrations)
    arrival.send(HEADER + STREAM[:1000])
    assert isinstance(arrival.join(), PeerLost)
    assert xen.aborted and xen.domains == {}


def test_a_sender_that_leaves_the_connection_open(xen: Xen, migrations: Migrations) -> None:
    """Its guest is destroyed by then: the only one is what came here."""
    xen.ends_after = STREAM
    arrival = Arrival(migrations)
    arrival.send(HEADER + STREAM)
    assert arrival.join() is None
    assert (xen.domains, xen.unpaused, xen.aborted) == ({"web": 9}, [9], False)


def test_the_same_domain_twice_at_a_time(xen: Xen, migrations: Migrations) -> None:
    first, second = Arrival(migrations), Arrival(migrations)
    first.send(HEADER + STREAM[:1000])
    while first.opening.half_open:
        time.sleep(0.001)
    second.send(HEADER)
    assert "already" in str(second.end())
    assert first.end() is None
    assert xen.domains == {"web": 9}


def test_the_end_of_remusd_ends_what_comes(xen: Xen, migrations: Migrations) -> None:
    arrival = Arrival(migrations)
    arrival.send(HEADER + STREAM[:1000])
    while arrival.opening.half_open:
        time.sleep(0.001)
    migrations.stop()
    assert isinstance(arrival.join(), PeerLost)
    assert xen.aborted and xen.domains == {}


def test_sslreceive_is_for_tls(migrations: Migrations) -> None:
    ours, theirs = socket.socketpair()
    with theirs, Channel(ours) as channel, pytest.raises(MessageError, match="TLS"):
        migrations.handle_encrypted(channel, mock.Mock())
