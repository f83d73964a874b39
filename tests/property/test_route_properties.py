"""Which operation a request is: botocore's model is the oracle over hostile queries, headers and methods."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import botocore.loaders  # type: ignore[import-untyped]
from hypothesis import example, given, settings
from hypothesis import strategies as st

from storaged.errors import S3Error
from storaged.s3 import aws_names, encryption, routes
from storaged.s3.operation import Operation
from tests.examples import examples

T = TypeVar("T")

CHANGES = ("PUT", "POST", "DELETE")
WHERE = {"bucket": ("bucket", b""), "object": ("bucket", b"key"), "service": ("", b"")}


@cache
def model() -> dict[str, Any]:
    loaded: dict[str, Any] = botocore.loaders.Loader().load_service_model("s3", "service-2")
    return loaded


@cache
def selectors(operation: str) -> frozenset[str]:
    query = model()["operations"][operation]["http"]["requestUri"].partition("?")[2]
    return frozenset(item.partition("=")[0] for item in query.split("&") if item)


@cache
def members(operation: str, location: str) -> frozenset[str]:
    shape = model()["operations"][operation].get("input", {}).get("shape")
    found = model()["shapes"][shape]["members"].values() if shape else ()
    return frozenset(member["locationName"] for member in found if member.get("location") == location)


@cache
def known_parameters() -> tuple[str, ...]:
    names: set[str] = set()
    for operation in model()["operations"]:
        names |= selectors(operation) | members(operation, "querystring")
    return tuple(sorted(names - {"x-id"}))


@cache
def known_headers() -> tuple[str, ...]:
    names: set[str] = set()
    for operation in model()["operations"]:
        names |= {name.lower() for name in members(operation, "header")}
    return tuple(sorted(name for name in names if name.startswith("x-amz-")))


def outcome(work: Callable[[], T]) -> T | S3Error:
    try:
        return work()
    except S3Error as error:
        return error


def odd_case(name: str, mask: int) -> str:
    return "".join(letter.upper() if mask >> index & 1 else letter.lower() for index, letter in enumerate(name))


spelt = st.builds(odd_case, st.sampled_from(known_parameters()), st.integers(0, 2**12))
names = (
    st.sampled_from(known_parameters())
    | spelt
    | st.sampled_from(["x-id", "foo", "", "legalhold", "tags"])
    | st.text(max_size=6)
)
queries = st.lists(names, max_size=3, unique=True).map(lambda found: dict.fromkeys(found, "1"))


@given(st.sampled_from(CHANGES), st.sampled_from(sorted(WHERE)), queries)
@example("DELETE", "object", {"policy": ""})
@example("DELETE", "bucket", {"metadataJournalTable": ""})
@example("PUT", "object", {"Tagging": ""})
@example("DELETE", "object", {"policy?x": ""})
@example("DELETE", "object", {" acl\x00": ""})
@settings(max_examples=examples(3000))
def test_what_changes_something_has_no_parameter_that_its_operation_does_not_take(
    method: str, level: str, query: dict[str, str]
) -> None:
    found = outcome(lambda: routes.find(method, *WHERE[level], query, {}, len(query)))
    if isinstance(found, S3Error):
        assert found.status in (400, 405, 501)
        return
    if not found.changes:
        return  # refused by its handler, or of another service
    takes = selectors(found.name) | members(found.name, "querystring")
    folded = {name.lower(): name for name in known_parameters()}
    for name in query:
        assert name in takes or name.strip().lower() not in folded, (found.name, name)
    assert selectors(found.name) <= query.keys() | {"select-type"}


def rows() -> dict[str, Operation]:
    found = {}
    for table in (routes.BUCKET, routes.OBJECT):
        for methods in table.values():
            for operation in methods.values():
                for row in (operation, operation.copy):
                    if row is not None and row.changes:
                        found[row.name] = row
    return found


@given(
    st.sampled_from(sorted(rows())),
    st.sampled_from(known_headers()),
    st.sampled_from(["", "1", "true", "AES256", "STANDARD"]),
)
@settings(max_examples=examples(3000))
def test_what_changes_something_takes_no_header_that_aws_does_not_give_it(name: str, header: str, value: str) -> None:
    found = outcome(lambda: rows()[name].check_headers({header: value}))
    if isinstance(found, S3Error):
        assert found.status in (400, 501)
        return
    given_by_aws = {item.lower() for item in members(name, "header")}
    harmless = aws_names.HEADERS[header].operations is aws_names.EVERY
    documented = (
        name in aws_names.DOCUMENTS or header == "x-amz-checksum-algorithm"
    )  # checksums of any document are verified
    # The encryption of an upload may be named once more: tests/integration/test_s3_encryption.py has what is refused.
    of_upload = name in ("CompleteMultipartUpload", "UploadPart", "UploadPartCopy")
    named_again = of_upload and header in encryption.OF_UPLOAD
    granted = named_again or (name, header) == ("PutObject", "x-amz-grant-write")  # clients send all five grants
    assert header in given_by_aws or harmless or granted or (documented and header.startswith("x-amz-checksum-")), (
        name,
        header,
    )
