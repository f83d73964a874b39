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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
from tests.servers import DISKS, Servers

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
    """``servers`` are made, and run. ``nemeses``: whether faults are played while something moves."""

    def __init__(
        self, servers: Servers, *, seed: int = 1, objects: int = 40, nemeses: bool = True, say: Report = print
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
        self.workload = Workload(client, "demo", workers=3, attempts=2, seed=seed, think_s=0.02)
        self.counters = Counters(client, "demo", clients=3, seed=seed)
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
        try:
            yield
        finally:
            self.workload.stop()
            self.counters.stop()

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.step(self.source.choice([step for step in STEPS if step.possible(self)]))

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
        """A name that was never used, and a rack that has no server now."""
        self.count += 1
        free = [rack for rack in RACKS if rack not in self.members.values()]
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
        time.sleep(self.source.uniform(2, 6))
        if self.servers.node(gone.name) is not None:
            self.wrong.append(f"{gone.name} was removed, and status names it again")
        self.servers.stop_node(gone.name)
        self.steps[f"a server comes back that {gone.how}"] += 1
        shutil.rmtree(server.folder)


def replicas(layout: Layout) -> list[tuple[str, ...]]:
    """Of all partitions, the system's last."""
    return [layout.replicas_of(number) for number in (*range(PARTITIONS), SYSTEM_PARTITION)]


# --- steps


def add(run: Change) -> None:
    name, rack = run.new_server()
    run.remember_folder()
    with run.moving("add a server") as move:
        move.update(run.servers.add(name, rack))
        run.members[name] = rack
    run.wait_whole(name)


def drain(run: Change) -> None:
    """Its disks give up what they have; then it is removed and stopped."""
    name = run.source.choice(list(run.members))
    run.remember_folder()
    run.servers.drain(name)
    run.change("drain a server")
    run.servers.remove(name)
    del run.members[name]
    run.change("remove a drained server")
    run.servers.stop_node(name)
    run.left.append(Left(name, "was drained and removed"))


def undrain(run: Change) -> None:
    """An administrator thinks again, in the middle of a drain."""
    name = run.source.choice(list(run.members))
    run.remember_folder()
    with run.moving("drain a server and undrain it") as move:
        run.servers.drain(name)
        move.update(run.servers.change())
        run.away.begin_move(replicas(run.layout()))
        time.sleep(run.source.uniform(0, 8))
        run.servers.undrain(name)
        run.servers.change()


def renew(run: Change) -> None:
    """A node gets a new certificate for a new key, and presents it after a reload."""
    name = run.source.choice([*run.members, *run.servers.gateways])
    run.servers.renew(name)
    run.servers.reload(name)
    run.servers.wait_until(
        lambda: "this node presents a new certificate" in run.servers.log_of(name, 200), 60, f"{name} is renewed"
    )


def lose(run: Change) -> None:
    """A server is gone for good, and is removed."""
    name = run.source.choice(list(run.members))
    run.remember_folder()
    run.servers.kill_node(name)
    run.away.take(name, run.disks_of(name))
    time.sleep(run.source.uniform(0, 5))
    run.servers.remove(name)
    del run.members[name]
    run.change("remove a lost server")
    run.away.back(name)
    run.left.append(Left(name, "was lost and removed"))


def come_back(run: Change) -> None:
    run.come_back(run.left.pop(0))


def replace_disk(run: Change) -> None:
    """A disk is gone; an empty one takes its place under its own id. The old one put back later is refused."""
    name, disk = run.source.choice(list(run.members)), run.source.choice(DISKS)
    server = run.servers.servers[name]
    here, aside, new = server.folder / disk, server.folder / f"{disk}.old", server.folder / f"{disk}.new"
    run.remember_folder()
    run.away.take(name, run.disks_of(name))
    run.servers.kill_node(name)
    here.rename(aside)
    here.mkdir(mode=0o700)
    old, _ = run.servers.replace_disk(name, disk)
    planned = run.servers.plan()
    files = run.servers.layouts()
    run.servers.start_node(name)
    run.away.take(name, [old])
    with run.moving("replace a disk") as move:
        move.update(planned)
        for file in files:
            run.servers.apply(file)
    run.away.back(name)
    run.wait_whole(name)
    if not run.away.may("the old disk is put back", run.disks_of(name), []):
        return
    with exchanged(run, name, here, aside, new):
        run.servers.wait_until(lambda: refuses(run, name), 60, f"the old disk in {here} is refused")
    shutil.rmtree(aside)
    run.wait_whole(name)


@contextlib.contextmanager
def exchanged(run: Change, name: str, here: Path, aside: Path, new: Path) -> Iterator[None]:
    """The old disk is in the place of the new one, inside the block."""
    run.servers.stop_node(name)
    here.rename(new)
    aside.rename(here)
    run.servers.start_node(name)
    yield
    run.servers.stop_node(name)
    here.rename(aside)
    new.rename(here)
    run.servers.start_node(name)


def refuses(run: Change, name: str) -> bool:
    return any(
        problem["code"] == "DISK_FOREIGN" and f"/{name}" in f"/{problem['subject']}"
        for problem in run.servers.status()["problems"]
    )


def two_administrators(run: Change) -> None:
    """Each adds another server, from a folder of his own, at the same time. One succeeds."""
    servers = run.servers
    mine, other = servers.authority, servers.root / f"authority-{run.count}"
    shutil.copytree(mine, other)
    wanted: list[tuple[Path, str, str, Path]] = []
    for folder in (mine, other):
        servers.authority = folder
        name, rack = run.new_server()
        servers.invite(name, rack)
        (file,) = servers.layouts()
        wanted.append((folder, name, rack, file))
    with ThreadPoolExecutor(2) as pool:
        asked = [
            pool.submit(servers.on, gateway, "cluster", "apply", str(file), check=False, timeout_s=120)
            for gateway, (_, _, _, file) in zip((servers.gateways[0], servers.gateways[-1]), wanted, strict=True)
        ]
    done = [future.result() for future in asked]
    won = [number for number, one in enumerate(done) if one.returncode == 0]
    if len(won) != 1 or "LAYOUT_OVERTAKEN" not in done[1 - won[0]].stderr:
        run.wrong.append(f"two administrators: {[(one.returncode, one.stdout, one.stderr) for one in done]}")
        raise AssertionError(run.wrong[-1])
    servers.authority, name, rack, _ = wanted[won[0]]
    loser, lost_name, _, _ = wanted[1 - won[0]]
    shutil.rmtree(loser)
    shutil.rmtree(servers.servers.pop(lost_name).folder)
    servers.join(name)
    servers.begin(name)
    with run.moving("two administrators add a server") as move:
        run.members[name] = rack
        move["partitions"] = None
    run.wait_whole(name)


def plan_on_an_older_layout(run: Change) -> None:
    """From a folder that does not know the last change. Refused by name, and nothing changes."""
    assert run.older is not None
    servers, epoch = run.servers, run.servers.status()["epoch"]
    kept, servers.authority = servers.authority, run.older
    try:
        name, rack = run.new_server()
        servers.invite(name, rack)
        file = servers.layouts()[0]
        done = servers.on(servers.gateways[-1], "cluster", "apply", str(file), check=False, timeout_s=120)
    finally:
        servers.authority = kept
    shutil.rmtree(run.older)
    shutil.rmtree(servers.servers.pop(name).folder)
    run.older = None
    if done.returncode == 0 or "LAYOUT_OVERTAKEN" not in done.stderr or servers.status()["epoch"] != epoch:
        run.wrong.append(f"a plan on an older layout: {done.returncode} {done.stdout} {done.stderr}")


ADD = Step("add a server", lambda run: len(run.members) < NODES_MAX, add)
DRAIN = Step("drain and remove a server", lambda run: len(run.members) > NODES_MIN, drain)
UNDRAIN = Step("drain and undrain a server", lambda run: len(run.members) > NODES_MIN, undrain)
RENEW = Step("renew a certificate", lambda run: True, renew)
LOSE = Step("lose a server for good", lambda run: len(run.members) > NODES_MIN, lose)
COME_BACK = Step("a removed server comes back", lambda run: bool(run.left), come_back)
REPLACE = Step("replace a disk", lambda run: True, replace_disk)
RIVALS = Step("two administrators", lambda run: len(run.members) < NODES_MAX - 1, two_administrators)
OLDER = Step("a plan on an older layout", lambda run: run.older is not None, plan_on_an_older_layout)
STEPS = (ADD, DRAIN, UNDRAIN, LOSE, COME_BACK, REPLACE, RIVALS, OLDER, RENEW)
