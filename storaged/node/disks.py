"""The disks of this node: opened one by one, so that one that is foreign or broken is reported and the others go on.

A disk's directory holds ``meta`` (its LMDB environment and its redo log) and ``fragments`` (its segment log). Which metadata store a disk had is kept in the node's own
directory: a disk whose store is another one, older, or gone must not answer, since it may have forgotten promises.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import structlog

from storaged.clock import Clock
from storaged.cluster.ports import DiskStatus
from storaged.config import Config, DiskSection
from storaged.errors import DirectoryInUse, DiskForeign, IndexDamaged, StoragedError
from storaged.fragments.engine import StoreLimits
from storaged.fragments.payloads import COPY_BYTES_MAX, Payloads, copy_write
from storaged.fragments.ports import FragmentHeader, FragmentId
from storaged.fragments.store import LocalFragmentStore
from storaged.meta.copies import TOLD_BYTES_A_DISK, TOLD_BYTES_MAX, CopiesToldLately, LoadCopy, PlainCopies
from storaged.meta.ports import Copy, Kept, StoreBatch
from storaged.meta.replica import LocalReplica
from storaged.meta.store import LmdbMetaStore
from storaged.node.system import StoreLedger
from storaged.wire import Buffer, decode

log = structlog.get_logger("disks")

OnCell = Callable[[str, FragmentId, int], None]
"""``on_cell(disk, fragment, cell)``: a cell whose checksum does not hold."""


@dataclass
class LocalDisk:
    """One disk in use: both stores and the acceptor over them."""

    id: str
    directory: str
    meta: LmdbMetaStore
    fragments: LocalFragmentStore
    replica: LocalReplica

    async def close(self) -> None:
        await self.replica.close()
        await self.fragments.close()
        await self.meta.close()


class DiskCopies(PlainCopies):
    """Small copies that lie beside the records that name them, in one group of the metadata store's redo log, until they are in the fragment store."""

    def __init__(self, meta: LmdbMetaStore, fragments: LocalFragmentStore, told: CopiesToldLately | None = None) -> None:
        payloads = Payloads(fragments)
        super().__init__(meta, payloads.store_payload, load_of(payloads), payloads.peek_payload, told)
        self._fragments = fragments
        self._records = meta
        meta.keep_copies = fragments.keep
        meta.sync_copies = fragments.sync_apart

    def keep(self, header: bytes, body: Sequence[Buffer], batch: StoreBatch, done: Kept) -> None:
        try:
            record = self._records.ready(batch, partial(done, None))
        except StoragedError as error:
            done(None, error)
            return
        body = [_own(piece) for piece in body]
        try:
            write = copy_write(header, body)
            refusal = self._fragments.refusal(write)
        except StoragedError as error:
            refusal = error
        if refusal is not None:
            done(refusal, None)
        elif write.payload_bytes > COPY_BYTES_MAX:  # the redo log takes none that large
            self._fragments.withdraw(write)
            super().keep(header, body, batch, done)
        else:
            record.copy, record.kept = (header, body), write
            record.size += len(header) + write.payload_bytes
            try:
                self._records.post_ready(record)
            except StoragedError:
                self._fragments.withdraw(write)
                raise


def _own(piece: Buffer) -> Buffer:
    """A copy is kept for longer than its sender knows: in bytes that nobody changes, and that are no part of more."""
    owner = piece.obj if isinstance(piece, memoryview) else piece
    return piece if isinstance(owner, bytes) and len(owner) == len(piece) else bytes(piece)


async def restore_copies(meta: LmdbMetaStore, fragments: LocalFragmentStore) -> None:
    """Gives the fragment store the copies that lie in the redo log. Raises DiskUnusable when it has no room for them: nothing is lost then, they stay in the log."""
    copies = meta.restorable()
    if copies:
        await fragments.restore([(decode(header, FragmentHeader), payload) for header, payload in copies])
    meta.copies_restored()


def load_of(payloads: Payloads) -> LoadCopy:
    async def load(data_id: bytes) -> Copy | None:
        found = await payloads.load_payload(data_id)
        return None if found is None else Copy(*found)

    return load


@dataclass
class Disks:
    """``used`` take part; ``refused`` do not, with the reason (DiskStatus)."""

    used: dict[str, LocalDisk] = field(default_factory=dict)
    refused: dict[str, DiskStatus] = field(default_factory=dict)

    async def statuses(self) -> list[DiskStatus]:
        """As heartbeats tell them."""
        found = list(self.refused.values())
        for disk in self.used.values():
            usage = await disk.fragments.usage()
            meta_state = disk.replica.statistics().state
            state = usage.state if meta_state == "ok" else "failed"
            reason = usage.reason if meta_state == "ok" else f"metadata: {meta_state}"
            found.append(DiskStatus(disk.id, disk.directory, state, usage.bytes_used, usage.bytes_free, reason))
        return sorted(found, key=lambda status: status.id)

    async def close(self) -> None:
        results = await asyncio.gather(*(disk.close() for disk in self.used.values()), return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                log.error("a disk did not close cleanly", reason=str(result))


async def open_disks(config: Config, clock: Clock, on_cell: OnCell) -> Disks:
    """Opens every configured disk. A refused one is logged and reported; raises DirectoryInUse when another process has one: that is a mistake of setup."""
    ledger = StoreLedger(Path(config.node.directory))
    disks = Disks()
    told = CopiesToldLately(min(TOLD_BYTES_A_DISK * len(config.disks), TOLD_BYTES_MAX))
    opened = await asyncio.gather(
        *(_open(section, config, ledger, clock, on_cell, told) for section in config.disks), return_exceptions=True
    )
    failure: BaseException | None = None
    for section, result in zip(config.disks, opened, strict=True):
        if isinstance(result, LocalDisk):
            ledger.record(section.id, result.meta.identity)
            disks.used[section.id] = result
        elif isinstance(result, DirectoryInUse) or not isinstance(result, StoragedError | OSError):
            failure = failure or result
        else:
            state = "foreign" if isinstance(result, DiskForeign) else "index-damaged" if isinstance(result, IndexDamaged) else "failed"
            reason = result.message if isinstance(result, StoragedError) else f"{result.strerror}: {result.filename}"
            log.error("a disk is refused; the others go on", disk=section.id, directory=section.directory, state=state, reason=reason)
            disks.refused[section.id] = DiskStatus(section.id, section.directory, state, reason=reason)
    if failure is not None:
        await disks.close()
        raise failure
    return disks


async def _open(
    section: DiskSection, config: Config, ledger: StoreLedger, clock: Clock, on_cell: OnCell, told: CopiesToldLately
) -> LocalDisk:
    directory, limits = Path(section.directory), config.limits
    expected = ledger.identity(section.id)
    if expected is None:
        await asyncio.to_thread(directory.mkdir, parents=True, exist_ok=True, mode=0o700)
    meta = await asyncio.to_thread(LmdbMetaStore.open_or_refuse, directory / "meta", expected, map_bytes=limits.meta_map_bytes)
    try:
        store_limits = StoreLimits(segment_bytes=limits.segment_bytes, reserve_bytes=limits.reserve_bytes or None)
        fragments = await LocalFragmentStore.open(
            directory / "fragments",
            section.id,
            limits=store_limits,
            clock=clock,
            on_damage=lambda fragment, cell: on_cell(section.id, fragment, cell),
        )
    except BaseException:
        await meta.close()
        raise
    try:
        await restore_copies(meta, fragments)
        replica = LocalReplica(section.id, meta, copies=DiskCopies(meta, fragments, told), clock=clock)
    except BaseException:
        await asyncio.gather(fragments.close(), meta.close())
        raise
    return LocalDisk(section.id, section.directory, meta, fragments, replica)
