"""Peers that know the protocol between nodes and use it against the node: what they can make it hold, lose or say, and
that an honest peer which the node makes wait is none of them.
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import uvloop
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from storaged.cluster import tls
from storaged.cluster.ports import Method
from storaged.cluster.rpc import ServerLimits
from storaged.cluster.rpc.framing import ErrorHead, Kind
from storaged.cluster.rpc.server_connection import UNREAD_BYTES_MAX
from storaged.config import parse
from storaged.errors import PeerRefused, PeerUnreachable, StoragedError
from storaged.units import KIB, MIB
from storaged.wire import decode, encode
from tests.patience import GUARD_S
from tests.worlds.authority import ROLES, Note, Service, World, pooled, serving, until
from tests.worlds.packet_peer import frame, greet, hello, packet_peer

ECHO = b"\x06t.echo" + encode(Note("x"))
HOLD = b"\x06t.hold" + encode(Note("x"))


@pytest.fixture(params=["uvloop", "asyncio"])
def event_loop_policy(request: pytest.FixtureRequest) -> Any:
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# --- a peer that does not read


@pytest.mark.parametrize("at_once", [True, False], ids=["answered at once", "answered by a task"])
async def test_a_peer_that_asks_and_does_not_read_is_not_read_from(world: World, at_once: bool) -> None:
    """A request of some 60 bytes has a reply of 100 KB: 4,000 of them would hold 400 MB."""
    large = Note("y" * 100_000)

    async def answer(_request: Note, _call: Any) -> Note:
        return large

    limits = ServerLimits(handlers_per_connection_max=16, drain_s=0.1)
    methods = {"t.echo": Method(Note, answer, ROLES, try_answer=(lambda *_: large) if at_once else None)}
    count, held = 4000, 0
    async with (
        serving(world.node("n1"), methods, limits=limits) as server,
        packet_peer(world.node("raw", ("gateway",)), server.port) as peer,
    ):
        await greet(peer, "raw")
        (connection,) = server._connections
        for first in range(1, count, 100):
            peer.writer.write(peer.seal(b"".join(frame(Kind.REQUEST, first + at, ECHO) for at in range(100))))
        await until(lambda: server.statistics().connections_waiting == 1 and not connection.running)
        held = sum(map(len, connection._small.values()))
        assert held <= UNREAD_BYTES_MAX + (16 + 1) * 101_000
        assert server.statistics().calls < count
        await peer.read_frames(1 + count)  # once it reads, it gets everything
        assert sorted(found[1] for found in peer.frames[1:]) == [*range(1, count + 1)]


async def test_what_waits_for_one_peer_is_not_written_over_by_what_another_gets(world: World) -> None:
    """All connections of a loop encrypt into the same memory, and a socket takes a part of it."""
    sizes = (24 * MIB, 24 * MIB + 1)  # more than sockets hold
    async with (
        serving(world.node("n1"), Service(), limits=ServerLimits(drain_s=0.1)) as server,
        packet_peer(world.node("g1", ("gateway",)), server.port) as first,
        packet_peer(world.node("g2", ("gateway",)), server.port) as second,
    ):
        for peer, name, size in zip((first, second), ("g1", "g2"), sizes, strict=True):
            await greet(peer, name)
            peer.writer.write(peer.seal(frame(Kind.REQUEST, 1, b"\x06t.make" + encode(Note("x", size)))))
        await until(lambda: all(connection._paused for connection in server._connections))
        for peer, size in zip((first, second), sizes, strict=True):
            await peer.read_frames(2)
            assert peer.frames[1][3] == bytes([size % 251]) * size


# --- a peer that is made to wait


async def test_a_peer_that_the_node_makes_wait_is_not_ended_for_its_silence(world: World) -> None:
    """Half a packet has arrived, and the node reads no more because all of its handlers are busy."""
    service = Service()
    limits = ServerLimits(handlers_per_connection_max=2, stall_timeout_s=50.0, drain_s=0.1)
    async with (
        serving(world.node("n1"), service, limits=limits) as server,
        packet_peer(world.node("raw", ("gateway",)), server.port) as peer,
    ):
        await greet(peer, "raw")
        (connection,) = server._connections
        whole = b"".join(bytes(peer.seal(frame(Kind.REQUEST, number, HOLD))) for number in range(1, 5))
        half = bytes(peer.seal(frame(Kind.REQUEST, 5, HOLD)))
        peer.writer.write(whole + half[:-1])
        await until(lambda: server.statistics().connections_waiting == 1)
        connection.last_read_at -= 100
        assert connection.stalled_s(asyncio.get_running_loop().time()) == 0.0
        service.gate.set()
        await peer.read_frames(5)
        assert connection.stalled_s(asyncio.get_running_loop().time()) < 50.0, "its silence begins when it can be heard"
        peer.writer.write(half[-1:])
        await peer.read_frames(6)


async def test_a_request_waits_for_the_budget_once_though_two_calls_end_together(world: World) -> None:
    """Each ended call wakes the request. Waiting twice, it would be granted twice, and one grant never came back."""
    service, other = Service(), Service()
    methods = {**service.methods(), "t.other": Method(Note, other.hold, ROLES)}
    limits = ServerLimits(handlers_per_connection_max=2, inflight_bytes_max=MIB, drain_s=0.1)
    async with (
        serving(world.node("n1"), methods, limits=limits) as server,
        packet_peer(world.node("raw", ("gateway",)), server.port) as peer,
        packet_peer(world.node("more", ("gateway",)), server.port) as second,
    ):
        await greet(peer, "raw")
        await greet(second, "more")
        second.writer.write(second.seal(frame(Kind.REQUEST, 1, b"\x07t.other" + encode(Note("x")), bytes(MIB))))
        await other.entered.wait()
        bodies = [b"", b"", bytes(100 * KIB)]
        held = [frame(Kind.REQUEST, number, HOLD, body) for number, body in enumerate(bodies, 1)]
        peer.writer.write(peer.seal(b"".join(held)))
        await until(lambda: server.statistics().connections_waiting == 1)
        service.gate.set()
        await until(lambda: len(server._shared.budget) > 0)
        await asyncio.sleep(0)
        other.gate.set()
        await peer.read_frames(4)
        await second.read_frames(2)
        await until(lambda: server.statistics().handlers_running == 0)
        assert server.statistics().inflight_bytes == 0


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "after a wait"])
async def test_a_peer_at_whose_request_the_node_fails_is_ended(world: World, waits: bool) -> None:
    """A refusal that can't be recorded. A connection that nobody reads from any more would stay for ever."""

    def refused(_peer: str, _error: StoragedError) -> None:
        raise RuntimeError("the refusal is not recorded")

    service, unexpected = Service(), []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: unexpected.append(context["exception"]))
    limits = ServerLimits(handlers_per_connection_max=2, drain_s=0.1)
    async with (
        serving(world.node("n1"), service, limits=limits, on_refusal=refused) as server,
        packet_peer(world.node("raw", ("storage",)), server.port) as peer,
    ):
        await greet(peer, "raw")
        held = [frame(Kind.REQUEST, number, HOLD) for number in (1, 2)] if waits else []
        refusal = frame(Kind.REQUEST, 3, b"\x0at.gateways" + encode(Note("x")), bytes(5000))
        peer.writer.write(peer.seal(b"".join([*held, refusal])))
        if waits:
            await until(lambda: server.statistics().connections_waiting == 1)
            service.gate.set()
        async with asyncio.timeout(GUARD_S):
            assert await peer.is_ended()
        await until(lambda: server.statistics().connections == 0)
        assert server.statistics().inflight_bytes == 0
        assert [type(error) for error in unexpected] == [RuntimeError]


# --- a peer with many connections


async def test_one_node_does_not_take_all_connections_and_reads_why(world: World) -> None:
    refusals: list[tuple[str, str]] = []

    def refused(peer: str, error: StoragedError) -> None:
        refusals.append((peer, error.remote_code if isinstance(error, PeerRefused) else error.code))

    limits, own = ServerLimits(connections_per_peer_max=3, drain_s=0.1), world.node("raw", ("gateway",))
    async with (
        serving(world.node("n1"), Service(), limits=limits, on_refusal=refused) as server,
        AsyncExitStack() as held,
    ):
        peers = [await held.enter_async_context(packet_peer(own, server.port)) for _ in range(4)]
        for peer in peers[:3]:
            await greet(peer, "raw")
        peers[3].send_in_tls(peers[3].secret)
        await peers[3].read_secret()
        peers[3].writer.write(peers[3].seal(hello("raw")))
        await peers[3].read_frames(1)
        kind, _number, head, _body = peers[3].frames[0]
        assert kind == Kind.REFUSED
        assert decode(head, ErrorHead).message == "raw has 3 connections to n1, and one node may have no more."
        async with asyncio.timeout(GUARD_S):
            assert await peers[3].is_ended()
        assert refusals == [("raw", "TOO_MANY_CONNECTIONS")]
        assert server.statistics().peers == ("raw", "raw", "raw")

        async with pooled(world.node("gw", ("gateway",)), {"n1": f"127.0.0.1:{server.port}"}) as pool:
            assert (await pool.call("n1", "t.echo", Note("another node"), Note))[0].text == "another node"
        dialled: list[tuple[str, str]] = []

        def by_server(peer: str, error: StoragedError) -> None:
            dialled.append((peer, error.remote_code if isinstance(error, PeerRefused) else error.code))

        async with pooled(own, {"n1": f"127.0.0.1:{server.port}"}, on_refusal=by_server) as pool:
            with pytest.raises(PeerUnreachable, match="raw has 3 connections to n1"):
                await pool.call("n1", "t.echo", Note(""), Note)
        assert dialled == [("n1", "TOO_MANY_CONNECTIONS")]
        peers[0].writer.transport.abort()
        await until(lambda: server.statistics().connections == 2)
        async with packet_peer(own, server.port) as again:
            await greet(again, "raw")


@pytest.mark.parametrize("most", [4, 2], ids=["there is room", "there is no room"])
async def test_processes_of_one_gateway_replace_their_connections_within_the_bound(world: World, most: int) -> None:
    """Where there is no room for a new connection, calls go on over the old one."""
    limits, own = ServerLimits(connections_per_peer_max=most, drain_s=0.1), world.node("gw", ("gateway",))
    async with serving(world.node("n1"), Service(), limits=limits) as server:
        addresses = {"n1": f"127.0.0.1:{server.port}"}
        async with pooled(own, addresses) as first, pooled(own, addresses) as second:
            for pool in (first, second):
                await pool.call("n1", "t.echo", Note("before"), Note)
            for pool in (first, second):
                pool.renew(own)
            if most == 4:
                await until(lambda: [pool.statistics().links[0].connects for pool in (first, second)] == [2, 2])
            else:
                await until(lambda: server.statistics().peers_refused == 2)
            for pool in (first, second):
                assert (await pool.call("n1", "t.echo", Note("after"), Note))[0].text == "after"
            assert server.statistics().peers_refused == (0 if most == 4 else 2)
            if most == 2:
                async with pooled(own, addresses) as third:
                    with pytest.raises(PeerUnreachable, match="n1 refuses this node: gw has 2 connections to n1"):
                        await third.call("n1", "t.echo", Note("one more"), Note)


def test_a_gateway_with_the_most_processes_has_four_connections_for_each() -> None:
    limits = ServerLimits()
    _config, mistakes = parse(f"[s3]\nworkers = {limits.connections_per_peer_max // 4 + 1}\n", Path("/"))
    assert any("outside 1 .. 64" in str(mistake) for mistake in mistakes)
    assert 4 * limits.connections_per_peer_max <= limits.connections_max


# --- strangers, and peers that keep TLS


async def test_a_stranger_that_sends_too_much_is_refused_and_nothing_else_is_logged(world: World) -> None:
    """It goes on sending after the bytes that end the handshake."""
    unexpected: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: unexpected.append(context))
    message = b"\x01" + (100_000).to_bytes(3, "big") + bytes(400_000)
    parts = [message[at : at + 16 * KIB] for at in range(0, len(message), 16 * KIB)]
    records = b"".join(b"\x16\x03\x01" + len(part).to_bytes(2, "big") + part for part in parts)
    async with serving(world.node("n1"), Service()) as server:
        for _ in range(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(records)
            try:
                while await reader.read(1000):
                    pass
            except ConnectionError:
                pass
            writer.close()
        await until(lambda: server.statistics().peers_refused == 5)
        assert unexpected == []


class KeyUpdates:
    """Records of TLS 1.3 that ask for new keys (RFC 8446, 4.6.3). Python's ssl can't send them, so this needs the log
    of its secrets, and how many records the client has sent.
    """

    def __init__(self, log: str, sent: int) -> None:
        (line,) = [line for line in log.splitlines() if line.startswith("CLIENT_TRAFFIC_SECRET_0")]
        self._secret = bytes.fromhex(line.split()[2])
        self._number = sent

    def _expand(self, label: bytes, count: int) -> bytes:
        name = b"tls13 " + label
        info = count.to_bytes(2, "big") + bytes([len(name)]) + name + b"\0"
        return HKDFExpand(hashes.SHA384(), count, info).derive(self._secret)

    def next(self) -> bytes:
        key, nonces = self._expand(b"key", 32), int.from_bytes(self._expand(b"iv", 12), "big")
        plain = bytes((24, 0, 0, 1, 1)) + b"\x16"
        header = b"\x17\x03\x03" + (len(plain) + 16).to_bytes(2, "big")
        record = header + AESGCM(key).encrypt((nonces ^ self._number).to_bytes(12, "big"), plain, header)
        self._secret, self._number = self._expand(b"traffic upd", 48), 0
        return record


@pytest.mark.parametrize(("asked", "kept"), [(100, True), (2000, False)])
async def test_a_peer_of_0_1_0_that_asks_tls_for_new_keys_for_ever_is_ended(
    world: World, tmp_path: Path, asked: int, kept: bool
) -> None:
    """TLS answers each time, and the answers wait for the next frame."""
    async with serving(world.node("n1"), Service()) as server:
        context = tls.client_context(world.node("raw", ("gateway",)))
        context.keylog_filename = str(tmp_path / "keys")
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        to_tls, from_tls = ssl.MemoryBIO(), ssl.MemoryBIO()
        own = context.wrap_bio(to_tls, from_tls, server_hostname="n1")
        while True:
            try:
                own.do_handshake()
                break
            except ssl.SSLWantReadError:
                writer.write(from_tls.read())
                to_tls.write(await reader.read(64 * KIB))
        assert own.cipher()[0] == "TLS_AES_256_GCM_SHA384"  # type: ignore[index]
        own.write(hello("raw"))
        writer.write(from_tls.read())
        await until(lambda: server.statistics().connections == 1)
        (connection,) = server._connections
        updates = KeyUpdates((tmp_path / "keys").read_text(), sent=1)
        sent = b"".join(updates.next() for _ in range(asked))
        before = connection.bytes_in
        writer.write(sent)
        if kept:
            await until(lambda: connection.bytes_in == before + len(sent))
            assert connection.is_open
        else:
            async with asyncio.timeout(GUARD_S):
                await connection.lost
            assert "new keys" in connection.reason
        writer.close()
