"""A peer of the RPC that a test drives by hand: it follows FORMATS.md, or breaks it."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from storaged.cluster import identity, tls
from storaged.cluster.rpc.framing import PROTOCOL_VERSION, FrameReader, Hello, Kind, Verdict, pack_header
from storaged.cluster.rpc.handshake import PACKETS
from storaged.cluster.rpc.packets import SECRET_BYTES, PacketReader, PacketWriter, secrets_of
from storaged.wire import encode
from tests.worlds.receiving import feed

TLS_HEADER_BYTES = 5


def frame(kind: Kind, request_id: int, head: bytes, body: bytes = b"") -> bytes:
    return pack_header(kind, request_id, len(head), len(body), 60_000 if kind == Kind.REQUEST else 0) + head + body


def hello(name: str) -> bytes:
    return frame(Kind.HELLO, 0, encode(Hello("c1", name, bytes(8), PROTOCOL_VERSION)))


class PacketPeer:
    """Dials a node, and knows every step of the beginning. ``received``: all bytes that came after TLS."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, context: ssl.SSLContext, node: str
    ) -> None:
        self.reader, self.writer = reader, writer
        self.to_tls, self.from_tls = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.to_tls, self.from_tls, server_hostname=node)
        self.secret = os.urandom(SECRET_BYTES)
        self.received = bytearray()
        self.frames: list[tuple[int, int, bytes, bytes]] = []

    def send_in_tls(self, *pieces: bytes) -> None:
        """One record of TLS for each piece, all in one write."""
        for piece in pieces:
            self.tls.write(piece)
        self.writer.write(self.from_tls.read())

    async def read_secret(self) -> None:
        """The node's secret; then both sides have their keys."""
        while True:
            try:
                theirs = self.tls.read(SECRET_BYTES + 1)
                break
            except ssl.SSLWantReadError:
                await self._read_record()
        assert len(theirs) == SECRET_BYTES
        ours, back = secrets_of(self.secret, theirs)
        self.seal = PacketWriter(ours).seal
        self.packets = PacketReader(back, FrameReader(lambda *header: Verdict.TAKE, self._take))

    def _take(self, kind: int, request_id: int, _ms: int, head: memoryview, body: memoryview) -> None:
        self.frames.append((kind, request_id, bytes(head), bytes(body)))

    async def _read_record(self) -> None:
        header = await self.reader.readexactly(TLS_HEADER_BYTES)
        self.to_tls.write(header + await self.reader.readexactly(int.from_bytes(header[3:], "big")))

    async def read_frames(self, count: int) -> None:
        """Waits until so many frames have come since the connection was made."""
        while len(self.frames) < count:
            data = await self.reader.read(65_536)
            if not data:
                raise ConnectionResetError("the node ended the connection")
            self.received += data
            feed(self.packets, data)

    async def is_ended(self) -> bool:
        """Waits until the node ends the connection."""
        try:
            while await self.reader.read(65_536):
                pass
        except ConnectionError:
            pass
        return True


@asynccontextmanager
async def packet_peer(
    own: identity.Identity, port: int, node: str = "n1", protocols: Sequence[str] = (PACKETS,)
) -> AsyncIterator[PacketPeer]:
    """A peer whose handshake of TLS is done, and that has sent nothing in it."""
    context = tls.client_context(own)
    context.set_alpn_protocols(list(protocols))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    peer = PacketPeer(reader, writer, context, node)
    try:
        while True:
            try:
                peer.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                writer.write(peer.from_tls.read())
                await peer._read_record()
        writer.write(peer.from_tls.read())
        yield peer
    finally:
        writer.transport.abort()


async def greet(peer: PacketPeer, name: str) -> None:
    """All that an honest peer does until it is let in."""
    peer.send_in_tls(peer.secret)
    await peer.read_secret()
    peer.writer.write(peer.seal(hello(name)))
    await peer.read_frames(1)
    assert peer.frames[0][0] == Kind.WELCOME
