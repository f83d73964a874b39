"""Bodies around the borders of whole copies, 64 and 256 KiB, over HTTP: what is right is stored, what is wrong changes
nothing, and clients that stand still or go leave no memory leased.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import itertools
import os
import re
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from storaged.objects.cache.buffers import _is_free
from storaged.objects.configuration.kinds import ENABLED, VERSIONING, Versioning
from storaged.objects.records import decode_object
from storaged.s3.http.limits import Limits
from tests.integration.s3_front import (
    ACCESS,
    REGION,
    SECRET,
    World,
    ask,
    break_off,
    crc32,
    read_head,
    s3_world,
    signed,
    until,
)
from tests.integration.test_s3_soon_put import chunked

KIB = 1024
LARGEST = 256 * KIB
BORDERS = [64 * KIB - 1, 64 * KIB, 64 * KIB + 1, 128 * KIB, LARGEST, LARGEST + 1]
KEY = bytes(range(32))
CUSTOMER = {
    "x-amz-server-side-encryption-customer-algorithm": "AES256",
    "x-amz-server-side-encryption-customer-key": base64.b64encode(KEY).decode(),
    "x-amz-server-side-encryption-customer-key-MD5": base64.b64encode(hashlib.md5(KEY).digest()).decode(),
}
TASK = {"x-unknown": "1"}
"""Has a GET answered by the connection's task."""

borders = pytest.mark.parametrize("size", BORDERS)


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with s3_world(small_bytes_max=LARGEST) as made:
        await made.buckets.create((await made.users.lookup(ACCESS))[0], "bucket", region=REGION)
        yield made
        assert leased(made) == 0


def leased(world: World) -> int:
    plane = world.objects.plane
    pools = (plane.fill_buffers, plane.put_buffers, plane.get_buffers)
    return sum(pool.bytes_leased + pool.transfers for pool in pools)


def form_of(world: World) -> str:
    """How the newest version of ``key`` is kept."""
    (value,) = [value for name, value in world.below.ring.values.items() if name.key == b"key"]
    return "copies" if decode_object(value.body).versions[0].parts[0].small else "coded"


async def body_of_get(world: World, **headers: str) -> bytes:
    head, _, body = (await ask(world, signed(world, "GET", "/bucket/key", headers=headers))).partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 206 ")), head
    return body


def in_signed_chunks(world: World, data: bytes, piece: int, *, broken: int = -1) -> bytes:
    """A PUT whose chunks are signed; the signature of the ``broken`` one is wrong. See
    https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-streaming.html
    """
    head = signed(
        world,
        "PUT",
        "/bucket/key",
        headers={"Content-Encoding": "aws-chunked", "x-amz-decoded-content-length": str(len(data))},
        payload="STREAMING-AWS4-HMAC-SHA256-PAYLOAD",
    ).partition(b"\r\n\r\n")[0]
    found = re.search(rb"X-Amz-Date: (\S+)", head, re.IGNORECASE)
    seed = re.search(rb"Signature=(\w+)", head)
    assert found
    assert seed
    stamp, before = found[1].decode(), seed[1].decode()
    scope = f"{stamp[:8]}/{REGION}/s3/aws4_request"
    key = b"AWS4" + SECRET.encode()
    for step in scope.split("/"):
        key = hmac.digest(key, step.encode(), "sha256")
    framed = b""
    pieces = [data[at : at + piece] for at in range(0, len(data), piece)] + [b""]
    for number, part in enumerate(pieces):
        empty, its = hashlib.sha256(b"").hexdigest(), hashlib.sha256(part).hexdigest()
        text = f"AWS4-HMAC-SHA256-PAYLOAD\n{stamp}\n{scope}\n{before}\n{empty}\n{its}"
        before = hmac.digest(key, text.encode(), "sha256").hex()
        said = before if number != broken else "0" * 64
        framed += b"%x;chunk-signature=%b\r\n%b\r\n" % (len(part), said.encode(), part)
    head = re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % len(framed), head)
    return head + b"\r\n\r\n" + framed


Make = Callable[[World, bytes], bytes]

RIGHT: dict[str, Make] = {
    "plain": lambda world, data: signed(world, "PUT", "/bucket/key", body=data),
    "checksums": lambda world, data: signed(
        world,
        "PUT",
        "/bucket/key",
        body=data,
        headers={
            "Content-MD5": base64.b64encode(hashlib.md5(data).digest()).decode(),
            "x-amz-checksum-crc32": crc32(data),
        },
    ),
    "new": lambda world, data: signed(world, "PUT", "/bucket/key", body=data, headers={"If-None-Match": "*"}),
    "chunks": lambda world, data: chunked(world, data, data),
    "signed chunks": lambda world, data: in_signed_chunks(world, data, 64 * KIB),
    "one signed chunk": lambda world, data: in_signed_chunks(world, data, len(data)),
}


@borders
@pytest.mark.parametrize("how", RIGHT)
async def test_a_body_is_stored_and_read_back_whole_and_in_ranges(world: World, size: int, how: str) -> None:
    data = os.urandom(size)
    assert b" 200 OK\r\n" in await ask(world, RIGHT[how](world, data))
    assert form_of(world) == ("copies" if size <= LARGEST else "coded")
    for headers in ({}, TASK):
        assert await body_of_get(world, **headers) == data
        assert await body_of_get(world, **headers, Range=f"bytes=1-{size - 2}") == data[1:-1]
        assert await body_of_get(world, **headers, Range="bytes=-5") == data[-5:]


def _other_end(request: bytes) -> bytes:
    return request[:-1] + bytes([request[-1] ^ 1])


WRONG: dict[str, tuple[Make, bytes]] = {
    "other bytes": (
        lambda world, data: _other_end(signed(world, "PUT", "/bucket/key", body=data)),
        b"XAmzContentSHA256Mismatch",
    ),
    "md5": (
        lambda world, data: signed(
            world, "PUT", "/bucket/key", body=data, headers={"Content-MD5": base64.b64encode(bytes(16)).decode()}
        ),
        b"BadDigest",
    ),
    "checksum": (
        lambda world, data: signed(
            world, "PUT", "/bucket/key", body=data, headers={"x-amz-checksum-crc32": crc32(b"other")}
        ),
        b"BadDigest",
    ),
    "shorter": (lambda world, data: signed(world, "PUT", "/bucket/key", body=data)[:-1], b"IncompleteBody"),
    "trailer": (lambda world, data: chunked(world, data, b"other"), b"BadDigest"),
    "longer in chunks": (lambda world, data: chunked(world, data, data, size=len(data) - 1), b"IncompleteBody"),
    "shorter in chunks": (lambda world, data: chunked(world, data, data, size=len(data) + 1), b"IncompleteBody"),
    "cut chunks": (lambda world, data: chunked(world, data, data)[:-40], b"IncompleteBody"),
    "chunk signature": (
        lambda world, data: in_signed_chunks(world, data, 64 * KIB, broken=0),
        b"SignatureDoesNotMatch",
    ),
    "last chunk signature": (
        lambda world, data: in_signed_chunks(world, data, len(data), broken=1),
        b"SignatureDoesNotMatch",
    ),
    "not new": (
        lambda world, data: signed(world, "PUT", "/bucket/key", body=data, headers={"If-None-Match": "*"}),
        b"PreconditionFailed",
    ),
    "not the same": (
        lambda world, data: signed(world, "PUT", "/bucket/key", body=data, headers={"If-Match": f'"{"0" * 32}"'}),
        b"PreconditionFailed",
    ),
}


@borders
@pytest.mark.parametrize("how", WRONG)
async def test_a_body_that_is_wrong_is_refused_and_changes_nothing(world: World, size: int, how: str) -> None:
    make, code = WRONG[how]
    assert b" 200 OK\r\n" in await ask(world, signed(world, "PUT", "/bucket/key", body=b"before"))
    answer = await ask(world, make(world, os.urandom(size)))
    assert b"<Code>" + code + b"<" in answer, answer
    assert await world.stored() == {b"key": b"before"}
    assert world.app.statistics().requests_in_flight == 0
    await world.objects.plane.background.settle()


@borders
async def test_a_customers_key_opens_a_copy_and_no_other_does(world: World, size: int) -> None:
    data = os.urandom(size)
    assert b" 200 OK\r\n" in await ask(world, signed(world, "PUT", "/bucket/key", body=data, headers=CUSTOMER))
    assert form_of(world) == ("copies" if size <= LARGEST else "coded")
    assert await body_of_get(world, **CUSTOMER) == data
    assert await body_of_get(world, **CUSTOMER, Range=f"bytes=2-{size - 3}") == data[2:-2]
    assert b"HTTP/1.1 400 " in await ask(world, signed(world, "GET", "/bucket/key"))
    other = hashlib.md5(b"other").digest() * 2
    wrong = {
        **CUSTOMER,
        "x-amz-server-side-encryption-customer-key": base64.b64encode(other).decode(),
        "x-amz-server-side-encryption-customer-key-MD5": base64.b64encode(hashlib.md5(other).digest()).decode(),
    }
    assert b"HTTP/1.1 400 " in await ask(world, signed(world, "GET", "/bucket/key", headers=wrong))


@borders
async def test_with_versioning_nothing_above_a_kib_is_a_copy(world: World, size: int) -> None:
    data = os.urandom(size)
    assert b" 200 OK\r\n" in await ask(world, signed(world, "PUT", "/bucket/key", body=b"x" * 5000))
    bucket = await world.buckets.get("bucket")
    await world.buckets.configure(bucket, VERSIONING, lambda _before: Versioning(ENABLED))
    assert b" 200 OK\r\n" in await ask(world, signed(world, "PUT", "/bucket/key", body=data))
    assert form_of(world) == "coded"
    assert await body_of_get(world) == data


@borders
async def test_a_form_has_its_file_stored_whatever_its_size(world: World, size: int) -> None:
    """A form does not say how large its file is: above 64 KiB it is coded, before all of it is known."""
    data, line = os.urandom(size), "--edge\r\nContent-Disposition: form-data; name="
    policy = base64.b64encode(
        b'{"expiration": "2099-12-31T23:59:59Z", "conditions": [{"bucket": "bucket"}, {"key": "key"}]}'
    ).decode()
    signature = base64.b64encode(hmac.digest(SECRET.encode(), policy.encode(), "sha1")).decode()
    fields = {"key": "key", "AWSAccessKeyId": ACCESS, "policy": policy, "signature": signature}
    form = "".join(f'{line}"{name}"\r\n\r\n{value}\r\n' for name, value in fields.items())
    body = f'{form}{line}"file"; filename="f"\r\n\r\n'.encode() + data + b"\r\n--edge--\r\n"
    head = f"POST /bucket HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    request = head.encode() + b"Content-Type: multipart/form-data; boundary=edge\r\n\r\n" + body
    assert (await ask(world, request)).startswith(b"HTTP/1.1 204 ")
    assert form_of(world) == ("copies" if size <= 64 * KIB else "coded")
    assert await body_of_get(world) == data


@pytest.mark.parametrize("size", [64 * KIB + 1, 128 * KIB, LARGEST])
@pytest.mark.parametrize("first", [0, 1, 50 * KIB, 64 * KIB])
async def test_a_plain_body_is_taken_without_the_task_in_whatever_pieces_it_comes(
    world: World, size: int, first: int
) -> None:
    """``first``: bytes of it that come with the head. The rest comes in three pieces, the last with the next request
    behind it."""
    data = os.urandom(size)
    request = signed(world, "PUT", "/bucket/key", body=data)
    head = request.index(b"\r\n\r\n") + 4
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    ends = sorted({head + first, min(head + first + 700, len(request)), len(request) - 5, len(request)})
    for begin, end in itertools.pairwise([0, *ends]):
        behind = signed(world, "HEAD", "/bucket/key") if end == len(request) else b""
        writer.write(request[begin:end] + behind)
        await asyncio.sleep(0.01)
    for _ in range(2):
        assert (await read_head(reader)).startswith(b"HTTP/1.1 200 OK\r\n")
    writer.close()
    assert len(world.objects.put_answers) == 1
    assert form_of(world) == "copies"
    assert await world.stored() == {b"key": data}
    assert world.app._connections is not None
    assert world.app._connections.whole_bytes == 0


async def test_bodies_beyond_the_memory_of_callbacks_are_the_tasks() -> None:
    size = 128 * KIB
    async with s3_world(Limits(whole_bytes_max=2 * size), small_bytes_max=LARGEST) as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        bodies = {f"key{number}": os.urandom(size) for number in range(4)}
        clients = []
        for key, body in bodies.items():
            request = signed(world, "PUT", f"/bucket/{key}", body=body)
            reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
            writer.write(request[:-1])
            clients.append((reader, writer, request[-1:]))
        await until(lambda: world.objects.plane.fill_buffers.bytes_leased >= 2 * size)
        assert world.app._connections is not None
        assert world.app._connections.whole_bytes == 2 * size
        for reader, writer, rest in clients:
            writer.write(rest)
            assert (await read_head(reader)).startswith(b"HTTP/1.1 200 OK\r\n")
            writer.close()
        assert len(world.objects.put_answers) == 2
        assert await world.stored() == {key.encode(): body for key, body in bodies.items()}
        assert world.app._connections.whole_bytes == 0
        assert leased(world) == 0


@pytest.mark.parametrize("size", [64 * KIB + 1, LARGEST])
@pytest.mark.parametrize("sent", [10, 60 * KIB])
@pytest.mark.parametrize("whole_bytes_max", [0, LARGEST], ids=["task", "callbacks"])
async def test_a_client_that_goes_in_the_middle_of_its_body_leaves_nothing(
    size: int, sent: int, whole_bytes_max: int
) -> None:
    async with s3_world(Limits(whole_bytes_max=whole_bytes_max), small_bytes_max=LARGEST) as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        request = signed(world, "PUT", "/bucket/key", body=os.urandom(size))
        end = request.index(b"\r\n\r\n") + 4 + sent
        _, writer = await asyncio.open_connection("127.0.0.1", world.port)
        writer.write(request[:end])
        connections = world.app._connections
        assert connections is not None
        await until(lambda: connections.whole_bytes == size or world.objects.plane.fill_buffers.bytes_leased >= size)
        assert bool(connections.whole_bytes) == bool(whole_bytes_max)
        break_off(writer)
        await until(lambda: world.app.statistics().requests_in_flight == 0)
        assert leased(world) == connections.whole_bytes == 0
        assert await world.stored() == {}


async def test_a_client_that_stops_in_the_middle_of_its_body_is_told_and_gives_its_memory_back() -> None:
    async with s3_world(Limits(body_idle_s=0.4, linger_s=0.1), small_bytes_max=LARGEST) as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        request = signed(world, "PUT", "/bucket/key", body=os.urandom(LARGEST))
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
        writer.write(request[: len(request) // 2])
        connections = world.app._connections
        assert connections is not None
        await until(lambda: connections.whole_bytes == LARGEST)
        answer = await asyncio.wait_for(reader.read(), 20)
        writer.close()
        assert b"<Code>RequestTimeout<" in answer
        assert leased(world) == connections.whole_bytes == 0
        assert await world.stored() == {}


async def test_a_plain_body_is_as_long_as_it_is_whatever_else_its_head_declares(world: World) -> None:
    data = os.urandom(LARGEST + 1)
    request = signed(world, "PUT", "/bucket/key", body=data, headers={"x-amz-decoded-content-length": "1"})
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(request[:-1])
    await until(lambda: leased(world) > 0)
    assert world.app._connections is not None
    assert world.app._connections.whole_bytes == 0
    writer.write(request[-1:])
    assert (await read_head(reader)).startswith(b"HTTP/1.1 200 OK\r\n")
    writer.close()
    assert world.objects.put_answers == []
    assert await world.stored() == {b"key": data}


async def test_a_body_that_came_whole_is_coded_when_too_few_disks_take_copies(world: World) -> None:
    await world.put("key", b"small")
    (name,) = [name for name in world.below.ring.values if name.key == b"key"]
    replicas = world.below.layouts.current.replicas_of(name.partition)
    world.below.disks.suspected.update(replicas[:2])
    data = os.urandom(LARGEST)
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(signed(world, "PUT", "/bucket/key", body=data))
    assert (await read_head(reader)).startswith(b"HTTP/1.1 200 OK\r\n")
    writer.close()
    assert form_of(world) == "coded"
    assert await world.stored() == {b"key": data}
    assert world.app._connections is not None
    assert world.app._connections.whole_bytes == 0


@pytest.mark.parametrize("end", ["takes it", "goes away"])
@pytest.mark.parametrize("headers", [{}, TASK, {"Range": f"bytes=1-{LARGEST - 2}"}], ids=["soon", "task", "range"])
async def test_the_memory_of_a_copy_is_kept_until_its_client_has_taken_it_or_gone(
    world: World, end: str, headers: dict[str, str]
) -> None:
    await world.put("key", body := os.urandom(LARGEST))
    wanted = body[1:-1] if "Range" in headers else body
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", world.port))
    client.setblocking(False)
    await until(lambda: world.app.statistics().connections == 1)
    [connection] = world.app._connections.open  # type: ignore[union-attr]
    connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    loop: Any = asyncio.get_running_loop()
    await loop.sock_sendall(client, signed(world, "GET", "/bucket/key", headers=headers))
    await until(lambda: connection.paused)
    pool = world.objects.plane.get_buffers
    assert (pool.bytes_leased, pool.transfers, world.done) == (LARGEST, 1, [])
    answer = b""
    while end == "takes it" and len(answer) < len(wanted):
        answer += await loop.sock_recv(client, 65536)
    if end == "goes away":
        client.close()
    await until(lambda: bool(world.done))
    assert leased(world) == 0
    assert [done.complete for done in world.done] == [end == "takes it"]
    world.done.clear()  # they have the answers
    await until(lambda: end == "goes away" or connection.idle)
    [buffer] = [buffer for stock in pool._free.values() for buffer in stock]
    is_free = _is_free(buffer)
    assert is_free, "a connection that waits for its next request holds its last answer"
    client.close()
    assert end == "goes away" or answer.endswith(wanted[-1000:])
