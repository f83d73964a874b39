"""What the planes above see of the cluster: a caller, methods to register, liveness of nodes and disks, and layouts.

``cluster.rpc`` implements ``Caller`` over mutual TLS; simulations implement it over a virtual network.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from storaged.cluster.layout import Layout
from storaged.cluster.partition_map import PartitionMap
from storaged.cluster.partitions import PartitionState
from storaged.errors import StoragedError
from storaged.wire import Buffer, Message

T = TypeVar("T", bound=Message)


class PeerIdentity(NamedTuple):
    """What a peer's certificate says, verified against the cluster's own authority and the jurisdiction policy.

    ``jurisdiction`` is the country whose law the operating entity is under. ``cluster`` is the id of the cluster that
    issued the certificate, ``fingerprint`` the SHA-256 of the certificate (DER).
    """

    name: str
    country: str
    site: str
    rack: str
    roles: tuple[str, ...]
    jurisdiction: str = ""
    cluster: str = ""
    fingerprint: bytes = b""


class LedgerReport(Message, frozen=True):
    """What a storage node reports about the ledger of its disks (``node.ledger``).

    ``id`` is the ledger's id. ``formed`` says whether its disks ever took part in the cluster. ``yours`` is the id of
    the asking node's ledger at the time it was formed, empty when unknown. ``whole`` says whether it counts in a
    majority of ledgers: a blank one does not, until it is rebuilt from others.
    """

    id: bytes
    formed: bool
    yours: bytes = b""
    whole: bool = False


class Call(NamedTuple):
    """The circumstances of one request: the caller, the bulk bytes that came with it, and the caller's deadline.

    ``peer.roles`` are only those that the layout in force gives the peer too; a non-member has none. ``body`` is valid
    until the handler returns. ``deadline`` is in seconds of the server's monotonic clock.
    """

    peer: PeerIdentity
    body: memoryview
    deadline: float


class Reply(NamedTuple):
    """A reply with bulk bytes. The buffers are sent one after the other, without being joined first."""

    message: Message
    body: Sequence[Buffer] = ()


Handler = Callable[[Any, Call], Awaitable[Message | Reply]]
"""``await handler(request, call)``. A PeerError raised here reaches the caller as the same class, any other
StoragedError as PeerRefused with its code."""


OnAnswer = Callable[[Message | Reply | Exception], None]
"""``on_answer(answer)``: called once, on the event loop, with what the handler would have returned or raised.

It does not raise. When the call was abandoned meanwhile (cancelled, past its deadline, the peer is gone), the answer is
dropped."""

TryStart = Callable[[Any, Call, OnAnswer], bool]
"""``try_start(request, call, on_answer)``: accepts the request and answers it, now or later.

It returns False, and has done nothing, where it would have to wait first. It raises what the handler would raise when
it does not accept the request. An accepted request may wait for a disk that never answers, longer than the server
counts it, so the implementation bounds the number and the bytes of the requests that it has accepted."""


class Method(NamedTuple):
    """A named RPC method: the type of its request, its handler, and the roles of which a caller needs one.

    ``roles`` is empty until ``cluster.rpc.authority.grant`` fills it from the table. ``for_non_members``: the method
    also answers a certified node that the layout in force does not name (not yet, or no longer).

    Two shorter ways are tried before the handler gets a task. ``try_answer`` answers on the event loop what needs no
    waiting and returns None for everything else. ``try_start`` accepts a request that a callback answers once a disk
    has written it; an accepted request is carried out even when the caller cancels.
    """

    request: type[Message]
    handler: Handler
    roles: frozenset[str] = frozenset()
    try_answer: Callable[[Any, Call], Message | Reply | None] | None = None
    for_non_members: bool = False
    try_start: TryStart | None = None


Methods = Mapping[str, Method]
"""Method name (``meta.prepare``, ``fragment.write``) -> Method. ``node`` merges every plane's and registers them."""


OnReply = Callable[[Any, memoryview], None]
"""``on_reply(answer, bulk)``: called once, on the event loop, with the reply and its bulk bytes, or with a PeerError
and no bytes. It must not raise."""

EncodedCall = Callable[[bytes, OnReply, Sequence[Buffer], float], bool]
"""``encoded_call(rest, on_reply, body, timeout_s)``: as ``TryCaller.try_call``, for one method of one node.

``rest`` is the encoded request without its common prefix."""


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
        """Returns the reply and the bulk bytes that came with it (empty when none did). The caller owns these bytes.

        Raises PeerUnreachable (at once when the node is known to be away), PeerTimeout, PeerRefused or another
        PeerError.
        """


@runtime_checkable
class TryCaller(Protocol):
    """Calls without a task, which a Caller may offer too.

    A small PUT makes three to six calls, and a task costs more than the frame that it sends.
    """

    def try_call(
        self,
        node: str,
        method: str,
        request: Message,
        reply: type[Message],
        on_reply: OnReply,
        *,
        body: Sequence[Buffer] = (),
        timeout_s: float = 10.0,
    ) -> bool:
        """As ``Caller.call``, but returns at once and hands the reply or error to ``on_reply``.

        Returns False, and sends nothing, where it would have to wait (no connection, or no room in it) and where the
        node is this one; ``call`` handles both. Raises ValueError when the request exceeds a frame's limits.
        """

    def encoded_call(
        self,
        node: str,
        method: str,
        reply: type[Message],
        prefix: bytes,
        *,
        urgent: bool = False,
        followed: bool = False,
    ) -> EncodedCall:
        """A call for requests that are already encoded and all begin with ``prefix``.

        So a request that goes to three nodes is encoded once. ``urgent``: bodies of up to 256 KiB do not wait for
        larger ones; without it this holds for bodies of up to 16 KiB. ``followed``: other calls of that node are likely
        in the same turn of the event loop, and leave in the same packet.
        """


@runtime_checkable
class BeginCaller(Protocol):
    """Calls without a task that may be given up, which a Caller may offer too."""

    def begin_call(
        self,
        node: str,
        method: str,
        request: Message,
        reply: type[Message],
        on_reply: OnReply,
        *,
        body: Sequence[Buffer] = (),
        timeout_s: float = 10.0,
    ) -> Callable[[], object] | None:
        """As ``TryCaller.try_call``, and returns the function that gives the call up: then ``on_reply`` is not called
        any more, and the body's buffers are free. None where ``try_call`` returns False.
        """


@dataclass(frozen=True)
class DiskStatus:
    """What a node last said of one of its disks. ``state``: one of ``disk_states.STATES``. ``bytes_free``: what
    clients' data may take. ``few``: there is little room for rows, so that none that take room should be sent there.
    ``ample``: rows have room outside of the reserve (``disk_room``). ``latency_ms``: how long its operations take, or
    the oldest one that has not ended.
    """

    id: str
    directory: str
    state: str
    bytes_used: int = 0
    bytes_free: int = 0
    reason: str = ""
    few: bool = False
    ample: bool = False
    latency_ms: int = 0


class Liveness(Protocol):
    """Which disks are usable now, and for what. It comes from heartbeats and from what this process sees, so it is a
    hint; safety never depends on it. ``cluster.disk_view`` implements it.
    """

    def disk_writable(self, disk_id: str) -> bool:
        """Its node answers and the disk takes new fragments."""

    def disk_readable(self, disk_id: str) -> bool:
        """Its node answers and the disk can be read."""

    def disk_prompt(self, disk_id: str) -> bool:
        """It can be read, and is not left out for being slow: it is asked, and written to, before those that are."""

    def disk_late(self, disk_id: str, for_s: float) -> None:
        """The caller gave up a call to this disk after so long, while others had answered."""

    def disk_answered(self, disk_id: str) -> None:
        """The disk answered a call in time. Needed only where ``disk_late`` may be called."""

    def disks_full(self) -> frozenset[str]:
        """Those that are readable and take no more fragments, or no more rows. The same object as long as nothing has
        changed; empty but for rare times.
        """

    def disk_takes_rows(self, disk_id: str, *, outside_reserve: bool = False) -> bool:
        """Of a disk that is full: whether it still takes rows that take room. ``outside_reserve``: it has room for them
        outside of its reserve.
        """


class Layouts(Protocol):
    """The layout in force, the earlier ones that records still name, and where the partitions are now."""

    @property
    def current(self) -> Layout: ...

    @property
    def partitions(self) -> PartitionMap: ...

    def partition(self, number: int) -> PartitionState:
        """Where the replicas of a partition are, as far as this node knows. The same object until that changes.

        Raises ServiceUnavailable while this node lacks the layout that placed it.
        """

    def at(self, epoch: int) -> Layout:
        """Raises KeyError when this node does not know that epoch."""

    def earlier(self) -> Sequence[Layout]:
        """The layouts that this node knows but the one in force, newest first."""


Admission = Callable[[PeerIdentity], None]
"""Raises JurisdictionRefused or CertificateRefused for a peer that this node must not talk to."""

RolesOf = Callable[[PeerIdentity], frozenset[str]]
"""The roles that the layout in force gives a certified peer. Empty for a peer that is not in the layout, or that the
layout places elsewhere than its certificate does."""

OnRefusal = Callable[[str, StoragedError], None]
"""``on_refusal(peer, error)``: a peer was refused; for the audit log.

``peer`` is the certified name, or the network address of a peer without one. The address has no port, so that the
thousand attempts of one stranger are recorded as one thing."""


@dataclass(frozen=True)
class PeerChecks:
    """How a node judges its peers. ``roles_of`` None: a peer has the roles of its certificate.

    ``on_revoked(peer, fingerprint)``: a dialled peer refuses this node, because the certificate that it presented is
    revoked.
    """

    admission: Admission
    roles_of: RolesOf | None = None
    on_refusal: OnRefusal | None = None
    on_revoked: Callable[[str, bytes], None] | None = None
