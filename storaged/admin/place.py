"""Files in a node's directory that node, supervisor and command line share: the lock with the pid, and the admin
socket.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storaged.errors import DirectoryInUse

LOCK_NAME = "lock"
SOCKET_NAME = "admin.sock"
SOCKET_PATH_BYTES_MAX = 107
"""sun_path of unix(7) without its closing zero."""


@contextmanager
def short_path(path: Path) -> Iterator[str]:
    """Yields a name for a Unix socket that fits into ``sun_path``, however deep the directory is: it goes through an
    open descriptor of the directory.
    """
    if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX:
        yield str(path)
        return
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)


def bind_private(path: Path) -> socket.socket:
    """Binds a Unix socket at ``path``, in place of an old one, that only its owner can connect to.

    It is private from the start: on Linux it gets the mode that the descriptor had before it was bound. A chmod
    afterwards would leave a moment for others to connect.
    """
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(listener.fileno(), 0o600)
        with short_path(path) as name:
            listener.bind(name)
        path.chmod(0o600)
    except BaseException:
        listener.close()
        raise
    return listener


def lock_directory(directory: Path) -> int:
    """Takes the lock of a directory and writes this process's pid into it; the descriptor holds the lock. Raises
    DirectoryInUse.
    """
    descriptor = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.read(descriptor, 32).decode().strip() or "unknown"
        os.close(descriptor)
        raise DirectoryInUse(f"{directory} is in use by the process {holder}") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def running_pid(node_directory: Path) -> int | None:
    """The pid of the process that holds the lock of a node directory; None when no process does."""
    try:
        descriptor = os.open(node_directory / LOCK_NAME, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        text = os.read(descriptor, 32).strip()
        return int(text) if text.isdigit() else None
    finally:
        os.close(descriptor)
    return None
