"""What an acceptor needs of its disk: a store for rows, fences and pages, and the small copies beside them.

``meta.storage`` implements ``MetaStore`` with LMDB after a redo log, ``tests/doubles`` in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from msgspec import Struct

from storaged.disk_health import DiskHealth
from storaged.errors import DiskUnusable, StoragedError
from storaged.meta.names import Ballot, RegisterName, Value
from storaged.wire import Buffer

T = TypeVar("T")


class Slot(NamedTuple):
    """One register at one acceptor as it is on disk: the highest accepted ballot and its value.

    ``copied``: the value names a small copy, and that was durable on this disk when the value was accepted. It stays,
    whatever becomes of the copy. A row that was written before rows had this bit counts as accepted with its copy.
    """

    name: RegisterName
    ballot: Ballot
    value: Value
    copied: bool = False


@dataclass(frozen=True)
class Fence:
    """``final``: it stays for ever. ``lends``: changes with its nonce pass, too (``acceptor.fences``); never of a final
    one.
    """

    scope: bytes
    nonce: bytes
    final: bool
    lends: bool = False


class StoredPage(NamedTuple):
    """``page_hash``: xxh3-128 of ``body``. ``created_ms``: when it was put last, by the clock of the disk's node; one
    more than it was where the clock does not say more, so that every put changes it. ``owner``: the packed name of the
    object's register whose record names it, or will; empty: not known.
    """

    page_hash: bytes
    body: bytes
    created_ms: int
    owner: bytes = b""


class StoreBatch(Struct):
    """What one group commit writes. A page that is there already gets the new age, and the owner if the
    batch has one; else it keeps its own. ``meta`` are small named values
    (high-water ballot, epoch fence, store id). ``gone``: registers whose rows are
    deleted; none of ``slots``.
    """

    slots: Sequence[Slot] = ()
    fences: Sequence[Fence] = ()
    unfence: Sequence[bytes] = ()
    pages: Sequence[StoredPage] = ()
    meta: dict[str, bytes] = {}
    gone: Sequence[RegisterName] = ()


class StoreFull(DiskUnusable):
    """The store has no room at the moment. The batch was not begun; the store goes on."""


Done = Callable[[StoragedError | None], None]
"""``done(error)``: called once, on the event loop; None when all went well. It must not raise."""


class Copy(NamedTuple):
    """A small object's copy as one disk has it: the encoded header of its fragment, and the whole payload, verified."""

    header: bytes
    payload: memoryview


class Copies(Protocol):
    """The small copies of one replica's disk."""

    def keep(
        self,
        header: bytes,
        body: Sequence[Buffer],
        batch: StoreBatch,
        done: Kept,
        *,
        settling: bool = False,
        check: bytes = b"",
    ) -> None:
        """Commits the batch to the replica's store and makes the copy durable, with it or before; then calls ``done``
        on the event loop. ``settling``: of a round that only settles. A full disk takes its copies too, for a while:
        else a key whose record is not confirmed could not be read until there is room. ``check``: as in
        ``ports.SmallCopies``.
        """

    def holds(self, data_id: bytes, *, was_durable: bool) -> bool:
        """Whether a copy is durable on this disk, as far as is known without reading it. ``was_durable``: a row of
        this disk says that it was, when it was accepted.
        """

    def peek(self, data_id: bytes) -> memoryview | None:
        """The copy's payload, when it is in memory; None when it is not, or not whole: ``load`` says which."""

    async def load(self, data_id: bytes) -> Copy | None:
        """None when this disk has none that is whole: it has none, or what it read does not have its checksum. Raises
        StoragedError when it can't tell, because a read failed.
        """


Kept = Callable[[StoragedError | None, StoragedError | None], None]
"""``done(copy, batch)``: why the copy was not stored (then the batch was not committed either), and why the batch was
not. It must not raise.
"""


class Stamps(NamedTuple):
    """Of some rows in order: their stamps one after the other, how many they are, the bytes of the rows, the key of the
    last one (empty without rows), and whether there are more. ``keys`` of all of them where that was asked for.
    """

    stamps: bytes
    rows: int
    row_bytes: int
    last: bytes
    more: bool
    keys: Sequence[bytes] = ()


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
    the last checkpoint. ``largest_group`` in operations. ``damaged_rows``: met since the store was opened.
    """

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
    """One disk's acceptor state. Reads see only what is synced; they are short and may be called on the event loop.
    There each may raise NotInMemory, but for ``row`` and ``rows``: the disk would have to be waited for. ``read`` and
    ``load`` do that.
    """

    async def read(self, call: Callable[[], T]) -> T:
        """The result of a call that reads this store: it is made here, or by a thread of the disk when it has to wait
        for the disk. Raises what the call raises, SlowDown, and DiskUnusable on a disk that hangs.
        """

    def start(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Begins work in a thread of the disk. Raises SlowDown, DiskUnusable."""

    async def load(self, missing: NotInMemory) -> None:
        """Brings into memory what a read missed; the read then has it, unless it was written or forgotten meanwhile.
        Raises as ``read``.
        """

    @property
    def health(self) -> DiskHealth:
        """Of the disk."""

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
        it is damaged or not in memory. One short snapshot.
        """

    def get_fence(self, scope: bytes) -> Fence | None: ...

    def get_page(self, page_hash: bytes) -> bytes | None:
        """Raises RowDamaged when the page does not have its hash."""

    def pages(self, *, after: bytes, limit: int) -> list[tuple[bytes, int]]:
        """(hash, created ms) of pages with a hash > ``after``, in the order of their hashes; unverified."""

    def page_owners(self, hashes: Sequence[bytes]) -> list[bytes]:
        """Of each page the ``owner``; empty where none is known, or no such page is there. One short snapshot."""

    def get_meta(self, key: str) -> bytes | None: ...

    def fenced_scopes(self, *, after: bytes, limit: int) -> list[bytes]:
        """The scopes > ``after`` that have a fence, in order."""

    def meta_names(self, prefix: str, *, after: str, limit: int) -> list[str]:
        """The names of small values that begin with ``prefix`` and are > ``after``, in order."""

    def slice(self, wanted: RowRange) -> list[tuple[bytes, bytes]]:
        """The rows of the range in key order, tombstones included, in one short snapshot: (key, the row's bytes as
        rowvalue lays them out, unverified). Raises RowDamaged where a page or a link is damaged.
        """

    def columns(self, wanted: RowRange) -> tuple[list[bytes], list[bytes], bool]:
        """As slice, but the keys and the rows apart, for work on all of them at once; and whether there are more."""

    def stamps(self, wanted: RowRange, *, with_keys: bool = False) -> Stamps:
        """The stamps of the rows that ``columns`` would return (``rowvalue.stamps_of``), without reading the rest of
        the rows.
        """

    def shard_sum(self, prefix: bytes) -> int | None:
        """The sum of the checks of all rows of a shard (table || scope || shard), modulo 2^64, without a look at the
        rows. None where it is not known now; it may be later.
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

        Raises DiskUnusable when the disk refused; the store is then read-only for ever. Raises StoreFull for a batch
        that was not begun.
        """

    def post(self, batch: StoreBatch, done: Done) -> None:
        """As ``commit``, but returns at once and calls ``done`` on the event loop with None, or with what ``commit``
        raises. Raises ValueError, DiskUnusable, StoreFull, or SlowDown (too many wait for this disk) for a batch that
        was not begun.
        """

    async def delete_pages(self, pages: Sequence[tuple[bytes, int]]) -> int:
        """Deletes those of these pages whose ``created_ms`` is still the one given: a page that was put again
        meanwhile stays. Returns how many, when it is durable. Raises as ``commit``.
        """

    async def close(self) -> None: ...


class RowDamaged(Exception):
    """The check of a row, a page or a small value does not hold."""


Place = tuple[bytes, bytes]
"""What a read was for: table || scope || shard and key of a row, or sub-database and key of a small value."""


class NotInMemory(Exception):
    """A read on the event loop would have to wait for the disk. ``place``: None for a read of more than one row."""

    def __init__(self, place: Place | None = None) -> None:
        super().__init__("the disk would have to be waited for")
        self.place = place
