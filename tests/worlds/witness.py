"""A gateway whose audit log three storage nodes witness, without sockets: real certificates, signatures, files and
messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from storaged.cluster.audit.files import chain_files
from storaged.cluster.audit.log import AuditLog
from storaged.cluster.audit.report import AuditReport, WitnessView
from storaged.cluster.audit.verify import verify
from storaged.cluster.audit.witness import WitnessBook, read_file
from storaged.cluster.audit.witness_client import WitnessClient
from storaged.cluster.identity import Identity, NodeSigner
from storaged.cluster.ports import Call, PeerIdentity, Reply
from storaged.errors import PeerTimeout, PeerUnreachable
from storaged.wire import Buffer, Message, decode, encode
from tests.worlds.authority import World

T = TypeVar("T", bound=Message)


class Clock:
    def __init__(self) -> None:
        self.now_ms = 1_767_225_600_000

    def monotonic(self) -> float:
        return self.now_ms / 1000

    def wall_ms(self) -> int:
        return self.now_ms


class Wire:
    """A ``Caller``: requests and answers are encoded, and go to the witness's handler."""

    def __init__(self, peer: PeerIdentity, books: dict[str, WitnessBook]) -> None:
        self.peer = peer
        self.books = books
        self.away: set[str] = set()
        self.lose: set[str] = set()
        """Nodes whose answers get lost."""
        self.calls: list[tuple[str, str]] = []

    async def call(
        self,
        node: str,
        method: str,
        request: Message,
        reply: type[T],
        *,
        body: Sequence[Buffer] = (),
        timeout_s: float = 10.0,
    ) -> tuple[T, memoryview]:
        if node in self.away:
            raise PeerUnreachable(f"{node} is away")
        self.calls.append((node, method))
        row = self.books[node].methods()[method]
        answer = await row.handler(
            decode(encode(request), row.request), Call(self.peer, memoryview(b"".join(body)), 0.0)
        )
        if node in self.lose:
            raise PeerTimeout(f"{node} did not answer")
        message, bulk = answer if isinstance(answer, Reply) else (answer, ())
        return decode(encode(message), reply), memoryview(b"".join(bulk))


class Witnessed:
    """``start`` and ``stop`` are a process's life; between them ``log`` is written and
    ``client.publish()`` shows it.
    """

    def __init__(self, directory: Path, witnesses: Sequence[str] = ("n1", "n2", "n3")) -> None:
        self.world = World(directory / "world")
        self.directory = directory
        self.audit = directory / "audit"
        self.clock = Clock()
        self.own: Identity = self.world.node("gw", ("gateway",))
        self.books = {name: self.open_book(name) for name in witnesses}
        self.wire = Wire(self.own.peer, self.books)
        self.starts = 0
        self.log: AuditLog
        self.client: WitnessClient

    @property
    def authority(self) -> Any:
        return self.world.authority.certificate

    def open_book(self, name: str) -> WitnessBook:
        return WitnessBook(self.directory / name / "witness", self.world.authority.certificate)

    async def start(self, *, file_bytes_max: int = 1 << 20) -> None:
        self.starts += 1
        self.log = AuditLog(
            self.audit, "gw", self.starts.to_bytes(8, "big"), clock=self.clock, file_bytes_max=file_bytes_max
        )
        await self.log.start()
        self.client = WitnessClient(self.log, NodeSigner(self.own), self.wire, lambda: list(self.books))

    async def write(self, count: int) -> None:
        for number in range(count):
            await self.log.append("key.release", target=f"bucket-id:{number:032x}", outcome="done", number=number)

    async def stop(self) -> None:
        await self.log.close()
        await self.client.close()

    async def life(self, count: int, **options: Any) -> None:
        await self.start(**options)
        await self.client.publish()
        await self.write(count)
        await self.stop()

    def files(self) -> list[Path]:
        return [path for files in chain_files(self.audit).values() for path in files]

    def views(self) -> list[WitnessView]:
        found = []
        for name in self.books:
            path = self.directory / name / "witness" / "gw.jsonl"
            if name in self.wire.away:
                found.append(WitnessView(name, None, "is away"))
            else:
                found.append(WitnessView(name, read_file(path)))
        return found

    def verify(self) -> AuditReport:
        return verify(self.files(), (), self.views(), authority=self.authority, whole=True)
