"""Objects come back as they were put, at every size class and border, whatever disks do."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import os
import zlib
from collections.abc import AsyncIterator, Sequence

import msgspec
import pytest

from storaged.cluster.layout import Layout
from storaged.cluster.spread import OPERATORS
from storaged.errors import (
    BadDigest,
    DataDamaged,
    EntityTooLarge,
    IncompleteBody,
    InvalidRange,
    InvalidRequest,
    NoSuchKey,
    NotModified,
    PreconditionFailed,
    ServiceUnavailable,
    SlowDown,
    XAmzContentSHA256Mismatch,
)
from storaged.fragments.ports import FragmentId
from storaged.meta.names import Change, RegisterName, Value, object_name
from storaged.meta.ports import Reading
from storaged.objects.api import (
    NO_WRITE_CONDITIONS,
    BodyChecks,
    CopySource,
    NewMeta,
    RangeSpec,
    ReadConditions,
    WriteConditions,
)
from storaged.objects.code.geometry import problem_of
from storaged.objects.configuration.document import NOTHING
from storaged.objects.configuration.kinds import COPIES, Copies
from storaged.objects.etags import ANY, Tags, tag
from storaged.objects.records import ObjectRecord, decode_object, encode_object
from storaged.objects.service import ObjectService
from storaged.objects.write import commit
from storaged.wire import Buffer
from tests.doubles.layouts import layout_of
from tests.patience import GUARD_S
from tests.worlds.objects import OWNER, World, bucket_of, entry_of, got, pieces, put

pytestmark = pytest.mark.virtual_time

KIB, MIB = 1024, 1024 * 1024
CELL = 64 * KIB - 16


BORDERS = [
    0,
    1,
    1007,
    1008,
    1009,
    4080,
    16 * KIB,
    16 * KIB + 1,
    50_000,
    CELL * 4 - 1,
    CELL * 4,
    CELL * 4 + 1,
    CELL * 48 - 1,
    CELL * 48,
    CELL * 48 + 1,
    7 * MIB + 13,
]


@pytest.mark.parametrize("size", BORDERS)
@pytest.mark.parametrize("sized", [True, False])
async def test_an_object_of_any_size_class_comes_back_whole(size: int, sized: bool) -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    data = os.urandom(size)
    result = await put(objects, bucket, data, sized=sized)
    assert result.etag == hashlib.md5(data).hexdigest()
    assert result.size == size
    assert await got(objects, bucket) == data
    info = await objects.head(bucket, b"key")
    assert (info.size, info.etag, info.part_count) == (size, result.etag, 0)
    assert not world.damage
    assert (
        objects.plane.fill_buffers.bytes_leased
        == objects.plane.put_buffers.bytes_leased
        == objects.plane.get_buffers.bytes_leased
        == 0
    )
    assert (
        objects.plane.fill_buffers.transfers
        == objects.plane.put_buffers.transfers
        == objects.plane.get_buffers.transfers
        == 0
    )
    await objects.close()


@pytest.mark.parametrize("size", [0, 1, 1008, 1009])
@pytest.mark.parametrize("sized", [True, False])
async def test_where_no_copies_are_kept_tiny_bodies_are_in_the_record_all_the_same(size: int, sized: bool) -> None:
    world = World(small_bytes_max=0)
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(size)
    await put(objects, bucket, data, sized=sized)
    entry = entry_of(world)
    assert (bool(entry.inline), entry.small) == (size <= 1008, False)
    assert await got(objects, bucket) == data
    await objects.close()


@pytest.mark.parametrize("size", [CELL - 1, CELL, CELL + 1, 2 * CELL, 200 * KIB, 200 * KIB + 1])
@pytest.mark.parametrize("sized", [True, False])
async def test_a_small_body_may_have_several_chunks(size: int, sized: bool) -> None:
    world = World(small_bytes_max=200 * KIB)
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    data = os.urandom(size)
    await put(objects, bucket, data, sized=sized)
    entry = entry_of(world)
    assert entry.small == (size <= (200 if sized else 64) * KIB)  # until it ends, one of unknown size may be large
    if entry.small:
        assert entry.block_cells == size // CELL + 1
        assert not problem_of(entry)
    assert await got(objects, bucket) == data
    await objects.close()


@pytest.mark.parametrize("size", [0, 1008, 4 * KIB, 4 * KIB + 1, 64 * KIB, 64 * KIB + 1])
@pytest.mark.parametrize("chosen", [None, 0, 4 * KIB, MIB])
@pytest.mark.parametrize("sized", [True, False])
async def test_a_bucket_may_choose_to_keep_fewer_objects_as_copies_but_not_more(
    chosen: int | None, size: int, sized: bool
) -> None:
    world = World(small_bytes_max=64 * KIB)
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(size)
    if chosen is not None:
        bucket = objects.plane.configurations.put(bucket, NOTHING.having(COPIES, Copies(chosen)))
    await put(objects, bucket, data, sized=sized)
    entry = entry_of(world)
    assert bool(entry.inline) == (size <= 1008)
    assert entry.small == (1008 < size <= min(64 * KIB, 64 * KIB if chosen is None else chosen))
    assert await got(objects, bucket) == data
    await objects.close()


def without(layout: Layout, disks: Sequence[str]) -> Layout:
    """The next layout: these disks give up what they have."""
    entries = [msgspec.structs.replace(entry, state="draining") for entry in layout.disks if entry.id in disks]
    others = [entry for entry in layout.disks if entry.id not in disks]
    return msgspec.structs.replace(layout, epoch=layout.epoch + 1, disks=(*others, *entries))


@pytest.mark.parametrize("change", ["register moves", "disks become full", "operators distrust"])
async def test_where_the_copies_of_a_body_go_is_decided_when_it_has_arrived(change: str) -> None:
    layout = layout_of((1,) * 8)
    world = World(layout, small_bytes_max=256 * KIB)
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(256 * KIB)
    first = layout.replicas_of(object_name(bucket.id, bucket.shard_numbers, b"key").partition)

    async def slow() -> AsyncIterator[Buffer]:
        yield data[:70_000]
        if change == "register moves":
            world.layouts.learn(without(layout, first[:2]))
        elif change == "disks become full":
            for disk in first[:2]:
                world.disks.disks[disk].full = True
        else:
            operators = tuple((node.location, node.name) for node in layout.nodes)
            world.layouts.learn(msgspec.structs.replace(layout, epoch=2, operators=operators, spread=OPERATORS))
        yield data[70_000:]

    result = await objects.put(bucket, b"key", slow(), NewMeta(), BodyChecks(size=len(data)), owner=OWNER)
    assert (result.size, result.etag) == (len(data), hashlib.md5(data).hexdigest())
    assert entry_of(world).small == (change == "register moves")
    assert await got(objects, bucket) == data
    plane = objects.plane
    assert plane.fill_buffers.bytes_leased == plane.put_buffers.bytes_leased == plane.fill_buffers.transfers == 0
    await objects.close()


class Whole:
    """An ``api.WholeBody`` that has ``data``, whatever was declared; ``asked`` counts."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.asked = 0
        self._pieces = pieces(data)

    def __aiter__(self) -> AsyncIterator[Buffer]:
        return self._pieces

    async def __anext__(self) -> Buffer:
        return await anext(self._pieces)

    async def whole(self) -> Buffer:
        self.asked += 1
        return memoryview(self.data)


@pytest.mark.parametrize("size", BORDERS)
async def test_a_body_that_can_be_had_whole_is_asked_for_that_when_it_is_small(size: int) -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    world.keys.late = True
    body = Whole(os.urandom(size))
    result = await objects.put(bucket, b"key", body, NewMeta(), BodyChecks(size=size), owner=OWNER)
    assert (result.etag, result.size) == (hashlib.md5(body.data).hexdigest(), size)
    assert body.asked == (size <= 16 * KIB)
    assert await got(objects, bucket) == body.data
    await objects.close()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("checks", "error"),
    [
        (BodyChecks(size=4097), IncompleteBody),
        (BodyChecks(size=4095), IncompleteBody),
        (BodyChecks(size=4096, md5=bytes(16)), BadDigest),
        (BodyChecks(size=4096, sha256="0" * 64), XAmzContentSHA256Mismatch),
        (BodyChecks(size=4096, checksums={"CRC32": "AAAAAA=="}), BadDigest),
        (BodyChecks(size=4096, algorithms=("CRC32",), trailing=lambda: {"CRC32": "AAAAAA=="}), BadDigest),
        (BodyChecks(size=4096, trailing=lambda: {"CRC32": "AAAAAA=="}), InvalidRequest),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
async def test_a_small_body_that_is_not_what_was_declared_changes_nothing(
    checks: BodyChecks, error: type[Exception], whole: bool
) -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    data = os.urandom(4096)
    await put(objects, bucket, b"before")
    with pytest.raises(error):
        await objects.put(bucket, b"key", Whole(data) if whole else pieces(data), NewMeta(), checks, owner=OWNER)
    assert await got(objects, bucket) == b"before"
    assert objects.statistics().puts_small == 0
    await objects.close()


@pytest.mark.parametrize("size", [1000, 9000, 300_000, 4 * MIB])
async def test_ranges_are_exact_at_chunk_and_block_borders(size: int) -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    data = os.urandom(size)
    await put(objects, bucket, data)
    borders = [
        at for at in (0, 1, CELL - 1, CELL, CELL + 1, 48 * CELL - 1, 48 * CELL, size // 2, size - 1) if at < size
    ]
    for first in borders:
        for last in [*(at for at in borders if at >= first), None]:
            expected = data[first:] if last is None else data[first : last + 1]
            assert await got(objects, bucket, span=RangeSpec(first, last)) == expected
    assert await got(objects, bucket, span=RangeSpec(None, 10)) == data[-10:]
    assert await got(objects, bucket, span=RangeSpec(size - 1, size + 100)) == data[-1:]
    for beyond in (RangeSpec(size, None), RangeSpec(None, 0)):
        with pytest.raises(InvalidRange):
            await objects.get(bucket, b"key", span=beyond)
    await objects.close()


async def test_tiny_objects_stay_in_the_record_and_small_ones_are_copies_beside_their_register() -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    await put(objects, bucket, b"x" * 1008)
    assert not any(disk.fragments for disk in world.disks.disks.values())
    await put(objects, bucket, b"x" * 1009)
    held = world.disks.of(entry_of(world).data_id)
    assert len(held) == 3
    assert len({disk[0] for disk, _ in held}) == 3
    assert all((f.k, f.m) == (1, 2) for _, f in held)
    await put(objects, bucket, b"x" * 17_000)
    held = world.disks.of(entry_of(world).data_id)
    assert [f.position for _, f in sorted(held, key=lambda item: item[1].position)] == [0, 1, 2, 3, 4, 5]
    assert not any(disk.unsynced for disk in world.disks.disks.values())
    await objects.close()


async def test_what_is_replaced_or_deleted_goes_to_the_garbage_lists_of_its_disks_with_a_delay() -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    for data in (b"x" * 5000, os.urandom(100_000)):
        await put(objects, bucket, data)
        replaced = entry_of(world).data_id
        disks = {disk for disk, _ in world.disks.of(replaced)}
        await put(objects, bucket, b"new")
        await objects.plane.background.settle()
        garbage = {name: disk.garbage[replaced] for name, disk in world.disks.disks.items() if replaced in disk.garbage}
        assert set(garbage) == disks
        (name,) = {owner for owner, _ in garbage.values()}
        assert name.endswith(b"key")
        assert all(due > world.clock.wall + 3_000_000 for _, due in garbage.values())
    assert (await objects.delete(bucket, b"key")).existed
    assert not (await objects.delete(bucket, b"key")).existed
    with pytest.raises(NoSuchKey):
        await objects.head(bucket, b"key")
    await objects.close()


async def test_a_small_put_that_slept_for_days_proposes_again_with_its_copies() -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    await put(objects, bucket, b"before")

    async def sleep(name: RegisterName) -> None:
        world.clock.ahead_s += 3 * 86_400
        world.ring.values[name] = Value(9, b"other", 2, world.ring.values[name].body)
        for disk in world.disks.disks.values():
            disk.lose()

    world.ring.interfere = sleep
    data = os.urandom(5000)
    await put(objects, bucket, data)
    assert await got(objects, bucket) == data
    await objects.close()


async def test_declared_digests_are_verified_before_anything_is_committed() -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    for data in (b"abc", b"d" * 3000, os.urandom(200_000)):
        signed = hashlib.sha256(data).hexdigest()
        crc = base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()
        sha = base64.b64encode(hashlib.sha256(data).digest()).decode()
        good = BodyChecks(
            len(data),
            hashlib.md5(data).digest(),
            {"CRC32": crc},
            ("CRC32", "SHA256"),
            dict[str, str](SHA256=sha).copy,
            signed,
        )
        result = await objects.put(bucket, b"good", pieces(data), NewMeta(), good, owner=OWNER)
        assert result.checksums == {"CRC32": crc, "SHA256": sha}
        assert (await objects.head(bucket, b"good")).checksums == result.checksums
        bad = [
            (XAmzContentSHA256Mismatch, BodyChecks(len(data), sha256=bytes(32).hex())),
            (XAmzContentSHA256Mismatch, BodyChecks(None, algorithms=("SHA256",), sha256=bytes(32).hex())),
            (BadDigest, BodyChecks(len(data), md5=bytes(16))),
            (BadDigest, BodyChecks(len(data), checksums={"CRC32C": crc})),
            (BadDigest, BodyChecks(None, algorithms=("CRC32",), trailing=lambda: {"CRC32": "AAAAAA=="})),
            (IncompleteBody, BodyChecks(len(data) + 1)),
            (IncompleteBody, BodyChecks(len(data) - 1)),
        ]
        for error, checks in bad:
            with pytest.raises(error):
                await objects.put(bucket, b"bad", pieces(data), NewMeta(), checks, owner=OWNER)
            with pytest.raises(NoSuchKey):
                await objects.head(bucket, b"bad")
    await objects.close()


async def test_a_body_that_breaks_leaves_nothing_but_garbage_that_is_listed() -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)

    async def broken() -> AsyncIterator[Buffer]:
        yield os.urandom(5 * MIB)
        await asyncio.sleep(0.05)
        raise IncompleteBody

    with pytest.raises(IncompleteBody):
        await objects.put(bucket, b"key", broken(), NewMeta(), BodyChecks(6 * MIB), owner=OWNER)
    await objects.plane.background.settle()
    data_ids = {f.data_id for disk in world.disks.disks.values() for f in disk.fragments}
    assert len(data_ids) == 1
    assert all(set(disk.garbage) == data_ids for disk in world.disks.disks.values() if disk.fragments)
    assert not world.ring.values
    assert objects.plane.put_buffers.bytes_leased == 0
    await objects.close()


async def test_a_body_longer_than_the_limit_is_refused() -> None:
    world = World(put_bytes_max=100_000)
    objects = ObjectService(world.plane())
    with pytest.raises(EntityTooLarge):
        await put(objects, bucket_of(world), bytes(100_001))
    with pytest.raises(EntityTooLarge):
        await put(objects, bucket_of(world), bytes(100_001), sized=False)
    await objects.close()


async def test_write_conditions_are_judged_on_what_the_commit_finds_not_on_what_was_there_before() -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    for size in (10, 5000, 100_000):
        data = os.urandom(size)

        async def rival(name: object, data: bytes = data) -> None:
            await put(objects, bucket, data[::-1])

        world.ring.interfere = rival
        with pytest.raises(PreconditionFailed):
            await put(objects, bucket, data, conditions=WriteConditions(if_none_match=ANY))
        assert await got(objects, bucket) == data[::-1]
        etag = hashlib.md5(data[::-1]).hexdigest()
        await put(objects, bucket, data, conditions=WriteConditions(if_match=tag(etag)))
        with pytest.raises(PreconditionFailed):
            await put(objects, bucket, data, conditions=WriteConditions(if_match=tag(etag)))
        await objects.delete(
            bucket, b"key", conditions=WriteConditions(if_match=tag(hashlib.md5(data).hexdigest()), if_match_size=size)
        )
        with pytest.raises(NoSuchKey):
            await put(objects, bucket, data, conditions=WriteConditions(if_match=tag(etag)))
        await objects.delete(bucket, b"key", conditions=WriteConditions(if_match_size=size, if_match_modified_ms=1))
    await objects.close()


async def test_an_unconditional_put_that_was_preempted_sees_its_fragments_again_and_wins() -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    data = os.urandom(100_000)

    async def rival(name: object) -> None:
        await put(objects, bucket, b"rival")

    world.ring.interfere = rival
    await put(objects, bucket, data)
    assert await got(objects, bucket) == data

    async def rival_and_collector(name: object) -> None:
        await put(objects, bucket, b"rival")
        for disk in world.disks.disks.values():
            disk.lose()

    world.ring.interfere = rival_and_collector
    with pytest.raises(ServiceUnavailable):
        await put(objects, bucket, data[::-1])
    assert await got(objects, bucket) == b"rival"
    await objects.close()


@pytest.mark.parametrize("conditions", [NO_WRITE_CONDITIONS, WriteConditions(if_match=ANY)])
async def test_a_put_that_others_come_before_every_time_is_to_be_tried_again(
    conditions: WriteConditions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "BACKOFF_FIRST_S", 0.0)
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    await put(objects, bucket, b"first")

    async def rival(name: object) -> None:
        await put(objects, bucket, b"rival")
        world.ring.interfere = rival

    world.ring.interfere = rival
    with pytest.raises(SlowDown):  # clients do by themselves
        await put(objects, bucket, os.urandom(100_000), conditions=conditions)
    world.ring.interfere = None
    assert await got(objects, bucket) == b"rival"
    await objects.close()


async def test_read_conditions_answer_304_and_412_in_the_order_of_the_rfc() -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    result = await put(objects, bucket, b"hello")
    at = result.modified_ms
    for call in (objects.head, objects.get):
        for conditions in (
            ReadConditions(if_none_match=tag(result.etag)),
            ReadConditions(if_none_match=ANY),
            ReadConditions(if_modified_since_ms=at),
            ReadConditions(if_match=tag(result.etag), if_none_match=Tags(("other", result.etag))),
        ):
            with pytest.raises(NotModified):
                await call(bucket, b"key", conditions=conditions)
        for conditions in (
            ReadConditions(if_match=tag("other"), if_none_match=tag(result.etag)),
            ReadConditions(if_unmodified_since_ms=at - 5000),
        ):
            with pytest.raises(PreconditionFailed):
                await call(bucket, b"key", conditions=conditions)
        await objects.head(
            bucket, b"key", conditions=ReadConditions(if_match=tag(result.etag), if_unmodified_since_ms=at - 5000)
        )
        await objects.head(
            bucket, b"key", conditions=ReadConditions(if_none_match=tag("other"), if_modified_since_ms=at + 5000)
        )
    await objects.close()


# --- disks that damage and lie


@pytest.mark.parametrize("near", [False, True], ids=["far", "near"])
@pytest.mark.parametrize("lie", [False, True])
@pytest.mark.parametrize("size", [60_000, 4 * MIB])
async def test_any_two_damaged_or_lying_fragments_are_read_around_and_reported(
    lie: bool, size: int, near: bool
) -> None:
    world = World(near=near)
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    data = os.urandom(size)
    await put(objects, bucket, data)
    held = {f.position: (disk, f) for disk, f in world.disks.of(entry_of(world).data_id) if f.block == 0}
    for bad in [(0,), (3,), (0, 1), (2, 5), (4, 5), (1, 4)]:
        kept = {position: world.disks.disks[held[position][0]].payload(held[position][1]) for position in bad}
        for position in bad:
            world.disks.disks[held[position][0]].flip(held[position][1], 0, lie=lie)
        world.damage.clear()
        assert await got(objects, bucket) == data
        reported = {(d.disk, d.fragment.position, d.reason) for d in world.damage}
        for position in bad:
            if position < 4:
                assert (held[position][0], position, "lied" if lie else "checksum") in reported
        assert {position for _, position, _ in reported} <= set(bad)
        for position in bad:
            world.disks.disks[held[position][0]].mend(held[position][1], kept[position])
    await objects.close()


@pytest.mark.parametrize("near", [False, True], ids=["far", "near"])
@pytest.mark.parametrize("known", [True, False], ids=["known to be away", "not noticed yet"])
@pytest.mark.parametrize("scattered", [False, True])
async def test_any_two_disks_may_be_away_whatever_is_asked_for(near: bool, known: bool, scattered: bool) -> None:
    world = World(near=near)
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    for size in (70_000, 4 * CELL + 1, 68 * CELL - 5, 4 * MIB + 77):
        data = os.urandom(size)
        await put(objects, bucket, data)
        for disk in world.disks.disks.values():
            disk.scattered = scattered
        for away in itertools.combinations(world.disks.disks, 2):
            for name, disk in world.disks.disks.items():
                disk.down = name in away
            world.disks.suspected = set(away) if known else set()
            assert await got(objects, bucket) == data
            for span in (
                RangeSpec(size - 1, None),
                RangeSpec(size // 3, size // 3 + CELL),
                RangeSpec(size // 2, size - 2),
            ):
                assert (
                    await got(objects, bucket, span=span)
                    == data[span.first : len(data) if span.last is None else span.last + 1]
                )
        for disk in world.disks.disks.values():
            disk.down = False
        world.disks.suspected = set()
    assert objects.plane.counters.cells_reconstructed
    await objects.close()


async def test_a_short_last_cell_that_is_rebuilt_is_as_short_as_it_was() -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    data = os.urandom(68 * CELL - 5)  # two blocks; the last stripe has all of its cells
    await put(objects, bucket, data)
    world.disks.suspected = {
        disk for disk, f in world.disks.of(entry_of(world).data_id) if (f.block, f.position) == (1, 3)
    }
    assert await got(objects, bucket) == data
    assert (
        sum(disk.reads for disk in world.disks.disks.values()) == 2 * 4
    )  # one of another length would not open, and be looked for
    await objects.close()


async def test_what_disks_of_this_node_have_in_memory_is_taken_without_a_wait() -> None:
    world = World(near=True, hedge_floor_s=GUARD_S, read_timeout_s=GUARD_S)
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    data = os.urandom(4 * MIB)
    await put(objects, bucket, data)
    assert await got(objects, bucket) == data
    assert not any(disk.reads for disk in world.disks.disks.values())
    for disk in world.disks.disks.values():
        disk.slow_s = 0.001
    assert await got(objects, bucket) == data
    assert sum(disk.reads for disk in world.disks.disks.values()) == 8
    await objects.close()


@pytest.mark.parametrize(("size", "cell"), [(5000, 0), (150_000, 0), (150_000, 2)])
async def test_a_lying_copy_of_a_small_object_is_replaced_by_its_neighbour(size: int, cell: int) -> None:
    world = World(small_bytes_max=200 * KIB)
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    data = os.urandom(size)
    await put(objects, bucket, data)
    held = world.disks.of(entry_of(world).data_id)
    for disk, fragment in held[:2]:
        world.disks.disks[disk].flip(fragment, cell, lie=True)
    assert await got(objects, bucket) == data
    assert {d.disk for d in world.damage} == {disk for disk, _ in held[:2]}
    assert await got(objects, bucket, span=RangeSpec(size - 100, None)) == data[-100:]
    world.disks.disks[held[2][0]].flip(held[2][1], cell, lie=True)
    with pytest.raises(DataDamaged):
        await got(objects, bucket)
    await objects.close()


@pytest.mark.parametrize("cell", [-1, 0])
async def test_what_drives_cannot_read_is_no_damage_for_good(cell: int) -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    await put(objects, bucket, os.urandom(4 * MIB))
    held = world.disks.of(entry_of(world).data_id)
    for disk, fragment in held:
        world.disks.disks[disk].damage(fragment, cell, unread=True)
    with pytest.raises(ServiceUnavailable):
        await got(objects, bucket)
    for disk, fragment in held:
        world.disks.disks[disk].damage(fragment, cell)
    with pytest.raises(DataDamaged):
        await got(objects, bucket)
    await objects.close()


async def test_a_record_that_has_less_of_a_part_than_its_size_says_is_refused_and_nobodys_memory_sent_for_it() -> None:
    """Where a part lies is in the clear. Who gives the first of its sealed chunks for all of it
    gives one that opens.
    """
    world = World()
    objects, bucket, size = ObjectService(world.plane()), bucket_of(world), 5 * CELL
    await put(objects, bucket, os.urandom(size), key=b"other")
    assert len(await got(objects, bucket, key=b"other")) == size
    await put(objects, bucket, os.urandom(size))
    (name,) = [name for name in world.ring.values if name.key == b"key"]
    (version,) = decode_object(world.ring.values[name].body).versions
    (first,) = [
        (disk, fragment) for disk, fragment in world.disks.of(version.parts[0].data_id) if fragment.position == 0
    ]
    chunk = world.disks.disks[first[0]].cell(first[1], 0)
    part = msgspec.structs.replace(version.parts[0], inline=chunk, runs=())
    body = encode_object(ObjectRecord((msgspec.structs.replace(version, parts=(part,)),)))
    await world.ring.change(name, lambda _value: Change(body))
    with pytest.raises(DataDamaged):
        await objects.get(bucket, b"key")
    await objects.close()


async def test_too_much_damage_is_refused_before_the_first_byte_and_never_served() -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    data = os.urandom(8 * MIB)
    await put(objects, bucket, data)
    for disk, fragment in world.disks.of(entry_of(world).data_id):
        if fragment.block == 2 and fragment.position < 3:
            world.disks.disks[disk].flip(fragment, 0, lie=True)
    stream = await objects.get(bucket, b"key")
    sent = b""
    with pytest.raises(DataDamaged):  # noqa: PT012 - what came before the error matters
        async for piece in stream.chunks():
            sent += bytes(piece)
    assert data.startswith(sent)
    with pytest.raises(DataDamaged):
        await objects.get(bucket, b"key", span=RangeSpec(96 * CELL, None))
    assert objects.plane.get_buffers.bytes_leased == 0
    await objects.close()


async def test_a_slow_disk_is_hedged() -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    data = os.urandom(200_000)
    await put(objects, bucket, data)
    (slow,) = [disk for disk, f in world.disks.of(entry_of(world).data_id) if f.position == 1]
    hang = world.disks.disks[slow].hang = asyncio.Event()
    assert await got(objects, bucket) == data
    assert objects.plane.counters.reads_hedged >= 1
    hang.set()
    await objects.close()


async def test_an_object_replaced_before_the_first_byte_is_read_from_its_new_record() -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    old, new = os.urandom(200_000), os.urandom(200_000)
    await put(objects, bucket, old)
    read = world.ring.read

    async def read_then_replace(
        name: RegisterName, *, want_payload: bool = False, settling_nonce: bytes = b""
    ) -> Reading:
        found = await read(name, want_payload=want_payload)
        world.ring.read = read  # type: ignore[method-assign]
        assert found.value is not None
        await put(objects, bucket, new)
        for disk, fragment in world.disks.of(decode_object(found.value.body).versions[0].context_id):
            world.disks.disks[disk].lose(fragment)
        return found

    world.ring.read = read_then_replace  # type: ignore[method-assign]
    assert await got(objects, bucket) == new
    await objects.close()


async def test_a_stream_that_is_closed_early_gives_its_memory_back() -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    await put(objects, bucket, os.urandom(8 * MIB))
    stream = await objects.get(bucket, b"key")
    await stream.close()
    await stream.close()
    stream = await objects.get(bucket, b"key")
    chunks = stream.chunks()
    await anext(chunks)
    await chunks.aclose()  # type: ignore[attr-defined]
    assert objects.plane.get_buffers.bytes_leased == 0
    assert objects.plane.get_buffers.transfers == 0
    await objects.close()


@pytest.mark.slow
async def test_many_transfers_share_a_small_memory_without_deadlock() -> None:
    world = World(fill_buffer_bytes_max=1 * MIB, put_buffer_bytes_max=4 * MIB, get_buffer_bytes_max=1 * MIB)
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    data = os.urandom(3 * MIB)
    keys = [b"k%d" % n for n in range(12)]
    await asyncio.gather(*(put(objects, bucket, data, key=key) for key in keys))
    assert set(await asyncio.gather(*(got(objects, bucket, key=key) for key in keys))) == {data}
    assert (
        objects.plane.fill_buffers.bytes_leased
        == objects.plane.put_buffers.bytes_leased
        == objects.plane.get_buffers.bytes_leased
        == 0
    )
    await objects.close()


async def test_a_copy_has_its_own_data_and_survives_the_source() -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    for size in (5, 5000, 300_000):
        data = os.urandom(size)
        meta = NewMeta({"content-type": "text/x"}, {"a": "1"}, {"t": "v"}, "STANDARD")
        await objects.put(bucket, b"src", pieces(data), meta, BodyChecks(size, algorithms=("CRC32C",)), owner=OWNER)
        source = await objects.head(bucket, b"src")
        await objects.copy(CopySource(bucket, b"src"), bucket, b"dst", owner=OWNER, meta=None)
        await objects.delete(bucket, b"src")
        await objects.plane.background.settle()
        for disk in world.disks.disks.values():
            for fragment in disk.fragments:
                if fragment.data_id in disk.garbage:
                    disk.lose(fragment)
        assert await got(objects, bucket, key=b"dst") == data
        info = await objects.head(bucket, b"dst")
        assert (info.headers, info.user, info.tags, info.checksums) == (
            source.headers,
            source.user,
            source.tags,
            source.checksums,
        )
        await objects.copy(
            CopySource(bucket, b"dst"), bucket, b"dst", owner=OWNER, meta=NewMeta(user={"b": "2"}), tags={}
        )
        info = await objects.head(bucket, b"dst")
        assert (dict(info.user), dict(info.tags)) == ({"b": "2"}, {})
        assert await got(objects, bucket, key=b"dst") == data
        with pytest.raises(PreconditionFailed):
            await objects.copy(
                CopySource(bucket, b"dst", conditions=ReadConditions(if_none_match=tag(info.etag))),
                bucket,
                b"x",
                owner=OWNER,
                meta=None,
            )
    await objects.close()


async def test_tags_are_changed_without_moving_data() -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    for size in (5, 5000, 300_000):
        data = os.urandom(size)
        await put(objects, bucket, data)
        await objects.set_tags(bucket, b"key", {"colour": "blue"})
        assert dict((await objects.head(bucket, b"key")).tags) == {"colour": "blue"}
        await objects.plane.background.settle()
        assert not any(entry_of(world).data_id in disk.garbage for disk in world.disks.disks.values())
        assert await got(objects, bucket) == data
    await objects.close()


async def test_listings_open_etags_and_group_by_delimiter() -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    for key in (b"a", b"d/1", b"d/2", b"e/1", b"z"):
        await put(objects, bucket, key, key=key)
    page = await objects.list_objects(bucket, delimiter=b"/", limit=3)
    assert list(page.keys) == [b"a"]
    assert page.prefixes == (b"d/", b"e/")
    assert page.shown[0].printed.etag == hashlib.md5(b"a").hexdigest()
    assert page.next_after is not None
    page = await objects.list_objects(bucket, delimiter=b"/", limit=3, after=page.next_after)
    assert list(page.keys) == [b"z"]
    versions = await objects.list_versions(bucket, prefix=b"d/")
    assert [(o.key, o.version_id, o.latest) for o in versions.versions] == [
        (b"d/1", "null", True),
        (b"d/2", "null", True),
    ]
    await objects.close()


async def test_a_record_moved_to_another_key_does_not_open() -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    await put(objects, bucket, b"secret")
    (name,) = world.ring.values
    other = object_name(bucket.id, bucket.shard_numbers, b"other")
    world.ring.values[other] = world.ring.values[name]
    with pytest.raises(DataDamaged):
        await objects.get(bucket, b"other")
    await objects.close()


def test_fragment_ids_of_one_block_are_ordered() -> None:
    ids = [FragmentId(b"x" * 16, 0, 4, 2, position) for position in range(6)]
    assert ids == sorted(ids)


@pytest.mark.slow
async def test_copies_do_not_wait_for_each_other_when_memory_is_short() -> None:
    """Half of them hold a block and want a window, the other half hold a window and want a block."""
    world = World(
        buffer_wait_s=2.0, fill_buffer_bytes_max=2 * MIB, put_buffer_bytes_max=4 * MIB, get_buffer_bytes_max=3 * MIB
    )
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    data = os.urandom(6_000_000)
    await put(objects, bucket, data)
    await asyncio.gather(
        *(objects.copy(CopySource(bucket, b"key"), bucket, b"copy%d" % n, owner=OWNER, meta=None) for n in range(12))
    )
    assert await got(objects, bucket, key=b"copy11") == data
    assert objects.plane.get_buffers.bytes_leased == objects.plane.put_buffers.bytes_leased == 0
    await objects.close()


async def test_a_page_whose_keys_are_sealed_under_several_versions_of_the_buckets_key_prints_all_of_them() -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    for number in range(6):
        world.keys.newest[bucket.id] = 1 + number % 3
        await put(objects, bucket, b"%d" % number, key=b"k%d" % number)
    page = await objects.list_objects(bucket)
    assert list(page.keys) == [b"k%d" % number for number in range(6)]
    assert [row.printed.etag for row in page.shown] == [hashlib.md5(b"%d" % number).hexdigest() for number in range(6)]
    assert [row.size for row in page.shown] == [1] * 6
    await objects.close()


@pytest.mark.parametrize("broken", ["moved", "garbage", "list field"])
async def test_a_listed_record_that_is_not_its_keys_is_refused_by_name_of_what_is_wrong(broken: str) -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    for key in (b"a", b"b", b"c"):
        await put(objects, bucket, b"data", key=key)
    name, other = (object_name(bucket.id, bucket.shard_numbers, key) for key in (b"b", b"c"))
    record = decode_object(world.ring.values[name].body)
    body = {
        "moved": world.ring.values[other].body,
        "garbage": b"\x00",
        "list field": encode_object(ObjectRecord((msgspec.structs.replace(record.versions[0], listing=b"short"),))),
    }[broken]
    await world.ring.change(name, lambda _value: Change(body))
    wrong = "read" if broken == "garbage" else "open"
    with pytest.raises(DataDamaged, match=f"{wrong}.*'b'"):
        await objects.list_objects(bucket)
    with pytest.raises(DataDamaged, match=f"{wrong}.*'b'"):
        await objects.list_versions(bucket)
    await objects.close()


async def test_a_read_whose_data_is_gone_because_the_object_was_replaced_says_so() -> None:
    world = World(block_cells_max=12)
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    data = os.urandom(12 * CELL * 4)
    for replaced in (True, False):
        await put(objects, bucket, data)
        stream = await objects.get(bucket, b"key")
        chunks = stream.chunks()
        await anext(chunks)
        if replaced:
            await put(objects, bucket, b"else")
        for disk in world.disks.disks.values():
            disk.lose(*disk.fragments)
        said = "replaced or deleted while it was read" if replaced else "too few readable fragments"
        with pytest.raises(ServiceUnavailable, match=said):
            async for _ in chunks:
                pass
        await stream.close()
    await objects.close()
