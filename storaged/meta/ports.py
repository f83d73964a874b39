"""The ring as ``objects`` and ``maintain`` use it, and the replicas under it.

objects, maintain
    |  Registers, Pages, Scanner, Fences   (meta.client, meta.listing: quorums of replicas)
    |  Replica                             (meta.acceptor.replica: one acceptor; meta.transport.replicas: over RPC)
    |  MetaStore, Copies                   (meta.store_ports: what an acceptor needs of its disk)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from msgspec import Struct

from storaged.cluster.ports import OnReply
from storaged.meta import messages
from storaged.meta.messages import ScanReply, ScanRequest
from storaged.meta.names import Ballot, Change, RegisterName, Value
from storaged.wire import Buffer, Message

Update = Callable[[Value | None], Change | None]
"""Pure: takes the settled value (None: never written) and returns what it should become, or None to leave it as it is.

It may run several times: after each pre-emption on the newer value. It may raise. The exception reaches the caller of
``change`` after the value that it judged was settled (a failed condition is a read).
"""


class Reading(NamedTuple):
    """A settled value. ``payload`` holds the copy of a small object when it was asked for and the replica that answered
    had it.
    """

    value: Value | None
    payload: memoryview | None = None


class Outcome(NamedTuple):
    """``before``: the settled value that the update saw last. It is None also when the update saw none and yet has
    overwritten something (``try_change``). ``after``: what the register holds now (``before`` when nothing changed).
    """

    before: Value | None
    after: Value | None


OnOutcome = Callable[[Outcome | Exception], None]
"""``on_outcome(outcome)`` gets what ``change`` would return or raise."""


class ReplicaState(NamedTuple):
    """``state``: ``current`` (has the newest value that a replica reported), ``behind``, ``empty`` (never heard of the
    register), ``damaged``, or ``away``. ``has_payload``: it has the copy of the small object that the newest value
    names.
    """

    disk: str
    state: str
    has_payload: bool = False


class SmallCopies(Struct, frozen=True):
    """A small object's sealed bytes. Every replica of the register stores them along with the accept, durable with the
    record that names them or before it.

    ``fragments`` has (encoded fragment header, payload) for each position of a replica (0, 1, 2), not for each replica:
    ``quorums.View`` has the positions. They are built by ``fragments.format``, opaque here. ``enough`` judges the ids
    of the disks that have synced their copy (the acknowledge rule): ``change`` succeeds only when it holds, besides the
    majority. ``check``: the payload's ``hashes.transfer_checksum``, made with the hash in the headers. Replicas compare
    it in place of the hash.

    A replica that can't store its copy accepts nothing, so the copies of a record are on a majority of its replicas
    from the moment that it is chosen. A settling round that finds a record which no majority has confirmed yet carries
    the copy along to the replicas that it writes to. There is one exception (``meta.consensus.proposer``).

    The buffers must not be reused afterwards: a slow replica's copy may still be on its way when ``change`` returns.
    """

    data_id: bytes
    fragments: Sequence[tuple[bytes, Sequence[Buffer]]]
    enough: Callable[[frozenset[str]], bool]
    check: bytes = b""


class Grounds(NamedTuple):
    """The ballot of a create, and the sequence of the floor that it names. From before any of the data that the create
    refers to was on a disk (``consensus.floors``).
    """

    ballot: Ballot
    floor: int


class Unasked(NamedTuple):
    """A create of data that is durable. ``change``: what the update makes of nothing."""

    grounds: Grounds
    change: Change


class Registers(Protocol):
    async def read(self, name: RegisterName, *, want_payload: bool = False, settling_nonce: bytes = b"") -> Reading:
        """Linearizable. One round trip when a majority reports the same ballot, else it settles first.

        Raises ServiceUnavailable without a majority, NoSuchBucket when it must settle a register of a fenced scope
        without the fence's nonce.
        """

    def try_read(self, name: RegisterName, want_payload: bool, on_done: Callable[[Reading | None], None]) -> None:
        """As ``read``, without a task. ``on_done`` is called once, perhaps before this returns, and must not raise.
        None: it is not the common case, and ``read`` has to be called.
        """

    def grounds(self, name: RegisterName) -> Grounds | None:
        """Of a create, to be taken before any of the data that it will refer to is on a disk. None: the register was
        probably written, or a create is not safe or likely to be in vain now.
        """

    async def change(
        self,
        name: RegisterName,
        update: Update,
        *,
        small: SmallCopies | None = None,
        ready: Awaitable[None] | None = None,
        settling_nonce: bytes = b"",
        regardless: bool = False,
        unasked: Unasked | None = None,
    ) -> Outcome:
        """Compare-and-set: prepare, ``update`` on what the prepare found, accept. Returns after a majority has the
        result on disk.

        ``ready`` is awaited between prepare and accept (the barrier of the fragments); the prepare overlaps it. It may
        wait until ``update`` has run, which shows that there is a promise: what is seen after that no garbage collector
        deletes. When it raises, nothing is accepted, and this raises its exception. It is awaited once. When ``update``
        runs again, under another promise, a garbage collector may be what pre-empted this change: an update of what has
        fragments raises then (``objects.write.commit``).

        ``regardless``: ``update`` makes the same change whatever the register holds. So it may be proposed before any
        replica was asked, in one round trip, where the register was probably never written. What it then overtakes
        unseen (``consensus.register``) is not in the outcome, and its data is left to the garbage collector. A history
        stays (``consensus.overtaking``): then the register holds more than the change says. With ``ready`` only an
        ``unasked`` change is proposed so. When that is not taken, all goes on as without it: ``update`` runs, and
        ``ready`` is awaited.

        Raises ServiceUnavailable when no majority answered a prepare (nothing changed). OutcomeUnknown when an accept
        may have been applied and could not be settled, or when copies of ``small`` could not be synced where they must
        be. NoSuchBucket when the scope is fenced, as ``settle`` says, unless ``settling_nonce`` is the fence's: with it
        values can be settled, and changed if the fence lends, never without asking first. ValueError for ``regardless``
        outside of the table OBJECT (``register.may_create``). And what ``update`` raises.
        """

    def try_change(
        self,
        name: RegisterName,
        update: Update,
        on_outcome: OnOutcome,
        *,
        small: SmallCopies | None = None,
        regardless: bool = False,
    ) -> bool:
        """As ``change``, without a task when no other change is in the way. ``on_outcome`` is called once, perhaps
        before this returns, and must not raise. False: nothing was begun, and ``change`` has to be called, which says
        why.
        """

    async def settle(self, name: RegisterName, *, settling_nonce: bytes = b"") -> Value | None:
        """A committed identity round at a new ballot. Afterwards no earlier promise or unfinished accept can take
        effect; a create may, at a replica that holds nothing (``consensus.looks``). It also brings replicas that lag,
        or whose row is damaged, up to date.

        Raises ServiceUnavailable when it could not be committed; NoSuchBucket for a fenced scope whose nonce this is
        not, with the detail ``final`` when the fence stays for ever, or ``lends`` when it lends: so says a majority.
        """

    async def agreement(self, name: RegisterName) -> list[ReplicaState]:
        """What each replica of the register holds, in the order of the ring (for ``where``): a snapshot, nothing is
        settled.
        """

    async def accepted_everywhere(self, name: RegisterName, usable: Callable[[Value], bool]) -> bool | None:
        """Whether every replica has accepted the value of a change that was made before this call, or a later value.
        None: a replica does not answer. ``usable(value)``: whether the value is that one, another proposal of the same
        change, or derived from one of these. A snapshot: nothing is settled.
        """

    async def outdated(self, name: RegisterName, usable: Callable[[Value], bool]) -> bool:
        """Whether a quorum reports something newer than each usable value that some replica holds. A snapshot: nothing
        is settled.
        """

    async def held_by_quorum(self, name: RegisterName, usable: Callable[[Value], bool]) -> Value | None:
        """The usable value that a quorum of the replicas holds, under whatever ballots; None when there is none. A
        snapshot: nothing is settled.
        """


class Pages(Protocol):
    """Immutable, content-addressed values that large records point to (manifests of more than 32 parts)."""

    async def put_page(self, near: RegisterName, body: bytes, name: bytes = b"") -> bytes:
        """Returns the page's name (``hashes.page_hash``) once a majority of the replicas of ``near`` has it synced.
        ``name``: of a page that is put again, which keeps it.
        """

    async def get_page(self, near: RegisterName, name: bytes) -> bytes:
        """From any replica; verified against the hash. Raises DataDamaged when none has it that answers, and PageLost
        when all of them say that they lack it: a page is on a majority before a record names it, so it is lost.
        """


class PageCopies(Pages, Protocol):
    """What repair needs besides: pages on single disks."""

    async def pages_missing(self, disk: str, hashes: Sequence[bytes]) -> tuple[bytes, ...]:
        """Those of up to ``messages.PAGES_A_CHECK`` pages that the disk does not have whole. Raises PeerError."""

    async def copy_page(self, near: RegisterName, page_hash: bytes, disk: str) -> None:
        """Puts a page of ``near`` that a replica has, verified, on one disk. Raises PeerError, and as ``get_page``."""


class Row(NamedTuple):
    key: bytes
    value: Value


@dataclass(frozen=True)
class ListPage:
    """``rows`` in key order and ``prefixes`` (each the common prefix, delimiter included) in order, together at most
    ``limit`` entries.

    ``next_after`` is what to pass as ``after`` for the next page, None at the end. It lies after everything returned:
    for a common prefix it is the prefix followed by bytes that sort after any of its keys (``list_after_prefix``).
    """

    rows: tuple[Row, ...] = ()
    prefixes: tuple[bytes, ...] = ()
    next_after: bytes | None = None


class HeadPage(NamedTuple):
    """As ListPage, with the heads of the bodies (``meta.storage.row_head``) in place of values: ``heads[i]`` is of
    ``keys[i]``. ``again``: most of it was listed before, and so it may be listed once more.
    """

    keys: Sequence[bytes]
    heads: Sequence[bytes]
    prefixes: Sequence[bytes] = ()
    next_after: bytes | None = None
    again: bool = False


class PageQuery(NamedTuple):
    """Asks for a page of the rows of these shards with key > ``after`` and the prefix, in key order. With a delimiter,
    keys with a common prefix after ``prefix`` are one entry. ``hidden``: HIDDEN rows too.

    ``settling_nonce`` is the fence's: rows of a fenced scope settle only with it. ``after_fence``: only replicas that
    hold this fence count, for the scan that decides whether a bucket being deleted is empty. All that answer have to
    agree on a key that one of them shows, or it is settled: one replica that lies and one that lags are no proof.
    """

    table: int
    scope: bytes
    shards: Sequence[int]
    prefix: bytes = b""
    after: bytes = b""
    delimiter: bytes = b""
    limit: int = 1000
    hidden: bool = False
    settling_nonce: bytes = b""
    after_fence: bool = False


class Scanner(Protocol):
    async def list_page(self, wanted: PageQuery) -> ListPage:
        """Settled LIVE rows (with ``hidden`` also HIDDEN ones), never tombstones.

        A row on which no majority agrees is settled before it is returned. Raises ServiceUnavailable when a shard has
        no majority.
        """

    async def list_heads(self, wanted: PageQuery) -> HeadPage:
        """The LIVE rows that ``list_page`` would return, of each only its body's head, or the whole body where it has
        none. The page is cached in bounded memory, and a majority confirms it when it is listed again.
        """

    def rows_anywhere(self, wanted: PageQuery, *, everyone: bool = True) -> AsyncIterator[Row]:
        """The LIVE rows (with ``hidden`` also HIDDEN ones) of one shard that any of its replicas has; where these
        differ, each. Nothing is settled: this shows what is *not* there, though some replicas lag and one may lie.
        Raises ServiceUnavailable unless every replica answers; without ``everyone`` a majority. Of ``wanted`` only
        table, scope, shard, prefix and ``hidden`` count.
        """

    def forget(self, scope: bytes) -> None:
        """Drops a bucket's listings from the cache."""


class Fences(Protocol):
    """A bucket's fence, by its id, on a majority of the replicas of every shard (object, upload and part rows
    alike).
    """

    async def fence(
        self, scope: bytes, shards: Sequence[int], nonce: bytes, *, final: bool = False, lends: bool = False
    ) -> bool:
        """Durable refusal of every accept but settling ones with this nonce; ``final`` makes it stay for ever (after
        Deleted). One that may be lifted waits for all replicas that answer: the scan that follows counts these alone.
        ``lends``: changes with this nonce pass too, until the fence is made final or is lifted (``acceptor.fences``).

        True when every replica of every shard has done it. Raises ServiceUnavailable where a majority has not; nodes
        that know no fence that lends have not done that.
        """

    async def unfence(self, scope: bytes, shards: Sequence[int], nonce: bytes) -> bool:
        """On the way back to Active only, also of a fence that lends; a final fence stays. True when every replica has
        lifted it. A replica that was away keeps its fence, and refuses the bucket when it returns, so this must be
        called again until then. One that hangs is waited for shortly: the bucket is in use.
        """


# --- replicas ---------------------------------------------------------------------------------------------------------


class Replica(Protocol):
    """One disk as an acceptor: ``meta.acceptor.replica`` in this process, ``meta.transport.replicas`` over RPC.
    Refusals are verdicts in the replies.

    Raises PeerUnreachable, DiskUnusable (failed, foreign, retired or unknown to its node), PeerRefused.
    """

    async def prepare(self, request: messages.Prepare, *, timeout_s: float = 10.0) -> messages.PrepareReply: ...

    async def accept(
        self, request: messages.Accept, body: Sequence[Buffer] = (), *, timeout_s: float = 10.0
    ) -> messages.AcceptReply:
        """Or a Create."""

    async def read(self, request: messages.Read, *, timeout_s: float = 10.0) -> tuple[messages.ReadReply, memoryview]:
        """The bulk bytes are the payload, when there is one."""

    async def page_put(self, request: messages.PagePut, *, timeout_s: float = 10.0) -> messages.PageReply: ...

    async def page_get(self, request: messages.PageGet, *, timeout_s: float = 10.0) -> messages.PageReply: ...

    async def page_check(self, request: messages.PageCheck, *, timeout_s: float = 10.0) -> messages.PagesMissing: ...

    async def fence(self, request: messages.FenceSet, *, timeout_s: float = 10.0) -> messages.FenceReply: ...

    async def unfence(self, request: messages.FenceLift, *, timeout_s: float = 10.0) -> messages.FenceReply: ...

    async def fence_epoch(self, request: messages.EpochFence, *, timeout_s: float = 10.0) -> messages.EpochReply: ...

    async def scan(self, request: ScanRequest, *, timeout_s: float = 10.0) -> ScanReply: ...


class TryReplica(Replica, Protocol):
    """What a replica may do besides: be asked without a task."""

    def try_call(
        self, request: Message, on_reply: OnReply, *, body: Sequence[Buffer] = (), timeout_s: float = 10.0
    ) -> bool:
        """A Prepare, Accept, Create, Read or ScanRequest, as ``cluster.ports.TryCaller``. False: the replica's method
        of that name has to be called instead.
        """


@runtime_checkable
class TurnReplica(Protocol):
    """What a replica may do besides: queue processes that compete for a register. Safety never depends on it."""

    async def turn(self, request: messages.Turn, *, timeout_s: float = 10.0) -> messages.TurnReply:
        """See ``messages.Turn``. It is answered within a second, granted or not."""


class Handover(Protocol):
    """What the mover of a partition asks of a replica besides. Raises as ``Replica``."""

    async def fences(self, request: messages.FencesAsk, *, timeout_s: float = 10.0) -> messages.FencesReply: ...

    async def take_fences(self, request: messages.FencesTake, *, timeout_s: float = 10.0) -> messages.FenceReply:
        """Durable when it returns. A scope keeps what is newer there."""

    async def ranges(self, request: messages.RangesAsk, *, timeout_s: float = 10.0) -> messages.RangesReply: ...


class Floors(Protocol):
    """The floors of one disk (``consensus.floors``). Raises as ``Replica``."""

    async def set_floor(self, request: messages.FloorSet, *, timeout_s: float = 10.0) -> messages.FloorReply: ...

    async def expunge(self, request: messages.Expunge, *, timeout_s: float = 10.0) -> messages.ExpungeReply: ...

    async def floors(self, request: messages.FloorsAsk, *, timeout_s: float = 10.0) -> messages.FloorsReply: ...

    async def take_floors(self, request: messages.FloorsTake, *, timeout_s: float = 10.0) -> messages.FloorReply:
        """Durable when it returns. A range keeps a higher floor that is there."""


@runtime_checkable
class HandoverReplica(Protocol):
    """A replica of a partition that may move, and whose deleted keys may be expunged."""

    @property
    def handover(self) -> Handover: ...

    @property
    def floors(self) -> Floors: ...


OnAnswer = Callable[[str, Any, memoryview], None]
"""``on_answer(disk, answer, bulk)`` gets the reply, or a StoragedError in its place. It must not raise."""


class LocalTryReplica(TryReplica, Protocol):
    """What a replica of this process may do besides: be asked with a request that it shares with others."""

    def try_call_shared(self, request: Message, header: bytes, body: Sequence[Buffer], on_answer: OnAnswer) -> bool:
        """A Prepare, Accept or Create that names no disk, and an accept's header and body for this one. ``on_answer``
        is called once, perhaps before this returns. False: it has to wait, and the replica's method of that name has to
        be called instead.
        """


class RemoteTryReplica(TryReplica, Protocol):
    """What a replica of another node may do besides: be asked with an encoding that it shares with others."""

    def try_call_encoded(
        self,
        kind: type[Message],
        first: bytes,
        tail: bytes,
        on_reply: OnReply,
        body: Sequence[Buffer],
        timeout_s: float,
    ) -> bool:
        """As ``try_call``, of a request whose encoding is ``first`` before the disk (the same for all of its kind), and
        ``tail`` after it.
        """


class Replicas(Protocol):
    """Every disk's acceptor by disk id."""

    def replica(self, disk_id: str) -> Replica:
        """Raises DiskUnusable for a disk that no known layout names."""
