"""What a process leaves when it dies by a fault of the machine, so that the next start looks for the cause first.

Theory of operation. LMDB reads its files through memory maps. Where the drive can't read a page of one, the process
gets SIGBUS and dies, with all its disks; a start that opened the disk again would die again. The interpreter's fault
handler writes to a file in the node's directory as the process dies. A start that finds it reads LMDB's files of all
disks with ordinary reads first, each disk by itself (``Opener``). Ordinary reads get an error, and only that disk is
left out. The file stays until all disks could be read: else the start after the next one would die again.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from storaged.errors import DiskUnreadable
from storaged.lmdb_file import DATA_FILE, MEDIA_ERRORS, STEP_BYTES
from storaged.units import KIB

T = TypeVar("T")

FAULT_FILE = "fault"
FAULT_BYTES_MAX = 64 * KIB
BUS_ERROR = b"Bus error"

TRANSIENT = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT))
"""What says nothing of the disk: it is tried again."""

TRIES, PAUSE_S = 5, 0.2
LMDB_FILES = (Path("meta") / DATA_FILE, Path("fragments") / "index" / DATA_FILE)
"""Of a disk, in its directory."""


def note_faults(directory: Path) -> None:
    """From now on the death of this process by a fault is noted in the node's directory. Raises OSError."""
    path = directory / FAULT_FILE
    if path.exists() and path.stat().st_size > FAULT_BYTES_MAX:  # a node that dies again and again fills no disk
        path.write_bytes(BUS_ERROR if died_by_bus_error(directory) else b"")
    faulthandler.enable(path.open("ab", buffering=0), all_threads=False)


def died_by_bus_error(directory: Path) -> bool:
    """Whether a process before this one did, and not all disks were read since."""
    try:
        return BUS_ERROR in (directory / FAULT_FILE).read_bytes()
    except OSError:
        return False


def forget_faults(directory: Path) -> None:
    """All disks could be read."""
    with contextlib.suppress(OSError):
        os.truncate(directory / FAULT_FILE, 0)


def read_disk(directory: Path) -> None:
    """Reads LMDB's files of a disk. In a thread: it may take minutes. Raises DiskUnreadable, OSError."""
    for name in LMDB_FILES:
        with contextlib.suppress(FileNotFoundError):
            _read_file(directory / name)


def _read_file(path: Path) -> None:
    descriptor = _patiently(lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    try:
        at, end = 0, os.fstat(descriptor).st_size
        while at < end:
            try:
                at = os.lseek(descriptor, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return  # only a hole is left
                raise
            hole = os.lseek(descriptor, at, os.SEEK_HOLE)
            while at < hole:
                count = _read_step(path, descriptor, at, min(STEP_BYTES, hole - at))
                if not count:
                    return  # the file was cut
                at += count
    finally:
        os.close(descriptor)


def _read_step(path: Path, descriptor: int, at: int, size: int) -> int:
    """Returns how many bytes could be read: fewer where what follows can't be."""
    try:
        return len(_patiently(lambda: os.pread(descriptor, size, at), MEDIA_ERRORS))
    except OSError as error:
        if error.errno not in MEDIA_ERRORS:
            raise
        raise DiskUnreadable(f"{path} can't be read near byte {at}: {error.strerror or error}") from None


def _patiently(call: Callable[[], T], more: frozenset[int] = frozenset()) -> T:
    """Makes the call again after errors that may pass. ``more``: other errors that are tried again."""
    for _ in range(TRIES - 1):
        try:
            return call()
        except OSError as error:
            if error.errno not in TRANSIENT | more:
                raise
            time.sleep(PAUSE_S)
    return call()
