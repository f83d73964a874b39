"""Encoding of messages and records: msgpack by msgspec, array-like structs, so that adding a field at the end is
compatible.

What is written to disk or sent to a peer derives from :class:`Message`; FORMATS.md lists each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

Buffer = bytes | bytearray | memoryview

T = TypeVar("T")

_new_bytearray = ctypes.pythonapi.PyByteArray_FromStringAndSize
_new_bytearray.argtypes, _new_bytearray.restype = (ctypes.c_char_p, ctypes.c_ssize_t), ctypes.py_object


def unfilled(size: int) -> bytearray:
    """``size`` bytes of whatever the memory held: for who overwrites all of them before anybody looks.
    ``bytearray(size)`` writes zeros, which costs a byte
    of a body about as much as being received or read."""
    found: bytearray = _new_bytearray(None, size)
    return found


class Message(msgspec.Struct, array_like=True, frozen=True):
    """Base of everything stored or sent. Fields are positional: new ones go last and have a default."""


class _Decoders(dict[Any, Callable[[Buffer], Any]]):
    """The decoder of each type, made when it is first asked for."""

    def __missing__(self, kind: Any) -> Callable[[Buffer], Any]:
        found = self[kind] = msgspec.msgpack.Decoder(kind).decode
        return found


MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for data that is not of a type."""

_encoder = msgspec.msgpack.Encoder()
_decoders = _Decoders()

encode = _encoder.encode


def decode(data: Buffer, kind: type[T]) -> T:
    """Raises msgspec.ValidationError or msgspec.DecodeError (both msgspec.MsgspecError), and nothing else, when
    ``data`` is
    not a ``kind``, whoever made it. msgspec lets a text that is not UTF-8 and a nesting that is too deep through as
    what
    Python raises for them: a sender could choose these to get past every handler."""
    try:
        result: T = _decoders[kind](data)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(f"MessagePack data is malformed: {error}") from None
    return result


def decoder_of(kind: type[T]) -> Callable[[Buffer], T]:
    """The bare decoder of one type, for hot paths. Raises any of MALFORMED."""
    return _decoders[kind]


def decode_all(values: Sequence[Buffer], kind: type[T]) -> list[T]:
    """Many encoded values in one call. Raises as ``decode``, unless they are as many values of ``kind``, and nothing
    besides.
    """
    return decode(b"\xdd" + len(values).to_bytes(4, "big") + b"".join(values), list[kind])  # type: ignore[valid-type]
