"""The bytes of what a metadata store holds: the test vectors of FORMATS.md, computed once more from its words alone."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
import xxhash

from storaged.meta.names import Ballot, RegisterName, Table, Value, Visibility
from storaged.meta.storage import rowvalue
from storaged.meta.storage.rowvalue import intact, open_small, pack_row, seal_small, seed_of, sound_rows, unpack_row
from storaged.meta.store_ports import RowDamaged, Slot

NAME = RegisterName(Table.OBJECT, bytes(range(16)), 3, b"photos/1.jpg")
SLOT = Slot(
    NAME,
    Ballot(2, 1_700_000_000_000_000, "gw1", b"incarnat"),
    Value(5, b"\x22" * 16, Visibility.LIVE, b"the body", bytes(range(16))),
    copied=True,
)
EPOCH = (2).to_bytes(8, "big")


def documented() -> tuple[bytes, bytes]:
    """The row, and the small value."""
    text = (Path(rowvalue.__file__).parents[2] / "FORMATS.md").read_text()
    block = re.search(r"<!-- row vector -->\s*```\n(.*?)```", text, re.DOTALL)
    assert block is not None
    lines = [bytes.fromhex(line.split("  ")[0]) for line in block[1].splitlines()]
    return b"".join(lines[:-1]), lines[-1]


def without_its_copy() -> bytes:
    text = (Path(rowvalue.__file__).parents[2] / "FORMATS.md").read_text()
    found = re.search(r"<!-- row without its copy -->\s*```\n(\w+)  ", text)
    assert found is not None
    return bytes.fromhex(found[1]) + documented()[0][10:]


def test_the_documented_vectors_are_what_the_code_writes() -> None:
    row, small = documented()
    assert (b"\2" + row[1:], small) == (pack_row(SLOT), seal_small(b"epoch", EPOCH))
    assert without_its_copy() == pack_row(SLOT._replace(copied=False))


def test_the_documented_vectors_are_read_back() -> None:
    row, small = documented()
    assert unpack_row(NAME, b"\2" + row[1:]) == SLOT
    assert unpack_row(NAME, without_its_copy()) == SLOT._replace(copied=False)
    assert open_small(b"epoch", small) == EPOCH


def test_a_row_from_before_the_bit_counts_as_accepted_with_its_copy() -> None:
    row, _ = documented()
    assert row[0] == 1
    assert unpack_row(NAME, row) == SLOT


def test_a_row_without_a_copy_has_no_bit() -> None:
    plain = SLOT._replace(value=msgspec.structs.replace(SLOT.value, payload=b""), copied=False)
    assert pack_row(plain)[0] == 1
    assert pack_row(plain._replace(copied=True)) == pack_row(plain)
    assert unpack_row(NAME, pack_row(plain)) == plain


def test_the_bit_does_not_flip_unnoticed() -> None:
    copied, uncopied = pack_row(SLOT), without_its_copy()
    for row in (b"\3" + copied[1:], b"\2" + uncopied[1:], b"\1" + uncopied[1:], b"\0" + copied[1:], b"\4" + copied[1:]):
        assert not intact(NAME.prefix, NAME.key, row)
        assert not sound_rows(seed_of(NAME.prefix), [NAME.key], [row])
        with pytest.raises(RowDamaged):
            unpack_row(NAME, row)
    seed = seed_of(NAME.prefix)
    assert sound_rows(seed, [NAME.key] * 2, [copied, b"\1" + copied[1:]])
    assert intact(NAME.prefix, NAME.key, uncopied)
    assert not sound_rows(seed, [NAME.key], [uncopied])


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
