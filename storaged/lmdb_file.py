"""Opens LMDB files so that a disk harms neither its process nor the process's other disks.

LMDB reads its file through a memory map, where a page beyond the file's end is no error but SIGBUS: one cut-off file
would end a node with all its disks. So a file that is shorter than its own header says is extended with zeros before a
page of it is read. A page of zeros has no type, and LMDB refuses it as corrupted if a tree leads to it. A healthy file
is not harmed: a page at the end that was allocated and freed again may never have been written, and no tree leads
there.

Each read transaction writes to LMDB's lock file, through a memory map as well. The first such write after the kernel
has written the page back asks the file system for permission, and a disk that hangs or is frozen does not give it: the
event loop would stop although all rows are in memory. So the lock file is in memory, without a name. It keeps processes
apart no more; each owner of an environment holds a lock of its own on its directory.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import lmdb

from storaged.durable import NoRoom, sync_path
from storaged.errors import DiskUnreadable
from storaged.units import GIB, MIB

LOCK_FILE = "lock.mdb"
DATA_FILE = "data.mdb"

_libc = ctypes.CDLL(None, use_errno=True)

FULL_BYTES = 16 * MIB
"""A file system with less free space than this counts as full: a write that was cut short took the rest, except for
what others gave back since.
"""

MEDIA_ERRORS = frozenset((errno.EIO, errno.EILSEQ, errno.EBADMSG, errno.ENODATA))
"""What a drive reports for bytes that it can't read. Any other error of a read says nothing of the bytes."""

LMDB_DAMAGED = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.BadTxnError,
    lmdb.InvalidError,
    lmdb.BadDbiError,
    lmdb.IncompatibleError,
    lmdb.CursorFullError,
)
"""What a read reports when pages are damaged: their content, their numbers, a transaction that has met such a page
before, the record of a database (the next three), a tree that is deeper than any can be.
"""

KEPT_BYTES_MAX = GIB
"""A file of up to this size, and of up to ``KEPT_PART`` of the machine's memory, is read whole, and again when the
kernel has dropped some of it.
"""

KEPT_PART = 16
STEP_BYTES = MIB
"""Read by one call."""

REST_PART = 50
REST_S = 60.0
"""The pause after a look is REST_PART times as long as the look took, and at least REST_S after the file was read: when
the kernel drops it again, memory is short.
"""


def open_environment(directory: Path, **options: Any) -> lmdb.Environment:
    """``lmdb.open`` with a lock file in memory; the file has at least the length that its header says.

    The caller has a lock on the directory. It exists, unless LMDB is to make it. Raises lmdb.Error, OSError.
    """
    if not options.get("readonly") and options.get("create", True) and directory.is_dir():
        _make_data_file(directory, options["map_size"], sync=options.get("sync", True))
    lock_file = directory / LOCK_FILE
    descriptor = _link_to_memory(lock_file) if directory.is_dir() else -1
    try:
        environment = lmdb.open(str(directory), **options)
    finally:
        if descriptor >= 0:
            lock_file.unlink(missing_ok=True)
            os.close(descriptor)
    try:
        _extend_to_last_page(environment, directory)
    except BaseException:
        environment.close()
        raise
    return environment


def _make_data_file(directory: Path, map_size: int, *, sync: bool) -> None:
    """Makes a data file without content where there is none. It appears only when it is whole: LMDB itself would write
    its first pages unsynced into place, and after a power cut refuse half of them for ever. Raises lmdb.Error, OSError.
    """
    file, fresh = directory / DATA_FILE, directory / "data.new"
    if file.exists() and file.stat().st_size:
        return
    fresh.unlink(missing_ok=True)
    lmdb.open(str(fresh), subdir=False, lock=False, map_size=map_size).close()
    if sync:
        sync_path(fresh)
    fresh.replace(file)
    if sync:
        sync_path(directory)


def _link_to_memory(lock_file: Path) -> int:
    """Makes ``lock_file`` the name of a file in memory, whose descriptor it returns; -1 where that is not possible:
    LMDB then makes a file on the disk.
    """
    if not hasattr(os, "memfd_create"):
        return -1
    try:
        descriptor = os.memfd_create("lmdb-lock", os.MFD_CLOEXEC)
    except OSError:
        return -1
    try:
        lock_file.unlink(missing_ok=True)
        lock_file.symlink_to(f"/proc/self/fd/{descriptor}")
        os.close(os.open(lock_file, os.O_RDWR | os.O_CLOEXEC))
        return descriptor
    except OSError:  # there is no /proc, or the file system is read-only or knows no links
        with contextlib.suppress(OSError):
            lock_file.unlink(missing_ok=True)
    os.close(descriptor)
    return -1


def _extend_to_last_page(environment: lmdb.Environment, directory: Path) -> None:
    """Before the first transaction of an environment that was just opened. Raises OSError."""
    wanted = _bytes_used(environment)
    path = directory / DATA_FILE
    if path.stat().st_size < wanted:
        os.truncate(path, wanted)


def _bytes_used(environment: lmdb.Environment) -> int:
    used: int = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    return used


class Residency:
    """Whether an environment can be read without its disk: whether the kernel has all pages of the file in memory.

    Until the first ``look`` they count as resident: an environment that was just opened was just read. The kernel may
    drop pages between two looks.
    """

    def __init__(self, environment: lmdb.Environment, directory: Path) -> None:
        self.resident = True
        self.looked = False
        self._environment = environment
        self._path = directory / DATA_FILE
        self._kept_bytes_max = min(KEPT_BYTES_MAX, _memory_bytes() // KEPT_PART)
        self._look_at_s = self._read_at_s = 0.0
        self._lock = threading.Lock()
        self._closed = False

    def look(self) -> None:
        """Looks when that is due. In a thread: it may read from the disk. Raises DiskUnreadable when the drive can't
        read a page: a read of that page through the map would end the process.
        """
        with self._lock:
            began_s = time.monotonic()
            if self._closed or began_s < self._look_at_s:
                return
            missing = self._missing()
            if missing is None:
                return
            if missing and began_s >= self._read_at_s and self._read(missing):
                self._read_at_s = time.monotonic() + max(REST_S, REST_PART * (time.monotonic() - began_s))
                missing = self._missing() or []
            self.resident, self.looked = not missing, True
            self._look_at_s = time.monotonic() + REST_PART * (time.monotonic() - began_s)

    def close(self) -> None:
        """Before the environment is closed. Waits for a ``look``."""
        self._closed = True
        with self._lock:
            pass

    def _missing(self) -> list[tuple[int, int]] | None:
        """Ranges of the file (offset, bytes) that are not in memory; None when the system does not say: a filter of
        system calls may forbid mincore(2).
        """
        used = _bytes_used(self._environment)
        found = ctypes.create_string_buffer(-(-used // mmap.PAGESIZE))
        try:
            with self._path.open("rb") as file, mmap.mmap(file.fileno(), used, access=mmap.ACCESS_COPY) as view:
                start = ctypes.c_char.from_buffer(view)
                refused = _libc.mincore(ctypes.byref(start), ctypes.c_size_t(used), found)
                del start
        except (OSError, ValueError):
            return [(0, used)]
        if refused:
            return None
        return [
            (match.start() * mmap.PAGESIZE, len(match.group()) * mmap.PAGESIZE)
            for match in re.finditer(b"\0+", found.raw[: -(-used // mmap.PAGESIZE)])
        ]

    def _read(self, ranges: list[tuple[int, int]]) -> bool:
        """False for a file that is too large to be kept in memory."""
        if _bytes_used(self._environment) > self._kept_bytes_max:
            return False
        try:
            with self._path.open("rb", buffering=0) as file:
                for offset, size in ranges:
                    at, end = offset, offset + size
                    while at < end and not self._closed:
                        count = len(os.pread(file.fileno(), min(STEP_BYTES, end - at), at))
                        at += count or end  # a page after those that were read may be a bad one
        except OSError as error:
            if error.errno in MEDIA_ERRORS:
                self.resident = False
                raise DiskUnreadable(f"{self._path} can't be read: {error.strerror or error}") from None
        return True


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def lacks_space(directory: Path, error: BaseException) -> bool:
    """Whether a write failed for lack of space. Also when the file system became full in the middle of a write: the
    write is then cut short, which LMDB reports as EIO.
    """
    if isinstance(error, NoRoom):
        return True
    code = getattr(error, "errno", None) or getattr(error, "code", None)
    if code != errno.EIO:
        return isinstance(error, lmdb.MapFullError) or code in (errno.ENOSPC, errno.EDQUOT)
    try:
        space = os.statvfs(directory)
    except OSError:
        return False
    return space.f_bavail * space.f_frsize < FULL_BYTES
