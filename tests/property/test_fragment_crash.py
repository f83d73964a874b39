"""Power cuts at every kind of moment, on a simulated disk that drops, reorders and tears what was not synced.

A seed makes a history (``worlds.fragment_history``): writes, replacements, deletes, garbage entries, syncs,
checkpoints, holes, compaction, and cuts in the middle of any of them. STORAGED_SIM_SEEDS=N runs more of them; a failure
names its seed. ``tests.power_cuts`` does the same to a whole disk, with its real files and LMDB's.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from storaged.fragments.compact import Compactor
from storaged.fragments.engine import Engine
from storaged.fragments.entry import Entry
from storaged.fragments.index import Index
from storaged.fragments.index_rows import Position
from tests.doubles.files import PowerCut, SimulatedFiles
from tests.power_cuts.planted import segments_go_before_the_checkpoint, torn_records_are_believed
from tests.worlds.fragment_history import SMALL, Fate, FragmentHistory
from tests.worlds.fragments import DISK, in_memory

SEEDS = int(os.environ.get("STORAGED_SIM_SEEDS", "150"))


class World(FragmentHistory):
    def __init__(self, seed: int, directory: Path, *, lying: bool = False) -> None:
        super().__init__(random.Random(seed))
        self.directory = directory
        self.files = SimulatedFiles(seed)
        self.files.lying = lying
        self.damage: list[tuple[bytes, int]] = []
        self.start()

    def start(self) -> None:
        self.index = Index(self.directory, DISK, map_bytes_max=1 << 24, durable=False)
        engine = Engine(
            self.files,
            self.index,
            SMALL,
            now_ms=lambda: 0,
            on_damage=lambda key, cell: self.damage.append((key, cell)),
        )
        self.engine = engine
        engine.recover()
        self.begin(engine)
        assert not engine.state.failure

    def cut(self) -> None:
        """Power comes back, and may fail again while the store recovers."""
        self.end()
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

    def check(self) -> None:
        assert not self.damage, f"damage on a sound disk: {self.damage}"
        super().check()

    def check_rebuild(self) -> None:
        """An index made from the segments alone says what this one says."""
        self.engine.log.sync()
        here = {key: entry[:8] for key, entry in self.index.entries()}
        garbage = {data_id: self.index.retired(data_id) for data_id in self.garbage}
        fresh = Index(self.directory / "rebuilt", DISK, map_bytes_max=1 << 24, durable=False)
        engine = Engine(self.files, fresh, SMALL, now_ms=lambda: 0, on_damage=lambda _key, _cell: None)
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


def test_a_segment_whose_maker_was_killed_has_a_durable_name_before_anything_is_acknowledged_in_it(
    quick_path: Path,
) -> None:
    world = World(1, quick_path)
    step, world.files.step = world.files.step, lambda kind: killed(kind)  # type: ignore[method-assign]

    def killed(kind: str) -> None:
        if kind == "sync_directory":
            raise PowerCut
        step(kind)

    with pytest.raises(PowerCut):
        world.write()
    world.files.step = step  # type: ignore[method-assign]
    world.index.close()
    assert not any(disk.entry_durable for disk in world.files.disks.values())
    world.start()
    assert world.engine.log.active == 1
    assert all(disk.entry_durable for disk in world.files.disks.values())
    world.index.close()


@pytest.mark.parametrize("seed", range(6))
def test_a_renewed_age_counts_for_every_body_that_a_drive_that_fails_may_have(quick_path: Path, seed: int) -> None:
    """The model believes in the first body there, and the disk has the second, as after a write that failed."""
    world = World(seed, quick_path)
    del world.ids[4:]
    key = world.ids[0].pack()
    while len(world.written.get(key, ())) < 2:
        world.write()
    first, second = world.written[key]
    del world.ids[1:]
    world.fragments[key] = Fate(durable=first)
    world.touch()
    found = world.engine.reader.read(key, 0, 1000).header
    assert found.created_ms > second.header.created_ms
    assert (found, second.payload) in [(made.header, made.payload) for made in world.written[key]]
    other = msgspec.structs.replace(found, created_ms=found.created_ms + 2000)
    assert other not in [made.header for made in world.written[key]]
    world.index.close()


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


@pytest.mark.parametrize(
    ("mistake", "first"),
    [
        (punch_before_the_death_is_durable, 0),
        (compaction_forgets_notes, 0),
        (torn_records_are_believed, 0),
        (segments_go_before_the_checkpoint, 80),  # one seed of some 40 shows it
    ],
)
def test_the_simulation_finds_a_planted_mistake(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Callable[..., None], first: int
) -> None:
    mistake(monkeypatch)
    for seed in range(first, first + 60):
        try:
            run(seed, quick_path / str(seed))
        except Exception:
            return
    pytest.fail(f"60 seeds did not notice: {mistake.__name__}")
