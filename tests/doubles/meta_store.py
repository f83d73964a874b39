"""``MetaStore`` in memory, for simulations: the same bytes as on LMDB, and a disk that loses what was not synced.

A commit becomes durable, and readable, when the injected ``sync`` has returned. Commits that arrive meanwhile share the
next one. ``crash`` is the power cut: it fails the commits on their way, though the first few may have reached the disk.
The object is the disk: what runs after the crash uses it again.
"""

from __future__ import annotations

import asyncio
import copy
from bisect import bisect_left, bisect_right, insort
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from storaged.cluster.layout import SYSTEM_PARTITION, partition_of
from storaged.disk_health import DiskHealth
from storaged.errors import DiskUnusable, StoragedError
from storaged.hashes import is_page
from storaged.ids import Entropy, system_entropy
from storaged.meta.names import RegisterName, Table
from storaged.meta.storage.dirty_ranges import DirtyRangeTracker
from storaged.meta.storage.rowvalue import MASK, check_number, columns_of, intact, pack_row, stamps_in, unpack_row
from storaged.meta.store_ports import (
    Done,
    Fence,
    NotInMemory,
    RowDamaged,
    RowRange,
    Slot,
    Stamps,
    StoreBatch,
    StoredPage,
)

T = TypeVar("T")

SLICE_ROWS_MAX = 10_000


async def _sync_nothing() -> None:
    """A disk that syncs in no time."""


@dataclass
class _Shard:
    """Rows of one (table, scope, shard): the keys in order, and each key's row."""

    keys: list[bytes] = field(default_factory=list)
    rows: dict[bytes, bytes] = field(default_factory=dict)


@dataclass
class _Pending:
    batch: StoreBatch
    rows: list[tuple[RegisterName, bytes]]
    deletes: Sequence[tuple[bytes, int]] = ()
    deleted: int = 0


class MemoryMetaStore:
    """``sync`` is awaited once for every group of commits (a virtual delay in simulations). ``entropy`` gives the
    store's id.
    """

    def __init__(
        self, *, sync: Callable[[], Awaitable[None]] = _sync_nothing, entropy: Entropy = system_entropy
    ) -> None:
        self.identity = entropy(16) + (1).to_bytes(8, "big")
        self.health = DiskHealth()
        self._sync = sync
        self._shards: dict[tuple[int, bytes, int], _Shard] = {}
        self._fences: dict[bytes, Fence] = {}
        self._pages: dict[bytes, StoredPage] = {}
        self._meta: dict[str, bytes] = {}
        self._pending: list[_Pending] = []
        self._turn = asyncio.Lock()
        self._posted: set[asyncio.Task[None]] = set()
        self.dirty_ranges = DirtyRangeTracker()
        self._crashes = 0
        self._reason = ""
        self.starts = self.position = 0
        """How often a process has begun with it, as the process counts; commits that are durable."""

    large = False

    @property
    def store_id(self) -> bytes:
        return self.identity[:16]

    def shard_sum(self, prefix: bytes) -> int | None:
        shard = self._shards.get((prefix[0], prefix[1:17], prefix[17]))
        return 0 if shard is None else sum(map(check_number, shard.rows.values())) & MASK

    def read_ahead(self, wanted: RowRange, *, whole: bool) -> None:
        """Everything is in memory."""

    def get(self, name: RegisterName) -> Slot | None:
        shard = self._shards.get(name[:3])
        row = None if shard is None else shard.rows.get(name.key)
        return None if row is None else unpack_row(name, row)

    def row(self, name: bytes) -> bytes | None:
        register = RegisterName.unpack(name)
        shard = self._shards.get(register[:3])
        row = b"" if shard is None else shard.rows.get(register.key, b"")
        return row if not row or intact(register.prefix, register.key, row) else None

    def rows(self, names: Sequence[bytes]) -> list[bytes | None]:
        return [self.row(name) for name in names]

    def get_fence(self, scope: bytes) -> Fence | None:
        return self._fences.get(scope)

    def get_page(self, page_hash: bytes) -> bytes | None:
        page = self._pages.get(page_hash)
        if page is not None and not is_page(page.body, page_hash):
            raise RowDamaged(f"page {page_hash.hex()} does not have its hash")
        return None if page is None else page.body

    def pages(self, *, after: bytes, limit: int) -> list[tuple[bytes, int]]:
        hashes = sorted(page_hash for page_hash in self._pages if page_hash > after)[:limit]
        return [(page_hash, self._pages[page_hash].created_ms) for page_hash in hashes]

    def page_owners(self, hashes: Sequence[bytes]) -> list[bytes]:
        found = [self._pages.get(page_hash) for page_hash in hashes]
        return [b"" if page is None else page.owner for page in found]

    def get_meta(self, key: str) -> bytes | None:
        return self._meta.get(key)

    def fenced_scopes(self, *, after: bytes, limit: int) -> list[bytes]:
        return sorted(scope for scope in self._fences if scope > after)[:limit]

    def meta_names(self, prefix: str, *, after: str, limit: int) -> list[str]:
        return sorted(name for name in self._meta if name.startswith(prefix) and name > after)[:limit]

    def slice(self, wanted: RowRange) -> list[tuple[bytes, bytes]]:
        if wanted.limit > SLICE_ROWS_MAX:
            raise ValueError(f"a slice has at most {SLICE_ROWS_MAX} rows, not {wanted.limit}")
        held = self._shards.get(wanted[:3])
        if held is None:
            return []
        first = max(bisect_right(held.keys, wanted.after), bisect_left(held.keys, wanted.prefix))
        found = []
        for key in held.keys[first : first + max(wanted.limit, 0)]:
            if not key.startswith(wanted.prefix):
                break
            found.append((key, held.rows[key]))
        return found

    def columns(self, wanted: RowRange) -> tuple[list[bytes], list[bytes], bool]:
        return columns_of(self.slice(wanted._replace(limit=wanted.limit + 1)), wanted.limit)

    def stamps(self, wanted: RowRange, *, with_keys: bool = False) -> Stamps:
        return stamps_in(*self.columns(wanted), with_keys=with_keys)

    def scopes(self, partition: int | None = None) -> list[tuple[int, bytes, int]]:
        return [
            (table, scope, shard)
            for table, scope, shard in sorted(self._shards)
            if partition is None
            or partition == (SYSTEM_PARTITION if table == Table.SYSTEM else partition_of(scope, shard))
        ]

    async def commit(self, batch: StoreBatch) -> None:
        """As the port says. The first of the waiting commits syncs for all that have arrived. A cancelled one leaves
        its batch for the next sync.
        """
        self._refuse_when_unusable()
        rows = [(slot.name, pack_row(slot)) for slot in batch.slots]
        entry = _Pending(batch, rows + [(name, b"") for name in batch.gone])
        for page in batch.pages:
            if not is_page(page.body, page.page_hash):
                raise ValueError("a page must be stored under its own hash")
        for key in batch.meta:
            if not key or key.startswith("\0"):
                raise ValueError(f"not a name for a small value: {key!r}")
        await self._write(entry)

    def post(self, batch: StoreBatch, on_done: Done) -> None:
        self._refuse_when_unusable()
        task = asyncio.get_running_loop().create_task(self._post(batch, on_done))
        self._posted.add(task)
        task.add_done_callback(self._posted.discard)

    async def _post(self, batch: StoreBatch, on_done: Done) -> None:
        try:
            await self.commit(batch)
        except StoragedError as error:
            on_done(error)
        else:
            on_done(None)

    async def delete_pages(self, pages: Sequence[tuple[bytes, int]]) -> int:
        self._refuse_when_unusable()
        entry = _Pending(StoreBatch(), [], pages)
        await self._write(entry)
        return entry.deleted

    async def _write(self, entry: _Pending) -> None:
        crashes = self._crashes
        self._pending.append(entry)
        async with self._turn:
            if crashes == self._crashes and any(waiting is entry for waiting in self._pending):
                count = len(self._pending)
                await self._sync()
                if crashes == self._crashes and not self._reason:
                    self._apply(count)
        if crashes != self._crashes:
            raise DiskUnusable("the disk lost power before this was synced")
        if self._reason and any(waiting is entry for waiting in self._pending):
            self._refuse_when_unusable()

    def _refuse_when_unusable(self) -> None:
        if self._reason:
            raise DiskUnusable(f"the metadata store takes no writes: {self._reason}")

    def _apply(self, count: int) -> None:
        self.position += count
        for entry in self._pending[:count]:
            with self.dirty_ranges.changing([(name.prefix, name.key) for name, _ in entry.rows]):
                for name, row in entry.rows:
                    shard = self._shards.setdefault(name[:3], _Shard())
                    if not row:
                        if shard.rows.pop(name.key, None) is not None:
                            shard.keys.remove(name.key)
                        continue
                    if name.key not in shard.rows:
                        insort(shard.keys, name.key)
                    shard.rows[name.key] = row
            self._fences.update((fence.scope, fence) for fence in entry.batch.fences)
            for scope in entry.batch.unfence:
                self._fences.pop(scope, None)
            for page in entry.batch.pages:
                was = self._pages.get(page.page_hash)
                if was is not None:
                    created_ms = max(page.created_ms, was.created_ms + 1)
                    page = page._replace(created_ms=created_ms, owner=page.owner or was.owner)
                self._pages[page.page_hash] = page
            for page_hash, created_ms in entry.deletes:
                held = self._pages.get(page_hash)
                if held is not None and held.created_ms == created_ms:
                    del self._pages[page_hash]
                    entry.deleted += 1
            self._meta.update(entry.batch.meta)
        del self._pending[:count]

    def crash(self, reached_disk: int = 0) -> None:
        """Power is lost: all commits on their way fail with DiskUnusable, but the first ``reached_disk`` of them are on
        the disk.
        """
        self._apply(min(reached_disk, len(self._pending)))
        self._pending.clear()
        self._crashes += 1
        self._turn = asyncio.Lock()

    def image(self) -> Any:
        """All that is durable, for ``put_back``."""
        durable = self.identity, self._shards, self._fences, self._pages, self._meta, self.starts, self.position
        return copy.deepcopy(durable)

    def put_back(self, image: Any) -> None:
        """The disk is as it was then. Nothing may be on its way."""
        self.identity, self._shards, self._fences, self._pages, self._meta, self.starts, self.position = copy.deepcopy(
            image
        )

    def fail(self, reason: str) -> None:
        """From now on the disk refuses every write, also those on their way."""
        self._reason = reason

    def damage(self, name: RegisterName) -> bool:
        """Flips one bit of a row; False when there is none."""
        shard = self._shards.get(name[:3])
        if shard is None or name.key not in shard.rows:
            return False
        shard.rows[name.key] = shard.rows[name.key][:-1] + bytes([shard.rows[name.key][-1] ^ 1])
        return True

    def page_hashes(self) -> list[bytes]:
        """Of all pages, damaged or not, as they came."""
        return list(self._pages)

    def set_version(self, name: RegisterName, version: int) -> None:
        """Puts another format version on a row, as another program would have written it."""
        rows = self._shards[name[:3]].rows
        rows[name.key] = bytes([version]) + rows[name.key][1:]

    def damage_page(self, page_hash: bytes) -> None:
        """Flips one bit of a page."""
        page = self._pages[page_hash]
        self._pages[page_hash] = page._replace(body=page.body[:-1] + bytes([page.body[-1] ^ 1]))

    def forget_page_owner(self, page_hash: bytes) -> None:
        """As of a page that a storage node copied here."""
        self._pages[page_hash] = self._pages[page_hash]._replace(owner=b"")

    async def read(self, call: Callable[[], T]) -> T:
        return call()

    def start(self, work: Callable[[], T]) -> asyncio.Future[T]:
        begun: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        begun.set_result(work())
        return begun

    async def load(self, missing: NotInMemory) -> None:
        raise AssertionError("all of it is in memory")

    async def close(self) -> None:
        """Waits for commits on their way."""
        if self._posted:
            await asyncio.wait(tuple(self._posted))
        async with self._turn:
            pass
