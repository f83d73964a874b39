"""The cells of one window of a part: which disks are asked for them, what came, what was rebuilt.

Theory of operation. A job works in callbacks, so that a window costs no task: ``begin`` asks for the data fragments,
``_go_on`` decides what follows whenever ``Reads`` says that there is something to decide, and ``on_done`` is called at
the end. A caller that has a task awaits ``fetch``. Where a disk can be read only by awaiting (what it has is not in
memory, or there is no connection yet), a job with a task starts one for that read, and a job without one ends with
NeedsTask.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

from storaged.cluster.layout import Profile
from storaged.errors import DataDamaged, FragmentDamaged, FragmentMissing, PeerError, ServiceUnavailable
from storaged.fragments.ports import CellRead, FragmentId
from storaged.meta.names import RegisterName
from storaged.objects.code import erasure
from storaged.objects.code.geometry import BlockShape, FragmentCells
from storaged.objects.plane import Damage, ObjectPlane, OnDamage
from storaged.objects.read.hedging import Expected, Reads
from storaged.objects.records import PartEntry, Run
from storaged.wire import Buffer

Cells = dict[int, dict[int, Buffer]]
"""stripe -> position -> cell."""


class NeedsTask(Exception):
    """A disk can be read only by awaiting."""


class Window(NamedTuple):
    """``cells`` data cells of block ``block``, from cell ``first`` of the block. Their plaintext begins at byte
    ``plain_start`` of the part.
    """

    block: int
    first: int
    cells: int
    plain_start: int
    plain_bytes: int


class WindowJob:
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
        on_damage: OnDamage,
    ) -> None:
        self._plane = plane
        self._on_damage = on_damage
        self._on_done: Callable[[Exception | None], None] | None = None
        self._owner = owner
        self._data_id = entry.data_id
        self.shape = shape
        self.profile: Profile = run.profile
        self.k = run.k
        self._full_stripes = shape.stripes(run.k) - (shape.last_bytes < shape.cell_bytes or shape.cells % run.k > 0)
        """Of the first stripes of the block every cell is full."""
        self.disks = disks
        self._bad = bad
        self._gone: set[int] = set()
        """Positions whose disks have said that they do not have the fragment, or not whole."""
        self._window = window
        self.cells: Cells = {
            stripe: {} for stripe in range(window.first // run.k, (window.first + window.cells - 1) // run.k + 1)
        }
        self._asked: dict[int, tuple[int, int]] = {}
        self._runs: dict[int, tuple[int, memoryview]] = {}
        """The last read of each fragment, by position, where it lies in one piece: (first stripe, cells)."""
        self._solver: tuple[tuple[int, ...], list[int], erasure.StripeSolver] | None = None
        self._reads = Reads(plane.hedge, plane.deadlines)
        self._spares: list[int] | None = None
        """The positions to ask next, best first. None until one is needed."""
        self._plain = run.k > 1
        """The data fragments were asked for all wanted cells, and nothing else was."""

    async def fetch(self) -> None:
        """Returns when every wanted cell is there, or enough of its stripe to rebuild it. Raises DataDamaged,
        ServiceUnavailable.
        """
        done: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        try:
            self.begin(partial(_resolve, done), has_task=True)
            error = await done
        finally:
            await self._reads.close()
        if error is not None:
            raise error

    def begin(self, on_done: Callable[[Exception | None], None], *, has_task: bool) -> None:
        """As ``fetch``, without a task: ``on_done`` is called once, perhaps before this returns, with what ``fetch``
        would raise, or with NeedsTask. ``has_task``: the caller has one, and closes the reads.
        """
        self._on_done, self._has_task = on_done, has_task
        window = self._window
        try:
            if self.k == 1:
                self._spares = self._order(range(self.profile.n))
                wanted = [FragmentCells(self._spares[0], window.first, window.cells)]
            else:
                wanted = self.shape.holders(self.k, window.first, window.cells)
            prompt, others = self._plane.liveness.disk_prompt, 0
            for position, row, count in wanted:
                disk = self.disks[position]
                if disk not in self._bad and prompt(disk):
                    self._asked[position] = row, count
                    self._ask(position, row, count)
                else:
                    others += 1
            if others:
                self._ask_spares(others)
        except Exception as error:
            self._end(error)
        else:
            self._go_on()

    def _go_on(self) -> None:
        """Something may be to decide."""
        try:
            if not self._decide():
                return
        except Exception as error:
            self._end(error)
        else:
            self._end(None)

    def _end(self, error: Exception | None) -> None:
        if not self._has_task:
            self._reads.abandon()
        on_done, self._on_done = self._on_done, None  # it holds this job: only the collector could free both
        if on_done is not None:
            on_done(error)

    def abandon(self) -> None:
        """Its end is not wanted any more: ``on_done`` is not called. No-op after the end. Of a job without a task."""
        self._on_done = None
        self._reads.abandon()

    def _decide(self) -> bool:
        """Whether all is there. If not, further answers are waited for. Raises ServiceUnavailable, DataDamaged,
        NeedsTask.
        """
        reads, limit_s = self._reads, self._plane.limits.read_timeout_s
        pending = reads.pending
        while True:
            more = reads.failures()
            if pending:
                for position in reads.give_up(limit_s):
                    self._bad.add(self.disks[position])
                    self._plane.liveness.disk_late(self.disks[position], limit_s)
                    more += 1
                if reads.stalled:
                    self._plane.counters.reads_hedged += 1
                    more += len(pending)
            if more:
                reads.eager = True
                self._ask_spares(more)
            if (reads.eager or not pending) and self._complete():
                break
            if not pending:
                if self._spares == []:
                    raise self._too_few()
                self._ask_spares(1)
            elif reads.watch(self._go_on, limit_s, math.inf if self._spares == [] else self._plane.hedge.seconds):
                return False
        if pending:
            for position, for_s in reads.overtaken():
                self._plane.liveness.disk_late(self.disks[position], for_s)
        return True

    def _ask_spares(self, count: int) -> None:
        """Asks for further fragments, over all stripes of the window. A data fragment that was asked for some stripes
        only is asked again, for all.
        """
        self._plain = False
        if self._spares is None:
            self._spares = self._order(p for p in range(self.profile.n) if self.shape.fragment_cells(self.profile, p))
        first, rows = min(self.cells), len(self.cells)
        while self._spares and count:
            position = self._spares.pop(0)
            cells = min(rows, self.shape.fragment_cells(self.profile, position) - first)
            if cells > 0 and self._asked.get(position) != (first, cells):
                self._asked[position] = first, cells
                self._ask(position, first, cells)
                count -= 1

    def _order(self, positions: Iterable[int]) -> list[int]:
        """Readable disks that are not slow first; disks that failed in this request last."""
        prompt = self._plane.liveness.disk_prompt
        return sorted(positions, key=lambda p: (self.disks[p] in self._bad, not prompt(self.disks[p])))

    def _ask(self, position: int, row: int, count: int) -> None:
        """Reads these cells of a fragment: in this call, by a call to another node, or by a task. Raises NeedsTask."""
        fragment = self._fragment(position)
        try:
            store = self._plane.stores.store(self.disks[position])
            try_ask = getattr(store, "try_ask_cells", None)  # of a RemoteFragmentStore
            if try_ask is not None:
                expected = self._reads.expect(position, partial(self._on_found, row, count))
                if try_ask(fragment, row, count, count * self.shape.cell_bytes, expected.answer):
                    return
                self._reads.forget(expected)
            else:
                try_read = getattr(store, "try_read", None)  # of a NearStore
                found = try_read(fragment, row, count) if try_read is not None else None
                if found is not None and self._take(position, row, count, found):
                    return
        except PeerError:
            pass  # ``_read`` meets it again
        if not self._has_task:
            raise NeedsTask
        self._reads.begin(position, self._read(position, row, count))

    def stripes(self) -> Iterable[Mapping[int, Buffer]]:
        """The data cells of each stripe of the window, by position. Missing ones are rebuilt from k others, in memory
        that the next stripe overwrites. A stripe has at most k + m cells, so that takes microseconds.
        """
        return self.cells.values() if self._plain else self._rebuilt_stripes()

    def _rebuilt_stripes(self) -> Iterator[Mapping[int, Buffer]]:
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
            self.profile,
            self.shape.cell_bytes,
            {position: erasure.CellRun(*self._runs[position]) for position in survivors},
            missing,
        )
        self._solver = survivors, missing, solver
        return solver

    def _too_few(self) -> ServiceUnavailable:
        """Damaged, unless disks that did not answer, or could not read, may have what is missing."""
        if self.profile.n - len(self._gone) >= self.k:
            return ServiceUnavailable("Disks that have this object's data do not answer now. Retry.")
        return DataDamaged(f"Block {self._window.block} of this object has too few readable fragments.")

    def _complete(self) -> bool:
        k = self.k
        return (self._plain and not self._reads.pending) or all(
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

    def _on_found(self, row: int, count: int, expected: Expected, found: CellRead | PeerError | None) -> None:
        if found is None and self._has_task:
            self._reads.forget(expected)
            self._reads.begin(expected.position, self._read(expected.position, row, count))
            return
        try:
            if found is None:
                whole: bool | Exception = NeedsTask()
            elif isinstance(found, PeerError):
                whole = self._failed(expected.position, found)
            else:
                whole = self._answered(expected.position, row, count, found)
        except Exception as mistake:
            whole = mistake
        self._reads.ended(expected, whole)

    async def _read(self, position: int, row: int, count: int) -> bool:
        """Whether every requested cell arrived whole."""
        try:
            found = await self._plane.stores.store(self.disks[position]).read(self._fragment(position), row, count)
        except PeerError as error:
            return self._failed(position, error)
        return self._answered(position, row, count, found)

    def _answered(self, position: int, row: int, count: int, found: CellRead) -> bool:
        """Whether every requested cell arrived whole."""
        if found.unread:  # a drive with bad sectors takes long to say so
            self._plane.liveness.disk_late(self.disks[position], 0.0)
        else:
            self._plane.liveness.disk_answered(self.disks[position])
        return self._take(position, row, count, found)

    def _failed(self, position: int, error: PeerError) -> bool:
        """Notes why a disk gave no cell; returns False."""
        if isinstance(error, FragmentMissing):
            self._gone.add(position)
            self._report(position, -1, "missing")
        elif isinstance(error, FragmentDamaged):
            if error.unread:
                self._plane.liveness.disk_late(self.disks[position], 0.0)
            else:
                self._gone.add(position)
            self._report(position, -1, "checksum")
        else:
            self._bad.add(self.disks[position])
        return False

    def _take(self, position: int, row: int, count: int, found: CellRead) -> bool:
        """Keeps the cells. Whether every requested one arrived whole."""
        whole, last, full = len(found.cells) == count, self._full_stripes, self.shape.cell_bytes
        for stripe, cell in enumerate(found.cells[:count], row):
            length = full if stripe < last else self._length(stripe, position)
            if cell is not None and len(cell) == length:
                self.cells[stripe][position] = cell
            else:
                if not found.unread:
                    self._gone.add(position)
                self._report(position, stripe, "checksum")
                whole = False
        if whole and found.whole is not None:
            self._runs[position] = row, found.whole
        return whole

    def _length(self, stripe: int, position: int) -> int:
        if position < self.k:
            return self.shape.cell_length(stripe * self.k + position)
        return self.shape.stripe_length(self.k, stripe) if self.k > 1 else self.shape.cell_length(stripe)

    def _fragment(self, position: int) -> FragmentId:
        return FragmentId(self._data_id, self._window.block, self.k, self.profile.m, position)

    def _report(self, position: int, cell: int, reason: str) -> None:
        self._on_damage(Damage(self._owner, self._fragment(position), self.disks[position], cell, reason))

    async def fetch_all(self, stripe: int) -> None:
        """Reads every available cell of a stripe again: a rebuilt cell may come from the disk that lies."""
        self.cells[stripe] = {}
        reads, limit_s = Reads(self._plane.hedge, self._plane.deadlines), self._plane.limits.read_timeout_s
        self._plain = False
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


def _resolve(done: asyncio.Future[Exception | None], error: Exception | None) -> None:
    if not done.done():
        done.set_result(error)
