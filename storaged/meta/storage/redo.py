"""A disk's redo log: what was acknowledged and is not in LMDB yet, in a file that is allocated once and overwritten in
turns.

Theory of operation
    A commit of LMDB writes every page of the tree that it touches and syncs twice, and a segment that grows adds work
    to the file system's own journal. So what a group of batches changes, and the small copies that come with them, go
    into this log first, with one synced write to blocks that the file has long had. The kernel writes while the event
    loop goes on (``try_write``; ``storaged.uring``, where that is forbidden ``storaged.aio``), or a thread does
    (``write``). Then the batches are acknowledged. They reach LMDB later, many groups in one commit (a *checkpoint*).

    The file (FORMATS.md, Redo log) has a header and two halves. A *group* begins on a page of its own, so that a torn
    write damages no other group. Its head and body have checks that are seeded with the store and the place. Groups are
    numbered without a gap for as long as the store lives. Groups fill one half while a checkpoint of the other is made.
    A half is overwritten only when LMDB has everything in it.

    A group is written when the one before it is durable. So after a crash only the last one can be torn, and it was
    never acknowledged: it is left out. Any sign of a group after a gap is damage to something acknowledged, and the
    disk may then have forgotten its promises: it is refused (rule 9). So is a log that is gone, that is another
    store's, or that is shorter than LMDB knows.

The idea is as old as ARIES (Mohan et al., TODS 17(1), 1992); InnoDB and XFS use preallocated logs in the same way to
keep the file system out of the path.
"""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import xxhash

from storaged.aio import DirectFile, DirectWriteRefused, OnDone
from storaged.durable import sync_path
from storaged.errors import DiskDamaged, DiskForeign, DiskUnusable
from storaged.meta.storage.identity import Mark
from storaged.units import KIB, MIB
from storaged.uring import RingFile
from storaged.wire import Buffer

PAGE_BYTES = 4 * KIB
HALF_BYTES = 16 * MIB
"""Of a new log; a log's header has the size of its halves. When one half is full before LMDB has the other, writes
wait.
"""

_HALF_BYTES_MIN, _HALF_BYTES_MAX = 8 * MIB, 64 * MIB
"""The first logs had halves of 8 MiB."""

READ_BYTES = MIB
"""How much of a log is read at once at the start."""

FILE_NAME = "redo"

VERSION = 1
_MAGIC = b"SOVREDO\n"
_GROUP_MAGIC = b"SORG"
_FILE = struct.Struct(">8sHHI16sQ")
"""Magic, version, 0, pages of a half, store id, check of all this."""

_HEAD = struct.Struct(">4sIQQQ")
"""Magic, bytes of the body, number, check of the body, check of all this."""

_HEAD_CHECKED = _HEAD.size - 8
_MASK = 2**64 - 1
_ZEROS = bytes(PAGE_BYTES)

assert _FILE.size == 40
assert _HEAD.size == 32

BODY_BYTES_MAX = _HALF_BYTES_MIN - PAGE_BYTES - _HEAD.size
"""A group of up to this size fits a half of any log."""

DIRECT_BODY_BYTES_MAX = 2 * MIB
"""A larger group is rare, and is written by a thread: the event loop would take a millisecond to check and copy it."""


class RedoLog:
    """The log of one store. One group is written at a time. The position changes under the store's lock (``advance``,
    ``try_switch_half``, ``mark_applied``).
    """

    def __init__(self, directory: Path, store_id: bytes, mark: Mark | None, *, direct: bool = True) -> None:
        """Opens the log, or makes one for a store that has none yet (``mark`` None) or needs none (it was closed).
        ``direct``: the caller wants ``try_write``.

        Afterwards ``bodies`` has all groups after ``mark.applied``, in order. Raises DiskDamaged, DiskForeign (it is
        the log of another store), DiskUnusable.
        """
        self._path = directory / FILE_NAME
        self._seed = xxhash.xxh3_64_intdigest(store_id + _MAGIC)
        self._applied = mark.applied if mark is not None else 0
        self.sequence = self._applied
        """The number of the last group that is durable."""
        self.half_bytes = 0
        self._half = 0
        self._ends = [0, 0]
        """How far each half is written, from its beginning."""
        self._lasts = [0, 0]
        """The number of the last group in each half."""
        self.bodies: list[bytes] = []
        try:
            if mark is None or (mark.closed and not self._path.exists()):
                _make(self._path, store_id)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise DiskDamaged(
                f"the redo log that was in {directory} is gone, and with it what the disk had acknowledged last"
            ) from None
        except OSError as error:
            raise DiskUnusable(f"no redo log can be opened in {directory}: {error.strerror or error}") from None
        self._direct: RingFile | DirectFile | None = None
        try:
            self._recover(store_id, mark)
            if direct:
                bytes_max = _pages(DIRECT_BODY_BYTES_MAX)
                self._direct = RingFile.open(self._path, bytes_max) or DirectFile.open(self._path, bytes_max)
        except BaseException:
            os.close(self._fd)
            raise

    def fits(self, body_bytes: int) -> bool:
        """Whether a group of this size fits what is left of the half."""
        return self._ends[self._half] + _pages(body_bytes) <= self.half_bytes

    def try_write(self, loop: asyncio.AbstractEventLoop, body: Buffer, on_done: OnDone) -> bool:
        """As ``write``, but without a thread: calls ``on_done`` on the loop. False, or ``on_done`` with
        DirectWriteRefused: use ``write`` for this group. One at a time. Raises ValueError as ``write``.
        """
        direct = self._direct
        if direct is None or direct.blocks_loop or len(body) > DIRECT_BODY_BYTES_MAX:
            return False
        at, pieces = self._layout(body)
        try:
            direct.write(loop, pieces, at, on_done)
        except DirectWriteRefused:
            return False
        return True

    def write(self, body: Buffer) -> None:
        """When it returns, the group is durable; ``advance`` then makes it the last one. Raises OSError: what the disk
        has is then unknown. Raises ValueError for a group that does not fit, since the next half begins with what was
        acknowledged there.
        """
        at, pieces = self._layout(body)
        if os.pwritev(self._fd, pieces, at, os.RWF_DSYNC) != _pages(len(body)):
            raise OSError(errno.EIO, "a write to the redo log was cut short")

    def advance(self, body_bytes: int) -> None:
        """A group with a body of this size is durable."""
        self.sequence += 1
        self._ends[self._half] += _pages(body_bytes)
        self._lasts[self._half] = self.sequence

    def _layout(self, body: Buffer) -> tuple[int, list[Buffer]]:
        """Where the next group goes, and what to write there."""
        if not self.fits(len(body)):
            raise ValueError(f"a group of {len(body)} bytes does not fit what is left of its half")
        at = PAGE_BYTES + self._half * self.half_bytes + self._ends[self._half]
        head = _HEAD.pack(_GROUP_MAGIC, len(body), self.sequence + 1, xxhash.xxh3_64_intdigest(body, self._seed), 0)[
            :_HEAD_CHECKED
        ]
        head += xxhash.xxh3_64_digest(head, (self._seed + at) & _MASK)
        return at, [head, body, _ZEROS[: _pages(len(body)) - len(head) - len(body)]]

    def try_switch_half(self) -> bool:
        """Continues in the other half. False while LMDB does not have everything in it."""
        other = 1 - self._half
        if self._lasts[other] > self._applied:
            return False
        self._half, self._ends[other] = other, 0
        return True

    def mark_applied(self, sequence: int) -> None:
        """LMDB durably has all groups up to this one."""
        self._applied = sequence

    def detach(self) -> None:
        """On the loop, when no write is under way. ``try_write`` must not be called afterwards."""
        if self._direct is not None:
            self._direct.detach()

    def close(self) -> None:
        if self._direct is not None:
            self._direct.close()
        os.close(self._fd)

    def _recover(self, store_id: bytes, mark: Mark | None) -> None:
        try:
            # A process that was killed may have left its last group only in the page cache. What counts from now on
            # must be on the drive, and be read from there.
            os.fdatasync(self._fd)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            header = os.pread(self._fd, _FILE.size, 0)
            self.half_bytes = _half_bytes_in(header)
            if not self.half_bytes:
                raise DiskDamaged(f"{self._path} is damaged: it does not begin as a redo log")
            if header != _file_header(store_id, self.half_bytes):
                raise DiskForeign(f"{self._path} is not the redo log of the store beside it")
            if os.fstat(self._fd).st_size < PAGE_BYTES + 2 * self.half_bytes:
                raise DiskDamaged(f"{self._path} is damaged: it is cut short")
            places = self._group_heads()
            while self._take_next(places.get(self.sequence + 1, ())):
                pass
        except OSError as error:
            raise DiskUnusable(f"{self._path} cannot be read: {error.strerror or error}") from None
        if max(places, default=0) > self.sequence + 1:
            raise DiskDamaged(f"{self._path} is damaged at group {self.sequence + 1}, which the disk had acknowledged")
        if mark is not None and self.sequence < mark.written:
            raise DiskDamaged(
                f"{self._path} ends at group {self.sequence}, and the disk had acknowledged group {mark.written}"
            )

    def _group_heads(self) -> dict[int, list[_GroupHead]]:
        """Valid heads by number. The beginning of a torn group may still lie beside the group that took its number.

        The file is read in pieces: a buffer for the whole file would cost more than the search.
        """
        found: dict[int, list[_GroupHead]] = {}
        piece = memoryview(bytearray(READ_BYTES))
        ends = PAGE_BYTES + 2 * self.half_bytes
        for first in range(PAGE_BYTES, ends, READ_BYTES):
            wanted = piece[: ends - first]
            if os.preadv(self._fd, [wanted], first) != len(wanted):
                raise OSError(errno.EIO, "it ends too early")
            for page in range(0, len(wanted), PAGE_BYTES):
                if wanted[page : page + len(_GROUP_MAGIC)] != _GROUP_MAGIC:
                    continue
                at = first + page
                _, length, sequence, body, check = _HEAD.unpack_from(wanted, page)
                if check == xxhash.xxh3_64_intdigest(wanted[page : page + _HEAD_CHECKED], (self._seed + at) & _MASK):
                    half, offset = divmod(at - PAGE_BYTES, self.half_bytes)
                    found.setdefault(sequence, []).append(
                        _GroupHead(half, at + _HEAD.size, length, offset + _pages(length), body)
                    )
        return found

    def _take_next(self, places: Sequence[_GroupHead]) -> bool:
        """Takes the group after the last one from the first of these places that has all of it. False if none has."""
        for place in places:
            body = os.pread(self._fd, min(place.length, self.half_bytes), place.at)
            if self._whole(body, place):
                self.sequence += 1
                self.bodies.append(body)
                self._half, self._ends[place.half], self._lasts[place.half] = place.half, place.end, self.sequence
                return True
        return False

    def _whole(self, body: bytes, place: _GroupHead) -> bool:
        fits = place.end <= self.half_bytes and len(body) == place.length
        return fits and xxhash.xxh3_64_intdigest(body, self._seed) == place.check


class _GroupHead(NamedTuple):
    """``at``, ``length`` and ``check`` of the body in the file; ``end`` of the group in its half."""

    half: int
    at: int
    length: int
    end: int
    check: int


def _pages(body_bytes: int) -> int:
    return -(-(_HEAD.size + body_bytes) // PAGE_BYTES) * PAGE_BYTES


def _file_header(store_id: bytes, half_bytes: int) -> bytes:
    raw = _FILE.pack(_MAGIC, VERSION, 0, half_bytes // PAGE_BYTES, store_id, 0)[:-8]
    return raw + xxhash.xxh3_64_digest(raw)


def _half_bytes_in(header: bytes) -> int:
    """The size of the halves from a log's header, whichever store's it is; 0 when the header is damaged."""
    if len(header) != _FILE.size:
        return 0
    fields = _FILE.unpack(header)
    half_bytes: int = fields[3] * PAGE_BYTES
    if half_bytes != HALF_BYTES and not _HALF_BYTES_MIN <= half_bytes <= _HALF_BYTES_MAX:
        return 0
    return half_bytes if header == _file_header(fields[4], half_bytes) else 0


def _make(path: Path, store_id: bytes) -> None:
    """The file appears only when it is complete. It is filled with zeros: a block that is only allocated costs a change
    of the file system's journal at its first write.
    """
    fresh = path.with_suffix(".new")
    fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        zeros = bytes(MIB)
        os.pwrite(fd, _file_header(store_id, HALF_BYTES).ljust(PAGE_BYTES, b"\0"), 0)
        for at in range(PAGE_BYTES, PAGE_BYTES + 2 * HALF_BYTES, MIB):
            if os.pwrite(fd, zeros, at) != MIB:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(fd)
    except OSError:
        fresh.unlink(missing_ok=True)  # on a disk without room for all of it, give back what it took
        raise
    finally:
        os.close(fd)
    fresh.rename(path)
    sync_path(path.parent)
