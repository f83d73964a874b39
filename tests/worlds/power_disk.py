"""A disk whose power can be cut: real files in memory, and a record of what a drive would have of them.

Theory of operation
    Inside of ``PowerDisk.attached`` every call that changes a file below the disk's directory comes here first: those
    of Python code by the names in ``os``, those of LMDB by ``lmdb_calls``. The call is carried out on the real file,
    which so plays the page cache. Beside it the disk keeps for each file what the drive surely has (``durable``), and
    the writes since (``pending``); in the same way it keeps the names of each directory.

    A write that is synced becomes durable. A cut (``cut``) decides about everything else: of each write none, all or
    some sectors of 512 bytes are kept, whatever came after it; a file may have become longer without its bytes; a name
    may be new or old. Then the real files are made to be what the drive has.

    ``cut_at`` counts calls down. At 0 the power goes in the middle of that call: PowerCut is raised, and by every call
    after it. LMDB gets EIO. A process that is killed ends in the same way, and ``revive`` follows instead of ``cut``.

    A sync of a file does not make its name durable: only a sync of its directory does. Renames and removals are kept or
    not each for itself. Most file systems are kinder. A hole that is punched is on the drive at once.

What the drive does wrong (``Faults``) is a value of its own, so that a sound drive and one that lies are the same code.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storaged.fragments import files as files_module
from storaged.wire import Buffer
from tests.doubles.files import SECTOR, PowerCut
from tests.sim.file_disk import set_aside
from tests.worlds import lmdb_calls

PAGE_BYTES = 4096
_KEPT = (0.0, 0.0, 0.5, 0.9, 1.0)
"""How much of what a file's pending writes are is kept by a cut."""

_PATCHED = (
    "open", "close", "pwrite", "pwritev", "write", "pread", "fsync", "fdatasync", "ftruncate", "truncate",
    "unlink", "remove", "rename", "replace", "mkdir", "rmdir", "posix_fallocate",
)  # fmt: skip


@dataclass
class Write:
    """``sure``: the drive has it, whatever happens (O_DSYNC)."""

    offset: int
    data: bytes
    sure: bool = False


@dataclass(eq=False)
class File:
    durable: bytearray = field(default_factory=bytearray)
    pending: list[Write | int] = field(default_factory=list)
    """Writes, and sizes to which it was cut or extended."""
    unrecorded: bool = False
    """Changed by calls that are not seen here: only a sync makes that durable."""


@dataclass(eq=False)
class Directory:
    now: dict[str, File | Directory] = field(default_factory=dict)
    durable: dict[str, File | Directory] = field(default_factory=dict)


Change = list[tuple[Directory, str, "File | Directory | None"]]
"""Names that change together. None: the name is gone."""


@dataclass
class Faults:
    """What a drive does wrong. ``fail``: by number of the call, the errno that it gets. ``lying_from``: from that call
    on syncs return and keep nothing. ``misplaced``: numbers of writes that land elsewhere in their file.
    ``other_reads``: how many of the reads of Python code return other bytes.
    """

    fail: dict[int, int] = field(default_factory=dict)
    lying_from: int = -1
    misplaced: set[int] = field(default_factory=set)
    other_reads: float = 0.0


class PowerDisk:
    def __init__(self, root: Path, seed: int) -> None:
        self.root = str(root)
        self.rng = random.Random(seed)
        self.faults = Faults()
        self.cut_at = -1
        self.dead = False
        self.calls = 0
        self.failures: list[str] = []
        """Calls that got an error of ``faults``."""
        self.harmed: list[str] = []
        """What the drive did wrong without saying so."""
        self._tree = Directory()
        self._changes: list[Change] = []
        self._open: dict[int, tuple[File | Directory, bool]] = {}
        """By descriptor; whether it was opened with O_DSYNC."""
        self._descriptors: set[int] = set()
        """Opened by Python code, and open."""
        self._real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in _PATCHED}

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Calls come here inside of the block. One thread only."""
        with contextlib.ExitStack() as stack:
            for name in _PATCHED:
                stack.enter_context(set_aside(os, name, getattr(self, f"_on_{name}")))
            stack.enter_context(set_aside(files_module, "_libc", _HolesOf(self)))
            lmdb = {name: getattr(self, f"_lmdb_{name}") for name in lmdb_calls.SIGNATURES}
            stack.enter_context(lmdb_calls.replaced(lmdb))
            yield

    # --- what a cut leaves ------------------------------------------------------------------------------------------

    def end_process(self) -> None:
        """Closes what a process leaves open that dies. Environments of LMDB must have been closed."""
        for fd in self._descriptors:
            with contextlib.suppress(FileNotFoundError):  # a file object has closed it
                if os.readlink(f"/proc/self/fd/{fd}").startswith(self.root):
                    self._real["close"](fd)
        self._descriptors.clear()
        self._open.clear()

    def revive(self) -> None:
        """The process was killed, and the machine goes on: what was written is in the page cache, or on its way."""
        self.cut_at, self.dead = -1, False

    def cut(self) -> None:
        """The power was cut and is back. Nothing has a file open any more."""
        for change in self._changes:
            if self.rng.random() < 0.5:
                _apply(change)
        self._changes.clear()
        self.cut_at, self.dead = -1, False
        self._restore(self._tree, self.root)

    def _restore(self, directory: Directory, path: str) -> None:
        """Makes the real directory what the drive has."""
        before = directory.now
        for name in set(os.listdir(path)) - directory.durable.keys():
            _remove(f"{path}/{name}", self._real)
        directory.now = dict(directory.durable)
        for name, node in directory.durable.items():
            place = f"{path}/{name}"
            moved = before.get(name) is not node
            if isinstance(node, Directory):
                if moved:
                    _remove(place, self._real)
                    self._real["mkdir"](place)
                    _forget(node)
                self._restore(node, place)
            elif moved or node.pending or node.unrecorded or not os.path.exists(place):
                self._settle(node)
                _remove(place, self._real)
                Path(place).write_bytes(node.durable)

    def _settle(self, file: File) -> None:
        """Decides what of a file's pending writes is on the drive."""
        kept = self.rng.choice(_KEPT)
        longest = max([0, *(len(one.data) + one.offset for one in file.pending if isinstance(one, Write))])
        for one in file.pending:
            if isinstance(one, int):
                if self.rng.random() < kept:
                    _resize(file.durable, one)
                continue
            part = 1.0 if one.sure else kept
            for offset in range(-(one.offset % SECTOR), len(one.data), SECTOR):
                if self.rng.random() < part:
                    _put(file.durable, one.offset + max(0, offset), one.data[max(0, offset) : offset + SECTOR])
        if len(file.durable) < longest and self.rng.random() < 0.1:
            _resize(file.durable, longest)  # the file system had written its length
        file.pending.clear()
        file.unrecorded = False

    # --- calls ------------------------------------------------------------------------------------------------------

    def _begin(self, kind: str) -> int:
        """Counts a call. Returns its number, or raises what becomes of it."""
        if self.dead or self.cut_at == 0:
            self.dead = True
            raise PowerCut
        self.cut_at -= 1
        self.calls += 1
        code = self.faults.fail.pop(self.calls, 0)
        if code:
            self.failures.append(f"{kind}: {os.strerror(code)}")
            raise OSError(code, os.strerror(code))
        return self.calls

    def _locate(self, path: Any, dir_fd: int | None = None) -> tuple[Directory, str] | None:
        """The directory and name of a path below the root; None: it is not this disk's."""
        text = os.fsdecode(path)
        if dir_fd is not None:
            text = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), text)
        if not text.startswith(self.root + "/"):
            return None
        *parents, name = [part for part in text[len(self.root) :].split("/") if part]
        here = self._tree
        for parent in parents:
            found = here.now.get(parent)
            if not isinstance(found, Directory):
                return None
            here = found
        return here, name

    def _node(self, path: Any, dir_fd: int | None = None) -> File | Directory | None:
        if os.fsdecode(path) == self.root:
            return self._tree
        found = self._locate(path, dir_fd)
        return None if found is None else found[0].now.get(found[1])

    def _change(self, change: Change) -> None:
        for directory, name, node in change:
            if node is None:
                directory.now.pop(name, None)
            else:
                directory.now[name] = node
        self._changes.append(change)

    def _file(self, fd: int) -> File | None:
        found = self._open.get(fd)
        return found[0] if found is not None and isinstance(found[0], File) else None

    def _on_open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        fd = self._opened(path, flags, mode, dir_fd)
        if fd in self._open:
            self._descriptors.add(fd)
        return fd

    def _opened(self, path: Any, flags: int, mode: int, dir_fd: int | None) -> int:
        options = {} if dir_fd is None else {"dir_fd": dir_fd}
        place = None if isinstance(path, int) else self._locate(path, dir_fd)
        node = None if isinstance(path, int) else self._node(path, dir_fd)
        fresh = node is None and place is not None and flags & os.O_CREAT and not os.path.islink(path)
        if fresh or (isinstance(node, File) and flags & os.O_TRUNC):
            self._begin("open")
        fd: int = self._real["open"](path, flags, mode, **options)
        if fresh:
            assert place is not None
            node = File()
            self._change([(*place, node)])
        if isinstance(node, File) and flags & os.O_TRUNC:
            node.pending.append(0)
        self._open.pop(fd, None)
        if node is not None:
            self._open[fd] = node, bool(flags & os.O_DSYNC)
        return fd

    def _on_close(self, fd: int) -> None:
        self._open.pop(fd, None)
        self._descriptors.discard(fd)
        self._real["close"](fd)

    def _on_pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        return self._on_pwritev(fd, [data], offset)

    def _on_write(self, fd: int, data: Buffer) -> int:
        file = self._file(fd)
        if file is not None:
            file.unrecorded = True
        count: int = self._real["write"](fd, data)
        return count

    def _on_pwritev(self, fd: int, pieces: Sequence[Buffer], offset: int, flags: int = 0) -> int:
        file = self._file(fd)
        if file is None:
            passed: int = self._real["pwritev"](fd, pieces, offset, flags)
            return passed
        data = b"".join(pieces)
        write = Write(offset, data, sure=False)
        try:
            number = self._begin("write")
        except (PowerCut, OSError):
            self._stop_write(fd, file, write)
            raise
        if number in self.faults.misplaced:
            write.offset = self._elsewhere(file, offset)
            self.harmed.append(f"a write of {len(data)} bytes at {offset} went to {write.offset}")
        write.sure = bool(flags & os.RWF_DSYNC or self._open[fd][1]) and not self._lies()
        file.pending.append(write)
        self._real["pwrite"](fd, data, write.offset)
        return len(data)

    def _stop_write(self, fd: int, file: File, write: Write) -> None:
        """It ended early: the page cache has all of it, or the first whole pages."""
        length = len(write.data)
        pages_end = (write.offset + self.rng.randrange(length + 1)) // PAGE_BYTES * PAGE_BYTES
        part = write.data[: self.rng.choice((length, max(0, pages_end - write.offset)))]
        if part:
            file.pending.append(Write(write.offset, part))
            self._real["pwrite"](fd, part, write.offset)

    def _elsewhere(self, file: File, offset: int) -> int:
        return max(0, offset + SECTOR * self.rng.choice((-64, -8, -1, 1, 8, 64)))

    def _lies(self) -> bool:
        lies = 0 <= self.faults.lying_from <= self.calls
        if lies and not self.harmed:
            self.harmed.append("syncs keep nothing")
        return lies

    def _on_pread(self, fd: int, length: int, offset: int) -> bytes:
        data: bytes = self._real["pread"](fd, length, offset)
        part = self.faults.other_reads
        if part and data and self._file(fd) is not None and self.rng.random() < part:
            self.harmed.append("a read returned other bytes")
            return self._other(fd, data, offset)
        return data

    def _other(self, fd: int, data: bytes, offset: int) -> bytes:
        """Of the same length: a bit or a sector differs, or all comes from elsewhere in the file."""
        kind = self.rng.randrange(3)
        if kind == 0:
            at = self.rng.randrange(len(data))
            return data[:at] + bytes([data[at] ^ 1 << self.rng.randrange(8)]) + data[at + 1 :]
        if kind == 1:
            at = self.rng.randrange(len(data))
            return (data[:at] + bytes(SECTOR) + data[at + SECTOR :])[: len(data)]
        elsewhere: bytes = self._real["pread"](fd, len(data), self.rng.randrange(offset + len(data)))
        return elsewhere.ljust(len(data), b"\0")

    def _on_fsync(self, fd: int) -> None:
        found = self._open.get(fd)
        if found is None:
            self._real["fsync"](fd)
        elif isinstance(found[0], Directory):
            self._begin("sync of a directory")
            if not self._lies():
                self._sync_names(found[0])
        else:
            self._sync(fd, found[0])

    def _on_fdatasync(self, fd: int) -> None:
        self._on_fsync(fd)

    def _sync(self, fd: int, file: File) -> None:
        try:
            self._begin("sync")
        except OSError:
            self._settle(file)  # the kernel does not try again: later syncs succeed, and keep nothing of it
            raise
        if self._lies():
            return
        for one in file.pending:
            if isinstance(one, int):
                _resize(file.durable, one)
            else:
                _put(file.durable, one.offset, one.data)
        file.pending.clear()
        if file.unrecorded:
            file.durable = bytearray(Path(f"/proc/self/fd/{fd}").read_bytes())
            file.unrecorded = False

    def _sync_names(self, directory: Directory) -> None:
        left: list[Change] = []
        for change in self._changes:
            if any(one is directory for one, _, _ in change):
                _apply(change)
            else:
                left.append(change)
        self._changes = left

    def _on_ftruncate(self, fd: int, size: int) -> None:
        file = self._file(fd)
        if file is not None:
            self._begin("truncate")
            file.pending.append(size)
        self._real["ftruncate"](fd, size)

    def _on_truncate(self, path: Any, size: int) -> None:
        file = self._open[path][0] if isinstance(path, int) and path in self._open else self._node(path)
        if isinstance(file, File):
            self._begin("truncate")
            file.pending.append(size)
        self._real["truncate"](path, size)

    def _on_posix_fallocate(self, fd: int, offset: int, count: int) -> None:
        file = self._file(fd)
        if file is not None:
            self._begin("fallocate")
            file.pending.append(max(offset + count, os.fstat(fd).st_size))
        self._real["posix_fallocate"](fd, offset, count)

    def _on_unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._gone("unlink", path, dir_fd)

    def _on_remove(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._gone("unlink", path, dir_fd)

    def _on_rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._gone("rmdir", path, dir_fd)

    def _gone(self, call: str, path: Any, dir_fd: int | None) -> None:
        place = self._locate(path, dir_fd)
        known = place is not None and place[1] in place[0].now
        if known:
            self._begin(call)
        self._real[call](path, **({} if dir_fd is None else {"dir_fd": dir_fd}))
        if known:
            assert place is not None
            self._change([(*place, None)])

    def _on_mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        place = self._locate(path, dir_fd)
        if place is not None and place[1] not in place[0].now:
            self._begin("mkdir")
            self._change([(*place, Directory())])
        self._real["mkdir"](path, mode, **({} if dir_fd is None else {"dir_fd": dir_fd}))

    def _on_rename(self, before: Any, after: Any) -> None:
        old, new = self._locate(before), self._locate(after)
        if old is not None and new is not None:
            self._begin("rename")
        self._real["rename"](before, after)
        if old is not None and new is not None:
            node = old[0].now[old[1]]
            self._change([(*old, None), (*new, node)])

    def _on_replace(self, before: Any, after: Any) -> None:
        self._on_rename(before, after)

    def punch(self, fd: int, offset: int, length: int) -> None:
        file = self._file(fd)
        if file is not None:
            self._begin("punch")
            zeros = bytes(min(length, max(0, os.fstat(fd).st_size - offset)))
            file.pending.append(Write(offset, zeros, sure=True))
            self._real["pwrite"](fd, zeros, offset)

    # --- LMDB's calls -----------------------------------------------------------------------------------------------

    def _lmdb_open(self, path: bytes, flags: int, mode: int) -> int:
        return self._opened(path, flags, mode, None)

    def _lmdb_pwrite(self, fd: int, address: int, count: int, offset: int) -> int:
        return self._on_pwritev(fd, [ctypes.string_at(address, count)], offset)

    def _lmdb_writev(self, fd: int, vector: int, count: int) -> int:
        pieces = lmdb_calls.buffers_of(vector, count)
        at = os.lseek(fd, 0, os.SEEK_CUR)
        done = self._on_pwritev(fd, pieces, at)
        os.lseek(fd, at + done, os.SEEK_SET)
        return done

    def _lmdb_write(self, fd: int, address: int, count: int) -> int:
        return self._on_write(fd, ctypes.string_at(address, count))

    def _lmdb_fdatasync(self, fd: int) -> int:
        self._on_fsync(fd)
        return 0

    def _lmdb_fsync(self, fd: int) -> int:
        self._on_fsync(fd)
        return 0

    def _lmdb_ftruncate(self, fd: int, size: int) -> int:
        self._on_ftruncate(fd, size)
        return 0


class _HolesOf:
    """In place of the C library of ``fragments.files``."""

    def __init__(self, disk: PowerDisk) -> None:
        self._disk = disk

    def fallocate(self, fd: int, _mode: int, offset: int, length: int) -> int:
        try:
            self._disk.punch(fd, offset, length)
        except OSError as error:
            ctypes.set_errno(error.errno or errno.EIO)
            return -1
        return 0

    def sync_file_range(self, *_arguments: int) -> int:
        return 0


def _apply(change: Change) -> None:
    for directory, name, node in change:
        if node is None:
            directory.durable.pop(name, None)
        else:
            directory.durable[name] = node


def _forget(directory: Directory) -> None:
    """The real directory is empty: everything in it is made again."""
    directory.now = {}


def _resize(content: bytearray, size: int) -> None:
    if len(content) > size:
        del content[size:]
    else:
        content.extend(bytes(size - len(content)))


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset + len(data):
        content.extend(bytes(offset + len(data) - len(content)))
    content[offset : offset + len(data)] = data


def _remove(path: str, real: dict[str, Callable[..., Any]]) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        for name in os.listdir(path):
            _remove(f"{path}/{name}", real)
        real["rmdir"](path)
    elif os.path.lexists(path):
        real["unlink"](path)
