"""Makes the inventories of all buckets. Runs in one gateway at a time; two at once share the work. ``s3.inventory`` has
the theory.

The worker visits the inventories in turn, and makes a data file or the manifests of one at a visit. A report is due
when a day, or for a weekly one a Sunday, has begun since the last one began (UTC); the first one is due at once.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import structlog
from msgspec.structs import replace

from storaged.errors import AccessDenied, DataDamaged, NoSuchBucket, StoragedError
from storaged.ids import DATA_ID_BYTES
from storaged.maintain.job import Job, JobReport
from storaged.maintain.rounds import TICKS_A_DAY, run_rounds
from storaged.objects.code.lifecycle import rules_of
from storaged.objects.configuration.inventory import INVENTORY, WEEKLY, Inventory
from storaged.objects.configuration.kinds import LOCK
from storaged.objects.encryption import KMS
from storaged.objects.identity import account_of
from storaged.objects.inventory import rows
from storaged.objects.inventory.listing import Listed, Position, list_page
from storaged.objects.inventory.rows import InventoryFile, InventoryState, digest_of
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import BucketRecord
from storaged.s3.authorization import inventory_grant
from storaged.s3.context import Front, existing_bucket
from storaged.s3.delivery import deliver
from storaged.s3.encryption import KMS_KEY, SSE
from storaged.s3.inventory import files as data_files
from storaged.s3.inventory.columns import Column, Source, Value, columns_of, row_of
from storaged.s3.inventory.files import PYARROW, DataFile, data_file
from storaged.s3.inventory.manifest import ListedFile, data_key, documents, folder_of, manifest_key
from storaged.s3.ops.acl import is_enforced
from storaged.wire import encode

PUT_TIMEOUT_S: Final = 120.0
RETRY_S: Final = 60.0
RETRY_MAX_S: Final = 900.0
"""After a failed visit, so that a target that takes nothing does not make the bucket be walked all the time. Doubled
with each failure; one that is known before the bucket is walked does not count."""
REST_RATIO: Final = 1.0
"""The pause after a page, as a multiple of its duration."""
REST_MAX_S: Final = 10.0
SLICE_S: Final = 0.005
"""How long the worker may hold the event loop: with a thousand lifecycle rules, the values of a page take seconds."""
FIRST_SUNDAY: Final = 3
"""In days since 1970."""
DATA_TYPE: Final = "application/octet-stream"

log = structlog.get_logger("inventory")


class EveryBucket(Protocol):
    """``BucketService``: what the worker asks of it."""

    async def every_bucket(self) -> list[BucketRecord]: ...


def is_due(report: Inventory, began_ms: int, now_ms: int, day_ms: int) -> bool:
    """Whether another report is due. ``began_ms``: when the last one began; 0: there was none. What began more than a
    day ahead was begun by a clock that was wrong: it holds up no other."""
    last, today = began_ms // day_ms, now_ms // day_ms
    if not began_ms or last > today + 1:
        return True
    if report.frequency != WEEKLY:
        return today > last
    return (today - FIRST_SUNDAY) // 7 > (last - FIRST_SUNDAY) // 7


@dataclass
class Visited:
    """What the worker knows of one inventory. ``last``: the last file of the report under way. ``problem``: why the
    last visit failed; ``failures``: how many did, one after the other; ``retry_at``: when the next one may be, by the
    monotonic clock.
    """

    bucket: str
    report: Inventory
    state: InventoryState | None = None
    last: InventoryFile | None = None
    problem: str = ""
    failures: int = 0
    retry_at: float = 0.0


@dataclass
class Known:
    """The inventories of a bucket, by id. ``turn``: how many visits were done, so that each has its turn.
    ``tidied``: the ids for which rows of others are gone."""

    visited: dict[str, Visited] = field(default_factory=dict)
    turn: int = 0
    tidied: tuple[str, ...] | None = None


class InventoryWorker:
    """``run`` is its task. ``is_mine()``: whether this gateway is the one that does it now."""

    def __init__(
        self,
        front: Front,
        plane: ObjectPlane,
        buckets: EveryBucket,
        *,
        is_mine: Callable[[], bool] = lambda: True,
        file_bytes_max: int = data_files.BYTES_MAX,
        file_rows_max: int = data_files.ROWS_MAX,
    ) -> None:
        self._front = front
        self._plane = plane
        self._buckets = buckets
        self._is_mine = is_mine
        self._bytes_max, self._rows_max = file_bytes_max, file_rows_max
        self._day_ms = plane.limits.lifecycle_day_ms
        self._known: dict[bytes, Known] = {}
        self.job = Job("inventory", plane.clock)

    async def run(self) -> None:
        """Runs for ever."""
        await run_rounds("inventories", self._day_ms, self.once, is_mine=self._is_mine, forget=self._forget)

    def _forget(self) -> None:
        self._known = {}

    async def once(self) -> bool:
        """Visits the inventories of each bucket, until one of them has cost something: those of one bucket take no more
        time than those of another. Returns whether there is work left that can be done now.
        """
        more, seen = False, set()
        for bucket in await self._buckets.every_bucket():
            if bucket.state == "active" and bucket.configuration:
                seen.add(bucket.id)
                more |= await self._visit_bucket(bucket)
        self._known = {bucket_id: known for bucket_id, known in self._known.items() if bucket_id in seen}
        if not more and self.job.state == "running":
            self.job.finish(detail=f"{self._plane.counters.inventory_reports} reports made since the start")
        return more

    async def _visit_bucket(self, bucket: BucketRecord) -> bool:
        try:
            found = self._plane.configurations.of(bucket).get(INVENTORY)
            if found is None:
                self._known.pop(bucket.id, None)
                return False
            known = self._known.setdefault(bucket.id, Known())
            ids = tuple(report.id for report in found.reports)
            if known.tidied != ids:
                await rows.drop_all_but(self._plane, bucket, {digest_of(one) for one in ids})
                known.tidied = ids
        except NoSuchBucket:
            return False
        except (StoragedError, TimeoutError) as error:
            log.info("the inventories of a bucket go on later", bucket=bucket.name, reason=str(error))
            return False
        known.visited = {
            report.id: known.visited.get(report.id) or Visited(bucket.name, report) for report in found.reports
        }
        turn, reports = known.turn, found.reports
        for step in range(len(reports)):
            report = reports[(turn + step) % len(reports)]
            known.turn = turn + step + 1
            if await self._try_visit(bucket, report, known.visited[report.id]):
                return True
        return False

    async def _try_visit(self, bucket: BucketRecord, report: Inventory, known: Visited) -> bool:
        """Returns whether it has cost something: then other buckets are next."""
        clock, walked = self._plane.clock, False
        if known.report != report:
            known.report, known.state, known.failures, known.retry_at = report, None, 0, 0.0
        if not report.enabled or clock.monotonic() < known.retry_at:
            return False
        try:
            more = await self.visit(bucket, report, known)
        except NoSuchBucket:
            return False  # the bucket is gone
        except AccessDenied as error:
            problem = f"the target bucket {report.target} refuses: {error.message}"
        except ImportError:
            problem = PYARROW
        except (StoragedError, TimeoutError) as error:
            problem, walked = str(error) or "no answer in time", True
        except Exception:  # a fault here must not end the gateway, nor keep the other inventories waiting
            log.exception("an inventory has failed", bucket=bucket.name, id=report.id)
            problem, walked = "an internal error: the gateway's log has it", True
        else:
            known.problem, known.failures = "", 0
            return more
        if known.problem != problem:
            log.warning("an inventory goes on later", bucket=bucket.name, id=report.id, reason=problem)
        known.problem = problem
        known.last = None  # read again: another worker may have gone on
        pause_s = min(RETRY_S * 2**known.failures, RETRY_MAX_S, self._day_ms / 1000 / TICKS_A_DAY)
        known.retry_at = clock.monotonic() + pause_s
        known.failures = min(known.failures + 1, 16) if walked else 0
        return walked

    # --- one inventory

    async def visit(self, bucket: BucketRecord, report: Inventory, known: Visited) -> bool:
        """A data file, or the manifests. Returns whether there is more. Raises StoragedError, ImportError."""
        plane, now_ms = self._plane, self._plane.clock.wall_ms()
        state = known.state
        if state is not None and state.finished_ms and not is_due(report, state.began_ms, now_ms, self._day_ms):
            return False
        digest, wanted = digest_of(report.id), self._digest(bucket, report)
        before = known.state
        state = known.state = await rows.read_state(plane, bucket, digest)
        if before is None or state is None or before.report != state.report:
            known.last = None
        if state is None or (
            is_due(report, state.began_ms, now_ms, self._day_ms) if state.finished_ms else state.configuration != wanted
        ):
            await self._check_target(bucket, report)
            state = await self._begin(bucket, report, known)
        if state.finished_ms or state.configuration != wanted:
            return False  # another worker was faster, or knows a newer configuration
        return await self._go_on(bucket, report, known, state)

    async def _begin(self, bucket: BucketRecord, report: Inventory, known: Visited) -> InventoryState:
        """A new report in place of that of ``known.state``."""
        plane, digest = self._plane, digest_of(report.id)
        wanted, now_ms = self._digest(bucket, report), plane.clock.wall_ms()
        new = InventoryState(rows.FORMAT, plane.entropy(DATA_ID_BYTES), wanted, now_ms)
        state = known.state = await rows.begin(plane, bucket, digest, known.state, new)
        known.last = None
        if state == new:
            log.info("an inventory begins", bucket=bucket.name, id=report.id)
        return state

    def _digest(self, bucket: BucketRecord, report: Inventory) -> bytes:
        """It is keyed, since configurations are sealed. Raises KeyringUnavailable."""
        return self._plane.keys.authenticate((b"inventory", bucket.id), encode(report))

    async def _check_target(self, bucket: BucketRecord, report: Inventory) -> BucketRecord:
        """The target, when the service may put reports into it. Raises AccessDenied."""
        try:
            target = await existing_bucket(self._front, report.target)
        except NoSuchBucket:
            raise AccessDenied("It does not exist.") from None
        if report.account and account_of(target.owner) != report.account:
            raise AccessDenied(f"It belongs to another account than {report.account}.")
        key = data_key(report, bucket.name, f"{'0' * 32}.{report.format}")
        inventory_grant(self._front, bucket, target, key, _encryption(report))
        return target

    async def _go_on(self, bucket: BucketRecord, report: Inventory, known: Visited, state: InventoryState) -> bool:
        digest = digest_of(report.id)
        await self._check_target(bucket, report)
        self._start_job(f"lists {bucket.name} for {report.id}")
        last, made = known.last, None
        if last is None or last.last:
            try:
                last, made = await self._made(bucket, digest, state)
            except DataDamaged as error:
                log.warning("an inventory begins again", bucket=bucket.name, id=report.id, reason=str(error))
                await self._begin(bucket, report, known)
                return True
        if made is None or last is None or not last.last:
            known.last = await self._make_file(bucket, report, state, last)
            return True
        known.last = last
        await self._end(bucket, report, known, state, last, made)
        return False

    async def _made(
        self, bucket: BucketRecord, digest: bytes, state: InventoryState
    ) -> tuple[InventoryFile | None, list[ListedFile]]:
        """The last file of a report, None before the first one; and all of them. Raises DataDamaged."""
        last, found = None, []
        async for last in rows.every_file(self._plane, bucket, digest, state.report):
            if last.key:
                found.append(ListedFile(last.key, last.size, rows.open_md5(self._plane, bucket, last)))
        return last, found

    async def _make_file(
        self, bucket: BucketRecord, report: Inventory, state: InventoryState, before: InventoryFile | None
    ) -> InventoryFile:
        """The next file of a report; its row. A bucket without objects has one without a key."""
        plane, unreadable = self._plane, before.unreadable if before is not None else 0
        position: Position | None = Position(before.after, before.below) if before is not None else Position()
        file = await asyncio.to_thread(data_file, report)
        while position is not None and file.size < self._bytes_max and file.rows < self._rows_max:
            position, missing = await self._add_page(bucket, report, file, position)
            unreadable += missing
        key, data = b"", b""
        if file.rows:
            data = await asyncio.to_thread(file.end)
            name = f"{plane.entropy(16).hex()}.{file.extension}"
            key = data_key(report, bucket.name, name)
            await self._put(bucket, report, key, data, DATA_TYPE)
            self.job.advance(0, len(data))
        after, number = position or Position(), before.number + 1 if before is not None else 0
        made = InventoryFile(
            rows.FORMAT,
            state.report,
            number,
            key,
            len(data),
            rows.seal_md5(plane, bucket, state.report, number, hashlib.md5(data, usedforsecurity=False).digest()),
            after.after,
            after.below,
            position is None,
            (before.rows if before is not None else 0) + file.rows,
            unreadable,
        )
        return await rows.add_file(plane, bucket, digest_of(report.id), made)

    async def _add_page(
        self, bucket: BucketRecord, report: Inventory, file: DataFile, at: Position
    ) -> tuple[Position | None, int]:
        """Returns where the next page begins, and what could not be read."""
        plane, columns = self._plane, columns_of(report)
        began = plane.clock.monotonic()
        configuration = plane.configurations.of(bucket)
        source = Source(
            bucket,
            is_enforced(configuration),
            configuration.get(LOCK) is not None,
            configuration.derive(rules_of),
            self._day_ms,
        )
        page = await list_page(
            plane,
            bucket,
            (report.prefix or "").encode(),
            at,
            all_versions=report.all_versions,
            opened=any(column.opened for column in columns),
        )
        if page.listed:
            await asyncio.to_thread(file.add, await self._values(columns, source, page.listed))
        self.job.advance(len(page.listed))
        plane.counters.inventory_rows += len(page.listed)
        await asyncio.sleep(min(REST_MAX_S, REST_RATIO * (plane.clock.monotonic() - began)))
        return page.next, page.unreadable

    async def _values(self, columns: Sequence[Column], source: Source, listed: Sequence[Listed]) -> list[list[Value]]:
        clock, found = self._plane.clock, []
        since = clock.monotonic()
        for one in listed:
            found.append(row_of(columns, source, one))
            spent = clock.monotonic() - since
            if spent >= SLICE_S:
                await asyncio.sleep(REST_RATIO * spent)
                since = clock.monotonic()
        return found

    async def _end(
        self,
        bucket: BucketRecord,
        report: Inventory,
        known: Visited,
        state: InventoryState,
        last: InventoryFile,
        made: list[ListedFile],
    ) -> None:
        """Puts the manifests."""
        plane, digest = self._plane, digest_of(report.id)
        for document in documents(report, bucket.name, state.began_ms, made):
            await self._put(bucket, report, *document)
        finished = replace(
            state,
            finished_ms=plane.clock.wall_ms(),
            rows=last.rows,
            files=len(made),
            unreadable=last.unreadable,
            manifest=manifest_key(report, bucket.name, state.began_ms),
        )
        if not await rows.finish(plane, bucket, digest, state, finished):
            return
        await rows.drop_files(plane, bucket, digest, state.report)
        known.state, known.last = finished, None
        plane.counters.inventory_reports += 1
        log.info("an inventory is made", bucket=bucket.name, id=report.id, rows=last.rows, files=len(made))

    async def _put(self, bucket: BucketRecord, report: Inventory, key: bytes, data: bytes, kind: str) -> None:
        """Raises AccessDenied, and as ``deliver``."""
        async with asyncio.timeout(PUT_TIMEOUT_S):
            target = await self._check_target(bucket, report)
            headers, unique = _encryption(report), self._plane.entropy(8).hex().upper()
            grant = inventory_grant(self._front, bucket, target, key, headers)
            await deliver(self._front, grant, key, data, kind, unique, headers)

    # --- reports

    def _start_job(self, detail: str) -> None:
        if self.job.state != "running":
            self.job.start()
        self.job.detail = detail

    def report(self, node: str) -> list[JobReport]:
        """As ``status`` shows it: nothing before the first work."""
        return [] if self.job.state == "waiting" else [self.job.report(node)]

    def document(self) -> list[Mapping[str, Any]]:
        """One entry for each inventory that this worker has visited."""
        return sorted(map(visited_document, self._every_visited()), key=lambda one: (one["bucket"], one["id"]))

    def _every_visited(self) -> Iterator[Visited]:
        for known in self._known.values():
            yield from known.visited.values()


def _encryption(report: Inventory) -> dict[str, str]:
    """What the headers of a PUT would say."""
    found = report.encryption
    if found is None:
        return {}
    return {SSE: found.algorithm} | ({KMS_KEY: found.key_id} if found.algorithm == KMS else {})


def visited_document(known: Visited) -> dict[str, Any]:
    last, state = known.last, known.state
    found = state_document(known.report, state)
    if state is not None and not state.finished_ms and last is not None and last.report == state.report:
        found |= {"rows": last.rows, "files": last.number + 1, "unreadable": last.unreadable}
    return {"bucket": known.bucket, **found, "problem": known.problem}


def state_document(report: Inventory, state: InventoryState | None) -> dict[str, Any]:
    """How far one inventory is, as JSON. ``finished_ms`` null: the report is under way, or none has begun."""
    return {
        "id": report.id,
        "enabled": report.enabled,
        "began_ms": state.began_ms if state is not None else None,
        "finished_ms": (state.finished_ms or None) if state is not None else None,
        "rows": state.rows if state is not None else 0,
        "files": state.files if state is not None else 0,
        "unreadable": state.unreadable if state is not None else 0,
        "manifest": state.manifest.decode() if state is not None else "",
    }


async def describe(plane: ObjectPlane, bucket: BucketRecord) -> dict[str, Any]:
    """The inventories of a bucket, for the operator. Raises ServiceUnavailable."""
    found = plane.configurations.of(bucket).get(INVENTORY)
    shown = []
    for report in found.reports if found is not None else ():
        state = await rows.read_state(plane, bucket, digest_of(report.id))
        shown.append(
            state_document(report, state)
            | {
                "format": report.format,
                "frequency": report.frequency,
                "versions": "All" if report.all_versions else "Current",
                "target": report.target,
                "folder": folder_of(report, bucket.name),
            }
        )
    return {"bucket": bucket.name, "inventories": shown}
