"""Clients without a key can't take the places of those with one: requests in flight, connections, and memory, from one
address and from many.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from storaged.config import parse
from storaged.s3 import app
from storaged.s3.http.limits import Limits
from storaged.s3.http.unauthenticated import UnauthenticatedClients, address_key
from tests.integration.s3_front import ACCESS, REGION, World, read_head, s3_world, signed, until
from tests.integration.test_s3_patience import contexts
from tests.patience import GUARD_S

FORM = (
    b"POST /bucket HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=a\r\nContent-Length:"
    b" 60000\r\n\r\n--a\r\n"
)


@asynccontextmanager
async def bucket(limits: Limits) -> AsyncIterator[World]:
    async with s3_world(limits) as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        yield world


async def sent(world: World, data: bytes) -> tuple[StreamReader, StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(data)
    await writer.drain()
    return reader, writer


async def answered(world: World) -> None:
    """A signed client, on a connection of its own."""
    reader, writer = await sent(world, signed(world, "PUT", "/bucket/k", body=b"x"))
    assert (await read_head(reader)).startswith(b"HTTP/1.1 200 ")
    writer.close()


async def test_forms_whose_policy_was_not_verified_take_no_place_of_signed_requests() -> None:
    async with bucket(Limits(requests_max=4)) as world:
        writers = [(await sent(world, FORM))[1] for _ in range(12)]
        await until(lambda: world.app.statistics().requests_in_flight == 12)
        await answered(world)
        assert world.app.statistics().refused_total == 0
        for writer in writers:
            writer.close()


async def test_answers_that_strangers_do_not_take_keep_no_place() -> None:
    async with bucket(Limits(requests_max=2)) as world:
        writers = []
        for _ in range(4):
            reader, writer = await asyncio.open_connection("127.0.0.1", world.port, limit=1)
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(b"GET /bucket/k HTTP/1.1\r\nHost: x\r\n\r\n" * 20_000)
            writers.append(writer)
        await until(lambda: world.app.statistics().requests_total > 4)
        await answered(world)
        assert world.app.statistics().refused_total == 0
        for writer in writers:
            writer.transport.abort()


async def test_signed_requests_beyond_the_limit_are_asked_to_slow_down_and_their_places_come_back() -> None:
    async with bucket(Limits(requests_max=2)) as world:
        held = asyncio.Event()
        head = world.objects.head

        async def slow(*args: object, **more: object) -> object:
            await held.wait()
            return await head(*args, **more)  # type: ignore[arg-type]

        world.objects.head = slow  # type: ignore[method-assign, assignment]
        waiting = [
            await sent(
                world,
                signed(world, "GET", f"/bucket/k{number}?attributes", headers={"x-amz-object-attributes": "ETag"}),
            )
            for number in range(2)
        ]
        await until(lambda: world.app.statistics().requests_in_flight == 2)
        for _ in range(3):
            reader, writer = await sent(world, signed(world, "PUT", "/bucket/k", body=b"x"))
            assert (await read_head(reader)).startswith(b"HTTP/1.1 503 ")
            writer.close()
        assert world.app.statistics().refused_total == 3
        held.set()
        for reader, writer in waiting:
            assert (await read_head(reader)).startswith(b"HTTP/1.1 404 ")
            writer.close()
        for _ in range(5):
            await answered(world)


async def test_the_oldest_stranger_of_an_address_makes_room_and_who_has_signed_stays() -> None:
    async with bucket(Limits(unauthenticated_connections_max=3)) as world:
        known = await sent(world, signed(world, "HEAD", "/bucket/none"))
        await read_head(known[0])
        strangers = [await sent(world, b"") for _ in range(3)]
        await until(lambda: world.app.statistics().unauthenticated == 3)
        await answered(world)
        assert await asyncio.wait_for(strangers[0][0].read(), GUARD_S) == b""
        assert world.app.statistics().evicted_total == 1
        known[1].write(signed(world, "HEAD", "/bucket/none"))
        assert (await read_head(known[0])).startswith(b"HTTP/1.1 404 ")
        for _, writer in (known, *strangers):
            writer.close()


async def test_when_all_connections_are_taken_the_oldest_stranger_makes_room() -> None:
    async with bucket(Limits(connections_max=4)) as world:
        strangers = [await sent(world, b"GET / HT") for _ in range(4)]
        await until(lambda: world.app.statistics().unauthenticated == 4)
        await answered(world)
        assert await asyncio.wait_for(strangers[0][0].read(), GUARD_S) == b""
        for _, writer in strangers:
            writer.close()


async def test_a_connection_beyond_the_limit_is_closed_when_all_have_signed() -> None:
    async with bucket(Limits(connections_max=2)) as world:
        known = [await sent(world, signed(world, "HEAD", "/bucket/none")) for _ in range(2)]
        for reader, _ in known:
            await read_head(reader)
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
        assert await asyncio.wait_for(reader.read(), GUARD_S) == b""
        for _, each in (*known, (reader, writer)):
            each.close()


async def test_bytes_of_strangers_are_bounded_for_their_address() -> None:
    async with bucket(Limits(unauthenticated_bytes_max=100_000)) as world:
        holders = [await sent(world, FORM + b"x" * 40_000) for _ in range(3)]
        assert await asyncio.wait_for(holders[0][0].read(), GUARD_S) == b""
        assert world.app.statistics().unauthenticated == 2
        await answered(world)
        for _, writer in holders:
            writer.close()


async def test_requests_of_strangers_are_bounded_for_their_address() -> None:
    async with bucket(Limits(unauthenticated_requests_max=2)) as world:
        forms = [await sent(world, FORM) for _ in range(3)]
        assert await asyncio.wait_for(forms[0][0].read(), GUARD_S) == b""
        await answered(world)
        assert world.app.statistics().unauthenticated == 2
        for _, writer in forms:
            writer.close()


async def test_a_form_that_does_not_come_keeps_no_server_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "UNAUTHENTICATED_DRAIN_S", 0.01)
    async with bucket(Limits(body_idle_s=3600)) as world:
        reader, writer = await sent(world, FORM)
        await until(lambda: world.app.statistics().requests_in_flight == 1)
        await asyncio.wait_for(world.app.close(3600), GUARD_S)
        await ended(reader)
        assert world.app.statistics().requests_in_flight == 0
        writer.close()


# --- pure


@pytest.mark.parametrize(
    ("remote", "key"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("", ""),
    ],
)
def test_an_address_is_one_of_ipv4_or_a_64_of_ipv6(remote: str, key: str) -> None:
    assert address_key(remote) == key


class _Connection:
    gone = False

    def evict(self) -> None:
        self.gone = True


def test_addresses_do_not_count_for_each_other_and_proxies_not_at_all() -> None:
    strangers = UnauthenticatedClients(Limits(unauthenticated_connections_max=2), ["10.0.0.0/8", "2001:db8::1"])
    found: dict[str, list[_Connection]] = {}
    for remote in ("192.0.2.1", "192.0.2.2", "2001:db8:1::1", "10.1.2.3", "::ffff:10.1.2.3", "2001:db8::1") * 3:
        connection = _Connection()
        found.setdefault(remote, []).append(connection)
        strangers.add(connection, remote)
    gone = {remote: [connection.gone for connection in each] for remote, each in found.items()}
    limited = [True, False, False]
    assert gone == {
        "192.0.2.1": limited,
        "192.0.2.2": limited,
        "2001:db8:1::1": limited,
        "10.1.2.3": [False] * 3,
        "::ffff:10.1.2.3": [False] * 3,
        "2001:db8::1": [False] * 3,
    }


def test_nothing_is_remembered_of_who_has_left() -> None:
    strangers = UnauthenticatedClients(Limits(unauthenticated_bytes_max=100))
    came = [strangers.add(_Connection(), f"192.0.2.{number % 5}") for number in range(50)]
    for number, stranger in enumerate(came):
        stranger.serve(True)
        stranger.keep(number % 60)
    for stranger in came:
        stranger.remove()
        stranger.remove()
    assert (strangers.counts().connections, strangers.counts().addresses) == (0, 0)
    assert not any(stranger.address.bytes for stranger in came)


def test_limits_of_strangers_are_configured_and_checked() -> None:
    base = (
        '[node]\nname = "a"\ndirectory = "d"\nroles = ["gateway"]\n[cluster]\nidentity = "i"\n[keys]\nkeyring ='
        ' "k"\npassphrase = "p"\n[s3]\n'
    )
    config, mistakes = parse(
        base + 'unauthenticated_bytes_max = "8 MiB"\nproxies = ["10.0.0.5", "2001:db8::/32"]\n', Path("/")
    )
    assert config is not None
    assert not mistakes
    assert config.s3.unauthenticated_bytes_max == 8 << 20
    _, mistakes = parse(
        base + 'unauthenticated_connections_max = 0\nproxies = ["10.0.0.5/8", "proxy.example"]\n', Path("/")
    )
    assert len(mistakes) == 2


# --- TLS


@pytest.mark.parametrize("limits", [Limits(unauthenticated_connections_max=3), Limits(connections_max=3)])
@pytest.mark.parametrize("handed", [False, True])
async def test_handshakes_that_are_not_made_make_room_for_others(limits: Limits, handed: bool, tmp_path: Path) -> None:
    server, client = contexts(tmp_path)
    async with s3_world(limits, tls=server) as world:
        await world.buckets.create((await world.users.lookup(ACCESS))[0], "bucket", region=REGION)
        silent = []
        for _ in range(4):
            if handed:
                mine, theirs = _pair()
                silent.append(await asyncio.open_connection(sock=mine))
                handing = asyncio.create_task(world.app.adopt(theirs))
                await asyncio.sleep(0)
                assert not handing.done()
            else:
                silent.append(await sent(world, b"\x16\x03\x01"))
        await ended(silent[0][0])
        reader, writer = await asyncio.open_connection("localhost", world.port, ssl=client)
        writer.write(signed(world, "PUT", "/bucket/k", body=b"x"))
        assert (await read_head(reader)).startswith(b"HTTP/1.1 200 ")
        assert world.app.statistics().evicted_total >= 2
        for _, each in (*silent, (reader, writer)):
            each.transport.abort()
        await until(lambda: world.app.statistics().unauthenticated == 0)


async def ended(reader: StreamReader) -> None:
    """The server has closed the connection, with or without a reset."""
    with contextlib.suppress(ConnectionResetError):
        assert await asyncio.wait_for(reader.read(), GUARD_S) == b""


def _pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        mine = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    for each in (mine, theirs):
        each.setblocking(False)
    return mine, theirs


async def test_when_the_port_closes_handshakes_are_given_up(tmp_path: Path) -> None:
    server, _ = contexts(tmp_path)
    async with s3_world(Limits(handshake_s=60), tls=server) as world:
        reader, writer = await sent(world, b"\x16\x03\x01")
        await until(lambda: world.app.statistics().unauthenticated == 1)
        await world.app.close(5)
        await ended(reader)
        assert world.app.statistics().connections == 0
        writer.close()
