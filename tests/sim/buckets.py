"""Buckets are created, deleted and used by several gateways, which die and stand still in the middle of it.

The program's own ``BucketService`` and fences, over the simulated ring. What must hold:

* When the deletion of a bucket is acknowledged, each of its keys is gone: the histories of keys are linearizable.
* After a bucket was deleted nothing is acknowledged in it any more.
* Once all is well, and someone has taken the steps that records owe, each bucket that is there takes writes, and no
  disk that takes part fences it. A disk that can't write any more keeps its fence, and then the record keeps its nonce.
"""

from __future__ import annotations

import asyncio
import contextlib

from storaged.errors import CopyUnreadable, DataDamaged, NoSuchBucket, OutcomeUnknown, S3Error
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.messages import FencesAsk
from storaged.meta.names import Change, RegisterName, object_name, system_name
from storaged.objects.api import Principal
from storaged.objects.records import BucketRecord
from storaged.objects.system.buckets import BucketService
from tests.sim.cluster import DISKS, Gateway
from tests.sim.linear import Content, Kind, Operation
from tests.sim.planes import Lives, keys_for, make_plane
from tests.sim.scenario import Scenario, play_out
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts, content_of, delete, put

WHO = Principal("f" * 64, "tester")
BUCKETS = ("one", "two")
BUCKET_KEYS = (b"k", b"l")
CALLS = 8
"""Of each worker."""


class Buckets(Scenario):
    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        self.moves = self.disks_may_be_swapped = self.disks_may_be_full = False
        self.first_seeds = DISKS
        self.names = {name: system_name("bucket/" + name) for name in BUCKETS}
        self.keys = keys_for(seed)
        self._services = Lives(self._make_service)
        self._deleted_at: dict[bytes, int] = {}
        """When the deletion of a bucket was acknowledged, by id."""
        self._records: dict[bytes, BucketRecord] = {}

    def _make_service(self, gateway: Gateway) -> BucketService:
        plane = make_plane(self.world, gateway, self.keys, on_fenced=lambda scope: service.fenced(scope))
        service = BucketService(plane)
        return service

    async def worker(self, gateway: Gateway) -> None:
        for _ in range(CALLS):
            await asyncio.sleep(self.random.uniform(0, 0.06))
            self.found.operations += 1
            name = self.random.choice(BUCKETS)
            choice = self.random.random()
            try:
                if choice < 0.2:
                    await self._delete_bucket(gateway, name)
                elif choice < 0.28:
                    await self._housekeep(gateway)
                else:
                    await self._use(gateway, name, self.random.choice(BUCKET_KEYS))
            except NoSuchBucket:
                with contextlib.suppress(S3Error):
                    await self._create(gateway, name)
            except OutcomeUnknown:
                self.found.unknown += 1
            except S3Error:
                self.found.refused += 1

    async def _create(self, gateway: Gateway, name: str) -> None:
        record = await self._services.of(gateway).create(WHO, name, region="eu-fr-1")
        self._records[record.id] = record

    async def _delete_bucket(self, gateway: Gateway, name: str) -> None:
        service = self._services.of(gateway)
        record = await service.get(name)
        self._records[record.id] = record
        await service.delete(record)
        self._gone(record)

    def _gone(self, record: BucketRecord) -> None:
        self._deleted_at.setdefault(record.id, self.moment())
        self.found.faults.append(f"the bucket {record.name} was deleted")
        for key in BUCKET_KEYS:
            place = _place(record, key)
            self.history.append(Operation(Kind.READ, place, self.moment(), returned=self.moment(), observed=None))

    async def _housekeep(self, gateway: Gateway) -> None:
        """Takes the steps that records owe."""
        service = self._services.of(gateway)
        for record in await service.every_bucket():
            if (record.state == "deleting" or record.nonce) and await service.resume(record) is None:
                self._gone(record)

    async def _use(self, gateway: Gateway, name: str, key: bytes) -> None:
        record = await self._services.of(gateway).get(name)
        self._records[record.id] = record
        register = object_name(record.id, record.shard_numbers, key)
        kind = self.random.choices((Kind.PUT, Kind.DELETE, Kind.READ), (4, 3, 3))[0]
        operation = Operation(kind, _place(record, key), self.moment(), new=b"%d" % self._moments)
        self.history.append(operation)
        try:
            operation.observed = await self._use_key(gateway, register, operation)
        except OutcomeUnknown:
            self.found.unknown += 1
            return
        except S3Error:
            self.found.refused += 1
            self.history.remove(operation)
            return
        operation.returned = self.moment()
        if kind is Kind.PUT and -1 < self._deleted_at.get(record.id, -1) < operation.invoked:
            self.complain("something was written in a bucket that was gone")

    async def _use_key(self, gateway: Gateway, register: RegisterName, operation: Operation) -> Content:
        if operation.kind is Kind.READ:
            return content_of((await gateway.client.read(register)).value)
        if operation.kind is Kind.DELETE:
            return content_of((await self._change(gateway.client, register, delete)).before)
        content, creates = operation.new or b"", self.random.random() < 0.7
        small, data_id = self._small_copies(content)
        outcome = await self._change(gateway.client, register, put(content, data_id), small, regardless=creates)
        operation.blind = outcome.before is None and outcome.after is not None and outcome.after.sequence > 1
        return content_of(outcome.before)

    # --- the end

    async def look_at_the_end(self, reader: Gateway) -> None:
        await asyncio.sleep(1.5)
        service = self._services.of(reader)
        for _ in range(3):
            await self._housekeep(reader)
        # A fence is lifted on all replicas, or its lifting is owed to those that are away or take no writes.
        away = not all(node.takes_writes for node in self.world.nodes.values())
        for record in await service.every_bucket():
            if record.state != "active" or (record.nonce and not away):
                self.complain(f"the bucket {record.name} stays closed")
                continue
            await self._look_at_fences(record)
            for key in BUCKET_KEYS:
                register = object_name(record.id, record.shard_numbers, key)
                with contextlib.suppress(OutcomeUnknown):
                    try:
                        await reader.client.change(register, lambda _value: Change(b"the last"))
                    except S3Error as error:
                        if not (self.copies_may_be_lost and isinstance(error, CopyUnreadable | DataDamaged)):
                            self.complain(f"a bucket that is there takes no write after everything healed: {error!r}")
        present = {record.id for record in await service.every_bucket()}
        for bucket_id in sorted(self._records.keys() - present):
            await self._look_into(reader, self._records[bucket_id])

    async def _look_at_fences(self, record: BucketRecord) -> None:
        """Each disk that takes part has lifted its fence, whichever others could not."""
        for node in self.world.nodes.values():
            if not node.takes_writes:
                continue
            held = (await node.replica.handover.fences(FencesAsk(node.disk, b""))).scopes
            if any(fence.scope == record.id and fence.nonce for fence in held):
                self.complain(f"{node.name} keeps the bucket {record.name} closed")

    async def _look_into(self, reader: Gateway, record: BucketRecord) -> None:
        """A bucket that is gone takes no write, for ever."""
        for key in BUCKET_KEYS:
            register = object_name(record.id, record.shard_numbers, key)
            if record.id not in self._deleted_at:
                continue
            try:
                await reader.client.change(register, lambda _value: Change(b"too late"))
            except S3Error:
                continue
            self.complain("something was written in a bucket that is gone")


def _place(record: BucketRecord, key: bytes) -> str:
    return f"{record.id.hex()}/{key.decode()}"


def run_buckets(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    return play_out(lambda loop: Buckets(seed, loop, rules))
