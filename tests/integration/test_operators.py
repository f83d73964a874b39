"""Four operators host one cloud together, and none of them is trusted alone."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter

import pytest
from msgspec.structs import replace

from storaged.cluster.layout import Layout, Profile, problems_of
from storaged.cluster.move_settings import MoveSettings
from storaged.cluster.spread import OPERATORS
from storaged.errors import PeerUnreachable, ServiceUnavailable, SlowDown, StoragedError
from storaged.fragments.ports import FragmentId
from storaged.maintain.context import MaintainLimits
from storaged.meta.names import RegisterName, object_name
from storaged.objects.api import BodyChecks, CopySource, NewMeta, Renaming
from storaged.objects.code.customer import CUSTOMERS
from storaged.objects.code.lending import LENT
from storaged.objects.code.place import first_choice
from storaged.objects.encryption import CUSTOMER, Encryption
from storaged.objects.records import BucketRecord, sharing_of
from storaged.objects.where import where
from storaged.objects.write.divide import divide
from storaged.units import KIB
from storaged.wire import Message
from tests.integration.memory_cluster import RACKS, WHO, Cluster, layout_of, run
from tests.integration.memory_cluster import body_of as stream_of
from tests.integration.test_maintain_collect import upload_parts

FOUR = {**RACKS, "d": "FR/lyo2/d"}
SIZES = (0, 1, 900, 4_000, 16_000, 50_000, 300_001)
LARGE = 40
"""So many that some lie where they may not, whatever their random ids are."""
LIMITS = MaintainLimits(drop_delay_s=30, recode_delay_s=60)


def spread_over(racks: dict[str, str], epoch: int = 1, *, base: int = 0) -> Layout:
    """Each rack has an operator of its own."""
    named = tuple(sorted((location, f"operator {rack}") for rack, location in racks.items()))
    layout = layout_of(2, epoch=epoch, racks=racks)
    layout = replace(layout, operators=named, spread=OPERATORS, base=base)
    assert not problems_of(layout)
    return layout


def body_of(key: bytes) -> bytes:
    return key[-1:] * SIZES[key[-1]]


async def store(cluster: Cluster, bucket: BucketRecord, name: bytes) -> list[bytes]:
    keys = [name + bytes([number]) for number in range(len(SIZES))]
    for key in keys:
        await cluster.put(bucket, key, body_of(key))
    return keys


async def check(cluster: Cluster, bucket: BucketRecord, keys: list[bytes]) -> None:
    """All can be read, are coded, and at no operator are so many fragments that it could read or withhold them."""
    for key in keys:
        assert await cluster.get(bucket, key) == body_of(key)
        entry = await cluster.entry(bucket, key)
        assert not entry.small
        assert not entry.inline
        places = await cluster.places(bucket, key)
        assert places
        for place in places:
            assert str(place.profile) == "4+2"
            assert max(Counter(disk[0] for disk in place.disks).values()) <= 2
            assert all(cluster.holds(disk, fragment) for fragment, disk in place.fragments)


def test_four_operators_write_while_one_is_away_and_nothing_is_a_whole_copy() -> None:
    async def scenario(cluster: Cluster) -> None:
        cluster.layouts.learn(spread_over(FOUR))
        bucket = await cluster.bucket()
        keys = await store(cluster, bucket, b"before")
        await check(cluster, bucket, keys)
        for operator in FOUR:
            await cluster.kill(f"n{operator}")
            for key in keys:
                assert await cluster.get(bucket, key) == body_of(key)
            more = await store(cluster, bucket, f"without {operator}".encode())
            await check(cluster, bucket, more)
            for key in more:
                assert not any(disk.startswith(operator) for p in await cluster.places(bucket, key) for disk in p.disks)
            keys += more
            cluster.start(f"n{operator}", maintain=False)
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        await check(cluster, bucket, keys)

    run(scenario, racks=FOUR, limits=LIMITS)


def test_what_an_operator_had_that_is_gone_is_rebuilt_at_the_others() -> None:
    async def scenario(cluster: Cluster) -> None:
        cluster.layouts.learn(spread_over(FOUR))
        bucket = await cluster.bucket()
        keys = await store(cluster, bucket, b"key")
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("nb")
        await cluster.pass_s(300)
        await check(cluster, bucket, keys)
        for key in keys:
            assert not any(disk.startswith("b") for place in await cluster.places(bucket, key) for disk in place.disks)

    run(scenario, racks=FOUR, limits=LIMITS)


def test_with_three_operators_nothing_is_written_weaker_while_one_is_away() -> None:
    async def scenario(cluster: Cluster) -> None:
        cluster.layouts.learn(spread_over(dict(RACKS)))
        bucket = await cluster.bucket()
        keys = await store(cluster, bucket, b"key")
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("nb")
        for size in SIZES:
            with pytest.raises(ServiceUnavailable, match="spread over operators"):
                await cluster.put(bucket, b"new", bytes(size))
        await cluster.pass_s(300)  # nothing is recoded for the operators that are left either
        for key in keys:
            assert await cluster.get(bucket, key) == body_of(key)
        cluster.start("nb")
        assert await cluster.settled() == (0, 0)
        await check(cluster, bucket, keys)
        await store(cluster, bucket, b"again")

    run(scenario, limits=LIMITS)


def test_what_was_coded_before_moves_to_where_no_operator_can_read_or_withhold_it() -> None:
    """Racks a and d have one operator. Whole copies are coded again, and the old ones go."""

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        old = await store(cluster, bucket, b"old")
        large = [f"large {number}".encode() for number in range(LARGE)]
        for key in large:
            await cluster.put(bucket, key, key * 4000)
        cluster.maintain()
        await cluster.settled()
        spread = spread_over(FIVE, 2, base=1)
        named = tuple((rack, "operator a" if name == "operator d" else name) for rack, name in spread.operators)
        spread = replace(spread, operators=named)
        assert not problems_of(spread)

        async def shares() -> int:
            places = [place for key in large for place in await cluster.places(bucket, key)]
            return max(sum(disk[0] in "ad" for disk in place.disks) for place in places)

        assert await shares() > 2
        cluster.layouts.partitions.complete = True
        cluster.layouts.learn(spread)
        for _ in range(300):
            await cluster.pass_s(1)
            if not sum(status.misplaced for status in await cluster.statuses()) and await shares() <= 2:
                break
        assert await shares() <= 2
        for key in large:
            assert await cluster.get(bucket, key) == key * 4000
        await check(cluster, bucket, old)
        assert sum(status.outdated for status in await cluster.statuses()) == 0
        await cluster.leap(2 * 3600)
        await cluster.pass_s(60)
        await check(cluster, bucket, old)
        left = {fragment.data_id for _, fragment in await cluster.fragments() if fragment.k == 1}
        assert left == set(), "old copies are collected"

    run(scenario, racks=FIVE, limits=LIMITS)


FIVE = {**FOUR, "e": "DE/fra1/e"}


async def whole_before(cluster: Cluster) -> tuple[BucketRecord, list[bytes]]:
    """Objects of all sizes, and then the layout that trusts no operator alone."""
    bucket = await cluster.bucket()
    keys = await store(cluster, bucket, b"old")
    cluster.layouts.partitions.complete = True
    return bucket, keys


def test_status_counts_what_is_whole_until_it_is_coded_and_a_pause_holds() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, keys = await whole_before(cluster)
        upload, parts, body = await upload_parts(cluster, bucket, b"many", {1: 20_000, 2: 5})
        await cluster.objects.complete(bucket, b"many", upload, parts, owner=WHO.user_id)
        for node in cluster.nodes.values():
            node.context.settings = lambda: MoveSettings(revision=1, fragments_paused=True)
        cluster.layouts.learn(spread_over(FOUR, 2, base=1))
        cluster.maintain()
        await cluster.settled()
        entries = [await cluster.entry(bucket, key) for key in keys]
        whole = sum(entry.small or bool(entry.inline) for entry in entries)
        assert whole > 4
        assert sum(status.outdated for status in await cluster.statuses()) == whole + 1, "a part of an upload, too"
        plane = cluster.gateway.objects.plane
        assert [(await where(plane, bucket, key)).whole for key in keys] == [1] * whole + [0] * (len(keys) - whole)
        assert await cluster.settled() == (0, 0), "nothing is below target"
        for node in cluster.nodes.values():
            node.context.settings = MoveSettings
        await cluster.pass_s(60)
        assert sum(status.outdated for status in await cluster.statuses()) == 0
        await check(cluster, bucket, keys)
        assert (await where(plane, bucket, keys[0])).whole == 0
        assert await cluster.get(bucket, b"many") == body
        assert all(part.runs and not part.inline for part in (await cluster.record(bucket, b"many")).versions[0].parts)

    run(scenario, racks=FOUR, limits=LIMITS)


def test_two_gateways_code_the_same_bytes_and_one_that_stops_halfway_spoils_nothing() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, keys = await whole_before(cluster)
        cluster.layouts.learn(spread_over(FOUR, 2, base=1))
        others = [cluster.gateway, cluster.new_gateway("g2")]
        names = [object_name(bucket.id, bucket.shard_numbers, key) for key in keys]
        for name in names:  # each dies somewhere in the middle
            for calls in (3, 9, 14):
                left = calls

                async def dies(_caller: str, _node: str, _method: str, _request: Message) -> None:
                    nonlocal left
                    left -= 1
                    if left < 0:
                        raise PeerUnreachable("it dies here")

                cluster.intercept = dies
                with contextlib.suppress(StoragedError):
                    await divide(others[0].objects.plane, bucket, name)
                cluster.intercept = None
        both = [divide(gateway.objects.plane, bucket, name) for name in names for gateway in others]
        done = await asyncio.gather(*both, return_exceptions=True)
        assert not [error for error in done if isinstance(error, Exception) and not isinstance(error, SlowDown)]
        for name in names:
            assert await divide(cluster.gateway.objects.plane, bucket, name) == ""
        await check(cluster, bucket, keys)
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        await cluster.leap(48 * 3600)
        await cluster.pass_s(60)
        await check(cluster, bucket, keys)

    run(scenario, racks=FOUR, limits=LIMITS)


WHOLE_SIZES = (0, 900, 5_000, 16_000, 66_000, 131_000, 200_000)
WHOLE_MAX = 256 * KIB


def coded_as(profile: str, epoch: int) -> Layout:
    layout = replace(spread_over(FOUR, epoch, base=1), profile=profile)
    assert not problems_of(layout)
    return layout


class Attempts:
    """Gateways that code what lies whole, and die before the accept of their change: for ever, so that they put nothing
    on garbage lists either. ``written``: the bytes that were ever seen under each id of a coded fragment.
    """

    def __init__(self, cluster: Cluster, bucket: BucketRecord) -> None:
        self._cluster = cluster
        self._bucket = bucket
        self._dead: set[str] = set()
        self.written: dict[FragmentId, set[bytes]] = {}
        cluster.intercept = self._dies

    async def _dies(self, caller: str, _node: str, method: str, _request: Message) -> None:
        if caller.startswith("mortal") and method.startswith("meta.accept"):
            self._dead.add(caller)
        if caller in self._dead:
            raise PeerUnreachable("it is dead")

    async def fail(self, keys: list[bytes], *, leased: float = 0.0) -> None:
        """``leased``: the share of the memory that other requests of these gateways have."""
        for key in keys:
            gateway = self._cluster.new_gateway(f"mortal {len(self._dead)}")
            pools = gateway.objects.plane.fill_buffers, gateway.objects.plane.put_buffers
            leases = [await pool.lease(int(pool.bytes_max * leased)) for pool in pools if leased]
            with pytest.raises(StoragedError):
                await divide(gateway.objects.plane, self._bucket, self._name(key))
            for lease in leases:
                lease.release()
            self._cluster.gateways.remove(gateway)
            await gateway.close()
        await self.look()

    async def succeed(self, keys: list[bytes]) -> None:
        for key in keys:
            assert await divide(self._cluster.gateway.objects.plane, self._bucket, self._name(key)) == ""
        await self.look()

    def _name(self, key: bytes) -> RegisterName:
        return object_name(self._bucket.id, self._bucket.shard_numbers, key)

    async def look(self) -> None:
        for disk, fragment in await self._cluster.fragments():
            if fragment.k > 1:
                self.written.setdefault(fragment, set()).add(self._cluster.store(disk).payload(fragment))


async def small_before(cluster: Cluster) -> tuple[BucketRecord, list[bytes]]:
    """Objects that lie whole, and nothing else."""
    bucket = await cluster.bucket()
    keys = [f"key {size}".encode() for size in WHOLE_SIZES]
    for key in keys:
        await cluster.put(bucket, key, whole_body(key))
        entry = await cluster.entry(bucket, key)
        assert entry.small or entry.inline
    cluster.layouts.partitions.complete = True
    return bucket, keys


def whole_body(key: bytes) -> bytes:
    return random.Random(key).randbytes(int(key.split()[1]))


def test_attempts_with_less_memory_or_another_profile_write_no_other_bytes_under_an_id() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, keys = await small_before(cluster)
        attempts = Attempts(cluster, bucket)
        layouts = [coded_as(profile, epoch) for epoch, profile in enumerate(("4+2", "3+2", "4+3", "4+2"), 2)]
        for layout in layouts:
            cluster.layouts.learn(layout)
            await attempts.fail(keys)
            await attempts.fail(keys, leased=0.6)
            await attempts.fail(keys, leased=0.95)
        await attempts.succeed(keys)
        assert {(fragment.k, fragment.m) for fragment in attempts.written} == {(4, 2), (3, 2), (4, 3)}
        assert max(map(len, attempts.written.values())) == 1
        for key in keys:
            assert await cluster.get(bucket, key) == whole_body(key)
            assert await cluster.is_whole(bucket, key)

    run(scenario, racks=FOUR, limits=LIMITS, small_bytes_max=WHOLE_MAX)


def test_what_an_attempt_left_is_collected_while_the_body_lies_whole_and_after_it_is_coded() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, keys = await small_before(cluster)
        for node in cluster.nodes.values():
            node.context.settings = lambda: MoveSettings(revision=1, fragments_paused=True)
        cluster.layouts.learn(coded_as("3+2", 2))
        attempts = Attempts(cluster, bucket)
        await attempts.fail(keys)
        left = {fragment for _, fragment in await cluster.fragments() if fragment.k > 1}
        assert len({fragment.data_id for fragment in left}) == len(keys)
        cluster.layouts.learn(coded_as("4+2", 3))
        coded, whole = keys[::2], keys[1::2]
        await attempts.succeed(coded)
        cluster.maintain()
        await cluster.leap(48 * 3600)
        await cluster.pass_s(120)
        coded_ids = {(await cluster.entry(bucket, key)).data_id for key in coded}
        found = {fragment for _, fragment in await cluster.fragments() if fragment.k > 1}
        assert {(fragment.data_id, fragment.k, fragment.m) for fragment in found} == {(one, 4, 2) for one in coded_ids}
        for key in keys:
            assert await cluster.get(bucket, key) == whole_body(key)
            entry = await cluster.entry(bucket, key)
            assert (entry.small or bool(entry.inline)) == (key in whole)

    run(scenario, racks=FOUR, limits=LIMITS, small_bytes_max=WHOLE_MAX)


def test_an_attempt_that_moves_a_block_deletes_nothing_that_another_one_has_committed() -> None:
    """Both avoid a slow disk. It is quick again when the later attempt, whose write a disk refuses, places the block
    once more.
    """

    async def scenario(cluster: Cluster) -> None:
        bucket, keys = await small_before(cluster)
        cluster.layouts.learn(coded_as("4+2", 2))
        key, first, second = keys[4], cluster.gateway.objects.plane, cluster.new_gateway("g2").objects.plane
        name = object_name(bucket.id, bucket.shard_numbers, key)
        chosen = first_choice(cluster.layouts.current, (await cluster.entry(bucket, key)).data_id, Profile(4, 2))
        cluster.alive.slow = {chosen[0]}
        arrived = False

        async def refuses(caller: str, _node: str, method: str, request: Message) -> None:
            nonlocal arrived
            if caller != "g2" or not method.startswith("fragment.write"):
                return
            if not arrived:
                arrived = True
                assert await divide(first, bucket, name) == ""
                cluster.alive.slow.clear()
            if getattr(request, "disk", "") == chosen[1]:
                raise PeerUnreachable("it is full")

        cluster.intercept = refuses
        with pytest.raises(SlowDown):
            await divide(second, bucket, name)
        assert arrived
        assert any(cluster.holds(chosen[0], fragment) for fragment in written_to(cluster, chosen[0])), "it was moved"
        assert await cluster.is_whole(bucket, key)
        assert await cluster.get(bucket, key) == whole_body(key)

    run(scenario, racks=FOUR, limits=LIMITS, small_bytes_max=WHOLE_MAX)


def written_to(cluster: Cluster, disk: str) -> list[FragmentId]:
    return [fragment for fragment in cluster.store(disk).fragments if fragment.k > 1]


def test_what_is_written_meanwhile_stays_and_a_customers_key_keeps_a_body_whole() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, keys = await whole_before(cluster)
        secret = NewMeta(encryption=Encryption(CUSTOMER, customer_key=bytes(32)))
        checks = BodyChecks(size=5)
        await cluster.objects.put(bucket, b"secret", stream_of(b"seale"), secret, checks, owner=WHO.user_id)
        cluster.layouts.learn(spread_over(FOUR, 2, base=1))
        plane, key, other = cluster.gateway.objects.plane, keys[3], cluster.new_gateway("g2")
        name = object_name(bucket.id, bucket.shard_numbers, key)

        async def overwrites(_caller: str, _node: str, method: str, _request: Message) -> None:
            if method == "fragment.write":
                cluster.intercept = None
                await cluster.put(bucket, key, b"another body", other)

        cluster.intercept = overwrites
        with pytest.raises(SlowDown):
            await divide(plane, bucket, name)
        assert await cluster.get(bucket, key) == b"another body"
        assert await divide(plane, bucket, name) == ""
        assert await divide(plane, bucket, object_name(bucket.id, bucket.shard_numbers, b"secret")) == CUSTOMERS
        cluster.maintain()
        await cluster.pass_s(60)
        found = await cluster.statuses()
        assert sum(status.outdated for status in found) == 1
        assert [status.unmoved for status in found if status.outdated] == [((CUSTOMERS, 1),)]
        assert (await where(plane, bucket, b"secret")).stays == CUSTOMERS
        assert (await where(plane, bucket, key)).stays == ""
        stream = await cluster.objects.get(bucket, b"secret", customer_key=bytes(32))
        assert b"".join([bytes(piece) async for piece in stream.chunks()]) == b"seale"

    run(scenario, racks=FOUR, limits=LIMITS)


def test_status_says_why_the_last_part_of_an_upload_that_was_renamed_stays_whole() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, _ = await whole_before(cluster)
        upload_id, parts, body = await upload_parts(cluster, bucket, b"many", {1: 300_000, 2: 5})
        await cluster.objects.complete(bucket, b"many", upload_id, parts, owner=WHO.user_id)
        await cluster.objects.rename(bucket, Renaming(key=b"new", source=b"many"))
        cluster.layouts.learn(spread_over(FOUR, 2, base=1))
        cluster.maintain()
        await cluster.pass_s(60)
        found = await cluster.statuses()
        assert sum(status.outdated for status in found) == 1
        assert [status.unmoved for status in found if status.outdated] == [((LENT, 1),)]
        place = await where(cluster.gateway.objects.plane, bucket, b"new")
        assert (place.whole, place.stays) == (1, LENT)
        assert await cluster.get(bucket, b"new") == body

    run(scenario, racks=FOUR, limits=LIMITS)


@pytest.mark.parametrize("count", [2, 34])
def test_the_small_last_part_of_an_upload_is_coded_for_its_copies_too(count: int) -> None:
    """``count``: of its parts, in the record or on pages."""

    async def scenario(cluster: Cluster) -> None:
        bucket, _ = await whole_before(cluster)
        plane = cluster.gateway.objects.plane
        sizes = dict.fromkeys(range(1, count), 2_000) | {count: 5}
        upload_id, parts, body = await upload_parts(cluster, bucket, b"many", sizes)
        await cluster.objects.complete(bucket, b"many", upload_id, parts, owner=WHO.user_id)
        await cluster.objects.copy(CopySource(bucket, b"many"), bucket, b"copy", owner=WHO.user_id, meta=None)
        assert (await cluster.record(bucket, b"copy")).versions[0].parts == ()
        cluster.layouts.learn(spread_over(FOUR, 2, base=1))
        cluster.maintain()
        await cluster.pass_s(60)
        assert sum(status.outdated for status in await cluster.statuses()) == 0
        record = await cluster.record(bucket, b"many")
        [loan], [version] = sharing_of(record).loans, record.versions
        assert (loan.parts, loan.manifest) == (version.parts, version.manifest)
        assert set(loan.pages) <= set(version.pages)
        for key in (b"many", b"copy"):
            assert (await where(plane, bucket, key)).whole == 0
            assert await cluster.get(bucket, key) == body
        await cluster.objects.delete(bucket, b"many")
        await cluster.leap(7200)
        await cluster.pass_s(60)
        assert sum(status.outdated for status in await cluster.statuses()) == 0
        assert await cluster.get(bucket, b"copy") == body

    run(scenario, racks=FOUR, limits=LIMITS)


@pytest.mark.parametrize("count", [2, 34])
def test_status_says_why_a_part_stays_whole_that_is_only_lent(count: int) -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, _ = await whole_before(cluster)
        sizes = dict.fromkeys(range(1, count), 2_000) | {count: 5}
        upload_id, parts, body = await upload_parts(cluster, bucket, b"many", sizes)
        await cluster.objects.complete(bucket, b"many", upload_id, parts, owner=WHO.user_id)
        await cluster.objects.rename(bucket, Renaming(key=b"new", source=b"many"))
        cluster.layouts.learn(spread_over(FOUR, 2, base=1))
        cluster.maintain()
        await cluster.pass_s(60)
        found = [status for status in await cluster.statuses() if status.outdated]
        assert [status.unmoved for status in found] == [((LENT, 1),)]
        assert await cluster.get(bucket, b"new") == body

    run(scenario, racks=FOUR, limits=LIMITS)


def test_a_small_part_of_an_open_upload_is_coded_once_it_is_in_an_object_and_status_says_so() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, _ = await whole_before(cluster)
        upload_id, parts, body = await upload_parts(cluster, bucket, b"many", {1: 300_000, 2: 5})
        cluster.layouts.learn(spread_over(FOUR, 2, base=1))
        cluster.maintain()
        await cluster.pass_s(60)
        found = [status for status in await cluster.statuses() if status.outdated]
        assert sum(status.outdated for status in found) == 1
        assert [status.unmoved for status in found] == [
            (("its upload has not ended: it is coded when it is in an object", 1),)
        ]
        await cluster.objects.complete(bucket, b"many", upload_id, parts, owner=WHO.user_id)
        await cluster.leap(3600)
        await cluster.pass_s(60)
        assert sum(status.outdated for status in await cluster.statuses()) == 0
        assert not any(part.inline for part in (await cluster.record(bucket, b"many")).versions[0].parts)
        assert await cluster.get(bucket, b"many") == body

    run(scenario, racks=FOUR, limits=LIMITS)


def test_small_parts_are_coded_too_and_where_names_the_operators() -> None:
    async def scenario(cluster: Cluster) -> None:
        cluster.layouts.learn(spread_over(FOUR))
        bucket = await cluster.bucket()
        upload_id, parts, whole = await upload_parts(cluster, bucket, b"many", {1: 20_000, 2: 5})
        await cluster.objects.complete(bucket, b"many", upload_id, parts, owner=WHO.user_id)
        assert await cluster.get(bucket, b"many") == whole
        for part in (await cluster.record(bucket, b"many")).versions[0].parts:
            assert part.runs
            assert not part.inline
        found = await where(cluster.gateway.objects.plane, bucket, b"many")
        for run_place in found.runs:
            named = Counter(fragment.operator for fragment in run_place.fragments)
            assert set(named) <= {f"operator {rack}" for rack in FOUR}
            assert max(named.values()) <= 2
        assert len({replica.operator for replica in found.replicas}) == 3

    run(scenario, racks=FOUR, limits=LIMITS)
