"""Slow clients and fast ones on the S3 port: a client that makes progress is waited for, and what is not taken or read
is bounded.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import tracemalloc
from pathlib import Path

import pytest

from storaged.s3.http.body import RequestBody
from storaged.s3.http.connection import Connection
from storaged.s3.http.connections import Connections
from storaged.s3.http.grammar import broken_so_far
from storaged.s3.http.limits import Limits
from tests.integration.s3_front import ACCESS, REGION, World, read_head, s3_world, signed
from tests.integration.test_s3_hostile import _Blocks, _Socket
from tests.integration.test_s3_http import certificate
from tests.patience import GUARD_S

IDLE_S = 3.0
"""How long a client may be silent here. It is never for longer than a quarter of it, unless a machine stands still."""


async def make_bucket(world: World, **objects: bytes) -> None:
    """``bucket``, and what is in it."""
    await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
    for key, data in objects.items():
        await world.put(key, data)


def contexts(directory: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Server's, client's."""
    path = certificate(directory)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(path)
    return server, ssl.create_default_context(cafile=str(path))


async def test_a_slow_client_may_take_longer_for_a_block_than_it_may_be_silent() -> None:
    """Bytes that go straight into a block are progress too, long before the block is full."""
    async with s3_world(Limits(body_idle_s=IDLE_S)) as world:
        await make_bucket(world)
        blocks = _Blocks()
        world.objects.put = blocks.put  # type: ignore[method-assign, assignment]
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
        request = signed(world, "PUT", "/bucket/k", body=bytes(400_000))
        writer.write(request[:-400_000])
        for _ in range(8):
            writer.write(bytes(50_000))
            await asyncio.sleep(IDLE_S / 4)
        assert b"200 OK" in await read_head(reader)
        writer.close()


@pytest.mark.parametrize("secure", [False, True])
async def test_a_slow_client_may_take_longer_for_a_piece_than_it_may_take_nothing(
    secure: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = contexts(tmp_path) if secure else (None, None)
    async with s3_world(Limits(send_idle_s=IDLE_S / 2), tls=server) as world:
        await make_bucket(world, big=bytes(48 << 20))
        world.objects.piece_bytes = 24 << 20
        reader, writer = await asyncio.open_connection("localhost", world.port, ssl=client)
        writer.write(signed(world, "GET", "/bucket/big"))
        await read_head(reader)
        left = 48 << 20
        while left:
            got = await reader.read(1 << 20)
            assert got, f"disconnected with {left} bytes left"
            left -= len(got)
            await asyncio.sleep(len(got) / (8 << 20))
        writer.close()


async def test_a_client_that_takes_next_to_nothing_is_disconnected() -> None:
    async with s3_world(Limits(send_idle_s=0.3, rate_min_bytes_s=50 << 20)) as world:
        await make_bucket(world, big=bytes(64 << 20))
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port, limit=1024)
        writer.write(signed(world, "GET", "/bucket/big"))
        while await reader.read(20_000):  # noqa: ASYNC110 - the pauses are the client's
            await asyncio.sleep(0.005)
        assert [done.complete for done in world.done] == [False]
        writer.close()


async def test_answers_that_nobody_takes_hold_up_the_requests_behind_them() -> None:
    """Those of empty objects, too, which have nothing but a head."""
    async with s3_world() as world:
        await make_bucket(world, none=b"")
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", world.port))
        client.setblocking(False)
        requests = signed(world, "GET", "/bucket/none") * 20_000
        sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(client, requests))
        await asyncio.sleep(0.5)
        while True:
            answered = len(world.done)
            await asyncio.sleep(0.3)
            if answered == len(world.done):
                break
        assert answered < 20_000
        (connection,) = world.app._connections.open
        assert connection.transport.get_write_buffer_size() < 4096
        sending.cancel()
        client.close()


async def test_a_client_that_ends_its_side_before_its_request_is_seen_gets_its_answer() -> None:
    """As when a read was full, and the next one, at once, finds the end."""

    async def converse(connection: Connection) -> None:
        await connection.next_head()

    connections = Connections(converse, Limits())
    connection = connections()
    connection.connection_made(_Transport())
    await asyncio.sleep(0)
    request = b"HEAD / HTTP/1.0\r\n\r\n"
    connection.get_buffer(-1)[: len(request)] = request
    connection.buffer_updated(len(request))
    assert connection.eof_received()
    await connections.close()


class _Transport(asyncio.Transport):
    reading = True

    def pause_reading(self) -> None:
        self.reading = False

    def abort(self) -> None: ...

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...


async def test_requests_that_come_at_once_are_not_all_taken_before_the_first_is_seen() -> None:
    """A readiness of the socket may bring dozens of reads before any task runs."""

    async def converse(connection: Connection) -> None:
        await connection.next_head()

    connections = Connections(converse, Limits())
    connection, transport = connections(), _Transport()
    connection.connection_made(transport)
    await asyncio.sleep(0)
    reads = 0
    while transport.reading:
        reads += 1
        assert reads <= 2
        view = connection.get_buffer(-1)
        view[:] = (b"HEAD / HTTP/1.1\r\n\r\n" * 5000)[: len(view)]
        connection.buffer_updated(len(view))
    await connections.close()


async def test_chunks_that_come_at_once_are_taken_read_by_read_and_kept_in_little_more_than_their_bytes() -> None:
    source = _Socket([])
    body = RequestBody(source, None, None, Limits())
    data = b"1\r\nx\r\n" * 10_000
    body.admit()
    body.waiter = asyncio.get_running_loop().create_future()
    body.feed(b"1")
    assert not source.held_back  # nothing for who waits
    assert not body.waiter.done()
    tracemalloc.start()
    try:
        body.feed(data[1:])
        assert tracemalloc.get_traced_memory()[0] < len(data) + 5_000
    finally:
        tracemalloc.stop()
    assert source.held_back
    assert body.waiter.done()
    body.feed(b"0\r\n\r\n")
    assert bytes(await body.whole()) == b"x" * 10_000


async def test_a_body_in_chunks_is_the_same_however_it_is_cut() -> None:
    chance = random.Random(5)
    for _ in range(200):
        plain = chance.randbytes(chance.randrange(1, 3000))
        sent, at = b"", 0
        while at < len(plain):
            size = chance.choice((1, 2, 500))
            piece = plain[at : at + size]
            sent += b"%x\r\n%b\r\n" % (len(piece), piece)
            at += size
        sent += b"0\r\n\r\n"
        body, at = RequestBody(_Socket([]), None, None, Limits()), 0
        body.admit()
        while at < len(sent):
            size = chance.choice((1, 3, 700, 2000))
            body.feed(sent[at : at + size])
            at += size
        assert await body.whole() == plain


async def test_who_is_waited_for_after_an_answer_takes_nobodys_place() -> None:
    async with s3_world(Limits(requests_max=2)) as world:
        await make_bucket(world, k=b"hello")
        writers = []
        for request in (b"nonsense\r\n\r\n", b"PUT /bucket/k HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n", b"PUT /bucket/k HTTP/1.1\r\nHost: h\r\nContent-Length: 9999999\r\n\r\n"):  # fmt: skip  # noqa: E501
            reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
            writer.write(request)
            assert b" 40" in await read_head(reader)
            writers.append(writer)
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
        writer.write(signed(world, "GET", "/bucket/k"))
        assert b" 200 OK" in await read_head(reader)
        for each in (*writers, writer):
            each.close()


def test_the_beginning_of_a_head_is_judged_the_same_however_it_comes() -> None:
    chance = random.Random(9)
    for _ in range(3000):
        data, seen, found = (
            b"".join(chance.choices((b"a", b"\r\n", b"\r", b"\n", b"\0"), (30, 10, 1, 1, 0.3), k=12)),
            0,
            False,
        )
        cuts = sorted(chance.sample(range(1, len(data) + 1), chance.randrange(1, 4)))
        for cut in (*cuts, len(data)):
            found = found or broken_so_far(data[:cut], Limits(), seen) is not None
            seen = cut
        assert found == any(broken_so_far(data[:cut], Limits()) for cut in (*cuts, len(data)))
    assert broken_so_far(b"\0" * 45_000, Limits()) is not None
    assert broken_so_far(b"\0" * 45_000 + b"y", Limits(), 45_000) is None, (
        "what was seen is not looked at again, whatever it is"
    )


@pytest.mark.parametrize("secure", [False, True])
async def test_an_answer_that_is_on_its_way_when_the_server_ends_arrives_whole(
    secure: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop's TLS takes a piece at once, and passes it on when the socket has room."""
    server, client = contexts(tmp_path) if secure else (None, None)
    async with s3_world(tls=server) as world:
        await make_bucket(world, big=bytes(16 << 20))
        world.objects.piece_bytes = 16 << 20
        reader, writer = await asyncio.open_connection("localhost", world.port, ssl=client)
        writer.write(signed(world, "GET", "/bucket/big"))
        await read_head(reader)
        closing = asyncio.create_task(world.app.close(GUARD_S))
        await asyncio.sleep(0.1)
        assert await asyncio.wait_for(reader.readexactly(16 << 20), GUARD_S) == bytes(16 << 20)
        writer.close()
        await asyncio.wait_for(closing, GUARD_S)
