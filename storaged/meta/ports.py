"""The ring as ``objects`` and ``maintain`` use it, and the ports under it.

objects, maintain
    |  Registers, Pages, Scanner      (meta.client, meta.listing: quorums over replicas)
    |  Replica                        (meta.replica: one acceptor; meta.remote: the same over RPC)
    |  MetaStore                      (meta.store: LMDB behind a redo log; tests/doubles: in memory)
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from msgspec import Struct

from storaged.cluster.ports import OnReply
from storaged.errors import StoragedError
from storaged.meta import messages
from storaged.meta.messages import ScanReply, ScanRequest
from storaged.meta.names import Ballot, Change, RegisterName, Value
from storaged.wire import Buffer, Message

Update = Callable[[Value | None], Change | None]
"""Pure: the settled value (None: never written) -> what it should become, or None to leave it as it is.

It may run several times, after each pre-emption on the newer value. It may raise: the exception reaches the caller of
``change``,
after the value that it judged was settled (a failed condition is a read).
"""


class Reading(NamedTuple):
    """A settled value. ``payload`` holds the copy of a small object when it was asked for and the replica that answered
    had it.
    """

    value: Value | None
    payload: memoryview | None = None


class Outcome(NamedTuple):
    """``before``: the settled value that the update saw last; None too when it saw none and yet has overwritten
    something (``try_change``). ``after``: what the register holds
    now (``before`` when nothing changed)."""

    before: Value | None
    after: Value | None


Changed = Callable[[Outcome | Exception], None]
"""``changed(outcome)``: what ``change`` would return or raise."""


class ReplicaState(NamedTuple):
    """``state``: ``current`` (has the newest value any replica reported), ``behind``, ``empty`` (never heard of the
    register), ``damaged``, or ``away``.
    ``has_payload``: it holds the copy of the small object that the newest value names."""

    disk: str
    state: str
    has_payload: bool = False


class SmallCopies(NamedTuple):
    """A small object's sealed bytes, to be stored by every replica of the register along with the accept, and durable
    with the record that names them or before it.

    ``fragments`` has (encoded fragment header, payload) for each replica index (0, 1, 2): built by
    ``fragments.format``, opaque here.
    ``enough`` judges the disk ids that have synced theirs (the acknowledge rule): ``change`` succeeds only when it
    holds beside the majority.
    A replica that can't store its copy accepts nothing, so the copies of a record are on a majority of its replicas
    from the moment it is chosen. A settling round
    that meets a record which no majority has confirmed yet carries the copy along to the replicas that it writes to.
    There is one exception (``meta.consensus.proposer``).
    The buffers are not to be reused afterwards: a slow replica's copy may still be on its way when ``change`` returns.
    """

    data_id: bytes
    fragments: Sequence[tuple[bytes, Sequence[Buffer]]]
    enough: Callable[[frozenset[str]], bool]


class Registers(Protocol):
    async def read(self, name: RegisterName, *, want_payload: bool = False, settling_nonce: bytes = b"") -> Reading:
        """Linearizable. One round trip when a majority reports the same ballot, else it settles first.

        Raises ServiceUnavailable without a majority, NoSuchBucket when it must settle a register of a fenced scope
        without the fence's nonce.
        """

    def try_read(self, name: RegisterName, want_payload: bool, then: Callable[[Reading | None], None]) -> None:
        """As ``read``, without a task: ``then`` is told, perhaps before this returns, and must not raise. None: it is
        not the common case, so ``read`` is to be called.
        """

    async def change(
        self,
        name: RegisterName,
        update: Update,
        *,
        small: SmallCopies | None = None,
        ready: Awaitable[None] | None = None,
        renew: Callable[[], Awaitable[None]] | None = None,
        settling_nonce: bytes = b"",
        regardless: bool = False,
    ) -> Outcome:
        """Compare-and-set: prepare, ``update`` on what the prepare found, accept; the answer comes after a majority has
        it on disk.

        ``ready`` is awaited between prepare and accept (the barrier of the fragments): the prepare overlaps it; when it
        raises, nothing is
        accepted and its exception is raised here. ``renew`` is awaited before every further prepare once ``ready`` is
        through: it makes sure that the fragments
        are still there and renews their age, for what pre-empted this change may have been the collector; it raises
        when they are gone. Raises ServiceUnavailable when no majority answered a prepare (nothing changed),
        OutcomeUnknown when an accept may have been applied and could not be settled, NoSuchBucket when the scope is
        fenced
        (unless ``settling_nonce`` is the fence's, with which values can be settled but not changed), and what
        ``update`` raises.
        A change with ``small`` whose copies could not be synced where they must be is of unknown outcome too.

        ``regardless``: whatever the register holds, ``update`` makes the same change of it. So it may be proposed
        before anybody was asked, in one round trip, where the
        register was probably never written. What it then overtakes unseen (``register``) is not in the outcome, and its
        data is left to the collector. Raises ValueError outside of the table OBJECT (``register.may_create``).
        """

    def try_change(
        self,
        name: RegisterName,
        update: Update,
        then: Changed,
        *,
        small: SmallCopies | None = None,
        regardless: bool = False,
    ) -> bool:
        """As ``change``, without a task where nobody is in the way: ``then`` is told its outcome or what it would
        raise, once, perhaps before this returns, and must not
        raise. False: nothing was begun, and ``change`` is to be called, which says why."""

    async def settle(self, name: RegisterName, *, settling_nonce: bytes = b"") -> Value | None:
        """A committed identity round at a new ballot: afterwards no earlier promise or unfinished accept can take
        effect, so what the value
        does not refer to may be deleted (but for a create that was begun less than a minute before: data is given
        longer than that). Also brings replicas that lag or whose row is damaged up to date.

        Raises ServiceUnavailable when it could not be committed; NoSuchBucket for a fenced scope, with the detail
        ``final`` when the fence stays for ever.
        """

    async def agreement(self, name: RegisterName) -> list[ReplicaState]:
        """What each replica of the register holds, in the order of the ring (for ``where``): a snapshot, nothing is
        settled.
        """

    async def held_by_quorum(self, name: RegisterName, usable: Callable[[Value], bool]) -> Value | None:
        """The usable value that a quorum of the replicas holds, under whatever ballots; None when there is none. A
        snapshot: nothing is settled.
        """


class Pages(Protocol):
    """Immutable, content-addressed values that large records point to (manifests of more than 32 parts)."""

    async def put_page(self, near: RegisterName, body: bytes, name: bytes = b"") -> bytes:
        """Its name (``hashes.page_hash``) once a majority of the replicas of ``near`` has it synced. ``name``: of a
        page that is put again, which keeps it.
        """

    async def get_page(self, near: RegisterName, name: bytes) -> bytes:
        """From any replica; verified against the hash. Raises DataDamaged when none has it."""


class PageCopies(Pages, Protocol):
    """What repair needs besides: pages on single disks."""

    async def pages_missing(self, disk: str, hashes: Sequence[bytes]) -> tuple[bytes, ...]:
        """Those of up to ``messages.PAGES_A_CHECK`` pages that the disk does not have whole. Raises PeerError."""

    async def copy_page(self, near: RegisterName, page_hash: bytes, disk: str) -> None:
        """Puts a page that some replica of ``near`` has, verified, on one disk. Raises PeerError, DataDamaged when none
        has it.
        """


class Row(NamedTuple):
    key: bytes
    value: Value


@dataclass(frozen=True)
class ListPage:
    """``rows`` in key order and ``prefixes`` (each the common prefix, delimiter included) in order, together at most
    ``limit`` entries.

    ``next_after`` is what to pass as ``after`` for the next page, None at the end. It lies behind everything emitted:
    for a common prefix
    it is the prefix followed by bytes that sort after any of its keys (``list_after_prefix``).
    """

    rows: tuple[Row, ...] = ()
    prefixes: tuple[bytes, ...] = ()
    next_after: bytes | None = None


class HeadPage(NamedTuple):
    """As ListPage, with the heads of the bodies (``meta.storage.row_head``) in place of values: ``heads[i]`` is of
    ``keys[i]``. ``again``: most of it was listed before, and so may be
    once more."""

    keys: Sequence[bytes]
    heads: Sequence[bytes]
    prefixes: Sequence[bytes] = ()
    next_after: bytes | None = None
    again: bool = False


class PageQuery(NamedTuple):
    """Asks for a page of the rows of these shards with key > ``after`` and the prefix, in key order. With a delimiter,
    keys with a common prefix after ``prefix`` are one entry. ``hidden``: HIDDEN rows too.

    ``settling_nonce`` is the fence's, for the scan that decides whether a bucket being deleted is empty: rows of a
    fenced scope settle only with it.
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

    def forget(self, scope: bytes) -> None:
        """Drops a bucket's listings from the cache."""


class Fences(Protocol):
    """A bucket's fence, by its id, on a majority of the replicas of every shard (object, upload and
    part rows alike).
    """

    async def fence(self, scope: bytes, shards: Sequence[int], nonce: bytes, *, final: bool = False) -> None:
        """Durable refusal of every accept but settling ones with this nonce; ``final`` makes it stay for ever (after
        Deleted).
        """

    async def unfence(self, scope: bytes, shards: Sequence[int], nonce: bytes) -> bool:
        """On the way back to Active only; a final fence stays. True when every replica has lifted it: one that was away
        keeps its fence, and refuses the
        bucket when it returns, so this must be asked again until then."""


# --- under the quorums
# --------------------------------------------------------------------------------------------------


class Slot(NamedTuple):
    """One register at one acceptor as it is on disk: the highest accepted ballot and its value."""

    name: RegisterName
    ballot: Ballot
    value: Value


@dataclass(frozen=True)
class Fence:
    scope: bytes
    nonce: bytes
    final: bool


class StoredPage(NamedTuple):
    """``page_hash``: xxh3-128 of ``body``. ``created_ms``: when it was put last, by the clock of the disk's node."""

    page_hash: bytes
    body: bytes
    created_ms: int


class StoreBatch(Struct):
    """What one group commit writes. A page that is there already gets the new age. ``meta`` are small named values
    (high-water ballot, epoch fence, store id).
    """

    slots: Sequence[Slot] = ()
    fences: Sequence[Fence] = ()
    unfence: Sequence[bytes] = ()
    pages: Sequence[StoredPage] = ()
    meta: dict[str, bytes] = {}


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
        self, request: Message, then: OnReply, *, body: Sequence[Buffer] = (), timeout_s: float = 10.0
    ) -> bool:
        """A Prepare, Accept, Create, Read or ScanRequest, as ``cluster.ports.TryCaller``. False: the replica's method
        of that name is to be called instead.
        """


OnAnswer = Callable[[str, Any, memoryview], None]
"""``heard(disk, answer, bulk)``: the reply, or a StoragedError in its place. It must not raise."""


class LocalTryReplica(TryReplica, Protocol):
    """What a replica of this process may do besides: be asked with a request that it shares with others."""

    def try_call_shared(self, request: Message, header: bytes, body: Sequence[Buffer], heard: OnAnswer) -> bool:
        """A Prepare, Accept or Create that names no disk, and an accept's header and body for this one. ``heard`` is
        told once, perhaps before this returns. False: something
        has to be waited for, so the replica's method of that name is to be called instead."""


class RemoteTryReplica(TryReplica, Protocol):
    """What a replica of another node may do besides: be asked with an encoding that it shares with others."""

    def try_call_encoded(
        self, kind: type[Message], first: bytes, tail: bytes, then: OnReply, body: Sequence[Buffer], timeout_s: float
    ) -> bool:
        """As ``post``, of a request whose encoding before the disk is ``first`` (the same for all of its kind), and
        behind it ``tail``.
        """


class Replicas(Protocol):
    """Every disk's acceptor by disk id."""

    def replica(self, disk_id: str) -> Replica:
        """Raises DiskUnusable for a disk that no known layout names."""


Done = Callable[[StoragedError | None], None]
"""OnRow once, on the event loop: None when all went well. It must not raise."""


class Copy(NamedTuple):
    """A small object's copy as one disk has it: the encoded header of its fragment, and the whole payload, verified."""

    header: bytes
    payload: memoryview


class Copies(Protocol):
    """The small copies of one replica's disk."""

    def keep(self, header: bytes, body: Sequence[Buffer], batch: StoreBatch, done: Kept) -> None:
        """Commits the batch to the replica's store and makes the copy durable, with it or before; then calls ``done``
        on the event loop.
        """

    def peek(self, data_id: bytes) -> memoryview | None:
        """The copy's payload, when it is in memory; None when it is not, or not whole: ``load`` says which."""

    async def load(self, data_id: bytes) -> Copy | None:
        """None when this disk has none that is whole. Raises StoragedError when it does not answer."""


Kept = Callable[[StoragedError | None, StoragedError | None], None]
"""``done(copy, batch)``: why the copy was not stored (then the batch was not committed either), and why the batch was
not. It must not raise.
"""


class Stamps(NamedTuple):
    """Of some rows in order: their stamps one behind the other, how many, their bytes together, the last one's key
    (empty without rows), and whether there are more.
    """

    stamps: bytes
    rows: int
    row_bytes: int
    last: bytes
    more: bool


class RowRange(NamedTuple):
    """Rows of one shard with key > ``after`` and the prefix, in key order, at most ``limit``."""

    table: int
    scope: bytes
    shard: int
    after: bytes
    prefix: bytes
    limit: int

    @property
    def name_prefix(self) -> bytes:
        """table || scope || shard."""
        return RegisterName(self.table, self.scope, self.shard, b"").prefix


class DirtyRanges(Protocol):
    """Whether rows of a store may have changed since they were read. Damage does not count as a change. ``prefix`` is a
    shard's: table || scope || shard.
    """

    def count_of(self, prefix: bytes) -> int:
        """The shard's count, to be read before the rows."""

    def changed_since(
        self, count: int, prefix: bytes, *, after: bytes, key_prefix: bytes, through: bytes | None
    ) -> bool:
        """Whether rows with key > ``after`` and the prefix, up to ``through`` (None: to the end), may have changed
        since the count was this.
        """


@dataclass(frozen=True)
class MetaStoreStatistics:
    """``state``: ok, read-only. ``commits``: groups of the log. ``rows`` and ``bytes_used`` (of ``map_bytes``) as of
    the last checkpoint; ``largest_group`` in
    operations; ``damaged_rows`` met since it was opened."""

    state: str
    reason: str
    commits: int
    checkpoints: int
    operations: int
    largest_group: int
    queued_batches: int
    rows: int
    bytes_used: int
    map_bytes: int
    damaged_rows: int


class MetaStore(Protocol):
    """One disk's acceptor state. Reads see only what is synced; they are short and may be called on the event loop."""

    @property
    def dirty_ranges(self) -> DirtyRanges: ...

    @property
    def store_id(self) -> bytes:
        """16 random bytes, as old as the store."""

    def get(self, name: RegisterName) -> Slot | None:
        """Raises RowDamaged when the row's check does not hold (the replica then answers nothing for it, and is
        repaired by settling).
        """

    def row(self, name: bytes) -> bytes | None:
        """As ``rows``, of one name."""

    def rows(self, names: Sequence[bytes]) -> list[bytes | None]:
        """Of each packed name the row's bytes as rowvalue lays them out, verified; empty when there is none; None when
        it is damaged. One short snapshot.
        """

    def get_fence(self, scope: bytes) -> Fence | None: ...

    def get_page(self, page_hash: bytes) -> bytes | None:
        """Raises RowDamaged when the page does not have its hash."""

    def pages(self, *, after: bytes, limit: int) -> list[tuple[bytes, int]]:
        """(hash, created ms) of pages with a hash > ``after``, in the order of their hashes; unverified."""

    def get_meta(self, key: str) -> bytes | None: ...

    def slice(self, wanted: RowRange) -> list[tuple[bytes, bytes]]:
        """The rows of the range in key order, tombstones included, in one short snapshot: (key, the row's bytes as
        rowvalue lays them out, unverified). Raises RowDamaged where a page or a link is damaged.
        """

    def columns(self, wanted: RowRange) -> tuple[list[bytes], list[bytes], bool]:
        """As slice, but the keys and the rows apart, for work on all of them at once; and whether there are more."""

    def stamps(self, wanted: RowRange) -> Stamps:
        """The stamps of the rows that ``columns`` would return (``rowvalue.stamps_of``), without reading the rest of
        the rows.
        """

    @property
    def large(self) -> bool:
        """Whether reading many rows may wait for the disk: call ``read_ahead`` first, in another thread."""

    def read_ahead(self, wanted: RowRange, *, whole: bool) -> None:
        """Brings into memory what ``columns`` reads, or (not ``whole``) ``stamps``. From any thread. Raises nothing:
        the read that follows reports what can't be read.
        """

    def scopes(self, partition: int | None = None) -> list[tuple[int, bytes, int]]:
        """Every (table, scope, shard) that has rows here, for repair's walk."""

    async def commit(self, batch: StoreBatch) -> None:
        """Returns when the batch is durable. Batches are applied in the order of the calls, many to one disk commit.

        Raises DiskUnusable when the disk refused; the store is then read-only for ever.
        """

    def post(self, batch: StoreBatch, done: Done) -> None:
        """As ``commit``, but returns at once and calls ``done`` on the event loop with None, or with what ``commit``
        raises. Raises ValueError, DiskUnusable,
        or SlowDown (too many wait for this disk), for what was not even begun."""

    async def delete_pages(self, pages: Sequence[tuple[bytes, int]]) -> int:
        """Deletes those of these pages whose ``created_ms`` is still the one given: what was put again meanwhile stays.
        How many, durably. Raises as ``commit``.
        """

    async def close(self) -> None: ...


class RowDamaged(Exception):
    """The check of a row, a page or a small value does not hold."""
