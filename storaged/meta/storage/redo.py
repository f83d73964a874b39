"""A disk's redo log: what was acknowledged and is not in LMDB yet, in a file that is made once and written over and
over.

Theory of operation
    A commit of LMDB writes every page of the tree that it touches and syncs twice; a segment that grows drags the file
    system's own journal along. So what a
    group of batches changes, and the small copies that come with them, go into this log first, with one synced write to
    blocks
    that have long been the file's: the kernel's, while the event loop goes on (``begin``, ``storaged.aio``), or a
    thread's (``write``). They are acknowledged then, and reach LMDB later, many groups in one commit (a *checkpoint*).

    The file (FORMATS.md, Redo log) has a header and two halves. A *group* begins on a page of its own, so that a write
    that is torn harms no other; its head
    and body have checks that are seeded with the store and the place; groups are numbered without a gap for as long as
    the store lives. Groups fill one half
    while the checkpoint of what is in the other is made. A half is written over only when LMDB has everything that is
    in it.

    A group is written when the one before it is durable. So after a crash only the last can be torn, and it was never
    acknowledged: it is left out. Any sign of a group
    behind a gap is damage to something acknowledged, and the disk may then have forgotten what it promised: it is
    refused (rule 9), as is a log that is gone,
    another store's, or shorter than LMDB knows it to have been.

The idea is as old as ARIES (Mohan et al., TODS 17(1), 1992); two preallocated logs in turn are how InnoDB and XFS keep
the file system out of the way.
"""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from pathlib import Path
from typing import NamedTuple

import xxhash

from storaged.aio import DirectFile, Done, NotTaken
from storaged.durable import sync_path
from storaged.errors import DiskForeign, DiskUnusable
from storaged.meta.storage.identity import Mark
from storaged.units import KIB, MIB
from storaged.wire import Buffer

PAGE_BYTES = 4 * KIB
HALF_BYTES = 16 * MIB
"""Of a new log; a log says of what size its halves are. What fills one before LMDB has the other waits."""

_HALF_BYTES_MIN, _HALF_BYTES_MAX = 8 * MIB, 64 * MIB
"""The first logs had halves of 8 MiB."""

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
"""A group of any size up to this fits a half of any log."""

DIRECT_BODY_BYTES_MAX = 2 * MIB
"""A larger group is rare, and a thread's: the event loop would take a millisecond to check and copy it."""


class RedoLog:
    """The log of one store. One group at a time is written; what says how far it is written changes under the store's
    lock (``wrote``, ``turn``, ``applied``).
    """

    def __init__(self, directory: Path, store_id: bytes, mark: Mark | None, *, direct: bool = True) -> None:
        """Opens the log, or makes one for a store that has none yet (``mark`` None) or needs none (it was closed).
        ``direct``: ``begin`` is wanted.

        ``bodies`` are then those of all groups behind ``mark.applied``, in order. Raises DiskForeign, DiskUnusable.
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
            raise DiskForeign(
                f"the redo log that was in {directory} is gone, and with it what the disk had acknowledged last"
            ) from None
        except OSError as error:
            raise DiskUnusable(f"no redo log can be opened in {directory}: {error.strerror or error}") from None
        self._direct: DirectFile | None = None
        try:
            self._recover(store_id, mark)
            self._direct = DirectFile.open(self._path, _pages(DIRECT_BODY_BYTES_MAX)) if direct else None
        except BaseException:
            os.close(self._fd)
            raise

    def fits(self, body_bytes: int) -> bool:
        """Whether a group of this size fits what is left of the half."""
        return self._ends[self._half] + _pages(body_bytes) <= self.half_bytes

    def begin(self, loop: asyncio.AbstractEventLoop, body: Buffer, done: Done) -> bool:
        """As ``write``, but without a thread: ``done`` is called on the loop. False, and ``done`` told of NotTaken: it
        is for ``write``. One at a time. Raises ValueError as ``write``.
        """
        direct = self._direct
        if direct is None or direct.blocks or len(body) > DIRECT_BODY_BYTES_MAX:
            return False
        at, pieces = self._laid_out(body)
        try:
            direct.write(loop, pieces, at, done)
        except NotTaken:
            return False
        return True

    def write(self, body: Buffer) -> None:
        """The next group is durable when it returns; ``wrote`` makes it the last. Raises OSError; what the disk has
        then is unknown. Raises ValueError for what does not
        fit: behind the half begins what was acknowledged in the other."""
        at, pieces = self._laid_out(body)
        if os.pwritev(self._fd, pieces, at, os.RWF_DSYNC) != _pages(len(body)):
            raise OSError(errno.EIO, "a write to the redo log was cut short")

    def wrote(self, body_bytes: int) -> None:
        """A group with a body of this size is durable."""
        self.sequence += 1
        self._ends[self._half] += _pages(body_bytes)
        self._lasts[self._half] = self.sequence

    def _laid_out(self, body: Buffer) -> tuple[int, list[Buffer]]:
        """Where the next group goes, and what is written there."""
        if not self.fits(len(body)):
            raise ValueError(f"a group of {len(body)} bytes does not fit what is left of its half")
        at = PAGE_BYTES + self._half * self.half_bytes + self._ends[self._half]
        head = _HEAD.pack(_GROUP_MAGIC, len(body), self.sequence + 1, xxhash.xxh3_64_intdigest(body, self._seed), 0)[
            :_HEAD_CHECKED
        ]
        head += xxhash.xxh3_64_digest(head, (self._seed + at) & _MASK)
        return at, [head, body, _ZEROS[: _pages(len(body)) - len(head) - len(body)]]

    def turn(self) -> bool:
        """Goes on in the other half; False while LMDB does not have everything in that."""
        other = 1 - self._half
        if self._lasts[other] > self._applied:
            return False
        self._half, self._ends[other] = other, 0
        return True

    def applied(self, sequence: int) -> None:
        """LMDB durably has all groups up to this one."""
        self._applied = sequence

    def detach(self) -> None:
        """``begin`` is not called any more, and nothing that was begun is under way. On the loop."""
        if self._direct is not None:
            self._direct.detach()

    def close(self) -> None:
        if self._direct is not None:
            self._direct.close()
        os.close(self._fd)

    # --- start
    # ------------------------------------------------------------------------------------------------------------

    def _recover(self, store_id: bytes, mark: Mark | None) -> None:
        try:
            # A process that was killed may have left its last group in the page cache alone: what counts from now on
            # must be on the drive, and be read from there.
            os.fdatasync(self._fd)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            self.half_bytes = _half_bytes_in(os.pread(self._fd, _FILE.size, 0), store_id)
            data = os.pread(self._fd, PAGE_BYTES + 2 * self.half_bytes, 0)
        except OSError as error:
            raise DiskUnusable(f"{self._path} cannot be read: {error.strerror or error}") from None
        if not self.half_bytes or len(data) < PAGE_BYTES + 2 * self.half_bytes:
            raise DiskForeign(f"{self._path} is not the redo log of the store beside it")
        places = self._places(data)
        while found := next((place for place in places.get(self.sequence + 1, ()) if self._whole(data, place)), None):
            self.sequence += 1
            self.bodies.append(data[found.at : found.at + found.length])
            self._half, self._ends[found.half], self._lasts[found.half] = found.half, found.end, self.sequence
        if max(places, default=0) > self.sequence + 1:
            raise DiskForeign(f"{self._path} is damaged at group {self.sequence + 1}, which the disk had acknowledged")
        if mark is not None and self.sequence < mark.written:
            raise DiskForeign(
                f"{self._path} ends at group {self.sequence}, and the disk had acknowledged group {mark.written}"
            )

    def _places(self, data: bytes) -> dict[int, list[_Place]]:
        """By number, where a head stands that holds. The beginning of a torn group may still be there beside the one
        that took its number.
        """
        found: dict[int, list[_Place]] = {}
        for at in range(PAGE_BYTES, len(data), PAGE_BYTES):
            magic, length, sequence, body, check = _HEAD.unpack_from(data, at)
            if magic == _GROUP_MAGIC and check == xxhash.xxh3_64_intdigest(
                data[at : at + _HEAD_CHECKED], (self._seed + at) & _MASK
            ):
                half, offset = divmod(at - PAGE_BYTES, self.half_bytes)
                found.setdefault(sequence, []).append(
                    _Place(half, at + _HEAD.size, length, offset + _pages(length), body)
                )
        return found

    def _whole(self, data: bytes, place: _Place) -> bool:
        body = memoryview(data)[place.at : place.at + place.length]
        return place.end <= self.half_bytes and xxhash.xxh3_64_intdigest(body, self._seed) == place.check


class _Place(NamedTuple):
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


def _half_bytes_in(header: bytes, store_id: bytes) -> int:
    """What the log of this store says of its halves; 0: it is another's, or damaged."""
    if len(header) != _FILE.size:
        return 0
    half_bytes: int = _FILE.unpack(header)[3] * PAGE_BYTES
    if half_bytes != HALF_BYTES and not _HALF_BYTES_MIN <= half_bytes <= _HALF_BYTES_MAX:
        return 0
    return half_bytes if header == _file_header(store_id, half_bytes) else 0


def _make(path: Path, store_id: bytes) -> None:
    """The file appears whole. It is filled with zeros, for a block that has only been set aside costs a change of the
    file system's own log when it is written first.
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
        fresh.unlink(missing_ok=True)  # a disk that has no room for all of it needs what it took
        raise
    finally:
        os.close(fd)
    fresh.rename(path)
    sync_path(path.parent)
