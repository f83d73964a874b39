"""Operations on a disk's fragments, and a model of what must be there after any end: for tests that kill processes and
cut the power.

The model keeps for every fragment the last durable state, and the states that were asked since. After a cut the disk
holds one of these as a whole, and nothing else.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import msgspec

from storaged.errors import StoragedError
from storaged.fragments.compact import Compactor
from storaged.fragments.engine import Engine
from storaged.fragments.index import Index
from storaged.fragments.index_rows import Checkpoint
from storaged.fragments.limits import StoreLimits
from storaged.fragments.ports import Retirement
from storaged.fragments.write import Write
from tests.worlds.fragments import Made, make

SMALL = StoreLimits(
    segment_bytes=96 * 1024,
    overlay_entries_max=12,
    replay_bytes_max=160 * 1024,
    note_reserve_bytes=0,
    reserve_bytes=1,
    compact_step_bytes=20_000,
)
"""So that segments fill, are compacted and go away within a short history."""

IDS = 14
LENGTHS = (0, 40, 700, 4112, 9000, 66_000)

T = TypeVar("T")


@dataclass
class Fate(Generic[T]):
    """``durable``: what a cut cannot take. ``since``: what was asked after that; any of it may have
    reached the disk.
    """

    durable: T | None = None
    since: list[T | None] = field(default_factory=list)

    def settle(self) -> None:
        if self.since:
            self.durable = self.since[-1]
            self.since = []

    @property
    def latest(self) -> T | None:
        return self.since[-1] if self.since else self.durable

    @property
    def allowed(self) -> list[T | None]:
        return [self.durable, *self.since]

    def found(self, value: T | None) -> None:
        """What a disk has after its start is durable."""
        self.durable, self.since = value, []


class FragmentHistory:
    """Acts on one engine after the other, as its disk is opened again and again."""

    engine: Engine
    index: Index
    compactor: Compactor

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.fragments: dict[bytes, Fate[Made]] = {}
        self.garbage: dict[bytes, Fate[int]] = {}
        self.written: dict[bytes, list[Made]] = {}
        """All that was ever asked for, by key."""
        self.ids = [make(rng, 0).id for _ in range(IDS)]
        self.compacted_bytes = self.punched_bytes = 0
        self.checkpoint: Checkpoint | None = None

    def begin(self, engine: Engine) -> None:
        """An engine that has recovered."""
        self.engine, self.index = engine, engine.index
        self.compactor = Compactor(engine)
        self.checkpoint = engine.unwritten

    def end(self) -> None:
        """The engine is used no more."""
        self.compacted_bytes += self.engine.compacted_bytes
        self.punched_bytes += self.engine.punched_bytes

    def settle(self) -> None:
        for fate in (*self.fragments.values(), *self.garbage.values()):
            fate.settle()

    # --- what may happen

    def write(self) -> None:
        batch: list[Write] = []
        before: list[Made | None] = []
        for fragment in self.rng.sample(self.ids, self.rng.randint(1, 4)):
            length = self.rng.choice(LENGTHS)
            made = make(self.rng, length, fragment=fragment, created_ms=self.rng.randint(1, 1000))
            fate = self.fragments.setdefault(made.header.id, Fate())
            before.append(fate.latest)
            fate.since.append(made)
            self.written.setdefault(made.header.id, []).append(made)
            batch.append(Write.of(made.header, [made.payload]))
        errors = self.engine.append(batch)
        for write, latest, error in zip(batch, before, errors, strict=True):
            if error is not None:  # a cut may still find it
                self.fragments[write.key].since.append(latest)
        if refused := [error for error in errors if error is not None]:
            raise refused[0]

    def delete(self) -> None:
        keys = [fragment.pack() for fragment in self.rng.sample(self.ids, self.rng.randint(1, 3))]
        with self._as_before_if_refused():
            for key in keys:
                if key in self.fragments:
                    self.fragments[key].since.append(None)
                if self.index.lookup(key) is not None and self.index.retired(key[:16]) is not None:
                    self.garbage[key[:16]].since.append(None)
            self.engine.delete(keys)

    def touch(self) -> None:
        key = self.rng.choice(self.ids).pack()
        fate = self.fragments.get(key)
        if fate is None or fate.latest is None:
            return
        header = fate.latest.header
        created_ms = max(self.rng.randint(1, 1000), header.created_ms + 1)
        with self._as_before_if_refused():
            for made in fate.allowed:  # a cut may take the newest record and leave the touch: it renews the one before
                if made is not None:
                    touched = replace(made, header=msgspec.structs.replace(made.header, created_ms=created_ms))
                    fate.since.append(touched)
            self._renew_written(key, created_ms)
            self.engine.touch([key], created_ms)

    def _renew_written(self, key: bytes, created_ms: int) -> None:
        """Notes as written what a touch may leave on a drive that fails. There any body that was ever written may be
        the newest one, whatever its fate says here. Its age is then another one as well, and the touch exceeds it.
        """
        written = self.written[key]
        ages = {max(created_ms, made.header.created_ms + 1) for made in written}
        originals = {made.header.part_header: made for made in reversed(written)}
        known = {(made.header.part_header, made.header.created_ms) for made in written}
        for made in originals.values():
            later = {age for age in ages if age > made.header.created_ms}
            for age in sorted(age for age in later if (made.header.part_header, age) not in known):
                written.append(replace(made, header=msgspec.structs.replace(made.header, created_ms=age)))

    def retire(self) -> None:
        data_id = self.rng.choice(self.ids).data_id
        fate = self.garbage.setdefault(data_id, Fate())
        with self._as_before_if_refused():
            if self.index.retired(data_id) is None:
                fate.since.append(self.rng.randint(0, 9))
                self.engine.retire([Retirement(data_id, b"owner", fate.since[-1] or 0)])
            else:
                fate.since.append(None)
                self.engine.unretire(data_id)

    @contextlib.contextmanager
    def _as_before_if_refused(self) -> Iterator[None]:
        """What a full drive refuses has not happened, though a cut may still find it."""
        fates = [*self.fragments.values(), *self.garbage.values()]
        before = [(fate, len(fate.since), fate.latest) for fate in fates]
        try:
            yield
        except (StoragedError, OSError):
            for fate, count, latest in before:
                if len(fate.since) > count:
                    fate.since.append(latest)
            raise

    def sync(self) -> None:
        self.engine.log.sync()
        self.settle()

    def sync_apart(self) -> None:
        self.engine.log.sync_apart()
        self.settle()

    def begin_checkpoint(self) -> None:
        if self.checkpoint is None:
            self.checkpoint = self.engine.freeze()
            self.settle()

    def end_checkpoint(self) -> None:
        if self.checkpoint is not None:
            self.engine.commit(self.checkpoint)
            checkpoint, self.checkpoint = self.checkpoint, None
            self.engine.thaw(checkpoint)

    def compact(self) -> None:
        self.compactor.step(self.engine.limits.compact_step_bytes)

    def punch(self) -> None:
        self.engine.punch()

    def act(self) -> None:
        self.rng.choice((
            self.write, self.write, self.write, self.delete, self.touch, self.retire, self.sync, self.sync_apart,
            self.begin_checkpoint, self.end_checkpoint, self.compact, self.compact, self.punch, self.punch,
        ))()  # fmt: skip

    # --- what must hold

    def check(self) -> None:
        """After a start. What was found is durable."""
        for key, fate in self.fragments.items():
            fate.found(self._fragment(key, fate))
        for data_id, due in self.garbage.items():
            row = self.index.retired(data_id)
            found = row.due_ms if row is not None else None
            assert found in due.allowed, f"garbage entry {data_id.hex()}"
            due.found(found)
        self.check_accounts()

    def _fragment(self, key: bytes, fate: Fate[Made]) -> Made | None:
        if self.index.lookup(key) is None:
            assert None in fate.allowed, f"lost {key.hex()}"
            return None
        read = self.engine.reader.read(key, 0, 1000)
        content = b"".join(cell for cell in read.cells if cell is not None)
        same = [one for one in fate.allowed if one is not None and one.payload == content and one.header == read.header]
        assert same, f"{key.hex()} holds what was never written, or was deleted before"
        return same[-1]

    def check_accounts(self) -> None:
        live: dict[int, int] = {}
        for _, entry in self.index.entries():
            live[entry.segment] = live.get(entry.segment, 0) + entry.record_bytes
        for data_id in self.garbage:
            row = self.index.retired(data_id)
            if row is not None:
                live[row.segment] = live.get(row.segment, 0) + row.record_bytes
        accounts = self.index.accounts
        assert {number: use.live for number, use in accounts.segments.items() if use.live} == live
        assert self.index.fragments == sum(1 for _ in self.index.entries())
        assert accounts.live_bytes == sum(live.values())
        assert set(accounts.segments) == set(self.engine.log.segments) == set(self.engine.files.segments())
