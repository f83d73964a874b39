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
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from functools import partial

from storaged import trace
from storaged.errors import DataDamaged, PeerError, ServiceUnavailable
from storaged.meta.names import RegisterName
from storaged.objects.code import erasure, place
from storaged.objects.code.geometry import BlockShape, PartShape
from storaged.objects.code.seal import part_key
from storaged.objects.plane import ObjectPlane, OnDamage
from storaged.objects.ports import SealBroken
from storaged.objects.read.window import Window, WindowJob
from storaged.objects.records import BucketRecord, PartEntry, Run
from storaged.sov1 import Opener, StreamKey
from storaged.wire import Buffer

COMBINATIONS_MAX = 1000
"""Sets of k fragments tried to open one chunk; C(12, 8) is 495."""

WIDE_CELLS = 8

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
        key: StreamKey | None = None,
    ) -> None:
        """``key``: of the part, if it was derived before."""
        self._plane = plane
        self._bucket = bucket
        self._moved = moved
        self._owner = owner
        self._entry = entry
        self._copy = copy
        self._bad: set[str] = set()
        self._placed: tuple[Run, tuple[str, ...]] | None = None
        """The run of the last window and its disks: that of the next window is mostly the same."""
        self.on_damage: OnDamage = plane.on_damage
        """Gets the damage that the reads find."""
        try:
            self.key = key or part_key(dek, entry.header, entry.data_id, entry.number)
            self._opener = Opener(self.key, entry.size)
            self.shape = PartShape.of(entry)
        except SealBroken as error:
            raise DataDamaged(f"The header of a part does not open: {error}") from None
        self._whole_block: BlockShape | None = None
        """The shape of all blocks before the last, once it was needed."""
        self._last_block = -1
        self._far: bool | None = None
        """Whether all disks of the last window are on other nodes. None: not known."""

    def windows(self, start: int, length: int, bytes_max: Callable[[], int]) -> Iterator[Window]:
        """The windows that hold the plaintext bytes ``start .. start + length - 1``, in order. A window lies in one
        block and has at most ``bytes_max()`` sealed bytes, called for each window, but at least one cell. A wide one
        has up to a quarter more where that ends the block: an object of 1 MiB has 17 cells.
        """
        shape, plain_bytes = self.shape, self.shape.plain_bytes
        if not shape.size:
            yield Window(0, 0, 1, 0, 0)  # an empty part is one sealed chunk too, which must open
        for block, first, cells in shape.locate(start, length):
            at, end = first, first + cells
            while at < end:
                count = max(1, bytes_max() // shape.cell_bytes)
                if end - at <= (count + count // 4 if count >= WIDE_CELLS else count):
                    count = end - at
                plain = (block * shape.block_cells + at) * plain_bytes
                yield Window(block, at, count, plain, min(count * plain_bytes, shape.size - plain))
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
                    self._open(window, self._cells_of(self._copy, window), 1, out)
                return
            except SealBroken:
                self._copy = None  # that replica lies; others are asked below
        try:
            job = await self._fetched(window)
        except ServiceUnavailable:  # DataDamaged is one
            entry = await self._moved(self._entry)
            if entry is None:
                raise
            self._entry, self._placed = entry, None
            job = await self._fetched(window)
        await self._open_or_rebuild(window, job, out)

    def try_read(
        self, window: Window, out: memoryview, on_read: Callable[[Exception | None], None]
    ) -> Callable[[], None] | None:
        """As ``read``, without a task: ``on_read`` is called once, perhaps before this returns, with None, or with what
        went wrong. Unless that is ServiceUnavailable, ``read`` must be awaited. Returns what ends it: afterwards
        ``out`` is not written, and ``on_read`` not called. None: ``read`` must be awaited, and nothing was begun.
        """
        if self._entry.inline or self._entry.small:
            return None
        job = self._job(window)
        job.begin(partial(self._on_fetched, window, job, out, on_read), has_task=False)
        return job.abandon

    def _on_fetched(
        self,
        window: Window,
        job: WindowJob,
        out: memoryview,
        on_read: Callable[[Exception | None], None],
        error: Exception | None,
    ) -> None:
        if error is None:
            try:
                self.open_fetched(window, job, out)
            except SealBroken as broken:  # ``read`` finds out who lies
                error = broken
        on_read(error)

    def far_job(self, window: Window) -> WindowJob | None:
        """What fetches the cells of a window whose disks are all on other nodes; else None, and ``read`` must be
        awaited. Raises DataDamaged.
        """
        if self._entry.inline or self._entry.small:
            return None
        _, disks = self._place_of(window.block)
        if self._far is None:
            stores = self._plane.stores
            try:
                self._far = all(hasattr(stores.store(disk), "try_ask_cells") for disk in disks)
            except PeerError:  # the layout in force does not name one of them
                return None
        return self._job(window) if self._far else None

    def open_fetched(self, window: Window, job: WindowJob, out: memoryview) -> None:
        """Opens what the job has fetched, to the front of ``out``. Raises SealBroken."""
        self._open(window, job.stripes(), job.k, out)

    def _cells_of(self, copy: Buffer, window: Window) -> Iterator[Mapping[int, Buffer]]:
        """The window's cells of a whole copy, each as a stripe."""
        view, size = memoryview(copy), self.shape.cell_bytes
        for cell in range(window.first, window.first + window.cells):
            yield {0: view[cell * size : (cell + 1) * size]}

    async def _fetched(self, window: Window) -> WindowJob:
        job = self._job(window)
        with trace.span("fetch"):
            await job.fetch()
        return job

    def _job(self, window: Window) -> WindowJob:
        block = window.block
        run, disks = self._place_of(block)
        return WindowJob(
            self._plane,
            self._owner,
            self._entry,
            window,
            self._shape_of(block),
            run,
            disks,
            self._bad,
            self.on_damage,
        )

    def _shape_of(self, block: int) -> BlockShape:
        if self._whole_block is not None:
            if self._last_block < 0:
                self._last_block = self.shape.blocks - 1
            if block < self._last_block:
                return self._whole_block
        found = self.shape.block(block)
        if found.sealed_bytes == self.shape.block_cells * self.shape.cell_bytes:
            self._whole_block = found
        return found

    def _place_of(self, block: int) -> tuple[Run, tuple[str, ...]]:
        """The run that has a block, and its disks. Raises DataDamaged."""
        if self._placed is not None:
            run, _ = self._placed
            if run.first <= block < run.first + run.count:
                return self._placed
        run = self._run_of(block)
        found = run, self._disks(run)
        self._far = None
        if not self._entry.small:  # where copies are changes with the partition's state
            self._placed = found
        return found

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

    async def _open_or_rebuild(self, window: Window, job: WindowJob, out: memoryview) -> None:
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
        first, left, open_chunks = window.first % k, window.cells, self._opener.open_chunks
        for cells in stripes:
            end = min(k, first + left)
            at = open_chunks(index, [cells[position] for position in range(first, end)], out, at)
            index += end - first
            left -= end - first
            first = 0
        if left:  # the rest of ``out`` was not written, and holds another request's bytes
            raise SealBroken(f"{left} of its chunks are not there")

    async def _expose_liars(self, window: Window, job: WindowJob, cell: int) -> None:
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

    def _search(self, block: int, job: WindowJob, stripe: int) -> dict[int, Buffer] | None:
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

    def _opens(self, block: int, job: WindowJob, stripe: int, data: dict[int, Buffer]) -> bool:
        for cell in range(stripe * job.k, min((stripe + 1) * job.k, job.shape.cells)):
            sealed = memoryview(data[cell % job.k])[: job.shape.cell_length(cell)]
            try:
                self._opener.open(block * self.shape.block_cells + cell, sealed)
            except SealBroken:
                return False
        return True
