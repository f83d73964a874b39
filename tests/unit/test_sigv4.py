"""Signatures: AWS's published examples, and what must not pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from storaged import errors
from storaged.s3.auth import sigv4
from storaged.s3.request import parse_target

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "sigv4.json").read_text())
SECRET = VECTORS["secret_key"]
NOW_MS = sigv4.timestamp_ms(VECTORS["timestamp"])


def authorization(case: dict[str, Any], signature: str = "", credential: str = "") -> str:
    signed = ";".join(sorted(case["headers"]))
    credential = credential or f"{VECTORS['access_key']}/20130524/us-east-1/s3/aws4_request"
    return f"AWS4-HMAC-SHA256 Credential={credential},SignedHeaders={signed},Signature={signature or case['signature']}"


def check(case: dict[str, Any], claim: sigv4.Claim, secret: str = SECRET) -> sigv4.ChunkKey:
    target = parse_target(case["target"].encode())
    payload = sigv4.payload_hash(claim, case["headers"], target.query)
    return sigv4.verify(claim, secret, case["method"], target.raw_path, target.pairs, case["headers"], payload)


CASES = [pytest.param(case, id=case["name"]) for case in VECTORS["header_requests"]]
FIRST = VECTORS["header_requests"][0]


@pytest.mark.parametrize("case", CASES)
def test_aws_examples_of_signed_headers_verify(case: dict[str, Any]) -> None:
    claim = sigv4.claim_from_header(authorization(case), case["headers"])
    sigv4.check_scope(claim, "us-east-1")
    sigv4.check_time(claim, NOW_MS + 899_000)
    sigv4.check_signed_headers(claim, case["headers"])
    assert check(case, claim).seed == case["signature"]


@pytest.mark.parametrize("case", CASES)
def test_an_altered_request_does_not_verify(case: dict[str, Any]) -> None:
    claim = sigv4.claim_from_header(authorization(case), case["headers"])
    for altered in (
        {**case, "method": "DELETE"},
        {**case, "target": "/other" + case["target"]},
        {**case, "target": case["target"] + ("&" if "?" in case["target"] else "?") + "versionId=1"},
        {**case, "headers": {**case["headers"], "host": "evil.example"}},
    ):
        with pytest.raises(errors.SignatureDoesNotMatch):
            check(altered, claim)
    with pytest.raises(errors.SignatureDoesNotMatch) as caught:
        check(case, claim, secret="another")
    assert caught.value.details["AWSAccessKeyId"] == VECTORS["access_key"]


def test_the_aws_example_of_a_presigned_url_verifies_until_it_expires() -> None:
    target = parse_target(VECTORS["presigned"]["target"].encode())
    claim = sigv4.claim_from_query(target.query)
    headers = {"host": VECTORS["presigned"]["host"]}
    sigv4.verify(
        claim, SECRET, "GET", target.raw_path, target.pairs, headers, sigv4.payload_hash(claim, headers, target.query)
    )
    sigv4.check_time(claim, NOW_MS + 86_399_000)
    with pytest.raises(errors.AccessDenied, match="expired"):
        sigv4.check_time(claim, NOW_MS + 86_400_000)
    with pytest.raises(errors.AccessDenied, match="not valid yet"):
        sigv4.check_time(claim, NOW_MS - 901_000)
    with pytest.raises(errors.SignatureDoesNotMatch):
        sigv4.verify(claim, SECRET, "PUT", target.raw_path, target.pairs, headers, sigv4.UNSIGNED_PAYLOAD)


def test_a_skewed_clock_is_told_both_times_and_the_limit() -> None:
    claim = sigv4.claim_from_header(authorization(FIRST), FIRST["headers"])
    for skew_ms in (-901_000, 901_000):
        with pytest.raises(errors.RequestTimeTooSkewed) as caught:
            sigv4.check_time(claim, NOW_MS + skew_ms)
        assert caught.value.details["RequestTime"] == "20130524T000000Z"
        assert caught.value.details["MaxAllowedSkewMilliseconds"] == "900000"
        assert caught.value.details["ServerTime"].startswith("2013-05-2")


@pytest.mark.parametrize("region", ["", "eu-central-1"])
def test_another_region_or_none_is_told_the_right_one(region: str) -> None:
    claim = replace(sigv4.claim_from_header(authorization(FIRST), FIRST["headers"]), region=region)
    with pytest.raises(errors.AuthorizationHeaderMalformed) as caught:
        sigv4.check_scope(claim, "us-east-1")
    assert caught.value.details["Region"] == "us-east-1"
    with pytest.raises(errors.AuthorizationQueryParametersError):
        sigv4.check_scope(replace(claim, expires_s=60), "us-east-1")


def test_an_empty_region_parses_and_another_service_is_refused() -> None:
    text = authorization(FIRST, credential=f"{VECTORS['access_key']}/20130524//iam/aws4_request")
    claim = sigv4.claim_from_header(text, FIRST["headers"])
    assert (claim.region, claim.service) == ("", "iam")
    with pytest.raises(errors.AuthorizationHeaderMalformed, match="incorrect service"):
        sigv4.check_scope(claim, "us-east-1")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("AWS AKIA:signature", errors.InvalidRequest),
        ("Basic dXNlcg==", errors.InvalidRequest),
        ("AWS4-HMAC-SHA256", errors.AuthorizationHeaderMalformed),
        (
            "AWS4-HMAC-SHA256 Credential=a/20130524/us-east-1/s3/aws4_request,Signature=00",
            errors.AuthorizationHeaderMalformed,
        ),
        (
            "AWS4-HMAC-SHA256 Credential=a/20130524/s3/aws4_request,SignedHeaders=host,Signature=00",
            errors.AuthorizationHeaderMalformed,
        ),
        (
            "AWS4-HMAC-SHA256 Credential=a/20130525/us-east-1/s3/aws4_request,SignedHeaders=host,Signature=00",
            errors.AuthorizationHeaderMalformed,
        ),
        (
            "AWS4-HMAC-SHA256 Credential=a/20130524/us-east-1/s3/aws4_request,SignedHeaders=range,Signature=00",
            errors.AuthorizationHeaderMalformed,
        ),
        (
            "AWS4-HMAC-SHA256 Credential=a/20130524/us-east-1/s3/aws4_request,SignedHeaders=host;a;A,Signature=00",
            errors.AuthorizationHeaderMalformed,
        ),
    ],
)
def test_malformed_authorizations_are_refused_precisely(text: str, error: type[errors.S3Error]) -> None:
    with pytest.raises(error):
        sigv4.claim_from_header(text, FIRST["headers"])


@pytest.mark.parametrize("filler", [" ", ", ", " ,", "Credential=", "Credential=,", "\t"])
def test_a_strangers_authorization_costs_no_more_than_its_length(filler: str) -> None:
    """A mebibyte: what backtracks would be busy with it for hours, and every other connection would wait."""
    for text in (filler * (2**20 // len(filler)) + "x", " x" + filler * (2**20 // len(filler)) + ",Signature=0"):
        with pytest.raises(errors.AuthorizationHeaderMalformed):
            sigv4.claim_from_header(sigv4.ALGORITHM + text, {"x-amz-date": "20130524T000000Z"})


@pytest.mark.parametrize(
    "twice", ["Credential=b/20130524/us-east-1/s3/aws4_request", "SignedHeaders=host;x-amz-date", "Signature=11"]
)
def test_a_component_that_comes_twice_is_no_signature(twice: str) -> None:
    once = "AWS4-HMAC-SHA256 Credential=a/20130524/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=00"
    assert sigv4.claim_from_header(once, {"x-amz-date": "20130524T000000Z"}).access_key == "a"
    with pytest.raises(errors.AuthorizationHeaderMalformed):
        sigv4.claim_from_header(f"{once}, {twice}", {"x-amz-date": "20130524T000000Z"})


@pytest.mark.parametrize(
    "more", ["Basic dXNlcg==", "Token=1", "x", "AWS4-HMAC-SHA256 Credential=b/20130524/r/s3/aws4_request"]
)
def test_an_authorization_that_says_more_than_its_components_is_refused(more: str) -> None:
    """A proxy may have joined two headers, and have checked the other one."""
    once = "AWS4-HMAC-SHA256 Credential=a/20130524/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=00"
    assert sigv4.claim_from_header(f"{once},", {"x-amz-date": "20130524T000000Z"}).access_key == "a"
    with pytest.raises(errors.AuthorizationHeaderMalformed):
        sigv4.claim_from_header(f"{once}, {more}", {"x-amz-date": "20130524T000000Z"})


def test_spaces_and_the_order_of_the_components_do_not_matter() -> None:
    signed = ";".join(sorted(FIRST["headers"]))
    text = (
        f"AWS4-HMAC-SHA256  Signature={FIRST['signature']},  SignedHeaders={signed} ,"
        f"Credential={VECTORS['access_key']}/20130524/us-east-1/s3/aws4_request"
    )
    check(FIRST, sigv4.claim_from_header(text, FIRST["headers"]))


def test_the_date_header_serves_when_there_is_no_x_amz_date() -> None:
    headers = {"host": "h", "date": "Fri, 24 May 2013 00:00:00 GMT"}
    text = "AWS4-HMAC-SHA256 Credential=a/20130524/us-east-1/s3/aws4_request,SignedHeaders=date;host,Signature=00"
    assert sigv4.claim_from_header(text, headers).timestamp == "20130524T000000Z"
    for bad in ({"host": "h"}, {"host": "h", "date": "yesterday"}, {"host": "h", "x-amz-date": "20130524"}):
        with pytest.raises(errors.AccessDenied):
            sigv4.claim_from_header(text, bad)


def test_unsigned_amz_headers_are_named() -> None:
    claim = sigv4.claim_from_header(authorization(FIRST), FIRST["headers"])
    with pytest.raises(errors.AccessDenied) as caught:
        sigv4.check_signed_headers(claim, {**FIRST["headers"], "x-amz-acl": "private"})
    assert caught.value.details["HeadersNotSigned"] == "x-amz-acl"


def test_content_sha256_must_be_there_and_be_one_of_the_known_forms() -> None:
    claim = sigv4.claim_from_header(authorization(FIRST), FIRST["headers"])
    for headers in (
        {},
        {"x-amz-content-sha256": "abc"},
        {"x-amz-content-sha256": "STREAMING-AWS4-ECDSA-P256-SHA256-PAYLOAD"},
    ):
        with pytest.raises(errors.InvalidRequest):
            sigv4.payload_hash(claim, headers, {})


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"X-Amz-Algorithm": "AWS4-HMAC-SHA1"}, errors.AuthorizationQueryParametersError),
        ({"X-Amz-Credential": "nobody"}, errors.AuthorizationQueryParametersError),
        ({"X-Amz-Date": "yesterday"}, errors.AuthorizationQueryParametersError),
        ({"X-Amz-Expires": "soon"}, errors.AuthorizationQueryParametersError),
        ({"X-Amz-Expires": "604801"}, errors.AccessDenied),
        ({"X-Amz-Expires": "-1"}, errors.AccessDenied),
        ({"X-Amz-SignedHeaders": "range"}, errors.AuthorizationQueryParametersError),
        ({"X-Amz-SignedHeaders": "host;range;host"}, errors.AuthorizationQueryParametersError),
        ({"X-Amz-Signature": ""}, errors.AuthorizationQueryParametersError),
    ],
)
def test_malformed_presigned_urls_are_refused_precisely(change: dict[str, str], error: type[errors.S3Error]) -> None:
    query = {**parse_target(VECTORS["presigned"]["target"].encode()).query, **change}
    with pytest.raises(error):
        sigv4.claim_from_query(query)


@pytest.mark.parametrize("name", ["chunked", "chunked_trailer"])
def test_aws_examples_of_chunk_signatures_follow_from_the_seed(name: str) -> None:
    import hashlib

    case = VECTORS[name]
    key = sigv4.ChunkKey(
        sigv4.signing_key(SECRET, "20130524", "us-east-1"),
        VECTORS["timestamp"],
        "20130524/us-east-1/s3/aws4_request",
        case["seed"],
    )
    previous = case["seed"]
    for size, expected in zip(case["sizes"], case["signatures"], strict=True):
        previous = sigv4.chunk_signature(key, previous, hashlib.sha256(b"a" * size).hexdigest())
        assert previous == expected
    if "trailer_name" in case:
        trailer = f"{case['trailer_name']}:{case['trailer_value']}\n".encode()
        assert sigv4.trailer_signature(key, previous, trailer) == case["trailer_signature"]
