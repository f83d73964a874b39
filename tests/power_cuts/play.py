"""One disk, its histories, and the power cuts that end them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from storaged.durable import make_directory
from storaged.fragments.offline import check as check_disk
from storaged.fragments.offline import rebuild_index
from storaged.meta.storage import redo as redo_module
from storaged.meta.storage import write_queue as write_queue_module
from storaged.meta.storage.opening import Known
from tests.doubles.files import PowerCut
from tests.power_cuts.records import BATCH_BYTES_MAX, RecordHistory
from tests.sim.file_disk import set_aside
from tests.worlds.fragment_history import FragmentHistory
from tests.worlds.fragments import DISK
from tests.worlds.power_disk import PowerDisk
from tests.worlds.still_disk import StillDisk

HALF_PAGES = (8, 12, 40)
"""Of a half of the redo log: so small that it goes round, and waits for checkpoints."""

OWNER = b"cluster\0disk"
STARTS_CALLS = 50
"""A little more than a start makes."""
CALLS = (3, 12, 40, 120)
"""A life of the disk ends within so many of its calls."""
ACTS_MAX = 60


class Play:
    """A disk from its first start on. ``cut`` ends a life, and judges what the next one finds."""

    def __init__(self, seed: int, root: Path) -> None:
        self.rng = random.Random(seed)
        self.root = root
        self.power = PowerDisk(root, seed)
        self.fragments = FragmentHistory(self.rng)
        self.records = RecordHistory(self.rng)
        self.half_pages = self.rng.choice(HALF_PAGES)
        self.known, self.expected = Known(0, OWNER), None
        self.disk: StillDisk | None = None
        self.happened: Counter[str] = Counter()
        self.cuts = 0
        self.over = False
        """The disk is refused for ever."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        half_bytes = self.half_pages * redo_module.PAGE_BYTES
        assert half_bytes > BATCH_BYTES_MAX
        with ExitStack() as stack:
            stack.enter_context(set_aside(write_queue_module, "GROUP_BYTES_MAX", half_bytes // 2))
            stack.enter_context(self.power.attached())
            try:
                yield
            finally:
                self.end()

    def cut(self) -> None:
        """Plays until the next power cut, and cuts. The process may be killed before that, also in the middle of a
        call.
        """
        if self.rng.random() < 0.25:
            self._live()
            self.power.revive()
            self.happened["killed in a call"] += 1
        self._live()
        self.power.cut()
        self.cuts += 1

    def _live(self) -> None:
        """A life of the process, until its end."""
        with self._until_the_cut():
            self.power.cut_at = self.rng.randrange(STARTS_CALLS) if self.rng.random() < 0.3 else -1
            self.start()
            self.power.cut_at = self.rng.randrange(self.rng.choice(CALLS))
            for _ in range(self.rng.randint(1, ACTS_MAX)):
                self.act()
        self.end()

    @contextmanager
    def _until_the_cut(self) -> Iterator[None]:
        """Swallows exceptions that the power cut has raised inside."""
        try:
            yield
        except PowerCut:
            self.happened["ends in a call"] += 1
        except Exception:
            if not self.power.dead:
                raise
            self.happened["ends in a call of LMDB"] += 1

    def finish(self) -> None:
        """Rebuilds the index from the segments, perhaps with a cut meanwhile. The new index must have the same entries
        as the old one, and nothing on the disk may be damaged.
        """
        self.start()
        assert self.disk is not None
        before = self._entries()
        self.disk.shut()
        self.fragments.settle()
        self.end()
        directory = self.root / "disk" / "fragments"
        self.power.cut_at = self.rng.choice((-1, self.rng.randrange(STARTS_CALLS)))
        with self._until_the_cut():
            rebuild_index(directory, disk_id=DISK)
        if self.power.dead:
            self.power.end_process()
            if self.rng.random() < 0.5:
                self.power.cut()
            else:
                self.power.revive()
            self.happened["rebuilds ended"] += 1
        self.power.cut_at = -1
        self.start()
        assert self._entries() == before, "the rebuilt index says something else"
        self.end()
        report = check_disk(directory, disk_id=DISK)
        assert not [*report.damaged, *report.gaps, *report.lost_segments], f"fsck: {report}"
        self.power.end_process()

    def _entries(self) -> dict[bytes, tuple[int, ...]]:
        assert self.disk is not None
        return {
            key: (entry.sequence, entry.created_ms, entry.payload_bytes, entry.cell_bytes)
            for key, entry in self.disk.engine.index.entries()
        }

    def start(self) -> None:
        directory = self.root / "disk"
        if self.expected is None:
            make_directory(directory)  # as ``node.opener``
        self.disk = disk = StillDisk(
            directory,
            half_pages=self.half_pages,
            known=self.known,
            expected=self.expected,
            entropy=self.rng.randbytes,
        )
        self.known, self.expected = Known(disk.meta.position, OWNER), disk.meta.identity
        self.happened["starts"] += 1
        self.happened["copies restored"] += disk.restored
        self.happened["torn bytes"] += disk.report.torn_bytes
        self.fragments.begin(disk.engine)
        self.records.begin(disk)
        self.check()

    def act(self) -> None:
        assert self.disk is not None
        one = self.rng.random()
        if one < 0.48:
            self.fragments.act()
        elif one < 0.96:
            self.records.act()
        elif one < 0.98:
            self.happened["kills"] += 1
            self.end()
            self.start()
        else:
            self.happened["ends"] += 1
            self.disk.shut()
            self.fragments.settle()
            self.end()
            self.start()
        if self.power.dead:
            raise PowerCut
        self.known = Known(self.disk.meta.position, OWNER)

    def end(self) -> None:
        """The process dies."""
        if self.disk is not None:
            disk, self.disk = self.disk, None
            self.fragments.end()
            self.happened["checkpoints"] += disk.meta.checkpoints.count
            disk.end()
        self.power.end_process()

    def check(self) -> None:
        disk = self.disk
        assert disk is not None
        assert not disk.engine.state.failure, disk.engine.state.failure
        assert not disk.damage, f"damage on a sound disk: {disk.damage}"
        assert not disk.report.gaps, f"gaps on a sound disk: {disk.report.gaps}"
        assert not disk.report.lost_segments, f"segments of a sound disk are lost: {disk.report.lost_segments}"
        self.fragments.check()
        self.records.check()
        assert not disk.damage, f"damage on a sound disk: {disk.damage}"
