"""Unmodified clients against a running cluster: what they wrote is read back byte for byte."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.cluster import Cluster

AWS = str(Path(sys.executable).parent / "aws")
MIB = 1024 * 1024


def need(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed here")


def run(cluster: Cluster, *command: str, stdin: bytes | None = None, **extra: str) -> str:
    done = subprocess.run(
        command,
        env={**cluster.client_environment(), **extra},
        input=stdin,
        capture_output=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, (
        f"{' '.join(command)} -> {done.returncode}\n{done.stdout.decode()[-3000:]}\n{done.stderr.decode()[-3000:]}"
    )
    return done.stdout.decode(errors="replace")


def make_tree(folder: Path, seed: int = 7) -> dict[str, bytes]:
    """Files of every size class, in folders, with awkward names."""
    source = random.Random(seed)
    names = {
        "empty": 0, "tiny.txt": 1, "a b+c&d.txt": 900, "é/ü ñ.bin": 5000, "deep/er/and/deeper/16k": 16_384, "64k": 65_536,  # noqa: E501
        "one-block": 3 * MIB, "large": 21 * MIB + 11,
    }  # fmt: skip
    files = {}
    for name, size in names.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        files[name] = source.randbytes(size)
        path.write_bytes(files[name])
    return files


def read_tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_aws_cli_encrypts_with_a_customers_key(cluster: Cluster, tmp_path: Path) -> None:
    """A small file, and one that is uploaded and read in parts."""
    rule = "ApplyServerSideEncryptionByDefault={SSEAlgorithm=AES256},BlockedEncryptionTypes={EncryptionType=[NONE]}"
    run(cluster, AWS, "s3", "mb", "s3://aws-sse-c")
    set_default = ("put-bucket-encryption", "--bucket", "aws-sse-c", "--server-side-encryption-configuration")
    run(cluster, AWS, "s3api", *set_default, f"Rules=[{{{rule}}}]")
    key, other = tmp_path / "key", tmp_path / "other"
    key.write_bytes(bytes(range(32)))
    other.write_bytes(bytes(range(1, 33)))
    with_key = ("--sse-c", "AES256", "--sse-c-key", f"fileb://{key}")
    for name, size in (("small", 5_000), ("parts", 21 * MIB + 11)):
        (tmp_path / name).write_bytes(data := random.Random(size).randbytes(size))
        run(cluster, AWS, "s3", "cp", str(tmp_path / name), f"s3://aws-sse-c/{name}", *with_key)
        run(cluster, AWS, "s3", "cp", f"s3://aws-sse-c/{name}", str(tmp_path / "read"), *with_key)
        assert (tmp_path / "read").read_bytes() == data
        copied = ("--sse-c-copy-source", "AES256", "--sse-c-copy-source-key", f"fileb://{key}")
        run(cluster, AWS, "s3", "cp", f"s3://aws-sse-c/{name}", f"s3://aws-sse-c/{name}-2", *copied)
        run(cluster, AWS, "s3", "cp", f"s3://aws-sse-c/{name}-2", str(tmp_path / "read"))
        assert (tmp_path / "read").read_bytes() == data
        for wrong in ((), ("--sse-c", "AES256", "--sse-c-key", f"fileb://{other}")):
            with pytest.raises(AssertionError, match="400"):
                run(cluster, AWS, "s3", "cp", f"s3://aws-sse-c/{name}", str(tmp_path / "read"), *wrong)
    run(cluster, AWS, "s3", "rb", "--force", "s3://aws-sse-c")


def test_aws_cli_copies_syncs_lists_presigns_and_removes(cluster: Cluster, tmp_path: Path) -> None:
    files = make_tree(tmp_path / "up")
    run(cluster, AWS, "s3", "mb", "s3://aws-cli")
    run(cluster, AWS, "s3", "sync", str(tmp_path / "up"), "s3://aws-cli/tree/")
    listed = run(cluster, AWS, "s3", "ls", "--recursive", "s3://aws-cli/")
    assert len(listed.splitlines()) == len(files)
    run(cluster, AWS, "s3", "sync", "s3://aws-cli/tree/", str(tmp_path / "down"))
    assert read_tree(tmp_path / "down") == files
    assert run(cluster, AWS, "s3", "sync", str(tmp_path / "up"), "s3://aws-cli/tree/").strip() == ""
    run(cluster, AWS, "s3", "cp", "s3://aws-cli/tree/large", "s3://aws-cli/copy")
    run(cluster, AWS, "s3", "mv", "s3://aws-cli/copy", str(tmp_path / "moved"))
    assert (tmp_path / "moved").read_bytes() == files["large"]
    url = run(cluster, AWS, "s3", "presign", "s3://aws-cli/tree/64k").strip()
    from urllib.request import urlopen

    with urlopen(url) as answer:
        assert answer.read() == files["64k"]
    run(cluster, AWS, "s3", "rb", "--force", "s3://aws-cli")


def rclone_remote(cluster: Cluster) -> dict[str, str]:
    return {
        "RCLONE_CONFIG_EU_TYPE": "s3", "RCLONE_CONFIG_EU_PROVIDER": "Other",
        "RCLONE_CONFIG_EU_ENDPOINT": cluster.endpoint, "RCLONE_CONFIG_EU_REGION": cluster.settings["region"],
        "RCLONE_CONFIG_EU_ACCESS_KEY_ID": cluster.settings["access_key"],
        "RCLONE_CONFIG_EU_SECRET_ACCESS_KEY": cluster.settings["secret_key"],
    }  # fmt: skip


def test_rclone_syncs_checks_and_purges(cluster: Cluster, tmp_path: Path) -> None:
    need("rclone")
    files = make_tree(tmp_path / "up")
    remote = rclone_remote(cluster)
    run(cluster, "rclone", "mkdir", "eu:rclone", **remote)
    run(
        cluster,
        "rclone",
        "sync",
        "--s3-upload-cutoff",
        "8M",
        "--s3-chunk-size",
        "5M",
        str(tmp_path / "up"),
        "eu:rclone/tree",
        **remote,
    )
    run(cluster, "rclone", "check", "--download", str(tmp_path / "up"), "eu:rclone/tree", **remote)
    run(cluster, "rclone", "check", str(tmp_path / "up"), "eu:rclone/tree", **remote)
    run(cluster, "rclone", "sync", "eu:rclone/tree", str(tmp_path / "down"), **remote)
    assert read_tree(tmp_path / "down") == files
    mtimes = run(cluster, "rclone", "lsf", "--format", "pst", "-R", "--files-only", "eu:rclone/tree", **remote)
    assert len(mtimes.splitlines()) == len(files)
    run(cluster, "rclone", "purge", "eu:rclone", **remote)


def test_restic_backs_up_checks_every_byte_and_restores(cluster: Cluster, tmp_path: Path) -> None:
    need("restic")
    files = make_tree(tmp_path / "up")
    settings = {
        "RESTIC_REPOSITORY": f"s3:{cluster.endpoint}/restic/repository",
        "RESTIC_PASSWORD": "a password of the test",
        "RESTIC_CACHE_DIR": str(tmp_path / "cache"),
    }
    run(cluster, "restic", "init", **settings)
    run(cluster, "restic", "backup", str(tmp_path / "up"), **settings)
    (tmp_path / "up" / "tiny.txt").write_bytes(b"changed")
    run(cluster, "restic", "backup", str(tmp_path / "up"), **settings)
    run(cluster, "restic", "check", "--read-data", **settings)
    run(cluster, "restic", "restore", "latest", "--target", str(tmp_path / "down"), **settings)
    assert read_tree(tmp_path / "down" / (tmp_path / "up").relative_to("/")) == {**files, "tiny.txt": b"changed"}
    run(cluster, "restic", "forget", "--keep-last", "1", "--prune", **settings)
    run(cluster, "restic", "check", **settings)


def test_s3cmd_puts_gets_and_deletes(cluster: Cluster, tmp_path: Path) -> None:
    need("s3cmd")
    files = make_tree(tmp_path / "up")
    config = tmp_path / "s3cfg"
    config.write_text(cluster.run("env", "--for", "s3cmd").stdout)
    s3cmd = ("s3cmd", "--config", str(config))
    run(cluster, *s3cmd, "mb", "s3://s3cmd")
    run(cluster, *s3cmd, "put", str(tmp_path / "up" / "large"), "s3://s3cmd/large")
    run(cluster, *s3cmd, "sync", str(tmp_path / "up") + "/", "s3://s3cmd/tree/")
    (tmp_path / "down").mkdir()
    run(cluster, *s3cmd, "sync", "s3://s3cmd/tree/", str(tmp_path / "down") + "/")
    assert read_tree(tmp_path / "down") == files
    assert hashlib.md5(files["64k"]).hexdigest() in run(cluster, *s3cmd, "info", "s3://s3cmd/tree/64k")
    run(cluster, *s3cmd, "get", "s3://s3cmd/large", str(tmp_path / "got"))
    assert (tmp_path / "got").read_bytes() == files["large"]
    run(cluster, *s3cmd, "rb", "--recursive", "--force", "s3://s3cmd")


@pytest.mark.parametrize("tool", ["aws", "rclone", "restic"])
def test_env_prints_a_setup_that_works_when_pasted(cluster: Cluster, tmp_path: Path, tool: str) -> None:
    setup = cluster.run("env", "--for", tool).stdout
    commands = {
        "aws": f"{AWS} s3 ls",
        "rclone": "rclone lsd storaged:",
        "restic": f"restic --cache-dir {tmp_path} init && restic --cache-dir {tmp_path} snapshots",
    }
    if tool != "aws":
        need(tool)
    if tool == "rclone" and "[storaged]" in setup:
        (tmp_path / "rclone.conf").write_text(setup)
        script = f"rclone --config {tmp_path / 'rclone.conf'} lsd storaged:"
    else:
        script = f"{setup}\n{commands[tool]}"
    environment = {**cluster.environment(), "RESTIC_PASSWORD": "x"}
    done = subprocess.run(
        ["bash", "-euc", script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"


def test_boto3_with_another_region_than_the_clusters_works_at_first_touch(cluster: Cluster) -> None:
    """The region that clients sign for without a configured one; and a bucket that says where it was created."""
    client = cluster.boto3(region_name="us-east-1")
    client.create_bucket(Bucket="first-touch")
    client.create_bucket(Bucket="first-touch-west", CreateBucketConfiguration={"LocationConstraint": "us-west-2"})
    client.put_object(Bucket="first-touch", Key="k", Body=b"data")
    assert client.get_object(Bucket="first-touch", Key="k")["Body"].read() == b"data"
    assert client.head_bucket(Bucket="first-touch")["BucketRegion"] == cluster.settings["region"]
    assert client.get_bucket_location(Bucket="first-touch-west")["LocationConstraint"] == "us-west-2"
    kept = client.head_object(Bucket="first-touch", Key="k", ChecksumMode="ENABLED")
    assert "ChecksumCRC32" in kept, "of boto3 itself"


def test_boto3_transfers_a_large_file_in_parts_with_every_checksum(cluster: Cluster, tmp_path: Path) -> None:
    from boto3.s3.transfer import TransferConfig

    client = cluster.boto3()
    client.create_bucket(Bucket="boto3-parts")
    path = tmp_path / "large"
    path.write_bytes(os.urandom(23 * MIB + 5))
    for algorithm in ("CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256", "SHA512", "XXHASH64", "XXHASH3", "XXHASH128"):
        client.upload_file(
            str(path),
            "boto3-parts",
            f"large-{algorithm}",
            ExtraArgs={"ChecksumAlgorithm": algorithm},
            Config=TransferConfig(multipart_threshold=5 * MIB, multipart_chunksize=6 * MIB),
        )
        head = client.head_object(Bucket="boto3-parts", Key=f"large-{algorithm}", ChecksumMode="ENABLED")
        assert head["ContentLength"] == path.stat().st_size
        assert f"Checksum{algorithm}" in head
        client.download_file("boto3-parts", f"large-{algorithm}", str(tmp_path / "back"))
        assert (tmp_path / "back").read_bytes() == path.read_bytes()


def test_boto3_renames_objects_of_every_size(cluster: Cluster) -> None:
    client = cluster.boto3()
    client.create_bucket(Bucket="boto3-renames")
    datas = {f"old/{size}": os.urandom(size) for size in (0, 100, 20_000, 3 * MIB)}
    for key, data in datas.items():
        client.put_object(Bucket="boto3-renames", Key=key, Body=data, Metadata={"size": str(len(data))})
    for key, data in datas.items():
        new = key.replace("old", "new")
        before = client.head_object(Bucket="boto3-renames", Key=key)
        client.rename_object(Bucket="boto3-renames", Key=new, RenameSource=key, DestinationIfNoneMatch="*")
        after = client.get_object(Bucket="boto3-renames", Key=new)
        assert after["Body"].read() == data
        assert (after["Metadata"], after["ETag"], after["LastModified"]) == (
            before["Metadata"],
            before["ETag"],
            before["LastModified"],
        )
    found = client.list_objects_v2(Bucket="boto3-renames")["Contents"]
    assert [one["Key"] for one in found] == sorted(key.replace("old", "new") for key in datas)
    for one in found:
        client.delete_object(Bucket="boto3-renames", Key=one["Key"])
    cluster.wait_until(lambda: _is_deleted(client, "boto3-renames"), 60, "deletable, with no loan left")


def _is_deleted(client: Any, bucket: str) -> bool:
    try:
        client.delete_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] != "SlowDown":
            raise
        return False
    return True


def test_aws_cli_renames_a_bucket_and_no_data_moves(cluster: Cluster, tmp_path: Path) -> None:
    """All objects are copied to a new bucket, and the old one is removed with its originals. Then its name is used
    again.
    """
    files, sizes = {}, {"a/300k": 300_000, "b/4m": 4 * MIB, "c/7m": 7 * MIB + 5}
    for name, size in sizes.items():
        (tmp_path / "old" / name).parent.mkdir(parents=True, exist_ok=True)
        files[name] = random.Random(size).randbytes(size)
        (tmp_path / "old" / name).write_bytes(files[name])
    run(cluster, AWS, "s3", "mb", "s3://name-before")
    run(cluster, AWS, "s3", "mb", "s3://name-after")
    run(cluster, AWS, "s3", "cp", "--recursive", str(tmp_path / "old"), "s3://name-before/")
    blocks = {name: cluster.where("name-before", name)["fragments"] for name in files}
    run(cluster, AWS, "s3", "sync", "s3://name-before", "s3://name-after")
    assert {name: cluster.where("name-after", name)["fragments"] for name in files} == blocks
    run(cluster, AWS, "s3", "rb", "--force", "s3://name-before")
    run(cluster, AWS, "s3", "mb", "s3://name-before")
    assert run(cluster, AWS, "s3", "ls", "--recursive", "s3://name-before") == ""
    listed = json.loads(cluster.run("bucket", "list", "--json").stdout)
    assert [(one["state"], one["formerly"]) for one in listed if one["formerly"]] == [("lending", "name-before")]
    run(cluster, AWS, "s3", "sync", "s3://name-after", str(tmp_path / "after"))
    assert read_tree(tmp_path / "after") == files
    run(cluster, AWS, "s3", "rb", "--force", "s3://name-after")
    run(cluster, AWS, "s3", "rb", "s3://name-before")
