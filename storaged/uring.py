"""Writes durably without a thread, and without ever waiting: io_uring (io_uring_setup(2)) past the page cache.

As ``aio``, with one difference: the kernel gives each write to a thread of its own at once (IOSQE_ASYNC). So a disk
that hangs, or a file system that is frozen, can't stop the event loop: io_submit(2) waits where the file system, its
journal or the queue of the device does. It takes the loop a third of the time, too.

``RingFile.open`` returns None where that is not available: Linux before 5.6, io_uring forbidden (containers,
/proc/sys/kernel/io_uring_disabled), and where ``aio`` has nothing either. Use ``aio.DirectFile`` then.

Source: io_uring_setup(2), io_uring_enter(2), io_uring(7); linux/io_uring.h.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import mmap
import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

from storaged.aio import (
    FAILING_IN_A_ROW_MAX,
    FILE_SYSTEMS,
    OnDone,
    OneWrite,
    file_system_of,
    system_call,
)
from storaged.wire import Buffer

_SETUP, _ENTER = 425, 426
"""The numbers of the system calls; the same on every processor."""

_OFF_SQES = 0x10000000
_SINGLE_MMAP = 1 << 0
_NO_DROP = 1 << 1
_GET_EVENTS = 1
_OP_WRITE = 23
_ASYNC = 1 << 4

_ENTRY = struct.Struct("<BBHiQQIi32x")
"""``struct io_uring_sqe``: operation, flags, priority, descriptor, offset, address, bytes, rw_flags."""

_COMPLETION = struct.Struct("<QiI")
"""``struct io_uring_cqe``: user data, result, flags."""

_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP, errno.EAGAIN, errno.ENOMEM, errno.EINTR, errno.EBADF)

assert _ENTRY.size == 64
assert _COMPLETION.size == 16


class _Offsets(ctypes.Structure):
    """``struct io_sqring_offsets`` and ``struct io_cqring_offsets``. ``last`` is ``array`` there, ``flags`` here."""

    _fields_ = (
        ("head", ctypes.c_uint32),
        ("tail", ctypes.c_uint32),
        ("mask", ctypes.c_uint32),
        ("entries", ctypes.c_uint32),
        ("fifth", ctypes.c_uint32),
        ("sixth", ctypes.c_uint32),
        ("last", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
    )


class _Parameters(ctypes.Structure):
    """``struct io_uring_params``."""

    _fields_ = (
        ("sq_entries", ctypes.c_uint32),
        ("cq_entries", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("thread_cpu", ctypes.c_uint32),
        ("thread_idle", ctypes.c_uint32),
        ("features", ctypes.c_uint32),
        ("wq_fd", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32 * 3),
        ("sq", _Offsets),
        ("cq", _Offsets),
    )


class RingFile(OneWrite):
    """Writes to an existing file that has its blocks, as ``aio.DirectFile``. One write at a time, on one event loop;
    ``open`` and ``close`` may block and may run elsewhere.
    """

    def __init__(self, fd: int, ring_fd: int, parameters: _Parameters, bytes_max: int) -> None:
        super().__init__(fd, ring_fd, bytes_max)
        sq, cq = parameters.sq, parameters.cq
        size = max(sq.last + 4 * parameters.sq_entries, cq.sixth + _COMPLETION.size * parameters.cq_entries)
        self._ring = mmap.mmap(ring_fd, size)
        self._entries = mmap.mmap(ring_fd, _ENTRY.size * parameters.sq_entries, offset=_OFF_SQES)
        self._sq_tail = ctypes.c_uint32.from_buffer(self._ring, sq.tail)
        self._cq_head = ctypes.c_uint32.from_buffer(self._ring, cq.head)
        self._cq_tail = ctypes.c_uint32.from_buffer(self._ring, cq.tail)
        self._completions, self._cq_mask = cq.sixth, parameters.cq_entries - 1
        ctypes.c_uint32.from_buffer(self._ring, sq.last).value = 0  # each request is the first entry
        self._request = tuple(ctypes.c_long(part) for part in (_ENTER, ring_fd, 1, 0, 0, 0, 0))

    @classmethod
    def open(cls, path: Path, bytes_max: int) -> RingFile | None:
        """Opens a file for direct writes of at most ``bytes_max`` each; None where they are not available."""
        if sys.byteorder != "little" or not sys.platform.startswith("linux") or ctypes.sizeof(ctypes.c_void_p) != 8:
            return None
        descriptors: list[int] = []
        try:
            descriptors.append(os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC))
            if file_system_of(descriptors[0]) in FILE_SYSTEMS:
                parameters = _Parameters()
                ring_fd = system_call()(ctypes.c_long(_SETUP), ctypes.c_long(1), ctypes.byref(parameters))
                if ring_fd >= 0:  # it closes on exec by itself
                    descriptors.append(ring_fd)
                    if parameters.features & (_SINGLE_MMAP | _NO_DROP) == _SINGLE_MMAP | _NO_DROP:
                        return cls(descriptors[0], ring_fd, parameters, bytes_max)
        except OSError:
            pass
        for descriptor in descriptors:
            os.close(descriptor)
        return None

    @property
    def blocks_loop(self) -> bool:
        """Whether the kernel refuses these writes; they never block."""
        return self._failing_in_a_row >= FAILING_IN_A_ROW_MAX

    def write(self, loop: asyncio.AbstractEventLoop, pieces: Sequence[Buffer], at: int, on_done: OnDone) -> None:
        """As ``aio.DirectFile.write``."""
        size = self._stage(loop, pieces, at)
        _ENTRY.pack_into(self._entries, 0, _OP_WRITE, _ASYNC, 0, self._fd, at, self._address, size, os.RWF_DSYNC)
        self._sq_tail.value += 1
        if self._call(*self._request) != 1:
            self._sq_tail.value -= 1  # the kernel has not taken it
            raise self._not_begun()
        self._on_done = on_done

    def _on_event(self) -> None:
        head = self._cq_head.value
        if head == self._cq_tail.value:
            return
        _, result, _ = _COMPLETION.unpack_from(
            self._ring, self._completions + _COMPLETION.size * (head & self._cq_mask)
        )
        self._cq_head.value = head + 1
        refused = -result in _REFUSALS
        if not refused:
            self._failing_in_a_row = 0
        self._conclude(result, refused=refused)

    def close(self) -> None:
        """Waits for a write that is under way, without calling ``on_done``."""
        wait = tuple(ctypes.c_long(part) for part in (_ENTER, self._events, 0, 1, _GET_EVENTS, 0, 0))
        call = system_call()
        while self._on_done is not None and self._cq_head.value == self._cq_tail.value:
            if call(*wait) < 0 and ctypes.get_errno() != errno.EINTR:
                break
        self._on_done = None
        del self._sq_tail, self._cq_head, self._cq_tail  # they lie in the maps, which have descriptors of their own
        self._ring.close()
        self._entries.close()
        os.close(self._events)
        os.close(self._fd)
