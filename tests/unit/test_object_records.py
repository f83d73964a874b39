"""Bodies of objects' registers: what is written now, and what was written before bodies had heads."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.meta.storage.row_head import head_of
from storaged.objects.api import CHECKSUM_ALGORITHMS
from storaged.objects.brief import brief_meta, full_meta, listed_checksum
from storaged.objects.records import (
    ListedFields,
    ObjectRecord,
    PartEntry,
    Run,
    SealedMeta,
    Version,
    decode_heads,
    decode_object,
    decode_version,
    encode_object,
)
from storaged.wire import encode

PART = PartEntry(1, b"d" * 16, 5, b"h" * 64, 1, "4+2", (Run(0, 1, 1, 2, 1),), small=True)


def version(number: int = 1, **changed: object) -> Version:
    made = Version(
        f"v{number}",
        1_700_000_000_000,
        5,
        "owner",
        1,
        b"c" * 16,
        b"listed %d" % number,
        False,
        b"w" * 112,
        b"meta",
        (PART,),
    )
    return msgspec.structs.replace(made, **changed)


def fields_of(version: Version) -> ListedFields:
    return ListedFields(*(getattr(version, name) for name in ListedFields.__struct_fields__))


def of_old(version: Version) -> list[object]:
    """As a version was encoded before: its list field between the metadata and the parts, what tells a delete marker
    second.
    """
    v = version
    return [
        v.version_id, v.delete_marker, v.modified_ms, v.size, v.owner, v.bucket_key, v.context_id, v.wrapped_key,
        v.meta, v.listing, v.parts, v.manifest, v.multipart, v.part_count, v.pages,
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 15, 16, 32])
def test_the_head_of_a_record_is_what_a_list_prints_of_its_newest_version(count: int) -> None:
    record = ObjectRecord(tuple(version(number) for number in range(count)))
    body = encode_object(record)
    assert decode_object(body) == record
    assert decode_heads([head_of(body)]) == [fields_of(record.versions[0])]
    assert len(head_of(body)) < 60


@pytest.mark.parametrize("count", [1, 3, 16])
def test_a_record_from_before_there_were_heads_is_read_and_listed(count: int) -> None:
    versions = [version(number) for number in range(count)]
    body = encode([[of_old(version) for version in versions]])
    assert decode_object(body) == ObjectRecord(tuple(versions))
    newer = encode_object(ObjectRecord((version(99),)))
    assert decode_heads([head_of(newer), head_of(body)]) == [fields_of(version(99)), fields_of(versions[0])]


def test_a_version_that_an_upload_pinned_is_read_in_both_forms() -> None:
    assert decode_version(encode(version())) == version()
    assert decode_version(encode(of_old(version()))) == version()


@pytest.mark.parametrize("head", [b"", b"\x00", b"\x91\x90", b"\xa2v1", encode("v1") + encode(1) * 12])
def test_what_is_neither_a_head_nor_a_record_is_refused(head: bytes) -> None:
    good = head_of(encode_object(ObjectRecord((version(),))))
    for heads in ([head], [good, head], [head, good]):
        with pytest.raises(msgspec.MsgspecError):
            decode_heads(heads)


@given(
    st.dictionaries(st.sampled_from(CHECKSUM_ALGORITHMS), st.text("abc=-2", min_size=1, max_size=12), max_size=3),
    st.sampled_from(["", "FULL_OBJECT", "COMPOSITE"]),
)
def test_checksums_read_as_they_were_written_and_the_usual_one_takes_few_bytes(
    checksums: dict[str, str], kind: str
) -> None:
    meta = SealedMeta("e" * 32, checksums=checksums, checksum_type=kind)
    stored = brief_meta(meta)
    assert full_meta(stored) == meta
    assert full_meta(meta) == meta, "metadata from before is written out"
    assert brief_meta(stored) == stored
    algorithm = next(iter(stored.checksums), "")
    assert listed_checksum(algorithm, stored.checksum_type) == (next(iter(checksums), ""), kind)
    if list(checksums) == ["CRC64NVME"] and kind == "FULL_OBJECT":
        assert len(encode(stored)) <= len(encode(meta)) - 19
    else:
        assert stored is meta
