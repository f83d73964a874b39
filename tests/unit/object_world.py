"""Small in-memory bodies of the ports under the object plane, with real behaviour: compare-and-set registers, verified
fragments, real cryptography.

Every one has switches for what can go wrong: disks that refuse, hang, lose, lie; registers that pre-empt.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from storaged.cluster.layout import DiskEntry, Layout, NodeEntry
from storaged.cluster.signers import signer_id
from storaged.errors import (
    CertificateRefused,
    DataDamaged,
    DiskUnusable,
    FragmentMissing,
    KeyringUnavailable,
    NoSuchBucket,
    PeerUnreachable,
)
from storaged.fragments.ports import (
    CELLS_MAX,
    CellRead,
    FragmentHeader,
    FragmentId,
    FragmentStat,
    Health,
    Retirement,
    Usage,
)
from storaged.hashes import fragment_hash, page_hash, quick_check
from storaged.keys.bucketkey import BucketEnd
from storaged.keys.upkeep import EndedKey
from storaged.meta.names import RegisterName, Table, Value, Visibility
from storaged.meta.ports import HeadPage, ListPage, Outcome, Reading, ReplicaState, Row, SmallCopies, Update
from storaged.meta.storage.row_head import head_of
from storaged.objects.api import NO_WRITE_CONDITIONS, BodyChecks, NewMeta, PutResult, RangeSpec, WriteConditions
from storaged.objects.plane import Damage, ObjectLimits, ObjectPlane
from storaged.objects.ports import SealBroken, pack_context
from storaged.objects.records import BucketRecord, PartEntry, decode_object
from storaged.objects.service import ObjectService
from storaged.wire import Buffer, decode

OWNER = "f" * 64


def layout_of(racks: Sequence[int] = (2, 2, 2), profile: str = "4+2", epoch: int = 1) -> Layout:
    """``racks``: disks in each; disk ids are ``rack-number``."""
    names = "abcdefgh"
    nodes = tuple(
        NodeEntry(f"n{names[r]}", f"FR/site{names[r]}/{names[r]}", "127.0.0.1:1", ("storage",))
        for r in range(len(racks))
    )
    disks = tuple(DiskEntry(f"{names[r]}{d}", f"n{names[r]}", 1) for r, count in enumerate(racks) for d in range(count))
    seeds = tuple(f"{names[r]}0" for r in range(min(3, len(racks))))
    return Layout("test", epoch, nodes, disks, seeds, profile)


class FakeLayouts:
    def __init__(self, layout: Layout) -> None:
        self._layouts = {layout.epoch: layout}
        self.current = layout

    def learn(self, layout: Layout) -> None:
        self._layouts[layout.epoch] = layout
        self.current = layout

    def at(self, epoch: int) -> Layout:
        return self._layouts[epoch]


@dataclass
class FakeClock:
    """Monotonic time is the loop's plus what a test adds."""

    ahead_s: float = 0.0
    wall: int = 1_760_000_000_000

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time() + self.ahead_s

    def wall_ms(self) -> int:
        self.wall += 1
        return self.wall


@dataclass
class Stored:
    header: FragmentHeader
    cells: list[bytes]
    sums: list[int]
    synced: bool = False


@dataclass
class FakeDisk:
    """A fragment store. ``down``: unreachable; ``full``: refuses writes; ``hang``: an event that operations wait for;
    ``slow_s``: how long all take; ``on_write``: called before each write with its number.
    """

    name: str
    fragments: dict[FragmentId, Stored] = field(default_factory=dict)
    garbage: dict[bytes, tuple[bytes, int]] = field(default_factory=dict)
    down: bool = False
    full: bool = False
    fail_sync: bool = False
    hang: asyncio.Event | None = None
    slow_s: float = 0.0
    on_write: Callable[[int], None] | None = None
    writes: int = 0
    reads: int = 0
    scattered: bool = False
    """Its cells do not lie one behind the other."""

    async def _enter(self) -> None:
        if self.hang is not None:
            await self.hang.wait()
        await asyncio.sleep(self.slow_s)
        if self.down:
            raise PeerUnreachable(f"{self.name} is down")

    async def write(
        self, header: FragmentHeader, payload: Sequence[Buffer], *, sync: bool = False, check: bytes = b""
    ) -> None:
        self.writes += 1
        if self.on_write is not None:
            self.on_write(self.writes)
        await self._enter()
        if self.full:
            raise DiskUnusable(f"{self.name} is full")
        data = b"".join(payload)
        assert len(data) == header.length
        assert check in (b"", quick_check((data,)))
        cells = [data[at : at + header.cell_bytes] for at in range(0, len(data), header.cell_bytes)]
        fragment = FragmentId.unpack(header.id)
        assert len(header.hashes) == (1 if fragment.k == 1 else fragment.k + fragment.m)
        assert header.hashes[0 if fragment.k == 1 else fragment.position] == fragment_hash((data,))
        self.fragments[fragment] = Stored(header, cells, [xxhash.xxh3_64_intdigest(cell) for cell in cells], sync)

    async def sync(self, ids: Sequence[FragmentId]) -> None:
        await self._enter()
        if self.fail_sync:
            raise DiskUnusable(f"{self.name}: fsync failed")
        for fragment in ids:
            if fragment not in self.fragments:
                raise FragmentMissing(str(fragment))
            self.fragments[fragment].synced = True

    async def read(self, fragment: FragmentId, first_cell: int, count: int) -> CellRead:
        self.reads += 1
        await self._enter()
        return self._cells(fragment, first_cell, count)

    def _cells(self, fragment: FragmentId, first_cell: int, count: int) -> CellRead:
        stored = self.fragments.get(fragment)
        if stored is None:
            raise FragmentMissing(str(fragment))
        span = range(first_cell, min(first_cell + count, len(stored.cells)))
        whole = memoryview(b"".join(stored.cells[i] for i in span))
        cells: list[memoryview | None] = []
        at = 0
        for i in span:
            end = at + len(stored.cells[i])
            cells.append(whole[at:end] if xxhash.xxh3_64_intdigest(whole[at:end]) == stored.sums[i] else None)
            at = end
        return CellRead(stored.header, tuple(cells), None if self.scattered or None in cells else whole)

    async def stat(self, ids: Sequence[FragmentId]) -> list[FragmentStat]:
        await self._enter()
        return [self._stat(fragment) for fragment in ids]

    def _stat(self, fragment: FragmentId) -> FragmentStat:
        stored = self.fragments.get(fragment)
        if stored is None:
            return FragmentStat(fragment.pack(), Health.MISSING)
        good = all(xxhash.xxh3_64_intdigest(cell) == want for cell, want in zip(stored.cells, stored.sums, strict=True))
        return FragmentStat(
            fragment.pack(), Health.OK if good else Health.DAMAGED, stored.header.length, stored.header.created_ms
        )

    async def touch(self, ids: Sequence[FragmentId], now_ms: int) -> list[FragmentStat]:
        return await self.stat(ids)

    async def retire(self, entries: Sequence[Retirement]) -> None:
        await self._enter()
        self.garbage.update({data_id: (owner, due_ms) for data_id, owner, due_ms in entries})

    async def retired(self, now_ms: int, limit: int) -> list[tuple[bytes, bytes]]:
        return [(data_id, owner) for data_id, (owner, due) in self.garbage.items() if due <= now_ms][:limit]

    async def unretire(self, data_id: bytes) -> None:
        self.garbage.pop(data_id, None)

    async def delete(self, ids: Sequence[FragmentId], *, created_ms: Sequence[int] = ()) -> int:
        await self._enter()
        return sum(self.fragments.pop(fragment, None) is not None for fragment in ids)

    async def scan(self, after: bytes = b"", limit: int = 1000) -> AsyncIterator[FragmentHeader]:
        for fragment in sorted(self.fragments)[:limit]:
            yield self.fragments[fragment].header

    async def verify(self, fragment: FragmentId) -> FragmentStat:
        return self._stat(fragment)

    async def usage(self) -> Usage:
        return Usage("ok", 0, 1 << 40, len(self.fragments))

    async def close(self) -> None:
        return None

    def flip(self, fragment: FragmentId, cell: int, *, lie: bool = False) -> None:
        """Damages a cell; with ``lie`` its checksum is made to fit."""
        stored = self.fragments[fragment]
        data = bytearray(stored.cells[cell])
        data[len(data) // 2] ^= 0x40
        stored.cells[cell] = bytes(data)
        if lie:
            stored.sums[cell] = xxhash.xxh3_64_intdigest(stored.cells[cell])


class NearDisk(FakeDisk):
    """A ``NearStore``: a disk of this very node."""

    peeks = 0

    def peek(self, fragment: FragmentId, first_cell: int = 0, count: int = CELLS_MAX) -> CellRead | None:
        self.peeks += 1
        if self.hang is not None or self.slow_s:
            return None
        if self.down:
            raise DiskUnusable(f"{self.name} is not in use")
        found = self._cells(fragment, first_cell, count)
        return None if None in found.cells else found


class FakeDisks:
    """All disks; also the cluster's Liveness: ``suspected`` are those that heartbeats call dead."""

    def __init__(self, layout: Layout, kind: type[FakeDisk] = FakeDisk) -> None:
        self.disks = {disk.id: kind(disk.id) for disk in layout.disks}
        self.suspected: set[str] = set()

    def store(self, disk_id: str) -> FakeDisk:
        return self.disks[disk_id]

    def disk_writable(self, disk_id: str) -> bool:
        return disk_id not in self.suspected and not self.disks[disk_id].full

    def disk_readable(self, disk_id: str) -> bool:
        return disk_id not in self.suspected

    def rack_down(self, rack: str, *, suspected: bool = True) -> None:
        for name, disk in self.disks.items():
            if name.startswith(rack):
                disk.down = True
                if suspected:
                    self.suspected.add(name)

    def of(self, data_id: bytes) -> list[tuple[str, FragmentId]]:
        return sorted((name, f) for name, disk in self.disks.items() for f in disk.fragments if f.data_id == data_id)


class FakeRing:
    """Registers, Pages, Scanner and Fences of one process. ``interfere``: called between prepare and accept; when it
    changes the key, the change is pre-empted.
    """

    again = True
    """What pages of heads say of themselves."""

    def __init__(self, layouts: FakeLayouts, disks: FakeDisks) -> None:
        self.layouts = layouts
        self.disks = disks
        self.values: dict[RegisterName, Value] = {}
        self.pages: dict[bytes, bytes] = {}
        self.fences: dict[bytes, tuple[bytes, bool]] = {}
        self.replica_away = False
        self.busy = False
        """``change_soon`` takes nothing on."""
        self.regardless: list[bool] = []
        """Of each change."""
        self.interfere: Callable[[RegisterName], Awaitable[None]] | None = None
        self.rounds: dict[RegisterName, int] = {}
        """Identity rounds: a proposal begun before one is refused."""

    async def settle(self, name: RegisterName, *, settling_nonce: bytes = b"") -> Value | None:
        await asyncio.sleep(0)
        held = self.fences.get(name.scope)
        if held is not None and held[0] != settling_nonce:
            raise NoSuchBucket("", **({"final": "true"} if held[1] else {}))
        self.rounds[name] = self.rounds.get(name, 0) + 1
        return self.values.get(name)

    async def agreement(self, name: RegisterName) -> list[ReplicaState]:
        return [
            ReplicaState(disk, "away" if self.disks.disks[disk].down else "current", True)
            for disk in self.layouts.current.replicas_of(name.partition)
        ]

    async def held_by_quorum(self, name: RegisterName, usable: Callable[[Value], bool]) -> Value | None:
        value = self.values.get(name)
        return value if value is not None and usable(value) else None

    async def read(self, name: RegisterName, *, want_payload: bool = False, settling_nonce: bytes = b"") -> Reading:
        await asyncio.sleep(0)
        value = self.values.get(name)
        payload = None
        if want_payload and value is not None and value.payload:
            payload = await self._load(name, value.payload)
        return Reading(value, payload)

    def read_soon(self, name: RegisterName, want_payload: bool, then: Callable[[Reading | None], None]) -> None:
        asyncio.get_running_loop().create_task(self.read(name, want_payload=want_payload)).add_done_callback(
            lambda task: then(task.result())
        )

    async def _load(self, name: RegisterName, data_id: bytes) -> memoryview | None:
        for disk in self.layouts.current.replicas_of(name.partition):
            if self.disks.disk_readable(disk) and not self.disks.disks[disk].down:
                for fragment, stored in self.disks.disks[disk].fragments.items():
                    if fragment.data_id == data_id:
                        return memoryview(b"".join(stored.cells))
        return None

    async def change(
        self,
        name: RegisterName,
        update: Update,
        *,
        small: SmallCopies | None = None,
        ready: Awaitable[None] | None = None,
        renew: Callable[[], Awaitable[None]] | None = None,
        settling_nonce: bytes = b"",
        regardless: bool = False,
    ) -> Outcome:
        first = True
        assert not regardless or name.table == Table.OBJECT
        self.regardless.append(regardless)
        while True:
            if not first and renew is not None:
                await renew()
            before, rounds = self.values.get(name), self.rounds.get(name, 0)
            change = update(before)
            assert not regardless or change == update(None)
            if change is None:
                return Outcome(before, before)
            if small is not None:
                await self._copies(name, small)
            if first and ready is not None:
                await ready
            first = False
            interfere, self.interfere = self.interfere, None
            if interfere is not None:
                await interfere(name)
            await asyncio.sleep(0)
            if name.scope in self.fences:
                raise NoSuchBucket
            if self.values.get(name) != before or self.rounds.get(name, 0) != rounds:
                continue
            sequence = (before.sequence if before else 0) + 1
            after = Value(sequence, os.urandom(16), change.visibility, change.body, change.payload)
            self.values[name] = after
            return Outcome(before, after)

    def change_soon(
        self,
        name: RegisterName,
        update: Update,
        then: Callable[[Outcome | Exception], None],
        *,
        small: SmallCopies | None = None,
        regardless: bool = False,
    ) -> bool:
        if self.busy:
            return False
        task = asyncio.get_running_loop().create_task(self.change(name, update, small=small, regardless=regardless))
        task.add_done_callback(lambda done: then(done.exception() or done.result()))  # type: ignore[arg-type]
        return True

    async def _copies(self, name: RegisterName, small: SmallCopies) -> None:
        synced = set()
        for disk, (header, payload) in zip(
            self.layouts.current.replicas_of(name.partition), small.fragments, strict=True
        ):
            try:
                await self.disks.disks[disk].write(decode(header, FragmentHeader), payload, sync=True)
            except (PeerUnreachable, DiskUnusable):
                continue
            synced.add(disk)
        assert small.enough(frozenset(synced))

    async def put_page(self, near: RegisterName, body: bytes, name: bytes = b"") -> bytes:
        name = name or page_hash(body)
        self.pages[name] = body
        return name

    async def get_page(self, near: RegisterName, page_hash: bytes) -> bytes:
        if page_hash not in self.pages:
            raise DataDamaged
        return self.pages[page_hash]

    async def fence(self, scope: bytes, shards: Sequence[int], nonce: bytes, *, final: bool = False) -> None:
        self.fences[scope] = (nonce, final)

    async def unfence(self, scope: bytes, shards: Sequence[int], nonce: bytes) -> bool:
        held = self.fences.get(scope)
        if held == (nonce, False):
            del self.fences[scope]
        return not self.replica_away

    async def list_page(
        self,
        table: int,
        scope: bytes,
        shards: Sequence[int],
        *,
        prefix: bytes = b"",
        after: bytes = b"",
        delimiter: bytes = b"",
        limit: int = 1000,
        hidden: bool = False,
        settling_nonce: bytes = b"",
    ) -> ListPage:
        least = Visibility.HIDDEN if hidden else Visibility.LIVE
        found = sorted(
            (name.key, value)
            for name, value in self.values.items()
            if (name.table, name.scope) == (table, scope) and name.shard in shards and value.visibility >= least
        )
        rows: list[Row] = []
        prefixes: list[bytes] = []
        last = after
        for key, value in found:
            if key <= last or not key.startswith(prefix) or (prefixes and key.startswith(prefixes[-1])):
                continue
            if len(rows) + len(prefixes) >= limit:
                return ListPage(tuple(rows), tuple(prefixes), last if limit else None)
            at = key.find(delimiter, len(prefix)) if delimiter else -1
            if at >= 0:
                common = key[: at + len(delimiter)]
                if after.startswith(common) and after > common:
                    continue
                prefixes.append(common)
                last = common + b"\xff" * 4
            else:
                rows.append(Row(key, value))
                last = key
        return ListPage(tuple(rows), tuple(prefixes), None)

    async def list_heads(self, table: int, scope: bytes, shards: Sequence[int], **bounds: Any) -> HeadPage:
        page = await self.list_page(table, scope, shards, **bounds)
        return HeadPage(
            [row.key for row in page.rows],
            [head_of(row.value.body) for row in page.rows],
            page.prefixes,
            page.next_after,
            again=self.again,
        )

    def forget(self, scope: bytes) -> None:
        """Nothing is remembered."""


class FakeBucketKey:
    def __init__(self, version: int) -> None:
        self._version = version
        self._key = AESGCM(hashlib.sha256(b"bucket key %d" % version).digest())

    @property
    def version(self) -> int:
        return self._version

    def wrap(self, dek: bytes, context: bytes) -> bytes:
        return self.seal_list(dek, context).ljust(112, b"\0")

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        return self.open_list(wrapped[:60], context)

    def seal_list(self, plaintext: bytes, context: bytes) -> bytes:
        nonce = os.urandom(12)
        return nonce + self._key.encrypt(nonce, plaintext, context)

    def open_list(self, sealed: bytes, context: bytes) -> bytes:
        try:
            return self._key.decrypt(sealed[:12], sealed[12:], context)
        except (InvalidTag, ValueError):
            raise SealBroken("wrong key or context") from None

    def open_lists(self, sealed: Sequence[bytes], contexts: Sequence[bytes]) -> list[bytes]:
        return [self.open_list(field, context) for field, context in zip(sealed, contexts, strict=True)]


SIGNING_KEY = Ed25519PrivateKey.from_private_bytes(b"s" * 32)


class FakeSigners:
    """A ``SignerKeys`` that knows the key of FakeKeys."""

    async def key(self, signer: bytes) -> Ed25519PublicKey:
        if signer != signer_id(SIGNING_KEY.public_key().public_bytes_raw()):
            raise CertificateRefused("no such signer")
        return SIGNING_KEY.public_key()


class FakeKeys:
    """``late``: no key is at hand, so that whoever needs one has to wait for it."""

    def __init__(self) -> None:
        self.newest: dict[bytes, int] = {}
        self.late = False
        self.now_ms: Callable[[], int] = lambda: 0
        self.ended: dict[bytes, BucketEnd] = {}
        self.looked_after: list[dict[bytes, tuple[str, ...]]] = []
        self._keys: dict[int, FakeBucketKey] = {}

    async def end_bucket_key(self, bucket_id: bytes, name: str, nonce: bytes, shards: Sequence[int]) -> None:
        self.ended[bucket_id] = BucketEnd(name, self.now_ms(), nonce, tuple(shards))

    async def ended_bucket_keys(self) -> list[EndedKey]:
        return [EndedKey(bucket_id, end) for bucket_id, end in self.ended.items()]

    async def destroy_bucket_key(self, bucket_id: bytes, nonce: bytes) -> bool:
        if bucket_id not in self.ended or self.ended[bucket_id].nonce != nonce:
            return False
        del self.ended[bucket_id], self.newest[bucket_id]
        return True

    async def look_after(self, buckets: Mapping[bytes, tuple[str, ...]]) -> None:
        self.looked_after.append(dict(buckets))

    async def create_bucket_key(self, bucket_id: bytes, countries: tuple[str, ...]) -> None:
        self.newest[bucket_id] = 1

    async def bucket_key(self, bucket_id: bytes, countries: tuple[str, ...], version: int = 0) -> FakeBucketKey:
        if bucket_id not in self.newest:
            raise KeyringUnavailable
        version = version or self.newest[bucket_id]
        return self._keys.setdefault(version, FakeBucketKey(version))

    def bucket_key_at_hand(
        self, bucket_id: bytes, countries: tuple[str, ...], version: int = 0
    ) -> FakeBucketKey | None:
        if self.late or bucket_id not in self.newest:
            return None
        return self._keys.get(version or self.newest[bucket_id])

    def authenticate(self, context: Sequence[bytes], message: bytes) -> bytes:
        return hmac.digest(b"record key", pack_context(message, context), "sha256")

    def verify(self, context: Sequence[bytes], message: bytes, tag: bytes) -> bool:
        return hmac.compare_digest(self.authenticate(context, message), tag)

    def sign_public(self, message: bytes) -> bytes:
        return SIGNING_KEY.sign(message)

    def public_signer(self) -> bytes:
        return SIGNING_KEY.public_key().public_bytes_raw()

    def seal_secret(self, plaintext: bytes, context: Sequence[bytes]) -> bytes:
        return FakeBucketKey(99).seal_list(plaintext, pack_context(b"", context))

    def open_secret(self, sealed: bytes, context: Sequence[bytes]) -> bytes:
        return FakeBucketKey(99).open_list(sealed, pack_context(b"", context))


FAST = ObjectLimits(late_grace_s=0.02, write_timeout_s=0.3, sync_timeout_s=0.3, read_timeout_s=0.3, hedge_floor_s=0.02)
"""Patience measured in test time."""


class World:
    """An object plane on fakes. A context manager that closes it."""

    def __init__(self, layout: Layout | None = None, *, disks: type[FakeDisk] = FakeDisk, **limits: object) -> None:
        self.layouts = FakeLayouts(layout or layout_of())
        self.disks = FakeDisks(self.layouts.current, disks)
        self.ring = FakeRing(self.layouts, self.disks)
        self.keys = FakeKeys()
        self.clock = FakeClock()
        self.damage: list[Damage] = []
        self.limits = dataclasses.replace(FAST, **limits)  # type: ignore[arg-type]

    def plane(self) -> ObjectPlane:
        ring = self.ring
        return ObjectPlane(
            registers=ring,
            pages=ring,
            scanner=ring,
            fences=ring,
            stores=self.disks,
            liveness=self.disks,
            layouts=self.layouts,
            keys=self.keys,
            clock=self.clock,
            entropy=os.urandom,
            limits=self.limits,
            on_damage=self.damage.append,
        )


def bucket_of(world: World) -> BucketRecord:
    bucket = BucketRecord("b", b"B" * 16, OWNER, 1, "active", 16, "eu-fr-1")
    world.keys.newest[bucket.id] = 1
    return bucket


async def pieces(data: bytes, size: int = 100_000) -> AsyncIterator[Buffer]:
    """A body whose pieces are overwritten when the next is asked for, as the port allows."""
    for at in range(0, len(data), size):
        piece = bytearray(data[at : at + size])
        yield piece
        piece[:] = b"\xee" * len(piece)


async def put(
    objects: ObjectService,
    bucket: BucketRecord,
    data: bytes | AsyncIterator[Buffer],
    *,
    key: bytes = b"key",
    sized: bool = True,
    conditions: WriteConditions = NO_WRITE_CONDITIONS,
) -> PutResult:
    """``sized``: its size is declared. One that comes as an iterator has none."""
    checks = BodyChecks(size=len(data) if isinstance(data, bytes) and sized else None)
    body = pieces(data) if isinstance(data, bytes) else data
    return await objects.put(bucket, key, body, NewMeta(), checks, owner=OWNER, conditions=conditions)


async def got(
    objects: ObjectService, bucket: BucketRecord, *, key: bytes = b"key", span: RangeSpec | None = None
) -> bytes:
    stream = await objects.get(bucket, key, span=span)
    data = b"".join([bytes(piece) async for piece in stream.chunks()])
    assert len(data) == stream.length
    return data


def entry_of(world: World) -> PartEntry:
    """The only part of the object ``key``."""
    (value,) = [value for name, value in world.ring.values.items() if name.key == b"key"]
    return decode_object(value.body).versions[0].parts[0]
