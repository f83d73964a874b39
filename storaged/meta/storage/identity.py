"""Whether the metadata store in a directory may be used, and by which process."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import lmdb

from storaged.durable import make_directory
from storaged.errors import DirectoryInUse, DiskDamaged, DiskForeign, DiskRolledBack, DiskUnusable
from storaged.lmdb_file import open_environment
from storaged.meta.storage.rowvalue import open_small
from storaged.meta.store_ports import RowDamaged

STORE_ID_BYTES = 16
IDENTITY = b"\0identity"
REDO = b"\0redo"
OWNER = b"\0owner"
_MARK = struct.Struct(">QQQ?B")
SUB_DATABASES = (b"rows", b"heap", b"nodes", b"fences", b"pages", b"meta")

LAYOUT = 1
"""Layout of the rows. 0: no heap (the mark ends before this field); 1: as in ``meta.storage.heap``. A store of layout 0
is a store of layout 1 with an empty heap.
"""

Transaction = Any
Database = Any


class Mark(NamedTuple):
    """What LMDB knows of its redo log. LMDB has the changes of all groups up to ``applied``. ``written``: the last
    group that was durable when the mark was written. ``closed``: there were no others. ``starts``: of the store at that
    time. The layout follows in the bytes, so that a program that does not know it refuses the store.
    """

    applied: int
    written: int
    starts: int
    closed: bool

    def pack(self) -> bytes:
        return _MARK.pack(*self, LAYOUT)


def read_mark(directory: Path, transaction: Transaction, meta: Database, starts: int) -> Mark | None:
    """None: the store has no log yet. Raises DiskDamaged when the mark is damaged, DiskForeign when a later version has
    written the store, or a version without a log has opened it while its log held something.
    """
    sealed = transaction.get(REDO, db=meta)
    if sealed is None:
        return None
    try:
        packed = open_small(REDO, sealed)
        applied, written, starts_then, closed, layout = _MARK.unpack(
            packed if len(packed) != _MARK.size - 1 else packed + b"\0"
        )
    except (RowDamaged, struct.error) as error:
        raise DiskDamaged(
            f"the metadata store in {directory} does not say what its redo log must hold: {error}"
        ) from None
    if layout > LAYOUT:
        raise DiskForeign(
            f"the metadata store in {directory} was written by a later version: its layout is {layout}, {LAYOUT} is"
            " known"
        )
    mark = Mark(applied, written, starts_then, closed)
    if not mark.closed and mark.starts != starts:
        raise DiskForeign(
            f"the metadata store in {directory} was opened by an older version while its redo log held what it had"
            " acknowledged"
        )
    return mark


def lock_directory(directory: Path) -> int:
    """Returns the descriptor that holds the lock. Raises DirectoryInUse, DiskUnusable."""
    try:
        make_directory(directory)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DiskUnusable(f"no metadata store can be opened in {directory}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise DirectoryInUse(f"another process uses the metadata store in {directory}") from None
    return descriptor


def verify_identity(directory: Path, expected: bytes) -> None:
    """Raises DiskForeign unless the store in ``directory`` is the expected one, DiskRolledBack when it had fewer starts
    than ``expected`` says. Reads only.
    """
    file = directory / "data.mdb"
    if not file.exists():
        raise DiskForeign(f"the metadata store that was in {directory} is gone")
    if not file.stat().st_size:
        raise _blank(directory)
    descriptor = lock_directory(directory)
    try:
        with open_environment(directory, readonly=True, max_dbs=len(SUB_DATABASES), create=False) as environment:
            try:
                meta = environment.open_db(b"meta", create=False)
            except lmdb.NotFoundError:
                raise _blank(directory) from None
            with environment.begin() as transaction:
                found = read_identity(directory, transaction, meta)
    except lmdb.Error as error:
        raise open_error(directory, error) from None
    finally:
        os.close(descriptor)
    if found is None or found[:STORE_ID_BYTES] != expected[:STORE_ID_BYTES]:
        raise DiskForeign(f"the metadata store in {directory} is another one than was in use there")
    if split_identity(found)[1] < split_identity(expected)[1]:
        raise DiskRolledBack(
            f"the metadata store in {directory} was put back to an older state: it shows start"
            f" {split_identity(found)[1]}, and was in start {split_identity(expected)[1]}"
        )


def owner_of(cluster: str, disk_id: str) -> bytes:
    """What a store notes of the disk that it is for."""
    return f"{cluster}\0{disk_id}".encode()


def verify_owner(directory: Path, transaction: Transaction, meta: Database, owner: bytes) -> None:
    """Raises DiskForeign for a store that was in use as another disk. A store that notes no owner is older than this
    note.
    """
    sealed = transaction.get(OWNER, db=meta)
    try:
        found = None if sealed is None else open_small(OWNER, sealed)
    except RowDamaged as error:
        raise DiskDamaged(f"the metadata store in {directory} does not say of which disk it is: {error}") from None
    if found is not None and found != owner:
        cluster, _, disk = found.decode(errors="replace").partition("\0")
        raise DiskForeign(f"the metadata store in {directory} is that of disk {disk!r} of cluster {cluster!r}")


def _blank(directory: Path) -> DiskForeign:
    return DiskForeign(f"the metadata store in {directory} is blank, although one was in use there")


def read_identity(directory: Path, transaction: Transaction, meta: Database) -> bytes | None:
    sealed = transaction.get(IDENTITY, db=meta)
    try:
        return None if sealed is None else open_small(IDENTITY, sealed)
    except RowDamaged as error:
        raise DiskDamaged(f"the metadata store in {directory} does not say which it is: {error}") from None


def split_identity(identity: bytes) -> tuple[bytes, int]:
    """Store id, and how often the store was opened."""
    return identity[:STORE_ID_BYTES], int.from_bytes(identity[STORE_ID_BYTES:], "big")


def open_error(directory: Path, error: lmdb.Error) -> DiskForeign | DiskUnusable:
    if isinstance(error, lmdb.InvalidError | lmdb.CorruptedError | lmdb.VersionMismatchError | lmdb.PageNotFoundError):
        return DiskDamaged(f"what is in {directory} is no metadata store: {error}")
    return DiskUnusable(f"no metadata store can be opened in {directory}: {error}")
