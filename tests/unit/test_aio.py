"""Writes that no thread waits for: what the kernel is given is in the file, and the callback gets each outcome."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import math
import os
import platform
import random
import resource
import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storaged import aio, uring
from storaged.aio import BLOCK_BYTES, FAILING_IN_A_ROW_MAX, DirectFile
from storaged.uring import RingFile
from tests.patience import GUARD_S

BLOCKS = 64
WRITE_BYTES_MAX = 16 * BLOCK_BYTES


@pytest.fixture(autouse=True)
def _no_write_hangs_at_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine; but for the test of it."""
    monkeypatch.setattr(aio, "STUCK_S", math.inf)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that has its blocks."""
    made = tmp_path / "file"
    made.write_bytes(bytes(BLOCKS * BLOCK_BYTES))
    return made


@pytest.fixture
def direct(path: Path) -> Iterator[DirectFile]:
    opened = DirectFile.open(path, WRITE_BYTES_MAX)
    if opened is None:
        pytest.skip("this machine, or this file system, has no asynchronous direct writes")
    yield opened
    opened.detach()
    opened.close()


Writer = DirectFile | RingFile


@pytest.fixture(params=[DirectFile, RingFile])
def writer(path: Path, request: pytest.FixtureRequest) -> Iterator[Writer]:
    """Either way to write; with those tests that know nothing of how it is done."""
    opened = request.param.open(path, WRITE_BYTES_MAX)
    if opened is None:
        pytest.skip("this machine, or this file system, has no asynchronous direct writes of this kind")
    yield opened
    opened.detach()
    opened.close()


def content(path: Path) -> bytes:
    return path.read_bytes()


def begin(direct: Writer, pieces: list[bytes], at: int) -> asyncio.Future[None]:
    """The write has begun; its callback has not been called when that returns."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def done(error: OSError | None) -> None:
        assert not ended.done(), "told twice"
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)

    direct.write(loop, pieces, at, done)
    assert not ended.done()
    return ended


async def write(direct: Writer, pieces: list[bytes], at: int) -> None:
    async with asyncio.timeout(GUARD_S):
        await begin(direct, pieces, at)


@contextlib.contextmanager
def size_limit(limit: int) -> Iterator[None]:
    """The kernel lets no file of this process grow, nor be written, beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_what_was_written_is_in_the_file_and_nothing_else_is_changed(writer: Writer, path: Path) -> None:
    expected = bytearray(content(path))
    data = random.Random(1).randbytes(3 * BLOCK_BYTES)
    await write(writer, [data[:32], data[32:7000], b"", data[7000:]], 5 * BLOCK_BYTES)
    expected[5 * BLOCK_BYTES : 8 * BLOCK_BYTES] = data
    assert content(path) == expected


async def test_writes_in_turn_of_any_size_and_place_are_all_there(writer: Writer, path: Path) -> None:
    rng, expected = random.Random(2), bytearray(BLOCKS * BLOCK_BYTES)
    for _ in range(40):
        count = rng.randint(1, WRITE_BYTES_MAX // BLOCK_BYTES)
        at = rng.randint(0, BLOCKS - count) * BLOCK_BYTES
        data = rng.randbytes(count * BLOCK_BYTES)
        await write(writer, [data], at)
        expected[at : at + len(data)] = data
    assert content(path) == expected


async def test_the_pieces_are_free_as_soon_as_the_write_was_begun(writer: Writer, path: Path) -> None:
    piece = bytearray(b"x" * WRITE_BYTES_MAX)
    ended = begin(writer, [piece], 0)  # type: ignore[list-item]
    piece[:] = bytes(len(piece))
    await ended
    assert content(path)[:WRITE_BYTES_MAX] == b"x" * WRITE_BYTES_MAX


async def test_the_next_may_be_begun_by_who_is_told_of_the_last(writer: Writer, path: Path) -> None:
    loop = asyncio.get_running_loop()
    all_there: asyncio.Future[None] = loop.create_future()
    blocks = [bytes([number]) * BLOCK_BYTES for number in range(1, 9)]

    def go_on(number: int) -> None:
        if number == len(blocks):
            all_there.set_result(None)
        else:
            writer.write(loop, [blocks[number]], number * BLOCK_BYTES, lambda _error: go_on(number + 1))

    go_on(0)
    await asyncio.wait_for(all_there, GUARD_S)
    assert content(path)[: 8 * BLOCK_BYTES] == b"".join(blocks)


@pytest.mark.parametrize(("limit", "code"), [(4, errno.EFBIG), (6, errno.EIO)])
async def test_what_the_kernel_refuses_or_cuts_short_is_an_error_of_that_write_alone(
    writer: Writer, path: Path, limit: int, code: int
) -> None:
    """Of four blocks none is within the limit, or two are."""
    with size_limit(limit * BLOCK_BYTES), pytest.raises(OSError) as refused:
        await write(writer, [bytes(4 * BLOCK_BYTES)], 4 * BLOCK_BYTES)
    assert refused.value.errno == code
    await write(writer, [b"y" * BLOCK_BYTES], 7 * BLOCK_BYTES)
    assert content(path)[7 * BLOCK_BYTES : 8 * BLOCK_BYTES] == b"y" * BLOCK_BYTES


@pytest.mark.parametrize(
    ("result", "code"), [(-errno.ENOSPC, errno.ENOSPC), (-errno.EIO, errno.EIO), (0, errno.EIO), (512, errno.EIO)]
)
async def test_each_result_but_all_of_it_is_an_error(
    direct: DirectFile, monkeypatch: pytest.MonkeyPatch, result: int, code: int
) -> None:
    call = direct._call

    def told(number: ctypes.c_long, *arguments: Any) -> int:
        found = call(number, *arguments)
        if number.value == direct._getevents and found == 1:
            direct._event.result = result
        return found

    with monkeypatch.context() as patch:
        patch.setattr(direct, "_call", told)
        with pytest.raises(OSError) as refused:
            await write(direct, [bytes(BLOCK_BYTES)], 0)
    assert refused.value.errno == code
    await write(direct, [bytes(BLOCK_BYTES)], 0)


async def test_what_the_kernel_does_not_take_is_raised_and_nobody_is_told(direct: DirectFile, path: Path) -> None:
    """Here of a descriptor that may only be read."""
    told: list[OSError | None] = []
    writable, readable = os.dup(direct._fd), os.open(path, os.O_RDONLY)
    os.dup2(readable, direct._fd)
    with pytest.raises(OSError) as refused:
        direct.write(asyncio.get_running_loop(), [bytes(BLOCK_BYTES)], 0, told.append)
    assert refused.value.errno == errno.EBADF
    os.dup2(writable, direct._fd)
    os.close(writable)
    os.close(readable)
    await write(direct, [b"z" * BLOCK_BYTES], 0)
    assert content(path)[:BLOCK_BYTES] == b"z" * BLOCK_BYTES
    assert not told


async def test_no_second_write_is_begun_while_one_is_under_way_and_none_of_half_a_block(writer: Writer) -> None:
    loop = asyncio.get_running_loop()
    ended = begin(writer, [bytes(BLOCK_BYTES)], 0)
    with pytest.raises(AssertionError, match="one write at a time"):
        writer.write(loop, [bytes(BLOCK_BYTES)], 0, lambda _error: None)
    await ended
    for pieces, at in (([bytes(100)], 0), ([bytes(BLOCK_BYTES)], 512)):
        with pytest.raises(AssertionError, match="whole blocks"):
            writer.write(loop, pieces, at, lambda _error: None)


@pytest.mark.parametrize("kind", [DirectFile, RingFile])
@pytest.mark.parametrize("round_", range(5))
async def test_close_waits_for_what_is_under_way_and_tells_nobody(
    path: Path, round_: int, kind: type[DirectFile] | type[RingFile]
) -> None:
    opened = kind.open(path, BLOCKS * BLOCK_BYTES)
    if opened is None:
        pytest.skip("this machine, or this file system, has no asynchronous direct writes")
    told: list[OSError | None] = []
    data = random.Random(round_).randbytes(BLOCKS * BLOCK_BYTES)
    opened.write(asyncio.get_running_loop(), [data], 0, told.append)
    opened.detach()
    opened.close()
    assert content(path) == data
    await asyncio.sleep(0.01)
    assert not told


async def test_a_loop_hears_of_nothing_that_was_detached(direct: DirectFile, monkeypatch: pytest.MonkeyPatch) -> None:
    heard, hear = 0, direct._on_event

    def noted() -> None:
        nonlocal heard
        heard += 1
        hear()

    monkeypatch.setattr(direct, "_on_event", noted)
    await write(direct, [bytes(BLOCK_BYTES)], 0)
    assert heard == 1
    for _ in range(2):
        direct.detach()
    os.eventfd_write(direct._events, 1)
    await asyncio.sleep(0.02)
    assert heard == 1
    os.eventfd_read(direct._events)
    await write(direct, [bytes(BLOCK_BYTES)], 0)
    assert heard == 2


async def test_news_of_nothing_is_taken_for_nothing(direct: DirectFile, path: Path) -> None:
    """As when a loop hears of an event that was read already, or before the kernel has written it down."""
    direct._on_event()
    await write(direct, [b"1" * BLOCK_BYTES], 0)
    for _ in range(2):
        os.eventfd_write(direct._events, 1)
        await asyncio.sleep(0.01)
        assert direct._on_done is None
    told: list[OSError | None] = []
    direct.write(asyncio.get_running_loop(), [b"2" * BLOCK_BYTES], 0, told.append)
    os.eventfd_write(direct._events, 1)
    async with asyncio.timeout(GUARD_S):
        while not told:  # noqa: ASYNC110  (the kernel, which sets no event)
            await asyncio.sleep(0.01)
    assert told == [None]
    assert content(path)[:BLOCK_BYTES] == b"2" * BLOCK_BYTES


def test_another_loop_may_go_on_where_one_has_ended(writer: Writer, path: Path) -> None:
    for number in (1, 2):
        asyncio.run(write(writer, [bytes([number]) * BLOCK_BYTES], 0))
        writer.detach()
        assert content(path)[:BLOCK_BYTES] == bytes([number]) * BLOCK_BYTES


# --- where it can't be had


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_another_processor_has_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "s390x")
    assert DirectFile.open(path, BLOCK_BYTES) is None


@pytest.mark.parametrize("what", ["platform", "byteorder"])
def test_another_operating_system_or_order_of_bytes_has_none(
    path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(aio.sys, what, "other")
    assert DirectFile.open(path, BLOCK_BYTES) is None


def test_a_file_system_without_direct_writes_has_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_ = os.open

    def refused(name: Path, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return open_(name, flags, *mode)

    monkeypatch.setattr(os, "open", refused)
    assert DirectFile.open(path, BLOCK_BYTES) is None


def test_a_kernel_that_gives_no_more_contexts_has_none_and_nothing_stays_open(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:
        """The C library of a machine that is at fs.aio-max-nr."""

        def __init__(self, *_arguments: object, **_named: object) -> None:
            self.syscall: Callable[..., int] = lambda *_arguments: -1  # a function has attributes, as ctypes' have

    before = descriptors()
    monkeypatch.setattr(aio, "file_system_of", lambda _fd: aio.FILE_SYSTEMS[0])
    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert DirectFile.open(path, BLOCK_BYTES) is None
    assert descriptors() == before


@pytest.mark.parametrize("kind", [DirectFile, RingFile])
def test_what_was_opened_is_closed_again(path: Path, kind: type[DirectFile] | type[RingFile]) -> None:
    before = descriptors()
    for _ in range(20):
        opened = kind.open(path, BLOCK_BYTES)
        if opened is None:
            pytest.skip("this machine, or this file system, has no asynchronous direct writes")
        opened.close()
    assert descriptors() == before


# --- a file system that writes while it is asked


class Submits:
    """What ``io_submit`` looks like: ``waits``: as one that returns when all is written; else as one that returns
    before.
    """

    def __init__(self, direct: DirectFile) -> None:
        self._direct = direct
        self._call = direct._call
        self.waits = True

    def __call__(self, number: ctypes.c_long, *arguments: Any) -> int:
        found = self._call(number, *arguments)
        if number.value == self._direct._submit and self.waits:
            assert select.select([self._direct._events], [], [], 10)[0]
        return found

    def arrived(self) -> bool:
        return self.waits and bool(select.select([self._direct._events], [], [], 0)[0])


@pytest.fixture
def submits(direct: DirectFile, monkeypatch: pytest.MonkeyPatch) -> Submits:
    """Whatever the machine, each takes long."""
    made = Submits(direct)
    monkeypatch.setattr(aio, "SLOW_S", 0.0)
    monkeypatch.setattr(direct, "_call", made)
    return made


async def test_so_many_slow_writes_in_turn_that_were_done_when_they_were_asked_for_say_that_the_file_system_blocks(
    direct: DirectFile, submits: Submits, path: Path
) -> None:
    for number in range(FAILING_IN_A_ROW_MAX):
        assert not direct.blocks_loop
        await write(direct, [bytes([number + 1]) * BLOCK_BYTES], 0)
    assert direct.blocks_loop
    assert content(path)[:BLOCK_BYTES] == bytes([FAILING_IN_A_ROW_MAX]) * BLOCK_BYTES, "each was heard of all the same"


async def test_slow_writes_that_are_not_done_yet_do_not_say_so(
    direct: DirectFile, submits: Submits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor that was taken away is slow as well."""
    submits.waits = False
    monkeypatch.setattr(direct, "_is_complete", submits.arrived)
    for _ in range(2 * FAILING_IN_A_ROW_MAX):
        await write(direct, [bytes(BLOCK_BYTES)], 0)
    assert not direct.blocks_loop


async def test_one_that_is_quick_or_not_done_yet_begins_the_count_anew(
    direct: DirectFile, submits: Submits, monkeypatch: pytest.MonkeyPatch
) -> None:
    for slow_s in (60.0, 0.0):
        for _ in range(FAILING_IN_A_ROW_MAX - 1):
            await write(direct, [bytes(BLOCK_BYTES)], 0)
        with monkeypatch.context() as patch:
            patch.setattr(aio, "SLOW_S", slow_s)
            patch.setattr(submits, "waits", slow_s > 0)
            patch.setattr(direct, "_is_complete", submits.arrived)
            await write(direct, [bytes(BLOCK_BYTES)], 0)
        assert not direct.blocks_loop
    for _ in range(FAILING_IN_A_ROW_MAX - 1):
        await write(direct, [bytes(BLOCK_BYTES)], 0)
    assert not direct.blocks_loop


async def test_after_one_write_that_hung_at_its_beginning_threads_write_for_a_while(
    direct: DirectFile, submits: Submits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aio, "STUCK_S", 0.0)
    await write(direct, [bytes(BLOCK_BYTES)], 0)
    assert direct.blocks_loop
    direct._avoided_until_s = aio.time.perf_counter()
    assert not direct.blocks_loop


# --- io_uring


def ring_file(path: Path) -> RingFile:
    opened = RingFile.open(path, WRITE_BYTES_MAX)
    if opened is None:
        pytest.skip("this machine, or this file system, has no io_uring")
    return opened


async def test_a_ring_that_refuses_writes_in_turn_is_not_asked_any_more(path: Path) -> None:
    """Here of a descriptor that may only be read."""
    ring = ring_file(path)
    writable, readable = os.dup(ring._fd), os.open(path, os.O_RDONLY)
    os.dup2(readable, ring._fd)
    with pytest.raises(OSError) as refused:
        await write(ring, [bytes(BLOCK_BYTES)], 0)
    assert refused.value.errno == errno.EBADF
    os.dup2(writable, ring._fd)
    for descriptor in (writable, readable):
        os.close(descriptor)
    for _ in range(FAILING_IN_A_ROW_MAX - 1):
        assert not ring.blocks_loop
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(uring, "_OP_WRITE", 250)
            with pytest.raises(aio.DirectWriteRefused):
                await write(ring, [bytes(BLOCK_BYTES)], 0)
    assert ring.blocks_loop
    await write(ring, [b"w" * BLOCK_BYTES], 0)
    assert not ring.blocks_loop
    assert content(path)[:BLOCK_BYTES] == b"w" * BLOCK_BYTES
    ring.detach()
    ring.close()
