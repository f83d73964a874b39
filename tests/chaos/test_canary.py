"""Secrets that must never be seen by a storage node: not on its disks, not in what reaches it over the wire, not in its memory maps' file names."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster

WORD = "canary-7d1f0e53b2"
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def canary_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(Path(tmp_path_factory.mktemp("canary")) / "s3").start()
    yield cluster
    cluster.stop()


def plant(cluster: Cluster) -> dict[str, bytes]:
    """Writes every kind of secret through S3; returns name -> the bytes to look for."""
    client = cluster.boto3()
    needles = {"content": WORD.encode(), "demo secret key": cluster.settings["secret_key"].encode()}
    client.create_bucket(Bucket="canary")
    for size in (0, 300, 9_000, 400_000, 6 * MIB):
        body = (WORD + " ").encode() * (size // (len(WORD) + 1) + 1)
        client.put_object(
            Bucket="canary", Key=f"size-{size}", Body=body, ContentType="application/x-" + WORD + "-type", Metadata={"secret": WORD + "-meta"},
            Tagging=f"label={WORD}-tag", ChecksumAlgorithm="SHA256",
        )  # fmt: skip
        needles[f"ETag of {size}"] = hashlib.md5(body).hexdigest().encode()
        needles[f"raw MD5 of {size}"] = hashlib.md5(body).digest()
        needles[f"SHA-256 of {size}"] = base64.b64encode(hashlib.sha256(body).digest())
    upload = client.create_multipart_upload(Bucket="canary", Key="parts", Metadata={"secret": WORD + "-upload"})["UploadId"]
    parts = []
    for number in (1, 2):
        body = f"{WORD} part {number} ".encode() * (5 * MIB // 20)
        etag = client.upload_part(Bucket="canary", Key="parts", UploadId=upload, PartNumber=number, Body=body)["ETag"]
        parts.append({"PartNumber": number, "ETag": etag})
        needles[f"ETag of part {number}"] = etag.strip('"').encode()
    done = client.complete_multipart_upload(Bucket="canary", Key="parts", UploadId=upload, MultipartUpload={"Parts": parts})
    needles["ETag of multipart"] = done["ETag"].strip('"').encode()
    import json

    added = json.loads(cluster.run("user", "add", "canary-user", "--json").stdout)
    needles["user secret key"] = added["secret_key"].encode()
    return needles


def test_storage_nodes_keep_nothing_readable_and_never_load_the_key_plane(canary_cluster: Cluster) -> None:
    needles = plant(canary_cluster)
    hits = []
    searched = 0
    for node in ("n1", "n2", "n3"):
        for path in (canary_cluster.directory / node).rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                searched += len(data)
                hits += [f"{name} in {path}" for name, needle in needles.items() if needle in data]
    assert searched > 8 * MIB
    assert hits == []
    keys = list((canary_cluster.directory / "gateway" / "keys").iterdir())
    assert keys, "the keyring must lie in the gateway's folder"


def test_memory_of_storage_nodes_holds_no_secret(canary_cluster: Cluster) -> None:
    """Everything that came in over the wire passes through a node's memory: what is not there was never sent."""
    needles = plant_more(canary_cluster)
    pids = canary_cluster.pids()
    hits = []
    for node in ("n1", "n2", "n3"):
        found, readable = search_memory(pids[node], needles)
        if not readable:
            pytest.skip("this system does not let a test read another process's memory")
        hits += [f"{name} in the memory of {node}" for name in found]
    assert hits == []
    found, _ = search_memory(pids["gateway"], {"content": WORD.encode()})
    assert found, "the search must be able to find what is there: the gateway has seen the content"


def plant_more(cluster: Cluster) -> dict[str, bytes]:
    client = cluster.boto3()
    client.create_bucket(Bucket="canary-memory")
    word = (WORD + "-in-memory").encode()
    for size in (300, 9_000, 2 * MIB):
        client.put_object(Bucket="canary-memory", Key=f"m{size}", Body=word * (size // len(word) + 1), Metadata={"secret": WORD + "-meta"})
        assert client.get_object(Bucket="canary-memory", Key=f"m{size}")["Body"].read().startswith(word)
    return {"content and metadata": WORD.encode(), "demo secret key": cluster.settings["secret_key"].encode()}


def search_memory(pid: int, needles: dict[str, bytes]) -> tuple[set[str], bool]:
    """Names of the needles in a process's anonymous memory, and whether it could be read at all."""
    found: set[str] = set()
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
                found |= {name for name, needle in needles.items() if needle in data}
    except PermissionError:
        return found, False
    return found, True


def test_a_running_storage_process_never_loaded_the_key_plane(canary_cluster: Cluster) -> None:
    """A module's code objects carry the path of its file: a process that imported it has that text in memory."""
    for node in ("n1", "n2", "n3"):
        found, readable = search_memory(canary_cluster.pids()[node], {"module": b"storaged/keys/keyring.py"})
        if not readable:
            pytest.skip("this system does not let a test read another process's memory")
        assert found == set()
    found, _ = search_memory(canary_cluster.pids()["gateway"], {"module": b"storaged/keys/keyring.py"})
    assert found == {"module"}
