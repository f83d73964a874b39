"""Encodes messages and records: msgpack by msgspec, with array-like structs, so that a new field at the end is
compatible.

Everything that is written to disk or sent to a peer derives from :class:`Message`; FORMATS.md lists each message.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

Buffer = bytes | bytearray | memoryview

T = TypeVar("T")

_new_bytearray = ctypes.pythonapi.PyByteArray_FromStringAndSize
_new_bytearray.argtypes, _new_bytearray.restype = (ctypes.c_char_p, ctypes.c_ssize_t), ctypes.py_object


def unfilled(size: int) -> bytearray:
    """``size`` uninitialised bytes, for a caller that overwrites all of them before they are read.

    ``bytearray(size)`` writes zeros, which costs about as much per byte as receiving or reading it.
    """
    found: bytearray = _new_bytearray(None, size)
    return found


class Message(msgspec.Struct, array_like=True, frozen=True):
    """Base of everything that is stored or sent. Fields are positional: new ones go last and have a default."""


class _Decoders(dict[Any, Callable[[Buffer], Any]]):
    """The decoder of each type, made at its first use.

    One thread at a time makes one: msgspec looks at the fields of a type only then, by Python code, and a second thread
    would meanwhile decode by what is there of them. That ended a node by SIGSEGV.
    """

    def __missing__(self, kind: Any) -> Callable[[Buffer], Any]:
        with _making:
            found = self[kind] = msgspec.msgpack.Decoder(kind).decode
        return found


_making = threading.RLock()


MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for data that does not match a type."""

_encoder = msgspec.msgpack.Encoder()
_decoders = _Decoders()

encode = _encoder.encode


def decode(data: Buffer, kind: type[T]) -> T:
    """Decodes ``data`` as a ``kind``.

    Raises msgspec.ValidationError or msgspec.DecodeError (both msgspec.MsgspecError), and nothing else, when ``data``
    is no ``kind``. For text that is not UTF-8 and for nesting that is too deep, msgspec lets Python's own errors
    through; a hostile sender could use these to get past every handler.
    """
    try:
        result: T = _decoders[kind](data)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(f"MessagePack data is malformed: {error}") from None
    return result


def decoder_of(kind: type[T]) -> Callable[[Buffer], T]:
    """The bare decoder of one type, for hot paths. Raises any of MALFORMED."""
    return _decoders[kind]


def decode_all(values: Sequence[Buffer], kind: type[T]) -> list[T]:
    """Decodes many values in one call. Raises as ``decode`` unless each of ``values`` is exactly one ``kind``."""
    return decode(b"\xdd" + len(values).to_bytes(4, "big") + b"".join(values), list[kind])  # type: ignore[valid-type]
