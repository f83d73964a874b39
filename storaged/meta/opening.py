"""Whether the metadata store in a directory may be used, and by whom."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import lmdb

from storaged.durable import sync_path
from storaged.errors import DirectoryInUse, DiskForeign, DiskUnusable
from storaged.mapped import reach_end
from storaged.meta.ports import RowDamaged
from storaged.meta.rowvalue import open_small

STORE_ID_BYTES = 16
IDENTITY = b"\0identity"
REDO = b"\0redo"
_MARK = struct.Struct(">QQQ?")
SUB_DATABASES = (b"rows", b"nodes", b"fences", b"pages", b"meta")

Transaction = Any
Database = Any


class Mark(NamedTuple):
    """What LMDB knows of its redo log. It has the changes of all groups up to ``applied``; ``written`` were durable when it was told; ``closed``: there were no others.
    ``starts``: of the store when it was told."""

    applied: int
    written: int
    starts: int
    closed: bool

    def pack(self) -> bytes:
        return _MARK.pack(*self)


def read_mark(directory: Path, transaction: Transaction, meta: Database, starts: int) -> Mark | None:
    """None: the store has no log yet. Raises DiskForeign when it is damaged, or a program that knows of no log has opened the store since there was something in it."""
    sealed = transaction.get(REDO, db=meta)
    try:
        mark = None if sealed is None else Mark(*_MARK.unpack(open_small(REDO, sealed)))
    except (RowDamaged, struct.error) as error:
        raise DiskForeign(f"the metadata store in {directory} does not say what its redo log must hold: {error}") from None
    if mark is not None and not mark.closed and mark.starts != starts:
        raise DiskForeign(
            f"the metadata store in {directory} was opened by an older version while its redo log held what it had acknowledged"
        )
    return mark


def lock(directory: Path) -> int:
    """Raises DirectoryInUse, DiskUnusable."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        sync_path(directory.parent)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DiskUnusable(f"no metadata store can be opened in {directory}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise DirectoryInUse(f"another process uses the metadata store in {directory}") from None
    return descriptor


def compare(directory: Path, expected: bytes) -> None:
    """Raises DiskForeign unless the store in ``directory`` is the expected one, no older than it was; reads only."""
    descriptor = lock(directory)
    try:
        with lmdb.open(str(directory), readonly=True, max_dbs=len(SUB_DATABASES), create=False) as environment:
            reach_end(environment, directory)
            try:
                meta = environment.open_db(b"meta", create=False)
            except lmdb.NotFoundError:
                raise DiskForeign(f"the metadata store in {directory} is blank, although one was in use there") from None
            with environment.begin() as transaction:
                found = read_identity(directory, transaction, meta)
    except lmdb.Error as error:
        raise unopened(directory, error) from None
    finally:
        os.close(descriptor)
    if found is None or found[:STORE_ID_BYTES] != expected[:STORE_ID_BYTES]:
        raise DiskForeign(f"the metadata store in {directory} is another one than was in use there")
    if split_identity(found)[1] < split_identity(expected)[1]:
        raise DiskForeign(f"the metadata store in {directory} is an older copy of the one that was in use there")


def read_identity(directory: Path, transaction: Transaction, meta: Database) -> bytes | None:
    sealed = transaction.get(IDENTITY, db=meta)
    try:
        return None if sealed is None else open_small(IDENTITY, sealed)
    except RowDamaged as error:
        raise DiskForeign(f"the metadata store in {directory} does not say which it is: {error}") from None


def split_identity(identity: bytes) -> tuple[bytes, int]:
    """Store id, and how often the store was opened."""
    return identity[:STORE_ID_BYTES], int.from_bytes(identity[STORE_ID_BYTES:], "big")


def unopened(directory: Path, error: lmdb.Error) -> DiskForeign | DiskUnusable:
    if isinstance(error, lmdb.InvalidError | lmdb.CorruptedError | lmdb.VersionMismatchError | lmdb.PageNotFoundError):
        return DiskForeign(f"what is in {directory} is no metadata store: {error}")
    return DiskUnusable(f"no metadata store can be opened in {directory}: {error}")
