"""A majority of the seed disks is lost for good, and the system partition goes on from those that are left.

The play ``layouts`` with a disaster: the nodes of two disks are powered off anywhere, also while seed disks are
exchanged, with a layout that is decided and not in force. Then two administrators recover the system partition at the
same time, and exchange the lost seed disks. When all nodes that are left know of it, the lost nodes come back: as they
were, with a blank disk, or without their ledger. Here a disk takes part only with a majority of the ledgers: the
program's own exchange of ledgers and its own table decide that.

What must hold, besides what the play ``layouts`` wants:

* A lost disk never takes part again.
* The layouts in force have one history, also those by which the system partition was recovered.
* A recovery of living seed disks is refused by the nodes.
* Afterwards one server may be away, and another one starts meanwhile.

What was acknowledged before may be lost, where a majority of the replicas was. So the history of these registers is cut
in two at the recovery: each part is linearizable. In the second one, writes of the first part may take effect at any
time, or never.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Mapping
from itertools import combinations
from typing import Any, cast

from msgspec.structs import replace

from storaged.cluster.claims import DiskClaim
from storaged.cluster.layout import SYSTEM_PARTITION, Layout
from storaged.cluster.messages import AcceptAnswer
from storaged.cluster.partitions import PartitionState
from storaged.cluster.signed_layout import SignedLayout
from storaged.cluster.succession import base_after, next_epoch, recovered_seeds
from storaged.cluster.voters import lacks_quorum
from storaged.errors import DiskForeign, StoragedError
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.consensus.register import RULES, Rules
from storaged.node.admission import LOST_REASON, DiskFacts, OwnLedger, admission
from storaged.node.forming import ids_of
from storaged.node.ledger import Ledger
from storaged.node.ledger_exchange import LedgerExchange
from storaged.node.opener import place_in
from storaged.node.recovering import SystemRecovery
from tests.sim import layout_parts
from tests.sim.cluster import DISKS, Gateway, StorageNode
from tests.sim.layouts import LayoutPlay, Node, Process, play_layouts
from tests.sim.linear import Kind, Operation, linearizable
from tests.sim.parts import ClockJumps, HungDisks, Part, Suspensions, Trouble
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts

PATIENCE_S = 60.0
LOOK_S = 0.05


class LedgerNode(Node):
    """A storage node whose disk takes part when a majority of the ledgers agrees. Implements
    ``ledger_exchange.ExchangePorts``.
    """

    play: RecoveryPlay

    def start(self) -> None:
        self.life += 1
        self.world.note("start", self.name)
        self.up = True
        self.local: dict[str, LocalReplica] = {}
        self.replica: Any = NotInUse()
        self.looked = False
        self.serve(self.local)
        asker, play = self.asker, self.play
        self.ledger = Ledger(play.ledgers(self.name), entropy=self.world.random.randbytes)
        self.ledgers = LedgerExchange(
            self.ledger, play.identity(self.name), play.authority.certificate, asker.book, self
        )
        self.methods = {**self.methods, **self.ledgers.methods()}
        asker.book.watch(self.ledgers.follow)
        asker.book.watch(lambda _layout: self.silence_if_lost())
        recovery = SystemRecovery(asker.book, self.name, self.local, Readable(play), asker.paths.read)
        self.acceptor.may_recover = recovery.may_recover
        asker.begin(self.ledgers.run(asker.caller))
        asker.begin(self.bring_up())

    @property
    def silent(self) -> bool:
        """It is in use, and must not have been; but for lost disks, which stay so."""
        refused = self.up and self.disk in self.local and not self.takes_part
        return refused and self.disk not in self.play.lost

    @property
    def takes_part(self) -> bool:
        return self.up and self.disk in self.local and self.local[self.disk].statistics().state == "ok"

    def crash(self) -> None:
        self.local.clear()
        super().crash()

    def silence_if_lost(self) -> None:
        if self.disk in self.local and place_in(self.asker.book, self.name, self.disk).lost:
            self.local[self.disk].silence(LOST_REASON)

    # --- ``ExchangePorts``

    def formed(self) -> bool | None:
        return self.ledger.formed or getattr(self.medium, "began", False) if self.looked else None

    def positions(self) -> Mapping[str, int]:
        return {}

    def on_outdated(self, disk_id: str, error: DiskForeign) -> None:
        self.local[disk_id].silence(error.message)

    # --- one disk, as ``node.opener`` does it

    async def bring_up(self) -> None:
        self.looked = True
        await self.ledgers.heard_first()
        if not await self._admitted():
            return
        await self.world.sync()
        self.store.starts += 1
        self.medium.began = True
        replica = LocalReplica(
            self.disk,
            self.store,
            copies=self.medium.copies(self.life, self),
            promises_max=self.world.promises_max,
            rules=self.world.rules,
            clock=self.clock,
        )
        await self.ledgers.publish(DiskClaim(self.disk, self.store.store_id, self.store.starts, 0))
        self.local[self.disk] = self.replica = replica
        self.world.note("in use", self.name)
        self.silence_if_lost()
        self.play.judge_disk(self)

    async def _admitted(self) -> bool:
        ledger, disk = self.ledger, self.disk
        while True:
            await self.ledgers.rebuild()
            place = place_in(self.asker.book, self.name, disk)
            blank = not getattr(self.medium, "began", False)
            facts = DiskFacts(
                disk, blank, ledger.knows(disk), ledger.claimed(disk), "", place.named, place.joins, place.lost
            )
            own = OwnLedger(ledger.id, self.formed(), ledger.fresh)
            found = admission(facts, own, self.ledgers.view())
            if found.opens and found.expected is not None and found.expected.store != self.store.store_id:
                return False
            if found.opens:
                if found.form or found.joins:
                    ledger.form(ids_of(self.ledgers.view().others), [disk])
                return True
            if not found.waits:
                self.world.note("refused", self.name, found.state)
                return False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self.ledgers.changed()


class NotInUse:
    """Of a disk that waits."""

    def fail(self, error: StoragedError) -> None:
        """Nothing is under way."""


class Readable:
    """What nodes see of disks."""

    def __init__(self, play: RecoveryPlay) -> None:
        self._play = play

    def disk_readable(self, disk_id: str) -> bool:
        node = self._play.world.nodes.get("n" + disk_id[1:])
        return isinstance(node, LedgerNode) and node.takes_part

    disk_prompt = disk_readable

    def disk_writable(self, disk_id: str) -> bool:
        return self.disk_readable(disk_id)


class RecoveryPlay(LayoutPlay):
    node_kind = LedgerNode

    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        self.world.on_files = False
        self.off: set[str] = set()
        """Nodes that are powered off for ever, as far as anybody knows."""
        self.lost: tuple[str, ...] = ()
        self.cut_keys: set[str] = set()
        """Of registers whose replicas have lost their majority."""
        self.recovered_at = 0
        """The moment at which a layout was first used that recovers the system partition."""

    def ledgers(self, name: str) -> Any:
        directory = self.directory(name).parent / f"node {name}"
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def restart(self, node: StorageNode) -> None:
        if node.name not in self.off:
            super().restart(node)

    def join_parts(self) -> None:
        self.parts = []
        for kind in (Trouble, HungDisks, Suspensions, ClockJumps, Disaster, layout_parts.Movers):
            chance = random.Random(f"{kind.__name__} {self.found.seed}")
            if kind is Trouble or cast("type[Part]", kind).joins(self, chance):
                self.parts.append(kind(self, chance))

    async def nodes_begin(self) -> None:
        """A new cluster begins when all its nodes are there."""
        while not all(cast(LedgerNode, node).takes_part for node in self.world.nodes.values()):  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)
        await self.judge_rash(self.process("r0"))

    async def judge_rash(self, process: Process) -> None:
        """Somebody calls living seed disks lost, and his gateway asks the nodes in spite of that."""
        before = process.book.current
        for lost in combinations(before.seeds, 2):
            signed = self.sign_recovery(process, lost)
            assert signed is not None
            (left,) = set(before.seeds) - set(lost)
            with contextlib.suppress(StoragedError):
                await process.caller.call(before.node_of(left), "cluster.accept", signed, AcceptAnswer, timeout_s=5.0)
                self.complain(f"a node accepts that living disks {lost} are lost")

    def in_force(self, name: str, book: Any, layout: Layout) -> None:
        super().in_force(name, book, layout)
        if layout.seeds_recovered and not self.recovered_at:
            self.recovered_at, self.chosen_may_fall = self.moment(), True

    def judge_disk(self, node: LedgerNode) -> None:
        """A disk takes part from now on."""
        if node.disk in self.lost and self.recovered_at and node.takes_part:
            self.complain(f"lost disk {node.disk} takes part again")

    def sign_recovery(self, process: Process, lost: tuple[str, ...]) -> SignedLayout | None:
        """What an administrator signs there: nothing while the system partition has a quorum."""
        before = process.book.current
        step = recovered_seeds(before, lost)
        if step is None:
            return None
        address = f"h:{process.name}"  # each signs another one
        nodes = (replace(before.nodes[0], address=address), *before.nodes[1:])
        epoch = next_epoch(before.epoch, moving=True)
        return self.sign(
            replace(
                before,
                epoch=epoch,
                predecessor=process.book.signed(before.epoch).hash,
                base=base_after(before),
                nodes=nodes,
                disks=tuple(replace(disk, state="active") for disk in before.disks if disk.id not in lost),
                lost=(*before.lost, *(disk for disk in lost if disk not in before.lost)),
                seeds=step.present,
                seeds_next=step.coming,
                seeds_step=step.step,
                seeds_lost=step.lost,
                seeds_recovered=epoch,
            )
        )

    # --- the history

    def judge(self) -> Verdicts:
        whole = self.history
        if self.recovered_at:
            cut = [operation for operation in whole if operation.key in self.cut_keys]
            self.history = [operation for operation in whole if operation.key not in self.cut_keys]
            if not linearizable(first_part(cut, self.recovered_at)):
                self.complain("the history before the recovery is not linearizable")
            if not linearizable(second_part(cut, self.recovered_at)):
                self.complain("the history after the recovery is not linearizable")
            self.found.done["recovered"] = 1
        return super().judge()


def first_part(history: list[Operation], moment: int) -> list[Operation]:
    """What ended later is open there."""
    found = []
    for operation in history:
        if operation.invoked < moment:
            ended = not operation.open and operation.returned < moment
            found.append(operation if ended else opened(operation))
    return [operation for operation in found if not (operation.open and operation.kind is Kind.READ)]


def second_part(history: list[Operation], moment: int) -> list[Operation]:
    """What was written before may take effect there, or not."""
    found = []
    for operation in history:
        earlier = not operation.open and operation.returned < moment
        found.append(opened(operation) if earlier else operation)
    return [operation for operation in found if not (operation.open and operation.kind is Kind.READ)]


def opened(operation: Operation) -> Operation:
    return Operation(operation.kind, operation.key, operation.invoked, operation.new, operation.expected)


class Disaster(layout_parts.LayoutPart):
    """Two administrators exchange seed disks; then a majority of these is lost; they recover. Later the lost nodes come
    back.
    """

    finishes = True

    def __init__(self, scenario: Any, chance: random.Random) -> None:
        super().__init__(scenario, chance)
        self.play = cast(RecoveryPlay, scenario)
        self.administrators = layout_parts.Administrators(scenario, chance)
        self.reason = ""
        self.ended = asyncio.Event()

    async def run(self) -> None:
        try:
            await self._play()
        finally:
            self.ended.set()

    async def _play(self) -> None:
        chance = self.chance
        work = asyncio.create_task(self.administrators.run())
        await asyncio.sleep(chance.uniform(0.1, 1.2))
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        for process in self.play.processes:
            if process.name in ("a0", "a1") and not process.up:
                process.start()
        await self._lose()
        await self._agreed()
        await asyncio.gather(*(self._recover(self._process(name)) for name in ("a0", "a1")))
        if self.play.recovered_at:
            await self._return()
        else:
            self._undo()

    def _process(self, name: str) -> Process:
        return next(process for process in self.play.processes if process.name == name)

    # --- the loss

    async def _lose(self) -> None:
        """The nodes of two disks are powered off."""
        newest = max(self.of.everybody(), key=lambda process: process.book.epoch).book
        state = newest.partition(SYSTEM_PARTITION)
        pairs = [pair for pair in combinations(DISKS, 2) if lacks_quorum(state.sets, state.lost, pair)]
        lost = self.chance.choice(pairs)
        self.play.lost = lost
        for disk in lost:
            node = self.world.nodes["n" + disk[1:]]
            self.play.off.add(node.name)
            if node.up:
                node.crash()
        self.fault(f"{' and '.join(lost)} are lost{' while seeds are exchanged' if state.coming else ''}")
        for key, name in self.play.names.items():
            # Partitions that move have other sets than one process knows.
            if newest.current.base or self._cuts(newest.partition(name.partition), lost):
                self.play.cut_keys.add(key)

    def _cuts(self, state: PartitionState, lost: tuple[str, ...]) -> bool:
        return lacks_quorum(state.sets, state.lost, lost)

    async def _agreed(self) -> None:
        """As operators are told: all servers that are left run, and use one layout."""
        for _ in range(int(PATIENCE_S / LOOK_S)):
            left = [node for node in self.world.nodes.values() if node.name not in self.play.off]
            same = len({process.book.epoch for process in self.of.everybody()}) == 1
            if same and all(node.up for node in left) and all(process.up for process in self.play.processes):
                return
            await asyncio.sleep(LOOK_S)

    def _undo(self) -> None:
        """The layout that was decided meanwhile has a quorum without the lost disks: they come back."""
        off, self.play.off, self.play.lost = sorted(self.play.off), set(), ()
        for name in off:
            self.play.restart(self.world.nodes[name])

    # --- the recovery

    async def _recover(self, process: Process) -> None:
        signed: SignedLayout | None = None
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not process.book.current.seeds_recovered:
                    signed = signed or self.play.sign_recovery(process, self.play.lost)
                    if signed is None:
                        break
                    await asyncio.sleep(self.chance.uniform(0, 0.1))
                    try:
                        await process.application(collect_s=self.chance.choice((0.3, 1.5))).apply(signed)
                    except StoragedError as error:
                        self.reason += f"; {process.name}: {error.message}"
        except TimeoutError:
            self.of.complain(f"the system partition can't be recovered: {self.reason}")
        if process.book.current.seeds_recovered:
            self.fault(f"{process.name} uses the recovery")

    async def _return(self) -> None:
        """When all nodes that are left know the recovery, the lost ones come back, as they were or with less."""
        left = [node for node in self.world.nodes.values() if node.name not in self.play.off]
        for _ in range(int(PATIENCE_S / LOOK_S)):
            if all(node.up and layout_parts.asker_of(node).book.current.seeds_recovered for node in left):
                break
            await asyncio.sleep(LOOK_S)
        for name in sorted(self.play.off):
            node, how = self.world.nodes[name], self.chance.choice(("as it was", "blank", "without its ledger"))
            if how == "blank":
                node.blank_disk()
            elif how == "without its ledger":
                (self.play.ledgers(name) / "disks.json").unlink(missing_ok=True)
            self.fault(f"{name} comes back {how}")
            node.start()
            await asyncio.sleep(self.chance.uniform(0, 0.3))

    # --- all is well

    async def heal(self) -> None:
        await self.ended.wait()
        if not self.of.found.violation:
            await self._exchange_all()

    async def _exchange_all(self) -> None:
        process = self.of.process("a9")
        administrators = self.administrators
        try:
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    current = process.book.current
                    same = {other.book.epoch for other in self.of.everybody()} == {process.book.epoch}
                    if same and not (current.seeds_lost or current.seeds_next):
                        return
                    await administrators.once(process, sound=True)
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            self.of.complain(f"lost seed disks are not exchanged: {administrators.reason}")

    async def judge(self, reader: Gateway) -> None:
        if self.of.found.violation or not self.play.recovered_at:
            return
        for node in self.world.nodes.values():
            assert isinstance(node, LedgerNode)
            if node.disk in self.play.lost and node.takes_part:
                self.of.complain(f"lost disk {node.disk} takes part at the end")
        await self._judge_ledgers()

    async def _judge_ledgers(self) -> None:
        """One server is away, and another one starts: as many ledgers are left as have to agree."""
        for name in sorted(self.play.off):
            if self.world.nodes[name].up:
                self.world.nodes[name].crash()
        left = sorted(node.name for node in self.world.nodes.values() if node.name not in self.play.off)
        away, starts = (cast(LedgerNode, self.world.nodes[name]) for name in self.chance.sample(left, 2))
        for node in (away, starts):
            if node.up:
                node.crash()
        starts.start()
        for _ in range(int(PATIENCE_S / LOOK_S)):
            if starts.takes_part:
                break
            await asyncio.sleep(LOOK_S)
        else:
            self.of.complain(f"{starts.name} does not come up while {away.name} is away")
        away.start()


def run_recovering_system(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    return play_layouts(lambda loop: RecoveryPlay(seed, loop, rules))
