"""Reads one part: windows of consecutive cells, each chunk opened before it is passed on, even when disks are slow,
away, damaged or lie.

Theory of operation. A window is a row of data cells of one block. The data fragments that hold them are read. When all
answer, nothing is decoded. When one is known to be away, fails, or has not answered after the hedge delay, further
fragments are read (parity, and data of the same stripes), until every wanted cell is there or its stripe has k cells to
rebuild it from.

The disk verifies cells against their checksums. Then each chunk is opened, stripe after stripe. The missing cells of a
stripe are rebuilt just before its chunks are opened, in memory that the next stripe reuses, so that they stay in the
processor's cache.

A chunk that does not open although its checksum holds was altered together with its checksum: the disk lies. The cell
is rebuilt from other fragments, in all combinations until one opens. The disks whose cells differ from that are
reported.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from storaged import trace
from storaged.cluster.layout import Profile
from storaged.errors import DataDamaged, FragmentDamaged, FragmentMissing, PeerError, ServiceUnavailable
from storaged.fragments.ports import CellRead, FragmentId
from storaged.meta.names import RegisterName
from storaged.objects.code import erasure, place
from storaged.objects.code.geometry import BlockShape, PartShape
from storaged.objects.code.seal import PartOpener
from storaged.objects.plane import Damage, ObjectPlane
from storaged.objects.ports import SealBroken
from storaged.objects.read.hedging import Reads
from storaged.objects.records import BucketRecord, PartEntry, Run
from storaged.wire import Buffer

COMBINATIONS_MAX = 1000
"""Sets of k fragments tried to open one chunk; C(12, 8) is 495."""

Cells = dict[int, dict[int, Buffer]]
"""stripe -> position -> cell."""


class Window(NamedTuple):
    """``cells`` data cells of block ``block``, from cell ``first`` of the block. Their plaintext begins at byte
    ``plain_start`` of the part.
    """

    block: int
    first: int
    cells: int
    plain_start: int
    plain_bytes: int


Moved = Callable[[PartEntry], Awaitable[PartEntry | None]]
"""Reads the part's entry again. None: its blocks were not moved, or the record no longer has the part."""


class PartReader:
    """Reads one part of a version. ``dek``: the version's data key. Raises DataDamaged when the part's header does not
    open with it.

    ``moved`` is called when a block is not where the entry says: repair may have recoded it since the record was read,
    and deleted the old fragments.
    """

    def __init__(
        self,
        plane: ObjectPlane,
        bucket: BucketRecord,
        owner: RegisterName,
        entry: PartEntry,
        dek: bytes,
        copy: Buffer | None,
        moved: Moved,
    ) -> None:
        self._plane = plane
        self._bucket = bucket
        self._moved = moved
        self._owner = owner
        self._entry = entry
        self._copy = copy
        self._bad: set[str] = set()
        try:
            self._opener = PartOpener(dek, entry.header, entry.data_id, entry.number, entry.size)
            self.shape = PartShape.of(entry)
        except SealBroken as error:
            raise DataDamaged(f"The header of a part does not open: {error}") from None

    def windows(self, start: int, length: int, bytes_max: Callable[[], int]) -> Iterator[Window]:
        """The windows that hold the plaintext bytes ``start .. start + length - 1``, in order. A window lies in one
        block and has at most ``bytes_max()`` sealed bytes, called for each window, but at least one cell.
        """
        shape = self.shape
        if not shape.size:
            yield Window(0, 0, 1, 0, 0)  # an empty part is one sealed chunk too, which must open
        for block, first, cells in shape.locate(start, length):
            at, end = first, first + cells
            while at < end:
                count = min(max(1, bytes_max() // shape.cell_bytes), end - at)
                plain = shape.plain_start(block * shape.block_cells + at)
                yield Window(block, at, count, plain, min(count * shape.plain_bytes, shape.size - plain))
                at += count

    async def read(self, window: Window, out: memoryview) -> None:
        """The window's plaintext, verified, to the front of ``out`` (at least ``plain_bytes``). Raises DataDamaged."""
        if self._entry.inline:
            try:
                with trace.span("open"):
                    self._open(window, [{0: self._entry.inline}], 1, out)
            except SealBroken as error:
                raise DataDamaged(f"The body in the record does not open: {error}") from None
            return
        if self._entry.small and self._copy is not None:
            try:
                with trace.span("open"):
                    self._open(window, [{0: self._copy}], 1, out)
                return
            except SealBroken:
                self._copy = None  # that replica lies; others are asked below
        try:
            job = await self._fetched(window)
        except ServiceUnavailable:  # DataDamaged is one
            entry = await self._moved(self._entry)
            if entry is None:
                raise
            self._entry = entry
            job = await self._fetched(window)
        await self._open_or_rebuild(window, job, out)

    async def _fetched(self, window: Window) -> _WindowJob:
        run = self._run_of(window.block)
        job = _WindowJob(
            self._plane,
            self._owner,
            self._entry,
            window,
            self.shape.block(window.block),
            run,
            self._disks(run),
            self._bad,
        )
        with trace.span("fetch"):
            await job.fetch()
        return job

    def _run_of(self, block: int) -> Run:
        for run in self._entry.runs:
            if run.first <= block < run.first + run.count:
                return run
        raise DataDamaged(f"The record names no place for block {block}.")

    def _disks(self, run: Run) -> tuple[str, ...]:
        try:
            if self._entry.small:  # the disk that comes may not have all copies yet
                return self._plane.layouts.partition(self._owner.partition).present[: run.k + run.m]
            return place.disks_of(run, self._plane.layouts.at(run.epoch), self._entry.data_id, self._bucket.countries)
        except (KeyError, ValueError) as error:
            raise DataDamaged(
                f"The layout of epoch {run.epoch}, which says where this object is, is not known here: {error}"
            ) from None

    async def _open_or_rebuild(self, window: Window, job: _WindowJob, out: memoryview) -> None:
        while True:
            try:
                with trace.span("open"):
                    # on the loop: 6 us a cell, less than a thread costs that has to get the interpreter back after each
                    self._open(window, job.stripes(), job.k, out)
                return
            except SealBroken as broken:
                if broken.index is None:
                    raise DataDamaged(f"A part does not open: {broken}") from None
                cell = broken.index - window.block * self.shape.block_cells
            await self._expose_liars(window, job, cell)

    def _open(self, window: Window, stripes: Iterable[Mapping[int, Buffer]], k: int, out: memoryview) -> None:
        """``stripes``: the data cells of each stripe of the window, by position. Raises SealBroken, also when they end
        before the window.
        """
        at, index = 0, window.block * self.shape.block_cells + window.first
        first, left = window.first % k, window.cells
        for cells in stripes:
            end = min(k, first + left)
            for position in range(first, end):
                at += self._opener.open_into(index, cells[position], out[at:])
                index += 1
            left -= end - first
            first = 0
        if left:  # the rest of ``out`` was not written, and holds another request's bytes
            raise SealBroken(f"{left} of its chunks are not there")

    async def _expose_liars(self, window: Window, job: _WindowJob, cell: int) -> None:
        """A chunk does not open: finds cells with which the whole stripe opens, and the disks that lied. Raises
        DataDamaged.
        """
        stripe = cell // job.k
        await job.fetch_all(stripe)
        honest = await self._plane.in_thread(self._search, window.block, job, stripe)
        if honest is None:
            raise DataDamaged("A chunk of this object does not open in any combination of its fragments.")
        for liar in job.adopt(stripe, honest):
            self._bad.add(job.disks[liar])

    def _search(self, block: int, job: _WindowJob, stripe: int) -> dict[int, Buffer] | None:
        """k cells of a stripe from which all its chunks open; None when there are none."""
        known = job.known(stripe)
        for chosen in itertools.islice(itertools.combinations(sorted(known), job.k), COMBINATIONS_MAX):
            cells = {position: known[position] for position in chosen}
            missing = [position for position in range(job.k) if position not in cells]
            data: dict[int, Buffer] = dict(cells)
            if missing:
                data.update(erasure.reconstruct(job.profile, cells, missing, job.shape.stripe_length(job.k, stripe)))
            if self._opens(block, job, stripe, data):
                return cells
        return None

    def _opens(self, block: int, job: _WindowJob, stripe: int, data: dict[int, Buffer]) -> bool:
        for cell in range(stripe * job.k, min((stripe + 1) * job.k, job.shape.cells)):
            sealed = memoryview(data[cell % job.k])[: job.shape.cell_length(cell)]
            try:
                self._opener.open(block * self.shape.block_cells + cell, sealed)
            except SealBroken:
                return False
        return True


class _WindowJob:
    """The cells of one window as they arrive."""

    def __init__(
        self,
        plane: ObjectPlane,
        owner: RegisterName,
        entry: PartEntry,
        window: Window,
        shape: BlockShape,
        run: Run,
        disks: tuple[str, ...],
        bad: set[str],
    ) -> None:
        self._plane = plane
        self._owner = owner
        self._data_id = entry.data_id
        self.shape = shape
        self.profile: Profile = run.profile
        self.k = run.k
        self.disks = disks
        self._bad = bad
        self._gone: set[int] = set()
        """Positions whose disks have said that they do not have the fragment, or not whole."""
        self._window = window
        self.cells: Cells = {
            stripe: {} for stripe in range(window.first // run.k, (window.first + window.cells - 1) // run.k + 1)
        }
        self._asked: dict[int, tuple[int, int]] = {}
        self._runs: dict[int, erasure.CellRun] = {}
        """The last read of each fragment, by position, where it lies in one piece."""
        self._solver: tuple[tuple[int, ...], list[int], erasure.StripeSolver] | None = None

    async def fetch(self) -> None:
        """Returns when every wanted cell is there, or enough of its stripe to rebuild it. Raises DataDamaged."""
        window = self._window
        if self.k == 1:
            spares = self._order(range(self.profile.n))
            start = {spares[0]: (window.first, window.cells)}
        else:
            start = {
                position: (row, count)
                for position, row, count in self.shape.holders(self.k, window.first, window.cells)
            }
            spares = self._order(p for p in range(self.profile.n) if self.shape.fragment_cells(self.profile, p))
        await self._gather(start, spares)

    def stripes(self) -> Iterator[Mapping[int, Buffer]]:
        """The data cells of each stripe of the window, by position. Missing ones are rebuilt from k others, in memory
        that the next stripe overwrites. A stripe has at most k + m cells, so that takes microseconds.
        """
        for stripe, cells in self.cells.items():
            missing = self._missing(stripe)
            yield self._rebuild(stripe, missing) if missing else cells

    def _missing(self, stripe: int) -> list[int]:
        """Positions of the window's data cells that are not there."""
        window, k, cells = self._window, self.k, self.cells[stripe]
        start = window.first - stripe * k
        return [position for position in range(max(start, 0), min(start + window.cells, k)) if position not in cells]

    def _rebuild(self, stripe: int, missing: list[int]) -> Mapping[int, Buffer]:
        found = self.known(stripe)
        if self.k == 1:
            return {0: next(iter(found.values()))}
        self._plane.counters.cells_reconstructed += len(missing)
        solver = self._solver_of(tuple(sorted(found)[: self.k]), missing)
        rebuilt: Mapping[int, Buffer]
        if solver is not None and solver.first <= stripe < solver.end:
            rebuilt = solver.solve(stripe)
        else:
            rebuilt = erasure.reconstruct(self.profile, found, missing, self.shape.stripe_length(self.k, stripe))
        for position, cell in rebuilt.items():
            found[position] = memoryview(cell)[: self._length(stripe, position)]
        return found

    def _solver_of(self, survivors: tuple[int, ...], missing: list[int]) -> erasure.StripeSolver | None:
        known = self._solver
        if known is not None and known[0] == survivors and known[1] == missing:
            return known[2]
        if not all(map(self._runs.__contains__, survivors)):
            return None
        solver = erasure.StripeSolver(
            self.profile, self.shape.cell_bytes, {position: self._runs[position] for position in survivors}, missing
        )
        self._solver = survivors, missing, solver
        return solver

    def _order(self, positions: Iterator[int] | range) -> list[int]:
        """Readable disks that are not slow first; disks that failed in this request last."""
        usable = self._plane.liveness.disk_prompt
        return sorted(positions, key=lambda p: (self.disks[p] in self._bad, not usable(self.disks[p])))

    def _doubtful(self, position: int) -> bool:
        return self.disks[position] in self._bad or not self._plane.liveness.disk_prompt(self.disks[position])

    async def _gather(self, start: dict[int, tuple[int, int]], spares: list[int]) -> None:
        reads, limit_s = Reads(self._plane.hedge), self._plane.limits.read_timeout_s
        every = min(self.cells), len(self.cells)

        def ask(position: int, row: int, count: int) -> None:
            self._asked[position] = (row, count)
            count = min(count, self.shape.fragment_cells(self.profile, position) - row)
            if count > 0 and not self._try_read(position, row, count):
                reads.begin(position, self._read(position, row, count))

        def ask_spares(count: int) -> None:
            """Asks for further fragments, over all stripes of the window. A data fragment that was asked for some
            stripes only is asked again, for all.
            """
            while spares and count:
                position = spares.pop(0)
                if self._asked.get(position) != every:
                    ask(position, *every)
                    count -= 1

        try:
            for position, (row, count) in start.items():
                if not self._doubtful(position):
                    ask(position, row, count)
            ask_spares(len(start) - len(self._asked))
            while not self._complete():
                if not reads:
                    if not spares:
                        raise self._too_few()
                    ask_spares(1)
                    continue
                more = await reads.turn(limit_s, patience_s=self._plane.hedge.seconds if spares else math.inf)
                for position in reads.give_up(limit_s):
                    self._bad.add(self.disks[position])
                    self._plane.liveness.disk_late(self.disks[position], limit_s)
                    more += 1
                if reads.stalled:
                    self._plane.counters.reads_hedged += 1
                    more += len(reads)
                if more:
                    reads.eager = True
                    ask_spares(more)
            for position, for_s in reads.overtaken():
                self._plane.liveness.disk_late(self.disks[position], for_s)
        finally:
            await reads.close()

    def _too_few(self) -> ServiceUnavailable:
        """Damaged, unless disks that did not answer, or could not read, may have what is missing."""
        if self.profile.n - len(self._gone) >= self.k:
            return ServiceUnavailable("Disks that have this object's data do not answer now. Retry.")
        return DataDamaged(f"Block {self._window.block} of this object has too few readable fragments.")

    def _complete(self) -> bool:
        k = self.k
        return all(
            len(cells) >= k or not self._missing(stripe) or len(self.known(stripe)) >= k
            for stripe, cells in self.cells.items()
        )

    def known(self, stripe: int) -> dict[int, Buffer]:
        """The stripe's cells that are there. Data cells after the end of the block are zeros."""
        found = dict(self.cells[stripe])
        for position in range(self.k):
            if stripe * self.k + position >= self.shape.cells:
                found[position] = b""
        return found

    def _try_read(self, position: int, row: int, count: int) -> bool:
        """Takes the cells from a disk of this process that has them in memory. False: ``_read`` must be awaited, which
        also meets any error again.
        """
        try:
            store = self._plane.stores.store(self.disks[position])
            try_read = getattr(store, "try_read", None)  # of a NearStore
            found = try_read(self._fragment(position), row, count) if try_read is not None else None
        except PeerError:
            return False
        return found is not None and self._take(position, row, count, found)

    async def _read(self, position: int, row: int, count: int) -> bool:
        """Whether every requested cell arrived whole."""
        disk = self.disks[position]
        try:
            found = await self._plane.stores.store(disk).read(self._fragment(position), row, count)
        except FragmentMissing:
            self._gone.add(position)
            self._report(position, -1, "missing")
            return False
        except FragmentDamaged as error:
            if error.unread:
                self._plane.liveness.disk_late(disk, 0.0)
            else:
                self._gone.add(position)
            self._report(position, -1, "checksum")
            return False
        except PeerError:
            self._bad.add(disk)
            return False
        if found.unread:  # a drive with bad sectors takes long to say so
            self._plane.liveness.disk_late(disk, 0.0)
        else:
            self._plane.liveness.disk_answered(disk)
        return self._take(position, row, count, found)

    def _take(self, position: int, row: int, count: int, found: CellRead) -> bool:
        """Keeps the cells. Whether every requested one arrived whole."""
        whole = len(found.cells) == count
        for offset, cell in enumerate(found.cells[:count]):
            if cell is not None and len(cell) == self._length(row + offset, position):
                self.cells[row + offset][position] = cell
            else:
                if not found.unread:
                    self._gone.add(position)
                self._report(position, row + offset, "checksum")
                whole = False
        if whole and found.whole is not None:
            self._runs[position] = erasure.CellRun(row, found.whole)
        return whole

    def _length(self, stripe: int, position: int) -> int:
        if position < self.k:
            return self.shape.cell_length(stripe * self.k + position)
        return self.shape.stripe_length(self.k, stripe) if self.k > 1 else self.shape.cell_length(stripe)

    def _fragment(self, position: int) -> FragmentId:
        return FragmentId(self._data_id, self._window.block, self.k, self.profile.m, position)

    def _report(self, position: int, cell: int, reason: str) -> None:
        self._plane.on_damage(Damage(self._owner, self._fragment(position), self.disks[position], cell, reason))

    async def fetch_all(self, stripe: int) -> None:
        """Reads every available cell of a stripe again: a rebuilt cell may come from the disk that lies."""
        self.cells[stripe] = {}
        reads, limit_s = Reads(self._plane.hedge), self._plane.limits.read_timeout_s
        try:
            for position in range(self.profile.n):
                if stripe < self.shape.fragment_cells(self.profile, position):
                    reads.begin(position, self._read(position, stripe, 1))
            while reads:
                await reads.turn(limit_s)
                self._bad.update(self.disks[position] for position in reads.give_up(limit_s))
        finally:
            await reads.close()

    def adopt(self, stripe: int, honest: dict[int, Buffer]) -> list[int]:
        """Rebuilds the stripe from these k cells. Reports the positions whose cells differ, and returns them."""
        length = self.shape.stripe_length(self.k, stripe)
        others = [position for position in range(self.profile.n) if position not in honest]
        truth: dict[int, Buffer] = dict(honest)
        for position, cell in erasure.reconstruct(self.profile, honest, others, length).items():
            inside = position >= self.k or stripe * self.k + position < self.shape.cells
            truth[position] = memoryview(cell)[: self._length(stripe, position)] if inside else b""
        liars = [position for position, cell in self.cells[stripe].items() if cell != truth[position]]
        for position in liars:
            self._plane.counters.cells_lied += 1
            self._report(position, stripe, "lied")
        self.cells[stripe] = {position: cell for position, cell in truth.items() if len(cell)}
        return liars
