"""Durable files: what is written survives a crash. A created or replaced name is durable once its directory is
synced.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

_CANNOT_SYNC = (errno.EACCES, errno.EPERM, errno.EINVAL, errno.EROFS)
"""Errors of a directory that this process may not read or write, or whose file system has no syncs. Nothing was made in
such a directory."""


class RestartNeeded(Exception):
    """Acknowledged data is safe where it is, but can't be moved to its place before a restart. The disk is still
    usable.
    """


class NoRoom(RestartNeeded):
    """As ``RestartNeeded``, for want of room: it can be moved as soon as there is some."""


def sync_path(path: Path) -> None:
    """Syncs a file or a directory (fsync). Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path, mode: int = 0o777) -> None:
    """Makes a directory and the missing ones above it, unless it exists. Its name is durable when this returns;
    otherwise a power cut would take the name, and with it synced files. Raises OSError.
    """
    if not path.parent.exists():
        make_directory(path.parent)
    path.mkdir(mode, exist_ok=True)
    try:
        sync_path(path.parent)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def append_durably(descriptor: int, content: bytes, size: int) -> None:
    """Appends to a file of ``size`` bytes that is open for appending; durable when it returns. Raises OSError, after it
    has cut off what was written. The cut is not synced: after a crash the file may still end in some of ``content``.
    """
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fdatasync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def replace_file(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replaces a file durably. After a crash the file is whole: the old one or this one.

    Raises OSError, and then removes what was written, so that half a key never stays on a full disk. The file has its
    mode, less the umask, before its first byte, so that no other user reads a key meanwhile. Writers of one directory
    wait for each other (flock of the directory), also those of other processes: a gateway's workers share a directory.
    """
    temporary = path.with_name(path.name + ".new")
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        os.fsync(directory)
    finally:
        os.close(directory)
