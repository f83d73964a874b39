"""Seeds with disks that forget: wiped, put back from a snapshot, alone or with their node's ledger; and lost ledgers.

Each node keeps a ledger, with the program's own claims, majorities and decisions (``cluster.claims``,
``node.admission``, ``node.forming``).

What is virtual: the ledgers' files, the calls between nodes, and the comparison of a store with what is claimed. A
statement has no signature here. In some runs the cluster is new: its disks are blank, and no ledger counts.

A disk that forgot what it promised must answer nothing any more, and a disk that forgot nothing must take part at the
end. Beside that everything fails that fails in ``scenario``, and the history is judged.
"""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Collection, Iterable
from typing import Any

from storaged.cluster.claims import ClaimBook, Claimed, DiskClaim, Ledgers, NodeClaims, SignedClaims, newest, outdates
from storaged.cluster.ports import LedgerReport
from storaged.meta.consensus.register import RULES, Rules
from storaged.node.admission import DiskFacts, OwnLedger, admission, may_begin_unclaimed
from storaged.node.forming import ids_of
from storaged.wire import encode
from tests.sim.cluster import Gateway, StorageNode, World
from tests.sim.parts import HungDisks, Part, Trouble
from tests.sim.scenario import GATEWAYS, Scenario, Verdicts, play_out
from tests.sim.virtual import VirtualLoop

AGAIN_S = 0.02
CALL_S = 0.05
PUBLISH_S = 0.03
CUT_S = 0.3


class VirtualLedger:
    """What ``node.ledger`` keeps, of a node with one disk. It is durable when a method returns."""

    def __init__(self, world: World, disk: str) -> None:
        self.id = world.random.randbytes(16)
        self.disk = disk
        self.formed = self.whole = self.listed = False
        self.fresh = True
        self.nodes: dict[str, bytes] = {}
        self.own: DiskClaim | None = None
        self.book = ClaimBook()

    def claimed(self, disk: str) -> Claimed:
        stores = {claim.store: claim for claim in self.book.of(disk).stores}
        if self.own is not None and disk == self.disk:
            known = stores.get(self.own.store)
            stores[self.own.store] = self.own if known is None else newest(known, self.own)
        return Claimed(tuple(stores.values()))

    def merge(self, statements: Iterable[NodeClaims]) -> None:
        for claims in statements:
            self.book.add(signed(claims), claims)

    def known(self) -> list[NodeClaims]:
        return [found for node in sorted(self.book._statements) for _, found in self.book._statements[node]]


def signed(claims: NodeClaims) -> SignedClaims:
    """The ledgers of this simulation believe it: signatures are tested elsewhere."""
    return SignedClaims(encode(claims), b"", b"")


Answer = tuple[LedgerReport, bool, list[NodeClaims]]
"""The report, whether the statement is stored, and the statements that the ledger holds."""


class LedgerNode(StorageNode):
    """A storage node that asks the ledgers of the others before its disk answers anything."""

    def __init__(self, world: World, name: str, disk: str, skew_ms: int | None = None) -> None:
        self.ledger = VirtualLedger(world, disk)
        self.running = self.forgot = False
        self.answered_starts = 0
        """The start in which its disk answered last."""
        self.on_up: Any = None
        self._tasks: list[asyncio.Task[None]] = []
        super().__init__(world, name, disk, skew_ms)

    @property
    def shown(self) -> DiskClaim:
        return DiskClaim(self.disk, self.store.store_id, self.store.starts, self.store.position)

    def start(self) -> None:
        if self.running:
            return
        self.running = True
        self.life += 1
        self._tasks = [self.world.loop.create_task(self._come_up())]

    def crash(self) -> None:
        for task in self._tasks:
            task.cancel()
        self.running = False
        if self.up:
            super().crash()
        else:
            self.life += 1
            self.medium.crash()

    def refuse(self, why: str) -> None:
        """Its disk takes no part any more, and its ledger does."""
        self.world.note("refused", self.name, why)
        self.foreign = True
        if self.up:
            self.replica.silence(why)
            self.up = False

    def take_part(self) -> None:
        """The disk answers from now on."""
        self.expected_store_id = self.store.store_id
        super().start()
        self.answered_starts = self.store.starts
        self.on_up(self)

    # --- coming up

    async def _come_up(self) -> None:
        if self.world.rules.foreign_refused:
            expected = await self._admitted()
            if expected is None:
                return
            if expected and outdates(expected[0], self.shown):
                self.refuse("the store is not what is claimed")
                return
        await self.world.sync()
        self.store.starts += 1
        if self.world.rules.foreign_refused:
            await self._claim()
        if not self.foreign:
            self.take_part()
            self._tasks.append(self.world.loop.create_task(self._publish()))

    async def _admitted(self) -> tuple[DiskClaim, ...] | None:
        """What the store must be (nothing: any); None for a disk that is refused for good."""
        ledger = self.ledger
        while True:
            view = await self._ask_all()
            if not ledger.whole and view.may_rebuild:
                await self.world.sync()
                ledger.whole = True
            view = view._replace(whole=ledger.whole)
            facts = DiskFacts(self.disk, not self.store.starts, ledger.listed, ledger.claimed(self.disk))
            own = OwnLedger(ledger.id, self.formed, ledger.fresh)
            begin = may_begin_unclaimed(own, view, [facts])
            if begin is not None:
                await self.world.sync()
                ledger.fresh = False
                if begin:
                    ledger.formed = ledger.listed = True
                continue
            found = admission(facts, own, view)
            if found.opens:
                if found.form:
                    await self.world.sync()
                    ledger.formed = ledger.listed = True
                    ledger.nodes |= ids_of(view.others)
                return () if found.expected is None else (found.expected,)
            if not found.waits:
                self.refuse(found.reason)
                return None
            await asyncio.sleep(AGAIN_S)

    @property
    def formed(self) -> bool:
        return self.ledger.formed or bool(self.store.starts)

    async def _ask_all(self) -> Ledgers:
        others = self._others()
        answers = await asyncio.gather(*(self._ask(other, None) for other in others))
        for answer in answers:
            if answer is not None:
                self.ledger.merge(answer[2])
        reports = {
            other.name: None if answer is None else answer[0] for other, answer in zip(others, answers, strict=True)
        }
        return Ledgers(self.ledger.whole, reports)

    def _others(self) -> list[LedgerNode]:
        found = [node for name, node in sorted(self.world.nodes.items()) if name != self.name]
        return [node for node in found if isinstance(node, LedgerNode)]

    async def _ask(self, other: LedgerNode, offer: NodeClaims | None) -> Answer | None:
        """A call of ``cluster.claims``; None: there is no answer in time."""
        try:
            async with asyncio.timeout(CALL_S):
                return await self._call(other, offer)
        except TimeoutError:
            return None

    async def _call(self, other: LedgerNode, offer: NodeClaims | None) -> Answer | None:
        world = self.world
        await asyncio.sleep(world.delay_s())
        if self._lost(other):
            return None
        life = other.life
        stored = False
        if offer is not None and not other.ledger.book.objections(offer):
            await world.sync()
            if other.life != life or not other.running:
                return None
            other.ledger.merge([offer])
            stored = True
        ledger = other.ledger
        report = LedgerReport(ledger.id, other.formed, ledger.nodes.get(self.name, b""), ledger.whole)
        known = ledger.known()
        await asyncio.sleep(world.delay_s())
        return None if self._lost(other) else (report, stored, known)

    def _lost(self, other: LedgerNode) -> bool:
        world = self.world
        return not other.running or world.apart(self.name, other.name) or world.random.random() < world.weather.lose

    # --- claiming

    def _statement(self) -> NodeClaims:
        assert self.ledger.own is not None
        return NodeClaims("sim", self.name, (self.ledger.claimed(self.disk).only or self.ledger.own,))

    async def _claim(self) -> None:
        """Returns when the start of the disk is in a majority of the ledgers, or the disk is refused."""
        shown = self.shown
        await self.world.sync()
        self.ledger.own, self.ledger.formed = shown, True
        stored = {self.name}
        while not self.foreign:
            offer = self._statement()
            self.ledger.merge([offer])
            others = [other for other in self._others() if other.name not in stored]
            for other, answer in zip(
                others, await asyncio.gather(*(self._ask(other, offer) for other in others)), strict=True
            ):
                if answer is not None:
                    self.ledger.merge(answer[2])
                    if answer[1] and answer[0].whole:
                        stored.add(other.name)
            self._check(shown)
            if len(stored) >= Ledgers(True, dict.fromkeys(other.name for other in self._others())).majority:
                return
            await asyncio.sleep(AGAIN_S)

    def _check(self, shown: DiskClaim) -> None:
        if any(outdates(known, shown) for known in self.ledger.claimed(self.disk).stores):
            self.refuse("another ledger knows better")

    async def _publish(self) -> None:
        while not self.foreign:
            await asyncio.sleep(PUBLISH_S)
            shown = self.shown
            await self.world.sync()
            self.ledger.own = shown if self.ledger.own is None else newest(self.ledger.own, shown)
            offer = self._statement()
            self.ledger.merge([offer])
            for answer in await asyncio.gather(*(self._ask(other, offer) for other in self._others())):
                if answer is not None:
                    self.ledger.merge(answer[2])
            self._check(self.shown)


class Image:
    """A disk at some moment, and its node's ledger."""

    def __init__(self, node: LedgerNode) -> None:
        self.shown = node.shown
        self.store = node.store.image()
        self.copies = dict(node.payloads.synced)
        self.ledger = copy.deepcopy(node.ledger)

    def put_back(self, node: LedgerNode, *, ledger: bool) -> None:
        node.store.put_back(self.store)
        node.payloads.synced = dict(self.copies)
        if ledger:
            node.ledger = copy.deepcopy(self.ledger)


class Forgetting(Part):
    """One disk forgets, once, in one of several ways; or ledgers are lost, and no disk forgets."""

    finishes = True

    async def run(self) -> None:
        chance = self.chance
        node = self.replica_node()
        assert isinstance(node, LedgerNode)
        kinds = (self._wipe, self._put_disk_back, self._put_machine_back, self._put_disk_back_without_ledger)
        kind = chance.choice(
            (*kinds, self._exchange, self._wipe_with_ledger, self._lose_ledgers, self._lose_all_ledgers)
        )
        # A blank disk whose node loses its ledger just before it begins never begins: it can't know that it is new.
        for other in self.world.nodes.values():
            while not other.answered_starts:  # type: ignore[attr-defined]  # noqa: ASYNC110
                await asyncio.sleep(AGAIN_S)
        await asyncio.sleep(chance.uniform(0.05, 0.3))
        await kind(node)

    async def _until_up(self, node: LedgerNode) -> None:
        while not node.up and not node.foreign:  # noqa: ASYNC110  (the simulation has no event for it)
            await asyncio.sleep(AGAIN_S)

    def _forget(self, node: LedgerNode, what: str, away: Collection[str] = ()) -> None:
        """The process is down, and the disk is not what it was. ``away``: processes that it does not reach for a while
        at its start.
        """
        node.forgot = True
        self.fault(f"{node.name} {what}")
        self.world.note("forget", node.name, what)
        others = [other for other in self.world.nodes if other != node.name]
        self._cut(away or self.chance.sample(others, self.chance.choice((0, 1, 2))))
        node.start()

    def _cut(self, processes: Collection[str]) -> None:
        self.world.cut = frozenset(processes)
        self.world.loop.call_later(CUT_S, self._mend)

    def _mend(self) -> None:
        self.world.cut = frozenset()

    async def _wipe(self, node: LedgerNode) -> None:
        await self._until_up(node)
        node.crash()
        node.blank_disk()
        self._forget(node, "got a blank disk")

    async def _exchange(self, node: LedgerNode) -> None:
        """For the disk of another place, which was in use there."""
        await self._until_up(node)
        node.crash()
        node.blank_disk()
        node.store.starts, node.store.position = 99, 99_999
        self._forget(node, "got another disk")

    async def _wipe_with_ledger(self, node: LedgerNode) -> None:
        await self._until_up(node)
        node.crash()
        node.blank_disk()
        node.ledger = VirtualLedger(self.world, node.disk)
        self._forget(node, "was built anew")

    async def _put_disk_back(self, node: LedgerNode) -> None:
        image = await self._image(node)
        for _ in range(100):
            await asyncio.sleep(0.01)
            own = node.ledger.own
            if own is not None and (own.position > image.shown.position or own.starts > image.shown.starts):
                break
        else:
            return
        last = await self._put_back(node, image, "had its disk put back", ledger=False)
        if self.chance.random() < 0.4:
            await asyncio.sleep(self.chance.uniform(0.05, 0.3))
            node.crash()
            last.put_back(node, ledger=False)
            node.foreign = node.forgot = False
            self.fault(f"{node.name} got its disk as it was")
            node.start()

    async def _put_machine_back(self, node: LedgerNode) -> None:
        """Only once all others know better: the ledger that could is back, too."""
        image = await self._image(node)
        for _ in range(20):
            await asyncio.sleep(self.chance.uniform(0.02, 0.2))
            others = [other for other in self.world.nodes.values() if other is not node]
            if all(self._knows_better(other, image) for other in others):
                away = (node.name,) if self.chance.random() < 0.5 else ()
                await self._put_back(node, image, "was put back as a whole", away, ledger=True)
                return

    async def _put_disk_back_without_ledger(self, node: LedgerNode) -> None:
        """To an earlier start. The start after it reached a majority, with two of the other nodes, and these are away
        when the node starts again.
        """
        image = await self._image(node)
        others = [name for name in self.world.nodes if name != node.name]
        near = self.chance.sample(others, 2)
        node.crash()
        self._cut((node.name, *near))
        node.start()
        for _ in range(100):
            await asyncio.sleep(0.005)
            if node.up and node.answered_starts > image.shown.starts:
                node.crash()
                image.put_back(node, ledger=False)
                node.ledger = VirtualLedger(self.world, node.disk)
                self._forget(node, "had its disk put back, and lost its ledger", near)
                return

    async def _image(self, node: LedgerNode) -> Image:
        await self._until_up(node)
        await asyncio.sleep(self.chance.uniform(0, 0.1))
        return Image(node)

    def _knows_better(self, node: StorageNode, image: Image) -> bool:
        assert isinstance(node, LedgerNode)
        return any(outdates(known, image.shown) for known in node.ledger.claimed(image.shown.disk).stores)

    async def _put_back(
        self, node: LedgerNode, image: Image, what: str, away: Collection[str] = (), *, ledger: bool
    ) -> Image:
        node.crash()
        last = Image(node)
        image.put_back(node, ledger=ledger)
        self._forget(node, what, away)
        return last

    async def _lose_ledgers(self, _node: LedgerNode) -> None:
        """One after the other; none of them knows of it."""
        for _ in range(self.chance.choice((1, 3))):
            node = self.world.nodes[self.chance.choice(sorted(self.world.nodes))]
            assert isinstance(node, LedgerNode)
            node.crash()
            node.ledger = VirtualLedger(self.world, node.disk)
            self.fault(f"{node.name} lost its ledger")
            node.start()
            for _ in range(100):
                if node.ledger.whole:
                    break
                await asyncio.sleep(AGAIN_S)
            else:
                return

    async def _lose_all_ledgers(self, _node: LedgerNode) -> None:
        self.fault("all ledgers were lost")
        nodes = [node for node in self.world.nodes.values() if isinstance(node, LedgerNode)]
        for node in nodes:
            node.crash()
            node.ledger = VirtualLedger(self.world, node.disk)
        for node in nodes:
            self.world.loop.call_later(self.chance.uniform(0, 0.3), node.start)


class Forgetful(Scenario):
    node_kind = LedgerNode

    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        self.random = self.world.random = random.Random(f"forgetful {seed}")
        self.world.on_files = self.moves = self.disks_may_be_full = self.disks_may_be_swapped = False
        self.world.epochs = 1
        self.is_new = self.aside.random() < 0.2

    def join_parts(self) -> None:
        for kind in (Trouble, HungDisks, Forgetting):
            chance = random.Random(f"forgetful {kind.__name__} {self.found.seed}")
            if kind.joins(self, chance):
                self.parts.append(kind(self, chance))

    def begin_gateways(self) -> None:
        nodes = [node for node in self.world.nodes.values() if isinstance(node, LedgerNode)]
        for node in nodes:
            node.on_up = self._answers
        if not self.is_new:
            self._form(nodes)
        self.gateways = [Gateway(self.world, f"g{index}", self.layout) for index in range(GATEWAYS)]

    def _form(self, nodes: list[LedgerNode]) -> None:
        """The cluster took part before the run."""
        for node in nodes:
            node.store.starts = 1
        claims = [NodeClaims("sim", node.name, (node.shown,)) for node in nodes]
        for node in nodes:
            ledger = node.ledger
            ledger.formed = ledger.whole = ledger.listed = True
            ledger.fresh = False
            ledger.own = node.shown
            ledger.nodes = {other.name: other.ledger.id for other in nodes if other is not node}
            ledger.merge(claims)

    def _answers(self, node: LedgerNode) -> None:
        if node.forgot:
            self.complain(f"{node.name} forgot what it promised, and answers")

    def look_for_copies(self, data_id: bytes) -> None:
        """One of two copies may be on the disk that forgets."""

    async def look_at_the_end(self, reader: Gateway) -> None:
        await super().look_at_the_end(reader)
        for node in self.world.nodes.values():
            assert isinstance(node, LedgerNode)
            if not node.up and not node.forgot:
                self.complain(f"{node.name} forgot nothing, and takes no part")
        for node in self.world.nodes.values():
            node.crash()


def run_forgetful(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    return play_out(lambda loop: Forgetful(seed, loop, rules))
