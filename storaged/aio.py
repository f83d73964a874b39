"""Durable writes that no thread waits for: Linux AIO (io_submit(2)) past the page cache, told of by an eventfd of the
event loop.

A thread that writes and syncs costs more than the write: it must get the interpreter to begin, and once more to say
that it is done, from a loop that has other things to do.
The kernel needs neither. With O_DIRECT and RWF_DSYNC it takes a write to blocks that the file has, sends it to the
drive, and tells when it is there for good.

Where that can't be had (another operating system or processor, a file system without O_DIRECT, or of which nobody knows
that it keeps the promise, no more contexts:
/proc/sys/fs/aio-max-nr) ``DirectFile.open`` says so, and so does ``blocks`` later, of a file system that refuses, or
that writes while it is asked instead of after: then a thread does better.

Source: io_setup(2), io_submit(2), io_getevents(2), eventfd(2), statfs(2); linux/aio_abi.h.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import mmap
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from storaged.wire import Buffer

BLOCK_BYTES = 4096
"""Places and sizes of direct writes are multiples of this: no drive in use has larger blocks."""

SLOW_S = 0.002
WORSE_IN_A_ROW_MAX = 8
"""So many requests in turn that were refused, or took so long and were done when they returned, and the file system is
one that does not write asynchronously.
"""

FILE_SYSTEMS = (0xEF53, 0x58465342)
"""By ``f_type``: ext2 to ext4, XFS. Elsewhere RWF_DSYNC may not mean what is written asynchronously: on btrfs it did
not from Linux 5.16 to 6.0 (kernel commit
8184620ae212), and nothing told."""

_STATFS_BYTES = 256
"""More than ``struct statfs`` has, whose first field is the type, in 8 bytes."""

_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP, errno.EAGAIN, errno.ENOMEM)

_SYSTEM_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2), "riscv64": (0, 1, 4, 2)}
"""By ``platform.machine()``: the numbers of io_setup, io_destroy, io_getevents, io_submit, for which the C library has
no functions.
"""

_IOCB_CMD_PWRITE = 1
_IOCB_FLAG_RESFD = 1

Done = Callable[[OSError | None], None]


class NotTaken(OSError):
    """The kernel does not write like this to this file, or not now. No drive has failed: the same may be written in
    another way.
    """


class _Iocb(ctypes.Structure):
    """``struct iocb``, on a little-endian machine."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("key", ctypes.c_uint32),
        ("rw_flags", ctypes.c_int32),
        ("opcode", ctypes.c_uint16),
        ("priority", ctypes.c_int16),
        ("fd", ctypes.c_uint32),
        ("buffer", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("eventfd", ctypes.c_uint32),
    )


class _Event(ctypes.Structure):
    """``struct io_event``."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("iocb", ctypes.c_uint64),
        ("result", ctypes.c_int64),
        ("result2", ctypes.c_int64),
    )


class DirectFile:
    """A file that exists and has its blocks. One write at a time; one event loop, but ``open`` and ``close``, which may
    block.
    """

    def __init__(self, fd: int, told: int, memory: mmap.mmap, context: int, numbers: tuple[int, int, int, int]) -> None:
        self._fd = fd
        self._told = told
        self._memory = memory
        self._context = context
        self._destroy, self._getevents, self._submit = numbers[1:]
        self._call = ctypes.PyDLL(
            None, use_errno=True
        ).syscall  # keeps the interpreter: what is called so waits for nothing as a rule
        self._call.restype = ctypes.c_long
        held = ctypes.c_char.from_buffer(self._memory)
        self._request = _Iocb(
            rw_flags=os.RWF_DSYNC,
            opcode=_IOCB_CMD_PWRITE,
            fd=fd,
            buffer=ctypes.addressof(held),
            flags=_IOCB_FLAG_RESFD,
            eventfd=self._told,
        )
        del held
        self._requests = (ctypes.c_void_p * 1)(ctypes.addressof(self._request))
        self._event = _Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._done: Done | None = None
        self._worse = 0
        self._refused = False
        """The last one was begun, and refused then."""

    @classmethod
    def open(cls, path: Path, bytes_max: int) -> DirectFile | None:
        """``bytes_max``: of a single write. None: not to be had here."""
        numbers = _SYSTEM_CALLS.get(platform.machine())
        if (
            numbers is None
            or sys.byteorder != "little"
            or not sys.platform.startswith("linux")
            or ctypes.sizeof(ctypes.c_void_p) != 8
        ):
            return None
        descriptors: list[int] = []
        context = ctypes.c_uint64(0)
        try:
            descriptors.append(os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC))
            if _file_system(descriptors[0]) in FILE_SYSTEMS:
                descriptors.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
                memory = mmap.mmap(-1, bytes_max)
                if _system_call()(ctypes.c_long(numbers[0]), ctypes.c_long(1), ctypes.byref(context)) == 0:
                    return cls(descriptors[0], descriptors[1], memory, context.value, numbers)
        except OSError:
            pass
        for descriptor in descriptors:
            os.close(descriptor)
        return None

    @property
    def blocks(self) -> bool:
        """Writes are refused, or done before ``write`` returns, and take long: the event loop
        stands still meanwhile.
        """
        return self._worse >= WORSE_IN_A_ROW_MAX

    def write(self, loop: asyncio.AbstractEventLoop, pieces: Sequence[Buffer], at: int, done: Done) -> None:
        """All of it is durable when ``done(None)`` is called on the loop; ``done(error)``: what the disk has is
        unknown. It is never called before this returns. The pieces are
        free at once. They and ``at`` fill whole blocks, of the file as it is. Raises NotTaken when nothing was begun;
        ``done`` may be told that, too."""
        assert self._done is None, "one write at a time"
        if loop is not self._loop:
            loop.add_reader(self._told, self._heard)
            self._loop = loop
        size, memory = 0, self._memory
        for piece in pieces:
            memory[size : size + len(piece)] = piece
            size += len(piece)
        assert (size | at) % BLOCK_BYTES == 0, "whole blocks alone"
        self._request.bytes, self._request.offset = size, at
        began = time.perf_counter()
        if (
            self._call(ctypes.c_long(self._submit), ctypes.c_uint64(self._context), ctypes.c_long(1), self._requests)
            != 1
        ):
            code = ctypes.get_errno()
            self._worse += 1
            raise NotTaken(code, os.strerror(code))
        self._done = done
        if time.perf_counter() - began >= SLOW_S and self._arrived():
            self._worse += 1
        elif not self._refused:
            self._worse = 0

    def _arrived(self) -> bool:
        """Whether the eventfd has been told; it still will be afterwards."""
        try:
            os.eventfd_write(self._told, os.eventfd_read(self._told))
        except BlockingIOError:
            return False
        return True

    def _heard(self) -> None:
        try:
            os.eventfd_read(self._told)
        except BlockingIOError:
            return
        found = self._call(
            ctypes.c_long(self._getevents),
            ctypes.c_uint64(self._context),
            ctypes.c_long(0),
            ctypes.c_long(1),
            ctypes.byref(self._event),
            None,
        )
        done = self._done
        if done is None or found != 1:
            return
        self._done = None
        result = self._event.result
        self._refused = -result in _REFUSALS
        if self._refused:
            self._worse += 1
            done(NotTaken(-result, os.strerror(-result)))
        elif result < 0:
            done(OSError(-result, os.strerror(-result)))
        elif result != self._request.bytes:
            done(OSError(errno.EIO, f"{result} of {self._request.bytes} bytes were written"))
        else:
            done(None)

    def detach(self) -> None:
        """The loop hears of nothing any more."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._told)
        self._loop = None

    def close(self) -> None:
        """Waits for a write that is under way; nobody is told of it."""
        _system_call()(ctypes.c_long(self._destroy), ctypes.c_uint64(self._context))
        os.close(self._told)
        os.close(self._fd)


def _system_call() -> Callable[..., int]:
    """Gives the interpreter to other threads meanwhile."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    return call


def _file_system(fd: int) -> int:
    found = ctypes.create_string_buffer(_STATFS_BYTES)
    if ctypes.CDLL(None).fstatfs(ctypes.c_int(fd), found):
        return 0
    return int.from_bytes(found.raw[:8], "little")
