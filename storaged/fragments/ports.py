"""The port of a fragment store, and the values that cross it.

Four implementations pass one test suite (tests/suites/fragment_store.py): the local disk (``store``), the same over RPC
(``remote``), memory, and the simulated disk that drops, reorders and tears unsynced writes.

A fragment is the part of one block that one disk keeps: its cells, one after the other. Every cell has C bytes (C =
4..64 KiB, a sealed chunk), but the last, which may be shorter. The record keeps an xxh3-64 for each cell, and for the
block the hashes of all its k+m fragments (``storaged.hashes``). So a rebuilt fragment is written only when it is what
the survivors agree on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

from storaged.errors import PeerError
from storaged.wire import Buffer, Message, encode

_PACKED_BYTES = 23

CELLS_MAX = 1 << 20
"""More cells than a fragment has: as a count it means all of them."""


class FragmentId(NamedTuple):
    """Names a fragment. ``position`` 0..k-1 is data, k..k+m-1 parity (any copy when k is 1). A block recoded under
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
        """Raises ValueError for bytes that are no fragment's id."""
        raw = bytes(data)
        if len(raw) != _PACKED_BYTES:
            raise ValueError(f"{len(raw)} bytes are no fragment's id")
        return cls(raw[:16], int.from_bytes(raw[16:20], "big"), raw[20], raw[21], raw[22])


class FragmentHeader(Message, frozen=True):
    """What a fragment carries besides its cells.

    ``owner``: the packed name of the register that refers to it (an object's, or an upload part's).
    ``part_header``: the 64 bytes of the SOV1 header; empty in the copy of a small object, whose record lies on the same
    disk and has them.
    ``hashes``: of all k+m fragments of the block in position order (``storaged.hashes``; 20 bytes each, 16 in older
    blocks); copies (k = 1) carry one.
    ``cell_bytes``: C. ``length``: bytes of the payload. ``created_ms``: when it was written (wall clock), renewed by
    ``touch``.
    """

    id: bytes
    owner: bytes
    part_header: bytes
    hashes: tuple[bytes, ...]
    cell_bytes: int
    length: int
    created_ms: int


_POSITION_AT = 1 + 2 + _PACKED_BYTES - 1
"""Where the position lies in an encoded FragmentHeader: it is the last byte of the id, which follows the array's mark
(1 byte) and the mark and length of the id (2).
"""


def encode_copies(header: FragmentHeader, count: int) -> list[bytes]:
    """The ``header`` of a copy (k = 1), encoded for the positions 0 .. count - 1. They differ in one byte."""
    encoded = encode(header)
    before, after = encoded[:_POSITION_AT], encoded[_POSITION_AT + 1 :]
    return [b"%b%c%b" % (before, position, after) for position in range(count)]


class Health(IntEnum):
    """Of a fragment on one disk."""

    OK = 0
    MISSING = 1
    DAMAGED = 2


class FragmentStat(Message, frozen=True):
    """``health``: as the index and the reads until now know it. A fragment with a cell that failed stays DAMAGED until
    it is replaced. So does everything on a disk whose failure lasts: it can be read, and counts for nothing.
    """

    id: bytes
    health: int
    length: int = 0
    created_ms: int = 0


RETIREMENTS_MAX = 1000
HEADERS_MAX = 1000
READS_MAX = 64


REPLACED = b"r"
"""The ``origin`` of data that a committed change of the owner's record replaced, and that was no part of an upload."""

OF_UPLOAD = b"u"
"""Begins the ``origin`` of data of a part: the 16 bytes of the upload's id follow."""


class Retirement(NamedTuple):
    """A data id for a garbage list. ``owner``: the packed name of the register that referred to it. ``due_ms``: when
    the collector may judge it (wall clock), for the sake of readers. ``origin``: what the gateway knows of the data:
    ``REPLACED``, ``OF_UPLOAD`` and the upload's id, or empty: nothing.
    """

    data_id: bytes
    owner: bytes
    due_ms: int
    origin: bytes = b""


class CellRead(NamedTuple):
    """Some cells of one fragment. ``cells[i]`` is None where the checksum did not hold, or the drive could not read it;
    the store has recorded the damage and reported it. ``whole``: all cells in one piece, when they lie so in memory.
    ``unread``: the drive could not read one of them. That says nothing of its bytes: a later read may bring them.
    """

    header: FragmentHeader
    cells: tuple[memoryview | None, ...]
    whole: memoryview | None = None
    unread: bool = False


class Usage(Message, frozen=True):
    """``state``: ok, full (up to the reserve), read-only (a write or sync failed), failed. ``garbage_bytes``: held by
    records that were deleted.
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
        self,
        header: FragmentHeader,
        payload: Sequence[Buffer],
        *,
        sync: bool = False,
        check: bytes = b"",
        spare_other: bool = False,
    ) -> None:
        """Appends a fragment. It is durable when a call with ``sync`` returns, or after a later ``sync``. An id that is
        there already is replaced (the newer record wins). Raises FragmentDamaged for a payload that does not match the
        header's hashes.

        ``check``: the payload's ``hashes.transfer_checksum``, made by a gateway that has computed the hashes from these
        very bytes. It is compared instead of the hashes, a hundred times as fast. From other callers it is not
        believed. The caller may reuse the buffers once this returns.

        ``spare_other``: for a caller that may be hostile. A fragment with this id that is undamaged, and is what its
        own header says, is not replaced by one with other hashes or another owner. Raises FragmentOther.
        """

    async def sync(self, ids: Sequence[FragmentId]) -> None:
        """Returns when each of these, written earlier by this caller, is durable. Many callers share one fdatasync.

        Raises FragmentMissing when one is not there (the node restarted in between and lost it).
        """

    async def read(self, fragment: FragmentId, first_cell: int, count: int) -> CellRead:
        """Cells ``first_cell .. first_cell + count - 1`` (fewer at the end), each verified against its checksum."""

    async def stat(self, ids: Sequence[FragmentId]) -> list[FragmentStat]:
        """One answer for each id, in order; up to 10,000 ids."""

    async def headers(self, ids: Sequence[FragmentId]) -> list[FragmentHeader | None]:
        """One answer for each id, in order; up to ``HEADERS_MAX`` ids. None for a fragment that is not there, or of
        which damage is known. The others are durable when this returns. The headers are read from the disk.
        """

    async def touch(self, ids: Sequence[FragmentId], now_ms: int) -> list[FragmentStat]:
        """As ``stat``, and renews the age of those that are there: ``created_ms`` becomes ``now_ms``, or one more than
        it was when that is later. A proposer whose accept was refused calls this before it prepares again.
        """

    async def retire(self, entries: Sequence[Retirement]) -> None:
        """Puts up to ``RETIREMENTS_MAX`` data ids on this disk's garbage list, durably. The collector judges and
        deletes all their fragments here, not before ``due_ms``. An entry that is on the list already stays as it is:
        its delay has begun.
        """

    async def retired(self, now_ms: int, limit: int) -> list[tuple[bytes, bytes]]:
        """(data id, owner) of the garbage list's entries that are due."""

    async def unretire(self, data_id: bytes) -> None:
        """Takes a data id off the garbage list (a record still refers to it)."""

    async def delete(self, ids: Sequence[FragmentId], *, created_ms: Sequence[int] = ()) -> int:
        """Deletes, also on a full disk. Returns how many were there. The bytes come back later, by punching holes or
        compaction.

        ``created_ms``: for each id what ``stat`` returned; a fragment that was written again or touched since then
        stays. So garbage is not lost when, between judgement and deletion, a writer wants to refer to it again and
        calls ``touch`` first.
        """

    def scan(self, after: bytes = b"", limit: int = 1000) -> AsyncIterator[FragmentHeader]:
        """Fragments in the order of their packed ids, after ``after``; at most ``limit``."""

    async def verify(self, fragment: FragmentId) -> FragmentStat:
        """Reads everything and checks every cell (scrub)."""

    async def usage(self) -> Usage: ...

    async def close(self) -> None: ...


class TryWrite(Protocol):
    """The method ``try_write``, which a ``FragmentStore`` may have."""

    def __call__(
        self,
        header: FragmentHeader,
        payload: Sequence[Buffer],
        on_done: Callable[[PeerError | None], None],
        *,
        sync: bool = False,
        check: bytes = b"",
    ) -> Callable[[], object] | None:
        """As ``write``, without a task: ``on_done`` gets the error, or None. Returns the function that gives the call
        up: ``on_done`` is not called any more then, and the buffers are free. None: nothing was begun.
        """


class NearStore(FragmentStore, Protocol):
    """A fragment store on this node."""

    async def due(self, now_ms: int, after: tuple[int, bytes], limit: int) -> list[Retirement]:
        """The entries of the garbage list that are due, the longest due first, after the one with this ``due_ms`` and
        data id.
        """

    async def aged(self, after: bytes, limit: int, since_ms: int, before_ms: int) -> tuple[list[FragmentHeader], bytes]:
        """Of the next ``limit`` fragments after the id ``after``: the headers of those whose ``created_ms`` is from
        ``since_ms`` on and before ``before_ms``, and the last id of all; empty at the end. Of the others nothing is
        read but the index. A damaged head: as ``scan``.
        """

    async def in_log_order(self, after: bytes, limit: int) -> tuple[list[tuple[FragmentHeader, bytes]], bytes]:
        """The next fragments, up to about ``limit``, in the order in which the drive reads them best, each with the
        place after it; and the place from which to go on, empty at the end. ``after``: a place, or empty for the
        beginning; one that is not of this store begins anew. A damaged head: as ``scan``. One that is moved meanwhile
        may come twice.
        """

    async def fragments_of(self, data_ids: Sequence[bytes]) -> list[list[FragmentId]]:
        """The fragments of each data id on this disk, in order; up to 10,000 data ids. Their headers are not read."""

    def condemn(self, data_ids: Iterable[bytes]) -> None:
        """The collector is about to delete these data ids here. A ``write``, ``sync`` or ``touch`` of one of their
        fragments, and a small copy of it that is kept, ends that (``fragments.condemned``).
        """

    def pardon(self, data_ids: Iterable[bytes]) -> None:
        """They are not to be deleted."""

    async def delete_condemned(self, ids: Sequence[FragmentId]) -> int:
        """As ``delete``, of fragments whose data ids are still condemned. They are not condemned afterwards."""

    def try_read(self, fragment: FragmentId, first_cell: int = 0, count: int = CELLS_MAX) -> CellRead | None:
        """As ``read`` when that needs no waiting and finds no damage; else None."""


class FragmentStores(Protocol):
    """All disks of the cluster as fragment stores, local or remote, by disk id."""

    def store(self, disk_id: str) -> FragmentStore:
        """Raises DiskUnusable for a disk that no known layout names."""
