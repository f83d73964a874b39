"""Disks that forget, under load: wiped, put back, swapped, exchanged, with and without their node's ledger.

One disk, or one node, is away at a time, so a majority of every partition is there. The store must refuse the disk with
its named code, change nothing on it, go on with the others, and lose, stale or corrupt nothing. Then the true disk is
put back, or a complete copy of it, as ``deploy/README.md`` says. Between these, nodes are killed, stand still, have a
disk that hangs, or a clock that is an hour off.
"""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.chaos import control
from tests.chaos.scenarios import Report, kill_one, workload_on
from tests.chaos.shelf import DISKS, NODES, Alteration, Copy, Shelf, fingerprint, standing_still
from tests.chaos.workload import Tally, Workload
from tests.cluster import Cluster
from tests.worlds.frozen_disk import FrozenDisk

WAIT_S = 120.0
FREE_BYTES_MIN = 4 << 30
HOUR_S = 3600
RECODE_DELAY_S = 10
"""The least that can be set."""

ALARMS = frozenset({"CHOSEN_FELL_BACK", "OBJECTS_LOST", "SYSTEM_RECORD_DAMAGED", "BUCKET_KEY_DAMAGED"})
"""What ``status`` may never say here."""

EXPECTED_AFTER = frozenset({"AUDIT_REFUSED_BY_WITNESS"})
"""What stays in ``status`` after a node's directory, with its audit log, was put back for a while."""

FAULTS = (
    "wipe",
    "roll back",
    "ledger lost",
    "kill",
    "swap",
    "roll back within a start",
    "stand still",
    "machine rolled back",
    "unmount",
    "hang",
    "disk of another node",
    "clock",
)


class Play:
    """What is done to one cluster. ``clocks``: the folder of ``clocks/sitecustomize.py``. ``hanging``: a disk that
    can hang takes the place of one. ``hold_s``: how long a fault lasts; ``beside``: now and then a process is killed
    meanwhile.
    """

    def __init__(
        self,
        cluster: Cluster,
        workload: Workload,
        seed: int,
        say: Report,
        *,
        clocks: Path | None = None,
        hanging: FrozenDisk | None = None,
        hold_s: tuple[float, float] = (3.0, 15.0),
        beside: bool = True,
    ) -> None:
        self.cluster = cluster
        self.workload = workload
        self.shelf = Shelf(cluster)
        self._source = random.Random(seed)
        self._say = say
        self._clocks = clocks
        self._hanging = hanging
        self._hold_s = hold_s
        self._beside = beside
        self._earlier: dict[str, Copy] = {}
        """The copy that is kept of a disk, and of a node: one of each kind (``disk``, ``node``)."""
        self.codes: set[str] = set()
        """All codes that ``status`` ever gave."""

    # --- what is seen

    def status(self) -> dict[str, Any]:
        found = control.status(self.cluster)
        self.codes.update(problem["code"] for problem in found["problems"])
        return found

    def refused(self) -> dict[str, str]:
        """The code of each disk that takes no part, by its id."""
        return {
            problem["subject"].rsplit("/", 1)[-1]: problem["code"]
            for problem in self.status()["problems"]
            if problem["code"].startswith("DISK_")
        }

    def _codes(self) -> set[str]:
        return {problem["code"] for problem in self.status()["problems"]}

    def whole(self) -> bool:
        """All nodes are up, and all disks take part."""
        nodes = self.status()["nodes"]
        disks = [disk for node in nodes for disk in node["disks"]]
        return (
            len(nodes) == len(NODES) + 1
            and all(node["state"] == "up" for node in nodes)
            and len(disks) == len(NODES) * len(DISKS)
            and all(disk["state"] == "ok" for disk in disks)
        )

    def wait_whole(self, what: str) -> None:
        self.cluster.wait_until(self.whole, WAIT_S, f"a whole cluster after {what}")

    # --- what is done

    def prepare(self) -> None:
        """Repair may recode soon, while a disk is away; the disk that can hang takes the place of the last one."""
        if self._hanging is None:
            return
        for node in NODES:
            control.stop(self.cluster, node)
            with (self.shelf.directory(node) / "config.toml").open("a") as config:
                config.write(f"recode_delay_s = {RECODE_DELAY_S}\n")  # its last section is [limits]
            if node == NODES[-1]:
                self.shelf.move_to(node, DISKS[-1], self._hanging.directory)
            control.start(self.cluster, node)
            self.wait_whole("a restart")

    def run(self, fault: str) -> bool:
        """Plays one fault, and waits until all disks take part again. Returns False where it can't be played here."""
        method = {
            "kill": self._kill,
            "stand still": self._stand_still,
            "hang": self._hang,
            "clock": self._clock,
        }.get(fault)
        if method is not None:
            done = method()
        else:
            alteration = self._alteration(fault)
            done = alteration is not None
            if alteration is not None:
                self._alter(alteration)
        if done:
            self.workload.tally.done[fault] += 1
            self.wait_whole(fault)
        return done

    def _alteration(self, fault: str) -> Alteration | None:
        node, disk = self._source.choice(NODES), self._source.choice(DISKS)
        if fault in ("wipe", "unmount"):
            return self.shelf.wiped(node, disk, mounted=fault == "wipe")
        if fault == "swap":
            return self.shelf.swapped(node)
        if fault == "ledger lost":
            return self.shelf.without_ledger(node)
        if self.shelf.free_bytes() < FREE_BYTES_MIN:
            self._say(f"too little space for copies: no {fault}")
            return None
        if fault == "disk of another node":
            other = self._source.choice([name for name in NODES if name != node])
            return self.shelf.of_another(node, disk, self.shelf.copy_running(other, disk))
        if fault == "roll back within a start":
            copy = self.shelf.copy_running(node, disk)
        else:
            copy = self._earlier_copy(node, "" if fault == "machine rolled back" else disk)
        self._wait_until_others_know_better(copy)
        return self.shelf.put_back(copy, name=fault)

    def _earlier_copy(self, node: str, disk: str) -> Copy:
        """One of an earlier start, where there is one: of another disk or node than the named one, then."""
        return self._earlier.pop("disk" if disk else "node", None) or self.shelf.copy_running(node, disk)

    def _wait_until_others_know_better(self, copy: Copy) -> None:
        """What a disk did in its last ten seconds may not be in the other nodes' ledgers yet, and a copy of that time
        is accepted (README, limits). When positions were published twice, the second one was measured after the copy.
        """
        others = [node for node in NODES if node != copy.node]
        for disk in [copy.disk] if copy.disk else DISKS:
            for _ in range(2):
                before = self.shelf.positions(others, copy.node, disk)
                self.cluster.wait_until(
                    lambda before=before, disk=disk: all(
                        now > then
                        for now, then in zip(self.shelf.positions(others, copy.node, disk), before, strict=True)
                    ),
                    WAIT_S,
                    f"what {copy.node}/{disk} did to be in the ledgers of {others}",
                )

    def _alter(self, alteration: Alteration) -> None:
        node, shelf = alteration.node, self.shelf
        self._down(node)
        alteration.do()
        if alteration.codes and alteration.name != "machine rolled back" and self._source.random() < 0.4:
            shelf.lose_ledger(node)
            self.workload.tally.done["ledger lost too"] += 1
        before = [fingerprint(place) for place in alteration.left_alone]
        control.start(self.cluster, node)
        self._wait_refused(alteration)
        self._hold(alteration)
        self._down(node)
        changed = [
            str(place)
            for place, earlier in zip(alteration.left_alone, before, strict=True)
            if fingerprint(place) != earlier
        ]
        assert not changed, f"{alteration.name} of {node}: refused, but changed: {changed}"
        alteration.undo()
        if len(alteration.codes) == 1 and self.shelf.free_bytes() > FREE_BYTES_MIN and self._source.random() < 0.3:
            shelf.exchange_for_copy(node, self._source.choice(DISKS))
            self.workload.tally.done["complete copy in place of a disk"] += 1
        self._keep_a_copy(node)
        control.start(self.cluster, node)

    def _keep_a_copy(self, node: str) -> None:
        """Of the node that is down, for later."""
        for kind, disk in (("disk", self._source.choice(DISKS)), ("node", "")):
            if kind not in self._earlier and self.shelf.free_bytes() > FREE_BYTES_MIN:
                self._earlier[kind] = self.shelf.copy(node, disk)

    def _wait_refused(self, alteration: Alteration) -> None:
        """Waits until exactly the altered disks are refused, each with its code."""
        if not alteration.codes:
            self.wait_whole(alteration.name)
            return
        what = f"{alteration.name} of {alteration.node}: {dict(alteration.codes)}"
        self.cluster.wait_until(lambda: self.refused() == alteration.codes, WAIT_S, what)

    def _hold(self, alteration: Alteration) -> None:
        """The load goes on without the disk. Now and then its node is killed, or the gateway or a worker of it."""
        self._let_pass(self._source.uniform(*self._hold_s))
        victim = self._source.choice([alteration.node, "gateway", "worker", "", ""])
        if victim and self._beside:
            kill_one(self.cluster, self.workload, self._source, victim)
        self._wait_refused(alteration)

    def _let_pass(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds))

    def _down(self, node: str) -> None:
        self._source.choice([control.kill, control.kill, control.stop])(self.cluster, node)

    # --- neighbours of a disk that forgets

    def _kill(self) -> bool:
        kill_one(self.cluster, self.workload, self._source, self._source.choice([*NODES, "gateway", "worker"]))
        return True

    def _stand_still(self) -> bool:
        node = self._source.choice(NODES)
        with standing_still(control.pid_of(self.cluster, node)):
            self._let_pass(self._source.uniform(1, 12))
        return True

    def _hang(self) -> bool:
        if self._hanging is None:
            return False
        with self._hanging.hanging():
            self.cluster.wait_until(lambda: "DISK_HUNG" in self._codes(), WAIT_S, "a disk that is seen to hang")
            self._let_pass(self._source.uniform(*self._hold_s))
        return True

    def _clock(self) -> bool:
        if self._clocks is None:
            return False
        node, off_s = self._source.choice(NODES), self._source.choice([-HOUR_S, HOUR_S])
        file = self._clocks / node

        def skewed() -> bool:
            return "CLOCK_SKEWED" in self._codes()

        file.write_text(str(off_s))
        try:
            self.cluster.wait_until(skewed, WAIT_S, f"a clock of {node} that is seen to be {off_s} s off")
            kill_one(self.cluster, self.workload, self._source, self._source.choice(NODES))
            self._let_pass(self._source.uniform(*self._hold_s))
            self.wait_whole("a kill beside a clock that is off")
        finally:
            file.unlink()
        self.cluster.wait_until(lambda: not skewed(), WAIT_S, f"the clock of {node} to be right again")
        return True


def forget_disks(
    cluster: Cluster,
    seconds: float,
    *,
    faults: Iterable[str] = (),
    seed: int = 4,
    think_s: float = 0.0,
    say: Report = print,
    **options: Any,
) -> Tally:
    """Plays ``faults`` once, or all of them for so many seconds, in an order from the seed. At the end everything is
    read, listed and compared. ``options``: of ``Play``.
    """
    workload = workload_on(cluster, f"forget-{seed}", seed=seed, think_s=think_s)
    play = Play(cluster, workload, seed, say, **options)
    play.prepare()
    workload.start()
    started = time.monotonic()
    try:
        for fault in faults or _for_a_while(started + seconds, seed):
            began = time.monotonic()
            say(f"{fault}")
            if play.run(fault):
                took_s = time.monotonic() - began
                say(f"{fault}: {took_s:.0f} s; {workload.tally.summary()}")
    finally:
        workload.stop()
    cluster.wait_until(lambda: _repaired(play), 4 * WAIT_S, "everything repaired")
    workload.read_everything()
    alarms = sorted(play.codes & ALARMS)
    workload.tally.corrupt += [f"status said {code}" for code in alarms]
    workload.tally.logged = errors_in_logs(cluster)
    say(f"{time.monotonic() - started:.0f} s; {workload.tally.summary()}; codes {sorted(play.codes)}")
    return workload.tally


def errors_in_logs(cluster: Cluster) -> Counter[str]:
    """How often each error was logged by the nodes."""
    found: Counter[str] = Counter()
    for node in (*NODES, "gateway"):
        for path in (cluster.directory / node).glob("log*"):
            for line in path.read_text(errors="replace").splitlines():
                if "level=error" in line or "level=critical" in line:
                    event = re.search(r'event=("[^"]*"|\S*)', line)
                    found[event.group(1).strip('"') if event else line[:80]] += 1
                elif line.startswith("Traceback"):
                    found["Traceback"] += 1
    return found


def _for_a_while(end: float, seed: int) -> Iterator[str]:
    source = random.Random(f"faults {seed}")
    while True:
        for fault in source.sample(FAULTS, len(FAULTS)):
            if time.monotonic() > end:
                return
            yield fault


def _repaired(play: Play) -> bool:
    found = play.status()
    codes = {problem["code"] for problem in found["problems"]}
    return bool(found["nodes"]) and not codes - EXPECTED_AFTER and found.get("objects_counted") is True
