"""Writes durably without a thread: Linux AIO (io_submit(2)) past the page cache; an eventfd tells the event loop when
it is done.

A thread that writes and syncs costs more than the write: it needs the interpreter to begin, and once more to report the
end, from a loop that has other work. The kernel needs neither. With O_DIRECT and RWF_DSYNC it accepts a write to blocks
that the file has, sends it to the drive, and reports when it is durable.

``uring`` does the same without ever waiting; this is for machines that forbid it.

``DirectFile.open`` returns None where that is not available: another operating system or processor, a file system
without O_DIRECT or one that is not known to keep the promise, no more contexts (/proc/sys/fs/aio-max-nr). Later
``blocks_loop`` reports a file system that refuses, or that writes during the call instead of after it; there a thread
does better.

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
"""Offsets and sizes of direct writes are multiples of this: no drive in use has larger blocks."""

SLOW_S = 0.002
FAILING_IN_A_ROW_MAX = 8
"""When this many requests in a row were refused, or took longer than SLOW_S and were complete on return, the file
system counts as one that does not write asynchronously.
"""

FILE_SYSTEMS = (0xEF53, 0x58465342)
"""By ``f_type``: ext2 to ext4, XFS. On others RWF_DSYNC may not cover asynchronous writes: on btrfs it did not from
Linux 5.16 to 6.0 (kernel commit 8184620ae212), without any sign of it."""

STUCK_S = 0.05
AVOIDED_S = 10.0
"""After one request that took STUCK_S to begin, ``blocks_loop`` is true for AVOIDED_S: the disk may hang."""

_STATFS_BYTES = 256
"""Larger than ``struct statfs``, whose first field is the type, in 8 bytes."""

_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP, errno.EAGAIN, errno.ENOMEM)

_SYSTEM_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2), "riscv64": (0, 1, 4, 2)}
"""By ``platform.machine()``: the numbers of io_setup, io_destroy, io_getevents and io_submit. The C library has no
functions for them."""

_IOCB_CMD_PWRITE = 1
_IOCB_FLAG_RESFD = 1

OnDone = Callable[[OSError | None], None]


class DirectWriteRefused(OSError):
    """The kernel refuses this kind of write to this file, or refuses it now. No drive has failed: the same data may be
    written in another way.
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


class OneWrite:
    """What direct writes by Linux AIO and by io_uring have in common: the memory that the kernel writes from, and one
    write at a time, on one event loop. The kernel makes the descriptor ``events`` readable when a write ended.
    """

    def __init__(self, fd: int, events: int, bytes_max: int) -> None:
        self._fd = fd
        self._events = events
        self._memory = mmap.mmap(-1, bytes_max)
        start = ctypes.c_char.from_buffer(self._memory)
        self._address = ctypes.addressof(start)
        del start
        # PyDLL keeps the interpreter: these calls do not wait, as a rule.
        self._call = ctypes.PyDLL(None, use_errno=True).syscall
        self._call.restype = ctypes.c_long
        self._bytes = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_done: OnDone | None = None
        self._failing_in_a_row = 0

    def _on_event(self) -> None:
        raise NotImplementedError

    def _stage(self, loop: asyncio.AbstractEventLoop, pieces: Sequence[Buffer], at: int) -> int:
        """Copies the pieces for the kernel. Returns their bytes."""
        assert self._on_done is None, "one write at a time"
        if loop is not self._loop:
            loop.add_reader(self._events, self._on_event)
            self._loop = loop
        size, memory = 0, self._memory
        for piece in pieces:
            memory[size : size + len(piece)] = piece
            size += len(piece)
        assert (size | at) % BLOCK_BYTES == 0, "only whole blocks"
        self._bytes = size
        return size

    def _not_begun(self) -> DirectWriteRefused:
        """The error of a system call that began nothing."""
        code = ctypes.get_errno()
        self._failing_in_a_row += 1
        return DirectWriteRefused(code, os.strerror(code))

    def _conclude(self, result: int, *, refused: bool) -> None:
        """Calls ``on_done``. ``result``: bytes, or a negative error number."""
        on_done = self._on_done
        if on_done is None:
            return
        self._on_done = None
        if refused:
            self._failing_in_a_row += 1
            on_done(DirectWriteRefused(-result, os.strerror(-result)))
        elif result < 0:
            on_done(OSError(-result, os.strerror(-result)))
        elif result != self._bytes:
            on_done(OSError(errno.EIO, f"{result} of {self._bytes} bytes were written"))
        else:
            on_done(None)

    def detach(self) -> None:
        """Stops listening on the event loop."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._events)
        self._loop = None


class DirectFile(OneWrite):
    """Writes to an existing file that has its blocks. One write at a time, on one event loop; ``open`` and ``close``
    may block and may run elsewhere.
    """

    def __init__(self, fd: int, eventfd: int, bytes_max: int, context: int, numbers: tuple[int, int, int, int]) -> None:
        super().__init__(fd, eventfd, bytes_max)
        self._context = context
        self._destroy, self._getevents, self._submit = numbers[1:]
        self._request = _Iocb(
            rw_flags=os.RWF_DSYNC,
            opcode=_IOCB_CMD_PWRITE,
            fd=fd,
            buffer=self._address,
            flags=_IOCB_FLAG_RESFD,
            eventfd=eventfd,
        )
        self._requests = (ctypes.c_void_p * 1)(ctypes.addressof(self._request))
        self._event = _Event()
        self._avoided_until_s = 0.0
        self._refused_late = False
        """Whether the last request was accepted first and refused then."""

    @classmethod
    def open(cls, path: Path, bytes_max: int) -> DirectFile | None:
        """Opens a file for direct writes of at most ``bytes_max`` each; None where they are not available."""
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
            if file_system_of(descriptors[0]) in FILE_SYSTEMS:
                descriptors.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
                if system_call()(ctypes.c_long(numbers[0]), ctypes.c_long(1), ctypes.byref(context)) == 0:
                    return cls(descriptors[0], descriptors[1], bytes_max, context.value, numbers)
        except OSError:
            pass
        for descriptor in descriptors:
            os.close(descriptor)
        return None

    @property
    def blocks_loop(self) -> bool:
        """Whether writes are refused, or take long and are complete before ``write`` returns, which stops the event
        loop; also for a while after one that took very long to begin.
        """
        if self._avoided_until_s:
            if time.perf_counter() < self._avoided_until_s:
                return True
            self._avoided_until_s = 0.0
        return self._failing_in_a_row >= FAILING_IN_A_ROW_MAX

    def write(self, loop: asyncio.AbstractEventLoop, pieces: Sequence[Buffer], at: int, on_done: OnDone) -> None:
        """Writes ``pieces`` at offset ``at``; together they fill whole blocks that the file has.

        ``on_done(None)`` is called on the loop once all of it is durable, ``on_done(error)`` when the disk has an
        unknown part of it; never before this method returns. The pieces are free at once. Raises DirectWriteRefused
        when nothing was begun; ``on_done`` may get that error too.
        """
        self._request.bytes, self._request.offset = self._stage(loop, pieces, at), at
        began = time.perf_counter()
        if (
            self._call(ctypes.c_long(self._submit), ctypes.c_uint64(self._context), ctypes.c_long(1), self._requests)
            != 1
        ):
            raise self._not_begun()
        self._on_done = on_done
        took_s = time.perf_counter() - began
        if took_s >= STUCK_S:
            self._avoided_until_s = began + took_s + AVOIDED_S
        if took_s >= SLOW_S and self._is_complete():
            self._failing_in_a_row += 1
        elif not self._refused_late:
            self._failing_in_a_row = 0

    def _is_complete(self) -> bool:
        """Whether the eventfd has an event; it keeps the event."""
        try:
            os.eventfd_write(self._events, os.eventfd_read(self._events))
        except BlockingIOError:
            return False
        return True

    def _on_event(self) -> None:
        try:
            os.eventfd_read(self._events)
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
        if self._on_done is None or found != 1:
            return
        result = self._event.result
        self._refused_late = -result in _REFUSALS
        self._conclude(result, refused=self._refused_late)

    def close(self) -> None:
        """Waits for a write that is under way, without calling ``on_done``."""
        system_call()(ctypes.c_long(self._destroy), ctypes.c_uint64(self._context))
        os.close(self._events)
        os.close(self._fd)


def system_call() -> Callable[..., int]:
    """``syscall(2)``; other threads may run meanwhile."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    return call


def file_system_of(fd: int) -> int:
    found = ctypes.create_string_buffer(_STATFS_BYTES)
    if ctypes.CDLL(None).fstatfs(ctypes.c_int(fd), found):
        return 0
    return int.from_bytes(found.raw[:8], "little")
