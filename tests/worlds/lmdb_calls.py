"""Puts Python functions in place of the system calls by which LMDB changes its file.

Theory of operation
    LMDB is C code in an extension module. A preload library or a block device could come between it and its file, but
    needs a compiler, or root and a module of the kernel. The dynamic linker leaves an easier way: a shared object calls
    functions of the C library through a table of addresses (the *global offset table*). Here an entry of that table of
    LMDB's extension module, and of nothing else in the process, gets the address of a callback.

    So it works without compiler and root, in this process, and costs two microseconds a call. It needs Linux, ELF with
    64 bits, and a processor whose kinds of relocation are listed here. ``unavailable`` says why it can't work.

Source: elf(5); the ABI supplements for x86-64 and AArch64 (relocations JUMP_SLOT and GLOB_DAT).
"""

from __future__ import annotations

import ctypes
import functools
import glob
import mmap
import os
import platform
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb

_RELOCATIONS = {"x86_64": (6, 7), "aarch64": (1025, 1026)}
"""By ``platform.machine()``: R_*_GLOB_DAT and R_*_JUMP_SLOT."""

_RELA_TABLE, _DYNAMIC_SYMBOLS = 4, 11
"""``sh_type`` of a section."""

_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")

_int, _size, _offset, _text, _address = (
    ctypes.c_int,
    ctypes.c_size_t,
    ctypes.c_int64,
    ctypes.c_char_p,
    ctypes.c_void_p,
)

SIGNATURES: dict[str, Any] = {
    name: ctypes.CFUNCTYPE(*types, use_errno=True)
    for name, types in {
        "open": (_int, _text, _int, _int),
        "pwrite": (ctypes.c_ssize_t, _int, _address, _size, _offset),
        "writev": (ctypes.c_ssize_t, _int, _address, _int),
        "write": (ctypes.c_ssize_t, _int, _address, _size),
        "fdatasync": (_int, _int),
        "fsync": (_int, _int),
        "ftruncate": (_int, _int, _offset),
    }.items()
}
"""The calls that change a file or make a change durable."""

Implementations = dict[str, Callable[..., int]]
"""By the names of ``SIGNATURES``. One that raises OSError fails with its errno; any other exception is EIO to LMDB."""


@functools.cache
def unavailable() -> str:
    """Why LMDB's calls can't be replaced here; empty where they can."""
    if not sys.platform.startswith("linux") or sys.maxsize < 2**32 or sys.byteorder != "little":
        return "needs Linux on a little-endian machine of 64 bits"
    if platform.machine() not in _RELOCATIONS:
        return f"the relocations of {platform.machine()} are not known here"
    try:
        places = _places()
    except (OSError, ValueError, struct.error, StopIteration) as error:
        return f"LMDB's extension module can't be read: {error!r}"
    missing = sorted({"open", "pwrite", "writev", "fdatasync"} - places.keys())
    return f"LMDB's extension module does not call {', '.join(missing)} through its table" if missing else ""


@contextmanager
def replaced(implementations: Implementations) -> Iterator[None]:
    """LMDB calls these inside of the block. Not while another thread uses LMDB."""
    assert not unavailable(), unavailable()
    callbacks = {name: SIGNATURES[name](_errno_of(call)) for name, call in implementations.items() if name in _places()}
    before = {}
    for name, callback in callbacks.items():
        entry = ctypes.c_uint64.from_address(_places()[name])
        before[name] = entry.value
        entry.value = ctypes.cast(callback, ctypes.c_void_p).value or 0
    try:
        yield
    finally:
        for name, address in before.items():
            ctypes.c_uint64.from_address(_places()[name]).value = address


def buffers_of(vector: int, count: int) -> list[bytes]:
    """The bytes that a ``struct iovec[count]`` refers to."""
    pairs = (ctypes.c_uint64 * (2 * count)).from_address(vector)
    return [ctypes.string_at(pairs[2 * place], pairs[2 * place + 1]) for place in range(count)]


def _errno_of(call: Callable[..., int]) -> Callable[..., int]:
    def called(*arguments: Any) -> int:
        try:
            return call(*arguments)
        except OSError as error:
            ctypes.set_errno(error.errno or 5)
        except BaseException:  # it must not get into C code; the caller knows what it raised
            ctypes.set_errno(5)
        return -1

    return called


@functools.cache
def _places() -> dict[str, int]:
    """The address of each call's entry in the table of LMDB's extension module; the entries can be written."""
    module = Path(next(iter(glob.glob(str(Path(lmdb.__file__).parent / "cpython*.so")))))
    data, kinds = module.read_bytes(), _RELOCATIONS[platform.machine()]
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("it is no ELF file of 64 bits")
    base = _loaded_at(module)
    table_at, entry_bytes, entries = struct.unpack_from("<Q", data, 40)[0], *struct.unpack_from("<HH", data, 58)
    sections = [_SECTION.unpack_from(data, table_at + number * entry_bytes) for number in range(entries)]
    found: dict[str, int] = {}
    for section in sections:
        if section[1] != _RELA_TABLE or sections[section[6]][1] != _DYNAMIC_SYMBOLS:
            continue
        symbols = sections[section[6]]
        names_at = sections[symbols[6]][4]
        for at in range(section[4], section[4] + section[5], _RELOCATION.size):
            place, info, _ = _RELOCATION.unpack_from(data, at)
            if info & 0xFFFFFFFF in kinds:
                name_at = names_at + _SYMBOL.unpack_from(data, symbols[4] + (info >> 32) * _SYMBOL.size)[0]
                name = data[name_at : data.index(b"\0", name_at)].decode()
                if name in SIGNATURES:
                    found[name] = base + place
    _make_writable(found.values())
    return found


def _loaded_at(module: Path) -> int:
    """The lowest address of the module in this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return min(int(line.split("-")[0], 16) for line in lines if line.endswith(os.path.realpath(module)))


def _make_writable(addresses: Any) -> None:
    """The linker protects the table of a module that was linked so (RELRO)."""
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for page in {address // mmap.PAGESIZE * mmap.PAGESIZE for address in addresses}:
        if protect(page, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE):
            raise OSError(ctypes.get_errno(), "the table can't be made writable")
