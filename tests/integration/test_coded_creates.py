"""PUTs of coded objects while disks and replicas fail, by all of the program: its writer, its proposers and acceptors.

A seed chooses what a few keys have been through, PUTs, copies and deletions at once or one after the other, by two
gateways, and which disks fail meanwhile, how and when. A collector looks on. Then all is well again. What was
acknowledged last must be there, or what came later and has an unknown outcome; also when any one rack is lost.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest

from storaged.errors import (
    DiskUnusable,
    NoSuchKey,
    OutcomeUnknown,
    PeerTimeout,
    PeerUnreachable,
    ServiceUnavailable,
    StoragedError,
)
from storaged.maintain.context import MaintainLimits
from storaged.objects.api import BodyChecks, CopySource, NewMeta
from storaged.objects.configuration.document import NOTHING
from storaged.objects.configuration.kinds import ENABLED, VERSIONING, Versioning
from storaged.objects.records import BucketRecord
from storaged.wire import Message
from tests.integration.memory_cluster import WHO, Cluster, Gateway, body_of, run

KEYS = (b"k0", b"k1", b"k2", b"k3")
PASTS = ("none", "object", "small", "deleted", "versions", "lent", "one replica", "two replicas", "two replicas")
FAULTS = ("", "", "away", "away", "full", "late", "hangs", "mute", "mute", "lossy")
"""With "" a disk is as ever, and heartbeats may think otherwise."""

COUNTED = ("", "", "fragment.write", "meta.create", "meta.prepare", "fragment.touch")
"""Calls of what method say when a fault begins, or ends; "": of any."""

SCOPES = ("", "fragment.", "fragment.", "meta.", "meta.")
"""What the methods begin with that a fault concerns."""

ACKNOWLEDGED, FAILED, UNKNOWN = "acknowledged", "failed", "unknown"
FOREVER = float("inf")
DELAYS_S = (0.0, 0.0, 0.001, 0.003, 0.01, 1.0)
LATE_S = (0.002, 0.01, 0.3, 1.5, 6.0)
GOES_S = (*[FOREVER] * 6, 0.002, 0.004, 0.006, 0.6, 1.5)
RETIRE_MS = 3_600_000


@dataclass
class Attempt:
    """Of giving a key ``data``; None: of deleting it."""

    data: bytes | None
    began_s: float
    ended_s: float = FOREVER
    end: str = UNKNOWN
    version_id: str = ""
    also: list[bytes | None] = field(default_factory=list)
    """What a copy may have found as well."""


@dataclass
class Done:
    """What became of the attempts of some seeds."""

    counts: dict[str, int] = field(default_factory=dict)

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


class Faults:
    """Disks fail and recover at calls that the seed chooses."""

    def __init__(self, cluster: Cluster, chance: random.Random) -> None:
        self._cluster = cluster
        self._chance = chance
        self._faults: dict[str, tuple[str, str]] = {}
        disks = [disk.id for disk in cluster.layouts.current.disks]
        bad = chance.sample(disks, chance.choice((1, 1, 2, 2, 3)))
        self._calls: Counter[str] = Counter()
        self._plan = []
        for _ in range(chance.randint(1, 8)):
            counted = chance.choice(COUNTED)
            number = chance.randrange(*((1, chance.choice((30, 100, 300))) if not counted else (1, 14)))
            self._plan.append((counted, number, chance.choice(bad), chance.random() < 0.75, chance.random() < 0.5))

    def begin(self) -> None:
        self._cluster.intercept, self._cluster.answering = self._asked, self._answered

    def end(self) -> None:
        self._cluster.intercept = self._cluster.answering = None
        self._cluster.alive.disks_down.clear()

    def _fault(self, node: str, method: str, request: Message) -> str:
        disk = getattr(request, "disk", "")
        found = [disk] if disk else [name for name in self._faults if f"n{name[0]}" == node]
        for name in found:
            fault, scope = self._faults.get(name, ("", ""))
            if fault and method.startswith(scope):
                return fault
        return ""

    async def _asked(self, caller: str, node: str, method: str, request: Message) -> None:
        chance, down = self._chance, self._cluster.alive.disks_down
        if caller.startswith("g"):
            self._calls.update(("", method))
        for event in list(self._plan):
            counted, number, disk, fails, suspected = event
            if self._calls[counted] < number:
                continue
            self._plan.remove(event)
            self._faults.pop(disk, None)
            down.discard(disk)
            if fails:
                self._faults[disk] = chance.choice(FAULTS), chance.choice(SCOPES)
                if suspected:
                    down.add(disk)
        match self._fault(node, method, request):
            case "away":
                raise PeerUnreachable("away")
            case "full" if method == "fragment.write" or method.startswith("meta."):
                raise DiskUnusable("full", state="full")
            case "late":
                await asyncio.sleep(chance.choice(LATE_S))
            case "hangs":
                await asyncio.sleep(12.0)
                raise PeerTimeout("it hung")
            case "lossy" if chance.random() < 0.4:
                raise PeerUnreachable("lost")

    async def _answered(self, _caller: str, node: str, method: str, request: Message) -> None:
        fault = self._fault(node, method, request)
        if fault == "mute" or (fault == "lossy" and self._chance.random() < 0.4):
            raise PeerUnreachable("its answer was lost")


class Play:
    def __init__(self, cluster: Cluster, chance: random.Random, done: Done) -> None:
        self._cluster = cluster
        self._chance = chance
        self._done = done
        self._gateways: list[Gateway] = []
        self._attempts: dict[bytes, list[Attempt]] = {key: [Attempt(None, -1.0, -1.0, ACKNOWLEDGED)] for key in KEYS}
        self._versioned: set[bytes] = set()

    async def run(self) -> None:
        cluster, chance = self._cluster, self._chance
        self._bare = await cluster.bucket()
        for key in KEYS:
            await self._give_past(key, chance.choice(PASTS))
        await cluster.gateway.plane.background.settle()
        self._gateways = [cluster.new_gateway(name) for name in ("g1", "g2")]  # they think that all keys are new
        faults = Faults(cluster, chance)
        faults.begin()
        for _ in range(chance.randint(1, 3)):
            at_once = [self._change() for _ in range(chance.choice((1, 1, 2, 4)))]
            if chance.random() < 0.4:
                at_once.append(self._collect())
            await asyncio.gather(*at_once)
        faults.end()
        await cluster.pass_s(15.0)
        for gateway in cluster.gateways:
            await gateway.plane.background.settle()
        final = {key: await self._read(key) for key in KEYS}
        for key in KEYS:
            self._judge(key, final[key])
        for _ in range(2):
            await cluster.leap(RETIRE_MS / 1000 + 1)
            await self._collect()
        for lost in ("", *cluster.nodes):
            if lost:
                await cluster.kill(lost)
            for key in KEYS:
                found = await self._read(key)
                if found != final[key]:  # what one replica has was carried on
                    carried = [one.data for one in self._attempts[key] if one.end == UNKNOWN]
                    assert found in carried, (key, lost)
                    final[key] = found
                for attempt in self._attempts[key]:
                    if attempt.version_id and attempt.end == ACKNOWLEDGED:
                        assert await self._read(key, attempt.version_id) == attempt.data, (key, lost, "a version")
            if lost:
                cluster.start(lost, maintain=False)

    # --- what is done

    async def _give_past(self, key: bytes, past: str) -> None:
        cluster, chance, gateway = self._cluster, self._chance, self._cluster.gateway
        if past in ("one replica", "two replicas"):
            kept = chance.sample(list(cluster.nodes), 1 if past == "one replica" else 2)

            async def lose(_caller: str, node: str, method: str, _request: Message) -> None:
                if method in ("meta.accept", "meta.accepts", "meta.create") and node not in kept:
                    raise PeerUnreachable("lost")

            cluster.intercept = lose
            await self._put(gateway, key, self._bytes())
            cluster.intercept = None
            await cluster.pass_s(1.0)
        elif past == "versions":
            self._versioned.add(key)
            for _ in range(2):
                await self._put(gateway, key, self._bytes(), versioned=True)
        elif past != "none":
            await self._put(gateway, key, chance.randbytes(5_000) if past == "small" else self._bytes())
        if past == "lent":
            await self._copy(gateway, key, chance.choice([other for other in KEYS if other != key]))
        if past == "deleted":
            await self._delete(gateway, key)

    def _bytes(self) -> bytes:
        return self._chance.randbytes(self._chance.choice((70_000, 100_000, 150_001, 400_000)))

    async def _change(self) -> None:
        chance = self._chance
        key, gateway = chance.choice(KEYS[: chance.choice((1, 4))]), chance.choice(self._gateways)
        what, data = chance.random(), self._bytes()
        await asyncio.sleep(chance.choice(DELAYS_S))
        if what < 0.8:
            await self._put(gateway, key, data, versioned=key in self._versioned and chance.random() < 0.3)
        elif what < 0.9:
            await self._delete(gateway, key)
        else:
            await self._copy(gateway, key, chance.choice([other for other in KEYS if other != key]))

    def _bucket(self, gateway: Gateway, versioned: bool) -> BucketRecord:
        if not versioned:
            return self._bare
        return gateway.plane.configurations.put(self._bare, NOTHING.having(VERSIONING, Versioning(ENABLED)))

    async def _put(self, gateway: Gateway, key: bytes, data: bytes, *, versioned: bool = False) -> None:
        bucket, checks = self._bucket(gateway, versioned), BodyChecks(size=len(data))
        put = gateway.objects.put(bucket, key, body_of(data), NewMeta(), checks, owner=WHO.user_id)
        goes_s = self._chance.choice(GOES_S) if gateway is not self._cluster.gateway else FOREVER
        await self._try("put", key, data, put, goes_s)

    async def _delete(self, gateway: Gateway, key: bytes) -> None:
        bucket = self._bucket(gateway, key in self._versioned)
        await self._try("delete", key, None, gateway.objects.delete(bucket, key))

    async def _copy(self, gateway: Gateway, source: bytes, to: bytes) -> None:
        """What it gives is what it finds."""
        wanted = CopySource(self._bare, source)
        began_s = self._cluster.loop.time()
        data = await self._read(source, quietly=True)
        if not data or any(one.end == UNKNOWN for one in self._attempts[source]):
            return
        copying = gateway.objects.copy(wanted, self._bare, to, owner=WHO.user_id, meta=None)
        attempt = await self._try("copy", to, data, copying)
        others = [one for one in self._attempts[source] if one.end != FAILED and one.ended_s >= began_s]
        attempt.data, attempt.also = data, [one.data for one in others]

    async def _try(
        self, what: str, key: bytes, data: bytes | None, doing: Awaitable[Any], goes_s: float = FOREVER
    ) -> Attempt:
        """``goes_s``: when the client goes away."""
        attempt = Attempt(data, self._cluster.loop.time())
        self._attempts[key].append(attempt)
        try:
            result = await asyncio.wait_for(doing, goes_s if goes_s < FOREVER else None)
        except (OutcomeUnknown, TimeoutError):
            pass
        except StoragedError:
            attempt.end = FAILED
        else:
            attempt.end, attempt.ended_s = ACKNOWLEDGED, self._cluster.loop.time()
            attempt.version_id = getattr(result, "version_id", "") if what == "put" else ""
        self._done.count(f"{what} {attempt.end}")
        return attempt

    async def _collect(self) -> None:
        await asyncio.sleep(self._chance.choice(DELAYS_S))
        for node in self._cluster.nodes.values():
            await node.maintenance.collector.sweep()
            await node.maintenance.collector.collect_due()

    # --- what is there

    async def _read(self, key: bytes, version_id: str = "", *, quietly: bool = False) -> bytes | None:
        for pause_s in (1.0, 15.0, 0.0):
            try:
                stream = await self._cluster.objects.get(self._bare, key, version_id=version_id)
                return b"".join([bytes(piece) async for piece in stream.chunks()])
            except NoSuchKey:
                return None
            except ServiceUnavailable:
                if quietly:
                    return None
                if not pause_s:
                    raise
            await self._cluster.pass_s(pause_s)
        raise AssertionError

    def _judge(self, key: bytes, found: bytes | None) -> None:
        attempts = self._attempts[key]
        last_s = max(one.began_s for one in attempts if one.end == ACKNOWLEDGED)
        could = [one for one in attempts if one.end != FAILED and one.ended_s >= last_s]
        assert any(found in (one.data, *one.also) for one in could), (
            key,
            [(one.end, one.began_s, one.ended_s) for one in attempts],
        )


def play(seed: int, done: Done) -> None:
    chance = random.Random(seed)
    options: dict[str, Any] = {
        "disks_per_node": chance.choice((2, 2, 3)),
        "limits": MaintainLimits(orphan_age_ms=chance.choice((0, 86_400_000))),
        "retire_delay_ms": chance.choice((0, RETIRE_MS)),
    }
    with mock.patch.object(os, "urandom", chance.randbytes):
        run(lambda cluster: Play(cluster, chance, done).run(), **options)


@pytest.mark.parametrize("first", range(40, 80, 5))
def test_what_was_acknowledged_is_there_after_faults_at_any_moment(first: int) -> None:
    """Seeds 44, 46 and 47 find a second commit that names places from before its block moved, and 78 a gateway that
    deletes fragments of a create which one replica has taken.
    """
    done = Done()
    for seed in range(first, first + 5):
        play(seed, done)
    assert done.counts["put acknowledged"] > 5
