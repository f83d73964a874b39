"""Erasure coding: Reed-Solomon over GF(2^8) with a systematic Cauchy matrix. ISA-L computes it on the caller's own
buffers.

The generator is ISA-L's ``gf_gen_cauchy1_matrix`` (polynomial 0x11d): rows 0..k-1 are the identity, row i >= k has 1 /
(i XOR j) in column j. Any k rows are independent, so any k of the k + m fragments give back the block. ``k == 1`` means
whole copies: no arithmetic.

The library is the one in the pyeclib wheel, called directly: pyeclib's own interface copies every cell into fragments
of its own, which costs more than the coding. Pointers come from the buffer protocol, so bytes, bytearrays and slices of
pooled memory all work.

The calls keep the interpreter lock (``PyDLL``): a stripe takes about 8 microseconds, a block of 3 MiB 0.1 ms. When the
lock was released around each stripe, the same block took 30 ms while another thread computed in Python, since every
release then waits for the interpreter's switch interval of 5 ms.

Errors: ImportError at import when there is no ISA-L, ValueError for arguments that do not fit.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from storaged.cluster.layout import Profile
from storaged.hashes import fragment_hash
from storaged.wire import Buffer, unfilled

FRAGMENTS_MAX = 255
"""GF(2^8) has that many non-zero elements; the Cauchy matrix has one row per fragment."""

_TABLE_BYTES = 32
"""ISA-L expands each matrix element to a multiplication table of 32 bytes."""

_RECOVERIES_MAX = 512
"""Cached recovery tables: 4+2 has 15 sets of survivors, 8+4 has 495. A set is used again as long as the same disks are
away.
"""


def _candidates() -> Iterator[str]:
    """The system's library is looked for when the wheel has none: ctypes starts a compiler for that."""
    spec = importlib.util.find_spec("pyeclib")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        site = Path(folder).parent
        for pattern in ("pyeclib.libs/libisal*", "pyeclib/.dylibs/libisal*"):
            yield from sorted(map(str, site.glob(pattern)))
    system = ctypes.util.find_library("isal")
    if system:
        yield system


def _load() -> ctypes.PyDLL:
    tried: list[str] = []
    for name in _candidates():
        try:
            library = ctypes.PyDLL(name)
            number, pointer = ctypes.c_int, ctypes.c_void_p
            for function, arguments, result in (
                ("gf_gen_cauchy1_matrix", (pointer, number, number), None),
                ("gf_invert_matrix", (pointer, pointer, number), number),
                ("gf_mul", (ctypes.c_ubyte, ctypes.c_ubyte), ctypes.c_ubyte),
                ("ec_init_tables", (number, number, pointer, pointer), None),
                ("ec_encode_data", (number, number, number, pointer, pointer, pointer), None),
            ):
                bound = getattr(library, function)
                bound.argtypes, bound.restype = arguments, result
        except (OSError, AttributeError) as error:
            tried.append(f"{name}: {error}")
        else:
            return library
    raise ImportError(
        "ISA-L was not found: install the pyeclib wheel, or the system's libisal. Tried: "
        + ("; ".join(tried) or "nothing")
    )


_isal = _load()


class _PyBuffer(ctypes.Structure):
    """CPython's ``Py_buffer`` (stable since 3.11): gives the address of read-only memory too."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int)
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_PyBuffer),)
_WRITABLE = 1


class _Pins:
    """Holds buffers in place while native code uses their addresses."""

    def __init__(self) -> None:
        self._views: list[_PyBuffer] = []

    def address(self, buffer: Buffer, *, writable: bool = False) -> int:
        """The address of the first byte. Raises BufferError for memory that is not contiguous, or read-only although
        ``writable``.
        """
        view = _PyBuffer()
        _get_buffer(buffer, ctypes.byref(view), _WRITABLE if writable else 0)
        self._views.append(view)
        address: int = view.buf or 0
        return address

    def __enter__(self) -> _Pins:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for view in self._views:
            _release_buffer(ctypes.byref(view))


def _check(profile: Profile) -> None:
    if profile.k < 1 or profile.m < 0 or profile.n > FRAGMENTS_MAX:
        raise ValueError(f"profile {profile} cannot be: k >= 1, m >= 0, k + m <= {FRAGMENTS_MAX}")


@lru_cache(maxsize=64)
def _generator(profile: Profile) -> bytes:
    """n rows of k bytes."""
    matrix = ctypes.create_string_buffer(profile.n * profile.k)
    _isal.gf_gen_cauchy1_matrix(matrix, profile.n, profile.k)
    return matrix.raw


def _tables(rows: bytes, k: int) -> ctypes.Array[ctypes.c_char]:
    count = len(rows) // k
    tables = ctypes.create_string_buffer(_TABLE_BYTES * k * count)
    _isal.ec_init_tables(k, count, ctypes.create_string_buffer(rows, len(rows)), tables)
    return tables


@lru_cache(maxsize=64)
def _encode_tables(profile: Profile) -> ctypes.Array[ctypes.c_char]:
    return _tables(_generator(profile)[profile.k * profile.k :], profile.k)


@lru_cache(maxsize=_RECOVERIES_MAX)
def _recover_tables(
    profile: Profile, survivors: tuple[int, ...], wanted: tuple[int, ...]
) -> ctypes.Array[ctypes.c_char]:
    """Survivors = G[survivors] x data, hence fragment w = G[w] x G[survivors]^-1 x survivors."""
    k, generator = profile.k, _generator(profile)
    rows = b"".join(generator[position * k : position * k + k] for position in survivors)
    inverse = ctypes.create_string_buffer(k * k)
    if _isal.gf_invert_matrix(ctypes.create_string_buffer(rows, len(rows)), inverse, k):
        raise ArithmeticError(f"fragments {survivors} of {profile} are not independent")
    inverted = inverse.raw
    result = bytearray()
    for position in wanted:
        for column in range(k):
            total = 0
            for index in range(k):
                total ^= _isal.gf_mul(generator[position * k + index], inverted[index * k + column])
            result.append(total)
    return _tables(bytes(result), k)


def parity_length(profile: Profile, cell_bytes: int, sealed_bytes: int) -> int:
    """Bytes of each parity fragment of a block of ``sealed_bytes``."""
    full, rest = divmod(sealed_bytes, profile.k * cell_bytes)
    return full * cell_bytes + min(rest, cell_bytes)


def encode_block(profile: Profile, cell_bytes: int, sealed: Buffer, parity: Sequence[memoryview]) -> None:
    """Computes the m parity fragments of a block.

    ``sealed``: the block's sealed bytes in the order of the stream. ``parity[i]``: the buffer of fragment k + i, at
    least ``parity_length`` bytes, filled cell after cell. A ragged last stripe is coded as if its short and missing
    cells ended in zeros.
    """
    _check(profile)
    k, total = profile.k, len(sealed)
    length = parity_length(profile, cell_bytes, total)
    if len(parity) != profile.m or any(len(buffer) < length for buffer in parity):
        raise ValueError(f"profile {profile} needs {profile.m} parity buffers of {length} bytes")
    if k == 1:
        for buffer in parity:
            buffer[:total] = sealed
        return
    if not parity or not total:
        return
    data, coding = (ctypes.c_void_p * k)(), (ctypes.c_void_p * profile.m)()
    tables = _encode_tables(profile)
    full, rest = divmod(total, k * cell_bytes)
    with _Pins() as pins:
        base = pins.address(sealed)
        out = [pins.address(buffer, writable=True) for buffer in parity]
        for stripe in range(full):
            start = base + stripe * k * cell_bytes
            data[:] = [start + column * cell_bytes for column in range(k)]
            coding[:] = [address + stripe * cell_bytes for address in out]
            _isal.ec_encode_data(cell_bytes, k, profile.m, tables, data, coding)
        if rest:
            width = min(rest, cell_bytes)
            padded = bytearray(k * width)
            padded[:rest] = memoryview(sealed)[full * k * cell_bytes :]
            start = pins.address(padded)
            data[:] = [start + column * width for column in range(k)]
            coding[:] = [address + full * cell_bytes for address in out]
            _isal.ec_encode_data(width, k, profile.m, tables, data, coding)


def reconstruct(
    profile: Profile, present: Mapping[int, Buffer], wanted: Sequence[int], length: int
) -> dict[int, bytearray]:
    """Computes fragments (or the cells of one stripe) from any k others: position -> ``length`` bytes.

    ``present``: position -> bytes. The k lowest positions are used; shorter ones count as padded with zeros.
    ``length``: of the longest of them, which a parity fragment has. The caller cuts a data fragment to its own length.
    Raises ValueError with fewer than k present.
    """
    _check(profile)
    k = profile.k
    if any(not 0 <= position < profile.n for position in (*present, *wanted)):
        raise ValueError(f"positions of {profile} are 0..{profile.n - 1}")
    if len(present) < k:
        raise ValueError(f"{len(present)} fragments are too few for {profile}")
    survivors = tuple(sorted(present)[:k])
    if any(len(present[position]) > length for position in survivors):
        raise ValueError(f"a fragment is longer than {length} bytes")
    result = {position: bytearray(length) for position in wanted}
    if k == 1:
        source = present[survivors[0]]
        for buffer in result.values():
            buffer[: len(source)] = source
        return result
    if not length or not result:
        return result
    tables = _recover_tables(profile, survivors, tuple(result))
    with _Pins() as pins:
        data = (ctypes.c_void_p * k)(*(pins.address(_padded(present[position], length)) for position in survivors))
        coding = (ctypes.c_void_p * len(result))(*(pins.address(buffer, writable=True) for buffer in result.values()))
        _isal.ec_encode_data(length, k, len(result), tables, data, coding)
    return result


class CellRun(NamedTuple):
    """Consecutive cells of a fragment, contiguous in memory, of the stripes from ``first`` on."""

    first: int
    cells: memoryview


class StripeSolver:
    """Computes cells of one stripe after the other from k fragments of their block, into memory of its own, which the
    next stripe overwrites.

    So a cell is opened while it is still in the processor's cache, and a stripe costs one native call and little else.
    """

    def __init__(self, profile: Profile, cell_bytes: int, runs: Mapping[int, CellRun], wanted: Sequence[int]) -> None:
        """``runs``: of each of the k fragments, by position. ``wanted``: positions of the cells to compute. Raises
        ValueError, BufferError.
        """
        _check(profile)
        if len(runs) != profile.k or profile.k == 1:
            raise ValueError(f"{len(runs)} fragments are not what {profile} is solved from")
        survivors = sorted(runs)
        self._cell_bytes = cell_bytes
        self._runs = [runs[position] for position in survivors]
        """Views: they keep their memory in place."""
        self._tables = _recover_tables(profile, tuple(survivors), tuple(wanted))
        self._data, self._coding = (ctypes.c_void_p * profile.k)(), (ctypes.c_void_p * len(wanted))()
        self._cells = {position: memoryview(unfilled(cell_bytes)) for position in wanted}
        with _Pins() as pins:
            self._bases = [pins.address(run.cells) - run.first * cell_bytes for run in self._runs]
            self._coding[:] = [pins.address(cell, writable=True) for cell in self._cells.values()]
        self.first = max(run.first for run in self._runs)
        self.end = min(run.first + len(run.cells) // cell_bytes for run in self._runs)
        """For ``first <= stripe < end`` all k cells are present, and full."""

    def solve(self, stripe: int) -> Mapping[int, memoryview]:
        """The wanted cells, by position, as long as full ones: the caller cuts the last one of a block."""
        if not self.first <= stripe < self.end:
            raise ValueError(f"stripe {stripe} is not one of {self.first}..{self.end - 1}")
        start = stripe * self._cell_bytes
        self._data[:] = [base + start for base in self._bases]
        _isal.ec_encode_data(
            self._cell_bytes, len(self._bases), len(self._cells), self._tables, self._data, self._coding
        )
        return self._cells


def _padded(buffer: Buffer, length: int) -> Buffer:
    return buffer if len(buffer) == length else bytes(buffer).ljust(length, b"\0")


def fragment_slices(profile: Profile, cell_bytes: int, sealed: Buffer, position: int) -> list[memoryview]:
    """The cells of the data fragment at ``position``, as slices of the block, without copies. With k = 1, the block
    itself.
    """
    _check(profile)
    if not 0 <= position < profile.k:
        raise ValueError(f"data fragments of {profile} are 0..{profile.k - 1}")
    view = memoryview(sealed)
    if profile.k == 1:
        return [view] if len(view) else []
    return [
        view[start : start + cell_bytes] for start in range(position * cell_bytes, len(view), profile.k * cell_bytes)
    ]


def fragments_of(profile: Profile, cell_bytes: int, sealed: Buffer, parity: Sequence[Buffer]) -> list[list[memoryview]]:
    """Every fragment of the block as the pieces that it consists of, in position order; of whole copies (k = 1) only
    one, since they are equal.
    """
    data = [fragment_slices(profile, cell_bytes, sealed, position) for position in range(profile.k)]
    if profile.k == 1:
        return data
    length = parity_length(profile, cell_bytes, len(sealed))
    return data + [[memoryview(buffer)[:length]] for buffer in parity]


def fragment_hashes(profile: Profile, cell_bytes: int, sealed: Buffer, parity: Sequence[Buffer]) -> tuple[bytes, ...]:
    """The hash (20 bytes) of every fragment of the block, in position order; of whole copies (k = 1) only one."""
    return tuple(map(fragment_hash, fragments_of(profile, cell_bytes, sealed, parity)))
