"""What lies in a node's directory besides its data, as the node, the supervisor and the command line share it: the lock
with the pid, the admin socket.
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
    """A name for a Unix socket that fits in ``sun_path`` however deep the directory is: through an open descriptor of
    its folder.
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
    """A Unix socket at ``path``, in the place of an old one, that its owner alone can connect to, from the moment it is
    there: on Linux it gets the mode that
    the descriptor had before it was bound, and a chmod afterwards would be too late for whoever is quick."""
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
    """Takes the lock of a directory and writes our pid into it; the descriptor holds it. Raises DirectoryInUse."""
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
    """The pid of the process that holds a node directory's lock, None when nobody does."""
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
