"""Inventories: what their documents mean, and the code of AWS for each one that is wrong; when one is due; what is in
its files.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from urllib.parse import unquote

import pytest
from msgspec.structs import replace

from storaged.errors import S3Error
from storaged.objects.code.history import Entry
from storaged.objects.code.lifecycle import DAY_MS, Rules
from storaged.objects.configuration.inventory import (
    CSV,
    DAILY,
    PARQUET,
    WEEKLY,
    Inventory,
    InventoryEncryption,
)
from storaged.objects.inventory.listing import Listed
from storaged.objects.records import BucketRecord, Kept, Lock, SealedList, Version
from storaged.s3 import xml
from storaged.s3.inventories import is_due
from storaged.s3.inventory.columns import FIELDS, OPTIONAL, Source, columns_of, row_of, schema_of
from storaged.s3.inventory.files import CsvFile, data_file
from storaged.s3.inventory.manifest import ListedFile, documents
from storaged.s3.ops.inventory import content, parse

BUCKET = "<Bucket>arn:aws:s3:::target</Bucket>"
FORM = "<Format>CSV</Format>"
SCHEDULE = "<Schedule><Frequency>Daily</Frequency></Schedule>"
VERSIONS = "<IncludedObjectVersions>All</IncludedObjectVersions>"
ENABLED = "<IsEnabled>true</IsEnabled>"
ID = "<Id>one</Id>"


def target(*parts: str) -> str:
    return f"<Destination><S3BucketDestination>{''.join(parts)}</S3BucketDestination></Destination>"


TARGET = target(BUCKET, FORM)


def document(*parts: str) -> bytes:
    return f"<InventoryConfiguration>{''.join(parts)}</InventoryConfiguration>".encode()


def whole(*, without: str = "", more: str = "", where: str = TARGET) -> bytes:
    return document(*(part for part in (ID, ENABLED, VERSIONS, SCHEDULE, where) if part != without), more)


FULL = Inventory(
    "one",
    False,
    "target",
    PARQUET,
    WEEKLY,
    False,
    "lists/of",
    "123456789012",
    "photos/",
    ("Size", "ETag", "ObjectOwner"),
    InventoryEncryption("aws:kms", "alias/aws/s3"),
)


@pytest.mark.parametrize(
    "report",
    [
        Inventory("one", True, "target", CSV, DAILY, True),
        FULL,
        replace(FULL, encryption=InventoryEncryption("AES256"), prefix="", target_prefix=""),
        replace(FULL, id="A.b_c-9", fields=tuple(sorted(FIELDS))),
    ],
)
def test_a_configuration_comes_back_as_it_was_sent(report: Inventory) -> None:
    assert parse(xml.document("InventoryConfiguration", content(report))) == report


ENCRYPTED = "<Encryption>{}</Encryption>"
WRONG = [
    ("nothing", document(), "MalformedXML"),
    ("not XML", b"<InventoryConfiguration>", "MalformedXML"),
    ("another document", b"<Tagging/>", "MalformedXML"),
    *((f"without {name}", whole(without=part), "MalformedXML") for name, part in (
        ("Id", ID), ("IsEnabled", ENABLED), ("IncludedObjectVersions", VERSIONS), ("Schedule", SCHEDULE),
        ("Destination", TARGET),
    )),
    ("an element twice", whole(more=ID), "MalformedXML"),
    ("an unknown element", whole(more="<Colour>red</Colour>"), "MalformedXML"),
    ("enabled in capitals", whole(without=ENABLED, more="<IsEnabled>TRUE</IsEnabled>"), "MalformedXML"),
    (
        "other versions",
        whole(without=VERSIONS, more="<IncludedObjectVersions>Some</IncludedObjectVersions>"),
        "MalformedXML",
    ),
    (
        "another frequency",
        whole(without=SCHEDULE, more="<Schedule><Frequency>Hourly</Frequency></Schedule>"),
        "MalformedXML",
    ),
    ("no frequency", whole(without=SCHEDULE, more="<Schedule/>"), "MalformedXML"),
    ("another format", whole(where=target(BUCKET, "<Format>JSON</Format>")), "MalformedXML"),
    ("no format", whole(where=target(BUCKET)), "MalformedXML"),
    ("no bucket", whole(where=target(FORM)), "MalformedXML"),
    ("two destinations", whole(where=TARGET.replace("</Destination>", "<S3BucketDestination/></Destination>")),
     "MalformedXML"),
    ("an unknown part", whole(where=target(BUCKET, FORM, "<Region>x</Region>")), "MalformedXML"),
    ("a bucket's name", whole(where=target("<Bucket>target</Bucket>", FORM)), "InvalidS3DestinationBucket"),
    (
        "an ARN with an account",
        whole(where=target("<Bucket>arn:aws:s3::123456789012:target</Bucket>", FORM)),
        "InvalidS3DestinationBucket",
    ),
    (
        "an ARN of an object",
        whole(where=target("<Bucket>arn:aws:s3:::target/key</Bucket>", FORM)),
        "InvalidS3DestinationBucket",
    ),
    ("no account", whole(where=target(BUCKET, FORM, "<AccountId>12</AccountId>")), "InvalidArgument"),
    ("a long prefix", whole(where=target(BUCKET, FORM, f"<Prefix>{'x' * 801}</Prefix>")), "InvalidArgument"),
    ("a long filter", whole(more=f"<Filter><Prefix>{'x' * 1025}</Prefix></Filter>"), "InvalidArgument"),
    ("a filter without a prefix", whole(more="<Filter/>"), "MalformedXML"),
    ("a filter by a tag", whole(more="<Filter><Tag>x</Tag></Filter>"), "MalformedXML"),
    ("an unknown field", whole(more="<OptionalFields><Field>Colour</Field></OptionalFields>"), "MalformedXML"),
    (
        "a field twice",
        whole(more="<OptionalFields><Field>Size</Field><Field>Size</Field></OptionalFields>"),
        "MalformedXML",
    ),
    ("no field", whole(more="<OptionalFields><Other>Size</Other></OptionalFields>"), "MalformedXML"),
    ("no encryption", whole(where=target(BUCKET, FORM, ENCRYPTED.format(""))), "MalformedXML"),
    (
        "two encryptions",
        whole(where=target(BUCKET, FORM, ENCRYPTED.format("<SSE-S3/><SSE-KMS><KeyId>k</KeyId></SSE-KMS>"))),
        "MalformedXML",
    ),
    ("no key", whole(where=target(BUCKET, FORM, ENCRYPTED.format("<SSE-KMS/>"))), "MalformedXML"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "code"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_a_wrong_document_gets_the_code_of_aws(wrong: bytes, code: str) -> None:
    with pytest.raises(S3Error) as caught:
        parse(wrong)
    assert caught.value.code == code


# --- when -------------------------------------------------------------------------------------------------------------


def test_a_report_is_due_at_once_then_each_day_or_sunday() -> None:
    daily = Inventory("d", True, "t", CSV, DAILY, True)
    weekly = replace(daily, frequency=WEEKLY)
    sunday = 3 * DAY_MS + 7 * 2900 * DAY_MS  # 4 January 1970 was one
    for report in (daily, weekly):
        assert is_due(report, 0, sunday, DAY_MS)
        assert not is_due(report, sunday, sunday + DAY_MS - 1, DAY_MS)
    assert is_due(daily, sunday, sunday + DAY_MS, DAY_MS)
    assert is_due(daily, sunday + DAY_MS - 1, sunday + DAY_MS, DAY_MS)
    assert not is_due(daily, sunday + DAY_MS, sunday, DAY_MS), "another gateway's clock is ahead"
    assert not is_due(weekly, sunday, sunday + 7 * DAY_MS - 1, DAY_MS)
    assert is_due(weekly, sunday, sunday + 7 * DAY_MS, DAY_MS)
    assert is_due(weekly, sunday + 6 * DAY_MS, sunday + 7 * DAY_MS, DAY_MS), "the first one was on a Saturday"
    assert is_due(weekly, sunday, sunday + 30 * DAY_MS, DAY_MS)
    assert is_due(daily, sunday, sunday + 5000, 5000), "a day of a test"


def test_a_report_of_a_clock_that_was_far_ahead_holds_up_no_other() -> None:
    daily = Inventory("d", True, "t", CSV, DAILY, True)
    now_ms = 20_000 * DAY_MS
    for report in (daily, replace(daily, frequency=WEEKLY)):
        assert is_due(report, now_ms + 400 * DAY_MS, now_ms, DAY_MS)
        assert not is_due(report, now_ms + DAY_MS, now_ms, DAY_MS), "clocks of two gateways at midnight"


# --- what -------------------------------------------------------------------------------------------------------------

OWNER = "f" * 64
SOURCE = Source(BucketRecord("photos", b"B" * 16, OWNER, 1, "active", 16, "eu-fr-1"), True, False, Rules(()), DAY_MS)


def listed(key: bytes, *, marker: bool = False, lock: Lock | None = None, version: str = "v") -> Listed:
    made = Version(version, 1_724_254_106_123, 5, OWNER, 1, b"c" * 16, b"", marker, b"", b"")
    printed = None if marker else SealedList("abc", "CRC32", "FULL_OBJECT")
    return Listed(key, Entry(Kept(7, lock), made), True, printed, None)


def lines(report: Inventory, *rows: Listed, source: Source = SOURCE) -> list[list[str]]:
    columns = columns_of(report)
    file = data_file(report)
    assert isinstance(file, CsvFile)
    file.add([row_of(columns, source, row) for row in rows])
    assert file.rows == len(rows)
    return list(csv.reader(io.StringIO(gzip.decompress(file.end()).decode())))


def test_a_line_has_every_value_in_quotation_marks_and_its_key_encoded() -> None:
    report = Inventory("d", True, "t", CSV, DAILY, False, fields=("Size", "LastModifiedDate"))
    columns = columns_of(report)
    file = CsvFile(columns)
    file.add([row_of(columns, SOURCE, listed('a "b"/+,\u00fc\n'.encode()))])
    text = gzip.decompress(file.end()).decode()
    assert text == '"photos","a%20%22b%22/%2B%2C%C3%BC%0A","5","2024-08-21T15:28:26.123Z"\n'
    assert unquote("a%20%22b%22/%2B%2C%C3%BC%0A") == 'a "b"/+,\u00fc\n'


def test_fields_that_do_not_apply_are_empty() -> None:
    fields = ("Size", "ETag", "StorageClass", "IsMultipartUploaded", "ObjectLockLegalHoldStatus", "ReplicationStatus")
    report = Inventory("d", True, "t", CSV, DAILY, True, fields=fields)
    marker, null = lines(report, listed(b"m", marker=True), listed(b"n", version="null"))
    assert marker[1:] == ["m", marker[2], "true", "true", "", "", "", "", "", ""]
    assert marker[2]
    assert null[1:] == ["n", "", "true", "false", "5", "abc", "STANDARD", "false", "", ""]


def test_a_lock_is_named_as_aws_documents_it() -> None:
    fields = ("ObjectLockRetainUntilDate", "ObjectLockMode", "ObjectLockLegalHoldStatus")
    report = Inventory("d", True, "t", CSV, DAILY, False, fields=fields)
    lockable = SOURCE._replace(lockable=True)
    kept, held, free = lines(
        report,
        listed(b"k", lock=Lock("COMPLIANCE", 1_800_000_000_000)),
        listed(b"h", lock=Lock(hold=True)),
        listed(b"f"),
        source=lockable,
    )
    assert kept[2:] == ["2027-01-15T08:00:00.000Z", "Compliance", "Off"]
    assert held[2:] == ["", "", "On"]
    assert free[2:] == ["", "", "Off"]


def test_schemas_are_those_of_aws_s_examples() -> None:
    """https://docs.aws.amazon.com/AmazonS3/latest/userguide/storage-inventory-location.html"""
    fields = ("ETag", "StorageClass", "LastModifiedDate", "Size", "IsMultipartUploaded")
    report = Inventory("d", True, "t", CSV, DAILY, True, fields=fields)
    assert schema_of(report) == (
        "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, LastModifiedDate, ETag, StorageClass,"
        " IsMultipartUploaded"
    )
    assert schema_of(replace(report, format=PARQUET)) == (
        "message s3.inventory { required binary bucket (UTF8); required binary key (UTF8); optional binary version_id"
        " (UTF8); optional boolean is_latest; optional boolean is_delete_marker; optional int64 size; optional int64"
        " last_modified_date (TIMESTAMP_MILLIS); optional binary e_tag (UTF8); optional binary storage_class (UTF8);"
        " optional boolean is_multipart_uploaded; }"
    )
    assert schema_of(Inventory("d", True, "t", CSV, DAILY, False)) == "Bucket, Key"
    names = [column.snake for column in OPTIONAL]
    assert "object_lock_retain_until_date" in names
    assert "intelligent_tiering_access_tier" in names


def test_the_manifest_names_each_file_and_its_checksum_comes_last() -> None:
    report = Inventory("daily", True, "target", CSV, DAILY, False, "lists")
    file = ListedFile(b"lists/photos/daily/data/0.csv.gz", 9, bytes(16))
    links, manifest, checksum = documents(report, "photos", 1_478_467_920_000, [file])
    assert links.key == b"lists/photos/daily/hive/dt=2016-11-06-21-32/symlink.txt"
    assert links.data == b"s3://target/lists/photos/daily/data/0.csv.gz"
    assert manifest.key == b"lists/photos/daily/2016-11-06T21-32Z/manifest.json"
    assert json.loads(manifest.data) == {
        "sourceBucket": "photos",
        "destinationBucket": "arn:aws:s3:::target",
        "version": "2016-11-30",
        "creationTimestamp": "1478467920000",
        "fileFormat": "CSV",
        "fileSchema": "Bucket, Key",
        "files": [{"key": file.key.decode(), "size": 9, "MD5checksum": "0" * 32}],
    }
    assert checksum.key == b"lists/photos/daily/2016-11-06T21-32Z/manifest.checksum"
    assert checksum.data == hashlib.md5(manifest.data).hexdigest().encode()
    assert next(iter(documents(replace(report, target_prefix=None), "photos", 0, []))).key.startswith(b"photos/daily/")


def test_parquet_has_the_types_of_the_schema() -> None:
    import pyarrow.parquet

    report = Inventory("d", True, "t", PARQUET, DAILY, True, fields=tuple(FIELDS))
    columns, file = columns_of(report), data_file(report)
    for start in range(0, 25_000, 1000):
        file.add([row_of(columns, SOURCE, listed(b"k%d" % number)) for number in range(start, start + 1000)])
    assert file.size > 0, "groups were written meanwhile"
    table = pyarrow.parquet.read_table(io.BytesIO(file.end()))
    assert table.num_rows == 25_000
    assert table.column_names == [column.snake for column in columns]
    first = table.slice(0, 1).to_pylist()[0]
    assert (first["bucket"], first["key"], first["size"], first["is_latest"]) == ("photos", "k0", 5, True)
    assert first["last_modified_date"].isoformat() == "2024-08-21T15:28:26.123000+00:00"
    assert first["replication_status"] is None
    assert not table.schema.field("key").nullable
    empty = data_file(report)
    assert pyarrow.parquet.read_table(io.BytesIO(empty.end())).num_rows == 0


def test_long_rows_of_parquet_wait_in_memory_for_less_long() -> None:
    """A thousand access control lists, as long as they get, have 18 MB."""
    import pyarrow.parquet

    report = Inventory("d", True, "t", PARQUET, DAILY, False, fields=("ObjectOwner",))
    file = data_file(report)
    for _ in range(3):
        file.add([["photos", "k", "x" * 18_000]] * 1000)
        assert file.size > 1000, "it is compressed"
    assert pyarrow.parquet.ParquetFile(io.BytesIO(file.end())).metadata.num_row_groups == 3
