"""LMDB on a disk that hangs: what is in memory can be read, and what is in memory is known."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest

from storaged import lmdb_file
from storaged.lmdb_file import DATA_FILE, LOCK_FILE, Residency, open_environment
from tests.worlds.hanging_disk import HANG_S_MAX, READS, WRITES, HangingDisk, available, hanging_disk

ROWS = 2000


@pytest.fixture
def disk() -> Iterator[HangingDisk]:
    if not available():
        pytest.skip("needs root and /dev/fuse")
    with hanging_disk() as disk:
        yield disk


def fill(environment: lmdb.Environment) -> None:
    with environment.begin(write=True) as transaction:
        for number in range(ROWS):
            transaction.put(b"%08d" % number, b"v" * 500)


def read(environment: lmdb.Environment, number: int) -> None:
    with environment.begin() as transaction:
        assert transaction.get(b"%08d" % number) == b"v" * 500


def test_the_lock_file_is_in_memory(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_bytes(b"of an earlier version")
    environment = open_environment(tmp_path, map_size=1 << 26)
    assert not (tmp_path / LOCK_FILE).is_symlink()
    assert not (tmp_path / LOCK_FILE).exists()
    fill(environment)
    read(environment, 7)
    environment.close()
    with open_environment(tmp_path, map_size=1 << 26, readonly=True) as again:
        read(again, 7)


def test_a_data_file_appears_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LMDB would write its first two pages into place, and refuse what a power cut leaves of them."""
    (tmp_path / "data.new").write_bytes(b"half of what was wr")
    places: list[str] = []
    original = lmdb.open

    def opened(path: str, **options: Any) -> lmdb.Environment:
        places.append(f"{path}: {(tmp_path / DATA_FILE).exists()}")
        return original(path, **options)

    monkeypatch.setattr(lmdb, "open", opened)
    open_environment(tmp_path, map_size=1 << 26).close()
    assert places == [f"{tmp_path / 'data.new'}: False", f"{tmp_path}: True"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [DATA_FILE]


def test_a_disk_that_takes_no_writes_does_not_delay_reads_of_what_is_in_memory(disk: HangingDisk) -> None:
    place = disk.directory / "store"
    place.mkdir()
    environment = open_environment(place, map_size=1 << 26)
    fill(environment)
    residency = Residency(environment, place)
    residency.look()
    assert residency.resident
    disk.hang(WRITES)
    began = time.monotonic()
    read(environment, 7)
    assert time.monotonic() - began < HANG_S_MAX / 2
    disk.release()
    environment.close()


def test_pages_that_left_memory_are_noticed_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = open_environment(tmp_path, map_size=1 << 26)
    fill(environment)
    environment.close()
    environment = open_environment(tmp_path, map_size=1 << 26)
    with (tmp_path / DATA_FILE).open("rb") as file:
        lmdb_file.os.posix_fadvise(file.fileno(), 0, 0, lmdb_file.os.POSIX_FADV_DONTNEED)
    monkeypatch.setattr(lmdb_file, "KEPT_BYTES_MAX", 0)
    small = Residency(environment, tmp_path)
    assert small.resident, "an environment that was just opened was just read"
    small.look()
    assert not small.resident
    monkeypatch.undo()
    kept = Residency(environment, tmp_path)
    kept.look()
    assert kept.resident
    kept.close()
    environment.close()


def test_where_the_system_does_not_say_what_is_in_memory_all_of_it_counts_as_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filter of system calls may forbid the question."""
    with open_environment(tmp_path, map_size=1 << 26) as environment:
        fill(environment)
        residency = Residency(environment, tmp_path)
        monkeypatch.setattr(lmdb_file._libc, "mincore", lambda *_arguments: -1)
        residency.look()
        assert (residency.resident, residency.looked) == (True, False)


def test_where_no_file_in_memory_can_be_linked_lmdb_makes_its_own_lock_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_arguments: object) -> int:
        raise OSError(1, "EPERM")

    monkeypatch.setattr(lmdb_file.os, "memfd_create", refused)
    with open_environment(tmp_path, map_size=1 << 26) as environment:
        fill(environment)
        read(environment, 3)
        assert (tmp_path / LOCK_FILE).is_file()


def test_a_read_of_what_is_not_in_memory_waits_for_the_disk(disk: HangingDisk) -> None:
    """The world of these tests hangs as a drive does."""
    place = disk.directory / "store"
    place.mkdir()
    environment = open_environment(place, map_size=1 << 26)
    fill(environment)
    environment.close()
    environment = open_environment(place, map_size=1 << 26)
    disk.drop_cache(place / DATA_FILE)
    disk.slow(0.2, READS)
    began = time.monotonic()
    read(environment, ROWS - 1)
    assert time.monotonic() - began >= 0.2
    disk.release()
    environment.close()
