"""Buckets with versioning, in the object plane."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest

from storaged.errors import (
    InvalidArgument,
    MethodNotAllowed,
    NoSuchKey,
    NoSuchVersion,
    PreconditionFailed,
)
from storaged.meta.names import RegisterName, Table, Value, Visibility
from storaged.objects import listing
from storaged.objects.api import BodyChecks, CopySource, NewMeta, PutResult, WriteConditions
from storaged.objects.code.history import Bounds
from storaged.objects.configuration.document import NOTHING
from storaged.objects.configuration.kinds import ENABLED, SUSPENDED, VERSIONING, Versioning
from storaged.objects.etags import ANY
from storaged.objects.listing_types import ListedVersion
from storaged.objects.records import BucketRecord, ListedFields, decode_object
from storaged.objects.service import ObjectService
from storaged.objects.write import versioned
from storaged.objects.write.references import pages_in, parts_in
from tests.unit.test_objects_multipart import stopped_before_done, uploaded
from tests.worlds.objects import OWNER, World, bucket_of, pieces

pytestmark = pytest.mark.virtual_time

FEW = Bounds(versions_max=3, versions_bytes_max=20_000, leaf_versions=2, refs_max=3, branch_refs=2)
"""So few versions a page that some ten make a tree."""


@pytest.fixture(autouse=True, params=["few", "many"])
def bounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "few":
        monkeypatch.setattr(versioned, "BOUNDS", FEW)


class Made:
    """A bucket, whose versioning changes."""

    def __init__(self, status: str = "") -> None:
        self.world = World(part_bytes_min=1000)
        self.plane = self.world.plane()
        self.objects = ObjectService(self.plane)
        self.bare = bucket_of(self.world)
        self.bucket = self.bare
        if status:
            self.set(status)

    def set(self, status: str) -> BucketRecord:
        configuration = NOTHING.having(VERSIONING, Versioning(status))
        self.bucket = self.plane.configurations.put(self.bare, configuration)
        return self.bucket

    async def put(self, data: bytes, key: bytes = b"key", **options: WriteConditions) -> PutResult:
        checks = BodyChecks(size=len(data))
        return await self.objects.put(self.bucket, key, pieces(data), NewMeta(), checks, owner=OWNER, **options)

    async def got(self, version_id: str = "", key: bytes = b"key") -> bytes:
        stream = await self.objects.get(self.bucket, key, version_id=version_id)
        return b"".join([bytes(piece) async for piece in stream.chunks()])

    async def versions(self, limit: int = 1000, **options: bytes) -> list[ListedVersion]:
        """All, page by page."""
        found: list[ListedVersion] = []
        after, version_id = b"", ""
        for _ in itertools.count():
            page = await self.objects.list_versions(
                self.bucket, after=after, after_version=version_id, limit=limit, **options
            )
            assert len(page.versions) + len(page.prefixes) <= limit
            found += page.versions
            if page.next_after is None:
                return found
            after, version_id = page.next_after, page.next_version
        raise AssertionError

    def value(self, key: bytes = b"key") -> Value:
        [value] = [value for name, value in self.world.ring.values.items() if (name.table, name.key) == (1, key)]
        return value

    def name(self, key: bytes = b"key") -> RegisterName:
        [name] = [name for name in self.world.ring.values if (name.table, name.key) == (Table.OBJECT, key)]
        return name

    async def live(self) -> set[bytes]:
        """The data that the key refers to."""
        value = self.value()
        if value.visibility == Visibility.TOMBSTONE:
            return set()
        return {part.data_id async for part in parts_in(self.world.ring, self.name(), value.body, Table.OBJECT)}


SIZES = (0, 10, 3_000, 50_000)


async def test_every_version_stays_and_is_read_by_its_id() -> None:
    made = Made(ENABLED)
    datas = [os.urandom(size) for size in SIZES * 4]
    results = [await made.put(data) for data in datas]
    ids = [result.version_id for result in results]
    assert len(set(ids)) == len(ids)
    assert await made.got() == datas[-1]
    for data, version_id in zip(datas, ids, strict=True):
        assert await made.got(version_id) == data
        info = await made.objects.head(made.bucket, b"key", version_id=version_id)
        assert (info.version_id, info.size) == (version_id, len(data))
    listed = await made.versions()
    assert [one.version_id for one in listed] == ids[::-1]
    assert [one.latest for one in listed] == [True] + [False] * (len(ids) - 1)
    assert [one.etag for one in listed] == [result.etag for result in results][::-1]
    assert [one.version_id for one in await made.versions(limit=3)] == ids[::-1]
    await made.objects.close()


async def test_an_object_from_before_versioning_is_the_null_version_with_its_copies() -> None:
    made = Made()
    small = os.urandom(3000)
    assert (await made.put(small)).version_id == ""
    payload = made.value().payload
    assert payload
    made.set(ENABLED)
    datas = [os.urandom(size) for size in SIZES * 3]
    ids = [(await made.put(data)).version_id for data in datas]
    assert made.value().payload == payload, "the copies of the null version stay named"
    assert await made.got("null") == small
    assert [one.version_id for one in await made.versions()] == [*ids[::-1], "null"]
    assert payload in await made.live()
    made.set(SUSPENDED)
    assert (await made.put(b"new null")).version_id == ""
    assert not made.value().payload
    assert payload not in await made.live()
    assert await made.got("null") == b"new null" == await made.got()
    assert [one.version_id for one in await made.versions()] == ["null", *ids[::-1]]
    for data, version_id in zip(datas, ids, strict=True):
        assert await made.got(version_id) == data
    await made.objects.close()


async def test_a_copy_of_a_null_version_on_a_page_is_known_to_nodes_without_keys() -> None:
    made = Made()
    await made.put(os.urandom(3000))
    made.set(ENABLED)
    for _ in range(30):
        await made.put(b"x")
    record = decode_object(made.value().body)
    assert record.history is not None
    assert record.history.copied is not None
    assert record.history.copied.data_id == made.value().payload
    assert record.history.null_at == 0
    await made.objects.delete(made.bucket, b"key", version_id="null")
    record = decode_object(made.value().body)
    assert record.history is not None
    assert (record.history.copied, record.history.null_at, made.value().payload) == (None, -1, b"")
    await made.objects.close()


async def test_a_delete_marker_hides_the_object_and_is_taken_away_again() -> None:
    made = Made(ENABLED)
    first = await made.put(b"first")
    gone = await made.objects.delete(made.bucket, b"key")
    assert gone.delete_marker
    assert gone.existed
    assert made.value().visibility == Visibility.HIDDEN
    with pytest.raises(NoSuchKey) as caught:
        await made.got()
    assert caught.value.details == {"DeleteMarker": "true", "MarkerVersionId": gone.version_id}
    with pytest.raises(MethodNotAllowed) as refused:
        await made.got(gone.version_id)
    assert int(refused.value.details["ModifiedMs"]) > 0
    assert await made.got(first.version_id) == b"first"
    assert (await made.objects.list_objects(made.bucket)).keys == ()
    listed = await made.versions()
    assert [(one.delete_marker, one.latest) for one in listed] == [(True, True), (False, False)]
    undone = await made.objects.delete(made.bucket, b"key", version_id=gone.version_id)
    assert (undone.delete_marker, undone.version_id) == (True, gone.version_id)
    assert await made.got() == b"first"
    await made.objects.delete(made.bucket, b"key", version_id=first.version_id)
    assert made.value().visibility == Visibility.TOMBSTONE
    assert await made.versions() == []
    await made.objects.close()


async def test_a_delete_where_versioning_is_suspended_removes_the_null_version_alone() -> None:
    made = Made(ENABLED)
    kept = await made.put(b"kept")
    made.set(SUSPENDED)
    await made.put(os.urandom(20_000))
    gone = await made.objects.delete(made.bucket, b"key")
    assert (gone.version_id, gone.delete_marker) == ("null", True)
    assert [(one.version_id, one.delete_marker) for one in await made.versions()] == [
        ("null", True),
        (kept.version_id, False),
    ]
    await made.objects.delete(made.bucket, b"key")
    assert len(await made.versions()) == 2, "a null marker replaces the one before"
    await made.put(b"again")
    assert [one.version_id for one in await made.versions()] == ["null", kept.version_id]
    await made.objects.close()


async def test_a_delete_of_a_key_that_never_was_leaves_a_marker() -> None:
    made = Made(ENABLED)
    gone = await made.objects.delete(made.bucket, b"never")
    assert gone.delete_marker
    assert not gone.existed
    assert [one.key for one in await made.versions()] == [b"never"]
    await made.objects.close()


async def test_versions_that_are_not_there_and_ids_that_cannot_be() -> None:
    made = Made(ENABLED)
    first = await made.put(b"1")
    await made.objects.delete(made.bucket, b"key", version_id=first.version_id)
    await made.put(b"2")
    for version_id in (first.version_id, "null"):
        with pytest.raises(NoSuchVersion):
            await made.got(version_id)
        assert not (await made.objects.delete(made.bucket, b"key", version_id=version_id)).existed
    for version_id in ("nonsense", "x" * 33):
        with pytest.raises(InvalidArgument):
            await made.got(version_id)
        with pytest.raises(InvalidArgument):
            await made.objects.delete(made.bucket, b"key", version_id=version_id)
        with pytest.raises(InvalidArgument):
            await made.objects.list_versions(made.bucket, after=b"key", after_version=version_id)
    assert await made.got() == b"2"
    await made.objects.close()


async def test_a_put_that_thinks_the_bucket_has_no_versioning_keeps_all_versions() -> None:
    made = Made(ENABLED)
    datas = [os.urandom(size) for size in SIZES * 2]
    ids = [(await made.put(data)).version_id for data in datas]
    old = made.bare
    for data in (b"inline", os.urandom(3000), os.urandom(50_000)):
        checks = BodyChecks(size=len(data))
        await made.objects.put(old, b"key", pieces(data), NewMeta(), checks, owner=OWNER)
        assert await made.got("null") == data
        assert [one.version_id for one in await made.versions()] == ["null", *ids[::-1]]
    answers: list[PutResult | Exception] = []
    assert made.objects.try_put(old, b"key", b"plain", NewMeta(), BodyChecks(size=5), answers.append, owner=OWNER)
    await made.plane.background.settle()
    while not answers:
        await made.world.ring.read(made.name())
    assert isinstance(answers[0], PutResult)
    gone = await made.objects.delete(old, b"key")
    assert gone.delete_marker
    assert [one.version_id for one in await made.versions()] == ["null", *ids[::-1]]
    for data, version_id in zip(datas, ids, strict=True):
        assert await made.got(version_id) == data
    await made.objects.close()


async def test_a_create_under_a_history_names_the_places_to_which_its_block_has_moved() -> None:
    made = Made(ENABLED)
    before = (await made.put(b"before")).version_id
    victim, data = made.world.disks.disks["b1"], os.urandom(300_000)

    def fail(_number: int) -> None:
        victim.down = True

    victim.on_write = fail
    await made.objects.put(made.bare, b"key", pieces(data), NewMeta(), BodyChecks(size=len(data)), owner=OWNER)
    assert made.world.ring.created == 0
    newest = decode_object(made.value().body).versions[0].parts[0]
    placed = {(fragment.k, fragment.m) for _, fragment in made.world.disks.of(newest.data_id)}
    assert {(run.k, run.m) for run in newest.runs} == placed
    assert await made.got() == data
    assert await made.got(before) == b"before"
    await made.objects.close()


async def test_conditions_judge_the_current_version_alone() -> None:
    made = Made(ENABLED)
    await made.put(b"1")
    with pytest.raises(PreconditionFailed):
        await made.put(b"2", conditions=WriteConditions(if_none_match=ANY))
    await made.objects.delete(made.bucket, b"key")
    made_again = await made.put(b"2", conditions=WriteConditions(if_none_match=ANY))
    assert await made.got() == b"2"
    await made.objects.delete(made.bucket, b"key")
    with pytest.raises(NoSuchKey):
        await made.put(b"3", conditions=WriteConditions(if_match=ANY))
    assert await made.got(made_again.version_id) == b"2"
    await made.objects.close()


async def test_what_a_record_refers_to_is_every_version_of_it() -> None:
    made = Made(ENABLED)
    ids = [(await made.put(os.urandom(20_000))).version_id for _ in range(20)]
    assert len(await made.live()) == 20
    needed = {page async for page in pages_in(made.world.ring, made.name(), made.value())}
    assert needed <= made.world.ring.pages.keys()
    for number, version_id in enumerate(ids):
        if number % 2:
            await made.objects.delete(made.bucket, b"key", version_id=version_id)
    assert len(await made.live()) == 10
    await made.plane.background.settle()
    retired = {data_id for disk in made.world.disks.disks.values() for data_id in disk._retired}
    assert len(retired) == 10
    assert not retired & await made.live()
    await made.objects.close()


async def test_the_pages_of_a_key_are_named_when_each_was_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(ENABLED)
    datas = [os.urandom(1000) for _ in range(40)]
    upload_id, parts = await uploaded(made.objects, made.bucket, datas)
    await made.objects.complete(made.bucket, b"key", upload_id, parts, owner=OWNER)
    for number in range(40):
        await made.put(b"%d" % number)
    read: list[bytes] = []
    get_page = made.world.ring.get_page

    async def counted(near: RegisterName, page_hash: bytes) -> bytes:
        read.append(page_hash)
        return await get_page(near, page_hash)

    monkeypatch.setattr(made.world.ring, "get_page", counted)
    needed = [page async for page in pages_in(made.world.ring, made.name(), made.value(), complete=True)]
    assert len(read) == len(set(read)) > 1
    assert set(read) < set(needed)  # the pages of the manifest, which its version lists, are needed too
    assert set(needed) == made.world.ring.pages.keys()
    await made.objects.close()


async def test_tags_of_an_older_version_change_and_its_data_stays() -> None:
    made = Made(ENABLED)
    datas = [os.urandom(size) for size in SIZES * 3]
    ids = [(await made.put(data)).version_id for data in datas]
    for number, version_id in enumerate(ids):
        await made.objects.set_tags(made.bucket, b"key", {"n": str(number)}, version_id=version_id)
    for number, version_id in enumerate(ids):
        info = await made.objects.head(made.bucket, b"key", version_id=version_id)
        assert info.tags == {"n": str(number)}
        assert await made.got(version_id) == datas[number]
    assert [one.version_id for one in await made.versions()] == ids[::-1]
    await made.objects.close()


async def test_a_copy_reads_the_version_that_it_names() -> None:
    made = Made(ENABLED)
    datas = [os.urandom(size) for size in SIZES * 2]
    ids = [(await made.put(data)).version_id for data in datas]
    for data, version_id in zip(datas, ids, strict=True):
        source = CopySource(made.bucket, b"key", version_id)
        copied = await made.objects.copy(source, made.bucket, b"copy", owner=OWNER, meta=None)
        assert await made.got(copied.version_id, b"copy") == data
    assert len([one for one in await made.versions() if one.key == b"copy"]) == len(datas)
    await made.objects.close()


async def test_a_complete_adds_a_version_and_its_repeat_adds_none() -> None:
    made = Made(ENABLED)
    ids = [(await made.put(b"plain")).version_id for _ in range(4)]
    datas = [os.urandom(1000) for _ in range(40)]
    upload_id, parts = await uploaded(made.objects, made.bucket, datas)
    first = await made.objects.complete(made.bucket, b"key", upload_id, parts, owner=OWNER)
    assert first.version_id not in ids
    later = [(await made.put(os.urandom(20_000))).version_id for _ in range(9)]
    again = await made.objects.complete(made.bucket, b"key", upload_id, parts, owner=OWNER)
    assert again == first
    assert await made.got(first.version_id) == b"".join(datas)
    assert [one.version_id for one in await made.versions()] == [*later[::-1], first.version_id, *ids[::-1]]
    needed = {page async for page in pages_in(made.world.ring, made.name(), made.value(), complete=True)}
    assert needed <= made.world.ring.pages.keys()
    part = await made.objects.head(made.bucket, b"key", version_id=first.version_id, part_number=2)
    assert part.part_count == 40
    await made.objects.close()


async def test_a_complete_that_stopped_is_resumed_when_its_version_lies_on_a_page() -> None:
    made = Made(ENABLED)
    await made.put(b"plain")
    datas = [os.urandom(1000), b"b"]
    upload_id, parts = await uploaded(made.objects, made.bucket, datas)
    await stopped_before_done(made.world, made.objects, made.bucket, upload_id, parts, Table.UPLOAD)
    first = (await made.versions())[0]
    later = [(await made.put(os.urandom(2_000))).version_id for _ in range(12)]
    done = await made.objects.complete(made.bucket, b"key", upload_id, parts, owner=OWNER)
    assert done.version_id == first.version_id
    assert len(await made.versions()) == len(later) + 2
    assert await made.got(done.version_id) == b"".join(datas)
    await made.objects.close()


async def test_versions_are_listed_with_prefixes_and_markers_anywhere() -> None:
    made = Made(ENABLED)
    wanted = []
    for key in (b"a", b"b/1", b"b/2", b"c", b"d/x", b"e"):
        ids = [(await made.put(b"", key)).version_id for _ in range(5)]
        wanted += [(key, version_id) for version_id in ids[::-1]]
    for limit in (1, 2, 3, 4, 7, 11, 1000):
        assert [(one.key, one.version_id) for one in await made.versions(limit=limit)] == wanted
        grouped = await made.versions(limit=limit, delimiter=b"/")
        assert [(one.key, one.version_id) for one in grouped] == [one for one in wanted if b"/" not in one[0]]
        some = await made.versions(limit=limit, prefix=b"b/")
        assert [(one.key, one.version_id) for one in some] == [one for one in wanted if one[0].startswith(b"b/")]
    key, version_id = wanted[7]
    await made.objects.delete(made.bucket, key, version_id=version_id)
    page = await made.objects.list_versions(made.bucket, after=key, after_version=version_id)
    assert [(one.key, one.version_id) for one in page.versions] == wanted[8:], "a marker that was deleted is a place"
    await made.objects.close()


async def test_a_page_goes_on_after_the_null_version_that_was_deleted_meanwhile() -> None:
    """A tool that empties a bucket lists a page, deletes what is on it, and asks for the next one."""
    made = Made(ENABLED)
    for _ in range(5):
        await made.put(b"named")
    made.set(SUSPENDED)
    await made.put(b"null")
    made.set(ENABLED)
    await made.put(b"named")
    for limit in (1, 2, 3):
        deleted = []
        after, version_id = b"", ""
        while True:
            page = await made.objects.list_versions(made.bucket, after=after, after_version=version_id, limit=limit)
            for one in page.versions:
                await made.objects.delete(made.bucket, one.key, version_id=one.version_id)
                deleted.append(one.version_id)
            if page.next_after is None:
                break
            after, version_id = page.next_after, page.next_version
        assert await made.versions() == []
        assert len(deleted) == 7
        for _ in range(5):
            await made.put(b"named")
        made.set(SUSPENDED)
        await made.put(b"null")
        made.set(ENABLED)
        await made.put(b"named")
    await made.objects.close()


async def test_a_complete_that_a_gateway_resumes_which_thinks_the_bucket_has_no_versioning_replaces_nothing() -> None:
    made = Made()
    await made.put(b"from before")
    made.set(ENABLED)
    upload_id, parts = await uploaded(made.objects, made.bucket, [os.urandom(1000), b"b"])
    await stopped_before_done(made.world, made.objects, made.bucket, upload_id, parts, Table.OBJECT)
    done = await made.objects.complete(made.bare, b"key", upload_id, parts, owner=OWNER)
    assert await made.got("null") == b"from before"
    assert [one.version_id for one in await made.versions()] == [done.version_id, "null"]
    await made.objects.close()


async def test_a_page_of_the_list_holds_what_it_prints_of_versions_and_not_the_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Made(ENABLED)
    for number in range(30):
        await made.put(b"data", b"key %d" % (number % 3))
    await made.objects.delete(made.bucket, b"key 0")
    listed, held = listing._listed, list[object]()

    async def counting(keys: Any, bucket: Any, found: Any) -> Any:
        held.extend(value for one in found for value in one)
        return await listed(keys, bucket, found)

    monkeypatch.setattr(listing, "_listed", counting)
    assert len(await made.versions()) == 31
    assert {type(value) for value in held} == {bytes, str, bool, ListedFields}
