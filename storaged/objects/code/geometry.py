"""The layout of a part's bytes: chunks, blocks, stripes, cells, fragments. Pure arithmetic.

    part      P bytes of plaintext in chunks of C - 16 bytes; every sealed chunk is one data cell of C bytes, except the
              last, which is shorter
    block b   the data cells b * block_cells .. (b + 1) * block_cells - 1 of the part, coded on its own
    stripe    k data cells and m parity cells of a block: data cell c lies in stripe c // k, at data fragment c % k
    fragment  the cells of a block that one disk keeps, in the order of the stripes
    parity    a parity cell is as long as the longest data cell of its stripe; shorter and missing cells count as zeros

Only the last stripe of a part's last block can be ragged. With k = 1 every fragment is the block itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from msgspec import Struct

from storaged.cluster.layout import Profile
from storaged.ids import DATA_ID_BYTES
from storaged.objects.records import PartEntry
from storaged.sov1 import (
    CHUNK_BYTES_MIN,
    TAG_BYTES,
    SealBroken,
    chunk_bytes_for,
    chunk_count,
    chunks_size,
    header_chunk_bytes,
)

FRAGMENTS_MAX = 255
"""Of a block: a fragment's position is one byte."""
BLOCK_CELLS_MAX = 2**16
PART_NUMBER_MAX = 10_000
PART_SIZE_MAX = 5 * 1024**4
"""No part can be larger, since no object can."""
SAVED_MIN = 0.1
"""Cells of a new part are half as large where that saves this share of its size on the disks."""
_PROFILE = re.compile(r"[1-9]\d{0,2}\+\d{1,3}", re.ASCII)


def cell_bytes_for(profile: Profile, size: int | None) -> int:
    """C of a new part of ``size`` bytes (None: unknown).

    It is the one of ``chunk_bytes_for``, with which a small part fits one stripe, or half of that where its last stripe
    wastes much: parity is as long as the longest cell. Three cells of 4+2, the last of which is nearly empty, take 2.0
    bytes for each byte, and the same bytes in five smaller cells 1.5. A further step would save less, and double the
    cells again.
    """
    usual = chunk_bytes_for(size, profile.k)
    if size is None or profile.k == 1 or usual == CHUNK_BYTES_MIN:
        return usual
    half = usual // 2
    saved = _coded_bytes(profile, size, usual) - _coded_bytes(profile, size, half)
    return half if saved >= SAVED_MIN * size else usual


def _coded_bytes(profile: Profile, size: int, cell_bytes: int) -> int:
    """Bytes of all fragments of a part that is one block."""
    sealed = chunks_size(size, cell_bytes)
    full, rest = divmod(sealed, profile.k * cell_bytes)
    return sealed + profile.m * (full * cell_bytes + min(rest, cell_bytes))


def problem_of(entry: PartEntry) -> str:
    """Why this cannot be a part; empty when it can.

    The places of an object's parts are in the clear and have no authenticator, since repair moves parts without keys.
    So a record may contain anything, and no code may count with it before this check: a profile of a billion fragments,
    or a block of no cells, would stop every process that reads or repairs the key.
    """
    try:
        header_chunk_bytes(entry.header)
    except SealBroken:
        return "its header is not one of SOV1"
    if len(entry.data_id) != DATA_ID_BYTES or not 1 <= entry.number <= PART_NUMBER_MAX:
        return "it has no data id, or no number"
    if not 0 <= entry.size <= PART_SIZE_MAX or not 1 <= entry.block_cells <= BLOCK_CELLS_MAX:
        return f"{entry.size} bytes in blocks of {entry.block_cells} cells cannot be"
    if (entry.target or entry.runs) and not _PROFILE.fullmatch(entry.target):
        return f"its target {entry.target[:20]!r} is no profile"
    blocks, left = -1, 0
    for run in entry.runs:
        if blocks < 0:
            blocks = left = PartShape.of(entry).blocks
        left -= run.count
        if run.first < 0 or run.count < 1 or run.first + run.count > blocks or left < 0:
            return f"it has {blocks} blocks, and a run of {run.count} from {run.first} on"
        if run.k < 1 or run.m < 0 or run.k + run.m > FRAGMENTS_MAX:
            return f"a block cannot have {run.k} + {run.m} fragments"
    return ""


class FragmentCells(NamedTuple):
    """``cells`` cells, from ``first`` on, of the data fragment at ``position``."""

    position: int
    first: int
    cells: int


class BlockCells(NamedTuple):
    """``cells`` data cells of block ``block``, from ``first`` on (counted within the block)."""

    block: int
    first: int
    cells: int


class BlockShape(Struct, frozen=True):
    """One block: ``cells`` data cells of ``cell_bytes``, the last of them ``last_bytes`` long (shorter only in a part's
    last block).
    """

    cells: int
    cell_bytes: int
    last_bytes: int

    @property
    def sealed_bytes(self) -> int:
        """All data cells together: the block's share of the sealed stream."""
        return (self.cells - 1) * self.cell_bytes + self.last_bytes

    def cell_length(self, cell: int) -> int:
        return self.last_bytes if cell == self.cells - 1 else self.cell_bytes

    def stripes(self, k: int) -> int:
        return -(-self.cells // k)

    def stripe_length(self, k: int, stripe: int) -> int:
        """Bytes of the stripe's longest cell, which is also the length of its parity cells."""
        return self.cell_length(stripe * k)

    def fragment_cells(self, profile: Profile, position: int) -> int:
        """How many cells the fragment has; 0 for a data fragment that a very short block does not reach."""
        if position >= profile.k:
            return self.stripes(profile.k)
        return max(0, -(-(self.cells - position) // profile.k))

    def fragment_length(self, profile: Profile, position: int) -> int:
        """Bytes of the fragment at ``position``."""
        cells = self.fragment_cells(profile, position)
        if cells == 0:
            return 0
        last = (cells - 1) * profile.k + (position if position < profile.k else 0)
        return (cells - 1) * self.cell_bytes + self.cell_length(last)

    def holders(self, k: int, first: int, count: int) -> list[FragmentCells]:
        """Which cells of which data fragments have the data cells ``first .. first + count - 1``; fragments without any
        are left out.
        """
        found = []
        for position in range(k):
            start = first + (position - first) % k
            if start < first + count:
                found.append(FragmentCells(position, start // k, (first + count - 1 - start) // k + 1))
        return found


class PartShape(Struct, frozen=True):
    """A part of ``size`` bytes of plaintext, in cells of ``cell_bytes`` (C), ``block_cells`` of them per block."""

    size: int
    cell_bytes: int
    block_cells: int

    @classmethod
    def of(cls, entry: PartEntry) -> PartShape:
        """Raises SealBroken when the entry's header is not one of SOV1."""
        return cls(entry.size, header_chunk_bytes(entry.header), entry.block_cells)

    @property
    def plain_bytes(self) -> int:
        """Plaintext bytes of a full cell."""
        return self.cell_bytes - TAG_BYTES

    @property
    def cells(self) -> int:
        """All data cells of the part (its chunks). The last is shorter than full, possibly with an empty plaintext."""
        return chunk_count(self.size, self.cell_bytes)

    @property
    def blocks(self) -> int:
        return -(-self.cells // self.block_cells)

    @property
    def sealed_bytes(self) -> int:
        """All cells, without the header."""
        return chunks_size(self.size, self.cell_bytes)

    def block(self, block: int) -> BlockShape:
        """Raises IndexError for a block that the part does not have."""
        if not 0 <= block < self.blocks:
            raise IndexError(f"block {block} of {self.blocks}")
        if block < self.blocks - 1:
            return BlockShape(self.block_cells, self.cell_bytes, self.cell_bytes)
        return BlockShape(
            self.cells - block * self.block_cells, self.cell_bytes, self.size % self.plain_bytes + TAG_BYTES
        )

    def cell_of(self, offset: int) -> int:
        """The cell of the part that contains the plaintext byte at ``offset``."""
        return offset // self.plain_bytes

    def plain_start(self, cell: int) -> int:
        """Offset of the first plaintext byte of a cell of the part."""
        return cell * self.plain_bytes

    def locate(self, start: int, length: int) -> Iterator[BlockCells]:
        """The cells that contain the plaintext bytes ``start .. start + length - 1``, block by block. Nothing when
        ``length`` is 0.

        The first byte wanted is ``start - plain_start(block * block_cells + first)`` bytes into the first cell.
        """
        if length <= 0:
            return
        cell, end = self.cell_of(start), self.cell_of(start + length - 1) + 1
        while cell < end:
            block, first = divmod(cell, self.block_cells)
            count = min(end - cell, self.block_cells - first)
            yield BlockCells(block, first, count)
            cell += count
