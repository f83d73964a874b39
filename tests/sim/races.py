"""Clients race on a few keys of three buckets: without versioning, with versioning and Object Lock, and with versioning
that was suspended. What they do is ``racing``; it goes through the program's own object plane, over the simulated ring.
Gateways pause and die in the middle, and lifecycle looks at keys. A record has so few versions that most lie on pages.

The history of each key is judged, with its versions and locks (``version_histories``).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
from collections.abc import AsyncIterator
from typing import Any

from storaged.errors import (
    AccessDenied,
    NoSuchKey,
    NoSuchVersion,
    OutcomeUnknown,
    PreconditionFailed,
    StoragedError,
)
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.names import RegisterName, Value, object_name
from storaged.objects.api import BodyChecks, CompletedPart, NewMeta, WriteConditions
from storaged.objects.code.adding import overtake
from storaged.objects.code.history import Bounds
from storaged.objects.configuration.document import NOTHING
from storaged.objects.configuration.kinds import ENABLED, LOCK, VERSIONING, ObjectLock, Versioning
from storaged.objects.configuration.kinds import SUSPENDED as SUSPENDED_STATUS
from storaged.objects.configuration.lifecycle import LIFECYCLE, Lifecycle, LifecycleFilter, LifecycleRule
from storaged.objects.etags import ANY, tag
from storaged.objects.lifecycle.look import Judge, look_at
from storaged.objects.plane import ObjectLimits, ObjectPlane
from storaged.objects.read.get import head
from storaged.objects.records import BucketRecord
from storaged.objects.records import Lock as LockRecord
from storaged.objects.service import ObjectService
from storaged.objects.source_types import CopySource
from storaged.objects.write import versioned
from tests.sim.cluster import DISKS, Gateway
from tests.sim.planes import Lives, keys_for, make_plane
from tests.sim.racing import PLAIN, SUSPENDED, VERSIONED, Race, Refused, Unknown, expiries
from tests.sim.scenario import Scenario, play_out
from tests.sim.version_histories import DENIED, MISSING, REFUSED, UNSEEN, Adds, Conditional, Lock, judge
from tests.sim.virtual import EPOCH_MS, VirtualLoop
from tests.sim.workload import Verdicts

OWNER = "f" * 64
FEW = Bounds(versions_max=3, versions_bytes_max=1 << 20, leaf_versions=2, refs_max=2, branch_refs=2)
CALLS = 9
"""Of each worker."""
HOUR_MS = 3_600_000
RULE = LifecycleRule("all", True, LifecycleFilter(""), noncurrent_days=1, newer_noncurrent=1)


def bucket_of(kind: str) -> BucketRecord:
    return BucketRecord(kind, kind.encode().ljust(16, b"."), OWNER, 1, "active", 2, "eu-fr-1")


CONFIGURATIONS = {
    PLAIN: NOTHING,
    SUSPENDED: NOTHING.having(VERSIONING, Versioning(SUSPENDED_STATUS)),
    VERSIONED: NOTHING.having(VERSIONING, Versioning(ENABLED))
    .having(LOCK, ObjectLock())
    .having(LIFECYCLE, Lifecycle((RULE,))),
}


class Buckets:
    """``look.KnownBuckets``."""

    def __init__(self, bucket: BucketRecord) -> None:
        self._bucket = bucket

    def try_get(self, name: str) -> BucketRecord:
        return self._bucket

    async def get(self, name: str) -> BucketRecord:
        return self._bucket


@contextlib.contextmanager
def answered() -> Any:
    try:
        yield
    except OutcomeUnknown:
        raise Unknown from None
    except PreconditionFailed:
        raise Refused(REFUSED) from None
    except (NoSuchKey, NoSuchVersion):
        raise Refused(MISSING) from None
    except AccessDenied:
        raise Refused(DENIED) from None
    except StoragedError:
        raise Refused from None


class PlanePort:
    """``racing.Port`` to one life of a gateway."""

    def __init__(self, plane: ObjectPlane) -> None:
        self.plane = plane
        self.objects = ObjectService(plane)
        bare = {kind: bucket_of(kind) for kind in CONFIGURATIONS}
        self.buckets = {kind: plane.configurations.put(bare[kind], its) for kind, its in CONFIGURATIONS.items()}
        enabled = NOTHING.having(VERSIONING, Versioning(ENABLED))
        self._enabled = plane.configurations.put(bare[SUSPENDED], enabled)

    async def put(self, bucket: str, key: str, body: bytes, how: Adds, lock: Lock) -> tuple[str, str]:
        late = bucket == SUSPENDED and how.id == UNSEEN  # by a gateway that does not know of it yet
        record = self._enabled if late else self.buckets[bucket]
        meta = NewMeta(lock=LockRecord(*lock) if lock != Lock() else None)
        with answered():
            result = await self.objects.put(
                record,
                key.encode(),
                pieces(body),
                meta,
                BodyChecks(size=len(body)),
                owner=OWNER,
                conditions=_conditions(how),
            )
        return result.version_id, result.etag

    async def copy(self, bucket: str, key: str, body: bytes) -> tuple[str, str]:
        source = b"of " + hashlib.sha256(body).hexdigest()[:16].encode()
        place = self.buckets[PLAIN]
        try:
            await self.put(PLAIN, source.decode(), body, Adds(), Lock())
        except Unknown:
            raise Refused from None
        with answered():
            result = await self.objects.copy(
                CopySource(place, source), self.buckets[bucket], key.encode(), owner=OWNER, meta=None
            )
        return result.version_id, result.etag

    async def begin_upload(self, bucket: str, key: str, body: bytes) -> tuple[Any, str]:
        record = self.buckets[bucket]
        with answered():
            upload = await self.objects.create_upload(record, key.encode(), NewMeta(), owner=OWNER)
            part = await self.objects.put_part(
                record, key.encode(), upload.upload_id, 1, pieces(body), BodyChecks(size=len(body))
            )
        whole = hashlib.md5(bytes.fromhex(part.etag)).hexdigest() + "-1"
        return (upload.upload_id, part.etag), whole

    async def complete(self, bucket: str, key: str, upload: Any, how: Conditional) -> tuple[str, str]:
        upload_id, etag = upload
        with answered():
            result = await self.objects.complete(
                self.buckets[bucket],
                key.encode(),
                upload_id,
                [CompletedPart(1, etag)],
                owner=OWNER,
                conditions=_conditions(how),
            )
        return result.version_id, result.etag

    async def delete(self, bucket: str, key: str, version: str, how: Conditional, *, bypass: bool) -> str:
        with answered():
            result = await self.objects.delete(
                self.buckets[bucket],
                key.encode(),
                version_id=version,
                bypass_governance=bypass,
                conditions=_conditions(how),
            )
        return result.version_id if result.delete_marker else ""

    async def retain(self, bucket: str, key: str, version: str, lock: Lock, *, bypass: bool) -> None:
        with answered():
            await self.objects.set_retention(
                self.buckets[bucket],
                key.encode(),
                lock.mode,
                lock.until_ms,
                version_id=version,
                bypass_governance=bypass,
            )

    async def hold(self, bucket: str, key: str, version: str, *, on: bool) -> None:
        with answered():
            await self.objects.set_hold(self.buckets[bucket], key.encode(), on, version_id=version)

    async def lock_of(self, bucket: str, key: str, version: str) -> Lock:
        with answered():
            info = await head(self.plane, self.buckets[bucket], key.encode(), version_id=version)
        lock = info.lock or LockRecord()
        return Lock(lock.mode, lock.until_ms, lock.hold)

    async def current(self, bucket: str, key: str) -> str:
        with answered():
            return (await head(self.plane, self.buckets[bucket], key.encode())).etag

    async def versions(self, bucket: str, key: str) -> list[tuple[str, str]]:
        with answered():
            page = await self.objects.list_versions(self.buckets[bucket], prefix=key.encode())
        return [(one.version_id, "" if one.delete_marker else one.etag) for one in page.versions]


def _conditions(how: Conditional) -> WriteConditions:
    return WriteConditions(tag(how.if_match) if how.if_match else None, ANY if how.if_absent else None)


async def pieces(body: bytes) -> AsyncIterator[bytes]:
    yield body


class Pausing:
    """The registers of a gateway. Now and then it pauses between a promise and its accept."""

    def __init__(self, client: Any, chance: random.Random, often: float) -> None:
        self._client = client
        self._chance = chance
        self._often = often

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def change(self, name: RegisterName, update: Any, *, ready: Any = None, **how: Any) -> Any:
        pause_s = self._chance.uniform(0, 0.3) if self._chance.random() < self._often else 0.0
        if not pause_s:
            return await self._client.change(name, update, ready=ready, **how)
        judged = asyncio.Event()

        def seen(value: Value | None) -> Any:
            change = update(value)
            judged.set()
            return change

        async def paused() -> None:
            await judged.wait()
            await asyncio.sleep(pause_s)
            if ready is not None:
                await ready

        task = asyncio.ensure_future(paused())
        try:
            how.pop("regardless", None)
            return await self._client.change(name, seen, ready=task, **how)
        finally:
            task.cancel()


class Races(Scenario):
    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        self.world.overtake = overtake
        self.moves = self.disks_may_be_swapped = self.disks_may_be_full = False
        self.of_objects = True
        self.first_seeds = DISKS
        self._chance = random.Random(f"races {seed}")
        self.keys = keys_for(seed, *(bucket_of(kind).id for kind in CONFIGURATIONS))
        self.places = [(VERSIONED, f"{VERSIONED} {number}") for number in range(2)]
        self.places += [(PLAIN, f"{PLAIN} 0"), (SUSPENDED, f"{SUSPENDED} 0")]
        self.names = {
            key: object_name(bucket_of(kind).id, bucket_of(kind).shard_numbers, key.encode())
            for kind, key in self.places
        }
        self.last_seen = dict.fromkeys(self.names)
        self.race = Race(
            self._chance,
            lambda: EPOCH_MS + int(loop.time() * 1000),
            lambda body: hashlib.md5(body).hexdigest(),
            history=self.history,
        )
        self._pauses = self._chance.choice((0.0, 0.1, 0.3))
        self._expires = self._chance.random() < 0.4
        self._ports = Lives(self.make_port)

    def make_port(self, gateway: Gateway) -> PlanePort:
        return PlanePort(self.make_plane(gateway))

    def make_plane(self, gateway: Gateway) -> ObjectPlane:
        return make_plane(
            self.world,
            gateway,
            self.keys,
            registers=Pausing(gateway.client, self._chance, self._pauses),
            limits=ObjectLimits(lifecycle_day_ms=100),
            agreed_ms=lambda: self.race.now_ms() + HOUR_MS,
        )

    async def worker(self, gateway: Gateway) -> None:
        for _ in range(CALLS):
            await asyncio.sleep(self._chance.uniform(0, 0.03))
            self.found.operations += 1
            kind, key = self._chance.choice(self.places)
            if kind == VERSIONED and self._expires and self._chance.random() < 0.15:
                with contextlib.suppress(StoragedError):
                    await self._look(self._ports.of(gateway), key)
            elif kind == SUSPENDED and self._chance.random() < 0.15:
                await self.race.put_named(self._ports.of(gateway), kind, key)
            else:
                await self.race.step(self._ports.of(gateway), kind, key)

    async def _look(self, port: PlanePort, key: str) -> None:
        bucket = port.buckets[VERSIONED]
        await look_at(port.plane, Judge(port.plane, Buckets(bucket), bucket), bucket, key.encode())

    async def look_at_the_end(self, reader: Gateway) -> None:
        await asyncio.sleep(1.0)
        for kind, key in self.places:
            before = len(self.history)
            await self.race.list(self._ports.of(reader), kind, key)
            if len(self.history) == before:
                self.complain(f"{key} cannot be listed after everything healed")

    def judge(self) -> Verdicts:
        race, found = self.race, self.found
        found.done["answers"] = len(race.counts)
        found.unknown, found.refused = race.counts["unknown"], race.counts["no answer"]
        if self._expires:
            expired = expiries(race, [key for kind, key in self.places if kind == VERSIONED], after_ms=0)
            self.history += expired
            found.done["expiries"] = len(expired)
        for wrong in race.wrong + judge(self.history):
            self.complain(wrong)
        self.history = []
        return super().judge()


def run_races(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    bounds, versioned.BOUNDS = versioned.BOUNDS, FEW
    try:
        return play_out(lambda loop: Races(seed, loop, rules))
    finally:
        versioned.BOUNDS = bounds
