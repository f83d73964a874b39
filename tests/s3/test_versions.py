"""Versioning as boto3 sees it, over the whole cluster. What AWS answers is in the comments with its source."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster import Cluster


def refused(call: Any, **arguments: Any) -> tuple[int, str, dict[str, str]]:
    """Status, code and headers."""
    from botocore.exceptions import ClientError

    with pytest.raises(ClientError) as caught:
        call(**arguments)
    answer = caught.value.response
    return (
        answer["ResponseMetadata"]["HTTPStatusCode"],
        answer["Error"]["Code"],
        answer["ResponseMetadata"]["HTTPHeaders"],
    )


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Any:
    return cluster.boto3(attempts=3)


_numbers = itertools.count()


def versions_of(client: Any, bucket: str, **options: Any) -> list[tuple[str, str, bool, bool]]:
    """(key, version id, is a delete marker, is latest), in the order of the listing, of all pages."""
    found = []
    while True:
        page = client.list_object_versions(Bucket=bucket, **options)
        entries = [(entry, False) for entry in page.get("Versions", [])]
        entries += [(entry, True) for entry in page.get("DeleteMarkers", [])]
        found += [(its["Key"], its["VersionId"], marker, its["IsLatest"]) for its, marker in entries]
        if not page["IsTruncated"]:
            return found
        options |= {"KeyMarker": page["NextKeyMarker"], "VersionIdMarker": page.get("NextVersionIdMarker", "")}
        if not options["VersionIdMarker"]:
            del options["VersionIdMarker"]


def empty(client: Any, bucket: str) -> None:
    for some in iter(lambda: versions_of(client, bucket)[:1000], []):
        named = [{"Key": key, "VersionId": version} for key, version, _, _ in some]
        assert "Errors" not in client.delete_objects(Bucket=bucket, Delete={"Objects": named, "Quiet": True})


@pytest.fixture
def bucket(client: Any) -> Iterator[str]:
    name = f"versions-{next(_numbers)}"
    client.create_bucket(Bucket=name)
    yield name
    empty(client, name)
    client.delete_bucket(Bucket=name)


def status(client: Any, bucket: str, value: str) -> None:
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": value})
    assert client.get_bucket_versioning(Bucket=bucket)["Status"] == value


def put(client: Any, bucket: str, data: bytes, key: str = "k") -> str:
    found: str = client.put_object(Bucket=bucket, Key=key, Body=data).get("VersionId", "")
    return found


def got(client: Any, bucket: str, version: str = "", key: str = "k") -> bytes:
    named = {"VersionId": version} if version else {}
    found: bytes = client.get_object(Bucket=bucket, Key=key, **named)["Body"].read()
    return found


def test_the_status_of_a_bucket(client: Any, bucket: str) -> None:
    assert "Status" not in client.get_bucket_versioning(Bucket=bucket)
    assert put(client, bucket, b"x") == ""
    assert "x-amz-version-id" not in client.head_object(Bucket=bucket, Key="k")["ResponseMetadata"]["HTTPHeaders"]
    status(client, bucket, "Enabled")
    assert client.head_object(Bucket=bucket, Key="k")["VersionId"] == "null"
    status(client, bucket, "Suspended")
    put_status = client.put_bucket_versioning
    assert refused(put_status, Bucket=bucket, VersioningConfiguration={"Status": "Off"})[:2] == (400, "MalformedXML")
    assert refused(put_status, Bucket=bucket, VersioningConfiguration={})[:2] == (
        400,
        "IllegalVersioningConfigurationException",
    )
    mfa = {"Status": "Enabled", "MFADelete": "Enabled"}
    assert refused(put_status, Bucket=bucket, VersioningConfiguration=mfa)[:2] == (501, "NotImplemented")
    assert client.get_bucket_versioning(Bucket=bucket)["Status"] == "Suspended"


def test_every_size_of_version_is_kept_and_deleted_by_its_id(client: Any, bucket: str) -> None:
    datas = [os.urandom(size) for size in (0, 1, 900, 3_000, 16_000, 100_000, 7_000_000)]
    put(client, bucket, datas[3])
    status(client, bucket, "Enabled")
    ids = ["null", *(put(client, bucket, data) for data in datas)]
    stored = [datas[3], *datas]
    for version, data in zip(ids, stored, strict=True):
        assert got(client, bucket, version) == data
        assert client.head_object(Bucket=bucket, Key="k", VersionId=version)["ContentLength"] == len(data)
    assert [version for _, version, _, _ in versions_of(client, bucket)] == ids[::-1]
    client.delete_object(Bucket=bucket, Key="k", VersionId=ids[3])
    assert refused(client.get_object, Bucket=bucket, Key="k", VersionId=ids[3])[:2] == (404, "NoSuchVersion")
    assert [version for _, version, _, _ in versions_of(client, bucket)] == [*ids[:3], *ids[4:]][::-1]
    assert got(client, bucket) == datas[-1]


def test_a_delete_marker_and_what_reads_of_it_answer(client: Any, bucket: str) -> None:
    status(client, bucket, "Enabled")
    first = put(client, bucket, b"first")
    gone = client.delete_object(Bucket=bucket, Key="k")
    assert gone["DeleteMarker"]
    marker = gone["VersionId"]
    # The current version is a delete marker: 404 and x-amz-delete-marker. (API_GetObject, "DeleteMarker")
    code, name, headers = refused(client.get_object, Bucket=bucket, Key="k")
    assert (code, name, headers["x-amz-delete-marker"]) == (404, "NoSuchKey", "true")
    assert headers["x-amz-version-id"] == marker
    code, _, headers = refused(client.head_object, Bucket=bucket, Key="k")
    assert (code, headers["x-amz-delete-marker"]) == (404, "true")
    # The marker by its version id: 405, and Last-Modified. (API_GetObject, "HTTP 405")
    for call in (client.get_object, client.head_object):
        code, _, headers = refused(call, Bucket=bucket, Key="k", VersionId=marker)
        assert (code, headers["x-amz-delete-marker"]) == (405, "true")
        assert "last-modified" in headers
    assert "Contents" not in client.list_objects_v2(Bucket=bucket)
    assert versions_of(client, bucket) == [("k", first, False, False), ("k", marker, True, True)]
    # A marker that is deleted by its id: the answer says that it was one. (API_DeleteObject, "DeleteMarker")
    undone = client.delete_object(Bucket=bucket, Key="k", VersionId=marker)
    assert (undone["DeleteMarker"], undone["VersionId"]) == (True, marker)
    assert got(client, bucket) == b"first"


def test_a_suspended_bucket_has_one_null_version(client: Any, bucket: str) -> None:
    status(client, bucket, "Enabled")
    kept = put(client, bucket, b"kept")
    status(client, bucket, "Suspended")
    assert put(client, bucket, b"one") == ""
    assert put(client, bucket, b"two") == ""
    assert got(client, bucket, "null") == b"two"
    assert [version for _, version, _, _ in versions_of(client, bucket)] == ["null", kept]
    # DELETE removes the null version only, and puts a null marker. (user guide, "Deleting objects from
    # versioning-suspended buckets")
    gone = client.delete_object(Bucket=bucket, Key="k")
    assert (gone["DeleteMarker"], gone["VersionId"]) == (True, "null")
    assert sorted(versions_of(client, bucket)) == sorted([("k", kept, False, False), ("k", "null", True, True)])
    assert got(client, bucket, kept) == b"kept"
    status(client, bucket, "Enabled")
    again = put(client, bucket, b"again")
    assert {version for _, version, _, _ in versions_of(client, bucket)} == {again, "null", kept}


def test_ids_that_are_none_and_ids_that_are_unknown(client: Any, bucket: str) -> None:
    status(client, bucket, "Enabled")
    known = put(client, bucket, b"x")
    unknown = "A" * len(known)
    for call in (client.get_object, client.head_object, client.get_object_tagging):
        assert refused(call, Bucket=bucket, Key="k", VersionId="nonsense")[0] == 400
        assert refused(call, Bucket=bucket, Key="k", VersionId=unknown)[0] == 404
    # To delete a version that does not exist succeeds.
    assert client.delete_object(Bucket=bucket, Key="k", VersionId=unknown)["ResponseMetadata"]["HTTPStatusCode"] == 204
    assert refused(client.delete_object, Bucket=bucket, Key="k", VersionId="nonsense")[:2] == (400, "InvalidArgument")
    assert got(client, bucket, known) == b"x"


def test_conditions_look_at_the_current_version(client: Any, bucket: str) -> None:
    # If-None-Match judges the current version only. (user guide, "conditional writes")
    status(client, bucket, "Enabled")
    put(client, bucket, b"x")
    asked = {"Bucket": bucket, "Key": "k", "Body": b"y", "IfNoneMatch": "*"}
    assert refused(client.put_object, **asked)[:2] == (412, "PreconditionFailed")
    client.delete_object(Bucket=bucket, Key="k")
    assert client.put_object(**asked)["VersionId"]
    assert len(versions_of(client, bucket)) == 3


def test_tags_attributes_copies_and_uploads_of_a_version(client: Any, bucket: str) -> None:
    status(client, bucket, "Enabled")
    datas = [os.urandom(5_300_000) for _ in range(2)]
    ids = [put(client, bucket, data) for data in datas]
    tags = {"TagSet": [{"Key": "a", "Value": "b"}]}
    answer = client.put_object_tagging(Bucket=bucket, Key="k", VersionId=ids[0], Tagging=tags)
    assert answer["VersionId"] == ids[0]
    assert client.get_object_tagging(Bucket=bucket, Key="k", VersionId=ids[0])["TagSet"] == tags["TagSet"]
    assert client.get_object_tagging(Bucket=bucket, Key="k")["TagSet"] == []
    attributes = client.get_object_attributes(
        Bucket=bucket, Key="k", VersionId=ids[0], ObjectAttributes=["ETag", "ObjectSize"]
    )
    assert (attributes["ObjectSize"], attributes["VersionId"]) == (len(datas[0]), ids[0])
    source = {"Bucket": bucket, "Key": "k", "VersionId": ids[0]}
    copied = client.copy_object(Bucket=bucket, Key="copy", CopySource=source)
    assert copied["CopySourceVersionId"] == ids[0]
    assert got(client, bucket, copied["VersionId"], "copy") == datas[0]
    restored = client.copy_object(Bucket=bucket, Key="k", CopySource=source)
    assert got(client, bucket) == got(client, bucket, restored["VersionId"]) == datas[0]
    upload = client.create_multipart_upload(Bucket=bucket, Key="u")["UploadId"]
    where = {"Bucket": bucket, "Key": "u", "UploadId": upload}
    parts = []
    for number, version in enumerate(ids, 1):
        made = client.upload_part_copy(**where, PartNumber=number, CopySource={**source, "VersionId": version})
        parts.append({"PartNumber": number, "ETag": made["CopyPartResult"]["ETag"]})
    done = client.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})
    assert got(client, bucket, done["VersionId"], "u") == b"".join(datas)
    again = client.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})
    assert again["VersionId"] == done["VersionId"]
    assert [its[0] for its in versions_of(client, bucket)].count("u") == 1


def test_many_versions_are_listed_page_by_page_and_deleted_together(cluster: Cluster, client: Any, bucket: str) -> None:
    status(client, bucket, "Enabled")
    ids = [put(client, bucket, b"%d" % number) for number in range(150)]
    for key in ("a/1", "a/2", "b", "z"):
        put(client, bucket, b"other", key)
    wanted = [("k", version) for version in ids[::-1]]
    assert [its[:2] for its in versions_of(client, bucket, Prefix="k")] == wanted
    for limit in (7, 50, 149, 150, 151):
        assert [its[:2] for its in versions_of(client, bucket, Prefix="k", MaxKeys=limit)] == wanted
    page = client.list_object_versions(Bucket=bucket, Delimiter="/", MaxKeys=3)
    assert [its["Prefix"] for its in page["CommonPrefixes"]] == ["a/"]
    assert [its["Key"] for its in page["Versions"]] == ["b", "k"]
    assert (page["NextKeyMarker"], page["NextVersionIdMarker"]) == ("k", ids[-1])
    assert got(client, bucket, ids[0]) == b"0"
    usage = json.loads(cluster.run("bucket", "usage", bucket, "--json").stdout)
    assert (usage["objects"], usage["versions"]) == (5, 154)
    assert refused(client.delete_bucket, Bucket=bucket)[:2] == (409, "BucketNotEmpty")
    answer = client.delete_objects(
        Bucket=bucket, Delete={"Objects": [{"Key": "k", "VersionId": version} for version in ids[10:]]}
    )
    assert {its["VersionId"] for its in answer["Deleted"]} == set(ids[10:])
    marked = client.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": "k"}]})["Deleted"]
    assert marked[0]["DeleteMarker"]
    assert "VersionId" not in marked[0]
    assert refused(client.delete_bucket, Bucket=bucket)[:2] == (409, "BucketNotEmpty")
    assert got(client, bucket, ids[4]) == b"4"


def test_writers_of_one_key_lose_no_version(client: Any, bucket: str) -> None:
    status(client, bucket, "Enabled")
    made: list[tuple[str, bytes]] = []

    def write(worker: int) -> None:
        for number in range(12):
            data = b"%d %d" % (worker, number) * (1 if number % 3 else 3000)
            made.append((put(client, bucket, data), data))

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 48
    assert {version for _, version, _, _ in versions_of(client, bucket)} == {version for version, _ in made}
    for version, data in made:
        assert got(client, bucket, version) == data
