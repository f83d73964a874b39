"""Opens the disks of this node, each by itself: a foreign, broken, blank or hung disk is reported, and the others work.

Theory of operation. A task for each disk looks whether it is blank, waits until the other nodes' ledgers have been read
(``ledger_exchange``), asks ``admission`` whether the disk may be opened, and opens it in a thread of its own. Then the
disk's new start is claimed at a majority of the ledgers, and the disk joins ``Disks``. Until then it answers nothing.

The start of the node waits ``OPEN_S`` for these tasks. A disk that takes longer, or waits for other nodes, joins later:
callers look disks up at every call.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import structlog

from storaged.clock import Clock
from storaged.cluster.claims import DiskClaim
from storaged.config import Config, DiskSection
from storaged.disk_states import CHECKING, UNREADABLE
from storaged.durable import make_directory
from storaged.errors import (
    DirectoryInUse,
    DiskDamaged,
    DiskForeign,
    DiskRolledBack,
    DiskUnreadable,
    IndexDamaged,
    StoragedError,
)
from storaged.fragments.limits import StoreLimits
from storaged.fragments.ports import FragmentId
from storaged.fragments.store import DiskOwner, LocalFragmentStore
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.storage.identity import owner_of
from storaged.meta.storage.lmdb_store import LmdbMetaStore
from storaged.meta.storage.opening import Known
from storaged.meta.storage.small_copies import COPY_CACHE_BYTES_A_DISK, COPY_CACHE_BYTES_MAX, SmallCopyCache
from storaged.node.admission import (
    HINT,
    LOST,
    LOST_REASON,
    WAITING,
    Admitted,
    DiskFacts,
    OwnLedger,
    admission,
    is_blank,
    may_begin_unclaimed,
)
from storaged.node.disks import DiskCopies, Disks, LocalDisk, restore_copies
from storaged.node.fault_note import died_by_bus_error, forget_faults, read_disk
from storaged.node.forming import ids_of
from storaged.node.ledger import Ledger
from storaged.node.ledger_exchange import LayoutHistory, LoneLedger

log = structlog.get_logger("disks")

T = TypeVar("T")

OPEN_S = 20.0
"""How long the start of a node waits for its disks. A disk opens within a second, except after a crash with a long log,
or when it hangs.
"""

CLAIM_S = 1.0
"""How long the start of a disk may take to reach a majority of the ledgers, before the disk is said to wait."""

LOOK_AGAIN_S = 1.0


class Place(NamedTuple):
    """What the layout in force says of a disk of this node (``DiskFacts``)."""

    named: bool
    joins: bool
    lost: bool = False


IN_PLACE = Place(named=True, joins=False)


def place_in(layouts: LayoutHistory, node: str, disk: str) -> Place:
    """Of a disk in the configuration of ``node``."""
    layout = layouts.current
    if disk in layout.lost:
        return Place(named=False, joins=False, lost=True)
    entry = layout.disk_by_id.get(disk)
    if entry is None or entry.node != node:
        return Place(named=False, joins=False)
    first = next((old for old in layouts.earlier() if old.epoch == layout.base), None)
    # The claims on a disk that took part before ledgers were lost may be lost, too.
    older = [old for old in layouts.earlier() if old.epoch < layout.seeds_recovered]
    joins = first is not None and not any(disk in old.disk_by_id for old in (first, *older))
    return Place(True, joins)


OnCell = Callable[[str, FragmentId, int], None]
"""``on_cell(disk, fragment, cell)``: a cell does not match its checksum."""


class Opener:
    """Opens the configured disks into ``disks``. Implements ``ledger_exchange.ExchangePorts``."""

    def __init__(
        self,
        config: Config,
        clock: Clock,
        on_cell: OnCell,
        ledger: Ledger,
        *,
        cluster: str = "",
        open_s: float = OPEN_S,
        place_of: Callable[[str], Place] = lambda _disk: IN_PLACE,
    ) -> None:
        """``cluster``: its id, which a store notes; empty: stores note nothing. ``place_of(disk)``: what the layout in
        force says of a disk.
        """
        self.disks = Disks(config.disks, config.limits.reserve_bytes or None)
        self.ledger = ledger
        self.ledgers = LoneLedger(ledger)
        """Of all nodes. Replaced before ``open`` where there are others."""
        self._config = config
        self._cluster = cluster
        self._clock = clock
        self._on_cell = on_cell
        self._open_s = open_s
        self._place_of = place_of
        self._unread = {section.id for section in config.disks} if self._bus_error() else set()
        """Disks whose metadata must be read before they are opened (``fault_note``)."""
        self._blank: dict[str, bool] = {}
        """Whether a disk was blank when this process looked."""
        self._settling = asyncio.Lock()
        self._all_seen = asyncio.Event()
        self._copy_cache = SmallCopyCache(min(COPY_CACHE_BYTES_A_DISK * len(config.disks), COPY_CACHE_BYTES_MAX))
        self._failure: BaseException | None = None

    def _bus_error(self) -> bool:
        return died_by_bus_error(Path(self._config.node.directory))

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
            if not settled[section.id].is_set() and section.id not in self._unread:
                self.disks.refuse(section, "hung", f"it has not answered within {self._open_s:.0f} s of being opened")
        if self._failure is not None:
            await self.disks.close()
            raise self._failure
        return self.disks

    async def close(self) -> None:
        """Closes all disks, and records how far they came."""
        await self.disks.close()
        try:
            self.ledger.note_positions(self.positions())
            await asyncio.to_thread(self.ledger.flush)
        except OSError as error:
            log.error("the ledger of this node can't be written", reason=str(error))

    # --- ``ExchangePorts``

    def formed(self) -> bool | None:
        if self.ledger.formed or False in self._blank.values():
            return True
        return False if len(self._blank) == len(self._config.disks) else None

    def positions(self) -> Mapping[str, int]:
        return {disk: meta.position for disk, meta in self.disks.metas.items()}

    def on_outdated(self, disk_id: str, error: DiskForeign) -> None:
        if disk_id in self.disks.used:
            self.disks.silence(disk_id, _state_of(error), error.message)

    def follow(self) -> None:
        """Another layout is in force: ends the part of disks that it calls lost for good."""
        for disk in list(self.disks.used):
            if disk not in self.disks.refused and self._place_of(disk).lost:
                self.disks.silence(disk, LOST, f"{LOST_REASON}; {HINT.format('DISK_LOST')}")

    # --- one disk

    async def _bring_up(self, section: DiskSection, settled: asyncio.Event) -> None:
        """Brings one disk into use, or refuses it for good."""
        try:
            await self._read_first(section)
            self._blank[section.id] = await in_own_thread(partial(is_blank, Path(section.directory)))
            await self._look_at_others()
            await self.ledgers.heard_first()
            admitted = await self._admitted(section, settled)
            if admitted.opens:
                self.disks.join(await self._open(section, admitted.expected, settled))
                self.follow()
        except (DirectoryInUse, StoragedError, OSError) as error:
            if isinstance(error, DirectoryInUse):
                self._failure = self._failure or error
            reason = error.message if isinstance(error, StoragedError) else f"{error.strerror}: {error.filename}"
            self.disks.refuse(section, _state_of(error), reason)
        except Exception as mistake:  # a defect of storaged
            if settled.is_set():
                log.exception("a disk could not be opened", disk=section.id)
            self._failure = self._failure or mistake
        settled.set()

    async def _read_first(self, section: DiskSection) -> None:
        """After a death by SIGBUS: finds out whether the disk's metadata can be read. Raises DiskUnreadable."""
        if section.id not in self._unread:
            return
        self.disks.refuse(section, CHECKING, "its metadata is read first: the process before died by SIGBUS")
        await in_own_thread(partial(read_disk, Path(section.directory)))
        self._unread.discard(section.id)
        if not self._unread:
            await asyncio.to_thread(forget_faults, Path(self._config.node.directory))

    async def _look_at_others(self) -> None:
        """The first start of a node is one of all its disks. One that hangs holds up the others for a moment only."""
        if len(self._blank) == len(self._config.disks):
            self._all_seen.set()
        if not self.ledger.formed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_AGAIN_S):
                    await self._all_seen.wait()

    async def _admitted(self, section: DiskSection, settled: asyncio.Event) -> Admitted:
        """Returns when it is decided whether the disk may be opened; meanwhile the disk waits for other nodes."""
        while True:
            await self._settle_new_ledger()
            admitted = admission(self._facts(section), self._own_ledger(), self.ledgers.view())
            if admitted.opens:
                if admitted.form:
                    await self._form()
                if admitted.joins:
                    await self._join(section.id)
                return admitted
            self.disks.refuse(section, admitted.state, f"{section.directory}: {admitted.reason}")
            settled.set()
            if not admitted.waits:
                return admitted
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_AGAIN_S):
                    await self.ledgers.changed()

    def _facts(self, section: DiskSection) -> DiskFacts:
        """Of a disk that was looked at."""
        ledger, disk = self.ledger, section.id
        place = self._place_of(disk)
        return DiskFacts(
            disk,
            self._blank[disk],
            ledger.knows(disk),
            ledger.claimed(disk),
            ledger.failure(disk, "meta"),
            place.named,
            place.joins,
            place.lost,
        )

    def _own_ledger(self) -> OwnLedger:
        return OwnLedger(self.ledger.id, self.formed(), self.ledger.fresh)

    async def _settle_new_ledger(self) -> None:
        """Rebuilds a new ledger once the others have been read, and lets stores begin that no ledger remembers, when
        all ledgers were lost.
        """
        async with self._settling:
            await self.ledgers.rebuild()
            sections = self._config.disks
            if not self.ledger.fresh or len(self._blank) < len(sections):
                return
            begin = may_begin_unclaimed(self._own_ledger(), self.ledgers.view(), map(self._facts, sections))
            if begin:
                log.warning("no ledger remembers these disks; they begin with what they have", disks=begin)
                await asyncio.to_thread(self.ledger.form, {}, begin)
            if begin is not None:
                await asyncio.to_thread(self.ledger.count_again, fresh=False)

    async def _form(self) -> None:
        """Records that this node begins with all its disks, unless they have a store."""
        new = [section.id for section in self._config.disks if self._blank.get(section.id, True)]
        await asyncio.to_thread(self.ledger.form, ids_of(self.ledgers.view().others), new)

    async def _join(self, disk: str) -> None:
        """Records that this node begins with one disk more. A new node also records the other nodes' ledgers."""
        log.info("a disk joins the cluster", disk=disk)
        others = {} if self.ledger.formed else ids_of(self.ledgers.view().others)
        await asyncio.to_thread(self.ledger.form, others, [disk])

    async def _open(self, section: DiskSection, expected: DiskClaim | None, settled: asyncio.Event) -> LocalDisk:
        directory, ledger = Path(section.directory), self.ledger
        if expected is None:
            await in_own_thread(partial(make_directory, directory, 0o700))
        meta = await in_own_thread(partial(self._open_meta, section, expected))
        meta.hooks.on_failed = partial(self._note_failed, section.id, "meta")
        try:
            fragments = await LocalFragmentStore.open(
                directory / "fragments",
                section.id,
                limits=StoreLimits(
                    segment_bytes=self._config.limits.segment_bytes,
                    reserve_bytes=self._config.limits.reserve_bytes or None,
                ),
                owner=DiskOwner(
                    clock=self._clock,
                    on_damage=lambda fragment, cell: self._on_cell(section.id, fragment, cell),
                    failed_before=ledger.failure(section.id, "fragments"),
                    note_failed=partial(self._note_failed, section.id, "fragments"),
                    in_thread=in_own_thread,
                    health=meta.health,
                ),
            )
        except BaseException:
            await meta.close()
            raise
        gaps, gone = fragments.report.gaps, fragments.report.lost_segments
        if gaps or gone:
            log.warning(
                "the log of fragments is damaged, or has lost a part; repair writes anew what is missing",
                disk=section.id,
                damaged_bytes=sum(length for _, _, length in gaps),
                segments_gone=len(gone),
                hint=f"storaged fsck {section.directory} (while the node is stopped) says which",
            )
        try:
            await restore_copies(meta, fragments)
            await in_own_thread(fragments.look)  # from now on the event loop asks the file system nothing
            copies = DiskCopies(meta, fragments, self._copy_cache)
            replica = await in_own_thread(partial(LocalReplica, section.id, meta, copies=copies, clock=self._clock))
            await self._claim(section, meta, settled)
        except BaseException:
            await asyncio.gather(fragments.close(), meta.close())
            raise
        return LocalDisk(section.id, section.directory, meta, fragments, replica)

    def _open_meta(self, section: DiskSection, expected: DiskClaim | None) -> LmdbMetaStore:
        """In a thread."""
        identity = expected.store + expected.starts.to_bytes(8, "big") if expected is not None else None
        position = expected.position if expected is not None else 0
        return LmdbMetaStore.open_or_refuse(
            Path(section.directory) / "meta",
            identity,
            map_bytes=self._config.limits.meta_map_bytes,
            known=Known(position, owner_of(self._cluster, section.id) if self._cluster else b""),
            health=self.disks.healths[section.id],
        )

    async def _claim(self, section: DiskSection, meta: LmdbMetaStore, settled: asyncio.Event) -> None:
        """Returns when a majority of the ledgers has the start of a disk. Raises as ``LoneLedger.publish``."""
        claim = DiskClaim(section.id, meta.store_id, meta.starts, meta.position)
        claiming = asyncio.get_running_loop().create_task(self.ledgers.publish(claim))
        try:
            await asyncio.wait((claiming,), timeout=CLAIM_S)
            if not claiming.done():
                waits = self.ledgers.view().waits_for() or "their answer"
                reason = f"its start must be in a majority of the nodes' ledgers, and waits for that: {waits}"
                self.disks.refuse(section, WAITING, f"{section.directory}: {reason}")
                settled.set()
            await claiming
        finally:
            claiming.cancel()

    def _note_failed(self, disk_id: str, store: str, reason: str) -> bool:
        """Called in the thread of a store that failed for good. Returns whether the ledger will tell the next start."""
        try:
            self.ledger.note_failed(disk_id, store, reason)
        except OSError as error:
            log.error("the failure of a disk can't be noted", disk=disk_id, store=store, reason=str(error))
            return False
        return True


def _state_of(error: Exception) -> str:
    """The state of a disk that was refused with this error."""
    if isinstance(error, DiskRolledBack):
        return "rolled-back"
    if isinstance(error, DiskDamaged):
        return "damaged"
    if isinstance(error, DiskForeign):
        return "foreign"
    if isinstance(error, DiskUnreadable):
        return UNREADABLE
    return "index-damaged" if isinstance(error, IndexDamaged) else "failed"


async def in_own_thread(work: Callable[[], T], /) -> T:
    """Runs ``work`` in a thread of its own. Nothing waits for that thread at the end: a disk that hangs keeps it."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def tell(set_outcome: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and no caller waits
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
