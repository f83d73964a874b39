"""Rebuilding fragments from their survivors, and recoding blocks for the disks that live. Works on sealed bytes: no key is needed, none is here.

A rebuilt fragment is written only when its xxh3-128 is what the headers of the survivors agree it should be: a disk that lies about its
fragment, or about the hashes, can spoil what it holds itself, but repair does not launder its bytes.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
import xxhash

from storaged.cluster.layout import Profile
from storaged.errors import PeerError
from storaged.fragments.ports import FragmentHeader, FragmentId
from storaged.maintain.context import MaintainContext
from storaged.maintain.survey import BlockHealth, BlockPlace
from storaged.meta.names import Change, RegisterName, Table, Value
from storaged.objects import erasure
from storaged.objects.assemble import assemble, empty_fragments
from storaged.objects.manifest import parts_of, write_manifest
from storaged.objects.place import Placement
from storaged.objects.records import ObjectRecord, PartEntry, PartRecord, Run, Version
from storaged.wire import Buffer, decode, encode


class Survivors(NamedTuple):
    """``fragments``: position -> whole fragment, verified against ``hashes``; k of them, those a short block does not reach included.
    ``owner``: the register that the fragments' headers name."""

    fragments: dict[int, Buffer]
    hashes: tuple[bytes, ...]
    owner: bytes


class CannotMend(Exception):
    """Too few survivors agree now; the block is looked at again later."""


class Mender:
    """Carries out repairs, a block at a time."""

    def __init__(self, context: MaintainContext) -> None:
        self._context = context
        self.fragments_rebuilt = 0
        self.bytes_rebuilt = 0
        self.blocks_recoded = 0

    # --- the same profile, the same disks ---------------------------------------------------------------------------

    async def rebuild_missing(self, health: BlockHealth) -> int:
        """Rebuilds the block's missing fragments on the disks that should have them; returns their bytes. Raises CannotMend, PeerError."""
        place = health.place
        survivors = await self._survivors(health)
        length = max(place.shape.fragment_length(place.profile, position) for position in range(place.profile.n))
        rebuilt = await asyncio.to_thread(erasure.reconstruct, place.profile, survivors.fragments, health.missing, length)
        moved = 0
        for position in health.missing:
            whole = memoryview(rebuilt[position])[: place.shape.fragment_length(place.profile, position)]
            if xxhash.xxh3_128_digest(whole) != _hash_of(survivors.hashes, position):
                raise CannotMend(f"fragment {position} of block {place.block} does not come out as its survivors say it was")
            await self._write(survivors.owner, place, position, whole, survivors.hashes, sync=True)
            self.fragments_rebuilt += 1
            moved += len(whole)
        self.bytes_rebuilt += moved
        return moved

    async def _survivors(self, health: BlockHealth) -> Survivors:
        """k whole fragments whose headers agree. Copies are all read first: with k = 1 the first one alone would be believed whatever it says."""
        place = health.place
        lost = {*health.missing, *health.away}
        known: dict[int, Buffer] = empty_fragments(place.profile, place.shape) if place.profile.k > 1 else {}
        positions = [position for position in range(place.profile.n) if position not in lost and position not in known]
        found: dict[int, tuple[FragmentHeader, bytes]] = {}
        for position in positions:
            read = await self._read(place, position)
            if read is not None:
                found[position] = read
            if place.profile.k > 1 and (agreed := _agreed(place.profile, known, found)) is not None:
                return agreed
        agreed = _agreed(place.profile, known, found)
        if agreed is None:
            raise CannotMend(f"block {place.block}: {len(found)} fragments can be read, {place.profile.k} that agree are needed")
        return agreed

    async def _read(self, place: BlockPlace, position: int) -> tuple[FragmentHeader, bytes] | None:
        cells = place.shape.fragment_cells(place.profile, position)
        try:
            async with asyncio.timeout(self._context.limits.call_timeout_s):
                read = await self._context.stores.store(place.disks[position]).read(place.fragment(position), 0, cells)
        except (PeerError, TimeoutError):
            return None
        if any(cell is None for cell in read.cells):
            return None
        return read.header, b"".join(cell for cell in read.cells if cell is not None)

    async def _write(self, owner: bytes, place: BlockPlace, position: int, whole: Buffer, hashes: tuple[bytes, ...], *, sync: bool) -> None:
        now_ms = self._context.clock.wall_ms()
        header = FragmentHeader(
            place.fragment(position).pack(), owner, place.entry.header, hashes, place.shape.cell_bytes, len(whole), now_ms
        )
        async with asyncio.timeout(self._context.limits.call_timeout_s):
            await self._context.stores.store(place.disks[position]).write(header, [whole], sync=sync)

    # --- another profile, other disks -------------------------------------------------------------------------------

    async def recode_run(
        self, owner: RegisterName, healths: Sequence[BlockHealth], placement: Placement, epoch: int
    ) -> list[tuple[FragmentId, str]]:
        """Codes all blocks of one run anew for ``placement``, syncs them, then replaces the run in the record by compare-and-set.

        Returns the fragments that the record no longer names. Raises CannotMend, PeerError, ServiceUnavailable; then the record is as it was.
        """
        entry, index = healths[0].place.entry, healths[0].place.run
        written: dict[str, list[FragmentId]] = {}
        for health in healths:
            for fragment, disk in await self._recode_block(health, placement):
                written.setdefault(disk, []).append(fragment)
        async with asyncio.timeout(self._context.limits.call_timeout_s):
            await asyncio.gather(*(self._context.stores.store(disk).sync(ids) for disk, ids in written.items()))
        old = entry.runs[index]
        new = Run(old.first, old.count, placement.profile.k, placement.profile.m, epoch, dict(placement.moved))
        if not await self._replace_run(owner, entry, old, new):
            raise CannotMend("the record has changed meanwhile")
        self.blocks_recoded += len(healths)
        kept = {(fragment, disk) for disk, ids in written.items() for fragment in ids}
        return [where for health in healths for where in health.place.fragments if where not in kept]

    async def _recode_block(self, health: BlockHealth, placement: Placement) -> list[tuple[FragmentId, str]]:
        place = health.place
        survivors = await self._survivors(health)
        fragments, hashes = await asyncio.to_thread(_recode, place.profile, placement.profile, place, survivors.fragments)
        new = place._replace(profile=placement.profile, disks=placement.disks)
        await asyncio.gather(
            *(self._write(survivors.owner, new, position, fragments[position], hashes, sync=False) for position in range(new.profile.n))
        )
        self.bytes_rebuilt += sum(len(fragment) for fragment in fragments)
        return list(new.fragments)

    async def _replace_run(self, owner: RegisterName, entry: PartEntry, old: Run, new: Run) -> bool:
        """Compare-and-set of one run. A run in a manifest page means new pages, written before the record that names them."""
        reading = await self._context.registers.read(owner)
        if reading.value is None:
            return False
        if owner.table == Table.PART:
            return await self._swap(owner, reading.value, _part_with_run(reading.value, entry, old, new))
        record = decode(reading.value.body, ObjectRecord)
        versions = []
        changed = False
        for version in record.versions:
            parts = [part async for part in parts_of(self._context.pages, owner, version)]
            swapped = [_with_run(part, entry.data_id, old, new) for part in parts]
            if swapped != parts:
                changed = True
                version = await self._with_parts(owner, version, swapped)
            versions.append(version)
        return changed and await self._swap(owner, reading.value, encode(ObjectRecord(tuple(versions))))

    async def _with_parts(self, owner: RegisterName, version: Version, parts: list[PartEntry]) -> Version:
        inline, manifest = await write_manifest(self._context.pages, owner, parts)
        return msgspec.structs.replace(version, parts=inline, manifest=manifest)

    async def _swap(self, owner: RegisterName, seen: Value, body: bytes | None) -> bool:
        """Writes ``body`` if the register still is at the sequence that it was made from."""
        if body is None:
            return False

        def update(value: Value | None) -> Change | None:
            if value is None or value.sequence != seen.sequence:
                return None
            return Change(body, value.visibility, value.payload)

        outcome = await self._context.registers.change(owner, update)
        return outcome.after is not None and outcome.after.sequence == seen.sequence + 1 and outcome.after.body == body


def _agreed(profile: Profile, known: Mapping[int, Buffer], found: Mapping[int, tuple[FragmentHeader, bytes]]) -> Survivors | None:
    """The survivors named by more headers than any others, when they are enough."""
    votes = Counter((header.hashes, header.owner) for header, _ in found.values()).most_common(2)
    if not votes or (len(votes) > 1 and votes[0][1] == votes[1][1]):
        return None
    (hashes, owner), _ = votes[0]
    fragments: dict[int, Buffer] = dict(known)
    for position, (header, whole) in found.items():
        if (header.hashes, header.owner) == (hashes, owner) and xxhash.xxh3_128_digest(whole) == _hash_of(hashes, position):
            fragments[position] = whole
    return Survivors(fragments, hashes, owner) if len(fragments) >= profile.k else None


def _recode(old: Profile, new: Profile, place: BlockPlace, present: Mapping[int, Buffer]) -> tuple[list[Buffer], tuple[bytes, ...]]:
    """Whole fragments of the block under ``new``, in position order, and their hashes."""
    shape = place.shape
    sealed = memoryview(assemble(old, shape, present))
    if new.k == 1:
        return [sealed] * new.n, erasure.fragment_hashes(new, shape.cell_bytes, sealed, [])
    length = erasure.parity_length(new, shape.cell_bytes, len(sealed))
    parity = [memoryview(bytearray(length)) for _ in range(new.m)]
    erasure.encode_block(new, shape.cell_bytes, sealed, parity)
    data: list[Buffer] = [b"".join(erasure.fragment_slices(new, shape.cell_bytes, sealed, position)) for position in range(new.k)]
    return [*data, *parity], erasure.fragment_hashes(new, shape.cell_bytes, sealed, parity)


def _hash_of(hashes: tuple[bytes, ...], position: int) -> bytes:
    """Copies have one hash for all of them."""
    return hashes[position if len(hashes) > 1 else 0]


def _with_run(part: PartEntry, data_id: bytes, old: Run, new: Run) -> PartEntry:
    if part.data_id != data_id:
        return part
    return msgspec.structs.replace(part, runs=tuple(new if run == old else run for run in part.runs))


def _part_with_run(value: Value, entry: PartEntry, old: Run, new: Run) -> bytes | None:
    record = decode(value.body, PartRecord)
    swapped = _with_run(record.entry, entry.data_id, old, new)
    return encode(msgspec.structs.replace(record, entry=swapped)) if swapped != record.entry else None
