"""The system partition moves, and layouts are decided, while gateways read and write system registers and objects.

The program's own books of layouts, acceptors of layouts, ``SystemMove``, ``LayoutApplication``, exchange of layouts,
followers of partitions and keepers, over the virtual network. ``layout_parts`` has the nemeses: two administrators who
exchange seed disks at the same time, on gateways that die; a mover that moves other partitions through the records in
the system partition; someone who offers layouts that nobody accepted; nodes that lose what they promised, or a gateway
that writes the register of the layout as it likes; a disk that is lost for good. ``layout_haste`` has two more: rival
layouts in the register, and exchanges that are ended before anything was copied.

What must hold:

* Layouts in force have one history, and none that moves data is in force without a certificate.
* What ``apply`` reports as done stays in this history. What it reports as overtaken never comes into it.
* The histories of system registers and of objects are linearizable.
* Once all is well the last layout is in force everywhere, the system partition and the others have settled, and each
  register can be read and written.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec.structs import replace

from storaged.cluster import layouts as layouts_module
from storaged.cluster.identity import Identity, identity_of
from storaged.cluster.layout import Layout
from storaged.cluster.layout_exchange import LayoutExchange, PeerLayouts
from storaged.cluster.layouts import LayoutBook, LayoutFiles
from storaged.cluster.messages import LayoutAfter
from storaged.cluster.partitions import PartitionRecord, signed_bytes
from storaged.cluster.ports import Method
from storaged.cluster.rpc.authority import grant
from storaged.cluster.signed_layout import SignedLayout, sign_layout, verify_layout
from storaged.cluster.succession import is_numbered_as_moving
from storaged.errors import DiskUnusable, StoragedError
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.client import DEADLINE_S
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.listing.merge import RingScanner
from storaged.meta.listing.round import ScanSettings
from storaged.meta.names import RegisterName, Table, object_name, system_name
from storaged.meta.transport.replicas import ReplicaHost
from storaged.node.accepting import LayoutAcceptor
from storaged.node.applying import LayoutApplication
from storaged.node.belief import NodeBelief
from storaged.node.keeper import SystemKeeper
from storaged.node.partition_follower import PartitionFollower, known_steps
from storaged.node.system import SystemPaths, write_again
from storaged.node.system_move import SystemMove
from storaged.wire import encode
from tests.sim import layout_parts
from tests.sim.cluster import DISKS, FIRST_SEEDS, Gateway, StorageNode, World, make_layout
from tests.sim.file_disk import set_aside
from tests.sim.linear import Kind
from tests.sim.parts import ClockJumps, HungDisks, Part, Suspensions, Trouble
from tests.sim.scenario import Scenario, play_out
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts, Workload
from tests.worlds.authority import World as Authority

CLUSTER = "sim"
OPERATIONS = 16
"""Of each worker."""
SYSTEM_KEYS = ("x", "y")
OBJECT_KEYS = ("o", "p", "q")
OBJECTS = {key: object_name(b"bucket of a test", range(2), key.encode()) for key in OBJECT_KEYS}
NUMBERS = sorted({name.partition for name in OBJECTS.values()})
SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(32))


def signed_record(record: PartitionRecord) -> PartitionRecord:
    """As a gateway does it."""
    return replace(record, signer=bytes(16), signature=SIGNER.sign(signed_bytes(CLUSTER, record)))


async def key_of(_signer: bytes) -> Ed25519PublicKey:
    return SIGNER.public_key()


class Seen:
    """Liveness: a disk whose node is down is away; now and then a sound one seems to be."""

    def __init__(self, world: World, chance: random.Random) -> None:
        self._world = world
        self._chance = chance

    def disk_readable(self, disk_id: str) -> bool:
        node = self._world.nodes.get("n" + disk_id[1:])
        return node is not None and node.up and self._chance.random() > 0.02

    disk_prompt = disk_readable

    def disk_writable(self, disk_id: str) -> bool:
        return self.disk_readable(disk_id)


class Process(Gateway):
    """One that has a book of layouts, on a disk of its own, and follows what others know."""

    def __init__(self, play: LayoutPlay, name: str, **options: Any) -> None:
        self.play = play
        self.tasks: list[asyncio.Task[None]] = []
        self.chance = random.Random(f"process {name} {play.found.seed}")
        super().__init__(play.world, name, play.layout, refresh=self._refresh, on_missed=self._missed, **options)

    @property
    def up(self) -> bool:
        return self.caller.alive

    def start(self) -> None:
        play = self.play
        self.book = self.layouts = play.open_book(self)
        self._options["believes"] = NodeBelief(play.identity("gw"), play.authority.certificate, lambda *_: True)
        super().start()
        seen, settings = Seen(self._world, self.chance), ScanSettings(timeout_s=0.3, hedge_s=0.02)
        self.scanner = RingScanner(self.book, self.directory, self.client, seen, settings, refresh=self._refresh)
        self.paths = SystemPaths(self.client)
        self.follower = PartitionFollower(self.book, self.client, self.scanner, key_of, CLUSTER)
        self.book.watch(lambda _layout: self.follower.wake())
        self.keeper = SystemKeeper(self.scanner, self.client, self.book, seen, jitter=lambda: 0.01)
        self.exchange = LayoutExchange(self.caller, self.book)
        self.peers: dict[str, PeerLayouts] = defaultdict(PeerLayouts)
        self.begin(self.follower.run())
        self.begin(self._ping())
        if self._options.get("gateway", True):
            self.follower.on_fallen = partial(write_again, self.paths)
            self.begin(self._keep())

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(self._world.loop.create_task(work))

    def stop(self) -> None:
        """What it has begun goes on no more; what it has sent arrives."""
        self.caller.alive = False
        for task in self.tasks:
            task.cancel()
        self.tasks.clear()

    async def crash(self) -> None:
        self.stop()
        await super().crash()

    def application(self, collect_s: float = 1.0) -> LayoutApplication:
        identity, certificate = self.play.identity("gw"), self.play.authority.certificate
        return LayoutApplication(identity, certificate, self.book, self.paths, self.caller, collect_s=collect_s)

    async def _refresh(self, partition: int) -> None:
        await self.follower.refresh(partition)

    def _missed(self, name: RegisterName) -> None:
        if name.table == Table.SYSTEM:
            self.keeper.hint(name)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self.chance.uniform(0.05, 0.3))
            if not self.play.resting:
                await self.keeper.once()

    async def _ping(self) -> None:
        """As heartbeats do: the newer layouts are passed on, and who has read fewer records is told."""
        world = self._world
        while True:
            await asyncio.sleep(self.chance.expovariate(1 / 0.1))
            node = world.nodes.get(self.chance.choice([*world.nodes]))
            silent = node is None or not node.up or node.name == self.name or world.apart(self.name, node.name)
            if silent or node is None or self.name in world.stopped or node.name in world.stopped:
                continue
            other = layout_parts.asker_of(node)
            await self.exchange.synchronise(self.peers[node.name], node.name, b"", other.book.epoch)
            self.book.partitions.hear(node.name, other.book.partitions.steps)
            other.book.partitions.hear(self.name, self.book.partitions.steps)


class Node(StorageNode):
    """A storage node that accepts layouts."""

    play: LayoutPlay

    def start(self) -> None:
        super().start()
        if not self.up:
            return
        self.serve({self.disk: self.replica})

    def serve(self, local: dict[str, LocalReplica]) -> None:
        """Answers for these disks, as far as they are in use."""
        world, play = self.world, self.play
        self.asker = asker = Process(play, self.name, gateway=False, skew_ms=0, local=local)
        steps = known_steps(asker.book, self.name, lambda: asker.follower)
        host = ReplicaHost(local, lambda: asker.book.epoch, world.rules, world.on_refusal, steps)
        self.acceptor = acceptor = LayoutAcceptor(
            play.identity(self.name), asker.book, asker.paths, play.directory(self.name)
        )
        acceptor.may_settle = SystemMove(asker.book, self.name, local, asker.scanner).may_settle
        exchange = {
            "cluster.layout": Method(LayoutAfter, asker.exchange.on_layout),
            "cluster.offer": Method(SignedLayout, asker.exchange.on_offer),
        }
        self.methods = {**host.methods(), **acceptor.methods(), **grant(exchange)}

    def crash(self) -> None:
        self.asker.stop()
        self.world.loop.create_task(self.asker.client.close())
        super().crash()


class LayoutPlay(Scenario):
    node_kind = Node

    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        world = self.world
        world.contents = False
        world.on_files = self.aside.random() < 0.1
        world.roles = {"n" + disk[1:]: ("storage",) for disk in DISKS}
        self.moves = self.disks_may_be_swapped = self.disks_may_be_full = self.of_objects = self.fresh = False
        self.small_share = 0.0
        self.first_seeds = DISKS
        self.names = {key: system_name(key) for key in SYSTEM_KEYS} | OBJECTS
        self.last_seen = dict.fromkeys(self.names)
        self.authority_world = Authority(Path(world.files()) / "authority", CLUSTER)
        self.authority = self.authority_world.authority
        self._identities: dict[str, Identity] = {}
        self._names: dict[bytes, str] = {}
        self.by_hash: dict[bytes, Layout] = {}
        """All that were ever signed."""
        self.layout = replace(make_layout(1, FIRST_SEEDS), profile="2+1")
        self.signed = self.sign(self.layout)
        self.line: list[bytes] = []
        """The layouts in force that moved data, oldest first."""
        self.register_lies = False
        """A gateway writes the register of the layout as it likes: who is told no, and when layouts come into force, is
        not judged then.
        """
        self.processes: list[Process] = []
        self.operations = OPERATIONS
        self.calm = False
        """No node, disk or gateway fails but by the parts of this play."""
        self.resting = False
        """No gateway copies, and no other administrator does anything."""
        Node.play = self

    # --- identities, layouts

    def identity(self, name: str) -> Identity:
        if name not in self._identities:
            roles, disk = (("gateway",), "d0") if name == "gw" else (("storage",), "d" + name[1:])
            self._identities[name] = self.authority_world.node(name, roles, f"FR/site/{disk}")
        return self._identities[name]

    def directory(self, name: str) -> Path:
        return Path(self.world.files()) / f"layouts of {name}"

    def sign(self, layout: Layout) -> SignedLayout:
        signed = sign_layout(layout, self.authority.administration)
        self.by_hash[signed.hash] = layout
        return signed

    def open_book(self, process: Process) -> LayoutBook:
        """Of one life of a process: with what it has used before."""
        files, life = LayoutFiles(self.directory(process.name)), process.life
        known = files.load()
        if not known:
            known = [self.signed]
            files._write(self.layout.epoch, encode(self.signed))

        async def persist(epoch: int, signed: SignedLayout) -> None:
            await self.world.sync()
            if process.life != life + 1 or not process.up:
                raise DiskUnusable("the process died")
            await files.save(epoch, signed)

        book = LayoutBook(
            self.authority.administration.public_key(),
            CLUSTER,
            known=known,
            persist=persist,
            clock=process.clock,
            authority=self.authority.certificate,
        )
        book.watch(lambda layout: self.in_force(process.name, book, layout))
        return book

    def in_force(self, name: str, book: LayoutBook, layout: Layout) -> None:
        """A process uses a layout from now on."""
        self.world.note("in force", name, layout.epoch)
        signed = book.signed(layout.epoch)
        if is_numbered_as_moving(layout) and not signed.certificate:
            self.complain(f"{name} uses layout {layout.epoch} without a certificate")
        if signed.certificate and not self.is_certified(signed, layout):
            self.complain(f"{name} uses layout {layout.epoch}, which too few have accepted")
        line = self.line_of(signed.hash)
        shorter, longer = sorted((line, self.line), key=len)
        if longer[: len(shorter)] != shorter:
            self.complain(f"{name} uses layout {layout.epoch}, which is not of the history that others have")
        self.line = longer

    def is_certified(self, signed: SignedLayout, layout: Layout) -> bool:
        """Counted here again, apart from the program: a majority of each set of seed disks."""
        before = self.by_hash[layout.predecessor]
        names = {self.name_of(acceptance.certificate) for acceptance in signed.certificate}
        if layout.seeds_recovered == layout.epoch:
            return {"n" + disk[1:] for disk in (*before.seeds, *before.seeds_next) if disk not in layout.lost} <= names
        for seeds in filter(None, (before.seeds, before.seeds_next)):
            left = ["n" + disk[1:] for disk in seeds if disk not in before.seeds_lost]
            if 2 * len(names.intersection(left)) <= len(left):
                return False
        return True

    def name_of(self, certificate: bytes) -> str:
        if certificate not in self._names:
            self._names[certificate] = identity_of(certificate).name
        return self._names[certificate]

    def line_of(self, hash_: bytes) -> list[bytes]:
        """The layouts that move data on the way to this one, which the first one begins."""
        found: list[bytes] = []
        while hash_:
            layout = self.by_hash[hash_]
            if is_numbered_as_moving(layout):
                found.append(hash_)
            hash_ = layout.predecessor
        return found[::-1]

    # --- the run

    def part_kinds(self) -> tuple[type[Part], ...]:
        from tests.sim.layout_haste import HASTY_PARTS

        return (*layout_parts.PARTS, *HASTY_PARTS)

    def join_parts(self) -> None:
        kinds = (*self.part_kinds(), Trouble, HungDisks, Suspensions, ClockJumps)
        for kind in kinds:
            chance = random.Random(f"{kind.__name__} {self.found.seed}")
            if self.calm and kind not in self.part_kinds():
                continue
            if kind is Trouble or kind.joins(self, chance):
                part = kind(self, chance)
                if kind in self.part_kinds():
                    self.parts.append(part)
                else:
                    self.parts.insert(0, part)

    def begin_gateways(self) -> None:
        self.gateways = [self.process(f"g{index}") for index in range(2)]

    def process(self, name: str, **options: Any) -> Process:
        found = Process(self, name, **options)
        self.processes.append(found)
        return found

    def everybody(self) -> list[Process]:
        """All processes that are up."""
        nodes = [layout_parts.asker_of(node) for node in self.world.nodes.values() if node.up]
        return [*nodes, *(process for process in self.processes if process.up)]

    def tell_gateways(self) -> None:
        """They have learnt it by themselves."""

    async def worker(self, gateway: Gateway) -> None:
        done = 0
        while done < self.operations:
            done += 1
            await asyncio.sleep(self.random.uniform(0, 0.12))
            await self.operate(gateway, self.random.choices(tuple(Kind), (35, 25, 25, 15))[0], self._choose_key())

    async def make_reader(self) -> Gateway:
        found = self.process("reader", deadline_s=DEADLINE_S)
        for _ in range(100):
            current = found.book.epoch == max(process.book.epoch for process in self.everybody())
            if current and (found.book.partitions.complete or not found.book.current.base):
                break
            await asyncio.sleep(0.1)
        return found

    async def play(self) -> None:
        await super().play()
        for process in self.everybody():
            process.stop()
            await process.client.close()

    def judge(self) -> Verdicts:
        self.found.done["layouts"] = len(self.line)
        return Workload.judge(self)


def run_layouts(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    return play_layouts(lambda loop: LayoutPlay(seed, loop, rules))


def play_layouts(begin: Callable[[VirtualLoop], Scenario]) -> Verdicts:
    verified: dict[tuple[bytes, bytes], Layout] = {}

    def verify(signed: SignedLayout, administration: Ed25519PublicKey, cluster: str) -> Layout:
        """Each layout is verified, and its places are computed, once for all processes: they have no clock for that."""
        content = signed.payload, signed.signature
        if content not in verified:
            verified[content] = verify_layout(signed, administration, cluster)
        return verified[content]

    with set_aside(layouts_module, "verify_layout", verify):
        return play_out(begin)


__all__ = ["LayoutPlay", "Process", "StoragedError", "run_layouts"]
