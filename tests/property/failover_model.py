# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two hosts, a link and a LAN in one process: the real state machines and monitors, everything else modelled.

Time goes in ticks.  A host may be dead or frozen; the link may be down, and delivers in order with a delay,
as TCP does.  What a model host does on an action is the least that the real one does.
"""

from __future__ import annotations

import enum
import random
from collections import deque
from dataclasses import dataclass, field

from remus_colo.failover.arbiter import LanProbe, Verdict
from remus_colo.failover.backup import DECIDING, BackupAction, BackupEvent, BackupMachine, BackupState
from remus_colo.failover.heartbeat import Pacer, PeerMonitor, SelfMonitor
from remus_colo.failover.primary import PrimaryAction, PrimaryEvent, PrimaryMachine, PrimaryState

TICK_S = 0.05
INTERVAL_S = 0.25
TIMEOUT_S = 1.2
DELAY_S = 0.1
# the time-out less an interval, a delay and two ticks of scheduling
SELF_LIMIT_S = 0.7
PROBE_WINDOW_S = 0.9
PROBE_GAP_S = 0.2
ARBITER_DELAY_S = 0.3


class Arbiter(enum.Enum):
    ORACLE = "knows: a frozen host is alive"
    LAN = "sees only who answers: a frozen host is silent"
    SWITCH = "switches the other host off, first come first served"


@dataclass
class Pipe:
    """One direction of the link."""

    messages: deque[tuple[float, str, int]] = field(default_factory=deque)

    def put(self, now_s: float, delay_s: float, kind: str, number: int = 0) -> None:
        due_s = max(now_s + delay_s, self.messages[-1][0] if self.messages else 0.0)
        self.messages.append((due_s, kind, number))


class World:
    def __init__(self, seed: int, arbiter: Arbiter) -> None:
        self.random = random.Random(seed)
        self.arbiter = arbiter
        self.now_s = 0.0
        self.link_up = True
        self.to_backup, self.to_primary = Pipe(), Pipe()
        self.primary = Primary(self)
        self.backup = Backup(self)
        self.both_active_at_s: float | None = None
        self.released_then_taken_over = False

    def tick(self) -> None:
        self.now_s += TICK_S
        for host in self.random.sample([self.primary, self.backup], 2):
            if host.runs:
                host.tick()
            self.observe()

    def observe(self) -> None:
        if self.primary.alone and self.primary.serves and self.backup.serves:
            self.both_active_at_s = self.both_active_at_s or self.now_s
        if self.primary.alone and self.backup.machine.state is BackupState.ACTIVE:
            self.released_then_taken_over = True

    def run(self, until_s: float) -> None:
        while self.now_s < until_s:
            self.tick()


class Host:
    def __init__(self, world: World, inbox: Pipe, outbox: Pipe) -> None:
        self.world = world
        self.inbox, self.outbox = inbox, outbox
        self.dead = self.frozen = self.closed = False
        self.monitor = PeerMonitor(TIMEOUT_S)
        self.pacer = Pacer(INTERVAL_S)
        self.sequence = self.peer_sequence = 0
        self.probe: LanProbe | None = None
        self.verdict_at_s: float | None = None
        self.timers: list[tuple[float, str]] = []

    @property
    def runs(self) -> bool:
        return not self.dead and not self.frozen

    @property
    def now_s(self) -> float:
        return self.world.now_s

    def send(self, kind: str, number: int = 0) -> None:
        if not self.closed:
            self.outbox.put(self.now_s, self.world.random.uniform(0.01, DELAY_S), kind, number)

    def later(self, what: str, longest_s: float = 0.4) -> None:
        self.timers.append((self.now_s + self.world.random.uniform(0, longest_s), what))

    def close(self) -> None:
        """The last message: end of stream."""
        self.send("EOF")
        self.closed = True

    def ask(self) -> None:
        self.probe = LanProbe(PROBE_WINDOW_S, PROBE_GAP_S)
        self.verdict_at_s = self.now_s + self.world.random.uniform(TICK_S, ARBITER_DELAY_S)

    def decided(self, other: Host, oracle: Verdict) -> Verdict | None:
        if self.probe is None or self.verdict_at_s is None:
            return None
        verdict: Verdict | None = None
        if self.world.arbiter is Arbiter.LAN:
            verdict = self.probe.observe(self.now_s, peer_answers=other.serves, lan_works=True)
        elif self.now_s >= self.verdict_at_s:
            if self.world.arbiter is Arbiter.SWITCH:
                other.dead = True
            verdict = Verdict.DEAD if self.world.arbiter is Arbiter.SWITCH else oracle
        if verdict is not None:
            self.probe = None
        return verdict

    def take_in(self) -> None:
        # a host that was frozen reads its socket empty before it asks who is silent
        while not self.closed and self.world.link_up and self.inbox.messages:
            due_s, kind, number = self.inbox.messages[0]
            if due_s > self.now_s:
                break
            self.inbox.messages.popleft()
            self.monitor.beat(self.now_s)
            self.receive(kind, number)

    def beat(self) -> None:
        if not self.closed and self.pacer.due(self.now_s):
            self.sequence += 1
            self.beating()
            # number packs what the other side needs: the sequence, what was seen, whether we are deciding
            self.send("HEARTBEAT", self.sequence * 10**6 + self.peer_sequence * 10 + self.deciding)

    def due_timers(self) -> list[str]:
        due = [what for at_s, what in self.timers if at_s <= self.now_s]
        self.timers = [timer for timer in self.timers if timer[0] > self.now_s]
        return due

    @property
    def serves(self) -> bool:
        raise NotImplementedError

    @property
    def deciding(self) -> bool:
        return False

    def beating(self) -> None:
        pass

    def receive(self, kind: str, number: int) -> None:
        raise NotImplementedError

    def tick(self) -> None:
        raise NotImplementedError


class Primary(Host):
    def __init__(self, world: World) -> None:
        super().__init__(world, world.to_primary, world.to_backup)
        self.machine = PrimaryMachine()
        self.self_monitor = SelfMonitor(SELF_LIMIT_S)
        self.pvm_runs = True
        self.alone = False
        self.begun = False

    @property
    def serves(self) -> bool:
        """Whether the guest answers on the LAN from this host."""
        return self.runs and self.pvm_runs

    def beating(self) -> None:
        self.self_monitor.sent(self.sequence, self.now_s)

    def on(self, event: PrimaryEvent) -> None:
        for action in self.machine.handle(event).actions:
            self.act(action)

    def act(self, action: PrimaryAction) -> None:
        match action:
            case PrimaryAction.CREATE_SVM:
                self.send("CREATE")
            case PrimaryAction.START_CHECKPOINT:
                self.send("PREPARE")
            case PrimaryAction.ABANDON_CAPTURE:
                self.timers.clear()
            case PrimaryAction.SEND_ABORT:
                self.send("ABORT")
            case PrimaryAction.SEND_STOP:
                self.send("STOP")
            case PrimaryAction.SEND_BYE:
                self.send("BYE")
            case PrimaryAction.RELEASE_ALL:
                self.alone = True
            case PrimaryAction.ASK_ARBITER:
                self.ask()
            case PrimaryAction.CUT_LAN | PrimaryAction.STOP_PVM:
                self.pvm_runs = False
            case PrimaryAction.CLEAN_UP:
                self.close()

    def receive(self, kind: str, number: int) -> None:
        match kind:
            case "HEARTBEAT":
                self.peer_sequence, seen, deciding = number // 10**6, number % 10**6 // 10, number % 10
                if not deciding:
                    self.self_monitor.seen(seen)
            case "HELLO":
                self.on(PrimaryEvent.BACKUP_READY)
            case "CREATED":
                self.on(PrimaryEvent.SVM_CREATED)
            case "DIRTY":
                if self.machine.state in (PrimaryState.SYNCING, PrimaryState.CHECKPOINTING):
                    self.send("BEGIN")
                    self.later("END")
            case "ACK":
                self.on(PrimaryEvent.CHECKPOINT_ACKED)
            case "RESUMED":
                self.on(PrimaryEvent.SVM_RESUMED)
            case "TAKEOVER":
                self.on(PrimaryEvent.TAKEOVER)
            case "BYE":
                self.on(PrimaryEvent.BACKUP_LEFT)
            case "EOF":
                self.lost()

    def lost(self) -> None:
        # with an arbiter that may be switching us off, we have to ask, too
        doubt = self.self_monitor.in_doubt(self.now_s) or self.world.arbiter is Arbiter.SWITCH
        self.on(PrimaryEvent.BACKUP_LOST_IN_DOUBT if doubt else PrimaryEvent.BACKUP_LOST)

    def tick(self) -> None:
        if not self.begun:
            self.begun = True
            self.send("HELLO")
            self.monitor.beat(self.now_s)
        self.take_in()
        if self.monitor.expired(self.now_s):
            self.lost()
        if self.machine.beats:
            self.beat()
        state = self.machine.state
        if state is PrimaryState.PROTECTED and self.world.random.random() < 0.1:
            self.on(PrimaryEvent.CHECKPOINT_DUE)
        for what in self.due_timers():
            if (
                what == "END"
                and self.machine.state is PrimaryState.CHECKPOINTING
                and self.world.random.random() < 0.1
            ):
                self.on(PrimaryEvent.CHECKPOINT_FAILED)
            else:
                self.send(what)
        verdict = self.decided(self.world.backup, self.oracle())
        if verdict is not None:
            self.on(
                {
                    Verdict.DEAD: PrimaryEvent.BACKUP_INACTIVE,
                    Verdict.ALIVE: PrimaryEvent.BACKUP_ACTIVE,
                    Verdict.UNKNOWN: PrimaryEvent.BACKUP_UNKNOWN,
                }[verdict]
            )
        if state is PrimaryState.UNPROTECTED and self.world.backup.serves:
            self.on(PrimaryEvent.LAN_CONFLICT)

    def oracle(self) -> Verdict:
        backup = self.world.backup
        if backup.machine.state is BackupState.ACTIVE and not backup.dead:
            return Verdict.ALIVE
        if backup.dead or not backup.machine.replica:
            return Verdict.DEAD
        return Verdict.UNKNOWN


class Backup(Host):
    def __init__(self, world: World) -> None:
        super().__init__(world, world.to_backup, world.to_primary)
        self.machine = BackupMachine()
        self.on_lan = False

    @property
    def serves(self) -> bool:
        return self.runs and self.on_lan

    @property
    def deciding(self) -> bool:
        return self.machine.state in DECIDING

    def on(self, event: BackupEvent) -> None:
        for action in self.machine.handle(event).actions:
            self.act(action)

    def act(self, action: BackupAction) -> None:
        match action:
            case BackupAction.CREATE_SVM:
                self.later("SVM_CREATED")
            case BackupAction.SEND_CREATED:
                self.send("CREATED")
            case BackupAction.SEND_DIRTY:
                self.send("DIRTY")
            case BackupAction.SEND_ACK:
                self.send("ACK")
            case BackupAction.APPLY_CHECKPOINT:
                # longer than the time-out: the primary may be lost meanwhile
                self.later("APPLIED", 2 * TIMEOUT_S)
            case BackupAction.SEND_RESUMED:
                self.send("RESUMED")
            case BackupAction.ASK_ARBITER:
                self.ask()
            case BackupAction.SEND_TAKEOVER:
                self.send("TAKEOVER")
            case BackupAction.OPEN_LAN:
                self.on_lan = True
            case BackupAction.DESTROY_SVM:
                self.timers.clear()
                self.later("SVM_DESTROYED")
            case BackupAction.SEND_BYE:
                self.send("BYE")
            case BackupAction.CLEAN_UP:
                self.close()

    def receive(self, kind: str, number: int) -> None:
        match kind:
            case "HELLO":
                self.send("HELLO")
            case "HEARTBEAT":
                self.peer_sequence = number // 10**6
                self.on(BackupEvent.PRIMARY_HEARD)
            case "EOF":
                self.on(BackupEvent.PRIMARY_LOST)
            case _:
                self.on(
                    {
                        "CREATE": BackupEvent.CREATE,
                        "PREPARE": BackupEvent.PREPARE,
                        "BEGIN": BackupEvent.CHECKPOINT_BEGIN,
                        "END": BackupEvent.CHECKPOINT_COMPLETE,
                        "ABORT": BackupEvent.ABORT,
                        "STOP": BackupEvent.STOP,
                        "BYE": BackupEvent.PRIMARY_LEFT,
                    }[kind]
                )

    def tick(self) -> None:
        self.take_in()
        if self.monitor.expired(self.now_s):
            self.on(BackupEvent.PRIMARY_LOST)
        self.beat()
        for what in self.due_timers():
            self.on(BackupEvent[what])
        verdict = self.decided(self.world.primary, Verdict.DEAD if self.world.primary.dead else Verdict.ALIVE)
        if verdict is not None:
            self.on(BackupEvent[f"PRIMARY_{verdict.name}"])
