"""The nemeses of ``layouts``."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING, cast

from msgspec.structs import replace

from storaged.cluster.certificates import is_enough
from storaged.cluster.layout import SYSTEM_PARTITION, Layout
from storaged.cluster.messages import AcceptAnswer, OfferAnswer
from storaged.cluster.partitions import is_settled
from storaged.cluster.signed_layout import Acceptance, SignedLayout
from storaged.cluster.succession import base_after, exchanged_seeds, next_epoch
from storaged.errors import LayoutNotAccepted, LayoutOvertaken, LayoutRefused, NoQuorum, StoragedError
from storaged.maintain.partition_mover import MoverPorts
from storaged.node.accepting import PROMISE_FILE
from storaged.wire import encode
from tests.sim.cluster import StorageNode
from tests.sim.partitions import Mover
from tests.sim.parts import Part
from tests.sim.scenario import Scenario

if TYPE_CHECKING:
    from tests.sim.layouts import LayoutPlay, Process

PATIENCE_S = 60.0
"""Of a sound cluster, until the last layout is in force everywhere and nothing moves."""


def asker_of(node: StorageNode) -> Process:
    return cast("Process", node.asker)  # type: ignore[attr-defined]


class LayoutPart(Part):
    def __init__(self, scenario: Scenario, chance: random.Random) -> None:
        super().__init__(scenario, chance)
        self.of = cast("LayoutPlay", scenario)

    def next_layout(self, process: Process, *, sound: bool = False) -> SignedLayout | None:
        """What an administrator signs there. ``sound``: only what has to be done; None: nothing has."""
        chance, before = self.chance, process.book.current
        moving = True
        lost = [d for d in before.seeds if d in before.seeds_lost or self.world.nodes["n" + d[1:]].foreign]
        if before.seeds_next:
            comes = next(disk for disk in before.seeds_next if disk not in before.seeds)
            back = self.world.nodes["n" + comes[1:]].foreign or (not sound and chance.random() < 0.2)
            seeds = before.seeds if back else before.seeds_next
            wanted = replace(before, seeds=seeds, seeds_next=(), seeds_step=before.seeds_step + 1)
        elif lost or (not sound and chance.random() < 0.5):
            old = lost[0] if lost else chance.choice(before.seeds)
            try:
                seeds = exchanged_seeds(before, old, active(self, before))
            except LayoutRefused:
                return None
            wanted = replace(before, seeds_next=seeds, seeds_step=before.seeds_step + 1)
        elif sound:
            return None
        elif process.name == "a0" and chance.random() < 0.3:  # two of these at once fork the history: a known limit
            moving, node = False, before.nodes[0]
            named = replace(node, address=f"h:{chance.randrange(1000)}")
            wanted = replace(before, nodes=(named, *before.nodes[1:]))
        else:
            draining = [disk for disk in before.disks if disk.state == "draining"]
            others = [disk for disk in before.disks if disk.id not in before.seeds]
            disk = draining[0] if draining else chance.choice(others)
            state = "active" if draining else "draining"
            disks = tuple(replace(other, state=state) if other is disk else other for other in before.disks)
            wanted = replace(before, disks=disks)
        kept = {*wanted.seeds, *wanted.seeds_next}
        return self.of.sign(
            replace(
                wanted,
                seeds_lost=tuple(disk for disk in before.seeds_lost if disk in kept),
                epoch=next_epoch(before.epoch, moving=moving),
                if_out="",
                predecessor=process.book.signed(before.epoch).hash,
                base=base_after(before) if moving else before.base,
            )
        )


def active(part: LayoutPart, layout: Layout) -> Layout:
    """Without the disks that are lost."""
    nodes = part.world.nodes
    return replace(layout, disks=tuple(disk for disk in layout.disks if not nodes["n" + disk.id[1:]].foreign))


class Administrators(LayoutPart):
    """Two of them exchange seed disks and drain others, on gateways that die anywhere."""

    def __init__(self, scenario: Scenario, chance: random.Random) -> None:
        super().__init__(scenario, chance)
        self.applied: list[bytes] = []
        self.overtaken: list[bytes] = []
        self.reason = ""

    async def run(self) -> None:
        await asyncio.gather(*(self._work(name) for name in ("a0", "a1")))

    async def _work(self, name: str) -> None:
        process = self.of.process(name)
        while True:
            await asyncio.sleep(self.chance.uniform(0, 0.2))
            if self.of.resting:
                continue
            limit_s = self.chance.uniform(0.02, 1.0) if self.chance.random() < 0.3 else None
            try:
                async with asyncio.timeout(limit_s):
                    await self.once(process)
            except TimeoutError:
                self.fault(f"{name} died")
                await process.crash()
                await asyncio.sleep(self.chance.uniform(0, 0.1))
                process.start()

    async def once(self, process: Process, *, sound: bool = False) -> None:
        application = process.application(collect_s=self.chance.choice((0.3, 1.5)))
        newest, in_force = await application.newest()
        wanted = self.next_layout(process, sound=sound) if in_force else newest
        if wanted is None:
            return
        try:
            await application.apply(wanted)
        except LayoutOvertaken as error:
            self.fault("a layout was overtaken")
            if "is not used" in error.message:
                self.overtaken.append(wanted.hash)
        except (LayoutNotAccepted, LayoutRefused, NoQuorum) as error:
            self.reason = error.message
        else:
            self.fault(f"layout {self.of.by_hash[wanted.hash].epoch} applied")
            self.applied.append(wanted.hash)

    async def heal(self) -> None:
        process = self.of.process("a9")
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not self._finished():
                    await self.once(process, sound=True)
                    await asyncio.sleep(0.05)
        except TimeoutError:
            if not self.of.register_lies:
                epochs = sorted({process.book.epoch for process in self.of.everybody()})
                self.of.complain(f"layouts do not come into force ({epochs}): {self.reason}")

    def _finished(self) -> bool:
        everybody = self.of.everybody()
        newest = max(everybody, key=lambda process: process.book.epoch)
        same = {process.book.epoch for process in everybody} == {newest.book.epoch}
        if not same:
            return False
        current = newest.book.current
        lost = any(self.world.nodes["n" + disk[1:]].foreign for disk in current.seeds)
        return not current.seeds_next and not lost

    async def judge(self, reader: object) -> None:
        moving = [hash_ for hash_ in self.applied if self.of.by_hash[hash_].epoch % 100 == 0]
        if any(hash_ not in self.of.line for hash_ in moving):
            self.of.complain("a layout that was applied is not in the history")
        if any(hash_ in self.of.line for hash_ in self.overtaken) and not self.of.register_lies:
            self.of.complain("a layout that was overtaken is in the history")


class Movers(LayoutPart):
    """A process moves the partitions of objects, dies, and begins again."""

    def __init__(self, scenario: Scenario, chance: random.Random) -> None:
        super().__init__(scenario, chance)
        self.reason = ""

    async def run(self) -> None:
        process = self.of.process("m0")
        while True:
            limit_s = self.chance.uniform(0.1, 1.5)
            try:
                async with asyncio.timeout(limit_s):
                    await self._move(process)
            except TimeoutError:
                self.fault("m0 died")
                await process.crash()
                await asyncio.sleep(self.chance.uniform(0, 0.1))
                process.start()

    def _mover(self, process: Process) -> Mover:
        from tests.sim.layouts import NUMBERS, Seen, signed_record

        ports = MoverPorts(
            process.book,
            process.client,
            process.scanner,
            process.client,
            process.client.moves,
            Seen(self.world, self.chance),
            process.clock,
            signed_record,
            process.follower.refresh,
        )
        return Mover(ports, lost_s=self.chance.choice((0.3, 5.0)), partitions=NUMBERS)

    async def _move(self, process: Process) -> None:
        mover = self._mover(process)
        try:
            while True:
                await mover.round()
                await asyncio.sleep(self.chance.uniform(0.01, 0.05))
        finally:
            self.of.found.done["steps"] += mover.progress.steps
            self.reason = mover.progress.reason or self.reason

    async def heal(self) -> None:
        from tests.sim.layouts import NUMBERS

        process = self.of.process("m9")
        task = self.world.loop.create_task(self._move(process))
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not self._settled(process, NUMBERS):  # noqa: ASYNC110  (virtual time)
                    await asyncio.sleep(0.05)
        except TimeoutError:
            if not self.of.register_lies:
                self.of.complain(f"partitions do not reach their places: {self.reason}")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def _settled(self, process: Process, numbers: list[int]) -> bool:
        book = process.book
        behind = book.epoch < max(other.book.epoch for other in self.of.everybody())
        if behind or (not book.partitions.complete and book.current.base):
            return False
        gone = {disk for disk in book.current.disk_by_id if self.world.nodes["n" + disk[1:]].foreign}
        states = [book.partition(number) for number in numbers]
        return all(
            is_settled(state, book.current)
            or (not state.coming and gone & {*book.current.replicas_of(state.partition)} - {*state.present})
            for state in states
        )


class Forger(LayoutPart):
    """Has layouts that an administrator signed and that nobody accepted. Offers them to everybody, asks nodes to accept
    them, and uses the acceptances that it gets.
    """

    @classmethod
    def joins(cls, scenario: Scenario, chance: random.Random) -> bool:
        return chance.random() < 0.4

    async def run(self) -> None:
        process = self.of.process("f0")
        given: dict[bytes, dict[str, Acceptance]] = {}
        known: list[SignedLayout] = []
        while True:
            await asyncio.sleep(self.chance.expovariate(1 / 0.04))
            if not known or self.chance.random() < 0.15:
                if (signed := self.next_layout(process)) is not None and self.of.by_hash[signed.hash].base:
                    known.append(signed)
                continue
            with contextlib.suppress(StoragedError):
                decided = await process.application().newest()
                await self._use(process, self.chance.choice([*known, decided[0]]), given)

    async def _use(self, process: Process, signed: SignedLayout, given: dict[bytes, dict[str, Acceptance]]) -> None:
        layout, node = self.of.by_hash[signed.hash], "n" + str(self.chance.randrange(5))
        before = self.of.by_hash.get(layout.predecessor)
        found = given.setdefault(signed.hash, {})
        if self.chance.random() < 0.5:
            answer, _ = await process.caller.call(node, "cluster.accept", signed, AcceptAnswer, timeout_s=0.5)
            found[node] = answer.acceptance
        elif found and before is not None and is_enough(before, layout, found):
            certified = replace(signed, certificate=tuple(found[name] for name in sorted(found)))
            await process.caller.call(node, "cluster.offer", certified, OfferAnswer, timeout_s=0.5)
        else:
            some = replace(signed, certificate=tuple(found.values()))
            await process.caller.call(node, "cluster.offer", some, OfferAnswer, timeout_s=0.5)


class Register(LayoutPart):
    """A gateway writes the register of the layout as it likes."""

    @classmethod
    def joins(cls, scenario: Scenario, chance: random.Random) -> bool:
        return chance.random() < 0.15

    async def run(self) -> None:
        self.of.register_lies = True
        self.fault("the register of the layout changes at will")
        process = self.of.process("l0")
        while True:
            await asyncio.sleep(self.chance.expovariate(1 / 0.1))
            signed = self.next_layout(process)
            known = [process.book.signed(layout.epoch) for layout in process.book.earlier()]
            written = self.chance.choice([each for each in (signed, *known) if each is not None] or [self.of.signed])
            with contextlib.suppress(StoragedError):
                await process.paths.write("layout", encode(written))


class LostPromises(LayoutPart):
    """A node loses what it promised. Not where the register lies: then two things went wrong."""

    @classmethod
    def joins(cls, scenario: Scenario, chance: random.Random) -> bool:
        lies = any(isinstance(part, Register) for part in scenario.parts)
        return not lies and chance.random() < 0.3

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self.chance.expovariate(1 / 0.2))
            node = "n" + str(self.chance.randrange(5))
            self.fault(f"{node} lost what it accepted")
            (self.of.directory(node) / PROMISE_FILE).unlink(missing_ok=True)


class LostDisk(LayoutPart):
    """A disk is lost for good in the middle of it: mostly one with a replica of the system partition."""

    finishes = True

    @classmethod
    def joins(cls, scenario: Scenario, chance: random.Random) -> bool:
        return chance.random() < 0.25

    async def run(self) -> None:
        await asyncio.sleep(self.chance.uniform(0, 0.8))
        current = self.of.everybody()[-1].book.partition(SYSTEM_PARTITION)
        disk = self.chance.choice((*current.disks, "d4"))
        node = self.world.nodes["n" + disk[1:]]
        if node.up:
            node.crash()
        node.blank_disk()
        node.start()
        self.fault(f"the disk of {node.name} is lost")


PARTS: tuple[type[LayoutPart], ...] = (Administrators, Movers, Forger, Register, LostPromises, LostDisk)
