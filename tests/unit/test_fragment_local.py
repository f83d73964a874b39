"""The local disk when things go wrong, and what it gives back."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import errno
import os
import random
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import lmdb
import pytest
import xxhash

from storaged.errors import (
    DirectoryInUse,
    DiskForeign,
    DiskUnusable,
    FragmentDamaged,
    FragmentMissing,
    IndexDamaged,
    OperatorError,
    PeerRefused,
)
from storaged.fragments.compact import Compactor
from storaged.fragments.entry import BROKEN, Entry
from storaged.fragments.files import PosixFiles
from storaged.fragments.index import Index
from storaged.fragments.index_rows import Checkpoint
from storaged.fragments.limits import StoreLimits
from storaged.fragments.offline import check, rebuild_index
from storaged.fragments.ports import FragmentId, Health, Retirement
from storaged.fragments.recovery import Step
from storaged.fragments.store import DiskOwner, LocalFragmentStore
from storaged.lmdb_file import LMDB_DAMAGED, MEDIA_ERRORS
from storaged.units import KIB, MIB
from tests.doubles.files import SimulatedFiles
from tests.patience import GUARD_S
from tests.worlds.fragments import ANY_SPACE, DISK, Made, flip_on_disk, make

RNG = random.Random(11)


@contextlib.asynccontextmanager
async def opened(
    directory: Path, *, files: SimulatedFiles | None = None, limits: StoreLimits | None = None, disk: str = DISK
) -> AsyncIterator[LocalFragmentStore]:
    store = await LocalFragmentStore.open(directory, disk, files=files, limits=limits or ANY_SPACE)
    try:
        yield store
    finally:
        await store.close()


async def put(store: LocalFragmentStore, length: int = 4112, **named: int) -> Made:
    made = make(RNG, length, **named)  # type: ignore[arg-type]
    await store.write(made.header, [made.payload], sync=True)
    return made


async def content(store: LocalFragmentStore, made: Made) -> bytes:
    return b"".join(cell for cell in (await store.read(made.id, 0, 10_000)).cells if cell is not None)


def segment_paths(directory: Path) -> list[Path]:
    return sorted((directory / "segments").iterdir())


def bytes_held(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in segment_paths(directory))


async def test_everything_is_there_after_a_clean_restart_that_replays_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        made = [await put(store, length) for length in (0, 10, 4112, 200_000)]
        await store.retire([Retirement(b"r" * 16, b"owner", 5)])
        await store.touch([made[1].id], 7777)
    async with opened(tmp_path) as store:
        assert store.report.records == 0
        assert [await content(store, one) for one in made] == [one.payload for one in made]
        assert (await store.stat([made[1].id]))[0].created_ms == 7777
        assert await store.retired(5, 10) == [(b"r" * 16, b"owner")]


async def test_a_small_record_costs_less_than_400_bytes_beside_its_payload(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        before = (await store.usage()).bytes_used
        for _ in range(10):
            await put(store, 4112, k=1, m=2)
        assert ((await store.usage()).bytes_used - before) / 10 < 4112 + 400


async def test_concurrent_writes_share_syncs(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        made = [make(RNG) for _ in range(400)]
        await asyncio.gather(*(store.write(one.header, [one.payload], sync=True) for one in made))
        assert store.statistics().syncs < 200
        assert [await content(store, one) for one in made] == [one.payload for one in made]


async def test_two_daemons_on_one_directory_are_refused(tmp_path: Path) -> None:
    async with opened(tmp_path):
        with pytest.raises(DirectoryInUse):
            await LocalFragmentStore.open(tmp_path, DISK)
    async with opened(tmp_path):
        pass


async def test_another_disks_segments_are_refused(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await put(store)
    with pytest.raises(DiskForeign):
        await LocalFragmentStore.open(tmp_path, "ffffffffffffffff")
    shutil.rmtree(tmp_path / "index")
    with pytest.raises(DiskForeign):
        await LocalFragmentStore.open(tmp_path, "ffffffffffffffff")
    shutil.rmtree(tmp_path / "index")
    async with opened(tmp_path) as store:
        assert (await store.usage()).fragments == 1


async def test_segments_of_a_later_version_are_refused_and_left_alone(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        made = await put(store)
    shutil.rmtree(tmp_path / "index")
    path = segment_paths(tmp_path)[0]
    good = path.read_bytes()
    header = bytearray(good[:64])
    header[9] = 2
    header[56:] = xxhash.xxh3_64_digest(bytes(header[:56]))
    path.write_bytes(bytes(header) + good[64:])
    with pytest.raises(OperatorError) as refused:
        await LocalFragmentStore.open(tmp_path, DISK)
    assert "format 2" in str(refused.value)
    assert path.read_bytes()[64:] == good[64:]
    path.write_bytes(good)
    async with opened(tmp_path) as store:
        assert await content(store, made) == made.payload


async def test_an_index_that_was_cut_off_ends_no_process_and_is_made_anew(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        made = [await put(store, 50) for _ in range(300)]
    path = tmp_path / "index" / "data.mdb"
    whole = path.read_bytes()
    for size in (100, 5000, 8192, len(whole) // 2, len(whole) - 4096):
        path.write_bytes(whole[:size])
        try:
            async with opened(tmp_path) as store:
                for one in made:
                    with contextlib.suppress(FragmentDamaged):
                        assert await content(store, one) == one.payload
        except (IndexDamaged, DiskUnusable):
            pass
        assert rebuild_index(tmp_path).records >= len(made)
        async with opened(tmp_path) as store:
            assert [await content(store, one) for one in made] == [one.payload for one in made]


async def test_a_lost_index_is_rebuilt_equal_from_the_segments(tmp_path: Path) -> None:
    limits = StoreLimits(reserve_bytes=1, segment_bytes=128 * KIB, overlay_entries_max=16)
    async with opened(tmp_path, limits=limits) as store:
        made = [await put(store, RNG.choice([50, 4112, 70_000])) for _ in range(60)]
        await store.delete([one.id for one in made[::3]])
        await store.touch([one.id for one in made[1::3]], 9_000)
        for one in made[2::6]:
            await store.write(one.header, [one.payload], sync=True)
        await store.retire([Retirement(b"a" * 16, b"owner-a", 1)])
        await store.retire([Retirement(b"b" * 16, b"owner-b", 2)])
        await store.unretire(b"a" * 16)
        stats = await store.stat([one.id for one in made])
        headers = [header async for header in store.scan()]
    steps: list[Step] = []
    report = await asyncio.to_thread(rebuild_index, tmp_path, progress=steps.append)
    assert report.gaps == []
    assert steps[-1].segments_done == steps[-1].segments == len(segment_paths(tmp_path))
    async with opened(tmp_path, limits=limits) as store:
        assert store.report.records == 0
        assert await store.stat([one.id for one in made]) == stats
        assert [header async for header in store.scan()] == headers
        assert await store.retired(9, 9) == [(b"b" * 16, b"owner-b")]


async def test_an_index_that_is_no_index_says_what_to_do(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        made = await put(store)
    (tmp_path / "index" / "data.mdb").write_bytes(b"not a database" * 1000)
    with pytest.raises(IndexDamaged) as refused:
        await LocalFragmentStore.open(tmp_path, DISK)
    assert "--rebuild-index" in refused.value.hint
    await asyncio.to_thread(rebuild_index, tmp_path)
    async with opened(tmp_path) as store:
        assert await content(store, made) == made.payload


async def test_an_index_entry_that_was_flipped_is_damage_and_never_another_fragment(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        made, other = await put(store), await put(store)
    path = tmp_path / "index" / "data.mdb"
    data = bytearray(path.read_bytes())
    at = data.rfind(made.id.pack())
    data[at + 23 + 7] ^= 1
    path.write_bytes(data)
    async with opened(tmp_path) as store:
        assert (await store.stat([made.id]))[0].health == Health.DAMAGED
        with pytest.raises(FragmentDamaged):
            await store.read(made.id, 0, 1)
        assert await content(store, other) == other.payload
        await store.write(made.header, [made.payload], sync=True)
        assert await content(store, made) == made.payload


async def test_a_segment_that_vanished_makes_its_fragments_missing(tmp_path: Path) -> None:
    limits = StoreLimits(reserve_bytes=1, segment_bytes=64 * KIB)
    async with opened(tmp_path, limits=limits) as store:
        made = [await put(store, 20_000) for _ in range(9)]
    segment_paths(tmp_path)[1].unlink()
    async with opened(tmp_path, limits=limits) as store:
        health = [stat.health for stat in await store.stat([one.id for one in made])]
        assert store.report.lost_segments == [2]
        assert health.count(Health.MISSING) == 3
        assert (await store.usage()).fragments == 6


@pytest.mark.parametrize("at", [0, 1, 2])
async def test_the_end_of_a_segment_that_vanished_makes_its_fragments_missing(tmp_path: Path, at: int) -> None:
    """The index knows them all: the store was closed. What lies before the end stays."""
    limits = StoreLimits(reserve_bytes=1, segment_bytes=64 * KIB)
    async with opened(tmp_path, limits=limits) as store:
        made = [await put(store, 20_000) for _ in range(9)]
    os.truncate(segment_paths(tmp_path)[at], 30_000)
    async with opened(tmp_path, limits=limits) as store:
        health = [stat.health for stat in await store.stat([one.id for one in made])]
        assert [(number, offset) for number, offset, _ in store.report.gaps][:1] == [(at + 1, 30_000)]
        assert health == [Health.MISSING if number // 3 == at and number % 3 else Health.OK for number in range(9)]
        more = [await put(store, 20_000) for _ in range(3)]
        for one in (made[3 * at + 1], made[3 * at + 2]):
            await store.write(one.header, [one.payload], sync=True)
    async with opened(tmp_path, limits=limits) as store:
        for one in (*made, *more):
            assert await content(store, one) == one.payload


def can_punch(directory: Path) -> bool:
    files = PosixFiles(directory)
    probe = files.create(1)
    probe.write([bytes(64 * KIB)], 0)
    probe.sync()
    able = probe.punch(0, 32 * KIB) and probe.allocated() <= 36 * KIB
    files.close()
    return able


async def test_holes_give_the_space_of_large_fragments_back(tmp_path: Path) -> None:
    if not can_punch(tmp_path / "probe"):
        pytest.skip("this file system makes no holes")
    async with opened(tmp_path) as store:
        made = [await put(store, 256 * KIB, cell_bytes=64 * KIB) for _ in range(8)]
        held = bytes_held(tmp_path)
        await store.delete([one.id for one in made[:6]])
        await _eventually(lambda: store.statistics().punched_bytes == 6 * 252 * KIB)  # the whole pages
        assert bytes_held(tmp_path) <= held - 6 * 252 * KIB + 8 * KIB
        assert await content(store, made[7]) == made[7].payload
        assert (await store.usage()).garbage_bytes < 6 * 5 * KIB  # heads, and a page each at both borders


async def _eventually(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(GUARD_S):
        while not condition():  # noqa: ASYNC110  (threads, which set no event)
            await asyncio.sleep(0.01)


async def test_compaction_keeps_what_is_live_and_removes_the_segment(tmp_path: Path) -> None:
    limits = StoreLimits(reserve_bytes=1, segment_bytes=256 * KIB, compact_rest_s=0.02)
    async with opened(tmp_path, limits=limits) as store:
        made = [await put(store, 4112) for _ in range(200)]
        gone = [one for i, one in enumerate(made) if i % 5]
        kept = made[::5]
        await store.delete([one.id for one in gone])
        await _eventually(lambda: store.statistics().compacted_bytes > 0 and not Compactor(store._engine).candidate())
        await _eventually(lambda: store.statistics().segments <= 2)
        assert [await content(store, one) for one in kept] == [one.payload for one in kept]
        await _eventually(lambda: len(segment_paths(tmp_path)) == store.statistics().segments)  # removed by a thread
    await asyncio.to_thread(rebuild_index, tmp_path)
    async with opened(tmp_path, limits=limits) as store:
        assert [header.id async for header in store.scan(limit=1000)] == sorted(one.id.pack() for one in kept)


async def test_compaction_carries_damage_along_as_damage(tmp_path: Path) -> None:
    limits = StoreLimits(reserve_bytes=1, segment_bytes=64 * KIB, compact_rest_s=0.02)
    files = SimulatedFiles()
    async with opened(tmp_path, files=files, limits=limits) as store:
        made = [await put(store, 3 * 4096) for _ in range(10)]
        disk = files.disks[1]
        at = disk.now.find(made[0].cells[1])
        disk.now[at] ^= 1
        disk.durable[at] ^= 1
        await store.delete([one.id for one in made[1:6]])
        await _eventually(lambda: 1 not in files.disks)
        found = await store.read(made[0].id, 0, 9)
        assert [None if cell is None else bytes(cell) for cell in found.cells] == [
            made[0].cells[0],
            None,
            made[0].cells[2],
        ]


async def test_a_start_without_room_for_the_index_serves_and_writes_the_index_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replay bounds its memory by checkpoints. One that failed took the node with all its disks."""
    async with opened(tmp_path) as store:
        made = [await put(store, 100) for _ in range(20)]
    shutil.rmtree(tmp_path / "index")

    def no_room(_index: Index, _checkpoint: Checkpoint) -> None:
        raise lmdb.MapFullError("the map is full")

    monkeypatch.setattr(Index, "commit", no_room)
    async with opened(tmp_path, limits=StoreLimits(reserve_bytes=1, overlay_entries_max=4)) as store:
        assert (await store.usage()).state == "full"
        assert [await content(store, one) for one in made] == [one.payload for one in made]
        with pytest.raises(DiskUnusable, match="checkpoint of the fragment index"):
            await put(store, 100)
        await store.delete([made[0].id])
        monkeypatch.undo()
        await _eventually(lambda: store.statistics().usage.state == "ok")
        more = await put(store, 100)
    async with opened(tmp_path) as store:
        assert store.report.records == 0
        assert [await content(store, one) for one in (*made[1:], more)] == [one.payload for one in (*made[1:], more)]
        with pytest.raises(FragmentMissing):
            await content(store, made[0])


async def test_a_start_whose_index_the_disk_refuses_is_an_error_of_that_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as store:
        for _ in range(20):
            await put(store, 100)
    shutil.rmtree(tmp_path / "index")

    def refused(_index: Index, _checkpoint: Checkpoint) -> None:
        raise lmdb.DiskError("mdb_txn_commit: Input/output error")

    monkeypatch.setattr(Index, "commit", refused)
    with pytest.raises(DiskUnusable, match="index can't be written"):
        async with opened(tmp_path, limits=StoreLimits(reserve_bytes=1, overlay_entries_max=4)):
            pass
    with pytest.raises(DiskUnusable, match=r"index\.new can't be written"):
        await asyncio.to_thread(rebuild_index, tmp_path)


def _of_system(kind: type[lmdb.Error], code: int) -> lmdb.Error:
    """As LMDB's binding makes it of an error of the system."""
    error = kind(f"mdb_txn_commit: {os.strerror(code)}")
    error.code = code  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (_of_system(lmdb.DiskError, errno.ENOSPC), "the disk is full: it has no room for the fragment index"),
        (_of_system(lmdb.Error, errno.EDQUOT), "the disk is full: it has no room for the fragment index"),
        (lmdb.MapFullError("the map is full"), "the disk is full: it has no room for the fragment index"),
        (_of_system(lmdb.MemoryError, errno.ENOMEM), "can't be opened"),
        (_of_system(lmdb.Error, errno.EMFILE), "can't be opened"),
        (_of_system(lmdb.ReadonlyError, errno.EACCES), "can't be opened"),
    ],
)
async def test_an_index_that_finds_no_room_or_permission_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: lmdb.Error, said: str
) -> None:
    """Its bytes are whole. To make the index anew would need as much room, and would read the whole disk."""
    async with opened(tmp_path) as store:
        made = await put(store)

    def fails(*_arguments: object, **_options: object) -> None:
        raise error

    with monkeypatch.context() as failing:
        failing.setattr("storaged.fragments.index.open_environment", fails)
        with pytest.raises(DiskUnusable, match=said):
            await LocalFragmentStore.open(tmp_path, DISK)
        for offline in (check, rebuild_index):
            with pytest.raises(DiskUnusable, match=said):
                await asyncio.to_thread(offline, tmp_path)
    async with opened(tmp_path) as store:
        assert await content(store, made) == made.payload


async def test_a_disk_that_never_got_a_fragment_is_checked_and_its_index_made_anew(tmp_path: Path) -> None:
    """No segment says which disk it is, nor does an index without a checkpoint."""
    async with opened(tmp_path):
        pass
    found = await asyncio.to_thread(check, tmp_path)
    assert (found.disk_id, found.fragments, found.damaged, found.gaps, found.lost_segments) == ("", 0, [], [], [])
    assert (await asyncio.to_thread(rebuild_index, tmp_path)).records == 0
    (tmp_path / "index" / "data.mdb").write_bytes(b"not a database" * 1000)
    with pytest.raises(IndexDamaged):
        await asyncio.to_thread(check, tmp_path)
    await asyncio.to_thread(rebuild_index, tmp_path)
    async with opened(tmp_path) as store:
        made = await put(store)
    assert (await asyncio.to_thread(check, tmp_path)).disk_id == DISK
    async with opened(tmp_path) as store:
        assert await content(store, made) == made.payload


async def test_a_disk_whose_segments_are_all_gone_is_checked_by_what_its_index_says(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await put(store)
    for path in segment_paths(tmp_path):
        path.unlink()
    found = await asyncio.to_thread(check, tmp_path)
    assert (found.disk_id, found.lost_segments) == (DISK, [1])


async def test_segments_without_a_header_are_checked_by_the_id_in_the_index(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        made = await put(store)
    for path in segment_paths(tmp_path):
        path.write_bytes(bytes(64) + path.read_bytes()[64:])
    found = await asyncio.to_thread(check, tmp_path)
    assert (found.disk_id, found.fragments, found.damaged) == (DISK, 1, [])
    await asyncio.to_thread(rebuild_index, tmp_path)
    async with opened(tmp_path) as store:
        assert await content(store, made) == made.payload
    shutil.rmtree(tmp_path / "index")
    for offline in (check, rebuild_index):
        (tmp_path / "index").mkdir(exist_ok=True)
        with pytest.raises(IndexDamaged, match="nothing says which disk"):
            await asyncio.to_thread(offline, tmp_path)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EACCES])
async def test_a_file_system_that_syncs_no_directory_does_not_have_a_disk_count_as_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """All disks of a cluster may meet that at once, after an upgrade."""
    async with opened(tmp_path) as store:
        made = await put(store)

    def refuse(_files: PosixFiles) -> None:
        raise OSError(code, os.strerror(code))

    noted: list[str] = []
    owner = DiskOwner(note_failed=lambda reason: bool(noted.append(reason)))
    with monkeypatch.context() as refusing:
        refusing.setattr(PosixFiles, "sync_directory", refuse)
        with pytest.raises(DiskUnusable, match="directory of the segments can't be synced"):
            await LocalFragmentStore.open(tmp_path, DISK, limits=ANY_SPACE, owner=owner)
    assert (noted, (tmp_path / "FAILED").exists()) == ([], False)
    async with opened(tmp_path) as store:
        assert (await store.usage()).state == "ok"
        assert await content(store, made) == made.payload


async def test_an_index_that_the_drive_can_not_read_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_arguments: object, **_options: object) -> None:
        raise _of_system(lmdb.Error, errno.EIO)

    monkeypatch.setattr("storaged.fragments.index.open_environment", fails)
    with pytest.raises(IndexDamaged, match="cannot be read"):
        await LocalFragmentStore.open(tmp_path, DISK)


@pytest.mark.parametrize("error", LMDB_DAMAGED)
async def test_a_start_whose_index_is_damaged_inside_goes_on_or_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[lmdb.Error]
) -> None:
    """LMDB finds damage when it reads the page. An error of its own would end the node with all its disks."""
    async with opened(tmp_path) as store:
        made = await put(store)
        index = store._index
        index.checkpoint_now(store._engine.log.end)

        class Damaged:
            def begin(self, **_options: object) -> None:
                raise error("damaged")

        real, index._env = index._env, Damaged()
        assert index.lookup(made.id.pack()) is BROKEN
        index._env = real

    def unreadable(_index: Index, _key: bytes, _entry: Entry) -> None:
        raise error("damaged")

    shutil.rmtree(tmp_path / "index")
    monkeypatch.setattr(Index, "put", unreadable)
    with pytest.raises(IndexDamaged, match="cannot be read: damaged"):
        async with opened(tmp_path):
            pass


async def test_an_index_that_lmdb_gave_up_is_an_error_of_that_disk(tmp_path: Path) -> None:
    """LMDB refuses even reads after it could not write one of its first pages."""

    class GivenUp:
        def begin(self, **_options: object) -> None:
            raise lmdb.PanicError("mdb_txn_begin: MDB_PANIC")

    async with opened(tmp_path) as store:
        made = await put(store)
        index = store._index
        index.checkpoint_now(store._engine.log.end)
        real, index._env = index._env, GivenUp()
        try:
            for ask in (
                lambda: store.read(made.id, 0, 1),
                lambda: store.stat([made.id]),
                lambda: store.fragments_of([made.id.data_id]),
                lambda: store.retired(10, 10),
                lambda: anext(store.scan()),
                lambda: store.locate_copy(b"d" * 16),
            ):
                with pytest.raises(DiskUnusable, match="can't be read before a restart"):
                    await ask()
            assert not store.holds_copy(b"d" * 16, False)
            assert store.try_read_copy(b"d" * 16) is None
        finally:
            index._env = real


async def test_a_full_disk_refuses_fragments_and_still_deletes(tmp_path: Path) -> None:
    files = SimulatedFiles()
    files.limit = 4 * MIB
    limits = StoreLimits(segment_bytes=512 * KIB, reserve_bytes=MIB, note_reserve_bytes=64 * KIB)
    async with opened(tmp_path, files=files, limits=limits) as store:
        made = [await put(store, 100_000) for _ in range(28)]

        async def fill() -> None:
            for _ in range(30):
                await put(store, 100_000)

        with pytest.raises(DiskUnusable) as refused:
            await fill()
        assert refused.value.details["state"] == "full"
        files.used += 100_000  # somebody else's: less than the reserve is free now, not only too little for one more
        assert (await store.usage()).state == "full"
        assert await content(store, made[0]) == made[0].payload
        assert await store.delete([one.id for one in made[:25]]) == 25
        await _eventually(lambda: store.statistics().usage.state == "ok")
        await put(store, 100_000)
        assert await content(store, made[-1]) == made[-1].payload


async def test_what_was_not_durable_when_a_disk_failed_is_not_called_so_after_a_restart(tmp_path: Path) -> None:
    files = SimulatedFiles()
    async with opened(tmp_path, files=files) as store:
        before, made = await put(store), make(RNG)
        await store.write(made.header, [made.payload])
        files.fail["sync"] = 0
        with pytest.raises(DiskUnusable):
            await store.sync([made.id])
    async with opened(tmp_path, files=files) as store:
        assert await content(store, before) == before.payload
        with pytest.raises(DiskUnusable):
            await store.sync([made.id])


async def test_deletes_use_the_reserve_when_somebody_else_has_filled_the_disk(tmp_path: Path) -> None:
    files = SimulatedFiles()
    files.limit = 4 * MIB
    limits = StoreLimits(reserve_bytes=0, note_reserve_bytes=64 * KIB)
    async with opened(tmp_path, files=files, limits=limits) as store:
        made = await put(store)
        files.used += files.free
        assert files.free == 0
        with pytest.raises(DiskUnusable) as refused:
            await put(store)
        assert refused.value.details["state"] == "full"
        assert await store.delete([made.id]) == 1
        assert files.reserved == 0
        assert (await store.usage()).state != "read-only"


async def test_deletes_use_the_reserve_for_a_new_segment_too(tmp_path: Path) -> None:
    files = SimulatedFiles()
    files.limit = 4 * MIB
    limits = StoreLimits(segment_bytes=64 * KIB, reserve_bytes=0, note_reserve_bytes=64 * KIB)
    async with opened(tmp_path, files=files, limits=limits) as store:
        made = [await put(store, 6000) for _ in range(10)]
        ages = iter(range(2000, 3000))
        while limits.segment_bytes - len(files.disks[1].now) > 200:
            await store.touch([made[0].id], next(ages))
        files.used += files.free
        assert await store.delete([one.id for one in made[:5]]) == 5
        assert files.reserved == 0
        with pytest.raises(FragmentMissing):
            await store.read(made[0].id, 0, 1)


async def test_a_write_that_finds_no_space_is_taken_back_whole(tmp_path: Path) -> None:
    files = SimulatedFiles()
    files.limit = MIB
    limits = StoreLimits(reserve_bytes=0, note_reserve_bytes=0)
    async with opened(tmp_path, files=files, limits=limits) as store:
        made = await put(store)
        space = files.space
        # the check before the write sees room
        files.space = lambda: space()._replace(free=1 << 40)  # type: ignore[method-assign]
        with pytest.raises(DiskUnusable):
            await put(store, 2 * MIB)
        again = await put(store, 100)
        assert await content(store, made) == made.payload
        assert await content(store, again) == again.payload


@pytest.mark.parametrize("time_ms", [-1, 2**64 - 1])
async def test_a_time_that_the_index_cannot_hold_is_refused_and_harms_nothing(tmp_path: Path, time_ms: int) -> None:
    async with opened(tmp_path) as store:
        made = await put(store)
        with pytest.raises(PeerRefused):
            await store.touch([made.id], time_ms)
        with pytest.raises(PeerRefused):
            await store.retire([Retirement(made.id.data_id, b"owner", time_ms)])
        await store.touch([made.id], 1)
        await store.retire([Retirement(made.id.data_id, b"owner", 1)])
    async with opened(tmp_path) as store:
        assert (await store.usage()).state == "ok"


@pytest.mark.parametrize("kind", ["write", "sync"])
async def test_a_failed_write_or_sync_makes_the_disk_read_only_for_good(tmp_path: Path, kind: str) -> None:
    files = SimulatedFiles()
    async with opened(tmp_path, files=files) as store:
        made = await put(store)
        files.fail[kind] = 0
        with pytest.raises(DiskUnusable) as refused:
            await put(store)
        assert refused.value.details["state"] == "read-only"
        files.fail.clear()
        for attempt in (
            store.delete([made.id]),
            store.touch([made.id], 5),
            store.retire([Retirement(b"x" * 16, b"", 0)]),
            put(store),
        ):
            with pytest.raises(DiskUnusable):
                await attempt
        usage = await store.usage()
        assert usage.state == "read-only"
        assert kind in usage.reason
        assert await content(store, made) == made.payload
    async with opened(tmp_path, files=files) as store:
        with pytest.raises(DiskUnusable):
            await put(store)
        assert await content(store, made) == made.payload


async def test_nothing_is_acknowledged_by_a_sync_that_failed(tmp_path: Path) -> None:
    files = SimulatedFiles()
    async with opened(tmp_path, files=files) as store:
        first = make(RNG)
        await store.write(first.header, [first.payload])
        files.fail["sync"] = 0
        with pytest.raises(DiskUnusable):
            await store.sync([first.id])
        with pytest.raises(DiskUnusable):
            await store.sync([first.id])


async def test_a_bad_sector_costs_one_cell(tmp_path: Path) -> None:
    files = SimulatedFiles()
    reports: list[tuple[FragmentId, int]] = []
    store = await LocalFragmentStore.open(
        tmp_path,
        DISK,
        files=files,
        owner=DiskOwner(on_damage=lambda fragment, cell: reports.append((fragment, cell))),
    )
    made = await put(store, 5 * 4096)
    at = files.disks[1].now.find(made.cells[3])
    files.unreadable.append((1, at + 100, at + 612))
    found = await store.read(made.id, 0, 5)
    assert ([cell is None for cell in found.cells], found.unread) == ([False, False, False, True, False], True)
    await store.read(made.id, 0, 5)
    await asyncio.sleep(0)
    assert reports == [(made.id, 3)]
    files.unreadable[0] = (1, 64, 200)
    with pytest.raises(FragmentDamaged) as caught:
        await store.read(made.id, 0, 1)
    assert caught.value.unread
    files.unreadable.clear()
    again = await store.read(made.id, 0, 5)
    assert (again.cells[3], again.unread) == (made.cells[3], False)
    assert [stat.health for stat in await store.stat([made.id])] == [Health.DAMAGED]
    await store.close()


@pytest.mark.parametrize("code", sorted(MEDIA_ERRORS))
async def test_a_head_in_a_bad_sector_ends_no_walk_through_the_log(tmp_path: Path, code: int) -> None:
    files = SimulatedFiles()
    store = await LocalFragmentStore.open(tmp_path, DISK, files=files)
    made = [await put(store, 500) for _ in range(3)]
    place = store._engine.index.lookup(made[1].id.pack())
    assert place is not None
    files.unreadable.append((place.segment, place.offset, place.offset + 8))
    files.media_error = code
    found, after = list[bytes](), b""
    while True:
        page, after = await store.in_log_order(after, 100)
        if not after:
            break
        found += [header.id for header, _ in page]
    assert set(found) == {one.id.pack() for one in made}
    files.unreadable.clear()
    await store.close()


async def test_known_damage_survives_a_restart_until_it_is_repaired(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        made = await put(store, 3 * 4096)
    path = segment_paths(tmp_path)[0]
    data = bytearray(path.read_bytes())
    data[data.find(made.cells[1]) + 9] ^= 4
    path.write_bytes(data)
    async with opened(tmp_path) as store:
        assert (await store.verify(made.id)).health == Health.DAMAGED
    async with opened(tmp_path) as store:
        assert (await store.stat([made.id]))[0].health == Health.DAMAGED
        await store.write(made.header, [made.payload], sync=True)
    async with opened(tmp_path) as store:
        assert (await store.stat([made.id]))[0].health == Health.OK


async def test_check_names_the_damaged_fragment_and_changes_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        made, other = await put(store, 3 * 4096), await put(store)
        await store.delete([other.id])
    clean = await asyncio.to_thread(check, tmp_path)
    assert (clean.fragments, clean.damaged, clean.gaps) == (1, [], [])
    path = segment_paths(tmp_path)[0]
    data = bytearray(path.read_bytes())
    data[data.find(made.cells[2]) + 5] ^= 1
    data[data.find(other.header.part_header)] ^= 1
    path.write_bytes(data)
    found = await asyncio.to_thread(check, tmp_path)
    assert found.damaged == [(made.id, (2,))]
    assert len(found.gaps) == 1
    assert path.read_bytes() == data


async def test_a_caller_that_gives_up_gets_its_buffers_back_untouched(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        made = [make(RNG, 100_000) for _ in range(20)]
        tasks = [asyncio.ensure_future(store.write(one.header, [one.payload])) for one in made]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(task.cancelled() for task in tasks[::2])
        assert [await content(store, one) for one in made[1::2]] == [one.payload for one in made[1::2]]
        assert all(stat.health != Health.DAMAGED for stat in await store.stat([one.id for one in made]))
        assert store.statistics().queued_bytes == 0


async def test_writes_beyond_the_queues_bound_wait_their_turn(tmp_path: Path) -> None:
    async with opened(tmp_path, limits=StoreLimits(reserve_bytes=1, queue_bytes_max=150_000)) as store:
        made = [make(RNG, 100_000) for _ in range(12)]
        await asyncio.gather(*(store.write(one.header, [one.payload]) for one in made))
        assert [await content(store, one) for one in made] == [one.payload for one in made]
        assert store.statistics().queued_bytes == 0


async def test_a_closed_store_says_so(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        made = await put(store)
    for attempt in (
        store.read(made.id, 0, 1),
        store.sync([made.id]),
        store.stat([made.id]),
        put(store),
        store.delete([made.id]),
    ):
        with pytest.raises(DiskUnusable):
            await attempt


async def test_a_killed_process_loses_nothing_that_was_synced_and_the_rest_cleanly(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    async with opened(tmp_path / "disk") as store:
        synced = [await put(store) for _ in range(20)]
        shutil.copytree(tmp_path / "disk", copy)
        late = await put(store)
    async with opened(copy) as store:
        assert [await content(store, one) for one in synced] == [one.payload for one in synced]
        with pytest.raises(FragmentMissing):
            await store.sync([late.id])


async def test_a_disk_whose_directory_is_gone_is_read_only_and_says_so(tmp_path: Path) -> None:
    """An unmounted or removed disk is a state to report: asking it how full it is must not end the process that has
    other disks.
    """
    place = tmp_path / "disk"
    async with opened(place) as store:
        made = await put(store)
        assert (await store.usage()).state == "ok"
        shutil.rmtree(place)
        usage = await store.usage()
        assert (usage.state, usage.bytes_free) == ("read-only", 0)
        assert "directory does not answer" in usage.reason
        with pytest.raises(DiskUnusable):
            await put(store)
        assert await content(store, made) == made.payload
        assert store.statistics().usage.state == "read-only"


@pytest.mark.usefixtures("cached_reads")
async def test_a_fragment_of_a_block_is_read_without_waiting_while_it_is_cached_and_whole(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        made = await put(store, 12 * 64 * KIB, cell_bytes=64 * KIB)
        found = store.try_read(made.id)
        assert found is not None
        assert found == await store.read(made.id, 0, 12)
        assert found.whole == b"".join(cell for cell in found.cells if cell is not None) == made.payload
        some = store.try_read(made.id, 3, 2)
        assert some is not None
        assert some.whole == made.payload[3 * 64 * KIB : 5 * 64 * KIB]
        large = await put(store, 17 * 64 * KIB, cell_bytes=64 * KIB)
        assert store.try_read(large.id) is None  # it would hold up others
        assert await content(store, large) == large.payload
        flip_on_disk(tmp_path, made, 2)
        assert store.try_read(made.id) is None
        assert [cell is None for cell in (await store.read(made.id, 0, 12)).cells] == [
            number == 2 for number in range(12)
        ]


async def test_a_write_that_waits_for_room_while_the_store_closes_is_refused(tmp_path: Path) -> None:
    store = await LocalFragmentStore.open(tmp_path, DISK, limits=StoreLimits(reserve_bytes=1, queue_bytes_max=10_000))
    writes = [asyncio.create_task(put(store, 9_000)) for _ in range(5)]
    await asyncio.sleep(0)
    await store.close()
    await asyncio.wait_for(writes[0], GUARD_S)
    for write in writes[1:]:
        with pytest.raises(DiskUnusable):
            await asyncio.wait_for(write, GUARD_S)


@pytest.mark.parametrize(("length", "cell_bytes"), [(4112, 8192), (9000, 4096)])
async def test_a_copy_in_memory_is_told_when_every_byte_of_its_record_holds(
    tmp_path: Path, length: int, cell_bytes: int
) -> None:
    """Each byte is flipped in turn, up to the end of the payload; what follows it is not read."""
    made = make(RNG, length, k=1, m=2, cell_bytes=cell_bytes)
    async with opened(tmp_path) as store:
        await store.write(made.header, [made.payload], sync=True)
        found = store.try_read_copy(made.id.data_id)
        if found is None:
            pytest.skip("this file system can't tell what is in memory")
        assert bytes(found) == made.payload
        assert store.try_read_copy(bytes(16)) is None
        [path] = segment_paths(tmp_path)
        data = path.read_bytes()
        payload_at = data.index(made.payload)
        begin = data.rindex(b"SOR1", 0, payload_at)
        positions = [*range(begin, payload_at), payload_at, payload_at + cell_bytes // 2, payload_at + length - 1]
        padding = {at for at in range(payload_at - 7, payload_at) if not any(data[at:payload_at])}
        with path.open("r+b", buffering=0) as file:
            for at in positions:
                file.seek(at)
                file.write(bytes([data[at] ^ 0x10]))
                assert (store.try_read_copy(made.id.data_id) is not None) == (at in padding), at - begin
                file.seek(at)
                file.write(data[at : at + 1])
        assert store.try_read_copy(made.id.data_id) == made.payload


async def test_a_caller_that_is_cancelled_in_the_turn_that_brings_its_answer_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as store:
        made, resolve = make(RNG), store._queue.resolve
        writing = asyncio.ensure_future(store.write(made.header, [made.payload], sync=True))
        monkeypatch.setattr(store._queue, "resolve", lambda *arguments: (writing.cancel(), resolve(*arguments)))
        await asyncio.wait((writing,), timeout=GUARD_S)
        assert writing.cancelled()
        assert store.statistics().queued_bytes == 0


async def test_what_was_synced_apart_is_damaged_and_not_torn_when_it_does_not_hold(tmp_path: Path) -> None:
    """Nobody else synced the segment: the head of a later record says how far it was durable."""
    files = SimulatedFiles()
    store = await LocalFragmentStore.open(tmp_path, DISK, files=files)
    first, second = make(RNG), make(RNG)
    await store.write(first.header, [first.payload])
    store.sync_apart()
    await store.write(second.header, [second.payload])
    left = SimulatedFiles()
    left.disks = copy.deepcopy(files.disks)
    await store.close()
    [disk] = left.disks.values()
    disk.now[disk.now.index(first.payload) + 100] ^= 1
    (tmp_path / "again").mkdir()
    async with opened(tmp_path / "again", files=left) as found:
        assert found.report.torn_bytes == 0
        assert (await found.verify(first.id)).health == Health.DAMAGED
        assert await content(found, second) == second.payload


@pytest.mark.parametrize("lasting", [False, True])
async def test_what_is_to_be_believed_after_a_restart_is_synced_apart_also_on_a_disk_that_takes_no_writes(
    tmp_path: Path, lasting: bool
) -> None:
    files = SimulatedFiles()
    async with opened(tmp_path, files=files) as store:
        made = make(RNG)
        await store.write(made.header, [made.payload])
        store._engine.state.fail("a reason", lasting=lasting)
        store.sync_apart()
        [disk] = files.disks.values()
        assert (made.payload in disk.durable) is not lasting
        files.fail["sync"] = 0
        store.sync_apart()
        assert ("simulated failure" in files.failed) is not lasting


async def test_a_segment_that_is_gone_from_under_the_disk_was_not_synced(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await put(store)
        (tmp_path / "segments").rename(tmp_path / "elsewhere")
        store.sync_apart()
        assert (await store.usage()).state == "read-only"


async def test_where_the_log_does_not_parse_a_page_is_no_longer_than_elsewhere(tmp_path: Path) -> None:
    """Twelve heads in a row are damaged, of which the index knows; each fragment comes once."""
    async with opened(tmp_path) as store:
        made = [await put(store, 500) for _ in range(30)]
        places = [store._engine.index.lookup(one.id.pack()) for one in made]
    (path,) = segment_paths(tmp_path)
    data = bytearray(path.read_bytes())
    for place in places[9:21]:
        assert place is not None
        data[place.offset + 1] ^= 1
    path.write_bytes(data)
    async with opened(tmp_path) as store:
        found, after = list[bytes](), b""
        while True:
            page, after = await store.in_log_order(after, 5)
            if not after:
                break
            assert len(page) <= 5
            found += [header.id for header, _ in page]
        assert found == [one.id.pack() for one in made]
        _, middle = await store.in_log_order(b"", 11)
        page, _ = await store.in_log_order(middle, 5)
        assert page[0][0].id == made[9].id.pack(), "a page ends before what does not parse"
        rest, _ = await store.in_log_order(page[2][1], 5)
        assert rest[0][0].id == made[12].id.pack(), "any place is one to go on from"


async def test_a_walk_through_the_log_misses_no_fragment_whose_head_or_entry_is_damaged(tmp_path: Path) -> None:
    limits = StoreLimits(reserve_bytes=1, segment_bytes=64 * KIB)
    async with opened(tmp_path, limits=limits) as store:
        made = [await put(store, 20_000) for _ in range(9)]
        place = store._engine.index.lookup(made[1].id.pack())
        assert place is not None
    path = segment_paths(tmp_path)[place.segment - 1]
    data = bytearray(path.read_bytes())
    data[place.offset + 1] ^= 1
    path.write_bytes(data)
    index = tmp_path / "index" / "data.mdb"
    rows = bytearray(index.read_bytes())
    rows[rows.rfind(made[4].id.pack()) + 23 + 7] ^= 1
    index.write_bytes(rows)
    async with opened(tmp_path, limits=limits) as store:
        found, after = set[bytes](), b""
        while True:
            page, after = await store.in_log_order(after, 2)
            if not after:
                break
            found |= {header.id for header, _ in page}
        assert found == {one.id.pack() for one in made}
        healths = [(await store.verify(one.id)).health for one in made]
        assert [number for number, health in enumerate(healths) if health != Health.OK] == [1, 4]
