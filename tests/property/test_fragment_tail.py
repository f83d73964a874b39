"""A log cut at any byte, and a bit flipped anywhere: what is served is what was written, or nothing."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storaged.errors import FragmentDamaged, FragmentMissing
from storaged.fragments.engine import Engine
from storaged.fragments.index import Index
from storaged.fragments.limits import StoreLimits
from storaged.fragments.write import Write
from storaged.hashes import fragment_hash
from tests.doubles.files import SimulatedFiles
from tests.examples import examples
from tests.worlds.fragments import DISK, Made, in_memory, make

LIMITS = StoreLimits(note_reserve_bytes=0, segment_bytes=1 << 20)


class Log:
    """Two synced groups and a third that is not; the index is always made anew from the segments."""

    def __init__(self, directory: Path, sizes: tuple[int, ...] = (0, 30, 700, 4112, 5000)) -> None:
        rng = random.Random(1)
        self.directory = directory
        self.files = SimulatedFiles()
        engine = self.open()
        self.groups: list[list[Made]] = []
        for _ in range(3):
            group = [make(rng, size) for size in sizes]
            assert engine.append([Write.of(one.header, [one.payload]) for one in group]) == [None] * len(group)
            self.groups.append(group)
            if len(self.groups) < 3:
                self.synced_end = engine.log.end.offset
                engine.log.sync()
        self.deleted = self.groups[0][3]
        engine.delete([self.deleted.id.pack()])
        self.end = engine.log.end.offset
        self.bytes = bytes(self.files.disks[1].now)
        self.close(engine)

    def open(self) -> Engine:
        shutil.rmtree(self.directory / "index", ignore_errors=True)
        index = Index(self.directory / "index", DISK, map_bytes_max=1 << 22, durable=False)
        engine = Engine(self.files, index, LIMITS, now_ms=lambda: 0, on_damage=lambda _key, _cell: None)
        self.report = engine.recover()
        return engine

    def close(self, engine: Engine) -> None:
        engine.index.close()

    def set(self, data: bytes) -> None:
        self.files.disks[1].now = bytearray(data)
        self.files.disks[1].written.clear()

    def found(self, engine: Engine, made: Made) -> str:
        """``whole``, ``missing`` or ``damaged``; anything but what was written is a failure."""
        try:
            read = engine.reader.read(made.header.id, 0, 100)
        except FragmentMissing:
            return "missing"
        except FragmentDamaged:
            return "damaged"
        assert read is not None
        assert read.header == made.header
        for cell, true in zip(read.cells, made.cells, strict=True):
            assert cell is None or cell == true
        return "damaged" if None in read.cells else "whole"


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    with in_memory(tmp_path) as path:
        yield Log(path)


def test_a_tail_torn_at_any_byte_costs_only_what_was_not_synced(log: Log) -> None:
    step = 97  # every alignment of a cut to the records' multiples of 8 comes up
    for end in [*range(log.synced_end, log.end, step), *range(log.end - 120, log.end + 1)]:
        log.set(log.bytes[:end])
        engine = log.open()
        for group in log.groups[:2]:
            for made in group:
                assert log.found(engine, made) == ("missing" if made is log.deleted and end == log.end else "whole")
        last = [log.found(engine, made) for made in log.groups[2]]
        assert last == sorted(last, key=("whole", "missing").index), "a cut leaves a beginning"
        assert log.report.gaps == []
        assert engine.log.end.offset <= end
        again = make(random.Random(end), 50)
        assert engine.append([Write.of(again.header, [again.payload])]) == [None]
        engine.log.sync()
        log.close(engine)
        engine = log.open()
        assert log.report.torn_bytes == 0, "what was cut once stays cut"
        assert log.found(engine, again) == "whole"
        log.close(engine)


@settings(
    max_examples=examples(200),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(at=st.integers(min_value=0), bit=st.integers(0, 7), more=st.integers(0, 3))
def test_a_flipped_bit_never_makes_wrong_bytes_and_costs_one_fragment(log: Log, at: int, bit: int, more: int) -> None:
    data = bytearray(log.bytes)
    for flip in range(more + 1):
        data[(at + flip * 7919) % log.synced_end] ^= 1 << bit
    log.set(bytes(data))
    engine = log.open()
    states = [log.found(engine, made) for group in log.groups[:2] for made in group if made is not log.deleted]
    assert states.count("whole") >= len(states) - (more + 1)
    assert [log.found(engine, made) for made in log.groups[2]] == ["whole"] * len(log.groups[2])
    assert log.report.torn_bytes == 0
    log.close(engine)


def test_zeros_behind_the_log_are_a_torn_tail(log: Log) -> None:
    log.set(log.bytes + bytes(100_000))
    engine = log.open()
    assert log.report.torn_bytes == 100_000
    assert engine.log.end.offset == log.end
    assert len(log.files.disks[1].now) == log.end
    log.close(engine)


def test_a_damaged_segment_header_loses_no_record(log: Log) -> None:
    log.set(bytes(64) + log.bytes[64:])
    engine = log.open()
    assert all(log.found(engine, made) == "whole" for group in log.groups[1:] for made in group)
    log.close(engine)


def test_a_payload_that_looks_like_a_record_is_not_taken_for_one(log: Log) -> None:
    """The whole log as the payload of a fragment, whose head is then destroyed: what is inside stays inside."""
    engine = log.open()
    inner = bytes(log.files.disks[1].now)
    made = make(random.Random(9), 8)
    header = msgspec.structs.replace(made.header, hashes=(fragment_hash((inner,)),) * 6, length=len(inner))
    assert engine.append([Write.of(header, [inner])]) == [None]
    entry = engine.index.lookup(header.id)
    assert entry is not None
    engine.log.sync()
    engine.log.mark()
    engine.log.sync()
    fragments = engine.index.fragments
    log.close(engine)
    log.files.disks[1].now[entry.offset + 5] ^= 0xFF
    engine = log.open()
    assert engine.index.fragments == fragments - 1
    assert len(log.report.gaps) == 1
    log.close(engine)
