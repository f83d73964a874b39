"""Writes the audit log: who got a key, who was refused, what was administered. It is hash-chained, an entry counts once
it is synced, and signed checkpoints of it are shown to witnesses.

Theory of operation. ``format`` has the format, ``verify`` the verifier. A chain alone shows that something in its
middle was altered, removed or reordered. That its end was cut off shows in the ``start`` of the chain that follows, and
at the witnesses: other nodes, which see its checkpoints each minute and at shutdown (``witness_client``).

An operation is two entries: the intent, on disk before the operation begins, and the outcome (``trail.audited``). What
is refused before anything is done is counted (``refused``, ``refusals``): nothing waits for it, and a stranger can't
fill the disk.

``append`` returns when its entry is on disk; many appends share one fdatasync. When the disk refuses, the entries that
are not on disk are taken back, their callers get AuditUnwritable, and the next entry goes into a new file. A crash may
leave a torn tail after the last entry on disk; those bytes were never acknowledged. The next start records how many
there are, and the verifier accepts exactly these.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import structlog

from storaged.clock import Clock, SystemClock
from storaged.cluster.audit.chain_writer import FILE_BYTES_MAX, ChainFile, ChainLines
from storaged.cluster.audit.files import PATTERN
from storaged.cluster.audit.format import ENTRY_BYTES_MAX, GENESIS, Event, Head, parse_line
from storaged.cluster.audit.links import RecentLinks
from storaged.cluster.audit.refusals import Refusals
from storaged.errors import AuditUnwritable

log = structlog.get_logger(__name__)

QUEUED_MAX = 4096
REFUSALS_EVERY_S = 15.0
"""How often the log looks for counted refusals whose minute is over."""


class Signer(Protocol):
    """``identity.NodeSigner``."""

    certificate: bytes

    def sign(self, data: bytes) -> bytes: ...


@dataclass(frozen=True)
class AuditStatistics:
    chain: str
    entries: int
    entries_durable: int
    syncs: int
    notes_dropped: int


class _Queued(NamedTuple):
    line: bytes
    done: asyncio.Future[None] | None
    file: Path | None
    """Begin this file with the line."""
    head: Head
    time_ms: int


class AuditLog:
    """One process's chain, and a ``Trail``. Use: ``await start()`` ... ``await close()``.

    Its attributes are the chain's lines and file, the queue before them, and what is counted.
    """

    def __init__(
        self,
        directory: Path,
        node: str,
        incarnation: bytes,
        *,
        clock: Clock | None = None,
        file_bytes_max: int = FILE_BYTES_MAX,
    ) -> None:
        self.directory = directory
        self.node = node
        self.links = RecentLinks(incarnation.hex())
        self.start_line = b""
        """Entry 0 as it is in the file, for witnesses that do not know this chain."""
        self.problem = ""
        """Why the disk refused the last entry; empty once it takes one again."""
        self._actor = f"node:{node}"
        self._clock = clock or SystemClock()
        self._lines = ChainLines(directory, incarnation.hex(), file_bytes_max)
        self._file = ChainFile()
        self._durable = self._lines.head
        self._queue: deque[_Queued] = deque()
        self._room = asyncio.Semaphore(QUEUED_MAX)
        self._work = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._failed = ""
        self._closing = False
        self._syncs = 0
        self._dropped = 0
        self._dropped_reported = 0
        self._refusals = Refusals()

    async def start(self) -> None:
        """Finds the head of the chain before, and begins this one. Raises AuditUnwritable."""
        try:
            predecessor, torn_bytes, last_ordinal = await asyncio.to_thread(_last_head, self.directory)
        except OSError as error:
            raise AuditUnwritable(
                f"The audit log in {self.directory} cannot be opened: {error.strerror or error}."
            ) from error
        self._lines.begin(predecessor.hash if predecessor else GENESIS, last_ordinal + 1)
        self._durable = self._lines.head
        fields = {
            "node": self.node,
            "incarnation": self._durable.chain,
            # As ``format.Predecessor``.
            "predecessor": {**predecessor._asdict(), "torn_bytes": torn_bytes} if predecessor else None,
        }
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._write_queued()), loop.create_task(self._write_refusals_regularly())]
        try:
            await self._enqueue(Event("start", self._actor, "", "", fields), wait=True)
        except AuditUnwritable:
            await self.close()
            raise

    async def close(self) -> None:
        """Writes what is queued, then closes the file."""
        if self._closing:
            return
        self._write_refusals(all_of_them=True)
        self._closing = True
        self._work.set()
        if self._tasks:
            await self._tasks[0]
            for task in self._tasks[1:]:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        self._file.close()

    @property
    def head(self) -> Head:
        """The last entry that is on disk."""
        return self._durable

    def statistics(self) -> AuditStatistics:
        return AuditStatistics(
            chain=self._durable.chain,
            entries=self._lines.head.sequence + 1,
            entries_durable=self._durable.sequence + 1,
            syncs=self._syncs,
            notes_dropped=self._dropped,
        )

    # Entries.

    async def append(
        self, kind: str, /, *, actor: str = "", target: str = "", outcome: str = "", **fields: Any
    ) -> None:
        await self._room.acquire()
        try:
            await self._enqueue(Event(kind, actor or self._actor, target, outcome, fields), wait=True)
        finally:
            self._room.release()

    def note(self, kind: str, /, *, actor: str = "", target: str = "", outcome: str = "", **fields: Any) -> None:
        self._note(Event(kind, actor or self._actor, target, outcome, fields))

    def refused(self, kind: str, code: str, /, *, actor: str, target: str = "", **fields: Any) -> None:
        event = self._refusals.add(self._clock.wall_ms(), kind, code, actor, target, fields)
        if event is not None:
            self._note(event)

    def _note(self, event: Event) -> None:
        try:
            if len(self._queue) >= QUEUED_MAX:
                raise AuditUnwritable("Too many entries wait for the disk.")
            if self._dropped > self._dropped_reported:
                dropped = {"events": self._dropped - self._dropped_reported}
                self._enqueue(Event("audit.dropped", self._actor, "", "", dropped), wait=False)
                self._dropped_reported = self._dropped
            self._enqueue(event, wait=False)
        except (AuditUnwritable, ValueError, TypeError) as error:
            self._dropped += 1
            log.error("an event could not be audited", kind=event.kind, reason=str(error))

    def _write_refusals(self, *, all_of_them: bool = False) -> None:
        for event in self._refusals.due(self._clock.wall_ms(), all_of_them=all_of_them):
            self._note(event)

    async def _write_refusals_regularly(self) -> None:
        while True:
            await asyncio.sleep(REFUSALS_EVERY_S)
            self._write_refusals()

    def _enqueue(self, event: Event, *, wait: bool) -> asyncio.Future[None]:
        if self._failed:
            raise AuditUnwritable(self._failed)
        if self._closing or not self._tasks:
            raise AuditUnwritable("The audit log is closed.")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line, digest = self._lines.build(event, self._clock.wall_ms())
        if self._lines.needs_file(line):
            part = self._lines.begin_file()
            if self._lines.head.sequence >= 0:
                following = Event("continue", self._actor, "", "", {"node": self.node, "part": part})
                self._push(*self._lines.build(following, self._clock.wall_ms()), None)
            line, digest = self._lines.build(event, self._clock.wall_ms())
        self._push(line, digest, done if wait else None)
        return done

    def _push(self, line: bytes, digest: str, done: asyncio.Future[None] | None) -> None:
        file = self._lines.add(line, digest)
        self._queue.append(_Queued(line, done, file, self._lines.head, self._clock.wall_ms()))
        self._work.set()

    # The disk.

    async def _write_queued(self) -> None:
        while self._queue or not self._closing:
            await self._work.wait()
            self._work.clear()
            while self._queue:
                batch = [self._queue.popleft()]
                while self._queue and self._queue[0].file is None:
                    batch.append(self._queue.popleft())
                try:
                    await asyncio.to_thread(self._write, batch)
                except OSError as error:
                    await self._take_back(batch, error)
                else:
                    self._acknowledge(batch)

    def _write(self, batch: list[_Queued]) -> None:
        path = batch[0].file
        if path is not None:
            self._file.begin(path)
        self._file.append(b"".join(item.line for item in batch))
        self._syncs += 1

    def _acknowledge(self, batch: list[_Queued]) -> None:
        self._durable, self.problem = batch[-1].head, ""
        if not self.start_line:
            self.start_line = batch[0].line.removesuffix(b"\n")
        for item in batch:
            self.links.add(bytes.fromhex(item.head.hash), item.time_ms)
            if item.done is not None and not item.done.done():
                item.done.set_result(None)

    async def _take_back(self, batch: list[_Queued], error: OSError) -> None:
        """Cuts off everything after the durable head, none of which was acknowledged; the next entry begins a file."""
        reason = f"The audit log in {self.directory} cannot be written: {error.strerror or error}."
        log.error("the audit log cannot be written", directory=str(self.directory), reason=error.strerror or str(error))
        self.problem = reason
        lost = batch + list(self._queue)
        self._queue.clear()
        self._lines.rewind(self._durable)
        try:
            await asyncio.to_thread(self._file.cut)
        except OSError as second:
            self._failed = (
                f"{reason} Its end could not be cut either ({second.strerror or second}): restart the node once the"
                " disk is well."
            )
        for item in [*lost, *self._queue] if self._failed else lost:
            if item.done is not None and not item.done.done():
                item.done.set_exception(AuditUnwritable(self._failed or reason))
            elif item.done is None:
                self._dropped += 1
        if self._failed:
            self._queue.clear()


def _last_head(directory: Path) -> tuple[Head | None, int, int]:
    """The last whole entry of the newest chain, how many unreadable bytes follow it (in its file and in later ones),
    and the highest ordinal in use.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    paths = sorted(directory.glob(PATTERN), reverse=True)
    last_ordinal = int(paths[0].name.split("-")[1]) if paths else 0
    torn_bytes = 0
    for path in paths:
        head: Head | None = None
        held = 0
        with path.open("rb") as file:
            while (line := file.readline(ENTRY_BYTES_MAX + 1)).endswith(b"\n"):
                try:
                    entry = parse_line(line[:-1])
                except ValueError:
                    break
                head = Head(entry.chain, entry.sequence, entry.hash)
                held += len(line)
        torn_bytes += path.stat().st_size - held
        if head is not None:
            return head, torn_bytes, last_ordinal
    return None, torn_bytes, last_ordinal
