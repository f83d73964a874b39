"""The file operations that a fragment store needs, as a port, and the implementation for real files.

Thanks to the port a simulated disk can drop, reorder and tear what was not synced, and answer EIO or ENOSPC when a test
asks for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import structlog

from storaged.durable import make_directory, replace_file
from storaged.errors import DirectoryInUse
from storaged.wire import Buffer, unfilled

log = structlog.get_logger(__name__)

IOV_MAX = 1024
OPEN_FILES_MAX = 512
"""A disk of 16 TiB has 65,536 segments of 256 MiB; their descriptors are opened when they are needed."""

PAGE_BYTES = 4096

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_SYNC_FILE_RANGE_WRITE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class NotOpened(OSError):
    """The process or the machine has no descriptor or memory left. Nothing was done to the file or the directory, and
    nothing of the drive is known by it. Raised by whatever has to open one.
    """


class Space(NamedTuple):
    """Bytes of the file system. ``free``: what an unprivileged process may use."""

    total: int
    free: int


class SegmentFile(Protocol):
    """One segment. Any thread may read; one thread at a time does everything else. All methods may raise OSError."""

    def size(self) -> int: ...

    def allocated(self) -> int:
        """Bytes that the file system has allocated for it, without holes."""

    def read(self, offset: int, length: int) -> bytes:
        """Returns fewer bytes only at the end of the file. Raises FileNotFoundError once the segment was removed."""

    def try_read(self, offset: int, length: int) -> Buffer | None:
        """As ``read`` when all of it is in the page cache, else None at once: may be called on the event loop."""

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        """Writes all of it, or raises OSError."""

    def start_writeback(self, offset: int, length: int) -> None:
        """A hint: the kernel should begin to write these bytes to the drive."""

    def sync(self) -> None: ...

    def sync_apart(self) -> None:
        """As ``sync``, in any thread. A failure is reported to ``sync`` too: the kernel reports it to each descriptor
        once. Raises FileNotFoundError when the file is gone.
        """

    def drop_cache(self, offset: int, length: int = 0) -> None:
        """A hint: reads of these bytes should come from the drive. ``length`` 0: all from ``offset`` on."""

    def truncate(self, size: int) -> None: ...

    def punch(self, offset: int, length: int) -> bool:
        """Makes a hole. Returns whether the bytes went back to the file system."""


class Files(Protocol):
    """One disk's segments, its lock and its reserve."""

    def segments(self) -> list[int]:
        """Their numbers, ascending."""

    def create(self, number: int) -> SegmentFile: ...

    def open(self, number: int) -> SegmentFile: ...

    def remove(self, number: int) -> None:
        """The removal is durable when this returns."""

    def sync_directory(self) -> None: ...

    def space(self) -> Space: ...

    def reserve(self, count: int) -> bool:
        """Keeps this many bytes for notes on a full disk; 0 gives them back. False when there was no space to keep, or
        nothing to give back.
        """

    def mark_failed(self, reason: str) -> bool:
        """Notes why the disk failed for good, for ``failure`` at the next start. Returns whether that is durable."""

    def failure(self) -> str:
        """Why the disk failed for good; empty when it did not."""

    def close(self) -> None: ...


class PosixSegmentFile:
    """A segment in a directory. Its descriptor is opened when it is needed, and closed when its last user has left.

    ``on_opened`` is called whenever a descriptor was opened.
    """

    def __init__(self, path: Path, on_opened: Callable[[PosixSegmentFile], None]) -> None:
        self._path = path
        self._on_opened = on_opened
        self._lock = threading.Lock()
        self._fd = -1
        self._users = 0
        self._removed = False
        self._closing = False
        self.unsynced = False
        """It was changed, and not synced since."""

    def create(self) -> None:
        """Makes the file, which must not exist. It stays open: what follows must not fail for want of a descriptor."""
        with self._lock:
            self._fd = _opened(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        self._on_opened(self)

    @contextlib.contextmanager
    def _lease(self) -> Iterator[int]:
        fd = self._acquire()
        try:
            yield fd
        finally:
            self._release()

    def _acquire(self) -> int:
        """The descriptor, open until ``_release``."""
        fresh = False
        with self._lock:
            if self._fd < 0:
                if self._removed:
                    raise FileNotFoundError(errno.ENOENT, "the segment was removed", str(self._path))
                self._fd = _opened(self._path, os.O_RDWR)
                fresh = True
            self._closing = False
            self._users += 1
            fd = self._fd
        if fresh:
            try:
                self._on_opened(self)
            except BaseException:
                self._release()
                raise
        return fd

    def _release(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users and (self._closing or self._removed):
                self._close_now()

    def _close_now(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def close(self, *, removed: bool = False) -> None:
        """Closes the descriptor now, or when its last user leaves. After ``removed`` it is not opened again."""
        with self._lock:
            self._removed = self._removed or removed
            self._closing = True
            if not self._users:
                self._close_now()

    def size(self) -> int:
        with self._lease() as fd:
            return os.fstat(fd).st_size

    def allocated(self) -> int:
        with self._lease() as fd:
            return os.fstat(fd).st_blocks * 512

    def read(self, offset: int, length: int) -> bytes:
        with self._lease() as fd:
            data = os.pread(fd, length, offset)
            while len(data) < length:
                more = os.pread(fd, length - len(data), offset + len(data))
                if not more:
                    break
                data += more
            return data

    def try_read(self, offset: int, length: int) -> Buffer | None:
        if self._fd < 0:
            return None  # a directory may have to be read
        buffer = unfilled(length)
        fd = self._acquire()
        try:
            count = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError as error:
            # EAGAIN: not in memory. EOPNOTSUPP: the file system can't say. The blocking read reports other errors.
            if error.errno == errno.ENOENT:
                raise
            return None
        finally:
            self._release()
        return buffer if count == length else None

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        with self._lease() as fd:
            self.unsynced = True
            for first in range(0, len(buffers), IOV_MAX):
                offset = _write_all(fd, list(buffers[first : first + IOV_MAX]), offset)

    def start_writeback(self, offset: int, length: int) -> None:
        with self._lease() as fd:
            _libc.sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)

    def sync(self) -> None:
        with self._lease() as fd:
            os.fdatasync(fd)
            self.unsynced = False

    def sync_apart(self) -> None:
        fd = _opened(self._path, os.O_RDONLY)
        try:
            os.fdatasync(fd)
        finally:
            os.close(fd)

    def drop_cache(self, offset: int, length: int = 0) -> None:
        start = offset // PAGE_BYTES * PAGE_BYTES  # the kernel drops whole pages only
        end = -(-(offset + length) // PAGE_BYTES) * PAGE_BYTES if length else start
        with self._lease() as fd, contextlib.suppress(OSError):
            if offset < os.fstat(fd).st_size:  # else its page has only what comes before
                os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_DONTNEED)

    def truncate(self, size: int) -> None:
        with self._lease() as fd:
            self.unsynced = True
            os.ftruncate(fd, size)

    def punch(self, offset: int, length: int) -> bool:
        with self._lease() as fd:
            return bool(_libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length) == 0)


def _opened(path: Path, flags: int) -> int:
    """Raises NotOpened, OSError."""
    try:
        return os.open(path, flags | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in _NO_DESCRIPTOR:
            raise
        raise NotOpened(*error.args) from None


def _write_all(fd: int, buffers: list[Buffer], offset: int) -> int:
    """Returns the offset after the last byte. A short write goes on where it stopped, and so meets the error that made
    it short.
    """
    while buffers:
        count = os.pwritev(fd, buffers, offset)
        offset += count
        if count == sum(map(len, buffers)):
            break
        while buffers and count >= len(buffers[0]):
            count -= len(buffers.pop(0))
        if count:
            buffers[0] = memoryview(buffers[0])[count:]
    return offset


class PosixFiles:
    """``DIRECTORY/segments/NNNNNNNNNN.seg``, ``DIRECTORY/LOCK`` (flock), ``DIRECTORY/reserve``,
    ``DIRECTORY/FAILED``.
    """

    def __init__(self, directory: Path) -> None:
        """Raises DirectoryInUse when another process has it."""
        self.directory = directory
        self._segments = directory / "segments"
        make_directory(directory)
        make_directory(self._segments)
        self._files: OrderedDict[Path, PosixSegmentFile] = OrderedDict()
        self._files_lock = threading.Lock()
        self._lock_fd = os.open(directory / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_fd)
            raise DirectoryInUse(f"another process has the fragment store in {directory}") from None

    def _path(self, number: int) -> Path:
        return self._segments / f"{number:010d}.seg"

    def segments(self) -> list[int]:
        return sorted(
            int(path.stem) for path in self._segments.iterdir() if path.suffix == ".seg" and path.stem.isdigit()
        )

    def create(self, number: int) -> PosixSegmentFile:
        file = self.open(number)
        file.create()
        return file

    def open(self, number: int) -> PosixSegmentFile:
        return PosixSegmentFile(self._path(number), self._remember)

    def _remember(self, file: PosixSegmentFile) -> None:
        """Bounds the open descriptors: closes the one that was opened first. A reader that comes back opens one again.
        A segment that was not synced since it was written keeps its own: the kernel may forget a write that failed when
        no descriptor is open.
        """
        with self._files_lock:
            self._files[file._path] = file
            self._files.move_to_end(file._path)
            oldest = None
            if len(self._files) > OPEN_FILES_MAX:
                oldest = next((known for known in self._files.values() if not known.unsynced), None)
            if oldest is not None:
                del self._files[oldest._path]
        if oldest is not None:
            oldest.close()

    def remove(self, number: int) -> None:
        path = self._path(number)
        path.unlink(missing_ok=True)
        with self._files_lock:
            file = self._files.pop(path, None)
        if file is not None:
            file.close(removed=True)
        self.sync_directory()

    def sync_directory(self) -> None:
        fd = _opened(self._segments, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def space(self) -> Space:
        found = os.statvfs(self.directory)
        return Space(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)

    def reserve(self, count: int) -> bool:
        path = self.directory / "reserve"
        try:
            if not count:
                had = path.exists() and path.stat().st_size > 0
                path.unlink(missing_ok=True)
                return had
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, count)
            except OSError:
                path.unlink(missing_ok=True)  # a part of it would be held by nobody
                raise
            finally:
                os.close(fd)
        except OSError:
            return False
        return True

    def mark_failed(self, reason: str) -> bool:
        try:
            replace_file(self.directory / "FAILED", reason.encode() + b"\n")
        except OSError as refused:
            log.error(
                "a fragment store can't note on its disk that it failed",
                directory=str(self.directory),
                reason=str(refused),
            )
            return False
        return True

    def failure(self) -> str:
        try:
            # a disk that failed may return anything, and must not stop the node
            reason = (self.directory / "FAILED").read_bytes().decode(errors="replace").strip()
            return reason or "it failed, and could not note why"
        except FileNotFoundError:
            return ""

    def close(self) -> None:
        with self._files_lock:
            files = list(self._files.values())
            self._files.clear()
        for file in files:
            file.close()
        os.close(self._lock_fd)
