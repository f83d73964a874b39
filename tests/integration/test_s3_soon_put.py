"""Small PUTs that are answered by callbacks: the same answers as by a task, whatever the body does, and what becomes of
a connection meanwhile.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import re
from collections.abc import AsyncIterator
from typing import Any

import botocore.auth  # type: ignore[import-untyped]
import msgspec
import pytest
from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]
from botocore.credentials import Credentials  # type: ignore[import-untyped]

from storaged import errors
from storaged.objects.api import PART_BYTES_MAX, PutResult
from storaged.objects.plane import ObjectLimits
from storaged.objects.records import BucketRecord
from storaged.s3 import responder
from storaged.s3.auth.aws_chunked import ChunkedDecoder
from storaged.s3.headers import INCIDENTAL
from storaged.s3.http.body import RequestBody
from storaged.s3.http.connection import Connection
from storaged.s3.http.limits import Limits
from storaged.s3.http.progress import BODY, HEAD
from storaged.s3.ops.put import parse_put
from storaged.s3.request import Request
from tests.integration.s3_front import (
    ACCESS,
    REGION,
    SECRET,
    Held,
    World,
    ask,
    break_off,
    crc32,
    read_head,
    s3_world,
    signed,
    until,
)
from tests.patience import GUARD_S

HELD_BYTES_MAX = ObjectLimits().small_bytes_max
SMALL = b"small" * 100
MD5 = base64.b64encode(hashlib.md5(SMALL).digest()).decode()


@pytest.fixture
def patience_s() -> float:
    """How long a server waits for its clients. Most tests are not about that, and may stand still for a moment."""
    return GUARD_S


hasty = pytest.mark.parametrize("patience_s", [0.4])


@pytest.fixture(params=["at once", "with others"])
async def world(
    request: pytest.FixtureRequest, patience_s: float, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    """Answers leave as they do with few requests in flight, and with many."""
    if request.param == "with others":
        monkeypatch.setattr(responder, "ALONE_MAX", 0)
    async with s3_world(Limits(body_idle_s=patience_s, linger_s=GUARD_S)) as made:
        await make_bucket(made)
        yield made


async def make_bucket(world: World) -> None:
    await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)


async def kept(world: World) -> dict[bytes, bytes]:
    return await world.stored()


def in_pieces(request: bytes, how: str) -> tuple[bytes, ...]:
    """The request at once, or cut in its head, after its head, or in its body."""
    end = request.index(b"\r\n\r\n") + 4
    cuts = {"whole": (), "head": (20,), "behind": (end,), "body": (end + 5, end + 9)}[how]
    edges = (0, *cuts, len(request))
    return tuple(piece for first, last in itertools.pairwise(edges) if (piece := request[first:last]))


@pytest.mark.parametrize("how", ["whole", "head", "behind", "body"])
@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (
            SMALL,
            {
                "Content-Type": "text/plain",
                "x-amz-meta-color": "blue",
                "x-amz-tagging": "a=b",
                "Cache-Control": "no-store",
            },
        ),
        (SMALL, {"Content-MD5": MD5}),
        (SMALL, {"x-amz-checksum-crc32": crc32(SMALL), "x-amz-sdk-checksum-algorithm": "CRC32"}),
        (SMALL, {"If-None-Match": "*", "x-amz-storage-class": "STANDARD", "x-amz-server-side-encryption": "AES256"}),
        (bytes(HELD_BYTES_MAX), {}),
    ],
    ids=["meta", "md5", "checksum", "condition", "largest"],
)
async def test_the_answer_is_the_one_that_the_task_gives(
    world: World, how: str, body: bytes, headers: dict[str, str]
) -> None:
    answers, infos = [], []
    for world.objects.busy in (False, True):
        answers.append(
            await ask(world, *in_pieces(signed(world, "PUT", "/bucket/key", body=body, headers=headers), how))
        )
        assert await kept(world) == {b"key": body}
        infos.append((await world.head("key"))._replace(modified_ms=0))
        await world.delete("key")
    assert answers[0].startswith(b"HTTP/1.1 200 OK\r\n")
    assert answers[0] == answers[1]
    assert infos[0] == infos[1]
    assert len(world.objects.put_answers) == 1
    first, second = ((done.operation, done.status, done.bytes_in, done.bytes_out, done.complete) for done in world.done)
    assert first == second == ("PutObject", 200, len(body), 0, True)
    statistics = world.app.statistics()
    assert (statistics.requests_in_flight, statistics.requests_total) == (0, 2)


@pytest.mark.parametrize("how", ["whole", "behind", "body"])
@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Content-MD5": base64.b64encode(bytes(16)).decode()}, b"BadDigest"),
        ({"Content-MD5": "AAAA"}, b"InvalidDigest"),
        ({"x-amz-checksum-crc32": crc32(b"other")}, b"BadDigest"),
        ({"If-None-Match": "*"}, b"PreconditionFailed"),
        ({"If-Match": '"' + "0" * 32 + '"'}, b"PreconditionFailed"),
        ({"x-amz-expected-bucket-owner": "somebody"}, b"AccessDenied"),
        ({"x-amz-acl": "public-read"}, b"AccessControlListNotSupported"),
        ({"x-amz-copy-source": "/bucket/none"}, b"InvalidRequest"),
        ({"x-amz-tagging": "a=b&a=b"}, b"InvalidTag"),
    ],
)
async def test_what_is_refused_changes_nothing_and_is_told_as_by_the_task(
    world: World, how: str, headers: dict[str, str], code: bytes
) -> None:
    assert b"200 OK" in await ask(world, signed(world, "PUT", "/bucket/key", body=b"before"))
    answers = []
    for world.objects.busy in (False, True):
        request = signed(world, "PUT", "/bucket/key", body=SMALL, headers=headers)
        answers.append(await ask(world, *in_pieces(request, how)))
    assert b"<Code>" + code + b"<" in answers[0]
    assert answers[0] == answers[1]
    assert await kept(world) == {b"key": b"before"}
    assert world.app.statistics().requests_in_flight == 0


@pytest.mark.parametrize("how", ["whole", "body"])
async def test_a_body_that_is_not_what_was_signed_is_refused(world: World, how: str) -> None:
    for world.objects.busy in (False, True):
        request = signed(world, "PUT", "/bucket/key", body=SMALL)
        assert b"<Code>XAmzContentSHA256Mismatch<" in await ask(world, *in_pieces(request[:-1] + b"L", how))
    assert await kept(world) == {}


async def test_who_is_not_who_they_say_stores_nothing_and_is_not_told_to_go_on(world: World) -> None:
    for change in (
        (b"Signature=", b"Signature=0"),
        (b"Credential=AKMAIN", b"Credential=NOBODY"),
        (b"Host: ", b"Host: x"),
    ):
        request = signed(world, "PUT", "/bucket/key", body=SMALL, headers={"Expect": "100-continue"}).replace(*change)
        assert (await ask(world, *in_pieces(request, "behind"))).startswith(b"HTTP/1.1 403 ")
    assert await kept(world) == {}
    assert world.objects.put_answers == []


async def test_what_an_sdk_writes_is_answered_without_the_task(world: World) -> None:
    client = world.client()

    def run() -> None:
        client.head_bucket(Bucket="bucket")  # the first head may be there before the connection's task waits for it
        client.put_object(Bucket="bucket", Key="plain", Body=SMALL, ContentType="text/plain", Metadata={"a": "b"})
        client.put_object(Bucket="bucket", Key="new", Body=b"", IfNoneMatch="*")

    await asyncio.to_thread(run)
    assert len(world.objects.put_answers) == 2
    assert await kept(world) == {b"plain": SMALL, b"new": b""}


async def test_who_waits_to_be_told_to_go_on_is_told_once(world: World) -> None:
    for body, at_once in ((SMALL, False), (SMALL, True), (b"", False)):
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
        writer.write(
            signed(world, "PUT", "/bucket/k", body=body, headers={"Expect": "100-continue"}, send_body=at_once)
        )
        assert (await read_head(reader)).startswith(b"HTTP/1.1 100 Continue\r\n")
        if not at_once:
            writer.write(body)
        assert (await read_head(reader)).startswith(b"HTTP/1.1 200 OK\r\n")
        writer.close()
    assert len(world.objects.put_answers) == 3


@pytest.mark.parametrize(
    ("target", "body", "headers"),
    [
        ("/bucket/key", bytes(HELD_BYTES_MAX + 1), {}),
        ("/bucket/key?x-id=PutObject&x-unknown=1", SMALL, {}),
        ("/bucket/key", SMALL, {"Connection": "close"}),
        ("/bucket/key", b"", {"x-amz-copy-source": "/bucket/other"}),
    ],
    ids=["large", "query", "close", "copy"],
)
async def test_whatever_else_is_asked_is_the_tasks(
    world: World, target: str, body: bytes, headers: dict[str, str]
) -> None:
    assert b"200 OK" in await ask(world, signed(world, "PUT", "/bucket/other", body=SMALL))
    assert (await ask(world, signed(world, "PUT", target, body=body, headers=headers))).startswith(
        b"HTTP/1.1 200 OK\r\n"
    )
    assert (await kept(world))[b"key"] == (body or SMALL)
    assert len(world.objects.put_answers) == 1


async def test_a_body_of_unknown_size_is_the_tasks(world: World) -> None:
    request = signed(world, "PUT", "/bucket/key", body=b"small", send_body=False)
    request = request.replace(b"Content-Length: 5", b"Transfer-Encoding: chunked") + b"5\r\nsmall\r\n0\r\n\r\n"
    assert b"200 OK" in await ask(world, request)
    assert await kept(world) == {b"key": b"small"}
    assert world.objects.put_answers == []


async def test_requests_that_come_together_are_answered_one_after_the_other(world: World) -> None:
    puts = [signed(world, "PUT", f"/bucket/{key}", body=key.encode()) for key in "abcd"]
    assert (
        await ask(world, b"".join(puts[:2]) + puts[2][:-1], puts[2][-1:] + puts[3] + signed(world, "GET", "/bucket/d"))
    ).count(b"200 OK") == 5
    assert await kept(world) == {key.encode(): key.encode() for key in "abcd"}


async def test_a_request_behind_a_body_that_came_in_pieces_is_answered_next(world: World) -> None:
    head, body = in_pieces(signed(world, "PUT", "/bucket/a", body=SMALL), "behind")
    answer = await ask(world, head, body[:-1], body[-1:] + signed(world, "GET", "/bucket/a"))
    assert answer.count(b"200 OK") == 2
    assert answer.endswith(SMALL)
    assert len(world.objects.put_answers) == 1


@hasty
async def test_a_body_that_does_not_come_is_waited_for_no_longer_than_any_other(world: World) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    head, body = in_pieces(signed(world, "PUT", "/bucket/key", body=SMALL), "behind")
    writer.write(head + body[:10])
    await until(lambda: world.app.statistics().connections == 1)
    [connection] = world.app._connections.open  # type: ignore[union-attr]
    await until(lambda: connection.progress.phase == BODY)
    answer = await asyncio.wait_for(reader.read(), GUARD_S)
    assert b"<Code>RequestTimeout<" in answer
    assert await kept(world) == {}
    assert [(done.operation, done.status, done.bytes_in) for done in world.done] == [("PutObject", 400, 10)]
    writer.close()


async def test_a_body_that_ends_early_is_refused(world: World) -> None:
    head, body = in_pieces(signed(world, "PUT", "/bucket/key", body=SMALL), "behind")
    assert b"<Code>IncompleteBody<" in await ask(world, head + body[:10])
    assert await kept(world) == {}
    assert world.app.statistics().requests_in_flight == 0


async def test_a_client_that_goes_in_the_middle_of_its_body_leaves_nothing(world: World) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", world.port)
    head, body = in_pieces(signed(world, "PUT", "/bucket/key", body=SMALL), "behind")
    writer.write(head + body[:10])
    await until(lambda: world.app.statistics().requests_in_flight == 1)
    break_off(writer)
    await until(lambda: world.app.statistics().connections == 0 and world.app.statistics().requests_in_flight == 0)
    assert await kept(world) == {}
    assert [done.complete for done in world.done] == [False]


async def test_a_client_that_goes_while_its_object_is_written_is_nobodys_trouble(world: World) -> None:
    held = Held(world)
    _, writer = await held.ask("PUT", "key", SMALL)
    break_off(writer)
    await until(lambda: world.app.statistics().connections == 0)
    assert world.app.statistics().requests_in_flight == 1
    held.go()
    await asyncio.sleep(0)
    assert world.app.statistics().requests_in_flight == 0
    assert [(done.status, done.complete) for done in world.done] == [(200, False)]
    assert await kept(world) == {b"key": SMALL}


async def test_what_a_client_that_has_gone_sent_behind_does_not_overtake_what_is_under_way(world: World) -> None:
    held = Held(world)
    _, writer = await held.ask("PUT", "key", SMALL)
    [connection] = world.app._connections.open  # type: ignore[union-attr]
    writer.write(signed(world, "PUT", "/bucket/key", body=b"later"))
    await until(lambda: connection._input != b"")
    break_off(writer)
    await until(lambda: world.app.statistics().connections == 0)
    await asyncio.sleep(0.02)
    held.go()
    await asyncio.sleep(0)
    assert [done.status for done in world.done] == [200]
    assert await kept(world) == {b"key": SMALL}
    assert world.app.statistics().requests_in_flight == 0


@pytest.mark.parametrize(
    "told", [errors.ServiceUnavailable("Retry."), RuntimeError("a mistake")], ids=["unavailable", "mistake"]
)
async def test_what_fails_is_told_as_by_the_task(
    world: World, told: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object, **_options: object) -> bool:
        then = _args[5]
        assert callable(then)
        then(told)
        return True

    async def raise_it(*_args: object, **_options: object) -> PutResult:
        raise told

    monkeypatch.setattr(world.objects, "try_put", fail)
    soon = await ask(world, signed(world, "PUT", "/bucket/key", body=SMALL))
    monkeypatch.setattr(world.objects, "try_put", lambda *_args, **_options: False)
    monkeypatch.setattr(world.objects, "put", raise_it)
    assert soon == await ask(world, signed(world, "PUT", "/bucket/key", body=SMALL))
    assert b"a mistake" not in soon
    assert [done.code for done in world.done] == [getattr(told, "code", "InternalError")] * 2


async def test_what_cannot_be_begun_is_left_to_the_task(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(*_args: object, **_options: object) -> bool:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(world.objects, "try_put", mistaken)
    assert b"200 OK" in await ask(world, signed(world, "PUT", "/bucket/key", body=SMALL))
    assert await kept(world) == {b"key": SMALL}


async def test_a_server_that_ends_waits_for_what_is_being_written(world: World) -> None:
    held = Held(world)
    reader, writer = await held.ask("PUT", "key", SMALL)
    closing = asyncio.create_task(world.app.close(GUARD_S))
    await asyncio.sleep(0.05)
    assert not closing.done()
    held.go()
    assert b"Connection: close\r\n" in await read_head(reader)
    assert await reader.read() == b""
    await closing
    writer.close()


async def test_a_server_that_ends_does_not_wait_for_ever_for_a_body(world: World) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", world.port)
    head, _ = in_pieces(signed(world, "PUT", "/bucket/key", body=SMALL), "behind")
    writer.write(head)
    await until(lambda: world.app.statistics().requests_in_flight == 1)
    await asyncio.wait_for(world.app.close(0.05), GUARD_S)
    await until(lambda: world.app.statistics().requests_in_flight == 0)
    assert [(done.status, done.code, done.complete) for done in world.done] == [(503, "ServiceUnavailable", False)]
    assert await kept(world) == {}
    writer.close()


async def test_more_than_may_be_in_flight_are_told_to_slow_down_also_while_bodies_come() -> None:
    async with s3_world(Limits(requests_max=1)) as world:
        await make_bucket(world)
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
        head, body = in_pieces(signed(world, "PUT", "/bucket/key", body=SMALL), "behind")
        writer.write(head)
        await until(lambda: world.app.statistics().requests_in_flight == 1)
        assert (await ask(world, signed(world, "PUT", "/bucket/other", body=SMALL))).startswith(b"HTTP/1.1 503 ")
        writer.write(body)
        assert (await read_head(reader)).startswith(b"HTTP/1.1 200 OK\r\n")
        assert await kept(world) == {b"key": SMALL}
        writer.close()


async def test_a_body_larger_than_what_is_kept_unread_holds_nothing_back() -> None:
    async with s3_world(Limits(read_buffer_bytes=1024)) as world:
        await make_bucket(world)
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
        request = signed(world, "PUT", "/bucket/key", body=bytes(9000))
        for pieces in (
            *(in_pieces(request, how) for how in ("whole", "behind", "body", "whole")),
            (request[:4000], request[4000:8000], request[8000:]),
        ):
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0.01)
            assert (await read_head(reader)).startswith(b"HTTP/1.1 200 OK\r\n")
        assert len(world.objects.put_answers) == 5
        writer.close()


async def test_a_client_that_does_not_take_its_answer_gets_no_other_before_it_has(world: World) -> None:
    held = Held(world)
    reader, writer = await held.ask("PUT", "key", SMALL)
    [connection] = world.app._connections.open  # type: ignore[union-attr]
    assert isinstance(connection, Connection)
    connection.pause_writing()  # as a transport does whose socket is full
    held.go()
    await asyncio.sleep(0.02)
    writer.write(signed(world, "PUT", "/bucket/other", body=b"other"))
    await asyncio.sleep(0.05)
    assert held.waiting == []
    connection.resume_writing()
    await until(lambda: len(held.waiting) == 1 or len(world.done) == 2)
    if held.waiting:
        held.go()
    for _ in range(2):
        assert (await read_head(reader)).startswith(b"HTTP/1.1 200 OK\r\n")
    await until(lambda: connection.progress.phase == HEAD)
    writer.close()


@pytest.mark.parametrize(
    "kind", [{}, {"content-type": "image/jpeg"}, {"content-type": ""}, {"content-type": "caf\udce9"}]
)
@pytest.mark.parametrize("length", [0, 5, None, PART_BYTES_MAX + 1])
@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("sha256", ["", "0" * 64])
def test_headers_that_say_little_are_understood_as_among_others(
    kind: dict[str, str], length: int | None, declared: bool, sha256: str
) -> None:
    def asked(headers: dict[str, str]) -> object:
        body = RequestBody(None, length, None, Limits(), declared=declared)  # type: ignore[arg-type]
        body.sha256 = sha256
        try:
            front: Any = None  # no header, and no configuration, asks for encryption
            bucket = BucketRecord("b", b"B" * 16, "owner", 1, "active", 16, "eu-fr-1")
            return parse_put(front, Request("", "PUT", b"/", "", False, headers, _body=body, _bucket_record=bucket))
        except errors.S3Error as error:
            return type(error), error.details

    common = {
        **dict.fromkeys(INCIDENTAL - {"content-type"}, "h"),
        "x-amz-content-sha256": sha256,
        "expect": "100-continue",
        **kind,
    }
    assert asked(common) == asked({**common, "x-amz-storage-class": "STANDARD"})


def chunked(world: World, data: bytes, sum_of: bytes, *, end: bytes = b"\r\n", size: int | None = None) -> bytes:
    """A PUT as SDKs send it over TLS: in one chunk, unsigned, followed by the checksum."""
    framed = (
        b"%x\r\n%b\r\n0\r\nx-amz-checksum-crc32:%b\r\n" % (len(data), data, crc32(sum_of).encode())
        if data
        else b"0\r\n"
    )
    framed = (framed if data else framed + b"x-amz-checksum-crc32:%b\r\n" % crc32(sum_of).encode()) + end
    headers = {
        "Content-Encoding": "aws-chunked", "x-amz-trailer": "x-amz-checksum-crc32", "x-amz-sdk-checksum-algorithm": "CRC32",  # noqa: E501
        "x-amz-decoded-content-length": str(len(data) if size is None else size),
    }  # fmt: skip
    request = AWSRequest("PUT", f"{world.endpoint}/bucket/key", headers=headers)
    request.context["checksum"] = {"request_algorithm": {"in": "trailer"}}
    botocore.auth.S3SigV4Auth(Credentials(ACCESS, SECRET), "s3", REGION).add_auth(request)
    lines = [
        "PUT /bucket/key HTTP/1.1",
        f"Host: 127.0.0.1:{world.port}",
        *(f"{name}: {value}" for name, value in request.headers.items()),
    ]
    return "\r\n".join([*lines, f"Content-Length: {len(framed)}"]).encode() + b"\r\n\r\n" + framed


@pytest.mark.parametrize("how", ["whole", "behind", "body"])
@pytest.mark.parametrize("data", [b"", SMALL, bytes(HELD_BYTES_MAX)])
async def test_a_body_in_the_chunks_of_sdks_is_answered_without_the_task(world: World, how: str, data: bytes) -> None:
    answers = []
    for world.objects.busy in (False, True):
        answers.append(await ask(world, *in_pieces(chunked(world, data, data), how)))
        assert await kept(world) == {b"key": data}
        assert (await world.head("key")).checksums == {"CRC32": crc32(data)}
        await world.delete("key")
    assert b"x-amz-checksum-crc32: " in answers[0]
    assert answers[0] == answers[1]
    assert len(world.objects.put_answers) == 1


@pytest.mark.parametrize("how", ["whole", "behind", "body"])
@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"sum_of": b"other"}, b"BadDigest"),
        ({"size": 4}, b"IncompleteBody"),
        ({"end": b"color:blue\r\n\r\n"}, b"MalformedTrailerError"),
        ({"end": b"\r\ndata"}, b"InvalidRequest"),
    ],
    ids=["checksum", "size", "trailer", "behind"],
)
async def test_what_is_wrong_with_chunks_is_told_as_by_the_task(
    world: World, how: str, wrong: dict[str, Any], code: bytes
) -> None:
    answers = []
    for world.objects.busy in (False, True):
        answers.append(await ask(world, *in_pieces(chunked(world, SMALL, **{"sum_of": SMALL, **wrong}), how)))
    assert b"<Code>" + code + b"<" in answers[0]
    assert answers[0] == answers[1]
    assert await kept(world) == {}
    assert world.app.statistics().requests_in_flight == 0


@pytest.mark.parametrize("how", ["whole", "body"])
async def test_a_mistake_in_decoding_is_answered_and_leaves_nothing_in_flight(
    world: World, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(_decoder: ChunkedDecoder, _piece: object) -> list[bytes]:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(ChunkedDecoder, "feed", mistaken)
    for world.objects.busy in (False, True):
        assert b"<Code>InternalError<" in await ask(world, *in_pieces(chunked(world, SMALL, SMALL), how))
    assert world.app.statistics().requests_in_flight == 0
    assert [done.status for done in world.done] == [500, 500]


def over_http_chunks(request: bytes) -> bytes:
    """As boto3 sends it over TLS: without the length of what is framed."""
    head, _, framed = request.partition(b"\r\n\r\n")
    head = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", head)
    cut = len(framed) // 2
    pieces = [piece for piece in (framed[:cut], framed[cut:]) if piece]
    return head + b"\r\n\r\n" + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize("how", ["whole", "behind", "body"])
async def test_a_body_in_chunks_within_chunks_is_answered_without_the_task(world: World, how: str) -> None:
    request = over_http_chunks(chunked(world, SMALL, SMALL))
    *pieces, last = in_pieces(request, how)
    answer = await ask(world, *pieces, last + signed(world, "GET", "/bucket/key"))  # and what follows at once
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == 2
    assert answer.endswith(SMALL)
    assert len(world.objects.put_answers) == 1


async def test_a_body_that_turns_out_long_or_in_crumbs_is_the_tasks(world: World) -> None:
    for framed in (bytes(300_000), b""):
        crumbs = b"1\r\nx\r\n" * 5000
        small = over_http_chunks(chunked(world, SMALL, SMALL)).partition(b"\r\n\r\n")[0]
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(framed), framed) if framed else crumbs + b"0\r\n\r\n"
        answer = await ask(world, small + b"\r\n\r\n" + body)
        assert answer.startswith(b"HTTP/1.1 400 "), answer
    assert await kept(world) == {}
    assert world.objects.put_answers == []
    assert world.app.statistics().requests_in_flight == 0


async def test_the_name_that_some_sdks_give_the_operation_says_nothing(world: World) -> None:
    for method, body in (("PUT", SMALL), ("GET", b"")):
        answer = await ask(world, signed(world, method, f"/bucket/key?x-id={method.title()}Object", body=body))
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(SMALL)
    assert (len(world.objects.put_answers), len(world.objects.read_answers)) == (1, 1)


async def test_a_put_into_a_bucket_that_is_gone_goes_to_the_one_that_has_its_name(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    buckets, objects = world.buckets, world.objects
    stale = msgspec.structs.replace(await buckets.get("bucket"), id=b"deleted".ljust(16))
    refused: list[bytes] = []

    def try_put(bucket: Any, _key: bytes, _plain: Any, _meta: Any, _checks: Any, then: Any, **_more: Any) -> bool:
        refused.append(bucket.id)
        then(errors.NoSuchBucket(""))
        return True

    monkeypatch.setattr(objects, "try_put", try_put)
    monkeypatch.setattr(buckets, "try_get", lambda _name: stale)
    monkeypatch.setattr(buckets, "gone", lambda bucket: bucket.id == stale.id)
    answer = await ask(world, signed(world, "PUT", "/bucket/key", body=SMALL))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert refused == [stale.id]
    assert await kept(world) == {b"key": SMALL}
    assert world.app.statistics().requests_in_flight == 0
