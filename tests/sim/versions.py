"""As ``collecting``, with keys that have versions: gateways add named and null versions and delete markers, delete
versions by their ids, and list, with the program's own changes (``objects.write.versioned``). A record has so few
versions that most lie on pages, and every disk sweeps its pages all the time.

Judged is, besides: the history of each key is linearizable, where a key's state is the list of its versions, newest
first, and a reader sees all of it. In the end the data of every version is where its writer saw it durable, every page
of the record can be read, and no other page stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from storaged.errors import OutcomeUnknown, PeerError, StoragedError
from storaged.fragments.ports import FragmentHeader, FragmentId, encode_copies
from storaged.hashes import fragment_hash
from storaged.maintain.manifest_gc import PageSweep
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.names import Change, RegisterName, Value, Visibility
from storaged.meta.ports import SmallCopies
from storaged.objects.bucket_keys import BucketKeys
from storaged.objects.code.adding import overtake
from storaged.objects.code.history import Bounds, Draft, Entry
from storaged.objects.code.version_names import NULL_NAME
from storaged.objects.code.version_walk import every_entry
from storaged.objects.code.versions import decode_record, record_change
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import NAMED_VERSION, NULL_VERSION, Kept, ObjectRecord, PartEntry, Version
from storaged.objects.write import versioned
from storaged.objects.write.commit import ProposedAgain, change_once
from storaged.objects.write.references import pages_in
from storaged.objects.write.retire import origin_of
from storaged.objects.write.versioned import Gone, VersionsUpdate, change_versions
from tests.sim.cluster import DISKS, Gateway
from tests.sim.collecting import KEYS, Collecting, CollectingNode, GatewayAsks, entry_of
from tests.sim.collecting_uploads import nothing
from tests.sim.linear import Content, Kind, Operation, linearizable
from tests.sim.planes import Lives, keys_for, make_plane
from tests.sim.scenario import play_out
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts


class HasHistory(Exception):
    """As ``put.HasHistory``."""


FEW = Bounds(versions_max=2, versions_bytes_max=1 << 20, leaf_versions=2, refs_max=2, branch_refs=2)
OPERATIONS = 12
ID_BYTES = 16
SWEEPS_MAX = 6

State = bytes
"""17 bytes a version, newest first: ``n`` for the null version, ``v`` for another one, and its context id."""


def state_of(entries: list[Entry]) -> State:
    return b"".join((b"n" if entry.is_null else b"v") + entry.version.context_id for entry in entries)


def _split(state: State) -> list[bytes]:
    return [state[at : at + ID_BYTES + 1] for at in range(0, len(state), ID_BYTES + 1)]


@dataclass
class VersionsOperation(Operation):
    """A READ observes the whole list. Others observe nothing. ``new``: the entry that a PUT adds; a DELETE takes the
    one with this id away.
    """

    def step(self, state: Content) -> tuple[bool, Content]:
        held = _split(state or b"")
        if self.kind is Kind.READ:
            return self.open or (self.observed or b"") == (state or b""), state
        assert self.new is not None
        if self.kind is Kind.PUT:
            if self.new[:1] == b"n":
                held = [one for one in held if one[:1] != b"n"]
            return True, self.new + b"".join(held)
        return True, b"".join(one for one in held if one[1:] != self.new[1:])


class Versions(Collecting):
    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        self.history: list[Operation] = []
        self._moments = 0
        self.world.overtake = overtake
        self.objects: tuple[bytes, ...] = KEYS
        self._known: dict[RegisterName, list[Entry]] = {}
        """Versions that were seen, of which some may be deleted."""
        self._chance = random.Random(f"versions {seed}")
        self._keys = keys_for(seed)
        self._planes = Lives(self._make_plane)

    def moment(self) -> int:
        self._moments += 1
        return self._moments

    def place(self, name: RegisterName) -> str:
        """The key of its operations in the history."""
        return name.key.decode()

    # --- gateways

    async def worker(self, gateway: Gateway) -> None:
        for _ in range(OPERATIONS):
            await asyncio.sleep(self._chance.uniform(0, 0.5))
            name = self.name(self._chance.choice(self.objects))
            self.found.operations += 1
            kind = self._chance.random()
            if kind < 0.4:
                await self._note(self._put(gateway, name, null=self._chance.random() < 0.3))
            elif kind < 0.5:
                await self._note(self._put_small(gateway, name))
            elif kind < 0.65:
                await self._note(self._mark(gateway, name, null=self._chance.random() < 0.5))
            elif kind < 0.8:
                await self._note(self._remove(gateway, name))
            else:
                await self._note(self._list(gateway, name))

    async def _note(self, work: Any) -> None:
        with contextlib.suppress(StoragedError, ProposedAgain):
            await work
            return
        self.found.refused += 1

    @contextlib.asynccontextmanager
    async def _noted(self, operation: Operation) -> Any:
        """Of unknown outcome it stays open; of any other error it had no effect."""
        try:
            yield
        except OutcomeUnknown:
            if operation.kind is not Kind.READ:
                self.history.append(operation)
            raise
        operation.returned = self.moment()
        self.history.append(operation)

    def _make_plane(self, gateway: Gateway) -> ObjectPlane:
        return make_plane(self.world, gateway, self._keys)

    def _tools(self, gateway: Gateway) -> tuple[ObjectPlane, BucketKeys]:
        """Of the life that the gateway has now. Nothing is sealed here, so the bucket needs no key."""
        plane = self._planes.of(gateway)
        return plane, BucketKeys(plane, None)  # type: ignore[arg-type]

    async def _put(self, gateway: Gateway, name: RegisterName, *, null: bool) -> None:
        entry, held = await self._write(gateway, name)
        operation = self._adding(name, entry.data_id, null=null)
        again = False

        async def made_durable() -> None:
            nonlocal again
            promised = asyncio.Event()
            promised.set()
            await self._made_durable(gateway, held, promised, again=again)
            again = True

        try:
            async with self._noted(operation):
                await self.sleep(0.1)
                self._ask_late(gateway)
                await self._add(gateway, name, self._version(entry, null=null), made_durable)
        except BaseException:
            self.retire(gateway, name, [entry], b"")
            raise

    def _adding(self, name: RegisterName, context_id: bytes, *, null: bool) -> Operation:
        new = (b"n" if null else b"v") + context_id
        return VersionsOperation(Kind.PUT, self.place(name), self.moment(), new)

    def _version(self, entry: PartEntry | None, *, null: bool, context_id: bytes = b"") -> Version:
        parts = (entry,) if entry is not None else ()
        version_id = NULL_VERSION if null else NAMED_VERSION
        context_id = entry.data_id if entry is not None else context_id
        return Version(version_id, 1, 1, "", 1, context_id, b"", entry is None, b"", b"", parts)

    async def _write(self, gateway: Gateway, name: RegisterName) -> tuple[PartEntry, dict[str, FragmentId]]:
        data_id, disks = self.random.randbytes(16), self.random.sample(DISKS, 3)
        payload, held = self.random.randbytes(8), dict[str, FragmentId]()
        for position, disk in enumerate(disks):
            fragment = FragmentId(data_id, 0, 2, 1, position)
            hashes = (fragment_hash([payload]),) * 3
            header = FragmentHeader(fragment.pack(), name.pack(), bytes(64), hashes, 4096, 8, 1)
            with contextlib.suppress(PeerError):
                await self.store(gateway, disk).write(header, [payload])
                held[disk] = fragment
        return entry_of(data_id, dict(enumerate(disks))), held

    async def _add(
        self,
        gateway: Gateway,
        name: RegisterName,
        version: Version,
        made_durable: Callable[[], Any],
        small: SmallCopies | None = None,
        edit: versioned.Edit | None = None,
    ) -> None:
        """As ``objects.write.put``."""
        plane, keys = self._tools(gateway)
        change = VersionsUpdate(keys.shelf, self._adds(name, version) if edit is None else edit)

        async def after_promise() -> None:
            await made_durable()
            await change.put_pages(plane.pages, name)

        payload = small.data_id if small is not None else b""
        await change_once(plane, keys, name, lambda value: change.update(value, payload), after_promise, small=small)
        self._retire_removed(gateway, name, change.removed)

    def _adds(self, name: RegisterName, version: Version) -> versioned.Edit:
        def edit(draft: Draft, ordinal: int) -> bool:
            draft.add(Entry(Kept(ordinal), version))
            return True

        return edit

    def _small_copies(self, name: RegisterName, chance: random.Random, data_id: bytes = b"") -> SmallCopies:
        """``data_id``: empty: a new one."""
        data_id = data_id or chance.randbytes(16)
        content = chance.randbytes(5)
        fragment = FragmentId(data_id, 0, 1, 2, 0)
        header = FragmentHeader(fragment.pack(), name.pack(), b"", (fragment_hash([content]),), 4096, 5, 1)
        self.durable[data_id] = set()
        copies = [(copy, [content]) for copy in encode_copies(header, 3)]
        return SmallCopies(data_id, copies, lambda disks: len(disks) >= 2)

    async def _put_small(self, gateway: Gateway, name: RegisterName) -> None:
        """The null version, by a gateway that does not know yet that the bucket has versioning."""
        small = self._small_copies(name, self.random)

        async with self._noted(self._adding(name, small.data_id, null=True)):
            version = self._version(entry_of(small.data_id, {}, small=True), null=True)
            await self._add(gateway, name, version, nothing, small)

    async def _put_unasked(self, gateway: Gateway, name: RegisterName) -> None:
        """As ``put.Replacement``, by a create where nothing is known of the key. Raises HasHistory."""
        small = self._small_copies(name, self._chance)
        version = self._version(entry_of(small.data_id, {}, small=True), null=True)
        change = record_change(ObjectRecord((version,)), small.data_id)

        def update(value: Value | None) -> Change:
            if decode_record(value).history is not None:
                raise HasHistory
            return change

        async with self._noted(self._adding(name, small.data_id, null=True)):
            await self.sleep(0.1)
            outcome = await gateway.client.change(name, update, small=small, regardless=True)
        for before in decode_record(outcome.before).versions:
            self.retire(gateway, name, before.parts, b"r")

    async def _mark(self, gateway: Gateway, name: RegisterName, *, null: bool) -> None:
        """A delete marker."""
        marker = self._version(None, null=null, context_id=self.random.randbytes(16))
        async with self._noted(self._adding(name, marker.context_id, null=null)):
            await self._edit(gateway, name, self._adds(name, marker))

    async def _edit(self, gateway: Gateway, name: RegisterName, edit: versioned.Edit) -> None:
        plane, keys = self._tools(gateway)
        _, removed = await change_versions(plane, keys, name, edit)
        self._retire_removed(gateway, name, removed)

    def _retire_removed(self, gateway: Gateway, name: RegisterName, removed: Gone) -> None:
        for version in removed.versions:
            self.retire(gateway, name, version.parts, origin_of(version))

    async def _remove(self, gateway: Gateway, name: RegisterName) -> None:
        known = self._known.get(name)
        if not known:
            return
        entry = self._chance.choice(known)
        wanted = NULL_NAME if entry.is_null else None

        def edit(draft: Draft, _ordinal: int) -> bool:
            found = draft.null() if wanted else draft.made_of(entry.version.context_id, entry.ordinal - 1)
            if found is None or found.version.context_id != entry.version.context_id:
                return False
            draft.remove(found)
            return True

        gone = b"?" + entry.version.context_id
        async with self._noted(VersionsOperation(Kind.DELETE, self.place(name), self.moment(), gone)):
            await self._edit(gateway, name, edit)

    async def _list(self, gateway: Gateway, name: RegisterName) -> list[Entry]:
        operation = VersionsOperation(Kind.READ, self.place(name), self.moment())
        async with self._noted(operation):
            value = (await gateway.client.read(name)).value
            entries = [entry async for entry in every_entry(gateway.client, name, decode_record(value))]
            operation.observed = state_of(entries)
            self._known[name] = entries
        return entries

    # --- collectors

    async def _collect_once(self, node: CollectingNode) -> None:
        await super()._collect_once(node)
        collector, client = self._collector(node, GatewayAsks(self))
        try:
            limits = dataclasses.replace(collector._context.limits, drop_delay_s=0.3)
            sweep = PageSweep(dataclasses.replace(collector._context, limits=limits))
            sweep._judge = collector._judge
            swept = await sweep.once()
            self.found.done["pages swept"] += swept
        except PeerError:
            pass
        finally:
            await client.client.close()

    # --- the end

    async def _look_at_the_end(self, reader: Gateway) -> set[bytes]:
        live: set[bytes] = set()
        for key in self.objects:
            name = self.name(key)
            try:
                await self.settle_everywhere(reader, name)
                reading = await reader.client.read(name, want_payload=True)
                entries = await self._list(reader, name)
            except StoragedError as error:
                self.complain(f"{key!r} cannot be read in the end: {error}")
                continue
            payload = reading.value.payload if reading.value is not None else b""
            for part in [part for entry in entries for part in entry.version.parts]:
                live.add(part.data_id)
                self._check_data(part, payload, copy_read=reading.payload is not None)
        self._judge_history()
        return live

    def _judge_history(self) -> None:
        if not self.found.violation and not linearizable(self.history):
            self.complain("not linearizable")

    def _check_data(self, part: PartEntry, payload: bytes, *, copy_read: bool) -> None:
        if part.small and (part.data_id != payload or not copy_read):
            self.complain(f"the copies of {part.data_id.hex()} are gone")
        for position, disk in self.durable[part.data_id].intersection(part.runs[0].moved.items()):
            medium: Any = self.world.nodes["n" + disk[1:]].medium
            if FragmentId(part.data_id, 0, 2, 1, position) not in medium.fragments.fragments:
                self.complain(f"a fragment of {part.data_id.hex()} is gone from {disk}")

    async def _nothing_else_stays(self, nodes: Any, live: set[bytes]) -> None:
        await super()._nothing_else_stays(nodes, live)
        reader = self.process("page reader", skew_ms=0)
        try:
            for _ in range(SWEEPS_MAX):
                left = await self._pages_left(reader, nodes)
                if not left or any(node.foreign for node in nodes):
                    return
                for node in nodes:
                    await self._collect_once(node)
                await asyncio.sleep(1.0)
            self.complain(f"pages stay that no record needs: {left[0].hex()}")
        finally:
            await reader.client.close()

    async def _pages_left(self, reader: Gateway, nodes: Any) -> list[bytes]:
        needed: set[bytes] = set()
        for key in self.objects:
            name = self.name(key)
            value = (await reader.client.read(name)).value
            if value is not None and value.visibility != Visibility.TOMBSTONE:
                try:
                    needed |= {page async for page in pages_in(reader.client, name, value)}
                except StoragedError as error:
                    self.complain(f"pages of {key!r} are gone: {error}")
        return [page for node in nodes for page, _ in node.store.pages(after=b"", limit=1000) if page not in needed]


def run_versions(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    before, versioned.BOUNDS = versioned.BOUNDS, FEW
    try:
        return play_out(lambda loop: Versions(seed, loop, rules))  # type: ignore[arg-type,return-value]
    finally:
        versioned.BOUNDS = before
