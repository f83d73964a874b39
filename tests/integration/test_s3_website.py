"""Buckets as websites: their configuration, and the website endpoint as browsers see it.

Sources: https://docs.aws.amazon.com/AmazonS3/latest/userguide/WebsiteHosting.html and the pages below it.
"""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from tests.integration.s3_front import World, s3_world
from tests.integration.test_s3_access import ALL, PUBLIC, allow, policy
from tests.integration.test_s3_fail_closed import call
from tests.integration.test_s3_front import refused

DOMAIN = "web.example.eu"
SITE = {"IndexDocument": {"Suffix": "index.html"}, "ErrorDocument": {"Key": "error.html"}}


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with s3_world(website_domain=DOMAIN, domains=("s3.example.eu",)) as world:
        yield world


class Browser:
    def __init__(self, world: World) -> None:
        self._world = world

    def __call__(
        self, path: str, method: str = "GET", host: str = f"bucket.{DOMAIN}", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers by lower-case name, body."""
        connection = http.client.HTTPConnection("127.0.0.1", self._world.port, timeout=60)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers={"Host": host, **sent})
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body


def opened(world: World, site: dict[str, Any] | None = SITE, bucket: str = "bucket") -> Any:
    """A client of the owner; everybody may read the bucket's objects, and it is a website."""
    owner = world.client()
    owner.create_bucket(Bucket=bucket)
    owner.put_public_access_block(Bucket=bucket, PublicAccessBlockConfiguration=PUBLIC)
    owner.put_bucket_policy(Bucket=bucket, Policy=policy(allow("s3:GetObject", ALL.replace("bucket/", f"{bucket}/"))))
    if site is not None:
        owner.put_bucket_website(Bucket=bucket, WebsiteConfiguration=site)
    return owner


async def run(work: Callable[[World], None], world: World) -> None:
    await asyncio.to_thread(work, world)


async def test_a_website_configuration_returns_as_it_was_put_and_goes(world: World) -> None:
    def work(world: World) -> None:
        owner = world.client()
        owner.create_bucket(Bucket="bucket")
        missing = (404, "NoSuchWebsiteConfiguration")
        assert refused(owner.get_bucket_website, Bucket="bucket") == missing
        rules = [
            {"Condition": {"KeyPrefixEquals": "docs/"}, "Redirect": {"ReplaceKeyPrefixWith": "documents/"}},
            {
                "Condition": {"HttpErrorCodeReturnedEquals": "404", "KeyPrefixEquals": "a&b"},
                "Redirect": {"HostName": "other.example.eu", "Protocol": "https", "HttpRedirectCode": "302"},
            },
            {"Redirect": {"ReplaceKeyWith": "gone.html"}},
        ]
        for wanted in (
            SITE,
            {"IndexDocument": {"Suffix": "i"}},
            SITE | {"RoutingRules": rules},
            {"RedirectAllRequestsTo": {"HostName": "example.eu", "Protocol": "https"}},
            {"RedirectAllRequestsTo": {"HostName": "example.eu"}},
        ):
            owner.put_bucket_website(Bucket="bucket", WebsiteConfiguration=wanted)
            found = owner.get_bucket_website(Bucket="bucket")
            assert {name: found[name] for name in found if name != "ResponseMetadata"} == wanted
        owner.delete_bucket_website(Bucket="bucket")
        assert refused(owner.get_bucket_website, Bucket="bucket") == missing
        owner.delete_bucket_website(Bucket="bucket")

    await run(work, world)


@pytest.mark.parametrize(
    ("document", "code"),
    [
        ("", "MissingRequestBodyError"),
        ("<WebsiteConfiguration>", "MalformedXML"),
        ("<Other/>", "MalformedXML"),
        ("<WebsiteConfiguration/>", "InvalidArgument"),
        ("<WebsiteConfiguration><Surprise/></WebsiteConfiguration>", "MalformedXML"),
        ("<WebsiteConfiguration><IndexDocument><Suffix/></IndexDocument></WebsiteConfiguration>", "InvalidArgument"),
        (
            "<WebsiteConfiguration><IndexDocument><Suffix>a/b</Suffix></IndexDocument></WebsiteConfiguration>",
            "InvalidArgument",
        ),
        (
            "<WebsiteConfiguration><IndexDocument><Suffix>a</Suffix><Suffix>b</Suffix></IndexDocument>"
            "</WebsiteConfiguration>",
            "MalformedXML",
        ),
        (
            "<WebsiteConfiguration><IndexDocument><Suffix>i</Suffix></IndexDocument><ErrorDocument><Key/>"
            "</ErrorDocument></WebsiteConfiguration>",
            "InvalidArgument",
        ),
        (
            "<WebsiteConfiguration><RedirectAllRequestsTo><HostName>h</HostName></RedirectAllRequestsTo>"
            "<IndexDocument><Suffix>i</Suffix></IndexDocument></WebsiteConfiguration>",
            "InvalidRequest",
        ),
        (
            "<WebsiteConfiguration><RedirectAllRequestsTo><HostName>h/x</HostName></RedirectAllRequestsTo>"
            "</WebsiteConfiguration>",
            "InvalidArgument",
        ),
        (
            "<WebsiteConfiguration><RedirectAllRequestsTo><HostName>h</HostName><Protocol>ftp</Protocol>"
            "</RedirectAllRequestsTo></WebsiteConfiguration>",
            "InvalidRequest",
        ),
        *(
            (
                "<WebsiteConfiguration><IndexDocument><Suffix>i</Suffix></IndexDocument><RoutingRules>"
                f"{rules}</RoutingRules></WebsiteConfiguration>",
                code,
            )
            for rules, code in (
                ("", "MalformedXML"),
                ("<RoutingRule/>", "MalformedXML"),
                ("<RoutingRule><Redirect/></RoutingRule>", "MalformedXML"),
                (
                    "<RoutingRule><Redirect><HttpRedirectCode>200</HttpRedirectCode></Redirect></RoutingRule>",
                    "InvalidRequest",
                ),
                (
                    "<RoutingRule><Redirect><HttpRedirectCode>300</HttpRedirectCode></Redirect></RoutingRule>",
                    "InvalidRequest",
                ),
                (
                    "<RoutingRule><Condition><HttpErrorCodeReturnedEquals>200</HttpErrorCodeReturnedEquals></Condition>"
                    "<Redirect><HostName>h</HostName></Redirect></RoutingRule>",
                    "InvalidRequest",
                ),
                (
                    "<RoutingRule><Redirect><ReplaceKeyWith>a</ReplaceKeyWith><ReplaceKeyPrefixWith>b"
                    "</ReplaceKeyPrefixWith></Redirect></RoutingRule>",
                    "InvalidRequest",
                ),
                ("<RoutingRule><Redirect><HostName>h</HostName></Redirect></RoutingRule>" * 51, "InvalidRequest"),
            )
        ),
    ],
)
async def test_a_bad_website_document_is_refused_and_changes_nothing(world: World, document: str, code: str) -> None:
    await run(lambda world: opened(world), world)
    status, _, answer = await call(world, "PUT", "/bucket?website", {}, document.encode())
    assert status == 400
    assert f"<Code>{code}</Code>".encode() in answer
    found = await asyncio.to_thread(world.client().get_bucket_website, Bucket="bucket")
    assert found["IndexDocument"] == SITE["IndexDocument"]


async def test_a_browser_gets_index_documents_objects_and_the_error_document(world: World) -> None:
    def work(world: World) -> None:
        owner, browse = opened(world), Browser(world)
        for key in ("index.html", "a/index.html", "a b/ü.txt", "error.html"):
            owner.put_object(Bucket="bucket", Key=key, Body=f"at {key}".encode(), ContentType="text/html")
        assert browse("/")[::2] == (200, b"at index.html")
        assert browse("/a/")[::2] == (200, b"at a/index.html")
        assert browse("/a%20b/%C3%BC.txt?versionId=x&acl")[::2] == (200, "at a b/ü.txt".encode())
        status, headers, body = browse("/", "HEAD")
        assert (status, body, headers["content-length"], headers["content-type"]) == (200, b"", "13", "text/html")
        etag = browse("/")[1]["etag"]
        assert browse("/", If_None_Match=etag)[::2] == (304, b"")
        assert browse("/", Range="bytes=3-7")[::2] == (206, b"index")
        status, headers, _ = browse("/a")
        assert (status, headers["location"]) == (302, "/a/"), "a folder, without its slash"
        status, headers, body = browse("/missing", If_None_Match="*", Range="bytes=0-1")
        assert (status, body, headers["content-type"]) == (403, b"at error.html", "text/html"), "may not list"
        assert headers["x-amz-error-code"] == "AccessDenied"
        grants = policy(allow("s3:GetObject"), allow("s3:ListBucket", "arn:aws:s3:::bucket"))
        owner.put_bucket_policy(Bucket="bucket", Policy=grants)
        assert browse("/missing")[::2] == (404, b"at error.html")
        owner.delete_object(Bucket="bucket", Key="error.html")
        status, headers, body = browse("/missing%3Cscript%3E")
        assert (status, headers["content-type"]) == (404, "text/html; charset=utf-8")
        assert b"<li>Code: NoSuchKey</li>" in body
        assert b"<script>" not in body
        assert browse("/missing", "HEAD")[::2] == (404, b"")

    await run(work, world)


async def test_the_endpoint_answers_nothing_but_get_and_head_of_what_everybody_may_read(world: World) -> None:
    def work(world: World) -> None:
        owner, browse = opened(world), Browser(world)
        owner.put_object(Bucket="bucket", Key="index.html", Body=b"index")
        for method in ("PUT", "POST", "DELETE", "OPTIONS"):
            status, headers, body = browse("/index.html", method)
            assert (status, headers["x-amz-error-code"]) == (405, "MethodNotAllowed")
            assert body.startswith(b"<html>")
        owner.delete_bucket_policy(Bucket="bucket")
        signed = owner.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "index.html"})
        assert browse("/index.html?" + signed.partition("?")[2])[0] == 403, "a signature means nothing there"
        assert browse("/?list-type=2")[0] == 403
        owner.delete_bucket_website(Bucket="bucket")
        assert browse("/")[1]["x-amz-error-code"] == "NoSuchWebsiteConfiguration"
        assert browse("/", host=f"nothing.{DOMAIN}")[1]["x-amz-error-code"] == "NoSuchBucket"
        assert browse("/", host=DOMAIN)[1]["x-amz-error-code"] == "InvalidBucketName"
        assert browse("/%FF")[1]["x-amz-error-code"] == "InvalidURI"
        assert browse("/", host=f"evil{DOMAIN}")[2].startswith(b"<?xml"), "another host is of the S3 API"
        assert browse("/", host=f"BUCKET.{DOMAIN.upper()}:80")[1]["x-amz-error-code"] == "NoSuchWebsiteConfiguration"

    await run(work, world)


async def test_requests_are_redirected_by_rules_by_objects_and_as_a_whole(world: World) -> None:
    rules = [
        {"Condition": {"KeyPrefixEquals": "docs/"}, "Redirect": {"ReplaceKeyPrefixWith": ""}},
        {
            "Condition": {"KeyPrefixEquals": "old"},
            "Redirect": {"ReplaceKeyWith": "new?a=b#c", "HttpRedirectCode": "307"},
        },
        {
            "Condition": {"HttpErrorCodeReturnedEquals": "404", "KeyPrefixEquals": "lost/"},
            "Redirect": {"HostName": "archive.example.eu", "Protocol": "https", "ReplaceKeyPrefixWith": "kept/"},
        },
        {"Condition": {"KeyPrefixEquals": "here/"}, "Redirect": {"Protocol": "https"}},
    ]

    def work(world: World) -> None:
        owner, browse = opened(world, SITE | {"RoutingRules": rules}), Browser(world)
        grants = policy(allow("s3:GetObject"), allow("s3:ListBucket", "arn:aws:s3:::bucket"))
        owner.put_bucket_policy(Bucket="bucket", Policy=grants)

        def where(path: str, **more: Any) -> tuple[int, str]:
            status, headers, body = browse(path, **more)
            assert body == b""
            return status, headers["location"]

        assert where("/docs/a%20b") == (301, "/a%20b")
        assert where("/docs//evil.example/x") == (301, "/%2Fevil.example/x"), "not another host"
        assert where("/old/x") == (307, "/new?a=b#c")
        assert where("/lost/x%0Ay") == (301, "https://archive.example.eu/kept/x%0Ay")
        assert where("/here/x") == (301, f"https://bucket.{DOMAIN}/here/x")
        for target, wanted in (("/other.html", "/other.html"), ("https://example.eu/ü", "https://example.eu/%C3%BC")):
            owner.put_object(Bucket="bucket", Key="moved", Body=b"x", WebsiteRedirectLocation=target)
            assert where("/moved") == where("/moved", method="HEAD") == (301, wanted)
        found = owner.get_object(Bucket="bucket", Key="moved")
        assert (found["Body"].read(), found["ResponseMetadata"]["HTTPStatusCode"]) == (b"x", 200)
        everything = {"RedirectAllRequestsTo": {"HostName": "example.eu"}}
        owner.put_bucket_website(Bucket="bucket", WebsiteConfiguration=everything)
        assert where("/a/b?c") == (301, "http://example.eu/a/b")

    await run(work, world)


async def test_a_copy_has_the_redirection_that_its_request_names_and_never_its_source_s(world: World) -> None:
    def work(world: World) -> None:
        owner = world.client()
        owner.create_bucket(Bucket="bucket")
        source = {"Bucket": "bucket", "Key": "k"}
        owner.put_object(
            Bucket="bucket", Key="k", Body=b"x", WebsiteRedirectLocation="/a", StorageClass="STANDARD_IA",
            Metadata={"m": "1"},
        )  # fmt: skip
        upload = owner.create_multipart_upload(Bucket="bucket", Key="u", WebsiteRedirectLocation="/u")["UploadId"]
        part = owner.upload_part(Bucket="bucket", Key="u", UploadId=upload, PartNumber=1, Body=b"x")
        parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
        owner.complete_multipart_upload(Bucket="bucket", Key="u", UploadId=upload, MultipartUpload=parts)

        def found(key: str) -> tuple[str, dict[str, str], str]:
            head = owner.head_object(Bucket="bucket", Key=key)
            return head.get("WebsiteRedirectLocation", ""), head["Metadata"], head.get("StorageClass", "")

        assert found("u")[0] == "/u"
        owner.copy_object(Bucket="bucket", Key="plain", CopySource=source)
        assert found("plain") == ("", {"m": "1"}, "")
        owner.copy_object(Bucket="bucket", Key="named", CopySource=source, WebsiteRedirectLocation="/b")
        assert found("named") == ("/b", {"m": "1"}, "")
        owner.copy_object(
            Bucket="bucket", Key="new", CopySource=source, WebsiteRedirectLocation="/c", MetadataDirective="REPLACE"
        )
        assert found("new") == ("/c", {}, "")
        owner.copy_object(Bucket="bucket", Key="k", CopySource=source, WebsiteRedirectLocation="/d")
        assert found("k")[0] == "/d", "onto itself, since that changes it"

    await run(work, world)
