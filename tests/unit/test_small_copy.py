"""Which bytes count as the small copy that a record names."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from storaged.fragments.ports import FragmentHeader, FragmentId
from storaged.hashes import fragment_hash
from storaged.meta.names import RegisterName, Table, Value, Visibility
from storaged.objects.code.small_copy import is_small_copy
from storaged.objects.records import ObjectRecord, PartEntry, Run, Version, encode_object
from storaged.wire import encode

NAME = RegisterName(Table.OBJECT, b"s" * 16, 3, b"key")
DATA_ID = b"d" * 16
SOV1 = b"SOV1\x01\x0c" + bytes(58)
COPY, LIE = b"sealed" * 20, b"a lie!" * 20


def value_of(copy_hash: bytes) -> Value:
    entry = PartEntry(1, DATA_ID, 100, SOV1, 1, "4+2", (Run(0, 1, 1, 2, 1),), small=True, copy_hash=copy_hash)
    version = Version("null", 1, 100, "owner", 1, DATA_ID, b"", False, b"", b"", (entry,))
    return Value(1, b"o" * 16, Visibility.LIVE, encode_object(ObjectRecord((version,))), DATA_ID)


def header_of(payload: bytes, **changes: Any) -> bytes:
    fragment = FragmentId(DATA_ID, 0, 1, 2, 2)
    header = FragmentHeader(fragment.pack(), NAME.pack(), b"", (fragment_hash((payload,)),), 4096, len(payload), 7)
    return encode(msgspec.structs.replace(header, **changes))


@pytest.mark.parametrize("copy_hash", [fragment_hash((COPY,)), b""])
def test_the_copy_of_the_record_counts_with_and_without_its_hash_there(copy_hash: bytes) -> None:
    assert is_small_copy(NAME, value_of(copy_hash), header_of(COPY), COPY)
    assert is_small_copy(NAME, value_of(copy_hash), header_of(COPY, created_ms=1), memoryview(COPY))


def test_other_bytes_count_only_where_the_record_of_an_older_version_does_not_say() -> None:
    assert not is_small_copy(NAME, value_of(fragment_hash((COPY,))), header_of(LIE), LIE)
    assert not is_small_copy(NAME, value_of(fragment_hash((COPY,))), header_of(COPY), LIE)
    assert is_small_copy(NAME, value_of(b""), header_of(LIE), LIE)
    assert not is_small_copy(NAME, value_of(b""), header_of(COPY), LIE)


@pytest.mark.parametrize(
    "changes",
    [
        {"id": FragmentId(b"e" * 16, 0, 1, 2, 2).pack()},
        {"id": FragmentId(DATA_ID, 1, 1, 2, 2).pack()},
        {"id": FragmentId(DATA_ID, 0, 2, 1, 2).pack()},
        {"id": b"short"},
        {"owner": RegisterName(Table.OBJECT, b"s" * 16, 3, b"other").pack()},
        {"part_header": SOV1},
        {"hashes": ()},
        {"hashes": (fragment_hash((COPY,)),) * 2},
        {"hashes": (b"",)},
        {"cell_bytes": 8192},
        {"length": len(COPY) - 1},
    ],
)
@pytest.mark.parametrize("copy_hash", [fragment_hash((COPY,)), b""])
def test_a_header_that_is_not_the_copys_own_is_not_carried_along(copy_hash: bytes, changes: dict[str, Any]) -> None:
    assert not is_small_copy(NAME, value_of(copy_hash), header_of(COPY, **changes), COPY)


def test_what_does_not_decode_is_no_copy() -> None:
    assert not is_small_copy(NAME, value_of(b""), b"\xc1", COPY)
    assert not is_small_copy(NAME, msgspec.structs.replace(value_of(b""), body=b"\xc1\xc1"), header_of(COPY), COPY)
    assert not is_small_copy(NAME, msgspec.structs.replace(value_of(b""), payload=b"e" * 16), header_of(COPY), COPY)
