"""The columns of an inventory, and the values of a version in them. Pure.

The names, their order and the values are AWS's; what does not apply is empty. The null version has no version id.
https://docs.aws.amazon.com/AmazonS3/latest/userguide/storage-inventory.html#storage-inventory-contents
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from storaged.objects.code.lifecycle import Rules, Subject, current_due
from storaged.objects.configuration.access import GROUPS, Acl, AclEntry
from storaged.objects.configuration.inventory import CSV, Inventory
from storaged.objects.encryption import CUSTOMER, KMS
from storaged.objects.inventory.listing import Listed
from storaged.objects.records import NULL_VERSION, BucketRecord
from storaged.s3.auth.acl import FULL, GROUP_URIS

TEXT: Final = "text"
INT: Final = "int"
TIME: Final = "time"
"""In milliseconds since 1970."""
FLAG: Final = "flag"

Value = str | int | bool | None

ACL_VERSION: Final = "2022-11-10"
"""Of the format of lists, which AWS's documentation calls their version.
https://docs.aws.amazon.com/AmazonS3/latest/userguide/objectacl.html"""

_WORD: Final = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


class Source(NamedTuple):
    """What the values depend on beside the version. ``enforced``: the bucket's owner owns all objects. ``lockable``:
    the bucket has Object Lock.
    """

    bucket: BucketRecord
    enforced: bool
    lockable: bool
    rules: Rules
    day_ms: int


class Column(NamedTuple):
    """``value``: of a version; ``opened``: it needs what is sealed in the record."""

    name: str
    kind: str
    value: Callable[[Source, Listed], Value]
    opened: bool = False
    required: bool = False

    @property
    def snake(self) -> str:
        """The name in Parquet: ``e_tag``, ``last_modified_date``."""
        return "e_tag" if self.name == "ETag" else _WORD.sub("_", self.name).lower()


def _nothing(source: Source, listed: Listed) -> Value:
    """No object here has such a state."""
    return None


def _version_id(source: Source, listed: Listed) -> Value:
    name = listed.entry.name
    return None if name == NULL_VERSION else name


def _size(source: Source, listed: Listed) -> Value:
    return listed.entry.version.size if listed.printed is not None else None


def _etag(source: Source, listed: Listed) -> Value:
    return listed.printed.etag if listed.printed is not None else None


def _storage_class(source: Source, listed: Listed) -> Value:
    return listed.printed.storage_class if listed.printed is not None else None


def _algorithm(source: Source, listed: Listed) -> Value:
    return listed.printed.algorithm or None if listed.printed is not None else None


def _multipart(source: Source, listed: Listed) -> Value:
    return listed.entry.version.multipart if listed.printed is not None else None


def _encryption(source: Source, listed: Listed) -> Value:
    if listed.opened is None:
        return None
    found = listed.opened.encryption
    return {"": "SSE-S3", KMS: "SSE-KMS", CUSTOMER: "SSE-C"}[found.kind if found is not None else ""]


def _bucket_key(source: Source, listed: Listed) -> Value:
    if listed.opened is None:
        return None
    found = listed.opened.encryption
    return "ENABLED" if found is not None and found.bucket_key else "DISABLED"


def _retained(source: Source, listed: Listed) -> Value:
    lock = listed.entry.kept.lock
    return lock.until_ms if lock is not None and lock.mode else None


def _lock_mode(source: Source, listed: Listed) -> Value:
    """AWS documents the values as ``Governance`` and ``Compliance``."""
    lock = listed.entry.kept.lock
    return lock.mode.capitalize() if lock is not None and lock.mode else None


def _hold(source: Source, listed: Listed) -> Value:
    """AWS documents the values as ``On`` and ``Off``."""
    lock = listed.entry.kept.lock
    if lock is not None and lock.hold:
        return "On"
    return "Off" if source.lockable and listed.printed is not None else None


def _owner(source: Source, listed: Listed) -> Value:
    return source.bucket.owner if source.enforced else listed.entry.version.owner or source.bucket.owner


def _acl(source: Source, listed: Listed) -> Value:
    """Base64 of a JSON object."""
    if listed.opened is None:
        return None
    sealed = listed.opened.meta.acl
    acl = Acl(sealed) if sealed is not None and not source.enforced else None
    entries = acl.entries if acl is not None else (AclEntry(str(_owner(source, listed)), FULL),)
    grants = [
        {"uri": GROUP_URIS[entry.grantee], "type": "Group", "permission": entry.permission}
        if entry.grantee in GROUPS
        else {"canonicalId": entry.grantee, "type": "CanonicalUser", "permission": entry.permission}
        for entry in entries
    ]
    found = {"version": ACL_VERSION, "status": "AVAILABLE", "grants": grants}
    return base64.b64encode(json.dumps(found, separators=(",", ":")).encode()).decode()


def _expires(source: Source, listed: Listed) -> Value:
    """When lifecycle ends a current version."""
    if listed.opened is None or not listed.latest:
        return None
    version, tags = listed.entry.version, listed.opened.meta.tags
    due = current_due(source.rules, Subject(listed.key, version.size, version.modified_ms, lambda: tags), source.day_ms)
    return due.day * source.day_ms if due is not None else None


def _text(name: str, value: Callable[[Source, Listed], Value], *, opened: bool = False) -> Column:
    return Column(name, TEXT, value, opened)


BEGINNING: Final = (
    Column("Bucket", TEXT, lambda source, _: source.bucket.name, required=True),
    Column("Key", TEXT, lambda _, listed: listed.key.decode("utf-8", "replace"), required=True),
)
OF_VERSIONS: Final = (
    _text("VersionId", _version_id),
    Column("IsLatest", FLAG, lambda _, listed: listed.latest),
    Column("IsDeleteMarker", FLAG, lambda _, listed: listed.entry.version.delete_marker),
)
OPTIONAL: Final = (
    Column("Size", INT, _size),
    Column("LastModifiedDate", TIME, lambda _, listed: listed.entry.version.modified_ms),
    _text("ETag", _etag),
    _text("StorageClass", _storage_class),
    Column("IsMultipartUploaded", FLAG, _multipart),
    _text("ReplicationStatus", _nothing),
    _text("EncryptionStatus", _encryption, opened=True),
    Column("ObjectLockRetainUntilDate", TIME, _retained),
    _text("ObjectLockMode", _lock_mode),
    _text("ObjectLockLegalHoldStatus", _hold),
    _text("IntelligentTieringAccessTier", _nothing),
    _text("BucketKeyStatus", _bucket_key, opened=True),
    _text("ChecksumAlgorithm", _algorithm),
    _text("ObjectAccessControlList", _acl, opened=True),
    _text("ObjectOwner", _owner),
    Column("LifecycleExpirationDate", TIME, _expires, opened=True),
    _text("ObjectLockEventHoldStatus", _nothing),
    _text("ObjectLockEventHoldDuration", _nothing),
    Column("IntelligentTieringReferenceDate", TIME, _nothing),
)
"""In this order, whatever the order of a configuration is. The last four are not in AWS's examples of a schema."""

FIELDS: Final = frozenset(column.name for column in OPTIONAL)


def columns_of(report: Inventory) -> tuple[Column, ...]:
    wanted = tuple(column for column in OPTIONAL if column.name in report.fields)
    return BEGINNING + (OF_VERSIONS if report.all_versions else ()) + wanted


def row_of(columns: Sequence[Column], source: Source, listed: Listed) -> list[Value]:
    return [column.value(source, listed) for column in columns]


_PARQUET: Final = {
    TEXT: ("binary", " (UTF8)"),
    INT: ("int64", ""),
    TIME: ("int64", " (TIMESTAMP_MILLIS)"),
    FLAG: ("boolean", ""),
}


def schema_of(report: Inventory) -> str:
    """``fileSchema`` of the manifest."""
    columns = columns_of(report)
    if report.format == CSV:
        return ", ".join(column.name for column in columns)
    shown = []
    for column in columns:
        kind, logical = _PARQUET[column.kind]
        shown.append(f"{'required' if column.required else 'optional'} {kind} {column.snake}{logical};")
    return f"message s3.inventory {{ {' '.join(shown)} }}"
