"""A gateway's answer to storage nodes whose repair has written blocks to new places: it verifies them, and makes the
records name them. ``moves`` has the contract and the rules.

Theory of operation. A batch of moves goes through these steps; a move that fails one is answered and left out.

1. Bounds: of the call, of the asker's rate, and one call of an asker at a time (``Allowance``).
2. The record of each register is read from a majority, and every move is judged by the record, the layout and the
   bucket's signed record.
3. Every disk is asked once for the headers of all fragments in the old and new places of the batch.
4. Each block is judged. Where headers don't show that the new fragments are right, survivors are read and the new
   hashes computed.
5. The old places go to the garbage lists of their disks. They become garbage by the next step, but after it this call
   may be cut off, or not learn what became of the change.
6. Each register is changed once, by a compare-and-set: if it still is at the sequence that was read in step 2, or has
   the very versions still, with their blocks in the old places (``moved_record.body_again``): a key that clients write
   all the time would never be repaired otherwise.

Old and new fragments are both there until long after; the record alone decides which count. So a gateway that stops
between any two steps loses nothing, two gateways may answer the same call, and the asker may ask again.

Every deletion of fragments first commits a round that ends all earlier promises, and then spares what was touched since
it looked. So the new fragments are touched *after* the promise and before the accept (``_touch_new``): either the touch
finds that they are gone, and the record is not changed, or it spares them. The disks that get an old fragment's entry
on their garbage list compare it with the record before they delete (``gc``), and keep what the record still names.

The work rests as long as it holds the event loop, and computes in threads: in a gateway clients use the same loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec

from storaged.cluster.rpc import faults
from storaged.errors import NoSuchBucket, PeerError, StoragedError
from storaged.fragments.ports import HEADERS_MAX, FragmentHeader, FragmentId, Health, Retirement
from storaged.hashes import is_old
from storaged.maintain.context import MaintainContext, concurrently
from storaged.maintain.directory import Buckets, BucketUnverified
from storaged.maintain.health import BlockPlace, blocks_of
from storaged.maintain.moved_record import RecordChange, body_after
from storaged.maintain.moves import (
    CHANGED,
    LATER,
    MOVED,
    OK,
    REFUSED,
    Agreed,
    Cost,
    Judged,
    MoveAnswer,
    MoveAsk,
    MovesAnswer,
    MovesAsk,
    agreed,
    cost_of,
    is_moved,
    is_whole,
    judge_ask,
    judge_block,
    must_read,
    problem_of_call,
)
from storaged.maintain.pace import Pace
from storaged.maintain.rebuild import CannotRepair, Rebuilder
from storaged.maintain.walk import entries_of
from storaged.meta.names import Change, RegisterName, Table, Value
from storaged.objects.code.history import PageNeeded
from storaged.objects.garbage import retire_all
from storaged.objects.records import BucketRecord, PartEntry

TOUCHES_A_CALL = 4000
REGISTERS_AT_ONCE = 16
BLOCKS_A_TURN = 64
"""Blocks that are judged before others get the event loop: some 3 ms."""
REST_S_MAX = 0.02
REFRESH_S = 5.0
"""The bucket directory is not read more often because of a bucket that it does not have."""

FRAGMENTS_PER_S = 12_000
"""What an asker may have verified, as ``cost_of`` counts: 1,000 blocks of 4+2 a second (125 whose profile changes),
more than repair writes. A call beyond that waits.
"""
FRAGMENTS_BURST = 24_000
PARTS_A_FRAGMENT = 16
"""Entries of parts that are read for the time of one fragment: records have up to 10,000. The next call waits for
them.
"""
REFUSED_PAUSE_S = 1.0
REFUSED_PAUSE_S_MAX = 60.0
"""An asker rests after a call with a move that no honest node asks; twice as long after each further one."""
CHANGES_MAX = 8
"""Attempts to change one record that others change."""
OVERTAKEN_S = 0.01
"""Pause before the second attempt; it doubles."""
CALLS_WAITING_MAX = 16
"""Of all askers. Further ones ask later."""


Headers = dict[tuple[str, FragmentId], FragmentHeader]
"""(disk, fragment) -> header."""


@dataclass
class _Planned:
    """A move on its way through the steps. ``seen``: the register's value in step 2."""

    ask: MoveAsk
    name: RegisterName
    seen: Value | None = None
    old: list[BlockPlace] = field(default_factory=list)
    new: list[BlockPlace] = field(default_factory=list)
    answer: MoveAnswer | None = None

    def end(self, judged: Judged) -> None:
        if judged.code and self.answer is None:
            self.answer = judged.answer

    @property
    def places(self) -> Iterable[BlockPlace]:
        return (*self.old, *self.new)


class _Overtaken(Exception):
    """Others change the record: the next promise may bring another value."""


class Allowance:
    """How much each asker may ask. Pure but for the clock that is handed in. Bounded by the number of nodes."""

    def __init__(self) -> None:
        self._pace = Pace(FRAGMENTS_PER_S, FRAGMENTS_BURST)
        self._refused: dict[str, tuple[float, float]] = {}
        """Asker -> (until when it rests, how long the next rest is)."""
        self.busy: set[str] = set()

    def problem(self, asker: str, now: float) -> str:
        """Why the asker has to wait; empty when it does not."""
        if asker in self.busy:
            return "another call of this node is being answered"
        if len(self.busy) >= CALLS_WAITING_MAX:
            return "many calls are waiting"
        if self._refused.get(asker, (0.0, 0.0))[0] > now:
            return "this node asked for what is refused, and has to wait"
        return ""

    def spend(self, asker: str, fragments: int, now: float) -> float:
        """How many seconds a call of this cost has to wait."""
        return self._pace.spend(asker, fragments, now)

    def note(self, asker: str, *, refused: bool, now: float) -> None:
        if not refused:
            self._refused.pop(asker, None)
            return
        pause_s = self._refused.get(asker, (0.0, REFUSED_PAUSE_S))[1]
        self._refused[asker] = (now + pause_s, min(2 * pause_s, REFUSED_PAUSE_S_MAX))


@dataclass(frozen=True)
class MoverStatistics:
    """Moves by how they were answered, and old fragments' entries on garbage lists."""

    moved: int
    changed: int
    later: int
    refused: int
    blocks_moved: int


class Mover:
    """Answers the calls of all askers, one at a time."""

    def __init__(self, context: MaintainContext) -> None:
        self.context = context
        self.buckets = Buckets()
        self._refreshed_at = -REFRESH_S
        self.allowance = Allowance()
        self._turn = asyncio.Lock()
        self._reads = asyncio.Semaphore(context.limits.rebuilds_concurrent_max)
        self.rebuilder = Rebuilder(context)
        self._counts = dict.fromkeys((MOVED, CHANGED, LATER, REFUSED), 0)
        self._blocks_moved = 0
        self._parts_read = 0
        """By the call that has its turn."""

    def statistics(self) -> MoverStatistics:
        counts = self._counts
        return MoverStatistics(counts[MOVED], counts[CHANGED], counts[LATER], counts[REFUSED], self._blocks_moved)

    async def answer(self, asker: str, ask: MovesAsk) -> MovesAnswer:
        """``asker``: the node, as its certificate names it. Does not raise for anything that a call may contain."""
        now = self.context.clock.monotonic
        if problem := problem_of_call(ask):
            self.allowance.note(asker, refused=True, now=now())
            return self._conclude(asker, [MoveAnswer(REFUSED, problem)])
        if problem := self.allowance.problem(asker, now()):
            return self._conclude(asker, [MoveAnswer(LATER, problem)] * len(ask.moves))
        self.allowance.busy.add(asker)
        try:
            await asyncio.sleep(self.allowance.spend(asker, sum(map(cost_of, ask.moves), Cost()).fragments, now()))
            async with self._turn:
                self._parts_read = 0
                planned = [_Planned(move, RegisterName.unpack(move.name)) for move in ask.moves]
                await self._work(planned)
                self.allowance.spend(asker, self._parts_read // PARTS_A_FRAGMENT, now())
        finally:
            self.allowance.busy.discard(asker)
        answers = [one.answer or MoveAnswer(LATER, "not decided") for one in planned]
        self.allowance.note(asker, refused=any(answer.code == REFUSED for answer in answers), now=now())
        return self._conclude(asker, answers)

    def _conclude(self, asker: str, answers: list[MoveAnswer]) -> MovesAnswer:
        for answer in answers:
            self._counts[answer.code] += 1
        refused = [answer.reason for answer in answers if answer.code == REFUSED]
        if refused:
            reason = f"{len(refused)} moves that {asker} asked for are refused, the first: {refused[0]}"
            self.context.on_refusal(asker, faults.refused(faults.MOVE_REFUSED, reason))
        return MovesAnswer(tuple(answers))

    async def _work(self, planned: Sequence[_Planned]) -> None:
        by_name: dict[RegisterName, list[_Planned]] = {}
        for one in planned:
            by_name.setdefault(one.name, []).append(one)
        await self.find_buckets({name.scope for name in by_name})
        await concurrently((self._plan(name, some) for name, some in by_name.items()), REGISTERS_AT_ONCE)
        left = [one for one in planned if one.answer is None]
        headers = await self.headers([where for one in left for where in one.places])
        await concurrently((self._judge(one, headers) for one in left), REGISTERS_AT_ONCE)
        await concurrently((self._commit(name, some) for name, some in by_name.items()), REGISTERS_AT_ONCE)

    # --- the record and the places ------------------------------------------------------------------------------------

    async def find_buckets(self, scopes: set[bytes]) -> None:
        """Reads the bucket directory when it lacks one of these, but not all the time."""
        now = self.context.clock.monotonic()
        if all(map(self.buckets.is_verified, scopes)) or now - self._refreshed_at < REFRESH_S:
            return
        self._refreshed_at = now
        try:
            await self.buckets.refresh(self.context)
        except StoragedError as error:
            self.context.log(f"the bucket directory can't be read now: {error}")

    async def bucket(self, scope: bytes) -> BucketRecord | None:
        """The bucket's record; None: it is not known here, or not verified."""
        await self.find_buckets({scope})
        return self.buckets.by_id[scope] if self.buckets.is_verified(scope) else None

    async def _plan(self, name: RegisterName, some: Sequence[_Planned]) -> None:
        try:
            value = (await self.context.registers.read(name)).value
            entries = await self._entries(name, value, {one.ask.data_id for one in some})
            countries = self.buckets.countries_of(name.scope)
        except BucketUnverified as error:
            judged = Judged(LATER, str(error.args[0]))
        except KeyError:
            judged = Judged(LATER, "this gateway does not know the bucket")
        except NoSuchBucket as error:
            judged = Judged(CHANGED, error.message)
        except (StoragedError, ValueError, TimeoutError) as error:
            judged = Judged(LATER, f"the record can't be read now: {error}")
        else:
            for one in some:
                one.seen = value
                one.end(self._plan_one(one, entries, countries))
            return
        for one in some:
            one.end(judged)

    async def _entries(self, name: RegisterName, value: Value | None, wanted: set[bytes]) -> list[PartEntry]:
        """Of this data, as far as it can be read. A key may have very many versions: no more are read than needed."""
        found: list[PartEntry] = []
        async for entry in entries_of(self.context, name, value, on_unreadable=lambda _error: None):
            self._parts_read += 1
            if entry.data_id in wanted:
                found.append(entry)
                wanted.discard(entry.data_id)
                if not wanted:
                    break
        return found

    def _plan_one(self, one: _Planned, entries: Sequence[PartEntry], countries: tuple[str, ...]) -> Judged:
        context, move = self.context, one.ask
        entry = next((entry for entry in entries if entry.data_id == move.data_id), None)
        if entry is None:
            return Judged(CHANGED, "the record does not have this data")
        if is_moved(entry.runs, move.new):
            return Judged(MOVED, "the record says so already")
        judged = judge_ask(context.layouts.current, entry, move, countries, context.liveness.disk_writable)
        if judged.code:
            return judged
        try:
            for run, places in ((move.old, one.old), (move.new, one.new)):
                blocks = msgspec.structs.replace(run, first=move.new.first, count=move.new.count)
                moved = msgspec.structs.replace(entry, runs=(blocks,))
                places += blocks_of(moved, one.name.partition, context.layouts, countries)
        except (KeyError, ValueError) as error:
            return Judged(LATER, f"the places of the blocks are not known here: {error}")
        return OK

    # --- the fragments ------------------------------------------------------------------------------------------------

    async def headers(self, places: Iterable[BlockPlace]) -> Headers:
        """Asks all disks at the same time, each once for all its fragments. One that does not answer is left out."""
        wanted: dict[str, dict[FragmentId, None]] = {}
        for where in places:
            for fragment, disk in where.fragments:
                if self.context.liveness.disk_readable(disk):
                    wanted.setdefault(disk, {})[fragment] = None
        found: Headers = {}

        async def ask(disk: str, ids: list[FragmentId]) -> None:
            try:
                for start in range(0, len(ids), HEADERS_MAX):
                    some = ids[start : start + HEADERS_MAX]
                    async with asyncio.timeout(self.context.limits.call_timeout_s):
                        headers = await self.context.stores.store(disk).headers(some)
                    pairs = zip(some, headers, strict=True)
                    found.update({(disk, fragment): header for fragment, header in pairs if header is not None})
            except (PeerError, TimeoutError) as error:
                self.context.log(f"disk {disk} does not answer about fragments: {error}")

        await asyncio.gather(*(ask(disk, list(ids)) for disk, ids in wanted.items()))
        return found

    async def _judge(self, one: _Planned, headers: Headers) -> None:
        one.end(await self._judge_blocks(one, headers))

    async def _judge_blocks(self, one: _Planned, headers: Headers) -> Judged:
        layout = self.context.layouts.current
        to_read: list[tuple[BlockPlace, BlockPlace, Agreed, FragmentHeader]] = []
        whole = True
        for start in range(0, len(one.old), BLOCKS_A_TURN):
            async with self._rested():
                for old, new in zip(one.old[start:][:BLOCKS_A_TURN], one.new[start:][:BLOCKS_A_TURN], strict=True):
                    survivors = agreed(layout, old, headers_of(old, headers), or_alone=True)
                    if survivors is None or (one.name.table == Table.OBJECT and survivors.owner != one.name.pack()):
                        return Judged(LATER, f"too few fragments in the old places of block {old.block} agree")
                    there = headers_of(new, headers)
                    judged = judge_block(layout, old, new, survivors, there)
                    if judged.code:
                        return judged
                    whole = whole and is_whole(old, survivors)
                    if must_read(old, new, survivors):
                        to_read.append((old, new, survivors, there[0]))
        if whole:
            return Judged(CHANGED, "the blocks are whole where they are")
        results = await asyncio.gather(*(self._compare(*block) for block in to_read))
        return next((judged for judged in results if judged.code), OK)

    @asynccontextmanager
    async def _rested(self) -> AsyncIterator[None]:
        began = self.context.clock.monotonic()
        yield
        await asyncio.sleep(min(self.context.clock.monotonic() - began, REST_S_MAX))

    async def _compare(self, old: BlockPlace, new: BlockPlace, survivors: Agreed, header: FragmentHeader) -> Judged:
        """Reads survivors, computes what should be in the new places, and compares it with the hashes that the headers
        there name; where those are of the old kind, with the bytes.
        """
        async with self._reads:
            try:
                fragments, hashes = await self.rebuilder.as_coded(
                    old, survivors.positions, survivors.hashes, new.profile
                )
                if any(map(is_old, header.hashes)):
                    same = await self.rebuilder.holds(new, fragments)
                else:
                    same = hashes == header.hashes
            except (CannotRepair, PeerError, ValueError, TimeoutError) as error:
                return Judged(LATER, f"survivors of block {old.block} can't be read now: {error}")
        return OK if same else Judged(REFUSED, f"the fragments of block {new.block} are not what its survivors make")

    # --- the change ---------------------------------------------------------------------------------------------------

    async def _commit(self, name: RegisterName, some: Sequence[_Planned]) -> None:
        """Changes the record by all moves that passed."""
        passed = [one for one in some if one.answer is None]
        if not passed:
            return
        try:
            await self._change(name, passed)
        except CannotRepair as error:
            judged = Judged(CHANGED, str(error))
        except NoSuchBucket as error:
            judged = Judged(CHANGED, error.message)
        except (StoragedError, TimeoutError) as error:
            judged = Judged(LATER, f"the record can't be changed now: {error}")
        else:
            judged = Judged(MOVED)
            self._blocks_moved += sum(len(one.new) for one in passed)
        for one in passed:
            one.end(judged)

    async def _change(self, name: RegisterName, moves: Sequence[_Planned]) -> None:
        """Raises CannotRepair when the record is not the one that the moves were judged by, or the new fragments are
        gone; StoragedError. Only after OutcomeUnknown the record may have changed.
        """
        seen, judged = moves[0].seen, [(one.ask, one.new[0].target) for one in moves]
        after = await body_after(self.context.pages, name, seen, judged)
        if seen is None or after is None:
            raise CannotRepair("the moves of this register do not go together")
        await self._retire_old(name, moves)
        changed = RecordChange(seen, after, judged)
        for attempt in range(CHANGES_MAX):
            try:
                await self._change_once(name, moves, changed)
            except PageNeeded:
                await changed.load(self.context.pages, name, (await self.context.registers.read(name)).value)
            except _Overtaken:
                await asyncio.sleep(OVERTAKEN_S * 2**attempt)
            else:
                return
        raise CannotRepair("others change the record")

    async def _change_once(self, name: RegisterName, moves: Sequence[_Planned], changed: RecordChange) -> None:
        """As ``_change``. Raises PageNeeded, _Overtaken too: then nothing has changed."""
        promised = asyncio.Event()

        def update(value: Value | None) -> Change | None:
            if promised.is_set():
                raise _Overtaken
            change = changed.update(value)
            if change is not None:
                promised.set()
            return change

        async def hold() -> None:
            await self._touch_new(moves, promised)
            await changed.put_pages(self.context.pages, name)

        guard = asyncio.ensure_future(hold())
        try:
            outcome = await self.context.registers.change(name, update, ready=guard)
        finally:
            guard.cancel()
            await asyncio.gather(guard, return_exceptions=True)
        if outcome.after is None or outcome.after.body != changed.body:
            raise CannotRepair("the record has changed meanwhile")

    async def _touch_new(self, moves: Sequence[_Planned], promised: asyncio.Event) -> None:
        """Touches the new fragments once the promise is there. Raises CannotRepair when one is gone."""
        await promised.wait()
        by_disk: dict[str, list[FragmentId]] = {}
        for one in moves:
            for where in one.new:
                for fragment, disk in where.fragments:
                    by_disk.setdefault(disk, []).append(fragment)

        async def touch(disk: str, ids: list[FragmentId]) -> None:
            for start in range(0, len(ids), TOUCHES_A_CALL):
                some = ids[start : start + TOUCHES_A_CALL]
                async with asyncio.timeout(self.context.limits.call_timeout_s):
                    stats = await self.context.stores.store(disk).touch(some, self.context.clock.wall_ms())
                if any(stat.health != Health.OK for stat in stats):
                    raise CannotRepair(f"fragments written to disk {disk} are not there any more")

        results = await asyncio.gather(*(touch(disk, ids) for disk, ids in by_disk.items()), return_exceptions=True)
        for result in results:
            if result is not None:
                raise result

    async def _retire_old(self, name: RegisterName, moves: Sequence[_Planned]) -> None:
        """Puts the data on the garbage lists of disks from which fragments move; it stays ``drop_delay_s`` for readers.
        Best effort. Not for the row of a part, which may be copied into the object just now: the sweep of orphans finds
        what that left.
        """
        if name.table != Table.OBJECT:
            return
        due_ms = self.context.clock.wall_ms() + int(self.context.limits.drop_delay_s * 1000)
        by_disk: dict[str, dict[bytes, Retirement]] = {}
        for one in moves:
            old, new = one.old[0], one.new[0]
            for position, disk in enumerate(old.disks):
                if old.profile != new.profile or new.disks[position] != disk:
                    entry = Retirement(one.ask.data_id, name.pack(), due_ms)
                    by_disk.setdefault(disk, {})[one.ask.data_id] = entry
        lists = {disk: list(entries.values()) for disk, entries in by_disk.items()}
        await retire_all(self.context.stores, lists, self.context.limits.call_timeout_s)


def headers_of(where: BlockPlace, headers: Headers) -> dict[int, FragmentHeader]:
    """Position -> header of the block's fragments that are in its places."""
    found = {position: headers.get((disk, fragment)) for position, (fragment, disk) in enumerate(where.fragments)}
    return {position: header for position, header in found.items() if header is not None}
