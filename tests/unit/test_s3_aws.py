"""The tables of what AWS names are complete: they are compared with botocore's model of S3."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from typing import Any

import botocore.loaders  # type: ignore[import-untyped]

from storaged.s3 import aws_names, routes
from storaged.s3.headers import CHECKSUM_HEADERS
from storaged.s3.operation import Document, NoBody, Operation, Stream
from storaged.s3.ops.get import WHOLE_HEADERS
from storaged.s3.ops.put import PLAIN_HEADERS

WITHOUT_ROW = {
    "GetBucketLifecycle", "PutBucketLifecycle", "GetBucketNotification", "PutBucketNotification", "WriteGetObjectResponse",  # noqa: E501
}  # fmt: skip
"""Operations that AWS keeps for old clients beside those of today, and one of another service's hosts."""


@cache
def model() -> dict[str, Any]:
    loaded: dict[str, Any] = botocore.loaders.Loader().load_service_model("s3", "service-2")
    return loaded


def named(operation: str, location: str) -> set[str]:
    """What botocore sends with an operation at ``location`` (header, querystring)."""
    found = model()["operations"][operation].get("input", {}).get("shape")
    members = model()["shapes"][found]["members"].values() if found else ()
    return {member["locationName"] for member in members if member.get("location") == location}


def rows() -> dict[str, Operation]:
    found = {}
    for table in (routes.SERVICE, routes.BUCKET, routes.OBJECT):
        for methods in table.values():
            for operation in methods.values():
                for row in (operation, operation.copy):
                    if row is not None:
                        found[row.name] = row
    return found


def selected(operation: str) -> tuple[str, str, set[str]]:
    """(method, level, parameters that select the operation) as the model has it."""
    http = model()["operations"][operation]["http"]
    path, _, query = http["requestUri"].partition("?")
    level = "object" if "{Key+}" in path else "bucket" if "{Bucket}" in path else "service"
    return http["method"], level, {item.partition("=")[0] for item in query.split("&") if item}


def test_every_operation_of_aws_is_found_by_what_selects_it() -> None:
    for name in sorted(model()["operations"].keys() - WITHOUT_ROW):
        method, level, query = selected(name)
        if "uploadId" in named(name, "querystring"):
            query.add("uploadId")
        if "Id" in model()["shapes"][name + "Request"]["members"]:
            query.add("id")
        headers = {"x-amz-copy-source": "/b/k"} if "x-amz-copy-source" in named(name, "header") else {}
        where = {"service": ("", b""), "bucket": ("bucket", b""), "object": ("bucket", b"key")}[level]
        if name == "ListDirectoryBuckets":
            query = {"max-directory-buckets"}
        found = routes.find(method, *where, dict.fromkeys(query, "1"), headers, len(query)).name
        # a list is found by another parameter than the selector, and is not implemented any more than its like
        assert found == name or (found, name) == ("GetObjectAnnotation", "ListObjectAnnotations")


def test_every_subresource_of_aws_is_listed() -> None:
    for name in model()["operations"].keys() - WITHOUT_ROW:
        _, level, query = selected(name)
        table = {"service": routes.SERVICE, "bucket": routes.BUCKET, "object": routes.OBJECT}[level]
        assert {item for item in query if item != "select-type"} <= table.keys(), name


def test_every_header_of_aws_is_listed_for_its_operation() -> None:
    missing = defaultdict(set)
    for name in model()["operations"].keys() - WITHOUT_ROW:
        for header in named(name, "header"):
            lower = header.lower()
            row = aws_names.HEADERS.get(lower)
            if row is None and lower in routes.Operation("", routes._foreign_action).headers:
                continue  # one that every operation understands, or need not
            if row is None or not (row.operations is aws_names.EVERY or name in row.operations):
                missing[name].add(lower)
    assert not missing


def test_no_header_is_listed_for_an_operation_that_aws_does_not_give_it_to() -> None:
    """But for those that are written out here, with the reason."""
    kept = {
        # SDKs name the algorithm with any body (MinIO's), and AWS verifies any document
        *(
            (name, header)
            for name in aws_names._BODIES
            for header in ("x-amz-checksum-algorithm", *aws_names.CHECKSUMS)
        ),
        *(("CreateSession", f"x-amz-server-side-encryption{suffix}") for suffix in ("", "-aws-kms-key-id", "-context", "-bucket-key-enabled")),  # noqa: E501
        # the API page has them
        *(("GetObjectAttributes", name) for name in ("if-match", "if-none-match", "if-modified-since", "if-unmodified-since")),  # noqa: E501
        ("PutObject", "content-range"),
        ("PutObject", "x-amz-grant-write"),  # its API page has it no more; clients send all five grants
        ("CreateBucket", "x-storaged-countries"),
    }  # fmt: skip
    for header, row in aws_names.HEADERS.items():
        for name in row.operations - {"*", "PostObject", "WriteGetObjectResponse"}:
            assert header in {item.lower() for item in named(name, "header")} or (name, header) in kept, (name, header)


def test_every_parameter_of_aws_is_listed_for_its_operation_and_for_no_other() -> None:
    for name in model()["operations"].keys() - WITHOUT_ROW:
        ours = {"ListParts": {"encoding-type"}, "SelectObjectContent": {"select-type"}}.get(name, set())
        assert aws_names.parameters(name) - ours == named(name, "querystring"), name


def test_every_body_is_a_document_a_stream_or_none_as_on_aws() -> None:
    for name, row in rows().items():
        if name not in model()["operations"] or name in WITHOUT_ROW:
            continue
        shape = model()["operations"][name].get("input", {}).get("shape")
        payload = model()["shapes"][shape].get("payload") if shape else None
        member = model()["shapes"][shape]["members"][payload] if payload else {}
        streams = member.get("streaming") or model()["shapes"].get(member.get("shape", ""), {}).get("streaming")
        if not row.changes:
            assert isinstance(row.body, NoBody)
        else:
            wanted = Stream if streams else Document if payload else NoBody
            assert isinstance(row.body, wanted), name
            assert (name in aws_names.DOCUMENTS) == (wanted is Document)


def test_the_headers_that_the_short_way_does_not_look_at_are_taken() -> None:
    put, get = routes.OBJECT[""]["PUT"], routes.OBJECT[""]["GET"]
    assert put.headers >= PLAIN_HEADERS
    assert get.headers >= WHOLE_HEADERS


def test_what_is_honoured_is_what_the_front_acts_on() -> None:
    """The reverse of a refusal is code that reads the header: each honoured header occurs in it, but for those without
    effect.
    """
    from pathlib import Path

    code = "".join(path.read_text() for path in Path(routes.__file__).parent.rglob("*.py") if path.name != "aws.py")
    without_effect = {"x-amz-user-agent", "x-amz-bypass-governance-retention", *CHECKSUM_HEADERS}
    built = {
        f"x-amz-{what}-source-{name}"
        for what in ("copy", "rename")
        for name in ("if-match", "if-none-match", "if-modified-since", "if-unmodified-since")
    } | {
        prefix + name
        for prefix in (aws_names.CUSTOMER_KEY, aws_names.CUSTOMER_KEY_SOURCE)
        for name in ("algorithm", "key", "key-md5")
    }
    for header, row in aws_names.HEADERS.items():
        assert row.refusal or header in code or header in without_effect | built, header
