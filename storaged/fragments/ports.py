"""The port of a fragment store, and the values that cross it.

Four bodies pass one test suite (tests/suites/fragment_store.py): the local disk (store), the same over RPC
(remote), memory, and the simulated disk
that drops, reorders and tears unsynced writes.

A fragment is what one disk keeps of one block: its cells, one after the other. Every cell is C bytes long (C = 4..64
KiB, a sealed chunk), but the
last, which may be shorter. Per cell the record keeps xxh3-64, and for the whole block the hashes of all its k+m
fragments (``storaged.hashes``), so that a
rebuilt fragment is only written when it is what the survivors agree on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

from storaged.wire import Buffer, Message, encode

_PACKED_BYTES = 23

CELLS_MAX = 1 << 20
"""More than a fragment has: all of its cells."""


class FragmentId(NamedTuple):
    """Which fragment: ``position`` 0..k-1 is data, k..k+m-1 parity (any copy when k is 1). A block recoded under
    another profile has other fragments.
    """

    data_id: bytes
    block: int
    k: int
    m: int
    position: int

    def pack(self) -> bytes:
        """23 bytes, ordered by data id, then block: data_id(16) block(u32 BE) k(u8) m(u8) position(u8)."""
        return self.data_id + self.block.to_bytes(4, "big") + bytes((self.k, self.m, self.position))

    @classmethod
    def unpack(cls, data: Buffer) -> FragmentId:
        """Raises ValueError for what is no fragment's id."""
        raw = bytes(data)
        if len(raw) != _PACKED_BYTES:
            raise ValueError(f"{len(raw)} bytes are no fragment's id")
        return cls(raw[:16], int.from_bytes(raw[16:20], "big"), raw[20], raw[21], raw[22])


class FragmentHeader(Message, frozen=True):
    """What a fragment carries besides its cells.

    ``owner`` is the packed name of the register that refers to it (an object's, or an upload part's). ``part_header``
    are the 64 bytes of the SOV1 header,
    empty in the copy of a small object: its record, which lies on the same disk, has them.
    ``hashes`` are those (``storaged.hashes``, 20 bytes each; of older blocks 16) of all k+m fragments of the block, in
    position order; copies (k = 1) carry one.
    ``created_ms`` is when it was written (wall clock), renewed by ``touch``. ``cell_bytes`` is C, ``length`` the
    payload's bytes.
    """

    id: bytes
    owner: bytes
    part_header: bytes
    hashes: tuple[bytes, ...]
    cell_bytes: int
    length: int
    created_ms: int


_POSITION_AT = 1 + 2 + _PACKED_BYTES - 1
"""In an encoded FragmentHeader: behind the array's byte and the two of the id's length lies the id, and the position is
its last byte.
"""


def encode_copies(header: FragmentHeader, count: int) -> list[bytes]:
    """``header`` of a copy (k = 1) encoded for the positions 0 .. count - 1: all but that byte is the same."""
    encoded = encode(header)
    before, behind = encoded[:_POSITION_AT], encoded[_POSITION_AT + 1 :]
    return [b"%b%c%b" % (before, position, behind) for position in range(count)]


class Health(IntEnum):
    OK = 0
    MISSING = 1
    DAMAGED = 2


class FragmentStat(Message, frozen=True):
    """``health`` as the index and the last reads know it (a cell that failed stays DAMAGED until it is replaced)."""

    id: bytes
    health: int
    length: int = 0
    created_ms: int = 0


RETIREMENTS_MAX = 1000


class Retirement(NamedTuple):
    """A data id for a garbage list: the packed name of the register that referred to it, and when the collector may
    judge it (wall clock).
    """

    data_id: bytes
    owner: bytes
    due_ms: int


class CellRead(NamedTuple):
    """Some cells of one fragment. ``cells[i]`` is None where the checksum did not hold (the store has quarantined it
    and told repair). ``whole``: all of them one
    after the other, where they lie so in memory."""

    header: FragmentHeader
    cells: tuple[memoryview | None, ...]
    whole: memoryview | None = None


class Usage(Message, frozen=True):
    """``state``: ok, full (up to the reserve), read-only (a write or sync failed), failed. ``garbage_bytes`` are held
    by deleted records.
    """

    state: str
    bytes_used: int
    bytes_free: int
    fragments: int
    garbage_bytes: int = 0
    reason: str = ""


class FragmentStore(Protocol):
    """One disk's fragments.

    Errors: DiskUnusable (full, read-only, failed), FragmentMissing, FragmentDamaged (header unreadable),
    PeerUnreachable for a remote one.
    """

    async def write(
        self, header: FragmentHeader, payload: Sequence[Buffer], *, sync: bool = False, check: bytes = b""
    ) -> None:
        """Appends. Durable when ``sync`` was asked and it returned, or after a later ``sync``. Raises FragmentDamaged
        for a payload that is not what the header's hashes say.

        ``check``: ``hashes.quick_check`` of the payload, by a gateway that has computed the hashes from these very
        bytes: that is compared then, a hundred times as fast. Of other
        callers it is not believed.
        The buffers may be reused by the caller once this returns. Writing an id that is there already replaces it (the
        newer record wins).
        """

    async def sync(self, ids: Sequence[FragmentId]) -> None:
        """Returns when every one of these, written earlier by this caller, is durable (group fdatasync: many callers
        share one).

        Raises FragmentMissing when one is not there at all (the node restarted in between and lost it).
        """

    async def read(self, fragment: FragmentId, first_cell: int, count: int) -> CellRead:
        """Cells ``first_cell .. first_cell + count - 1`` (fewer at the end), each verified against its checksum before
        it is returned.
        """

    async def stat(self, ids: Sequence[FragmentId]) -> list[FragmentStat]:
        """One answer an id, in order; batches of up to 10,000."""

    async def touch(self, ids: Sequence[FragmentId], now_ms: int) -> list[FragmentStat]:
        """As stat, and renews the age of those that are there (a proposer whose accept was refused calls this before it
        prepares again): ``created_ms`` becomes
        ``now_ms``, or one more than it was when that is later."""

    async def retire(self, entries: Sequence[Retirement]) -> None:
        """Puts data ids on this disk's garbage list, up to ``RETIREMENTS_MAX`` at once: all their fragments here are to
        be judged and deleted by the collector, not
        before ``due_ms``. One that is on the list already stays as it is: its delay has begun. Durable."""

    async def retired(self, now_ms: int, limit: int) -> list[tuple[bytes, bytes]]:
        """(data id, owner) of garbage that is due."""

    async def unretire(self, data_id: bytes) -> None:
        """Takes a data id off the garbage list (a record still refers to it)."""

    async def delete(self, ids: Sequence[FragmentId], *, created_ms: Sequence[int] = ()) -> int:
        """Deletes; the bytes come back by punching holes or compaction. Returns how many were there. Works on a full
        disk.

        ``created_ms``, one for each id as ``stat`` told it: what was written anew or touched since then stays. So what
        is judged to be garbage and, between the
        judgement and the deletion, taken up again by somebody who looks (``touch``) before relying on it, is not lost.
        """

    def scan(self, after: bytes = b"", limit: int = 1000) -> AsyncIterator[FragmentHeader]:
        """Every fragment in the order of its packed id, from behind ``after``; at most ``limit``."""

    async def verify(self, fragment: FragmentId) -> FragmentStat:
        """Reads everything and checks every cell (scrub)."""

    async def usage(self) -> Usage: ...

    async def close(self) -> None: ...


class NearStore(FragmentStore, Protocol):
    """A body on this very node."""

    def peek(self, fragment: FragmentId, first_cell: int = 0, count: int = CELLS_MAX) -> CellRead | None:
        """As ``read`` when that needs no waiting, and nothing was found damaged; else None."""


class FragmentStores(Protocol):
    """All disks of the cluster as fragment stores, local or remote, by disk id."""

    def store(self, disk_id: str) -> FragmentStore:
        """Raises DiskUnusable for a disk that no known layout names."""
