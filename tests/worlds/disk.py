"""One disk of a node as the node opens it: records and small copies in one redo log, which can be held up, and the
fragment log that the copies go to later.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from storaged.aio import OnDone
from storaged.fragments.limits import StoreLimits
from storaged.fragments.store import LocalFragmentStore
from storaged.meta.storage.lmdb_store import LmdbMetaStore
from storaged.node.disks import DiskCopies, restore_copies
from storaged.wire import Buffer
from tests.doubles.files import SimulatedFiles
from tests.worlds.fragments import DISK


class HeldLog:
    """Sits between a store and its redo log, on the event loop. A group that comes after ``hold`` is not written until
    ``go_on``, or (``written``) it is written and not acknowledged.
    """

    def __init__(self, store: LmdbMetaStore) -> None:
        self.held = asyncio.Event()
        """A group is being held up."""
        self.groups = 0
        self._redo = store._state.redo
        self._begin = self._redo.try_write
        self._redo.try_write = self._begun  # type: ignore[method-assign]
        self._holding = self._written = False
        self._waiting: Callable[[Exception | None], None] | None = None

    def hold(self, *, written: bool = False) -> None:
        self._holding, self._written = True, written

    def go_on(self, error: Exception | None = None) -> None:
        """``error``: what becomes of the group that waits."""
        self._holding = False
        self.held.clear()
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            asyncio.get_running_loop().call_soon(waiting, error)

    def _begun(self, loop: asyncio.AbstractEventLoop, body: Buffer, done: OnDone) -> bool:
        self.groups += 1
        if not self._holding:
            return self._begin(loop, body, done)
        if self._written:
            self._redo.write(body)
        self._waiting = partial(self._end, body, done, self._written)
        self.held.set()
        return True

    def _end(
        self, body: Buffer, done: Callable[[Exception | None], None], written: bool, error: Exception | None
    ) -> None:
        if error is None and not written:
            self._redo.write(body)
        done(error)


class LogDisk:
    """Both stores of a disk. ``hold``: no record gets to its disk until ``go_on``, nor its copy."""

    def __init__(self, meta: LmdbMetaStore, fragments: LocalFragmentStore, files: SimulatedFiles | None) -> None:
        self.meta = meta
        self.fragments = fragments
        self.files = files
        self.copies = DiskCopies(meta, fragments)
        self.log = HeldLog(meta)

    @classmethod
    async def opened(
        cls,
        directory: Path,
        *,
        simulated: bool = True,
        files: SimulatedFiles | None = None,
        direct: bool = True,
        map_bytes: int = 1 << 26,
        **limits: int,
    ) -> LogDisk:
        meta = LmdbMetaStore(directory / "meta", map_bytes=map_bytes, direct=direct)
        if files is None and simulated:
            files = SimulatedFiles()
        try:
            fragments = await LocalFragmentStore.open(
                directory / "fragments", DISK, files=files, limits=StoreLimits(**limits)
            )
        except BaseException:
            await meta.close()
            raise
        return cls(meta, fragments, files)

    @property
    def held(self) -> asyncio.Event:
        return self.log.held

    def set_full(self, full: bool) -> None:
        assert self.files is not None
        self.files.limit = 1 if full else 0

    def hold(self, *, written: bool = False) -> None:
        self.log.hold(written=written)

    def go_on(self, error: Exception | None = None) -> None:
        self.log.go_on(error)

    async def close(self) -> None:
        """As a node does."""
        self.log.go_on()
        await self.fragments.close()
        await self.meta.close()


async def died(disk: LogDisk, directory: Path) -> LogDisk:
    """The disk as a process finds it whose predecessor was killed now."""
    place = directory / "died"
    for name in ("meta", "fragments"):
        await asyncio.to_thread(shutil.copytree, directory / name, place / name)
    await disk.close()
    found = await LogDisk.opened(place, simulated=False, reserve_bytes=1)
    await restore_copies(found.meta, found.fragments)
    return found
