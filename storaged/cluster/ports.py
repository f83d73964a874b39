"""What the planes above see of the cluster: a caller, methods to answer with, who is alive, which layout counts.

``cluster.rpc`` implements ``Caller`` over mutual TLS; simulations implement it over a virtual network.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from storaged.cluster.layout import Layout
from storaged.wire import Buffer, Message

T = TypeVar("T", bound=Message)


class PeerIdentity(NamedTuple):
    """What a peer's certificate says, verified against the cluster's own authority and the jurisdiction policy.

    ``jurisdiction`` is the country whose law the operating entity is under, ``cluster`` the id of the cluster that
    issued the certificate.
    """

    name: str
    country: str
    site: str
    rack: str
    roles: tuple[str, ...]
    jurisdiction: str = ""
    cluster: str = ""


class LedgerReport(Message, frozen=True):
    """What a storage node says of the ledger of its disks (``node.ledger``): its ``id``, whether its disks ever took
    part (``formed``), and the id of the asking
    node's ledger when it was formed (``yours``, empty when that is not known)."""

    id: bytes
    formed: bool
    yours: bytes = b""


class Call(NamedTuple):
    """The circumstances of one request: who asks, the bulk bytes that came with it, and when the asker gives up.

    ``peer.roles`` are those that the layout in force gives it too, none for a stranger. ``body`` is valid until the
    handler returns. ``deadline`` is in the server's monotonic seconds.
    """

    peer: PeerIdentity
    body: memoryview
    deadline: float


class Reply(NamedTuple):
    """An answer with bulk bytes: the buffers are sent one after the other, without being copied together."""

    message: Message
    body: Sequence[Buffer] = ()


Handler = Callable[[Any, Call], Awaitable[Message | Reply]]
"""``await handler(request, call)``. A StoragedError raised here reaches the caller as PeerRefused with its code, or as
the same
class again when it derives from PeerError."""


Answer = Callable[[Message | Reply | Exception], None]
"""``answer(outcome)``: called once, on the event loop, with what the handler would have returned or raised. It does not
raise. When the call was let go
meanwhile (withdrawn, its deadline passed, the peer is gone) the outcome goes nowhere."""

Begin = Callable[[Any, Call, Answer], bool]
"""``begin(request, call, answer)``: takes the request on and answers, now or later; False: nothing was done, since that
would need waiting first.
Raises what the handler would raise, when it was not taken on. What was taken on may have to wait for a disk that never
answers, longer than the server counts it:
its number and bytes are bounded by whoever takes it on."""


class Method(NamedTuple):
    """A named RPC method: the type of its request, its handler, and the roles that may call it (any of them): none,
    until ``cluster.rpc.authority.grant`` gave it what the table says.

    Two shorter ways to an answer are tried before the task that the handler runs in. ``at_once`` answers on the event
    loop what needs no waiting, and returns
    None for everything else. ``begin`` takes on what is answered by a callback when a disk has written it; once taken
    on, it is carried out even when the caller cancels.
    ``for_strangers``: also answers a certified node that the layout in force does not name (yet, or any more).
    """

    request: type[Message]
    handler: Handler
    roles: frozenset[str] = frozenset()
    at_once: Callable[[Any, Call], Message | Reply | None] | None = None
    for_strangers: bool = False
    begin: Begin | None = None


Methods = Mapping[str, Method]
"""Method name (``meta.prepare``, ``fragment.write``) -> Method. ``node`` merges every plane's and registers them."""


Then = Callable[[Any, memoryview], None]
"""``then(answer, bulk)``: called once, on the event loop, with the reply and its bulk bytes, or with a PeerError and
none. It must not raise.
"""

Line = Callable[[bytes, Then, Sequence[Buffer], float], bool]
"""``line(rest, then, body, timeout_s)``: one method of one node, for who calls it often; as ``Poster.post``. ``rest``:
the encoded request behind its start.
"""


class Caller(Protocol):
    """Calls methods on other nodes by name (or on this one, without the network)."""

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
        """The answer, and the bulk bytes that came with it (empty when none did); the bytes belong to the caller.

        Raises PeerUnreachable (at once when the node is known to be away), PeerTimeout, PeerRefused or another
        PeerError.
        """


@runtime_checkable
class Poster(Protocol):
    """What a Caller may do besides: ask without a task. A small PUT makes three to six calls, and a task costs more
    than the frame that it sends.
    """

    def post(
        self,
        node: str,
        method: str,
        request: Message,
        reply: type[Message],
        then: Then,
        *,
        body: Sequence[Buffer] = (),
        timeout_s: float = 10.0,
    ) -> bool:
        """As ``call``, but returns at once and hands the outcome to ``then``. False: nothing was sent, since that would
        need waiting (no connection, no
        room in it) or the node is this one; ``call`` does that. Raises ValueError when the request is over a frame's
        limits."""

    def line(self, node: str, method: str, reply: type[Message], start: bytes, *, urgent: bool = False) -> Line:
        """For requests that are encoded already, and all begin with ``start``: what goes to three nodes is encoded
        once. ``urgent``: bodies of up to 256 KiB wait for no larger
        ones, as those of up to 16 KiB never do."""


@dataclass(frozen=True)
class DiskStatus:
    """What a node last said of one of its disks. ``state``: ok, full, read-only, failed, foreign, index-damaged."""

    id: str
    directory: str
    state: str
    bytes_used: int = 0
    bytes_free: int = 0
    reason: str = ""


class Liveness(Protocol):
    """Which disks may be counted on now; from heartbeats, so a hint and never a matter of safety."""

    def disk_writable(self, disk_id: str) -> bool:
        """Its node answers and the disk takes new fragments."""

    def disk_readable(self, disk_id: str) -> bool:
        """Its node answers and the disk can be read."""


class Layouts(Protocol):
    """The layout in force, and the earlier ones that records still name."""

    @property
    def current(self) -> Layout: ...

    def at(self, epoch: int) -> Layout:
        """Raises KeyError when this node does not know that epoch."""


Admission = Callable[[PeerIdentity], None]
"""Raises JurisdictionRefused or CertificateRefused for a peer that must not be talked to."""

Membership = Callable[[PeerIdentity], frozenset[str]]
"""The roles in which the layout in force knows a certified peer; empty for one that is not in it, or elsewhere than it
is certified to be.
"""
