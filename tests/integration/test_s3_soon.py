"""GETs and HEADs that are answered by callbacks: the same answers as by a task, and what becomes of a connection
meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
from collections.abc import AsyncIterator

import pytest

from storaged.meta.names import object_name
from storaged.objects.api import FailedRead, NewMeta
from storaged.objects.read.streams import HeldStream, VerifiedStream
from storaged.s3 import responder
from storaged.s3.http.connection import Connection
from storaged.s3.http.limits import Limits
from storaged.s3.http.progress import HEAD, WORKING
from tests.integration.s3_front import (
    ACCESS,
    REGION,
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

META = NewMeta({"content-type": "text/plain", "cache-control": "no-store"}, {"color": "blue"}, {"a": "b"})
SMALL, LARGE = b"small" * 100, bytes(range(256)) * 400


@pytest.fixture(params=["at once", "with others"])
async def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """Answers leave as they do with few requests in flight, and with many."""
    if request.param == "with others":
        monkeypatch.setattr(responder, "ALONE_MAX", 0)
    async with s3_world() as made:
        await fill(made)
        yield made


async def fill(world: World) -> None:
    await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
    for key, data in {"small": SMALL, "other": SMALL[1:], "large": LARGE, "empty": b""}.items():
        await world.put(key, data, META, algorithm="CRC32")


async def ask_once(world: World, method: str, target: str, **headers: str) -> tuple[bytes, bytes]:
    head, _, body = (await ask(world, signed(world, method, target, headers=headers))).partition(b"\r\n\r\n")
    return head, body


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("key", ["small", "empty", "large", "none"])
@pytest.mark.parametrize("mode", ["", "ENABLED", "enabled", "DISABLED"])
async def test_the_answer_is_the_one_that_the_task_gives(world: World, method: str, key: str, mode: str) -> None:
    headers = {"x-amz-checksum-mode": mode} if mode else {}
    soon = await ask_once(world, method, f"/bucket/{key}", **headers)
    assert (b"x-amz-checksum-crc32: " in soon[0]) == (mode.upper() == "ENABLED" and key != "none")
    assert len(world.objects.read_answers) == 1
    by_task = await ask_once(world, method, f"/bucket/{key}", **headers, **{"x-unknown": "1"})
    assert len(world.objects.read_answers) == 1
    assert soon == by_task
    assert [(done.operation, done.status, done.code, done.bytes_out, done.complete) for done in world.done[:1]] == [
        (done.operation, done.status, done.code, done.bytes_out, done.complete) for done in world.done[1:]
    ]
    statistics = world.app.statistics()
    assert (statistics.requests_in_flight, statistics.requests_total) == (0, 2)


async def test_what_is_held_is_answered_without_the_task(world: World) -> None:
    head, body = await ask_once(world, "GET", "/bucket/small")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"x-amz-meta-color: blue\r\n" in head
    assert body == SMALL
    assert isinstance(world.objects.read_answers[0], HeldStream)
    assert world.objects.readings == []


async def test_a_coded_object_is_answered_without_the_task_and_its_memory_is_free_again() -> None:
    async with s3_world(far=True) as world:
        await fill(world)
        for _ in range(3):
            head, body = await ask_once(world, "GET", "/bucket/large")
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            assert body == LARGE
        assert [type(found) for found in world.objects.read_answers] == 3 * [VerifiedStream]
        assert world.objects.readings == []
        pool = world.objects.plane.get_buffers
        assert (pool.bytes_leased, pool.transfers) == (0, 0)
        assert [(done.status, done.bytes_out, done.complete) for done in world.done] == 3 * [(200, len(LARGE), True)]


@pytest.mark.parametrize("end", ["takes it", "goes away"])
async def test_the_memory_of_a_coded_object_is_kept_until_its_client_has_taken_it_or_gone(end: str) -> None:
    async with s3_world(far=True) as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        await world.put("long", body := b"longer" * 160_000, META)
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", world.port))
        client.setblocking(False)
        await until(lambda: world.app.statistics().connections == 1)
        [connection] = world.app._connections.open  # type: ignore[union-attr]
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(client, signed(world, "GET", "/bucket/long"))
        await until(lambda: connection.paused)
        pool = world.objects.plane.get_buffers
        assert (pool.bytes_leased > 0, pool.transfers, world.done) == (True, 1, [])
        answer = b""
        while end == "takes it" and len(answer) < len(body):
            answer += await loop.sock_recv(client, 65536)
        client.close()
        await until(lambda: bool(world.done) and not pool.bytes_leased)
        assert pool.transfers == 0
        assert [done.complete for done in world.done] == [end == "takes it"]
        assert end == "goes away" or answer.endswith(body[-1000:])


async def test_what_can_not_be_read_in_time_is_refused_once() -> None:
    async with s3_world(far=True) as world:
        await fill(world)
        for disk in world.below.disks.disks.values():
            disk.down = True
        head, _ = await ask_once(world, "GET", "/bucket/large")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert [type(found) for found in world.objects.read_answers] == [FailedRead]
        assert [disk.reads for disk in world.below.disks.disks.values()] == 6 * [1], "no disk is asked again"


async def test_what_an_sdk_asks_with_is_answered_without_the_task(world: World) -> None:
    client = world.client()

    def run() -> None:
        client.head_bucket(Bucket="bucket")  # the first head may be there before the connection's task waits for it
        got = client.get_object(Bucket="bucket", Key="small")
        assert (got["Body"].read(), got["ChecksumCRC32"], got["ChecksumType"]) == (
            SMALL,
            crc32(SMALL),
            "FULL_OBJECT",
        )
        for more in ({}, {"ChecksumMode": "ENABLED"}):
            assert ("ChecksumCRC32" in client.head_object(Bucket="bucket", Key="small", **more)) == bool(more)

    await asyncio.to_thread(run)
    assert len(world.objects.read_answers) == 3
    assert world.objects.readings == []


async def test_a_record_that_was_read_is_not_read_again_for_what_takes_longer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = await world.buckets.get("bucket")
    reading = await world.below.ring.read(object_name(bucket.id, bucket.shard_numbers, b"large"))
    monkeypatch.setattr(world.objects, "try_read", lambda bucket, key, want_plain, then, span: then(reading))
    _, body = await ask_once(world, "GET", "/bucket/large")
    assert body == LARGE
    assert world.objects.readings == [reading]


@pytest.mark.parametrize("which", ["small", "large"])
async def test_a_range_is_answered_as_its_header_asks(world: World, which: str) -> None:
    data = {"small": SMALL, "large": LARGE}[which]
    for text, first, end in (("1-2", 1, 3), ("5-", 5, len(data)), ("-7", len(data) - 7, len(data))):
        head, body = await ask_once(world, "GET", f"/bucket/{which}", Range=f"bytes={text}")
        assert head.split(b" ")[1] == b"206"
        assert f"Content-Range: bytes {first}-{end - 1}/{len(data)}\r\n".encode() in head
        assert body == data[first:end]
    for text in ("2-1", "1-2,4-5", "x"):  # no range that counts
        head, body = await ask_once(world, "GET", f"/bucket/{which}", Range=f"bytes={text}")
        assert (head.split(b" ")[1], body) == (b"200", data)
    assert len(world.objects.read_answers) == 6
    assert len(world.objects.readings) == (0 if which == "small" else 6), "these disks can be read by a task only"
    world.objects.readings.clear()
    head, body = await ask_once(world, "GET", f"/bucket/{which}", Range=f"bytes={len(data)}-")
    assert head.split(b" ")[1] == b"416"
    assert f"<ActualObjectSize>{len(data)}</ActualObjectSize>".encode() in body
    assert world.objects.readings == [], "the record is not read again"
    by_task = await ask_once(world, "GET", f"/bucket/{which}", Range=f"bytes={len(data)}-", **{"x-unknown": "1"})
    assert (len(world.objects.readings), by_task) == (1, (head, body))


@pytest.mark.parametrize(
    ("target", "headers", "status"),
    [
        ("/bucket/small", {"Range": "bytes=1-2", "If-Range": f'"{hashlib.md5(SMALL).hexdigest()}"'}, b"206"),
        ("/bucket/small", {"If-None-Match": f'"{hashlib.md5(SMALL).hexdigest()}"'}, b"304"),
        ("/bucket/small", {"x-amz-expected-bucket-owner": "somebody"}, b"403"),
        ("/bucket/small?versionId=nothing", {}, b"400"),
        ("/bucket/small?partNumber=1", {}, b"206"),
        ("/elsewhere/small", {}, b"404"),
        ("/bucket", {}, b"200"),
    ],
)
async def test_whatever_else_is_asked_is_the_tasks(
    world: World, target: str, headers: dict[str, str], status: bytes
) -> None:
    head, _ = await ask_once(world, "GET", target, **headers)
    assert head.split(b" ")[1] == status
    assert world.objects.read_answers == []


@pytest.mark.parametrize(
    "change", [(b"Signature=", b"Signature=0"), (b"Credential=AKMAIN", b"Credential=NOBODY"), (b"Host: ", b"Host: x")]
)
async def test_who_is_not_who_they_say_is_told_nothing(world: World, change: tuple[bytes, bytes]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(signed(world, "GET", "/bucket/small").replace(*change))
    assert (await read_head(reader)).startswith(b"HTTP/1.1 403 ")
    assert world.objects.read_answers == []
    writer.close()


async def test_requests_that_come_together_are_answered_one_after_the_other(world: World) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    for _ in range(3):
        writer.write(b"".join(signed(world, "GET", f"/bucket/{key}") for key in ("small", "other", "large", "empty")))
        for body in (SMALL, SMALL[1:], LARGE, b""):
            assert (await read_head(reader)).startswith(b"HTTP/1.1 200 OK\r\n")
            assert await reader.readexactly(len(body)) == body
    writer.close()


async def test_a_request_that_comes_while_one_is_answered_waits_for_its_turn(world: World) -> None:
    held = Held(world)
    reader, writer = await held.ask("GET", "small")
    second = signed(world, "GET", "/bucket/other")
    for piece in (second[:50], second[50:]):
        writer.write(piece)
        await asyncio.sleep(0.02)
    assert len(held.waiting) == 1
    held.go()
    for body in (SMALL, SMALL[1:]):
        assert (await read_head(reader)).startswith(b"HTTP/1.1 200 OK\r\n")
        assert await reader.readexactly(len(body)) == body
    writer.close()


async def test_a_client_that_has_gone_is_nobodys_trouble(world: World) -> None:
    held = Held(world)
    for answer_last in (False, True):
        _, writer = await held.ask("GET", "small" if answer_last else "large")
        break_off(writer)
        await until(lambda: world.app.statistics().connections == 0)
        held.go()
        await until(lambda: world.app.statistics().requests_in_flight == 0)
    assert [(done.status, done.bytes_out, done.complete) for done in world.done] == [(200, 0, False)] * 2
    assert world.app.statistics().requests_total == 2


@pytest.mark.parametrize("header", [{}, {"x-unknown": "1"}], ids=["soon", "task"])
async def test_an_answer_that_must_not_be_sent_ends_the_connection_and_is_counted(
    world: World, header: dict[str, str]
) -> None:
    await world.put("wrong", SMALL, NewMeta(user={"color": "blue\r\nSet-Cookie: a"}))
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(signed(world, "GET", "/bucket/wrong", headers=header))
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    await until(lambda: world.app.statistics().connections == 0)
    assert len(world.objects.read_answers) == (not header)
    assert [(done.status, done.bytes_out, done.complete) for done in world.done] == [(200, 0, False)]
    assert world.app.statistics().requests_in_flight == 0
    writer.close()


async def test_a_server_that_ends_waits_for_what_is_being_answered(world: World) -> None:
    held = Held(world)
    reader, writer = await held.ask("GET", "small")
    closing = asyncio.create_task(world.app.close(GUARD_S))
    await asyncio.sleep(0.05)
    assert not closing.done()
    held.go()
    head = await read_head(reader)
    assert b"Connection: close\r\n" in head
    assert await reader.read() == SMALL
    await closing
    writer.close()


async def test_a_server_that_ends_waits_for_what_was_left_to_the_task(world: World) -> None:
    held = Held(world)
    reader, writer = await held.ask("GET", "large")
    closing = asyncio.create_task(world.app.close(GUARD_S))
    await asyncio.sleep(0.05)
    held.go()
    assert b"Connection: close\r\n" in await read_head(reader)
    assert await reader.read() == LARGE
    await closing
    statistics = world.app.statistics()
    assert (statistics.requests_in_flight, statistics.requests_total) == (0, 1)
    writer.close()


async def test_a_server_that_ends_waits_for_a_client_that_has_not_taken_its_answer(world: World) -> None:
    body = b"m" * 16_000
    await world.put("middling", body, META)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", world.port))
    client.setblocking(False)
    await until(lambda: world.app.statistics().connections == 1)
    [connection] = world.app._connections.open  # type: ignore[union-attr]
    connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(client, signed(world, "GET", "/bucket/middling"))
    await until(lambda: connection.paused)
    assert world.done == []
    closing = asyncio.create_task(world.app.close(GUARD_S))
    await asyncio.sleep(0.05)
    assert not closing.done()
    answer = b""
    while piece := await loop.sock_recv(client, 4096):
        answer += piece
    assert answer.endswith(b"\r\n\r\n" + body)
    await closing
    assert [(done.status, done.complete) for done in world.done] == [(200, True)]
    client.close()


async def test_more_than_may_be_in_flight_are_told_to_slow_down() -> None:
    async with s3_world(Limits(requests_max=1)) as world:
        await fill(world)
        held = Held(world)
        first, writer = await held.ask("GET", "small")
        head, _ = await ask_once(world, "GET", "/bucket/other")
        assert head.startswith(b"HTTP/1.1 503 ")
        held.go()
        assert (await read_head(first)).startswith(b"HTTP/1.1 200 OK\r\n")
        writer.close()


async def test_a_client_that_does_not_take_its_answer_gets_no_other_before_it_has(world: World) -> None:
    held = Held(world)
    reader, writer = await held.ask("GET", "small")
    [connection] = world.app._connections.open  # type: ignore[union-attr]
    assert isinstance(connection, Connection)
    assert connection.progress.phase == WORKING
    assert not connection.idle
    connection.pause_writing()  # as a transport does whose socket is full
    held.go()
    await asyncio.sleep(0.02)
    writer.write(signed(world, "GET", "/bucket/other"))
    await asyncio.sleep(0.05)
    assert held.waiting == []
    connection.resume_writing()
    await until(lambda: len(held.waiting) == 1 or len(world.done) == 2)
    if held.waiting:
        held.go()
    for body in (SMALL, SMALL[1:]):
        assert (await read_head(reader)).startswith(b"HTTP/1.1 200 OK\r\n")
        assert await reader.readexactly(len(body)) == body
    await until(lambda: connection.progress.phase == HEAD)
    writer.close()


async def test_answers_of_one_turn_of_the_loop_leave_one_behind_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[int] = []
    send_batch = responder.Responder._send_batch

    def counted(front: responder.Responder) -> None:
        together.append(len(front._batch))
        send_batch(front)

    monkeypatch.setattr(responder.Responder, "_send_batch", counted)
    async with s3_world() as world:
        await fill(world)
        held = Held(world)
        clients = [await asyncio.open_connection("127.0.0.1", world.port) for _ in range(responder.BATCH_MAX + 4)]
        for _, writer in clients:
            writer.write(signed(world, "GET", "/bucket/small"))
        await until(lambda: len(held.waiting) == len(clients))
        while held.waiting:
            held.go()
        assert together == [responder.BATCH_MAX]
        assert world.app.statistics().requests_in_flight == 4, "until they have left"
        for reader, writer in clients:
            assert (await read_head(reader)).startswith(b"HTTP/1.1 200 OK\r\n")
            assert await reader.readexactly(len(SMALL)) == SMALL
            writer.close()
        assert world.app.statistics().requests_in_flight == 0


async def test_a_client_that_goes_before_its_answer_leaves_keeps_no_other_from_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(responder, "ALONE_MAX", 0)
    async with s3_world() as world:
        await fill(world)
        held = Held(world)
        clients = [await asyncio.open_connection("127.0.0.1", world.port) for _ in range(3)]
        for _, writer in clients:
            writer.write(signed(world, "GET", "/bucket/small"))
        await until(lambda: len(held.waiting) == 3)
        while held.waiting:
            held.go()
        gone = next(iter(world.app._connections.open))  # type: ignore[union-attr]
        gone.transport.abort()
        bodies = []
        for reader, writer in clients:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                await read_head(reader)
                bodies.append(await reader.readexactly(len(SMALL)))
            writer.close()
        assert bodies == [SMALL, SMALL]
        assert sorted(done.complete for done in world.done) == [False, True, True]
        assert world.app.statistics().requests_in_flight == 0
