"""A certificate authority, identities and echoing methods for the tests of the cluster plane."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from storaged.cluster import identity, issuing
from storaged.cluster.policy import Policy
from storaged.cluster.ports import Call, Method, Methods, PeerChecks, PeerIdentity, Reply
from storaged.cluster.rpc import PoolLimits, RpcPool, RpcServer, ServerLimits
from storaged.errors import FragmentMissing, NoSuchBucket, PeerTimeout
from storaged.wire import Message
from tests.patience import GUARD_S

EU = Policy().admit
ROLES = frozenset({"storage", "gateway"})


class Note(Message, frozen=True):
    text: str
    number: int = 0


class World:
    """One authority in a directory, and nodes as they are asked for."""

    def __init__(self, directory: Path, cluster: str = "c1") -> None:
        self.directory = directory
        self.authority = issuing.create_authority(directory / "authority", cluster)

    def node(self, name: str, roles: tuple[str, ...] = ("storage",), location: str = "FR/par1/a") -> identity.Identity:
        return issuing.issue(self.authority, self.directory / name, name=name, location=location, roles=roles)

    def forged(self, own: identity.Identity, **changes: Any) -> identity.Identity:
        """The same node with a certificate that really is of the authority, but says what it would never be asked to
        say.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        peer: PeerIdentity = own.peer._replace(**changes)
        certificate = issuing.certify(self.authority, peer, key.public_key(), days=1, now=datetime.now(UTC))
        (own.directory / "node.key").write_bytes(issuing.private_pem(key))
        (own.directory / "node.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return identity.Identity(own.directory, peer, own.expires, own.administration, own.valid_from)


class Service:
    """Methods to call, and what happened in them."""

    def __init__(self) -> None:
        self.running = 0
        self.running_peak = 0
        self.held_bytes = 0
        self.held_bytes_peak = 0
        self.cancelled = 0
        self.finished = 0
        self.gate = asyncio.Event()
        self.entered = asyncio.Event()
        self.last: Call | None = None

    async def echo(self, request: Note, call: Call) -> Note:
        self.last = call
        return Note(request.text, len(call.body))

    async def mirror(self, request: Note, call: Call) -> Reply:
        half = len(call.body) // 2
        return Reply(request, [call.body[:half], b"", call.body[half:]])

    async def make(self, request: Note, call: Call) -> Reply:
        return Reply(request, [bytes([request.number % 251]) * request.number])

    async def hold(self, request: Note, call: Call) -> Note:
        self.running += 1
        self.held_bytes += len(call.body)
        self.running_peak = max(self.running, self.running_peak)
        self.held_bytes_peak = max(self.held_bytes, self.held_bytes_peak)
        self.entered.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
            self.held_bytes -= len(call.body)
        self.finished += 1
        return Note(request.text, len(call.body))

    async def fail(self, request: Note, call: Call) -> Note:
        match request.text:
            case "missing":
                raise FragmentMissing("block 7 is not here", disk="d1")
            case "bucket":
                raise NoSuchBucket("no bucket of that name")
            case _:
                raise KeyError("secret detail of the implementation")

    def methods(self) -> Methods:
        every: dict[str, Callable[[Any, Call], Awaitable[Any]]] = {
            "t.echo": self.echo,
            "t.mirror": self.mirror,
            "t.make": self.make,
            "t.hold": self.hold,
            "t.fail": self.fail,
        }
        found = {name: Method(Note, handler, ROLES) for name, handler in every.items()}
        found["t.gateways"] = Method(Note, self.echo, frozenset({"gateway"}))
        return found


@asynccontextmanager
async def serving(
    own: identity.Identity,
    service: Service | Methods,
    *,
    limits: ServerLimits | None = None,
    port: int = 0,
    **options: Any,
) -> AsyncIterator[RpcServer]:
    methods = service.methods() if isinstance(service, Service) else service
    checks = PeerChecks(options.pop("admission", EU), options.pop("roles_of", None), options.pop("on_refusal", None))
    server = RpcServer(own, methods, checks=checks, limits=limits or ServerLimits(drain_s=0.1), **options)
    await server.start("127.0.0.1", port)
    try:
        yield server
    finally:
        await server.close()


@asynccontextmanager
async def pooled(own: identity.Identity, addresses: Any, **options: Any) -> AsyncIterator[RpcPool]:
    checks = PeerChecks(
        options.pop("admission", EU),
        on_refusal=options.pop("on_refusal", None),
        on_revoked=options.pop("on_revoked", None),
    )
    options.setdefault("limits", PoolLimits(connect_timeout_s=5, backoff_first_s=0.01, backoff_max_s=0.05))
    pool = RpcPool(own, addresses=addresses, checks=checks, **options)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


async def run_out(call: Callable[[float], Awaitable[object]], entered: asyncio.Event) -> None:
    """Calls that run out of time, until the handler of one has begun. Each may take twice as long as the last, because
    on a busy machine a short time is over before the call has reached its handler.
    """
    timeout_s = 0.05
    while not entered.is_set():
        with pytest.raises(PeerTimeout):
            await call(timeout_s)
        timeout_s *= 2


async def until(condition: Callable[[], bool]) -> None:
    """Waits for something that must happen."""
    async with asyncio.timeout(GUARD_S):
        while not condition():  # noqa: ASYNC110  (what is waited for is inside the code under test, which has no event for it)
            await asyncio.sleep(0.005)
