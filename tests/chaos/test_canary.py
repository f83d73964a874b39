"""Secrets and digests of content must never be seen by a storage node: not on its disks, not in logs, not in its
memory."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.chaos.digests import DIGESTS, SIBLINGS, Needle, Search, forms, of_body, of_parts, of_request
from tests.cluster import Cluster

WORD = "canary-7d1f0e53b2"
MIB = 1024 * 1024
NODES = ("n1", "n2", "n3")
SIZES = (300, 9_000, 400_000)
"""One object each that stays in its record, that is kept as copies beside it, and that is coded."""
PART_BYTES = 5 * MIB


@pytest.fixture(scope="module")
def canary_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(Path(tmp_path_factory.mktemp("canary")) / "s3").start()
    yield cluster
    cluster.stop()


def body_of(size: int, sibling: int, more: str = "") -> bytes:
    """Always the same bytes, so that always the same digests are looked for."""
    text = f"{WORD} {more} {size} {sibling} ".encode()
    return (text * (size // len(text) + 1))[:size]


def md5_of(body: bytes) -> str:
    """SDKs leave this one to their callers."""
    return base64.b64encode(DIGESTS["MD5"](body)).decode()


def secret(what: str, data: str) -> list[Needle]:
    return [Needle(what, 0, data.encode()), *forms(what, 0, data.encode())]


@pytest.fixture(scope="module")
def needles(canary_cluster: Cluster) -> list[Needle]:
    """Writes every kind of secret through S3, and objects and uploads with every checksum; returns what to look for."""
    client = canary_cluster.boto3()
    found = [*secret("content", WORD), *secret("demo secret key", canary_cluster.settings["secret_key"])]
    client.create_bucket(Bucket="canary")
    client.put_bucket_tagging(
        Bucket="canary", Tagging={"TagSet": [{"Key": "of-bucket", "Value": WORD + "-bucket-tag"}]}
    )
    client.put_object(Bucket="canary", Key="empty", Body=b"", Metadata={"secret": WORD + "-meta"})
    for size in SIZES:
        for sibling in range(SIBLINGS):
            body = body_of(size, sibling)
            found += of_body(f"{size} bytes", sibling, body, short_alone=sibling > 0)
            for algorithm in DIGESTS if sibling == 0 else ("CRC32", "CRC32C"):
                asked = {"ChecksumAlgorithm": algorithm} if algorithm != "MD5" else {"ChecksumMD5": md5_of(body)}
                client.put_object(
                    Bucket="canary", Key=f"{size}-{sibling}-{algorithm}", Body=body, ContentType=f"application/x-{WORD}-type",  # noqa: E501
                    Metadata={"secret": WORD + "-meta"}, Tagging=f"label={WORD}-tag", **asked,
                )  # fmt: skip
            client.copy_object(
                Bucket="canary", Key=f"{size}-{sibling}-copy", CopySource=f"canary/{size}-{sibling}-CRC32"
            )
    found += upload_all(client)
    added = json.loads(canary_cluster.run("user", "add", "canary-user", "--json").stdout)
    return [*found, *secret("user secret key", added["secret_key"])]


def upload_all(client: Any) -> list[Needle]:
    """Multipart uploads, without and with checksums of either type."""
    found: list[Needle] = []
    kinds = [("", ""), ("SHA256", "COMPOSITE"), ("CRC64NVME", "FULL_OBJECT"), ("CRC32", "FULL_OBJECT")]
    for sibling, (algorithm, kind) in enumerate(kinds):
        bodies = [body_of(PART_BYTES, sibling, "first"), body_of(70_000, sibling, "second")]
        asked = {"ChecksumAlgorithm": algorithm, "ChecksumType": kind} if algorithm else {}
        each = {"ChecksumAlgorithm": algorithm} if algorithm else {}
        key = f"upload-{sibling}"
        upload = client.create_multipart_upload(
            Bucket="canary", Key=key, Metadata={"secret": WORD + "-upload"}, **asked
        )["UploadId"]
        parts = []
        for number, body in enumerate(bodies, 1):
            put = client.upload_part(Bucket="canary", Key=key, UploadId=upload, PartNumber=number, Body=body, **each)
            named = {f"Checksum{algorithm}": put[f"Checksum{algorithm}"]} if algorithm else {}
            parts.append({"PartNumber": number, "ETag": put["ETag"].strip('"'), **named})
        client.complete_multipart_upload(Bucket="canary", Key=key, UploadId=upload, MultipartUpload={"Parts": parts})
        found += of_parts("upload", sibling, bodies, algorithm, short_alone=sibling > 0) + of_request(
            "upload", sibling, bodies
        )
    return found


def files_of(cluster: Cluster) -> Iterator[tuple[Path, bytes]]:
    """What storage nodes have on disk, and the log that they and the gateway write."""
    for node in NODES:
        for path in (cluster.directory / node).rglob("*"):
            if path.is_file():
                yield path, solid(path.read_bytes())
    log = cluster.directory.parent / (cluster.directory.name + ".log")
    yield log, log.read_bytes()


ZEROS = bytes(64 * 1024)


def solid(data: bytes) -> bytes:
    """Without the holes: logs and databases of fixed size are mostly zeros. What lies around a hole is kept apart by
    some."""
    pieces = [data[start : start + len(ZEROS)] for start in range(0, len(data), len(ZEROS))]
    return b"".join(piece if piece != ZEROS[: len(piece)] else bytes(64) for piece in pieces)


@pytest.mark.timeout(900)
def test_disks_and_logs_of_storage_nodes_hold_no_secret_and_no_digest_of_content(
    canary_cluster: Cluster, needles: list[Needle]
) -> None:
    search = Search(needles)
    for _, data in files_of(canary_cluster):
        search.look(data)
    assert search.searched > 8 * MIB
    assert search.hits == []
    keys = list((canary_cluster.directory / "gateway" / "keys").iterdir())
    assert keys, "the keyring must lie in the gateway's folder"


@pytest.mark.timeout(900)  # some hundred MiB, searched for some hundred needles
def test_memory_of_storage_nodes_holds_no_secret_and_no_digest_of_content(
    canary_cluster: Cluster, needles: list[Needle]
) -> None:
    """Everything that came in over the wire passes through a node's memory: what is not there was never sent."""
    touch_again(canary_cluster)
    pids = canary_cluster.pids()
    search = Search([needle for needle in needles if not needle.what.endswith((", HEX", ", reversed"))])
    for node in NODES:
        if not search_memory(pids[node], search):
            pytest.skip("this system does not let a test read another process's memory")
    assert search.hits == []
    control = Search(secret("content", WORD))
    search_memory(pids["gateway"], control)
    assert "content" in control.hits, "the search must be able to find what is there: the gateway has seen the content"


def touch_again(cluster: Cluster) -> None:
    """Reads, lists and writes once more, so that something of each is in memory."""
    client = cluster.boto3()
    for size in SIZES:
        for sibling in range(SIBLINGS):
            key = f"{size}-{sibling}-CRC32"
            assert client.get_object(Bucket="canary", Key=key, ChecksumMode="ENABLED")["Body"].read() == body_of(
                size, sibling
            )
            client.put_object(
                Bucket="canary",
                Key=key,
                Body=body_of(size, sibling),
                Metadata={"secret": WORD + "-meta"},
                ChecksumAlgorithm="SHA256",
            )
    assert client.list_objects_v2(Bucket="canary")["KeyCount"] > len(SIZES) * SIBLINGS


def test_the_search_finds_each_needle_where_there_is_one(needles: list[Needle]) -> None:
    control = Search(needles)
    control.look(os.urandom(MIB))
    assert control.hits == [], "random bytes have none"
    control.look(b"".join(os.urandom(50) + needle.data for needle in needles))
    assert control.hits == sorted({needle.what for needle in needles})
    assert len({needle.what for needle in needles}) > 4 * 5 * len(DIGESTS)


def test_a_digest_of_four_bytes_counts_when_those_of_three_siblings_are_there() -> None:
    needles = [needle for sibling in range(SIBLINGS) for needle in of_body("body", sibling, body_of(300, sibling))]
    raw = [needle for needle in needles if needle.what == "CRC32 of body, raw"]
    search = Search(needles)
    search.look(raw[0].data + raw[1].data)
    assert search.hits == []
    search.look(raw[3].data)
    assert search.hits == ["CRC32 of body, raw"]


def test_plain_sizes_are_where_the_table_of_what_nodes_read_says(canary_cluster: Cluster) -> None:
    """Sizes are in the clear (FORMATS.md, kind `size`): when they no longer are, the table has to say so."""
    size = 70_003
    canary_cluster.boto3().put_object(Bucket="canary", Key="odd", Body=bytes(size))
    data = b"".join(data for _, data in files_of(canary_cluster))
    assert msgspec.msgpack.encode(size) in data


def search_memory(pid: int, search: Search) -> bool:
    """Looks at a process's anonymous memory; False when it could not be read at all."""
    try:
        with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
            for line in maps:
                fields = line.split()
                if "r" not in fields[1] or (len(fields) > 5 and fields[5].startswith(("/", "[v"))):
                    continue
                start, end = (int(part, 16) for part in fields[0].split("-"))
                try:
                    memory.seek(start)
                    data = memory.read(end - start)
                except (OSError, ValueError, OverflowError):
                    continue
                search.look(solid(data))
    except PermissionError:
        return False
    return True


def test_a_running_storage_process_never_loaded_the_key_plane(canary_cluster: Cluster) -> None:
    """A module's code objects carry the path of its file: a process that imported it has that text in memory."""
    module = [Needle("module", 0, b"storaged/keys/keyring.py")]
    for node in NODES:
        search = Search(module)
        if not search_memory(canary_cluster.pids()[node], search):
            pytest.skip("this system does not let a test read another process's memory")
        assert search.hits == []
    search = Search(module)
    search_memory(canary_cluster.pids()["gateway"], search)
    assert search.hits == ["module"]
