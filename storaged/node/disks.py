"""The disks of this node: those in use, with their stores, and those that are left out, with the reason.

A disk's directory holds ``meta`` (its LMDB environment and its redo log) and ``fragments`` (its segment log).
``node.opener`` opens them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog

from storaged.cluster.ports import DiskStatus
from storaged.config import DiskSection
from storaged.disk_health import DiskHealth
from storaged.disk_states import Finding
from storaged.errors import StoragedError
from storaged.fragments.payloads import COPY_BYTES_MAX, Payloads, copy_write
from storaged.fragments.ports import FragmentHeader
from storaged.fragments.store import LocalFragmentStore
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.storage.lmdb_store import LmdbMetaStore
from storaged.meta.storage.small_copies import LoadCopy, PlainCopies, SmallCopyCache
from storaged.meta.store_ports import Copy, Kept, StoreBatch
from storaged.node.admission import WAITING
from storaged.node.disk_watch import DiskWatch, log_change, probe, watch_health
from storaged.units import KIB
from storaged.wire import Buffer, decode

log = structlog.get_logger("disks")

T = TypeVar("T")

ADMISSION = "admission"
"""The source of findings that keep a disk out of use (``opener``)."""

CLOSE_LOOK_S = 0.1
"""How often a disk that is being closed is looked at: the end of a node waits for none that hangs."""


@dataclass
class LocalDisk:
    """One disk in use: its two stores, and the acceptor over them."""

    id: str
    directory: str
    meta: LmdbMetaStore
    fragments: LocalFragmentStore
    replica: LocalReplica
    watch: DiskWatch | None = None

    @property
    def health(self) -> DiskHealth:
        return self.meta.health

    async def close(self) -> None:
        """Raises DiskUnusable when the disk hangs. Then it stays open: the process ends without it."""
        if self.watch is not None:
            self.watch.stop()
        if self.health.given_up:
            self.health.check()
        closing = asyncio.get_running_loop().create_task(self._close())
        while not closing.done():
            await asyncio.wait((closing,), timeout=CLOSE_LOOK_S)
            self.health.look()
            if self.health.hung and not closing.done():
                closing.cancel()
                self.health.check()
        closing.result()

    async def _close(self) -> None:
        await self.replica.close()
        await self.fragments.close()
        await self.meta.close()


LOGGED_BYTES_MAX = 65 * KIB
"""Larger copies are not written to the redo log first: their bytes would go to the disk twice. Those of a round that
settles are, since a full disk takes them only there, unless the log takes no group so large. A body of 64 KiB is a
little longer when it is sealed.
"""


class DiskCopies(PlainCopies):
    """Copies beside the records that name them. Up to ``LOGGED_BYTES_MAX`` both are in one group of the metadata
    store's redo log until the fragment store has the copy. A larger one is synced in its segment before the record goes
    to the log.
    """

    def __init__(self, meta: LmdbMetaStore, fragments: LocalFragmentStore, cache: SmallCopyCache | None = None) -> None:
        payloads = Payloads(fragments)
        super().__init__(
            meta, payloads.store_payload, load_of(payloads), payloads.try_load_payload, cache, payloads.holds_payload
        )
        self._fragments = fragments
        self._records = meta
        meta.hooks.keep_copies = fragments.keep
        meta.hooks.sync_copies = fragments.sync_apart

    def keep(
        self,
        header: bytes,
        body: Sequence[Buffer],
        batch: StoreBatch,
        on_done: Kept,
        *,
        settling: bool = False,
        check: bytes = b"",
    ) -> None:
        try:
            record = self._records.pack(batch, partial(on_done, None))
        except StoragedError as error:  # first: a copy whose record has no room would stay without one
            on_done(None, error)
            return
        if sum(map(len, body)) > (COPY_BYTES_MAX if settling else LOGGED_BYTES_MAX):
            super().keep(header, body, batch, on_done, check=check)
            return
        body = [_own(piece) for piece in body]
        try:
            write = copy_write(header, body, check)
            refusal = self._fragments.admit(write, into_reserve=settling)
        except StoragedError as error:
            refusal = error
        if refusal is not None:
            on_done(refusal, None)
        else:
            record.copy, record.copy_write = (header, body), write
            record.size += len(header) + write.payload_bytes
            try:
                self._records.post_packed(record)
            except StoragedError:
                self._fragments.withdraw(write)
                raise


def _own(piece: Buffer) -> Buffer:
    """Copies the bytes: they are kept longer than the sender knows, and must not change or hold a larger buffer."""
    owner = piece.obj if isinstance(piece, memoryview) else piece
    return piece if isinstance(owner, bytes) and len(owner) == len(piece) else bytes(piece)


async def restore_copies(meta: LmdbMetaStore, fragments: LocalFragmentStore) -> None:
    """Gives the fragment store the copies in the redo log. Raises DiskUnusable when there is no room; they stay in the
    log then.
    """
    copies = meta.restorable()
    if copies:
        await fragments.restore([(decode(header, FragmentHeader), payload) for header, payload in copies])
    meta.copies_restored()


def load_of(payloads: Payloads) -> LoadCopy:
    async def load(data_id: bytes) -> Copy | None:
        found = await payloads.load_payload(data_id)
        return None if found is None else Copy(*found)

    return load


class Disks:
    """The disks of this node. ``used`` take part; others are left out, with the reason (``refused``).

    ``healths``: of every configured disk, from before it is opened, by disk id. ``replicas``, ``fragments`` and
    ``metas`` are those of disks in use. They grow when a disk joins late.
    """

    def __init__(self, sections: Sequence[DiskSection] = (), reserve_bytes: int | None = None) -> None:
        self.used: dict[str, LocalDisk] = {}
        self.replicas: dict[str, LocalReplica] = {}
        self.fragments: dict[str, LocalFragmentStore] = {}
        self.metas: dict[str, LmdbMetaStore] = {}
        self.healths = {section.id: DiskHealth(section.id, reserve_bytes=reserve_bytes) for section in sections}
        self.on_change: Callable[[], None] = lambda: None
        """Called when a disk begins to hang or to be late, or is well again."""
        self._directories = {section.id: section.directory for section in sections}
        self._coming: dict[str, asyncio.Task[None]] = {}
        self._watching: asyncio.Task[None] | None = None

    @property
    def refused(self) -> dict[str, Finding]:
        """Why disks take no part, by disk id."""
        found = {disk: health.noted(ADMISSION) for disk, health in self.healths.items()}
        return {disk: finding for disk, finding in found.items() if finding is not None}

    def refuse(self, section: DiskSection, state: str, reason: str) -> None:
        """Leaves a disk out until it joins, and logs a new reason. State ``waiting``: it waits for other nodes."""
        health = self.healths.setdefault(section.id, DiskHealth(section.id))
        self._directories.setdefault(section.id, section.directory)
        if health.noted(ADMISSION) != (state, reason):
            facts = {"disk": section.id, "directory": section.directory, "state": state, "reason": reason}
            if state == WAITING:
                log.warning("a disk waits", **facts)
            else:
                log.error("a disk is refused; the others go on", **facts)
        health.note(ADMISSION, state, reason)

    def join(self, disk: LocalDisk) -> None:
        health = disk.health
        if health.noted(ADMISSION) is not None:
            log.info("a disk joins", disk=disk.id, directory=disk.directory)
            health.clear(ADMISSION)
        self.used[disk.id] = disk
        self.healths[disk.id] = health
        health.on_change = self._changed
        disk.watch = DiskWatch(health, (disk.meta.look, disk.fragments.look), partial(probe, Path(disk.directory)))
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(watch_health(self.healths))
        self.metas[disk.id], self.fragments[disk.id], self.replicas[disk.id] = disk.meta, disk.fragments, disk.replica

    def _changed(self, health: DiskHealth, before: str) -> None:
        log_change(health, before)
        self.on_change()

    def silence(self, disk_id: str, state: str, reason: str) -> None:
        """Ends the part that a disk takes: it was in use, and must not have been. Its stores stay open."""
        self.used[disk_id].replica.silence(reason)
        self.healths[disk_id].note(ADMISSION, state, reason)
        log.error("a disk in use is refused; the others go on", disk=disk_id, state=state, reason=reason)

    def waits(self) -> str:
        """Which disks wait for other nodes, and for what; empty when none does."""
        waiting = [finding for finding in self.refused.values() if finding.state == WAITING]
        if not waiting:
            return ""
        return f"{len(waiting)} disk{'s wait' if len(waiting) > 1 else ' waits'}: {waiting[0].reason}"

    def expect(self, disk_id: str, coming: asyncio.Task[None]) -> None:
        """``coming`` opens the disk; ``close`` cancels it."""
        self._coming[disk_id] = coming

    async def statuses(self) -> list[DiskStatus]:
        """The states of all disks but those that are being opened, as heartbeats carry them."""
        refused = self.refused
        return [await self._status(disk_id) for disk_id in sorted(refused.keys() | self.used.keys())]

    async def _status(self, disk_id: str) -> DiskStatus:
        health = self.healths[disk_id]
        if health.noted(ADMISSION) is not None:
            state, reason = health.finding()
            return DiskStatus(disk_id, self._directories[disk_id], state, reason=reason)
        used = self.used[disk_id]
        usage = await used.fragments.usage()
        state, reason = health.finding()
        return DiskStatus(
            disk_id,
            used.directory,
            state,
            usage.bytes_used,
            usage.bytes_free,
            reason,
            health.room.few,
            health.room.ample,
            health.latency_ms(),
        )

    async def close(self) -> None:
        for task in self._coming.values():
            task.cancel()
        await asyncio.gather(*self._coming.values(), return_exceptions=True)
        if self._watching is not None:
            self._watching.cancel()
        results = await asyncio.gather(*(disk.close() for disk in self.used.values()), return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                log.error("a disk did not close cleanly", reason=str(result))


class Snapshot(Mapping[str, T]):
    """A view of a dictionary that may change while it is iterated over, for work that awaits in between."""

    def __init__(self, inner: Mapping[str, T]) -> None:
        self._inner = inner

    def __getitem__(self, key: str) -> T:
        return self._inner[key]

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._inner))

    def __len__(self) -> int:
        return len(self._inner)
