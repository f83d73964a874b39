"""Small copies that are lost, that can't be read, and that come late.

In most runs one disk loses copies, or can never read them again. Those of the others can't be read for a while, at
times on all disks together, or they come late. What was acknowledged is whole somewhere then: in the end every key can
be read, and no object ever counts as damaged. In the other runs every disk loses copies: objects may be damaged for
good, but nothing that was acknowledged is undone.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING

from storaged.errors import OutcomeUnknown, StoragedError
from storaged.meta import messages
from storaged.meta.consensus.register import Verdict, created
from storaged.meta.names import Ballot, RegisterName, Value, Visibility
from storaged.meta.ports import SmallCopies
from tests.sim.cluster import Gateway
from tests.sim.linear import Kind, Operation
from tests.sim.parts import BitFlips, DiskFaults, Part
from tests.sim.workload import content_of, put

if TYPE_CHECKING:
    from tests.sim.cluster import StorageNode
    from tests.sim.scenario import Scenario

HANGS_S = 5.0
"""A read that takes longer than anybody waits for it."""


class LostCopies(Part):
    def __init__(self, scenario: Scenario, chance: random.Random) -> None:
        super().__init__(scenario, chance)
        scenario.copies_may_be_lost = chance.random() < 0.25
        scenario.small_share = 0.7
        self.rotten = self.replica_node()
        self._for_ever: set[bytes] = set()

    @classmethod
    def joins(cls, scenario: Scenario, chance: random.Random) -> bool:
        others_lose = any(isinstance(part, BitFlips | DiskFaults) for part in scenario.parts)
        alone = not (scenario.disks_may_be_swapped or scenario.moves or others_lose)
        return scenario.of_objects and alone and chance.random() < 0.6

    async def run(self) -> None:
        chance = self.chance
        self.fault(f"copies are lost at {'all disks' if self.scenario.copies_may_be_lost else self.rotten.name}")
        while True:
            await asyncio.sleep(chance.expovariate(1 / 0.02))
            node = self.replica_node()
            copies = list(node.payloads.synced)[-4:]
            if not copies:
                continue
            data_id, kind = chance.choice(copies), chance.random()
            nodes = [node] if chance.random() < 0.4 else list(self.world.nodes.values())
            if kind < 0.3:
                self._lose(node if self.scenario.copies_may_be_lost else self.rotten, data_id)
            elif kind < 0.75:
                self._hide(nodes, data_id)
            else:
                self._delay(nodes, data_id)

    def _lose(self, node: StorageNode, data_id: bytes) -> None:
        self.world.note("lost", node.name, data_id)
        if self.chance.random() < 0.7:
            node.payloads.lost.add(data_id)
        else:
            node.payloads.unreadable[data_id] = 0.0
            self._for_ever.add(data_id)

    def _hide(self, nodes: list[StorageNode], data_id: bytes) -> None:
        after_s, seconds = self.chance.choice((0.0, 0.0, HANGS_S)), self.chance.choice((0.05, 0.3, 1.5))
        self.world.note("unreadable", [node.name for node in nodes], data_id)
        for node in nodes:
            node.payloads.unreadable.setdefault(data_id, after_s)
        self.world.loop.call_later(seconds, self._show, nodes, data_id)

    def _show(self, nodes: list[StorageNode], data_id: bytes) -> None:
        for node in nodes:
            if data_id not in self._for_ever or (node is not self.rotten and not self.scenario.copies_may_be_lost):
                node.payloads.unreadable.pop(data_id, None)

    def _delay(self, nodes: list[StorageNode], data_id: bytes) -> None:
        self.world.note("late", [node.name for node in nodes], data_id)
        for node in nodes:
            node.payloads.late[data_id] = self.chance.choice((0.02, 0.2, 0.6))

    async def heal(self) -> None:
        for node in self.world.nodes.values():
            node.payloads.late.clear()
            for data_id in list(node.payloads.unreadable):
                self._show([node], data_id)


class HalfWrites(Part):
    """Gateways that die in the middle of a write: a majority has promised, the accept reaches one disk or two."""

    async def run(self) -> None:
        chance, scenario, count = self.chance, self.scenario, 0
        while True:
            await asyncio.sleep(chance.expovariate(1 / 0.04))
            count += 1
            key = chance.choice(list(scenario.names))
            if chance.random() < 0.2:
                await self._write_slowly(key, count)
            else:
                await self._die(key, count, lost=chance.random() < 0.4)

    async def _die(self, key: str, count: int, *, lost: bool) -> None:
        writer = Gateway(self.world, f"half{count}", self.scenario.layout)
        operation = Operation(Kind.PUT, key, self.scenario.moment(), new=b"half %s %d" % (key.encode(), count))
        try:
            if await self._write(writer, self.scenario.names[key], operation, lost):
                self.fault(f"{writer.name} died")
        finally:
            await writer.client.close()

    async def _write_slowly(self, key: str, count: int) -> None:
        """A writer is cut off when one disk has its accept, another dies, somebody reads, and the first goes on."""
        scenario, world, name = self.scenario, self.world, self.scenario.names[key]
        slow, content = Gateway(world, f"slow{count}", scenario.layout), b"slow %s %d" % (key.encode(), count)
        operation = Operation(Kind.PUT, key, scenario.moment(), new=content)
        scenario.history.append(operation)
        data_id = self.chance.randbytes(16)
        scenario.copied[data_id] = content
        small = SmallCopies(data_id, [(data_id, [content])] * len(scenario.layout.seeds), lambda disks: len(disks) >= 2)
        writing = world.loop.create_task(slow.client.change(name, put(content, data_id), small=small))
        try:
            if await self._taken(name, content):
                world.cut |= {slow.name}
                await self._die(key, count, lost=True)
                with contextlib.suppress(StoragedError):
                    await self.chance.choice(scenario.gateways).client.read(name)
                world.cut -= {slow.name}
            outcome = await writing
            operation.observed, operation.returned = content_of(outcome.before), scenario.moment()
        except OutcomeUnknown:
            pass
        except StoragedError:
            scenario.history.remove(operation)
        finally:
            writing.cancel()
            await slow.client.close()

    async def _taken(self, name: RegisterName, content: bytes) -> bool:
        """Whether a single disk takes the value before others do, and not the one that loses its copies."""
        for _ in range(100):
            await asyncio.sleep(0.0005)
            slots = {node: node.store.get(name) for node in self.world.nodes.values() if node.up}
            holders = [node for node, slot in slots.items() if slot is not None and slot.value.body == content]
            if holders:
                return len(holders) == 1 and holders[0] is not self._rotten
        return False

    @property
    def _rotten(self) -> StorageNode:
        return next(part.rotten for part in self.scenario.parts if isinstance(part, LostCopies))

    async def _write(self, writer: Gateway, name: RegisterName, operation: Operation, lost: bool) -> bool:
        """Whether it was begun: its outcome is unknown then. ``lost``: the disk that takes it loses its copy."""
        chance, disks = self.chance, list(self.scenario.layout.seeds)
        chance.shuffle(disks)
        counter = writer.clock.wall_ms() * 1000
        for _ in range(3):
            ballot = Ballot(self.scenario.layout.epoch, counter, writer.name, chance.randbytes(8))
            promises: dict[str, messages.PrepareReply] = {}
            for disk in disks[: len(disks) // 2 + 1]:
                with contextlib.suppress(StoragedError):
                    request = messages.Prepare(disk, name, ballot)
                    reply = await writer.directory.replica(disk).prepare(request, timeout_s=0.1)
                    counter = max(counter, reply.promised.counter + 1)
                    if reply.verdict == Verdict.OK:
                        promises[disk] = reply
            if 2 * len(promises) > len(disks):
                break
        else:
            return False
        newest = max(promises.values(), key=lambda reply: reply.accepted).value
        sequence = 1 + max((reply.value.sequence for reply in promises.values() if reply.value), default=0)
        if newest is not None and may_be_overtaken(newest):
            return False
        data_id, content = chance.randbytes(16), operation.new or b""
        self.scenario.copied[data_id] = content
        value = Value(sequence, chance.randbytes(14) + b"\0\1", Visibility.LIVE, content, data_id)
        self.scenario.history.append(operation)
        for disk in [self._rotten.disk] if lost else chance.sample(disks, chance.choice((1, 1, 1, 2))):
            accept = messages.Accept(disk, name, ballot, value, header=data_id)
            with contextlib.suppress(StoragedError):
                await writer.directory.replica(disk).accept(accept, (content,), timeout_s=0.1)
        if lost:
            self._rotten.payloads.lost.add(data_id)
        elif chance.random() < 0.5:
            self._hide_new(data_id)
        return True

    def _hide_new(self, data_id: bytes) -> None:
        for node in self.world.nodes.values():
            node.payloads.unreadable[data_id] = 0.0
        self.world.loop.call_later(self.chance.choice((0.1, 1.0)), self._show_new, data_id)

    def _show_new(self, data_id: bytes) -> None:
        for node in self.world.nodes.values():
            node.payloads.unreadable.pop(data_id, None)

    async def heal(self) -> None:
        """``LostCopies`` does."""


def may_be_overtaken(value: Value) -> bool:
    """A value that a proposer carries on with another sequence: the half writer here does not know how."""
    return created(value)
