"""Hot keys: many clients change few keys through several gateway processes. Figures in virtual time, the same for each
seed.

``python -m tests.sim.hot`` prints the table of storaged/README.md. Each writer adds one to its key, so that a change
that is lost, or counts twice, shows in the sum.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import structlog.testing

from storaged.errors import OutcomeUnknown, PreconditionFailed, StoragedError
from storaged.meta.client import RingClient
from storaged.meta.messages import TURN_GRANTED, TURN_QUEUED, TURN_REFUSED, Turn, TurnReply
from storaged.meta.names import Change, RegisterName, Table, Value, Visibility
from tests.sim.cluster import DISKS, FIRST_SEEDS, Gateway, StorageNode, Weather, World, make_layout
from tests.sim.virtual import VirtualClock, VirtualLoop, run
from tests.worlds.ring_client import ring_client

SCOPE = b"hot bucket 0 \0\0\0"
PAUSE_S = 0.05
"""A client's pause after an error."""


@dataclass(frozen=True)
class Load:
    """``processes`` of gateways, ``workers`` of them a node. ``reads``: the part of operations that read. ``keys`` are
    of one partition. ``creators``: writers create the key, once, if it does not exist.
    """

    processes: int = 1
    workers: int = 1
    writers: int = 64
    keys: int = 1
    reads: float = 0.0
    seconds: float = 20.0
    creators: bool = False
    skew_ms: int = 0
    fault: str = ""

    def __str__(self) -> str:
        text = f"{self.writers} writers, {self.keys} key{'s' * (self.keys > 1)}, {self.processes} processes"
        if self.workers > 1:
            text += f" of {self.processes // self.workers} gateways"
        if self.reads:
            text += f", {self.reads:.0%} reads"
        if self.creators:
            text += ", each creates it"
        if self.skew_ms:
            text += f", clocks off by {self.skew_ms / 1000:.0f} s"
        return text + (f", {self.fault}" if self.fault else "")


@dataclass
class Figures:
    """What became of a load's operations. ``done``: changes of each writer that were acknowledged."""

    load: Load
    done: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    reads: int = 0
    waits: list[float] = field(default_factory=list)
    read_waits: list[float] = field(default_factory=list)
    messages: int = 0
    trace: str = ""
    wrong: str = ""

    @property
    def per_second(self) -> float:
        return self.done.total() / self.load.seconds

    @property
    def unknown(self) -> float:
        """Of all changes."""
        every = self.done.total() + self.errors.total()
        return self.errors["OutcomeUnknown"] / every if every else 0.0

    @property
    def slowest(self) -> float:
        """The writer with the fewest changes, relative to the mean."""
        fewest = min(self.done[writer] for writer in range(self.load.writers))
        return fewest * self.load.writers / max(1, self.done.total())

    def __str__(self) -> str:
        load, errors = self.load, ", ".join(f"{count} {name}" for name, count in sorted(self.errors.items()))
        text = (
            f"{load}: "
            f"{self.per_second:6.1f}/s, unknown {self.unknown:6.2%}, slowest {self.slowest:4.2f} of the mean, "
            f"longest wait {max(self.waits, default=0):.2f} s, {self.messages} messages"
        )
        if self.reads:
            text += f"; {self.reads / load.seconds:.0f} reads/s, longest {max(self.read_waits):.2f} s"
        return text + (f"; {errors}" if errors else "") + (f"; WRONG: {self.wrong}" if self.wrong else "")


class _Play:
    """One load."""

    def __init__(self, seed: int, load: Load, kind: type[RingClient] = RingClient) -> None:
        self.loop = VirtualLoop()
        self.random = random.Random(seed)
        self.world = World(self.loop, self.random, weather=Weather(refuse=0.0))
        self.world.skew_ms_max = 0
        self.load = load
        self.figures = Figures(load)
        self.kind = kind
        self.gateways: list[Gateway] = []
        self.sums: Counter[RegisterName] = Counter()

    async def play(self) -> None:
        load, layout = self.load, make_layout(1, FIRST_SEEDS)
        nodes = [StorageNode(self.world, "n" + disk[1:], disk) for disk in DISKS]
        names = [RegisterName(Table.OBJECT, SCOPE, 0, b"%d" % number) for number in range(load.keys)]
        by_disk = {node.disk: node for node in nodes}
        replicas = [by_disk[disk] for disk in layout.replicas_of(names[0].partition)]
        self.gateways = [self._gateway(number, layout) for number in range(load.processes)]
        fault = FAULTS[load.fault](self, replicas) if load.fault else None
        end = self.loop.time() + load.seconds
        writers = [self._write(number, names[number % len(names)], end) for number in range(load.writers)]
        nemesis = asyncio.ensure_future(self._nemesis(fault)) if fault is not None else None
        await asyncio.gather(*writers)
        if nemesis is not None:
            nemesis.cancel()
        self.figures.messages = self.world.messages
        self.figures.trace = self.world.trace()
        await self._check(names)
        for gateway in self.gateways:
            await gateway.client.close()

    def _gateway(self, number: int, layout: Any) -> Gateway:
        gateway = Gateway(self.world, f"g{number // self.load.workers}", layout, skew_ms=0)
        skew_ms = self.random.randint(-self.load.skew_ms, self.load.skew_ms)
        self._connect(gateway, skew_ms)
        return gateway

    def _connect(self, gateway: Gateway, skew_ms: int = 0) -> None:
        """With the time limits of production."""
        gateway.client = ring_client(
            gateway.layouts,
            gateway.directory,
            kind=self.kind,
            node=gateway.name,
            clock=VirtualClock(self.loop, skew_ms),
            entropy=self.random.randbytes,
            jitter=self.random.random,
        )

    async def _nemesis(self, fault: Iterator[float]) -> None:
        for pause_s in fault:
            await asyncio.sleep(pause_s)

    async def _write(self, number: int, name: RegisterName, end: float) -> None:
        load, figures, loop = self.load, self.figures, self.loop
        while loop.time() < end:
            client = self.gateways[number % load.processes].client
            began = loop.time()
            reads = load.reads and self.random.random() < load.reads
            try:
                if reads:
                    await client.read(name)
                    figures.reads += 1
                else:
                    await client.change(name, _create if load.creators else _add)
                    figures.done[number] += 1
            except PreconditionFailed:
                figures.errors["PreconditionFailed"] += 1
            except StoragedError as error:
                figures.errors[type(error).__name__] += 1
                if isinstance(error, OutcomeUnknown):
                    self.sums[name] += 1
                await asyncio.sleep(PAUSE_S)
            (figures.read_waits if reads else figures.waits).append(loop.time() - began)
            if load.creators:
                return

    async def _check(self, names: list[RegisterName]) -> None:
        """The counters have every change that was acknowledged, once, and perhaps those of unknown outcome."""
        self.world.weather.lose = 0.0
        for position, name in enumerate(names):
            value = (await self.gateways[-1].client.read(name)).value
            counted = int(value.body) if value is not None else 0
            done = sum(count for writer, count in self.figures.done.items() if writer % len(names) == position)
            if not done <= counted <= done + self.sums[name]:
                self.figures.wrong = f"{counted} counted, {done} acknowledged, {self.sums[name]} unknown"


def _add(value: Value | None) -> Change:
    return Change(b"%d" % (1 + (int(value.body) if value is not None else 0)), Visibility.LIVE, b"")


def _create(value: Value | None) -> Change:
    if value is not None:
        raise PreconditionFailed("it exists")
    return Change(b"1", Visibility.LIVE, b"")


# --- faults: generators that do something, and give the seconds until they go on -------------------------------------


def _replica_away(play: _Play, replicas: list[StorageNode]) -> Iterator[float]:
    yield 2.0
    replicas[0].crash()
    yield 1e9


def _replica_comes_and_goes(play: _Play, replicas: list[StorageNode]) -> Iterator[float]:
    while True:
        yield 3.0
        replicas[0].crash()
        yield 3.0
        replicas[0].start()


def _replica_hangs(play: _Play, replicas: list[StorageNode]) -> Iterator[float]:
    yield 2.0
    replicas[0].deliver = lambda *request: None  # type: ignore[method-assign]
    yield 1e9


def _replica_slow(play: _Play, replicas: list[StorageNode]) -> Iterator[float]:
    deliver = replicas[0].deliver
    yield 2.0
    replicas[0].deliver = lambda *request: play.loop.call_later(0.2, deliver, *request)  # type: ignore
    yield 1e9


def _gateway_dies(play: _Play, replicas: list[StorageNode]) -> Iterator[float]:
    """Every three seconds another process dies, with its turn or its place in the queue, and comes back."""
    number = 0
    while True:
        yield 3.0
        gateway = play.gateways[number % len(play.gateways)]
        number += 1
        gateway.caller.alive = False
        client = gateway.client
        gateway.start()
        play._connect(gateway)
        closing = play.loop.create_task(client.close())
        yield 0.0
        del closing


def _gateway_keeps(play: _Play, replicas: list[StorageNode]) -> Iterator[float]:
    """Four processes of a node take turns, keep them as long as they can, and never end one."""
    gateway = Gateway(play.world, "hostile", play.gateways[0].layouts.current, skew_ms=0)
    while True:
        for register in range(play.load.keys):
            name = RegisterName(Table.OBJECT, SCOPE, 0, b"%d" % register)
            for process in range(4):
                request = Turn(replicas[0].disk, name, b"process%d" % process, 1)
                gateway.caller.try_call(replicas[0].name, "meta.turn", request, TurnReply, lambda reply, bulk: None)
        yield 0.2


def _lying(state: int, hold_ms: int = 250) -> Callable[[_Play, list[StorageNode]], Iterator[float]]:
    def fault(play: _Play, replicas: list[StorageNode]) -> Iterator[float]:
        replicas[0].replica.turns.ask = (  # type: ignore[method-assign]
            lambda node, request, on_answer: on_answer(TurnReply(state, hold_ms, True))
        )
        yield 1e9

    return fault


def _network_slow(play: _Play, replicas: list[StorageNode]) -> Iterator[float]:
    play.world.weather.slow = 0.02
    yield 1e9


FAULTS: dict[str, Callable[[_Play, list[StorageNode]], Iterator[float]]] = {
    "first replica away": _replica_away,
    "first replica comes and goes": _replica_comes_and_goes,
    "first replica hangs": _replica_hangs,
    "first replica slow": _replica_slow,
    "a process dies every 3 s": _gateway_dies,
    "a gateway keeps its turns": _gateway_keeps,
    "first replica grants all": _lying(TURN_GRANTED),
    "first replica grants none": _lying(TURN_QUEUED),
    "first replica refuses": _lying(TURN_REFUSED),
    "2% of messages and syncs slow": _network_slow,
}


def play(seed: int, load: Load, kind: type[RingClient] = RingClient) -> Figures:
    playing = _Play(seed, load, kind)
    with structlog.testing.capture_logs():
        run(playing.loop, playing.play())
    return playing.figures


TABLE = (
    *(Load(processes) for processes in (1, 2, 4, 8)),
    Load(8, 4),
    Load(32, 4),
    Load(64),
    *(Load(processes, writers=writers) for writers in (2, 8) for processes in (1, 2, 8) if processes <= writers),
    *(Load(processes, keys=4) for processes in (1, 8)),
    *(Load(processes, reads=0.9) for processes in (1, 2, 8)),
    *(Load(processes, creators=True) for processes in (1, 8)),
    Load(8, skew_ms=5000),
    *(Load(8, fault=fault) for fault in FAULTS),
    *(Load(1, fault=fault) for fault in ("first replica slow", "2% of messages and syncs slow")),
)


def main() -> None:
    for load in TABLE:
        print(play(1, load), flush=True)


if __name__ == "__main__":
    main()
