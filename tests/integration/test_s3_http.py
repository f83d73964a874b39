"""The S3 front below boto3: what HTTP allows, what broken and hostile clients send, and how it stops."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import boto3  # type: ignore[import-untyped]
import pytest
import pytest_asyncio
from botocore.config import Config  # type: ignore[import-untyped]
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from storaged import errors
from storaged.s3.http.limits import Limits
from tests.integration.s3_front import ACCESS, REGION, SECRET, World, read_head, s3_world, signed, until
from tests.patience import GUARD_S


@pytest.fixture
def patience_s() -> float:
    """How long a server waits for its clients. Most tests are not about that, and may stand still for a moment."""
    return GUARD_S


hasty = pytest.mark.parametrize("patience_s", [0.4])


@pytest_asyncio.fixture
async def world(patience_s: float) -> AsyncIterator[World]:
    limits = Limits(body_idle_s=patience_s, headers_s=patience_s, linger_s=GUARD_S, requests_max=4)
    async with s3_world(limits) as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        yield world


async def test_100_continue_comes_after_authentication_and_also_for_an_empty_body(world: World) -> None:
    for body in (b"hello", b""):
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
        writer.write(signed(world, "PUT", "/bucket/k", body=body, headers={"Expect": "100-continue"}, send_body=False))
        assert (await read_head(reader)).startswith(b"HTTP/1.1 100 Continue\r\n")
        writer.write(body)
        assert (await read_head(reader)).startswith(b"HTTP/1.1 200 OK\r\n")
        writer.close()
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(b"PUT /bucket/k HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), GUARD_S)
    assert answer.startswith(b"HTTP/1.1 403 Forbidden\r\n")
    assert b"100 Continue" not in answer
    writer.close()


async def test_odd_expectations_are_ignored(world: World) -> None:
    for value in ("200-ok", ""):
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
        writer.write(signed(world, "PUT", "/bucket/k", body=b"x", headers={"Expect": value}))
        assert (await read_head(reader)).startswith(b"HTTP/1.1 200 OK\r\n")
        writer.close()


async def test_keys_are_taken_as_they_were_sent(world: World) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(signed(world, "PUT", "/bucket///a/../b%2Bc/./d//", body=b"x"))
    assert b"200 OK" in await read_head(reader)
    writer.close()
    await world.buckets.get("bucket")
    assert list(await world.stored()) == [b"//a/../b+c/./d//"]


@pytest.mark.parametrize("target", ["/bucket/%ff", "/bucket/k?prefix=%ff", "ftp://evil/bucket/k"])
async def test_what_is_not_utf8_or_not_a_path_is_an_invalid_uri(world: World, target: str) -> None:
    answer = await world.raw(f"GET {target} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
    assert b"400 Bad Request" in answer
    assert b"<Code>InvalidURI</Code>" in answer


async def test_every_answer_names_its_request_and_head_errors_have_no_body(world: World) -> None:
    answer = await world.raw(b"GET /nowhere HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    request_id = head.split(b"x-amz-request-id: ")[1].split(b"\r\n")[0]
    assert b"<RequestId>" + request_id + b"</RequestId>" in body
    for name in (b"x-amz-id-2: ", b"Date: ", b"Server: storaged"):
        assert name in head
    for element in (b"<Code>NoSuchBucket</Code>", b"<Message>", b"<Resource>/nowhere</Resource>", b"<HostId>"):
        assert element in body
    answer = await world.raw(b"HEAD /nowhere/k HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 404 Not Found\r\n")
    assert answer.endswith(b"\r\n\r\n")


async def test_a_refused_upload_of_many_bytes_still_gets_its_answer(world: World) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    size = 64 << 20
    writer.write(f"PUT /bucket/k HTTP/1.1\r\nHost: h\r\nContent-Length: {size}\r\n\r\n".encode())
    for _ in range(size >> 20):
        writer.write(bytes(1 << 20))
        await asyncio.wait_for(writer.drain(), GUARD_S)
    answer = await asyncio.wait_for(reader.read(), GUARD_S)
    assert answer.startswith(b"HTTP/1.1 403 Forbidden\r\n")
    assert b"Connection: close" in answer
    assert b"<Code>AccessDenied</Code>" in answer
    writer.close()


async def test_a_connection_is_kept_after_an_error_with_a_small_body(world: World) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    for _ in range(2):
        writer.write(b"PUT /bucket/k HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello")
        head = await read_head(reader)
        assert b"403 Forbidden" in head
        assert b"Connection: close" not in head
        await reader.readexactly(int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0]))
    writer.close()


@hasty
async def test_a_body_that_stops_is_a_timeout_and_a_client_that_goes_leaves_nothing(world: World) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(signed(world, "PUT", "/bucket/slow", body=b"0123456789")[:-5])
    answer = await asyncio.wait_for(reader.read(), GUARD_S)
    assert b"<Code>RequestTimeout</Code>" in answer
    writer.close()
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(signed(world, "PUT", "/bucket/gone", body=b"0123456789")[:-5])
    await writer.drain()
    writer.close()
    await until(lambda: any(done.target == "/bucket/gone" for done in world.done))
    assert next(done.code for done in world.done if done.target == "/bucket/gone") == "IncompleteBody"
    assert not await world.stored()


@hasty
async def test_headers_that_trickle_are_cut_off(world: World) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(b"GET / HTTP/1.1\r\nHost:")
    assert await asyncio.wait_for(reader.read(), GUARD_S) == b""
    writer.close()


@pytest.mark.parametrize(
    ("request_bytes", "code"),
    [
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n", b"RequestHeaderSectionTooLarge"),
        (b"GET / HTTP/1.1\r\nHost: h\r\nx: " + b"a" * 20_000 + b"\r\n\r\n", b"RequestHeaderSectionTooLarge"),
        (b"GET / HTTP/1.1\r\n" + b"".join(b"x%d: y\r\n" % n for n in range(200)) + b"\r\n", b"RequestHeaderSectionTooLarge"),  # noqa: E501
        (b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n" + b"".join(b"x%d: %s\r\n" % (n, b"y" * 1000) for n in range(60)) + b"\r\n", b"RequestHeaderSectionTooLarge"),  # noqa: E501
        (b"PUT /bucket/k HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n", b"BadRequest"),
        (b"PUT /bucket/k HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", b"BadRequest"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"BadRequest"),
    ],
)  # fmt: skip
async def test_broken_and_oversized_http_gets_an_s3_error(world: World, request_bytes: bytes, code: bytes) -> None:
    answer = await world.raw(request_bytes)
    assert answer.partition(b"\r\n")[0] in (b"HTTP/1.1 400 Bad Request", b"HTTP/1.0 400 Bad Request")
    assert b"<Code>" + code + b"</Code>" in answer
    assert b"x-amz-request-id: " in answer


async def test_a_put_without_a_length_is_told_so(world: World) -> None:
    request = signed(world, "PUT", "/bucket/k").replace(b"Content-Length: 0\r\n", b"Connection: close\r\n")
    answer = await world.raw(request)
    assert answer.startswith(b"HTTP/1.1 411 Length Required\r\n")
    assert b"<Code>MissingContentLength</Code>" in answer


@pytest.mark.parametrize("size", [5, 200_000])
async def test_a_body_that_is_not_what_was_signed_is_not_stored(world: World, size: int) -> None:
    body = b"h" * size
    request = signed(world, "PUT", "/bucket/k", body=body).replace(b"\r\n\r\nhhh", b"\r\nConnection: close\r\n\r\nhjh")
    answer = await world.raw(request)
    assert b"<Code>XAmzContentSHA256Mismatch</Code>" in answer
    assert not await world.stored()


async def test_requests_of_other_services_and_old_signatures_get_a_quick_4xx(world: World) -> None:
    body = b"Action=ListRoles&Version=2010-05-08"
    answer = await world.raw(
        b"POST / HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    assert b"403 Forbidden" in answer
    assert b"<Code>MissingAuthenticationToken</Code>" in answer
    answer = await world.raw(
        b"GET /bucket HTTP/1.1\r\nHost: h\r\nAuthorization: AWS AK:c2ln\r\nConnection: close\r\n\r\n"
    )
    assert b"<Code>InvalidRequest</Code>" in answer
    answer = await world.raw(
        b"GET /bucket?AWSAccessKeyId=AK&Signature=x&Expires=1 HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
    )
    assert b"<Code>InvalidRequest</Code>" in answer


async def test_xml_bombs_and_huge_documents_are_refused(world: World) -> None:
    bomb = b'<!DOCTYPE d [<!ENTITY a "aaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]><Tagging><TagSet>&b;</TagSet></Tagging>'
    answer = await world.raw(signed(world, "PUT", "/bucket?tagging", body=bomb, headers={"Connection": "close"}))
    assert b"<Code>MalformedXML</Code>" in answer
    answer = await world.raw(
        signed(world, "PUT", "/bucket?tagging", body=b" " * (2 << 20) + b"x", headers={"Connection": "close"})
    )
    assert b"<Code>MaxMessageLengthExceeded</Code>" in answer


async def test_a_body_in_http_chunks_without_a_length_is_taken(world: World) -> None:
    request = signed(world, "PUT", "/bucket/k", body=b"hello", send_body=False)
    request = request.replace(b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\nConnection: close\r\n")
    assert b"200 OK" in await world.raw(request + b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n")
    assert (await world.stored())[b"k"] == b"hello"


async def test_a_read_that_fails_in_the_middle_breaks_the_connection(world: World) -> None:
    bucket = await world.buckets.get("bucket")
    client = world.client()
    await asyncio.to_thread(client.put_object, Bucket="bucket", Key="k", Body=bytes(200_000))
    world.objects.fail_after = 100_000
    answer = await world.raw(signed(world, "GET", "/bucket/k"))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Content-Length: 200000" in head
    assert len(body) < 200_000
    assert not world.done[-1].complete
    world.objects.fail_after = 0
    answer = await world.raw(signed(world, "GET", "/bucket/k", headers={"Connection": "close"}))
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"<Code>ServiceUnavailable</Code>" in answer
    assert all(stream.closed for stream in world.objects.streams)
    assert bucket.name == "bucket"


async def test_a_failure_nobody_expected_says_nothing_of_the_inside(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the secret of the inside")

    world.objects.head = broken  # type: ignore[method-assign, assignment]
    answer = await world.raw(signed(world, "GET", "/bucket/k?tagging", headers={"Connection": "close"}))
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b"<Code>InternalError</Code>" in answer
    assert b"secret of the inside" not in answer
    request_id = answer.split(b"x-amz-request-id: ")[1].split(b"\r\n")[0].decode()
    assert any(request_id in record.getMessage() and record.exc_info for record in caplog.records)


async def test_too_many_requests_are_asked_to_slow_down(world: World) -> None:
    connections = []
    for _ in range(4):
        _, writer = await asyncio.open_connection("127.0.0.1", world.port)
        writer.write(signed(world, "PUT", "/bucket/k", body=b"hello")[:-1])
        connections.append(writer)
    await until(lambda: world.app.statistics().requests_in_flight == 4)
    answer = await world.raw(signed(world, "GET", "/bucket", headers={"Connection": "close"}))
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"<Code>SlowDown</Code>" in answer
    assert world.app.statistics().refused_total == 1
    for writer in connections:
        writer.close()


async def test_closing_lets_requests_in_flight_finish_and_takes_no_new_ones() -> None:
    async with s3_world() as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        idle_reader, idle_writer = await asyncio.open_connection("127.0.0.1", world.port)
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
        request = signed(world, "PUT", "/bucket/k", body=b"hello")
        writer.write(request[:-3])
        await until(lambda: world.app.statistics().requests_in_flight == 1)
        closing = asyncio.create_task(world.app.close(5))
        assert await asyncio.wait_for(idle_reader.read(), GUARD_S) == b""
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", world.port)
        assert not closing.done()
        writer.write(request[-3:])
        answer = await asyncio.wait_for(reader.read(), GUARD_S)
        await closing
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert (await world.stored())[b"k"] == b"hello"
        writer.close()
        idle_writer.close()


async def test_a_port_in_use_is_said_so() -> None:
    async with s3_world() as world:
        with pytest.raises(errors.PortInUse, match=str(world.port)):
            await world.app.start("127.0.0.1", world.port)


def certificate(directory: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(days=1), now + timedelta(days=1))
    built = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False).sign(
        key, hashes.SHA256()
    )
    path = directory / "server.pem"
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(pem + built.public_bytes(serialization.Encoding.PEM))
    return path


async def test_over_tls_boto3_sends_checksums_in_trailers_and_they_are_verified(tmp_path: Path) -> None:
    path = certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(path)
    async with s3_world(tls=context) as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        body = bytes(range(256)) * 20_000

        def run() -> dict[str, str]:
            client = boto3.client(
                "s3", endpoint_url=f"https://localhost:{world.port}", region_name=REGION, aws_access_key_id=ACCESS,
                aws_secret_access_key=SECRET, verify=str(path),
                config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
            )  # fmt: skip
            seen: dict[str, str] = {}
            client.meta.events.register(
                "before-send.s3.PutObject",
                lambda request, **_: seen.update({k.lower(): str(v) for k, v in request.headers.items()}),
            )
            put = client.put_object(Bucket="bucket", Key="k", Body=body, ContentEncoding="gzip")
            got = client.get_object(Bucket="bucket", Key="k")
            assert got["Body"].read() == body
            assert got["ContentEncoding"] == "gzip"
            assert got["ChecksumCRC32"] == put["ChecksumCRC32"]
            assert client.put_object(Bucket="bucket", Key="empty", Body=b"")["ETag"]
            client.put_object(Bucket="bucket", Key="small", Body=b"small")
            assert client.get_object(Bucket="bucket", Key="small")["Body"].read() == b"small"
            return seen

        seen = await asyncio.to_thread(run)
        assert len(world.objects.put_answers) == 2  # the small ones, by callbacks
        assert "STREAMING-UNSIGNED-PAYLOAD-TRAILER" in seen["x-amz-content-sha256"]


async def test_a_connection_that_was_accepted_elsewhere_is_served_and_after_the_end_it_is_closed() -> None:
    async with s3_world() as world:
        with socket.create_server(("127.0.0.1", 0)) as elsewhere:
            for answered in (b"HTTP/1.1 403", b""):
                reader, writer = await asyncio.open_connection(*elsewhere.getsockname())
                accepted, _ = elsewhere.accept()
                await world.app.adopt(accepted)
                writer.write(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
                assert (await asyncio.wait_for(reader.read(), GUARD_S)).startswith(answered)
                writer.close()
                await world.app.close(0.5)
