"""Strangers' bytes on the S3 port: what is no request gets S3's answer, changes nothing, and is never taken for two
requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import re
import ssl
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from storaged.errors import BadRequest, IncompleteBody, RequestHeaderSectionTooLarge, RequestTimeout
from storaged.objects.api import Body, BodyChecks, PutResult
from storaged.objects.write.body import BodyReader
from storaged.s3.http.body import RequestBody
from storaged.s3.http.chunks import TransferChunks
from storaged.s3.http.grammar import parse_head
from storaged.s3.http.limits import Limits
from storaged.wire import Buffer
from tests.integration.s3_front import ACCESS, REGION, World, read_head, s3_world, signed, until
from tests.integration.test_s3_http import certificate
from tests.patience import GUARD_S

LIMITS = Limits()
HOST = b"Host: h\r\n"


@pytest.fixture
def patience_s() -> float:
    """How long a server waits for its clients. Most tests are not about that, and may stand still for a moment."""
    return GUARD_S


hasty = pytest.mark.parametrize("patience_s", [0.4])


@pytest_asyncio.fixture
async def world(patience_s: float) -> AsyncIterator[World]:
    limits = Limits(
        body_idle_s=patience_s,
        headers_s=patience_s,
        send_idle_s=patience_s,
        linger_s=GUARD_S,
        connections_max=8,
        read_buffer_bytes=16 * 1024,
    )
    async with s3_world(limits) as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        yield world


async def connect(world: World) -> tuple[StreamReader, StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", world.port)


async def answers(world: World, data: bytes, *, pieces: int = 1) -> list[tuple[int, str]]:
    """(status, error code) of all answers to ``data``, sent in so many pieces, until the server closes."""
    reader, writer = await connect(world)
    size = -(-len(data) // pieces)
    for start in range(0, len(data), size):
        writer.write(data[start : start + size])
        if pieces > 1:
            await asyncio.sleep(0.002)
    text = (await asyncio.wait_for(reader.read(), GUARD_S)).decode()
    writer.close()
    found = re.split(r"HTTP/1\.1 (\d{3}) ", text)
    return [
        (int(status), rest.partition("<Code>")[2].partition("</Code>")[0])
        for status, rest in zip(found[1::2], found[2::2], strict=True)
    ]


REFUSED = {
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "an HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "another version": b"GET / HTTP/1.2\r\n" + HOST + b"\r\n",
    "a version in lower case": b"GET / http/1.1\r\n" + HOST + b"\r\n",
    "two spaces": b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n",
    "a tab in the request line": b"GET /a\tb HTTP/1.1\r\n" + HOST + b"\r\n",
    "a space in the target": b"GET /a b HTTP/1.1\r\n" + HOST + b"\r\n",
    "NUL in the target": b"GET /a\x00b HTTP/1.1\r\n" + HOST + b"\r\n",
    "DEL in the target": b"GET /a\x7fb HTTP/1.1\r\n" + HOST + b"\r\n",
    "a method that is no token": b"GE(T / HTTP/1.1\r\n" + HOST + b"\r\n",
    "lines that end in LF": b"GET / HTTP/1.1\nHost: h\n\n",
    "one line that ends in LF": b"GET / HTTP/1.1\r\nHost: h\nx: y\r\n\r\n",
    "a CR without LF": b"GET / HTTP/1.1\r\nHost: h\rx: y\r\n\r\n",
    "a head that ends in LF LF": b"GET / HTTP/1.1\r\nHost: h\n\nGET /b HTTP/1.1\r\n\r\n",
    "a continued header": b"GET / HTTP/1.1\r\nHost: h\r\nx: a\r\n b\r\n\r\n",
    "a continued header, by a tab": b"GET / HTTP/1.1\r\nHost: h\r\nx: a\r\n\tb\r\n\r\n",
    "white space before the colon": b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length : 5\r\n\r\nhello",
    "white space before the first header": b"GET / HTTP/1.1\r\n Host: h\r\n\r\n",
    "a name that is no token": b"GET / HTTP/1.1\r\nHost: h\r\nx(y: z\r\n\r\n",
    "a name that is not ASCII": b"GET / HTTP/1.1\r\nHost: h\r\nx\xc3\xa9: z\r\n\r\n",
    "an empty name": b"GET / HTTP/1.1\r\nHost: h\r\n: z\r\n\r\n",
    "no colon": b"GET / HTTP/1.1\r\nHost: h\r\nAccept\r\n\r\n",
    "a known name without a colon": b"GET / HTTP/1.1\r\nHost: h\r\nHost\r\n\r\n",
    "NUL in a value": b"GET / HTTP/1.1\r\nHost: h\r\nx: a\x00b\r\n\r\n",
    "an escape in a value": b"GET / HTTP/1.1\r\nHost: h\r\nx: \x1b[2J\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "two hosts, the same": b"GET / HTTP/1.1\r\nHost: a\r\nhost: a\r\n\r\n",
    "two authorizations": b"GET / HTTP/1.1\r\nHost: h\r\nAuthorization: AWS4-HMAC-SHA256 a\r\nauthorization: Basic b\r\n\r\n",  # noqa: E501
    "a signed length": b"PUT /bucket/k HTTP/1.1\r\nHost: h\r\nContent-Length: +5\r\n\r\nhello",
    "a negative length": b"PUT /bucket/k HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n",
    "a length with an underscore": b"PUT /bucket/k HTTP/1.1\r\nHost: h\r\nContent-Length: 1_0\r\n\r\n",
    "a hexadecimal length": b"PUT /bucket/k HTTP/1.1\r\nHost: h\r\nContent-Length: 0x5\r\n\r\nhello",
    "an empty length": b"PUT /bucket/k HTTP/1.1\r\nHost: h\r\nContent-Length:\r\n\r\nhello",
    "a length of other digits": b"PUT /bucket/k HTTP/1.1\r\nHost: h\r\nContent-Length: \xd9\xa5\r\n\r\nhello",
    "an endless length": b"PUT /bucket/k HTTP/1.1\r\nHost: h\r\nContent-Length: " + b"9" * 40 + b"\r\n\r\n",
    "two lengths in one": b"PUT /bucket/k HTTP/1.1\r\nHost: h\r\nContent-Length: 5, 5\r\n\r\nhello",
    "two lengths": b"PUT /bucket/k HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "two lengths, the same": b"PUT /bucket/k HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello",  # noqa: E501
    "length and chunks": b"PUT /bucket/k HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",  # noqa: E501
    "chunks and length": b"PUT /bucket/k HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",  # noqa: E501
    "chunks twice": b"PUT /bucket/k HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",  # noqa: E501
    "chunks in HTTP/1.0": b"PUT /bucket/k HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "only empty lines": b"\r\n\r\n\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("pieces", [1, 5])
@pytest.mark.parametrize("name", REFUSED)
async def test_what_another_parser_might_read_otherwise_is_refused_and_nothing_behind_it_is_read(
    world: World, name: str, pieces: int
) -> None:
    behind = signed(world, "PUT", "/bucket/smuggled", body=b"x")
    assert await answers(world, REFUSED[name] + behind, pieces=pieces) == [(400, "BadRequest")]
    assert not await world.stored()


@pytest.mark.parametrize(
    "value", ["gzip, chunked", "identity", "chunked, identity", "xchunked", '"chunked"', "chunked;q=1", ""]
)
async def test_no_transfer_coding_but_chunked_is_known(world: World, value: str) -> None:
    request = b"PUT /bucket/k HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: %s\r\n\r\n0\r\n\r\n" % value.encode()
    assert await answers(world, request + signed(world, "PUT", "/bucket/smuggled", body=b"x")) == [
        (501, "NotImplemented")
    ]


BROKEN_CHUNKS = [
    b"5\nhello\r\n0\r\n\r\n",
    b"5\r\nhello0\r\n\r\n",
    b"5\r\nhellO\n0\r\n\r\n",
    b"4\r\nhello\r\n0\r\n\r\n",
    b"+5\r\nhello\r\n0\r\n\r\n",
    b"0x5\r\nhello\r\n0\r\n\r\n",
    b" 5\r\nhello\r\n0\r\n\r\n",
    b"5 \r\nhello\r\n0\r\n\r\n",
    b"\r\nhello\r\n0\r\n\r\n",
    b"5;a\rb\r\nhello\r\n0\r\n\r\n",
    b"5;a\x00b\r\nhello\r\n0\r\n\r\n",
    b"fffffffffffffffff\r\nhello\r\n0\r\n\r\n",
    b"5;" + b"a" * 2000 + b"\r\nhello\r\n0\r\n\r\n",
    b"5\r\nhello\r\n0\r\nno colon\r\n\r\n",
    b"5\r\nhello\r\n0\r\nx y: z\r\n\r\n",
    b"5\r\nhello\r\n0\r\n" + b"a: b\r\n" * 3000 + b"\r\n",
    b"5\r\nhello\r\n0\n\n",
]


@pytest.mark.parametrize("chunks", BROKEN_CHUNKS)
@pytest.mark.parametrize("pieces", [1, 7])
async def test_chunks_that_are_broken_store_nothing_and_end_the_connection(
    world: World, chunks: bytes, pieces: int
) -> None:
    request = signed(world, "PUT", "/bucket/k", body=b"hello", send_body=False)
    request = request.replace(b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n")
    behind = signed(world, "PUT", "/bucket/smuggled", body=b"x")
    found = await answers(world, request + chunks + behind, pieces=pieces)
    assert found in ([(400, "BadRequest")], [(400, "IncompleteBody")])
    assert not await world.stored()


async def test_chunk_extensions_and_trailers_are_passed_over(world: World) -> None:
    request = signed(world, "PUT", "/bucket/k", body=b"hello", send_body=False)
    request = request.replace(b"Content-Length: 5\r\n", b"transfer-encoding: Chunked\r\nConnection: close\r\n")
    assert await answers(world, request + b'2;a="b"\r\nhe\r\n003 ; c\r\nllo\r\n0\r\nX-Trailer: y\r\n\r\n') == [
        (200, "")
    ]
    assert (await world.stored())[b"k"] == b"hello"


def test_chunks_are_decoded_the_same_however_they_are_cut() -> None:
    chance = random.Random(7)
    for _ in range(300):
        plain = b"".join(chance.randbytes(chance.choice((1, 2, 15, 16, 300))) for _ in range(chance.randrange(4)))
        wire, start = b"", 0
        while start < len(plain):
            size = chance.randrange(1, 40)
            piece = plain[start : start + size]
            wire += b"%x\r\n%s\r\n" % (len(piece), piece)
            start += size
        wire += b"0\r\n\r\n"
        chunks, found, at = TransferChunks(), b"", 0
        behind = b"GET / HTTP/1.1"
        wire += behind
        while not chunks.ended:
            size = chance.randrange(1, 9)
            found += b"".join(chunks.feed(wire[at : at + size]))
            at += size
        assert found == plain
        assert chunks.rest + wire[at:] == behind


# --- heads


def test_a_head_is_what_it_says() -> None:
    head = parse_head(b"PUT /b/k%20?x=y HTTP/1.1\r\nHOST:h\r\nX-Amz-Meta-A:  a \t\r\nx-amz-meta-a: b\r\nx-utf: \xc3\xa9\xff\r\nContent-Length: 007\r\nConnection: foo, Close", LIMITS)  # fmt: skip  # noqa: E501
    assert (head.method, head.target, head.length, head.declared, head.keep_alive, head.expects_continue) == (
        "PUT",
        b"/b/k%20?x=y",
        7,
        True,
        False,
        False,
    )
    assert head.headers["x-amz-meta-a"] == "a,b"
    assert head.headers["x-utf"].encode("utf-8", "surrogateescape") == b"\xc3\xa9\xff"
    old = parse_head(b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\nExpect: 100-continue", LIMITS)
    assert (old.keep_alive, old.expects_continue, old.http11, old.declared) == (True, False, False, False)
    assert not parse_head(b"GET / HTTP/1.0", LIMITS).keep_alive


def test_limits_of_a_head_hold_exactly() -> None:
    limits = Limits(header_line_bytes_max=100, header_section_bytes_max=1000, headers_max=10)
    parse_head(
        b"GET /" + b"a" * 86 + b" HTTP/1.1\r\nhost: h" + b"".join(b"\r\nx%d: " % n + b"y" * 96 for n in range(9)),
        limits,
    )
    for head in (
        b"GET /" + b"a" * 87 + b" HTTP/1.1\r\nhost: h",
        b"GET / HTTP/1.1\r\nhost: h\r\nx: " + b"y" * 98,
        b"GET / HTTP/1.1\r\nhost: h" + b"".join(b"\r\nx%d: y" % n for n in range(10)),
        b"GET / HTTP/1.1\r\nhost: h"
        + b"".join(b"\r\nx%d%s: y" % (n, b"-" * 90) for n in range(9))
        + b"\r\nxyz: "
        + b"z" * 95,
    ):
        with pytest.raises(RequestHeaderSectionTooLarge):
            parse_head(head, limits)


def test_random_bytes_are_refused_or_are_heads_that_mean_what_they_say() -> None:
    """Mutations of a good head: none is taken that has a control character, or a header that the strict grammar does
    not have.
    """
    chance = random.Random(11)
    good = (
        b"PUT /bucket/key?a=b HTTP/1.1\r\nHost: h:9\r\nContent-Length: 5\r\nx-amz-date: 20261125T160000Z\r\nAccept: */*"
    )
    taken = 0
    for _ in range(20_000):
        raw = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(raw))
            raw[at : at + chance.randrange(2)] = chance.choice(
                (b"\r", b"\n", b"\r\n", b" ", b"\t", b":", b"\0", b",", b"\x80", chance.randbytes(1))
            )
        try:
            head = parse_head(bytes(raw), LIMITS)
        except BadRequest:
            continue
        taken += 1
        assert head.length is not None
        assert b"\n" not in raw.replace(b"\r\n", b"")
        assert not any(code < 32 and code != 9 for code in raw.replace(b"\r\n", b""))
        assert raw.count(b"\r\n") == len(head.headers)
        assert b" " not in head.target
    assert taken > 100


MUTATIONS = (
    b"\xff", b"\xc3\xa9", b"\xd9\xa5", b"\xc2\xb2", b"\xed\xa0\x80", b"%", b"%00", b"%ff", b"&", b"=", b"?", b"/", b",", b";", b" ", b"\t", b":", b"\r\n",  # noqa: E501
    b"\r\n\r\n", b"9", b"-1", b'"', b"<", b"*", b"e", b"",
)  # fmt: skip


@hasty
async def test_requests_with_a_few_bytes_changed_are_never_a_failure_of_ours(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(5)
    good = [
        signed(
            world,
            "PUT",
            "/bucket/k",
            body=b"hello",
            headers={"x-amz-meta-a": "b", "x-amz-tagging": "a=b", "If-None-Match": "*"},
        ),
        signed(world, "GET", "/bucket/k?versionId=null&partNumber=1", headers={"Range": "bytes=0-1"}),
        signed(world, "GET", "/bucket?list-type=2&prefix=a&max-keys=5"),
        signed(world, "POST", "/bucket?delete", body=b"<Delete><Object><Key>a</Key></Object></Delete>"),
        (
            b"PUT /bucket/k HTTP/1.1\r\nHost: h\r\nx-amz-trailer: x-amz-checksum-crc32\r\nTransfer-Encoding:"
            b" chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
        ),
        (
            b"GET /bucket/k?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AK%2F20261125%2Feu-fr-1%2Fs3%2Faws4_request&X-Amz-Date=20261125T160000Z&X-Amz-Expires=100&X-Amz-SignedHeaders=host&X-Amz-Signature=ab"  # noqa: E501
            b" HTTP/1.1\r\nHost: h\r\n\r\n"
        ),
    ]
    for _ in range(300):
        raw = bytearray(chance.choice(good))
        for _ in range(chance.choice((1, 1, 2, 5))):
            at = chance.randrange(len(raw))
            raw[at : at + chance.choice((0, 1, 2))] = chance.choice(MUTATIONS)
        reader, writer = await connect(world)
        writer.write(raw)
        answer = await asyncio.wait_for(reader.read(12), GUARD_S)
        assert answer[9:12] not in (b"500", b"503"), bytes(raw)
        writer.transport.abort()
    await until(lambda: world.app.statistics().connections == 0)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# --- connections


async def test_requests_sent_in_one_go_are_answered_in_their_order(world: World) -> None:
    several = b"".join(signed(world, "PUT", f"/bucket/k{n}", body=b"%d" % n) for n in range(20)) + signed(world, "GET", "/bucket/k19", headers={"Connection": "close"})  # fmt: skip  # noqa: E501
    for pieces in (1, 40):
        assert [status for status, _ in await answers(world, several, pieces=pieces)] == [200] * 21
    assert len(await world.stored()) == 20


async def test_requests_sent_in_one_go_do_not_keep_others_waiting(world: World) -> None:
    reader, writer = await connect(world)
    other_reader, other = await connect(world)
    writer.write(b"HEAD /first HTTP/1.1\r\nHost: h\r\n\r\n" * 1000)
    other.write(b"HEAD /other HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
    await asyncio.wait_for(other_reader.read(), GUARD_S)
    await until(lambda: len(world.done) == 1001)
    assert [done.target for done in world.done].index("/other") < 100
    writer.close()
    other.close()
    del reader


async def test_one_empty_line_before_a_request_is_passed_over(world: World) -> None:
    request = signed(world, "PUT", "/bucket/k", body=b"x")
    last = signed(world, "GET", "/bucket/k", headers={"Connection": "close"})
    assert [status for status, _ in await answers(world, b"\r\n" + request + b"\r\n" + last)] == [200, 200]
    assert await answers(world, request + b"\r\n\r\n" + last) == [(200, ""), (400, "BadRequest")]


async def test_http_1_0_is_closed_after_its_answer_unless_it_asks_to_be_kept(world: World) -> None:
    assert [code for code, _ in await answers(world, b"GET / HTTP/1.0\r\n\r\n" * 2)] == [403]
    reader, writer = await connect(world)
    for _ in range(2):
        writer.write(b"HEAD / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert b"Connection: keep-alive\r\n" in await read_head(reader)
    writer.close()


async def test_a_client_that_ends_its_side_first_gets_its_answers(world: World) -> None:
    reader, writer = await connect(world)
    writer.write(signed(world, "PUT", "/bucket/k", body=b"hello") + signed(world, "GET", "/bucket/k"))
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), GUARD_S)
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert answer.endswith(b"hello")
    writer.close()
    reader, writer = await connect(world)
    writer.write(signed(world, "PUT", "/bucket/half", body=b"hello")[:-1])
    writer.write_eof()
    assert b"<Code>IncompleteBody</Code>" in await asyncio.wait_for(reader.read(), GUARD_S)
    writer.close()


@hasty
async def test_idle_connections_and_trickled_heads_are_closed_in_time(world: World) -> None:
    idle, idle_writer = await connect(world)
    trickled, writer = await connect(world)

    async def trickle() -> None:
        for code in signed(world, "GET", "/bucket"):
            writer.write(bytes((code,)))
            await asyncio.sleep(0.05)

    trickling = asyncio.create_task(trickle())
    assert await asyncio.wait_for(idle.read(), GUARD_S) == b""
    with contextlib.suppress(ConnectionResetError):  # where a byte came after the end
        assert await asyncio.wait_for(trickled.read(), GUARD_S) == b""
    trickling.cancel()
    idle_writer.close()
    writer.close()
    await until(lambda: world.app.statistics().connections == 0)


async def test_a_tls_handshake_that_is_never_made_is_given_up(tmp_path: Path) -> None:
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate(tmp_path))
    async with s3_world(Limits(handshake_s=0.3), tls=server) as world:
        reader, writer = await connect(world)
        writer.write(b"\x16\x03\x01")
        assert await asyncio.wait_for(reader.read(), GUARD_S) == b""
        writer.close()


async def test_a_body_that_trickles_is_a_timeout_however_steadily_it_comes() -> None:
    async with s3_world(Limits(body_idle_s=0.3, rate_min_bytes_s=100)) as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        reader, writer = await connect(world)
        request = signed(world, "PUT", "/bucket/k", body=bytes(1000))
        writer.write(request[:-1000])

        async def trickle() -> None:
            for _ in range(100):
                writer.write(b"\0")
                await asyncio.sleep(0.05)

        trickling = asyncio.create_task(trickle())
        assert b"<Code>RequestTimeout</Code>" in await asyncio.wait_for(reader.read(), GUARD_S)
        trickling.cancel()
        writer.close()


@hasty
async def test_a_client_that_takes_nothing_is_disconnected(world: World) -> None:
    await asyncio.to_thread(world.client().put_object, Bucket="bucket", Key="big", Body=bytes(32 << 20))
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port, limit=1024)
    writer.write(signed(world, "GET", "/bucket/big"))
    await until(lambda: any(done.operation == "GetObject" and not done.complete for done in world.done))
    assert all(stream.closed for stream in world.objects.streams)
    writer.close()
    del reader


@hasty
async def test_further_connections_than_may_be_are_closed_at_once(world: World) -> None:
    writers = [(await connect(world))[1] for _ in range(8)]
    reader, writer = await connect(world)
    with contextlib.suppress(ConnectionResetError):
        assert await asyncio.wait_for(reader.read(), GUARD_S) == b""
    for each in (writer, *writers):
        each.close()
    await until(lambda: world.app.statistics().connections == 0)
    assert await answers(world, signed(world, "GET", "/bucket", headers={"Connection": "close"})) == [(200, "")]


async def test_what_nobody_reads_is_not_taken_from_the_socket(world: World) -> None:
    """Requests that follow one that is being answered wait in the client's socket, but for a few KiB."""
    going_on = asyncio.Event()

    async def slow(*_: object, **__: object) -> None:
        await going_on.wait()
        raise BadRequest

    world.objects.head = slow  # type: ignore[method-assign, assignment]
    _, writer = await connect(world)
    writer.write(signed(world, "HEAD", "/bucket/k"))
    writer.write(bytes(64 << 20))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await writer.drain()
    writer.transport.abort()
    going_on.set()


# --- bodies


class _Socket:
    """A body's connection: what it would receive, read by read."""

    def __init__(self, reads: list[bytes]) -> None:
        self.reads = reads
        self.direct = 0
        self.held_back = False

    def pause_reading(self) -> None:
        self.held_back = True

    def on_body_done(self, rest: Buffer = b"") -> None: ...

    def on_admitted(self) -> None: ...

    async def wait_for_body(self, body: RequestBody) -> None:
        body.waiter = asyncio.get_running_loop().create_future()
        while not body.waiter.done():
            data = self.reads.pop(0)
            if body.destination is None:
                body.feed(data)
                continue
            taken = min(len(data), len(body.destination))
            body.destination[:taken] = data[:taken]
            if taken < len(data):
                self.reads.insert(0, data[taken:])
            self.direct += taken
            body.received(taken)
        body.waiter = None


async def test_a_large_body_goes_straight_into_its_readers_memory() -> None:
    chance = random.Random(3)
    for _ in range(50):
        plain = chance.randbytes(chance.randrange(200_000, 400_000))
        reads, at = [], 0
        while at < len(plain):
            size = chance.choice((1, 700, 60_000))
            reads.append(plain[at : at + size])
            at += size
        socket = _Socket(reads)
        body = RequestBody(socket, len(plain), None, LIMITS)
        body.feed(socket.reads.pop(0))
        reader, found = BodyReader(body, 1 << 20), b""
        while not reader.ended:
            block = memoryview(bytearray(chance.choice((100, 50_000, 100_000))))
            found += block[: await reader.fill(block)]
        assert found == plain
        assert body.bytes_received == len(plain)
        assert socket.direct > len(plain) // 4


class _Blocks:
    """The object plane's ``put``, as it reads a large body: block by block, each in memory that is used again."""

    def __init__(self) -> None:
        self.found = b""
        self.failed: list[Exception] = []

    async def put(
        self, bucket: object, key: bytes, body: Body, meta: object, checks: BodyChecks, **_: object
    ) -> PutResult:
        reader, block = BodyReader(body, 1 << 30), memoryview(bytearray(300_000))
        try:
            while not reader.ended:
                count = await reader.fill(block)
                await asyncio.sleep(0.001)
                self.found += block[:count]
        except Exception as error:
            self.failed.append(error)
            raise
        assert hashlib.sha256(self.found).hexdigest() == checks.sha256
        return PutResult("0" * 32)


@pytest.mark.parametrize("secure", [False, True])
async def test_a_large_body_comes_through_a_socket_into_blocks_and_what_follows_it_is_the_next_request(
    secure: bool, tmp_path: Path
) -> None:
    path = certificate(tmp_path)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(path)
    client = ssl.create_default_context(cafile=str(path))
    async with s3_world(tls=server if secure else None) as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        for size in (300_000, 299_999, 2_500_001):
            blocks = _Blocks()
            world.objects.put = blocks.put  # type: ignore[method-assign, assignment]
            body = random.Random(size).randbytes(size)
            reader, writer = await asyncio.open_connection("localhost", world.port, ssl=client if secure else None)
            writer.write(signed(world, "PUT", "/bucket/k", body=body) + signed(world, "HEAD", "/bucket/none"))
            assert b"200 OK" in await read_head(reader)
            assert b"404 Not Found" in await read_head(reader)
            writer.close()
            assert blocks.found == body


@hasty
async def test_a_large_body_that_stops_or_breaks_off_is_told_to_its_reader(world: World) -> None:
    blocks = _Blocks()
    world.objects.put = blocks.put  # type: ignore[method-assign, assignment]
    request = signed(world, "PUT", "/bucket/k", body=bytes(1_000_000))
    reader, writer = await connect(world)
    writer.write(request[:-1000])
    assert b"<Code>RequestTimeout</Code>" in await asyncio.wait_for(reader.read(), GUARD_S)
    writer.close()
    reader, writer = await connect(world)
    writer.write(request[:-1000])
    await writer.drain()
    writer.transport.abort()
    await until(lambda: len(blocks.failed) == 2)
    assert [type(error) for error in blocks.failed] == [RequestTimeout, IncompleteBody]
    del reader


async def test_uploads_of_any_size_arrive_whole_through_a_socket(world: World) -> None:
    client = world.client()
    for size in (0, 1, 4096, 65_536, 65_537, 1 << 20, 9_000_001):
        body = random.Random(size).randbytes(size)
        await asyncio.to_thread(client.put_object, Bucket="bucket", Key="k", Body=body)
        assert (await world.stored())[b"k"] == body
