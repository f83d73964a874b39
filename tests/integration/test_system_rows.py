"""A row of a bucket or a user that can't be used harms its owner alone, is named, and is healed where a majority holds
a good one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import msgspec
import pytest

from storaged.admin.status import Durability, Facts, judge
from storaged.errors import (
    DataDamaged,
    InvalidAccessKeyId,
    InvalidArgument,
    NoSuchUpload,
    ServiceUnavailable,
    SystemRecordDamaged,
)
from storaged.meta.names import SYSTEM_SCOPE, Change, RegisterName, Table, Value, Visibility, system_name, upload_name
from storaged.meta.store_ports import StoreBatch
from storaged.node.housekeeping import check_records, tidy
from storaged.objects.api import BodyChecks, NewMeta
from storaged.objects.bad_rows import BAD_ROWS_MAX, BadRows
from storaged.objects.configuration.kinds import TAGGING, Tags
from storaged.objects.records import BucketRecord
from storaged.objects.service import ObjectService
from storaged.objects.system.buckets import BucketService
from storaged.objects.system.users import NameClaim, UserService
from storaged.objects.upload_records import UploadRecord
from storaged.objects.user_records import UserRecord
from storaged.objects.write.uploads import parse_upload_id
from storaged.wire import decode, encode
from tests.doubles.layouts import layout_of
from tests.integration.memory_cluster import WHO, Cluster, run
from tests.unit.test_objects_buckets import ANNE, BEN, world_of
from tests.worlds.objects import World, pieces

pytestmark = pytest.mark.virtual_time

Forge = Callable[[bytes], bytes]


def another_owner(body: bytes) -> bytes:
    return encode(msgspec.structs.replace(decode(body, BucketRecord), owner=ANNE.user_id))


FORGED: dict[str, Forge] = {
    "of no message": lambda _body: b"\xc1 noise",
    "cut": lambda body: body[: len(body) // 2],
    "of another type": lambda _body: encode({"name": "ben"}),
    "with another owner": another_owner,
    "of a bucket with another name": lambda body: encode(
        msgspec.structs.replace(decode(body, BucketRecord), name="other")
    ),
    "ending before its authenticator": lambda body: encode(decode(body, list)[:7]),
    "with an empty authenticator": lambda body: encode(
        msgspec.structs.replace(decode(body, BucketRecord), authenticator=b"")
    ),
}


def overwrite(world: World, path: str, forge: Forge) -> None:
    name = system_name(path)
    value = world.ring.values[name]
    world.ring.values[name] = msgspec.structs.replace(value, body=forge(value.body))


@pytest.mark.parametrize("how", FORGED)
async def test_a_forged_bucket_stops_neither_lists_nor_creations_nor_housekeeping_and_status_names_it(how: str) -> None:
    world, objects, buckets = world_of()
    users = UserService(objects.plane)
    for name in ("a", "m", "z"):
        await buckets.create(ANNE, f"{name}-anne", region="r")
        await buckets.create(BEN, f"{name}-ben", region="r")
    overwrite(world, "bucket/m-ben", FORGED[how])
    buckets.forget("m-ben")
    assert [found.name for found in (await buckets.list_buckets(ANNE))[0]] == ["a-anne", "m-anne", "z-anne"]
    assert [found.name for found in (await buckets.list_buckets(BEN))[0]] == ["a-ben", "z-ben"]
    await buckets.create(ANNE, "new", region="r")
    await tidy(objects.plane, buckets)
    await check_records(buckets, users)
    with pytest.raises(DataDamaged):
        await buckets.get("m-ben")
    with pytest.raises(DataDamaged):
        await buckets.create(ANNE, "m-ben", region="r")
    ((name, reason),) = objects.plane.bad_rows.listed()
    assert name == "bucket/m-ben"
    assert "record of this bucket" in reason
    facts = Facts(layout_of(), (), "4+2", durability=Durability(), bad_records=objects.plane.bad_rows.listed())
    found = judge(facts, 1)
    assert found["verdict"] != "HEALTHY"
    assert [entry["subject"] for entry in found["problems"] if entry["code"] == SystemRecordDamaged.code] == [
        "bucket/m-ben"
    ]


async def test_a_row_whose_key_is_no_text_is_passed_over() -> None:
    world, objects, buckets = world_of()
    await buckets.create(ANNE, "photos", region="r")
    name = RegisterName(Table.SYSTEM, SYSTEM_SCOPE, 0, b"bucket/\xff\xfe\n")
    world.ring.values[name] = Value(1, b"o" * 16, Visibility.LIVE, b"noise")
    assert [found.name for found in await buckets.every_bucket()] == ["photos"]
    assert [found.name for found in (await buckets.list_buckets(ANNE))[0]] == ["photos"]
    assert [row.name for row in objects.plane.bad_rows.listed()] == ["bucket/\\\\xff\\\\xfe\\n"]


async def test_a_row_that_is_good_again_is_named_no_longer() -> None:
    world, objects, buckets = world_of()
    await buckets.create(ANNE, "photos", region="r")
    before = dict(world.ring.values)
    overwrite(world, "bucket/photos", FORGED["cut"])
    assert await buckets.every_bucket() == []
    assert len(objects.plane.bad_rows) == 1
    world.ring.values = before
    assert [found.name for found in await buckets.every_bucket()] == ["photos"]
    assert len(objects.plane.bad_rows) == 0


async def test_a_forged_user_is_refused_alone_and_can_be_removed_and_made_anew() -> None:
    world, objects, _ = world_of()
    users = UserService(objects.plane)
    for name in ("anne", "ben", "carl"):
        await users.add(name, access_key=f"AK-{name}")
    overwrite(
        world,
        "user/AK-ben",
        lambda body: encode(msgspec.structs.replace(decode(body, UserRecord), user_id=ANNE.user_id)),
    )
    assert [user.access_key for user in await users.list_users()] == ["AK-anne", "AK-carl"]
    assert (await users.lookup("AK-anne"))[0].display_name == "anne"
    with pytest.raises(DataDamaged):
        await users.lookup("AK-ben")
    assert [row.name for row in objects.plane.bad_rows.listed()] == ["user/AK-ben"]
    await users.remove("AK-ben")
    assert len(objects.plane.bad_rows) == 0
    world.clock.wall += 10**9
    await users.add("ben", access_key="AK-ben")
    assert (await users.lookup("AK-ben"))[0].display_name == "ben"


async def test_a_damaged_claim_of_a_name_is_named_and_frees_the_name_only_of_nobody() -> None:
    world, objects, buckets = world_of()
    users = UserService(objects.plane)
    await users.add("anne", access_key="AK-anne")
    await users.add("ben", access_key="AK-ben")
    overwrite(world, "username/anne", FORGED["of no message"])
    world.ring.values[system_name("username/carl")] = Value(1, b"o" * 16, Visibility.LIVE, b"noise")
    await check_records(buckets, users)
    assert [row.name for row in objects.plane.bad_rows.listed()] == ["username/anne", "username/carl"]
    with pytest.raises(InvalidArgument):
        await users.add("anne")
    await users.add("carl", access_key="AK-carl")
    await users.remove("AK-anne")
    assert world.ring.values[system_name("username/anne")].visibility == Visibility.TOMBSTONE
    assert decode(world.ring.values[system_name("username/carl")].body, NameClaim).access_key == "AK-carl"
    assert [user.display_name for user in await users.list_users()] == ["ben", "carl"]


async def test_one_bad_row_of_an_upload_hides_no_other_and_keeps_none_from_being_forgotten() -> None:
    world, objects, buckets = world_of(upload_keep_ms=0)
    bucket = await buckets.create(ANNE, "b", region="r")
    uploads = {key: await objects.create_upload(bucket, key, NewMeta(), owner="o") for key in (b"a", b"m", b"z")}
    await objects.put_part(bucket, b"z", uploads[b"z"].upload_id, 1, pieces(b"x" * 9000), BodyChecks(size=9000))
    row = upload_name(bucket.id, b"m", parse_upload_id(uploads[b"m"].upload_id))
    value = world.ring.values[row]
    record = decode(value.body, UploadRecord)
    victim = parse_upload_id(uploads[b"z"].upload_id)
    for forged in (
        b"\xc1",
        encode(msgspec.structs.replace(record, upload_id=b"short")),
        encode(msgspec.structs.replace(record, wrapped_key=bytes(112))),
        encode(msgspec.structs.replace(record, upload_id=victim, state="aborted", changed_ms=0)),
    ):
        world.ring.values[row] = msgspec.structs.replace(value, body=forged)
        found, _, more = await objects.list_uploads(bucket)
        assert [(upload.key, more) for upload in found] == [(b"a", None), (b"z", None)]
        before = objects.plane.counters.uploads_unreadable
        assert await tidy(objects.plane, buckets) == 0
        assert objects.plane.counters.uploads_unreadable >= before
    assert len((await objects.list_parts(bucket, b"z", uploads[b"z"].upload_id))[1]) == 1, (
        "parts go by the upload of their own row"
    )
    await objects.abort(bucket, b"a", uploads[b"a"].upload_id)
    await objects.plane.background.settle()
    world.clock.wall += 10
    assert await tidy(objects.plane, buckets) == 1
    with pytest.raises(NoSuchUpload):
        await objects.list_parts(bucket, b"a", uploads[b"a"].upload_id)
    await objects.close()


def test_what_is_remembered_of_bad_rows_is_bounded() -> None:
    bad = BadRows()
    for number in range(2 * BAD_ROWS_MAX):
        bad.note(b"bucket/%d" % number, "cut")
    assert len(bad) == BAD_ROWS_MAX
    bad.note(b"user/" + os.urandom(2000), "cut")
    assert all(len(row.name) < 600 for row in bad.listed())


# --- on a whole ring


async def forge_at(cluster: Cluster, disks: list[str], name: RegisterName, forge: Forge) -> None:
    """These disks hold another value under the ballot of the one that was chosen."""
    for disk in disks:
        slot = cluster.meta(disk).get(name)
        assert slot is not None
        forged = msgspec.structs.replace(slot.value, body=forge(slot.value.body))
        await cluster.meta(disk).commit(StoreBatch([slot._replace(value=forged)]))


@pytest.mark.parametrize("liar", range(3))
@pytest.mark.parametrize("how", ["of no message", "with another owner"])
def test_what_one_replica_holds_instead_is_healed_from_the_others(liar: int, how: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.bucket("other")
        name = system_name("bucket/bucket")
        disks = list(cluster.layouts.current.seeds)
        await forge_at(cluster, [disks[liar]], name, FORGED[how])
        gateway = cluster.new_gateway("h")
        assert [found.name for found in (await gateway.buckets.list_buckets(WHO))[0]][-1] == "other"
        assert await gateway.buckets.get("bucket") == msgspec.structs.replace(
            await cluster.buckets.get("bucket"), authenticator=(await gateway.buckets.get("bucket")).authenticator
        )
        await cluster.pass_s(400)  # gateways compare all rows of the system partition, those of the third replica too
        held = {cluster.meta(disk).get(name).value for disk in disks}  # type: ignore[union-attr]
        assert {decode(value.body, BucketRecord).owner for value in held} == {WHO.user_id}
        assert gateway.objects.plane.bad_rows.listed() == []
        assert (await gateway.buckets.get("bucket")).id == bucket.id

    run(scenario)


async def forge_above(cluster: Cluster, disk: str, name: RegisterName, forge: Callable[[Value], Value]) -> None:
    """A disk's own node writes there what it likes, under a ballot above all."""
    slot = cluster.meta(disk).get(name)
    assert slot is not None
    ballot = slot.ballot._replace(counter=slot.ballot.counter + 10_000_000, node="na", incarnation=b"incarnat")
    await cluster.meta(disk).commit(StoreBatch([slot._replace(ballot=ballot, value=forge(slot.value))]))


ABOVE: dict[str, Callable[[Value], Value]] = {
    "noise": lambda value: msgspec.structs.replace(value, body=b"noise", sequence=value.sequence + 5),
    "a deletion": lambda value: msgspec.structs.replace(
        value, visibility=Visibility.TOMBSTONE, sequence=value.sequence + 1
    ),
    "an empty deletion": lambda value: msgspec.structs.replace(value, body=b"", visibility=Visibility.TOMBSTONE),
    "another owner": lambda value: msgspec.structs.replace(value, body=another_owner(value.body)),
    "the record at another sequence number": lambda value: msgspec.structs.replace(value, sequence=value.sequence + 1),
}


@pytest.mark.parametrize("liar", range(3))
@pytest.mark.parametrize("what", ABOVE)
def test_what_one_replica_forges_above_all_ballots_is_carried_to_no_other(liar: int, what: str) -> None:
    """Where it counted as the newest, a gateway that brings the replicas together would write it everywhere."""

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.bucket("other")
        name, disks = system_name("bucket/bucket"), list(cluster.layouts.current.seeds)
        await forge_above(cluster, disks[liar], name, ABOVE[what])
        gateway = cluster.new_gateway("h")
        await gateway.scanner.catch_up(Table.SYSTEM, SYSTEM_SCOPE, 0)
        assert (await gateway.buckets.get("bucket")).id == bucket.id
        assert [found.name for found in (await gateway.buckets.list_buckets(WHO))[0]] == ["bucket", "other"]
        await gateway.buckets.configure(bucket, TAGGING, lambda _: Tags({"a": "b"}))
        await cluster.pass_s(400)
        held = [cluster.meta(disk).get(name) for disk in disks]
        assert len({slot.value for slot in held if slot is not None}) == 1
        assert (await gateway.buckets.get("bucket")).owner == WHO.user_id
        assert gateway.objects.plane.bad_rows.listed() == []
        assert liar == 2 or gateway.ring.statistics().doubted > 0

    run(scenario)


@pytest.mark.parametrize("liar", range(2))
@pytest.mark.parametrize("path", ["user/AK-anne", "username/anne"])
@pytest.mark.parametrize("what", ["noise", "a deletion", "an empty deletion", "the record at another sequence number"])
def test_neither_a_user_nor_a_name_goes_or_comes_back_by_what_one_replica_says(liar: int, path: str, what: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        users = UserService(cluster.objects.plane)
        await users.add("anne", access_key="AK-anne")
        name, disks = system_name(path), list(cluster.layouts.current.seeds)
        alive = cluster.meta(disks[liar]).get(name)
        assert alive is not None
        third = cluster.layouts.current.node_of(disks[2])

        async def brought_together() -> None:
            """First without the third replica: two that differ are no majority of either, unless
            what one says counts.
            """
            await cluster.kill(third)
            with contextlib.suppress(ServiceUnavailable):
                await cluster.gateway.ring.settle(name)
            cluster.start(third)
            await cluster.pass_s(400)

        await forge_above(cluster, disks[liar], name, ABOVE[what])
        await brought_together()
        users.forget("AK-anne")
        assert (await users.lookup("AK-anne"))[0].display_name == "anne"
        with pytest.raises(InvalidArgument):
            await users.add("anne")
        await users.remove("anne")
        late = msgspec.structs.replace(alive.value, sequence=alive.value.sequence + 10)
        await forge_above(cluster, disks[liar], name, lambda _value: late)
        await brought_together()
        assert await users.list_users() == []
        await users.add("anne", access_key="AK-anne")

    run(scenario)


def test_a_removal_from_before_it_was_authentic_stays_one() -> None:
    async def scenario(cluster: Cluster) -> None:
        users = UserService(cluster.objects.plane)
        await users.add("anne", access_key="AK-anne")
        for path in ("user/AK-anne", "username/anne"):
            await cluster.gateway.ring.change(system_name(path), lambda _value: Change(b"", Visibility.TOMBSTONE))
        await cluster.pass_s(700)
        assert await users.list_users() == []
        with pytest.raises(InvalidAccessKeyId):
            await users.lookup("AK-anne")
        await users.add("anne", access_key="AK-anne")
        assert (await users.lookup("AK-anne"))[0].display_name == "anne"

    run(scenario)


def test_a_forged_row_with_a_replica_away_stops_its_own_register_alone() -> None:
    """Whether the replica that is away has a newer one can't be known: nothing is rolled back."""

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.bucket("other")
        name, disks = system_name("bucket/bucket"), list(cluster.layouts.current.seeds)
        await forge_above(cluster, disks[0], name, ABOVE["noise"])
        await cluster.kill(cluster.layouts.current.node_of(disks[1]))
        gateway = cluster.new_gateway("h")
        with pytest.raises(ServiceUnavailable):
            await gateway.buckets.get("bucket")
        assert (await gateway.buckets.get("other")).name == "other"
        cluster.start(cluster.layouts.current.node_of(disks[1]))
        await cluster.pass_s(30)
        assert (await gateway.buckets.get("bucket")).id == bucket.id

    run(scenario)


def test_a_user_whose_record_a_majority_forged_can_be_removed_and_made_anew() -> None:
    async def scenario(cluster: Cluster) -> None:
        users = UserService(cluster.objects.plane)
        await users.add("anne", access_key="AK-anne")
        name, disks = system_name("user/AK-anne"), list(cluster.layouts.current.seeds)
        for disk in disks[:2]:
            await forge_above(cluster, disk, name, ABOVE["noise"])
        users.forget("AK-anne")
        with pytest.raises(DataDamaged):
            await users.lookup("AK-anne")
        await users.remove("AK-anne")
        await cluster.pass_s(700)
        await users.add("anne", access_key="AK-anne")
        assert (await users.lookup("AK-anne"))[0].display_name == "anne"

    run(scenario)


def test_what_a_majority_holds_is_not_healed_and_a_deletion_is_not_undone() -> None:
    async def scenario(cluster: Cluster) -> None:
        await cluster.bucket()
        await cluster.bucket("other")
        name, disks = system_name("bucket/bucket"), list(cluster.layouts.current.seeds)
        await forge_at(cluster, disks[:2], name, FORGED["with another owner"])
        gateway = cluster.new_gateway("h")
        assert [found.name for found in await gateway.buckets.every_bucket()] == ["other"]
        with pytest.raises(DataDamaged):
            await gateway.buckets.get("bucket")
        assert [row.name for row in gateway.objects.plane.bad_rows.listed()] == ["bucket/bucket"]

    run(scenario)


async def test_services_share_what_is_known_of_bad_rows() -> None:
    world = World(None)
    plane = world.plane()
    assert ObjectService(plane).plane.bad_rows is BucketService(plane)._plane.bad_rows
