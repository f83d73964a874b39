"""What a disk does that no disk should: files that are gone, descriptors that are used up, a full disk at the wrong
moment, notes that say nothing.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from storaged.errors import IndexDamaged
from storaged.fragments.engine import Engine
from storaged.fragments.files import PosixFiles
from storaged.fragments.index import Index
from storaged.fragments.ports import Retirement
from storaged.fragments.write import Write
from tests.doubles.files import SimulatedFiles
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
