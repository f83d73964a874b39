"""Further unmodified clients against the running cluster: libraries for data (PyArrow, s3fs, DuckDB), Terraform's state
with its lock, aws cli 2, pgBackRest; and the calls that Velero and Loki make.

The libraries live in an environment of their own (``tests/clients.lock``), since they want other versions of botocore
than the tests. A client that is missing is skipped, with the reason.
"""

from __future__ import annotations

import json
import os
import random
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from socket import create_connection, create_server, socket
from typing import Any

import pytest
from botocore.exceptions import ClientError  # type: ignore[import-untyped]

from tests.cluster import Cluster
from tests.s3.test_real_clients import MIB, need, run

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
"""Of the libraries."""


def need_library(name: str) -> None:
    found = PYTHON.exists() and subprocess.run([PYTHON, "-c", f"import {name}"], capture_output=True, check=False)
    if not found or found.returncode:
        pytest.skip(f"{name} is not installed in {PYTHON.parent.parent.name}: tests/run makes it where it can")


def run_script(cluster: Cluster, script: str, **more: Any) -> str:
    """Runs Python in the environment of the libraries. The script gets ``at``: endpoint, host, region, keys."""
    at = {**cluster.settings, "endpoint": cluster.endpoint, "host": cluster.endpoint.split("//")[1], **more}
    return run(cluster, str(PYTHON), "-c", f"import json\nat = json.loads({json.dumps(json.dumps(at))})\n{script}")


PYARROW = """
import pyarrow as pa, pyarrow.dataset as ds, pyarrow.parquet as pq
from pyarrow.fs import FileSelector, FileType, S3FileSystem

fs = S3FileSystem(access_key=at["access_key"], secret_key=at["secret_key"], endpoint_override=at["host"],
                  scheme="http", region=at["region"], allow_bucket_creation=True, allow_bucket_deletion=True,
                  request_timeout=60, connect_timeout=60)
fs.create_dir("pyarrow")
table = pa.table({"n": list(range(50_000)), "kind": [("a", "b", "c d")[n % 3] for n in range(50_000)]})
pq.write_to_dataset(table, "pyarrow/data", partition_cols=["kind"], filesystem=fs)
found = ds.dataset("pyarrow/data", filesystem=fs, partitioning="hive")
assert found.to_table(filter=ds.field("kind") == "c d").num_rows == 16_666
assert sorted(found.to_table(columns=["n"])["n"].to_pylist()) == list(range(50_000))
data = bytes(range(256)) * (21 * 4096)
with fs.open_output_stream("pyarrow/large", metadata={"Content-Type": "a/b"}) as out:
    for start in range(0, len(data), 1_000_000):
        out.write(data[start : start + 1_000_000])
with fs.open_input_file("pyarrow/large") as back:
    assert back.size() == len(data)
    assert back.read_at(1000, 5_000_000) == data[5_000_000:5_001_000]
    assert back.read() == data
fs.copy_file("pyarrow/large", "pyarrow/copy")
fs.move("pyarrow/copy", "pyarrow/moved")
assert fs.get_file_info("pyarrow/copy").type == FileType.NotFound
assert fs.get_file_info("pyarrow/moved").size == len(data)
assert len(fs.get_file_info(FileSelector("pyarrow/data", recursive=True))) == 6
fs.delete_dir("pyarrow")
"""


def test_pyarrow_writes_and_reads_a_dataset(cluster: Cluster) -> None:
    need_library("pyarrow")
    run_script(cluster, PYARROW)


S3FS = """
import s3fs

fs = s3fs.S3FileSystem(key=at["access_key"], secret=at["secret_key"],
                       client_kwargs={"endpoint_url": at["endpoint"], "region_name": at["region"]})
fs.mkdir("s3fs")
fs.pipe({"s3fs/a/1": b"one", "s3fs/a/2": b"two", "s3fs/b": b"bb"})
data = bytes(range(256)) * (11 * 4096)
with fs.open("s3fs/large", "wb", block_size=5 * 2**20) as out:
    out.write(data)
with fs.open("s3fs/large", "rb", block_size=2**20) as back:
    back.seek(7_000_000)
    assert back.read(1000) == data[7_000_000:7_001_000]
assert fs.cat("s3fs/large") == data
assert fs.cat_ranges(["s3fs/large"] * 2, [0, 100], [10, 200]) == [data[:10], data[100:200]]
assert fs.cat("s3fs/a/*") == {"s3fs/a/1": b"one", "s3fs/a/2": b"two"}
assert sorted(fs.find("s3fs")) == ["s3fs/a/1", "s3fs/a/2", "s3fs/b", "s3fs/large"]
assert fs.isdir("s3fs/a") and not fs.exists("s3fs/c")
fs.cp("s3fs/a", "s3fs/c", recursive=True)
fs.mv("s3fs/b", "s3fs/d")
fs.touch("s3fs/e")
fs.put_tags("s3fs/d", {"x": "y"})
assert fs.get_tags("s3fs/d") == {"x": "y"} and fs.info("s3fs/e")["size"] == 0
try:
    with fs.open("s3fs/d", "xb") as out:
        out.write(b"other")
except FileExistsError:
    pass
assert fs.cat("s3fs/d") == b"bb"
fs.rm("s3fs", recursive=True)
"""


def test_s3fs_is_a_file_system(cluster: Cluster) -> None:
    need_library("s3fs")
    run_script(cluster, S3FS)


DUCKDB = """
import duckdb
from pathlib import Path
db = duckdb.connect()
[extension] = (Path(duckdb.__file__).parents[1] / "duckdb_ext").rglob("httpfs.duckdb_extension")
db.execute(f"LOAD '{extension}'")
db.execute("CREATE SECRET (TYPE s3, KEY_ID $k, SECRET $s, REGION $r, ENDPOINT $h, URL_STYLE 'path', USE_SSL false)"
           .replace("$k", repr(at["access_key"])).replace("$s", repr(at["secret_key"]))
           .replace("$r", repr(at["region"])).replace("$h", repr(at["host"])))
db.execute("COPY (SELECT n, n % 7 AS part FROM range(200000) t(n)) TO 's3://duckdb/data'"
           " (FORMAT parquet, PARTITION_BY part)")
assert db.execute("SELECT count(*), sum(n) FROM 's3://duckdb/data/*/*.parquet' WHERE part = 3").fetchone()[0] == 28571
db.execute("COPY (SELECT n, md5(n::varchar) AS m FROM range(300000) t(n)) TO 's3://duckdb/large.csv'")
assert db.execute("SELECT count(*) FROM read_csv('s3://duckdb/large.csv')").fetchone() == (300000,)
"""


def test_duckdb_writes_and_queries_files(cluster: Cluster) -> None:
    need_library("duckdb")
    cluster.boto3().create_bucket(Bucket="duckdb")
    run_script(cluster, DUCKDB)


TERRAFORM = """
terraform {
  backend "s3" {
    bucket = "terraform"
    key = "state/main.tfstate"
    region = "REGION"
    endpoints = { s3 = "ENDPOINT" }
    use_path_style = true
    use_lockfile = true
    skip_credentials_validation = true
    skip_metadata_api_check = true
    skip_region_validation = true
    skip_requesting_account_id = true
  }
}
resource "terraform_data" "thing" { input = "VALUE" }
"""


def test_terraform_keeps_its_state_and_its_lock(cluster: Cluster, tmp_path: Path) -> None:
    """The lock is an object that is created with If-None-Match: *."""
    need("terraform")
    client = cluster.boto3()
    client.create_bucket(Bucket="terraform")
    client.put_bucket_versioning(Bucket="terraform", VersioningConfiguration={"Status": "Enabled"})

    def terraform(*command: str, value: str = "one") -> str:
        text = TERRAFORM.replace("REGION", cluster.settings["region"]).replace("ENDPOINT", cluster.endpoint)
        (tmp_path / "main.tf").write_text(text.replace("VALUE", value))
        return run(cluster, "terraform", f"-chdir={tmp_path}", *command, TF_CLI_CONFIG_FILE=os.devnull)

    version = json.loads(run(cluster, "terraform", "version", "-json", TF_CLI_CONFIG_FILE=os.devnull))
    if tuple(map(int, version["terraform_version"].split(".")[:2])) < (1, 10):
        pytest.skip("this terraform has no lock files: they came with 1.10")
    terraform("init", "-input=false")
    terraform("apply", "-auto-approve", "-input=false")
    where = {"Bucket": "terraform", "Key": "state/main.tfstate"}
    assert json.loads(client.get_object(**where)["Body"].read())["serial"] == 1
    lock = {"Bucket": "terraform", "Key": "state/main.tfstate.tflock"}
    client.put_object(**lock, Body=json.dumps({"ID": "1", "Who": "another", "Info": ""}), IfNoneMatch="*")
    with pytest.raises(AssertionError, match="state lock"):
        terraform("apply", "-auto-approve", "-input=false", "-lock-timeout=0s", value="two")
    client.delete_object(**lock)
    terraform("apply", "-auto-approve", "-input=false", value="two")
    assert json.loads(client.get_object(**where)["Body"].read())["serial"] == 2
    with pytest.raises(ClientError, match="404"):
        client.head_object(**lock)


def test_aws_cli_2_copies_and_lists(cluster: Cluster, tmp_path: Path) -> None:
    found = next((path for path in ("/usr/bin/aws", "/usr/local/bin/aws") if Path(path).exists()), "")
    if not found or not run(cluster, found, "--version").startswith("aws-cli/2"):
        pytest.skip("aws cli 2 is not installed here")
    data = random.Random(2).randbytes(21 * MIB + 3)
    (tmp_path / "large").write_bytes(data)
    at = ("--endpoint-url", cluster.endpoint)  # of a time before AWS_ENDPOINT_URL
    run(cluster, found, *at, "s3", "mb", "s3://aws-cli-2")
    run(cluster, found, *at, "s3", "cp", "--no-progress", str(tmp_path / "large"), "s3://aws-cli-2/a/large")
    run(cluster, found, *at, "s3", "cp", "--no-progress", "s3://aws-cli-2/a/large", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == data
    assert "large" in run(cluster, found, *at, "s3", "ls", "--recursive", "s3://aws-cli-2")
    run(cluster, found, *at, "s3", "rb", "--force", "s3://aws-cli-2")


# --- https, which some clients insist on


class TlsFront:
    """Listens with TLS, and passes everything on to the cluster's port."""

    def __init__(self, folder: Path, target: tuple[str, int]) -> None:
        command = [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-days",
                "2",
            ),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", str(folder / "key.pem"), "-out", str(folder / "certificate.pem")),
        ]
        subprocess.run(command, check=True, capture_output=True)
        self.certificate = folder / "certificate.pem"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, folder / "key.pem")
        self._target = target
        self._context = context
        self._listener = create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(accepted,), daemon=True).start()

    def _serve(self, accepted: socket) -> None:
        try:
            client = self._context.wrap_socket(accepted, server_side=True)
            server = create_connection(self._target)
        except OSError:
            accepted.close()
            return
        threading.Thread(target=_pass_on, args=(server, client), daemon=True).start()
        _pass_on(client, server)


def _pass_on(source: socket, sink: socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        pass
    for end in (source, sink):
        try:
            end.close()
        except OSError:
            pass


@pytest.fixture(scope="module")
def front(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsFront]:
    need("openssl")
    host, port = cluster.endpoint.split("//")[1].split(":")
    found = TlsFront(tmp_path_factory.mktemp("tls"), (host, int(port)))
    yield found
    found.close()


def test_pgbackrest_keeps_a_repository(cluster: Cluster, front: TlsFront, tmp_path: Path) -> None:
    """It speaks S3 itself, only over https: signed payloads, Content-MD5, lists of version 2, POST ?delete."""
    need("pgbackrest")
    cluster.boto3().create_bucket(Bucket="pgbackrest")
    options = {
        "repo1-type": "s3", "repo1-path": "/repo", "repo1-s3-bucket": "pgbackrest", "repo1-s3-endpoint": "localhost",
        "repo1-s3-region": cluster.settings["region"], "repo1-s3-uri-style": "path", "repo1-storage-verify-tls": "n",
        "repo1-storage-host": "localhost", "repo1-storage-port": str(front.port),
        "repo1-s3-key": cluster.settings["access_key"], "repo1-s3-key-secret": cluster.settings["secret_key"],
        "log-path": str(tmp_path), "lock-path": str(tmp_path),
    }  # fmt: skip
    config = tmp_path / "pgbackrest.conf"
    config.write_text("[global]\n" + "".join(f"{name}={value}\n" for name, value in options.items()))
    command = ("pgbackrest", f"--config={config}")
    data = random.Random(3).randbytes(12 * MIB + 5)
    run(cluster, *command, "repo-put", "archive/db/large", stdin=data)
    run(cluster, *command, "repo-put", "archive/db/a b+c", stdin=b"small")
    back = subprocess.run([*command, "repo-get", "archive/db/large"], capture_output=True, check=True, timeout=180)
    assert back.stdout == data
    assert run(cluster, *command, "repo-ls", "archive/db").split("\n")[:2] == ["a b+c", "large"]
    run(cluster, *command, "repo-rm", "--recurse", "archive")
    assert run(cluster, *command, "repo-ls", "--recurse").strip() == ""


def test_boto3_over_https_sends_trailers(
    cluster: Cluster, front: TlsFront, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over https a checksum comes after the body, in a trailer of aws-chunked."""
    monkeypatch.setenv("AWS_CA_BUNDLE", str(front.certificate))
    client = cluster.boto3(endpoint_url=f"https://localhost:{front.port}")
    client.create_bucket(Bucket="over-https")
    sizes = {"empty": 0, "small": 1_000, "large": 17 * MIB + 1}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(data := random.Random(size).randbytes(size))
        client.upload_file(str(tmp_path / name), "over-https", name)
        assert client.get_object(Bucket="over-https", Key=name, ChecksumMode="ENABLED")["Body"].read() == data
        with (tmp_path / name).open("rb") as body:
            client.put_object(Bucket="over-https", Key=name, Body=body, ChecksumAlgorithm="SHA256")
        assert client.head_object(Bucket="over-https", Key=name, ChecksumMode="ENABLED")["ChecksumSHA256"]


# --- the calls of programs that are not installed here, as their documentation and their permissions list them


def test_the_calls_of_velero(cluster: Cluster) -> None:
    """Its AWS plug-in wants GetObject, DeleteObject, PutObject, AbortMultipartUpload, ListMultipartUploadParts and
    ListBucket. https://github.com/vmware-tanzu/velero-plugin-for-aws#set-permissions-for-velero
    """
    client = cluster.boto3()
    client.create_bucket(Bucket="velero")
    for name in ("backups/b1/velero-backup.json", "backups/b1/b1.tar.gz", "backups/b2/velero-backup.json"):
        client.put_object(Bucket="velero", Key=name, Body=name.encode(), Tagging="")
    page = client.list_objects_v2(Bucket="velero", Prefix="backups/", Delimiter="/")
    assert [found["Prefix"] for found in page["CommonPrefixes"]] == ["backups/b1/", "backups/b2/"]
    with pytest.raises(ClientError) as missing:
        client.head_object(Bucket="velero", Key="backups/b3/velero-backup.json")
    assert missing.value.response["Error"]["Code"] == "404"
    url = client.generate_presigned_url("get_object", {"Bucket": "velero", "Key": "backups/b1/b1.tar.gz"}, 600)
    from urllib.request import urlopen

    with urlopen(url) as answer:
        assert answer.read() == b"backups/b1/b1.tar.gz"
    where = {"Bucket": "velero", "Key": "backups/b4/b4.tar.gz"}
    upload = client.create_multipart_upload(**where)["UploadId"]
    client.upload_part(**where, UploadId=upload, PartNumber=1, Body=b"x" * 1000)
    assert len(client.list_parts(**where, UploadId=upload)["Parts"]) == 1
    client.abort_multipart_upload(**where, UploadId=upload)
    for found in client.list_objects_v2(Bucket="velero", Prefix="backups/b1/")["Contents"]:
        client.delete_object(Bucket="velero", Key=found["Key"])
    assert client.list_objects_v2(Bucket="velero", Prefix="backups/b1/")["KeyCount"] == 0


def test_the_calls_of_loki(cluster: Cluster) -> None:
    """Its object client wants ListBucket, PutObject, GetObject and DeleteObject: chunks whose names have colons, reads
    of ranges, lists page by page, deletions of what may be gone.
    https://grafana.com/docs/loki/latest/operations/storage/#aws-deployment-s3-single-store
    """
    client = cluster.boto3()
    client.create_bucket(Bucket="loki")
    chunks = {f"fake/{n:016x}:18c0{n:08x}:18c1{n:08x}:{n:08x}": os.urandom(500 + n) for n in range(12)}
    for name, data in chunks.items():
        client.put_object(Bucket="loki", Key=name, Body=data)
    for name, data in chunks.items():
        assert client.get_object(Bucket="loki", Key=name)["Body"].read() == data
        part = client.get_object(Bucket="loki", Key=name, Range="bytes=100-299")
        assert (part["Body"].read(), part["ContentRange"]) == (data[100:300], f"bytes 100-299/{len(data)}")
    with pytest.raises(ClientError, match="NoSuchKey"):
        client.get_object(Bucket="loki", Key="index/delete_requests/delete_requests.gz")
    pages = client.get_paginator("list_objects_v2").paginate(
        Bucket="loki", Prefix="fake/", Delimiter="/", PaginationConfig={"PageSize": 5}
    )
    assert [found["Key"] for page in pages for found in page["Contents"]] == sorted(chunks)
    for name in [*chunks, "fake/gone"]:
        client.delete_object(Bucket="loki", Key=name)
    assert client.list_objects_v2(Bucket="loki")["KeyCount"] == 0
