"""Buckets are made and deleted by compare-and-set, records that grant are authentic, users are found by their access
keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec
import pytest

from storaged.errors import (
    BucketAlreadyExists,
    BucketAlreadyOwnedByYou,
    BucketNotEmpty,
    CopyUnreadable,
    DataDamaged,
    InvalidAccessKeyId,
    InvalidArgument,
    InvalidRequest,
    NoSuchBucket,
    ServiceUnavailable,
    SlowDown,
    TooManyBuckets,
)
from storaged.meta.names import Change, RegisterName, Table, Value, Visibility, system_name
from storaged.meta.ports import ListPage, PageQuery
from storaged.objects import usage
from storaged.objects.api import BodyChecks, NewMeta, Principal
from storaged.objects.cache.ttl import REFRESHES_MAX, TtlCache
from storaged.objects.configuration import kinds
from storaged.objects.configuration.document import NOTHING, Configuration, Kind
from storaged.objects.configuration.kinds import TAGGING, Tags
from storaged.objects.records import BucketRecord
from storaged.objects.service import ObjectService
from storaged.objects.system.buckets import BucketService
from storaged.objects.system.users import CLAIM_STALE_MS, NameClaim, UserService
from storaged.objects.user_records import UserRecord
from storaged.wire import Message, decode, encode
from tests.doubles.clock import LoopClock
from tests.doubles.layouts import layout_of
from tests.unit.test_objects_put_get import got, put
from tests.worlds.objects import World, pieces

pytestmark = pytest.mark.virtual_time

ANNE, BEN = Principal("a" * 64, "anne", "AKA"), Principal("b" * 64, "ben", "AKB")


def world_of(**limits: float) -> tuple[World, ObjectService, BucketService]:
    world = World(None, **limits)
    plane = world.plane()
    return world, ObjectService(plane), BucketService(plane)


async def test_a_name_belongs_to_the_first_who_takes_it() -> None:
    world, _, buckets = world_of()
    made = await buckets.create(ANNE, "photos", region="eu-fr-1")
    assert world.keys.newest == {made.id: 1}
    assert await buckets.get("photos") == made
    with pytest.raises(BucketAlreadyOwnedByYou):
        await buckets.create(ANNE, "photos", region="eu-fr-1")
    with pytest.raises(BucketAlreadyExists):
        await buckets.create(BEN, "photos", region="eu-fr-1")
    results = await asyncio.gather(
        *(buckets.create(who, "race", region="eu-fr-1") for who in (ANNE, BEN, ANNE, BEN)), return_exceptions=True
    )
    assert sum(isinstance(result, BucketRecord) for result in results) == 1
    with pytest.raises(NoSuchBucket):
        await buckets.get("other")


async def test_a_record_from_before_it_had_a_list_of_shards_is_authentic_and_keeps_its_shards() -> None:
    """It ends with its authenticator, of which the tag is over the thirteen fields that there were."""
    world, objects, buckets = world_of()
    name = system_name("bucket/old")
    fields: list[Any] = ["old", b"O" * 16, ANNE.user_id, 1, "active", 16, "eu-fr-1", (), "4+2", b"", False, b"", b""]
    fields[12] = world.keys.authenticate((name.pack(), (1).to_bytes(8, "big")), encode(fields))
    world.ring.values[name] = Value(1, b"o" * 16, Visibility.LIVE, encode(fields))
    world.keys.newest[b"O" * 16] = 1
    old = await buckets.get("old")
    assert old.shard_numbers == bytes(range(16))
    await put(objects, old, b"data")
    assert {row.shard for row in world.ring.values if row.table == Table.OBJECT} <= set(range(16))
    await buckets.configure(old, TAGGING, lambda _: Tags({"a": "b"}))
    assert (await buckets.configuration(await buckets.get("old"))).get(TAGGING) == Tags({"a": "b"})
    await objects.close()


async def test_buckets_are_listed_by_owner_in_pages() -> None:
    _, _, buckets = world_of(buckets_per_user_max=5)
    for name in ("a1", "a2", "a3", "b1"):
        await buckets.create(ANNE, name, region="eu-fr-1")
        await buckets.create(BEN, name + "-ben", region="eu-fr-1")
    page, after = await buckets.list_buckets(ANNE, limit=2)
    assert ([bucket.name for bucket in page], after) == (["a1", "a2"], "a2")
    page, after = await buckets.list_buckets(ANNE, after="a2")
    assert ([bucket.name for bucket in page], after) == (["a3", "b1"], None)
    for prefix, there in (("b", ["b1"]), ("b1", ["b1"]), ("b11", []), ("a", ["a1", "a2", "a3"])):
        page, _ = await buckets.list_buckets(ANNE, prefix=prefix)
        assert [bucket.name for bucket in page] == there
    page, after = await buckets.list_buckets(ANNE, prefix="a", limit=1)
    page, after = await buckets.list_buckets(ANNE, prefix="a", after=after or "", limit=1)
    assert ([bucket.name for bucket in page], after) == (["a2"], "a2")
    await buckets.create(ANNE, "a5", region="eu-fr-1")
    with pytest.raises(TooManyBuckets):
        await buckets.create(ANNE, "a6", region="eu-fr-1")


async def test_a_user_who_makes_many_buckets_has_them_counted_once_and_the_limit_holds() -> None:
    world, _, buckets = world_of(buckets_per_user_max=4)
    pages, list_page = 0, world.ring.list_page

    async def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal pages
        pages += 1
        return await list_page(*arguments, **named)

    world.ring.list_page = counted  # type: ignore[method-assign]
    for number in range(4):
        await buckets.create(ANNE, f"b{number}", region="r")
    assert pages == 1
    with pytest.raises(TooManyBuckets):
        await buckets.create(ANNE, "b4", region="r")
    await buckets.delete(await buckets.get("b0"))
    await buckets.create(ANNE, "b4", region="r")
    with pytest.raises(TooManyBuckets):
        await buckets.create(ANNE, "b5", region="r")
    await buckets.create(BEN, "b5", region="r")


async def test_an_empty_bucket_is_deleted_for_good_and_its_name_is_free_again() -> None:
    world, objects, buckets = world_of()
    old = await buckets.create(ANNE, "b", region="eu-fr-1")
    upload = await objects.create_upload(old, b"key", NewMeta(), owner="o")
    assert upload.upload_id
    await put(objects, old, b"x")
    with pytest.raises(BucketNotEmpty):
        await buckets.delete(old)
    await objects.delete(old, b"key")
    await buckets.delete(old)
    with pytest.raises(NoSuchBucket):
        await buckets.get("b")
    with pytest.raises(NoSuchBucket):
        await buckets.delete(old)
    with pytest.raises(NoSuchBucket):
        await put(objects, old, b"late")
    assert world.ring.fences[old.id][1]
    new = await buckets.create(BEN, "b", region="eu-fr-1")
    assert new.id != old.id
    await put(objects, new, b"fresh")
    assert await got(objects, new) == b"fresh"
    await objects.close()


async def test_a_deletion_fences_every_shard_before_it_looks_and_for_good() -> None:
    world, objects, buckets = world_of()
    bucket = await buckets.create(ANNE, "b", region="eu-fr-1")
    fenced: list[tuple[list[int], bool]] = []
    real_fence = world.ring.fence

    async def fence(
        scope: bytes, shards: Sequence[int], nonce: bytes, *, final: bool = False, lends: bool = False
    ) -> bool:
        fenced.append((list(shards), final))
        return await real_fence(scope, shards, nonce, final=final, lends=lends)

    world.ring.fence = fence  # type: ignore[method-assign]
    await buckets.delete(bucket)
    assert len(bucket.shard_numbers) > 1
    assert fenced == [(list(bucket.shard_numbers), False), (list(bucket.shard_numbers), True)]
    await objects.close()


async def test_a_put_that_slips_in_before_the_fence_saves_the_bucket() -> None:
    world, objects, buckets = world_of()
    bucket = await buckets.create(ANNE, "b", region="eu-fr-1")

    async def slip_in(name: RegisterName) -> None:
        assert name.table == Table.SYSTEM
        await put(objects, bucket, b"precious")

    world.ring.interfere = slip_in
    with pytest.raises(BucketNotEmpty):
        await buckets.delete(bucket)
    assert not world.ring.fences
    again = await buckets.get("b")
    assert (again.id, again.state, again.nonce) == (bucket.id, "active", b"")
    assert await got(objects, again) == b"precious"
    await put(objects, again, b"more")
    await objects.close()


@pytest.mark.parametrize("error", [CopyUnreadable, DataDamaged])
async def test_a_key_that_cannot_be_settled_keeps_its_bucket_and_does_not_keep_it_closed(
    error: type[ServiceUnavailable], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its copies may be gone for ever. The bucket would take no writes for ever."""
    _world, objects, buckets = world_of()
    bucket = await buckets.create(ANNE, "b", region="eu-fr-1")
    plane = buckets._plane
    list_page = plane.scanner.list_page

    async def page(query: PageQuery) -> ListPage:
        if query.after_fence:
            raise error
        return await list_page(query)

    monkeypatch.setattr(plane.scanner, "list_page", page)
    with pytest.raises(SlowDown):
        await buckets.delete(bucket)
    again = await buckets.get("b")
    assert (again.id, again.state, again.nonce) == (bucket.id, "active", b"")
    await put(objects, again, b"more")
    await objects.close()


async def test_a_fence_that_a_replica_still_has_is_remembered_until_it_is_lifted() -> None:
    world, _, buckets = world_of()
    bucket = await buckets.create(ANNE, "photos", region="eu-fr-1")
    reopened = await buckets._step(bucket, msgspec.structs.replace(bucket, nonce=b"n" * 16))
    assert reopened is not None
    world.ring.replica_away = True
    assert (await buckets.resume(reopened) or bucket).nonce == b"n" * 16
    world.ring.replica_away = False
    assert (await buckets.resume(reopened) or reopened).nonce == b""


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("step", ["fence", "unfence", "fence-final"])
async def test_a_deletion_that_was_interrupted_anywhere_is_finished_by_another_gateway(empty: bool, step: str) -> None:
    world, objects, buckets = world_of()
    bucket = await buckets.create(ANNE, "b", region="eu-fr-1")
    real_fence, real_unfence = world.ring.fence, world.ring.unfence

    async def fence(
        scope: bytes, shards: Sequence[int], nonce: bytes, *, final: bool = False, lends: bool = False
    ) -> bool:
        if step == ("fence-final" if final else "fence"):
            raise ServiceUnavailable
        if not empty and not final:
            await put(objects, bucket, b"slipped in")
        return await real_fence(scope, shards, nonce, final=final, lends=lends)

    async def unfence(scope: bytes, shards: Sequence[int], nonce: bytes) -> bool:
        raise ServiceUnavailable

    world.ring.fence = fence  # type: ignore[method-assign]
    if step == "unfence":
        world.ring.unfence = unfence  # type: ignore[method-assign]
    interrupted = (step == "fence") or (empty and step == "fence-final") or (not empty and step == "unfence")
    outcome = (await asyncio.gather(buckets.delete(bucket), return_exceptions=True))[0]
    assert isinstance(outcome, ServiceUnavailable if interrupted else type(None) if empty else BucketNotEmpty)
    world.ring.fence, world.ring.unfence = real_fence, real_unfence  # type: ignore[method-assign]
    other = BucketService(world.plane())
    for record in await other.every_bucket():
        await other.resume(record)
    if empty:
        with pytest.raises(NoSuchBucket):
            await other.get("b")
        with pytest.raises(NoSuchBucket):
            await put(objects, bucket, b"late") if bucket.id in world.ring.fences else await other.get("b")
    elif step != "fence":
        again = await other.get("b")
        assert (again.id, again.nonce) == (bucket.id, b"")
        assert await got(objects, again) == b"slipped in"
        await put(objects, again, b"more")
    await objects.close()


async def test_a_record_that_no_gateway_made_is_refused() -> None:
    world, _, buckets = world_of()
    users = UserService(world.plane())
    await buckets.create(ANNE, "b", region="eu-fr-1")
    name = system_name("bucket/b")
    value = world.ring.values[name]
    forged = encode(msgspec.structs.replace(decode(value.body, BucketRecord), owner=BEN.user_id))
    world.ring.values[name] = msgspec.structs.replace(value, body=forged)
    with pytest.raises(DataDamaged):
        await BucketService(world.plane()).get("b")
    world.ring.values[name] = msgspec.structs.replace(value, sequence=value.sequence + 1)  # an old record played back
    with pytest.raises(DataDamaged):
        await BucketService(world.plane()).get("b")
    world.ring.values[system_name("bucket/c")] = value  # under another name
    with pytest.raises(DataDamaged):
        await BucketService(world.plane()).get("c")
    anne, _ = await users.add("anne")
    user = system_name("user/" + anne.access_key)
    forged = encode(msgspec.structs.replace(decode(world.ring.values[user].body, UserRecord), user_id="c" * 64))
    world.ring.values[user] = msgspec.structs.replace(world.ring.values[user], body=forged)
    with pytest.raises(DataDamaged):
        await UserService(world.plane()).lookup(anne.access_key)


async def test_bucket_tags_are_sealed_and_kept_apart_from_deletion() -> None:
    world, _, buckets = world_of()
    bucket = await buckets.create(ANNE, "b", region="eu-fr-1")
    assert (await buckets.configuration(bucket)).get(TAGGING) is None
    await buckets.configure(bucket, TAGGING, lambda _: Tags({"team": "storage"}))
    assert (await buckets.configuration(bucket)).get(TAGGING) == Tags({"team": "storage"})
    assert b"storage" not in world.ring.values[system_name("bucket/b")].body
    await buckets.configure(bucket, TAGGING, lambda _: None)
    assert (await buckets.configuration(bucket)).get(TAGGING) is None
    await buckets.delete(bucket)
    with pytest.raises(NoSuchBucket):
        await buckets.configure(bucket, TAGGING, lambda _: Tags({}))


class Other(Message, frozen=True):
    text: str


OTHER = Kind("other", Other)


async def test_the_configuration_is_one_sealed_value_that_is_changed_by_compare_and_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kinds, "KINDS", (TAGGING, OTHER))
    world, _, buckets = world_of()
    elsewhere = BucketService(world.plane())
    bucket = await buckets.create(ANNE, "b", region="eu-fr-1")
    assert buckets.configuration_of(bucket) == NOTHING
    await asyncio.gather(
        buckets.configure(bucket, TAGGING, lambda _: Tags({"team": "storage"})),
        elsewhere.configure(bucket, OTHER, lambda _: Other("secret")),
    )
    found = await buckets.renewed("b")
    assert not found.plain
    configuration = buckets.configuration_of(found)
    assert configuration.get(TAGGING) == Tags({"team": "storage"})
    assert configuration.get(OTHER) == Other("secret")
    assert buckets.configuration_of(found) is configuration, "it is opened once"
    assert b"secret" not in world.ring.values[system_name("bucket/b")].body

    def refuse(before: Configuration) -> Other:
        assert before.get(OTHER) == Other("secret"), "it sees what there is"
        raise InvalidArgument

    with pytest.raises(InvalidArgument):
        await buckets.configure(bucket, OTHER, refuse)
    assert await buckets.configuration(bucket) == configuration
    await buckets.configure(bucket, OTHER, lambda _: None)
    assert (await buckets.renewed("b")).plain
    with pytest.raises(InvalidRequest, match="256 KiB"):
        await buckets.configure(bucket, OTHER, lambda _: Other("x" * 262_144))


async def test_a_gateway_refuses_a_bucket_that_a_newer_one_has_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    """It could not honour it. A configuration that was moved to another bucket does not open."""
    _, _, buckets = world_of()
    first = await buckets.create(ANNE, "b", region="eu-fr-1")
    other = await buckets.create(ANNE, "c", region="eu-fr-1")
    with monkeypatch.context() as newer:
        newer.setattr(kinds, "KINDS", (TAGGING, OTHER))
        await buckets.configure(first, OTHER, lambda _: Other("x"))
    _, _, older = world_of()
    with pytest.raises(ServiceUnavailable, match="other"):
        older._plane.configurations.of(await buckets.renewed("b"))
    moved = msgspec.structs.replace(other, configuration=(await buckets.renewed("b")).configuration)
    with pytest.raises(DataDamaged):
        buckets.configuration_of(moved)


async def test_a_bucket_that_stays_keeps_its_configuration_and_a_deleted_one_leaves_none() -> None:
    world, objects, buckets = world_of()
    bucket = await buckets.create(ANNE, "b", region="eu-fr-1")
    await put(objects, bucket, b"data")
    await buckets.configure(bucket, TAGGING, lambda _: Tags({"a": "b"}))
    with pytest.raises(BucketNotEmpty):
        await buckets.delete(bucket)  # of a record from before the change
    assert (await buckets.configuration(bucket)).get(TAGGING) == Tags({"a": "b"})
    await objects.delete(bucket, b"key")
    await buckets.delete(bucket)
    assert decode(world.ring.values[system_name("bucket/b")].body, BucketRecord).configuration == b""


async def test_tags_of_a_record_from_before_there_were_configurations_are_read_and_move_there() -> None:
    world, _, buckets = world_of()
    bucket = await buckets.create(ANNE, "b", region="eu-fr-1")
    sealed = world.keys.seal_secret(encode({"a": "b"}), (b"bucket tags", bucket.id))
    await buckets._amend(bucket, lambda found: msgspec.structs.replace(found, tags=sealed))
    old = await buckets.renewed("b")
    assert buckets.configuration_of(old).get(TAGGING) == Tags({"a": "b"})
    await buckets.set_owner(old, BEN.user_id)
    assert (await buckets.configuration(bucket)).get(TAGGING) == Tags({"a": "b"})
    await buckets.configure(bucket, TAGGING, lambda _: Tags({"a": "c"}))
    new = await buckets.renewed("b")
    assert (new.tags, buckets.configuration_of(new).get(TAGGING)) == (b"", Tags({"a": "c"}))


async def test_a_bucket_of_three_french_racks_beside_a_german_one_works_and_none_of_its_registers_leaves_france() -> (
    None
):
    layout = layout_of((2, 2, 2, 2))
    german = msgspec.structs.replace(layout.nodes[3], location="DE/sited/d")
    world = World(msgspec.structs.replace(layout, nodes=(*layout.nodes[:3], german)))
    plane = world.plane()
    objects, buckets = ObjectService(plane), BucketService(plane)
    bucket = await buckets.create(ANNE, "fr", region="eu-fr-1", countries=("FR",))
    assert len(bucket.shard_numbers) == 16
    keys = sorted(b"key-%d" % number for number in range(60))
    for key in keys:
        await put(objects, bucket, b"data of " + key, key=key)
        assert await got(objects, bucket, key=key) == b"data of " + key
    assert list((await objects.list_objects(bucket)).keys) == keys
    upload = await objects.create_upload(bucket, b"many", NewMeta(), owner="o")
    await objects.put_part(bucket, b"many", upload.upload_id, 1, pieces(b"x" * 9000), BodyChecks(size=9000))
    uploads, _, _ = await objects.list_uploads(bucket)
    assert [found.upload_id for found in uploads] == [upload.upload_id]
    for row in world.ring.values:
        if row.table != Table.SYSTEM:
            assert row.shard in bucket.shard_numbers
            assert all(
                world.layouts.current.country_of(disk) == "FR"
                for disk in world.layouts.current.replicas_of(row.partition)
            )
    for key in keys:
        await objects.delete(bucket, key)
    await buckets.delete(bucket)
    await objects.close()


async def test_countries_that_the_ring_does_not_cover_are_refused() -> None:
    _, _, buckets = world_of()
    assert (await buckets.create(ANNE, "fr", region="eu-fr-1", countries=("FR",))).countries == ("FR",)
    with pytest.raises(ServiceUnavailable):
        await buckets.create(ANNE, "de", region="eu-fr-1", countries=("DE",))
    for outside in ("GB", "US", "fr", "NC", ""):
        with pytest.raises(InvalidArgument):
            await buckets.create(ANNE, "outside", region="eu-fr-1", countries=("FR", outside))


async def test_users_are_found_by_access_key_until_they_are_removed() -> None:
    world = World(user_cache_s=0.0)
    users = UserService(world.plane())
    anne, secret = await users.add("anne", email="anne@example.org")
    assert len(anne.user_id) == 64
    assert await users.lookup(anne.access_key) == (anne, secret)
    assert secret.encode() not in b"".join(value.body for value in world.ring.values.values())
    ben, ben_secret = await users.add("ben", access_key="BENKEY", secret_key="bensecret")
    assert (ben.access_key, ben_secret) == ("BENKEY", "bensecret")
    assert {user.display_name for user in await users.list_users()} == {"anne", "ben"}
    for name, key in (
        ("anne", ""),
        ("", ""),
        ("  ", ""),
        (" dan", ""),
        ("x" * 200, ""),
        ("new", "no/slash"),
        ("carl", "BENKEY"),
    ):
        with pytest.raises(InvalidArgument):
            await users.add(name, access_key=key)
    with pytest.raises(InvalidArgument, match="64 hexadecimal"):
        await users.add("dan", user_id="anne")
    assert await users.remove("anne") == anne
    assert await users.remove("BENKEY") == ben
    for key in (anne.access_key, "BENKEY", "", "no such", "x" * 300):
        with pytest.raises(InvalidAccessKeyId):
            await users.lookup(key)
    with pytest.raises(InvalidArgument):
        await users.remove("anne")
    again, _ = await users.add("anne")
    assert again.user_id != anne.user_id
    heir, _ = await users.add("anne-2", user_id=anne.user_id)
    assert (heir.user_id, heir.access_key != anne.access_key) == (anne.user_id, True)


async def test_a_forged_claim_of_a_name_removes_nobody_else() -> None:
    """A claim is not authenticated: a storage node could make one that names somebody else's access key, and wait for
    the operator to remove the user.
    """
    world = World(user_cache_s=0.0)
    users = UserService(world.plane())
    anne, _ = await users.add("anne")
    await users.add("ben")
    await world.ring.change(system_name("username/ben"), lambda _value: Change(encode(NameClaim(anne.access_key, 0))))
    with pytest.raises(InvalidArgument):
        await users.remove("ben")
    assert (await users.lookup(anne.access_key))[0] == anne


async def test_a_name_claimed_by_a_gateway_that_died_is_free_after_a_while() -> None:
    world = World()
    users = UserService(world.plane())

    async def die(name: RegisterName) -> None:
        if name.key.startswith(b"user/"):
            raise ConnectionError
        world.ring.interfere = die

    world.ring.interfere = die
    with pytest.raises(ConnectionError):
        await users.add("anne")
    with pytest.raises(InvalidArgument):
        await users.add("anne")
    world.clock.wall += CLAIM_STALE_MS
    anne, _ = await users.add("anne")
    assert (await users.lookup(anne.access_key))[0] == anne


async def test_lookups_are_kept_for_a_moment_and_shared_while_they_load() -> None:
    world = World(user_cache_s=1.0)
    users = UserService(world.plane())
    anne, _ = await users.add("anne")
    reads = 0
    read = world.ring.read

    async def counted(name: RegisterName, *, want_payload: bool = False, settling_nonce: bytes = b"") -> object:
        nonlocal reads
        reads += 1
        return await read(name, want_payload=want_payload)

    world.ring.read = counted  # type: ignore[method-assign, assignment]
    await asyncio.gather(*(users.lookup(anne.access_key) for _ in range(50)))
    await users.lookup(anne.access_key)
    assert reads == 1
    world.clock.ahead_s += 1.1
    await users.lookup(anne.access_key)
    assert reads == 2
    await users.remove("anne")
    with pytest.raises(InvalidAccessKeyId):
        await users.lookup(anne.access_key)


class Spawned(list[asyncio.Task[None]]):
    """The background, as ``TtlCache`` knows it: what it was given."""

    def __call__(self, work: Coroutine[Any, Any, None]) -> bool:
        self.append(asyncio.create_task(work))
        return True


def not_spawned(work: Coroutine[Any, Any, None]) -> bool:
    work.close()
    return False


async def test_what_is_in_use_is_loaded_anew_once_before_it_expires_and_what_is_not_expires() -> None:
    clock, spawned, loads = LoopClock(), Spawned(), 0

    async def load(_key: str) -> int:
        nonlocal loads
        loads += 1
        if loads == 3:
            raise ServiceUnavailable
        return loads

    recent = TtlCache[str, int](clock, 1.0, 10, load, spawned)
    assert recent.try_get("key") is None
    assert await recent.get("key") == 1
    clock.ahead_s += 0.5
    assert recent.try_get("key") == 1
    assert not spawned
    clock.ahead_s += 0.2
    assert [recent.try_get("key") for _ in range(3)] == [1, 1, 1]
    assert await recent.get("key") == 1
    await asyncio.gather(*spawned)
    assert (len(spawned), recent.try_get("key")) == (1, 2)
    clock.ahead_s += 0.7  # after the end of the first
    assert recent.try_get("key") == 2
    await asyncio.gather(*spawned)
    assert (len(spawned), loads) == (2, 3)  # a failure reaches no caller, and the value lives as long as it would
    clock.ahead_s += 0.2
    assert recent.try_get("key") == 2
    await asyncio.gather(*spawned)
    assert recent.try_get("key") == 4
    clock.ahead_s += 1.1
    assert recent.try_get("key") is None


async def test_what_is_gone_when_it_is_loaded_anew_is_forgotten() -> None:
    clock, spawned, gone = LoopClock(), Spawned(), False

    async def load(_key: str) -> int:
        if gone:
            raise NoSuchBucket
        return 1

    recent = TtlCache[str, int](clock, 1.0, 10, load, spawned)
    await recent.get("key")
    clock.ahead_s += 0.7
    gone = True
    assert recent.try_get("key") == 1
    await asyncio.gather(*spawned)
    assert recent.try_get("key") is None


async def test_renewals_are_bounded_and_one_that_is_not_spawned_may_be_another_time() -> None:
    clock, spawned, spawns = LoopClock(), Spawned(), True
    hang = asyncio.Event()

    def spawn(work: Coroutine[Any, Any, None]) -> bool:
        return spawned(work) if spawns else not_spawned(work)

    async def load(key: str) -> str:
        if spawned:
            await hang.wait()
        return key

    recent = TtlCache[str, str](clock, 1.0, 1000, load, spawn)
    keys = [str(number) for number in range(3 * REFRESHES_MAX)]
    for key in keys:
        await recent.get(key)
    clock.ahead_s += 0.7
    spawns = False
    assert [recent.try_get(key) for key in keys] == keys
    spawns = True
    assert [recent.try_get(key) for key in keys] == keys
    assert len(spawned) == REFRESHES_MAX
    hang.set()
    await asyncio.gather(*spawned)
    assert [recent.try_get(key) for key in keys] == keys
    assert len(spawned) > REFRESHES_MAX
    await asyncio.gather(*spawned)


async def test_what_is_being_loaded_is_not_loaded_anew_besides() -> None:
    clock, spawned, loads = LoopClock(), Spawned(), 0

    async def load(_key: str) -> int:
        nonlocal loads
        loads += 1
        await asyncio.sleep(0.01)
        return loads

    recent = TtlCache[str, int](clock, 1.0, 10, load, spawned)
    await recent.get("key")
    clock.ahead_s += 0.7
    assert recent.try_get("key") == 1
    clock.ahead_s += 0.7  # it has expired before the renewal has begun
    assert await asyncio.gather(recent.get("key"), recent.get("key"), *spawned) == [2, 2, None]
    assert loads == 2


async def test_all_who_wait_for_a_load_end_when_they_are_cancelled_together_and_go_on_when_only_the_loader_is() -> None:
    loads = 0
    hang = asyncio.Event()

    async def load(_key: str) -> int:
        nonlocal loads
        loads += 1
        await hang.wait()
        return 1

    recent = TtlCache[str, int](LoopClock(), 1.0, 10, load, not_spawned)
    tasks = [asyncio.create_task(recent.get("key")) for _ in range(3)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    done, pending = await asyncio.wait(tasks, timeout=0.2)
    assert not pending
    assert all(task.cancelled() for task in done)
    tasks = [asyncio.create_task(recent.get("key")) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    hang.set()
    assert await asyncio.gather(*tasks[1:]) == [1, 1]
    assert loads == 3


async def test_a_bucket_is_handed_over_and_keeps_all_else() -> None:
    _, objects, buckets = world_of()
    made = await buckets.create(ANNE, "photos", region="eu-fr-1", countries=("FR",))
    await buckets.configure(made, TAGGING, lambda _: Tags({"a": "b"}))
    await buckets.set_owner(made, BEN.user_id)
    found = await buckets.get("photos")
    assert (found.owner, found.countries, found.id) == (BEN.user_id, ("FR",), made.id)
    assert (await buckets.configuration(found)).get(TAGGING) == Tags({"a": "b"})
    assert (await buckets.list_buckets(ANNE))[0] == []
    assert [bucket.name for bucket in (await buckets.list_buckets(BEN))[0]] == ["photos"]
    await buckets.delete(found)
    with pytest.raises(NoSuchBucket):
        await buckets.set_owner(found, ANNE.user_id)
    await objects.close()


async def test_usage_counts_every_object_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "PAGES_A_CALL", 2)
    monkeypatch.setattr(usage, "VERSIONS_A_PAGE", 3)
    _, objects, buckets = world_of()
    bucket = await buckets.create(ANNE, "photos", region="eu-fr-1")
    sizes = [0, 1, 10, 100, 3000, 20_000, 5, 7, 9, 11]
    for number, size in enumerate(sizes):
        await put(objects, bucket, bytes(size), key=b"k%02d" % number)
    pieces_found, after = [], ""
    while True:
        piece = await usage.usage_after(objects, bucket, after)
        pieces_found.append(piece)
        if piece.next_after is None:
            break
        after = piece.next_after
    assert len(pieces_found) >= 2
    assert max(piece.versions for piece in pieces_found) <= 6
    assert sum(piece.objects for piece in pieces_found) == len(sizes)
    assert sum(piece.size_bytes for piece in pieces_found) == sum(sizes)
    await objects.close()


async def test_open_uploads_end_with_their_bucket_and_their_parts_go_to_the_garbage_lists() -> None:
    world, objects, buckets = world_of()
    bucket = await buckets.create(ANNE, "b", region="eu-fr-1")
    for key, parts in ((b"one", 3), (b"other", 1), (b"none", 0)):
        upload = await objects.create_upload(bucket, key, NewMeta(), owner="o")
        for number in range(1, parts + 1):
            await objects.put_part(
                bucket, key, upload.upload_id, number, pieces(bytes(9000 * number)), BodyChecks(size=9000 * number)
            )
    held = {fragment.data_id for disk in world.disks.disks.values() for fragment in disk.fragments}
    assert len(held) == 4
    await buckets.delete(bucket)
    await objects.plane.background.settle()
    assert {data_id for disk in world.disks.disks.values() for data_id in disk.garbage} == held
    with pytest.raises(NoSuchBucket):
        await objects.create_upload(bucket, b"late", NewMeta(), owner="o")
    await objects.close()


async def test_what_can_not_be_retired_of_a_deleted_bucket_is_left_to_the_sweep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, objects, buckets = world_of()
    bucket = await buckets.create(ANNE, "b", region="eu-fr-1")
    upload = await objects.create_upload(bucket, b"key", NewMeta(), owner="o")
    await objects.put_part(bucket, b"key", upload.upload_id, 1, pieces(bytes(9000)), BodyChecks(size=9000))
    list_page = world.ring.list_page

    async def fail(wanted: PageQuery) -> ListPage:
        if wanted.table == Table.PART:
            raise ServiceUnavailable
        return await list_page(wanted)

    monkeypatch.setattr(world.ring, "list_page", fail)
    await buckets.delete(bucket)
    await objects.plane.background.settle()
    assert not any(disk.garbage for disk in world.disks.disks.values())
    assert await buckets.every_bucket() == []
    await objects.close()
