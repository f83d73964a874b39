"""Inventories are made while all sorts of things happen: objects change; gateways pause and die in the middle; several
work at once; configurations change; the target refuses, is full, or is not there; source buckets are deleted and made
again.

The program's own planes and workers (``s3.inventories``), over the simulated ring. A day lasts DAY_MS of virtual time.
``inventory_oracle`` judges what is listed. What must hold:

* When a manifest is put, the files that it names are stored, with the sizes and checksums that it names, and have the
  rows that the oracle wants. The checksum follows its manifest.
* A report that counts as finished has its manifest and its checksum in the target, and as many rows as its files.
* A report begins on a day on which none has begun, unless the configuration changed under the last one.
* Once all is well, each day has its report, and the target has what was put there.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import random
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

from storaged.errors import NoSuchBucket, OutcomeUnknown, QuotaExceeded, StoragedError
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.names import Change, RegisterName, Table, Value, Visibility, object_name
from storaged.meta.ports import Outcome
from storaged.objects.api import BodyChecks, Grant, NewMeta
from storaged.objects.code.adding import overtake
from storaged.objects.code.progress import progress_in
from storaged.objects.configuration.access import POLICY, PolicyText
from storaged.objects.configuration.document import NOTHING, Configuration
from storaged.objects.configuration.inventory import CSV, DAILY, INVENTORY, Inventories, Inventory
from storaged.objects.configuration.kinds import ENABLED, VERSIONING, Versioning
from storaged.objects.granted import GrantedObjects
from storaged.objects.inventory import listing
from storaged.objects.inventory.rows import FORMAT, InventoryState, digest_of, read_state
from storaged.objects.plane import ObjectLimits, ObjectPlane
from storaged.objects.records import BucketRecord
from storaged.objects.service import ObjectService
from storaged.s3.context import Endpoint, Front
from storaged.s3.inventories import InventoryWorker
from storaged.s3.inventory import manifest
from storaged.wire import decode
from tests.sim.cluster import DISKS, Gateway
from tests.sim.inventory_oracle import Clients, Report, Wrote, check_rows, rows_of
from tests.sim.parts import ClockJumps
from tests.sim.planes import KnownBuckets, Lives, keys_for, make_plane
from tests.sim.scenario import Scenario, play_out
from tests.sim.virtual import EPOCH_MS, VirtualLoop
from tests.sim.workload import Verdicts

OWNER = "f" * 64
DAY_MS = 4000
"""Longer than a report takes while all is well and no disk is away."""
CALLS = 14
"""Of each worker."""
PLAIN, VERSIONED, TARGET = "plain", "versioned", "target"
SOURCES = (PLAIN, VERSIONED)
LIVES_MAX = 6
SKEW_MS = 300
"""Of gateways. Where clocks are more than a day apart, each takes the other's reports for ones of a wrong clock."""
KEYS = ("a/1", "a/2", "a/3", "b 1", "b 2", "c")
KINDS = {"all": (True, ""), "current": (False, ""), "some": (False, "a/")}
"""Ids of inventories: whether they list all versions, and of which keys."""
FILE_ROWS = 3
DAYS_AFTER = 2
IDLE_MAX, VISITS_MAX = 6, 100
"""Of each of these days: how often the worker may find nothing to do, and how many visits it has."""
ALLOWED = json.dumps(
    {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Principal": {"Service": "s3.amazonaws.com"},
                "Action": "s3:PutObject",
                "Resource": "arn:aws:s3:::target/*",
            }
        ],
    }
)


class Watched:
    """Registers of a gateway. The states of inventories that its worker proposes are judged."""

    def __init__(self, client: Any, play: Listing) -> None:
        self._client = client
        self._play = play

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def change(self, name: RegisterName, update: Callable[[Value | None], Change | None], **how: Any) -> Outcome:
        judged = update
        if name.table == Table.INVENTORY and name.key[:1] == b"s":

            def judged(value: Value | None) -> Change | None:
                change = update(value)
                if change is not None and change.visibility != Visibility.TOMBSTONE:
                    self._play.judge_state(name, value, decode(change.body, InventoryState))
                return change

        outcome: Outcome = await self._client.change(name, judged, **how)
        return outcome


class Delivered(GrantedObjects):
    """What the service puts into the target is judged."""

    def __init__(self, objects: ObjectService, play: Listing) -> None:
        super().__init__(objects)
        self._play = play

    async def put(self, grant: Grant, key: bytes, body: Any, meta: NewMeta, checks: BodyChecks, **named: Any) -> Any:
        data = b"".join([bytes(piece) async for piece in body])
        self._play.offer(key.decode(), data)
        await self._play.pause()
        if self._play.full:
            raise QuotaExceeded
        result = await super().put(grant, key, _pieces(data), meta, checks, **named)
        self._play.stored[key.decode()] = data
        return result


class Process(NamedTuple):
    """One life of a gateway."""

    plane: ObjectPlane
    objects: ObjectService
    directory: KnownBuckets
    worker: InventoryWorker
    turn: asyncio.Lock
    """A gateway has one task that makes inventories."""


class Begun(NamedTuple):
    """``began_s``: before it began."""

    scope: bytes
    report: bytes
    began_s: float


class Listing(Scenario):
    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        self.moves = self.disks_may_be_swapped = self.disks_may_be_full = False
        self.of_objects = True
        self.world.overtake = overtake
        self.first_seeds = DISKS
        self.chance = random.Random(f"inventories {seed}")
        self.lives: dict[str, int | None] = dict.fromkeys((*SOURCES, TARGET), 0)
        """Which life of a bucket there is; None: it is deleted."""
        self._last_life = dict.fromkeys(self.lives, 0)
        self.keys = keys_for(seed, *(bare(name, life).id for name, life in every_life()))
        self.clients = {
            bare(name, life).id: Clients(name == VERSIONED) for name in SOURCES for life in range(LIVES_MAX)
        }
        self.reports = {name: self._some_reports() for name in SOURCES}
        self.allowed = True
        self.full = False
        self.offered: dict[str, set[bytes]] = {}
        """Key in the target -> what a worker began to put there."""
        self.stored: dict[str, bytes] = {}
        """Key in the target -> what was put there, as far as that was acknowledged."""
        self._begun: dict[tuple[str, str, int], Begun] = {}
        self._rows: dict[str, int] = {}
        """Manifest -> how many rows its files have."""
        self.names = {
            f"{name} {key}": object_name(bare(name, 0).id, bare(name, 0).shard_numbers, key.encode())
            for name in SOURCES
            for key in KEYS
        }
        self.last_seen = dict.fromkeys(self.names)
        self._processes = Lives(self._make)
        self._still = self.chance.choice((0.0, 0.2, 0.5))
        self._serial = 0

    def begin_gateways(self) -> None:
        super().begin_gateways()
        for gateway in self.gateways:
            gateway.clock.skew_ms = self.chance.randint(-SKEW_MS, SKEW_MS)

    # --- buckets

    def _some_reports(self) -> tuple[Inventory, ...]:
        chance = self.chance
        return tuple(
            Inventory(
                name,
                chance.random() < 0.9,
                TARGET,
                CSV,
                DAILY,
                KINDS[name][0],
                target_prefix=chance.choice((None, "folder")),
                prefix=KINDS[name][1] or None,
                fields=chance.choice((("Size", "ETag"), ("ETag", "Size"), ("Size", "ETag", "LastModifiedDate"))),
            )
            for name in sorted(chance.sample(sorted(KINDS), chance.choice((1, 2, 2))))
        )

    def bucket_of(self, name: str, plane: ObjectPlane) -> BucketRecord:
        """As it is now. Raises NoSuchBucket."""
        life = self.lives[name]
        if life is None:
            raise NoSuchBucket(BucketName=name)
        found: Configuration = NOTHING
        if name == TARGET:
            found = found.having(POLICY, PolicyText(ALLOWED)) if self.allowed else found
        else:
            found = found.having(INVENTORY, Inventories(self.reports[name]))
        if name == VERSIONED:
            found = found.having(VERSIONING, Versioning(ENABLED))
        return plane.configurations.put(bare(name, life), found)

    def _delete_or_make(self, name: str) -> None:
        """What it had is in another life."""
        if self.lives[name] is not None:
            self.found.faults.append(f"{name} is deleted")
            self.lives[name] = None
        elif self._last_life[name] + 1 < LIVES_MAX:
            self._last_life[name] += name != TARGET  # the target comes back with its objects, as if renamed away
            self.lives[name] = self._last_life[name]

    def _make(self, gateway: Gateway) -> Process:
        plane = make_plane(
            self.world,
            gateway,
            self.keys,
            registers=Watched(gateway.client, self),
            limits=ObjectLimits(lifecycle_day_ms=DAY_MS),
        )
        directory, objects = KnownBuckets(self, plane, (*SOURCES, TARGET)), ObjectService(plane)
        front = Front(Delivered(objects, self), directory, None, Endpoint("eu-fr-1"), plane.clock)  # type: ignore[arg-type]
        worker = InventoryWorker(front, plane, directory, file_rows_max=FILE_ROWS)  # type: ignore[arg-type]
        return Process(plane, objects, directory, worker, asyncio.Lock())

    # --- what happens

    async def worker(self, gateway: Gateway) -> None:
        for _ in range(CALLS):
            await asyncio.sleep(self.chance.uniform(0, 1.5))
            self.found.operations += 1
            kind, process = self.chance.random(), self._processes.of(gateway)
            try:
                if kind < 0.5:
                    await self._work(process, visits=4)
                elif kind < 0.88:
                    await self._change(process)
                else:
                    self._disturb()
            except OutcomeUnknown:
                self.found.unknown += 1
            except (StoragedError, TimeoutError):
                self.found.refused += 1

    async def _work(self, process: Process, visits: int) -> None:
        async with process.turn:
            for _ in range(visits):
                if not await process.worker.once():
                    break
                await self.pause()

    async def pause(self) -> None:
        if self.chance.random() < self._still:
            await asyncio.sleep(self.chance.uniform(0, 0.3))

    def _disturb(self) -> None:
        kind, gone = self.chance.random(), [name for name, life in self.lives.items() if life is None]
        if gone and kind < 0.5:
            self._delete_or_make(self.chance.choice(gone))
        elif kind < 0.6:
            self.reports[self.chance.choice(SOURCES)] = self._some_reports()
        elif kind < 0.73:
            self.allowed = self.chance.random() < 0.6
        elif kind < 0.86:
            self.full = self.chance.random() < 0.4
        else:
            self._delete_or_make(self.chance.choice((*SOURCES, TARGET)))

    async def _change(self, process: Process) -> None:
        name, key, kind = self.chance.choice(SOURCES), self.chance.choice(KEYS), self.chance.random()
        bucket = await process.directory.get(name)
        clients, now_s = self.clients[bucket.id], self.world.loop.time()
        named = [one for one in clients.of(key) if one.version and one.returned < now_s]
        if kind < 0.7 or not named:
            self._serial += 1
            body = b"x" * self.chance.randrange(20) + b"%d" % self._serial
            one = Wrote(key, now_s, hashlib.md5(body).hexdigest(), size=len(body))
            clients.wrote.append(one)
            checks = BodyChecks(size=len(body))
            put = await process.objects.put(bucket, key.encode(), _pieces(body), NewMeta(), checks, owner=OWNER)
            one.version = put.version_id
        elif kind < 0.85:
            one = Wrote(key, now_s)
            clients.wrote.append(one)
            one.version = (await process.objects.delete(bucket, key.encode())).version_id
        else:
            other = self.chance.choice(named)
            one = Wrote(key, now_s, removes=other.version)
            clients.wrote.append(one)
            await process.objects.delete(bucket, key.encode(), version_id=other.version)
        one.returned = self.world.loop.time()

    # --- what workers do

    def judge_state(self, name: RegisterName, value: Value | None, after: InventoryState) -> None:
        before = progress_in(value, InventoryState, FORMAT)
        source, inventory = self._inventory_of(name)
        if before is None or before.report != after.report:
            begun = Begun(name.scope, after.report, self.world.loop.time())
            self._begun.setdefault((source, inventory, after.began_ms), begun)
            if before is None:
                return
            jump = any(isinstance(part, ClockJumps) for part in self.parts)
            if not jump and before.finished_ms and after.began_ms // DAY_MS <= before.began_ms // DAY_MS:
                self.complain(f"{source} {inventory}: a second report of a day begins")
            if not before.finished_ms and before.configuration == after.configuration:
                self.complain(f"{source} {inventory}: a report that is under way is begun again")
            return
        key = after.manifest.decode()
        data = self.stored.get(key)
        if data is None or key not in self._rows:
            self.complain(f"{source} {inventory}: a report is finished without its manifest {key!r}")
        elif self.stored.get(key.removesuffix(".json") + ".checksum") != hashlib.md5(data).hexdigest().encode():
            self.complain(f"{source} {inventory}: a report is finished without its checksum")
        elif after.rows != self._rows[key]:
            self.complain(f"{source} {inventory}: a report says it has {after.rows} rows, not {self._rows[key]}")

    def _inventory_of(self, name: RegisterName) -> tuple[str, str]:
        source = next(one for one, life in every_life() if bare(one, life).id == name.scope)
        return source, next(one for one in KINDS if digest_of(one) == name.key[1:])

    def offer(self, key: str, data: bytes) -> None:
        """A worker begins to put an object into the target."""
        if "/data/" in key and key in self.offered:
            self.complain(f"the data file {key} is put twice")
        self.offered.setdefault(key, set()).add(data)
        if key.endswith("manifest.json"):
            for wrong in self._wrong_in(key, json.loads(data)):
                self.complain(f"{key}: {wrong}")
        elif key.endswith(".checksum"):
            put = self.offered.get(key.removesuffix(".checksum") + ".json", set())
            if data.decode() not in {hashlib.md5(one).hexdigest() for one in put}:
                self.complain(f"{key} comes before its manifest")

    def _wrong_in(self, key: str, document: dict[str, Any]) -> list[str]:
        source, inventory = key.split("/")[-4:-2]
        begun = self._begun.get((source, inventory, int(document["creationTimestamp"])))
        if begun is None or document["sourceBucket"] != source:
            return ["it is of a report that never began"]
        try:
            rows = list(rows_of(document, self.stored))
        except ValueError as error:
            return [str(error)]
        self._rows[key] = len(rows)
        self.found.done["manifests"] += 1
        self.found.done["rows"] += len(rows)
        everything, prefix = KINDS[inventory]
        report = Report(begun.began_s, self.world.loop.time(), prefix, everything)
        return list(check_rows(report, self.clients[begun.scope], rows))

    # --- the end

    async def look_at_the_end(self, reader: Gateway) -> None:
        """Nothing is in the way any more."""
        self.allowed, self.full, self._still = True, False, 0.0
        for name, life in self.lives.items():
            if life is None:
                self._delete_or_make(name)
        reader.clock.skew_ms = SKEW_MS
        process = self._processes.of(reader)
        for _ in range(DAYS_AFTER):
            left_ms = DAY_MS - process.plane.clock.wall_ms() % DAY_MS
            await asyncio.sleep((left_ms + 1) / 1000)
            await self._judge_day(process, process.plane.clock.wall_ms() // DAY_MS)
        await self._look_at_target(process)

    async def _judge_day(self, process: Process, today: int) -> None:
        """Each inventory has to have a finished report that began today or later. With a disk away, reports may take
        longer than a day: then the next one is due when one is finished, and there is always work.
        """
        wanted = [
            (name, one)
            for name in SOURCES
            for one in self.reports[name]
            if one.enabled and self.lives[name] is not None
        ]
        idle, visits = 0, 0
        while wanted and idle < IDLE_MAX and visits < VISITS_MAX:
            visits += 1
            if not await process.worker.once():
                idle += 1
                await asyncio.sleep(DAY_MS / 10_000)
            wanted = [one for one in wanted if not await self._is_made(process, *one, today)]
        for name, report in wanted:
            problems = [one["problem"] for one in process.worker.document()]
            self.complain(f"{name} {report.id} has no report of day {today} after {visits} visits: {problems}")

    async def _is_made(self, process: Process, name: str, report: Inventory, today: int) -> bool:
        state = await read_state(process.plane, self.bucket_of(name, process.plane), digest_of(report.id))
        return state is not None and state.finished_ms > 0 and state.began_ms // DAY_MS >= today

    async def _look_at_target(self, process: Process) -> None:
        """By ETags: there are no fragment stores to read content from."""
        target = self.bucket_of(TARGET, process.plane)
        for key, data in sorted(self.stored.items()):
            etag = (await process.objects.head(target, key.encode())).etag
            possible = {data} if "/data/" in key else self.offered[key]
            if etag not in {hashlib.md5(one).hexdigest() for one in possible}:
                self.complain(f"{key} is not as it was put")


def every_life() -> Iterator[tuple[str, int]]:
    return itertools.product((*SOURCES, TARGET), range(LIVES_MAX))


def bare(name: str, life: int) -> BucketRecord:
    return BucketRecord(name, f"{name}{life}".encode().ljust(16, b"."), OWNER, 1, "active", 2, "eu-fr-1")


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    yield body


def _moment(ms: int) -> datetime:
    """Days of the play are some minutes apart in the names of manifests, as real ones are a day apart."""
    return datetime.fromtimestamp((ms - EPOCH_MS) // DAY_MS * 120 + EPOCH_MS // 1000, UTC)


def run_inventories(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    pages = "ROWS_A_PAGE", "VERSIONED_ROWS_A_PAGE", "VERSIONS_A_PAGE"
    before, moment = [getattr(listing, name) for name in pages], manifest._moment
    for name, few in zip(pages, (2, 2, 3), strict=True):
        setattr(listing, name, few)
    manifest._moment = _moment
    try:
        return play_out(lambda loop: Listing(seed, loop, rules))
    finally:
        manifest._moment = moment
        for name, its in zip(pages, before, strict=True):
            setattr(listing, name, its)
