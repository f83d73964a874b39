"""Operations on a disk's metadata store and its small copies, and a model of what must be there after any cut or kill.

Batches are applied in their order. So after a cut the store has all acknowledged batches, and the first few of the
later ones, each as a whole. Of those that a full drive refused it may have any. A row that names a small copy is never
there without it.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from storaged.errors import StoragedError
from storaged.hashes import page_hash
from storaged.meta.names import Ballot, RegisterName, Table, Value, Visibility
from storaged.meta.storage.batch import PackedBatch
from storaged.meta.storage.rowvalue import MASK, check_number, pack_row
from storaged.meta.store_ports import Fence, Slot, StoreBatch, StoredPage
from storaged.units import KIB
from storaged.wire import encode
from tests.worlds.fragment_history import Fate
from tests.worlds.fragments import Made, make
from tests.worlds.still_disk import StillDisk

SCOPES = (bytes(range(16)), bytes(range(1, 17)))
KEYS = (b"a", b"a\0", b"b" * 200, b"b" * 479 + b"c", b"b" * 481, b"b" * 481 + b"\0", b"c/1", b"\xff" * 1041)
LENGTHS = (10, 300, 2_000, 9_000)
PAGES = 6
UNUSED_MAX = 6
"""Copies that no row names any more, and whose bytes are still compared."""

BATCH_BYTES_MAX = 16 * KIB
"""More than any batch here takes: a half of the log must have room for it."""

Key = tuple[str, Any]
Changes = dict[Key, Any]
"""New values of rows (by name), fences (by scope) and small values (by name); None: it is deleted."""


@dataclass(eq=False)
class Batch:
    changes: Changes
    pages: list[bytes] = field(default_factory=list)
    """Hashes of pages that it brings."""
    done: bool = False
    refused: bool = False
    """The drive had no room. It may have some of it, or all."""


class RecordHistory:
    """Acts on one disk after the other, as it is opened again and again."""

    disk: StillDisk

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.names = [RegisterName(Table.OBJECT, scope, 0, key) for scope in SCOPES for key in KEYS]
        self.bodies = [rng.randbytes(rng.choice(LENGTHS)) for _ in range(PAGES)]
        self.acknowledged: Changes = {}
        self.posted: deque[Batch] = deque()
        self.pages: dict[bytes, Fate[bytes]] = {page_hash(body): Fate() for body in self.bodies}
        self.copies: dict[bytes, Made] = {}
        """By data id."""
        self.unused: list[bytes] = []
        self.counter = 0
        self.refusals: list[StoragedError] = []
        self.asked: dict[Key, list[Any]] = {}
        """All that was ever asked for, by key."""

    def begin(self, disk: StillDisk) -> None:
        self.disk = disk

    # --- what may happen

    def post(self) -> None:
        for _ in range(self.rng.randint(1, 3)):
            self._post_one()

    def _post_one(self) -> None:
        rng, changes, batch = self.rng, Changes(), StoreBatch()
        for name in rng.sample(self.names, rng.randint(1, 3)):
            slot = None if rng.random() < 0.2 else self._slot(name)
            changes["row", name] = slot
            if slot is None:
                batch.gone = [*batch.gone, name]
            else:
                batch.slots = [*batch.slots, slot]
        if rng.random() < 0.2:
            scope = rng.choice(SCOPES)
            fence = None if rng.random() < 0.3 else Fence(scope, rng.randbytes(8), rng.random() < 0.5)
            changes["fence", scope] = fence
            if fence is None:
                batch.unfence = [scope]
            else:
                batch.fences = [fence]
        if rng.random() < 0.3:
            changes["value", "high"] = value = rng.randbytes(20)
            batch.meta = {"high": value}
        pages = rng.sample(self.bodies, 2) if rng.random() < 0.15 else []
        batch.pages = [StoredPage(page_hash(body), body, 7) for body in pages]
        self._post(Batch(changes, [page.page_hash for page in batch.pages]), batch)

    def _slot(self, name: RegisterName, payload: bytes = b"") -> Slot:
        self.counter += 1
        body = self.rng.randbytes(self.rng.choice(LENGTHS[:3]))
        value = Value(self.counter, self.rng.randbytes(16), Visibility.LIVE, body, payload)
        return Slot(name, Ballot(3, self.counter, "n1", b"incarnat"), value, copied=bool(payload))

    def _post(self, batch: Batch, stored: StoreBatch) -> None:
        self._remember(batch)
        self._on_loop(lambda: self.disk.meta.post(stored, partial(self._done, batch)), batch)

    def _remember(self, batch: Batch) -> None:
        for page in batch.pages:
            self.pages[page].since.append(page)
        for key, value in batch.changes.items():
            self.asked.setdefault(key, []).append(value)
        self.posted.append(batch)

    def _on_loop(self, call: Callable[[], object], batch: Batch | None = None) -> None:
        try:
            with self.disk.loop.running():
                call()
        except StoragedError as error:  # nothing was begun
            self.refusals.append(error)
            if batch is not None:
                self.posted.remove(batch)

    def _done(self, batch: Batch, error: StoragedError | None) -> None:
        if error is not None:
            self.refusals.append(error)
            batch.refused = True
            return
        batch.done = True
        for page in batch.pages:
            self.pages[page].found(page)

    def post_copy(self) -> None:
        """A small object: its row, and its copy beside it."""
        made = make(self.rng, self.rng.choice(LENGTHS), k=1, m=2)
        data_id = made.id.data_id
        slot = self._slot(self.rng.choice(self.names), data_id)
        batch = Batch({("row", slot.name): slot})
        self.copies[data_id] = made
        self._remember(batch)

        def on_done(copy: StoragedError | None, error: StoragedError | None) -> None:
            if copy is not None and batch in self.posted:
                self.refusals.append(copy)
                self.posted.remove(batch)
            else:
                self._done(batch, error)

        header, stored = encode(made.header), StoreBatch(slots=[slot])
        self._on_loop(lambda: self.disk.copies.keep(header, [made.payload], stored, on_done), batch)

    def delete_pages(self) -> None:
        page = self.rng.choice(list(self.pages))
        created = dict(self.disk.meta.pages(after=b"", limit=100)).get(page)
        if created is None or any(page in batch.pages for batch in self.posted):
            return
        self.pages[page].since.append(None)
        packed = PackedBatch(partial(self._page_gone, page), stale_pages=[(page, created)], operations=1)
        self._on_loop(lambda: self.disk.meta.post_packed(packed))

    def _page_gone(self, page: bytes, error: StoragedError | None) -> None:
        if error is not None:
            self.refusals.append(error)
        elif self.pages[page].since == [None]:
            self.pages[page].settle()

    def run(self) -> None:
        """Writes all posted batches, unless the log waits for a checkpoint."""
        self.disk.run()
        if self.disk.meta.log_full:
            self.freeze()
            self.write_frozen()
            self.disk.run()
        self._apply_done()

    def _apply_done(self) -> None:
        while self.posted and self.posted[0].done:
            _apply(self.acknowledged, self.posted.popleft().changes)

    def freeze(self) -> None:
        self.disk.meta.checkpoints.freeze()

    def write_frozen(self) -> None:
        self.disk.meta.checkpoints.write_frozen()

    def append_copies(self) -> None:
        self.disk.fragments.append()

    def delete_copies(self) -> None:
        """Deletes copies of replaced rows, as collection does: after the row that replaced them was acknowledged."""
        self._apply_done()
        used = {slot.value.payload for slot in self._slots_that_may_be()}
        unused = [data_id for data_id in self.copies if data_id not in used and data_id not in self.unused]
        if unused and not self.posted:
            self.disk.fragments.append()
            taken = self.rng.sample(unused, self.rng.randint(1, len(unused)))
            self.unused.extend(taken)
            self.disk.engine.delete([self.copies[data_id].header.id for data_id in taken])
            for data_id in self.unused[:-UNUSED_MAX]:
                self.copies.pop(data_id, None)
            del self.unused[:-UNUSED_MAX]

    def _slots_that_may_be(self) -> list[Slot]:
        found = [slot for slot in self.acknowledged.values() if isinstance(slot, Slot)]
        for batch in self.posted:
            found.extend(slot for slot in batch.changes.values() if isinstance(slot, Slot))
        return found

    def act(self) -> None:
        self.rng.choice((
            self.post, self.post, self.post, self.post_copy, self.post_copy, self.run, self.run, self.run,
            self.freeze, self.write_frozen,
            self.append_copies, self.delete_copies, self.delete_pages,
        ))()  # fmt: skip

    # --- what must hold

    def check(self) -> None:
        """To be called after a start. From now on everything that it finds must stay."""
        self._apply_done()
        found = self._found()
        applied = self._applied(found)
        assert applied is not None, f"records that were never so: {_difference(found, self.acknowledged)}"
        for page, fate in self.pages.items():
            body = self.disk.meta.get_page(page)
            assert (page if body is not None else None) in fate.allowed, f"page {page.hex()}: {body is not None}"
            fate.found(page if body is not None else None)
        for batch in applied:
            assert all(self.pages[page].durable for page in batch.pages), "a record came before its pages"
        self.acknowledged = found
        self.posted.clear()
        self.check_sums()
        self.check_copies()

    def _applied(self, found: Changes) -> list[Batch] | None:
        """The fewest batches that make what was found: all that are done, and only such as were refused are left out
        before others.
        """
        last_done = max((number for number, batch in enumerate(self.posted, 1) if batch.done), default=0)
        states: list[tuple[Changes, list[Batch]]] = [(dict(self.acknowledged), [])]
        for number in range(len(self.posted) + 1):
            if number >= last_done:
                for allowed, applied in states:
                    if found == allowed:
                        return applied
            if number < len(self.posted):
                states = _with(self.posted[number], states)
        return None

    def check_sums(self) -> None:
        slots = [slot for slot in self.acknowledged.values() if isinstance(slot, Slot)]
        for prefix in {name.prefix for name in self.names}:
            rows = [pack_row(slot) for slot in slots if slot.name.prefix == prefix]
            expected = sum(map(check_number, rows)) & MASK
            assert self.disk.meta.shard_sum(prefix) == expected, f"the sum of {len(rows)} rows is another one"

    def check_copies(self) -> None:
        named = {slot.value.payload for slot in self.acknowledged.values() if isinstance(slot, Slot)} - {b""}
        for data_id, made in self.copies.items():
            key = self.disk.engine.index.find_copy(data_id)
            if key is None:
                assert data_id not in named, f"lost the copy {data_id.hex()} of a row that is there"
                continue
            read = self.disk.engine.reader.read(key, 0, 1000)
            content = b"".join(cell for cell in read.cells if cell is not None)
            assert content == made.payload, f"the copy {data_id.hex()} has other bytes"

    def _found(self) -> Changes:
        meta, found = self.disk.meta, Changes()
        for name in self.names:
            if (slot := meta.get(name)) is not None:
                found["row", name] = slot
        for scope in SCOPES:
            if (fence := meta.get_fence(scope)) is not None:
                found["fence", scope] = fence
        if (value := meta.get_meta("high")) is not None:
            found["value", "high"] = value
        return found


def _with(batch: Batch, states: list[tuple[Changes, list[Batch]]]) -> list[tuple[Changes, list[Batch]]]:
    """What the states may become, without doubles."""
    after = list(states) if batch.refused else []
    for before, applied in states:
        allowed = dict(before)
        _apply(allowed, batch.changes)
        if all(allowed != known for known, _ in after):
            after.append((allowed, [*applied, batch]))
    return after


def _apply(state: Changes, changes: Changes) -> None:
    for key, value in changes.items():
        if value is None:
            state.pop(key, None)
        else:
            state[key] = value


def _difference(found: Changes, wanted: Changes) -> str:
    return ", ".join(str(key)[:60] for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
