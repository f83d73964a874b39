"""What repair does to a cluster: fragments lost, damaged, forged; disks and racks that go, stay away and return."""

from __future__ import annotations

import asyncio
import os
import random
from typing import Any

import msgspec
import pytest
import xxhash

from storaged.cluster.layout import Sparing, partition_of
from storaged.cluster.ports import Call, PeerIdentity
from storaged.errors import PeerUnreachable, StoragedError
from storaged.fragments.ports import FragmentId
from storaged.maintain import service
from storaged.maintain.context import MaintainLimits
from storaged.maintain.repair import NO_RECODING_S
from storaged.maintain.service import Ask
from storaged.meta.names import Change, RegisterName, Table, object_name, part_name, system_name, upload_name
from storaged.meta.store_ports import RowDamaged, RowRange
from storaged.objects.records import BucketRecord, ObjectRecord, encode_object
from storaged.objects.upload_records import PartRecord, UploadRecord
from storaged.wire import encode
from tests.integration.memory_cluster import Cluster, run, without_hash
from tests.second_preimage import second_preimage

SMALL, LARGE = 5_000, 2_500_000
DELAY_S = MaintainLimits().recode_delay_s
DROP_S = MaintainLimits().drop_delay_s


async def filled(cluster: Cluster, count: int = 2) -> tuple[BucketRecord, dict[bytes, bytes]]:
    """A bucket with objects of every form: in the record, as copies, coded."""
    bucket = await cluster.bucket()
    objects = {b"%s-%d" % (form, index): os.urandom(size) for form, size in FORMS.items() for index in range(count)}
    for key, data in objects.items():
        await cluster.put(bucket, key, data)
    return bucket, objects


FORMS = {b"inline": 10, b"small": SMALL, b"large": LARGE}


async def assert_whole(cluster: Cluster, bucket: BucketRecord, objects: dict[bytes, bytes]) -> None:
    for key, data in objects.items():
        assert await cluster.is_whole(bucket, key), key
        assert await cluster.get(bucket, key) == data


def test_a_healthy_cluster_is_counted_and_at_rest() -> None:
    async def scenario(cluster: Cluster) -> None:
        await filled(cluster)
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        assert all(status.fragments_rebuilt == status.registers_settled == 0 for status in await cluster.statuses())

    run(scenario)


def test_missing_fragments_are_rebuilt_where_they_were() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, objects = await filled(cluster)
        for key in (b"large-0", b"small-0"):
            for place in await cluster.places(bucket, key):
                for fragment, disk in list(place.fragments)[:2]:
                    await cluster.store(disk).delete([fragment])
        before = await cluster.record(bucket, b"large-0")
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        await assert_whole(cluster, bucket, objects)
        assert await cluster.record(bucket, b"large-0") == before
        assert sum(status.fragments_rebuilt for status in await cluster.statuses()) == 2 * 4 + 2

    run(scenario)


def test_a_block_with_too_few_fragments_is_lost_until_they_return() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, _ = await filled(cluster, 1)
        place = (await cluster.places(bucket, b"large-0"))[1]
        stolen = []
        for fragment, disk in list(place.fragments)[:3]:
            stolen.append((disk, cluster.store(disk).kept(fragment)))
            await cluster.store(disk).delete([fragment])
        cluster.maintain()
        assert await cluster.settled() == (1, 1)
        disk, kept = stolen[0]
        await cluster.store(disk).write(kept.header, [kept.payload], sync=True)
        cluster.gateway.maintain.hint(object_name(bucket.id, bucket.shard_numbers, b"large-0"))
        assert await cluster.settled() == (0, 0)
        assert await cluster.is_whole(bucket, b"large-0")

    run(scenario)


def test_what_a_read_finds_damaged_is_rebuilt_soon() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, objects = await filled(cluster, 1)
        cluster.maintain()
        await cluster.settled()
        fragment, disk = next((await cluster.places(bucket, b"large-0"))[0].fragments)
        cluster.store(disk).damage(fragment, 0)
        assert await cluster.get(bucket, b"large-0") == objects[b"large-0"]
        await cluster.pass_s(3.0)
        await assert_whole(cluster, bucket, objects)

    run(scenario)


def test_a_liars_bytes_are_not_laundered_and_are_replaced() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, objects = await filled(cluster, 1)
        place, *_ = await cluster.places(bucket, b"large-0")
        where = list(place.fragments)
        good = cluster.store(where[5][1]).kept(where[5][0]).payload
        cluster.forge(where[1][1], where[1][0])
        await cluster.store(where[5][1]).delete([where[5][0]])
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        assert cluster.store(where[5][1]).kept(where[5][0]).payload == good
        assert cluster.holds(where[1][1], where[1][0])
        await assert_whole(cluster, bucket, objects)

    run(scenario)


@pytest.mark.parametrize("key", [b"large-0", b"small-0"])
def test_a_lie_with_the_xxh3_of_the_truth_is_not_laundered_and_is_replaced(key: bytes) -> None:
    """What stood in a header before was the xxh3-128 of a fragment, for which a liar finds other bytes."""

    async def scenario(cluster: Cluster) -> None:
        bucket, objects = await filled(cluster, 1)
        where = list((await cluster.places(bucket, key))[0].fragments)
        stores = [(cluster.store(disk).kept, fragment) for fragment, disk in where]
        (lying, lied), (missing, lost) = stores[0], stores[-1]
        truth, good = lying(lied).payload, missing(lost).payload
        forged = second_preimage(truth, random.Random(3))
        assert forged != truth
        assert xxhash.xxh3_128_digest(forged) == xxhash.xxh3_128_digest(truth)
        cluster.forge(where[0][1], where[0][0], forged)
        await cluster.store(where[-1][1]).delete([where[-1][0]])
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        assert missing(lost).payload == good
        assert lying(lied).payload == truth
        await assert_whole(cluster, bucket, objects)

    run(scenario)


@pytest.mark.parametrize("key", [b"large-0", b"small-0"])
def test_a_block_of_the_old_kind_is_read_and_rebuilt_with_the_hashes_that_it_has(key: bytes) -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, objects = await filled(cluster, 1)
        if key == b"small-0":
            await cluster.gateway.ring.change(object_name(bucket.id, bucket.shard_numbers, key), without_hash)
        for place in await cluster.places(bucket, key):
            kept = [cluster.store(disk).kept(fragment) for fragment, disk in place.fragments]
            old = tuple(xxhash.xxh3_128_digest(one.payload) for one in kept)[: len(kept[0].header.hashes)]
            for one in kept:
                one.header = msgspec.structs.replace(one.header, hashes=old)
        fragment, disk = next((await cluster.places(bucket, key))[0].fragments)
        before = cluster.store(disk).kept(fragment)
        assert {len(one) for one in before.header.hashes} == {16}
        await cluster.store(disk).delete([fragment])
        assert await cluster.get(bucket, key) == objects[key]
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        rebuilt = cluster.store(disk).kept(fragment)
        assert (rebuilt.payload, rebuilt.header.hashes) == (before.payload, before.header.hashes)
        await assert_whole(cluster, bucket, objects)

    run(scenario)


@pytest.mark.parametrize("key", [b"large-0", b"small-0"])
def test_a_lie_that_only_the_gateway_can_see_is_replaced(key: bytes) -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, objects = await filled(cluster, 1)
        cluster.maintain()
        await cluster.settled()
        for fragment, disk in list((await cluster.places(bucket, key))[0].fragments)[:1]:
            cluster.forge(disk, fragment)
            assert await cluster.get(bucket, key) == objects[key]
            cluster.gateway.maintain.hint(object_name(bucket.id, bucket.shard_numbers, key), fragment)
            await cluster.pass_s(3.0)
            assert cluster.holds(disk, fragment)

    run(scenario)


def test_a_rebuilt_copy_carries_what_it_was_written_with_and_no_more() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, _ = await filled(cluster, 1)
        where = list((await cluster.places(bucket, b"small-0"))[0].fragments)
        fragment, disk = where[0]
        written = cluster.store(disk).kept(fragment)
        assert written.header.part_header == b"", "it is in the record, on the same disk"
        await cluster.store(disk).delete([fragment])
        cluster.maintain()
        await cluster.settled()
        rebuilt = cluster.store(disk).kept(fragment)
        assert rebuilt.payload == written.payload
        assert msgspec.structs.replace(rebuilt.header, created_ms=0) == msgspec.structs.replace(
            written.header, created_ms=0
        )
        whole = (await cluster.places(bucket, b"large-0"))[0]
        fragment, disk = next(iter(whole.fragments))
        assert cluster.store(disk).kept(fragment).header.part_header == whole.entry.header

    run(scenario)


def test_a_range_that_its_disk_cannot_read_keeps_no_other_from_being_looked_at() -> None:
    """A page of the store that is none any more: no slice of the range is read, nor are the keys in it known."""

    async def scenario(cluster: Cluster) -> None:
        bucket, objects = await filled(cluster, 4)
        keys = {
            object_name(bucket.id, bucket.shard_numbers, key).shard: key for key in objects if key.startswith(b"large")
        }
        leaders = {
            shard: node
            for node in cluster.nodes.values()
            for shard in bucket.shard_numbers
            if node.context.leads(partition_of(bucket.id, shard))
        }
        broken, shard = next(
            (other, shard) for shard in keys for other in range(shard) if leaders[other] is leaders[shard]
        )
        for meta in leaders[shard].meta.values():

            def unreadable(wanted: RowRange, real: Any = meta.slice) -> Any:
                if wanted[:3] == (Table.OBJECT, bucket.id, broken):
                    raise RowDamaged("a page that is none")
                return real(wanted)

            meta.slice = unreadable  # type: ignore[method-assign]
        fragment, disk = next(iter((await cluster.places(bucket, keys[shard]))[0].fragments))
        await cluster.store(disk).delete([fragment])
        cluster.maintain()
        await cluster.pass_s(60)
        assert await cluster.is_whole(bucket, keys[shard])
        assert any("check of all objects" in line and "failures" in line for line in leaders[shard].log)

    run(scenario)


def test_a_copy_that_is_outvoted_is_not_copied() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, objects = await filled(cluster, 1)
        where = list((await cluster.places(bucket, b"small-0"))[0].fragments)
        await cluster.store(where[0][1]).delete([where[0][0]])
        kept = cluster.store(where[1][1]).kept(where[1][0])
        cluster.forge(where[1][1], where[1][0])  # its hash does not hold any more: it has no vote
        cluster.maintain()
        await cluster.settled()
        assert cluster.store(where[0][1]).kept(where[0][0]).payload != kept.payload or cluster.holds(
            where[1][1], where[1][0]
        )
        await assert_whole(cluster, bucket, objects)

    run(scenario)


# --- racks and disks that go


def test_a_rack_that_is_away_for_a_short_time_moves_nothing() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, objects = await filled(cluster)
        cluster.maintain()
        await cluster.settled()
        before = await cluster.fragments()
        await cluster.kill("nb")
        below, lost = await cluster.settled()
        assert (below, lost) == (4, 0)
        await cluster.pass_s(DELAY_S - 60)
        assert await cluster.fragments() == before
        away = {disk.id for disk in cluster.layouts.current.disks if disk.node == "nb"}
        waits = [status.waits for status in await cluster.statuses()]
        assert all(set(one.disks_away) == away for one in waits)
        due = [one.recode_in_s for one in waits if one.recode_in_s != NO_RECODING_S]
        assert due
        assert all(0 < seconds <= 60 for seconds in due)
        cluster.start("nb")
        assert await cluster.settled() == (0, 0)
        assert await cluster.fragments() == before
        await assert_whole(cluster, bucket, objects)

    run(scenario)


def test_a_rack_that_stays_away_is_done_without_and_made_use_of_when_it_returns() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, objects = await filled(cluster)
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("nc")
        await cluster.pass_s(DELAY_S + 60)
        assert await cluster.settled() == (4, 0)  # safe again, but not what the bucket asks for
        for place in await cluster.places(bucket, b"large-0"):
            assert str(place.profile) == "2+2"
            assert all(cluster.holds(disk, fragment) and disk[0] != "c" for fragment, disk in place.fragments)
        for key, data in objects.items():
            assert await cluster.get(bucket, key) == data
        cluster.start("nc")
        assert await cluster.settled() == (0, 0)
        await assert_whole(cluster, bucket, objects)
        await cluster.leap(DROP_S)
        await cluster.pass_s(60)
        for key in (b"large-0", b"large-1"):
            named = {
                (disk, fragment) for place in await cluster.places(bucket, key) for fragment, disk in place.fragments
            }
            assert set(await cluster.fragments((await cluster.entry(bucket, key)).data_id)) == named
        await assert_whole(cluster, bucket, objects)

    run(scenario)


def test_what_is_written_while_a_rack_is_away_is_counted_and_brought_to_its_target() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("na")
        await cluster.settled()
        objects = {b"%s-%d" % (form, index): os.urandom(size) for form, size in FORMS.items() for index in range(3)}
        for key, data in objects.items():
            await cluster.put(bucket, key, data)
        await cluster.pass_s(3)
        assert (await cluster.counts())[:2] == (6, 0)
        cluster.start("na")
        assert await cluster.settled() == (0, 0)
        assert cluster.differing_registers() == []
        await assert_whole(cluster, bucket, objects)

    run(scenario)


def test_a_cluster_never_looks_healthy_before_it_is() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, _ = await filled(cluster)
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("nb")
        await cluster.pass_s(0.1)
        other = await cluster.bucket("made-meanwhile")
        for index in range(4):
            await cluster.put(other, b"new-%d" % index, os.urandom(SMALL))
            await cluster.put(bucket, b"large-%d" % index, os.urandom(LARGE))
        await cluster.pass_s(30)
        cluster.start("nb")
        healthy_at = None
        for _ in range(400):
            below, _, counted = await cluster.counts()
            truth = not cluster.differing_registers()
            for key in (b"large-0", b"large-3", b"small-0"):
                truth = truth and await cluster.is_whole(bucket, key)
            for index in range(4):
                truth = truth and await cluster.is_whole(other, b"new-%d" % index)
            if counted and not below:
                assert truth
                healthy_at = healthy_at or cluster.loop.time()
            await cluster.pass_s(0.05)
        assert healthy_at is not None

    run(scenario)


def test_a_restart_that_nobody_noticed_is_made_good() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, objects = await filled(cluster, 1)
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("nc")
        objects[b"small-0"] = os.urandom(SMALL)
        await cluster.put(bucket, b"small-0", objects[b"small-0"])
        other = await cluster.bucket("other")
        await cluster.put(other, b"x", b"1")
        cluster.start("nc")
        assert cluster.differing_registers()
        assert await cluster.settled() == (0, 0)
        assert cluster.differing_registers() == []
        await assert_whole(cluster, bucket, objects)

    run(scenario)


def test_replicas_that_differ_when_a_cluster_starts_are_brought_together() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, objects = await filled(cluster, 1)
        await cluster.kill("na")
        for index in range(5):
            await cluster.put(bucket, b"tiny-%d" % index, b"2")
        await cluster.objects.delete(bucket, b"inline-0")
        del objects[b"inline-0"]
        cluster.start("na", maintain=False)
        assert len(cluster.differing_registers()) == 6
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        assert cluster.differing_registers() == []

    run(scenario)


def test_a_write_that_one_replica_missed_is_made_good_soon() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        cluster.maintain()
        await cluster.settled()

        async def refuse(source: str, node: str, method: str, request: object) -> None:
            if source == "g" and node == "nb" and method in ("meta.prepare", "meta.accept", "fragment.write"):
                raise PeerUnreachable("a broken line")

        cluster.intercept = refuse
        await cluster.put(bucket, b"small", os.urandom(SMALL))
        await cluster.put(bucket, b"large", os.urandom(LARGE))
        cluster.intercept = None
        assert cluster.differing_registers()
        await cluster.pass_s(5)
        assert cluster.differing_registers() == []
        assert await cluster.is_whole(bucket, b"small")
        assert await cluster.is_whole(bucket, b"large")
        assert (await cluster.counts())[:2] == (0, 0)

    run(scenario)


def test_a_disk_lost_for_good_is_done_without_where_others_can_hold_the_target() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, objects = await filled(cluster)
        cluster.maintain()
        await cluster.settled()
        places = await cluster.places(bucket, b"large-0")
        lost = places[0].disks[0]
        cluster.lose_disk(lost)
        await cluster.pass_s(DELAY_S + 60)
        await cluster.settled()
        for key in (b"large-0", b"large-1"):
            for place in await cluster.places(bucket, key):
                assert lost not in place.disks
                assert len(set(place.disks)) == 6
                assert all(cluster.holds(disk, fragment) for fragment, disk in place.fragments)
        blocks = len(await cluster.places(bucket, b"large-0"))
        assert sum(status.fragments_rebuilt for status in await cluster.statuses()) <= 2 * blocks
        assert await cluster.get(bucket, b"large-0") == objects[b"large-0"]

    run(scenario, disks_per_node=3)


def test_fragments_that_a_read_only_disk_has_lost_count_and_are_moved_in_the_end() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, _ = await filled(cluster, 1)
        cluster.maintain()
        await cluster.settled()
        place = (await cluster.places(bucket, b"large-0"))[0]
        disk = place.disks[2]
        cluster.store(disk).refuse("read-only")
        cluster.alive.read_only.add(disk)
        cluster.store(disk).lose(place.fragment(2))
        below, _ = await cluster.settled()
        assert below == 1
        await cluster.pass_s(DELAY_S + 60)
        assert await cluster.settled() == (0, 0)
        place = (await cluster.places(bucket, b"large-0"))[0]
        assert disk not in place.disks

    run(scenario, disks_per_node=3)


# --- without a majority, and bounds


def test_without_a_majority_nothing_is_called_counted_and_the_log_stays_short() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, objects = await filled(cluster)
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("na", "nb")
        before = await cluster.fragments()
        await cluster.pass_s(2400)
        _, lost, counted = await cluster.counts()
        assert not counted
        assert lost == 0, "they wait for disks that are away"
        assert sum(status.unreadable for status in await cluster.statuses()) == 2
        assert await cluster.fragments() == before
        assert len(cluster.nodes["nc"].log) < 200
        cluster.start("na", "nb")
        assert await cluster.settled() == (0, 0)
        await assert_whole(cluster, bucket, objects)

    run(scenario)


def test_findings_beyond_the_bound_are_counted_and_mended_all_the_same() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        keys = [b"small-%d" % index for index in range(12)]
        for key in keys:
            await cluster.put(bucket, key, os.urandom(SMALL))
        for key in keys:
            fragment, disk = next((await cluster.places(bucket, key))[0].fragments)
            await cluster.store(disk).delete([fragment])
        cluster.maintain()
        await cluster.pass_s(0.5)
        assert sum(status.below_target for status in await cluster.statuses()) > 0
        assert await cluster.settled(20_000) == (0, 0)
        for key in keys:
            assert await cluster.is_whole(bucket, key)

    run(scenario, limits=MaintainLimits(findings_max=2))


def test_many_findings_are_looked_through_every_two_seconds_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(cluster: Cluster) -> None:
        await filled(cluster, 3)
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("nb")
        await cluster.settled()
        maintenance = next(
            one.maintenance for one in cluster.nodes.values() if one.up and one.maintenance.check.queue.listed
        )
        few = maintenance.status()
        assert few.below_target > 0
        assert maintenance.status() is not few
        monkeypatch.setattr(service, "MANY_FINDINGS", 0)
        many = maintenance.status()
        assert maintenance.status() is many
        await cluster.pass_s(service.STATUS_AGE_S)
        assert maintenance.status() is not many

    run(scenario)


@pytest.mark.parametrize("method", ["maintain.scrub", "maintain.wake"])
def test_what_a_node_is_asked_for_shows_in_its_next_status_also_with_many_findings(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Who asked for a scrub waits until the nodes are busy no more."""

    async def scenario(cluster: Cluster) -> None:
        monkeypatch.setattr(service, "MANY_FINDINGS", -1)
        await filled(cluster, 1)
        cluster.maintain()
        await cluster.settled()
        maintenance = cluster.nodes["na"].maintenance
        await cluster.pass_s(service.STATUS_AGE_S)
        assert not maintenance.status().busy
        await maintenance.methods()[method].handler(Ask(), NO_CALL)
        assert maintenance.status().busy

    run(scenario)


def test_hints_beyond_the_bound_become_a_walk() -> None:
    async def scenario(cluster: Cluster) -> None:
        await filled(cluster, 1)
        cluster.maintain()
        await cluster.settled()
        check = cluster.nodes["na"].maintenance.check
        for index in range(20):
            check.hint(RegisterName(1, bytes(16), 0, b"%d" % index).pack())
        assert not check.current
        assert await cluster.settled() == (0, 0)

    run(scenario, limits=MaintainLimits(hints_max=10))


def test_a_hint_that_waits_already_takes_no_room_and_wakes_no_node() -> None:
    async def scenario(cluster: Cluster) -> None:
        cluster.maintain()
        await cluster.settled()
        check, name = cluster.nodes["na"].maintenance.check, RegisterName(1, bytes(16), 0, b"key").pack()
        check.hint(name)
        check.wake.clear()
        check.hint(name)
        assert not check.wake.is_set()
        assert check.current, "no walk is wanted"
        check.hint(RegisterName(1, bytes(16), 0, b"other").pack())
        assert not check.current

    run(scenario, limits=MaintainLimits(hints_max=1))


def test_hints_about_a_key_that_is_long_to_look_at_wait_and_others_do_not() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        long, other = (object_name(bucket.id, bucket.shard_numbers, key).pack() for key in (b"long", b"other"))
        looked: list[bytes] = []
        cluster.maintain()
        await cluster.settled()
        checks = [node.maintenance.check for node in cluster.nodes.values()]
        for one in checks:

            async def look(name: RegisterName) -> None:
                looked.append(name.pack())
                await asyncio.sleep(1.0 if name.pack() == long else 0.01)

            one._look_at = look  # type: ignore[method-assign]
        for _ in range(100):
            for one in checks:
                one.hint(long)
                one.hint(other)
            await cluster.pass_s(0.5)
        assert 4 <= looked.count(long) <= 6, "one in eleven seconds"
        assert looked.count(other) >= 20
        await cluster.pass_s(30)
        assert not any(one.has_hints for one in checks)

    run(scenario)


def test_a_repair_that_fails_again_and_again_rests_longer_and_longer() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, _ = await filled(cluster, 1)
        where = list((await cluster.places(bucket, b"small-0"))[0].fragments)
        fragment, disk = where[0]
        await cluster.store(disk).delete([fragment])
        for other, there in where[1:]:
            cluster.forge(there, other)
        reads = 0

        async def count(source: str, node: str, method: str, request: object) -> None:
            nonlocal reads
            reads += method == "fragment.read"

        cluster.maintain()
        cluster.intercept = count
        await cluster.pass_s(2400)
        assert reads < 30
        below, _, counted = await cluster.counts()
        assert (below, counted) == (1, True)
        assert not any(status.busy for status in await cluster.statuses())

    run(scenario)


def test_a_fragment_that_a_disk_finds_damaged_while_it_reads_is_told_to_whom_it_concerns() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, _ = await filled(cluster, 1)
        cluster.maintain()
        await cluster.settled()
        fragment, disk = list((await cluster.places(bucket, b"large-0"))[0].fragments)[4]
        cluster.store(disk).damage(fragment, 0)
        await cluster.store(disk).read(fragment, 0, 1)
        node = cluster.nodes[cluster.layouts.current.node_of(disk)]
        node.maintenance.cell_damaged(disk, fragment)
        node.maintenance.cell_damaged(disk, FragmentId(os.urandom(16), 0, 4, 2, 0))
        await cluster.pass_s(5)
        assert cluster.holds(disk, fragment)

    run(scenario)


def test_a_register_that_can_not_be_settled_keeps_no_other_from_repair() -> None:
    """A majority of its rows is damaged. Every other register is walked, in its own shard too, and what they lack is
    rebuilt.
    """

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        keys = [b"large-%d" % number for number in range(40)]
        for key in keys:
            await cluster.put(bucket, key, os.urandom(200_000))
        shard_of = {key: object_name(bucket.id, bucket.shard_numbers, key).shard for key in keys}
        lost = next(key for key in keys if list(shard_of.values()).count(shard_of[key]) > 1)
        name = object_name(bucket.id, bucket.shard_numbers, lost)
        others = {key: next((await cluster.places(bucket, key))[0].fragments) for key in keys if key != lost}
        for fragment, disk in others.values():
            await cluster.store(disk).delete([fragment])
        for disk in cluster.layouts.current.replicas_of(name.partition)[:2]:
            cluster.meta(disk).damage(name)
        cluster.maintain()
        await cluster.pass_s(120)
        for key, (fragment, disk) in others.items():
            assert cluster.holds(disk, fragment), key
        assert not (await cluster.counts())[2], "what can't be looked at is not said to be counted"

    run(scenario)


def test_what_a_hostile_node_writes_or_says_ends_nobodys_repair() -> None:
    """Records lie in the clear and any member can send hints. What can not be true is skipped, and everything else is
    repaired as before.
    """

    async def scenario(cluster: Cluster) -> None:
        bucket, objects = await filled(cluster, 1)
        ring, whole = cluster.gateway.ring, await cluster.record(bucket, b"large-0")

        async def forge(name: RegisterName, body: bytes) -> None:
            await ring.change(name, lambda _value: Change(body))

        for number, (shards, id_) in enumerate([(10**9, b"x" * 16), (300, b"y" * 16), (-1, b"z" * 16), (16, b"short")]):
            await forge(
                system_name(f"bucket/evil{number}"),
                encode(BucketRecord(f"evil{number}", id_, "", 0, "active", shards, "")),
            )
        await forge(system_name("bucket/other"), encode(BucketRecord("bucket", b"w" * 16, "", 0, "active", 16, "")))
        (entry, *_), version = whole.versions[0].parts, whole.versions[0]
        for number, forged in enumerate(
            (
                msgspec.structs.replace(entry, target="none"),
                msgspec.structs.replace(entry, header=b""),
                msgspec.structs.replace(entry, runs=(msgspec.structs.replace(entry.runs[0], k=0),)),
                msgspec.structs.replace(entry, runs=(msgspec.structs.replace(entry.runs[0], count=2**62),)),
            )
        ):
            body = encode_object(ObjectRecord((msgspec.structs.replace(version, parts=(forged,)),)))
            await forge(object_name(bucket.id, bucket.shard_numbers, b"evil-%d" % number), body)
        upload_id = bytes([3]) * 16
        await forge(
            upload_name(bucket.id, b"evil", upload_id), encode(UploadRecord(b"", "open", "", 0, 1, b"", b"", b""))
        )
        await forge(
            part_name(bucket.id, upload_id, 1),
            encode(PartRecord(msgspec.structs.replace(entry, block_cells=0), 0, b"")),
        )
        place = (await cluster.places(bucket, b"large-0"))[0]
        fragment, disk = next(place.fragments)
        await cluster.store(disk).delete([fragment])
        cluster.maintain()
        for node in cluster.nodes.values():
            for ask in (
                Ask((b"",)), Ask((b"x" * 5000,)), Ask((), ((b"", fragment.pack()),)), Ask((), ((object_name(*NAME).pack(), b""),)),  # noqa: E501
            ):  # fmt: skip
                with pytest.raises(StoragedError):
                    await node.methods["maintain.hint"].handler(ask, NO_CALL)
            node.maintenance.hint(b"the owner that a fragment's header names")
            node.maintenance.hint(b"")
        await cluster.pass_s(30)
        assert cluster.holds(disk, fragment)
        assert await cluster.get(bucket, b"small-0") == objects[b"small-0"]

    run(scenario)


NAME = (b"B" * 16, range(16), b"key")
NO_CALL = Call(PeerIdentity("n", "FR", "s", "r", ("storage",)), memoryview(b""), 0.0)


SIX_RACKS = {name: f"FR/par1/{name}" for name in "abcdef"}


def test_while_more_racks_are_silent_than_are_replaced_only_what_has_no_spare_is_recoded() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        layout = cluster.layouts.current
        silent = {disk.id for disk in layout.disks if disk.node in ("nd", "ne")}
        spared, bare = [], []

        async def waiting(keys: list[bytes]) -> list[bytes]:
            """Those with fragments at silent disks."""
            found = [(key, place) for key in keys for place in await cluster.places(bucket, key)]
            return sorted({key for key, place in found if silent & set(place.disks)})

        for number in range(24):
            key = b"%d" % number
            replicas = set(layout.replicas_of(object_name(bucket.id, bucket.shard_numbers, key).partition))
            if len(replicas & silent) < 2:  # else its record can't be read meanwhile
                await cluster.put(bucket, key, os.urandom(300_000))
                lost = {len(silent & set(place.disks)) for place in await cluster.places(bucket, key)}
                (spared if lost == {1} else bare if lost == {2} else []).append(key)
        assert spared
        assert bare
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("nd", "ne")
        await cluster.pass_s(DELAY_S / 2)
        assert any(0 < status.waits.recode_in_s < DELAY_S for status in await cluster.statuses()), "what has no spare"
        await cluster.pass_s(DELAY_S / 2 + 300)
        assert await waiting(spared) == sorted(spared)
        assert await waiting(bare) == []
        assert all(status.waits.recode_in_s == NO_RECODING_S for status in await cluster.statuses())
        cluster.layouts.learn(msgspec.structs.replace(layout, sparing=Sparing(domains_max=2)))
        await cluster.pass_s(300)
        assert await waiting(spared) == []

    run(scenario, racks=SIX_RACKS)


def test_broken_disks_of_nodes_that_answer_are_no_silent_racks() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        layout = cluster.layouts.current
        broken = {disk.id for disk in layout.disks if disk.node in ("nd", "ne")}
        spared = []
        for number in range(24):
            key = b"%d" % number
            replicas = layout.replicas_of(object_name(bucket.id, bucket.shard_numbers, key).partition)
            if len(broken.intersection(replicas)) < 2:
                await cluster.put(bucket, key, os.urandom(300_000))
                lost = {len(broken.intersection(place.disks)) for place in await cluster.places(bucket, key)}
                spared += [key] if lost == {1} else []
        assert spared
        cluster.maintain()
        await cluster.settled()
        for disk in broken:
            cluster.lose_disk(disk)
        await cluster.pass_s(DELAY_S + 300)
        places = [place for key in spared for place in await cluster.places(bucket, key)]
        assert not any(broken.intersection(place.disks) for place in places)

    run(scenario, racks=SIX_RACKS)
