"""Disks with sectors that can't be read: only the disk goes, not its node.

The drive fails in the kernel (``hanging_disk``). Needs root and /dev/fuse, and is skipped elsewhere.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from storaged.errors import DiskUnreadable, DiskUnusable
from storaged.fragments.ports import Health
from storaged.meta.consensus.register import Verdict
from storaged.node import disk_watch, fault_note
from storaged.node.fault_note import BUS_ERROR, FAULT_FILE, died_by_bus_error, forget_faults, read_disk
from tests.integration.test_hung_disks import Node, accept, fill, read
from tests.patience import GUARD_S
from tests.worlds.authority import until
from tests.worlds.fragments import make
from tests.worlds.hanging_disk import HangingDisk, available, hanging_disk

DIES = """
import mmap, sys
from pathlib import Path
from storaged.node.fault_note import note_faults
note_faults(Path(sys.argv[1]))
with open(sys.argv[2], "rb") as file:
    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)[:]
"""


@pytest.fixture
def hanging() -> Iterator[HangingDisk]:
    if not available():
        pytest.skip("needs root and /dev/fuse")
    with hanging_disk() as disk:
        yield disk


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_watch, "LOOK_S", 0.1)
    monkeypatch.setattr(fault_note, "PAUSE_S", 0.01)


def note_a_fault(node: Node) -> Path:
    directory = Path(node.config.node.directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / FAULT_FILE).write_bytes(b"Fatal Python error: " + BUS_ERROR + b"\n")
    return directory


async def test_after_sigbus_the_unreadable_disk_stays_out_until_it_can_be_read(
    tmp_path: Path, hanging: HangingDisk
) -> None:
    node = Node(tmp_path, hanging)
    await node.open()
    await fill(node.bad)
    await node.disks.close()
    data = hanging.directory / "d1" / "meta" / "data.mdb"
    hanging.drop_cache(data)
    hanging.unreadable("meta/data.mdb", above=8192)

    command = [sys.executable, "-c", DIES, str(tmp_path), str(data)]
    dead = await asyncio.to_thread(subprocess.run, command, timeout=GUARD_S, check=False)
    assert dead.returncode == -signal.SIGBUS
    assert died_by_bus_error(tmp_path)
    forget_faults(tmp_path)
    assert not died_by_bus_error(tmp_path)

    directory = note_a_fault(node)
    for _ in range(2):  # it is not forgotten by a start that could not read a disk
        await node.open()
        assert await node.states() == ["unreadable", "ok"]
        status = next(status for status in await node.disks.statuses() if status.state == "unreadable")
        assert "data.mdb can't be read near byte" in status.reason
        assert await read(node.good, b"nothing") is None
        await node.disks.close()
        assert died_by_bus_error(directory)
    hanging.release()
    await node.open()
    assert await node.states() == ["ok", "ok"]
    assert await read(node.bad, b"k007") is not None
    assert not died_by_bus_error(directory)
    await node.disks.close()


async def test_a_disk_that_takes_long_to_read_joins_when_it_was_read(tmp_path: Path, hanging: HangingDisk) -> None:
    node = Node(tmp_path, hanging)
    await node.open()
    await fill(node.bad, 20)
    await node.disks.close()
    hanging.drop_cache(hanging.directory / "d1" / "meta" / "data.mdb")
    note_a_fault(node)
    hanging.hang("reads", name="data.mdb")
    await node.open(open_s=0.5)
    await until(lambda: len(node.disks.used) == 1)  # a slow machine may take longer than that for the other one
    assert await node.states() == ["checking", "ok"]
    hanging.release()
    await until(lambda: len(node.disks.used) == 2)
    assert await node.states() == ["ok", "ok"]
    await node.disks.close()


async def test_pages_that_leave_memory_and_can_not_be_read_again_take_the_disk_out_of_a_running_node(
    tmp_path: Path, hanging: HangingDisk
) -> None:
    node = Node(tmp_path, hanging)
    await node.open()
    await fill(node.bad)
    await node.bad.meta.checkpoint()
    hanging.unreadable("meta/data.mdb", above=8192)
    node.bad.meta._residency._look_at_s = node.bad.meta._residency._read_at_s = 0.0
    hanging.drop_cache(hanging.directory / "d1" / "meta" / "data.mdb")
    await until(lambda: bool(node.bad.health.given_up))
    assert await node.states() == ["unreadable", "ok"]
    with pytest.raises(DiskUnusable, match="unreadable"):
        await accept(node.bad, b"k001")
    with pytest.raises(DiskUnusable, match="unreadable"):
        await read(node.bad, b"k002")
    assert (await accept(node.good, b"k")).verdict == Verdict.OK
    await asyncio.sleep(0.3)
    assert node.bad.health.hung, "it does not come back by itself in this process"
    hanging.release()
    await node.disks.close()


async def test_scrub_reads_the_drive_and_not_what_memory_has_of_it(tmp_path: Path, hanging: HangingDisk) -> None:
    node = Node(tmp_path, hanging)
    await node.open()
    store, made = node.bad.fragments, make(random.Random(1), 100_000)
    await store.write(made.header, [made.payload], sync=True)
    assert (await store.verify(made.id)).health == Health.OK
    (segment,) = (hanging.backing / "d1" / "fragments" / "segments").iterdir()
    content = segment.read_bytes()
    at = content.index(made.payload[50_000:50_016])
    with segment.open("r+b") as file:
        file.seek(at)
        file.write(bytes([content[at] ^ 1]))
    assert (await store.read(made.id, 0, 99)).whole is not None, "memory has it as it was"
    assert (await store.verify(made.id)).health == Health.DAMAGED
    await node.disks.close()


# --- without a drive


def disk_of(directory: Path) -> Path:
    for name in fault_note.LMDB_FILES:
        (directory / name).parent.mkdir(parents=True)
        (directory / name).write_bytes(os.urandom(3_000_000))
    return directory


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM, errno.EINTR, errno.ETIMEDOUT, errno.EIO])
def test_an_error_that_passes_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    real, failures = os.pread, [code, code]

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        if failures:
            raise OSError(failures.pop(), "")
        return real(descriptor, size, offset)

    monkeypatch.setattr(fault_note.os, "pread", pread)
    read_disk(disk_of(tmp_path))
    assert not failures


def test_bytes_that_the_drive_can_not_read_are_damage_and_other_lasting_errors_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, codes = disk_of(tmp_path), [errno.EIO]

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        if offset + size > 1_048_576:
            raise OSError(codes[0], os.strerror(codes[0]))
        return bytes(size)

    monkeypatch.setattr(fault_note.os, "pread", pread)
    with pytest.raises(DiskUnreadable, match="near byte 1048576: Input/output error"):
        read_disk(disk)
    codes[0] = errno.EMFILE
    with pytest.raises(OSError, match="Too many open files"):
        read_disk(disk)


def test_a_node_that_dies_again_and_again_fills_no_disk_with_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fault_note.faulthandler, "enable", lambda file, **_: file.close())
    note = tmp_path / FAULT_FILE
    for content, kept in ((BUS_ERROR * 10_000, BUS_ERROR), (b"Segmentation fault" * 10_000, b""), (b"short", b"short")):
        note.write_bytes(content)
        fault_note.note_faults(tmp_path)
        assert note.read_bytes() == kept
        assert died_by_bus_error(tmp_path) is (kept == BUS_ERROR)


def test_a_disk_without_files_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blank disk, or one that was taken away, is for ``admission`` to judge; files that are there are all read."""
    seen = list[Path]()
    monkeypatch.setattr(fault_note, "_read_file", lambda path: (seen.append(path), path.stat()))
    read_disk(tmp_path)
    assert seen == [tmp_path / name for name in fault_note.LMDB_FILES], "the first that is missing does not end it"
