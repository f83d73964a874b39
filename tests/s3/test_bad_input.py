"""What a running cluster says to requests that are wrong: the precise S3 error, nothing partial visible, nothing of the
inside shown.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import os
import re
import socket
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storaged.cli.client import request as admin
from tests.cluster import RACKS, Cluster

BUCKET = "bad-input"
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[Any]:
    found = cluster.boto3()
    found.create_bucket(Bucket=BUCKET)
    yield found
    pages = found.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    for key in [entry["Key"] for page in pages for entry in page.get("Contents", [])]:
        found.delete_object(Bucket=BUCKET, Key=key)
    for upload in found.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []):
        found.abort_multipart_upload(Bucket=BUCKET, Key=upload["Key"], UploadId=upload["UploadId"])
    found.delete_bucket(Bucket=BUCKET)


def signed(
    cluster: Cluster,
    method: str,
    path: str,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
    *,
    payload: str = "",
    **other: str,
) -> dict[str, str]:
    """The headers of a request signed by botocore; ``other``: access_key, secret_key, timestamp where they are not the
    cluster's own.
    """
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    given = {"host": f"127.0.0.1:{cluster.s3_port}", **(headers or {})}
    given["X-Amz-Content-SHA256"] = payload or hashlib.sha256(body).hexdigest()
    request = AWSRequest(method=method, url=f"http://127.0.0.1:{cluster.s3_port}{path}", data=body, headers=given)
    signer = S3SigV4Auth(
        Credentials(
            other.get("access_key", cluster.settings["access_key"]),
            other.get("secret_key", cluster.settings["secret_key"]),
        ),
        "s3",
        cluster.settings["region"],
    )
    request.context["timestamp"] = other.get("timestamp") or time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    request.headers["X-Amz-Date"] = request.context["timestamp"]
    canonical = signer.canonical_request(request)
    request.headers["Authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={signer.scope(request)},"
        f" SignedHeaders={signer.signed_headers(signer.headers_to_sign(request))},"
        f" Signature={signer.signature(signer.string_to_sign(request, canonical), request)}"
    )
    return {name: value for name, value in request.headers.items() if name.lower() != "host"}


def send(
    cluster: Cluster, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None, **other: Any
) -> tuple[int, str]:
    """(status, code): of one signed request, sent as it is."""
    return code_of(*raw_send(cluster, method, path, body, signed(cluster, method, path, body, headers, **other)))


def raw_send(cluster: Cluster, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", cluster.s3_port, timeout=120)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def code_of(status: int, text: str) -> tuple[int, str]:
    """Of an error document, which names the request and shows nothing of the inside."""
    if status < 300:
        return status, ""
    assert text.startswith('<?xml version="1.0" encoding="UTF-8"?>'), text
    for forbidden in ("Traceback", "storaged.", ".py", "0x7"):
        assert forbidden not in text
    code = re.search(r"<Code>(\w+)</Code><Message>[^<]+</Message>", text)
    assert code, text
    assert re.search(r"<RequestId>[0-9A-F]{16}</RequestId>", text)
    return status, code[1]


def absent(client: Any, key: str) -> bool:
    listed = client.list_objects_v2(Bucket=BUCKET, Prefix=key).get("KeyCount")
    with pytest.raises(client.exceptions.ClientError) as caught:
        client.head_object(Bucket=BUCKET, Key=key)
    return listed == 0 and caught.value.response["Error"]["Code"] == "404"


def refused(call: Any, **arguments: Any) -> tuple[int, str]:
    """(status, code) of a boto3 call that fails."""
    from botocore.exceptions import ClientError

    with pytest.raises(ClientError) as caught:
        call(**arguments)
    found = caught.value.response
    return found["ResponseMetadata"]["HTTPStatusCode"], found["Error"]["Code"]


# --- who asks


def test_signatures_clocks_and_keys_that_are_wrong_are_told_apart(cluster: Cluster, client: Any) -> None:
    path = f"/{BUCKET}/unsigned"
    assert send(cluster, "PUT", path, b"x", secret_key="wrong") == (403, "SignatureDoesNotMatch")
    assert send(cluster, "PUT", path, b"x", access_key="SOVNOBODY") == (403, "InvalidAccessKeyId")
    assert send(cluster, "PUT", path, b"x", timestamp="20200101T000000Z") == (403, "RequestTimeTooSkewed")
    ahead = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() + 20 * 60))
    assert send(cluster, "PUT", path, b"x", timestamp=ahead) == (403, "RequestTimeTooSkewed")
    assert code_of(*raw_send(cluster, "PUT", path, b"x", {})) == (403, "AccessDenied")
    headers = signed(cluster, "PUT", path, b"x")
    assert code_of(*raw_send(cluster, "PUT", path + "2", b"x", headers)) == (403, "SignatureDoesNotMatch")
    assert code_of(*raw_send(cluster, "PUT", path, b"y", headers)) == (400, "XAmzContentSHA256Mismatch")
    assert absent(client, "unsigned")


# --- what is sent


@pytest.mark.parametrize("size", [3, 9_000, 5 * MIB])
def test_a_digest_that_does_not_hold_stores_nothing_whatever_the_size(cluster: Cluster, client: Any, size: int) -> None:
    body, key = os.urandom(size), f"digest-{size}"
    path = f"/{BUCKET}/{key}"
    wrong = base64.b64encode(hashlib.md5(b"other").digest()).decode()
    assert send(cluster, "PUT", path, body, {"content-md5": wrong}) == (400, "BadDigest")
    for name, length in (("crc32", 4), ("crc32c", 4), ("crc64nvme", 8), ("sha1", 20), ("sha256", 32)):
        zeros = base64.b64encode(bytes(length)).decode()
        assert send(cluster, "PUT", path, body, {f"x-amz-checksum-{name}": zeros}) == (400, "BadDigest"), name
        assert send(cluster, "PUT", path, body, {f"x-amz-checksum-{name}": "AAAA"}) == (400, "BadDigest"), name
    assert send(cluster, "PUT", path, body, {"content-md5": "not base64!"}) == (400, "InvalidDigest")
    assert send(cluster, "PUT", path, body, payload=hashlib.sha256(b"other").hexdigest()) == (
        400,
        "XAmzContentSHA256Mismatch",
    )
    trailing = f"{size:x}\r\n".encode() + body + b"\r\n0\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n"
    headers = {
        "x-amz-trailer": "x-amz-checksum-crc32",
        "x-amz-decoded-content-length": str(size),
        "content-encoding": "aws-chunked",
    }
    assert send(cluster, "PUT", path, trailing, headers, payload="STREAMING-UNSIGNED-PAYLOAD-TRAILER") == (
        400,
        "BadDigest",
    )
    headers["x-amz-decoded-content-length"] = str(size + 1)
    assert send(cluster, "PUT", path, trailing, headers, payload="STREAMING-UNSIGNED-PAYLOAD-TRAILER") == (
        400,
        "IncompleteBody",
    )
    assert absent(client, key)


@pytest.mark.parametrize("size", [500, 12_000, 9 * MIB])
def test_a_client_that_leaves_in_the_middle_changes_nothing_and_holds_nothing_up(
    cluster: Cluster, client: Any, size: int
) -> None:
    key = f"gone-{size}"
    client.put_object(Bucket=BUCKET, Key=key, Body=b"before")
    headers = signed(cluster, "PUT", f"/{BUCKET}/{key}", payload="UNSIGNED-PAYLOAD")
    head = f"PUT /{BUCKET}/{key} HTTP/1.1\r\nHost: 127.0.0.1:{cluster.s3_port}\r\nContent-Length: {size}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    with socket.create_connection(("127.0.0.1", cluster.s3_port), 10) as connection:
        connection.sendall(head.encode() + os.urandom(size - 1))
    with socket.create_connection(("127.0.0.1", cluster.s3_port), 10) as connection:
        connection.sendall(head.encode() + os.urandom(size - 1))
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(20)
        connection.recv(4096)  # the server answers what it can, or closes
    assert client.get_object(Bucket=BUCKET, Key=key)["Body"].read() == b"before"
    cluster.wait_until(lambda: in_flight(cluster) == 0, 10, "the broken requests to end")


def in_flight(cluster: Cluster) -> int:
    import urllib.request

    port = admin_port(cluster)
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()
    found = re.search(r"^storaged_s3_in_flight(?:\{[^}]*\})? ([0-9.]+)$", text, re.MULTILINE)
    return int(float(found[1])) if found else -1


def admin_port(cluster: Cluster) -> int:
    import json

    return int(json.loads((cluster.directory / "dev.json").read_text())["admin_port"])


def test_names_that_no_bucket_and_no_key_can_have_are_refused(cluster: Cluster, client: Any) -> None:
    for name in ("ab", "Upper", "under_score", "a" * 64, "192.168.1.1", "a..b", "-a-b", "xn--abc", "caf%C3%A9"):
        assert send(cluster, "PUT", f"/{name}") == (400, "InvalidBucketName"), name
    assert send(cluster, "PUT", "/%ff%fe") == (400, "InvalidURI")
    for path in ("%ff", "a%C3", "%ED%A0%80"):
        assert send(cluster, "PUT", f"/{BUCKET}/{path}", b"x") == (400, "InvalidURI"), path
    assert send(cluster, "PUT", f"/{BUCKET}/{'k' * 1025}", b"x") == (400, "KeyTooLongError")
    assert send(cluster, "PUT", f"/{BUCKET}/{'k' * 1024}", b"x") == (200, "")
    assert send(cluster, "GET", "/nobodys-bucket/x") == (404, "NoSuchBucket")
    assert send(cluster, "GET", f"/{BUCKET}/nothing") == (404, "NoSuchKey")


def test_documents_that_are_bombs_or_too_large_or_no_xml_change_nothing(cluster: Cluster, client: Any) -> None:
    client.put_object(Bucket=BUCKET, Key="kept", Body=b"kept")
    lol = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    bomb = (
        f'<?xml version="1.0"?><!DOCTYPE l [<!ENTITY l0 "lol">{lol}]><Delete><Object><Key>&l9;</Key></Object></Delete>'
    )
    external = '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><Delete><Object><Key>&e;</Key></Object></Delete>'
    deep = "<a>" * 100_000
    for text in (bomb, external, deep, "<Delete><Object><Key>kept</Key></Object>", "\x00", "", "<Delete></Delete>"):
        body = text.encode()
        md5 = base64.b64encode(hashlib.md5(body).digest()).decode()
        assert send(cluster, "POST", f"/{BUCKET}?delete", body, {"content-md5": md5}) == (400, "MalformedXML"), text[
            :40
        ]
    many = ("<Delete>" + "<Object><Key>kept</Key></Object>" * 1001 + "</Delete>").encode()
    md5 = base64.b64encode(hashlib.md5(many).digest()).decode()
    assert send(cluster, "POST", f"/{BUCKET}?delete", many, {"content-md5": md5}) == (400, "MalformedXML")
    huge = b"<Delete>" + b" " * (3 * MIB)
    md5 = base64.b64encode(hashlib.md5(huge).digest()).decode()
    assert send(cluster, "POST", f"/{BUCKET}?delete", huge, {"content-md5": md5}) == (400, "MaxMessageLengthExceeded")
    assert client.get_object(Bucket=BUCKET, Key="kept")["Body"].read() == b"kept"


def test_headers_and_metadata_beyond_their_bounds_are_refused(cluster: Cluster, client: Any) -> None:
    path = f"/{BUCKET}/headers"
    assert send(cluster, "PUT", path, b"x", {"x-amz-meta-a": "v" * 2049}) == (400, "MetadataTooLarge")
    assert send(cluster, "PUT", path, b"x", {"x-long": "v" * 20_000}) == (400, "RequestHeaderSectionTooLarge")
    many = {f"x-many-{number}": "v" * 1000 for number in range(60)}
    assert send(cluster, "PUT", path, b"x", many) == (400, "RequestHeaderSectionTooLarge")
    assert send(cluster, "PUT", path, b"x", {f"x-many-{number}": "v" for number in range(300)}) == (
        400,
        "RequestHeaderSectionTooLarge",
    )
    assert absent(client, "headers")


# --- multipart


def test_uploads_that_cannot_be_completed_are_refused_and_stay_as_they_are(cluster: Cluster, client: Any) -> None:
    where = {"Bucket": BUCKET, "Key": "parts"}
    upload = {**where, "UploadId": client.create_multipart_upload(**where)["UploadId"]}
    etags = [client.upload_part(**upload, PartNumber=number, Body=b"small")["ETag"] for number in (1, 2)]
    both = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
    complete = client.complete_multipart_upload
    assert refused(complete, **upload, MultipartUpload={"Parts": both}) == (400, "EntityTooSmall")
    assert refused(complete, **upload, MultipartUpload={"Parts": both[::-1]}) == (400, "InvalidPartOrder")
    assert refused(complete, **upload, MultipartUpload={"Parts": [{"PartNumber": 3, "ETag": etags[0]}]}) == (
        400,
        "InvalidPart",
    )
    assert refused(
        complete, **upload, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": '"' + "0" * 32 + '"'}]}
    ) == (400, "InvalidPart")
    assert refused(client.upload_part, **upload, PartNumber=10_001, Body=b"x") == (400, "InvalidArgument")
    assert send(cluster, "PUT", f"/{BUCKET}/parts?partNumber=0&uploadId={upload['UploadId']}", b"x") == (
        400,
        "InvalidArgument",
    )
    lines = "".join(
        f"<Part><PartNumber>{number}</PartNumber><ETag>{etags[0]}</ETag></Part>" for number in range(1, 10_002)
    )
    document = f"<CompleteMultipartUpload>{lines}</CompleteMultipartUpload>".encode()
    target = f"/{BUCKET}/parts?uploadId={upload['UploadId']}"
    assert send(cluster, "POST", target, document) == (400, "MalformedXML")
    assert send(cluster, "POST", target, b"<CompleteMultipartUpload></CompleteMultipartUpload>") == (
        400,
        "MalformedXML",
    )
    assert absent(client, "parts")
    assert [part["PartNumber"] for part in client.list_parts(**upload)["Parts"]] == [1, 2]
    complete(**upload, MultipartUpload={"Parts": both[:1]})
    assert client.get_object(**where)["Body"].read() == b"small"


@pytest.mark.parametrize(
    "upload_id", ["nothing-of-ours", "0" * 32, "A" * 500, "..%2F..%2Fx", urllib.parse.quote("ü\n"), "%00"]
)
def test_an_unknown_upload_is_no_such_upload_for_every_call(cluster: Cluster, client: Any, upload_id: str) -> None:
    target = f"/{BUCKET}/unknown?uploadId={upload_id}"
    body = b"<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>x</ETag></Part></CompleteMultipartUpload>"
    assert send(cluster, "PUT", f"/{BUCKET}/unknown?partNumber=1&uploadId={upload_id}", b"x") == (404, "NoSuchUpload")
    assert send(cluster, "GET", target) == (404, "NoSuchUpload")
    assert send(cluster, "DELETE", target) == (404, "NoSuchUpload")
    assert send(cluster, "POST", target, body) == (404, "NoSuchUpload")


# --- and nothing of it in the logs


def test_none_of_it_left_a_traceback_in_any_log(cluster: Cluster, client: Any) -> None:
    for name in (*RACKS, "gateway"):
        assert "Traceback" not in (cluster.directory / name / "log").read_text(), name
        assert admin(cluster.directory / name, "GET", "/healthz")["healthy"] is True
    assert Path(f"/proc/{cluster.pids()['gateway']}").exists()


@pytest.mark.parametrize(
    ("method", "query", "headers", "answer"),
    [
        ("DELETE", "policy", {}, (405, "MethodNotAllowed")),
        ("DELETE", "ACL", {}, (501, "NotImplemented")),
        ("PUT", "annotation=a", {}, (501, "NotImplemented")),
        ("PUT", "partNumber=1", {}, (400, "InvalidArgument")),
        (
            "PUT",
            "",
            {"x-amz-write-offset-bytes": "3", "x-amz-server-side-encryption": "AES256"},
            (501, "NotImplemented"),
        ),
        ("PUT", "", {"if-match": '""'}, (412, "PreconditionFailed")),
        ("PUT", "", {"if-match": "W/"}, (412, "PreconditionFailed")),
        ("PUT", "", {"if-none-match": '*,"x"'}, (501, "NotImplemented")),
        ("DELETE", "", {"if-match": '""'}, (412, "PreconditionFailed")),
        ("DELETE", "", {"if-none-match": "*"}, (501, "NotImplemented")),
        ("DELETE", "", {"if-unmodified-since": "Mon, 01 Jan 1994 00:00:00 GMT"}, (501, "NotImplemented")),
    ],
)
def test_what_is_not_understood_leaves_the_object_as_it_was(
    cluster: Cluster, client: Any, method: str, query: str, headers: dict[str, str], answer: tuple[int, str]
) -> None:
    client.put_object(Bucket=BUCKET, Key="kept", Body=b"as it was")
    target = f"/{BUCKET}/kept{'?' if query else ''}{query}"
    assert send(cluster, method, target, b"new" if method == "PUT" else b"", headers) == answer
    assert client.get_object(Bucket=BUCKET, Key="kept")["Body"].read() == b"as it was"


def test_an_empty_object_has_no_range_but_its_last_bytes(cluster: Cluster, client: Any) -> None:
    client.put_object(Bucket=BUCKET, Key="none", Body=b"")
    for arguments, status in (({"Range": "bytes=-5"}, 200), ({"PartNumber": 1}, 200)):
        for call in (client.get_object, client.head_object):
            found = call(Bucket=BUCKET, Key="none", **arguments)
            assert (found["ResponseMetadata"]["HTTPStatusCode"], found["ContentLength"], found.get("ContentRange")) == (
                status,
                0,
                None,
            )
