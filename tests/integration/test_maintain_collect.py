"""What is deleted, and above all what is not: garbage lists, the sweep of orphans, sleeping gateways, what recoding
leaves, scrub.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import random
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from storaged.cluster.move_settings import UNKNOWN, MoveSettings
from storaged.errors import DiskUnusable, NoSuchKey, OutcomeUnknown, PeerUnreachable, ServiceUnavailable, StoragedError
from storaged.fragments.ports import OF_UPLOAD, REPLACED, FragmentId, Health, Retirement
from storaged.maintain import disuse, garbage_page
from storaged.maintain import gc as collect_module
from storaged.maintain.context import MaintainLimits
from storaged.maintain.gc import RESTS_A_KEY, Collector
from storaged.maintain.sweep import FULL_S
from storaged.meta.consensus.register import NEVER, Verdict
from storaged.meta.messages import Create, FenceSet, ScanRequest
from storaged.meta.names import (
    Ballot,
    Change,
    RegisterName,
    Table,
    Value,
    Visibility,
    object_name,
    system_name,
    upload_name,
)
from storaged.meta.store_ports import RowDamaged, StoreBatch
from storaged.node.housekeeping import tidy
from storaged.objects.api import BodyChecks, CompletedPart, NewMeta
from storaged.objects.plane import ObjectLimits
from storaged.objects.records import BucketRecord
from storaged.objects.write.uploads import parse_upload_id, upload_text
from storaged.wire import encode
from tests.doubles.fragments import MemoryFragmentStore
from tests.integration.memory_cluster import WHO, Cluster, body_of, run
from tests.worlds.fragments import make

SMALL, LARGE = 5_000, 1_500_000
PART = 60_000
"""One block of one stripe, all of whose cells hold something."""
RETIRE_S = ObjectLimits().retire_delay_ms / 1000
ORPHAN_S = MaintainLimits().orphan_age_ms / 1000


async def collect(cluster: Cluster) -> int:
    return sum([await node.maintenance.collector.collect_due() for node in cluster.nodes.values() if node.up])


async def sweep(cluster: Cluster) -> int:
    return sum([await node.maintenance.collector.sweep() for node in cluster.nodes.values() if node.up])


async def upload_parts(
    cluster: Cluster, bucket: BucketRecord, key: bytes, sizes: dict[int, int]
) -> tuple[str, list[CompletedPart], bytes]:
    upload = await cluster.objects.create_upload(bucket, key, NewMeta(), owner=WHO.user_id)
    parts, whole = [], b""
    for number, size in sizes.items():
        data = os.urandom(size)
        result = await cluster.put_part(bucket, key, upload.upload_id, number, data)
        parts.append(CompletedPart(number, result.etag))
        whole += data
    return upload.upload_id, parts, whole


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_replaced_and_deleted_data_goes_after_the_delay(size: int) -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"k", os.urandom(size))
        first = (await cluster.entry(bucket, b"k")).data_id
        await cluster.put(bucket, b"k", data := os.urandom(size))
        second = (await cluster.entry(bucket, b"k")).data_id
        await cluster.leap(RETIRE_S - 10)
        assert await collect(cluster) == 0
        await cluster.pass_s(20)
        assert await collect(cluster) > 0
        assert await cluster.fragments(first) == []
        assert await cluster.get(bucket, b"k") == data
        await cluster.objects.delete(bucket, b"k")
        await cluster.leap(RETIRE_S + 10)
        await collect(cluster)
        assert await cluster.fragments(second) == []

    run(scenario)


def test_replaced_data_costs_neither_rounds_nor_deletions_elsewhere() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        keys = [b"key%d" % number for number in range(20)]
        for _ in range(3):
            for key in keys:
                await cluster.put(bucket, key, os.urandom(SMALL))
        await cluster.leap(RETIRE_S + 60)
        calls: Counter[str] = Counter()

        async def count(source: str, node: str, method: str, request: object) -> None:
            calls[method] += source in cluster.nodes

        cluster.intercept = count
        assert await collect(cluster) == 2 * 20 * 3
        # the check of a row at one other replica, or where none is here the row too
        assert {method for method, times in calls.items() if times} == {"meta.read"}
        assert calls["meta.read"] <= 2 * 20 * 3
        assert sum(node.maintenance.collector.rounds for node in cluster.nodes.values()) == 0
        assert len(await cluster.fragments()) == 3 * 20
        for key in keys:
            assert await cluster.is_whole(bucket, key)

    run(scenario)


def test_each_node_deletes_its_own_copies_when_it_is_back() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"k", os.urandom(SMALL))
        old = (await cluster.entry(bucket, b"k")).data_id
        first, *_ = cluster.layouts.current.replicas_of(object_name(bucket.id, bucket.shard_numbers, b"k").partition)
        await cluster.put(bucket, b"k", data := os.urandom(SMALL))
        await cluster.leap(RETIRE_S + 60)
        await cluster.kill(cluster.layouts.current.node_of(first))
        assert await collect(cluster) == 2
        assert [disk for disk, _ in await cluster.fragments(old)] == [first]
        cluster.start(cluster.layouts.current.node_of(first), maintain=False)
        await cluster.pass_s(5)
        assert await collect(cluster) == 1
        assert await cluster.fragments(old) == []
        assert await cluster.get(bucket, b"k") == data

    run(scenario)


def test_while_an_upload_is_open_what_its_key_replaced_goes_and_orphans_wait() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        for _ in range(3):
            await cluster.put(bucket, b"k", os.urandom(SMALL))
        orphan = os.urandom(16)
        name = object_name(bucket.id, bucket.shard_numbers, b"k")
        upload, *_ = await upload_parts(cluster, bucket, b"k", {1: PART})
        await write_orphan(cluster, orphan, name, "a0")
        await cluster.leap(RETIRE_S + 60)
        assert await collect(cluster) == 2 * 3
        assert [disk for disk, _ in await cluster.fragments(orphan)] == ["a0"]
        assert cluster.nodes["na"].maintenance.status().garbage_waiting == (("an upload of its key is open", 1),)
        await cluster.objects.abort(bucket, b"k", upload)
        await cluster.leap(RETIRE_S + 60)
        await collect(cluster)
        assert len(await cluster.fragments()) == 3
        await collect(cluster)
        assert cluster.nodes["na"].maintenance.status().garbage_waiting == ()

    run(scenario)


def test_a_hot_key_with_open_uploads_keeps_no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """More entries that wait than may rest hold up nothing behind them."""
    monkeypatch.setattr(collect_module, "RESTING_MAX", 1)

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        for key in (b"one", b"two", b"three"):
            await upload_parts(cluster, bucket, key, {1: PART})
            upload, *_ = await upload_parts(cluster, bucket, key, {1: PART})
            await cluster.put_part(bucket, key, upload, 1, os.urandom(PART))
        await cluster.pass_s(1)
        for _ in range(5):
            await cluster.put(bucket, b"hot", os.urandom(SMALL))
        before = len(await cluster.fragments())
        await cluster.leap(RETIRE_S + 60)
        assert await collect(cluster) == 4 * 3
        assert len(await cluster.fragments()) == before - 4 * 3
        waiting = [node.maintenance.status().garbage_waiting for node in cluster.nodes.values()]
        assert {reason for reasons in waiting for reason, _ in reasons} == {"its upload is open"}

    run(scenario, limits=MaintainLimits(collect_batch=2))


def test_a_key_with_very_many_open_uploads_takes_no_more_than_its_share_of_rests() -> None:
    context: Any = SimpleNamespace(clock=None, limits=MaintainLimits())
    judge: Any = SimpleNamespace(buckets=None)
    collector = Collector(context, judge)
    for number in range(10 * RESTS_A_KEY):
        collector._let_rest((b"hot", b"u%d" % number), 5.0, "its upload is open")
    assert len(collector._resting) == RESTS_A_KEY + 1
    assert collector._resting[b"hot", None] == (5.0, "its upload is open")
    collector._let_rest((b"other", b"u"), 6.0, "away")
    assert collector._resting[b"other", b"u"] == (6.0, "away")


async def write_orphan(cluster: Cluster, data_id: bytes, owner: RegisterName, disk: str) -> FragmentId:
    """A fragment of a PUT that died, on the disk's garbage list."""
    made = make(random.Random(1), data_id=data_id)
    header = msgspec.structs.replace(made.header, owner=owner.pack())
    await cluster.store(disk).write(header, [made.payload], sync=True)
    await cluster.store(disk).retire([Retirement(data_id, owner.pack(), 0)])
    return made.id


def test_with_a_replica_away_only_orphans_wait() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        name = object_name(bucket.id, bucket.shard_numbers, b"k")
        *_, last = cluster.layouts.current.replicas_of(name.partition)
        away = cluster.layouts.current.node_of(last)
        here = next(disk.id for disk in cluster.layouts.current.disks if disk.node != away)
        orphan = os.urandom(16)
        await write_orphan(cluster, orphan, name, here)
        for _ in range(2):
            await cluster.put(bucket, b"k", os.urandom(SMALL))
        await cluster.leap(RETIRE_S + 60)
        await cluster.kill(away)
        assert await collect(cluster) == 2
        assert await cluster.fragments(orphan) != []
        told = {node.maintenance.status().garbage_waiting for node in cluster.nodes.values() if node.up}
        assert (("a replica of its register is away or lags", 1),) in told
        cluster.start(away, maintain=False)
        await cluster.pass_s(MaintainLimits().retry_max_s)
        await collect(cluster)
        assert await cluster.fragments(orphan) == []

    run(scenario)


def test_an_orphan_waits_for_a_replica_that_answers_and_has_not_accepted_the_round() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"k", os.urandom(SMALL))
        name = object_name(bucket.id, bucket.shard_numbers, b"k")
        *_, last = cluster.layouts.current.replicas_of(name.partition)
        lags = cluster.layouts.current.node_of(last)
        orphan = os.urandom(16)
        here = next(disk.id for disk in cluster.layouts.current.disks if disk.node != lags)
        await write_orphan(cluster, orphan, name, here)

        async def accepts_nothing(_source: str, node: str, method: str, _request: object) -> None:
            if node == lags and method in ("meta.accept", "meta.accepts"):
                raise PeerUnreachable("it is late")

        cluster.intercept = accepts_nothing
        await collect(cluster)
        assert await cluster.fragments(orphan) != []
        told = {node.maintenance.status().garbage_waiting for node in cluster.nodes.values()}
        assert (("a replica of its register is away or lags", 1),) in told
        cluster.intercept = None
        await cluster.pass_s(MaintainLimits().retry_max_s)
        await collect(cluster)
        assert await cluster.fragments(orphan) == []

    run(scenario)


def test_the_register_of_an_orphan_that_was_never_written_refuses_every_create_afterwards() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        name = object_name(bucket.id, bucket.shard_numbers, b"never")
        orphan = os.urandom(16)
        await write_orphan(cluster, orphan, name, "a0")
        assert await collect(cluster) == 1
        far = Ballot(1, cluster.clock.wall_ms() * 1000 + 3_000_000_000, "g", b"incarnat")
        for disk in cluster.layouts.current.replicas_of(name.partition):
            replica = cluster.nodes[cluster.layouts.current.node_of(disk)].replicas[disk]
            slot = cluster.meta(disk).get(name)
            assert slot is not None
            assert slot.value == NEVER
            value = Value(1, bytes(16), Visibility.LIVE, b"late")
            reply = await replica.accept(Create(disk, name, far, value))
            assert reply.verdict == Verdict.HELD
        await cluster.put(bucket, b"never", data := os.urandom(SMALL))
        assert await cluster.get(bucket, b"never") == data

    run(scenario)


def test_what_a_gateway_says_of_a_round_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway of another version, or a broken one, answers that it settled what it did not."""

    async def nothing(self: object, names: object) -> None:
        return

    monkeypatch.setattr(disuse.Judge, "_settle", nothing)

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"k", os.urandom(SMALL))
        orphan = os.urandom(16)
        await write_orphan(cluster, orphan, object_name(bucket.id, bucket.shard_numbers, b"k"), "a0")
        assert await collect(cluster) == 0
        assert await cluster.fragments(orphan) != []

    run(scenario)


def neighbours(bucket: BucketRecord, key: bytes, count: int) -> list[bytes]:
    """Other keys of the key's shard."""
    shard = object_name(bucket.id, bucket.shard_numbers, key).shard
    names = (object_name(bucket.id, bucket.shard_numbers, b"other%d" % number) for number in range(10_000))
    return [name.key for name in itertools.islice((name for name in names if name.shard == shard), count)]


def test_what_is_more_than_fits_one_deletion_is_deleted_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage_page, "DELETIONS_A_CALL", 2)
    deletes: list[int] = []
    delete = MemoryFragmentStore.delete

    async def counted(store: MemoryFragmentStore, ids: Sequence[FragmentId], *, created_ms: Sequence[int] = ()) -> int:
        deletes.append(len(ids))
        return await delete(store, ids, created_ms=created_ms)

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"k", os.urandom(3 * LARGE))
        data_id = (await cluster.entry(bucket, b"k")).data_id
        assert max(Counter(disk for disk, _ in await cluster.fragments(data_id)).values()) > 2 * 2
        await cluster.put(bucket, b"k", os.urandom(SMALL))
        await cluster.leap(RETIRE_S + 60)
        monkeypatch.setattr(MemoryFragmentStore, "delete", counted)
        assert await collect(cluster) > 0
        assert await cluster.fragments(data_id) == []
        assert max(deletes) == 2

    run(scenario)


@pytest.mark.parametrize("damage", ["unreadable", "another's"])
def test_a_damaged_row_of_an_upload_keeps_orphans_of_its_own_key_and_no_others(damage: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        (other,) = neighbours(bucket, b"k", 1)
        orphans = {key: os.urandom(16) for key in (b"k", other)}
        for key, orphan in orphans.items():
            await write_orphan(cluster, orphan, object_name(bucket.id, bucket.shard_numbers, key), "a0")
        upload, another = [
            parse_upload_id((await cluster.objects.create_upload(bucket, b"k", NewMeta(), owner=WHO.user_id)).upload_id)
            for _ in range(2)
        ]
        row = upload_name(bucket.id, b"k", upload)
        foreign = (await cluster.gateway.ring.read(upload_name(bucket.id, b"k", another))).value
        assert foreign is not None
        body = b"not a record" if damage == "unreadable" else foreign.body
        await cluster.gateway.ring.change(row, lambda value: Change(body))
        await cluster.objects.abort(bucket, b"k", upload_text(another))
        assert await collect(cluster) == 1
        assert await cluster.fragments(orphans[b"k"]) != []

    run(scenario)


def test_what_could_not_be_judged_rests_and_a_disk_that_refuses_deletions_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"k", os.urandom(LARGE))
        await cluster.objects.delete(bucket, b"k")
        await cluster.store("a0").retire([Retirement(os.urandom(16), b"nonsense", 0)])
        await cluster.leap(RETIRE_S + 60)
        node = cluster.nodes["na"]
        before = len(await cluster.fragments())

        async def gone(ids: Sequence[FragmentId], *, created_ms: Sequence[int] = ()) -> int:
            raise DiskUnusable("the disk is gone")

        monkeypatch.setattr(cluster.store("a0"), "delete", gone)
        for _ in range(2):
            node.log.clear()
            await node.maintenance.collector.collect_due()
            assert next(line for line in node.log if "disk a0" in line).endswith("the disk is gone"), node.log
        monkeypatch.undo()
        assert before > len(await cluster.fragments()) > 0
        await cluster.pass_s(MaintainLimits().retry_max_s)
        await collect(cluster)
        assert await cluster.fragments() == []

    run(scenario)


def test_what_a_record_refers_to_stays_whoever_put_it_on_the_list() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"k", data := os.urandom(LARGE))
        entry = await cluster.entry(bucket, b"k")
        before = await cluster.fragments(entry.data_id)
        for disk, fragment in before:
            await cluster.store(disk).retire(
                [Retirement(fragment.data_id, object_name(bucket.id, bucket.shard_numbers, b"k").pack(), 0)]
            )
        assert await collect(cluster) == 0
        assert await cluster.fragments(entry.data_id) == before
        assert [await cluster.store(disk).retired(1 << 62, 10) for disk, _ in before] == [[]] * len(before)
        assert await cluster.get(bucket, b"k") == data

    run(scenario)


def test_without_a_majority_nothing_is_deleted_and_the_rest_of_the_list_is_judged() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        for index in range(8):
            await cluster.put(bucket, b"k%d" % index, os.urandom(SMALL))
            await cluster.objects.delete(bucket, b"k%d" % index)
        await cluster.leap(RETIRE_S + 10)
        before = await cluster.fragments()
        await cluster.kill("na", "nb")
        assert await collect(cluster) == 0
        assert await cluster.fragments() == before
        assert len(cluster.nodes["nc"].log) <= 4
        cluster.start("na", "nb", maintain=False)
        await cluster.pass_s(MaintainLimits().retry_max_s)
        await collect(cluster)
        assert await cluster.fragments() == []

    run(scenario, limits=MaintainLimits(collect_batch=2))


def test_an_entry_that_names_no_register_harms_nobody() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.store("a0").retire([Retirement(os.urandom(16), b"nonsense", 0)])
        await cluster.put(bucket, b"k", os.urandom(SMALL))
        await cluster.objects.delete(bucket, b"k")
        await cluster.leap(RETIRE_S + 10)
        await collect(cluster)
        assert await cluster.fragments() == []

    run(scenario)


async def sleeping_put(
    cluster: Cluster, bucket: BucketRecord, key: bytes, data: bytes
) -> tuple[asyncio.Task[object], asyncio.Event]:
    """A gateway whose fragments are durable, and that falls asleep right before its accept leaves."""
    gateway, wake = cluster.new_gateway("sleeper"), asyncio.Event()

    async def sleep(source: str, node: str, method: str, request: object) -> None:
        if source == "sleeper" and method == "meta.accept" and not request.identity:  # type: ignore[attr-defined]
            await wake.wait()

    cluster.intercept = sleep

    put = gateway.objects.put(bucket, key, body_of(data), NewMeta(), BodyChecks(size=len(data)), owner=WHO.user_id)
    task = asyncio.get_running_loop().create_task(put)
    await cluster.pass_s(2)
    assert not task.done()
    return task, wake


def test_a_gateway_that_slept_before_its_accept_acknowledges_nothing_that_was_collected() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        task, wake = await sleeping_put(cluster, bucket, b"k", os.urandom(LARGE))
        assert await cluster.fragments()
        await cluster.pass_s(20)
        await cluster.leap(ORPHAN_S + 60)
        assert await collect(cluster) > 0
        wake.set()  # the accept, of a promise given a day ago, goes out
        with pytest.raises(StoragedError):
            await task
        await cluster.pass_s(1)
        with pytest.raises(StoragedError):
            await cluster.objects.head(bucket, b"k")
        assert await cluster.fragments() == []

    run(scenario)


def test_a_complete_that_slept_before_its_accept_brings_back_nothing_that_was_collected() -> None:
    """Two requests complete one upload. The second one puts the version into the record, and it is deleted. Then the
    first one is promised, sees that the upload is Completing, and falls asleep."""

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        upload_id, parts, _ = await upload_parts(cluster, bucket, b"k", {1: LARGE})
        sleeper, third = cluster.new_gateway("sleeper"), cluster.new_gateway("third")
        prepares, accepts, ends = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def hold(source: str, node: str, method: str, request: Any) -> None:
            if source == "sleeper" and method == "meta.prepare" and request.name.table == Table.OBJECT:
                await prepares.wait()
            is_change = method == "meta.accept" and not request.identity
            if source == "sleeper" and is_change and request.name.table == Table.OBJECT:
                await accepts.wait()
            if source == "g" and method == "meta.prepare" and request.name.table == Table.UPLOAD:
                await ends.wait()

        def complete(gateway: Any) -> asyncio.Task[object]:
            work = gateway.objects.complete(bucket, b"k", upload_id, parts, owner=WHO.user_id)
            return asyncio.get_running_loop().create_task(work)

        cluster.intercept = hold
        first = complete(sleeper)
        await cluster.pass_s(0.5)
        second = complete(cluster.gateway)
        await cluster.pass_s(3)
        await third.objects.delete(bucket, b"k")
        prepares.set()
        await cluster.pass_s(1)
        ends.set()
        await second
        await cluster.leap(RETIRE_S + 60)
        await collect(cluster)
        assert await cluster.fragments() == []
        accepts.set()
        await asyncio.gather(first, return_exceptions=True)
        await cluster.pass_s(1)
        with pytest.raises(NoSuchKey):
            await cluster.objects.head(bucket, b"k")

    run(scenario)


@pytest.mark.parametrize("origin", [REPLACED, OF_UPLOAD + bytes(16), b""])
def test_an_entry_that_names_the_data_of_another_register_harms_nobody(origin: bytes) -> None:
    """A replica that lies has a gateway find a record that names data of another object, and replace it."""

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        for size in (SMALL, LARGE):
            await cluster.put(bucket, b"victim", data := os.urandom(size))
            await cluster.put(bucket, b"k", os.urandom(SMALL))
            entry = await cluster.entry(bucket, b"victim")
            owner = object_name(bucket.id, bucket.shard_numbers, b"k").pack()
            for disk in {disk for disk, _ in await cluster.fragments(entry.data_id)}:
                await cluster.store(disk).retire([Retirement(entry.data_id, owner, 0, origin)])
            await cluster.leap(RETIRE_S + 60)
            await collect(cluster)
            assert await cluster.is_whole(bucket, b"victim")
            assert await cluster.get(bucket, b"victim") == data
        assert any("of another register" in line for node in cluster.nodes.values() for line in node.log)

    run(scenario)


def test_data_that_a_record_names_after_the_look_is_not_deleted() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        task, wake = await sleeping_put(cluster, bucket, b"k", data := os.urandom(LARGE))
        node = cluster.nodes["na"]
        for disk, fragment in await cluster.fragments():
            await cluster.store(disk).retire(
                [Retirement(fragment.data_id, object_name(bucket.id, bucket.shard_numbers, b"k").pack(), 0)]
            )
        judge = node.maintenance.collector._judge
        prove = judge.prove

        async def slow(owners: Sequence[RegisterName]) -> Any:
            found = await prove(owners)
            # the gateway's accept is refused now; it looks at its fragments, and proposes again, while this collector
            # is still on its way
            wake.set()
            await asyncio.sleep(20)
            return found

        judge.prove = slow  # type: ignore[method-assign]
        assert await node.maintenance.collector.collect_due() == 0
        await task
        await collect(cluster)
        assert await cluster.get(bucket, b"k") == data
        assert await cluster.is_whole(bucket, b"k")

    run(scenario)


def test_fragments_of_a_request_that_died_are_swept_when_no_request_lives_so_long() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"kept", data := os.urandom(LARGE))
        task, _ = await sleeping_put(cluster, bucket, b"dead", os.urandom(LARGE))
        kept = (await cluster.entry(bucket, b"kept")).data_id
        data_id = next(fragment.data_id for _, fragment in await cluster.fragments() if fragment.data_id != kept)
        task.cancel()
        for node in cluster.nodes.values():  # the gateway died before it could put anything on a list
            for store in node.fragments.values():
                await store.unretire(data_id)
        await cluster.leap(ORPHAN_S / 2)
        assert await sweep(cluster) == 0
        await cluster.leap(ORPHAN_S / 2 + 60)
        assert await sweep(cluster) > 0
        await cluster.pass_s(1)
        await collect(cluster)
        assert await cluster.fragments(data_id) == []
        assert await cluster.get(bucket, b"kept") == data
        assert await sweep(cluster) == 0

    run(scenario)


def test_a_fragment_that_recoding_left_is_swept_and_its_data_is_not() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"k", data := os.urandom(LARGE))
        entry = await cluster.entry(bucket, b"k")
        (disk, fragment), *_ = await cluster.fragments(entry.data_id)
        kept = cluster.store(disk).kept(fragment)
        stray = next(other.id for other in cluster.layouts.current.disks if other.id != disk)
        left = FragmentId(entry.data_id, 0, 2, 2, 0)
        header = msgspec.structs.replace(
            kept.header, id=left.pack(), hashes=(kept.header.hashes[fragment.position],) * 4
        )
        await cluster.store(stray).write(header, [kept.payload], sync=True)
        await cluster.leap(ORPHAN_S + 60)
        assert await sweep(cluster) == 1
        assert await collect(cluster) == 1
        assert await cluster.store(stray).retired(1 << 62, 9) == []
        assert (await cluster.store(stray).stat([left]))[0].health == Health.MISSING
        assert await cluster.is_whole(bucket, b"k")
        assert await cluster.get(bucket, b"k") == data

    run(scenario)


def test_orphans_of_a_bucket_that_is_gone_for_good_are_swept() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        task, _ = await sleeping_put(cluster, bucket, b"k", os.urandom(LARGE))
        task.cancel()
        await cluster.pass_s(1)
        cluster.intercept = None
        await cluster.buckets.delete(bucket)
        await cluster.leap(ORPHAN_S + 60)
        await sweep(cluster)
        await cluster.pass_s(1)
        await collect(cluster)
        assert await cluster.fragments() == []

    run(scenario)


def test_a_bucket_that_a_lie_hides_from_the_directory_loses_nothing_while_it_is_fenced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"k", data := os.urandom(LARGE))
        data_id = (await cluster.entry(bucket, b"k")).data_id
        owner = object_name(bucket.id, bucket.shard_numbers, b"k").pack()
        leave_out_buckets(cluster, monkeypatch)
        for node in cluster.nodes.values():
            for store in node.fragments.values():
                await store.retire([Retirement(data_id, owner, 0)])
        await cluster.gateway.ring.fence(bucket.id, bucket.shard_numbers, b"nonce")
        await cluster.leap(RETIRE_S + 60)
        assert await collect(cluster) == 0
        assert await cluster.gateway.ring.unfence(bucket.id, bucket.shard_numbers, b"nonce")
        assert await cluster.is_whole(bucket, b"k")
        assert await cluster.get(bucket, b"k") == data

    run(scenario)


def test_garbage_of_a_bucket_goes_although_the_gateway_that_deleted_it_died_before_its_fence_was_final() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, other = await cluster.bucket(), await cluster.bucket("other")
        await cluster.put(bucket, b"deleted before", os.urandom(LARGE))
        await cluster.objects.delete(bucket, b"deleted before")
        task, _ = await sleeping_put(cluster, bucket, b"never finished", os.urandom(LARGE))
        task.cancel()
        await cluster.pass_s(1)

        async def dies(caller: str, node: str, method: str, request: object) -> None:
            if isinstance(request, FenceSet) and request.final:
                raise PeerUnreachable("the gateway died")

        cluster.intercept = dies
        with pytest.raises(ServiceUnavailable):
            await cluster.buckets.delete(bucket)
        cluster.intercept = None
        await cluster.leap(ORPHAN_S + 60)
        register = system_name("bucket/other")
        value = (await cluster.gateway.ring.read(register)).value
        assert value is not None
        await cluster.gateway.ring.change(register, lambda value: Change(b"not a record"))
        await sweep(cluster)
        await collect(cluster)
        assert await cluster.fragments() != [], "with a record that can't be read nobody knows which buckets there are"
        await cluster.gateway.ring.change(register, lambda now: cluster.buckets._records.change(register, now, other))
        await cluster.pass_s(MaintainLimits().retry_max_s)
        await sweep(cluster)
        assert await collect(cluster) == 0, "no replica says that the fence stays"
        await tidy(cluster.gateway.plane, cluster.buckets)
        await cluster.pass_s(MaintainLimits().retry_max_s)
        await collect(cluster)
        assert await cluster.fragments() == []
        await cluster.gateway.ring.settle(object_name(other.id, other.shard_numbers, b"open for writing"))

    run(scenario)


def test_parts_of_an_open_upload_are_kept_and_those_of_an_aborted_one_go() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        upload_id, _, _ = await upload_parts(cluster, bucket, b"k", {1: LARGE, 2: SMALL})
        before = await cluster.fragments()
        await cluster.leap(ORPHAN_S + 60)
        await sweep(cluster)
        await cluster.pass_s(1)
        await collect(cluster)
        assert await cluster.fragments() == before
        await cluster.objects.abort(bucket, b"k", upload_id)
        await cluster.leap(RETIRE_S + 60)
        await collect(cluster)
        assert await cluster.fragments() == []

    run(scenario)


@pytest.mark.parametrize("reads", ["answered", "refused"])
def test_a_directory_that_leaves_out_a_bucket_costs_its_open_uploads_no_part(
    monkeypatch: pytest.MonkeyPatch, reads: str
) -> None:
    """Replicas that lie and lag may do so. A Complete that has seen the older attempt of a part still wants it."""

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        upload_id, *_ = await upload_parts(cluster, bucket, b"k", {1: PART})
        await cluster.put_part(bucket, b"k", upload_id, 1, os.urandom(PART))
        await cluster.pass_s(1)
        before = await cluster.fragments()
        await cluster.leap(RETIRE_S + 60)
        leave_out_buckets(cluster, monkeypatch)
        cluster.intercept = refuse_reads if reads == "refused" else None
        await collect(cluster)
        assert await cluster.fragments() == before
        waiting = [node.maintenance.status().garbage_waiting for node in cluster.nodes.values()]
        reasons = {reason for reasons in waiting for reason, _ in reasons}
        assert ("its upload is open" in reasons) == (reads == "answered")
        assert reasons

    run(scenario)


def test_a_directory_that_leaves_out_a_bucket_costs_it_no_data_while_its_records_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A node that lies can say of the data of an object that it was replaced. Then a read of the record decides."""

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"k", os.urandom(PART))
        entry, owner = await cluster.entry(bucket, b"k"), object_name(bucket.id, bucket.shard_numbers, b"k")
        before = await cluster.fragments()
        for disk in {disk for disk, _ in before}:
            await cluster.store(disk).retire([Retirement(entry.data_id, owner.pack(), 0, REPLACED)])
        leave_out_buckets(cluster, monkeypatch)
        cluster.intercept = refuse_reads
        await collect(cluster)
        assert before
        assert await cluster.fragments() == before

    run(scenario)


def test_a_lie_of_the_directory_that_is_over_costs_nothing_when_its_bucket_is_fenced_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        upload_id, *_ = await upload_parts(cluster, bucket, b"k", {1: PART})
        await cluster.put_part(bucket, b"k", upload_id, 1, os.urandom(PART))
        await cluster.pass_s(1)
        before = await cluster.fragments()
        await cluster.leap(RETIRE_S + 60)
        leave_out_buckets(cluster, monkeypatch)
        await collect(cluster)
        monkeypatch.undo()
        for node in cluster.nodes.values():
            judge = node.maintenance.collector._judge
            assert await judge.is_gone(bucket.id)
            await judge.buckets.refresh(judge._context)
        await cluster.gateway.ring.fence(bucket.id, bucket.shard_numbers, b"nonce")
        await cluster.leap(RETIRE_S + 60)
        await collect(cluster)
        assert await cluster.fragments() == before

    run(scenario)


def leave_out_buckets(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the directories of all nodes."""

    async def leave_out(buckets: disuse.Buckets, _context: object) -> None:
        buckets.by_id, buckets._verified = {}, {}

    monkeypatch.setattr(disuse.Buckets, "refresh", leave_out)
    for node in cluster.nodes.values():
        node.maintenance.collector._judge.buckets.by_id.clear()


async def refuse_reads(_source: str, node: str, method: str, _request: object) -> None:
    if method == "meta.read":
        raise PeerUnreachable(f"{node} is away")


@pytest.mark.parametrize("way", ["retired", "swept"])
def test_parts_of_uploads_that_were_open_when_their_bucket_was_deleted_go(way: str) -> None:
    """Also when the gateway that deleted it dies right afterwards."""

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await upload_parts(cluster, bucket, b"k", {1: LARGE, 2: SMALL})
        await upload_parts(cluster, bucket, b"other", {1: SMALL})

        async def dies(_source: str, _node: str, _method: str, request: object) -> None:
            if isinstance(request, ScanRequest) and request.table == Table.PART:
                raise PeerUnreachable("the gateway died")

        cluster.intercept = dies if way == "swept" else None
        await cluster.buckets.delete(bucket)
        await cluster.pass_s(1)
        cluster.intercept = None
        await cluster.leap(RETIRE_S + 60)
        await collect(cluster)
        assert (await cluster.fragments() == []) == (way == "retired")
        await cluster.leap(ORPHAN_S + 60)
        await sweep(cluster)
        await cluster.pass_s(1)
        await collect(cluster)
        assert await cluster.fragments() == []

    run(scenario)


@pytest.mark.parametrize("way", ["retired", "swept"])
def test_data_of_a_deleted_bucket_goes_although_most_replicas_have_a_row_from_before(way: str) -> None:
    """They had the partition before, and got it again when the bucket was deleted: then nothing settles their rows."""

    async def scenario(cluster: Cluster) -> None:
        bucket, living = await cluster.bucket(), await cluster.bucket("living")
        for its in (bucket, living):
            await cluster.put(its, b"k", os.urandom(PART))
        before, kept = await cluster.fragments(), (await cluster.entry(living, b"k")).data_id
        name = object_name(bucket.id, bucket.shard_numbers, b"k")
        stores = [cluster.meta(disk) for disk in cluster.layouts.current.replicas_of(name.partition)[:2]]
        rows = [slot for store in stores if (slot := store.get(name)) is not None]
        assert len(rows) == 2
        await cluster.objects.delete(bucket, b"k")
        await cluster.pass_s(1)
        await cluster.buckets.delete(bucket)
        await cluster.pass_s(1)
        for store, row in zip(stores, rows, strict=True):
            await store.commit(StoreBatch([row]))
        if way == "swept":
            for disk in cluster.layouts.current.disk_by_id:
                cluster.store(disk)._retired.clear()
            await cluster.leap(ORPHAN_S + 60)
            await sweep(cluster)
            await cluster.pass_s(1)
        await cluster.leap(RETIRE_S + 60)
        await collect(cluster)
        assert 0 < len(await cluster.fragments()) < len(before)
        assert await cluster.fragments() == await cluster.fragments(kept)

    run(scenario)


def test_the_parts_of_an_upload_that_ends_with_its_bucket_go_to_the_lists_together() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await upload_parts(cluster, bucket, b"k", dict.fromkeys(range(1, 13), SMALL))
        calls: Counter[str] = Counter()

        async def count(_source: str, node: str, method: str, _request: object) -> None:
            calls[method] += 1

        cluster.intercept = count
        await cluster.buckets.delete(bucket)
        await cluster.pass_s(1)
        disks = {disk for disk, _ in await cluster.fragments()}
        assert 0 < calls["fragment.retire"] <= len(disks)

    run(scenario)


def test_a_part_whose_row_may_be_on_its_way_is_kept_while_its_upload_is_open() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        upload_id, parts, first = await upload_parts(cluster, bucket, b"k", {1: LARGE})
        gateway, wake = cluster.new_gateway("sleeper"), asyncio.Event()

        async def sleep(source: str, node: str, method: str, request: object) -> None:
            if source == "sleeper" and method == "meta.accept":
                await wake.wait()

        cluster.intercept = sleep
        data = os.urandom(LARGE)
        task = asyncio.get_running_loop().create_task(cluster.put_part(bucket, b"k", upload_id, 2, data, gateway))
        await cluster.pass_s(20)
        await cluster.leap(ORPHAN_S + 60)
        await sweep(cluster)
        await cluster.pass_s(1)
        await collect(cluster)
        wake.set()
        with pytest.raises(OutcomeUnknown):
            await task
        await cluster.pass_s(1)
        _, listed, _ = await cluster.objects.list_parts(bucket, b"k", upload_id)
        assert [part.number for part in listed] == [1, 2]
        parts.append(CompletedPart(2, listed[1].etag))
        await cluster.objects.complete(bucket, b"k", upload_id, parts, owner=WHO.user_id)
        assert await cluster.get(bucket, b"k") == first + data

    run(scenario)


# --- recoding, and what it leaves


def test_parts_in_rows_and_on_manifest_pages_are_recoded_and_brought_back() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        upload_id, parts, whole = await upload_parts(cluster, bucket, b"many", dict.fromkeys(range(1, 41), PART))
        await cluster.objects.complete(bucket, b"many", upload_id, parts, owner=WHO.user_id)
        assert (await cluster.record(bucket, b"many")).versions[0].manifest
        open_id, open_parts, open_whole = await upload_parts(cluster, bucket, b"open", {1: LARGE, 2: PART})
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        await cluster.kill("nb")
        await cluster.pass_s(700)
        assert await cluster.settled() == (1, 0)
        assert await cluster.parts_below_target() == 2
        places = await cluster.places(bucket, b"many")
        assert len(places) == 40
        assert {str(place.profile) for place in places} == {"2+2"}
        assert await cluster.get(bucket, b"many") == whole
        cluster.start("nb")
        assert await cluster.settled() == (0, 0)
        assert await cluster.parts_below_target() == 0
        assert await cluster.is_whole(bucket, b"many")
        await cluster.objects.complete(bucket, b"open", open_id, open_parts, owner=WHO.user_id)
        assert await cluster.is_whole(bucket, b"open")
        await cluster.leap(MaintainLimits().drop_delay_s)
        await cluster.pass_s(60)
        assert await cluster.get(bucket, b"open") == open_whole
        assert await cluster.get(bucket, b"many") == whole
        assert await cluster.settled() == (0, 0)

    run(scenario)


def test_manifest_pages_come_back_to_a_replica_that_was_away_or_lost_them() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        upload_id, parts, whole = await upload_parts(cluster, bucket, b"key", dict.fromkeys(range(1, 41), 100))
        await cluster.kill("na")
        await cluster.objects.complete(bucket, b"key", upload_id, parts, owner=WHO.user_id)
        cluster.start("na", maintain=False)
        stores = [
            node.meta[disk]
            for node in cluster.nodes.values()
            for disk in node.meta
            if node.meta[disk].page_hashes() or node.name == "na"
        ]
        (page_hash, *_) = max((store.page_hashes() for store in stores), key=len)
        rotten = next(store for store in stores if page_hash in store.page_hashes())
        rotten.damage_page(page_hash)
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("nb")
        assert await cluster.get(bucket, b"key") == whole
        cluster.start("nb")
        await cluster.settled()
        await cluster.kill("nc")
        assert await cluster.get(bucket, b"key") == whole

    run(scenario)


def test_a_slow_reader_follows_blocks_that_were_recoded_and_dropped_meanwhile() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        data = os.urandom(4 * LARGE)
        await cluster.put(bucket, b"key", data)
        entry = await cluster.entry(bucket, b"key")
        cluster.maintain()
        await cluster.settled()
        chunks = (await cluster.objects.get(bucket, b"key")).chunks()
        read = [bytes(await anext(chunks))]
        await cluster.kill("na")
        await cluster.pass_s(MaintainLimits().recode_delay_s + MaintainLimits().drop_delay_s + 600)
        assert (await cluster.entry(bucket, b"key")).runs != entry.runs
        read += [bytes(piece) async for piece in chunks]
        assert b"".join(read) == data

    run(scenario)


def test_fragments_that_came_back_into_use_are_not_dropped() -> None:
    """4+2 is recoded to 2+2, and back to the same fragments on the same disks, before what the first recoding left is
    due.
    """

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"k", data := os.urandom(LARGE))
        cluster.maintain()
        await cluster.settled()
        for _ in range(2):
            await cluster.kill("na")
            await cluster.pass_s(700)
            cluster.start("na")
            assert await cluster.settled() == (0, 0)
        await cluster.leap(2 * MaintainLimits().drop_delay_s)
        await cluster.pass_s(60)
        assert await cluster.is_whole(bucket, b"k")
        named = {(disk, fragment) for place in await cluster.places(bucket, b"k") for fragment, disk in place.fragments}
        assert set(await cluster.fragments((await cluster.entry(bucket, b"k")).data_id)) == named
        assert await cluster.get(bucket, b"k") == data

    run(scenario)


def test_a_record_that_changed_while_it_was_recoded_stays_as_it_was_changed() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"k", os.urandom(LARGE))
        cluster.maintain()
        await cluster.settled()
        newer = os.urandom(LARGE)
        written = False
        other = cluster.new_gateway("h")

        async def interfere(source: str, node: str, method: str, request: object) -> None:
            nonlocal written
            if method == "fragment.touch" and not written:
                written = True
                await cluster.put(bucket, b"k", newer, other if source == "g" else cluster.gateway)

        await cluster.kill("nc")
        cluster.intercept = interfere
        await cluster.pass_s(700)
        assert written
        assert await cluster.get(bucket, b"k") == newer
        cluster.intercept = None
        cluster.start("nc")
        assert await cluster.settled() == (0, 0)
        assert await cluster.is_whole(bucket, b"k")
        assert await cluster.get(bucket, b"k") == newer

    run(scenario)


def test_recoding_says_nothing_when_its_fragments_are_gone_behind_its_back() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"k", data := os.urandom(LARGE))
        cluster.maintain()
        await cluster.settled()
        before = await cluster.record(bucket, b"k")
        stolen = 0

        async def steal(source: str, node: str, method: str, request: object) -> None:
            nonlocal stolen
            if method == "fragment.touch":
                for disk, fragment in await cluster.fragments():
                    if (fragment.k, fragment.m) == (2, 2):
                        stolen += await cluster.store(disk).delete([fragment])

        await cluster.kill("nc")
        cluster.intercept = steal
        await cluster.pass_s(620)
        assert stolen
        assert await cluster.record(bucket, b"k") == before
        assert await cluster.get(bucket, b"k") == data

    run(scenario)


def test_a_sweep_judges_what_became_old_since_the_last_one_and_everything_once_a_week() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"k", os.urandom(LARGE))
        await cluster.leap(ORPHAN_S + 60)
        judged: list[bytes] = []
        for node in cluster.nodes.values():
            found = node.maintenance.collector._sweep
            claimed = found._claimed

            async def counted(disk: str, owner: RegisterName, header: Any, claimed: Any = claimed) -> bool:
                judged.append(header.id)
                return await claimed(disk, owner, header)

            found._claimed = counted
        assert await sweep(cluster) == 0
        first = len(judged)
        assert first
        assert await sweep(cluster) == 0
        assert len(judged) == first, "nothing has become old since"
        await cluster.put(bucket, b"k2", os.urandom(LARGE))
        await cluster.leap(ORPHAN_S + 60)
        assert await sweep(cluster) == 0
        second = len(judged)
        assert second > first
        assert not set(judged[:first]) & set(judged[first:])
        await cluster.leap(FULL_S)
        assert await sweep(cluster) == 0
        assert set(judged[second:]) == set(judged[:second])

    run(scenario)


# --- pause and pace


def test_collection_stops_while_it_is_paused_and_goes_on_at_the_pace_that_is_set() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        for index in range(40):
            await cluster.put(bucket, b"k%d" % index, os.urandom(SMALL))
            await cluster.objects.delete(bucket, b"k%d" % index)
        await cluster.leap(RETIRE_S + 10)
        node = cluster.nodes["na"]
        collector, context = node.maintenance.collector, node.maintenance.collector._context
        before = len(await cluster.fragments())
        settings = MoveSettings(revision=1, collection_paused=True)
        context.settings = lambda: settings
        task = asyncio.get_running_loop().create_task(collector.collect_due())
        await cluster.pass_s(1000)
        assert (task.done(), len(await cluster.fragments())) == (False, before)
        [job] = [job for job in node.maintenance.status().jobs if job.name == "collection"]
        assert (job.state, "storaged job resume collection" in job.detail) == ("paused", True)
        settings = MoveSettings(revision=2, collection_per_s=1)
        await cluster.pass_s(20)
        assert len(await cluster.fragments()) > before - 30
        await cluster.pass_s(100)
        assert task.done()
        assert task.result() == before - len(await cluster.fragments()) > 0
        assert not [job for job in node.maintenance.status().jobs if job.name == "collection"]

    run(scenario, limits=MaintainLimits(collect_batch=4))


@pytest.mark.parametrize("replaced", [True, False])
def test_what_was_judged_before_a_pause_is_not_deleted_in_it(replaced: bool) -> None:
    """Judging a page may take long: its rounds wait for replicas."""

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"k", os.urandom(LARGE))
        if replaced:
            await cluster.objects.delete(bucket, b"k")
            await cluster.leap(RETIRE_S + 10)
        else:
            await write_orphan(cluster, os.urandom(16), object_name(bucket.id, bucket.shard_numbers, b"k"), "a0")
        collector = cluster.nodes["na"].maintenance.collector
        settings, judge = MoveSettings(), collector._judge
        collector._context.settings = lambda: settings
        step = "read" if replaced else "prove"
        judged = getattr(judge, step)

        async def judge_and_pause(owners: Sequence[RegisterName]) -> Any:
            nonlocal settings
            found = await judged(owners)
            settings = MoveSettings(revision=1, collection_paused=True)
            return found

        setattr(judge, step, judge_and_pause)
        before = await cluster.fragments()
        task = asyncio.get_running_loop().create_task(collector.collect_due())
        await cluster.pass_s(100)
        assert await cluster.fragments() == before
        setattr(judge, step, judged)
        settings = MoveSettings(revision=2)
        await cluster.pass_s(2)
        assert task.done()
        await collector.collect_due()
        assert len(await cluster.fragments()) < len(before)

    run(scenario)


async def leave_after_move(cluster: Cluster, count: int) -> tuple[str, FragmentId, list[FragmentId], Retirement]:
    """Puts an object, and fragments that a move left, on a disk of the node ``na``. Returns the disk, the object's
    fragment there, the left ones, and their entry of the garbage list.
    """
    bucket = await cluster.bucket()
    await cluster.put(bucket, b"k", os.urandom(LARGE))
    kept, disk = next(
        where for place in await cluster.places(bucket, b"k") for where in place.fragments if where[1][0] == "a"
    )
    store, owner = cluster.store(disk), object_name(bucket.id, bucket.shard_numbers, b"k").pack()
    left = [make(random.Random(1), data_id=kept.data_id, block=kept.block + 100 + number) for number in range(count)]
    for made in left:
        await store.write(msgspec.structs.replace(made.header, owner=owner), [made.payload], sync=True)
    entry = Retirement(kept.data_id, owner, 0)
    await store.retire([entry])
    return disk, kept, [made.id for made in left], entry


def test_what_a_move_left_stays_on_the_list_until_it_is_gone() -> None:
    """Of data that its record refers to. Without an entry the next full sweep would find it, a week later."""

    async def scenario(cluster: Cluster) -> None:
        disk, kept, (left,), entry = await leave_after_move(cluster, 1)
        store, collector = cluster.store(disk), cluster.nodes["na"].maintenance.collector
        settings, prove = MoveSettings(), collector._judge.prove
        collector._context.settings = lambda: settings

        async def prove_and_pause(owners: Sequence[RegisterName]) -> Any:
            nonlocal settings
            found = await prove(owners)
            settings = MoveSettings(revision=1, collection_paused=True)
            return found

        collector._judge.prove = prove_and_pause  # type: ignore[method-assign]
        task = asyncio.get_running_loop().create_task(collector.collect_due())
        await cluster.pass_s(100)
        assert await store.due(cluster.clock.wall_ms(), (0, b""), 9) == [entry]
        collector._judge.prove = prove  # type: ignore[method-assign]
        settings = MoveSettings(revision=2)
        await cluster.pass_s(2)
        await task
        await collector.collect_due()
        assert await store.due(cluster.clock.wall_ms(), (0, b""), 9) == []
        assert not cluster.holds(disk, left)
        assert cluster.holds(disk, kept)

    run(scenario)


def test_what_a_move_left_of_many_fragments_stays_on_the_list_until_all_are_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One call deletes so many of one data id. It is not condemned afterwards, so the others wait for later rounds."""
    monkeypatch.setattr(garbage_page, "DELETIONS_A_CALL", 2)

    async def scenario(cluster: Cluster) -> None:
        disk, kept, left, _ = await leave_after_move(cluster, 5)
        store, collector = cluster.store(disk), cluster.nodes["na"].maintenance.collector
        counts = [5]
        while counts[-1] and await store.due(cluster.clock.wall_ms(), (0, b""), 9):
            await collector.collect_due()
            counts.append(sum(cluster.holds(disk, fragment) for fragment in left))
        assert counts == [5, 3, 1, 0]
        assert await store.due(cluster.clock.wall_ms(), (0, b""), 9) == []
        assert cluster.holds(disk, kept)

    run(scenario)


def test_a_pause_stops_a_sweep_in_the_middle_of_a_page() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        for index in range(20):
            await cluster.put(bucket, b"k%d" % index, os.urandom(LARGE))
        await cluster.leap(ORPHAN_S + 10)
        collector = cluster.nodes["na"].maintenance.collector
        settings, judged, claimed = MoveSettings(), 0, collector._sweep._claimed
        collector._context.settings = lambda: settings

        async def slow(*arguments: Any) -> bool:
            nonlocal judged
            judged += 1
            await asyncio.sleep(10)
            return await claimed(*arguments)

        collector._sweep._claimed = slow  # type: ignore[method-assign]
        sweep = asyncio.get_running_loop().create_task(collector.sweep())
        await cluster.pass_s(25)
        settings = MoveSettings(revision=1, collection_paused=True)
        await cluster.pass_s(1000)
        assert judged == 3
        settings = MoveSettings(revision=2)
        await cluster.pass_s(10_000)
        assert sweep.done()

    run(scenario)


def test_the_sweeps_are_paused_with_the_garbage_lists() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"k", os.urandom(LARGE))
        await cluster.leap(ORPHAN_S + 10)
        node = cluster.nodes["na"]
        settings = MoveSettings(collection_paused=True)
        node.maintenance.collector._context.settings = lambda: settings
        sweep = asyncio.get_running_loop().create_task(node.maintenance.collector.sweep())
        await cluster.pass_s(100)
        assert not sweep.done()
        settings = MoveSettings()
        await cluster.pass_s(100)
        assert sweep.done()

    run(scenario)


# --- scrub


def test_scrub_finds_flips_in_fragments_and_rows_and_all_is_mended() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"small", os.urandom(SMALL))
        await cluster.put(bucket, b"large", os.urandom(LARGE))
        upload_id, parts, whole = await upload_parts(cluster, bucket, b"upload", {1: LARGE})
        cluster.maintain()
        await cluster.settled()
        for key in (b"small", b"large"):
            fragment, disk = list((await cluster.places(bucket, key))[0].fragments)[1]
            cluster.store(disk).damage(fragment, 0)
        part = next(where for where in await cluster.fragments() if owner_of(cluster, where) == b"upload")
        cluster.store(part[0]).damage(part[1], 0)
        name = object_name(bucket.id, bucket.shard_numbers, b"large")
        row_disk = cluster.layouts.current.replicas_of(name.partition)[1]
        cluster.nodes[cluster.layouts.current.node_of(row_disk)].meta[row_disk].damage(name)
        assert await cluster.gateway.maintain.start_scrub() == ["na", "nb", "nc"]
        assert await cluster.settled() == (0, 0)
        assert sum(status.damaged_found for status in await cluster.statuses()) == 4
        assert cluster.differing_registers() == []
        assert await cluster.is_whole(bucket, b"small")
        assert await cluster.is_whole(bucket, b"large")
        assert cluster.holds(*part)
        await cluster.objects.complete(bucket, b"upload", upload_id, parts, owner=WHO.user_id)
        assert await cluster.get(bucket, b"upload") == whole

    run(scenario)


def test_scrub_has_all_nodes_look_for_the_registers_of_fragments_whose_heads_are_damaged() -> None:
    """A damaged head names no register. So the node that is responsible for it does not get to know of it by a hint."""

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        for number in range(12):
            await cluster.put(bucket, b"%d" % number, os.urandom(LARGE if number % 2 else SMALL))
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        damaged = [where for where in await cluster.fragments() if where[0] == "b1"]
        for _, fragment in damaged:
            cluster.store("b1").damage(fragment, -1)
        assert await cluster.gateway.maintain.start_scrub() == ["na", "nb", "nc"]
        assert await cluster.settled() == (0, 0)
        assert [where for where in damaged if not cluster.holds(*where)] == []
        assert all([await cluster.is_whole(bucket, b"%d" % number) for number in range(12)])

    run(scenario)


def owner_of(cluster: Cluster, where: tuple[str, FragmentId]) -> bytes:
    return RegisterName.unpack(cluster.store(where[0]).kept(where[1]).header.owner).key


def test_a_scrub_that_starts_by_itself_goes_on_where_it_was_interrupted() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        for index in range(6):
            await cluster.put(bucket, b"k%d" % index, os.urandom(LARGE))
        node = cluster.nodes["na"]
        node.maintenance.scrub.pace.bytes_per_s = 20_000
        task = asyncio.get_running_loop().create_task(node.maintenance.scrub.once(resume=True))
        await cluster.pass_s(100)
        task.cancel()
        position = node.meta["a0"].get_meta("scrub-position")
        assert position
        left = [header.id async for header in cluster.store("a0").scan() if header.id > position]
        assert 0 < len(left) < (await cluster.store("a0").usage()).fragments
        again = node.maintenance.scrub
        await again.once(resume=True)
        assert again.job.done == len(left) + (await cluster.store("a1").usage()).fragments
        assert node.meta["a0"].get_meta("scrub-finished-ms")
        assert node.meta["a0"].get_meta("scrub-position") == b""

    run(scenario)


def test_a_scrub_that_ended_by_a_clock_that_was_wrong_does_not_delay_the_next_one() -> None:
    async def scenario(cluster: Cluster) -> None:
        node = cluster.nodes["na"]
        in_ten_years = str(cluster.clock.wall_ms() + 10 * 365 * 86_400_000).encode()
        for store in node.meta.values():
            await store.commit(StoreBatch(meta={"scrub-finished-ms": in_ten_years}))
        cluster.maintain()
        await cluster.settled()
        await cluster.leap(3000)
        assert node.maintenance.scrub.job.state == "done"
        assert int(node.meta["a0"].get_meta("scrub-finished-ms") or 0) <= cluster.clock.wall_ms()

    run(scenario, limits=MaintainLimits(scrub_interval_s=20_000.0))


def test_a_scrub_stops_while_it_is_paused_and_goes_on_there_at_the_pace_that_is_set() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        for index in range(6):
            await cluster.put(bucket, b"k%d" % index, os.urandom(LARGE))
        node = cluster.nodes["na"]
        scrub, context = node.maintenance.scrub, node.maintenance.scrub._context
        settings = MoveSettings(scrub_bytes_per_s=20_000)
        context.settings = lambda: settings
        scrub.pace.bytes_per_s = 0
        task = asyncio.get_running_loop().create_task(scrub.once())
        await cluster.pass_s(100)
        done = scrub.job.done
        assert 0 < scrub.job.bytes < 150 * 20_000
        settings = UNKNOWN
        await cluster.pass_s(50)
        assert "not read yet" in scrub.job.detail
        settings = MoveSettings(scrub_paused=True)
        await cluster.pass_s(50)
        stopped = scrub.job.done
        assert stopped <= done + 2
        await cluster.pass_s(1000)
        assert (scrub.job.done, scrub.job.state) == (stopped, "running")
        assert scrub.job.detail == "paused; to go on: storaged job resume scrub"
        settings = MoveSettings()
        await cluster.pass_s(100)
        assert task.done()
        assert (scrub.job.state, scrub.job.detail) == ("done", "0 damaged")
        assert scrub.job.done == sum([(await cluster.store(disk).usage()).fragments for disk in ("a0", "a1")])

    run(scenario)


def test_a_scrub_starts_by_itself_when_the_last_one_is_long_ago() -> None:
    async def scenario(cluster: Cluster) -> None:
        cluster.maintain()
        node = cluster.nodes["na"]
        ended = []
        for _ in range(12):
            await cluster.leap(400)
            await cluster.pass_s(1)
            ended.append(node.meta["a0"].get_meta("scrub-finished-ms"))
        assert ended[0] is not None
        assert ended[0] == ended[5] != ended[11]

    run(scenario, limits=MaintainLimits(scrub_interval_s=3000.0))


def test_a_scrub_whose_notes_have_rotted_begins_anew_and_ends_no_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def rotten(name: str) -> bytes | None:
        if name.startswith("scrub"):
            raise RowDamaged(name)
        return None

    async def scenario(cluster: Cluster) -> None:
        monkeypatch.setattr(cluster.nodes["na"].meta["a0"], "get_meta", rotten)
        cluster.maintain()
        await cluster.pass_s(3700)
        assert cluster.nodes["na"].maintenance.scrub.job.state == "done"

    run(scenario)


def test_a_row_that_a_gateway_changes_is_never_undone_by_repair() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        cluster.maintain()
        await cluster.settled()
        name = object_name(bucket.id, bucket.shard_numbers, b"counter")
        for index in range(30):
            await cluster.gateway.ring.change(name, functools.partial(_next, index))
            cluster.nodes["na"].maintenance.check.request_walk()
            await cluster.pass_s(0.3)
        value = (await cluster.gateway.ring.read(name)).value
        assert value is not None
        assert value.sequence == 30

    run(scenario)


def _next(index: int, value: Value | None) -> Change:
    assert (value.sequence if value is not None else 0) == index
    return Change(encode(index), 1)
