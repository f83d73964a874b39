"""How connections between nodes begin and what carries their frames: packets between nodes of this version, TLS with
those of version 0.1.0, and an end for whoever keeps to neither.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from storaged.cluster import identity, tls
from storaged.cluster.ports import Method, PeerChecks
from storaged.cluster.rpc import PoolLimits, RpcServer, ServerLimits, handshake, packets
from storaged.cluster.rpc.connection import Connection
from storaged.cluster.rpc.framing import PROTOCOL_VERSION, FrameReader, Hello, Kind, Verdict
from storaged.cluster.rpc.handshake import PACKETS, TlsReader
from storaged.cluster.rpc.packets import PacketReader
from storaged.errors import PeerUnreachable, StoragedError
from storaged.units import KIB, MIB
from storaged.wire import encode
from tests.patience import GUARD_S
from tests.worlds.authority import EU, ROLES, Note, Service, World, pooled, serving, until
from tests.worlds.packet_peer import PacketPeer, frame, greet, hello, packet_peer
from tests.worlds.receiving import feed

ECHO = b"\x06t.echo" + encode(Note("x"))
SECRET = b"an object that nobody on the way may read"


@pytest.fixture(params=["uvloop", "asyncio"])
def event_loop_policy(request: pytest.FixtureRequest) -> Any:
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def carriers(*connections: Connection | None) -> set[type]:
    return {type(connection._incoming) for connection in connections if connection is not None}


class Wire:
    """Passes bytes on between a node and those who dial it, and keeps them."""

    def __init__(self, port: int, step: int, change: Callable[[bytes], bytes]) -> None:
        self.kept = bytearray()
        self._port = port
        self._step = step
        self.change = change

    async def join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        await asyncio.gather(self._pass_on(reader, back), self._pass_on(there, writer), return_exceptions=True)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := self.change(await reader.read(64 * KIB)):
                self.kept += data
                for at in range(0, len(data), self._step):
                    writer.write(data[at : at + self._step])
                    await writer.drain()
                    if self._step < 100:
                        await asyncio.sleep(0)
        finally:
            writer.close()


@asynccontextmanager
async def wire_to(
    server: RpcServer, step: int = 1 << 30, change: Callable[[bytes], bytes] = bytes
) -> AsyncIterator[tuple[Wire, str]]:
    wire = Wire(server.port, step, change)
    listener = await asyncio.start_server(wire.join, "127.0.0.1", 0)
    try:
        yield wire, f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()


# --- nodes of this version


@pytest.mark.parametrize("step", [17, 1000, 1 << 30])
async def test_nodes_of_this_version_send_frames_in_packets_which_nobody_on_the_way_can_read(
    world: World, step: int
) -> None:
    sent = SECRET + os.urandom(1000 if step < 100 else 900 * KIB) + SECRET
    async with serving(world.node("n1"), Service()) as server, wire_to(server, step) as (wire, address):
        async with pooled(world.node("gw", ("gateway",)), {"n1": address}) as pool:
            answer, body = await pool.call("n1", "t.mirror", Note(SECRET.decode()), Note, body=[sent])
            assert (answer.text, bytes(body)) == (SECRET.decode(), sent)
            (at_server,) = server._connections
            assert carriers(at_server, pool._links["n1"].connection) == {PacketReader}
        assert len(wire.kept) > 2 * len(sent)
        assert SECRET not in wire.kept
        assert sent[500:560] not in wire.kept


async def test_many_bodies_both_ways_at_once_arrive_as_they_were_sent(world: World) -> None:
    """All connections of a loop encrypt into the same memory, and some of it waits for its socket."""
    async with serving(world.node("n1"), Service(), limits=ServerLimits(drain_s=0.1)) as server:
        addresses = {"n1": f"127.0.0.1:{server.port}"}
        async with (
            pooled(world.node("g1", ("gateway",)), addresses) as first,
            pooled(world.node("g2", ("gateway",)), addresses) as second,
        ):

            async def one(pool: Any, number: int) -> None:
                sent = [os.urandom(64 * KIB) for _ in range(20)] + [bytes([number]) * (number * 3000 + 1)]
                _answer, body = await pool.call("n1", "t.mirror", Note(""), Note, body=sent, timeout_s=60)
                assert bytes(body) == b"".join(sent)

            await asyncio.gather(*(one(pool, number) for number in range(12) for pool in (first, second)))


async def test_keys_change_while_calls_go_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packets, "PACKETS_A_KEY", 5)
    async with (
        serving(world.node("n1"), Service()) as server,
        pooled(world.node("gw", ("gateway",)), {"n1": f"127.0.0.1:{server.port}"}) as pool,
    ):
        for number in range(40):
            sent = os.urandom(number * 5000)
            assert bytes((await pool.call("n1", "t.mirror", Note(""), Note, body=[sent]))[1]) == sent
        assert pool.statistics().links[0].connects == 1


async def test_a_byte_that_is_altered_on_the_way_ends_the_connection_and_its_calls(world: World) -> None:
    service, altered = Service(), []

    def change(data: bytes) -> bytes:
        if not service.entered.is_set() or altered:
            return data
        altered.append(True)
        return data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]

    async with (
        serving(world.node("n1"), service) as server,
        wire_to(server, change=change) as (_wire, address),
        pooled(world.node("gw", ("gateway",)), {"n1": address}) as pool,
    ):
        held = asyncio.create_task(pool.call("n1", "t.hold", Note(""), Note, timeout_s=60))
        await service.entered.wait()
        calls = server.statistics().calls
        with pytest.raises(PeerUnreachable, match="broke"):
            await pool.call("n1", "t.echo", Note("never seen"), Note, timeout_s=60)
        with pytest.raises(PeerUnreachable, match="broke"):
            await held
        assert server.statistics().calls == calls
        await until(lambda: pool.connected("n1"))
        assert (await pool.call("n1", "t.echo", Note("again"), Note))[0].text == "again"


# --- nodes of version 0.1.0


class OldNode:
    """A listening node of version 0.1.0: frames in the records of TLS, without ALPN. It answers each request with the
    body that came."""

    def __init__(self, own: identity.Identity) -> None:
        self.own = own
        self.protocols: list[str | None] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.protocols.append(writer.get_extra_info("ssl_object").selected_alpn_protocol())
        frames = FrameReader(lambda *header: Verdict.TAKE, lambda *found: self._answer(writer, *found))
        while data := await reader.read(64 * KIB):
            feed(frames, data)
        writer.close()

    def _answer(
        self, writer: asyncio.StreamWriter, kind: int, number: int, _ms: int, head: memoryview, body: memoryview
    ) -> None:
        if kind == Kind.HELLO:
            writer.write(frame(Kind.WELCOME, 0, encode(Hello("c1", self.own.name, b"i" * 8, PROTOCOL_VERSION))))
        else:
            writer.write(frame(Kind.REPLY, number, encode(Note("", len(body))), bytes(body)))


@pytest.mark.parametrize("protocols", [None, ["h2", "storaged-packets/2"]])
async def test_a_node_of_0_1_0_is_dialled_and_calls_go_through_tls(world: World, protocols: list[str] | None) -> None:
    own = world.node("n1")
    context = tls.server_context(own)
    if protocols:
        context.set_alpn_protocols(protocols)
    old = OldNode(own)
    listener = await asyncio.start_server(old.serve, "127.0.0.1", 0, ssl=context)
    address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    async with pooled(world.node("gw", ("gateway",)), {"n1": address}) as pool:

        async def one(size: int) -> None:
            sent = os.urandom(size)
            answer, body = await pool.call("n1", "t.mirror", Note("x"), Note, body=[sent], timeout_s=60)
            assert (answer.number, bytes(body)) == (size, sent)

        await asyncio.gather(*(one(size) for size in (0, 1, 16 * KIB, 300 * KIB, 3 * MIB + 1, *range(50))))
        assert carriers(pool._links["n1"].connection) == {TlsReader}
        assert pool.statistics().links[0].connects == 1
    listener.close()
    assert old.protocols == [None]


@pytest.mark.parametrize("protocols", [None, ["h2"], ["storaged-packets/2", "http/1.1"]])
async def test_a_node_of_0_1_0_dials_and_its_calls_come_through_tls(world: World, protocols: list[str] | None) -> None:
    service = Service()
    async with serving(world.node("n1"), service) as server:
        context = tls.client_context(world.node("raw", ("gateway",)))
        if protocols:
            context.set_alpn_protocols(protocols)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context, server_hostname="n1")
        writer.write(hello("raw"))
        assert (await reader.readexactly(24))[3] == Kind.WELCOME
        (connection,) = server._connections
        assert carriers(connection) == {TlsReader}
        found: dict[int, bytes] = {}
        frames = FrameReader(
            lambda *header: Verdict.TAKE,
            lambda kind, number, ms, head, body: found.update({number: bytes(body)} if kind == Kind.REPLY else {}),
        )
        sent = {number: os.urandom(size) for number, size in enumerate((0, 1, 16 * KIB, 300 * KIB, 3 * MIB + 1), 1)}
        for number, body in sent.items():
            writer.write(frame(Kind.REQUEST, number, b"\x08t.mirror" + encode(Note("x")), body))
        welcome_head = True
        async with asyncio.timeout(GUARD_S):
            while len(found) < len(sent):
                data = await reader.read(64 * KIB)
                if welcome_head:  # its frame's header was read above
                    data, welcome_head = data[len(encode(Hello("c1", "n1", bytes(8), PROTOCOL_VERSION))) :], False
                feed(frames, data)
        assert found == sent
        writer.close()  # in TLS; it waits 30 seconds for the node's end of it
        async with asyncio.timeout(20):
            await until(lambda: server.statistics().connections == 0)


async def test_a_node_of_0_1_0_that_floods_is_paused_as_others_are(world: World) -> None:
    service = Service()
    limits = ServerLimits(inflight_bytes_per_connection_max=2 * MIB, drain_s=0.1)
    async with serving(world.node("n1"), service, limits=limits) as server:
        context = tls.client_context(world.node("raw", ("gateway",)))
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context, server_hostname="n1")
        writer.write(hello("raw"))
        await reader.readexactly(24)
        for number in range(1, 9):
            writer.write(frame(Kind.REQUEST, number, b"\x06t.hold" + encode(Note("x")), bytes(MIB)))
        await until(lambda: server.statistics().connections_waiting == 1)
        assert service.held_bytes_peak <= 2 * MIB
        service.gate.set()
        await until(lambda: service.finished == 8)
        writer.transport.abort()


async def test_both_versions_of_a_node_are_reached_in_a_rolling_upgrade(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node comes back as the new version under the same address: the next connection has packets."""
    own, service = world.node("n1"), Service()
    with monkeypatch.context() as old:
        old.setattr("storaged.cluster.rpc.server.offer_packets", lambda context: None)
        first = RpcServer(own, service.methods(), checks=PeerChecks(EU), limits=ServerLimits(drain_s=0.1))
    await first.start("127.0.0.1", 0)
    port = first.port
    async with pooled(world.node("gw", ("gateway",)), {"n1": f"127.0.0.1:{port}"}) as pool:
        await pool.call("n1", "t.echo", Note("old"), Note)
        assert carriers(pool._links["n1"].connection) == {TlsReader}
        await first.close()
        await until(lambda: not pool.connected("n1"))
        async with serving(own, service, port=port):
            await until(lambda: pool.connected("n1"))
            await pool.call("n1", "t.echo", Note("new"), Note)
            assert carriers(pool._links["n1"].connection) == {PacketReader}


# --- who keeps to neither


async def test_a_peer_that_keeps_to_the_description_is_answered(world: World) -> None:
    async with serving(world.node("n1"), Service()) as server:
        own = world.node("raw", ("gateway",))
        async with packet_peer(own, server.port, protocols=("storaged-packets/2", PACKETS)) as peer:
            assert peer.tls.selected_alpn_protocol() == PACKETS
            await greet(peer, "raw")
            for number in range(1, 4):
                peer.writer.write(peer.seal(frame(Kind.REQUEST, number, ECHO, bytes(number))))
            await peer.read_frames(4)
            assert [found[:2] for found in peer.frames[1:]] == [(Kind.REPLY, number) for number in range(1, 4)]


async def test_a_peer_whose_every_byte_comes_alone_is_answered(world: World) -> None:
    async with (
        serving(world.node("n1"), Service()) as server,
        packet_peer(world.node("raw", ("gateway",)), server.port) as peer,
    ):
        peer.tls.write(peer.secret)
        for byte in peer.from_tls.read():
            peer.writer.write(bytes([byte]))
            await asyncio.sleep(0.001)
        await peer.read_secret()
        for byte in bytes(peer.seal(hello("raw"))):
            peer.writer.write(bytes([byte]))
            await asyncio.sleep(0.001)
        await peer.read_frames(1)
        assert peer.frames[0][0] == Kind.WELCOME
        for byte in bytes(peer.seal(frame(Kind.REQUEST, 1, ECHO, b"a body"))):
            peer.writer.write(bytes([byte]))
            await asyncio.sleep(0.001)
        await peer.read_frames(2)
        assert peer.frames[1][:2] == (Kind.REPLY, 1)
        assert server.statistics().calls == 1


SENT_IN_TLS = {
    "nothing but an end": (b"",),
    "a byte less": (bytes(31),),
    "a byte more": (bytes(33),),
    "in two records": (bytes(16), bytes(16)),
    "frames": (hello("raw"),),
    "16 KiB": (bytes(16 * KIB),),
}


@pytest.mark.parametrize("what", SENT_IN_TLS)
async def test_a_peer_that_sends_something_else_in_the_place_of_its_secret_is_ended(world: World, what: str) -> None:
    refusals: list[str] = []

    def refused(_peer: str, error: StoragedError) -> None:
        refusals.append(error.message)

    async with (
        serving(world.node("n1"), Service(), on_refusal=refused) as server,
        packet_peer(world.node("raw", ("gateway",)), server.port) as peer,
    ):
        if what == "nothing but an end":
            with pytest.raises(ssl.SSLWantReadError):
                peer.tls.unwrap()
            peer.writer.write(peer.from_tls.read())
        else:
            peer.send_in_tls(*SENT_IN_TLS[what])
        async with asyncio.timeout(GUARD_S):
            assert await peer.is_ended()
        await until(lambda: len(refusals) == 1)
        assert "in the place of its secret" in refusals[0]
        assert (server.statistics().calls, server.statistics().connections) == (0, 0)


async def _more_in_tls(peer: PacketPeer) -> None:
    peer.send_in_tls(hello("raw"))


async def _huge(peer: PacketPeer) -> None:
    peer.writer.write(b"\xff\xff\xff\xff")


async def _of_no_use(peer: PacketPeer) -> None:
    peer.writer.write((1000).to_bytes(4, "big") + bytes(1000))


async def _again(peer: PacketPeer) -> None:
    packet = bytes(peer.seal(frame(Kind.REQUEST, 1, ECHO)))
    peer.writer.write(packet)
    await peer.read_frames(2)
    peer.writer.write(packet)


async def _back(peer: PacketPeer) -> None:
    assert peer.received
    peer.writer.write(bytes(peer.received))


async def _left_out(peer: PacketPeer) -> None:
    peer.seal(frame(Kind.REQUEST, 1, ECHO))
    peer.writer.write(peer.seal(frame(Kind.REQUEST, 2, ECHO)))


BROKEN = {
    "more in TLS": _more_in_tls,
    "a huge length": _huge,
    "a packet that nobody sealed": _of_no_use,
    "a packet again": _again,
    "the node's own packet": _back,
    "a packet left out": _left_out,
}


@pytest.mark.parametrize("how", BROKEN)
async def test_a_peer_that_breaks_the_protocol_of_packets_is_ended(world: World, how: str) -> None:
    async with (
        serving(world.node("n1"), Service()) as server,
        packet_peer(world.node("raw", ("gateway",)), server.port) as peer,
    ):
        await greet(peer, "raw")
        await until(lambda: server.statistics().connections == 1)
        calls = 1 if how == "a packet again" else 0
        await BROKEN[how](peer)
        async with asyncio.timeout(GUARD_S):
            assert await peer.is_ended()
        await until(lambda: server.statistics().connections == 0)
        assert (server.statistics().calls, server.statistics().inflight_bytes) == (calls, 0)


@pytest.mark.parametrize("bytes_more", [2, 100])
async def test_a_peer_that_stops_in_the_middle_of_a_packet_is_ended(world: World, bytes_more: int) -> None:
    async with (
        serving(world.node("n1"), Service(), limits=ServerLimits(stall_timeout_s=0.2, drain_s=0.1)) as server,
        packet_peer(world.node("raw", ("gateway",)), server.port) as peer,
    ):
        await greet(peer, "raw")
        peer.writer.write(bytes(peer.seal(frame(Kind.REQUEST, 1, ECHO, bytes(5000))))[:bytes_more])
        async with asyncio.timeout(GUARD_S / 8):
            assert await peer.is_ended()
        assert server.statistics().calls == 0


@pytest.mark.parametrize("step", ["TLS", "half of its secret", "its secret", "half of its hello"])
async def test_a_peer_that_stops_before_it_has_said_who_it_is_has_the_time_of_a_handshake(
    world: World, step: str
) -> None:
    async with (
        serving(world.node("n1"), Service(), limits=ServerLimits(handshake_timeout_s=1.0, drain_s=0.1)) as server,
        packet_peer(world.node("raw", ("gateway",)), server.port) as peer,
    ):
        if step != "TLS":
            peer.tls.write(peer.secret)
            sealed = peer.from_tls.read()
            peer.writer.write(sealed[:30] if step == "half of its secret" else sealed)
        if step == "half of its hello":
            await peer.read_secret()
            peer.writer.write(bytes(peer.seal(hello("raw")))[:20])
        async with asyncio.timeout(GUARD_S / 8):
            assert await peer.is_ended()
        assert (server.statistics().connections, server.statistics().peers_refused) == (0, 0)


async def test_strangers_that_stop_after_tls_do_not_keep_nodes_out(world: World) -> None:
    limits = ServerLimits(handshakes_max=3, handshake_timeout_s=600.0, drain_s=0.1)
    own = world.node("raw", ("gateway",))
    async with serving(world.node("n1"), Service(), limits=limits) as server, AsyncExitStack() as strangers:
        for _ in range(5):
            await strangers.enter_async_context(packet_peer(own, server.port))
        async with pooled(world.node("gw", ("gateway",)), {"n1": f"127.0.0.1:{server.port}"}) as pool:
            assert (await pool.call("n1", "t.echo", Note("in"), Note))[0].text == "in"


async def test_a_connection_that_ends_in_the_middle_of_a_packet_leaves_nothing_behind(world: World) -> None:
    service = Service()
    async with (
        serving(world.node("n1"), service) as server,
        packet_peer(world.node("raw", ("gateway",)), server.port) as peer,
    ):
        await greet(peer, "raw")
        held = bytes(peer.seal(frame(Kind.REQUEST, 1, b"\x06t.hold" + encode(Note("x")), bytes(100 * KIB))))
        peer.writer.write(held + bytes(peer.seal(frame(Kind.REQUEST, 2, ECHO, bytes(100 * KIB))))[:-1])
        await service.entered.wait()
        peer.writer.write_eof()
        await until(lambda: server.statistics().connections == 0)
        await until(lambda: service.cancelled == 1 and server.statistics().inflight_bytes == 0)
        assert server.statistics().calls == 1


async def test_a_handshake_of_tls_has_a_largest_size(world: World) -> None:
    """A stranger announces a message of 100 KB and sends it in records that are as large as may be."""
    refusals: list[str] = []
    async with serving(
        world.node("n1"), Service(), on_refusal=lambda _peer, error: refusals.append(error.message)
    ) as server:
        _reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        body = b"\x01" + (100_000).to_bytes(3, "big") + bytes(100_000)
        try:
            for at in range(0, len(body), 16 * KIB):
                part = body[at : at + 16 * KIB]
                writer.write(b"\x16\x03\x01" + len(part).to_bytes(2, "big") + part)
                await writer.drain()
        except ConnectionError:
            pass
        await until(lambda: len(refusals) == 1)
        assert str(handshake.HANDSHAKE_WIRE_BYTES_MAX) in refusals[0]
        writer.close()


async def test_who_has_no_certificate_of_the_cluster_gets_no_secret(world: World, tmp_path: Path) -> None:
    """TLS 1.3 lets the side that dials believe in the handshake before the other side has seen its certificate."""
    mixed = World(tmp_path / "other").node("raw", ("gateway",))
    (mixed.directory / "authority.crt").write_bytes((world.authority.directory / "authority.crt").read_bytes())
    async with (
        serving(world.node("n1"), Service()) as server,
        packet_peer(mixed, server.port) as peer,
    ):
        peer.send_in_tls(peer.secret)
        with pytest.raises((ssl.SSLError, asyncio.IncompleteReadError, ConnectionError)):
            await peer.read_secret()
        await until(lambda: server.statistics().peers_refused == 1)


async def test_a_node_that_answers_something_else_than_its_secret_counts_as_away(world: World) -> None:
    own = world.node("n1")
    context = tls.server_context(own)
    context.set_alpn_protocols([PACKETS])

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame(Kind.WELCOME, 0, encode(Hello("c1", "n1", b"i" * 8, PROTOCOL_VERSION))))
        await reader.read()
        writer.close()

    async with (
        await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context) as listener,
        pooled(world.node("gw", ("gateway",)), {"n1": f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"}) as pool,
    ):
        with pytest.raises(PeerUnreachable, match="in the place of its secret"):
            await pool.call("n1", "t.echo", Note(""), Note)


@pytest.mark.parametrize("step", ["TCP", "half a record", "TLS", "its secret", "half a packet"])
async def test_a_node_that_stops_before_it_has_said_who_it_is_counts_as_away(world: World, step: str) -> None:
    """It is dialled, and hangs at one step. The connection to it is closed."""
    own, ended = world.node("n1"), asyncio.Event()
    context = tls.server_context(own)
    context.set_alpn_protocols([PACKETS])

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if step == "half a record":
            writer.write(b"\x16\x03\x03\x01\x00" + bytes(100))
        elif step != "TCP":
            to_tls, from_tls = ssl.MemoryBIO(), ssl.MemoryBIO()
            side = context.wrap_bio(to_tls, from_tls, server_side=True)
            while True:
                try:
                    side.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    writer.write(from_tls.read())
                    to_tls.write(await reader.read(64 * KIB))
            if step != "TLS":
                side.write(bytes(32))
            writer.write(from_tls.read())
            if step == "half a packet":
                writer.write((1000).to_bytes(4, "big") + bytes(100))
        try:
            while await reader.read(1000):
                pass
        except ConnectionError:
            pass
        ended.set()
        writer.close()

    limits = PoolLimits(connect_timeout_s=0.5, backoff_first_s=0.01, backoff_max_s=0.05)
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listener:
        addresses = {"n1": f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"}
        async with pooled(world.node("gw", ("gateway",)), addresses, limits=limits) as pool:
            with pytest.raises(PeerUnreachable, match="no answer in time"):
                await pool.call("n1", "t.echo", Note(""), Note, timeout_s=60)
            async with asyncio.timeout(GUARD_S / 8):
                await ended.wait()


async def test_a_handler_that_waits_for_room_gets_the_rest_of_its_packet_later(world: World) -> None:
    """One packet has more requests than may run at once: what is behind waits in the packet."""
    service = Service()
    limits = ServerLimits(handlers_per_connection_max=2, drain_s=0.1)
    methods = {**service.methods(), "t.hold": Method(Note, service.hold, ROLES)}
    async with (
        serving(world.node("n1"), methods, limits=limits) as server,
        packet_peer(world.node("raw", ("gateway",)), server.port) as peer,
    ):
        await greet(peer, "raw")
        hold = b"\x06t.hold" + encode(Note("x"))
        bodies = [bytes([number]) * (number * 900) for number in range(1, 13)]
        stream = b"".join(frame(Kind.REQUEST, number, hold, body) for number, body in enumerate(bodies, 1))
        peer.writer.write(bytes(peer.seal(stream)) + bytes(peer.seal(frame(Kind.REQUEST, 99, ECHO))))
        await until(lambda: server.statistics().connections_waiting == 1)
        assert service.running == 2
        service.gate.set()
        await peer.read_frames(14)
        assert sorted(found[1] for found in peer.frames[1:]) == [*range(1, 13), 99]


@pytest.mark.parametrize(
    "sent", [b"G\x03\x01\x40\x00", b"\x16\x02\x01\x00\x05", b"\x16\x03\x01\xff\xff", b"SR\x03\x01\x00"]
)
async def test_what_is_no_record_of_tls_is_refused_at_its_first_bytes(world: World, sent: bytes) -> None:
    """OpenSSL waits for more of some."""
    limits = ServerLimits(handshake_timeout_s=600.0, drain_s=0.1)
    async with serving(world.node("n1"), Service(), limits=limits) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(sent)
        async with asyncio.timeout(GUARD_S / 8):
            while await reader.read(1000):
                pass
        writer.close()
        assert server.statistics().peers_refused == 1
