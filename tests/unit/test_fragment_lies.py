"""What a disk does that no disk should: files that are gone, descriptors that are used up, a full disk at the wrong
moment, notes that say nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from storaged.durable import NoRoom
from storaged.errors import DiskDamaged, DiskForeign, DiskUnusable, IndexDamaged
from storaged.fragments.engine import Engine
from storaged.fragments.files import OPEN_FILES_MAX, PosixFiles
from storaged.fragments.index import Index
from storaged.fragments.ports import Retirement
from storaged.fragments.write import Write
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.storage.lmdb_store import LmdbMetaStore
from storaged.meta.storage.rowvalue import seal_small
from storaged.wire import Buffer
from tests.doubles.files import SimulatedFile, SimulatedFiles
from tests.worlds.fragments import ANY_SPACE, DISK, Made, make

RNG = random.Random(12)


def started(directory: Path, files: SimulatedFiles | PosixFiles) -> Engine:
    index = Index(directory, DISK, map_bytes_max=1 << 24, durable=False)
    engine = Engine(files, index, ANY_SPACE, now_ms=lambda: 0, on_damage=lambda _key, _cell: None)
    try:
        engine.recover()
    except BaseException:
        index.close()
        raise
    return engine


def put(engine: Engine, length: int = 100) -> Made:
    made = make(RNG, length)
    assert engine.append([Write.of(made.header, [made.payload])]) == [None]
    engine.log.sync()
    return made


def checkpoint(engine: Engine) -> None:
    found = engine.freeze()
    engine.commit(found)
    engine.thaw(found)


def test_what_is_written_after_the_last_segment_was_lost_is_found_again(tmp_path: Path) -> None:
    """The segments before are covered by the checkpoint: no replay looks there for new records."""
    files = SimulatedFiles()
    engine = started(tmp_path, files)
    kept = put(engine)
    engine.log.sync()
    engine.log._create(2)
    lost = put(engine)
    checkpoint(engine)
    engine.index.close()
    del files.disks[2]

    engine = started(tmp_path, files)
    assert engine.index.lookup(lost.id.pack()) is None
    made = put(engine)
    engine.index.close()  # the process is killed

    engine = started(tmp_path, files)
    for one in (kept, made):
        assert b"".join(engine.reader.read(one.id.pack(), 0, 10).cells) == one.payload  # type: ignore[arg-type]
    engine.index.close()


def test_a_checkpoint_of_a_log_without_its_last_segment_goes_not_back(tmp_path: Path) -> None:
    files = SimulatedFiles()
    engine = started(tmp_path, files)
    kept = put(engine)
    engine.log._create(2)
    put(engine)
    checkpoint(engine)
    before = engine.index.checkpoint
    engine.index.close()
    del files.disks[2]
    engine = started(tmp_path, files)
    checkpoint(engine)
    assert engine.index.checkpoint >= before
    made = put(engine)
    engine.close()
    engine = started(tmp_path, files)
    assert {key for key, _ in engine.index.entries()} == {kept.id.pack(), made.id.pack()}
    engine.index.close()


def test_copies_do_not_count_as_synced_while_the_failure_of_their_disk_is_being_noted(tmp_path: Path) -> None:
    files = SimulatedFiles()
    engine = started(tmp_path, files)
    put(engine)
    believed: list[bool] = []
    noting, asked = threading.Event(), threading.Event()

    def ask() -> None:
        noting.wait(10)
        asked.set()
        try:
            engine.log.sync_apart()
        except DiskUnusable:
            believed.append(False)
        else:
            believed.append(True)

    def note(_reason: str) -> bool:
        noting.set()
        asked.wait(10)
        thread.join(0.3)  # it may wait for the note
        return False

    thread = threading.Thread(target=ask)
    thread.start()
    engine.state.note_failed = note
    files.mark_failed = lambda _reason: False  # type: ignore[method-assign]
    engine.state.fail("fdatasync of segment 1: Input/output error")
    thread.join(10)
    assert believed == [False], "the next start believes a disk that may have lost these copies"
    engine.index.close()


def test_a_failed_sync_of_the_writer_is_not_overlooked_by_a_descriptor_that_was_opened_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports a failed write-back to every open descriptor once, and not to later ones. The thread that got
    it needs the interpreter before it can say so.
    """
    files = SimulatedFiles()
    engine = started(tmp_path, files)
    put(engine)
    reported, returned = threading.Event(), threading.Event()

    def fail(_file: SimulatedFile) -> None:
        reported.set()
        returned.wait(0.3)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(SimulatedFile, "sync", fail)
    monkeypatch.setattr(SimulatedFile, "sync_apart", lambda _file: None)
    files.mark_failed = lambda _reason: False  # type: ignore[method-assign]
    more = make(RNG, 100)
    assert engine.append([Write.of(more.header, [more.payload])]) == [None]

    def sync() -> None:
        with pytest.raises(DiskUnusable):
            engine.log.sync()

    writer = threading.Thread(target=sync)
    writer.start()
    assert reported.wait(10)
    with pytest.raises(DiskUnusable):
        engine.log.sync_apart()
    returned.set()
    writer.join(10)
    engine.index.close()


@pytest.mark.parametrize("reserve", [False, True])
def test_a_disk_that_is_full_when_a_torn_tail_is_cut_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reserve: bool
) -> None:
    files = SimulatedFiles()
    engine = started(tmp_path, files)
    made = put(engine)
    start = engine.log.end.offset
    for _ in range(2):
        more = make(RNG, 100)
        assert engine.append([Write.of(more.header, [more.payload])]) == [None]
    engine.index.close()
    files.disks[1].now[start + 100] ^= 1  # the first of them is torn, the second is whole

    files.reserved = 4096 if reserve else 0
    write = SimulatedFile.write

    def refuse(file: SimulatedFile, buffers: Sequence[Buffer], offset: int) -> None:
        if files.reserved or not reserve:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, buffers, offset)

    with monkeypatch.context() as full:
        full.setattr(SimulatedFile, "write", refuse)
        with contextlib.ExitStack() as expected:
            if not reserve:
                expected.enter_context(pytest.raises(DiskUnusable, match="torn tail"))
            started(tmp_path, files).index.close()
    assert not files.failed
    engine = started(tmp_path, files)
    assert not engine.state.failure
    assert b"".join(engine.reader.read(made.id.pack(), 0, 10).cells) == made.payload  # type: ignore[arg-type]
    engine.index.close()


def test_a_failed_disks_note_that_is_damaged_is_still_a_note(tmp_path: Path) -> None:
    (tmp_path / "FAILED").write_bytes(b"\xff\xfe\x80 fdatasync\n")
    files = PosixFiles(tmp_path)
    assert "fdatasync" in files.failure()
    files.close()


def test_a_damaged_entry_of_the_garbage_list_is_a_damaged_index(tmp_path: Path) -> None:
    files = SimulatedFiles()
    engine = started(tmp_path, files)
    engine.retire([Retirement(b"r" * 16, b"owner", 5)])
    checkpoint(engine)
    engine.unretire(b"r" * 16)
    engine.log.sync()
    with engine.index._env.begin(write=True) as txn:
        raw = txn.get(b"r" * 16, db=engine.index._db["retired"])
        txn.put(b"r" * 16, b"\xc1" + raw[1:], db=engine.index._db["retired"])
    engine.index.close()
    with pytest.raises(IndexDamaged):
        started(tmp_path, files)


def test_the_segment_that_is_written_keeps_its_descriptor_until_it_is_synced(tmp_path: Path) -> None:
    """A descriptor that is closed and opened again may not hear of a failed write-back in between."""
    files = PosixFiles(tmp_path)
    written = files.create(1)
    written.write([b"dirty"], 0)
    kept = written._fd
    for number in range(2, OPEN_FILES_MAX + 10):
        files.create(number).size()
    assert written._fd == kept >= 0
    written.sync()
    for number in range(2, OPEN_FILES_MAX + 10):
        files.open(number).size()
    assert written._fd < 0
    assert len(os.listdir("/proc/self/fd")) < OPEN_FILES_MAX + 100
    files.close()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_process_without_descriptors_or_memory_condemns_no_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    files = PosixFiles(tmp_path / "files")
    engine = started(tmp_path / "index", files)
    made = put(engine)
    opened = os.open

    def refuse(path: str | Path, flags: int, mode: int = 0o777, **more: int) -> int:
        if str(path).endswith((".seg", "segments")):
            raise OSError(code, os.strerror(code))
        return opened(path, flags, mode, **more)

    steps: list[Callable[[], object]] = [
        engine.log.sync_apart,
        lambda: engine.log.make_room(engine.limits.segment_bytes),
    ]
    for step in steps:
        with monkeypatch.context() as short:
            short.setattr(os, "open", refuse)
            with contextlib.suppress(NoRoom):  # it is tried again
                assert not step()
        assert not engine.state.lost
    assert not files.failure()
    engine.close()
    engine = started(tmp_path / "index", PosixFiles(tmp_path / "files"))
    assert not engine.state.failure
    assert b"".join(engine.reader.read(made.id.pack(), 0, 10).cells) == made.payload  # type: ignore[arg-type]
    engine.close()


def test_a_reserve_that_found_no_room_for_all_of_it_keeps_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would give back what it took, and deletions would lack it."""

    def fill(descriptor: int, _offset: int, _length: int) -> None:
        os.write(descriptor, bytes(8192))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files = PosixFiles(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(os, "posix_fallocate", fill)
        assert not files.reserve(1 << 20)
    assert not (tmp_path / "reserve").exists()
    assert files.reserve(4096)
    assert files.reserve(0)
    files.close()


def test_a_metadata_store_whose_note_is_damaged_is_refused_alone(tmp_path: Path) -> None:
    """Any error that is not expected at an opening ends the start of the node with all its disks."""
    (tmp_path / "failed").write_bytes(b"\xff\xfe\x80 pwritev\n")
    with pytest.raises(DiskForeign, match="pwritev"):
        LmdbMetaStore(tmp_path, map_bytes=1 << 24)


@pytest.mark.parametrize("name", [b"epoch 1\xf7", b"epoch one"])
async def test_a_damaged_name_among_a_disks_promises_is_damage_of_that_disk(tmp_path: Path, name: bytes) -> None:
    store = LmdbMetaStore(tmp_path, map_bytes=1 << 24)
    with store._state.environment.begin(write=True) as txn:
        txn.put(name, seal_small(name, bytes(8)), db=store._state.databases[b"meta"])
    with pytest.raises(DiskDamaged):
        LocalReplica("d1", store)
    await store.close()
