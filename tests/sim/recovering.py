"""A majority of the replicas of some partitions is lost for good while gateways work and partitions move, and these
partitions go on from the disks that are left (``cluster.partitions``, "Recovery").

Two disks lose power at one moment, and never come back. Some time later processes learn, each at another time, of a
layout that calls them lost. The mover is the program's own; nodes die, hang and lose messages meanwhile as in
``moving``.

What is judged of a partition that was recovered
    * Before the loss the history is linearizable, as ever.
    * After it, it is linearizable from what the disks that are left had: of each key the value with the highest ballot
      that one of them had durably, or one that it took later under a ballot of a step from before the recovery (an
      accept that was on its way). It need not have been chosen. What a disk has that had left the partition before may
      come back with it. An older value is a violation, also where the newer
      one was never acknowledged: nothing that is left may be overlooked.
    * An operation that was under way at the loss may have taken effect before it, after it, in both, or never.

Partitions that kept a quorum are judged as ever. At the end all partitions are where the layout wants them, and all
keys can be read, listed and written.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from storaged.cluster.layout import Layout
from storaged.cluster.partitions import PartitionRecord, step_of
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.names import RegisterName, Value
from storaged.meta.store_ports import Slot, StoreBatch
from tests.sim.cluster import DISKS, FIRST_SEEDS, Gateway, StorageNode, Weather, make_layout
from tests.sim.linear import Content, Kind, Operation, linearizable
from tests.sim.listing import LISTED_KEYS, listed_as
from tests.sim.partitions import NAMES, NUMBERS, Movers, Moving
from tests.sim.parts import ClockJumps, HungDisks, Part, Suspensions, Trouble
from tests.sim.scenario import play_out
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts, content_of

LOST = ("d3", "d4")
MOVERS = ("m0", "m1")
LIVES = 3
LEFT = tuple(disk for disk in DISKS if disk not in LOST)


def layouts_of(chance: random.Random) -> list[Layout]:
    """One or two that place replicas on the disks that will be lost, and the one that calls these lost."""
    if chance.random() < 0.7:
        others = [[disk] for disk in chance.sample(LEFT, 2)]  # each set of a joint state has a disk of its own
    else:
        others = [chance.sample(LEFT, chance.choice((1, 2))) for _ in range(chance.choice((1, 2)))]
    found = [_layout(number, {*LOST, *some}) for number, some in enumerate(others, 1)]
    last = _layout(len(found) + 1, set(LEFT))
    remaining = tuple(disk for disk in last.disks if disk.id not in LOST)
    return [*found, msgspec.structs.replace(last, disks=remaining, lost=LOST)]


def _layout(epoch: int, active: set[str]) -> Layout:
    whole = make_layout(epoch, FIRST_SEEDS)
    places = tuple(
        disk if disk.id in active else msgspec.structs.replace(disk, state="draining") for disk in whole.disks
    )
    return msgspec.structs.replace(whole, disks=places, base=1 if epoch > 1 else 0)


class Loss(Part):
    """Two disks are lost at one moment. Layouts become known, the one that calls them lost after it."""

    finishes = True

    def __init__(self, scenario: Recovering, chance: random.Random) -> None:
        super().__init__(scenario, chance)
        self.of = scenario
        self.sound = False

    async def run(self) -> None:
        chance, of = self.chance, self.of
        for layout in of.layouts[1:-1]:
            await asyncio.sleep(chance.uniform(0, 0.1))
            self._announce(layout)
        if chance.random() < 0.3 or not await self._lose_while_joint():
            await asyncio.sleep(chance.uniform(0.05, 0.6))
        of.lose()
        await asyncio.sleep(chance.uniform(0, 0.6))
        if not self.sound:
            self._announce(of.layouts[-1])

    async def _lose_while_joint(self) -> bool:
        """While a partition has two sets, one of its disks that will be left misses what is written just before."""
        for _ in range(100):
            await asyncio.sleep(0.01)
            joint = [
                record for record in self.of.before_loss.values() if (record.partition, record.step) in self.of.joint
            ]
            if joint:
                break
        else:
            return False
        chance, record = self.chance, self.chance.choice(joint)
        disks = {*record.present, *record.coming}.difference(LOST)
        disk = (
            chance.choices(sorted(disks, key=record.coming.__contains__), (3, 1))[0] if len(disks) == 2 else min(disks)
        )
        node = self.world.nodes["n" + disk[1:]]
        await asyncio.sleep(chance.uniform(0, 0.03))
        if node.up:
            self.fault(f"{node.name} died just before")
            node.crash()
        for name in MOVERS if chance.random() < 0.8 else ():
            self.world.stop(name)
        await asyncio.sleep(chance.uniform(0.05, 0.4))
        self.of.lose()
        self.of.restart(node)
        for name in MOVERS:
            self.world.go_on(name)
        return True

    def _announce(self, layout: Layout) -> None:
        self.fault(f"layout {layout.epoch}")
        for name in self.of.known:
            self.world.loop.call_later(self.chance.uniform(0, 0.1), self._learn, name, layout)

    def _learn(self, name: str, layout: Layout) -> None:
        if self.of.known[name].epoch >= layout.epoch:
            return
        self.of.known[name] = layout
        for gateway in self.of.gateways:
            if gateway.name == name:
                gateway.layouts.learn(layout)  # type: ignore[attr-defined]

    async def heal(self) -> None:
        """Before the movers: they go on with the last layout."""
        self.sound = True
        self.of.lose()
        for name in self.of.known:
            self._learn(name, self.of.layouts[-1])


class TroubleAfterIt(Trouble):
    """Before the loss all is well, so that much is written while partitions are joint."""

    async def run(self) -> None:
        while self.scenario.lost_at < 0:  # type: ignore[attr-defined]  # noqa: ASYNC110 - nothing tells when
            await asyncio.sleep(0.05)
        await super().run()


class Recovering(Moving):
    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        self.spread.joins = False
        self.world.on_files = False  # what disks write is watched in memory
        self.layouts = layouts_of(random.Random(f"layouts {seed}"))
        self.layout = self.layouts[-1]
        self.world.epochs = self.layout.epoch
        names = (*self.known, *("n" + disk[1:] for disk in DISKS))
        self.known = dict.fromkeys(names, self.layouts[0])
        self.small_share = 0.0  # copies of small objects are lost with their disks
        self.chosen_may_fall = True
        self.lost_at = self.after_loss = -1
        self.recovered: dict[int, int] = {}
        """By partition: the step of its first record with lost disks."""
        self.before_loss: dict[int, PartitionRecord] = {}
        """By partition: the last one before that, if it has moved at all."""
        self.joint: set[tuple[int, int]] = set()
        """(partition, step) of joint states in which something was written."""
        self.written: dict[tuple[str, RegisterName], list[Slot]] = {}
        """All that each disk was told to write, in order."""
        self.left: dict[tuple[str, RegisterName], Slot] = {}
        """What each disk had durably at the loss."""

    def join_parts(self) -> None:
        chances = {kind: random.Random(f"{kind.__name__} {self.found.seed}") for kind in PARTS}
        self.movers = Movers(self, chances[Movers])
        self.parts = [Loss(self, chances[Loss]), self.movers]
        if self.aside.random() < 0.7:
            self.world.weather = Weather()
            self.parts.insert(0, TroubleAfterIt(self, chances[Trouble]))
        else:
            self.parts.insert(0, Trouble(self, chances[Trouble]))
        for kind in (HungDisks, Suspensions, ClockJumps):
            if kind.joins(self, chances[kind]):
                self.parts.insert(0, kind(self, chances[kind]))
        for node in self.world.nodes.values():
            self._watch(node)

    # --- what disks have

    def _watch(self, node: StorageNode) -> None:
        commit = node.store.commit

        async def watched(batch: StoreBatch) -> None:
            for slot in batch.slots:
                step = step_of(slot.ballot.epoch)
                if step % 2:
                    self.joint.add((slot.name.partition, step))
                self.written.setdefault((node.disk, slot.name), []).append(slot)
            await commit(batch)

        node.store.commit = watched

    def lose(self) -> None:
        if self.lost_at >= 0:
            return
        self.found.faults.append(f"{LOST} are lost")
        for disk in LOST:
            node = self.world.nodes["n" + disk[1:]]
            if node.up:
                node.crash()
        self.lost_at, self.after_loss = self.moment(), self.moment()
        for name in NAMES.values():
            for disk in LEFT:
                slot = self.world.nodes["n" + disk[1:]].store.get(name)
                if slot is not None:
                    self.left[disk, name] = slot

    def restart(self, node: StorageNode) -> None:
        if self.lost_at < 0 or node.disk not in LOST:
            super().restart(node)

    def note_record(self, record: PartitionRecord) -> None:
        number = record.partition
        if not record.lost:
            known = self.before_loss.get(number)
            if number not in self.recovered and (known is None or known.step < record.step):
                self.before_loss[number] = record
        elif number not in self.recovered:
            self.recovered[number] = record.step
            done = self.found.done
            done["recovered"] = len(self.recovered)
            done["recovered joint"] += bool(record.coming)

    def _left_of(self, number: int) -> list[str]:
        """The disks of the partition that are left, of both sets of its state before the recovery."""
        record = self.before_loss.get(number)
        disks = record.present + record.coming if record is not None else self.layouts[0].replicas_of(number)
        return [disk for disk in dict.fromkeys(disks) if disk not in LOST]

    # --- verdicts

    def judge(self) -> Verdicts:
        whole = self.history
        lost = {key for key, name in NAMES.items() if name.partition in self.recovered}
        for key in sorted(lost):
            own = [operation for operation in whole if operation.key == key]
            if not linearizable(self._before(own)):
                self.complain(f"the history of {key} is not linearizable before the loss")
                continue
            after = [*self._returning(key), *self._after(own)]
            if not any(linearizable([self._begin(key, content), *after]) for content in self._had(key)):
                self.complain(f"{key} does not go on from what a disk that is left has: {self._had(key)}")
        self.history = [operation for operation in whole if operation.key not in lost]
        self.prefixes = [seen for seen in self.prefixes if not lost.intersection(LISTED_KEYS)]
        return super().judge()

    def _before(self, own: Sequence[Operation]) -> list[Operation]:
        """What returned later may have taken effect or not."""
        begun = [operation for operation in own if operation.invoked < self.lost_at]
        done = [operation for operation in begun if operation.returned < self.lost_at]
        return [*done, *(_open(operation) for operation in begun if operation.returned > self.lost_at)]

    def _after(self, own: Sequence[Operation]) -> list[Operation]:
        pending = [
            _open(operation)
            for operation in own
            if operation.invoked < self.lost_at and (operation.open or operation.returned > self.lost_at)
        ]
        return [*pending, *(operation for operation in own if operation.invoked > self.lost_at)]

    def _begin(self, key: str, content: Content) -> Operation:
        return Operation(Kind.PUT, key, self.lost_at, new=content, returned=self.after_loss, blind=True)

    def _had(self, key: str) -> list[Content]:
        """What the key may have been after the loss: the newest of the disks that are left, and what they took late."""
        disks = self._left_of(NAMES[key].partition)
        newest = self._newest(key)
        values = [newest.value if newest is not None else None, *(slot.value for slot in self._newer(key, disks))]
        return list(dict.fromkeys(self._seen(key, value) for value in values))

    def _newest(self, key: str) -> Slot | None:
        name = NAMES[key]
        disks = [disk for disk in self._left_of(name.partition) if (disk, name) in self.left]
        return max((self.left[disk, name] for disk in disks), key=lambda slot: slot.ballot, default=None)

    def _newer(self, key: str, disks: Iterable[str]) -> list[Slot]:
        """What these disks were ever told to write that is newer, from before the recovery."""
        name, newest = NAMES[key], self._newest(key)
        step = self.recovered[name.partition]
        slots = [slot for disk in disks for slot in self.written.get((disk, name), ())]
        newer = [slot for slot in slots if newest is None or slot.ballot > newest.ballot]
        return [slot for slot in newer if step_of(slot.ballot.epoch) < step]

    def _returning(self, key: str) -> list[Operation]:
        """What a disk that had left the partition before may bring back."""
        others = set(LEFT).difference(self._left_of(NAMES[key].partition))
        contents = dict.fromkeys(self._seen(key, slot.value) for slot in self._newer(key, sorted(others)))
        return [Operation(Kind.PUT, key, self.lost_at, new=content) for content in contents]

    def _seen(self, key: str, value: Value | None) -> Content:
        return listed_as(value) if key in LISTED_KEYS else content_of(value)

    async def worker(self, gateway: Gateway) -> None:
        """Before, at and after the loss."""
        for _ in range(LIVES):
            await super().worker(gateway)

    async def make_reader(self) -> Gateway:
        reader = await super().make_reader()
        for number in NUMBERS:
            if reader.layouts.partition(number).lost:
                self.complain(f"partition {number} has lost disks at the end")
        return reader


def _open(operation: Operation) -> Operation:
    return replace(operation, returned=-1, observed=None)


PARTS: tuple[Any, ...] = (Loss, Movers, Trouble, HungDisks, Suspensions, ClockJumps)


def run_recovering(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    return play_out(lambda loop: Recovering(seed, loop, rules))
