"""A fragment store in memory: the port's behaviour without a disk.

``crash`` forgets what was not synced, ``damage`` makes a cell fail, ``forge`` makes the disk lie, ``refuse`` makes it
full or read-only.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from storaged.errors import DiskUnusable, FragmentDamaged, FragmentMissing, FragmentOther
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
from storaged.fragments.write import Write, check_time
from storaged.hashes import is_fragment
from storaged.wire import Buffer


@dataclass
class Kept:
    """A fragment as it is on the disk. ``bad``: cells whose checksum does not hold, -1 for the head. ``unread``: the
    drive reports errors for them instead.
    """

    header: FragmentHeader
    payload: bytes
    bad: set[int] = field(default_factory=set)
    unread: bool = False
    known_bad: set[int] = field(default_factory=set)


class MemoryFragmentStore:
    """A FragmentStore that keeps everything in dicts."""

    def __init__(self, *, bytes_max: int = 1 << 40, on_damage: Callable[[FragmentId, int], None] | None = None) -> None:
        self._bytes_max = bytes_max
        self._on_damage = on_damage
        self._fragments: dict[bytes, Kept] = {}
        self._durable: dict[bytes, Kept] = {}
        self._retired: dict[bytes, tuple[bytes, int, bytes]] = {}
        self._condemned: set[bytes] = set()
        self._state = "ok"

    # --- what tests do to it ----------------------------------------------------------------------------------------

    @property
    def held_bytes(self) -> int:
        return self._used()

    def refuse(self, state: str) -> None:
        """``full`` or ``read-only``; ``ok`` ends it."""
        self._state = state

    def crash(self) -> None:
        """What was written and not synced is lost."""
        self._fragments = dict(self._durable)

    def damage(self, fragment: FragmentId, cell: int, *, unread: bool = False) -> None:
        """The checksum of a cell does not hold any more. -1: that of the head. ``unread``: the drive can't read it."""
        kept = self._fragments[fragment.pack()]
        kept.bad.add(cell)
        kept.unread = unread

    def mend(self, fragment: FragmentId, payload: bytes) -> None:
        """The fragment has these bytes again, and no damage."""
        kept = self._fragments[fragment.pack()]
        kept.payload = payload
        kept.bad.clear()
        kept.known_bad.clear()

    def forge(self, fragment: FragmentId, payload: bytes) -> None:
        """Other bytes, whose checksums hold: the disk lies."""
        self._fragments[fragment.pack()].payload = payload

    def lose(self, *fragments: FragmentId) -> None:
        """These are gone, synced or not. Without any: all are."""
        for key in [fragment.pack() for fragment in fragments] or list(self._fragments):
            self._fragments.pop(key, None)
            self._durable.pop(key, None)

    # --- what tests see of it ---------------------------------------------------------------------------------------

    @property
    def fragments(self) -> list[FragmentId]:
        """In order."""
        return [FragmentId.unpack(key) for key in sorted(self._fragments)]

    @property
    def unsynced(self) -> list[FragmentId]:
        """What a crash would lose."""
        return [
            fragment
            for fragment in self.fragments
            if self._durable.get(fragment.pack()) is not self._fragments[fragment.pack()]
        ]

    @property
    def garbage(self) -> dict[bytes, tuple[bytes, int]]:
        """Data id -> (owner, when it is due)."""
        return {data_id: entry[:2] for data_id, entry in self._retired.items()}

    def kept(self, fragment: FragmentId) -> Kept:
        """A test may change it."""
        return self._fragments[fragment.pack()]

    def header(self, fragment: FragmentId) -> FragmentHeader:
        return self._fragments[fragment.pack()].header

    def payload(self, fragment: FragmentId) -> bytes:
        """As it is on the disk, damaged or forged or not."""
        return self._fragments[fragment.pack()].payload

    def cell(self, fragment: FragmentId, cell: int) -> bytes:
        width = self.header(fragment).cell_bytes
        return self.payload(fragment)[cell * width : (cell + 1) * width]

    def is_whole(self, fragment: FragmentId) -> bool:
        """The disk has the fragment without damage, and its bytes are what its header says."""
        kept = self._fragments.get(fragment.pack())
        if kept is None or kept.bad:
            return False
        hashes = kept.header.hashes
        return is_fragment((kept.payload,), hashes[fragment.position if len(hashes) > 1 else 0])

    # --- the port ---------------------------------------------------------------------------------------------------

    async def write(
        self,
        header: FragmentHeader,
        payload: Sequence[Buffer],
        *,
        sync: bool = False,
        check: bytes = b"",
        spare_other: bool = False,
    ) -> None:
        write = Write.of(header, payload, check=check)
        self._refuse_read_only()
        if self._state == "full" or self._used() + write.payload_bytes > self._bytes_max:
            raise DiskUnusable("the disk is full up to its reserve", state="full")
        if not write.matches_hash():
            raise FragmentDamaged(f"the payload of {write.key.hex()} is not what its hashes say; not written")
        there = self._fragments.get(write.key)
        if spare_other and there is not None and not there.bad and not write.may_replace(there.header, [there.payload]):
            raise FragmentOther(f"the disk has another fragment {write.key.hex()}, which is sound; it stays")
        self._condemned.discard(write.key[:16])
        kept = Kept(header, b"".join(write.payload))
        self._fragments[write.key] = kept
        if sync:
            self._durable[write.key] = kept

    async def sync(self, ids: Sequence[FragmentId]) -> None:
        self._refuse_read_only()
        self.pardon(fragment.data_id for fragment in ids)
        for fragment in ids:
            self._durable[fragment.pack()] = self._find(fragment)

    async def read(self, fragment: FragmentId, first_cell: int, count: int) -> CellRead:
        return self._cells(fragment, first_cell, count)

    def _cells(self, fragment: FragmentId, first_cell: int, count: int) -> CellRead:
        kept = self._find(fragment)
        if -1 in kept.bad:
            self._found_bad(fragment, kept, -1)
            details = {"unread": "yes"} if kept.unread else {}
            raise FragmentDamaged(f"the head of fragment {fragment.pack().hex()} is damaged on the disk", **details)
        width = kept.header.cell_bytes
        view = memoryview(kept.payload)
        cells: list[memoryview | None] = []
        for cell in range(first_cell, min(first_cell + count, -(-len(view) // width))):
            if cell in kept.bad:
                self._found_bad(fragment, kept, cell)
            cells.append(None if cell in kept.bad else view[cell * width : (cell + 1) * width])
        whole = None if None in cells else view[first_cell * width : (first_cell + len(cells)) * width]
        return CellRead(kept.header, tuple(cells), whole, kept.unread and None in cells)

    async def stat(self, ids: Sequence[FragmentId]) -> list[FragmentStat]:
        return [self._stat(fragment.pack()) for fragment in ids]

    async def headers(self, ids: Sequence[FragmentId]) -> list[FragmentHeader | None]:
        self.pardon(fragment.data_id for fragment in ids)
        found = [self._fragments.get(fragment.pack()) for fragment in ids]
        self._durable.update({kept.header.id: kept for kept in found if kept is not None})
        return [None if kept is None or kept.known_bad or -1 in kept.bad else kept.header for kept in found]

    async def touch(self, ids: Sequence[FragmentId], now_ms: int) -> list[FragmentStat]:
        check_time(now_ms)
        self._refuse_read_only()
        self.pardon(fragment.data_id for fragment in ids)
        for fragment in ids:
            for kept in {
                id(kept): kept
                for kept in (self._fragments.get(fragment.pack()), self._durable.get(fragment.pack()))
                if kept
            }.values():
                kept.header = msgspec.structs.replace(kept.header, created_ms=max(now_ms, kept.header.created_ms + 1))
        return await self.stat(ids)

    async def retire(self, entries: Sequence[Retirement]) -> None:
        for entry in entries:
            check_time(entry.due_ms)
        self._refuse_read_only()
        for data_id, owner, due_ms, origin in entries:
            known = self._retired.get(data_id)
            if known is None:
                self._retired[data_id] = owner, due_ms, origin
            elif origin and not known[2] and owner == known[0]:
                self._retired[data_id] = owner, known[1], origin

    async def retired(self, now_ms: int, limit: int) -> list[tuple[bytes, bytes]]:
        return [(entry.data_id, entry.owner) for entry in await self.due(now_ms, (0, b""), limit)]

    async def due(self, now_ms: int, after: tuple[int, bytes], limit: int) -> list[Retirement]:
        entries = [Retirement(data_id, *entry) for data_id, entry in self._retired.items()]
        due = [entry for entry in entries if entry.due_ms <= now_ms and (entry.due_ms, entry.data_id) > after]
        return sorted(due, key=lambda entry: (entry.due_ms, entry.data_id))[:limit]

    async def fragments_of(self, data_ids: Sequence[bytes]) -> list[list[FragmentId]]:
        found: dict[bytes, list[FragmentId]] = {data_id: [] for data_id in data_ids}
        for key in self._fragments:
            if key[:16] in found:
                found[key[:16]].append(FragmentId.unpack(key))
        return [sorted(fragments) for fragments in found.values()]

    def condemn(self, data_ids: Iterable[bytes]) -> None:
        self._condemned.update(data_ids)

    def pardon(self, data_ids: Iterable[bytes]) -> None:
        self._condemned.difference_update(data_ids)

    async def delete_condemned(self, ids: Sequence[FragmentId]) -> int:
        some = [fragment for fragment in ids if fragment.data_id in self._condemned]
        self.pardon(fragment.data_id for fragment in some)
        return await self.delete(some)

    async def unretire(self, data_id: bytes) -> None:
        self._refuse_read_only()
        self._retired.pop(data_id, None)

    async def delete(self, ids: Sequence[FragmentId], *, created_ms: Sequence[int] = ()) -> int:
        self._refuse_read_only()
        keys = {fragment.pack() for fragment in ids} & self._fragments.keys()
        if created_ms:
            asked = {fragment.pack(): then for fragment, then in zip(ids, created_ms, strict=True)}
            keys = {key for key in keys if self._fragments[key].header.created_ms == asked[key]}
        for key in keys:
            del self._fragments[key]
            self._durable.pop(key, None)
        for data_id in {key[:16] for key in keys}:
            if not any(key.startswith(data_id) for key in self._fragments):
                self._retired.pop(data_id, None)
        return len(keys)

    async def scan(self, after: bytes = b"", limit: int = 1000) -> AsyncIterator[FragmentHeader]:
        for key in sorted(key for key in self._fragments if key > after)[:limit]:
            kept = self._fragments[key]
            unknown = {"owner": b"", "part_header": b"", "hashes": ()} if -1 in kept.bad else {}
            yield msgspec.structs.replace(kept.header, **unknown)

    async def in_log_order(self, after: bytes, limit: int) -> tuple[list[tuple[FragmentHeader, bytes]], bytes]:
        page = [(header, header.id) async for header in self.scan(after, limit)]
        return page, page[-1][1] if page else b""

    async def aged(self, after: bytes, limit: int, since_ms: int, before_ms: int) -> tuple[list[FragmentHeader], bytes]:
        page = [header async for header in self.scan(after, limit)]
        return [header for header in page if since_ms <= header.created_ms < before_ms], page[-1].id if page else b""

    async def verify(self, fragment: FragmentId) -> FragmentStat:
        kept = self._fragments.get(fragment.pack())
        for cell in sorted(kept.bad) if kept is not None else ():
            self._found_bad(fragment, kept, cell)
        return self._stat(fragment.pack())

    async def usage(self) -> Usage:
        return Usage(self._state, self._used(), max(0, self._bytes_max - self._used()), len(self._fragments))

    async def close(self) -> None:
        self._state = "failed"

    async def locate_copy(self, data_id: bytes) -> FragmentId | None:
        prefix = data_id + b"\0\0\0\0\x01"
        return next((FragmentId.unpack(key) for key in self._fragments if key.startswith(prefix)), None)

    def holds_copy(self, data_id: bytes, was_durable: bool) -> bool:
        """Everything here is durable."""
        prefix = data_id + b"\0\0\0\0\x01"
        return any(key.startswith(prefix) and not kept.known_bad for key, kept in self._fragments.items())

    def try_read(self, fragment: FragmentId, first_cell: int = 0, count: int = CELLS_MAX) -> CellRead | None:
        """Nothing is read without its simulated latency."""
        return None

    def try_read_copy(self, data_id: bytes) -> memoryview | None:
        """As ``try_read``."""
        return None

    def _used(self) -> int:
        return sum(len(kept.payload) for kept in self._fragments.values())

    def _refuse_read_only(self) -> None:
        if self._state not in ("ok", "full"):
            raise DiskUnusable(f"the disk is {self._state}", state=self._state)

    def _find(self, fragment: FragmentId) -> Kept:
        if self._state == "failed":
            raise DiskUnusable("the fragment store is closed", state="failed")
        kept = self._fragments.get(fragment.pack())
        if kept is None:
            raise FragmentMissing(f"the disk does not hold fragment {fragment.pack().hex()}")
        return kept

    def _found_bad(self, fragment: FragmentId, kept: Kept | None, cell: int) -> None:
        if kept is not None and cell not in kept.known_bad:
            kept.known_bad.add(cell)
            if self._on_damage is not None:
                self._on_damage(fragment, cell)

    def _stat(self, key: bytes) -> FragmentStat:
        kept = self._fragments.get(key)
        if kept is None:
            return FragmentStat(key, Health.MISSING)
        health = Health.DAMAGED if kept.known_bad else Health.OK
        return FragmentStat(key, health, len(kept.payload), kept.header.created_ms)
