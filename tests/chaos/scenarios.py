"""What is done to a running cluster while a recorded workload is on it. Used by the tests (short) and by ``python -m
tests.chaos`` (long).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos import control
from tests.chaos.workload import Tally, Workload
from tests.cluster import Cluster, children_of

Report = Callable[[str], None]


def workload_on(cluster: Cluster, bucket: str, *, seed: int = 1, attempts: int = 1, think_s: float = 0.0) -> Workload:
    cluster.boto3(attempts=5).create_bucket(Bucket=bucket)
    client = lambda: cluster.boto3(read_timeout_s=30)  # noqa: E731
    return Workload(client, bucket, seed=seed, attempts=attempts, think_s=think_s)


def kill_nodes(
    cluster: Cluster,
    seconds: float,
    *,
    seed: int = 1,
    gateway: bool = True,
    think_s: float = 0.0,
    least: int = 0,
    say: Report = print,
) -> Tally:
    """kill -9 of a random node (the gateway too, and one of its further workers) under load, again and again; at most
    one is away at a time. It lasts longer where there are not yet ``least`` acknowledged writes, and as many reads.
    Then everything is read back.
    """
    source = random.Random(seed)
    workload = workload_on(cluster, f"kill-{seed}", seed=seed, think_s=think_s)
    workload.start()
    end = time.monotonic() + seconds
    done = workload.tally.done
    try:
        while time.monotonic() < end or min(workload.tally.acknowledged, workload.tally.reads) < least:
            time.sleep(source.uniform(0.5, 3))
            victim = source.choice(VICTIMS if gateway else VICTIMS[:3])
            kill_one(cluster, workload, source, victim)
            # The next victim falls only when this one takes part again: two of three racks are the least the store
            # promises to live on.
            cluster.wait_until(lambda: control.all_up(cluster), 60, f"{victim} to be back")
            if sum(done.values()) % 10 == 0:
                say(f"{sum(done.values())} kills; {workload.tally.summary()}")
    finally:
        workload.stop()
    cluster.wait_until(lambda: control.status(cluster)["verdict"] == "HEALTHY", 240, "HEALTHY")
    workload.read_everything()
    say(f"{sum(done.values())} kills in {seconds:.0f} s; {workload.tally.summary()}")
    return workload.tally


VICTIMS = ("n1", "n2", "n3", "gateway", "worker")


def kill_any(cluster: Cluster, workload: Workload, source: random.Random) -> None:
    """As ``kill_one``, of any of them."""
    kill_one(cluster, workload, source, source.choice(VICTIMS))


def kill_one(cluster: Cluster, workload: Workload, source: random.Random, victim: str) -> None:
    """kill -9 of a node, of the gateway, or of a further worker of it (``worker``); starts it again a moment later."""
    workload.tally.done[f"kill {victim}"] += 1
    with workload.outages.one() if victim in ("gateway", "worker") else contextlib.nullcontext():
        if victim == "worker":
            _kill_a_worker(cluster, source)
            return
        control.kill(cluster, victim)
        time.sleep(source.uniform(0.2, 4))
        control.start(cluster, victim)


def _kill_a_worker(cluster: Cluster, source: random.Random) -> None:
    """It comes back by itself."""
    workers = _further_workers(cluster)
    if workers:
        victim = source.choice(workers)
        os.kill(victim, signal.SIGKILL)
        cluster.wait_until(
            lambda: victim not in (now := _further_workers(cluster)) and len(now) == len(workers),
            60,
            "a worker to be back",
        )


def _further_workers(cluster: Cluster) -> list[int]:
    """The pids of the gateway's processes but its first."""
    return children_of(control.pid_of(cluster, "gateway"))


@dataclass
class RackOutcome:
    tally: Tally
    below_target: list[tuple[float, int]] = field(default_factory=list)
    """(seconds since the kill, objects below target)."""
    repaired_after_s: float = 0.0


def lose_a_rack(
    cluster: Cluster, rack: str, away_s: float, *, before_s: float = 4.0, seed: int = 2, say: Report = print
) -> RackOutcome:
    """A rack is killed under load and comes back; every request is retried once. Samples objects below target until the
    cluster is healthy again.
    """
    workload = workload_on(cluster, f"rack-{seed}", seed=seed, attempts=2)
    outcome = RackOutcome(workload.tally)
    workload.start()
    try:
        time.sleep(before_s)
        started = time.monotonic()

        def sample() -> dict[str, object]:
            status = control.status(cluster)
            outcome.below_target.append(
                (round(time.monotonic() - started, 1), int(status.get("objects_below_target", 0)))
            )
            return status

        cluster.run("dev", "kill", rack)
        while time.monotonic() < started + away_s:
            sample()
            time.sleep(1)
    finally:
        workload.stop()
    cluster.run("dev", "start", rack)
    returned = time.monotonic()
    cluster.wait_until(lambda: sample()["verdict"] == "HEALTHY", 240, "full redundancy after the rack's return")
    outcome.repaired_after_s = time.monotonic() - returned
    workload.read_everything()
    say(
        f"rack {rack} away {away_s:.0f} s; {workload.tally.summary()}; full redundancy {outcome.repaired_after_s:.1f} s"
        " after its return"
    )
    return outcome


@dataclass
class FlipOutcome:
    flips: int = 0
    wrong: int = 0
    refused: int = 0
    reads: int = 0


def flip_bits(
    cluster: Cluster, flips: int, *, waves: int, seed: int = 3, objects: int = 24, say: Report = print
) -> FlipOutcome:
    """Bits flipped in live segment files, in waves on one rack each; after every wave all objects are read, then scrub
    and repair mend them.

    A wave stays within one rack because what is promised is the loss of any one rack: damage beyond m fragments of a
    block can only be refused.
    """
    source = random.Random(seed)
    client = cluster.boto3(attempts=3)
    bucket = f"flip-{seed}"
    client.create_bucket(Bucket=bucket)
    bodies = {
        f"o{i:02d}": source.randbytes(source.choice([3000, 14_000, 200_000, 400_000, 5_000_000]))
        for i in range(objects)
    }
    for key, body in bodies.items():
        client.put_object(Bucket=bucket, Key=key, Body=body)
    outcome = FlipOutcome()

    def read_all() -> None:
        for key, body in bodies.items():
            outcome.reads += 1
            try:
                got = client.get_object(Bucket=bucket, Key=key)["Body"].read()
            except Exception as error:
                outcome.refused += 1
                say(f"  {key}: refused: {error}")
                continue
            outcome.wrong += got != body

    for wave in range(waves):
        node = ["n1", "n2", "n3"][wave % 3]
        segments = sorted(path for path in (cluster.directory / node).rglob("*.seg") if path.stat().st_size > 8192)
        assert segments, f"no segment files below {cluster.directory / node}"
        for _ in range(flips // waves):
            outcome.flips += flip_one_bit(source, source.choice(segments))
        read_all()
        cluster.run("scrub", "--wait", timeout_s=300)
        cluster.wait_healthy(180)
    read_all()
    say(
        f"{outcome.flips} bits flipped in {waves} waves; {outcome.reads} reads: wrong {outcome.wrong}, refused"
        f" {outcome.refused}"
    )
    return outcome


def flip_one_bit(source: random.Random, path: Path) -> int:
    """Flips a bit of a byte that is not zero (holes and padding hold nothing worth breaking). Returns 1 when one was
    flipped.
    """
    size = path.stat().st_size
    with path.open("r+b") as file:
        for _ in range(100):
            offset = source.randrange(size)
            file.seek(offset)
            byte = file.read(1)
            if byte and byte != b"\0":
                file.seek(offset)
                file.write(bytes([byte[0] ^ (1 << source.randrange(8))]))
                return 1
    return 0
