"""The bytes of an entry of the fragment index: in either form it is read as it was, and what was changed is not
believed.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import lmdb
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from storaged.errors import IndexDamaged
from storaged.fragments import entry as entry_module
from storaged.fragments import index as index_module
from storaged.fragments.entry import BROKEN, SHORT_BYTES, Entry, pack_entry, unpack_entry
from storaged.fragments.format import TRAILER_BYTES, align
from storaged.fragments.index import Index
from storaged.fragments.index_rows import CheckpointRow, Position
from storaged.fragments.ports import FragmentId
from storaged.wire import decode, encode

DISK = "00112233445566aa"
KEY = FragmentId(bytes(range(16)), 7, 1, 2, 0).pack()
COPY = Entry(1, 64, 4840, 216, 4608, 4096, 1, 1_700_000_000_000)
U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)


def long_form(key: bytes, entry: Entry) -> bytes:
    """As programs wrote every entry that knew of no other."""
    raw = struct.pack(">6I2Q", *entry[:8]) + struct.pack(f">{len(entry.shadows)}I", *entry.shadows)
    return raw + (xxhash.xxh3_64_intdigest(key + raw) & 0xFFFFFFFF).to_bytes(4, "big")


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    """As a log has them, and with one number or two that it never has."""
    payload_bytes = draw(st.integers(0, 1 << 28))
    payload_start = draw(st.integers(7, 1 << 17)) * 8
    entry = Entry(
        draw(U32), draw(U32), payload_start + align(payload_bytes) + TRAILER_BYTES, payload_start, payload_bytes,
        1 << draw(st.integers(0, 28)), draw(st.integers(0, 1 << 49)), draw(st.integers(0, 1 << 49)),
    )  # fmt: skip
    for name, value in draw(st.dictionaries(st.sampled_from(Entry._fields[:6]), U32, max_size=2)).items():
        entry = entry._replace(**{name: value})
    return entry._replace(shadows=tuple(draw(st.lists(U32, max_size=2))))


@given(entry=entries())
def test_an_entry_is_read_as_it_was_and_takes_no_more_than_the_long_form(entry: Entry) -> None:
    packed = pack_entry(KEY, entry)
    assert unpack_entry(KEY, packed) == entry
    assert unpack_entry(KEY, memoryview(packed)) == entry
    assert packed == long_form(KEY, entry) or len(packed) == SHORT_BYTES
    assert unpack_entry(KEY, long_form(KEY, entry)) == entry


@given(entry=entries(), at=st.integers(0, 10_000), bit=st.integers(0, 7), cut=st.integers(1, 40))
def test_what_was_changed_or_lies_elsewhere_is_broken(entry: Entry, at: int, bit: int, cut: int) -> None:
    packed = bytearray(pack_entry(KEY, entry))
    assert unpack_entry(KEY[:-1] + b"\7", packed) is BROKEN
    assert unpack_entry(KEY, packed[:-cut]) is BROKEN
    packed[at % len(packed)] ^= 1 << bit
    assert unpack_entry(KEY, packed) is BROKEN


def test_the_documented_entries_are_what_the_code_writes() -> None:
    text = (Path(entry_module.__file__).parents[1] / "FORMATS.md").read_text()
    block = re.search(r"<!-- entry vector -->\s*```\n(.*?)```", text, re.DOTALL)
    assert block is not None
    assert [bytes.fromhex(line.split("  ")[0]) for line in block[1].splitlines()] == [
        pack_entry(KEY, COPY),
        pack_entry(KEY, COPY._replace(shadows=(7,))),
    ]


def version_of(directory: Path) -> int:
    with lmdb.open(str(directory), max_dbs=6) as environment, environment.begin() as transaction:
        row = decode(
            transaction.get(b"checkpoint", db=environment.open_db(b"meta", txn=transaction, create=False)),
            CheckpointRow,
        )
    return row.version


def checkpointed(index: Index) -> None:
    checkpoint = index.freeze(Position(1, 9000), ())
    index.commit(checkpoint)
    index.thaw(checkpoint)


def test_an_index_that_knew_one_form_is_read_and_says_so_no_more_once_it_has_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [FragmentId(bytes([number]) * 16, 0, 1, 2, 0).pack() for number in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "INDEX_VERSION", 1)
        patch.setattr(index_module, "pack_entry", long_form)
        index = Index(tmp_path, DISK)
        for key in keys[:2]:
            index.put(key, COPY)
        checkpointed(index)
        index.close()
    assert version_of(tmp_path) == 1
    index = Index(tmp_path, DISK)
    assert [index.lookup(key) for key in keys] == [COPY, COPY, None]
    index.put(keys[2], COPY)
    checkpointed(index)
    index.close()
    assert version_of(tmp_path) == 2
    index = Index(tmp_path, DISK)
    assert list(index.entries()) == [(key, COPY) for key in keys]
    assert index.fragments == 3
    index.close()


@pytest.mark.parametrize("version", [0, 3])
def test_an_index_of_a_version_that_is_not_known_is_refused(tmp_path: Path, version: int) -> None:
    index = Index(tmp_path, DISK)
    index.put(KEY, COPY)
    checkpointed(index)
    index.close()
    with lmdb.open(str(tmp_path), max_dbs=6) as environment, environment.begin(write=True) as transaction:
        transaction.put(
            b"checkpoint",
            encode(CheckpointRow(version, DISK, 1, 9000, 1, 1)),
            db=environment.open_db(b"meta", txn=transaction, create=False),
        )
    with pytest.raises(IndexDamaged, match=f"version {version}, this program knows 2"):
        Index(tmp_path, DISK)
