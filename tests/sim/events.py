"""Gateways put and delete keys of a bucket with notifications, deliver events, and die in the middle of it, while the
destination refuses some events and loses some of its acknowledgements.

The program's own PUT, DELETE and delivery (``objects.write``, ``objects.event_delivery``), over the simulated ring.
What must hold once all is well and the pointers were swept:

* Each change that was acknowledged has its event, and no change that was refused has one.
* Of each key, the events come in the order of their sequencers, but for duplicates, which have the same.
* The last event of a key tells what the key is.
* No outbox has an event any more, and no pointer a key.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import unquote_plus

from storaged.errors import NoSuchKey, OutcomeUnknown, S3Error, StoragedError
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.listing.merge import every_row
from storaged.meta.names import RegisterName, Table, Value, event_name, object_name
from storaged.meta.ports import Outcome, PageQuery
from storaged.objects.api import BodyChecks, NewMeta
from storaged.objects.code.adding import overtake
from storaged.objects.code.versions import decode_record
from storaged.objects.configuration.document import NOTHING
from storaged.objects.configuration.notification import NOTIFICATION, Notification, NotificationRule
from storaged.objects.destinations import DeliveryFailed
from storaged.objects.event_delivery import EventDelivery
from storaged.objects.pending_events import CREATED, REMOVED, Origin
from storaged.objects.plane import ObjectPlane
from storaged.objects.read.get import head
from storaged.objects.records import BucketRecord
from storaged.objects.write.delete import delete
from storaged.objects.write.outbox import decode_keys
from storaged.objects.write.put import put
from tests.sim.cluster import DISKS, Gateway
from tests.sim.planes import Lives, keys_for, make_plane
from tests.sim.scenario import Scenario, play_out
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts

OWNER = "f" * 64
EVENT_KEYS = tuple(b"key %d" % number for number in range(8))
CALLS = 8
"""Of each worker."""
SWEEPS_MAX = 20
ARN = "arn:storaged:sqs::inbox:webhook"
RULE = NotificationRule("all", ARN, (f"{CREATED}:*", f"{REMOVED}:*"))


class Inbox:
    """The destination. ``got``: (sequencer, event, ETag) of each key, as they came."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.well = False
        self.got: dict[bytes, list[tuple[str, str, str]]] = defaultdict(list)

    def knows(self, arn: str) -> bool:
        return arn == ARN

    async def send(self, arn: str, body: bytes) -> None:
        await asyncio.sleep(self._chance.uniform(0, 0.02))
        fate = self._chance.random() if not self.well else 1.0
        if fate < 0.2:
            raise DeliveryFailed("it does not listen")
        (record,) = json.loads(body)["Records"]
        thing = record["s3"]["object"]
        self.got[unquote_plus(thing["key"]).encode()].append(
            (thing["sequencer"], record["eventName"], thing.get("eTag", ""))
        )
        if fate < 0.4:
            raise DeliveryFailed("its answer is lost")


class Registers:
    """Those of a gateway. When it has noted a key in a pointer, and not accepted yet, it sometimes stands still, and
    another one delivers the events of that key; when it has settled a register, too.
    """

    def __init__(self, client: Any, play: Events) -> None:
        self._client = client
        self._play = play

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def change(self, name: RegisterName, *what: Any, **how: Any) -> Outcome:
        outcome: Outcome = await self._client.change(name, *what, **how)
        if name.table == Table.EVENT:
            await self._play.meanwhile(name)
        return outcome

    async def settle(self, name: RegisterName, **how: Any) -> Value | None:
        value: Value | None = await self._client.settle(name, **how)
        await self._play.meanwhile(event_name(name))
        return value


class Directory:
    """The bucket, as each gateway knows it."""

    def __init__(self, plane: ObjectPlane, bucket: BucketRecord) -> None:
        self._plane = plane
        self._bucket = bucket

    async def get(self, name: str) -> BucketRecord:
        return self._bucket

    def configuration_of(self, record: BucketRecord) -> Any:
        return self._plane.configurations.of(record)

    async def configuration(self, bucket: BucketRecord) -> Any:
        return self._plane.configurations.of(self._bucket)

    async def every_bucket(self) -> list[BucketRecord]:
        return [self._bucket]


class Events(Scenario):
    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        self.world.overtake = overtake
        self.moves = self.disks_may_be_swapped = self.disks_may_be_full = False
        self.of_objects = True
        self.first_seeds = DISKS
        self.bare = BucketRecord("b", b"B" * 16, OWNER, 1, "active", 2, "eu-fr-1")
        self.keys = keys_for(seed, self.bare.id)
        self.names = {key.decode(): object_name(self.bare.id, self.bare.shard_numbers, key) for key in EVENT_KEYS}
        self.last_seen = dict.fromkeys(self.names)
        self.inbox = Inbox(random.Random(f"inbox {seed}"))
        self._chance = random.Random(f"events {seed}")
        self._gateways = Lives(self._make)
        self._acknowledged: set[tuple[bytes, str]] = set()
        """(key, ETag) of PUTs."""
        self._deleted: dict[bytes, int] = defaultdict(int)
        """How many deletions of a key were acknowledged that found something; and those of unknown outcome."""
        self._perhaps_deleted: dict[bytes, int] = defaultdict(int)
        self._refused: set[tuple[bytes, str]] = set()
        self._within = 0

    def _make(self, gateway: Gateway) -> tuple[ObjectPlane, BucketRecord, EventDelivery]:
        plane = make_plane(self.world, gateway, self.keys, registers=Registers(gateway.client, self))
        bucket = plane.configurations.put(self.bare, NOTHING.having(NOTIFICATION, Notification((RULE,))))
        delivery = EventDelivery(plane, Directory(plane, bucket), self.inbox, "eu-fr-1")  # type: ignore[arg-type]
        delivery.down_s = 0.0
        return plane, bucket, delivery

    # --- gateways

    async def meanwhile(self, pointer: RegisterName) -> None:
        """What happens while a gateway is between two steps."""
        if self._within or self.inbox.well or self._chance.random() < 0.5:
            return
        self._within += 1
        try:
            await asyncio.sleep(self._chance.uniform(0, 0.1))
            gateway = self._chance.choice(self.gateways)
            _, bucket, delivery = self._gateways.of(gateway)
            for key, name in self.names.items():
                if event_name(name) == pointer:
                    with contextlib.suppress(StoragedError):
                        if self._chance.random() < 0.7:
                            await delivery.deliver(bucket, name)
                        else:
                            await self._put(gateway, key.encode())
        finally:
            self._within -= 1

    async def worker(self, gateway: Gateway) -> None:
        for _ in range(CALLS):
            await asyncio.sleep(self._chance.uniform(0, 0.05))
            key, choice = self._chance.choice(EVENT_KEYS), self._chance.random()
            self.found.operations += 1
            try:
                if choice < 0.45:
                    await self._put(gateway, key)
                elif choice < 0.65:
                    await self._delete(gateway, key)
                elif choice < 0.95:
                    _, bucket, delivery = self._gateways.of(gateway)
                    await delivery.deliver(bucket, self.names[key.decode()])
                else:
                    await self._gateways.of(gateway)[2].sweep(fresh_ms=0)
            except OutcomeUnknown:
                self.found.unknown += 1
            except StoragedError:
                self.found.refused += 1

    async def _put(self, gateway: Gateway, key: bytes) -> None:
        plane, bucket, _ = self._gateways.of(gateway)
        self._serial += 1
        content = f"{key.decode()} {self._serial}".encode()
        etag = hashlib.md5(content).hexdigest()
        meta = NewMeta(origin=Origin(f"{CREATED}:Put"))
        try:
            await put(plane, bucket, key, _pieces(content), meta, BodyChecks(size=len(content)), owner=OWNER)
        except OutcomeUnknown:
            raise
        except StoragedError:
            self._refused.add((key, etag))
            raise
        self._acknowledged.add((key, etag))

    async def _delete(self, gateway: Gateway, key: bytes) -> None:
        plane, bucket, _ = self._gateways.of(gateway)
        self._perhaps_deleted[key] += 1
        try:
            result = await delete(plane, bucket, key, origin=Origin(REMOVED))
        except OutcomeUnknown:
            raise
        except S3Error:
            self._perhaps_deleted[key] -= 1
            raise
        if result.existed:
            self._deleted[key] += 1
        else:
            self._perhaps_deleted[key] -= 1

    # --- the end

    async def look_at_the_end(self, reader: Gateway) -> None:
        await asyncio.sleep(1.0)
        self.inbox.well = True
        plane, bucket, delivery = self._gateways.of(reader)
        for _ in range(SWEEPS_MAX):
            if not await delivery.sweep(fresh_ms=0):
                break
            await asyncio.sleep(1.0)
        else:
            self.complain("events are not delivered after everything healed")
        self.found.done["events"] = sum(map(len, self.inbox.got.values()))
        async for row in every_row(plane.scanner, PageQuery(Table.EVENT, bucket.id, bucket.shard_numbers)):
            self.complain(f"pointers stay: {decode_keys(row.value).stamps}")
        for key in EVENT_KEYS:
            await self._judge_key(plane, bucket, key)

    async def _judge_key(self, plane: ObjectPlane, bucket: BucketRecord, key: bytes) -> None:
        record = decode_record((await plane.registers.read(self.names[key.decode()])).value)
        if record.history is not None and record.history.outbox:
            self.complain(f"events of {key!r} are left that no pointer names")
        events = list(dict.fromkeys(self.inbox.got[key]))
        if [one[0] for one in events] != sorted({one[0] for one in events}):
            self.complain(f"events of {key!r} came in another order than their sequencers, or two have the same")
        made = {(key, etag) for _, _, etag in events if etag}
        if self._refused & made:
            self.complain(f"a change of {key!r} that was refused has an event")
        if lost := {one for one in self._acknowledged if one[0] == key} - made:
            self.complain(f"{len(lost)} acknowledged changes of {key!r} have no event")
        removed = sum(name == f"{REMOVED}:Delete" for _, name, _ in events)
        if not self._deleted[key] <= removed <= self._perhaps_deleted[key]:
            self.complain(f"{key!r}: {self._deleted[key]} deletions were acknowledged, {removed} have events")
        try:
            there = (await head(plane, bucket, key)).etag
        except NoSuchKey:
            there = ""
        if (events[-1][2] if events else "") != there:
            self.complain(f"the last event of {key!r} tells of something else than what is there")


async def _pieces(content: bytes) -> AsyncIterator[bytes]:
    yield content


def run_events(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    return play_out(lambda loop: Events(seed, loop, rules))
