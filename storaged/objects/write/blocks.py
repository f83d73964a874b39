"""A part that is being written, and its blocks: where they are, and how the record names their places. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from storaged.cluster.layout import Layout, Profile
from storaged.hashes import fragment_hash, is_fragment, transfer_checksum
from storaged.meta.names import RegisterName
from storaged.objects.code import erasure, place
from storaged.objects.code.geometry import BlockShape
from storaged.objects.records import BucketRecord, Run
from storaged.units import KIB
from storaged.wire import Buffer

HELD_LEFT_MIN = 0.5
"""The only block of a part is sent at once when a smaller share of the memory is free: a promise may have to wait for
others that change the key.
"""

SOON_BYTES_MAX = 256 * KIB
"""Up to this much plaintext that has arrived whole is hashed and sealed on the event loop, for copies: 1 ms or less.
The task, the thread and the leases of pools that it spares cost a third of a millisecond (benches/HISTORY.md).
"""

INLINE_BYTES_MAX = 64 * KIB
"""Up to this much plaintext is hashed, sealed and coded on the event loop, in 0.2 ms. A thread would have to get the
interpreter back after each of the native calls (40 to 100 us).
"""

OnPlain = Callable[[memoryview], None]
"""Gets the plaintext of each block in order, in the thread that seals it: the digests."""


class Form(NamedTuple):
    """How a part is sealed: C, the data cells of a block, and the salt of the stream."""

    cell_bytes: int
    block_cells: int
    salt: bytes


class NewPart(NamedTuple):
    """A part that is about to be written: a whole object, or a part of an upload.

    ``name``: the object's register, also for a part of an upload, which has a row of its own (see ``references``).
    ``dek``: its data key. ``data_id``: 16 fresh random bytes. ``number``: of an upload's part; 0 for a whole object.
    ``form``: None: the writer chooses it, with a fresh salt. Given, other attempts may write this part too, in the same
    form, and a record may name what they have written: the writer deletes no fragment itself.
    """

    bucket: BucketRecord
    name: RegisterName
    dek: bytes
    data_id: bytes
    number: int = 0
    form: Form | None = None

    @property
    def sealed_number(self) -> int:
        """The part number that the sealed bytes are bound to."""
        return self.number or 1


class Coded(NamedTuple):
    """A block as it is sent: ``sealed`` cells in stream order, ``parity`` fragments, the hashes of all fragments, and
    their ``checks`` (empty when no fragment was hashed here).
    """

    sealed: memoryview
    parity: tuple[memoryview, ...]
    hashes: tuple[bytes, ...]
    checks: tuple[bytes, ...] = ()

    def fragment(self, profile: Profile, chunk_bytes: int, position: int) -> Sequence[Buffer]:
        """The bytes of one fragment, in pieces."""
        if profile.k == 1:
            return (self.sealed,)
        if position < profile.k:
            return erasure.fragment_slices(profile, chunk_bytes, self.sealed, position)
        return (self.parity[position - profile.k],)

    def check(self, profile: Profile, position: int) -> bytes:
        """Of that fragment; empty when it was not hashed here."""
        return self.checks[position if profile.k > 1 else 0] if self.checks else b""


def code_block(profile: Profile, chunk_bytes: int, sealed: memoryview, room: memoryview) -> Coded:
    """Codes a sealed block. Parity goes to ``room`` if it fits; that of the target profile does."""
    length = erasure.parity_length(profile, chunk_bytes, len(sealed))
    count = profile.m if profile.k > 1 else 0
    if length * count > len(room):
        room = memoryview(bytearray(length * count))
    parity = tuple(room[index * length : (index + 1) * length] for index in range(count))
    if count:
        erasure.encode_block(profile, chunk_bytes, sealed, parity)
    fragments = erasure.fragments_of(profile, chunk_bytes, sealed, parity)
    return Coded(sealed, parity, tuple(map(fragment_hash, fragments)), tuple(map(transfer_checksum, fragments)))


def shape_of(cell_bytes: int, length: int) -> BlockShape:
    """Of a block of ``length`` sealed bytes."""
    cells = -(-length // cell_bytes)
    return BlockShape(cells, cell_bytes, length - (cells - 1) * cell_bytes)


@dataclass
class BlockState:
    """Where one block is. ``durable``: position -> disk of each fragment that was written (before the barrier) or
    synced (after it).
    """

    number: int
    shape: BlockShape
    placement: place.Placement
    layout: Layout
    hashes: tuple[bytes, ...] = ()
    durable: dict[int, str] = field(default_factory=dict)

    def wrote(self, fragment: bytes, position: int) -> bool:
        """Whether a fragment that was read back is the one that was written. Copies (k = 1) have one hash for all."""
        return is_fragment((fragment,), self.hashes[position if len(self.hashes) > 1 else 0])


def runs_of(blocks: Iterable[BlockState]) -> tuple[Run, ...]:
    """Blocks in order, as the runs of their part: neighbours with the same profile, epoch and disks are one run."""
    runs: list[Run] = []
    for block in blocks:
        profile, epoch, moved = block.placement.profile, block.layout.epoch, dict(block.placement.moved)
        previous = runs[-1] if runs else None
        if previous and (previous.k, previous.m, previous.epoch, previous.moved) == (*profile, epoch, moved):
            runs[-1] = Run(previous.first, previous.count + 1, profile.k, profile.m, epoch, moved)
        else:
            runs.append(Run(block.number, 1, profile.k, profile.m, epoch, moved))
    return tuple(runs)
