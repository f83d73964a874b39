"""A disk that hangs on demand: a FUSE file system over a folder, in a process of its own.

What a program asks of the kernel really waits then: reads, page faults of memory maps, writes, syncs, opens, statvfs.
Threads that wait can't be interrupted, as with a drive that does not answer. Requests that waited are carried out when
the disk is well again. It covers no direct asynchronous writes (storaged uses none on FUSE): for these, tests freeze a
file system on a loop device (``frozen_disk``).

Needs Linux, /dev/fuse and root.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import select
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

READS, WRITES, SYNCS, OPENS, SPACE = "reads", "writes", "syncs", "opens", "space"
HANG_S_MAX = 60.0
"""A disk that hangs for so long is released: a test that waits for it fails, and does not block what comes after it."""

EVERYTHING = (READS, WRITES, SYNCS, OPENS, SPACE)

_LOOKUP, _FORGET, _GETATTR, _SETATTR, _READLINK, _SYMLINK = 1, 2, 3, 4, 5, 6
_MKDIR, _UNLINK, _RMDIR, _RENAME = 9, 10, 11, 12
_OPEN, _READ, _WRITE, _STATFS, _RELEASE, _FSYNC, _FLUSH, _INIT = 14, 15, 16, 17, 18, 20, 25, 26
_OPENDIR, _READDIR, _RELEASEDIR, _FSYNCDIR, _CREATE, _INTERRUPT = 27, 28, 29, 30, 35, 36
_DESTROY, _BATCH_FORGET, _FALLOCATE, _RENAME2 = 38, 42, 43, 45
"""Of linux/fuse.h."""

_KINDS = {
    READS: (_READ,),
    WRITES: (_WRITE, _SETATTR, _SYMLINK, _MKDIR, _UNLINK, _RMDIR, _RENAME, _RENAME2, _CREATE, _FALLOCATE),
    SYNCS: (_FSYNC, _FSYNCDIR),
    OPENS: (_LOOKUP, _OPEN, _OPENDIR, _READDIR, _GETATTR),
    SPACE: (_STATFS,),
}
_KIND = {code: kind for kind, codes in _KINDS.items() for code in codes}

_HEAD = struct.Struct("<IIQQIIII")
_VALID_S = 3600
_KEEP_CACHE = 2
_WRITE_BYTES = 128 * 1024


def available() -> bool:
    return sys.platform == "linux" and os.geteuid() == 0 and os.path.exists("/dev/fuse")


class HangingDisk:
    """A mounted one. ``directory`` is the disk; ``backing`` what is on the drive."""

    def __init__(self, place: Path) -> None:
        self.directory, self.backing = place / "disk", place / "drive"
        for path in (self.directory, self.backing):
            path.mkdir(parents=True)
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(self.directory), str(self.backing)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ask("ready")

    def hang(self, *kinds: str, name: str = "") -> None:
        """Requests of these kinds (all when none is named) wait from now on. ``name``: only those for files whose path
        contains it.
        """
        self._ask("hang", kinds or EVERYTHING, name)

    def slow(self, delay_s: float, *kinds: str) -> None:
        """Requests of these kinds take so long from now on."""
        self._ask("slow", kinds or EVERYTHING, delay_s)

    def unreadable(self, name: str, *, above: int = 0) -> None:
        """Reads of files whose path contains ``name`` fail from now on (EIO), from byte ``above`` on: as those of a bad
        sector. A page of a memory map that can't be read is SIGBUS.
        """
        self._ask("unreadable", name, above)

    def refuse(self, error: str, *kinds: str, name: str = "") -> None:
        """Requests of these kinds fail from now on, with this name of ``errno``. ``name``: as in ``hang``."""
        self._ask("refuse", kinds, [error, name])

    def release(self) -> None:
        """The disk is well again: what waited is done now, in its order."""
        self._ask("release")

    def waiting(self) -> int:
        """How many requests wait."""
        return int(self._ask("waiting"))

    def drop_cache(self, path: Path) -> None:
        """Pages of this file are not in memory any more, but for those that are dirty, or mapped and in use. Before the
        disk hangs.
        """
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        self.release()
        _libc.umount2(str(self.directory).encode(), 2)
        assert self._server.stdin is not None
        self._server.stdin.close()
        try:
            self._server.wait(10)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()

    def _ask(self, *words: Any) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(words) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


@contextlib.contextmanager
def hanging_disk() -> Iterator[HangingDisk]:
    with tempfile.TemporaryDirectory(prefix="hanging-disk-") as place:
        disk = HangingDisk(Path(place))
        try:
            yield disk
        finally:
            disk.close()


# --- the server -------------------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)


class _Server:
    def __init__(self, mount: str, backing: str) -> None:
        self._fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fuse},rootmode=40000,user_id=0,group_id=0,allow_other,max_read={_WRITE_BYTES}"
        if _libc.mount(b"hanging", mount.encode(), b"fuse.hanging", 0, options.encode()):
            raise OSError(ctypes.get_errno(), "mount")
        self._paths = {1: backing}
        self._nodes = {backing: 1}
        self._next = 2
        self._hung: tuple[str, ...] = ()
        self._name = ""
        self._slow: tuple[str, ...] = ()
        self._delay_s = 0.0
        self._hung_until_s = 0.0
        self._unreadable, self._unreadable_above = "", 0
        self._refused: tuple[str, ...] = ()
        self._error, self._refused_name = 0, ""
        self._waiting: list[tuple[int, int, int, bytes]] = []
        self._late: list[tuple[float, int, int, int, bytes]] = []
        self._calls: dict[int, Callable[[int, bytes], bytes]] = {
            _LOOKUP: lambda node, body: self._entry(self._child(node, body)),
            _GETATTR: lambda node, _body: self._attributes(node),
            _SETATTR: self._setattr,
            _READLINK: lambda node, _body: os.readlink(self._paths[node]).encode(),
            _SYMLINK: self._symlink,
            _MKDIR: self._mkdir,
            _UNLINK: lambda node, body: self._gone(os.unlink, self._child(node, body)),
            _RMDIR: lambda node, body: self._gone(os.rmdir, self._child(node, body)),
            _RENAME: lambda node, body: self._rename(node, body, 8),
            _RENAME2: lambda node, body: self._rename(node, body, 16),
            _OPEN: lambda node, body: self._open(self._paths[node], struct.unpack_from("<I", body)[0]),
            _READ: self._read,
            _WRITE: self._write,
            _STATFS: self._statfs,
            _RELEASE: self._release_file,
            _FSYNC: self._fsync,
            _FLUSH: lambda _node, _body: b"",
            _OPENDIR: lambda _node, _body: struct.pack("<QII", 0, 0, 0),
            _READDIR: self._readdir,
            _RELEASEDIR: lambda _node, _body: b"",
            _FSYNCDIR: lambda _node, _body: b"",
            _CREATE: self._create,
            _FALLOCATE: self._fallocate,
        }

    def run(self) -> None:
        poll = select.poll()
        poll.register(self._fuse, select.POLLIN)
        poll.register(0, select.POLLIN)
        commands = b""
        while True:
            due_s = min(
                [late[0] for late in self._late[:1]] + ([self._hung_until_s] if self._hung else []), default=None
            )
            wait_ms = max(0, int((due_s - time.monotonic()) * 1000) + 1) if due_s is not None else None
            for fd, _event in poll.poll(wait_ms):
                if fd == self._fuse:
                    if not self._take():
                        return
                    continue
                more = os.read(0, 65536)
                if not more:
                    return
                commands += more
                while b"\n" in commands:
                    line, commands = commands.split(b"\n", 1)
                    print(json.dumps(self._command(*json.loads(line))), flush=True)
            if self._hung and time.monotonic() >= self._hung_until_s:
                self._command("release")
            while self._late and self._late[0][0] <= time.monotonic():
                self._answer(*self._late.pop(0)[1:])

    def _command(self, word: str, kinds: Any = (), more: Any = None) -> int:
        if word == "hang":
            self._hung, self._name = tuple(kinds), more
            self._hung_until_s = time.monotonic() + HANG_S_MAX
        elif word == "slow":
            self._slow, self._delay_s = tuple(kinds), more
        elif word == "refuse":
            self._refused, self._error, self._refused_name = tuple(kinds), getattr(errno, more[0]), more[1]
        elif word == "unreadable":
            self._unreadable, self._unreadable_above = kinds, more
        elif word == "release":
            self._hung = self._slow = self._refused = ()
            self._unreadable = ""
            waiting, self._waiting = self._waiting, []
            for request in waiting:
                self._answer(*request)
        return len(self._waiting)

    def _take(self) -> bool:
        try:
            data = os.read(self._fuse, _WRITE_BYTES + 4096 * 2)
        except OSError as error:
            return error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN)
        _length, code, unique, node, *_ = _HEAD.unpack_from(data)
        request = unique, code, node, data[_HEAD.size :]
        kind = _KIND.get(code, "")
        if kind in self._hung and self._name in self._paths.get(node, ""):
            self._waiting.append(request)
        elif kind in self._slow:
            self._late.append((time.monotonic() + self._delay_s, *request))
        else:
            self._answer(*request)
        return True

    def _answer(self, unique: int, code: int, node: int, body: bytes) -> None:
        if code in (_FORGET, _BATCH_FORGET, _INTERRUPT):
            return
        failed, reply = 0, b""
        try:
            full = self._error in (errno.ENOSPC, errno.EDQUOT)  # what gives room back goes on
            frees = full and code in (_SETATTR, _UNLINK, _RMDIR)
            if not frees and _KIND.get(code) in self._refused and self._refused_name in self._paths.get(node, ""):
                raise OSError(self._error, "")
            if code == _INIT:
                reply = self._init(body)
            elif code != _DESTROY:
                call = self._calls.get(code)
                if call is None:
                    raise OSError(errno.ENOSYS, "")
                reply = call(node, body)
        except OSError as error:
            failed = error.errno or errno.EIO
        except KeyError:
            failed = errno.ESTALE
        if failed:
            reply = b""
        with contextlib.suppress(OSError):  # the caller was killed meanwhile
            os.write(self._fuse, struct.pack("<IiQ", 16 + len(reply), -failed, unique) + reply)

    @staticmethod
    def _init(body: bytes) -> bytes:
        major, _minor, ahead, flags = struct.unpack_from("<IIII", body)
        big_writes = flags & (1 << 5)
        return struct.pack("<IIIIHHIIHHI28x", major, 31, ahead, big_writes, 16, 12, _WRITE_BYTES, 1, 32, 0, 0)

    def _child(self, node: int, body: bytes) -> str:
        return self._paths[node] + "/" + body.split(b"\0", 1)[0].decode()

    def _packed(self, path: str) -> bytes:
        found = os.lstat(path)
        times = (found.st_atime, found.st_mtime, found.st_ctime)
        return struct.pack(
            "<QQQQQQIIIIIIIIII",
            found.st_ino,
            found.st_size,
            found.st_blocks,
            *(int(at) for at in times),
            *(int(at % 1 * 1e9) for at in times),
            found.st_mode,
            found.st_nlink,
            found.st_uid,
            found.st_gid,
            0,
            4096,
            0,
        )

    def _attributes(self, node: int) -> bytes:
        return struct.pack("<QII", _VALID_S, 0, 0) + self._packed(self._paths[node])

    def _entry(self, path: str) -> bytes:
        packed = self._packed(path)
        if path not in self._nodes:
            self._nodes[path], self._paths[self._next] = self._next, path
            self._next += 1
        return struct.pack("<QQQQII", self._nodes[path], 0, _VALID_S, _VALID_S, 0, 0) + packed

    def _gone(self, remove: Callable[[str], None], path: str) -> bytes:
        remove(path)
        self._nodes.pop(path, None)  # the node keeps its path: open files are known by their descriptors
        return b""

    def _rename(self, node: int, body: bytes, skip: int) -> bytes:
        target = struct.unpack_from("<Q", body)[0]
        old, new, *_ = body[skip:].split(b"\0")
        before, after = self._paths[node] + "/" + old.decode(), self._paths[target] + "/" + new.decode()
        os.rename(before, after)
        self._nodes.pop(after, None)
        moved = self._nodes.pop(before, None)
        if moved is not None:
            self._nodes[after], self._paths[moved] = moved, after
        return b""

    def _setattr(self, node: int, body: bytes) -> bytes:
        valid, _, handle, size = struct.unpack_from("<IIQQ", body)
        if valid & 8:
            os.truncate(handle if valid & 64 else self._paths[node], size)
        if valid & 1:
            os.chmod(self._paths[node], stat.S_IMODE(struct.unpack_from("<I", body, 68)[0]))
        return self._attributes(node)

    def _symlink(self, node: int, body: bytes) -> bytes:
        name, target = body.split(b"\0")[:2]
        path = self._paths[node] + "/" + name.decode()
        os.symlink(target, path)
        return self._entry(path)

    def _mkdir(self, node: int, body: bytes) -> bytes:
        path = self._child(node, body[8:])
        os.mkdir(path, stat.S_IMODE(struct.unpack_from("<I", body)[0]))
        return self._entry(path)

    def _open(self, path: str, flags: int, mode: int = 0) -> bytes:
        flags &= ~(os.O_DIRECT | os.O_EXCL if not mode else os.O_DIRECT)
        return struct.pack("<QII", os.open(path, flags | os.O_CLOEXEC, mode), _KEEP_CACHE, 0)

    def _create(self, node: int, body: bytes) -> bytes:
        flags, mode = struct.unpack_from("<II", body)
        path = self._child(node, body[16:])
        opened = self._open(path, flags | os.O_CREAT, stat.S_IMODE(mode))
        return self._entry(path) + opened

    def _read(self, node: int, body: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", body)
        if (
            self._unreadable
            and self._unreadable in self._paths.get(node, "")
            and offset + size > self._unreadable_above
        ):
            raise OSError(errno.EIO, "")  # the kernel reads page by page then
        return os.pread(handle, size, offset)

    def _write(self, _node: int, body: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", body)
        return struct.pack("<II", os.pwrite(handle, body[40 : 40 + size], offset), 0)

    def _statfs(self, _node: int, _body: bytes) -> bytes:
        found = os.statvfs(self._paths[1])
        return struct.pack(
            "<QQQQQIIII24x",
            found.f_blocks,
            found.f_bfree,
            found.f_bavail,
            found.f_files,
            found.f_ffree,
            found.f_bsize,
            255,
            found.f_frsize,
            0,
        )

    def _release_file(self, _node: int, body: bytes) -> bytes:
        os.close(struct.unpack_from("<Q", body)[0])
        return b""

    def _fsync(self, _node: int, body: bytes) -> bytes:
        os.fdatasync(struct.unpack_from("<Q", body)[0])
        return b""

    def _fallocate(self, _node: int, body: bytes) -> bytes:
        handle, offset, length, mode = struct.unpack_from("<QQQI", body)
        _libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        if _libc.fallocate(handle, mode, offset, length):
            raise OSError(ctypes.get_errno(), "")
        return b""

    def _readdir(self, node: int, body: bytes) -> bytes:
        _handle, offset, size = struct.unpack_from("<QQI", body)
        reply = b""
        for place, name in enumerate(sorted(os.listdir(self._paths[node])), 1):
            if place <= offset:
                continue
            packed = name.encode()
            entry = struct.pack("<QQII", place, place, len(packed), 0) + packed
            entry += bytes(-len(entry) % 8)
            if len(reply) + len(entry) > size:
                break
            reply += entry
        return reply


if __name__ == "__main__":
    try:
        _Server(sys.argv[1], sys.argv[2]).run()
    finally:  # also when the test was killed
        _libc.umount2(sys.argv[1].encode(), 2)
