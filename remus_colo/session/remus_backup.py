# SPDX-License-Identifier: LGPL-2.1-or-later
"""The backup's session in Remus mode: checkpoints go to a waiting ``xl``, which starts the guest at failover.

Nothing of the guest runs here before, so there is no network to keep apart.  What xl has had are complete checkpoints
only: one that breaks off never leaves this process.
"""

from __future__ import annotations

import copy
import functools
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from remus_colo.adapters import devicemodel, xenctrl
from remus_colo.adapters.netlink import Links
from remus_colo.adapters.rawlink import RawLink
from remus_colo.checkpoint import libxlformat
from remus_colo.checkpoint.delta import DeltaDecoder
from remus_colo.checkpoint.guestinfo import domain_kind
from remus_colo.checkpoint.receiver import INCOMING_SUFFIX, Receiver
from remus_colo.errors import DomainError, MessageError, RemusError, StateError
from remus_colo.failover.arbiter import Verdict
from remus_colo.failover.backup import BackupEvent as E
from remus_colo.failover.backup import BackupState
from remus_colo.proxy import announce
from remus_colo.relocation.bulk import CheckpointDigest, parse_state
from remus_colo.relocation.schema import MessageType
from remus_colo.relocation.wire import Message
from remus_colo.session.backup import ANNOUNCE_REPEATS, BackupConfig, BackupSession
from remus_colo.session.creation import RemusCreation
from remus_colo.session.lan import bridge_here, mac_bytes, probe_guest, side_of
from remus_colo.session.peer import Peer
from remus_colo.session.remus_sender import CODEC_DELTA, CODEC_NONE, DEVICE_MODEL_STATE, DEVICE_MODEL_XENSTORE

log = logging.getLogger(__name__)

# A guest that stood still for longer would be no use protected; and a takeover waits for a multiple of it.
LONGEST_PAUSE_S = 600.0
NEIGHBOURS = 16  # that are asked, at most


@dataclass(frozen=True, slots=True)
class Incoming:
    """A later checkpoint, as far as it has come."""

    delta: bool
    length: int
    pieces: list[bytes]
    size: list[int]


class RemusBackupSession(BackupSession):
    """One guest that is kept as its last complete checkpoint."""

    QUIET = True  # several a second
    creation: RemusCreation

    def __init__(
        self,
        config: BackupConfig,
        creation: RemusCreation,
        make_peer: Callable[..., Peer],
        clock: xenctrl.Clock,
        event: Callable[..., None],
    ) -> None:
        super().__init__(config, creation, make_peer, clock, event)
        self._receiver: Receiver | None = None
        self._decoder = DeltaDecoder()
        self._digest = CheckpointDigest()
        self._incoming: Incoming | None = None
        self._device_state: dict[str, bytes] = {}
        self._complete = 0  # the last checkpoint that is whole
        self._addresses: dict[int, list[announce.Address]] = {}
        self._neighbours: dict[int, list[announce.Address]] = {}
        self._pause_s = 0.0  # the longest
        self._links = Links()

    # -- what comes ----------------------------------------------------------------------------------------

    def _create_svm(self) -> None:
        try:
            if domain_kind(self.creation.config) == "hvm":
                devicemodel.refuse_without_program(self.creation.config)
            self._refuse_remains(self.creation.config["c_info"]["name"] + INCOMING_SUFFIX)
            self._receiver = Receiver(self._receiving_config())
        except RemusError as error:
            self._svm_failed(error)
            return
        self.loop.call(lambda: self.handle(E.SVM_CREATED))

    def _receiving_config(self) -> dict[str, Any]:
        """The primary's configuration, with bridges of this host.

        :raise DomainError: there is none for a vif.
        """
        config = copy.deepcopy(self.creation.config)
        if self.creation.same_host:
            config["c_info"]["uuid"] = str(uuid.uuid4())
        for index, nic in enumerate(config.get("nics", [])):
            nic["bridge"] = self._bridge_of(index)
            nic.pop("ifname", None)
        return config

    def _bridge_of(self, index: int, links: Links | None = None) -> str:
        """:param links: of the thread that asks, if that is not the session's.
        :raise DomainError: there is none.
        """
        return bridge_here(links or self._links, self.creation.config, index, self.config.lan_bridge)

    def _send_created(self) -> None:
        self.peer.send(MessageType.CREATED, domid=0, ports={}, addresses={})

    def _on_stream(self, chunk: bytes) -> None:
        """In the reader's thread: a piece of the whole guest goes to xl as it comes."""
        self._digest.update([chunk])
        receiver = self._receiver
        if receiver is None or self.machine.final or self.machine.state is BackupState.STANDING_DOWN:
            return
        try:
            receiver.feed(chunk)
        except RemusError as error:
            self.loop.call(functools.partial(self._svm_failed, error))

    def _end_stream(self) -> None:
        pass  # nobody waits: xl has a pipe of its own, and is told when to begin

    def _on_checkpoint(self, message: Message) -> None:
        kind = message.type
        if kind is MessageType.PAGES:
            raise MessageError(f"the primary sent {kind.name}, which is COLO's")
        if kind is MessageType.CHECKPOINT_BEGIN:
            self._begin(message)
        elif kind is MessageType.CHECKPOINT_STREAM:
            self._digest.update([message.data])
            incoming = self._incoming
            if incoming is None:
                return  # of a checkpoint that was given up
            incoming.pieces.append(bytes(message.data))
            incoming.size[0] += len(message.data)
            if incoming.size[0] > self.creation.limit_bytes:
                raise MessageError(f"a checkpoint of more than {self.creation.limit_bytes} bytes")
        elif kind is MessageType.STATE:
            self._digest.update([message.data])
            name, data = parse_state(message.data)
            if name not in (DEVICE_MODEL_STATE, DEVICE_MODEL_XENSTORE):
                raise MessageError(f"the primary sent the state {name!r}, which this host does not know")
            self._device_state[name] = bytes(data)
        else:
            self._digest.verify(message.fields)
            self._complete = message.epoch
            self.handle(E.CHECKPOINT_COMPLETE)

    def _begin(self, message: Message) -> None:
        fields = message.fields
        try:
            codec, length = fields["codec"], int(fields["length"])
            longest_pause_s = float(fields["longest_pause_s"])
            addresses, neighbours = _by_handle(fields["addresses"]), _by_handle(fields["neighbours"])
        except (KeyError, OverflowError, TypeError, ValueError, AttributeError) as error:
            raise MessageError(f"CHECKPOINT_BEGIN lacks a part or has a malformed one: {error!r}") from error
        if codec not in (CODEC_NONE, CODEC_DELTA) or not 0 <= length <= self.creation.limit_bytes:
            raise MessageError(f"CHECKPOINT_BEGIN announces {length} bytes as {codec!r}")
        if not 0 <= longest_pause_s <= LONGEST_PAUSE_S:
            raise MessageError(f"CHECKPOINT_BEGIN tells of a pause of {longest_pause_s} s")
        self._pause_s = longest_pause_s
        self._addresses.update(addresses)
        self._neighbours.update(neighbours)
        self._device_state = {}
        if message.epoch > 1:
            self._digest = CheckpointDigest()
            self._incoming = Incoming(codec == CODEC_DELTA, length, [], [0])
        self.handle(E.CHECKPOINT_BEGIN)

    def _pause_svm(self) -> None:
        pass  # nothing runs

    def _send_dirty(self) -> None:
        pass  # nothing here changes the guest

    def _discard_buffer(self) -> None:
        self._incoming = None

    def _resume_svm(self) -> None:
        pass

    def _apply_checkpoint(self) -> None:
        incoming, self._incoming = self._incoming, None
        receiver = self._receiver
        if receiver is None:
            raise StateError("a checkpoint, and nobody to take it")
        device_state, self._device_state = self._device_state, {}

        def apply() -> float:
            if incoming is not None:
                stream: bytes | bytearray
                if incoming.delta:
                    stream = self._decoder.decode(incoming.pieces, incoming.length)
                else:
                    stream = b"".join(incoming.pieces)
                receiver.feed(stream)
            receiver.feed(
                libxlformat.checkpoint_end(
                    device_state.get(DEVICE_MODEL_STATE, b""), device_state.get(DEVICE_MODEL_XENSTORE, b"")
                )
            )
            return 0.0

        self._apply_thread(apply, self._on_applied)

    def _on_applied(self, _: float | None, error: BaseException | None) -> None:
        if self.machine.state is BackupState.STANDING_DOWN or self.machine.final:
            return  # xl was ended under its hands
        if error is not None:
            self._svm_failed(error)
        else:
            self.handle(E.APPLIED)

    def _send_resumed(self) -> None:
        self.peer.send(MessageType.RESUMED, self._epoch)

    # -- failover ------------------------------------------------------------------------------------------

    def _longest_pause_s(self) -> float:
        return self._pause_s

    def _look_at_lan(self, window_s: float) -> Verdict:
        with Links() as links:
            hosts = links.addresses()  # which does not answer itself
            sides = [
                side_of(
                    links,
                    self._bridge_of(index, links),
                    self._mac_of(index),
                    self._addresses.get(handle, []),
                    self._neighbours.get(handle, []),
                    hosts,
                    same_host=self.creation.same_host,
                )
                for index, handle in enumerate(self.creation.handles)
            ]
        return probe_guest(sides, window_s)

    def _mac_of(self, index: int) -> bytes:
        """:raise DomainError: the vif has none."""
        nics = self.creation.config.get("nics", [])
        mac = nics[index].get("mac") if index < len(nics) else None
        if mac is None:
            raise DomainError(
                f"the configuration of {self.creation.name} gives its vif {index} no MAC address"
            )
        return mac_bytes(str(mac))

    def _open_lan(self) -> None:
        """Let xl finish: it makes the devices, with their places in the bridges, and lets the guest run."""
        receiver = self._receiver
        if receiver is None:
            raise StateError("a takeover without a guest")
        self.event("starting", epoch=self._complete)
        log.warning(
            "%s: the primary is gone, the guest starts here from checkpoint %d",
            self.creation.name,
            self._complete,
        )
        self._svm_thread("start", lambda: receiver.take_over(self.store), self._on_started)

    def _on_started(self, domid: int | None, error: BaseException | None) -> None:
        if error is not None:
            self._svm_failed(error)
            return
        self.domid = domid
        self.event("active", domid=domid)
        self._announce(ANNOUNCE_REPEATS)

    def _announce(self, repeats: int) -> None:
        """From the takeover on until the guest is there, which takes xl seconds: a primary that was only frozen looks
        for it, and would go on if it found nobody.
        """
        starting = self.domid is None and self.machine.state is BackupState.ACTIVE
        super()._announce(ANNOUNCE_REPEATS if starting else repeats)

    def _announce_once(self) -> None:
        """The guest does so, too, as soon as its interface is connected."""
        for index, handle in enumerate(self.creation.handles):
            try:
                with RawLink(self._bridge_of(index)) as raw:
                    for frame in announce.announcements(self._mac_of(index), self._addresses.get(handle, [])):
                        raw.send(frame)
            except RemusError as error:
                log.error("could not announce the guest: %s", error)

    # -- the end -------------------------------------------------------------------------------------------

    def _svm_failure(self) -> RemusError | None:
        if self.machine.state is BackupState.ACTIVE:
            gone = self.domid is not None and self.store.read(f"/local/domain/{self.domid}/name") is None
            return DomainError("the guest has ended by itself") if gone else None
        if self._receiver is None or self._receiver.running():
            return None
        return self._receiver.failure()

    def _destroy(self) -> None:
        if self._receiver is not None:
            self._receiver.abort(self.store)

    def _end_steps(self) -> list[Callable[[], object]]:
        return [self._links.close, self.peer.close]


def _by_handle(known: dict[str, list[str]]) -> dict[int, list[announce.Address]]:
    return {
        int(handle): [ip_address(address) for address in addresses[:NEIGHBOURS]]
        for handle, addresses in known.items()
    }
