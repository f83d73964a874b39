"""An inventory over the whole cluster: it is in the target when its checksum is, and the operator sees it."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from typing import Any

from tests.cluster import Cluster

PATIENCE_S = 180.0
"""A gateway looks for inventories that are due every 20 s."""
FIELDS = ["Size", "ETag", "EncryptionStatus"]


def test_an_inventory_is_put_into_its_target_and_the_operator_sees_it(cluster: Cluster) -> None:
    client = cluster.boto3(attempts=3)
    for name in ("listed", "lists"):
        client.create_bucket(Bucket=name)
    client.put_bucket_versioning(Bucket="listed", VersioningConfiguration={"Status": "Enabled"})
    large = b"x" * 300_000  # coded, not kept as copies
    for body in (b"first", large):
        client.put_object(Bucket="listed", Key="a key", Body=body)
    client.delete_object(Bucket="listed", Key="gone")
    configuration = {
        "Id": "all",
        "IsEnabled": True,
        "IncludedObjectVersions": "All",
        "OptionalFields": FIELDS,
        "Schedule": {"Frequency": "Daily"},
        "Destination": {"S3BucketDestination": {"Bucket": "arn:aws:s3:::lists", "Format": "CSV", "Prefix": "of"}},
    }
    client.put_bucket_inventory_configuration(Bucket="listed", Id="all", InventoryConfiguration=configuration)

    def seen() -> dict[str, Any]:
        (found,) = [one for one in cluster.status()["inventories"] if one["bucket"] == "listed"] or [{}]
        return dict(found)

    cluster.wait_until(lambda: "refuses" in seen().get("problem", ""), PATIENCE_S, "the target refuses the report")
    statement = {
        "Effect": "Allow",
        "Principal": {"Service": "s3.amazonaws.com"},
        "Action": "s3:PutObject",
        "Resource": "arn:aws:s3:::lists/of/*",
        "Condition": {"ArnLike": {"aws:SourceArn": "arn:aws:s3:::listed"}},
    }
    policy = {"Version": "2012-10-17", "Statement": [statement]}
    client.put_bucket_policy(Bucket="lists", Policy=json.dumps(policy))

    def keys() -> list[str]:
        return [one["Key"] for one in client.list_objects_v2(Bucket="lists").get("Contents", [])]

    def content(key: str) -> bytes:
        body: bytes = client.get_object(Bucket="lists", Key=key)["Body"].read()
        return body

    wanted = "the checksum of the manifest is there"
    cluster.wait_until(lambda: any(key.endswith("manifest.checksum") for key in keys()), PATIENCE_S, wanted)
    (name,) = [key for key in keys() if key.endswith("manifest.json")]
    assert name.startswith("of/listed/all/20")
    manifest = content(name)
    assert content(name.replace(".json", ".checksum")) == hashlib.md5(manifest).hexdigest().encode()
    (file,) = json.loads(manifest)["files"]
    data = content(file["key"])
    assert (len(data), hashlib.md5(data).hexdigest()) == (file["size"], file["MD5checksum"])
    rows = list(csv.reader(io.StringIO(gzip.decompress(data).decode())))
    page = client.list_object_versions(Bucket="listed")
    known = {(one["Key"], one["VersionId"]): one for one in (*page["Versions"], *page["DeleteMarkers"])}
    assert [(row[1].replace("%20", " "), row[2]) for row in rows] == [
        *((one["Key"], one["VersionId"]) for one in page["Versions"]),
        *((one["Key"], one["VersionId"]) for one in page["DeleteMarkers"]),
    ], "in the order of keys"
    for row in rows[:2]:
        one = known["a key", row[2]]
        assert row[3:] == [
            "true" if one["IsLatest"] else "false", "false", str(one["Size"]), one["ETag"].strip('"'), "SSE-S3",
        ]  # fmt: skip
    assert rows[2][3:] == ["true", "true", "", "", ""]
    cluster.wait_until(lambda: seen()["finished_ms"] is not None, PATIENCE_S, "the report is made")
    found = seen()
    assert (found["rows"], found["files"], found["problem"], found["manifest"]) == (3, 1, "", name)
    shown = json.loads(cluster.run("bucket", "inventory", "listed", "--json").stdout)["inventories"]
    assert [(one["id"], one["target"], one["rows"]) for one in shown] == [("all", "lists", 3)]
    assert "3 rows in 1 files" in cluster.run("bucket", "inventory", "listed").stdout
    assert "no inventories" in cluster.run("bucket", "inventory", "lists").stdout
