"""Mistakes in the program that power cuts must find. They show that the checks can fail."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from storaged import durable
from storaged.fragments import files as files_module
from storaged.fragments import index as index_module
from storaged.fragments import reader as fragment_reader
from storaged.fragments import recovery
from storaged.fragments.engine import Engine
from storaged.fragments.entry import Entry
from storaged.fragments.files import Files, PosixFiles, PosixSegmentFile, SegmentFile
from storaged.fragments.index import Index
from storaged.fragments.index_rows import Checkpoint
from storaged.fragments.log import SegmentLog
from storaged.lmdb_file import open_environment
from storaged.meta.storage import identity, opening, reader, sums
from storaged.meta.storage import redo as redo_module
from storaged.meta.storage.redo import RedoLog
from storaged.meta.storage.state import StoreState
from storaged.meta.storage.sums import Sums
from storaged.wire import Buffer
from tests.worlds.still_disk import StillFragments

Plant = Callable[[pytest.MonkeyPatch], None]


def segments_are_not_synced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PosixSegmentFile, "sync", lambda _self: None)
    patch.setattr(PosixSegmentFile, "sync_apart", lambda _self: None)


def groups_are_not_synced(patch: pytest.MonkeyPatch) -> None:
    def write(self: RedoLog, body: Buffer) -> None:
        at, pieces = self._layout(body)
        os.pwritev(self._fd, pieces, at)

    patch.setattr(RedoLog, "write", write)


def a_groups_head_is_written_before_its_body(patch: pytest.MonkeyPatch) -> None:
    """The reader believes it, as if a head proved that its body is there."""

    def write(self: RedoLog, body: Buffer) -> None:
        at, pieces = self._layout(body)
        content = b"".join(pieces)
        os.pwritev(self._fd, [content[: redo_module.PAGE_BYTES]], at, os.RWF_DSYNC)
        os.pwritev(self._fd, [content[redo_module.PAGE_BYTES :]], at + redo_module.PAGE_BYTES, os.RWF_DSYNC)

    patch.setattr(RedoLog, "write", write)
    patch.setattr(RedoLog, "_whole", lambda _self, _data, _place: True)


def a_half_is_overwritten_before_lmdb_has_it(patch: pytest.MonkeyPatch) -> None:
    def switch(self: RedoLog) -> bool:
        self._half, self._ends[1 - self._half] = 1 - self._half, 0
        return True

    patch.setattr(RedoLog, "try_switch_half", switch)


def the_mark_is_ahead_of_the_records(patch: pytest.MonkeyPatch) -> None:
    """A checkpoint says that LMDB has all groups of the log, also those that came while it was made."""
    original = StoreState.put_mark

    def hasty(self: StoreState, transaction: Any, _applied: int, *, closed: bool = False) -> None:
        original(self, transaction, self.redo.sequence, closed=closed)

    patch.setattr(StoreState, "put_mark", hasty)


def a_kill_leaves_groups_in_the_page_cache(patch: pytest.MonkeyPatch) -> None:
    """A start believes what it reads there, and does not sync it."""
    original = RedoLog._recover

    def recover(self: RedoLog, *given: Any) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(os, "fdatasync", lambda _fd: None)
            original(self, *given)

    patch.setattr(RedoLog, "_recover", recover)


def a_kill_leaves_records_in_the_page_cache(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recovery, "_make_durable", lambda _files, _file, _border: "")


def a_kill_leaves_a_segments_name_in_the_page_cache(patch: pytest.MonkeyPatch) -> None:
    original = recovery._make_durable

    def bytes_only(files: Files, file: SegmentFile, border: int) -> str:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(type(files), "sync_directory", lambda _self: None)
            return original(files, file, border)

    patch.setattr(recovery, "_make_durable", bytes_only)


def lmdb_is_not_synced(patch: pytest.MonkeyPatch) -> None:
    def unsynced(directory: Path, **options: Any) -> Any:
        return open_environment(directory, **{**options, "sync": False})

    patch.setattr(opening, "open_environment", unsynced)


def the_index_is_not_synced(patch: pytest.MonkeyPatch) -> None:
    def unsynced(directory: Path, **options: Any) -> Any:
        return open_environment(directory, **{**options, "sync": False})

    patch.setattr(index_module, "open_environment", unsynced)


def index_checkpoints_are_ahead_of_the_segments(patch: pytest.MonkeyPatch) -> None:
    def hasty(self: Engine) -> Checkpoint:
        return self.index.freeze(self.log.end, self.dead_segments())

    patch.setattr(Engine, "freeze", hasty)


def segments_go_before_the_checkpoint(patch: pytest.MonkeyPatch) -> None:
    original = Engine.freeze

    def hasty(self: Engine) -> Checkpoint:
        for number in self.dead_segments():
            self.log.remove(number)
            self.index.accounts.remove(number)
        return original(self)

    patch.setattr(Engine, "freeze", hasty)


def torn_records_are_believed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recovery, "whole", lambda *_: True)


def torn_cells_are_believed(patch: pytest.MonkeyPatch) -> None:
    torn_records_are_believed(patch)
    patch.setattr(fragment_reader, "cell_holds", lambda *_: True)


def ages_are_renewed_to_others_than_asked(patch: pytest.MonkeyPatch) -> None:
    original = Index.touch

    def late(self: Index, key: bytes, created_ms: int, sequence: int) -> Entry | None:
        return original(self, key, created_ms + 1, sequence)

    patch.setattr(Index, "touch", late)


def a_full_segment_is_not_synced(patch: pytest.MonkeyPatch) -> None:
    original = SegmentLog._create

    def hasty(self: SegmentLog, number: int) -> None:
        original(self, number)

    def room(self: SegmentLog, need: int) -> int:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(SegmentLog, "sync", lambda _self: None)
            return make_room(self, need)

    make_room = SegmentLog.make_room
    patch.setattr(SegmentLog, "_create", hasty)
    patch.setattr(SegmentLog, "make_room", room)


def names_of_segments_are_not_synced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PosixFiles, "sync_directory", lambda _self: None)


def names_of_directories_are_not_synced(patch: pytest.MonkeyPatch) -> None:
    def unsynced(path: Path, mode: int = 0o777) -> None:
        path.mkdir(mode, parents=True, exist_ok=True)

    for module in (durable, files_module, identity, index_module):
        patch.setattr(module, "make_directory", unsynced)


def copies_leave_the_log_before_they_are_synced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StillFragments, "sync_apart", lambda _self: None)


def copies_come_after_their_rows(patch: pytest.MonkeyPatch) -> None:
    """Copies of the log are not given to the fragment store at a start."""

    def nothing(_self: StillFragments, _copies: Sequence[Any]) -> None:
        return

    patch.setattr(StillFragments, "restore", nothing)


def sums_come_one_checkpoint_late(patch: pytest.MonkeyPatch) -> None:
    late: dict[bytes, int] = {}
    put, stored, begin = Sums._put, sums.stored_sum, sums.begin_start

    def put_late(self: Sums, transaction: Any, prefix: bytes, total: int) -> None:
        if prefix in late:
            put(self, transaction, prefix, late[prefix])
        late[prefix] = total

    def of_both(transaction: Any, nodes: Any, prefix: bytes) -> int | None:
        return late[prefix] if prefix in late else stored(transaction, nodes, prefix)

    def forget(*given: Any) -> None:
        late.clear()
        begin(*given)

    patch.setattr(Sums, "_put", put_late)
    patch.setattr(sums, "begin_start", forget)
    for module in (sums, reader):
        patch.setattr(module, "stored_sum", of_both)


RARE: tuple[Plant, ...] = (a_kill_leaves_a_segments_name_in_the_page_cache,)
"""It takes a thousand cuts to meet. ``tests.property.test_fragment_crash`` makes it happen."""

PLANTED: tuple[Plant, ...] = (
    segments_are_not_synced,
    groups_are_not_synced,
    a_groups_head_is_written_before_its_body,
    a_half_is_overwritten_before_lmdb_has_it,
    the_mark_is_ahead_of_the_records,
    a_kill_leaves_groups_in_the_page_cache,
    a_kill_leaves_records_in_the_page_cache,
    lmdb_is_not_synced,
    the_index_is_not_synced,
    index_checkpoints_are_ahead_of_the_segments,
    segments_go_before_the_checkpoint,
    torn_records_are_believed,
    a_full_segment_is_not_synced,
    names_of_segments_are_not_synced,
    names_of_directories_are_not_synced,
    copies_leave_the_log_before_they_are_synced,
    copies_come_after_their_rows,
    sums_come_one_checkpoint_late,
)

PLANTED_ON_FAILING: tuple[Plant, ...] = (torn_cells_are_believed, ages_are_renewed_to_others_than_asked)
"""Plays of a drive that fails must find these, by what the disk serves."""
