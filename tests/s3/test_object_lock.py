"""Object Lock as boto3 sees it, over the whole cluster."""

from __future__ import annotations

import datetime
import itertools
from typing import Any

import pytest

from tests.cluster import Cluster
from tests.s3.test_versions import got, refused, versions_of

_numbers = itertools.count()


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Any:
    return cluster.boto3(attempts=3)


@pytest.fixture
def bucket(client: Any) -> Any:
    """With Object Lock. Every version is in governance mode at most, so that all goes in the end."""
    name = f"locked-{next(_numbers)}"
    client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=True)
    yield name
    for key, version, marker, _ in versions_of(client, name):
        if not marker:
            client.put_object_legal_hold(Bucket=name, Key=key, VersionId=version, LegalHold={"Status": "OFF"})
        client.delete_object(Bucket=name, Key=key, VersionId=version, BypassGovernanceRetention=True)
    client.delete_bucket(Bucket=name)


def soon(hours: int = 1) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=hours)


def test_the_configuration_of_a_bucket(client: Any, bucket: str) -> None:
    assert client.get_bucket_versioning(Bucket=bucket)["Status"] == "Enabled"
    found = client.get_object_lock_configuration(Bucket=bucket)["ObjectLockConfiguration"]
    assert found == {"ObjectLockEnabled": "Enabled"}
    # Versioning of a bucket with Object Lock can't be suspended. (user guide, "Object Lock considerations")
    suspend = {"Status": "Suspended"}
    assert refused(client.put_bucket_versioning, Bucket=bucket, VersioningConfiguration=suspend)[:2] == (
        409,
        "InvalidBucketState",
    )
    wanted = {"ObjectLockEnabled": "Enabled", "Rule": {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": 1}}}
    client.put_object_lock_configuration(Bucket=bucket, ObjectLockConfiguration=wanted)
    assert client.get_object_lock_configuration(Bucket=bucket)["ObjectLockConfiguration"] == wanted
    for days, code in (
        (0, "InvalidRetentionPeriod"),
        (-3, "InvalidRetentionPeriod"),
        (10**9, "InvalidRetentionPeriod"),
    ):
        wrong = {"ObjectLockEnabled": "Enabled", "Rule": {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": days}}}
        assert refused(client.put_object_lock_configuration, Bucket=bucket, ObjectLockConfiguration=wrong)[:2] == (
            400,
            code,
        )
    version = client.put_object(Bucket=bucket, Key="k", Body=b"x")["VersionId"]
    retention = client.get_object_retention(Bucket=bucket, Key="k", VersionId=version)["Retention"]
    assert retention["Mode"] == "GOVERNANCE"
    assert soon(23) < retention["RetainUntilDate"] < soon(25)


def test_a_locked_version_stays(client: Any, bucket: str) -> None:
    version = client.put_object(
        Bucket=bucket, Key="k", Body=b"x", ObjectLockMode="GOVERNANCE", ObjectLockRetainUntilDate=soon()
    )["VersionId"]
    head = client.head_object(Bucket=bucket, Key="k")
    assert head["ObjectLockMode"] == "GOVERNANCE"
    assert "ObjectLockLegalHoldStatus" not in head
    named = {"Bucket": bucket, "Key": "k", "VersionId": version}
    assert refused(client.delete_object, **named)[:2] == (403, "AccessDenied")
    answer = client.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": "k", "VersionId": version}]})
    assert [its["Code"] for its in answer["Errors"]] == ["AccessDenied"]
    client.put_object_legal_hold(**named, LegalHold={"Status": "ON"})
    assert client.get_object_legal_hold(**named)["LegalHold"] == {"Status": "ON"}
    assert refused(client.delete_object, **named, BypassGovernanceRetention=True)[:2] == (403, "AccessDenied")
    assert client.delete_object(Bucket=bucket, Key="k")["DeleteMarker"]
    assert refused(client.delete_bucket, Bucket=bucket)[:2] == (409, "BucketNotEmpty")
    assert got(client, bucket, version) == b"x"
    client.put_object_legal_hold(**named, LegalHold={"Status": "OFF"})
    assert client.head_object(**named)["ObjectLockLegalHoldStatus"] == "OFF"
    shorter = {"Mode": "GOVERNANCE", "RetainUntilDate": soon() - datetime.timedelta(minutes=30)}
    assert refused(client.put_object_retention, **named, Retention=shorter)[:2] == (403, "AccessDenied")
    client.put_object_retention(**named, Retention=shorter, BypassGovernanceRetention=True)
    client.delete_object(**named, BypassGovernanceRetention=True)
    assert refused(client.get_object, **named)[:2] == (404, "NoSuchVersion")


def test_a_bucket_without_object_lock(client: Any) -> None:
    name = f"unlocked-{next(_numbers)}"
    client.create_bucket(Bucket=name)
    client.put_object(Bucket=name, Key="k", Body=b"x")
    named = {"Bucket": name, "Key": "k"}
    retention = {"Mode": "GOVERNANCE", "RetainUntilDate": soon()}
    assert refused(client.put_object_retention, **named, Retention=retention)[:2] == (400, "InvalidRequest")
    assert refused(client.get_object_legal_hold, **named)[:2] == (400, "InvalidRequest")
    asked = {**named, "Body": b"y", "ObjectLockLegalHoldStatus": "ON"}
    assert refused(client.put_object, **asked)[:2] == (400, "InvalidRequest")
    assert got(client, name) == b"x"
    assert refused(client.get_object_lock_configuration, Bucket=name)[:2] == (
        404,
        "ObjectLockConfigurationNotFoundError",
    )
    # Without versioning a bucket can't get Object Lock. (API_PutObjectLockConfiguration)
    asked = {"Bucket": name, "ObjectLockConfiguration": {"ObjectLockEnabled": "Enabled"}}
    assert refused(client.put_object_lock_configuration, **asked)[:2] == (409, "InvalidBucketState")
    client.delete_object(**named)
    client.delete_bucket(Bucket=name)
