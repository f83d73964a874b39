"""The bytes of what a metadata store holds: the test vectors of FORMATS.md, computed once more from its words alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import xxhash

from storaged.meta.names import Ballot, RegisterName, Table, Value, Visibility
from storaged.meta.storage import rowvalue
from storaged.meta.storage.rowvalue import open_small, pack_row, seal_small, unpack_row
from storaged.meta.store_ports import RowDamaged, Slot

NAME = RegisterName(Table.OBJECT, bytes(range(16)), 3, b"photos/1.jpg")
SLOT = Slot(
    NAME,
    Ballot(2, 1_700_000_000_000_000, "gw1", b"incarnat"),
    Value(5, b"\x22" * 16, Visibility.LIVE, b"the body", bytes(range(16))),
)
EPOCH = (2).to_bytes(8, "big")


def documented() -> tuple[bytes, bytes]:
    """The row, and the small value."""
    text = (Path(rowvalue.__file__).parents[2] / "FORMATS.md").read_text()
    block = re.search(r"<!-- row vector -->\s*```\n(.*?)```", text, re.DOTALL)
    assert block is not None
    lines = [bytes.fromhex(line.split("  ")[0]) for line in block[1].splitlines()]
    return b"".join(lines[:-1]), lines[-1]


def test_the_documented_vectors_are_what_the_code_writes() -> None:
    assert documented() == (pack_row(SLOT), seal_small(b"epoch", EPOCH))


def test_the_documented_vectors_are_read_back() -> None:
    row, small = documented()
    assert unpack_row(NAME, row) == SLOT
    assert open_small(b"epoch", small) == EPOCH


def test_the_checks_of_the_documented_vectors_are_as_the_text_says() -> None:
    row, small = documented()
    seed = xxhash.xxh3_64_intdigest(bytes([1]) + bytes(range(16)) + bytes([3]))
    assert row[1:9] == xxhash.xxh3_64_digest(row[9:] + b"photos/1.jpg", seed)
    assert small[:8] == xxhash.xxh3_64_digest(b"epoch" + small[8:], len(b"epoch"))


def test_a_row_or_a_small_value_that_lies_elsewhere_is_damaged() -> None:
    row, small = documented()
    for name in (
        NAME._replace(key=b"photos/2.jpg"),
        NAME._replace(shard=4),
        NAME._replace(table=Table.UPLOAD),
        NAME._replace(scope=bytes(16)),
    ):
        with pytest.raises(RowDamaged):
            unpack_row(name, row)
    for context in (b"retired", b"epoc", b""):
        with pytest.raises(RowDamaged):
            open_small(context, small)
    with pytest.raises(RowDamaged):
        open_small(b"epoch", small[:7])
