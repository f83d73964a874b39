"""The audit log: who was given a key, who was refused, what was administered. Hash-chained, synced before it counts,
checkpointed under a signature.

Theory of operation. The format is in ``audit_format``, the verifier in ``audit_verify``. A chain alone shows what was
altered, removed or reordered in its middle. That its end was cut off shows in the ``start`` of the chain that
follows, and at the witnesses: other nodes, which are shown its checkpoints each minute and at shutdown
(``witness_client``).

What is done is two entries of one ``operation``: the intent, on disk before it is done, and the outcome
(``audited``). What is refused before anything is done is counted (``refused``, ``audit_refusals``): nothing waits for
it, and a stranger can't fill the disk.

``append`` returns when its entry is on disk: many appends share one fdatasync. When the disk refuses, the entries
that are not on disk are taken back, their callers get AuditUnwritable, and the next entry goes into a new file. A
crash may leave a torn tail after the last entry on disk; those bytes were never acknowledged. The next start records
how many there are, and the verifier accepts exactly these.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import structlog

from storaged.clock import Clock, SystemClock
from storaged.cluster.audit.files import PATTERN, file_name
from storaged.cluster.audit.format import (
    DONE,
    ENTRY_BYTES_MAX,
    FAILED,
    GENESIS,
    INTENT,
    REFUSED,
    Checkpoint,
    Event,
    Head,
    make_line,
    parse_line,
)
from storaged.cluster.audit.links import LinkTail
from storaged.cluster.audit.refusals import Refusals
from storaged.cluster.audit.verify import AuditProblem, AuditReport, verify
from storaged.durable import sync_path
from storaged.errors import AuditUnwritable, StoragedError
from storaged.ids import system_entropy
from storaged.units import MIB

__all__ = ["AuditLog", "AuditProblem", "AuditReport", "AuditStatistics", "Checkpoint", "Head", "Signer", "verify"]

log = structlog.get_logger(__name__)

FILE_BYTES_MAX = 64 * MIB
QUEUED_MAX = 4096
REFUSALS_EVERY_S = 15.0
"""How often is looked for refusals whose minute is over."""

OPERATION_BYTES = 8
SALT_BYTES = 16


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


class Trail(Protocol):
    """Where entries go: ``AuditLog``, or in a gateway's further process ``node.leader.Leader``.

    ``actor``, ``target`` and ``outcome``: see ``audit_format.Event``; an ``actor`` that is not given is this node.
    ``fields`` are text, numbers, booleans, None, and lists and mappings of these; no keys, no secrets, no content.
    """

    async def append(
        self, kind: str, /, *, actor: str = "", target: str = "", outcome: str = "", **fields: Any
    ) -> None:
        """Returns when the entry is on disk. Raises AuditUnwritable; ValueError or TypeError for what is too large or
        not JSON (nothing is written)."""

    def note(self, kind: str, /, *, actor: str = "", target: str = "", outcome: str = "", **fields: Any) -> None:
        """On disk soon, for events that nothing waits for, and that no stranger can cause. Dropped when the queue is
        full, and the drops are counted."""

    def refused(self, kind: str, code: str, /, *, actor: str, target: str = "", **fields: Any) -> None:
        """What was refused before anything was done: the first of a kind and code is an entry, those of the next
        minute are counted in one."""


@contextlib.asynccontextmanager
async def audited(
    trail: Trail, kind: str, /, *, actor: str, target: str, **fields: Any
) -> AsyncIterator[dict[str, Any]]:
    """The intent is on disk before the block begins, the outcome before it is left. What the block puts into the
    mapping goes into the outcome's entry.

    Raises AuditUnwritable before the block only: what was done is not undone because its outcome can't be written
    (that is logged, and the intent stays).
    """
    operation = system_entropy(OPERATION_BYTES).hex()
    await trail.append(kind, actor=actor, target=target, outcome=INTENT, operation=operation, **fields)
    found: dict[str, Any] = {}
    try:
        yield found
    except BaseException as error:
        trail.note(kind, actor=actor, target=target, outcome=outcome_of(error), operation=operation, **found)
        raise
    try:
        await trail.append(kind, actor=actor, target=target, outcome=DONE, operation=operation, **found)
    except (AuditUnwritable, ValueError, TypeError) as error:
        log.error(
            "the outcome of what was done could not be audited", kind=kind, operation=operation, reason=str(error)
        )


def outcome_of(error: BaseException) -> str:
    """Of what ended with ``error``. A rule that refuses (4xx, or an operator's error) changed nothing."""
    if not isinstance(error, StoragedError):
        return f"{FAILED} {'InternalError' if isinstance(error, Exception) else 'CANCELLED'}"
    return f"{REFUSED if error.status < 500 else FAILED} {error.code}"


class AuditLog:
    """One process's chain, and a ``Trail``. Use: ``await start()`` ... ``await close()``."""

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
        self._actor = f"node:{node}"
        self._chain = incarnation.hex()
        self._clock = clock or SystemClock()
        self._file_bytes_max = file_bytes_max
        self._ordinal = 0
        self._part = 0
        self._head = Head(self._chain, -1, GENESIS)
        self._durable = self._head
        self._file_bytes = 0  # of the current file, with what is queued
        self._new_file = True
        self._descriptor = -1
        self._durable_bytes = 0
        self._queue: deque[_Queued] = deque()
        self._room = asyncio.Semaphore(QUEUED_MAX)
        self._work = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._failed = ""
        self.problem = ""
        """Why the disk refused the last entry; empty once it takes one again."""
        self._closing = False
        self._syncs = 0
        self._dropped = 0
        self._dropped_told = 0
        self._refusals = Refusals()
        self.links = LinkTail(self._chain)
        self.start_line = b""
        """Entry 0 as it lies in the file, for witnesses that do not know this chain."""

    async def start(self) -> None:
        """Finds the head of the chain before, and begins this one. Raises AuditUnwritable."""
        try:
            predecessor, torn_bytes, last_ordinal = await asyncio.to_thread(_last_head, self.directory)
        except OSError as error:
            raise AuditUnwritable(
                f"The audit log in {self.directory} cannot be opened: {error.strerror or error}."
            ) from error
        self._head = self._durable = Head(self._chain, -1, predecessor.hash if predecessor else GENESIS)
        self._ordinal = last_ordinal + 1
        fields = {
            "node": self.node,
            "incarnation": self._chain,
            "predecessor": (
                {**predecessor._asdict(), "torn_bytes": torn_bytes} if predecessor else None
            ),  # audit_format.Predecessor
        }
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._write_queued()), loop.create_task(self._tell_refusals_regularly())]
        try:
            await self._enqueue(Event("start", self._actor, "", "", fields), wait=True)
        except AuditUnwritable:
            await self.close()
            raise

    async def close(self) -> None:
        """Writes what is queued."""
        if self._closing:
            return
        self._tell_refusals(all_of_them=True)
        self._closing = True
        self._work.set()
        if self._tasks:
            await self._tasks[0]
            for task in self._tasks[1:]:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @property
    def head(self) -> Head:
        """The last entry that is on disk."""
        return self._durable

    def statistics(self) -> AuditStatistics:
        return AuditStatistics(
            self._chain, self._head.sequence + 1, self._durable.sequence + 1, self._syncs, self._dropped
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
            if self._dropped > self._dropped_told:
                self._enqueue(
                    Event("audit.dropped", self._actor, "", "", {"events": self._dropped - self._dropped_told}),
                    wait=False,
                )
                self._dropped_told = self._dropped
            self._enqueue(event, wait=False)
        except (AuditUnwritable, ValueError, TypeError) as error:
            self._dropped += 1
            log.error("an event could not be audited", kind=event.kind, reason=str(error))

    def _tell_refusals(self, *, all_of_them: bool = False) -> None:
        for event in self._refusals.due(self._clock.wall_ms(), all_of_them=all_of_them):
            self._note(event)

    async def _tell_refusals_regularly(self) -> None:
        while True:
            await asyncio.sleep(REFUSALS_EVERY_S)
            self._tell_refusals()

    def _enqueue(self, event: Event, *, wait: bool) -> asyncio.Future[None]:
        if self._failed:
            raise AuditUnwritable(self._failed)
        if self._closing or not self._tasks:
            raise AuditUnwritable("The audit log is closed.")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line, digest = self._next_line(event)
        if self._new_file or self._file_bytes + len(line) > self._file_bytes_max:
            self._begin_file()
            line, digest = self._next_line(event)
        self._push(line, digest, done if wait else None, None if self._file_bytes else self._path())
        return done

    def _next_line(self, event: Event) -> tuple[bytes, str]:
        return make_line(
            self._chain,
            self._head.sequence + 1,
            self._clock.wall_ms(),
            event,
            self._head.hash,
            system_entropy(SALT_BYTES).hex(),
        )

    def _begin_file(self) -> None:
        self._part += 1
        self._new_file = False
        self._file_bytes = 0
        if self._head.sequence >= 0:
            line, digest = self._next_line(
                Event("continue", self._actor, "", "", {"node": self.node, "part": self._part})
            )
            self._push(line, digest, None, self._path())

    def _push(self, line: bytes, digest: str, done: asyncio.Future[None] | None, file: Path | None) -> None:
        self._head = Head(self._chain, self._head.sequence + 1, digest)
        self._file_bytes += len(line)
        self._queue.append(_Queued(line, done, file, self._head, self._clock.wall_ms()))
        self._work.set()

    def _path(self) -> Path:
        return self.directory / file_name(self._ordinal, self._chain, self._part)

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
                    self._durable, self.problem = batch[-1].head, ""
                    if not self.start_line:
                        self.start_line = batch[0].line.removesuffix(b"\n")
                    for item in batch:
                        self.links.add(bytes.fromhex(item.head.hash), item.time_ms)
                        if item.done is not None and not item.done.done():
                            item.done.set_result(None)

    def _write(self, batch: list[_Queued]) -> None:
        path = batch[0].file
        if path is not None:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._descriptor = -1
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
            self._durable_bytes = 0
            sync_path(self.directory)
        data = memoryview(b"".join(item.line for item in batch))
        size = len(data)
        while data:
            data = data[os.write(self._descriptor, data) :]
        os.fdatasync(self._descriptor)
        self._durable_bytes += size
        self._syncs += 1

    async def _take_back(self, batch: list[_Queued], error: OSError) -> None:
        """Nothing behind the durable head was acknowledged: it is cut off, and the next entry begins a new file."""
        reason = f"The audit log in {self.directory} cannot be written: {error.strerror or error}."
        log.error("the audit log cannot be written", directory=str(self.directory), reason=error.strerror or str(error))
        self.problem = reason
        lost = batch + list(self._queue)
        self._queue.clear()
        self._head = self._durable
        self._new_file = True
        try:
            await asyncio.to_thread(self._cut)
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

    def _cut(self) -> None:
        if self._descriptor < 0:
            return
        try:
            os.ftruncate(self._descriptor, self._durable_bytes)
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
            self._descriptor = -1


def _last_head(directory: Path) -> tuple[Head | None, int, int]:
    """The last whole entry of the newest chain, how many unreadable bytes lie behind it (in its file and in later
    ones), and the highest ordinal in use."""
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
