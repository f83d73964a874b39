"""The inventories of a bucket.

Every refusal has the code that AWS sends, and changes nothing. ORC is not implemented, and Parquet needs an extra.
Whether the target lets the service write is not asked here, as on AWS: its policy may come later. ``status`` says when
it does not.

https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutBucketInventoryConfiguration.html
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

from storaged import errors
from storaged.objects.configuration.inventory import (
    CSV,
    DAILY,
    INVENTORY,
    PARQUET,
    WEEKLY,
    Inventories,
    Inventory,
    InventoryEncryption,
)
from storaged.objects.encryption import KMS, S3
from storaged.objects.names import bucket_name_possible
from storaged.s3 import xml
from storaged.s3.auth.policy import ARN_PREFIX
from storaged.s3.context import Front
from storaged.s3.encryption import kms_arn
from storaged.s3.inventory.columns import FIELDS
from storaged.s3.inventory.files import PYARROW, has_parquet
from storaged.s3.ops.configuration import NamedRow

PREFIX_BYTES_MAX: Final = 1024
TARGET_PREFIX_BYTES_MAX: Final = 800
"""A key has at most 1,024 bytes, and what follows the prefix takes up to 190 of them."""
_ACCOUNT: Final = re.compile("[0-9]{12}")
_ORC: Final = "ORC"
_VERSIONS: Final = {"All": True, "Current": False}
_NEEDED: Final = frozenset({"Destination", "IsEnabled", "Id", "IncludedObjectVersions", "Schedule"})
_ROOT: Final = _NEEDED | {"Filter", "OptionalFields"}
_TARGET: Final = frozenset({"AccountId", "Bucket", "Format", "Prefix", "Encryption"})


def parse(document: bytes) -> Inventory:
    """Raises MalformedXML, InvalidArgument, InvalidS3DestinationBucket."""
    parts = _parts(xml.parse(document, "InventoryConfiguration"), _ROOT, _NEEDED)
    enabled, versions = _text(parts["IsEnabled"]), _text(parts["IncludedObjectVersions"])
    if enabled not in ("true", "false") or versions not in _VERSIONS:
        raise errors.MalformedXML()
    frequency = parts["Schedule"].fields({"Frequency"}).get("Frequency")
    if frequency not in (DAILY, WEEKLY):
        raise errors.MalformedXML()
    target = _parts(
        _parts(parts["Destination"], {"S3BucketDestination"}, {"S3BucketDestination"})["S3BucketDestination"],
        _TARGET,
        {"Bucket", "Format"},
    )
    kind = _text(target["Format"])
    if kind not in (CSV, PARQUET, _ORC):
        raise errors.MalformedXML()
    return Inventory(
        _text(parts["Id"]),
        enabled == "true",
        _bucket(_text(target["Bucket"])),
        kind,
        frequency,
        _VERSIONS[versions],
        _prefix(target, TARGET_PREFIX_BYTES_MAX),
        _account(target),
        _prefix(_parts(parts["Filter"], {"Prefix"}, {"Prefix"}), PREFIX_BYTES_MAX) if "Filter" in parts else None,
        _fields(parts.get("OptionalFields")),
        _encryption(target.get("Encryption")),
    )


def _parts(node: xml.Node, known: Collection[str], needed: Collection[str]) -> dict[str, xml.Node]:
    """The children of an element, each at most once. Raises MalformedXML."""
    found = {child.name: child for child in node.children}
    if len(found) != len(node.children) or found.keys() - set(known) or set(needed) - found.keys():
        raise errors.MalformedXML()
    return found


def _text(node: xml.Node) -> str:
    if node.children:
        raise errors.MalformedXML()
    return node.text


def _bucket(arn: str) -> str:
    """The name of the bucket. Raises InvalidS3DestinationBucket."""
    name = arn.removeprefix(ARN_PREFIX)
    if name == arn or not bucket_name_possible(name):
        names_account = arn.startswith("arn:aws:s3:") and not arn.startswith(ARN_PREFIX)
        raise errors.InvalidS3DestinationBucket(
            "Bucket ARN should not specify a namespace." if names_account else "Invalid bucket ARN."
        )
    return name


def _prefix(parts: Mapping[str, xml.Node], bytes_max: int) -> str | None:
    if "Prefix" not in parts:
        return None
    found = _text(parts["Prefix"])
    if len(found.encode()) > bytes_max:
        raise errors.InvalidArgument(f"This Prefix has at most {bytes_max} bytes.", ArgumentName="Prefix")
    return found


def _account(parts: Mapping[str, xml.Node]) -> str:
    found = _text(parts["AccountId"]) if "AccountId" in parts else ""
    if "AccountId" in parts and not _ACCOUNT.fullmatch(found):
        raise errors.InvalidArgument(
            "The account of the destination is not valid.", ArgumentName="AccountId", ArgumentValue=found[:200]
        )
    return found


def _fields(node: xml.Node | None) -> tuple[str, ...]:
    if node is None:
        return ()
    found = tuple(map(_text, node.children))
    if any(child.name != "Field" for child in node.children) or len(set(found)) != len(found) or set(found) - FIELDS:
        raise errors.MalformedXML()
    return found


def _encryption(node: xml.Node | None) -> InventoryEncryption | None:
    if node is None:
        return None
    parts = _parts(node, {"SSE-S3", "SSE-KMS"}, ())
    if len(parts) != 1:
        raise errors.MalformedXML()
    if "SSE-S3" in parts:
        if parts["SSE-S3"].children:
            raise errors.MalformedXML()
        return InventoryEncryption(S3)
    key_id = parts["SSE-KMS"].fields({"KeyId"}).get("KeyId", "")
    if not key_id:
        raise errors.MalformedXML()
    return InventoryEncryption(KMS, key_id)


def content(value: Inventory) -> str:
    fields = "".join(xml.element("Field", name) for name in value.fields)
    return "".join(
        (
            xml.element("Id", value.id),
            xml.boolean("IsEnabled", value.enabled),
            f"<Filter>{xml.element('Prefix', value.prefix)}</Filter>" if value.prefix is not None else "",
            f"<Destination><S3BucketDestination>{_shown_target(value)}</S3BucketDestination></Destination>",
            f"<Schedule>{xml.element('Frequency', value.frequency)}</Schedule>",
            xml.element("IncludedObjectVersions", "All" if value.all_versions else "Current"),
            f"<OptionalFields>{fields}</OptionalFields>" if fields else "",
        )
    )


def _shown_target(value: Inventory) -> str:
    encryption = ""
    if value.encryption is not None:
        kind = "<SSE-S3></SSE-S3>"
        if value.encryption.algorithm == KMS:
            kind = f"<SSE-KMS>{xml.element('KeyId', value.encryption.key_id)}</SSE-KMS>"
        encryption = f"<Encryption>{kind}</Encryption>"
    return "".join(
        (
            xml.element("Format", value.format),
            xml.optional("AccountId", value.account),
            xml.element("Bucket", ARN_PREFIX + value.target),
            xml.element("Prefix", value.target_prefix) if value.target_prefix is not None else "",
            encryption,
        )
    )


def verify(front: Front, value: Inventory) -> None:
    """Raises NotImplemented, KMSNotFound."""
    if value.format == _ORC:
        raise errors.NotImplemented("Inventories as ORC are not implemented: CSV and Parquet are.")
    if value.format == PARQUET and not has_parquet():
        raise errors.NotImplemented(PYARROW)
    if value.encryption is not None and value.encryption.algorithm == KMS:
        kms_arn(front, value.encryption.key_id)


BUCKET_INVENTORIES: Final = NamedRow(
    INVENTORY,
    "InventoryConfiguration",
    lambda found: found.reports,
    lambda reports: Inventories(tuple(reports)),
    parse,
    content,
    verify,
)
