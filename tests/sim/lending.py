"""As ``versions``, with copies that move no data: a version of one key borrows the data of another key
(``objects.write.loans``), while keys are overwritten and deleted, blocks move, and every disk collects.

Lending, its look between promise and accept, and its end are the program's own. Two of the three keys have no
versioning, and are sometimes written by creates. Requests fall asleep between any two steps, background work that
should end loans is dropped now and then, and looks for loans that nothing uses spare none because it is young. Some
objects have two parts, which in every second play are on pages.

The play also checks: a reader of a borrowing version finds its loan, unless the version has gone. In the end the data
of each version is where its writer saw it durable, no loan stays that nothing uses, and all other data goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Coroutine, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec

from storaged.cluster.layout import Profile
from storaged.errors import StoragedError
from storaged.fragments.ports import FragmentId, Retirement
from storaged.hashes import page_hash
from storaged.maintain.moved_record import RecordChange, body_after
from storaged.maintain.moves import MoveAsk
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.names import RegisterName, Table, Value, Visibility
from storaged.objects.code import manifest
from storaged.objects.code.history import Draft, Entry, PageNeeded, unversioned
from storaged.objects.code.lending import borrowed_by, find_borrower
from storaged.objects.code.manifest import manifest_pages, parts_of, write_manifest
from storaged.objects.code.version_names import NULL_NAME, VersionName
from storaged.objects.code.version_walk import every_entry
from storaged.objects.code.versions import decode_record
from storaged.objects.plane import ObjectLimits, ObjectPlane
from storaged.objects.records import Kept, Loan, PartEntry, Version, sharing_of
from storaged.objects.sharing import Borrowed, Borrower
from storaged.objects.write import versioned
from storaged.objects.write.commit import AfterPromise, ProposedAgain
from storaged.objects.write.loans import NotLent, Wanted, end_unused, retire_gone, with_loan
from storaged.objects.write.references import parts_in
from tests.sim.cluster import DISKS, Gateway
from tests.sim.collecting import KEYS, SCOPE
from tests.sim.collecting_uploads import commit_move
from tests.sim.planes import make_plane
from tests.sim.scenario import play_out
from tests.sim.versions import FEW, OPERATIONS, HasHistory, Versions
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts

BUCKET: Any = SimpleNamespace(id=SCOPE, shard_numbers=b"\x03", countries=(), plain=True, state="active")
Source = tuple[RegisterName, tuple[bytes, ...], VersionName | None, tuple[bytes, ...]]
"""(owner, data ids, version, pages) of a version that may lend, or has borrowed: as of ``Wanted``."""
PAGES_READ_MAX = 6
LOOKS_MAX = 8
"""At all keys in the end, for loans that nothing uses."""


class _Sleepy:
    """The registers of a gateway. After some of its changes the gateway pauses."""

    def __init__(self, client: Any, play: Lending) -> None:
        self._client = client
        self._play = play

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def change(self, name: RegisterName, *what: Any, **how: Any) -> Any:
        outcome = await self._client.change(name, *what, **how)
        await self._play.nap()
        return outcome

    async def settle(self, name: RegisterName, **how: Any) -> Value | None:
        value: Value | None = await self._client.settle(name, **how)
        await self._play.nap_after_round()
        return value


class _Held:
    """Pages that are not put yet."""

    def __init__(self) -> None:
        self.pages: dict[bytes, bytes] = {}

    async def put_page(self, _near: RegisterName, body: bytes, _name: bytes = b"") -> bytes:
        name = page_hash(body)
        self.pages[name] = body
        return name

    async def put_all(self, gateway: Gateway, near: RegisterName) -> None:
        for name, body in self.pages.items():
            await gateway.client.put_page(near, body, name)


class Lending(Versions):
    with_versions = KEYS[2]
    """The key that has versioning."""

    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        self._luck = random.Random(f"lending {seed}")
        self._garbage: list[tuple[str, Retirement]] = []

    async def nap(self) -> None:
        await self._nap(0.1)

    async def nap_after_round(self) -> None:
        await self.nap()

    async def _nap(self, share: float) -> None:
        if not self._healed and self._luck.random() < share:
            await asyncio.sleep(self._luck.uniform(0.1, 8.0))

    def _make_plane(self, gateway: Gateway) -> ObjectPlane:
        limits = ObjectLimits(retire_delay_ms=0)
        plane = make_plane(self.world, gateway, self._keys, registers=_Sleepy(gateway.client, self), limits=limits)
        later: Any = SimpleNamespace(add=lambda disk, entry: self._retire_later(gateway, disk, entry))
        spawning: Any = SimpleNamespace(spawn=self._spawn)
        plane.garbage, plane.background = later, spawning
        return plane

    def _retire_later(self, gateway: Gateway, disk: str, entry: Retirement) -> None:
        """Collects the entries of a turn, and retires them in their order."""
        if not self._garbage:
            self.world.loop.call_soon(self._retire_all, gateway)
        self._garbage.append((disk, entry))

    def _retire_all(self, gateway: Gateway) -> None:
        garbage, self._garbage = sorted(self._garbage), []
        for disk, entry in garbage:
            if self._luck.random() > 0.2:
                self._start(self._retire_on(gateway, disk, [entry]))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> bool:
        if self._luck.random() < 0.3 and not self._healed:
            work.close()
            return False
        self._start(self._suppressed(work))
        return True

    async def _suppressed(self, work: Coroutine[Any, Any, None]) -> None:
        with contextlib.suppress(StoragedError, ProposedAgain):
            await work

    # --- the workload

    async def worker(self, gateway: Gateway) -> None:
        for _ in range(OPERATIONS):
            await asyncio.sleep(self._luck.uniform(0, 0.5))
            key = self._luck.choice(KEYS)
            name = self.name(key)
            self.found.operations += 1
            kind, null = self._luck.random(), key != self.with_versions or self._luck.random() < 0.3
            if kind < 0.2:
                await self._note(self._put(gateway, name, null=null))
            elif kind < 0.3:
                await self._note(self._put_small(gateway, name))
            elif kind < 0.35 and key == self.with_versions:
                await self._note(self._mark(gateway, name, null=null))
            elif kind < 0.45:
                await self._note(self._remove(gateway, name))
            elif kind < 0.52:
                await self._note(self._list(gateway, name))
            elif kind < 0.68:
                await self._note(self._move(gateway, name))
            else:
                await self._note(self._copy(gateway, name, self._luck.choice([one for one in KEYS if one != key])))

    async def _note(self, work: Any) -> None:
        with contextlib.suppress(NotLent, HasHistory):
            await super()._note(work)
            return
        self.found.refused += 1

    def _adds(self, name: RegisterName, version: Version, borrowed: Borrowed | None = None) -> versioned.Edit:
        """As ``put.AddedVersion``."""

        def edit(draft: Draft, ordinal: int) -> bool:
            if name.key == self.with_versions:
                added = Entry(Kept(ordinal), version)
            else:
                assert not draft.has_history
                for before in draft.inline:
                    draft.remove(before)
                added = unversioned(version)
            draft.add(added)
            if borrowed is not None:
                draft.borrowed[added.ordinal] = borrowed
            return True

        return edit

    async def _put_small(self, gateway: Gateway, name: RegisterName) -> None:
        """Of a key without versioning: as ``put.Replacement``, by a create where nothing is known of the key."""
        if name.key == self.with_versions or self._luck.random() < 0.3:
            await super()._put_small(gateway, name)
            return
        await self._put_unasked(gateway, name)

    async def _put(self, gateway: Gateway, name: RegisterName, *, null: bool) -> None:
        """Some objects have two parts."""
        if self._luck.random() < 0.6:
            await super()._put(gateway, name, null=null)
            return
        written = [await self._write(gateway, name) for _ in range(2)]
        parts, held = tuple(entry for entry, _ in written), _Held()
        context_id = self._luck.randbytes(16)
        made = await write_manifest(held, name, parts)  # type: ignore[arg-type]
        version = msgspec.structs.replace(
            self._version(parts[0], null=null),
            parts=made.parts,
            manifest=made.first,
            pages=made.pages,
            context_id=context_id,
        )
        operation, again = self._adding(name, context_id, null=null), False

        async def made_durable() -> None:
            nonlocal again
            promised = asyncio.Event()
            promised.set()
            for _, fragments in written:
                await self._made_durable(gateway, fragments, promised, again=again)
            await held.put_all(gateway, name)
            again = True

        try:
            async with self._noted(operation):
                await self.sleep(0.1)
                await self._add(gateway, name, version, made_durable)
        except BaseException:
            self.retire(gateway, name, parts, b"")
            raise

    def _retire_removed(self, gateway: Gateway, name: RegisterName, removed: Any) -> None:
        plane, _ = self._tools(gateway)
        retire_gone(plane, BUCKET, name, removed)

    # --- copies

    async def _copy(self, gateway: Gateway, name: RegisterName, source: bytes) -> None:
        """As ``lent_copy``."""
        plane, _ = self._tools(gateway)
        found = await self._source(gateway, source)
        if found is None:
            return
        owner, data_ids, named, pages = found
        borrowed = Borrowed(owner.key, self._luck.randbytes(16))
        version, held = await self._borrowing(borrowed.id, pages, null=name.key != self.with_versions)
        wanted = Wanted(owner, data_ids, named, Borrower(borrowed.id, name.key, 1), pages)
        await self.sleep(0.1)
        operation = self._adding(name, borrowed.id, null=name.key != self.with_versions)

        async def commit(check: AfterPromise) -> None:
            async def made_durable() -> None:
                await self.nap()
                await check()
                await held.put_all(gateway, name)
                await self.sleep(0.25)

            await self.nap()
            async with self._noted(operation):
                await self._add(gateway, name, version, made_durable, edit=self._adds(name, version, borrowed))

        await with_loan(plane, BUCKET, wanted, commit)
        self.found.done["copies"] += 1
        self.found.done["copies of pages"] += bool(pages)

    async def _borrowing(
        self, context_id: bytes, pages: tuple[bytes, ...], *, null: bool = True
    ) -> tuple[Version, _Held]:
        """A version without data of its own. If that is on pages, the version has a page, too: the list of its parts,
        which is to be put between promise and accept.
        """
        held = _Held()
        named = (await held.put_page(RegisterName(1, SCOPE, 0, b""), self._luck.randbytes(20)),) if pages else ()
        version = self._version(None, null=null, context_id=context_id)
        return msgspec.structs.replace(version, delete_marker=False, pages=named), held

    async def _source(self, gateway: Gateway, key: bytes) -> Source | None:
        name = self.name(key)
        record = decode_record((await gateway.client.read(name)).value)
        entries = [entry async for entry in every_entry(gateway.client, name, record)]
        entries = [entry for entry in entries if not any(part.small for part in entry.version.parts)]
        entries = [entry for entry in entries if not entry.version.delete_marker]
        if not entries:
            return None
        entry = self._luck.choice(entries)
        borrowed = borrowed_by(record, entry.ordinal)
        if borrowed is None:
            named = NULL_NAME if entry.is_null else VersionName(entry.ordinal, entry.version.context_id)
            return name, *await self._names(gateway, name, entry.version, named)
        loan = await self._lent(gateway, name, borrowed)
        if loan is None:
            return None
        owner = self.name(borrowed.key)
        return owner, *await self._names(gateway, owner, loan, None)

    async def _names(
        self, gateway: Gateway, owner: RegisterName, having: Version | Loan, named: VersionName | None
    ) -> tuple[tuple[bytes, ...], VersionName | None, tuple[bytes, ...]]:
        """As ``lent_copy.lent_of``."""
        pages = [page async for page, _ in manifest_pages(gateway.client, owner, having)]
        return tuple(part.data_id for part in having.parts), named, tuple(pages)

    async def _lent(self, gateway: Gateway, name: RegisterName, borrowed: Borrowed) -> Loan | None:
        """What a version borrows. None: the version has gone since."""
        lent = find_borrower((await gateway.client.read(self.name(borrowed.key))).value, borrowed.id)
        if lent is not None:
            return lent[0]
        again = sharing_of(decode_record((await gateway.client.read(name)).value)).borrowed
        if borrowed in again.values():
            self.complain(f"a version of {name.key!r} has lost the data that it borrows")
        return None

    async def _move(self, gateway: Gateway, name: RegisterName) -> None:
        """As ``maintain.mover`` does what repair asks: a fragment has a copy on another disk already."""
        seen = (await gateway.client.read(name)).value
        if seen is None or seen.visibility == Visibility.TOMBSTONE:
            return
        parts = [part async for part in parts_in(gateway.client, name, seen.body, Table.OBJECT) if not part.small]
        if not parts:
            return
        part = self._luck.choice(parts)
        places = part.runs[0].moved
        position, target = self._luck.choice(list(places)), self._luck.choice(DISKS)
        fragment, source = FragmentId(part.data_id, 0, 2, 1, position), places[position]
        if target in places.values() or not await self.uploads._copy(fragment, source, target):
            return
        new = msgspec.structs.replace(part.runs[0], moved={**places, position: target})
        ask = MoveAsk(name.pack(), part.data_id, part.runs[0], new)
        moves = [(ask, Profile(2, 1))]
        after = await body_after(gateway.client, name, seen, moves)
        if after is None:
            return  # a page can't be read now
        change = RecordChange(seen, after, moves)

        async def put_pages() -> None:
            await change.put_pages(gateway.client, name)

        for _ in range(PAGES_READ_MAX):
            try:
                await commit_move(self, gateway, name, change.update, (fragment, target), put_pages)
                break
            except PageNeeded:
                await change.load(gateway.client, name, (await gateway.client.read(name)).value)
        else:
            return
        self.found.done["moves"] += 1
        self.found.done["moves of changed records"] += change.body != after.body
        await self._retire_on(gateway, source, [Retirement(part.data_id, name.pack(), 0)])

    # --- loans that nothing uses

    def more(self) -> Sequence[Coroutine[Any, Any, None]]:
        return (self._look_for_unused(),)

    async def _look_for_unused(self) -> None:
        while True:
            await asyncio.sleep(self._luck.uniform(0.2, 3.0))
            plane, _ = self._tools(self._luck.choice(self.gateways))
            self._start(self._suppressed(self._look_at(plane, self.name(self._luck.choice(KEYS)))))

    async def _look_at(self, plane: Any, name: RegisterName) -> None:
        await end_unused(plane, BUCKET, name, fresh_ms=-(1 << 50))

    # --- the end

    async def _look_at_the_end(self, reader: Gateway) -> set[bytes]:
        await self._end_all(reader)
        live: set[bytes] = set()
        for key in KEYS:
            name = self.name(key)
            try:
                await self.settle_everywhere(reader, name)
                value = (await reader.client.read(name)).value
                copy_read = (await reader.client.read(name, want_payload=True)).payload is not None
                entries = await self._list(reader, name)
            except StoragedError as error:
                self.complain(f"{key!r} cannot be read in the end: {error}")
                continue
            record = decode_record(value)
            try:
                for entry in entries:
                    for page in entry.version.pages:
                        await reader.client.get_page(name, page)
                    borrowed = borrowed_by(record, entry.ordinal)
                    lent = await self._lent(reader, name, borrowed) if borrowed is not None else None
                    owner, having = (name, entry.version) if borrowed is None else (self.name(borrowed.key), lent)
                    for part in await self._parts(reader, owner, having):
                        live.add(part.data_id)
                        self._check_data(part, value.payload if value is not None else b"", copy_read=copy_read)
                for loan in sharing_of(record).loans:
                    live |= {part.data_id for part in await self._parts(reader, name, loan)}
            except StoragedError as error:
                self.complain(f"a page of {key!r} is gone: {error}")
        self._judge_history()
        return live

    async def _parts(self, reader: Gateway, owner: RegisterName, having: Version | Loan | None) -> list[PartEntry]:
        return [part async for part in parts_of(reader.client, owner, having)] if having is not None else []

    async def _end_all(self, reader: Gateway) -> None:
        """All loans that nothing uses end, and no others are left."""
        plane, _ = self._tools(reader)
        for _ in range(LOOKS_MAX):
            for key in KEYS:
                await self._suppressed(self._look_at(plane, self.name(key)))
        used: set[bytes] = set()
        lent: set[bytes] = set()
        for key in KEYS:
            with contextlib.suppress(StoragedError):
                sharing = sharing_of(decode_record((await reader.client.read(self.name(key))).value))
                used |= {borrowed.id for borrowed in sharing.borrowed.values()}
                lent |= {borrower.id for loan in sharing.loans for borrower in loan.borrowers}
        if lent - used:
            self.complain("a loan stays that nothing uses")


@contextlib.contextmanager
def few(seed: int) -> Iterator[None]:
    """Small bounds for what lies in a record."""
    before, inline = versioned.BOUNDS, manifest.PARTS_INLINE_MAX
    versioned.BOUNDS = FEW
    if seed % 2:
        manifest.PARTS_INLINE_MAX = 1
    try:
        yield
    finally:
        versioned.BOUNDS, manifest.PARTS_INLINE_MAX = before, inline


def run_lending(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    with few(seed):
        return play_out(lambda loop: Lending(seed, loop, rules))  # type: ignore[arg-type,return-value]
