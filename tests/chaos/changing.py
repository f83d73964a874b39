"""The cluster changes while it runs, and things happen to it meanwhile: servers come and go, disks are exchanged, two
administrators change at once, plans are too old; processes are killed and stand still. ``Change`` is one run.

A step is what an administrator does, with the commands of deploy/README.md. Steps are chosen at random among those that
are possible now. While what a step moves is under way, faults are played, as far as ``Away`` allows them: not more at
once than the cluster promises to survive.

Clients read and write all the time, through all gateways in turn, and increment counters. At the end everything is
read, listed and compared.
"""

from __future__ import annotations

import bisect
import contextlib
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from storaged.cli import create
from storaged.cluster.issuing import load_authority
from storaged.cluster.layout import PARTITIONS, SYSTEM_PARTITION, Layout
from tests.chaos.away import Away
from tests.chaos.beside import Beside
from tests.chaos.counters import Counters
from tests.chaos.objects import Objects, movement
from tests.chaos.workload import Workload, percentile
from tests.patience import SLOWNESS
from tests.servers import Servers

RACKS = ("FR/par1/a", "FR/par2/b", "FR/lyo1/c", "FR/lyo2/d", "DE/fra1/e", "DE/ber1/f")
NODES_MIN, NODES_MAX = 3, 6
MOVED_S = 120.0
"""A guard (times ``SLOWNESS``): so long a change may move, whatever else happens."""
ATTEMPTS = 10
SAMPLE = 12
"""Objects whose blocks are looked at before a fault."""

REST, MOVING = "rest", "moving"

Report = Callable[[str], None]


@dataclass(frozen=True)
class Left:
    """A server that the layout no longer names. Its folder is as it was."""

    name: str
    how: str


class Step(NamedTuple):
    name: str
    possible: Callable[[Change], bool]
    play: Callable[[Change], None]


class Change:
    """``servers`` are made, and run. ``nemeses``: whether faults are played while something moves. ``think_s``: a
    client's pause between requests.
    """

    def __init__(
        self,
        servers: Servers,
        *,
        seed: int = 1,
        objects: int = 40,
        nemeses: bool = True,
        think_s: float = 0.02,
        say: Report = print,
    ) -> None:
        self.servers = servers
        self.source = random.Random(seed)
        self.nemeses = nemeses
        self.say = say
        self.members = dict(zip(("n1", "n2", "n3"), RACKS, strict=False))
        self.count = len(self.members)
        self.left: list[Left] = []
        self.away = Away(replicas(self.layout()))
        self.objects = Objects(servers.in_turns, "demo", objects, seed=seed)
        client = lambda: servers.in_turns(read_timeout_s=60)  # noqa: E731
        self.workload = Workload(client, "demo", workers=3, attempts=2, seed=seed, think_s=think_s)
        self.counters = Counters(client, "demo", clients=3, seed=seed, think_s=think_s)
        self.steps: Counter[str] = Counter()
        self.moves: list[dict[str, Any]] = []
        self.wrong: list[str] = []
        self.phases: list[tuple[float, str]] = [(time.monotonic(), REST)]
        self.older: Path | None = None

    # --- the run

    @contextlib.contextmanager
    def load(self) -> Iterator[None]:
        self.objects.write()
        self.counters.start()
        self.workload.start()
        self.objects.start()
        try:
            yield
        finally:
            self.objects.stop()
            self.workload.stop()
            self.counters.stop()

    def run(self, seconds: float, steps: Sequence[Step]) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.step(self.source.choice([step for step in steps if step.possible(self)]))

    def step(self, step: Step) -> None:
        started = time.monotonic()
        self.say(f"{step.name}: {', '.join(self.members)}")
        step.play(self)
        self.steps[step.name] += 1
        self.say(f"{step.name} took {time.monotonic() - started:.0f} s; {self.workload.tally.summary()}")

    def judge(self) -> None:
        """After the load has ended."""
        for name in self.members:
            self.wait_whole(name)
        self.servers.wait_until(
            lambda: self.servers.status()["verdict"] == "HEALTHY", MOVED_S, "HEALTHY when everything is done"
        )
        self.workload.read_everything()
        self.objects.compare()
        self.counters.judge()

    def violations(self) -> list[str]:
        return [*self.workload.tally.violations(), *self.objects.wrong, *self.counters.wrong, *self.wrong]

    def document(self) -> dict[str, Any]:
        return {
            "steps": dict(self.steps),
            "faults": self.away.document(),
            "moves": self.moves,
            "latency_ms": {name: self.latency(name) for name in (REST, MOVING)},
            "counters": self.counters.document(),
            "objects": {
                "count": len(self.objects.keys),
                "bytes": sum(map(self.objects.size, self.objects.keys)),
                "reads": self.objects.reads,
                "failed_twice": self.objects.failed_twice,
                "wrong": self.objects.wrong,
            },
            "tally": self.workload.tally.document(),
            "violations": self.violations(),
        }

    def latency(self, phase: str) -> dict[str, float]:
        moments = [moment for moment, _ in self.phases]
        taken = [
            seconds
            for moment, seconds in self.workload.latencies
            if self.phases[max(0, bisect.bisect(moments, moment) - 1)][1] == phase
        ]
        return {"requests": len(taken), "p50": percentile(taken, 0.5), "p99": percentile(taken, 0.99)}

    # --- what steps are made of

    def layout(self) -> Layout:
        authority = load_authority(self.servers.authority)
        found = create.last_signed(authority, create.load_plan(authority.directory))
        assert found is not None
        return found[1]

    def new_server(self) -> tuple[str, str]:
        """A name that was never used, and a rack that has no server now, under another name neither."""
        self.count += 1
        former = {node.certified for node in create.load_plan(self.servers.authority).nodes}
        free = [rack for rack in RACKS if rack not in {*former, *self.members.values()}]
        return f"n{self.count}", self.source.choice(free)

    def remember_folder(self) -> None:
        """The authority's folder before a change: what another administrator may still have."""
        if self.older is not None:
            shutil.rmtree(self.older)
        self.older = self.servers.root / "authority-older"
        shutil.copytree(self.servers.authority, self.older)

    def change(self, what: str) -> None:
        """``plan``, ``layout``, ``apply``; then waits until everything has moved, with faults meanwhile."""
        with self.moving(what) as move:
            move.update(self.servers.change())

    @contextlib.contextmanager
    def moving(self, what: str) -> Iterator[dict[str, Any]]:
        """The block brings a change into force, and puts into the value what ``plan`` said of it."""
        before, started = self.objects.places(self.servers), time.monotonic()
        beside = Beside(self.servers.in_turns(attempts=ATTEMPTS), len(self.moves))
        beside.begin()
        self.phases.append((started, MOVING))
        move: dict[str, Any] = {"what": what}
        yield move
        self.away.begin_move(replicas(self.layout()))
        beside.middle()
        self.settle()
        beside.end()
        self.wrong.extend(beside.wrong)
        self.away.end_move()
        self.phases.append((time.monotonic(), REST))
        seconds = time.monotonic() - started
        bytes_ = movement(before, self.objects.places(self.servers))
        planned = {name: move.get(name) for name in ("partitions", "replicas", "fragments")}
        self.moves.append({"what": what, "seconds": round(seconds, 1), **planned, "bytes": bytes_._asdict()})
        self.say(f"  {what}: {seconds:.0f} s, {bytes_.bytes} bytes of fragments, ideal {bytes_.ideal}")

    def settle(self) -> None:
        end = time.monotonic() + MOVED_S * SLOWNESS
        while what := self.servers.still_moves():
            if time.monotonic() > end:
                raise AssertionError(f"it does not end: {what}; {self.servers.log_tail()}")
            if self.nemeses:
                self.nemesis()
            time.sleep(self.source.uniform(0.3, 1.5))

    def wait_whole(self, name: str) -> None:
        self.servers.wait_until(lambda: self.is_whole(name), 120, f"{name} takes part")

    def is_whole(self, name: str) -> bool:
        node = self.servers.node(name)
        if node is None or node["state"] != "up":
            return False
        return all(disk["state"] == "ok" for disk in node["disks"])

    def disks_of(self, name: str) -> list[str]:
        return list(self.servers.servers[name].disk_ids().values())

    # --- faults

    def nemesis(self) -> None:
        """One fault and its end. Gateways first of all: one of them moves the partitions."""
        if self.source.random() < 0.1:
            self.pause_moves()
            return
        storage = [name for name in self.members if self.servers.runs(name)]
        gateway = self.source.random() < 0.5
        victim = self.source.choice(self.servers.gateways if gateway else storage)
        kind = self.source.choice(("kill", "pause"))
        fault = f"{kind} {'gateway' if gateway else 'node'}"
        disks = [] if gateway else self.disks_of(victim)
        keys = self.source.sample(self.objects.coded, min(SAMPLE, len(self.objects.coded)))
        if not self.away.may(fault, disks, [] if gateway else self.objects.blocks(self.servers, keys)):
            return
        self.away.take(victim, disks)
        with self.workload.outages.one() if gateway else contextlib.nullcontext():
            if kind == "kill":
                self.servers.kill_node(victim)
                time.sleep(self.source.uniform(0.2, 3))
                self.servers.start_node(victim)
            else:
                with self.servers.stands_still(victim, self.source.uniform(1, 12)):
                    pass
        if not gateway:
            self.wait_whole(victim)
        self.away.back(victim)

    def pause_moves(self) -> None:
        """An administrator stops the moves for a while."""
        job = self.source.choice(("partitions", "fragments"))
        for action in ("pause", "resume"):
            self.servers.wait_until(
                lambda: self.servers.on_any("job", action, job),  # noqa: B023
                60,
                f"job {action} {job}",
            )
            time.sleep(self.source.uniform(1, 5))
        self.away.played[f"pause and resume {job}"] += 1

    def come_back(self, gone: Left) -> None:
        """The folder of a server that was removed is started again. It must not take part."""
        server = self.servers.servers[gone.name]
        self.servers.begin(gone.name)
        self.servers.wait_until(
            lambda: self.servers.serves(gone.name) or not self.servers.runs(gone.name),
            60,
            f"{gone.name} serves or ends",
        )
        time.sleep(self.source.uniform(2, 6))
        if self.servers.node(gone.name) is not None:
            self.wrong.append(f"{gone.name} was removed, and status names it again")
        self.say(f"  {gone.name}: {self.servers.log_of(gone.name, 2)}")
        self.servers.stop_node(gone.name)
        self.steps[f"a server comes back that {gone.how}"] += 1
        shutil.rmtree(server.folder)


def replicas(layout: Layout) -> list[tuple[str, ...]]:
    """Of all partitions, the system's last."""
    return [layout.replicas_of(number) for number in (*range(PARTITIONS), SYSTEM_PARTITION)]
