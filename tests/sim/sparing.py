"""Disks go out and come back while partitions move: the nemesis of ``cluster.sparing`` in the play ``moving``.

The gateway's side is the program's own (``node.sparing_duty``), and so is how a node counts what it has seen. Votes are
not signed here: no process of this play forges one. Two kinds of verdict are wrong. All nodes may see a disk away that
is not: then a majority puts it out, and what it has goes on being written meanwhile. Or fewer nodes than a majority see
it: then nobody may put it out. Movers die while disks are out, and each process learns of the record at another time.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING, Any

from storaged.cluster.layout import Sparing as Policy
from storaged.cluster.ports import Call, Method
from storaged.cluster.sparing import PATH, UNREACHABLE, DisksOut, Opinion, SignedVote, Vote, VoteAsk
from storaged.errors import StoragedError
from storaged.meta.names import Change, system_name
from storaged.node.sparing import DiskTimes
from storaged.node.sparing_duty import SparingDuty, SparingPorts
from storaged.wire import decode, encode
from tests.sim.cluster import DISKS
from tests.sim.parts import Part

if TYPE_CHECKING:
    from tests.sim.partitions import Moving, Process

HASTE = 20.0
"""Delays count whole seconds, and a run lasts one or two: here time goes faster."""
POLICY = Policy(fragments_s=1, registers_s=2, domains_max=2)
MAJORITY = len(DISKS) // 2 + 1
"""Counted here again, apart from the program."""


class HastyClock:
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def monotonic(self) -> float:
        return float(self._inner.monotonic() * HASTE)

    def wall_ms(self) -> int:
        return int(self._inner.wall_ms())


class Paths:
    """``node.system.SystemPaths``, as far as it is needed."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def replace(self, path: str, choose: Any) -> bytes | None:
        def update(value: Any) -> Change | None:
            body = choose(value.body if value is not None and value.body else None)
            return None if body is None else Change(body)

        after = (await self._process.client.change(system_name(path), update)).after
        return after.body if after is not None else None


class Sparing(Part):
    """It joins half of the runs, and draws nothing in the others."""

    def __init__(self, scenario: Moving, chance: random.Random) -> None:
        super().__init__(scenario, chance)
        self.of: Moving = scenario
        self.sound = False
        self.blind: dict[str, str] = {}
        """Node -> the disk that it wrongly sees away."""
        self.clock = HastyClock(_Loop(scenario.world.loop))
        self.times = {
            name: DiskTimes(scenario, self._why(name), self.clock)  # type: ignore[arg-type]  # of layouts, it uses current
            for name in (*scenario.world.nodes, "m0", "m1", "m9")
        }
        self.went_out = self.came_back = 0

    @classmethod
    def joins(cls, scenario: Any, chance: random.Random) -> bool:
        return chance.random() < 0.5

    def _why(self, name: str) -> Any:
        def why_away(disk: str) -> str:
            down = not self.world.nodes["n" + disk[1:]].up
            return UNREACHABLE if down or self.blind.get(name) == disk else ""

        return why_away

    # --- nodes

    def methods_of(self, name: str) -> dict[str, Method]:
        """What a storage node serves more."""

        async def vote(ask: VoteAsk, _call: Call) -> SignedVote:
            seen = self.times[name].seen()
            opinions = tuple(seen[disk] for disk in ask.disks if disk in seen)
            return SignedVote(encode(Vote("sim", name, self.of.layout.epoch, ask.nonce, opinions)), b"", b"")

        return {"cluster.vote": Method(VoteAsk, vote)}

    async def run(self) -> None:
        """What nodes see, right and wrong."""
        chance = self.chance
        looking = asyncio.create_task(self._look())
        try:
            while True:
                await asyncio.sleep(chance.uniform(0, 0.3))
                disk = chance.choice(DISKS)
                names = [*self.world.nodes, "m0", "m1"]
                who = names if chance.random() < 0.7 else ["m0", *chance.sample(sorted(self.world.nodes), MAJORITY - 1)]
                self.blind = dict.fromkeys(who, disk)
                self.fault(f"{len(who)} see {disk} away")
                await asyncio.sleep(chance.uniform(0.05, 0.6))
                self.blind = {}
        finally:
            looking.cancel()

    async def _look(self) -> None:
        while True:
            for times in self.times.values():
                times.seen()
            await asyncio.sleep(0.02)

    async def heal(self) -> None:
        self.sound, self.blind = True, {}

    # --- movers

    async def turn(self, process: Process) -> None:
        """What a gateway does now and then besides moving. It dies anywhere in it."""
        chance = self.chance
        with contextlib.suppress(StoragedError):
            if self.sound or chance.random() < 0.3:
                await self.read(process)
            if self.sound or chance.random() < 0.5:
                before = process.layouts.partitions.out.disks
                await SparingDuty(self._ports(process)).once()
                after = process.layouts.partitions.out.disks
                self.went_out += len(after - before)
                self.came_back += len(before - after)

    def _ports(self, process: Process) -> SparingPorts:
        return SparingPorts(
            process.layouts,
            process.caller,
            Paths(process),
            process.clock,
            lambda signed: decode(signed.payload, Vote),
            self._seen(process),
            lambda: self.read(process),
            lambda record: record,
            self.chance.randbytes,
            lambda before, after: None,
        )

    def _seen(self, process: Process) -> Any:
        def seen() -> dict[str, Opinion]:
            self.world.note("seen", process.name)
            return self.times[process.name].seen()

        return seen

    async def read(self, process: Process) -> None:
        value = (await process.client.read(system_name(PATH))).value
        if value is not None and value.body:
            record = decode(value.body, DisksOut)
            self._judge_record(record)
            process.layouts.partitions.note_out(record)

    async def ended(self, process: Process) -> bool:
        """Whether no disk is out any more, as far as a quorum knows, but one that is lost for good."""
        await self.read(process)
        return not any(self.world.nodes["n" + disk[1:]].up for disk in process.layouts.partitions.out.disks)

    def _judge_record(self, record: DisksOut) -> None:
        votes = [decode(signed.payload, Vote) for signed in record.votes]
        for entry in record.out:
            said: dict[bytes, set[str]] = {}
            for vote in votes:
                for opinion in vote.opinions:
                    if opinion.disk == entry.disk and opinion.state and opinion.for_s >= POLICY.registers_s:
                        said.setdefault(vote.nonce, set()).add(vote.node)
            if max(map(len, said.values()), default=0) < MAJORITY:
                self.of.complain(f"disk {entry.disk} is out by the votes of {sorted(map(sorted, said.values()))}")


class _Loop:
    def __init__(self, loop: Any) -> None:
        self._loop = loop

    def monotonic(self) -> float:
        return float(self._loop.time())

    def wall_ms(self) -> int:
        return int(self._loop.time() * 1000)
