"""Seed disks go out, and the system partition leaves them by layouts that were signed beforehand.

The play ``layouts`` without an administrator who helps. Gateways decide which disks are out, and apply such layouts:
the program's own ``SparingDuty`` and ``SystemSparing``, on processes that die anywhere. Votes are signed and verified.
Servers with a seed disk stop for a while, two of them at once, or for good; all nodes, or fewer than a majority, see a
sound disk away; the disk that comes dies before the exchange has ended. In some runs administrators bring layouts of
their own into force meanwhile, or a gateway uses layouts that were signed beforehand as it likes: without votes, with
those of others, with votes of an earlier loss.

What must hold, besides what the play ``layouts`` wants:

* A layout that was signed for the loss of a disk comes into force only where a majority of the nodes has voted, since
  the last layout that moved data, that it has been away for long enough.
* Once nothing fails any more but what is lost for good, all seed disks live again, without an administrator as long as
  there is a layout for the case. Then another server may stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

from msgspec.structs import replace

from storaged.cluster.certificates import is_enough, seed_nodes
from storaged.cluster.layout import Layout
from storaged.cluster.layout import Sparing as Policy
from storaged.cluster.messages import AcceptAnswer, OfferAnswer
from storaged.cluster.ports import Call
from storaged.cluster.presigned import layout_after, presign, spares_of
from storaged.cluster.signed_layout import Acceptance, Presigned, SignedLayout
from storaged.cluster.sparing import PATH, UNREACHABLE, DisksOut, SignedVote, Vote, VoteAsk
from storaged.cluster.votes import check_votes, verify_vote
from storaged.errors import StoragedError, VoteRefused
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.consensus.register import RULES, Rules
from storaged.node.sparing import DiskTimes, Voter
from storaged.node.sparing_duty import SparingDuty, SparingPorts
from storaged.node.system_move import SystemMove
from storaged.node.system_sparing import SystemSparing, SystemSparingPorts
from storaged.wire import decode, encode
from tests.sim.cluster import DISKS, Gateway, StorageNode
from tests.sim.layout_parts import Administrators, Forger, LayoutPart, LostPromises, Movers
from tests.sim.layouts import CLUSTER, SYSTEM_KEYS, LayoutPlay, Node, Process, play_layouts
from tests.sim.parts import Part
from tests.sim.sparing import MAJORITY, HastyClock
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts, put

PATIENCE_S = 60.0
LOOK_S = 0.02


def policy_of(chance: random.Random) -> Policy:
    return Policy(fragments_s=1, registers_s=2, domains_max=chance.choice((1, 1, 2)))


class SpareProcess(Process):
    """One that watches disks, and reads which are out."""

    play: SparePlay

    def start(self) -> None:
        super().start()
        self.times = DiskTimes(self.book, self.play.why_away(self.name), self.play.haste)
        self.begin(self._follow_out())
        self.sparing, self.system = self._duties()

    async def _follow_out(self) -> None:
        while True:
            await asyncio.sleep(self.chance.uniform(0.05, 0.3))
            with contextlib.suppress(StoragedError):
                await self.read_out()

    async def read_out(self) -> None:
        body = await self.paths.read(PATH)
        record = decode(body, DisksOut) if body is not None else None
        if record is not None and record.number > self.book.partitions.out.number:
            with contextlib.suppress(VoteRefused):
                check_votes(record, self.book.at, self.play.authority.certificate, CLUSTER)
                self.book.partitions.note_out(record)

    def verify(self, signed: SignedVote) -> Vote:
        return verify_vote(signed, self.book.at, self.play.authority.certificate, CLUSTER)

    def _duties(self) -> tuple[SparingDuty, SystemSparing]:
        play, seen = self.play, self.times.seen
        clock: Any = self.clock

        def nothing(*_: object) -> None: ...

        random_bytes = self.chance.randbytes
        sparing = SparingDuty(
            SparingPorts(
                self.book,
                self.caller,
                self.paths,
                clock,
                self.verify,
                seen,
                self.read_out,
                lambda record: record,
                random_bytes,
                nothing,
            )
        )
        system = SystemSparing(
            SystemSparingPorts(
                self.book,
                self.application(collect_s=self.chance.choice((0.3, 1.5))),
                sparing.ask,
                lambda disk: not play.why_away(self.name)(disk),
                SystemMove(self.book, self.name, {}, self.scanner).may_settle,
                nothing,
            )
        )
        return sparing, system


class SpareNode(Node):
    """A storage node that votes."""

    play: SparePlay

    def serve(self, local: dict[str, LocalReplica]) -> None:
        super().serve(local)
        play, asker = self.play, self.asker
        asker.times = DiskTimes(asker.book, play.why_away(self.name), play.haste)  # type: ignore[attr-defined]
        asker.begin(SpareProcess._follow_out(cast(SpareProcess, asker)))
        asker.read_out = lambda: SpareProcess.read_out(cast(SpareProcess, asker))  # type: ignore[attr-defined]
        voter = Voter(lambda: play.identity(self.name), asker.book, asker.times)  # type: ignore[attr-defined]
        method = voter.methods()["cluster.vote"]

        async def vote(ask: VoteAsk, call: Call) -> Any:
            found: Any = await method.handler(ask, call)
            play.note_vote(decode(found.payload, Vote))
            return found

        self.methods = {**self.methods, "cluster.vote": method._replace(handler=vote)}


class SparePlay(LayoutPlay):
    node_kind = SpareNode

    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        self.haste: Any = HastyClock(_Loop(loop))
        self.blind: dict[str, str] = {}
        """Process -> the disk that it wrongly sees away."""
        self.off: set[str] = set()
        """Nodes that are lost for good."""
        self.said: dict[tuple[str, int, bytes], set[str]] = defaultdict(set)
        self.voted: set[tuple[str, int]] = set()
        """(disk, epoch): a majority of the nodes has voted in one round that it is out."""
        super().__init__(seed, loop, rules)
        self.world.on_files = False
        self.operations *= 2
        self.layout = replace(self.layout, sparing=policy_of(random.Random(f"policy {seed}")))
        self.signed = self.sign(self.layout)

    # --- layouts

    def sign(self, layout: Layout) -> SignedLayout:
        signed = super().sign(layout)
        signed = replace(signed, following=presign(signed, self.authority.administration.sign))
        self._note(signed, signed.following)
        return signed

    def _note(self, before: SignedLayout, following: tuple[Presigned, ...]) -> None:
        for step in following:
            after = layout_after(before, step)
            self.by_hash[after.hash] = decode(after.payload, Layout)
            self._note(after, step.following)

    def in_force(self, name: str, book: Any, layout: Layout) -> None:
        super().in_force(name, book, layout)
        if layout.if_out:
            self.found.done["spared"] += 1
            before = self.by_hash[layout.predecessor]
            since = before.epoch // 100 * 100
            if not any(disk == layout.if_out and epoch >= since for disk, epoch in self.voted):
                self.complain(f"{name} uses layout {layout.epoch}, and no majority has voted {layout.if_out} out")

    # --- votes, counted here again

    def note_vote(self, vote: Vote) -> None:
        for opinion in vote.opinions:
            if opinion.state and opinion.for_s >= self.layout.sparing.registers_s:
                said = self.said[opinion.disk, vote.epoch, vote.nonce]
                said.add(vote.node)
                if len(said) >= MAJORITY:
                    self.voted.add((opinion.disk, vote.epoch))

    def why_away(self, name: str) -> Callable[[str], str]:
        def why(disk: str) -> str:
            down = not self.world.nodes["n" + disk[1:]].up
            return UNREACHABLE if down or self.blind.get(name) == disk else ""

        return why

    # --- the run

    def restart(self, node: StorageNode) -> None:
        if node.name not in self.off:
            super().restart(node)

    def part_kinds(self) -> tuple[type[Part], ...]:
        return Outages, Presigner, Sometimes, Movers, Forger, LostPromises

    def process(self, name: str, **options: Any) -> Process:
        found = SpareProcess(self, name, **options)
        self.processes.append(found)
        return found


class _Loop:
    def __init__(self, loop: Any) -> None:
        self._loop = loop

    def monotonic(self) -> float:
        return float(self._loop.time())

    def wall_ms(self) -> int:
        return int(self._loop.time() * 1000)


class Sometimes(Administrators):
    """Administrators of other things meanwhile."""

    @classmethod
    def joins(cls, scenario: Any, chance: random.Random) -> bool:
        return chance.random() < 0.5

    async def heal(self) -> None:
        """``Outages`` looks after that."""


class Outages(LayoutPart):
    """Nodes with seed disks stop, and are seen away. Two gateways do what is due, and die."""

    def __init__(self, scenario: Any, chance: random.Random) -> None:
        super().__init__(scenario, chance)
        self.play = cast(SparePlay, scenario)
        self.administrators = Administrators(scenario, chance)
        self.may_lose = chance.random() < 0.6
        self.healing: list[asyncio.Task[None]] = []
        self.reason = ""
        self.helped = 0

    async def run(self) -> None:
        looking = self.world.loop.create_task(self._look())
        try:
            await asyncio.gather(self._nemesis(), *(self._work(name) for name in ("s0", "s1")))
        finally:
            looking.cancel()

    async def _look(self) -> None:
        while True:
            for process in self.of.everybody():
                if hasattr(process, "times"):
                    process.times.seen()
            await asyncio.sleep(LOOK_S)

    # --- what fails

    async def _nemesis(self) -> None:
        chance = self.chance
        while True:
            await asyncio.sleep(chance.uniform(0.1, 0.5))
            current = self._newest().book.current
            disks = [*dict.fromkeys((*current.seeds, *current.seeds_next))]
            if chance.random() < 0.25:
                await self._wrong(chance.choice((*disks, *DISKS)))
                continue
            down = chance.sample(disks, 2) if chance.random() < 0.2 else [chance.choice(disks)]
            for disk in down:
                self._stop(disk)
            if self.may_lose and len(down) == 1 and chance.random() < 0.5:
                self._lose(down[0])
            await asyncio.sleep(chance.choice((0.05, 0.3, 0.8, 1.5)))
            for disk in down:
                self.play.restart(self._node(disk))

    def _newest(self) -> Process:
        return max(self.of.everybody(), key=lambda process: process.book.epoch)

    def _node(self, disk: str) -> StorageNode:
        return self.world.nodes["n" + disk[1:]]

    def _stop(self, disk: str) -> None:
        if self._node(disk).up:
            self._node(disk).crash()
            self.fault(f"{disk} stopped")

    def _lose(self, disk: str) -> None:
        node = self._node(disk)
        if not node.up:
            self.may_lose = False
            node.blank_disk()
            node.foreign = True
            self.play.off.add(node.name)
            self.fault(f"{disk} is lost for good")

    async def _wrong(self, disk: str) -> None:
        names = [process.name for process in self.of.everybody()]
        nodes = sorted(self.world.nodes)
        few = ["s0", "s1", *self.chance.sample(nodes, MAJORITY - 1)]
        who = names if self.chance.random() < 0.7 else few
        self.play.blind = dict.fromkeys(who, disk)
        self.fault(f"{len(who)} see {disk} away")
        await asyncio.sleep(self.chance.uniform(0.05, 0.8))
        self.play.blind = {}

    # --- what gateways do

    async def _work(self, name: str) -> None:
        process = cast(SpareProcess, self.of.process(name))
        while True:
            await asyncio.sleep(self.chance.uniform(0, 0.1))
            limit_s = self.chance.uniform(0.02, 1.0) if self.chance.random() < 0.2 else None
            try:
                async with asyncio.timeout(limit_s):
                    await self._once(process)
            except TimeoutError:
                self.fault(f"{name} died")
                await process.crash()
                await asyncio.sleep(self.chance.uniform(0, 0.1))
                process.start()

    async def _once(self, process: SpareProcess) -> None:
        for duty in (process.sparing, process.system):
            try:
                await duty.once()
            except (StoragedError, TimeoutError) as error:
                self.reason = f"{type(duty).__name__}: {error}"
            else:
                self.reason = duty.reason or self.reason

    # --- all is well but what is lost for good

    async def heal(self) -> None:
        self.play.blind = {}
        process = cast(SpareProcess, self.of.process("s9"))
        self.healing = [self.world.loop.create_task(work) for work in (self._look(), self._go_on(process))]
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not self._finished() or not await self._nothing_pending(process):
                    await self._help(process)
                    await asyncio.sleep(0.05)
        except TimeoutError:
            if not self.of.register_lies:
                self.of.complain(f"not all seed disks live again: {self.reason}; {self.administrators.reason}")
        if self.helped:
            self.of.found.done["helped"] += 1

    async def _go_on(self, process: SpareProcess) -> None:
        while True:
            await asyncio.sleep(0.05)
            await self._once(process)

    async def _help(self, process: Process) -> None:
        """An administrator is needed where he has begun an exchange, and where all that was signed has been used."""
        current = process.book.current
        signed = process.book.signed(current.epoch)
        lost = [seed for seed in current.seeds if self._node(seed).foreign]
        spares = spares_of(signed)
        begun = current.seeds_next and not current.if_out
        used = not current.seeds_next and any(
            all(self._node(disk).foreign for disk in spares.get(seed, ())) for seed in lost
        )
        undecided = not (await process.application().newest())[1] if begun or used else False
        if begun or used or undecided:
            self.helped += 1
            await self.administrators.once(process, sound=True)

    async def _nothing_pending(self, process: Process) -> bool:
        """No layout that was signed beforehand is decided and not in force: nobody could decide another one."""
        newest, in_force = await process.application().newest()
        return in_force or self.of.register_lies or not self.of.by_hash[newest.hash].if_out

    def _finished(self) -> bool:
        everybody = self.of.everybody()
        newest = self._newest().book
        if {process.book.epoch for process in everybody} != {newest.epoch}:
            return False
        current = newest.current
        return not current.seeds_next and all(self._node(disk).up for disk in current.seeds)

    async def judge(self, reader: Gateway) -> None:
        """One more server stops."""
        for task in self.healing:
            task.cancel()
        await asyncio.gather(*self.healing, return_exceptions=True)
        if self.of.register_lies or self.of.found.violation:
            return
        seed = self.chance.choice(self._newest().book.current.seeds)
        self._node(seed).crash()
        await asyncio.sleep(0.1)
        for key in SYSTEM_KEYS:
            try:
                await reader.client.read(self.of.names[key])
                await reader.client.change(self.of.names[key], put(b"after all", b""))
            except StoragedError as error:
                self.of.complain(f"{key} is out of reach while {seed} is away: {error!r}")
        self.of.restart(self._node(seed))


class Presigner(LayoutPart):
    """A gateway uses what was signed beforehand as it likes: it writes the register, and asks nodes to accept."""

    @classmethod
    def joins(cls, scenario: Any, chance: random.Random) -> bool:
        return chance.random() < 0.25

    async def run(self) -> None:
        self.of.register_lies = True
        self.fault("a gateway uses what was signed beforehand as it likes")
        process = cast(SpareProcess, self.of.process("p0"))
        known: list[SignedVote] = []
        while True:
            await asyncio.sleep(self.chance.expovariate(1 / 0.1))
            with contextlib.suppress(StoragedError, VoteRefused):
                await self._once(process, known)

    async def _once(self, process: SpareProcess, known: list[SignedVote]) -> None:
        current = process.book.current
        signed = process.book.signed(current.epoch)
        if not signed.following:
            return
        step = self.chance.choice(signed.following)
        votes = await process.sparing.ask(current, (step.out,)) if step.out else {}
        found = [each for _, each in votes.values()]
        known += found
        some = self.chance.choice(((), tuple(found), tuple(found[: MAJORITY - 1]), tuple(known[-12:])))
        await self._use(process, current, replace(layout_after(signed, step), votes=some))

    async def _use(self, process: SpareProcess, before: Layout, signed: SignedLayout) -> None:
        layout = decode(signed.payload, Layout)
        if self.chance.random() < 0.7:
            await process.paths.write("layout", encode(signed))
        found: dict[str, Acceptance] = {}
        for node in sorted(seed_nodes(before, layout)):
            with contextlib.suppress(StoragedError):
                answer, _ = await process.caller.call(node, "cluster.accept", signed, AcceptAnswer, timeout_s=0.5)
                found[node] = answer.acceptance
        if is_enough(before, layout, found):
            certified = replace(signed, certificate=tuple(found[name] for name in sorted(found)))
            node = self.chance.choice(sorted(self.world.nodes))
            await process.caller.call(node, "cluster.offer", certified, OfferAnswer, timeout_s=0.5)


def run_sparing_system(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    return play_layouts(lambda loop: SparePlay(seed, loop, rules))
