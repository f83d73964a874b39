"""As ``lending``, between buckets that are created and deleted: copies borrow the data of keys in other buckets, and a
bucket that is deleted meanwhile goes on as a lender (``objects.system.lenders``).

Buckets, their fences and lenders, loans, the ends of loans, what collectors know of buckets, and the ends of keys are
the program's own. Gateways fall asleep in a PUT, a copy or a DeleteBucket, and die; uploads stay open; one replica lies
about fences and hides uploads. Besides what ``lending`` judges:

* A bucket whose deletion is acknowledged is empty then, and for ever. Nothing is acknowledged in it that began later,
  and its name is free.
* A reader of a borrowing version gets the parts of its loan, and their fragments are where their writer saw them
  durable.
* When all is well, no lender stays that lends nothing. When all objects and buckets are deleted, no record of a bucket
  stays, each fence is final, each key has ended, and no data stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from storaged.errors import BucketNotEmpty, DataDamaged, NoSuchBucket, S3Error, StoragedError
from storaged.fragments.ports import FragmentId
from storaged.maintain.asks import SETTLED, UNSETTLED, Settle, SettledNames
from storaged.maintain.disuse import Judge
from storaged.maintain.gc import Collector
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.messages import FencesAsk
from storaged.meta.names import Change, RegisterName, Table, object_name, upload_name
from storaged.objects.api import Principal
from storaged.objects.code.history import Draft
from storaged.objects.code.lending import borrowed_by, find_borrower, may_lend, name_of_owner
from storaged.objects.code.version_names import NULL_NAME, VersionName
from storaged.objects.code.version_walk import every_entry
from storaged.objects.code.versions import decode_record
from storaged.objects.plane import ObjectLimits, ObjectPlane
from storaged.objects.read.borrowed import with_data
from storaged.objects.read.find import Found
from storaged.objects.records import ACTIVE, LENDING, BucketRecord, PartEntry, Version, sharing_of
from storaged.objects.sharing import Borrowed
from storaged.objects.system import buckets as program
from storaged.objects.system.buckets import BucketService
from storaged.objects.system.keyends import destroy_ended_keys
from storaged.objects.system.shards import Drawn
from storaged.objects.write.commit import AfterPromise
from storaged.objects.write.loans import Wanted, bucket_of_owner, end_unused, introduce, retire_gone, with_loan
from storaged.objects.write.uploads import OPEN, UploadRecord
from storaged.wire import encode
from tests.doubles.keys import MemorySigners
from tests.sim.cluster import DISKS, Gateway
from tests.sim.collecting import HOUR_S, KEYS, CollectingNode, GatewayAsks
from tests.sim.collecting_uploads import Uploads
from tests.sim.hiding import HidingNode
from tests.sim.lending import Lending, Source, _Sleepy, few
from tests.sim.linear import Kind, Operation
from tests.sim.planes import Lives, make_plane
from tests.sim.scenario import play_out
from tests.sim.versions import VersionsOperation
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts

WHO = Principal("f" * 64, "tester")
BUCKETS = ("one", "two", "three")
SHARDS = 2
"""Of each bucket: every scan and every fence asks all of them."""
OPERATIONS = 20
PAUSE_S_MAX = 1.5
ALWAYS_MS = -(1 << 50)
"""No borrower is spared because it is young."""
ROUNDS_MAX = 7
"""Of housekeeping in the end."""
DELETIONS_MAX = 6


class _Opened(NamedTuple):
    """As much of an ``OpenedVersion`` as ``with_data`` looks at."""

    version: Version
    borrowed: Borrowed | None


class _SleepyFences:
    """After some of its fences a gateway pauses."""

    def __init__(self, client: Any, play: Lenders) -> None:
        self._client = client
        self._play = play

    async def fence(self, *what: Any, **how: Any) -> bool:
        everywhere: bool = await self._client.fence(*what, **how)
        await self._play.nap()
        return everywhere

    async def unfence(self, *what: Any) -> bool:
        everywhere: bool = await self._client.unfence(*what)
        await self._play.nap()
        return everywhere


class _Mover:
    """A gateway that moves blocks: it changes the rows of lenders, too."""

    def __init__(self, gateway: Gateway, plane: ObjectPlane) -> None:
        self.caller = gateway.caller
        self.client = _MoversClient(gateway.client, plane)


class _MoversClient:
    def __init__(self, client: Any, plane: ObjectPlane) -> None:
        self._client = client
        self.read = plane.lender_registers.read
        self._change = plane.lender_registers.change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def change(self, name: RegisterName, update: Any, *, ready: Any) -> Any:
        task = asyncio.ensure_future(ready)
        try:
            return await self._change(name, update, ready=task)
        finally:
            task.cancel()


class _Asks(GatewayAsks):
    """Gateways settle the rows of lenders, too."""

    _run: Lenders

    async def ask(self, kind: str, request: Settle, answer: type[SettledNames]) -> SettledNames:
        run, asked = self._run, await super().ask(kind, request, answer)
        gateways = [gateway for gateway in run.gateways if gateway.caller.alive]
        results = list(asked.results)
        for at, packed in enumerate(request.names):
            if results[at] == UNSETTLED and gateways:
                plane, _ = run.tools(run.luck.choice(gateways))
                with contextlib.suppress(StoragedError):
                    await plane.lender_registers.settle(RegisterName.unpack(packed))
                    results[at] = SETTLED
        return SettledNames(tuple(results), asked.reasons)


class _Uploads(Uploads):
    """Some are in buckets that are gone."""

    _run: Lenders

    async def end(self, gateway: Gateway) -> None:
        owners, living = self._owners, await self._run.living(gateway)
        for name, owner in owners.items():
            self._owners = {name: owner} if name.scope in living else {}
            with contextlib.suppress(NoSuchBucket):
                await super().end(gateway)
        self._owners = owners


class Lenders(Lending):
    node_kind = HidingNode

    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        self._skewed = seed % 4 == 0
        self.luck = random.Random(f"lenders {seed}")
        self.lies = self.luck.random() < 0.4
        self.liar = self.luck.choice(DISKS) if self.lies else ""
        HidingNode.play = self  # type: ignore[assignment]
        self.calm_s = self.luck.choice((2.0, 6.0, 20.0))
        self.pauses_s = (0.5, 2.0, 5.0, 10.0)
        self._sleeps_long = self.luck.choice((0.0, 0.02, 0.05))
        self._lifetime_s = self.luck.choice((6.0, 20.0, 60.0))
        """Of a gateway."""
        self._services = Lives(self._make_service)
        self._directories: dict[str, Any] = {}
        self._records: dict[bytes, BucketRecord] = {}
        """By id: every bucket that was seen."""
        self._deleted_at: dict[bytes, int] = {}
        """When the deletion of a bucket was acknowledged, by id."""
        self._asked: set[bytes] = set()
        """Buckets whose deletion was asked for."""
        self._made: dict[str, set[bytes]] = defaultdict(set)
        """By name: buckets whose creation was acknowledged, and whose deletion was not asked for."""
        self.uploads = _Uploads(self)
        self._lives: dict[Gateway, dict[asyncio.Task[Any], None]] = defaultdict(dict)

    def _skew_ms(self, *hours: int) -> int:
        return super()._skew_ms(*hours) if self._skewed else self.world.skew_ms()

    # --- gateways

    async def nap(self) -> None:
        await super().nap()
        if not self._healed and self.luck.random() < self._sleeps_long:
            self.found.faults.append("a gateway slept")
            await asyncio.sleep(self.luck.uniform(0.3, 2.0) * HOUR_S)

    def _make_plane(self, gateway: Gateway) -> ObjectPlane:
        plane = make_plane(
            self.world,
            gateway,
            self._keys,
            registers=_Sleepy(gateway.client, self),
            limits=ObjectLimits(retire_delay_ms=0),
            on_fenced=lambda scope: self._services.of(gateway).fenced(scope),
        )
        later: Any = SimpleNamespace(add=lambda disk, entry: self._retire_later(gateway, disk, entry))
        spawning: Any = SimpleNamespace(spawn=self._spawn)
        stores: Any = SimpleNamespace(store=lambda disk: self.store(gateway, disk))
        fences: Any = _SleepyFences(gateway.client, self)
        plane.garbage, plane.background, plane.stores, plane.fences = later, spawning, stores, fences
        return plane

    def _make_service(self, gateway: Gateway) -> BucketService:
        return BucketService(self._planes.of(gateway))

    def _tools(self, gateway: Gateway) -> Any:
        self._services.of(gateway)  # knows the lenders
        return super()._tools(gateway)

    def tools(self, gateway: Gateway) -> Any:
        return self._tools(gateway)

    def _bucket(self, name: RegisterName) -> BucketRecord:
        return self._records[name.scope]

    def place(self, name: RegisterName) -> str:
        return _place(name.scope, name.key)

    def _retire_removed(self, gateway: Gateway, name: RegisterName, removed: Any) -> None:
        plane, _ = self._tools(gateway)
        retire_gone(plane, self._bucket(name), name, removed)

    @contextlib.asynccontextmanager
    async def _noted(self, operation: Operation) -> Any:
        """One whose gateway died stays open."""
        try:
            async with super()._noted(operation):
                yield
        except asyncio.CancelledError:
            if operation.kind is not Kind.READ:
                self.history.append(operation)
            raise
        scope = bytes.fromhex(operation.key.partition("/")[0])
        if operation.kind is Kind.PUT and -1 < self._deleted_at.get(scope, -1) < operation.invoked:
            self.complain("something was written in a bucket that was gone")

    # --- the workload

    async def worker(self, gateway: Gateway) -> None:
        for _ in range(OPERATIONS):
            await asyncio.sleep(self.luck.uniform(0, PAUSE_S_MAX))
            self.found.operations += 1
            work = self.world.loop.create_task(self._operate(gateway))
            self._lives[gateway][work] = None
            try:
                await asyncio.wait([work])
            finally:
                self._lives[gateway].pop(work, None)
            if not work.cancelled() and (error := work.exception()) is not None:
                raise error

    async def _operate(self, gateway: Gateway) -> None:
        names = self.luck.sample(BUCKETS, 2)
        try:
            await self._note(self._do(gateway, *names))
        except NoSuchBucket:
            self.found.refused += 1
            for name in names:
                with contextlib.suppress(S3Error):
                    await self._create(gateway, name)

    async def _note(self, work: Any) -> None:
        """NoSuchBucket is not for it."""
        missing: NoSuchBucket | None = None

        async def noted() -> None:
            nonlocal missing
            try:
                await work
            except NoSuchBucket as error:
                missing = error

        await super()._note(noted())
        if missing is not None:
            raise missing

    async def _do(self, gateway: Gateway, bucket: str, other: str) -> None:
        key, kind = self.luck.choice(KEYS), self.luck.random()
        null = key != self.with_versions or self.luck.random() < 0.3
        if kind < 0.22:
            await self._put(gateway, await self._name(gateway, bucket, key), null=null)
        elif kind < 0.25:
            await self._put_small(gateway, await self._name(gateway, bucket, key))
        elif kind < 0.57:
            await self._copy_to(gateway, bucket if self.luck.random() < 0.15 else other, bucket, key)
        elif kind < 0.65:
            name = await self._name(gateway, bucket, key)
            await self._list(gateway, name)
            await self._remove(gateway, name)
        elif kind < 0.75:
            await self._read(gateway, await self._name(gateway, bucket, key))
        elif kind < 0.78:
            await self._open_upload(gateway, await self._name(gateway, bucket, key))
        elif kind < 0.84:
            await self._move_in(gateway, await self._name(gateway, bucket, key))
        elif kind < 0.9:
            await self._housekeep(gateway)
        elif kind < 0.92:
            await self._delete_bucket(gateway, bucket)
        else:
            if kind > 0.95:
                await self._note(self._copy_to(gateway, bucket, other, key))
            await self._empty(gateway, bucket)
            await self._delete_bucket(gateway, bucket)

    async def _name(self, gateway: Gateway, bucket: str, key: bytes) -> RegisterName:
        record = await self._get(gateway, bucket)
        return object_name(record.id, record.shard_numbers, key)

    async def _get(self, gateway: Gateway, bucket: str) -> BucketRecord:
        record = await self._services.of(gateway).get(bucket)
        self._records[record.id] = record
        return record

    async def living(self, gateway: Gateway) -> dict[bytes, BucketRecord]:
        """Active buckets, by id."""
        records = await self._services.of(gateway).every_bucket()
        return {record.id: record for record in records if record.state == ACTIVE}

    # --- buckets

    async def _create(self, gateway: Gateway, name: str) -> None:
        before = set(self._made[name])
        record = await self._services.of(gateway).create(WHO, name, region="eu-fr-1")
        self._records[record.id] = record
        if before & self._made[name]:
            self.complain(f"two buckets have the name {name}")
        if record.id not in self._asked:
            self._made[name].add(record.id)
        self.found.done["buckets"] += 1

    async def _empty(self, gateway: Gateway, bucket: str) -> None:
        """Removes all versions of all keys."""
        for key in KEYS:
            name = await self._name(gateway, bucket, key)
            for _ in range(len(await self._list(gateway, name))):
                await self._remove(gateway, name)

    async def _delete_bucket(self, gateway: Gateway, name: str) -> None:
        record = await self._get(gateway, name)
        self._asked.add(record.id)
        self._made[name].discard(record.id)
        try:
            await self._services.of(gateway).delete(record)
        except BucketNotEmpty:
            self.found.done["not empty"] += 1
            raise
        self._gone(record)

    def _gone(self, record: BucketRecord) -> None:
        if record.id in self._deleted_at:
            return
        self._deleted_at[record.id] = self.moment()
        self.found.done["buckets deleted"] += 1
        self._see_empty(record)

    def _see_empty(self, record: BucketRecord) -> None:
        for key in KEYS:
            now = self.moment()
            self.history.append(
                VersionsOperation(Kind.READ, _place(record.id, key), now, returned=self.moment(), observed=b"")
            )

    async def _housekeep(self, gateway: Gateway) -> None:
        """As ``node.housekeeping.tidy``."""
        plane, _ = self._tools(gateway)
        service = self._services.of(gateway)
        records = await service.every_bucket()
        await destroy_ended_keys(plane, service)
        for record in records:
            lends = record.state == LENDING
            if not lends:
                self._records.setdefault(record.id, record)
            with contextlib.suppress(StoragedError):
                if await service.resume(record) is None:
                    self.found.done["lenders ended"] += lends
                    if not lends:
                        self._gone(record)

    # --- objects

    async def _copy_to(self, gateway: Gateway, source: str, target: str, key: bytes) -> None:
        """As ``lent_copy``."""
        plane, _ = self._tools(gateway)
        there, bucket = await self._get(gateway, source), await self._get(gateway, target)
        name = object_name(bucket.id, bucket.shard_numbers, key)
        found: tuple[Source, Borrowed | None] | None = None
        for source_key in self.luck.sample(KEYS, len(KEYS)):
            if (there.id, source_key) != (bucket.id, key):
                found = await self._source_in(gateway, there, object_name(there.id, there.shard_numbers, source_key))
            if found is not None:
                break
        else:
            return
        (owner, data_ids, named, pages), borrowed = found
        lender = await bucket_of_owner(plane, there, borrowed)
        if lender is None or lender.state != ACTIVE or not may_lend(lender, bucket):
            self.found.done["not lent by lenders"] += lender is None or lender.state == LENDING
            return
        borrowed, borrower = introduce(plane, owner, lender, name, self.luck.randbytes(16))
        version, held = await self._borrowing(borrowed.id, pages, null=name.key != self.with_versions)
        wanted = Wanted(owner, data_ids, named, borrower, pages)
        await self.sleep(0.1)
        operation = self._adding(name, borrowed.id, null=name.key != self.with_versions)
        edit = self._adds(name, version, borrowed)

        async def commit(check: AfterPromise) -> None:
            async def made_durable() -> None:
                await self.nap()
                await check()
                await held.put_all(gateway, name)
                await self.sleep(0.2)

            await self.nap()
            async with self._noted(operation):
                await self._add(gateway, name, version, made_durable, edit=edit)

        await with_loan(plane, lender, wanted, commit)
        self.found.done["copies"] += 1
        self.found.done["copies between buckets"] += bool(borrowed.scope)

    async def _source_in(
        self, gateway: Gateway, bucket: BucketRecord, name: RegisterName
    ) -> tuple[Source, Borrowed | None] | None:
        record = decode_record((await gateway.client.read(name)).value)
        entries = [entry async for entry in every_entry(gateway.client, name, record)]
        entries = [entry for entry in entries if not any(part.small for part in entry.version.parts)]
        entries = [entry for entry in entries if not entry.version.delete_marker]
        if not entries:
            return None
        entry = self.luck.choice(entries)
        borrowed = borrowed_by(record, entry.ordinal)
        if borrowed is None:
            named = NULL_NAME if entry.is_null else VersionName(entry.ordinal, entry.version.context_id)
            return (name, *await self._names(gateway, name, entry.version, named)), None
        plane, _ = self._tools(gateway)
        owner = name_of_owner(bucket, borrowed)
        loan = find_borrower((await plane.lender_registers.read(owner)).value, borrowed.id)
        if loan is None:
            return None
        return (owner, *await self._names(gateway, owner, loan[0], None)), borrowed

    async def _read(self, gateway: Gateway, name: RegisterName) -> None:
        """Reads a version as ``read.borrowed`` does, and sees whether its data is there."""
        entries = await self._list(gateway, name)
        record = decode_record((await gateway.client.read(name)).value)
        held = [entry async for entry in every_entry(gateway.client, name, record)]
        if not held or not entries:
            return
        entry = self.luck.choice(held)
        borrowed = borrowed_by(record, entry.ordinal)
        if borrowed is not None:
            await self._read_borrowed(gateway, name, entry.version, borrowed)

    async def _read_borrowed(
        self, gateway: Gateway, name: RegisterName, version: Version, borrowed: Borrowed
    ) -> list[PartEntry]:
        """The parts. Complains when there are none although the version is there; raises StoragedError."""
        plane, _ = self._tools(gateway)
        bucket, found = self._bucket(name), Found(name, _Opened(version, borrowed), "", None, None)  # type: ignore[arg-type]
        reason = ""
        try:
            for _ in range(2):  # data that moves now may be where the other record says
                data = await with_data(plane, bucket, found)
                parts = await self._parts(gateway, data.name, data.opened.version)
                lost = [part for part in parts if self._lacks(part)]
                if not lost:
                    self.found.done["borrowed reads"] += 1
                    return parts
            reason = f"a fragment of {lost[0].data_id.hex()} is gone"
        except DataDamaged as error:
            reason = f"a version has lost the data that it borrows: {error}"
        except NoSuchBucket:
            reason = "a version can't be read because the bucket is gone that lends it its data"
        again = sharing_of(decode_record((await gateway.client.read(name)).value)).borrowed
        if borrowed in again.values():
            self.complain(reason)
        return []

    def _lacks(self, part: PartEntry) -> bool:
        for position, disk in self.durable[part.data_id].intersection(part.runs[0].moved.items()):
            medium: Any = self.world.nodes["n" + disk[1:]].medium
            if FragmentId(part.data_id, 0, 2, 1, position) not in medium.fragments.fragments:
                return True
        return False

    async def _move_in(self, gateway: Gateway, name: RegisterName) -> None:
        """Of a row of the bucket, or of a lender."""
        plane, _ = self._tools(gateway)
        lenders = [one for one in await self._services.of(gateway).every_bucket() if one.state == LENDING]
        if lenders and self.luck.random() < 0.5:
            lender = self.luck.choice(lenders)
            name = object_name(lender.id, lender.shard_numbers, name.key)
            moves = self.found.done["moves"]
            await self._move(_Mover(gateway, plane), name)  # type: ignore[arg-type]
            self.found.done["moves in lenders"] += self.found.done["moves"] - moves
            return
        await self._move(_Mover(gateway, plane), name)  # type: ignore[arg-type]

    async def _open_upload(self, gateway: Gateway, owner: RegisterName) -> None:
        """Nobody completes it."""
        upload_id = bytes((owner.shard,)) + self.luck.randbytes(15)
        name = upload_name(owner.scope, owner.key, upload_id)
        self.uploads._owners[name] = owner
        record = UploadRecord(upload_id, OPEN, "", 1, 1, b"", b"", b"")
        await gateway.client.change(name, lambda _value: Change(encode(record)))
        await self.uploads._put_part(gateway, owner, upload_id, 1)

    # --- what else goes on

    def more(self) -> Sequence[Coroutine[Any, Any, None]]:
        return (*super().more(), self._kill())

    async def _kill(self) -> None:
        while True:
            await asyncio.sleep(self.luck.expovariate(1 / self._lifetime_s))
            gateway = self.luck.choice(self.gateways)
            for work in list(self._lives[gateway]):
                work.cancel()
            await gateway.crash()
            self.found.faults.append(f"{gateway.name} died")
            gateway.start()

    async def _look_for_unused(self) -> None:
        while True:
            await asyncio.sleep(self.luck.uniform(0.2, 3.0))
            self._start(self._suppressed(self._walk(self.luck.choice(self.gateways), everything=False)))

    async def _walk(self, gateway: Gateway, *, everything: bool) -> None:
        """As a walk of storage nodes asks gateways to look at rows with loans."""
        plane, _ = self._tools(gateway)
        records = await self._services.of(gateway).every_bucket()
        if not everything:
            records = [self.luck.choice(records)] if records else []
        for record in records:
            for key in KEYS:
                name = object_name(record.id, record.shard_numbers, key)
                with contextlib.suppress(StoragedError):
                    if record.state == LENDING:
                        await self._see_no_version(gateway, record, name)
                    await end_unused(plane, record, name, ALWAYS_MS)

    async def _see_no_version(self, gateway: Gateway, lender: BucketRecord, name: RegisterName) -> None:
        """Nothing moves here, so no replica came late."""
        plane, _ = self._tools(gateway)
        found = await self._services.of(gateway)._records.last(lender.formerly)
        if found is not None and (found[1].id, found[1].state) == (lender.id, ACTIVE):
            return  # the attempt has failed
        if decode_record(await plane.lender_registers.settle(name)).versions:
            last = await self._services.of(gateway)._records.is_deleted(lender.formerly, lender.id, lender.nonce)
            if last and await plane.lenders.find(lender.id) is not None:
                self.complain("a lender has a version")

    def _collector(self, node: CollectingNode, asks: GatewayAsks) -> tuple[Collector, Gateway]:
        """With the program's own directory of buckets."""
        collector, client = super()._collector(node, _Asks(self))
        context = collector._context
        context.signers = MemorySigners()
        judge = Judge(context)
        if node.name in self._directories:
            judge.buckets = self._directories[node.name]
        self._directories[node.name] = judge.buckets
        return Collector(context, judge), client

    # --- the end

    async def _heal(self, nodes: Sequence[CollectingNode]) -> None:
        self.lies = False
        await super()._heal(nodes)

    async def _look_at_the_end(self, reader: Gateway) -> set[bytes]:
        service = self._services.of(reader)
        away = any(node.foreign for node in self.world.nodes.values())
        for _ in range(ROUNDS_MAX):
            await self._housekeep(reader)
            await self._walk(reader, everything=True)
            await asyncio.sleep(1.5)
        records = await service.every_bucket()
        living = {record.id: record for record in records if record.state == ACTIVE}
        for record in records:
            if record.state not in (ACTIVE, LENDING) or (record.nonce and record.state == ACTIVE and not away):
                self.complain(f"the bucket {record.name} stays {record.state}")
            if record.id not in self._keys.newest:
                self.complain(f"the key of the bucket {record.name} is destroyed")
            if record.id in self._deleted_at and record.state != LENDING:
                self.complain(f"the bucket {record.name} came back")
        await self._judge_loans(reader, records)
        live = await self._judge_data(reader, living)
        for bucket_id in sorted(self._records.keys() - living.keys()):
            self._see_empty(self._records[bucket_id])
        self._judge_history()
        if away:
            return live | await self._lent_data(reader, records)
        await self._delete_everything(reader, living)
        return set()

    async def _judge_loans(self, reader: Gateway, records: Sequence[BucketRecord]) -> None:
        """Each loan has its borrower, and no lender lends nothing."""
        used: set[bytes] = set()
        lent: set[bytes] = set()
        for record in records:
            lends = False
            for key in KEYS:
                name = object_name(record.id, record.shard_numbers, key)
                sharing = sharing_of(decode_record((await reader.client.read(name)).value))
                used |= {borrowed.id for borrowed in sharing.borrowed.values()}
                lent |= {borrower.id for loan in sharing.loans for borrower in loan.borrowers}
                lends |= bool(sharing.loans)
            if record.state == LENDING and not lends:
                self.complain("a lender stays that lends nothing")
            self.found.done["lenders"] += record.state == LENDING
        if lent - used:
            self.complain("a loan stays that nothing uses")
        if used - lent:
            self.complain("a version borrows what nobody lends")

    async def _judge_data(self, reader: Gateway, living: dict[bytes, BucketRecord]) -> set[bytes]:
        live: set[bytes] = set()
        for record in living.values():
            for key in KEYS:
                name = object_name(record.id, record.shard_numbers, key)
                try:
                    await self.settle_everywhere(reader, name)
                    reading = await reader.client.read(name, want_payload=True)
                    entries = await self._list(reader, name)
                    found = decode_record(reading.value)
                    payload = reading.value.payload if reading.value is not None else b""
                    for entry in entries:
                        borrowed = borrowed_by(found, entry.ordinal)
                        if borrowed is not None:
                            parts = await self._read_borrowed(reader, name, entry.version, borrowed)
                        else:
                            parts = await self._parts(reader, name, entry.version)
                        for part in parts:
                            live.add(part.data_id)
                            self._check_data(part, payload, copy_read=reading.payload is not None)
                except StoragedError as error:
                    self.complain(f"{key!r} cannot be read in the end: {error!r}")
        return live

    async def _lent_data(self, reader: Gateway, records: Sequence[BucketRecord]) -> set[bytes]:
        live: set[bytes] = set()
        for record in records:
            for key in KEYS:
                name = object_name(record.id, record.shard_numbers, key)
                for loan in sharing_of(decode_record((await reader.client.read(name)).value)).loans:
                    live |= {part.data_id for part in await self._parts(reader, name, loan)}
        return live

    async def _delete_everything(self, reader: Gateway, living: dict[bytes, BucketRecord]) -> None:
        """In an order that the seed decides. Some buckets become lenders on the way."""
        service = self._services.of(reader)
        order = sorted(living.values(), key=lambda record: record.id)
        self.luck.shuffle(order)
        for record in order:
            for key in KEYS:
                name = object_name(record.id, record.shard_numbers, key)
                try:
                    while await self._list(reader, name):
                        await self._edit(reader, name, _remove_all)
                except StoragedError as error:
                    self.complain(f"{key!r} can't be removed in the end: {error!r}")
            await self._delete_in_the_end(reader, record)
        for _ in range(ROUNDS_MAX):
            await self._walk(reader, everything=True)
            await self._housekeep(reader)
            await asyncio.sleep(1.5)
        for record in await service.every_bucket():
            self.complain(f"the record {record.name} stays {record.state}")
        for record in self._records.values():
            await self._look_at_fences(record)

    async def _delete_in_the_end(self, reader: Gateway, record: BucketRecord) -> None:
        error: StoragedError | None = None
        for _ in range(DELETIONS_MAX):
            try:
                await self._services.of(reader).delete(record)
                return
            except StoragedError as failed:
                error = failed
            await asyncio.sleep(1.5)
            await self._walk(reader, everything=True)
            await self._housekeep(reader)
            if record.id in self._deleted_at:
                return
        self.complain(f"the bucket {record.name} can't be deleted in the end: {error!r}")

    async def _look_at_fences(self, record: BucketRecord) -> None:
        """A majority of each shard's replicas keeps the bucket closed for ever, and none lends."""
        final: set[str] = set()
        for node in self.world.nodes.values():
            held = (await node.replica.handover.fences(FencesAsk(node.disk, b""))).scopes
            final |= {node.disk for fence in held if fence.scope == record.id and fence.final and fence.nonce}
        for shard in record.shard_numbers:
            quorum = self.layout.replicas_of(RegisterName(Table.OBJECT, record.id, shard, b"").partition)
            if 2 * len(final.intersection(quorum)) <= len(quorum):
                self.complain(f"the fence of the bucket {record.name} is not final")

    async def _pages_left(self, reader: Gateway, nodes: Any) -> list[bytes]:
        """All buckets are deleted. A row that lagged when its bucket ended still names pages."""
        if any(node.foreign for node in nodes):
            return []
        return [page for node in nodes for page, _ in node.store.pages(after=b"", limit=1000)]


def _remove_all(draft: Draft, _ordinal: int) -> bool:
    entries = list(draft.inline)
    for entry in entries:
        draft.remove(entry)
    return bool(entries)


def _place(scope: bytes, key: bytes) -> str:
    return f"{scope.hex()}/{key.decode()}"


@contextlib.contextmanager
def few_shards() -> Iterator[None]:
    before = program.draw

    def draw(_layouts: Any, _countries: Sequence[str], new_id: Callable[[], bytes]) -> Drawn:
        return Drawn(new_id(), SHARDS, b"")

    program.draw = draw
    try:
        yield
    finally:
        program.draw = before


def run_lenders(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    with few(seed), few_shards():
        return play_out(lambda loop: Lenders(seed, loop, rules))  # type: ignore[arg-type,return-value]
