"""Rebuilding fragments from their survivors, and recoding blocks for other disks. Works on sealed bytes, without a key.

A rebuilt fragment is written only when it has the hash (``storaged.hashes``) on which the headers of the survivors
agree; of small copies, with the hash that the record has (not those of version 0.1.0). So a disk that lies about its
fragment, or about the hashes, can spoil what it holds itself, but repair does not spread its bytes. Headers agree when
they name the same hashes, so headers with hashes of different kinds never agree. A fragment that is not what the others
agree on is rebuilt like one that is missing; but one that is sound by itself only where the record has the hash, or
where the others are so many that the block can't be read from the rest (``moves.are_alone``).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from storaged.cluster.layout import Profile
from storaged.errors import FragmentOther, PeerError
from storaged.fragments.ports import FragmentHeader, FragmentId
from storaged.hashes import is_fragment
from storaged.maintain.context import MaintainContext
from storaged.maintain.health import BlockHealth, BlockPlace, is_allowed
from storaged.maintain.moves import are_alone
from storaged.objects.code import erasure
from storaged.objects.code.assemble import assemble, empty_fragments
from storaged.objects.code.place import Placement
from storaged.objects.records import PartEntry, Run
from storaged.wire import Buffer

_T = TypeVar("_T")

IN_THE_WAY_MAX = 1000
UNDECIDED_MAX = 1000


class CannotRepair(Exception):
    """Too few survivors agree now, or the record has changed. The register is looked at again later."""


class Survivors(NamedTuple):
    """``fragments``: position -> whole fragment, verified against ``hashes``; at least k of them, including the empty
    ones that a short block does not reach. ``owner``: the register that their headers name. ``mismatched``: positions
    whose fragment was read and is not what the others agree on.
    """

    fragments: dict[int, Buffer]
    hashes: tuple[bytes, ...]
    owner: bytes
    mismatched: tuple[int, ...]


class Move(NamedTuple):
    """Blocks ``new.first .. new.first + new.count - 1`` of a part, all of run ``old``, were written as ``new`` says."""

    entry: PartEntry
    old: Run
    new: Run


class Rebuilder:
    """Rebuilds and recodes blocks, at most ``rebuilds_concurrent_max`` at a time."""

    def __init__(self, context: MaintainContext) -> None:
        self._context = context
        self._gate = asyncio.Semaphore(context.limits.rebuilds_concurrent_max)
        self.fragments_rebuilt = 0
        self.bytes_rebuilt = 0
        self.blocks_recoded = 0
        self.undecided: dict[tuple[bytes, FragmentId], None] = {}
        """(owner, fragment): sound fragments that differ from most others of their block, and were left as they are
        when the block was last compared. Bounded.
        """
        self.in_the_way: dict[tuple[str, FragmentId], None] = {}
        """Fragments that a disk did not let this node replace. Bounded."""

    # --- the same profile, the same disks ---------------------------------------------------------------------------

    async def rebuild_missing(self, healths: Iterable[BlockHealth]) -> None:
        """Rebuilds missing fragments on the disks that should have them. Tries every block; then raises the first
        failure (CannotRepair, PeerError).
        """
        await self._each([self._rebuild(health) for health in healths])

    async def _rebuild(self, health: BlockHealth) -> None:
        survivors = await self._survivors(health)
        await self._write_positions(survivors, {*health.missing, *survivors.mismatched}, health.place, sync=True)

    async def verify_block(self, health: BlockHealth) -> int:
        """Reads all fragments of a block and rebuilds those that are not what the others agree on. Returns how many
        were missing or mismatched. Raises CannotRepair, PeerError.
        """
        async with self._gate:
            survivors = await self._survivors(health, everything=True)
            wrong = {*health.missing, *survivors.mismatched}
            await self._write_positions(survivors, wrong, health.place, sync=True)
            return len(wrong)

    async def _write_positions(
        self, survivors: Survivors, positions: set[int], place: BlockPlace, *, sync: bool
    ) -> list[tuple[str, FragmentId]]:
        """Computes and writes fragments of a block at ``place``, which has the survivors' profile. Compares each with
        its hash before it is written.
        """
        profile, shape = place.profile, place.shape
        length = max(shape.fragment_length(profile, position) for position in range(profile.n))
        unknown = [position for position in sorted(positions) if position not in survivors.fragments]
        rebuilt = await asyncio.to_thread(_reconstruct, profile, survivors.fragments, unknown, length)
        written, others = [], list[int]()
        for position in sorted(positions):
            whole = survivors.fragments.get(position)
            if whole is None:
                whole = memoryview(rebuilt[position])[: shape.fragment_length(profile, position)]
            if not is_fragment((whole,), _hash_of(survivors.hashes, position)):
                raise CannotRepair(
                    f"fragment {position} of block {place.block} does not come out as its survivors say it was"
                )
            try:
                await self._write(survivors.owner, survivors.hashes, place, position, whole, sync=sync)
            except FragmentOther:
                others.append(position)
                continue
            written.append((place.disks[position], place.fragment(position)))
            self.fragments_rebuilt += 1
            self.bytes_rebuilt += len(whole)
        _refuse_others(place, others)
        return written

    # --- survivors --------------------------------------------------------------------------------------------------

    async def _survivors(self, health: BlockHealth, *, everything: bool = False) -> Survivors:
        """Reads until k whole fragments agree, no more than that unless ``everything``. Copies (k = 1) are all read:
        otherwise the first one alone would be believed.
        """
        place, profile = health.place, health.place.profile
        known = empty_fragments(profile, place.shape) if profile.k > 1 else {}
        positions = [position for position in health.present if position not in known]
        few = len(positions) if everything or profile.k == 1 else profile.k - len(known)
        found: dict[int, tuple[FragmentHeader, bytes]] = {}
        while positions:
            now, positions = positions[: max(few, 1)], positions[max(few, 1) :]
            reads = await asyncio.gather(*(self._read(place, position) for position in now))
            found.update((position, read) for position, read in zip(now, reads, strict=True) if read is not None)
            few = 1
            agreed = _agreed(place, known, found)
            if agreed is not None:
                return self._spare_undecided(place, agreed, found)
        agreed = _agreed(place, known, found)
        if agreed is None:
            raise CannotRepair(
                f"block {place.block}: {len(found)} fragments can be read, {profile.k} that agree are needed"
            )
        return self._spare_undecided(place, agreed, found)

    def _spare_undecided(
        self, place: BlockPlace, agreed: Survivors, found: Mapping[int, tuple[FragmentHeader, bytes]]
    ) -> Survivors:
        """Without the sound fragments that may be the block's as well as those that agree."""
        if self.undecided:
            for fragment, _ in place.fragments:
                self.undecided.pop((agreed.owner, fragment), None)
        if not agreed.mismatched or place.entry.copy_hash or are_alone(place, agreed.fragments):
            return agreed
        sound = [position for position in agreed.mismatched if _is_sound(place.profile, position, *found[position])]
        if sound:
            if len(self.undecided) < UNDECIDED_MAX:
                self.undecided.update({(agreed.owner, place.fragment(position)): None for position in sound})
            self._context.log(
                f"block {place.block} of {agreed.owner[18:98]!r}: fragments {sound} differ from the others and stay, as"
                " either may be the block's; they are compared again"
            )
        return agreed._replace(mismatched=tuple(position for position in agreed.mismatched if position not in sound))

    async def as_coded(
        self, place: BlockPlace, positions: Sequence[int], hashes: tuple[bytes, ...], profile: Profile
    ) -> tuple[list[Buffer], tuple[bytes, ...]]:
        """The fragments of a block under ``profile``, and their hashes, from survivors with ``hashes``, which the
        caller believes. Raises CannotRepair.
        """
        read = await self._read_agreed(place, positions, hashes)
        return await asyncio.to_thread(recoded, place, profile, read)

    async def _read_agreed(
        self, place: BlockPlace, positions: Sequence[int], hashes: tuple[bytes, ...]
    ) -> dict[int, Buffer]:
        """As many whole fragments of these positions as the block can be read from, each verified."""
        profile = place.profile
        found: dict[int, Buffer] = dict(empty_fragments(profile, place.shape)) if profile.k > 1 else {}
        left = [position for position in positions if position not in found]
        while left and len(found) < profile.k:
            few = profile.k - len(found)
            now, left = left[:few], left[few:]
            reads = await asyncio.gather(*(self._read(place, position) for position in now))
            for position, read in zip(now, reads, strict=True):
                if read is not None and is_fragment((read[1],), _hash_of(hashes, position)):
                    found[position] = read[1]
        if len(found) < profile.k:
            raise CannotRepair(f"block {place.block}: {len(found)} fragments can be read, {profile.k} are needed")
        return found

    async def holds(self, place: BlockPlace, fragments: Sequence[Buffer]) -> bool:
        """Whether the disks of the block have these very bytes. ``fragments``: one for each position."""
        for position, fragment in enumerate(fragments):
            read = await self._read(place, position)
            if read is None or read[1] != bytes(fragment):
                return False
        return True

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

    async def _write(
        self, owner: bytes, hashes: tuple[bytes, ...], place: BlockPlace, position: int, whole: Buffer, *, sync: bool
    ) -> None:
        now_ms = self._context.clock.wall_ms()
        entry, disk = place.entry, place.disks[position]
        if not is_allowed(self._context.layouts.current, disk, place.countries):
            raise CannotRepair(
                f"fragment {position} of block {place.block} would be written to disk {disk}, outside of the bucket's"
                " countries"
            )
        part_header = b"" if entry.small else entry.header
        header = FragmentHeader(
            place.fragment(position).pack(), owner, part_header, hashes, place.shape.cell_bytes, len(whole), now_ms
        )
        try:
            async with asyncio.timeout(self._context.limits.call_timeout_s):
                await self._context.stores.store(disk).write(header, [whole], sync=sync)
        except FragmentOther:
            if len(self.in_the_way) < IN_THE_WAY_MAX:
                self.in_the_way[disk, place.fragment(position)] = None
            raise

    # --- another profile, other disks -------------------------------------------------------------------------------

    async def recode(self, healths: Sequence[BlockHealth], placement: Placement, epoch: int) -> Move:
        """Writes consecutive blocks of one run for ``placement`` and syncs them. Does not change the record. Raises
        CannotRepair, PeerError, TimeoutError.
        """
        place = healths[0].place
        profile = placement.profile
        new = Run(place.block, len(healths), profile.k, profile.m, epoch, dict(placement.moved))
        written: dict[str, list[FragmentId]] = {}
        for fragments in await self._each([self._recode_block(health, placement, new) for health in healths]):
            for disk, fragment in fragments:
                written.setdefault(disk, []).append(fragment)

        async def sync(disk: str, ids: list[FragmentId]) -> None:
            async with asyncio.timeout(self._context.limits.call_timeout_s):
                await self._context.stores.store(disk).sync(ids)

        await self._each([sync(disk, ids) for disk, ids in written.items()])
        self.blocks_recoded += len(healths)
        return Move(place.entry, place.run, new)

    async def _recode_block(self, health: BlockHealth, placement: Placement, run: Run) -> list[tuple[str, FragmentId]]:
        """With the same profile, a fragment that lies in its new place already stays."""
        place = health.place
        survivors = await self._survivors(health)
        new = place._replace(run=run, disks=placement.disks)
        if placement.profile == place.profile:
            stay = {position for position in health.present if placement.disks[position] == place.disks[position]}
            positions = set(range(place.profile.n)) - stay | set(survivors.mismatched)
            return await self._write_positions(survivors, positions, new, sync=False)
        fragments, hashes = await asyncio.to_thread(recoded, place, placement.profile, survivors.fragments)
        others = []
        for position, whole in enumerate(fragments):
            try:
                await self._write(survivors.owner, hashes, new, position, whole, sync=False)
            except FragmentOther:
                others.append(position)
            self.bytes_rebuilt += len(whole)
        _refuse_others(new, others)
        self.fragments_rebuilt += len(fragments)
        return [(disk, fragment) for fragment, disk in new.fragments]

    async def _each(self, work: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
        """Does all of it, some at a time; then raises the first failure."""

        async def one(job: Coroutine[Any, Any, _T]) -> _T:
            async with self._gate:
                return await job

        results = await asyncio.gather(*(one(job) for job in work), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if not isinstance(result, BaseException)]


def _agreed(
    place: BlockPlace, known: Mapping[int, Buffer], found: Mapping[int, tuple[FragmentHeader, bytes]]
) -> Survivors | None:
    """The survivors with the hashes and the owner that most headers name, when there are enough. Of small copies whose
    hash is in the record no other counts.
    """
    profile, hashed = place.profile, (place.entry.copy_hash,)
    headers = [header for header, _ in found.values() if hashed == (b"",) or header.hashes == hashed]
    votes = Counter((header.hashes, header.owner) for header in headers).most_common(2)
    if not votes or (len(votes) > 1 and votes[0][1] == votes[1][1]):
        return None
    hashes, owner = votes[0][0]
    if len(hashes) != (1 if profile.k == 1 else profile.n):
        return None
    fragments: dict[int, Buffer] = dict(known)
    for position, (header, whole) in found.items():
        if (header.hashes, header.owner) == (hashes, owner) and is_fragment((whole,), _hash_of(hashes, position)):
            fragments[position] = whole
    mismatched = tuple(position for position in found if position not in fragments)
    return Survivors(fragments, hashes, owner, mismatched) if len(fragments) >= profile.k else None


def _is_sound(profile: Profile, position: int, header: FragmentHeader, whole: Buffer) -> bool:
    """Whether a fragment is what its own header says."""
    hashes = header.hashes
    return len(hashes) == (1 if profile.k == 1 else profile.n) and is_fragment((whole,), _hash_of(hashes, position))


def _refuse_others(place: BlockPlace, others: Sequence[int]) -> None:
    """Raises CannotRepair when disks have other fragments in some positions, and keep them."""
    if others:
        raise CannotRepair(f"disks have other fragments {list(others)} of block {place.block}, and do not replace them")


def _reconstruct(
    profile: Profile, present: Mapping[int, Buffer], wanted: Sequence[int], length: int
) -> dict[int, Buffer]:
    if profile.k == 1:
        return {position: next(iter(present.values())) for position in wanted}
    return dict(erasure.reconstruct(profile, present, wanted, length)) if wanted else {}


def recoded(place: BlockPlace, new: Profile, present: Mapping[int, Buffer]) -> tuple[list[Buffer], tuple[bytes, ...]]:
    """Whole fragments of the block under ``new``, in position order, and their hashes."""
    cell_bytes = place.shape.cell_bytes
    sealed = memoryview(assemble(place.profile, place.shape, present))
    if new.k == 1:
        return [sealed] * new.n, erasure.fragment_hashes(new, cell_bytes, sealed, [])
    length = erasure.parity_length(new, cell_bytes, len(sealed))
    parity = [memoryview(bytearray(length)) for _ in range(new.m)]
    erasure.encode_block(new, cell_bytes, sealed, parity)
    data: list[Buffer] = [
        b"".join(erasure.fragment_slices(new, cell_bytes, sealed, position)) for position in range(new.k)
    ]
    return [*data, *parity], erasure.fragment_hashes(new, cell_bytes, sealed, parity)


def _hash_of(hashes: tuple[bytes, ...], position: int) -> bytes:
    """Copies share one hash."""
    return hashes[position if len(hashes) > 1 else 0]
