"""The names of the objects of an inventory, and its manifests, as AWS lays them out. Pure.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/storage-inventory-location.html
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple

from storaged.objects.configuration.inventory import Inventory
from storaged.s3.auth.policy import ARN_PREFIX
from storaged.s3.inventory.columns import schema_of

VERSION: Final = "2016-11-30"
"""Of the format of manifests."""


class ListedFile(NamedTuple):
    """A data file, as the manifest names it."""

    key: bytes
    size: int
    md5: bytes


class Document(NamedTuple):
    """An object to be put."""

    key: bytes
    data: bytes
    content_type: str


def folder_of(report: Inventory, source: str) -> str:
    prefix = f"{report.target_prefix}/" if report.target_prefix else ""
    return f"{prefix}{source}/{report.id}"


def data_key(report: Inventory, source: str, name: str) -> bytes:
    return f"{folder_of(report, source)}/data/{name}".encode()


def manifest_key(report: Inventory, source: str, began_ms: int) -> bytes:
    return f"{folder_of(report, source)}/{_moment(began_ms):%Y-%m-%dT%H-%MZ}/manifest.json".encode()


def documents(report: Inventory, source: str, began_ms: int, files: Sequence[ListedFile]) -> Iterable[Document]:
    """In the order in which they are put: the checksum comes last, when all others are there."""
    began = _moment(began_ms)
    folder, key = folder_of(report, source), manifest_key(report, source, began_ms)
    links = "\n".join(f"s3://{report.target}/{file.key.decode()}" for file in files)
    yield Document(f"{folder}/hive/dt={began:%Y-%m-%d-%H-%M}/symlink.txt".encode(), links.encode(), "text/plain")
    manifest = {
        "sourceBucket": source,
        "destinationBucket": ARN_PREFIX + report.target,
        "version": VERSION,
        "creationTimestamp": str(began_ms),
        "fileFormat": report.format,
        "fileSchema": schema_of(report),
        "files": [{"key": file.key.decode(), "size": file.size, "MD5checksum": file.md5.hex()} for file in files],
    }
    text = json.dumps(manifest, indent=2).encode()
    yield Document(key, text, "application/json")
    checksum = hashlib.md5(text, usedforsecurity=False).hexdigest().encode()
    yield Document(key.removesuffix(b".json") + b".checksum", checksum, "text/plain")


def _moment(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)
