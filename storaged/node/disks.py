"""Opens the disks of this node, each by itself: a foreign, broken, blank or hung disk is reported, and the others work.

A disk's directory holds ``meta`` (its LMDB environment and its redo log) and ``fragments`` (its segment log). The
node's own directory records which metadata store each disk had (``node.ledger``). A disk whose store is another one,
older, failed or gone must not answer, as it may have forgotten promises.

Theory of operation. A task for each disk asks ``admission`` whether it may be opened, opens it in a thread of its own,
and adds it to ``Disks``. The start of the node waits ``OPEN_S`` for these tasks. A disk that takes longer, or waits for
other nodes or an operator, joins later: callers look disks up at every call.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import structlog

from storaged.clock import Clock
from storaged.cluster.ports import DiskStatus
from storaged.config import Config, DiskSection
from storaged.errors import DirectoryInUse, DiskForeign, IndexDamaged, StoragedError
from storaged.fragments.limits import StoreLimits
from storaged.fragments.payloads import COPY_BYTES_MAX, Payloads, copy_write
from storaged.fragments.ports import FragmentHeader, FragmentId
from storaged.fragments.store import DiskOwner, LocalFragmentStore
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.storage.lmdb_store import LmdbMetaStore
from storaged.meta.storage.small_copies import (
    COPY_CACHE_BYTES_A_DISK,
    COPY_CACHE_BYTES_MAX,
    LoadCopy,
    PlainCopies,
    SmallCopyCache,
)
from storaged.meta.store_ports import Copy, Kept, StoreBatch
from storaged.node.admission import Opening, admission, drop_acceptance, is_blank, take_acceptance
from storaged.node.forming import Answers, Forming, Verdict, begin_at_once
from storaged.node.ledger import Ledger
from storaged.wire import Buffer, decode

log = structlog.get_logger("disks")

T = TypeVar("T")

OPEN_S = 20.0
"""How long the start of a node waits for its disks. A disk opens within a second, except after a crash with a long log,
or when it hangs.
"""

FORMING_POLL_S = 0.1
ACCEPTED_POLL_S = 1.0

OnCell = Callable[[str, FragmentId, int], None]
"""``on_cell(disk, fragment, cell)``: a cell does not match its checksum."""


@dataclass
class LocalDisk:
    """One disk in use: its two stores, and the acceptor over them."""

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
    """Small copies beside the records that name them. They are in one group of the metadata store's redo log until the
    fragment store has them.
    """

    def __init__(self, meta: LmdbMetaStore, fragments: LocalFragmentStore, cache: SmallCopyCache | None = None) -> None:
        payloads = Payloads(fragments)
        super().__init__(meta, payloads.store_payload, load_of(payloads), payloads.try_load_payload, cache)
        self._fragments = fragments
        self._records = meta
        meta.hooks.keep_copies = fragments.keep
        meta.hooks.sync_copies = fragments.sync_apart

    def keep(self, header: bytes, body: Sequence[Buffer], batch: StoreBatch, on_done: Kept) -> None:
        try:
            record = self._records.pack(batch, partial(on_done, None))
        except StoragedError as error:
            on_done(None, error)
            return
        body = [_own(piece) for piece in body]
        try:
            write = copy_write(header, body)
            refusal = self._fragments.admit(write)
        except StoragedError as error:
            refusal = error
        if refusal is not None:
            on_done(refusal, None)
        elif write.payload_bytes > COPY_BYTES_MAX:  # the redo log takes no group so large
            self._fragments.withdraw(write)
            super().keep(header, body, batch, on_done)
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
    """The disks of this node. ``used`` take part; ``refused`` do not, with the reason (DiskStatus).

    ``replicas``, ``fragments`` and ``metas`` are those of disks in use, by disk id. They grow when a disk joins late.
    """

    def __init__(self) -> None:
        self.used: dict[str, LocalDisk] = {}
        self.refused: dict[str, DiskStatus] = {}
        self.replicas: dict[str, LocalReplica] = {}
        self.fragments: dict[str, LocalFragmentStore] = {}
        self.metas: dict[str, LmdbMetaStore] = {}
        self._coming: dict[str, asyncio.Task[None]] = {}

    def refuse(self, section: DiskSection, state: str, reason: str, *, waits: bool = False) -> None:
        """Leaves a disk out for now, and logs a new reason. ``waits``: it waits for the other nodes of a new cluster,
        as expected.
        """
        known = self.refused.get(section.id)
        if known is None or (known.state, known.reason) != (state, reason):
            facts = {"disk": section.id, "directory": section.directory, "state": state, "reason": reason}
            if waits:
                log.info("a disk waits", **facts)
            else:
                log.error("a disk is refused; the others go on", **facts)
        self.refused[section.id] = DiskStatus(section.id, section.directory, state, reason=reason)

    def join(self, disk: LocalDisk) -> None:
        if self.refused.pop(disk.id, None) is not None:
            log.info("a disk joins", disk=disk.id, directory=disk.directory)
        self.used[disk.id] = disk
        self.metas[disk.id], self.fragments[disk.id], self.replicas[disk.id] = disk.meta, disk.fragments, disk.replica

    def expect(self, disk_id: str, coming: asyncio.Task[None]) -> None:
        """``coming`` opens the disk; ``close`` cancels it."""
        self._coming[disk_id] = coming

    async def statuses(self) -> list[DiskStatus]:
        """The states of all disks, as heartbeats carry them."""
        found = list(self.refused.values())
        for disk in list(self.used.values()):
            usage = await disk.fragments.usage()
            meta_state = disk.replica.statistics().state
            state = usage.state if meta_state == "ok" else "failed"
            reason = usage.reason if meta_state == "ok" else f"metadata: {meta_state}"
            found.append(DiskStatus(disk.id, disk.directory, state, usage.bytes_used, usage.bytes_free, reason))
        return sorted(found, key=lambda status: status.id)

    async def close(self) -> None:
        for task in self._coming.values():
            task.cancel()
        await asyncio.gather(*self._coming.values(), return_exceptions=True)
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


class NoticeAccepted(Protocol):
    def __call__(self, disk_id: str, directory: str, uid: int) -> None: ...


@dataclass(frozen=True)
class OpenerPorts:
    """What opening disks asks of the node."""

    forming: Forming = begin_at_once
    """Whether blank disks may begin without an operator, from the other nodes' ledgers (``node.forming``)."""
    epoch: Callable[[], int] = lambda: 1
    """The epoch of the layout in force."""
    on_accepted: NoticeAccepted | None = None
    """Called for a disk that an operator accepted."""


class Opener:
    """Opens the configured disks into ``disks``."""

    def __init__(
        self,
        config: Config,
        clock: Clock,
        on_cell: OnCell,
        ledger: Ledger,
        ports: OpenerPorts = OpenerPorts(),  # frozen
        *,
        open_s: float = OPEN_S,
    ) -> None:
        self.disks = Disks()
        self.ledger = ledger
        self.foreign_stores = False
        """Whether there are stores that the ledger does not know: then this node is not new."""
        self._config = config
        self._clock = clock
        self._on_cell = on_cell
        self._ports = ports
        self._open_s = open_s
        self._first = False
        """Whether this very process formed the node."""
        self._copy_cache = SmallCopyCache(min(COPY_CACHE_BYTES_A_DISK * len(config.disks), COPY_CACHE_BYTES_MAX))
        self._failure: BaseException | None = None

    async def open(self) -> Disks:
        """Opens all disks; waits until each is in use, is refused, or has had OPEN_S. Raises DirectoryInUse when
        another process uses one, as that is a mistake of set-up.
        """
        settled = {section.id: asyncio.Event() for section in self._config.disks}
        for section in self._config.disks:
            self.disks.expect(
                section.id, asyncio.get_running_loop().create_task(self._bring_up(section, settled[section.id]))
            )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._open_s):
                await asyncio.gather(*(event.wait() for event in settled.values()))
        for section in self._config.disks:
            if not settled[section.id].is_set():
                self.disks.refuse(section, "hung", f"it has not answered within {self._open_s:.0f} s of being opened")
        if self._failure is not None:
            await self.disks.close()
            raise self._failure
        return self.disks

    async def _bring_up(self, section: DiskSection, settled: asyncio.Event) -> None:
        """Brings one disk into use, or refuses it for good."""
        try:
            opening = await self._admitted(section, settled)
            disk = await self._open(section, opening)
        except (DirectoryInUse, StoragedError, OSError) as error:
            if isinstance(error, DirectoryInUse):
                self._failure = self._failure or error
            state = (
                "foreign"
                if isinstance(error, DiskForeign)
                else "index-damaged"
                if isinstance(error, IndexDamaged)
                else "failed"
            )
            reason = error.message if isinstance(error, StoragedError) else f"{error.strerror}: {error.filename}"
            self.disks.refuse(section, state, reason)
        except Exception as mistake:  # a defect of storaged
            if settled.is_set():
                log.exception("a disk could not be opened", disk=section.id)
            self._failure = self._failure or mistake
        else:
            self.disks.join(disk)
        settled.set()

    async def _admitted(self, section: DiskSection, settled: asyncio.Event) -> Opening:
        """Waits until the disk may be opened. Raises DiskForeign for a disk that waiting does not help."""
        place, directory = Path(self._config.node.directory), Path(section.directory)
        while True:
            blank = await in_own_thread(partial(is_blank, directory))
            answers = self._answers()
            admitted = admission(self.ledger, section.id, blank, answers.verdict)
            if admitted.opening is not None:
                if admitted.form:
                    self._first = True
                    await asyncio.to_thread(self.ledger.form, answers.ledgers, [section.id])
                return admitted.opening
            self.foreign_stores = self.foreign_stores or not blank
            if (accepted := take_acceptance(place, section.id)) is not None:
                await asyncio.to_thread(self.ledger.accept, section.id)
                drop_acceptance(place, section.id)
                log.warning(
                    "a disk was accepted by an operator",
                    disk=section.id,
                    directory=section.directory,
                    blank=blank,
                    uid=accepted,
                )
                if self._ports.on_accepted is not None:
                    self._ports.on_accepted(section.id, section.directory, accepted)
                return Opening(accepted=True)
            waits = blank and not self.ledger.formed
            self.disks.refuse(section, admitted.state, f"{directory}: {admitted.reason}", waits=waits)
            settled.set()
            await asyncio.sleep(FORMING_POLL_S if not self.ledger.formed else ACCEPTED_POLL_S)

    def _answers(self) -> Answers:
        if self._first:
            return begin_at_once()
        return Answers(Verdict(False)) if self.ledger.formed else self._ports.forming()

    async def _open(self, section: DiskSection, opening: Opening) -> LocalDisk:
        directory, limits, ledger = Path(section.directory), self._config.limits, self.ledger
        if failure := ledger.failure(section.id, "meta"):
            raise DiskForeign(
                f"the metadata store in {directory / 'meta'} failed before, as this node noted, and is not used again:"
                f" {failure}"
            )
        drop_acceptance(Path(self._config.node.directory), section.id)
        if opening.expected is None:
            await in_own_thread(partial(directory.mkdir, parents=True, exist_ok=True, mode=0o700))
        open_meta = partial(
            LmdbMetaStore.open_or_refuse, directory / "meta", opening.expected, map_bytes=limits.meta_map_bytes
        )
        meta = await in_own_thread(open_meta)
        meta.hooks.on_failed = partial(self._note_failed, section.id, "meta")
        try:
            fragments = await LocalFragmentStore.open(
                directory / "fragments",
                section.id,
                limits=StoreLimits(segment_bytes=limits.segment_bytes, reserve_bytes=limits.reserve_bytes or None),
                owner=DiskOwner(
                    clock=self._clock,
                    on_damage=lambda fragment, cell: self._on_cell(section.id, fragment, cell),
                    failed_before=ledger.failure(section.id, "fragments"),
                    note_failed=partial(self._note_failed, section.id, "fragments"),
                    in_thread=in_own_thread,
                ),
            )
        except BaseException:
            await meta.close()
            raise
        try:
            await restore_copies(meta, fragments)
            replica = LocalReplica(
                section.id, meta, copies=DiskCopies(meta, fragments, self._copy_cache), clock=self._clock
            )
            if opening.accepted:  # its earlier promises are unknown: this is above all of them
                await replica.end_promises(self._ports.epoch())
            await asyncio.to_thread(ledger.record, section.id, meta.identity)
        except BaseException:
            await asyncio.gather(fragments.close(), meta.close())
            raise
        return LocalDisk(section.id, section.directory, meta, fragments, replica)

    def _note_failed(self, disk_id: str, store: str, reason: str) -> bool:
        """Called in the thread of a store that failed for good. Returns whether the ledger will tell the next start."""
        try:
            self.ledger.note_failed(disk_id, store, reason)
        except OSError as error:
            log.error("the failure of a disk can't be noted", disk=disk_id, store=store, reason=str(error))
            return False
        return True


async def in_own_thread(work: Callable[[], T], /) -> T:
    """Runs ``work`` in a thread of its own. Nothing waits for that thread at the end: a disk that hangs keeps it."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def tell(set_outcome: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits any more
            loop.call_soon_threadsafe(lambda: None if outcome.done() else set_outcome())

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # raised again where it is awaited
            tell(partial(outcome.set_exception, error))
        else:
            tell(partial(outcome.set_result, result))

    threading.Thread(target=run, name="disk-opening", daemon=True).start()
    return await outcome
