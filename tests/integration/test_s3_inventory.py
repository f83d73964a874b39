"""Inventories over HTTP, and the worker that makes them: what is listed, where it goes, and who may stop it.

Sources: https://docs.aws.amazon.com/AmazonS3/latest/userguide/storage-inventory.html and the pages below it.
"""

from __future__ import annotations

import asyncio
import base64
import csv
import gzip
import hashlib
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from urllib.parse import unquote

import pytest
import pytest_asyncio

from storaged.clock import SystemClock
from storaged.errors import DataDamaged, QuotaExceeded, ServiceUnavailable
from storaged.meta.names import RegisterName, Table
from storaged.meta.ports import PageQuery
from storaged.objects.code.lifecycle import DAY_MS
from storaged.objects.code.version_walk import every_entry
from storaged.objects.configuration.inventory import INVENTORY
from storaged.objects.identity import account_of
from storaged.objects.inventory import listing
from storaged.objects.inventory.rows import digest_of, drop_all_but, read_state
from storaged.objects.records import BucketRecord
from storaged.s3 import inventories
from storaged.s3.inventories import InventoryWorker, describe
from storaged.s3.ops import inventory
from tests.integration.s3_front import ACCESS_ALT, SECRET_ALT, World, s3_world
from tests.integration.test_s3_access import allow, policy
from tests.integration.test_s3_front import refused

ALL_FIELDS = [
    "Size", "LastModifiedDate", "ETag", "StorageClass", "IsMultipartUploaded", "ReplicationStatus", "EncryptionStatus",
    "ObjectLockRetainUntilDate", "ObjectLockMode", "ObjectLockLegalHoldStatus", "IntelligentTieringAccessTier",
    "BucketKeyStatus", "ChecksumAlgorithm", "ObjectAccessControlList", "ObjectOwner", "LifecycleExpirationDate",
]  # fmt: skip


class MovedClock(SystemClock):
    """A test moves the wall clock, and lets a pause be over."""

    ahead_ms = 0
    ahead_s = 0.0

    def wall_ms(self) -> int:
        return super().wall_ms() + self.ahead_ms

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead_s


def moved(world: World) -> MovedClock:
    clock = MovedClock()
    world.objects.plane.clock = clock
    return clock


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with s3_world() as world:
        yield world


def worker_of(world: World, **bounds: int) -> InventoryWorker:
    return InventoryWorker(world.app.front, world.objects.plane, world.buckets, **bounds)


async def run(work: Callable[[Any], Any], world: World) -> Any:
    return await asyncio.to_thread(work, world.client())


async def works(worker: InventoryWorker) -> int:
    """Until nothing is left to do; how many visits that took."""
    visits = 1
    while await worker.once():
        visits += 1
        assert visits < 1000
    return visits


def wanted(name: str = "daily", **more: Any) -> dict[str, Any]:
    to = {"Bucket": "arn:aws:s3:::target", "Format": more.pop("Format", "CSV"), **more.pop("to", {})}
    return {
        "Id": name,
        "IsEnabled": True,
        "IncludedObjectVersions": "Current",
        "Schedule": {"Frequency": "Daily"},
        "Destination": {"S3BucketDestination": to},
        **more,
    }


def put(client: Any, configuration: dict[str, Any], name: str = "") -> None:
    client.put_bucket_inventory_configuration(
        Bucket="bucket", Id=name or configuration["Id"], InventoryConfiguration=configuration
    )


def grants(prefix: str = "", **condition: Any) -> str:
    more = {"Condition": condition} if condition else {}
    return policy(allow("s3:PutObject", f"arn:aws:s3:::target/{prefix}*", {"Service": "s3.amazonaws.com"}, **more))


def made(client: Any, *, allowed: bool = True, **more: Any) -> Any:
    client.create_bucket(Bucket="bucket", **more)
    client.create_bucket(Bucket="target")
    if allowed:
        client.put_bucket_policy(Bucket="target", Policy=grants())
    return client


class Report:
    """A report in the target, all of which is checked."""

    def __init__(self, world_files: dict[bytes, bytes], folder: str = "bucket/daily") -> None:
        self.keys = [key.decode() for key in world_files if key.startswith(folder.encode())]
        (name,) = [key for key in self.keys if key.endswith("manifest.json")]
        text = world_files[name.encode()]
        checksum = name.removesuffix(".json") + ".checksum"
        assert world_files[checksum.encode()] == hashlib.md5(text).hexdigest().encode()
        self.name, self.manifest = name, json.loads(text)
        self.files: list[bytes] = []
        for file in self.manifest["files"]:
            data = world_files[file["key"].encode()]
            assert (len(data), hashlib.md5(data).hexdigest()) == (file["size"], file["MD5checksum"])
            assert file["key"].startswith(f"{folder}/data/")
            self.files.append(data)
        (links,) = [key for key in self.keys if key.endswith("symlink.txt")]
        named = [f"s3://target/{file['key']}" for file in self.manifest["files"]]
        assert world_files[links.encode()].decode().split() == named

    def rows(self) -> list[dict[str, str]]:
        """Of CSV; keys decoded."""
        columns = self.manifest["fileSchema"].split(", ")
        found = []
        for data in self.files:
            for row in csv.reader(io.StringIO(gzip.decompress(data).decode())):
                one = dict(zip(columns, row, strict=True))
                found.append(one | {"Key": unquote(one["Key"])})
        return found


async def report(world: World, folder: str = "bucket/daily") -> Report:
    return Report(await world.stored("target"), folder)


async def rows_left(world: World) -> int:
    bucket = await world.buckets.get("bucket")
    query = PageQuery(Table.INVENTORY, bucket.id, bucket.shard_numbers)
    return len((await world.objects.plane.scanner.list_page(query)).rows)


# --- configurations ---------------------------------------------------------------------------------------------------


async def test_configurations_are_stored_returned_listed_and_removed(world: World) -> None:
    def play(client: Any) -> None:
        made(client)
        get, get_all = client.get_bucket_inventory_configuration, client.list_bucket_inventory_configurations
        none = (404, "NoSuchConfiguration")
        assert refused(get, Bucket="bucket", Id="daily") == none
        assert "InventoryConfigurationList" not in get_all(Bucket="bucket")
        full = wanted(
            "full",
            IsEnabled=False,
            IncludedObjectVersions="All",
            Schedule={"Frequency": "Weekly"},
            Filter={"Prefix": "a/"},
            OptionalFields=["ETag", "Size", "ObjectLockEventHoldStatus"],
            to={"Prefix": "lists", "AccountId": "123456789012", "Encryption": {"SSES3": {}}},
        )
        put(client, full)
        put(client, wanted())
        assert get(Bucket="bucket", Id="full")["InventoryConfiguration"] == full
        assert get(Bucket="bucket", Id="daily")["InventoryConfiguration"] == wanted()
        assert get_all(Bucket="bucket")["InventoryConfigurationList"] == [wanted(), full]
        put(client, wanted(IsEnabled=False))
        assert get(Bucket="bucket", Id="daily")["InventoryConfiguration"] == wanted(IsEnabled=False)
        client.delete_bucket_inventory_configuration(Bucket="bucket", Id="daily")
        assert refused(client.delete_bucket_inventory_configuration, Bucket="bucket", Id="daily") == none
        assert get_all(Bucket="bucket")["InventoryConfigurationList"] == [full]

    await run(play, world)


async def test_a_refused_configuration_leaves_what_there_was(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "has_parquet", lambda: False)

    def play(client: Any) -> None:
        made(client)
        put(client, wanted())
        again = client.list_bucket_inventory_configurations

        def answer(configuration: dict[str, Any], name: str = "") -> tuple[int, str]:
            return refused(lambda: put(client, configuration, name))

        assert answer(wanted("other"), "daily") == (400, "IdMismatch")
        assert answer(wanted("a b"), "a b") == (400, "InvalidArgument")
        assert answer(wanted("x" * 65)) == (400, "InvalidArgument")
        assert answer(wanted(Format="ORC")) == (501, "NotImplemented")
        assert answer(wanted(Format="Parquet")) == (501, "NotImplemented")
        assert answer(wanted(Format="JSON")) == (400, "MalformedXML")
        assert answer(wanted(OptionalFields=["Colour"])) == (400, "MalformedXML")
        assert answer(wanted(to={"Bucket": "target"})) == (400, "InvalidS3DestinationBucket")
        kms = {"Encryption": {"SSEKMS": {"KeyId": "arn:aws:kms:eu-fr-1:111122223333:key/other"}}}
        assert answer(wanted(to=kms)) == (400, "KMS.NotFoundException")
        get = client.get_bucket_inventory_configuration
        assert refused(again, Bucket="bucket", ContinuationToken="?") == (400, "InvalidArgument")
        assert refused(get, Bucket="bucket", Id="a b") == (400, "InvalidArgument")
        assert again(Bucket="bucket")["InventoryConfigurationList"] == [wanted()]

    await run(play, world)


async def test_a_bucket_has_at_most_a_thousand_and_a_page_a_hundred(world: World) -> None:
    await run(made, world)
    bucket = await world.buckets.get("bucket")
    await run(lambda client: put(client, wanted("0")), world)
    row = inventory.BUCKET_INVENTORIES
    (one,) = row.stored(await world.buckets.configuration(bucket)).values()
    many = {f"{number:04}": type(one)(f"{number:04}", False, "t", "CSV", "Daily", False) for number in range(1000)}
    await world.buckets.configure(bucket, INVENTORY, lambda _: row.made(many))

    def play(client: Any) -> None:
        assert refused(lambda: put(client, wanted("more"))) == (400, "TooManyConfigurations")
        put(client, wanted("0999"))
        found: list[str] = []
        named: dict[str, str] = {}
        while True:
            page = client.list_bucket_inventory_configurations(Bucket="bucket", **named)
            assert len(page["InventoryConfigurationList"]) == 100
            found += [one["Id"] for one in page["InventoryConfigurationList"]]
            if not page["IsTruncated"]:
                break
            named = {"ContinuationToken": page["NextContinuationToken"]}
        assert found == sorted(many)

    await run(play, world)


async def test_a_policy_may_give_the_permissions_of_aws_s_names(world: World) -> None:
    def play(client: Any) -> None:
        made(client)
        put(client, wanted())
        other = world.client(ACCESS_ALT, SECRET_ALT)
        get = other.get_bucket_inventory_configuration
        assert refused(get, Bucket="bucket", Id="daily") == (403, "AccessDenied")
        account = {"AWS": account_of(other.list_buckets()["Owner"]["ID"])}
        client.put_bucket_policy(
            Bucket="bucket", Policy=policy(allow("s3:GetInventoryConfiguration", "arn:aws:s3:::bucket", account))
        )
        assert get(Bucket="bucket", Id="daily")["InventoryConfiguration"]["Id"] == "daily"
        assert other.list_bucket_inventory_configurations(Bucket="bucket")["InventoryConfigurationList"]
        assert refused(lambda: put(other, wanted())) == (403, "AccessDenied")
        assert refused(other.delete_bucket_inventory_configuration, Bucket="bucket", Id="daily") == (
            403,
            "AccessDenied",
        )

    await run(play, world)


# --- what is listed ---------------------------------------------------------------------------------------------------


async def test_current_versions_are_listed_with_all_fields(world: World) -> None:
    def play(client: Any) -> str:
        made(client)
        client.put_object(Bucket="bucket", Key="a b/\u00fc+", Body=b"hello")
        client.put_object(Bucket="bucket", Key="kms", Body=b"x", ServerSideEncryption="aws:kms", BucketKeyEnabled=True)
        secret = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": b"k" * 32}
        client.put_bucket_encryption(
            Bucket="bucket",
            ServerSideEncryptionConfiguration={
                "Rules": [
                    {
                        "ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"},
                        "BlockedEncryptionTypes": {"EncryptionType": ["NONE"]},
                    }
                ]
            },
        )
        client.put_object(Bucket="bucket", Key="own key", Body=b"x", **secret)
        upload = client.create_multipart_upload(Bucket="bucket", Key="parts")["UploadId"]
        part = client.upload_part(Bucket="bucket", Key="parts", UploadId=upload, PartNumber=1, Body=b"x")
        client.complete_multipart_upload(
            Bucket="bucket",
            Key="parts",
            UploadId=upload,
            MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]},
        )
        rule = {"ID": "r", "Status": "Enabled", "Filter": {"Prefix": "a"}, "Expiration": {"Days": 3}}
        client.put_bucket_lifecycle_configuration(Bucket="bucket", LifecycleConfiguration={"Rules": [rule]})
        put(client, wanted(OptionalFields=ALL_FIELDS, Filter={"Prefix": ""}))
        return str(client.list_buckets()["Owner"]["ID"])

    me = await run(play, world)
    worker = worker_of(world)
    await works(worker)
    found = await report(world)
    assert found.manifest["sourceBucket"] == "bucket"
    assert found.manifest["destinationBucket"] == "arn:aws:s3:::target"
    assert found.manifest["fileFormat"] == "CSV"
    assert found.manifest["fileSchema"] == ", ".join(["Bucket", "Key", *ALL_FIELDS])
    plain, kms, own, parts = found.rows()
    head = await world.head("a b/\u00fc+")
    assert (plain["Bucket"], plain["Key"], plain["Size"], plain["ETag"]) == ("bucket", "a b/\u00fc+", "5", head.etag)
    written = datetime.fromisoformat(plain["LastModifiedDate"])
    assert int(written.timestamp() * 1000) == head.modified_ms
    expires = datetime.fromisoformat(plain["LifecycleExpirationDate"])
    assert expires == written.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=4)
    assert kms["LifecycleExpirationDate"] == ""
    assert [row["EncryptionStatus"] for row in (plain, kms, own, parts)] == ["SSE-S3", "SSE-KMS", "SSE-C", "SSE-S3"]
    assert [row["BucketKeyStatus"] for row in (plain, kms, own)] == ["DISABLED", "ENABLED", "DISABLED"]
    assert [row["IsMultipartUploaded"] for row in (plain, parts)] == ["false", "true"]
    assert plain["ChecksumAlgorithm"] == "CRC32"
    assert {row["StorageClass"] for row in (plain, kms, own, parts)} == {"STANDARD"}
    assert plain["ObjectOwner"] == me
    access = json.loads(base64.b64decode(plain["ObjectAccessControlList"]))
    grant = {"canonicalId": me, "type": "CanonicalUser", "permission": "FULL_CONTROL"}
    assert access == {"version": "2022-11-10", "status": "AVAILABLE", "grants": [grant]}
    (status,) = worker.document()
    assert (status["bucket"], status["id"], status["rows"], status["problem"]) == ("bucket", "daily", 4, "")
    assert status["finished_ms"] >= status["began_ms"]
    assert status["manifest"] == found.name
    shown = await describe(world.objects.plane, await world.buckets.get("bucket"))
    assert shown["inventories"][0]["manifest"] == found.name
    assert shown["inventories"][0]["folder"] == "bucket/daily"
    assert await rows_left(world) == 1, "the state alone"


async def test_all_versions_are_listed_newest_first_with_markers_and_locks(world: World) -> None:
    until = datetime.now(UTC).replace(microsecond=0) + timedelta(days=5)

    def play(client: Any) -> list[dict[str, Any]]:
        made(client)
        client.put_object(Bucket="bucket", Key="k", Body=b"null")
        client.put_bucket_versioning(Bucket="bucket", VersioningConfiguration={"Status": "Enabled"})
        client.put_object_lock_configuration(Bucket="bucket", ObjectLockConfiguration={"ObjectLockEnabled": "Enabled"})
        lock = {"ObjectLockMode": "GOVERNANCE", "ObjectLockRetainUntilDate": until}
        client.put_object(Bucket="bucket", Key="k", Body=b"second", **lock)
        client.delete_object(Bucket="bucket", Key="k")
        client.put_object(Bucket="bucket", Key="other", Body=b"x", ObjectLockLegalHoldStatus="ON")
        put(client, wanted(IncludedObjectVersions="All", OptionalFields=ALL_FIELDS))
        put(client, wanted("current"))
        page = client.list_object_versions(Bucket="bucket")
        return [*page["Versions"], *page["DeleteMarkers"]]

    ids = {(one["Key"], one.get("Size", -1)): one["VersionId"] for one in await run(play, world)}
    await works(worker_of(world))
    found = await report(world)
    assert found.manifest["fileSchema"].startswith("Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size")
    marker, second, null, other = found.rows()
    assert [row["Key"] for row in (marker, second, null, other)] == ["k", "k", "k", "other"]
    assert [row["VersionId"] for row in (marker, second, null)] == [ids["k", -1], ids["k", 6], ""]
    assert [row["IsLatest"] for row in (marker, second, null, other)] == ["true", "false", "false", "true"]
    assert [row["IsDeleteMarker"] for row in (marker, second, null)] == ["true", "false", "false"]
    assert (marker["Size"], marker["ETag"], marker["EncryptionStatus"]) == ("", "", "")
    assert datetime.fromisoformat(second["ObjectLockRetainUntilDate"]) == until
    assert [row["ObjectLockMode"] for row in (marker, second, null)] == ["", "Governance", ""]
    assert [row["ObjectLockLegalHoldStatus"] for row in (second, other)] == ["Off", "On"]
    assert [row["Key"] for row in (await report(world, "bucket/current")).rows()] == ["other"]


async def test_lists_of_access_are_shown_where_they_count() -> None:
    def play(client: Any) -> str:
        made(client)
        client.put_object(Bucket="bucket", Key="k", Body=b"x", ACL="public-read")
        put(client, wanted(OptionalFields=["ObjectAccessControlList", "ObjectOwner"]))
        return str(client.list_buckets()["Owner"]["ID"])

    async with s3_world(legacy=True) as world:
        me = await run(play, world)
        await works(worker_of(world))
        (row,) = (await report(world)).rows()
        everybody = {"uri": "http://acs.amazonaws.com/groups/global/AllUsers", "type": "Group", "permission": "READ"}
        owner = {"canonicalId": me, "type": "CanonicalUser", "permission": "FULL_CONTROL"}
        assert json.loads(base64.b64decode(row["ObjectAccessControlList"]))["grants"] == [everybody, owner]
        assert row["ObjectOwner"] == me


async def test_a_bucket_without_objects_has_a_report_without_files(world: World) -> None:
    def play(client: Any) -> None:
        made(client)
        put(client, wanted(to={"Prefix": "lists"}))

    await run(play, world)
    await works(worker_of(world))
    found = await report(world, "lists/bucket/daily")
    assert found.manifest["files"] == []


async def test_a_record_that_cannot_be_read_is_left_out_and_counted(world: World) -> None:
    def play(client: Any) -> None:
        made(client)
        for key in "abc":
            client.put_object(Bucket="bucket", Key=key, Body=b"x")
        put(client, wanted(OptionalFields=["ETag"]))

    await run(play, world)
    ring = world.below.ring
    (name,) = [name for name in ring.values if name.table == Table.OBJECT and name.key == b"b"]
    value = ring.values[name]
    ring.values[name] = type(value)(value.sequence, value.operation, value.visibility, b"damaged", value.payload)
    worker = worker_of(world)
    await works(worker)
    assert [row["Key"] for row in (await report(world)).rows()] == ["a", "c"]
    (status,) = worker.document()
    assert (status["rows"], status["unreadable"]) == (2, 1)


@pytest.mark.parametrize("damage", ["record", "order"])
async def test_a_key_that_is_damaged_while_it_is_listed_ends_no_report(
    world: World, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(listing, "VERSIONS_A_PAGE", 7)

    def play(client: Any) -> None:
        made(client)
        client.put_bucket_versioning(Bucket="bucket", VersioningConfiguration={"Status": "Enabled"})

    await run(play, world)
    for _ in range(40):
        await world.put("many", b"x")
    await world.put("z", b"x")
    await run(lambda client: put(client, wanted(IncludedObjectVersions="All")), world)
    worker = worker_of(world, file_rows_max=7)
    assert await worker.once()
    if damage == "record":
        ring = world.below.ring
        (name,) = [name for name in ring.values if name.table == Table.OBJECT and name.key == b"many"]
        value = ring.values[name]
        ring.values[name] = type(value)(value.sequence, value.operation, value.visibility, b"damaged", value.payload)
    else:

        async def disordered(*what: Any, **how: Any) -> AsyncIterator[Any]:
            if how["below"] is not None:
                raise DataDamaged("The pages of older versions of this key are not in order.")
            async for entry in every_entry(*what, **how):
                yield entry

        monkeypatch.setattr(listing, "every_entry", disordered)
    await works(worker)
    assert [row["Key"] for row in (await report(world)).rows()] == ["many"] * 7 + ["z"]
    (status,) = worker.document()
    assert (status["unreadable"], status["problem"]) == (1, "")


# --- pages, several workers -------------------------------------------------------------------------------------------


async def filled(world: World, count: int = 40, **more: Any) -> None:
    await run(made, world)
    for number in range(count):
        await world.put(f"key {number:03}", b"x")
    await run(lambda client: put(client, wanted(**more)), world)


async def test_another_worker_goes_on_after_the_last_file(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "ROWS_A_PAGE", 5)
    await filled(world)
    first = worker_of(world, file_rows_max=10)
    assert await first.once()
    assert await first.once()
    (status,) = first.document()
    assert (status["rows"], status["files"], status["finished_ms"]) == (20, 2, None)
    pages: list[int] = []
    add_page = InventoryWorker._add_page

    async def counted(self: InventoryWorker, *what: Any) -> Any:
        pages.append(1)
        return await add_page(self, *what)

    monkeypatch.setattr(InventoryWorker, "_add_page", counted)
    second = worker_of(world, file_rows_max=10)
    await works(second)
    assert len(pages) == 4, "of the other half"
    found = await report(world)
    assert len(found.files) == 4
    assert [row["Key"] for row in found.rows()] == [f"key {number:03}" for number in range(40)]
    assert await rows_left(world) == 1
    assert not await first.once(), "it learns that the report is made"
    assert len([key for key in found.keys if "/data/" in key]) == 4


async def test_two_workers_at_once_list_each_object_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "ROWS_A_PAGE", 3)
    clock = moved(world)
    await filled(world)
    await asyncio.gather(*(works(worker_of(world, file_rows_max=rows)) for rows in (3, 7)))
    found = await report(world)
    assert [row["Key"] for row in found.rows()] == [f"key {number:03}" for number in range(40)]
    clock.ahead_ms = DAY_MS
    await works(worker_of(world))
    assert await rows_left(world) == 1, "what the slower one has left goes when the next report begins"


async def test_a_slow_worker_deletes_no_file_of_a_later_report(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands still after it ended a report, or began one. Meanwhile others begin the next."""
    monkeypatch.setattr(listing, "ROWS_A_PAGE", 5)
    clock = moved(world)
    await filled(world, 20)
    slow, others = worker_of(world, file_rows_max=10), worker_of(world, file_rows_max=10)
    registers, meanwhile = world.objects.plane.registers, list[Callable[[], Awaitable[object]]]()
    change = registers.change

    async def change_slowly(name: RegisterName, *what: Any, **how: Any) -> Any:
        found = await change(name, *what, **how)
        if meanwhile and name.table == Table.INVENTORY and name.key[:1] == b"s":
            await meanwhile.pop()()
        return found

    async def the_next_day() -> None:
        await works(others)
        clock.ahead_ms += DAY_MS
        assert await others.once()

    monkeypatch.setattr(registers, "change", change_slowly)
    assert await slow.once()
    assert await slow.once()
    assert await rows_left(world) == 3
    meanwhile.append(the_next_day)
    assert not await slow.once(), "it ends the report"
    assert await rows_left(world) == 2, "the state, and the first file of the next report"
    await works(others)
    assert await rows_left(world) == 1
    clock.ahead_ms += DAY_MS
    meanwhile.append(the_next_day)
    assert await slow.once(), "it begins a report, and makes a file of it that comes too late"
    assert await rows_left(world) == 3, "the state, the first file of the next report, and the one that came too late"
    await works(others)
    assert await reports(world) == 4
    assert len([key for key in await world.stored("target") if b"/data/" in key]) == 4 * 2 + 1, "none was lost"
    clock.ahead_ms += DAY_MS
    await works(others)
    assert await rows_left(world) == 1


async def test_many_versions_of_a_key_take_several_files(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "VERSIONS_A_PAGE", 7)

    def play(client: Any) -> list[str]:
        made(client)
        client.put_bucket_versioning(Bucket="bucket", VersioningConfiguration={"Status": "Enabled"})
        return []

    await run(play, world)
    for key in ("a", "many", "z"):
        for _ in range(60 if key == "many" else 2):
            await world.put(key, b"x")
    await run(lambda client: put(client, wanted(IncludedObjectVersions="All")), world)
    for _ in range(3):
        assert await worker_of(world, file_rows_max=10).once()
    await works(worker_of(world, file_rows_max=10))
    found = await report(world)
    assert len(found.files) > 3
    bucket = await world.buckets.get("bucket")
    versions = (await world.objects.list_versions(bucket)).versions
    assert [(row["Key"], row["VersionId"]) for row in found.rows()] == [
        (one.key.decode(), one.version_id) for one in versions
    ]


async def test_others_run_between_rows_that_take_long(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await filled(world, 10)
    clock, log = moved(world), [""]
    row_of = inventories.row_of

    def slow(*what: Any) -> Any:
        log.append("row")
        clock.ahead_s += inventories.SLICE_S
        return row_of(*what)

    async def other() -> None:
        while True:
            log.append("other")
            await asyncio.sleep(0)

    monkeypatch.setattr(inventories, "row_of", slow)
    task = asyncio.create_task(other())
    await works(worker_of(world))
    task.cancel()
    assert log.count("row") == 10
    assert ("row", "row") not in set(pairwise(log))


class Killed(BaseException):
    """Nothing catches it."""


async def test_a_report_is_whole_wherever_its_worker_is_killed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after each change of a row and each PUT; the next worker's gateway has another clock."""
    monkeypatch.setattr(listing, "ROWS_A_PAGE", 2)
    clock = moved(world)
    await filled(world, 4)
    registers, left = world.objects.plane.registers, [-1]
    change, put_below = registers.change, world.objects.put

    def killing(work: Callable[..., Any]) -> Callable[..., Any]:
        async def then(*what: Any, **how: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            found = await work(*what, **how)
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return found

        return then

    monkeypatch.setattr(registers, "change", killing(change))
    monkeypatch.setattr(world.objects, "put", killing(put_below))
    keys = [f"key {number:03}" for number in range(4)]
    for step in range(1, 200):
        clock.ahead_ms += DAY_MS
        left[0] = step
        try:
            await works(worker_of(world, file_rows_max=2))
        except Killed:
            killed = True
        else:
            killed = False
        left[0] = -1
        clock.ahead_ms += 61_000 if step % 2 else -61_000
        worker = worker_of(world, file_rows_max=2)
        await works(worker)
        (status,) = worker.document()
        assert (status["problem"], status["rows"]) == ("", 4), step
        stored = await world.stored("target")
        newest = {key: data for key, data in stored.items() if key.startswith(status["manifest"][:-13].encode())}
        files = json.loads(newest[status["manifest"].encode()])["files"]
        rows = [gzip.decompress(stored[file["key"].encode()]).decode().split() for file in files]
        listed = [unquote(line.split(",")[1].strip('"')) for lines in rows for line in lines]
        assert listed == keys, step
        if not killed:
            break
    assert step > 15
    assert not killed


# --- when -------------------------------------------------------------------------------------------------------------


async def reports(world: World) -> int:
    return len([key for key in await world.stored("target") if key.endswith(b"manifest.json")])


async def test_a_report_is_made_at_once_then_once_a_day(world: World) -> None:
    clock = moved(world)
    await filled(world, 1)
    worker = worker_of(world)
    await works(worker)
    await works(worker)
    await works(worker_of(world))
    assert await reports(world) == 1
    clock.ahead_ms = DAY_MS
    await works(worker)
    assert await reports(world) == 2
    clock.ahead_ms = 2 * DAY_MS
    await run(lambda client: put(client, wanted(IsEnabled=False)), world)
    await works(worker)
    assert await reports(world) == 2, "it is disabled"
    await run(lambda client: put(client, wanted()), world)
    await works(worker)
    assert await reports(world) == 3


async def test_what_is_removed_leaves_no_rows(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "ROWS_A_PAGE", 5)
    await filled(world, 10)
    worker = worker_of(world, file_rows_max=5)
    assert await worker.once()
    assert await rows_left(world) == 2
    await run(lambda client: client.delete_bucket_inventory_configuration(Bucket="bucket", Id="daily"), world)
    await works(worker_of(world))
    assert await rows_left(world) == 0
    assert await reports(world) == 0
    await run(lambda client: put(client, wanted()), world)
    assert await worker.once()
    bucket = await world.buckets.get("bucket")
    for key in (await world.objects.list_objects(bucket)).keys:
        await world.delete(key.decode())
    await run(lambda client: client.delete_bucket(Bucket="bucket"), world)
    left = [name for name, value in world.below.ring.values.items() if name.table == Table.INVENTORY and value.body]
    assert left == []
    await works(worker)


async def test_no_file_of_a_report_goes_before_the_state(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway with an old configuration deletes the rows of an inventory, and fails in the middle."""
    monkeypatch.setattr(listing, "ROWS_A_PAGE", 5)
    await filled(world, 10)
    assert await worker_of(world, file_rows_max=5).once()
    bucket = await world.buckets.get("bucket")
    registers = world.objects.plane.registers
    change, done = registers.change, list[bytes]()

    async def change_once(name: RegisterName, *what: Any, **how: Any) -> Any:
        if done:
            raise ServiceUnavailable("A test.")
        done.append(name.key[:1])
        return await change(name, *what, **how)

    monkeypatch.setattr(registers, "change", change_once)
    with pytest.raises(ServiceUnavailable):
        await drop_all_but(world.objects.plane, bucket)
    assert await read_state(world.objects.plane, bucket, digest_of("daily")) is None
    assert await rows_left(world) == 1


async def test_another_configuration_begins_another_report(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "ROWS_A_PAGE", 5)
    await filled(world, 20)
    worker = worker_of(world, file_rows_max=5)
    assert await worker.once()
    assert await worker.once()
    await run(lambda client: put(client, wanted(OptionalFields=["Size"])), world)
    await works(worker)
    found = await report(world)
    assert [row["Size"] for row in found.rows()] == ["1"] * 20
    assert await rows_left(world) == 1


# --- the target -------------------------------------------------------------------------------------------------------


def again(worker: InventoryWorker) -> None:
    """The pause after a failure is over."""
    for known in worker._every_visited():
        known.retry_at = 0.0


async def test_the_policy_of_the_target_decides(world: World) -> None:
    await run(lambda client: made(client, allowed=False), world)
    await world.put("k", b"x")
    me = account_of((await world.buckets.get("bucket")).owner)
    await run(lambda client: put(client, wanted(to={"AccountId": me})), world)
    worker = worker_of(world)

    async def problem() -> str:
        again(worker)
        await works(worker)
        (status,) = worker.document()
        return str(status["problem"])

    assert "target" in await problem()
    for condition in (
        {"ArnLike": {"aws:SourceArn": "arn:aws:s3:::another"}},
        {"StringEquals": {"aws:SourceAccount": "123456789012"}},
        {"StringEquals": {"s3:x-amz-acl": "private"}},
    ):
        await run(
            lambda client, condition=condition: client.put_bucket_policy(Bucket="target", Policy=grants(**condition)),
            world,
        )
        assert "refuses" in await problem(), condition
    other = policy(allow("s3:PutObject", "arn:aws:s3:::target/*", {"Service": "logging.s3.amazonaws.com"}))
    await run(lambda client: client.put_bucket_policy(Bucket="target", Policy=other), world)
    assert "refuses" in await problem()
    assert await world.stored("target") == {}
    assert await rows_left(world) == 0, "nothing was begun"
    documented = grants(
        ArnLike={"aws:SourceArn": "arn:aws:s3:::bucket"},
        StringEquals={"aws:SourceAccount": me, "s3:x-amz-acl": "bucket-owner-full-control"},
    )
    await run(lambda client: client.put_bucket_policy(Bucket="target", Policy=documented), world)
    assert await problem() == ""
    assert await reports(world) == 1


async def test_the_target_may_be_another_account_s_if_that_is_what_was_said(world: World) -> None:
    def play(client: Any) -> str:
        other = world.client(ACCESS_ALT, SECRET_ALT)
        client.create_bucket(Bucket="bucket")
        put(client, wanted(to={"AccountId": "123456789012"}))
        other.create_bucket(Bucket="target")
        other.put_bucket_policy(Bucket="target", Policy=grants())
        return account_of(other.list_buckets()["Owner"]["ID"])

    account = await run(play, world)
    worker = worker_of(world)
    await works(worker)
    assert "another account" in worker.document()[0]["problem"]
    await run(lambda client: put(client, wanted(to={"AccountId": account})), world)
    await works(worker)
    assert worker.document()[0]["problem"] == ""
    record = await world.buckets.get("target")
    (key, *_) = (await world.objects.list_objects(record)).keys
    assert (await world.objects.head(record, key)).owner == record.owner


async def test_a_target_that_takes_nothing_keeps_no_other_inventory_waiting(world: World) -> None:
    def play(client: Any) -> None:
        made(client)
        client.create_bucket(Bucket="full")
        client.put_bucket_policy(Bucket="full", Policy=grants().replace("target", "full"))
        put(client, wanted("a", to={"Bucket": "arn:aws:s3:::full"}))
        put(client, wanted("b", to={"Bucket": "arn:aws:s3:::missing"}))
        put(client, wanted())

    await run(play, world)
    await world.put("k", b"x")
    put_below = world.objects.put

    attempts: list[bytes] = []

    async def put_unless_full(bucket: BucketRecord, *what: Any, **how: Any) -> Any:
        if bucket.name == "full":
            attempts.append(what[0])
            raise QuotaExceeded
        return await put_below(bucket, *what, **how)

    world.objects.put = put_unless_full  # type: ignore[assignment]
    worker = worker_of(world)
    await works(worker)
    problems = {one["id"]: one["problem"] for one in worker.document()}
    assert "operator allows" in problems["a"]
    assert "does not exist" in problems["b"]
    assert problems["daily"] == ""
    assert await reports(world) == 1
    assert not await worker.once()
    assert len(attempts) == 1, "there is a pause before the next attempt"
    world.objects.put = put_below
    again(worker)
    await works(worker)
    assert [one["problem"] for one in worker.document() if one["id"] == "a"] == [""]


async def test_many_inventories_of_a_bucket_keep_those_of_another_waiting_no_longer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "ROWS_A_PAGE", 5)

    def play(client: Any) -> None:
        made(client)
        client.create_bucket(Bucket="zzz")
        client.put_object(Bucket="zzz", Key="k", Body=b"x")
        client.put_bucket_inventory_configuration(Bucket="zzz", Id="daily", InventoryConfiguration=wanted())
        for number in range(5):
            put(client, wanted(f"{number}"))

    await run(play, world)
    for number in range(10):
        await world.put(f"key {number}", b"x")
    worker = worker_of(world, file_rows_max=5)
    for _ in range(2):
        await worker.once()
    files = {(one["bucket"], one["id"]): one["files"] for one in worker.document()}
    assert (files["bucket", "0"], files["bucket", "1"], files["bucket", "2"]) == (1, 1, 0)
    assert worker.document()[-1]["finished_ms"], "that of the other bucket is made"
    await works(worker)
    assert await reports(world) == 6


async def test_the_pause_grows_while_a_target_takes_nothing(world: World) -> None:
    clock = moved(world)
    await filled(world, 3)

    async def full(*what: Any, **how: Any) -> Any:
        raise QuotaExceeded

    put_below, world.objects.put = world.objects.put, full  # type: ignore[method-assign]
    worker, pauses = worker_of(world), []
    for _ in range(6):
        began = clock.monotonic()
        await works(worker)
        (known,) = worker._every_visited()
        pauses.append(round((known.retry_at - began) / 60))
        clock.ahead_s += known.retry_at - clock.monotonic()
    assert pauses == [1, 2, 4, 8, 15, 15]
    world.objects.put = put_below  # type: ignore[method-assign]
    await works(worker)
    assert len((await report(world)).rows()) == 3


async def test_a_report_waits_while_the_cluster_is_away(world: World) -> None:
    await filled(world, 3)
    put_below = world.objects.put

    async def away(*what: Any, **how: Any) -> Any:
        raise ServiceUnavailable

    world.objects.put = away  # type: ignore[assignment]
    worker = worker_of(world)
    await works(worker)
    assert worker.document()[0]["problem"]
    assert worker.document()[0]["finished_ms"] is None
    world.objects.put = put_below
    again(worker)
    await works(worker)
    assert worker.document()[0]["problem"] == ""
    assert len((await report(world)).rows()) == 3


async def test_the_files_are_encrypted_as_configured_or_as_the_target_says(world: World) -> None:
    def play(client: Any) -> None:
        made(client)
        put(client, wanted("kms", to={"Encryption": {"SSEKMS": {"KeyId": "alias/aws/s3"}}}))
        put(client, wanted("s3", to={"Encryption": {"SSES3": {}}}))
        put(client, wanted("open"))
        rule = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms"}}
        client.put_bucket_encryption(Bucket="target", ServerSideEncryptionConfiguration={"Rules": [rule]})

    await run(play, world)
    await world.put("k", b"x")
    await works(worker_of(world))
    for name, kind in (("kms", "aws:kms"), ("s3", None), ("open", "aws:kms")):
        for key in await world.stored("target"):
            if key.startswith(f"bucket/{name}/".encode()):
                info = await world.head(key.decode(), bucket="target")
                assert (info.encryption.kind if info.encryption is not None else None) == kind, key


async def test_parquet_is_what_pyarrow_reads(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet

    monkeypatch.setattr(listing, "ROWS_A_PAGE", 5)
    await filled(world, 12, Format="Parquet", OptionalFields=ALL_FIELDS)
    await works(worker_of(world, file_rows_max=5))
    found = await report(world)
    assert found.manifest["fileFormat"] == "Parquet"
    tables = [pyarrow.parquet.read_table(io.BytesIO(data)) for data in found.files]
    rows = pyarrow.concat_tables(tables).to_pylist()
    assert [row["key"] for row in rows] == [f"key {number:03}" for number in range(12)]
    assert all(name.endswith(".parquet") for name in found.keys if "/data/" in name)
    assert rows[0]["encryption_status"] == "SSE-S3"
    assert rows[0]["last_modified_date"].tzinfo is not None


async def test_a_gateway_without_pyarrow_says_so_and_makes_the_others(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "has_parquet", lambda: True)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    await filled(world, 1, Format="Parquet")
    await run(lambda client: put(client, wanted("csv")), world)
    worker = worker_of(world)
    await works(worker)
    problems = {one["id"]: one["problem"] for one in worker.document()}
    assert "storaged[inventory]" in problems["daily"]
    assert problems["csv"] == ""
    bucket: BucketRecord = await world.buckets.get("bucket")
    assert await read_state(world.objects.plane, bucket, digest_of("csv")) is not None


async def test_manifests_that_are_there_already_are_put_again(world: World) -> None:
    """A gateway that stops between the manifests and the end of the report, and a target that fails in the middle."""
    await filled(world, 3)
    put_below = world.objects.put
    left = [2]

    async def fails(bucket: BucketRecord, key: bytes, *what: Any, **how: Any) -> Any:
        if b"/data/" not in key:
            left[0] -= 1
            if left[0] < 0:
                raise ServiceUnavailable
        return await put_below(bucket, key, *what, **how)

    world.objects.put = fails  # type: ignore[assignment]
    await works(worker_of(world))
    assert len([key for key in await world.stored("target") if b"/data/" not in key]) == 2
    world.objects.put = put_below
    worker = worker_of(world)
    await works(worker)
    assert worker.document()[0]["problem"] == ""
    assert len((await report(world)).rows()) == 3


async def test_the_policy_of_the_target_may_ask_for_an_encryption(world: World) -> None:
    """As AWS's example, which denies a PUT that does not ask for SSE-KMS."""

    def play(client: Any) -> None:
        made(client, allowed=False)
        put(client, wanted("kms", to={"Encryption": {"SSEKMS": {"KeyId": "alias/aws/s3"}}}))
        put(client, wanted("s3", to={"Encryption": {"SSES3": {}}}))
        put(client, wanted("open"))
        other = {"StringNotEquals": {"s3:x-amz-server-side-encryption": "aws:kms"}}
        objects, service = "arn:aws:s3:::target/*", {"Service": "s3.amazonaws.com"}
        client.put_bucket_policy(
            Bucket="target",
            Policy=policy(
                allow("s3:PutObject", objects, service),
                {**allow("s3:PutObject", objects, "*", Condition=other), "Effect": "Deny"},
            ),
        )

    await run(play, world)
    worker = worker_of(world)
    await works(worker)
    problems = {one["id"]: one["problem"] for one in worker.document()}
    assert problems["kms"] == ""
    assert "refuses" in problems["s3"]
    assert "refuses" in problems["open"]
