"""Opens the store in a directory, or makes one, and brings back what its redo log has and LMDB has not."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import lmdb
import msgspec

from storaged.disk_health import DiskHealth
from storaged.durable import sync_path
from storaged.errors import DiskDamaged, DiskForeign, DiskRolledBack
from storaged.ids import Entropy
from storaged.lmdb_file import open_environment
from storaged.meta.storage import sums
from storaged.meta.storage.batch import decode_group
from storaged.meta.storage.identity import (
    IDENTITY,
    OWNER,
    STORE_ID_BYTES,
    SUB_DATABASES,
    Mark,
    lock_directory,
    open_error,
    read_identity,
    read_mark,
    split_identity,
    verify_owner,
)
from storaged.meta.storage.redo import RedoLog
from storaged.meta.storage.rowvalue import seal_small
from storaged.meta.storage.state import FAILED_FILE, StoreState


class Known(NamedTuple):
    """What the owner of a store knows of it, beside its identity. ``position``: a group that its redo log had.
    ``owner``: the disk that it is for (``identity.owner_of``); empty: nothing is noted or compared.
    """

    position: int = 0
    owner: bytes = b""


UNKNOWN = Known()


def open_state(
    directory: Path,
    *,
    map_bytes: int,
    entropy: Entropy,
    direct: bool,
    known_before: Known = UNKNOWN,
    health: DiskHealth | None = None,
) -> StoreState:
    """Counts the start in the store's identity. ``direct``: as for ``RedoLog``.

    Raises DirectoryInUse, DiskForeign (it failed before, or is another disk's), DiskDamaged, DiskRolledBack (it lacks
    ``known_before.position``), DiskUnusable (the disk refuses).
    """
    with ExitStack() as undo:
        lock_file = lock_directory(directory)
        undo.callback(os.close, lock_file)
        _refuse_failed(directory)
        try:
            environment = open_environment(directory, map_size=map_bytes, max_dbs=len(SUB_DATABASES), max_spare_txns=8)
            undo.callback(environment.close)
            environment.reader_check()
            databases = {name: environment.open_db(name) for name in SUB_DATABASES}
            meta = databases[b"meta"]
            with environment.begin() as transaction:
                known = read_identity(directory, transaction, meta)
                store_id, starts = split_identity(known) if known else (entropy(STORE_ID_BYTES), 0)
                mark = read_mark(directory, transaction, meta, starts)
                if known_before.owner:
                    verify_owner(directory, transaction, meta, known_before.owner)
            redo = RedoLog(directory, store_id, mark, direct=direct)
            undo.callback(redo.close)
            if redo.sequence < known_before.position:
                raise DiskRolledBack(
                    f"the metadata store in {directory} was put back to an older state: its redo log ends at group"
                    f" {redo.sequence}, and had group {known_before.position}"
                )
            identity = store_id + (starts + 1).to_bytes(8, "big")
            state = StoreState(directory, lock_file, environment, databases, redo, identity, health or DiskHealth())
            _recover(state, mark, known_before.owner)
        except lmdb.Error as error:
            raise open_error(directory, error) from None
        undo.pop_all()
        return state


def _refuse_failed(directory: Path) -> None:
    failed = directory / FAILED_FILE
    if failed.exists():
        reason = failed.read_bytes().decode(errors="replace").strip()  # such a disk may return anything
        raise DiskForeign(f"the metadata store in {directory} failed before and is not used again: {reason}")


def _recover(state: StoreState, mark: Mark | None, owner: bytes) -> None:
    """Reads the log into the overlay, then durably counts the start."""
    try:
        for body in state.redo.bodies:
            batches = decode_group(body)
            state.fresh.add(batches)
            state.fresh_bytes += len(body)
            state.restorable.extend(batch.copy for batch in batches if batch.copy is not None)
    except msgspec.MsgspecError as error:
        raise DiskDamaged(f"the redo log in {state.directory} holds something that is no group: {error}") from None
    state.redo.bodies.clear()
    with state.environment.begin(write=True) as transaction:
        transaction.put(IDENTITY, seal_small(IDENTITY, state.identity), db=state.databases[b"meta"])
        if owner:
            transaction.put(OWNER, seal_small(OWNER, owner), db=state.databases[b"meta"])
        sums.begin_start(
            transaction, state.databases[b"nodes"], state.databases[b"meta"], split_identity(state.identity)[1]
        )
        state.put_mark(transaction, mark.applied if mark is not None else 0)
    sync_path(state.directory)
