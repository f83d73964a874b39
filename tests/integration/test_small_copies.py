"""Small copies and the records that name them, over both bodies: coroutines beside a store in memory, and a disk's own
log and LMDB environment.
"""

from __future__ import annotations

import asyncio
import errno
import random
import shutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import pytest

from storaged.clock import SystemClock
from storaged.errors import DiskUnusable, SlowDown, StoragedError
from storaged.fragments import deferred as deferred_module
from storaged.fragments.payloads import COPY_BYTES_MAX
from storaged.hashes import transfer_checksum
from storaged.meta import messages
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.consensus.register import Verdict
from storaged.meta.names import ZERO_BALLOT, Ballot, RegisterName, Table, Value, Visibility
from storaged.meta.storage import checkpoint, write_queue
from storaged.meta.storage.small_copies import ENTRY_BYTES, PlainCopies, SmallCopyCache
from storaged.meta.store_ports import Copies, Copy, MetaStore, StoreBatch, StoreFull
from storaged.node import disks
from storaged.node.disks import LOGGED_BYTES_MAX, restore_copies
from storaged.units import KIB
from storaged.wire import Buffer, encode
from tests.doubles.files import SimulatedFile, SimulatedFiles
from tests.doubles.meta_store import MemoryMetaStore
from tests.patience import GUARD_S
from tests.worlds.authority import until
from tests.worlds.disk import LogDisk, died
from tests.worlds.fragments import make

SCOPE = b"s" * 16
NAME = RegisterName(Table.OBJECT, SCOPE, 3, b"key")
OTHER = RegisterName(Table.OBJECT, SCOPE, 3, b"other")
RNG = random.Random(5)


@dataclass(frozen=True)
class Small:
    """A small object's copy: its data id, its encoded fragment header, its payload."""

    data_id: bytes
    header: bytes
    payload: bytes


def small(length: int = 100) -> Small:
    made = make(RNG, length, k=1, m=2)
    return Small(made.id.data_id, encode(made.header), made.payload)


class Disk(Protocol):
    """What a test does to a body. ``hold``: no record gets to its disk until ``go_on``."""

    meta: MetaStore
    copies: Copies

    def set_full(self, full: bool) -> None: ...

    def hold(self) -> None: ...

    def go_on(self) -> None: ...

    async def close(self) -> None: ...


class PlainDisk:
    def __init__(self, _directory: Path) -> None:
        self._held: dict[bytes, memoryview] = {}
        self._full = False
        self._open = asyncio.Event()
        self._open.set()
        self.meta = MemoryMetaStore(sync=self._sync)
        self.copies = PlainCopies(self.meta, self._store, self._load, holds=self._holds)

    async def _sync(self) -> None:
        await self._open.wait()

    async def _store(self, header: bytes, body: Sequence[Buffer], _check: bytes) -> None:
        if self._full:
            raise DiskUnusable("the disk is full")
        self._held[header] = memoryview(b"".join(body))

    async def _load(self, data_id: bytes) -> Copy | None:
        return next((Copy(header, payload) for header, payload in self._held.items() if data_id in header), None)

    def _holds(self, data_id: bytes, _was_durable: bool) -> bool:
        return any(data_id in header for header in self._held)

    def set_full(self, full: bool) -> None:
        self._full = full

    def hold(self) -> None:
        self._open.clear()

    def go_on(self) -> None:
        self._open.set()

    async def close(self) -> None:
        await self.meta.close()


@pytest.fixture(params=["plain", "log", "segment"])
async def disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Disk]:
    """``segment``: a disk's log and LMDB, where each copy is synced in its segment before its record is written."""
    (tmp_path / "fragments").mkdir()
    if request.param == "segment":
        monkeypatch.setattr(disks, "LOGGED_BYTES_MAX", 0)
    opened: Disk = PlainDisk(tmp_path) if request.param == "plain" else await LogDisk.opened(tmp_path)
    yield opened
    await opened.close()


@pytest.fixture(autouse=True)
def _no_checkpoint_but_those_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine makes them a second after a write."""
    monkeypatch.setattr(checkpoint, "CHECKPOINT_S", 3600.0)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "fragments").mkdir()
    return tmp_path


def ballot(counter: int) -> Ballot:
    return Ballot(1, counter, "gw", b"incarnat")


def value(copy: Small, body: bytes = b"v") -> Value:
    return Value(1, b"o" * 16, Visibility.LIVE, body, copy.data_id)


def with_copy(at: Ballot, copy: Small, name: RegisterName = NAME, *, identity: bool = False) -> messages.Accept:
    return messages.Accept("d", name, at, value(copy), b"", identity, copy.header)


async def settle_tasks() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def payload_at(replica: LocalReplica, name: RegisterName = NAME) -> tuple[bytes, bytes]:
    reply, body = await replica.read(messages.Read("d", name, 1, want_payload=True))
    return reply.payload, bytes(body)


async def test_a_copy_comes_with_the_accept_and_is_stored_only_where_that_is_not_refused(disk: Disk) -> None:
    replica, first, second = LocalReplica("d", disk.meta, copies=disk.copies), small(), small()
    await replica.prepare(messages.Prepare("d", NAME, ballot(10)))
    accepted = await replica.accept(with_copy(ballot(10), first), [first.payload[:3], first.payload[3:]])
    refused = await replica.accept(with_copy(ballot(9), second), [second.payload])
    assert (accepted.verdict, accepted.copy_synced) == (Verdict.OK, True)
    assert (refused.verdict, refused.copy_synced) == (Verdict.PREEMPTED, False)
    assert await disk.copies.load(second.data_id) is None
    assert await payload_at(replica) == (first.data_id, first.payload)


async def test_where_the_copy_cannot_be_stored_nothing_is_accepted_not_even_by_a_settling_round(disk: Disk) -> None:
    replica, copy = LocalReplica("d", disk.meta, copies=disk.copies), small()
    disk.set_full(True)
    refused = await replica.accept(with_copy(ballot(10), copy), [copy.payload])
    assert (refused.verdict, refused.copy_synced, "full" in refused.copy_error) == (Verdict.UNSTORED, False, True)
    assert disk.meta.get(NAME) is None
    settled = await replica.accept(with_copy(ballot(11), copy, identity=True), [copy.payload])
    assert (settled.verdict, settled.copy_synced, "full" in settled.copy_error) == (Verdict.UNSTORED, False, True)
    bare = messages.Accept("d", NAME, ballot(11), value(copy), b"", True)
    assert (await replica.accept(bare)).verdict == Verdict.UNSTORED
    assert disk.meta.get(NAME) is None
    disk.set_full(False)
    again = await replica.accept(with_copy(ballot(12), copy), [copy.payload])
    assert (again.verdict, again.copy_synced, replica.statistics().state) == (Verdict.OK, True, "ok")
    assert await payload_at(replica) == (copy.data_id, copy.payload)
    slot = disk.meta.get(NAME)
    assert slot is not None
    assert slot.copied


async def test_a_copy_that_the_drive_cannot_read_is_not_reported_as_absent(directory: Path) -> None:
    files = SimulatedFiles()
    disk = await LogDisk.opened(directory, files=files)
    replica, copy = LocalReplica("d", disk.meta, copies=disk.copies), small()
    assert (await replica.accept(with_copy(ballot(10), copy), [copy.payload])).verdict == Verdict.OK
    await disk.fragments.stat([])
    assert await payload_at(replica) == (copy.data_id, copy.payload)
    files.unreadable.append((1, 0, 1 << 30))
    unread, _ = await replica.read(messages.Read("d", NAME, 1, want_payload=True))
    assert (unread.payload, unread.copy_absent) == (b"", False)
    files.unreadable.clear()
    assert await payload_at(replica) == (copy.data_id, copy.payload)
    at = files.disks[1].now.find(copy.payload)
    files.disks[1].now[at] ^= 1
    damaged, _ = await replica.read(messages.Read("d", NAME, 1, want_payload=True))
    assert (damaged.payload, damaged.copy_absent) == (b"", True)
    await disk.close()


async def test_a_row_that_names_a_copy_is_written_without_one_where_the_copy_is_durable(disk: Disk) -> None:
    replica, copy, other = LocalReplica("d", disk.meta, copies=disk.copies), small(), small()
    assert (await replica.accept(with_copy(ballot(10), copy), [copy.payload])).verdict == Verdict.OK
    kept = await replica.accept(messages.Accept("d", NAME, ballot(11), value(copy, b"tagged")))
    assert (kept.verdict, kept.copy_synced) == (Verdict.OK, True)
    slot = disk.meta.get(NAME)
    assert slot is not None
    assert slot.copied
    refused = await replica.accept(messages.Accept("d", NAME, ballot(12), value(other)))
    assert (refused.verdict, refused.copy_synced) == (Verdict.UNSTORED, False)
    promise = await replica.prepare(messages.Prepare("d", NAME, ballot(13)))
    reply, _ = await replica.read(messages.Read("d", NAME, 1))
    assert (promise.accepted, promise.copied, reply.copied) == (ballot(11), True, True)


async def test_what_is_no_copy_is_refused_and_its_replica_goes_on(directory: Path) -> None:
    disk = await LogDisk.opened(directory)
    replica, copy = LocalReplica("d", disk.meta, copies=disk.copies), small()
    for header, payload in (
        (b"not a header", copy.payload),
        (copy.header, copy.payload[1:]),
        (copy.header, bytes(100)),
    ):
        request = messages.Accept("d", NAME, ballot(10), value(copy), b"", False, header)
        assert (await replica.accept(request, [payload])).verdict == Verdict.UNSTORED
    assert disk.meta.get(NAME) is None
    assert (await replica.accept(with_copy(ballot(10), copy), [copy.payload])).copy_synced
    await disk.close()


async def test_while_a_copy_is_being_stored_its_register_waits_and_a_fence_is_not_answered(disk: Disk) -> None:
    replica, copy = LocalReplica("d", disk.meta, copies=disk.copies), small()
    await replica.prepare(messages.Prepare("d", NAME, ballot(10)))
    disk.hold()
    accepting = asyncio.create_task(replica.accept(with_copy(ballot(10), copy), [copy.payload]))
    await settle_tasks()
    reading = asyncio.create_task(payload_at(replica))
    fencing = asyncio.create_task(replica.fence(messages.FenceSet("d", SCOPE, b"nonce")))
    ending = asyncio.create_task(replica.fence_epoch(messages.EpochFence("d", 1)))
    await asyncio.sleep(0.02)
    assert [task.done() for task in (accepting, reading, fencing, ending)] == [False] * 4
    assert disk.meta.get(NAME) is None
    disk.go_on()
    async with asyncio.timeout(GUARD_S):
        assert (await accepting).copy_synced
        assert await reading == (copy.data_id, copy.payload)
        assert (await fencing).done
        await ending


async def test_a_read_brings_the_copy_that_it_names_with_its_header_or_says_that_there_is_none(disk: Disk) -> None:
    replica, copy, unknown = LocalReplica("d", disk.meta, copies=disk.copies), small(), small()
    await replica.accept(with_copy(ballot(10), copy), [copy.payload])
    by_id, body = await replica.read(messages.Read("d", NAME, 1, full=False, data_id=copy.data_id))
    assert (by_id.payload, by_id.header, bytes(body)) == (copy.data_id, copy.header, copy.payload)
    missing, body = await replica.read(messages.Read("d", NAME, 1, full=False, data_id=unknown.data_id))
    assert (missing.payload, bytes(body)) == (b"", b"")


async def test_a_record_that_the_store_refused_with_its_copy_makes_the_replica_silent(directory: Path) -> None:
    disk = await LogDisk.opened(directory)
    replica, copy = LocalReplica("d", disk.meta, copies=disk.copies), small()
    await replica.prepare(messages.Prepare("d", NAME, ballot(10)))
    disk.hold()
    accepting = asyncio.create_task(replica.accept(with_copy(ballot(10), copy), [copy.payload]))
    await disk.held.wait()
    disk.go_on(OSError(errno.EIO, "Input/output error"))
    with pytest.raises(DiskUnusable, match="Input/output"):
        await accepting
    assert disk.meta.get(NAME) is None
    assert disk.fragments.find_copy(copy.data_id) is None
    with pytest.raises(DiskUnusable):
        await replica.prepare(messages.Prepare("d", OTHER, ballot(11)))
    async with asyncio.timeout(GUARD_S):
        await replica.close()
        await disk.close()


async def test_copies_that_come_while_a_group_is_written_are_one_group(directory: Path) -> None:
    """One comes in each turn of the loop, while the first is held up on its way to the log; a record without a copy
    goes with them, a large fragment waits for none.
    """
    disk = await LogDisk.opened(directory)
    told: list[str] = []

    def keep(name: str, copy: Small) -> None:
        def done(refusal: StoragedError | None, error: StoragedError | None) -> None:
            assert (refusal, error) == (None, None)
            told.append(name)

        disk.copies.keep(copy.header, [copy.payload], StoreBatch(meta={name: b"1"}), done)

    copies = [small() for _ in range(11)]
    disk.hold()
    keep("first", copies[0])
    await disk.held.wait()
    for number, copy in enumerate(copies[1:]):
        keep(f"{number}", copy)
        await asyncio.sleep(0)
    alone = asyncio.ensure_future(disk.meta.commit(StoreBatch(meta={"alone": b"1"})))
    large = make(RNG, 200_000)
    async with asyncio.timeout(GUARD_S):
        await disk.fragments.write(large.header, [large.payload], sync=True)
    assert not told
    assert not any(disk.fragments.find_copy(copy.data_id) for copy in copies)
    disk.go_on()
    async with asyncio.timeout(GUARD_S):
        await alone
    assert told == ["first", *map(str, range(10))]
    assert disk.log.groups == 2
    for copy in copies:
        loaded = await disk.copies.load(copy.data_id)
        assert loaded is not None
        assert (loaded.header, bytes(loaded.payload)) == (copy.header, copy.payload)
    await disk.close()


async def test_each_copy_is_told_of_once_when_writing_its_group_fails_unexpectedly(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = await LogDisk.opened(directory)
    told: list[tuple[str, bool, bool]] = []

    def mistaken(*_arguments: object) -> bool:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(disk.meta._state.redo, "try_write", mistaken)
    for name, payload_byte in (("bad", 1), ("good", 0)):
        copy = small()
        payload = bytes([copy.payload[0] ^ payload_byte]) + copy.payload[1:]

        def done(refusal: StoragedError | None, error: StoragedError | None, name: str = name) -> None:
            told.append((name, refusal is not None, error is not None))

        disk.copies.keep(copy.header, [payload], StoreBatch(meta={name: b"1"}), done)
    await until(lambda: len(told) == 2)
    assert told == [("bad", True, False), ("good", False, True)]
    assert disk.meta.statistics().state == "read-only"
    await disk.close()


async def test_a_callback_that_raises_keeps_its_news_from_no_other_copy(directory: Path) -> None:
    told, troubles = asyncio.Event(), []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: troubles.append(context["exception"]))

    def mistaken(_refusal: StoragedError | None, _error: StoragedError | None) -> None:
        raise RuntimeError("a mistake")

    disk = await LogDisk.opened(directory)
    for name, done in (("one", mistaken), ("two", lambda _refusal, _error: told.set())):
        copy = small()
        disk.copies.keep(copy.header, [copy.payload], StoreBatch(meta={name: b"1"}), done)
    await asyncio.wait_for(told.wait(), GUARD_S)
    await disk.close()
    assert [str(error) for error in troubles] == ["a mistake"]


async def test_a_copy_for_which_the_stores_queue_has_no_room_is_refused_and_harms_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_queue, "QUEUED_BATCHES_MAX", 1)
    disk = await LogDisk.opened(directory)
    replica, copies = LocalReplica("d", disk.meta, copies=disk.copies), [small(), small()]
    await replica.prepare(messages.Prepare("d", NAME, ballot(10)))
    disk.hold()
    first = asyncio.create_task(replica.accept(with_copy(ballot(10), copies[0]), [copies[0].payload]))
    await disk.held.wait()
    with pytest.raises(SlowDown):
        await replica.accept(with_copy(ballot(10), copies[1], OTHER), [copies[1].payload])
    disk.go_on()
    async with asyncio.timeout(GUARD_S):
        assert (await first).copy_synced
        assert (await replica.accept(with_copy(ballot(10), copies[1], OTHER), [copies[1].payload])).copy_synced
    for copy, name in zip(copies, (NAME, OTHER), strict=True):
        assert await payload_at(replica, name) == (copy.data_id, copy.payload)
    await disk.close()


@pytest.mark.parametrize("length", [LOGGED_BYTES_MAX + 1, 256 * KIB, COPY_BYTES_MAX + 1])
async def test_a_larger_copy_is_synced_in_its_segment_before_its_record(directory: Path, length: int) -> None:
    disk = await LogDisk.opened(directory)
    replica, copy = LocalReplica("d", disk.meta, copies=disk.copies), small(length)
    await replica.prepare(messages.Prepare("d", NAME, ballot(10)))
    disk.hold()
    accepting = asyncio.create_task(replica.accept(with_copy(ballot(10), copy), [copy.payload]))
    async with asyncio.timeout(GUARD_S):
        await disk.held.wait()
    assert disk.files is not None
    assert any(copy.payload in segment.durable for segment in disk.files.disks.values())
    assert copy.payload not in (directory / "meta" / "redo").read_bytes()
    disk.go_on()
    assert (await accepting).copy_synced
    assert await payload_at(replica) == (copy.data_id, copy.payload)
    await disk.close()


@pytest.mark.parametrize("record", [False, True])
async def test_a_process_that_dies_after_a_larger_copy_is_synced_leaves_it_with_its_record_or_as_an_orphan(
    directory: Path, record: bool
) -> None:
    disk = await LogDisk.opened(directory, simulated=False, reserve_bytes=1)
    replica, copy = LocalReplica("d", disk.meta, copies=disk.copies), small(LOGGED_BYTES_MAX + 1)
    await replica.prepare(messages.Prepare("d", NAME, ballot(10)))
    disk.hold(written=record)
    accepting = asyncio.create_task(replica.accept(with_copy(ballot(10), copy), [copy.payload]))
    await disk.held.wait()
    found = await died(disk, directory)
    await accepting
    assert [header.id[:16] async for header in found.fragments.scan()] == [copy.data_id]
    returned = LocalReplica("d", found.meta, copies=found.copies)
    if record:
        assert await payload_at(returned) == (copy.data_id, copy.payload)
    else:
        assert found.meta.get(NAME) is None
    await found.close()


async def test_a_larger_copy_of_a_settling_round_goes_to_the_log_where_a_full_disk_has_room(directory: Path) -> None:
    disk = await LogDisk.opened(directory, simulated=False, reserve_bytes=1)
    replica, copy = LocalReplica("d", disk.meta, copies=disk.copies), small(256 * KIB)
    await replica.prepare(messages.Prepare("d", NAME, ballot(10)))
    disk.hold(written=True)
    accepting = asyncio.create_task(replica.accept(with_copy(ballot(10), copy, identity=True), [copy.payload]))
    await disk.held.wait()
    assert not any(copy.payload in path.read_bytes() for path in (directory / "fragments" / "segments").iterdir())
    found = await died(disk, directory)
    await accepting
    assert await payload_at(LocalReplica("d", found.meta, copies=found.copies)) == (copy.data_id, copy.payload)
    await found.close()


async def test_a_larger_copy_whose_record_has_no_room_is_not_written_either(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each attempt would fill the disk with another copy that no record names."""
    disk = await LogDisk.opened(directory)
    replica, copy = LocalReplica("d", disk.meta, copies=disk.copies), small(256 * KIB)
    await replica.prepare(messages.Prepare("d", NAME, ballot(10)))
    monkeypatch.setattr(disk.meta._state, "fed", lambda: None)  # a checkpoint of nothing finds room
    disk.meta._state.starved = "no room for a checkpoint"
    for counter in (10, 11):
        with pytest.raises(StoreFull, match="no room"):
            await replica.accept(with_copy(ballot(counter), copy), [copy.payload])
    assert disk.fragments.find_copy(copy.data_id) is None
    disk.meta._state.starved = ""
    assert (await replica.accept(with_copy(ballot(12), copy), [copy.payload])).copy_synced
    assert await payload_at(replica) == (copy.data_id, copy.payload)
    await disk.close()


async def test_a_copy_that_its_gateway_has_hashed_is_compared_by_its_checksum(disk: Disk) -> None:
    replica, copy, other = LocalReplica("d", disk.meta, copies=disk.copies), small(), small()
    checked = with_copy(ballot(10), copy)
    checked = msgspec.structs.replace(checked, check=transfer_checksum([copy.payload]))
    if not isinstance(disk, PlainDisk):
        damaged = await replica.accept(checked, [other.payload])
        assert (damaged.verdict, damaged.copy_synced) == (Verdict.UNSTORED, False)
        assert disk.meta.get(NAME) is None
    assert (await replica.accept(checked, [copy.payload])).copy_synced
    assert await payload_at(replica) == (copy.data_id, copy.payload)


async def test_a_senders_buffer_that_is_used_again_changes_no_copy(directory: Path) -> None:
    """The body of a request is valid until it is answered; the copy is found in memory and appended after that, and
    written to the log before.
    """
    disk = await LogDisk.opened(directory, simulated=False, reserve_bytes=1)
    replica, copies = LocalReplica("d", disk.meta, copies=disk.copies), [small(5000), small(5000)]
    await replica.prepare(messages.Prepare("d", NAME, ballot(10)))
    buffer = bytearray(copies[0].payload)
    await replica.accept(with_copy(ballot(10), copies[0]), [memoryview(buffer)[:3000], memoryview(buffer)[3000:]])
    buffer[:] = bytes(len(buffer))
    buffer = bytearray(copies[1].payload)
    disk.hold()
    accepting = asyncio.create_task(replica.accept(with_copy(ballot(10), copies[1], OTHER), [buffer]))
    await disk.held.wait()
    buffer[:] = bytes(len(buffer))
    disk.go_on()
    assert (await accepting).copy_synced
    for _ in range(2):
        for copy, name in zip(copies, (NAME, OTHER), strict=True):
            assert await payload_at(replica, name) == (copy.data_id, copy.payload)
        await disk.fragments._append_deferred()  # what was kept is appended then
    found = await died(disk, directory)
    assert [bytes(payload) for _, payload in found.meta.restorable()] == []
    for copy in copies:
        loaded = await found.copies.load(copy.data_id)
        assert loaded is not None
        assert bytes(loaded.payload) == copy.payload
    await found.close()


async def test_a_process_that_dies_before_the_log_has_them_leaves_neither_copy_nor_record(directory: Path) -> None:
    disk = await LogDisk.opened(directory, simulated=False, reserve_bytes=1)
    replica, copy = LocalReplica("d", disk.meta, copies=disk.copies), small()
    await replica.prepare(messages.Prepare("d", NAME, ballot(10)))
    disk.hold()
    accepting = asyncio.create_task(replica.accept(with_copy(ballot(10), copy), [copy.payload]))
    await disk.held.wait()
    assert disk.copies.peek(copy.data_id) is None
    found = await died(disk, directory)
    await accepting
    assert found.meta.get(NAME) is None
    assert [header async for header in found.fragments.scan()] == []
    assert await found.copies.load(copy.data_id) is None
    returned = LocalReplica("d", found.meta, copies=found.copies)
    reply = await returned.prepare(messages.Prepare("d", NAME, ballot(SystemClock().wall_ms() * 1000)))
    assert (reply.verdict, reply.accepted) == (Verdict.OK, ZERO_BALLOT)
    await found.close()


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("direct", [True, False])
async def test_a_process_that_dies_after_the_log_has_them_and_before_the_copy_is_appended_leaves_both(
    directory: Path, monkeypatch: pytest.MonkeyPatch, answered: bool, direct: bool
) -> None:
    monkeypatch.setattr(deferred_module, "DEFER_S", 60)
    disk = await LogDisk.opened(directory, simulated=False, direct=direct, reserve_bytes=1)
    replica, copy = LocalReplica("d", disk.meta, copies=disk.copies), small()
    await replica.prepare(messages.Prepare("d", NAME, ballot(10)))
    if not answered:
        disk.hold(written=True)
    accepting = asyncio.create_task(replica.accept(with_copy(ballot(10), copy), [copy.payload]))
    if answered:
        assert (await accepting).copy_synced
    else:
        await disk.held.wait()
    assert not any(copy.payload in path.read_bytes() for path in (directory / "fragments" / "segments").iterdir())
    found = await died(disk, directory)
    await accepting
    returned = LocalReplica("d", found.meta, copies=found.copies)
    assert await payload_at(returned) == (copy.data_id, copy.payload)
    assert [header.id[:16] async for header in found.fragments.scan()] == [copy.data_id]
    await found.close()


@pytest.mark.parametrize("lost", ["nothing", "its tail", "every segment", "the bytes of one copy"])
@pytest.mark.parametrize("full", [False, True])
async def test_copies_whose_own_log_was_not_synced_come_back_from_the_redo_log(
    directory: Path, lost: str, full: bool
) -> None:
    """What a power cut takes from a segment that was not synced, and a disk that is full up to its reserve when it
    returns.
    """
    disk = await LogDisk.opened(directory, simulated=False, reserve_bytes=1)
    replica, copies = LocalReplica("d", disk.meta, copies=disk.copies), [small(5000) for _ in range(8)]
    names = [NAME._replace(key=b"key%d" % number) for number in range(8)]
    for name, copy in zip(names[:4], copies[:4], strict=True):
        await replica.accept(with_copy(ballot(10), copy, name), [copy.payload])
    await disk.meta.checkpoint()
    for name, copy in zip(names[4:], copies[4:], strict=True):
        await replica.accept(with_copy(ballot(10), copy, name), [copy.payload])
    await disk.fragments._append_deferred()  # what was kept is appended then
    place = directory / "died"
    for part in ("meta", "fragments"):
        await asyncio.to_thread(shutil.copytree, directory / part, place / part)
    await disk.close()
    [segment] = (place / "fragments" / "segments").iterdir()
    data = bytearray(segment.read_bytes())
    at = data.index(copies[5].payload)
    if lost == "its tail":
        del data[at + 1000 :]
    elif lost == "the bytes of one copy":
        data[at : at + 5000] = bytes(5000)
    segment.write_bytes(data)
    if lost == "every segment":
        segment.unlink()
    found = await LogDisk.opened(place, simulated=False, reserve_bytes=1 << 50 if full else 1)
    await found.meta.checkpoint()
    assert found.meta.statistics().checkpoints == 0, "the copies are not back yet"
    await restore_copies(found.meta, found.fragments)
    await found.meta.checkpoint()
    returned = LocalReplica("d", found.meta, copies=found.copies)
    for number in range(4 if lost == "every segment" else 0, 8):
        assert await payload_at(returned, names[number]) == (copies[number].data_id, copies[number].payload)
    again = await died(found, place)
    assert again.meta.restorable() == []
    returned = LocalReplica("d", again.meta, copies=again.copies)
    assert await payload_at(returned, names[7]) == (copies[7].data_id, copies[7].payload)
    await again.close()


async def test_copies_for_which_there_is_no_room_at_all_stay_in_the_redo_log_and_the_disk_is_refused(
    directory: Path,
) -> None:
    disk = await LogDisk.opened(directory, simulated=False, reserve_bytes=1)
    replica, copy = LocalReplica("d", disk.meta, copies=disk.copies), small()
    await replica.accept(with_copy(ballot(10), copy), [copy.payload])
    place = directory / "died"
    await asyncio.to_thread(shutil.copytree, directory / "meta", place / "meta")
    await disk.close()
    (place / "fragments").mkdir()
    for full in (True, True, False):
        found = await LogDisk.opened(place)
        found.set_full(full)
        if full:
            with pytest.raises(DiskUnusable, match="full"):
                await restore_copies(found.meta, found.fragments)
            await found.meta.checkpoint()
        else:
            await restore_copies(found.meta, found.fragments)
            assert await payload_at(LocalReplica("d", found.meta, copies=found.copies)) == (copy.data_id, copy.payload)
        await found.close()


async def test_a_checkpoint_waits_for_the_copies_own_log(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not for a group that is on its way to the redo log: that may be waiting for the checkpoint."""
    monkeypatch.setattr(deferred_module, "DEFER_S", 60)
    disk = await LogDisk.opened(directory)
    replica, copy = LocalReplica("d", disk.meta, copies=disk.copies), small()
    order: list[str] = []
    sync_copies, apply = disk.meta.hooks.sync_copies, disk.meta._checkpointer.applier.apply

    def durable() -> bool:
        assert disk.files is not None
        return any(copy.payload in segment.durable for segment in list(disk.files.disks.values()))

    disk.meta.hooks.sync_copies = lambda: (order.append(f"copies {durable()}"), sync_copies())[1]
    disk.meta._checkpointer.applier.apply = lambda *arguments: (order.append(f"rows {durable()}"), apply(*arguments))[1]  # type: ignore[method-assign]
    await replica.accept(with_copy(ballot(10), copy), [copy.payload])
    other = small()
    disk.hold()
    accepting = asyncio.create_task(replica.accept(with_copy(ballot(10), other, OTHER), [other.payload]))
    await disk.held.wait()
    async with asyncio.timeout(GUARD_S):
        await disk.meta.checkpoint()
    assert order == ["copies False", "rows True"]
    disk.go_on()
    assert (await accepting).copy_synced
    await disk.close()


async def test_a_disk_that_is_known_to_have_failed_takes_no_copies(directory: Path) -> None:
    """They would be acknowledged, and count as lost: also when it was asked just before how much room it has."""
    disk = await LogDisk.opened(directory)
    replica, first, second = LocalReplica("d", disk.meta, copies=disk.copies), small(), small()
    assert (await replica.accept(with_copy(ballot(10), first, OTHER), [first.payload])).copy_synced
    assert disk.files is not None
    disk.files.fail["sync"] = 0
    other = make(RNG)
    with pytest.raises(DiskUnusable):
        await disk.fragments.write(other.header, [other.payload], sync=True)
    reply = await replica.accept(with_copy(ballot(10), second), [second.payload])
    assert (reply.verdict, reply.copy_synced) == (Verdict.UNSTORED, False)
    assert disk.meta.get(NAME) is None
    await disk.close()


@pytest.mark.parametrize("noted", [True, False])
async def test_copies_stay_in_the_redo_log_when_their_own_could_not_be_synced_and_nothing_will_say_so(
    directory: Path, monkeypatch: pytest.MonkeyPatch, noted: bool
) -> None:
    disk = await LogDisk.opened(directory)
    replica, copy = LocalReplica("d", disk.meta, copies=disk.copies), small()

    def broken(_file: SimulatedFile) -> None:
        raise OSError(errno.EIO, "Input/output error")

    await replica.accept(with_copy(ballot(10), copy), [copy.payload])
    monkeypatch.setattr(SimulatedFile, "sync_apart", broken)
    monkeypatch.setattr(SimulatedFiles, "mark_failed", lambda _files, _reason: noted)
    await disk.meta.checkpoint()
    assert disk.meta.statistics().checkpoints == (1 if noted else 0)
    assert disk.meta.statistics().state == ("ok" if noted else "read-only")
    await disk.close()


def test_copies_told_lately_are_the_last_ones_and_of_bounded_size() -> None:
    told = SmallCopyCache(10 * (1000 + ENTRY_BYTES))
    payloads = {bytes([number]) * 16: memoryview(bytes([number]) * 1000) for number in range(30)}
    first = bytes(16)
    for data_id, payload in payloads.items():
        assert told.get(data_id) is None
        told.put(data_id, payload)
        assert told.get(first) == payloads[first]  # asked for again and again, it stays
    assert len(told) == 10
    assert [data_id[0] for data_id in payloads if told.get(data_id) is not None] == [0, *range(21, 30)]
    told.put(b"large" * 4, memoryview(bytes(20_000)))
    assert len(told) == 0
    nothing = SmallCopyCache(0)
    nothing.put(first, payloads[first])
    assert nothing.get(first) is None


async def test_a_copy_is_read_from_its_disk_once_for_all_disks_of_a_node(tmp_path: Path) -> None:
    told = SmallCopyCache(1 << 20)
    asked: list[bytes] = []

    def peek(data_id: bytes) -> memoryview | None:
        asked.append(data_id)
        return memoryview(b"sealed") if data_id == b"D" * 16 else None

    async def store(header: bytes, body: Sequence[Buffer], _check: bytes) -> None: ...

    async def load(data_id: bytes) -> Copy | None:
        return None

    meta = MemoryMetaStore()
    disks = [PlainCopies(meta, store, load, peek, told) for _ in range(2)]
    for _ in range(2):
        for disk in disks:
            assert disk.peek(b"D" * 16) == b"sealed"
            assert disk.peek(b"E" * 16) is None
    assert asked == [b"D" * 16] + [b"E" * 16] * 4
