"""Drives that fail, and drives that lie. They may lose data, but the disk serves nothing that was never written.

A *failing* drive returns errors (EIO, ENOSPC) from some calls. ENOSPC loses nothing. After EIO the program gives the
disk up: a mark on it prevents its use as a whole disk.

A *lying* drive drops what was synced, puts a write somewhere else, or returns other bytes than were written. Then the
only promise is that wrong bytes are refused.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb

from storaged.errors import DiskForeign, DiskUnusable, FragmentDamaged, FragmentMissing, StoragedError
from storaged.fragments.offline import rebuild_index
from storaged.meta.store_ports import RowDamaged
from tests.power_cuts.play import STARTS_CALLS, Play
from tests.power_cuts.records import SCOPES
from tests.worlds.fragments import DISK, Made

REFUSALS = (StoragedError, OSError)
"""By which a disk that is opened is refused (``node.opener``): any other error ends the node."""


class Refused(Exception):
    """The disk does not open any more, and says why."""


class FaultyPlay(Play):
    def plan(self) -> None:
        """What the drive does wrong in the life that begins."""
        raise NotImplementedError

    def cut(self) -> None:
        self.plan()
        super().cut()
        if self.power.failures or self.power.harmed:
            self.happened["cuts after a fault"] += 1

    @property
    def keeps_all(self) -> bool:
        """Whether the disk must have all that it acknowledged."""
        return not self.power.harmed and all(
            one.startswith("write") and "No space" in one for one in self.power.failures
        )

    def start(self) -> None:
        try:
            super().start()
        except REFUSALS as error:
            if not self.power.failures and not self.power.harmed:
                raise
            self.happened[f"refused: {type(error).__name__}"] += 1
            self.over = isinstance(error, DiskForeign)
            raise Refused from error
        except lmdb.Error as error:
            if self.power.dead:
                raise
            raise AssertionError(f"a start that ends the node: {error!r}") from error

    def _live(self) -> None:
        try:
            super()._live()
        except Refused:
            self.end()
            self._look_at_what_is_left()

    def act(self) -> None:
        assert self.disk is not None
        disk, state = self.disk, self.disk.engine.state
        try:
            super().act()
        except StoragedError:
            self.happened["requests refused"] += 1
        except RowDamaged:  # as the maintenance that reads lists of pages does
            if not self.power.failures and not self.power.harmed:
                raise
            self.happened["requests refused"] += 1
        except (OSError, lmdb.Error) as error:  # as the writer thread does
            if not self.power.dead and not state.failure:
                state.fail(f"{type(error).__name__}: {error}", lasting=False)
        if self.disk is disk and self.rng.random() < 0.2:
            self.check_served()

    def finish(self) -> None:
        """No-op: such a drive leaves no index that a rebuilt one could be compared with."""

    def check(self) -> None:
        disk = self.disk
        assert disk is not None
        if self.keeps_all:
            try:
                super().check()
            except (AssertionError, StoragedError):
                if self.keeps_all:
                    raise
                # else the drive has lied for the first time meanwhile
        if not self.keeps_all:
            self.check_served()
            for fate in (*self.fragments.fragments.values(), *self.fragments.garbage.values()):
                fate.since.append(fate.durable)
            self.records.posted.clear()

    def _look_at_what_is_left(self) -> None:
        """Rebuilds the index of a refused disk, as an operator would."""
        self.power.revive()
        self.power.faults.fail.clear()
        self.power.faults.other_reads = 0.0
        directory = self.root / "disk" / "fragments"
        try:
            rebuild_index(directory, disk_id=DISK)
            self.happened["rebuilt"] += 1
        except REFUSALS:
            self.happened["can't be rebuilt"] += 1

    # --- what must hold ---------------------------------------------------------------------------------------------

    def check_served(self) -> None:
        """Everything that can be read was once written there. What was given to the store counts as written, also when
        the call failed: the drive may have all of it.
        """
        for key, versions in self.fragments.written.items():
            self._check_fragment(key, versions)
        for data_id, made in self.records.copies.items():
            self._check_fragment(made.header.id, [made])
            assert self.disk is not None
            found = self.disk.engine.reader.try_read_copy(data_id, 1 << 20)
            assert found is None or found == made.payload, f"other bytes of the copy {data_id.hex()}"
        self._check_records()

    def _check_fragment(self, key: bytes, versions: list[Made]) -> None:
        assert self.disk is not None
        try:
            read = self.disk.engine.reader.read(key, 0, 1000)
        except (FragmentMissing, FragmentDamaged, DiskUnusable):
            return
        for made in versions:
            if made.header == read.header and all(
                cell is None or bytes(cell) == whole for cell, whole in zip(read.cells, made.cells, strict=True)
            ):
                return
        raise AssertionError(f"{key.hex()} is served with bytes that were never written")

    def _check_records(self) -> None:
        assert self.disk is not None
        meta, asked = self.disk.meta, self.records.asked
        reads: list[tuple[tuple[str, Any], Callable[[Any], Any]]] = [
            *((("row", name), meta.get) for name in self.records.names),
            *((("fence", scope), meta.get_fence) for scope in SCOPES),
            (("value", "high"), meta.get_meta),
        ]
        for key, read in reads:
            try:
                found = read(key[1])
            except (RowDamaged, DiskUnusable):
                self.happened["rows refused"] += 1
                continue
            assert found is None or found in asked.get(key, ()), f"{key} is served and was never so"
        for page in self.records.pages:
            try:
                meta.get_page(page)  # verified by its name
            except (RowDamaged, DiskUnusable):
                self.happened["pages refused"] += 1


class FailingPlay(FaultyPlay):
    def plan(self) -> None:
        within = self.rng.choice((10, STARTS_CALLS, STARTS_CALLS + 40, STARTS_CALLS + 120))
        code = self.rng.choice((errno.EIO, errno.EIO, errno.ENOSPC))
        self.power.faults.fail = {self.power.calls + 1 + self.rng.randrange(within): code}


class LyingPlay(FaultyPlay):
    def plan(self) -> None:
        faults, kind = self.power.faults, self.rng.randrange(4)
        within = self.rng.choice((10, STARTS_CALLS, STARTS_CALLS + 40, STARTS_CALLS + 120))
        if kind == 0:
            faults.lying_from = self.power.calls + self.rng.randrange(within)
        elif kind == 1:
            faults.misplaced = {self.power.calls + self.rng.randrange(within) for _ in range(3)}
        elif kind == 2:
            faults.other_reads = self.rng.choice((0.001, 0.01, 0.1))
        else:
            faults.lying_from, faults.other_reads = -1, 0.0
            faults.misplaced = set()


DRIVES: dict[str, Callable[[int, Path], Play]] = {"sound": Play, "failing": FailingPlay, "lying": LyingPlay}
"""By ``--drive``."""
