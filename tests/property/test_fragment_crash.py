"""Power cuts at every kind of moment, on a simulated disk that drops, reorders and tears what was not synced.

A seed makes a history: writes, replacements, deletes, touches, garbage entries, syncs, checkpoints, holes, compaction,
and cuts in the middle of
any of them. The model keeps for every fragment what was last made durable, and what was asked since: after a cut the
disk holds one of
these, whole, and never anything else. STORAGED_SIM_SEEDS=N runs more of them; a failure names its seed.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, TypeVar

import pytest

from storaged.fragments import recovery
from storaged.fragments.compact import Compactor
from storaged.fragments.engine import Engine
from storaged.fragments.entry import Entry
from storaged.fragments.index import Index
from storaged.fragments.index_rows import Checkpoint, Position
from storaged.fragments.limits import StoreLimits
from storaged.fragments.ports import Retirement
from storaged.fragments.write import Write
from tests.doubles.files import PowerCut, SimulatedFiles
from tests.worlds.fragments import DISK, Made, in_memory, make

SEEDS = int(os.environ.get("STORAGED_SIM_SEEDS", "150"))
LIMITS = StoreLimits(
    segment_bytes=96 * 1024,
    overlay_entries_max=12,
    replay_bytes_max=160 * 1024,
    note_reserve_bytes=0,
    compact_step_bytes=20_000,
)


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


class World:
    def __init__(self, seed: int, directory: Path, *, lying: bool = False) -> None:
        self.rng = random.Random(seed)
        self.directory = directory
        self.files = SimulatedFiles(seed)
        self.files.lying = lying
        self.fragments: dict[bytes, Fate[Made]] = {}
        self.garbage: dict[bytes, Fate[int]] = {}
        self.ids = [make(self.rng, 0).id for _ in range(14)]
        self.damage: list[tuple[bytes, int]] = []
        self.compacted_bytes = self.punched_bytes = 0
        self.checkpoint: Checkpoint | None = None
        self.start()

    def start(self) -> None:
        self.index = Index(self.directory, DISK, map_bytes_max=1 << 24, durable=False)
        self.engine = Engine(
            self.files,
            self.index,
            LIMITS,
            now_ms=lambda: 0,
            on_damage=lambda key, cell: self.damage.append((key, cell)),
        )
        self.compactor = Compactor(self.engine)
        self.checkpoint = None
        self.engine.recover()
        assert not self.engine.state.failure

    def settle(self) -> None:
        for fate in (*self.fragments.values(), *self.garbage.values()):
            fate.settle()

    # --- what may happen

    def write(self) -> None:
        batch: list[Write] = []
        for fragment in self.rng.sample(self.ids, self.rng.randint(1, 4)):
            length = self.rng.choice([0, 40, 700, 4112, 9000, 66_000])
            made = make(self.rng, length, fragment=fragment, created_ms=self.rng.randint(1, 1000))
            self.fragments.setdefault(made.header.id, Fate()).since.append(made)
            batch.append(Write.of(made.header, [made.payload]))
        assert self.engine.append(batch) == [None] * len(batch)

    def delete(self) -> None:
        keys = [fragment.pack() for fragment in self.rng.sample(self.ids, self.rng.randint(1, 3))]
        for key in keys:
            if key in self.fragments:
                self.fragments[key].since.append(None)
            if self.index.lookup(key) is not None and self.index.retired(key[:16]) is not None:
                self.garbage[key[:16]].since.append(None)
        self.engine.delete(keys)

    def retire(self) -> None:
        data_id = self.rng.choice(self.ids).data_id
        fate = self.garbage.setdefault(data_id, Fate())
        if self.index.retired(data_id) is None:
            fate.since.append(self.rng.randint(0, 9))
            self.engine.retire([Retirement(data_id, b"owner", fate.since[-1] or 0)])
        else:
            fate.since.append(None)
            self.engine.unretire(data_id)

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
            checkpoint, self.checkpoint = self.checkpoint, None
            self.engine.commit(checkpoint)
            self.engine.thaw(checkpoint)

    def compact(self) -> None:
        self.compactor.step(LIMITS.compact_step_bytes)

    def punch(self) -> None:
        self.engine.punch()

    def act(self) -> None:
        acts: list[Callable[[], None]] = [
            self.write, self.write, self.write, self.delete, self.retire, self.sync, self.sync_apart, self.begin_checkpoint,  # noqa: E501
            self.end_checkpoint, self.compact, self.compact, self.punch, self.punch,
        ]  # fmt: skip
        self.rng.choice(acts)()

    def cut(self) -> None:
        """Power comes back, and may fail again while the store recovers."""
        self.compacted_bytes += self.engine.compacted_bytes
        self.punched_bytes += self.engine.punched_bytes
        while True:
            self.index.close()
            self.files.crash()
            self.files.cut_at = self.rng.choice([-1, self.rng.randint(0, 4)])
            try:
                self.start()
            except PowerCut:
                continue
            break
        self.files.cut_at = -1
        self.check()

    # --- what must hold

    def check(self) -> None:
        assert not self.damage, f"damage on a sound disk: {self.damage}"
        for key, fate in self.fragments.items():
            allowed = [fate.durable, *fate.since]
            found: Made | None = None
            if self.index.lookup(key) is None:
                assert None in allowed, f"lost {key.hex()}"
            else:
                read = self.engine.reader.read(key, 0, 1000)
                assert read is not None
                content = b"".join(cell for cell in read.cells if cell is not None)
                same = [
                    one for one in allowed if one is not None and one.payload == content and one.header == read.header
                ]
                assert same, f"{key.hex()} holds what was never written, or was deleted before"
                found = same[-1]
            fate.durable, fate.since = found, []
        for data_id, due in self.garbage.items():
            row = self.index.retired(data_id)
            assert (row.due_ms if row is not None else None) in [
                due.durable,
                *due.since,
            ], f"garbage entry {data_id.hex()}"
            due.durable, due.since = (row.due_ms if row is not None else None), []
        self.check_accounts()

    def check_accounts(self) -> None:
        live: dict[int, int] = {}
        for _, entry in self.index.entries():
            live[entry.segment] = live.get(entry.segment, 0) + entry.record_bytes
        for data_id in self.garbage:
            row = self.index.retired(data_id)
            if row is not None:
                live[row.segment] = live.get(row.segment, 0) + row.record_bytes
        assert {number: use.live for number, use in self.index.accounts.segments.items() if use.live} == live
        assert self.index.fragments == sum(1 for _ in self.index.entries())
        assert self.index.accounts.live_bytes == sum(live.values())
        assert set(self.index.accounts.segments) == set(self.engine.log.segments) == set(self.files.disks)

    def check_rebuild(self) -> None:
        """An index made from the segments alone says what this one says."""
        self.engine.log.sync()
        here = {key: entry[:8] for key, entry in self.index.entries()}
        garbage = {data_id: self.index.retired(data_id) for data_id in self.garbage}
        fresh = Index(self.directory / "rebuilt", DISK, map_bytes_max=1 << 24, durable=False)
        engine = Engine(self.files, fresh, LIMITS, now_ms=lambda: 0, on_damage=lambda _key, _cell: None)
        engine.recover()
        assert {key: entry[:8] for key, entry in fresh.entries()} == here
        for data_id, row in garbage.items():
            again = fresh.retired(data_id)
            assert (again is None) == (row is None)
            assert (
                again is None
                or row is None
                or (again.owner, again.due_ms, again.sequence) == (row.owner, row.due_ms, row.sequence)
            )
        fresh.close()
        shutil.rmtree(self.directory / "rebuilt")


def run(seed: int, directory: Path, *, lying: bool = False) -> World:
    world = World(seed, directory, lying=lying)
    for _ in range(3):
        world.files.cut_at = world.rng.choice([-1, world.rng.randint(0, 90)])
        try:
            for _ in range(60):
                world.act()
            world.check_accounts()
        except PowerCut:
            pass
        world.cut()
    world.check_rebuild()
    world.index.close()
    return world


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    with in_memory(tmp_path) as path:
        yield path


@pytest.mark.slow
def test_no_power_cut_loses_what_was_synced_or_serves_what_was_never_written(quick_path: Path) -> None:
    compacted = punched = 0
    for seed in range(SEEDS):
        try:
            world = run(seed, quick_path / str(seed))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        compacted += world.compacted_bytes
        punched += world.punched_bytes
        shutil.rmtree(quick_path / str(seed))
    assert compacted, "no history ever compacted: the test would not show what it says"
    assert punched, "no history ever punched a hole"


def test_the_simulation_notices_a_drive_that_lies_about_syncs(quick_path: Path) -> None:
    for seed in range(30):
        try:
            run(seed, quick_path / str(seed), lying=True)
        except AssertionError:
            return
    pytest.fail("a drive that syncs nothing lost nothing: the simulation proves nothing")


def punch_before_the_death_is_durable(patch: pytest.MonkeyPatch) -> None:
    original = Engine._queue_hole

    def hasty(self: Engine, old: Entry) -> None:
        original(self, old)
        if self.holes:
            self.holes[-1] = replace(self.holes[-1], after=Position(0, 0))

    patch.setattr(Engine, "_queue_hole", hasty)


def compaction_forgets_notes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Compactor, "_needed", lambda *_: None)


def torn_records_are_believed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recovery, "whole", lambda *_: True)


def segments_go_before_the_checkpoint(patch: pytest.MonkeyPatch) -> None:
    original = Engine.freeze

    def hasty(self: Engine) -> Checkpoint:
        for number in self.dead_segments():
            self.log.remove(number)
            self.index.accounts.remove(number)
        return original(self)

    patch.setattr(Engine, "freeze", hasty)


@pytest.mark.parametrize(
    "mistake",
    [
        punch_before_the_death_is_durable,
        compaction_forgets_notes,
        torn_records_are_believed,
        segments_go_before_the_checkpoint,
    ],
)
def test_the_simulation_finds_a_planted_mistake(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Callable[..., None]
) -> None:
    mistake(monkeypatch)
    for seed in range(60):
        try:
            run(seed, quick_path / str(seed))
        except Exception:
            return
    pytest.fail(f"60 seeds did not notice: {mistake.__name__}")
