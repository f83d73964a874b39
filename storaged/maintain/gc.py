"""Garbage collection: each node deletes on its own disks what is out of use. ``disuse`` says when that is.

Theory of operation. Garbage is found in two ways: gateways fill the garbage lists (``retire``), and the ``sweep`` puts
on them what no record claims. A page of a list is judged together:

* What a committed change replaced goes after a settled read of its register. One message to a node reads many.
* Parts of uploads go when their upload has ended, after a round of the object's register.
* Everything else needs a round of its register, which is asked of a gateway.

No node deletes on another's disk: each has its own list, and looks by itself.

An entry names the register that referred to the data. A gateway takes that from a record, and one replica of the
record may have forged it. So a fragment is deleted only if its own header names that register too: the gateway that
wrote the fragment has put it there.

What can't be judged now rests for a while, with what else of its register has the same origin. A list is
gone through page by page, so that entries which wait for long hold up no others. How many wait, and why, is in the
node's status.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from storaged.errors import StoragedError
from storaged.fragments.ports import HEADERS_MAX, OF_UPLOAD, REPLACED, FragmentId, NearStore, Retirement
from storaged.ids import UPLOAD_ID_BYTES
from storaged.maintain.context import MaintainContext, concurrently
from storaged.maintain.disuse import PAST, Judge, Proof, is_open
from storaged.maintain.sweep import Sweep, owner_of
from storaged.maintain.walk import is_claimed
from storaged.meta.names import RegisterName

READS_CONCURRENT_MAX = 128
DELETIONS_A_CALL = 2000
ENTRIES_A_ROUND = 50_000
"""Entries of one disk looked at before the other disks have their turn; the next round goes on from there."""
RESTING_MAX = 10_000
"""Registers and origins whose garbage rests. Of further ones each round asks again."""
RESTS_A_KEY = 64
"""When so many origins of one register rest, all its garbage rests: a key with ten thousand open uploads leaves room to
others.
"""

_Rest = tuple[bytes, bytes | None]
"""Packed name of a register, and the origin of the data: what is known of both is the same for many data ids. None: of
every origin.
"""


class Garbage(NamedTuple):
    """An entry of a garbage list with the fragments of its data id on that disk."""

    entry: Retirement
    owner: RegisterName
    fragments: Sequence[FragmentId]

    @property
    def data_id(self) -> bytes:
        return self.entry.data_id

    @property
    def upload_id(self) -> bytes:
        """Empty when the data is of no part, as far as known."""
        origin = self.entry.origin
        return origin[1:] if origin[:1] == OF_UPLOAD and len(origin) == 1 + UPLOAD_ID_BYTES else b""


class Collector:
    """Judges and deletes on this node's disks. ``run`` is its task."""

    def __init__(self, context: MaintainContext, judge: Judge | None = None) -> None:
        self._context = context
        self._judge = judge if judge is not None else Judge(context)
        self._sweep = Sweep(context, self._judge.buckets)
        self._resting: dict[_Rest, tuple[float, str]] = {}
        """What can't be judged now: until when, and why."""
        self._rests_of: Counter[bytes] = Counter()
        """How many of these each register has."""
        self._cursors: dict[str, tuple[int, bytes]] = {}
        """Where on each disk's list the next round goes on."""
        self._counting: dict[str, Counter[str]] = {}
        self._waiting: dict[str, Counter[str]] = {}
        self.deleted_fragments = 0
        self.kept = 0
        self.rounds = 0
        """Registers for which a round was asked."""

    @property
    def orphans(self) -> int:
        return self._sweep.orphans

    def waiting(self) -> Counter[str]:
        """How many data ids of the garbage lists wait, by reason, as the last complete passes over the lists found."""
        return sum(self._waiting.values(), Counter())

    async def run(self) -> None:
        """For ever: the garbage lists often, the sweep of orphans a few times a day."""
        next_sweep = self._context.clock.monotonic() + self._context.limits.orphan_interval_s
        while True:
            await asyncio.sleep(self._context.limits.collect_interval_s)
            await self.collect_due()
            if self._context.clock.monotonic() >= next_sweep:
                next_sweep = self._context.clock.monotonic() + self._context.limits.orphan_interval_s
                await self.sweep()

    async def sweep(self) -> int:
        """Puts on the lists what no record claims; returns how many fragments that were."""
        return await self._sweep.once()

    async def collect_due(self) -> int:
        """Judges what is due on all disks. Returns how many fragments were deleted."""
        before = self.deleted_fragments
        now = self._context.clock.monotonic()
        self._resting = {owner: rest for owner, rest in self._resting.items() if rest[0] > now}
        self._rests_of = Counter(owner for owner, _ in self._resting)
        for disk, store in self._context.local_fragments.items():
            counting = self._counting.setdefault(disk, Counter())
            resting_before = len(self._resting)
            try:
                if await self._collect_disk(disk, store, counting):
                    self._waiting[disk], self._counting[disk] = counting, Counter()
            except (StoragedError, TimeoutError) as error:
                self._cursors.pop(disk, None)
                counting.clear()
                self._context.log(f"the garbage list of disk {disk} can't be judged now: {error}")
            if counting and len(self._resting) > resting_before:
                reason, count = counting.most_common(1)[0]
                self._context.log(
                    f"{counting.total()} entries of disk {disk}'s garbage list can't be judged now; {count} of them:"
                    f" {reason}"
                )
        return self.deleted_fragments - before

    async def _collect_disk(self, disk: str, store: NearStore, counting: Counter[str]) -> bool:
        """One round over a list, or the next part of it. True: its end was reached."""
        limits, now_ms = self._context.limits, self._context.clock.wall_ms()
        for _ in range(0, ENTRIES_A_ROUND, limits.collect_batch):
            page = await store.due(now_ms, self._cursors.get(disk, (0, b"")), limits.collect_batch)
            if not page:
                self._cursors.pop(disk, None)
                return True
            self._cursors[disk] = page[-1].due_ms, page[-1].data_id
            await self._collect_page(disk, store, page, counting)
        return False

    async def _collect_page(
        self, disk: str, store: NearStore, page: Sequence[Retirement], counting: Counter[str]
    ) -> None:
        awake = []
        for entry in page:
            rest = self._resting.get((entry.owner, entry.origin)) or self._resting.get((entry.owner, None))
            if rest is None:
                awake.append(entry)
            else:
                counting[rest[1]] += 1
        judged = _Page(self._context, self._judge, disk, store)
        try:
            await judged.collect(awake)
        finally:
            self.deleted_fragments += judged.deleted
            self.kept += judged.kept
            self.rounds += judged.rounds
            until = self._context.clock.monotonic() + self._context.limits.retry_max_s / 10
            for waits, reason in judged.waiting:
                counting[reason] += 1
                self._let_rest(waits, until, reason)

    def _let_rest(self, waits: _Rest, until: float, reason: str) -> None:
        owner = waits[0]
        if self._rests_of[owner] >= RESTS_A_KEY:
            waits = owner, None
        if waits in self._resting or len(self._resting) < RESTING_MAX:
            self._rests_of[owner] += waits not in self._resting
            self._resting[waits] = until, reason


class _Page:
    """One page of a garbage list, while it is judged. ``waiting``: of each data id that waits, and why."""

    def __init__(self, context: MaintainContext, judge: Judge, disk: str, store: NearStore) -> None:
        self._context = context
        self._judge = judge
        self._disk = disk
        self._store = store
        self._uncertain: list[Garbage] = []
        """Needs a round of its register."""
        self._dead: list[FragmentId] = []
        self.waiting: list[tuple[_Rest, str]] = []
        self.deleted = self.kept = self.rounds = 0

    async def collect(self, entries: Sequence[Retirement]) -> None:
        """Raises StoragedError when the disk itself does not answer."""
        replaced: dict[RegisterName, list[Garbage]] = {}
        parts: dict[tuple[RegisterName, bytes], list[Garbage]] = {}
        for garbage in await self._found(entries):
            if garbage.upload_id:
                parts.setdefault((garbage.owner, garbage.upload_id), []).append(garbage)
            elif garbage.entry.origin == REPLACED:
                replaced.setdefault(garbage.owner, []).append(garbage)
            else:
                self._uncertain.append(garbage)
        work = [self._judge_replaced(owner, some) for owner, some in replaced.items()]
        work += [self._judge_parts(owner, upload_id, some) for (owner, upload_id), some in parts.items()]
        await concurrently(work, READS_CONCURRENT_MAX)
        for start in range(0, len(self._dead), DELETIONS_A_CALL):
            self.deleted += await self._store.delete(self._dead[start : start + DELETIONS_A_CALL])
        if self._uncertain:
            await self._judge_uncertain()

    async def _found(self, entries: Sequence[Retirement]) -> list[Garbage]:
        """The entries with their fragments. Those without any are taken off the list."""
        found = []
        fragments = await self._store.fragments_of([entry.data_id for entry in entries]) if entries else []
        foreign = await self._foreign(dict(zip(entries, fragments, strict=True)))
        for entry, some in zip(entries, fragments, strict=True):
            try:
                owner = owner_of(entry.owner)
            except ValueError as error:
                self._wait([entry], str(error))
                continue
            own = [fragment for fragment in some if fragment not in foreign]
            if own:
                found.append(Garbage(entry, owner, own))
            else:
                await self._store.unretire(entry.data_id)
        return found

    async def _foreign(self, found: Mapping[Retirement, Sequence[FragmentId]]) -> set[FragmentId]:
        """The fragments that belong to another register than the entry says, as their headers tell. One whose header
        can't be read goes with the others of its data id.
        """
        ids = [fragment for some in found.values() for fragment in some]
        owners: dict[FragmentId, bytes] = {}
        for start in range(0, len(ids), HEADERS_MAX):
            some = ids[start : start + HEADERS_MAX]
            headers = await self._store.headers(some)
            owners |= {one: header.owner for one, header in zip(some, headers, strict=True) if header is not None}
        foreign: set[FragmentId] = set()
        for entry, fragments in found.items():
            if any(owners.get(fragment, entry.owner) != entry.owner for fragment in fragments):
                foreign |= {fragment for fragment in fragments if owners.get(fragment) != entry.owner}
                self._context.log(
                    f"the garbage list of disk {self._disk} names data {entry.data_id.hex()} of another register: a "
                    "replica has forged a record"
                )
        return foreign

    def _wait(self, entries: Iterable[Retirement], reason: str) -> None:
        self.waiting.extend(((entry.owner, entry.origin), reason) for entry in entries)

    def _wait_all(self, some: Iterable[Garbage], reason: str) -> None:
        self._wait([garbage.entry for garbage in some], reason)

    # --- by a settled read --------------------------------------------------------------------------------------------

    async def _judge_replaced(self, owner: RegisterName, some: Sequence[Garbage]) -> None:
        try:
            live = await self._judge.references(owner)
        except PAST as error:
            if not await self._of_gone_bucket(owner, some):
                self._wait_all(some, str(error))
            return
        for garbage in some:
            if garbage.data_id in live:  # a move put its old places on the list before
                self._uncertain.append(garbage)
            else:
                self._dead.extend(garbage.fragments)

    async def _of_gone_bucket(self, owner: RegisterName, some: Sequence[Garbage]) -> bool:
        try:
            gone = await self._judge.is_gone(owner.scope)
        except PAST:
            return False
        if gone:
            self._dead.extend(fragment for garbage in some for fragment in garbage.fragments)
        return gone

    async def _judge_parts(self, owner: RegisterName, upload_id: bytes, some: Sequence[Garbage]) -> None:
        try:
            state = await self._judge.upload_state(owner, upload_id)
        except PAST as error:
            if not await self._of_gone_bucket(owner, some):
                self._wait_all(some, str(error))
            return
        if is_open(state):
            self._wait_all(some, "its upload is open")
        else:
            self._uncertain.extend(some)

    # --- by a round ---------------------------------------------------------------------------------------------------

    async def _judge_uncertain(self) -> None:
        data_ids = [garbage.data_id for garbage in self._uncertain]
        by_owner: dict[RegisterName, list[Garbage]] = {}
        for garbage in self._uncertain:
            by_owner.setdefault(garbage.owner, []).append(garbage)
        self._store.condemn(data_ids)
        try:
            self.rounds += len(by_owner)
            proofs = await self._judge.prove(list(by_owner))
            for owner, some in by_owner.items():
                proof = proofs.get(owner, "it was not looked at")
                if isinstance(proof, str):
                    self._wait_all(some, proof)
                    continue
                for garbage in some:
                    await self._conclude(garbage, proof)
        finally:
            self._store.pardon(data_ids)

    async def _conclude(self, garbage: Garbage, proof: Proof) -> None:
        part = bool(garbage.upload_id)
        if garbage.data_id in proof.of_uploads:
            await self._keep(garbage)
        elif any(entry.data_id == garbage.data_id for entry in proof.entries):
            await self._delete_unclaimed(garbage, proof)
        elif proof.gone or part or (proof.everywhere and not proof.uploads):
            await self._delete(garbage.fragments)
        elif proof.uploads:
            self._wait_all([garbage], "an upload of its key is open")
        else:
            self._wait_all([garbage], "a replica of its register is away or lags")

    async def _delete_unclaimed(self, garbage: Garbage, proof: Proof) -> None:
        """The record refers to the data: only fragments that none of its runs places on this disk go."""
        owner = garbage.owner
        try:
            countries = await self._judge.countries_of(owner.scope)
            unclaimed = [
                fragment
                for fragment in garbage.fragments
                if not is_claimed(self._context, owner, proof.entries, fragment, self._disk, countries)
            ]
        except PAST as error:
            self._wait_all([garbage], f"where its fragments belong is not known: {error}")
            return
        if unclaimed:
            await self._delete(unclaimed)
        if len(unclaimed) < len(garbage.fragments):
            await self._keep(garbage)

    async def _delete(self, fragments: Sequence[FragmentId]) -> None:
        for start in range(0, len(fragments), DELETIONS_A_CALL):
            self.deleted += await self._store.delete_condemned(fragments[start : start + DELETIONS_A_CALL])

    async def _keep(self, garbage: Garbage) -> None:
        self.kept += 1
        await self._store.unretire(garbage.data_id)
